"""SPD: its loss and its evaluation against computations by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from decomp_bench import data
from decomp_bench.config import DataConfig, parse
from decomp_bench.data.streams import SequenceStream, with_clean
from decomp_bench.errors import UserError
from decomp_bench.methods._importance import Penalty
from decomp_bench.methods._masks import Uniforms
from decomp_bench.methods._reconstruction import collapsed, rows_of
from decomp_bench.methods._spd_losses import OwnMasks
from decomp_bench.methods.spd import SPD, SPDConfig
from decomp_bench.replacement import clean_codes, clean_points, clean_rows
from tests.targets.test_toys import recorded

CPU = torch.device("cpu")


def small(target, **config) -> SPD:
    return SPD(SPDConfig(**{"gate_hidden": (8,), "components": 12, "init": "random", **config}), target, tuple(range(target.layers)), 0)


def a_batch(decomposer: SPD, source, rows=(0, 1, 2)):
    return with_clean(source, source.batch("train", np.array(rows)), clean_points(decomposer))


def test_the_loss_of_a_language_model_and_its_gradients_by_hand(gated_lm, monkeypatch):
    """With pinned sources, the KL is that of a model whose masked matrices are formed explicitly, position by position."""
    target, source = gated_lm
    spd = small(target, stochastic=1.0, subset=0.0, faithfulness=0.0, importance=0.0)
    lengths = source.rows("train").length
    batch = a_batch(spd, source, (int(lengths.argmin()), int(lengths.argmax()), 0))  # with padding
    fixed = torch.rand(1 << 14, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(Uniforms, "draw", lambda _self, *shape, device: fixed[: math.prod(shape)].view(shape))
    sum(spd.loss(batch, 0.0).values()).backward()
    found = {name: p.grad.clone() for name, p in spd.named_parameters()}
    spd.zero_grad()

    real = torch.arange(batch.x.shape[1]) < batch.length[:, None]
    real[:, 0] = False
    n = int(real.sum())
    modules = {}
    inputs = {p: batch.clean[p] for p in spd.points()}
    logits = spd.logits(inputs, {site.name: inputs[site.name] @ spd.components[site.name].V for site in spd.sites})
    for name, part in spd.components.items():
        lower = logits[name][real].clamp(0, 1) + 0.01 * (logits[name][real].clamp(max=0) - logits[name][real].clamp(max=0).detach())
        lower.register_hook(lambda g, z=logits[name][real]: torch.where((z <= 0) & (g > 0), 0.0, g))
        mask = lower + (1 - lower) * fixed[: n * part.n].view(n, part.n)
        delta = fixed[:n]
        modules[target.path(name)] = _Explicit(target.part(name), part, real, mask, delta)
    with target.swapped(modules):
        output = target(batch.x)
    kl = F.kl_div(output[real].log_softmax(-1), batch.logits[real].log_softmax(-1), log_target=True, reduction="sum") / n
    kl.backward()
    assert torch.allclose(spd.loss(batch, 0.0)["stochastic"], kl, rtol=1e-5)
    for name, parameter in spd.named_parameters():
        scale = max(float(parameter.grad.abs().max()), 1e-6)
        assert float((found[name] - parameter.grad).abs().max()) <= 1e-4 * scale, name


class _Explicit(torch.nn.Module):
    """A map whose real positions multiply by their own masked matrix."""

    def __init__(self, original, part, real, mask, delta) -> None:
        super().__init__()
        self.original, self.part, self.real, self.mask, self.delta = original, part, real, mask, delta

    def forward(self, x):
        V, U, W = self.part.V, self.part.U, self.original.weight
        matrices = torch.einsum("ic,nc,co->noi", V, self.mask, U) + self.delta[:, None, None] * (W - (V @ U).T)
        y = self.original(x)
        return y.index_put((self.real,), torch.einsum("noi,ni->no", matrices, x[self.real]))


def test_every_loss_trains_and_draws_from_its_own_generator(toy, lm):
    for target, source in (toy, lm):
        for options in (
            {"gate": "scalar", "stochastic": 1.0, "layerwise": 1.0, "penalty": "lp", "p": 1.0, "p_end": 0.5, "beta": 0.1},
            {"sigmoid": "leaky", "samples": 2, "delta": False},
        ):
            spd = small(target, **options)
            batch = a_batch(spd, source, range(8))
            torch.manual_seed(0)
            first = spd.loss(batch, 0.3)
            sum(first.values()).backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in spd.parameters())
            assert {"faithfulness", "importance", "subset"} <= first.keys()
            torch.manual_seed(1)
            again = small(target, **options).loss(batch, 0.3)
            assert all(torch.equal(first[key], again[key]) for key in first)


def test_a_layer_alone_is_compared_with_the_others_the_target_s(toy):
    """Layerwise reconstruction is the mean over maps of the error with only that map masked."""
    target, source = toy
    spd = small(target, subset=0.0, layerwise=1.0, delta=False, gate_bias=-50.0)  # nothing is important: masks are the sources
    batch = a_batch(spd, source, range(16))
    value = spd.loss(batch, 0.0)["layerwise"]
    spd.uniforms = Uniforms(spd.uniforms.seed)
    errors = []
    for name, part in spd.components.items():
        mask = spd.uniforms.draw(16, part.n, device=CPU)

        def alone(module, args, _y, part=part, mask=mask):
            return (args[0] @ part.V * mask) @ part.U + module.bias

        hook = target.part(name).register_forward_hook(alone)
        errors.append((target(batch.x) - batch.logits).square().mean())
        hook.remove()
    assert torch.allclose(value, torch.stack(errors).mean(), rtol=1e-5)


def test_chosen_rows_and_weights_of_all_rows_agree(lm, monkeypatch):
    """On a GPU every position is computed, with a mask of one where it is not routed and a weight of zero where it is padding."""
    target, source = lm
    spd = small(target, delta=False, gate_bias=50.0, beta=0.1)  # all masks are one, whatever the draws
    lengths = source.rows("train").length
    batch = a_batch(spd, source, (int(lengths.argmin()), int(lengths.argmax()), 0))
    assert batch.length.unique().numel() > 1
    chosen = spd.loss(batch, 0.5)
    monkeypatch.setattr("decomp_bench.methods._reconstruction.gathers", lambda _device: False)
    monkeypatch.setattr("decomp_bench.methods._spd_losses.uniform_subset", lambda n, maps, *_: torch.ones(n, maps, dtype=torch.bool))
    whole = spd.loss(batch, 0.5)
    assert torch.allclose(chosen["importance"], whole["importance"])
    spd.uniforms = Uniforms(spd.uniforms.seed)
    monkeypatch.undo()
    monkeypatch.setattr("decomp_bench.methods._spd_losses.uniform_subset", lambda n, maps, *_: torch.ones(n, maps, dtype=torch.bool))
    assert torch.allclose(spd.loss(batch, 0.5)["subset"], whole["subset"], rtol=1e-5)


def test_evaluation_masks(lm):
    target, source = lm
    spd = small(target, components=None, init="neuron").eval()
    batch = a_batch(spd, source)
    everything = spd.at(mask="all", delta=True)
    assert torch.allclose(everything.replaced(batch).logits, batch.logits, atol=1e-5)
    assert torch.allclose(spd.at(mask="all").replaced(batch).logits, batch.logits, atol=1e-4)  # neurons sum to W
    whole = clean_codes(spd, batch)
    soft, high, top = (clean_codes(spd.at(**c), batch) for c in ({"mask": "soft"}, {"threshold": 0.5}, {"k": 3}))
    for name, codes in whole.items():
        assert torch.equal(codes.gate, (soft[name].gate > 0).float())
        assert torch.equal(high[name].gate, (soft[name].gate > 0.5).float())
        assert (top[name].gate.sum(-1) == 3).all()
        assert codes.delta is None
    point = spd.sites[0].name
    assert (spd.constant_size(point), everything.constant_size(point)) == (0, target.weight(point).numel())
    assert everything.constant_coefficients(point) == min(target.weight(point).shape)


def test_l0_and_kl_of_a_checkpoint_by_hand(gated_lm):
    target, source = gated_lm
    spd = small(target).eval()
    batch = a_batch(spd, source)
    found = spd.replaced(batch, gates="clean")
    inputs = {p: batch.clean[p] for p in spd.points()}
    logits = spd.logits(inputs, {site.name: inputs[site.name] @ spd.components[site.name].V for site in spd.sites})
    hooks = []
    for name, part in spd.components.items():

        def masked(_module, args, y, part=part, z=logits[name]):
            on = (z > 0).float()
            return torch.cat([y[:, :1], ((args[0] @ part.V * on) @ part.U)[:, 1:]], 1)

        hooks.append(target.part(name).register_forward_hook(masked))
    by_hand = target(batch.x)
    for hook in hooks:
        hook.remove()
    assert torch.allclose(found.logits, by_hand, atol=1e-5)
    for name, codes in found.codes.items():
        assert torch.equal(codes.gate.sum(), clean_rows(spd, logits[name] > 0).sum().float())


def test_attention_on_request(gated_lm):
    target, source = gated_lm
    spd = small(target, attention=True)
    assert {site.name for site in spd.sites} >= {"0.attn.q", "2.attn.o", "1.mlp.gate"}
    batch = a_batch(spd, source)
    sum(spd.loss(batch, 0.0).values()).backward()
    assert spd.parts["0_attn_k"].V.grad.abs().sum() > 0
    exact = spd.eval().at(mask="all", delta=True).replaced(batch)
    assert torch.allclose(exact.logits, batch.logits, atol=1e-5)
    assert set(clean_codes(spd, batch)) == {site.name for site in spd.sites}


def test_directions_sum_to_the_matrix_and_sizes_are_those_of_their_vectors(lm):
    target, _ = lm
    spd = small(target, components=None, init="neuron")
    for site in spd.sites:
        read, write = spd.directions(site, site.slots[0])
        assert torch.allclose(write.T @ read, target.weight(site.name), atol=1e-6)
        assert spd.component_sizes(site) == read.shape[1] + write.shape[1]
        assert len(read) == site.n == round(24 * 1.125)


def test_gates_that_start_at_neurons_open_the_neurons_own_components(lm):
    target, source = lm
    spd = small(target, components=None, init="neuron", gate_hidden=None).eval()
    batch = a_batch(spd, source)
    spd.before_training(iter([batch]))
    hidden = batch.clean["1.mlp.down"][:, 1:].flatten(0, 1)  # what the target's own neurons do
    soft = clean_codes(spd.at(mask="soft"), batch)
    for name in ("1.mlp.up", "1.mlp.down"):
        gate = soft[name].gate.flatten(0, 1)[:, : hidden.shape[1]]
        strong = hidden > hidden.quantile(0.9)
        assert gate[strong].mean() > 1.5 * gate[~strong].mean()
    without = small(target, components=None, init="neuron", gate_hidden=None, gate_init="random")
    assert not torch.equal(without.gates["1_mlp"].hidden[0].weight, spd.gates["1_mlp"].hidden[0].weight)


@pytest.mark.parametrize("bias", [False, True])
def test_rows_without_input_may_be_taken_together(bias):
    """With masks that are not drawn, loss and gradients are those of all rows; where a map reads something on such rows, they stay."""
    target = recorded(4)
    if bias:
        target.part("0.mlp.up").bias = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    source = data.source(target, DataConfig())
    found = []
    for collapse in (False, True):
        config = SPDConfig(
            components=7, init="random", gate="scalar", importance=0.1, subset=0.0, unmasked=1.0, ci_masked=1.0, delta=False,
            collapse=collapse,
        )  # fmt: skip
        decomposer = SPD(config, target, (0,))
        batch = SequenceStream(source, clean_points(decomposer), 256).batch(0)
        torch.stack(list(decomposer.loss(batch, 0.5).values())).sum().backward()
        seen = len(collapsed(batch, target, decomposer.points())[1].weight)
        assert seen == 256 if bias else seen < 100
        found.append([parameter.grad for parameter in decomposer.parameters()])
    for whole, together in zip(*found, strict=True):
        torch.testing.assert_close(whole, together, rtol=1e-4, atol=1e-7)


def whole_rows(spd: SPD, source):
    """Two rows without padding, so that every position is drawn for in the same order."""
    lengths = source.rows("train").length
    return a_batch(spd, source, tuple(np.flatnonzero(lengths == lengths.max())[:2].tolist()))


def pinned(monkeypatch) -> torch.Tensor:
    fixed = torch.rand(1 << 14, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(Uniforms, "draw", lambda _self, *shape, device: fixed[: math.prod(shape)].view(shape))
    return fixed


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize(("clean", "own"), [("stochastic", "self_gated"), ("ci_masked", "self_masked")])
def test_where_nothing_before_is_masked_own_gates_are_those_of_the_clean_pass(gated_lm, monkeypatch, delta, clean, own):
    target, source = gated_lm
    weights: dict = {clean: 1.0, own: 1.0, "self_importance": 2.0}
    config = SPDConfig(components={"0.mlp.up": 12}, init="random", delta=delta, subset=0.0, **weights)
    spd = SPD(config, target, (0,), 0)
    batch = whole_rows(spd, source)
    pinned(monkeypatch)
    gradients = []
    for name in (clean, own):
        spd.zero_grad()
        spd.loss(batch, 0.0)[name].backward()
        gradients.append({key: p.grad.clone() for key, p in spd.named_parameters() if p.grad is not None})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-7)
    terms = spd.loss(batch, 0.0)
    torch.testing.assert_close(terms[own], terms[clean], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(terms["self_importance"], 2 * terms["importance"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("random", [True, False])
def test_own_gates_read_the_masked_stream(gated_lm, monkeypatch, random):
    target, source = gated_lm
    spd = small(target, self_gated=1.0, subset=0.0)
    batch = whole_rows(spd, source)
    fixed = pinned(monkeypatch)
    with spd.masking_itself(OwnMasks(spd, rows_of(batch, target), Penalty("lp", 1.0), random)):
        run = spd.replaced(batch)
    strength = {name: codes.strength for name, codes in run.codes.items()}
    logits = spd.logits(run.inputs, strength)
    clean = spd.logits({point: clean_rows(spd, batch.clean[point]) for point in run.inputs}, strength)
    for name, codes in run.codes.items():
        g = logits[name].clamp(0, 1)
        mask = g + (1 - g) * fixed[: g.numel()].view(g.shape) if random else g
        torch.testing.assert_close(codes.gate, mask)
        assert torch.allclose(logits[name], clean[name]) == name.startswith("0.")
    assert float(spd.replaced(batch).codes["0.mlp.up"].gate.unique().numel()) <= 2, "afterwards gates are those of an evaluation"


@pytest.mark.parametrize("own", ["self_gated", "self_masked"])
def test_own_gates_are_refused_where_gates_need_the_whole_clean_pass(own):
    with pytest.raises(UserError, match=f"{own}: gates of gate=global_shared_transformer need the clean pass"):
        parse(SPDConfig, {"gate": "global_shared_transformer", own: 1.0}, "spd")
    with pytest.raises(UserError, match="self_importance: no term has gates of its own"):
        parse(SPDConfig, {"self_importance": 1.0}, "spd")
