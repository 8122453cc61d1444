"""The embedded target: a tiny training end to end, and the committed folders against their records."""

import json
import sysconfig
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from decomp_bench.data import pydocs
from decomp_bench.data.documents import Document
from decomp_bench.data.text import to_rows
from decomp_bench.targets import ASSETS
from decomp_bench.targets.card import card
from decomp_bench.targets.muon import orthogonalised
from decomp_bench.targets.ngrams import NGrams
from decomp_bench.targets.pydocs import STREAM, train_pydocs
from decomp_bench.targets.rows import Rows, rows_of
from decomp_bench.targets.sampling import entropy, read_stream, stream_rows
from decomp_bench.targets.training import Recipe, Schedule, cross_entropy, loss_of, new_model, plan, rates

TINY = Recipe(
    tokens=6_000, horizon=9_000, cooldown=3_000, vocab=300, hidden=32, layers=2, heads=2, intermediate=64, context=32, max_position=64,
    rows=8, window=4, evaluations=3, evaluation_rows=8, checkpoint_seconds=0,
)  # fmt: skip


def tiny_corpus() -> dict[str, list[Document]]:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    files = [(name, name, (stdlib / f"{name}.py").read_text()) for name in ("calendar", "functools", "shutil", "textwrap")]
    found = pydocs.merge(files)
    return {"train": found[:2], "validation": found[2:3], "test": found[3:]}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("tiny")
    return folder / "out", train_pydocs(folder / "out", work=folder / "work", recipe=TINY, corpus=tiny_corpus(), stream_tokens=500)


def test_a_tiny_training_writes_a_folder_that_transformers_loads(trained: tuple[Path, dict]) -> None:
    out, record = trained
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    text = "def f(x):\n    return 'naïve'"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    rows = rows_of(tiny_corpus()["validation"], tokenizer, TINY.context)
    assert cross_entropy(model, rows) == pytest.approx(record["cross_entropy"]["validation"]["model"], abs=1e-5)
    assert json.loads((out / "training.json").read_text()) == record
    curve = (out / "training_curve.csv").read_text().splitlines()
    assert curve[0] == "step,tokens,train_loss,validation_ce"
    assert len(curve) > TINY.evaluations
    assert float(curve[-1].split(",")[3]) < float(curve[1].split(",")[3]) - 0.5
    assert "pydocs-4l" in (out / "README.md").read_text()


def test_training_and_evaluation_cut_the_same_rows(trained: tuple[Path, dict]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    documents = tiny_corpus()["train"]
    ours, theirs = rows_of(documents, tokenizer, TINY.context), to_rows(documents, tokenizer, TINY.context, "train")
    assert sorted(ours.tokens.tolist()) == sorted(theirs.tokens.tolist())
    assert sorted(ours.lengths.tolist()) == sorted(theirs.length.tolist())


def test_a_killed_training_continues_to_the_same_weights_bit_for_bit(trained: tuple[Path, dict], tmp_path: Path) -> None:
    def stop(step: int, steps: int, info: dict) -> None:
        if step == steps // 2:
            raise KeyboardInterrupt

    common = {"work": tmp_path / "work", "recipe": TINY, "corpus": tiny_corpus(), "stream_tokens": 0}
    with pytest.raises(KeyboardInterrupt):
        train_pydocs(tmp_path / "out", progress=stop, **common)
    assert not (tmp_path / "out").exists()
    train_pydocs(tmp_path / "out", **common)
    first, second = weights(trained[0]), weights(tmp_path / "out")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_training_loss_is_the_scored_cross_entropy() -> None:
    model = new_model(TINY, seed=3)
    tokens = torch.randint(1, TINY.vocab, (6, 20), generator=torch.Generator().manual_seed(0))
    rows = Rows(tokens, torch.tensor([20, 20, 5, 16, 9, 12]), torch.arange(6))
    loss = loss_of(model, rows)
    assert float(loss.detach()) == pytest.approx(cross_entropy(model, rows), abs=1e-5)
    loss.backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    scored = rows.predicted()
    torch.nn.functional.cross_entropy(model(tokens[:, :-1]).logits[scored], tokens[:, 1:][scored]).backward()
    for mine, p in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, atol=1e-6, rtol=1e-4)


