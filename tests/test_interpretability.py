"""Planted truth: a component that is a token is told by a rule, by intruders and by purity; shifted and random activity is not."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from decomp_bench import registry, results
from decomp_bench.concepts.sample import draw as draw_rows
from decomp_bench.config import DataConfig, MethodConfig, parse
from decomp_bench.data import source as open_source
from decomp_bench.decomposer import Decomposer, Site, SiteCodes, Slot
from decomp_bench.errors import UserError
from decomp_bench.interpretability import intruder, purity, rules
from decomp_bench.interpretability.contexts import cosines, cosines_in_groups, embeddings, words
from decomp_bench.interpretability.examples import banded, draw, silent
from decomp_bench.interpretability.harvest import Activity, Harvest, Text, harvest, place_of
from decomp_bench.interpretability.jacobian import JacobianConfig
from decomp_bench.interpretability.proxies import ProxyConfig, Tools, score
from decomp_bench.measurements import measurement
from tests.test_intervene import METHODS

CONFIG = ProxyConfig(components=8, rows=60, fewest=8, examples=60, tasks=4, bands=3, similar=20, bootstrap=200)


def make(name, target, layers):
    """A decomposition that was not trained."""
    kind = registry.method(name)
    return kind(parse(kind.Config, METHODS[name], name), target, layers, 0).eval()


LETTERS = {letter: i + 1 for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz .,\n")}


@pytest.fixture(scope="module")
def texts(lm):
    """Folds A and C of the tiny model's text."""
    return tuple(Text.of(draw_rows(lm[1], fold, (), 60, 0, 0)) for fold in ("A", "C"))


def here(text, offset=0):
    return text.around(np.arange(len(text.row)), offset)


def activity(texts, *detectors):
    """Columns that are active where detectors hold, at sizes that say nothing."""
    draws = np.random.default_rng(0)
    columns = [np.stack([found(text) * draws.uniform(0.5, 2, len(text.row)) for found in detectors], 1) for text in texts]
    return Activity(*(column.astype(np.float32) for column in columns))


def is_letter(letter):
    return lambda text: here(text) == LETTERS[letter]


DETECTORS = [is_letter("g"), is_letter("c"), is_letter("m"), lambda text: (here(text) == LETTERS["o"]) & (here(text, -1) == LETTERS["d"])]


@pytest.fixture(scope="module")
def scored(lm, texts):
    """Scores of planted detectors (three letters, and `do`), of the same shifted, and of random activity."""
    tools = Tools.of(lm[0], texts[0], 0)
    own = activity(texts, *DETECTORS)
    noise = activity(texts, *(lambda text, i=i: np.random.default_rng(i + len(text.row)).random(len(text.row)) < 0.1 for i in range(12)))
    found = Harvest(*texts, ())
    ticks: list[int] = []
    made = {name: score(found, one, tools, CONFIG, lambda: ticks.append(1)) for name, one in (("own", own), ("noise", noise))}
    many = Activity(*(np.tile(size, (1, 4)) for size in (own.fit, own.held)))
    made["shifted"] = score(found, many.shifted(np.random.default_rng(0)), tools, CONFIG, lambda: None)
    assert len(ticks) == 16
    return made


def test_a_planted_detector_scores_near_one(scored):
    own = scored["own"]
    for name in ("rule_auroc", "rule_auroc_near", "rule_accuracy"):
        assert own[name][:, 0].min() > 0.99, name  # of `do` every near miss is an o after another letter
    assert np.isfinite(own["rule_auroc"]).all()
    assert own["purity_token"][:, 0].min() > 0.99
    assert own["purity_contexts"][:, 0].min() > 0.3
    assert own["intruder_words"][:, 0].mean() > 0.9
    assert own["intruder_embeddings"][:, 0].mean() > 0.9


@pytest.mark.parametrize("way", ["noise", "shifted"])
def test_activity_about_nothing_scores_at_chance(scored, way):
    chance = {"rule": 0.5, "intruder": intruder.CHANCE, "purity": 0.0}
    for name, values in scored[way].items():
        spread = np.nanstd(values[:, 0]) / np.sqrt(np.isfinite(values[:, 0]).sum())
        assert abs(np.nanmean(values[:, 0]) - chance[name.split("_")[0]]) < 4 * spread + 0.01, name


