"""Planted truth: a neuron that is a concept is found, steers to it and is what its ablation removes; random controls are not."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from decomp_bench import registry, results
from decomp_bench.concepts.base import Concept
from decomp_bench.concepts.detectors import aurocs, detectors
from decomp_bench.concepts.sample import SPLIT, draw, half_of
from decomp_bench.concepts.tokens import token
from decomp_bench.concepts.topics import topic
from decomp_bench.config import DataConfig, parse
from decomp_bench.data import source as open_source
from decomp_bench.data.streams import with_clean
from decomp_bench.errors import UserError
from decomp_bench.forms import everything_on, forms
from decomp_bench.intervene import Intervention, intervened, one
from decomp_bench.measurements import measurement
from decomp_bench.measurements import steering as steering_module
from decomp_bench.measurements import topic_ablation as ablation_module
from decomp_bench.selection import best, components, controls, scores
from decomp_bench.steering import SteeringConfig
from decomp_bench.topic_ablation import AblationConfig, Resamples, at_damage, losses, selectivity
from tests.conftest import open_target
from tests.test_intervene import METHODS, make

LAYER, NEURON = 2, 5
LETTER = "z"
PLANTED = token("the letter z", LETTER)
TOPIC = topic("zoo")
SMALL = SteeringConfig(
    factors=(0.5, 2.0),
    prompts=12,
    prompt_tokens=4,
    length=10,
    prefixes=(4,),
    general=60,
    positive=10,
    reft_steps=3,
    controls=4,
    bootstrap=200,
)
NOWHERE = Concept("nowhere", "topic", ("nowhere",))


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
    return everything_on(made)[0]


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
    found = scores(neurons, sample)
    for c in range(2):
        first, second = best(found, c, 2)
        assert (first.site, first.component) == (str(LAYER), NEURON)
        assert first.auroc > second.auroc
        drawn = controls(found, [first] * 5, c, np.random.default_rng(0))
        assert len({one_of.component for one_of in drawn} - {NEURON}) == 5
        distance = (found[first.site].density - first.density).abs()
        nearest = distance.sort().values[15]  # itself, and ten that are left after five were drawn
        assert all(abs(one_of.density - first.density) <= nearest for one_of in drawn)
    assert components([first]) == {str(LAYER): {NEURON: 1.0}}


def test_taking_sites_in_turn_changes_no_score(planted, neurons, monkeypatch):
    import decomp_bench.selection as module

    sample = draw(planted[1], "A", [PLANTED, TOPIC], 20, 10)
    whole = scores(neurons, sample)
    monkeypatch.setattr(module, "HELD_BYTES", 1)
    for name, score in scores(neurons, sample, size=7).items():
        torch.testing.assert_close(score.auroc, whole[name].auroc, equal_nan=True)


def test_detectors_tell_texts_of_documents_they_have_not_seen(planted):
    sample = draw(planted[1], "D", [PLANTED, TOPIC, NOWHERE], 150, 60)
    letter, zoo, nowhere = detectors(sample, 8)
    assert (letter.auroc, letter.by_definition, zoo.by_definition) == (1, True, False)
    assert letter.score(["zzzz", "the cat"]).tolist() == [1, 0]
    assert math.isnan(nowhere.auroc)
    assert 0.5 < zoo.lo <= zoo.auroc <= zoo.hi  # better than chance by its interval: most texts have a letter that no other topic has


def test_auroc_of_resampled_documents_is_that_of_the_texts_drawn():
    from sklearn.metrics import roc_auc_score

    draws = np.random.default_rng(0)
    values, labels, documents = draws.integers(0, 4, 60).astype(float), draws.random(60) < 0.4, np.arange(60) // 3
    found = aurocs(values, labels, documents, 3)
    from decomp_bench.bootstrap import resampled

    for auroc, weight in zip(found, resampled(20, 3), strict=True):
        assert auroc == pytest.approx(roc_auc_score(labels, values, sample_weight=weight[documents]))


def measured(module, name, decomposer, source, config, concepts):
    """Rows of a measurement as a frame with a column for each key of their conditions; the concepts are these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "concepts_of", lambda dataset, names: concepts)
        module._met.cache_clear()
        rows = measurement(name).measure(decomposer, source, config, lambda done, parts: told.append((done, parts)))
    frame = pd.DataFrame(rows)
    return results.unfolded(frame.assign(family=frame["family"].fillna("own"), reason=frame["reason"].fillna("")))


told: list[tuple[int, int]] = []


