"""Hub data sets, by local folders in their formats and a stand-in for the hub: columns, splits, streams, token ids, one-line errors."""

from __future__ import annotations

import json
import warnings

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import zstandard

from decomp_bench.config import DataConfig
from decomp_bench.data import hub
from decomp_bench.data.corpus import open_corpus, verify_disjoint
from decomp_bench.data.sources import open_source
from decomp_bench.errors import UserError
from decomp_bench.runs import _absolute
from tests.conftest import tiny_tokenizer

WORDS = ["the cat", "a dog", "runs", "sleeps", "on the mat", "and sings", "to a fox", "by night"]


def stories(count: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (12,), generator=generator)).capitalize() for _ in range(count)]


def parquet(folder, **splits: list) -> str:
    """A folder as the hub lays one out."""
    folder.mkdir(exist_ok=True)
    for split, values in splits.items():
        pd.DataFrame({"story": values, "topic": "x"}).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return f"hf:{folder}"


def by_split(config: DataConfig) -> dict[str, list]:
    found: dict[str, list] = {"train": [], "validation": [], "test": []}
    for record in open_corpus(config).read():
        found[record.split].append(record.content)
    return found


def test_every_layout_of_a_folder_gives_the_same_documents(tmp_path):
    texts = stories(60)
    sources = [parquet(tmp_path / "parquet", train=texts)]
    (tmp_path / "jsonl").mkdir()
    (tmp_path / "jsonl" / "train.jsonl").write_text("".join(json.dumps({"story": text}) + "\n" for text in texts))
    made = datasets.Dataset.from_dict({"story": texts})
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "saved_splits")
    sources += [f"hf:{tmp_path / name}" for name in ("jsonl", "saved", "saved_splits")]
    found = [by_split(DataConfig(source=source, column="story")) for source in sources]
    assert all(one == found[0] for one in found)
    assert sorted(text for split in found[0].values() for text in split) == sorted(texts)
    assert len(found[0]["train"]) > 40
    assert open_corpus(DataConfig(source=sources[0], column="story")).name == "parquet"


def test_a_stream_takes_documents_in_an_order_of_the_data_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.2)  # four seconds at the end of every stream
    source = parquet(tmp_path / "d", train=stories(80))

    def first(seed: int, **more) -> list[str]:
        config = DataConfig(source=source, column="story", documents=20, seed=seed, **more)
        return [str(record.content) for record in open_corpus(config).read()]

    assert sorted(first(0)) == sorted(stories(80)[:20])
    assert first(0, streaming=True) == first(0, streaming=True) != first(1, streaming=True)
    assert len(first(1, streaming=True)) == 20
    keys = [open_corpus(DataConfig(source=source, seed=seed, streaming=streaming)).key for seed in (0, 1) for streaming in (False, True)]
    assert keys[0] == keys[2]  # without a stream the seed decides no document
    assert keys[1] != keys[3]


def test_given_splits_are_used_and_share_no_document_with_train(tmp_path):
    train, validation, test = stories(50, 1), stories(10, 2), stories(10, 3)
    source = parquet(tmp_path / "d", train=[*train, *test[:3], validation[0]], validation=[*validation, test[0]], test=test)
    config = DataConfig(source=source, column="story", validation_split="validation", test_split="test")
    with pytest.warns(UserWarning, match="dropped: 1 from validation and 4 from train") as caught:
        found = by_split(config)
    assert len(caught) == 1
    assert found == {"train": train, "validation": validation, "test": test}
    with pytest.warns(UserWarning, match="dropped: 3 from train"):
        cut = by_split(config.model_copy(update={"validation_split": None}))
    assert cut["test"] == test
    assert cut["validation"]
    assert sorted(cut["train"] + cut["validation"]) == sorted([*train, validation[0]])


def test_splits_that_share_a_document_are_refused():
    verify_disjoint({"train": {"a"}, "validation": {"b"}, "test": {"c"}})
    with pytest.raises(UserError, match="1 documents of the validation split are in the test split too"):
        verify_disjoint({"train": {"a"}, "validation": {"b"}, "test": {"b"}})


@pytest.fixture
def standin(monkeypatch):
    """load_dataset as the hub would answer it; the calls it got."""
    calls: list[dict] = []

    def load(name, subset=None, **options):
        calls.append({"name": name, "subset": subset, **options})
        tokens = [[1, 2, 3] * 20 for _ in range(30)]
        columns = {"story": stories(30), "text": stories(30, 1), "input_ids": tokens}
        made = datasets.Dataset.from_dict(columns)
        return made.to_iterable_dataset() if options["streaming"] else made

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    return calls


def test_known_data_sets_work_by_name(standin):
    simple = [str(r.content) for r in open_corpus(DataConfig(source="hf:SimpleStories/SimpleStories")).read()]
    assert sorted(simple) == sorted(text.lower() for text in stories(30))
    for name in ("roneneldan/TinyStories", "monology/pile-uncopyrighted", "Skylion007/openwebtext"):
        found = [str(r.content) for r in open_corpus(DataConfig(source=f"hf:{name}")).read()]
        assert sorted(found) == sorted(stories(30, 1))
    tokens = list(open_corpus(DataConfig(source="hf:danbraunai/pile-uncopyrighted-tok-shuffled")).read())
    assert tokens[0].content == [1, 2, 3] * 20
    assert all(call["streaming"] and call["split"] == "train" for call in standin)
    assert len(standin) == 5


def test_name_subset_revision_and_split_reach_the_hub(standin):
    config = DataConfig(source="hf:someone/texts@refs/convert/parquet", subset="en", split="train[:5%]", lower=True)
    assert next(iter(open_corpus(config).read())).content == stories(30, 1)[0].lower()
    assert standin == [
        {"name": "someone/texts", "subset": "en", "split": "train[:5%]", "revision": "refs/convert/parquet", "streaming": False}
    ]


