"""Recovery on toys: planted truth scores full marks through the whole evaluation, junk does not, and every null is where chance is."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import pytest
import torch

from decomp_bench import data, registry, targets
from decomp_bench.config import DataConfig, EvalConfig, MethodConfig, parse
from decomp_bench.decomposer import Decomposer, Site, SiteCodes, Slot
from decomp_bench.evaluate import evaluate
from decomp_bench.metrics import metric_catalogue
from decomp_bench.metrics.recovery import METRICS
from decomp_bench.targets.toys.hierarchy import Hierarchy
from decomp_bench.targets.toys.resid import Resid
from decomp_bench.targets.toys.two_hop import TwoHop
from tests.planted import Basis
from tests.targets.test_toys import QUIET, recorded

CONFIG = EvalConfig(tokens=4096, bootstrap=2, protocols=("cascading",), gates=("self",), sweep=False)


class Planted(Decomposer):
    """The known mechanisms of every map as components, each on where its feature (of a last map: its output) is; junk where asked."""

    name = "planted"
    trainable = False
    junk: ClassVar[bool] = False

    def build(self, generator):
        truth, self.parts = self.target.toy.truth, {}
        for (read, write), known in truth.mechanisms.items():
            if read == write and read in self.target.map_paths and int(read[0]) in self.layers:
                pair = torch.linalg.pinv(known.basis).T, known.vectors
                if self.junk:
                    pair = tuple(torch.randn(v.shape, generator=generator) for v in pair)
                self.parts[read] = pair if known.side == "read" else pair[::-1]
                layer = int(read[0])
                self.sites.append(Site(read, layer, (f"{layer}.mlp.in",), (Slot(read, read),), len(known.vectors)))

    def encode(self, inputs, gates=None):
        truth, found = self.target.toy.truth, {}
        for site in self.sites:
            if site.name in inputs:
                gate = gates[site.name].gate if gates is not None else self._on(site, truth, inputs[f"{site.layer}.mlp.in"])
                found[site.name] = SiteCodes(inputs[site.name] @ self.parts[site.name][0].T, gate)
        return found

    def _on(self, site, truth, x):
        known = truth.mechanisms[f"{site.layer}.mlp.in", f"{site.layer}.mlp.out"]
        on = (x @ torch.linalg.pinv(known.basis)).abs() > 0.05
        if truth.hop is not None and site.name == "1.mlp.down":
            on = (on.float() @ truth.hop.edges.float()) > 0
        return on.float()

    def decode(self, codes, write, inputs):
        value = codes[write].value @ self.parts[write][1]
        bias = self.target.bias(write) if write not in self._taken else self._taken[write]
        return value if bias is None else value + bias

    def bind(self, target):
        super().bind(target)
        object.__setattr__(self, "_taken", {point: target.bias(point) for point in target.map_paths})

    def component_sizes(self, site):
        return sum(self.target.weight(site.name).shape)

    def directions(self, site, slot):
        return self.parts[site.name]


class Junk(Planted):
    name = "junk"
    junk = True


def scores(kind, target):
    """(metric, site or layer) -> value, `all` included."""
    made = kind(MethodConfig(steps=0), target, tuple(range(target.layers)))
    (found,) = evaluate([made], data.source(target, DataConfig()), CONFIG)
    return {(r["metric"], r["site"] if r["site"] != "all" else r["layer"]): r for r in found.rows}


@pytest.fixture(scope="module")
def two_hop():
    recipe = dataclasses.replace(TwoHop(), steps=1000)
    return recipe.build(recipe.train(0, QUIET)[0], "toy:two_hop", "cpu")


@pytest.fixture(params=["tms", "two_hop"])
def known(request):
    return recorded(4) if request.param == "tms" else request.getfixturevalue("two_hop")


FULL = {"mmcs": 1, "ml2r": 1, "ml2r_longest": 1, "matched_cosine": 1, "recovery_precision": 1, "recovery_recall": 1, "recovery_f1": 1,
        "merges": 0, "splits": 0, "spare": 0, "live_surplus": 0, "ci_error": 0}  # fmt: skip


def test_planted_truth_scores_full_marks_and_is_the_target(known):
    found = scores(Planted, known)
    for key, value in FULL.items():
        assert found[key, "all"]["value"] == pytest.approx(value, abs=1e-4), key
        assert found[key, "all"]["applicable"] == "yes"
    assert found["output_mse", "all"]["value"] < 1e-3


def test_junk_is_at_its_null(known):
    found = scores(Junk, known)
    value = {key: row["value"] for key, row in found.items()}
    assert value["recovery_f1", "all"] == 0
    assert value["recovery_f1_null", "all"] < 0.1
    for key in ("mmcs", "matched_cosine"):
        assert abs(value[key, "all"] - value[f"{key}_null", "all"]) < 0.2, key
        assert value[f"{key}_null", "all"] < 0.97


def test_every_metric_tells_the_truth_from_junk_or_says_what_it_is_blind_to(known):
    """Junk here has the truth's own importances, so that what reads importances alone has its own test below."""
    truth, junk = ({key: row["value"] for (key, part), row in scores(kind, known).items() if part == "all"} for kind in (Planted, Junk))
    claims = {row["key"]: row["direction"] for row in metric_catalogue() if row["direction"] != "none" and not row["blind"]}
    told = {
        key: truth[key] > junk[key] if direction == "higher" else truth[key] < junk[key]
        for key, direction in claims.items()
        if key != "ci_error" and math.isfinite(truth.get(key, math.nan)) and math.isfinite(junk.get(key, math.nan))
    }
    assert told.keys() >= {"output_mse", "fvu", "norm_mse", "matched_cosine", "recovery_f1", "spare"}
    assert [key for key, better in told.items() if not better] == []


