"""Jacobians of replacement MLPs, against what they are known to be: the target's own, products of weights, and finite differences."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from decomp_bench import registry, results, targets
from decomp_bench.config import DataConfig, parse
from decomp_bench.data import source as open_source
from decomp_bench.data.streams import with_clean
from decomp_bench.interpretability.jacobian import JacobianConfig, _quantities, jacobians, sums
from decomp_bench.measurements import measurement
from decomp_bench.replacement import clean_codes, clean_points
from tests.test_intervene import METHODS

CONFIG = JacobianConfig(rows=6, positions=3, probes=16, batch=4, bootstrap=100)
LAYERS = (0, 1, 2)


def make(name, target, **config):
    kind = registry.method(name)
    return kind(parse(kind.Config, METHODS[name] | config, name), target, LAYERS, 0).eval()


def compared(decomposer, source, layer):
    """Jacobians [s, d, d] (output by input) of target and replacement at three positions of two rows."""
    batch = with_clean(source, source.batch("test", np.arange(2)), clean_points(decomposer), logits=False)
    at = (np.array([0, 0, 1]), np.array([1, 5, 4]))
    pair = jacobians(decomposer, batch, layer, at, torch.eye(decomposer.target.width))
    return batch, at, tuple(one.transpose(0, 1) for one in pair)


def measured(decomposer, source, config=CONFIG):
    told: list[tuple[int, int]] = []
    rows = measurement("jacobian").measure(decomposer, source, config, lambda done, parts: told.append((done, parts)))
    assert not told or told[-1][0] == told[-1][1]
    return results.unfolded(pd.DataFrame(rows)).set_index(["metric", "way", "mlp"])


@pytest.mark.parametrize("models", ["lm", "gated_lm"])
def test_with_every_neuron_the_jacobian_is_the_targets_own_and_that_is_its_derivative(models, request):
    target, source = request.getfixturevalue(models)
    neurons = make("neurons", target).at(k=24)
    for layer in LAYERS:
        batch, (rows, places), (original, own) = compared(neurons, source, layer)
        torch.testing.assert_close(own, original, atol=1e-5, rtol=1e-4)
        u, step = batch.clean[f"{layer}.mlp.in"], torch.randn(target.width, generator=torch.Generator().manual_seed(0))
        mlp = target.part(f"{layer}.mlp")
        with torch.no_grad():
            change = (mlp(u + 1e-3 * step) - mlp(u - 1e-3 * step))[rows, places] / 2e-3
        torch.testing.assert_close(original @ step, change, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("name", ["transcoder", "clt"])
def test_a_dictionarys_jacobian_is_its_active_writes_times_reads(lm, name):
    """Of a cross-layer one too: what earlier layers write is held constant."""
    target, source = lm
    decomposer = make(name, target)
    for site in decomposer.sites:
        batch, (rows, places), (_, own) = compared(decomposer, source, site.layer)
        on = clean_codes(decomposer, batch)[site.name].gate[rows, places - 1]
        slot = next(slot for slot in site.slots if slot.write == f"{site.layer}.mlp.out")
        read, write = decomposer.directions(site, slot)
        assert 0 < on.sum() <= 4 * len(rows)
        torch.testing.assert_close(own, torch.einsum("sn,no,ni->soi", on, write, read).detach(), atol=1e-5, rtol=1e-4)


def test_masked_matrices_respond_through_both_maps(lm):
    """The derivative at fixed masks, by finite differences of the replaced MLP."""
    target, source = lm
    decomposer = make("spd", target)
    batch, (rows, places), (_, own) = compared(decomposer, source, 1)
    step = torch.randn(target.width, generator=torch.Generator().manual_seed(0))
    codes = clean_codes(decomposer, batch)

    def output(size):
        from dataclasses import replace

        moved = replace(batch, clean={**batch.clean, "1.mlp.in": batch.clean["1.mlp.in"] + size * step})
        return decomposer.replaced(moved, (1,), "single", codes).outputs[1][rows, places - 1]

    with torch.no_grad():
        change = (output(1e-3) - output(-1e-3)) / 2e-3
    torch.testing.assert_close((own @ step).detach(), change, atol=2e-3, rtol=1e-2)


def test_a_perfect_replacement_scores_one_and_a_turned_one_nothing(lm):
    rows = measured(make("neurons", lm[0]).at(k=24), lm[1])["value"]
    assert rows["jacobian_cosine", "component", "all"] == pytest.approx(1, abs=1e-5)
    assert rows["jacobian_error", "component", "all"] == pytest.approx(0, abs=1e-3)
    assert abs(rows["jacobian_cosine", "turned", "all"]) < 0.25  # of 256 entries
    assert rows["jacobian_error", "turned", "all"] == pytest.approx(math.sqrt(2), abs=0.2)
    assert rows["jacobian_cosine", "random positions", "all"] < 0.999
    assert rows["jacobian_gain", "component", "all"] == pytest.approx(1 - rows["jacobian_cosine", "random positions", "all"], abs=1e-5)


def test_figures_do_not_depend_on_the_basis_nor_on_batches(lm):
    decomposer = make("transcoder", lm[0])
    whole = sums(decomposer, lm[1], CONFIG, lambda: None)
    for other in (CONFIG.model_copy(update={"batch": 1}), CONFIG.model_copy(update={"probes": 1000})):
        found = sums(decomposer, lm[1], other, lambda: None)
        for layer, table in whole.by_layer.items():
            np.testing.assert_allclose(found.by_layer[layer], table, rtol=1e-4, atol=1e-6)


def test_fewer_probes_estimate_the_same(lm):
    decomposer = make("transcoder", lm[0])
    exact, rough = (measured(decomposer, lm[1], JacobianConfig(rows=20, probes=p, bootstrap=10))["value"] for p in (16, 8))
    for name in ("jacobian_cosine", "jacobian_error"):
        assert rough[name, "component", "all"] == pytest.approx(exact[name, "component", "all"], abs=0.15)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_compared_or_says_why_not(lm, name):
    rows = measured(make(name, lm[0]), lm[1])
    assert {key[0] for key in rows.index} == {metric.key for metric in measurement("jacobian").metrics}
    if make(name, lm[0]).kind == "autoencoding":
        assert rows["value"].isna().all()
        assert rows["reason"].str.contains("given the MLP's output").all()
        return
    cosine = rows.loc["jacobian_cosine"]
    assert cosine["value"].between(-1, 1).all()
    assert ((cosine["lo"] <= cosine["value"]) & (cosine["value"] <= cosine["hi"])).all()
    assert set(cosine.loc["component"].index) == {"all", "0", "1", "2"}
    assert cosine.loc[("component", "all"), "value"] == pytest.approx(cosine.loc["component"]["value"][["0", "1", "2"]].mean())
    assert set(rows["protocol"]) == {"single"}


def test_a_replacement_that_ignores_its_input_has_an_error_of_one(lm):
    decomposer = make("transcoder", lm[0])
    with torch.no_grad():
        for name, parameter in decomposer.named_parameters():
            if "dec" in name.lower():
                parameter.zero_()
    rows = measured(decomposer, lm[1])["value"]
    assert rows["jacobian_error", "component", "all"] == pytest.approx(1)
    assert rows["jacobian_cosine", "component", "all"] == 0


@pytest.mark.parametrize("uri", ["toy:resid_mlp2", "toy:tms_5-2@2", "toy:tms_5-2-id@2"])
def test_on_a_toy_all_of_its_own_directions_respond_as_it_does(uri):
    target = targets.load(uri)
    source = open_source(target, DataConfig())
    kind = registry.method("svd")
    decomposer = kind(parse(kind.Config, {"k": 1000}, "svd"), target, target.layer_tuple("all"), 0).eval()
    rows = measured(decomposer, source)["value"]
    assert rows["jacobian_cosine", "component", "all"] == pytest.approx(1, abs=1e-5)
    assert rows["jacobian_error", "component", "all"] == pytest.approx(0, abs=1e-3)
    is_linear = "tms" in uri  # its relu comes after what is replaced
    assert (rows["jacobian_cosine", "random positions", "all"] > 0.999) == is_linear
    for table in sums(decomposer, source, CONFIG, lambda: None).by_layer.values():
        assert 0 < table[:, 0].sum() <= CONFIG.rows * CONFIG.positions


def test_positions_where_the_target_does_not_respond_are_left_out():
    original, own = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    original[:, 1] = 0
    found = _quantities(original, own, torch.eye(4), np.zeros(3, np.int64))
    assert found[:, 0].tolist() == [1, 0, 1]
    assert (found[1] == 0).all()
