"""Floors: with everything kept they are the target itself, and what they keep is what they say."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch

from decomp_bench.config import parse
from decomp_bench.data.streams import ActivationStream, iterate, with_clean
from decomp_bench.decomposer import Choice, Decomposer
from decomp_bench.registry import method
from decomp_bench.replacement import clean_codes, clean_points, clean_rows

FLOORS = [("neurons", {}), ("svd", {}), ("svd", {"kind": "autoencoding"})]
TARGETS = ["lm", "gated_lm", "toy"]


@pytest.fixture(params=TARGETS)
def world(request: pytest.FixtureRequest):
    return request.getfixturevalue(request.param)


def make(world, name: str, **config) -> Decomposer:
    target, source = world
    kind = method(name)
    decomposer = kind(parse(kind.Config, config, name), target, tuple(range(target.layers)), 0)
    decomposer.finish(iterate(ActivationStream(source, decomposer.points(), 128)))
    return decomposer.eval()


def a_batch(world, decomposer, rows: int = 5):
    target, source = world
    assert target is decomposer.target
    return with_clean(source, source.batch("validation", np.arange(rows)), clean_points(decomposer))


@pytest.mark.parametrize(("name", "config"), FLOORS)
def test_with_everything_kept_the_model_is_the_target(world, name, config):
    decomposer = make(world, name, **config, **({"calibration": 512} if config else {}))
    batch = a_batch(world, decomposer)
    every = decomposer.at(k=max(site.n for site in decomposer.sites))
    for protocol in ("cascading", "clean"):
        out = every.replaced(batch, protocol=protocol)
        for layer, y in out.outputs.items():
            torch.testing.assert_close(y, clean_rows(decomposer, batch.clean[f"{layer}.mlp.out"]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(out.logits, batch.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "config"), FLOORS)
def test_k_is_the_number_kept_and_more_is_better(world, name, config):
    decomposer = make(world, name, **config, **({"calibration": 512} if config else {}))
    batch = a_batch(world, decomposer, 24)
    assert decomposer.config.k == 16
    assert decomposer.variant == "k=16"
    errors = []
    for k in (1, 4, 10):
        view = decomposer.at(k=k)
        assert all(int(codes.active.sum(-1).max()) <= k for codes in clean_codes(view, batch).values())
        y = view.replaced(batch, protocol="clean").outputs[0]
        errors.append(float((y - clean_rows(view, batch.clean["0.mlp.out"])).square().sum()))
    assert errors[0] > errors[1] > errors[2]
    sweep = decomposer.sweep()
    assert sweep[-1] == Choice(k=max(site.n for site in decomposer.sites))
    assert all(2 * a.k < b.k < 3 * a.k for a, b in itertools.pairwise(sweep[:-1]))


def test_neurons_are_the_targets_hidden_units_and_the_strongest_are_kept(world):
    target, _ = world
    decomposer = make(world, "neurons", k=3)
    batch = a_batch(world, decomposer)
    hidden, _ = target.clean(batch.x, {"1.mlp.down"})
    codes = clean_codes(decomposer, batch)["1"]
    strength = clean_rows(decomposer, hidden["1.mlp.down"])
    torch.testing.assert_close(codes.strength, strength)
    score = strength.abs() * target.weight("1.mlp.down").norm(dim=0)
    weakest_kept = torch.where(codes.active, score, torch.inf).amin(-1)
    strongest_left = torch.where(codes.active, 0.0, score).amax(-1)
    assert (weakest_kept >= strongest_left).all()


def test_neurons_are_billed_for_every_row_and_column(lm, gated_lm, toy):
    for world, vectors, bias in ((lm, 2, 0), (gated_lm, 3, 0), (toy, 2, 12)):
        decomposer = make(world, "neurons")
        site = decomposer.sites[0]
        assert decomposer.component_sizes(site) == vectors * world[0].width
        assert decomposer.constant_size(site.slots[0].write) == bias


def test_neurons_run_while_their_own_layers_are_replaced(world):
    """The hidden layer comes from the target's MLP, not from what has been put in its place."""
    decomposer = make(world, "neurons", k=2)
    batch = a_batch(world, decomposer)
    first, second = (decomposer.replaced(batch).logits for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.allclose(first, batch.logits, atol=1e-3)


def test_singular_components_of_a_matrix(gated_lm):
    target, _ = gated_lm
    decomposer = make(gated_lm, "svd")
    assert [site.name for site in decomposer.sites][:3] == target.maps(0)
    for site in decomposer.sites:
        read, write = decomposer.directions(site, site.slots[0])
        torch.testing.assert_close(write.T @ read, target.weight(site.name), atol=1e-5, rtol=1e-4)
        assert (read.norm(dim=1).diff() <= 1e-6).all()
        torch.testing.assert_close(write @ write.T, torch.eye(site.n), atol=1e-5, rtol=0)
        assert decomposer.component_sizes(site) == sum(target.weight(site.name).shape)


def test_principal_components_explain_most_first(lm):
    target, source = lm
    decomposer = make(lm, "svd", kind="autoencoding", calibration=512)
    y = torch.cat([ActivationStream(source, decomposer.points(), 128).batch(i).clean["0.mlp.out"] for i in range(4)])
    codes = decomposer.encode({"0.mlp.out": y})["0.mlp.out"]
    assert (codes.strength.var(0).diff() <= 1e-3).all()
    torch.testing.assert_close(codes.strength.mean(0), torch.zeros(target.width), atol=1e-4, rtol=0)
    assert decomposer.constant_size("0.mlp.out") == target.width


@pytest.mark.parametrize(
    ("name", "kinds"), [("svd", ("svd", "svd (sees y)")), ("random_directions", ("random directions", "random directions (sees y)"))]
)
def test_the_config_decides_what_a_floor_imitates(toy, name, kinds):
    kind = method(name)
    for config, family in zip(("replacement", "autoencoding"), kinds, strict=True):
        decomposer = kind(parse(kind.Config, {"kind": config}, name), toy[0], (0, 1), 0)
        assert (decomposer.kind, decomposer.family) == (config, family)
        sees = all(site.reads[0].endswith("mlp.out") for site in decomposer.sites)
        assert sees == (config == "autoencoding")


def test_random_directions_train_everything_but_their_decoder(toy):
    target, source = toy
    for config in ("replacement", "autoencoding"):
        kind = method("random_directions")
        decomposer = kind(parse(kind.Config, {"kind": config, "features": 24, "k": 4, "calibration": 512}, "x"), target, (0, 1), 0)
        before = {key: value.clone() for key, value in decomposer.state_dict().items()}
        stream = ActivationStream(source, decomposer.points(), 128)
        decomposer.train().before_training(iterate(stream))
        optimiser = torch.optim.AdamW(decomposer.parameter_groups(), lr=1e-2, weight_decay=0.0)
        for step in range(30):
            losses = decomposer.loss(stream.batch(step), step / 30)
            sum(losses.values()).backward()
            optimiser.step()
            optimiser.zero_grad()
            decomposer.after_step(step / 30)
        moved = {key for key, value in decomposer.state_dict().items() if not torch.equal(value, before[key])}
        for layer in ("0", "1"):
            assert {f"coders.{layer}.W_enc", f"coders.{layer}.b_enc", f"outputs.{layer}.b_dec"} <= moved
            assert f"coders.{layer}.W_dec" not in moved
            assert torch.allclose(decomposer.state_dict()[f"coders.{layer}.W_dec"].norm(dim=1), torch.ones(24), atol=1e-6)


def test_floors_say_where_they_do_not_apply(toy):
    target, _ = toy
    bare = copy.copy(target)
    bare.uri, bare.map_paths = "bare", {}
    for name in ("neurons", "svd"):
        assert method(name).skip(target, (0,)) is None
        assert "no MLP of linear maps at layer 1" in method(name).skip(bare, (1,))