def test_a_rule_needs_the_literals_that_it_may_have(texts):
    """Two letters of equal frequency take two literals."""
    text = texts[0]
    held = is_letter("g")(text) | is_letter("c")(text)
    examples = draw(text, held.astype(np.float32), 80, 2, np.random.default_rng(0))
    codes = rules.Literals([""] * 40).of(text, examples.at)
    one, two = (rules.fit(codes, examples.labels, most) for most in (1, 2))
    found = [rules.separation(rule.score(codes), examples.labels) for rule in (one, two)]
    assert [len(one.literals), len(two.literals)] == [1, 2]
    assert found[0] < 0.9 < 0.99 < found[1]


def test_examples_are_what_they_are_called(texts):
    text = texts[1]
    size = activity(texts, is_letter("o")).held[:, 0] * (here(text, -1) == LETTERS["d"])
    found = draw(text, size, 15, 3, np.random.default_rng(0))
    assert (size[found.active] > 0).all()
    assert (size[found.inactive] == 0).all()
    assert len(set(found.active.tolist())) == len(found.active) == 15
    assert len(found.inactive) == 15
    assert np.bincount(found.band).tolist() == [5, 5, 5]
    assert [size[found.active[found.band == band]].mean() for band in range(3)] == sorted(
        size[found.active[found.band == band]].mean() for band in range(3)
    )
    assert set(here(text)[found.near]) == {LETTERS["o"]}  # a near miss has the token
    always = activity(texts, is_letter("g")).held[:, 0]
    beside = draw(text, always, 30, 3, np.random.default_rng(0)).near  # an inactive g is nowhere: what is beside one is taken
    assert all(LETTERS["g"] in {int(text.around(np.array([at]), step)[0]) for step in (-2, -1, 1, 2)} for at in beside)
    quiet = silent(text, always, np.arange(len(text.row)), 2, 1)
    near = [(here(text, step) == LETTERS["g"]) & (text.near(np.arange(len(text.row)), step) >= 0) for step in (-2, -1, 0, 1)]
    np.testing.assert_array_equal(quiet, ~np.logical_or.reduce(near))


def test_bands_hold_as_many_from_small_to_large():
    size = np.array([0, 3, 1, 0, 2, 5, 4, 6], np.float32)
    assert [band.tolist() for band in banded(size, 3)] == [[2, 4], [1, 6], [5, 7]]


def test_intruders_are_active_elsewhere_and_the_component_is_silent_around_them(texts):
    text, own = texts[1], activity(texts, *DETECTORS).held
    given = intruder.tasks(text, own, 2, 5, 0)
    assert len(given.at) > 30
    for at, c in zip(given.at, given.component, strict=True):
        assert (own[at[:4], c] > 0).all()
        assert len(set(at.tolist())) == 5
        assert silent(text, own[:, c], at[4:], 10, 5).all()
        assert (own[at[4]] > 0).any()


def test_ties_are_shared(texts):
    """An embedder that tells nothing finds an intruder as often as chance."""
    given = intruder.tasks(texts[1], activity(texts, *DETECTORS).held, 2, 5, 0)
    blank = lambda text, at: np.tile([[1.0, 0.0]], (len(at), 1))
    np.testing.assert_allclose(intruder.found_out(given, texts[1], blank), intruder.CHANCE)


def test_cosines_of_sparse_and_dense_vectors_agree(lm, texts):
    at = np.arange(40, 60)
    for embedder in (words(texts[0], 40, 0), embeddings(lm[0], texts[0], 0)):
        whole = cosines(embedder(texts[1], at))
        np.testing.assert_allclose(np.diag(whole), 1, atol=1e-6)
        groups = cosines_in_groups(embedder(texts[1], at), 5)
        for g in range(4):
            np.testing.assert_allclose(groups[g], whole[5 * g : 5 * g + 5, 5 * g : 5 * g + 5], atol=1e-6)


def test_purity_of_one_token_is_one_and_of_nothing_is_missing(texts):
    text = texts[1]
    at, other = np.flatnonzero(is_letter("g")(text))[:20], np.flatnonzero(~is_letter("g")(text))[:20]
    assert purity.tokens(text, at, other, np.ones(20), 0) == 1
    assert np.isnan(purity.tokens(text, at[:1], other, np.ones(1), 0))
    assert purity.entropy(np.array([1, 2, 1, 2]), np.array([1.0, 1, 1, 1])) == pytest.approx(np.log(2))
    assert purity.entropy(np.array([1, 2]), np.array([3.0, 1])) == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))


