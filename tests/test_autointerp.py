"""Autointerp against a local server: who understands scores 1, one answer to everything is chance, and nonsense is missing."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest

from decomp_bench import results
from decomp_bench.concepts.pieces import Pieces
from decomp_bench.concepts.sample import draw as draw_rows
from decomp_bench.config import DataConfig, field_docs
from decomp_bench.data import source as open_source
from decomp_bench.errors import UserError
from decomp_bench.interpretability.autointerp import (
    CLOSE,
    OPEN,
    AutointerpConfig,
    Reader,
    accuracy,
    ask_which,
    detection,
    examples,
    explained,
    fuzzing,
    read_explanation,
    read_numbers,
)
from decomp_bench.interpretability.harvest import Text
from decomp_bench.judge import Judge, JudgeConfig
from decomp_bench.measurements import asked, measurement
from tests.test_interpretability import LETTERS, activity, here, is_letter, make
from tests.test_judge import completion, server  # noqa: F401 - fixture

WANTED = "gcm"


def reply(text):
    return (200, completion(text if isinstance(text, str) else json.dumps(text)))


def excerpts(body):
    return [json.loads(line.split(": ", 1)[1]) for line in re.findall(r"^\d+: .*$", body["messages"][0]["content"], re.M)]


def understanding(body):
    """Explains by the letter that is marked most, and answers by it."""
    prompt = body["messages"][0]["content"]
    shown = excerpts(body)
    if "have in common" in prompt:
        marked = re.findall(f"{OPEN}(.)", " ".join(shown))
        return reply({"explanation": f"the letter {max(set(marked), key=marked.count)}"})
    letter = re.search("the letter (.)", prompt)[1]
    if OPEN in "".join(shown):
        return reply({"active": [i for i, text in enumerate(shown, 1) if f"{OPEN}{letter}" in text]})
    return reply({"active": [i for i, text in enumerate(shown, 1) if letter in text]})


@pytest.fixture
def config(server, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setenv("DECOMP_BENCH_CACHE", str(tmp_path))
    judge = JudgeConfig(model="m", endpoint=f"http://127.0.0.1:{server.server_port}/v1", attempts=2, backoff=0, timeout=5)
    server.script = [understanding]
    return AutointerpConfig(judge=judge, components=4, rows=60, fewest=8, contexts=8, strongest=4, spread=3, bootstrap=50)


@pytest.fixture(scope="module")
def texts(lm):
    return tuple(Text.of(draw_rows(lm[1], fold, (), 60, 0, 0)) for fold in ("A", "C"))


@pytest.fixture(scope="module")
def pieces(lm):
    return Pieces(lm[0].tokenizer).of


def run(texts, pieces, config):
    own = activity(texts, *(is_letter(letter) for letter in WANTED))
    return explained(*texts, own, pieces, config, (Judge(config.judge), Judge(config.judge)))


def test_who_understands_scores_one_and_by_anothers_explanation_less(texts, pieces, config):
    outcome = run(texts, pieces, config)
    assert outcome.explanations == [f"the letter {letter}" for letter in WANTED]
    for kind in ("detection", "fuzzing"):
        np.testing.assert_array_equal(outcome.scores[kind, "own"], 1)
        assert outcome.scores[kind, "other"].mean() < 0.8
    assert not any(outcome.missing.values())
    assert outcome.asked == {("explanation", "own"): 3, **{(k, w): 3 for k in ("detection", "fuzzing") for w in ("own", "other")}}


@pytest.mark.parametrize("always", [[], "all"])
def test_one_answer_to_everything_is_chance(texts, pieces, config, server, always):  # noqa: F811
    def answer(body):
        if "have in common" in body["messages"][0]["content"]:
            return understanding(body)
        return reply({"active": always if always == [] else list(range(1, len(excerpts(body)) + 1))})

    server.script = [answer]
    outcome = run(texts, pieces, config)
    for values in outcome.scores.values():
        np.testing.assert_array_equal(values, 0.5)


@pytest.mark.parametrize(
    "nonsense",
    ["none of them", '{"active": "none"}', '{"active": [0]}', '{"active": [99]}', '{"active": [1, 1]}', '{"active": [true]}', "[1]", ""],
)
def test_replies_that_cannot_be_read_are_missing_and_never_a_score(texts, pieces, config, server, nonsense):  # noqa: F811
    def answer(body):
        return understanding(body) if "have in common" in body["messages"][0]["content"] else reply(nonsense)

    server.script = [answer]
    outcome = run(texts, pieces, config)
    for key, values in outcome.scores.items():
        assert np.isnan(values).all()
        assert len(outcome.missing[key]) == outcome.asked[key] == 3


@pytest.mark.parametrize(
    "said", ['{"explanation": ""}', '{"explanation": "tokens in ⟦⟧"}', '{"explanation": 3}', "{}", json.dumps({"explanation": "a " * 50})]
)
def test_an_explanation_that_explains_nothing_is_missing(said):
    with pytest.raises((ValueError, KeyError, TypeError)):
        read_explanation(said)


def test_without_an_explanation_nothing_is_asked(texts, pieces, config, server):  # noqa: F811
    server.script = [reply("no idea")]
    outcome = run(texts, pieces, config)
    assert outcome.explanations == [""] * 3
    assert len(outcome.missing["explanation", "own"]) == 3
    assert all(np.isnan(values).all() for values in outcome.scores.values())
    assert len(server.seen) == 3


def test_contexts_are_what_they_are_said_to_be(texts, pieces, config):
    reader, size = Reader(texts[1], pieces), activity(texts, is_letter("g")).held[:, 0]
    generator = np.random.default_rng(0)
    asked_of = detection(reader, size, config, generator)
    assert sum(asked_of.right) * 2 == len(asked_of.right) == 8
    assert all(("g" in text) == right for text, right in zip(asked_of.contexts, asked_of.right, strict=True))
    assert OPEN not in "".join(asked_of.contexts)
    marked = fuzzing(reader, size, config, generator)
    assert {True, False} == set(marked.right)
    for text, right in zip(marked.contexts, marked.right, strict=True):
        inside = "".join(re.findall(f"{OPEN}(.*?){CLOSE}", text))
        assert set(inside) == {"g"} if right else "g" not in inside
    picked = examples(texts[0], activity(texts, is_letter("g")).fit[:, 0], config, generator)
    strongest = activity(texts, is_letter("g")).fit[:, 0].argmax()
    assert picked[0] == strongest
    assert len(set(texts[0].row[picked[:4]].tolist())) == 4
    assert (here(texts[0])[picked] == LETTERS["g"]).all()


def test_accuracy_is_balanced():
    assert accuracy([1, 2], (True, True, False, False)) == 1
    assert accuracy([1], (True, True, False, False)) == 0.75
    assert accuracy([3, 4], (True, True, False, False)) == 0
    assert accuracy([1, 2, 3], (True, False, False, False)) == pytest.approx(2 / 3)


def test_numbers_are_read_from_a_fenced_reply():
    assert read_numbers(3)('```json\n{"active": [3, 1]}\n```') == [3, 1]


def test_what_is_asked_shows_the_explanation_and_every_context():
    (message,) = ask_which("detection", "verbs", ["a\nb", 'c "d"'])
    assert "described so: verbs" in message["content"]
    assert '1: "a\\nb"\n2: "c \\"d\\""' in message["content"]


def test_rows_say_what_is_missing_and_everything_asked_is_kept(lm, config, server, tmp_path):  # noqa: F811
    told: list[tuple[int, int]] = []

    def answer(body):
        if "have in common" in body["messages"][0]["content"]:
            return understanding(body)
        return reply({"active": [1]}) if OPEN in body["messages"][0]["content"].split("JSON")[0] else reply("pardon?")

    server.script = [answer]
    rows = measurement("autointerp").measure(make("transcoder", lm[0], (0, 1)), lm[1], config, lambda *part: told.append(part))
    frame = results.unfolded(pd.DataFrame(rows))
    assert set(frame["metric"]) <= {metric.key for metric in measurement("autointerp").metrics}
    whole = frame[frame["component"] == "all"].set_index(["metric", "way", "at"])
    assert np.isnan(whole["value"]["autointerp_detection", "component", "all"])
    assert whole["value"]["autointerp_missing", "component", "detection"] == 1
    assert "form" in whole["reason"]["autointerp_missing", "component", "detection"]
    assert whole["value"]["autointerp_missing", "component", "fuzzing"] == 0
    assert 0 <= whole["value"]["autointerp_fuzzing", "component", "all"] <= 1
    assert whole["n"]["autointerp_fuzzing", "random explanations", "all"] > 0
    assert told == [(1, 1)]
    (log,) = (tmp_path / "autointerp").glob("*.jsonl")
    assert "pardon?" in log.read_text()
    kept = json.loads(log.with_suffix(".json").read_text())
    assert all(text.startswith("the letter") for text in kept["explanations"]["mlp.in to mlp.out"].values())
    assert kept["usage"][0]["requests"] > 0


def test_a_judge_must_be_named_and_text_be_there(lm, toy, config):
    with pytest.raises(UserError, match="judge"):
        asked({"autointerp": {}}, "here")
    assert field_docs(AutointerpConfig)["judge"] == "JudgeConfig, required"
    with pytest.raises(UserError, match="needs text"):
        measurement("autointerp").measure(make("transcoder", lm[0], (0,)), open_source(toy[0], DataConfig()), config, print)
