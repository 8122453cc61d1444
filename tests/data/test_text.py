"""Local text: rows, splits, and one line for everything that can be wrong."""

from __future__ import annotations

import gzip
import hashlib
import json

import numpy as np
import pandas as pd
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from decomp_bench.config import DataConfig
from decomp_bench.data.corpus import open_corpus
from decomp_bench.data.documents import Document
from decomp_bench.data.local import read_documents
from decomp_bench.data.sources import open_source
from decomp_bench.data.text import SHORTEST_ROW, Tokens, packed_rows, split_of, to_rows
from decomp_bench.errors import UserError
from decomp_bench.targets.base import places_in_documents
from tests.conftest import tiny_tokenizer


@given(st.text(min_size=1))
def test_a_name_falls_into_one_split_wherever_it_is_asked(name):
    assert split_of(name) == split_of(name)
    assert split_of(name) in ("train", "validation", "test")


def test_shares_of_the_splits():
    found = [split_of(str(i)) for i in range(4000)]
    assert found.count("test") / 4000 == pytest.approx(0.10, abs=0.02)
    assert found.count("validation") / 4000 == pytest.approx(0.05, abs=0.015)


def written(folder, texts) -> dict[str, str]:
    """The same texts as a file of every kind; a column `other` stands beside them."""
    records = [{"text": text, "other": "x"} for text in texts]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "a.jsonl").write_text(lines)
    (folder / "lines.json").write_text(lines)
    (folder / "list.json").write_text(json.dumps(records))
    (folder / "plain.json").write_text(json.dumps(texts))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    pd.DataFrame(records).to_parquet(folder / "a.parquet")
    pd.DataFrame(records).to_csv(folder / "a.csv", index=False)
    pd.DataFrame(records).to_csv(folder / "b.csv.gz", index=False)
    return {path.name: str(path) for path in folder.iterdir()}


def test_the_same_text_in_every_format(tmp_path):
    texts = ["one story,\nwith a comma", "another \u2028 story", "007", "nan"]
    found = {name: [d.text for d in read_documents(path, "text")] for name, path in written(tmp_path, texts).items()}
    assert len(found) == 9
    assert all(value == texts for value in found.values()), found
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    assert [d.text for d in read_documents(str(tmp_path / "a.txt"), "text")] == ["\n\n".join(texts)]


def test_folders_and_globs(tmp_path, monkeypatch):
    written(tmp_path, ["one", "two", "three"])
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "more.jsonl").write_text('{"text": "four"}\n')
    assert len(read_documents(str(tmp_path), "text")) == 6 * 3 + 1  # a .json file is named itself
    assert len(read_documents(str(tmp_path / "*.json*"), "text")) == 6 * 3
    assert [d.text for d in read_documents(str(tmp_path / "**" / "more.jsonl"), "text")] == ["four"]
    monkeypatch.setenv("PLACE", str(tmp_path))
    assert [d.label for d in read_documents("$PLACE/b.jsonl.gz", "text")] == ["b", "b", "b"]
    assert open_corpus(DataConfig(source=str(tmp_path / "*.jsonl"))).name == tmp_path.name
    with pytest.raises(UserError, match="no data at"):
        read_documents(str(tmp_path / "*.nothing"), "text")