def test_shuffled_importances_are_an_error_where_true_ones_are_not(known):
    found = scores(Planted, known)
    assert found["ci_error_null", "all"]["value"] > 4


def test_the_second_hop_answers_and_its_edges_are_found(two_hop):
    found = {key: row["value"] for key, row in scores(Planted, two_hop).items()}
    assert found["hop_r2", "all"] == pytest.approx(1, abs=1e-3)
    assert (found["edge_precision", "all"], found["edge_recall", "all"]) == (1, 1)


class Shortcut(Basis):
    """A second layer whose output is remembered from the unpatched input: it does not read what the first layer wrote."""

    name = "shortcut"
    kind = "replacement"

    def build(self, generator):
        self.sites = [Site("1", 1, ("0.mlp.in",), (Slot("0.mlp.in", "1.mlp.out"),), self.target.width)]

    def decode(self, codes, write, inputs):
        m = (inputs["0.mlp.in"] @ self.target.module.embed.T).abs() @ self.target.toy.truth.hop.basis
        return self.mlp(m)


def test_a_shortcut_past_the_first_layer_does_not_answer(two_hop):
    Shortcut.mlp = staticmethod(two_hop.part("1.mlp"))
    found = scores(Shortcut, two_hop)
    assert found["output_mse", "all"]["value"] < 1e-4, "the outputs are right"
    assert found["hop_r2", "all"]["value"] == pytest.approx(0, abs=1e-3), "and do not depend on the first layer"
    assert found["edge_recall", "all"]["value"] == 0
    assert found["edge_precision", "all"]["applicable"] == "no"


class Honest(Planted):
    """A component for each feature of a hierarchy at the MLP, on where the feature is on; parents give way to children where asked."""

    absorbs: ClassVar[bool] = False

    def build(self, generator):
        self.sites = [Site("0", 0, ("0.mlp.in",), (Slot("0.mlp.in", "0.mlp.out"),), self.target.width)]

    def encode(self, inputs, gates=None):
        x, parent = inputs["0.mlp.in"], self.target.toy.truth.parent
        on = (x > 0).float()
        if self.absorbs:
            for p in (parent < 0).nonzero().flatten():
                on[:, p] *= 1 - on[:, parent == p].amax(1)
        return {"0": SiteCodes(x, gates["0"].gate if gates is not None else on)}

    def decode(self, codes, write, inputs):
        return codes["0"].value @ self.target.toy.truth.mechanisms["0.mlp.in", "0.mlp.out"].vectors

    def component_sizes(self, site):
        return 2 * self.target.width

    def directions(self, site, slot):
        known = self.target.toy.truth.mechanisms["0.mlp.in", "0.mlp.out"]
        return known.basis, known.vectors


class Absorbing(Honest):
    absorbs = True


def test_absorption_is_seen_in_components_not_in_directions():
    recipe = dataclasses.replace(Hierarchy(), steps=50)
    target = recipe.build(recipe.train(0, QUIET)[0], "toy:hierarchy", "cpu")
    for kind, expected in ((Honest, 0.0), (Absorbing, 1.0)):
        found = scores(kind, target)
        assert found["absorption", "all"]["value"] == pytest.approx(expected)
        assert found["undetected", "all"]["value"] == 0
        assert found["recovery_f1", "all"]["value"] == 1