# ---- the harvest


def harvested(lm, name="transcoder", layers=(0, 1, 2), **config):
    return harvest(make(name, lm[0], layers), lm[1], CONFIG.model_copy(update=config))


@pytest.mark.parametrize("name", METHODS)
def test_a_harvest_does_not_depend_on_its_batches_and_leaves_padding_and_the_first_position_out(lm, name):
    whole, small = (harvested(lm, name, batch=size) for size in (60, 7))
    rows = lm[1].rows("test")
    assert len(whole.held.row) == int((whole.held.length - 1).sum())
    assert whole.held.place.min() == 1
    assert (whole.held.place < whole.held.length[whole.held.row]).all()
    assert set(whole.held.document.tolist()) <= set(rows.doc.tolist())
    assert whole.places
    for one, other in zip(whole.places, small.places, strict=True):
        assert [c.name for c in one.components] == [c.name for c in other.components]
        for way in ("own", "random"):
            for fold in ("fit", "held"):
                values = [getattr(getattr(place, way), fold) for place in (one, other)]
                np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-4)


def test_drawn_components_are_alive_on_both_folds_and_spread_over_density(lm):
    (place,) = harvested(lm, components=10).places
    (every,) = harvested(lm, components=10_000).places
    assert len(every.components) == every.pool == place.pool > 20
    for fold in ("fit", "held"):
        active = (getattr(every.own, fold) > 0).sum(0)
        assert (active >= CONFIG.fewest).all()
        assert (active <= CONFIG.densest * len(every.own.fit)).all() or fold == "held"
    assert {c.name for c in place.components} <= {c.name for c in every.components}
    ranked = [c.name for c in every.components]  # densest first: one is drawn of each tenth
    strata = [set(part.tolist()) for part in np.array_split(np.array(ranked), 10)]
    assert [sum(c.name in stratum for c in place.components) for stratum in strata] == [1] * 10
    assert [c.name for c in harvested(lm, components=10).places[0].components] == [c.name for c in place.components]


def test_random_directions_are_as_dense_as_the_components_beside_them(lm):
    for place in harvested(lm, "svd").places:
        own, random = ((activity.fit > 0).sum(0) for activity in (place.own, place.random))
        np.testing.assert_allclose(own, random, rtol=0.05)  # equal contexts have equal products, and go in or out together
        np.testing.assert_allclose([c.density for c in place.components], own / len(place.own.fit))
        assert not np.array_equal(place.own.fit > 0, place.random.fit > 0)


def test_shifting_keeps_every_columns_sizes(texts):
    own = activity(texts, *DETECTORS)
    moved = own.shifted(np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(moved.held, 0), np.sort(own.held, 0))
    assert ((moved.held > 0) & (own.held > 0)).sum() < 0.5 * (own.held > 0).sum()


def test_places_are_named_by_where_components_read_and_write(lm):
    names = {name: {place_of(site) for site in make(name, lm[0], (0, 1)).sites} for name in METHODS}
    assert names["transcoder"] == names["clt"] == {"mlp.in to mlp.out"}
    assert names["sae"] == {"mlp.out"}
    assert names["spd"] == {"mlp.up", "mlp.down"}


# ---- the measurement


def measured(decomposer, source, config=CONFIG):
    told: list[tuple[int, int]] = []
    rows = measurement("interpretability").measure(decomposer, source, config, lambda done, parts: told.append((done, parts)))
    assert told[-1][0] == told[-1][1]
    return results.unfolded(pd.DataFrame(rows).assign(family="own"))


class Detector(Decomposer):
    """Components that are on at g, at c, everywhere and nowhere, as told from the embeddings."""

    name = "detector"

    def build(self, generator):
        slot = Slot("0.resid", "0.mlp.out")
        self.sites = [Site("0", 0, (slot.read,), (slot,), 4)]

    def encode(self, inputs, gates=None):
        x, table = inputs["0.resid"], self.target.module.get_input_embeddings().weight
        told = [(x == table[LETTERS[letter]]).all(-1).float() for letter in "gc"]
        found = torch.stack([*told, torch.ones_like(told[0]), torch.zeros_like(told[0])], -1)
        return {"0": SiteCodes(found, (found > 0).float())}