def test_empty_documents_are_skipped_and_counted_and_limits_and_case_hold(tmp_path):
    texts = ["One", "", None, "  ", "Two", "Three"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = str(tmp_path / "a.jsonl")
    with pytest.warns(UserWarning, match="3 of 6 documents are empty"):
        assert [record.content for record in open_corpus(DataConfig(source=source)).read()] == ["One", "Two", "Three"]
    limited = open_corpus(DataConfig(source=source, documents=5, lower=True))
    with pytest.warns(UserWarning, match="3 of 5"):
        assert [record.content for record in limited.read()] == ["one", "two"]


def test_the_key_of_a_corpus_follows_its_files_and_what_is_read_of_them(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    keys = [open_corpus(DataConfig(source=str(tmp_path / "a.txt"), lower=lower)).key for lower in (None, True)]
    (tmp_path / "a.txt").write_text("other text")
    keys.append(open_corpus(DataConfig(source=str(tmp_path / "a.txt"))).key)
    assert len({json.dumps(key) for key in keys}) == 3


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(16, 40))
def test_packed_rows_are_the_documents_one_after_another(sizes, context):
    tokens, stream = Tokens(), []
    for i, size in enumerate(sizes):
        tokens.add(str(i), "x", [i + 1] * size)
    for index, i in enumerate(sorted(range(len(sizes)), key=lambda i: hashlib.sha256(str(i).encode()).hexdigest())):
        stream += [(i + 1, index)] * sizes[i] + [(0, index)]  # a separator belongs to the document that it ends
    rows = packed_rows(tokens, context, 0)
    found = [list(zip(ids, origin, strict=True)) for ids, origin in zip(rows.tokens.tolist(), rows.origin.tolist(), strict=True)]
    assert sorted(found) == sorted(stream[i * context : (i + 1) * context] for i in range(len(stream) // context))
    assert rows.length.tolist() == [context] * len(found)
    assert rows.doc.tolist() == list(range(len(found)))  # each row is a block of the bootstrap


def test_packing_reaches_the_source_and_its_batches(lm):
    target, source = lm
    packed_source = open_source(target, source.config.model_copy(update={"packing": "packed"}))
    batch = packed_source.batch("test", np.arange(4))
    assert (batch.length == packed_source.context).all()
    assert batch.doc.tolist() == [0, 1, 2, 3]
    assert packed_source.documents_in("test", 4) == 4
    assert packed_source.hash != source.hash
    again = open_source(target, packed_source.config).rows("test")  # from the cache
    assert np.array_equal(again.origin, packed_source.rows("test").origin)


def test_confined_rows_are_packed_ones_that_count_as_other_data(lm):
    target, source = lm
    packed, confined = (open_source(target, source.config.model_copy(update={"packing": name})) for name in ("packed", "confined"))
    assert target.separator == target.tokenizer.eos_token_id
    assert np.array_equal(packed.rows("test").tokens, confined.rows("test").tokens)
    assert packed.hash != confined.hash
    assert packed.token_hash("test", 4) != confined.token_hash("test", 4)
    open_source(target, source.config)
    assert target.separator is None, "another source of the same target crosses documents again"


@given(st.lists(st.integers(0, 2), min_size=1, max_size=20))
def test_places_start_again_after_each_separator(tokens):
    expected, place = [], 0
    for token in tokens:
        expected.append(place)
        place = 0 if token == 0 else place + 1
    assert places_in_documents(torch.tensor([tokens]), 0).tolist() == [expected]


def test_a_model_that_sees_across_documents_is_refused(lm, monkeypatch):
    target, source = lm
    monkeypatch.setattr("decomp_bench.targets.base.places_in_documents", lambda x, _separator: torch.arange(x.shape[1]).repeat(len(x), 1))
    with pytest.raises(UserError, match=r"cannot be confined to documents: set data\.packing=packed or none"):
        open_source(target, source.config.model_copy(update={"packing": "confined"}))
    assert target.separator is None


def test_ids_beyond_the_vocabulary_are_one_line(lm, monkeypatch):
    target, source = lm
    monkeypatch.setattr("decomp_bench.data.sources._vocabulary", lambda _target: 5)
    with pytest.raises(UserError, match="vocabulary is 0 to 4: give the model its own tokenizer") as error:
        open_source(target, source.config).rows("train")
    assert "\n" not in str(error.value)


def test_rows_never_mix_documents_and_lose_nothing():
    tokenizer = tiny_tokenizer()
    documents = [Document(str(i), "x", "the cat sat on a mat. " * (i + 1)) for i in range(5)]
    rows = to_rows(documents, tokenizer, 24, "train")
    assert (rows.tokens[:, 0] == tokenizer.bos_token_id).all()
    for index, name in enumerate(rows.documents):
        text = next(d.text for d in documents if d.name == name)
        mine = [row[1:length] for row, length, doc in zip(rows.tokens, rows.length, rows.doc, strict=True) if doc == index]
        decoded = [tokenizer.decode(part).replace(" ", "") for part in mine]
        whole = text.replace(" ", "")
        assert all(part in whole for part in decoded)
        assert len(text) - sum(len(part) for part in mine) < SHORTEST_ROW
    assert rows.first(30).length.sum() - len(rows.first(30).length) >= 30


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        (None, "no.jsonl", "no data at"),
        ("", "empty.jsonl", "no text in"),
        ("{broken", "broken.jsonl", "cannot read"),
        ('{"story": "x"}', "other.jsonl", "no key 'text'; it has story: set data.column"),
        ("x", "a.doc", "data.source takes"),
        ("story\nx", "a.csv", "no column 'text'; it has story: set data.column"),
        ("[1, 2]", "a.json", "has no key 'text'; it has a int"),
        ("x", "a.jsonl.gz", "cannot read"),
        ("not parquet", "a.parquet", "cannot read"),
    ],
)
def test_bad_data_is_one_line_that_names_the_fix(tmp_path, content, name, says):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says) as error:
        read_documents(str(tmp_path / name), "text")
    assert "\n" not in str(error.value)


def test_too_little_text_is_one_line(lm, tmp_path):
    (tmp_path / "short.jsonl").write_text('{"text": "a cat"}\n')
    with pytest.raises(UserError, match="no row of at least"):
        open_source(lm[0], DataConfig(source=str(tmp_path / "short.jsonl"))).rows("train")


def test_a_target_without_data_says_how_to_give_some(lm):
    with pytest.raises(UserError, match=r"data\.source=FILE"):
        open_source(lm[0], DataConfig())


def test_splits_share_no_document(lm):
    _, source = lm
    names = {split: set(source.rows(split).documents) for split in ("train", "validation", "test")}
    assert not names["train"] & names["test"]
    assert not names["train"] & names["validation"]
    assert not names["validation"] & names["test"]
    assert all(names.values())


def test_token_hash_follows_tokens(lm):
    _, source = lm
    assert source.token_hash("test", 3) != source.token_hash("test", 4)
    assert source.token_hash("test", 3) == open_source(lm[0], source.config).token_hash("test", 3)
    assert np.array_equal(source.batch("test", np.array([0])).x[0].numpy()[:5], source.rows("test").tokens[0][:5])