@pytest.fixture(scope="module")
def steered(planted, neurons):
    told.clear()
    return measured(steering_module, "steering", neurons, planted[1], SMALL, [PLANTED, NOWHERE])


def rows_of(frame, **wanted):
    for key, value in wanted.items():
        frame = frame[frame[key] == value]
    return frame


def test_the_planted_component_steers_more_than_random_ones_do(steered):
    picked = rows_of(steered, family="own", metric="selection_auroc").iloc[0]
    assert (picked["site"], picked["component"]) == (str(LAYER), str(NEURON))
    at_most = rows_of(steered, family="own", metric="steering_concept", concept=PLANTED.name, factor="2").set_index("way")
    assert (
        at_most.loc["component", "lo"] > at_most.loc["random components", "hi"]
    )  # what it writes is the letter; fluency is another matter


def test_the_gain_is_the_paired_difference_from_the_mean_of_random_components(steered):
    own = rows_of(steered, family="own", concept=PLANTED.name)
    at_chosen = rows_of(own, metric="steering_score", factor="chosen").set_index("way")["value"]
    gain = rows_of(own, metric="steering_gain")["value"].item()
    assert gain == pytest.approx(at_chosen["component"] - at_chosen["random components"])


def test_progress_ends_at_its_whole(steered):
    assert told[-1][0] == told[-1][1]
    assert told == sorted(told)


def test_scores_are_bounded_and_lie_in_their_intervals(steered):
    scored = steered[steered["metric"].isin(["steering_concept", "steering_fluency", "steering_score"]) & steered["value"].notna()]
    assert scored["value"].between(0, 1).all()
    known = scored[scored["lo"].notna()]
    assert ((known["lo"] <= known["value"] + 1e-9) & (known["value"] <= known["hi"] + 1e-9)).all()
    names = {"difference in means", "probe", "ReFT-r1", "prompt", "no steering", "own"}
    assert set(scored["family"]) == names


def test_the_factor_that_counts_is_the_one_that_fold_b_prefers(steered):
    """The row of the chosen factor repeats the one of a factor of the grid, and that factor is the one that is named."""
    for _, group in steered[steered["way"].isin(["component", "baseline"]) & (steered["concept"] == PLANTED.name)].groupby("family"):
        (factor,) = rows_of(group, metric="steering_factor")["value"]
        whole = rows_of(group, metric="steering_score")
        chosen, grid = whole[whole["factor"] == "chosen"]["value"], whole[whole["factor"] == f"{factor:g}"]["value"]
        assert chosen.item() == grid.item()


def test_a_concept_without_a_good_detector_is_left_out_with_its_figure(steered):
    out = rows_of(steered, concept=NOWHERE.name)
    assert set(out["metric"]) == {"detector_auroc", "steering_score"}
    assert "left out" in rows_of(out, metric="steering_score")["reason"].item()
    trivial = rows_of(steered, concept=PLANTED.name, metric="detector_auroc")
    assert trivial["applicable"].item() == "trivial"
    assert set(out["run_id"]) == {""}


def test_what_is_over_all_concepts_is_their_mean(steered):
    own = rows_of(steered, family="own", way="component", factor="chosen", metric="steering_score")
    one_concept, over = own[own["concept"] == PLANTED.name], own[own["concept"] == "all"]
    assert set(over["over"]) == {"concepts", "prompts"}
    assert over["value"].tolist() == pytest.approx([one_concept["value"].item()] * 2)  # of one concept
    assert rows_of(over, over="concepts")[["lo", "hi"]].isna().all(axis=None)  # one concept has no spread
    over_prompts = rows_of(over, over="prompts")
    assert over_prompts[["lo", "hi"]].to_numpy().tolist() == pytest.approx(one_concept[["lo", "hi"]].to_numpy())


def test_steering_twice_gives_the_same_rows(planted, neurons, steered):
    again = measured(steering_module, "steering", neurons, planted[1], SMALL, [PLANTED, NOWHERE])
    pd.testing.assert_frame_equal(again, steered)


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


ABLATION = AblationConfig(
    counts=(1, 4),
    control_counts=(1, 4, 12, 20),
    damages=(1e-4, 50.0),
    general=60,
    positive=20,
    off_rows=30,
    on_rows=12,
    controls=3,
    bootstrap=200,
)


@pytest.fixture(scope="module")
def ablated(planted, neurons):
    return measured(ablation_module, "topic_ablation", neurons, planted[1], ABLATION, [TOPIC, NOWHERE])