def test_neuron_contributions_and_live_counts_of_a_residual_mlp():
    recipe = Resid(12, 1, 6, steps=40, width=30)
    target = recipe.build(recipe.train(0, QUIET)[0], "toy:resid_mlp_1l", "cpu")

    class Both(Planted):
        def build(self, generator):
            super().build(generator)
            weight = self.target.weight("0.mlp.down")
            self.parts["0.mlp.down"] = torch.eye(6), weight.T.contiguous()
            self.sites.append(Site("0.mlp.down", 0, ("0.mlp.in",), (Slot("0.mlp.down", "0.mlp.down"),), 6))

        def _on(self, site, truth, x):
            return torch.ones(len(x), 6) if site.name == "0.mlp.down" else super()._on(site, truth, x)

    found = {key: row["value"] for key, row in scores(Both, target).items()}
    assert found["contributions", "all"] == pytest.approx(1, abs=1e-5)
    assert abs(found["contributions_null", "all"]) < 0.7
    assert found["ci_error", "0.mlp.down"] == 0
    assert found["ci_error", "0.mlp.up"] == 0
    assert found["live_surplus", "all"] == 0
    assert found["live", "0.mlp.down"] == 6


def test_a_component_that_writes_where_nothing_reads_is_not_counted():
    recipe = Resid(12, 2, 6, steps=40, width=30)
    target = recipe.build(recipe.train(0, QUIET)[0], "toy:resid_mlp_2l", "cpu")

    def live(layer: int) -> float:
        name = f"{layer}.mlp.down"
        readout, up = target.toy.truth.readout, target.weight("1.mlp.up")
        unread = torch.linalg.svd(torch.cat([readout, up]), full_matrices=True).Vh[-1:]
        read_by_the_next_alone = up[:1] - up[:1] @ torch.linalg.pinv(readout) @ readout

        class Spare(Planted):
            def build(self, generator):
                super().build(generator)
                self.parts[name] = torch.eye(6)[[*range(6), 0, 0]], torch.cat([target.weight(name).T, unread, read_by_the_next_alone])
                self.sites.append(Site(name, layer, (f"{layer}.mlp.in",), (Slot(name, name),), 8))

            def _on(self, site, truth, x):
                return torch.ones(len(x), 8) if site.name == name else super()._on(site, truth, x)

        return scores(Spare, target)["live", name]["value"]

    assert live(1) == 6
    assert live(0) == 7


def test_a_toy_without_truth_says_that_nothing_can_be_compared(toy):
    target, _ = toy
    found = scores(Basis, target)
    for metric in METRICS:
        row = found[metric.key, "all"]
        assert row["applicable"] == "no"
        assert "mechanisms are known" in row["reason"]
        assert math.isnan(row["value"])


def test_every_null_names_a_metric():
    keys = {row["key"] for row in metric_catalogue()}
    nulls = [key for key in keys if key.endswith("_null")]
    assert nulls
    assert all(key.removesuffix("_null") in keys for key in nulls)


@pytest.mark.parametrize("apart", [True, False])
def test_a_decomposer_of_the_seed_of_a_toy_does_not_draw_the_toy_again(apart):
    """Residual toys draw their embedding first, from their seed: a decomposer's first numbers of that seed would be its features."""
    target = targets.load("toy:resid_mlp1@3")
    features = torch.nn.functional.normalize(target.module.embed, dim=1)

    class Drawing(Basis):
        def build(self, generator):
            self.first = torch.nn.functional.normalize(torch.randn(features.shape, generator=generator), dim=1)
            super().build(generator)

    if not apart:
        target.apart = 0
    nearest = (Drawing(MethodConfig(), target, (0,), seed=3).first @ features.T).abs().max(1).values
    assert (nearest > 0.99).all() != apart


def test_gates_that_only_the_clean_pass_has_are_not_asked_how_they_answer_a_patch(two_hop):
    kind = registry.method("apd")
    made = kind(parse(kind.Config, {"components": 6, "rank": 2, "k": 1.0}, "apd"), two_hop, (0, 1), 0).eval()
    (found,) = evaluate([made], data.source(two_hop, DataConfig()), CONFIG.model_copy(update={"gates": ("clean",)}))
    rows = {row["metric"]: row for row in found.rows if (row["layer"], row["site"], row["gates"]) == ("all", "all", "clean")}
    assert rows["matched_cosine"]["applicable"] == "yes"
    assert (rows["hop_r2"]["applicable"], math.isnan(rows["hop_r2"]["value"])) == ("no", True)