def test_token_ids_are_cut_to_rows_as_they_are_and_checked(lm, tmp_path):
    target, _ = lm
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 20, (40,), generator=generator).tolist() for _ in range(120)]
    (tmp_path / "tok").mkdir()
    pd.DataFrame({"input_ids": [*ids, [3] * 5]}).to_parquet(tmp_path / "tok" / "train.parquet")
    config = DataConfig(source=f"hf:{tmp_path / 'tok'}", tokenised=True)
    source = open_source(target, config)
    rows = [row.tolist() for split in ("train", "validation", "test") for row in source.rows(split).tokens]
    assert sorted(rows) == sorted(row[: source.context] for row in ids)  # the short one makes no row
    with pytest.raises(UserError, match="holds token ids, not text"):
        source.documents("train")
    with pytest.raises(UserError, match=r"leave data\.packing out"):
        open_source(target, config.model_copy(update={"packing": "packed"})).rows("train")
    pd.DataFrame({"input_ids": [*ids, [50_000] * 30]}).to_parquet(tmp_path / "tok" / "train.parquet")
    with pytest.raises(UserError, match="token id 50000, but the model's vocabulary is 0 to 30: the data set was tokenised"):
        open_source(target, config).rows("train")


def test_token_ids_of_another_tokenizer_are_refused_where_it_is_known(lm, tmp_path):
    target, _ = lm
    pd.DataFrame({"input_ids": [[1, 2, 3] * 12 + [i % 20, i // 20] for i in range(100)]}).to_parquet(tmp_path / "train.parquet")
    config = DataConfig(source=f"hf:{tmp_path}", tokenised=True)
    other = tiny_tokenizer()
    other.add_tokens(["xyz"])
    for name, tokenizer in (("same", tiny_tokenizer()), ("other", other)):
        tokenizer.save_pretrained(tmp_path.parent / f"{tmp_path.name}-{name}")
        (tmp_path / "sae_lens.json").write_text(json.dumps({"tokenizer_name": str(tmp_path.parent / f"{tmp_path.name}-{name}")}))
        if name == "same":
            assert len(open_source(target, config).rows("train").length)
        else:
            with pytest.raises(UserError, match=r"was tokenised with .*whose vocabulary is not the target's"):
                open_source(target, config).rows("train")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"column": "body"}, r"no column 'body'; it has story, topic: set data\.column"),
        ({"split": "dev"}, r"\(split 'dev'\): Bad split"),
        ({"subset": "en"}, "subset 'en'"),
        ({"tokenised": True, "column": "story"}, "holds text: leave data.tokenised out"),
        ({"source": "hf:/no/such/folder"}, "no folder /no/such/folder"),
        ({"source": "hf:"}, "^data.source=hf:NAME takes a local data set folder or a hub name"),
        ({"source": "a.txt", "subset": "en"}, r"data\.subset: for hub data sets only"),
        ({"source": "pydocs", "documents": 5}, r"data\.documents: the embedded corpus is taken as it is"),
    ],
)
def test_what_does_not_fit_is_one_line_that_names_the_fix(tmp_path, change, says):
    config = DataConfig(source=parquet(tmp_path / "d", train=stories(20)), column="story").model_copy(update=change)
    with pytest.raises(UserError, match=says) as error:
        list(open_corpus(config).read())
    assert "\n" not in str(error.value)


def test_a_column_of_ids_read_as_text_says_so(tmp_path):
    with pytest.raises(UserError, match=r"for token ids set data\.tokenised=true"):
        list(open_corpus(DataConfig(source=parquet(tmp_path / "d", train=[[1, 2], [3, 4]]), column="story")).read())


def test_a_data_set_of_compressed_files_is_read(tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two"))
    (tmp_path / "train.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    assert sorted(str(record.content) for record in open_corpus(DataConfig(source=f"hf:{tmp_path}")).read()) == ["one", "two"]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("forbidden", [True, False])
def test_offline_fails_at_once_and_says_what_to_give(monkeypatch, streaming, forbidden):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", forbidden)
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    monkeypatch.setattr("time.sleep", lambda _seconds: pytest.fail("it waits to try again"))
    config = DataConfig(source="hf:SimpleStories/SimpleStories", streaming=streaming, subset="en")
    with pytest.raises(UserError) as error:
        list(open_corpus(config).read())
    assert "\n" not in str(error.value)
    for part in ("'SimpleStories/SimpleStories'", "split 'train', subset 'en'", "data.source=hf:FOLDER"):
        assert part in str(error.value)


def test_rows_once_made_need_no_hub(lm, standin, monkeypatch):
    monkeypatch.setattr(hub, "STREAMED", 29)
    target, _ = lm
    config = DataConfig(source="hf:SimpleStories/SimpleStories")
    made = open_source(target, config).rows("train")
    monkeypatch.setattr(datasets, "load_dataset", None)
    again = open_source(target, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(again.rows("train").tokens, made.tokens)
    assert again.name == "SimpleStories/SimpleStories"


def test_a_run_config_finds_its_data_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parquet(tmp_path / "d", train=stories(3))
    sources = ["hf:d", "hf:SimpleStories/SimpleStories", "pydocs", "a.txt", "x/*.jsonl"]
    assert [_absolute(DataConfig(source=source)).source for source in sources] == [
        f"hf:{tmp_path}/d", "hf:SimpleStories/SimpleStories", "pydocs", f"{tmp_path}/a.txt", f"{tmp_path}/x/*.jsonl",
    ]  # fmt: skip
