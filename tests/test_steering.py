"""Planted truth: a neuron that is a concept is found, steers to it and is what its ablation removes; random controls are not."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch

from decomp_bench import registry
from decomp_bench.concepts.base import Concept
from decomp_bench.concepts.detectors import detectors
from decomp_bench.concepts.sample import SPLIT, draw, half_of
from decomp_bench.concepts.tokens import token
from decomp_bench.concepts.topics import topic
from decomp_bench.config import parse
from decomp_bench.contenders import COLUMNS, Contender, forms
from decomp_bench.data.streams import with_clean
from decomp_bench.errors import UserError
from decomp_bench.intervene import Intervention, one
from decomp_bench.selection import best, components, controls, scores
from decomp_bench.steering import SteeringConfig, frontier, steer
from decomp_bench.topic_ablation import AblationConfig, ablate, at_damage, losses, selectivity
from tests.conftest import open_target
from tests.test_intervene import METHODS, make

LAYER, NEURON = 2, 5
LETTER = "z"
PLANTED = token("the letter z", LETTER)
TOPIC = topic("zoo")
SMALL = SteeringConfig(
    factors=(0.5, 2.0), prompts=12, prompt_tokens=4, length=10, prefixes=(4,), general=60, positive=10, reft_steps=3, bootstrap=50
)


@pytest.fixture(scope="module")
def planted(tiny_arcee, tmp_path_factory):
    """(target, source): texts of label `zoo` are full of z; one neuron of the last layer reads z and writes z."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("planted")
    shutil.copytree(tiny_arcee, folder / "model")
    lines = [json.loads(line)["text"] for line in (folder / "model" / "text.jsonl").read_text().splitlines()]
    (folder / "text").mkdir()
    for name, texts in (("plain", lines[:160]), ("zoo", [text.replace("a", "zz").replace("n", "z") for text in lines[160:]])):
        (folder / "text" / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    _, source = open_target(f"hf:{folder / 'model'}", str(folder / "text"))
    batch = with_clean(source, source.batch("train", np.arange(80)), {f"{LAYER}.mlp.in"})
    z = ord(LETTER) - ord("a") + 1
    read, kept = batch.clean[f"{LAYER}.mlp.in"][:, 1:], (torch.arange(batch.x.shape[1])[None] < batch.length[:, None])[:, 1:]
    is_z = (batch.x[:, 1:] == z) & kept
    mean = read[kept & ~is_z].mean(0)
    away = read[is_z].mean(0) - mean
    away = away - (away @ mean) / (mean @ mean) * mean
    weights = load_file(folder / "model" / "model.safetensors")
    away = away / away.norm()
    up = weights[f"model.layers.{LAYER}.mlp.up_proj.weight"]
    up -= (up @ away)[:, None] * away  # no other neuron of the layer reads z
    up[NEURON] = 3 * away
    embed = weights["model.embed_tokens.weight"]
    down = weights[f"model.layers.{LAYER}.mlp.down_proj.weight"]
    towards = embed[z] - embed.mean(0)
    towards = towards / towards.norm()
    down -= towards[:, None] * (towards @ down)  # and none writes it
    down[:, NEURON] = 2 * towards
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    return open_target(f"hf:{folder / 'model'}", str(folder / "text"))


@pytest.fixture(scope="module")
def neurons(planted):
    kind = registry.method("neurons")
    made = kind(parse(kind.Config, {}, "neurons"), planted[0], (LAYER,), 0).eval()
    return Contender("neurons", "run-1", made).everything_on()


def test_folds_share_no_document(planted):
    _, source = planted
    names = {fold: {source.rows(SPLIT[fold]).documents[d] for d in draw(source, fold, [TOPIC], 40, 20).documents} for fold in "ABCD"}
    for a, b in ("AB", "AC", "AD", "BC", "BD", "CD"):
        assert names[a]
        assert not names[a] & names[b]
    assert {half_of(name) for name in names["A"]} == {"A"}


def test_labels_hold_at_real_tokens_only(planted):
    _, source = planted
    sample = draw(source, "A", [PLANTED, TOPIC], 30, 10)
    tokens = source.rows("train").tokens[sample.index]
    for i, length in enumerate(sample.length):
        np.testing.assert_array_equal(sample.tokens[i, : length - 1, 0].numpy(), tokens[i, 1:length] == 26)
        assert (sample.tokens[i, : length - 1, 1] == sample.topic[i, 1]).all()
        assert not sample.tokens[i, length - 1 :].any()


def test_the_planted_component_is_found_for_tokens_and_for_topics_and_controls_are_as_active(planted, neurons):
    sample = draw(planted[1], "A", [PLANTED, TOPIC], 60, 20)
    found = scores(neurons.decomposer, sample)
    for c in range(2):
        (first,) = best(found, c)
        assert (first.site, first.component) == (str(LAYER), NEURON)
        assert first.auroc > 0.9
        (control,) = controls(found, [first], c, np.random.default_rng(0))
        assert control.component != NEURON
        assert control.density == pytest.approx(first.density, abs=0.3)
    assert components([first]) == {str(LAYER): {NEURON: 1.0}}


def test_taking_sites_in_turn_changes_no_score(planted, neurons, monkeypatch):
    import decomp_bench.selection as module

    sample = draw(planted[1], "A", [PLANTED, TOPIC], 20, 10)
    whole = scores(neurons.decomposer, sample)
    monkeypatch.setattr(module, "HELD_BYTES", 1)
    for name, score in scores(neurons.decomposer, sample, size=7).items():
        torch.testing.assert_close(score.auroc, whole[name].auroc, equal_nan=True)


def test_detectors_tell_texts_of_documents_they_have_not_seen(planted):
    sample = draw(planted[1], "D", [PLANTED, TOPIC, Concept("nowhere", "topic", ("nowhere",))], 150, 60)
    letter, zoo, nowhere = detectors(sample, 8)
    assert letter.auroc == 1
    assert letter.score(["zzzz", "the cat"]).tolist() == [1, 0]
    assert math.isnan(nowhere.auroc)
    assert zoo.auroc > 0.9
    assert zoo.texts > 20


@pytest.fixture(scope="module")
def steered(planted, neurons):
    return steer([neurons], planted[1], SMALL, [PLANTED])


def test_the_planted_component_steers_and_random_ones_do_not(steered):
    planted_row = steered[(steered["form"] == "write") & steered["chosen"]].iloc[0]
    assert (planted_row["site"], planted_row["component"], planted_row["run"]) == (str(LAYER), NEURON, "run-1")
    pushed = steered[(steered["metric"] == "concept") & (steered["split"] == "C") & (steered["factor"] == 2.0)].set_index("form")["value"]
    assert pushed["write"] > 0.25  # all that the unsteered text leaves: two thirds of it has the letter already
    assert pushed["write, random component"] < 0.1


def test_rows_are_tidy_and_the_factor_is_chosen_on_b(steered):
    assert list(steered.columns) == list(COLUMNS)
    assert {"difference in means", "probe", "ReFT-r1", "random direction", "prompt", "neurons", "detector"} == set(steered["method"])
    unit = steered[steered["metric"].isin(["concept", "fluency", "score", "variety"])]
    assert unit["value"].between(0, 1).all()
    assert (unit["lo"] <= unit["value"] + 1e-9).all()
    assert (unit["value"] <= unit["hi"] + 1e-9).all()
    for _, group in steered[(steered["metric"] == "score") & (steered["method"] != "prompt")].groupby(["method", "form"]):
        on_b = group[group["split"] == "B"]
        assert set(group[group["chosen"]]["factor"]) == {on_b.loc[on_b["value"].idxmax(), "factor"]}
    table = frontier(steered)
    assert {"concept", "fluency", "score", "factor", "form"} <= set(table.columns)
    assert len(table[table["form"] == "write"]) == 2


def test_steering_twice_gives_the_same_rows(planted, neurons, steered):
    import pandas as pd

    pd.testing.assert_frame_equal(steer([neurons], planted[1], SMALL, [PLANTED]), steered)


def test_every_method_has_its_forms(planted):
    expected = {
        "neurons": ["write"],
        "svd": ["linear write", "own gate"],
        "transcoder": ["write"],
        "sae": ["write"],
        "clt": ["write", "write, source layer"],
        "spd": ["linear write", "own gate"],
    }
    assert {name: [form.name for form in forms(make(name, planted[0]))] for name in METHODS} == expected


def test_the_planted_component_is_what_its_ablation_removes(planted, neurons):
    config = AblationConfig(counts=(1, 4), damages=(1e-4, 50.0), general=60, positive=20, off_rows=30, on_rows=12, bootstrap=50)
    frame = ablate([neurons], planted[1], config, [TOPIC])
    at_one = frame[(frame["factor"] == 1) & (frame["method"] == "neurons")].pivot(index="form", columns="metric", values="value")
    assert at_one.loc["components", "ce_on"] > 0.2
    assert at_one.loc["components", "ce_off"] < 0  # the model was not trained with it: other text gains
    assert abs(at_one.loc["random components", "ce_on"]) < at_one.loc["components", "ce_on"] / 5
    assert {"difference in means", "random direction"} <= set(frame["method"])
    assert frame[frame["metric"].str.startswith("selectivity")]["value"].dropna().between(0, 1).all()
    beyond = frame[(frame["factor"] == 50.0)]
    assert beyond["value"].isna().all()
    assert (beyond["reason"] == "this much damage was not reached").all()


def test_losses_do_not_depend_on_padding(planted, neurons):
    sample = draw(planted[1], "C", [TOPIC], 20, 5)
    ablated = one(str(LAYER), NEURON)
    (whole,) = losses(neurons.decomposer, sample, [ablated])
    target = planted[0]
    from decomp_bench.intervene import intervened

    for document, rise, tokens in zip(whole.document, whole.rise, whole.tokens, strict=True):
        total, count = 0.0, 0
        for i in np.flatnonzero(sample.documents == document):
            x = planted[1].batch("test", sample.index[i : i + 1]).x
            batch = with_clean(planted[1], planted[1].batch("test", sample.index[i : i + 1]), {f"{LAYER}.mlp.in"})
            out = intervened(neurons.decomposer, batch, Intervention("zero", ablated)).logits
            nll = [torch.nn.functional.cross_entropy(logits[0, 1:-1], x[0, 2:], reduction="sum") for logits in (out, target(x))]
            total, count = total + float(nll[0] - nll[1]), count + x.shape[1] - 2
        assert tokens == count
        assert rise == pytest.approx(total, abs=1e-3)


def test_selectivity_is_bounded_and_best_where_nothing_else_is_hurt():
    on, off = np.array([0.2, 0.2, 0.2, -0.1, 0.0]), np.array([0.0, 0.2, -0.2, 0.3, 0.0])
    np.testing.assert_array_equal(selectivity(on, off), [1, 0.5, 0.5, 0, np.nan])


def test_loss_at_equal_damage_is_interpolated_and_never_extrapolated():
    on, off = [np.array([1.0]), np.array([3.0])], [np.array([0.1]), np.array([-0.3])]
    assert [float(at_damage(on, off, d)[0]) for d in (0.05, 0.1, 0.2)] == pytest.approx([0.5, 1.0, 2.0])
    assert math.isnan(at_damage(on, off, 0.4)[0])


def test_what_cannot_be_done_is_said(planted, neurons):
    with pytest.raises(UserError, match="at least one run"):
        steer([], planted[1], SMALL, [PLANTED])
    with pytest.raises(UserError, match="no concept 'grpahs'"):
        steer([neurons], planted[1], SMALL.model_copy(update={"concepts": ("grpahs",)}))
    with pytest.raises(UserError, match="no topics"):
        ablate([neurons], planted[1], AblationConfig())
    with pytest.raises(UserError, match="fewer than two rows"):
        steer([neurons], planted[1], SMALL.model_copy(update={"length": 30}), [PLANTED])