def test_seeds_decide_the_weights_and_the_order_and_nothing_else_does() -> None:
    torch.manual_seed(11)
    one = new_model(TINY, 0).state_dict()
    torch.manual_seed(12)
    same, other = new_model(TINY, 0).state_dict(), new_model(TINY, 1).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
    rows = Rows(torch.zeros(50, 32, dtype=torch.int64), torch.arange(50) % 30 + 2, torch.arange(50))
    steps = plan(rows, 1_000, TINY, 0)
    assert sum(int((rows.lengths[step] - 1).sum()) for step in steps[:-1]) < 1_000
    assert sum(int((rows.lengths[step] - 1).sum()) for step in steps) >= 1_000
    assert not torch.equal(torch.cat(steps), torch.cat(plan(rows, 1_000, TINY, 1))[: len(torch.cat(steps))])
    assert sorted(torch.cat(plan(rows, 10_000, TINY, 0))[:50].tolist()) == list(range(50))


def test_the_rate_rises_falls_slowly_then_falls_to_zero() -> None:
    found = rates(steps=60, horizon=100, cooldown=40, warmup=0.05)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[40] == pytest.approx(60 / 95)
    assert found[50] == pytest.approx(30 / 95)
    assert 0 < found[59] < 0.04
    plain = rates(steps=100, horizon=100, cooldown=100, warmup=0.05)
    assert plain[52:] == pytest.approx([(100 - i) / 95 for i in range(52, 100)])


def test_the_curve_is_denser_in_the_cooldown() -> None:
    rows = Rows(torch.zeros(400, 32, dtype=torch.int64), torch.full((400,), 31), torch.arange(400))
    schedule = Schedule.of(rows, replace(TINY, rows=2, tokens=6_000, horizon=12_000, cooldown=3_000, evaluations=10), 0)
    assert len(schedule.rows) == len(schedule.rates) == 100
    assert sorted(m for m in schedule.marks if m <= 100) == [0, 20, 40, 50, 60, 70, 80, 90, 100]


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    matrices = torch.randn(3, 24, 48, generator=torch.Generator().manual_seed(0))
    for m in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalised(m))
        assert float(values.min()) > 0.6
        assert float(values.max()) < 1.3


def test_ngrams_by_hand() -> None:
    rows = Rows(torch.tensor([[0, 1, 2, 1], [0, 1, 0, 0]]), torch.tensor([4, 2]), torch.arange(2))
    ngrams = NGrams(rows, vocab=3)
    assert ngrams.p.tolist() == pytest.approx([1 / 7, 4 / 7, 2 / 7])
    test = Rows(torch.tensor([[0, 1, 1]]), torch.tensor([3]), torch.arange(1))
    p = torch.tensor([(2 + 1.5 * 4 / 7) / (2 + 1.5), (0 + 1.5 * 4 / 7) / (1 + 1.5)])
    assert ngrams.bigram(test, alpha=1.5) == pytest.approx(float(-p.log().mean()))
    assert ngrams.unigram(test) == pytest.approx(-float(torch.tensor(4 / 7).log()))


def test_a_models_own_stream_has_its_entropy_as_cross_entropy(trained: tuple[Path, dict]) -> None:
    stream = read_stream(trained[0] / STREAM, TINY.context)
    assert stream.shape == (16, TINY.context)
    assert (stream[:, 0] == 0).all()
    assert (stream[:, 1:] > 0).all()
    figures = trained[1]["stream"]
    assert figures["cross_entropy"] == pytest.approx(figures["entropy"], abs=0.3)


@pytest.mark.parametrize("name", ["pydocs-4l", "pydocs-4l@1"])
def test_a_committed_target_has_its_recorded_cross_entropy(name: str) -> None:
    folder = ASSETS / name
    record = json.loads((folder / "training.json").read_text())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # another version of Python has another standard library
        documents = pydocs.documents("validation")
    rows = rows_of(documents, tokenizer, record["recipe"]["context"]).head(record["check"]["rows"])
    same = pydocs.corpus_hash() == record["corpus"]["hash"]
    assert cross_entropy(model, rows) == pytest.approx(record["check"]["cross_entropy"], abs=1e-4 if same else 0.3)
    assert (folder / "README.md").read_text() == card(record)
    figures = record["cross_entropy"]
    assert all(v["model"] < v["bigram"] - 0.5 < v["unigram"] for v in figures.values())
    assert sum(file.stat().st_size for file in folder.iterdir() if file.name != STREAM) < 5_000_000


def test_the_committed_stream_is_the_models_own() -> None:
    folder = ASSETS / "pydocs-4l"
    stream = read_stream(folder / STREAM)
    figures = json.loads((folder / "training.json").read_text())["stream"]
    assert stream.size == figures["tokens"] >= 1_000_000
    assert int(stream.max()) < 2048
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = stream_rows(stream[:64])
    assert cross_entropy(model, rows) == pytest.approx(entropy(model, rows), abs=0.1)
    assert figures["cross_entropy"] == pytest.approx(figures["entropy"], abs=0.01)