def test_a_planted_decomposition_is_told_from_end_to_end(lm):
    rows = measured(Detector(MethodConfig(steps=0), lm[0], (0,)), lm[1])
    each = rows[(rows["component"] != "all") & (rows["way"] == "component")].set_index(["metric", "component"])["value"]
    assert set(each.index.get_level_values("component")) == {"0/0", "0/1"}  # neither what is always on nor what never is
    for name in ("rule_auroc", "rule_auroc_near", "rule_accuracy", "purity_token"):
        assert each[name].min() > 0.99
    whole = rows[(rows["component"] == "all") & (rows["at"] == "all")].set_index(["metric", "way"])["value"]
    assert whole["interpretability_pool", "component"] == 0.5
    assert whole["rule_auroc", "random directions"] > 0.8  # directions in embeddings are sets of tokens too
    assert abs(whole["rule_auroc", "shifted"] - 0.5) < 0.1


@pytest.fixture(scope="module")
def rows(lm):
    return measured(make("spd", lm[0], (0, 1)), lm[1])


def test_means_gains_and_bands_are_those_of_the_components(rows):
    assert set(rows["metric"]) == {metric.key for metric in measurement("interpretability").metrics}
    for form in ("mlp.up", "mlp.down"):
        of = lambda form=form, **wanted: rows[
            np.logical_and.reduce([rows[key] == value for key, value in (wanted | {"form": form}).items()])
        ]
        for name in ("rule_auroc", "purity_next"):
            each = [of(metric=name, way=way, at="all") for way in ("component", "random directions")]
            means = [one[one["component"] == "all"]["value"].item() for one in each]
            per = [one[one["component"] != "all"].set_index("component")["value"] for one in each]
            assert means == pytest.approx([one.mean() for one in per])
            gain = of(metric=f"{name}_gain")
            assert gain["value"].item() == pytest.approx((per[0] - per[1]).mean())
            assert gain["lo"].item() <= gain["value"].item() <= gain["hi"].item()
        assert set(of(metric="rule_auroc", component="all")["at"]) == {"all", "0.166667", "0.5", "0.833333"}
    assert set(rows["form"]) == {"mlp.up", "mlp.down"}
    assert set(rows["protocol"]) == {"clean"}


def test_measuring_twice_gives_the_same_rows(lm, rows):
    pd.testing.assert_frame_equal(measured(make("spd", lm[0], (0, 1)), lm[1]), rows)


def test_a_decomposition_without_components_to_draw_says_so(lm):
    found = measurement("interpretability").measure(make("spd", lm[0], (0,)), lm[1], CONFIG.model_copy(update={"fewest": 10**6}), print)
    assert {row["metric"] for row in found} == {"interpretability_pool"}
    assert all(row["value"] == 0 and "no component is active" in row["reason"] for row in found)


def test_a_target_without_text_is_refused(lm, toy):
    with pytest.raises(UserError, match="needs text"):
        measurement("interpretability").measure(make("spd", lm[0], (0,)), open_source(toy[0], DataConfig()), CONFIG, print)


@pytest.mark.parametrize("name", [*registry.names(), "global gates"])
def test_every_registered_method_is_drawn_from_and_compared(lm, name):
    """Untrained: what matters is that nothing is asked of a method that not all have."""
    name, more = ("spd", {"gate": "global_shared_mlp"}) if name == "global gates" else (name, {})
    kind = registry.method(name)
    if reason := kind.skip(lm[0], (0, 1)):
        pytest.skip(reason)
    wanted = {"k": 3, **getattr(kind, "presets", {}).get("smoke", {}), **more}
    config = {key: value for key, value in wanted.items() if key in kind.Config.model_fields}
    decomposer = kind(parse(kind.Config, config, name), lm[0], (0, 1), 0).eval()
    found = harvest(decomposer, lm[1], CONFIG.model_copy(update={"rows": 20, "fewest": 1, "densest": 0.99}))
    assert sum(len(place.components) for place in found.places) > 0
    for place in found.places:
        assert np.isfinite(place.own.held).all()
        assert np.isfinite(place.random.held).all()
    settings = JacobianConfig(rows=2, positions=2, probes=2, bootstrap=5)
    rows = measurement("jacobian").measure(decomposer, lm[1], settings, lambda done, parts: None)
    assert all(np.isfinite(row["value"]) != bool(row.get("reason")) for row in rows)
