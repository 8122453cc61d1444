"""Local text: rows, splits, and one line for everything that can be wrong."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decomp_bench.config import DataConfig
from decomp_bench.data.documents import Document
from decomp_bench.data.sources import open_source
from decomp_bench.data.text import SHORTEST_ROW, read_documents, split_of, to_rows
from decomp_bench.errors import UserError
from tests.conftest import tiny_tokenizer


@given(st.text(min_size=1))
def test_a_name_falls_into_one_split_wherever_it_is_asked(name):
    assert split_of(name) == split_of(name)
    assert split_of(name) in ("train", "validation", "test")


def test_shares_of_the_splits():
    found = [split_of(str(i)) for i in range(4000)]
    assert found.count("test") / 4000 == pytest.approx(0.10, abs=0.02)
    assert found.count("validation") / 4000 == pytest.approx(0.05, abs=0.015)


def test_the_same_text_in_every_format(tmp_path):
    texts = ["one story", "another story", "a third"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    pd.DataFrame({"text": texts}).to_parquet(tmp_path / "a.parquet")
    names = {kind: [d.name for d in read_documents(str(tmp_path / f"a.{kind}"), "text")] for kind in ("jsonl", "parquet")}
    assert names["jsonl"] == names["parquet"]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    assert [d.text for d in read_documents(str(tmp_path / "a.txt"), "text")] == ["\n\n".join(texts)]
    assert len(read_documents(str(tmp_path), "text")) == 7


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
        ('{"story": "x"}', "other.jsonl", "no key 'text': set data.column"),
        ("x", "a.csv", "data.source takes"),
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