def test_the_planted_component_is_what_its_ablation_removes(ablated):
    at_one = rows_of(ablated, family="own", metric="ablation_on", count="1", concept=TOPIC.name).set_index("way")
    assert at_one.loc["component", "lo"] > at_one.loc["random components", "hi"]
    (gain,) = rows_of(ablated, family="own", metric="ablation_gain", concept=TOPIC.name, damage="0.0001").to_dict("records")
    assert gain["lo"] > 0


def test_ablation_is_compared_with_directions_and_says_what_is_missing(ablated):
    assert {"difference in means", "own", "concept"} == set(ablated["family"])
    assert ablated[ablated["metric"].str.contains("selectivity")]["value"].dropna().between(0, 1).all()
    beyond = rows_of(ablated, damage="50", way="component")
    assert beyond["value"].isna().all()
    assert beyond[beyond["concept"] != "all"]["reason"].str.contains("not reached").all()
    assert rows_of(ablated, concept=NOWHERE.name)["reason"].item() == "fewer than two held-out documents of the concept"


def test_losses_do_not_depend_on_padding_and_are_split_by_what_is_predicted(planted, neurons):
    sample = draw(planted[1], "C", [PLANTED], 20, 0)
    chosen = one(str(LAYER), NEURON)
    found = losses(neurons, sample, 0, [chosen])
    target, source = planted
    for document, tokens, rise in zip(found.document, found.tokens.T, found.rise[0].T, strict=True):
        total, count = np.zeros(2), np.zeros(2)
        for i in np.flatnonzero(sample.documents == document):
            batch = with_clean(source, source.batch("test", sample.index[i : i + 1]), {f"{LAYER}.mlp.in"})
            x = batch.x[0]
            out = intervened(neurons, batch, Intervention("zero", chosen)).logits
            nll = [torch.nn.functional.cross_entropy(logits[0, 1:-1], x[2:], reduction="none") for logits in (out, target(batch.x))]
            on = (x[2:] == 26).numpy()
            for side, kept in enumerate((on, ~on)):
                total[side] += float((nll[0] - nll[1])[torch.from_numpy(kept)].sum())
                count[side] += kept.sum()
        np.testing.assert_array_equal(tokens, count)
        np.testing.assert_allclose(rise, total, atol=1e-3)


def test_resamples_keep_the_number_of_documents_of_each_topic():
    topics = np.array([[True], [True], [False], [False], [False]])
    drawn = Resamples.of(np.array([3, 5, 6, 8, 9]), topics, 40)
    np.testing.assert_array_equal(drawn.weight[0], 1)
    np.testing.assert_array_equal(drawn.weight[:, :2].sum(1), 2)
    np.testing.assert_array_equal(drawn.weight[:, 2:].sum(1), 3)
    assert len(np.unique(drawn.weight, axis=0)) > 10


def test_selectivity_is_bounded_and_best_where_nothing_else_is_hurt():
    on, off = np.array([0.2, 0.2, 0.2, -0.1, 0.0]), np.array([0.0, 0.2, -0.2, 0.3, 0.0])
    np.testing.assert_array_equal(selectivity(on, off), [1, 0.5, 0.5, 0, np.nan])


def test_loss_at_equal_damage_is_interpolated_and_never_extrapolated():
    on, off = np.array([[1.0], [3.0]]), np.array([[0.1], [-0.3]])
    assert [float(at_damage(on, off, d)[0]) for d in (0.05, 0.1, 0.2)] == pytest.approx([0.5, 1.0, 2.0])
    assert math.isnan(at_damage(on, off, 0.4)[0])


def test_every_metric_of_the_rows_is_declared(steered, ablated):
    for name, frame in (("steering", steered), ("topic_ablation", ablated)):
        assert set(frame["metric"]) == {metric.key for metric in measurement(name).metrics}


def test_what_cannot_be_done_is_said(planted, neurons, toy):
    with pytest.raises(UserError, match="no concept 'grpahs'"):
        measurement("steering").measure(neurons, planted[1], SMALL.model_copy(update={"concepts": ("grpahs",)}), print)
    with pytest.raises(UserError, match="fewer than two rows"):
        measured(steering_module, "steering", neurons, planted[1], SMALL.model_copy(update={"length": 30}), [PLANTED])
    for name in ("steering", "topic_ablation"):
        one_of = measurement(name)
        with pytest.raises(UserError, match="needs text"):
            one_of.measure(neurons, open_source(toy[0], DataConfig()), one_of.Settings(), print)
