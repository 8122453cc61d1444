"""SPD: parity with the reference implementation's recorded numbers, and the parts by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from decomp_bench.data.streams import with_clean
from decomp_bench.decomposer import SiteCodes
from decomp_bench.methods import _importance as importance_module
from decomp_bench.methods._components import (
    Components,
    RoutedCodes,
    faithfulness,
    masked_map,
    neuron_components,
    random_components,
    strengths,
    warm_up,
)
from decomp_bench.methods._importance import Penalty, ScalarGates, SharedGates, annealed, importances
from decomp_bench.methods._masks import Uniforms, interpolate, uniform_subset
from decomp_bench.methods.spd import SPD, SPDConfig
from decomp_bench.replacement import clean_codes, clean_points, clean_rows

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
MAPS = ("a", "b", "c")
CPU = torch.device("cpu")


class Golden:
    """A recorded case, compared to the tolerances that its README advises."""

    def __init__(self, case: str) -> None:
        self.tensors = load_file(GOLDEN / f"{case}.safetensors")
        self.about = json.loads((GOLDEN / f"{case}.json").read_text())["hyperparameters"]

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def agrees(self, key: str, value: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        expected, value = self.tensors[key].double(), value.detach().double()
        if mask is not None:
            expected, value = expected[mask], value[mask]
        gradient = key.startswith("grad")
        scale = max(0.0 if gradient else 0.05, float(expected.abs().max()), 1e-8)
        error = float((value - expected).abs().max()) / scale
        assert error <= (3e-5 if gradient else 1e-5), f"{key}: {error:.1e}"


def lower_and_upper(z: torch.Tensor, straight: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Both importances of logits [rows, C]; the upper one from an L1 penalty of one row at a time."""
    lower = importances(z, torch.ones(len(z)), 1.0, Penalty("lp", 1.0, eps=0.0), straight)[0]
    columns = [importances(row[:, None], torch.ones(len(row)), 1.0, Penalty("lp", 1.0, eps=0.0), straight)[1] for row in z.reshape(-1, 1)]
    return lower, torch.stack(columns).view_as(z)


@pytest.mark.parametrize("case", ["spd_main_sigmoids", "spd_paper_sigmoids"])
def test_sigmoids_and_their_gradients_are_the_reference_s(case):
    golden, main = Golden(case), case == "spd_main_sigmoids"
    names = ("lower_leaky_hard", "upper_leaky_hard") if main else ("lower", "upper")
    z = golden["in.z"][:, None]
    smooth = (z[:, 0] != 0) & (z[:, 0] != 1)  # at the kinks the reference's slope depends on its torch version
    for upstream in ("plus1", "minus1", "upstream"):
        g = golden["in.upstream"][:, None] if upstream == "upstream" else torch.full_like(z, 1.0 if upstream == "plus1" else -1.0)
        leaf = z.clone().requires_grad_()
        for name, value in zip(names, lower_and_upper(leaf, straight=main), strict=True):
            golden.agrees(f"out.{name}", value[:, 0])
            (gradient,) = torch.autograd.grad(value, leaf, g, retain_graph=True)
            golden.agrees(f"grad.{name}.{upstream}", gradient[:, 0], smooth)


def test_slopes_at_the_kinks_are_those_documented():
    z = torch.tensor([[0.0], [1.0]], requires_grad=True)
    lower, upper = lower_and_upper(z)
    assert torch.autograd.grad(lower.sum(), z, retain_graph=True)[0].flatten().tolist() == [0.0, 1.0]
    assert torch.autograd.grad(-lower.sum(), z, retain_graph=True)[0].flatten().tolist() == pytest.approx([-0.01, -1.0])
    assert torch.autograd.grad(upper.sum(), z)[0].flatten().tolist() == [0.0, 1.0]


def test_importance_minimality_is_the_reference_s():
    golden = Golden("spd_main_importance_minimality")
    about = golden.about
    cases = {f"beta{b}.frac{f}": (None, b, f) for b in (0.0, 0.1, 0.5) for f in (0.0, 0.5, 0.75)}
    cases |= {f"fixed_p{p}.beta0.1": (p, 0.1, 0.0) for p in (0.9, 1.0, 2.0)}
    for key, (p, beta, progress) in cases.items():
        p = p or annealed(about["pnorm"], about["p_anneal_final_p"], progress, about["p_anneal_start_frac"], about["p_anneal_end_frac"])
        total = torch.zeros(())
        logits = {}
        for name in MAPS:
            upper = golden[f"in.ci_upper.{name}"]
            z = torch.where(upper > 1, 1 + (upper - 1) / 0.01, upper).flatten(0, 1).requires_grad_()
            logits[name] = z
            total = total + importances(z, torch.full((len(z),), 1 / len(z)), float(len(z)), Penalty("lp", p, beta))[1]
        golden.agrees(f"out.loss.{key}", total)
        total.backward()
        for name, z in logits.items():
            upper = golden[f"in.ci_upper.{name}"].flatten(0, 1)
            gradient = z.grad / torch.where(upper > 1, 0.01, 1.0)
            expected = golden[f"grad.{key}.{name}"].flatten(0, 1)
            assert torch.allclose(gradient[upper > 0], expected[upper > 0], rtol=2e-4), (key, name)


def test_annealing_is_the_reference_s_for_p_and_geometric_for_gamma():
    golden = Golden("spd_main_importance_minimality")
    found = [annealed(2.0, 0.3, f, 0.25, 0.75) for f in golden["in.fracs"].tolist()]
    assert found == pytest.approx(golden["out.p_at_frac"].tolist(), abs=1e-9)
    assert annealed(1.0, 0.1, 0.5, 0.0, 1.0, geometric=True) == pytest.approx(0.1**0.5)
    assert annealed(2.0, None, 0.9, 0.0, 1.0) == 2.0


def test_smooth_l0_and_its_gradient_with_chunks_padding_and_frequency(monkeypatch):
    monkeypatch.setattr(importance_module, "_CHUNK", 40)
    z = (torch.randn(23, 7, generator=torch.Generator().manual_seed(0)) * 1.5).requires_grad_()
    real = torch.arange(23) < 19
    weight, gamma, beta = real / 19, 0.3, 0.5
    upstream = torch.randn(23, 7, generator=torch.Generator().manual_seed(1))
    lower, cost, frequency = importances(z, weight, 19.0, Penalty("smooth_l0", gamma, beta))
    (cost + (lower * upstream).sum()).backward()
    by_hand = z.detach().clone().requires_grad_()
    upper = torch.where(by_hand > 1, 1 + 0.01 * (by_hand - 1), by_hand.clamp(min=0))[:19]
    s = (upper**2 / (upper**2 + gamma**2)).sum(0)
    expected = (s / 19 * (1 + beta * torch.log2(1 + s))).sum()
    expected.backward()
    straight = upstream * ((by_hand > 0) & (by_hand <= 1)) + 0.01 * upstream.clamp(max=0) * (by_hand <= 0)
    assert torch.allclose(cost, expected)
    assert torch.allclose(z.grad, by_hand.grad + straight, atol=1e-6)
    assert torch.allclose(frequency, (by_hand[:19] > 0).float().mean(0))


@pytest.mark.parametrize("kind", ["mlp", "shared_mlp"])
def test_gate_networks_are_the_reference_s(kind):
    golden = Golden(f"spd_main_ci_{kind}")
    hidden = golden.about["hidden"]
    x, total, parameters = golden["in.x"], torch.zeros(()), {}
    for name in MAPS:
        weight, bias = golden[f"target.{name}.weight"], golden.tensors.get(f"target.{name}.bias")
        V = golden[f"param.comp.{name}.V"].clone().requires_grad_()
        n = V.shape[1]
        generator = torch.Generator()
        gates = ScalarGates(n, hidden, 0.0, generator) if kind == "mlp" else SharedGates(x.shape[-1], hidden, {name: n}, 0.0, generator)
        for i in range(len(hidden) + 1):
            W, b = (golden[f"param.ci.{name}.layers.{2 * i}.{part}"] for part in "Wb")
            if isinstance(gates, ScalarGates):
                places = gates.weights[i], gates.biases[i]
            else:
                layer = gates.out[name] if i == len(hidden) else gates.hidden[i]
                places, W = (layer.weight, layer.bias), W.T
            for part, place, value in zip("Wb", places, (W, b), strict=True):
                place.data.copy_(value)
                parameters[f"ci.{name}.layers.{2 * i}.{part}"] = (place, kind == "shared_mlp" and part == "W")
        parameters[f"comp.{name}.V"] = (V, False)
        logits = gates(x @ V) if isinstance(gates, ScalarGates) else gates(x, name)
        golden.agrees(f"out.ci_logit.{name}", logits)
        flat = logits.flatten(0, 1)
        upstream = golden[f"in.upstream.{name}"].flatten(0, 1)
        lower, _, _ = importances(flat, torch.ones(len(flat)), 1.0, Penalty("lp", 1.0))
        upper = torch.where(flat > 1, 1 + 0.01 * (flat - 1), flat.clamp(0, 1))
        golden.agrees(f"out.ci_lower.{name}", lower.view_as(logits))
        total = total + (upstream * (lower + 0.5 * upper)).sum()
        x = torch.relu(F.linear(x, weight, bias))
    golden.agrees("out.test_scalar", total)
    found = torch.autograd.grad(total, [place for place, _ in parameters.values()], allow_unused=True)
    for (key, (place, turned)), gradient in zip(parameters.items(), found, strict=True):
        gradient = torch.zeros_like(place) if gradient is None else gradient
        golden.agrees(f"grad.test_scalar.{key}", gradient.T if turned else gradient)


def test_faithfulness_warm_up_is_the_reference_s():
    golden = Golden("spd_main_faith_warmup")
    weights = {name: golden[f"target.{name}.weight"] for name in MAPS}
    for steps in (0, 1, 3):
        parts = {name: Components(golden[f"param.{name}.V"].clone(), golden[f"param.{name}.U"].clone()) for name in MAPS}
        warm_up(parts, weights, steps, golden.about["lr"], golden.about["weight_decay"])
        golden.agrees(f"out.loss_after{steps}", faithfulness(parts, weights))
        for name in MAPS if steps else ():
            for key in ("V", "U"):
                assert torch.allclose(getattr(parts[name], key), golden[f"out.after{steps}.{name}.{key}"], atol=2e-5)


# ---- components


def a_map(generator_seed: int = 0, n: int = 9):
    generator = torch.Generator().manual_seed(generator_seed)
    weight, bias = torch.randn(5, 6, generator=generator), torch.randn(5, generator=generator)
    return random_components(weight, n, generator), weight, bias, torch.randn(4, 3, 6, generator=generator), generator


def test_the_masked_map_is_its_formula_and_the_target_s_own_where_everything_is_on():
    part, weight, bias, x, generator = a_map()
    mask, delta = torch.rand(4, 3, 9, generator=generator), torch.rand(4, 3, generator=generator)
    remainder = weight - (part.V @ part.U).T
    by_hand = (x @ part.V * mask) @ part.U + delta[..., None] * (x @ remainder.T) + bias
    strength = strengths(x, part.V)
    assert torch.allclose(masked_map(x, SiteCodes(strength, mask, delta), part.U, weight, bias), by_hand, atol=1e-5)
    ones = SiteCodes(strength, torch.ones(4, 3, 9), torch.ones(4, 3))
    assert torch.equal(masked_map(x, ones, part.U, weight, None), x @ weight.T)
    zeros = SiteCodes(strength, torch.zeros(4, 3, 9), None)
    assert torch.equal(masked_map(x, zeros, part.U, weight, bias), bias.expand(4, 3, 5))


@pytest.mark.parametrize("with_delta", [True, False])
def test_routed_rows_equal_masks_of_one_elsewhere_with_all_gradients(with_delta):
    part, weight, bias, x, generator = a_map()
    rows = torch.tensor([0, 3, 4, 10])
    mask = torch.rand(4, 9, generator=generator).requires_grad_()
    delta = torch.rand(4, generator=generator).requires_grad_() if with_delta else None
    x.requires_grad_()
    upstream = torch.randn(4, 3, 5, generator=generator)
    wanted = [x, mask, part.V, part.U] + ([delta] if with_delta else [])

    def routed():
        codes = RoutedCodes(mask, mask, delta, rows)
        codes.strength = strengths(x, part.V, codes)
        return masked_map(x, codes, part.U, weight, bias)

    def dense():
        whole = torch.ones(12, 9).index_copy(0, rows, mask)
        remainder = torch.ones(12).index_copy(0, rows, torch.zeros(4) if delta is None else delta)
        return masked_map(x, SiteCodes(strengths(x, part.V), whole.view(4, 3, 9), remainder.view(4, 3)), part.U, weight, bias)

    assert torch.allclose(routed(), dense(), atol=1e-5)
    for first, second in zip(*(torch.autograd.grad(f(), wanted, upstream) for f in (routed, dense)), strict=True):
        assert torch.allclose(first, second, atol=1e-5)


def test_faithfulness_is_the_mean_squared_remainder():
    part, weight, _, _, _ = a_map()
    other, other_weight, _, _, _ = a_map(1, 4)
    remainders = [(w - (p.V @ p.U).T).square().sum() for p, w in ((part, weight), (other, other_weight))]
    found = faithfulness({"a": part, "b": other}, {"a": weight, "b": other_weight})
    assert torch.allclose(found, sum(remainders) / 60)


@pytest.mark.parametrize("writes", [False, True])
def test_neurons_as_components_give_the_matrix_exactly(writes):
    weight = torch.randn(7, 7, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 7)[:, None]
    part = neuron_components(weight, 9, writes, torch.Generator().manual_seed(1))
    assert torch.equal((part.V @ part.U).T, weight)
    V, U = part.V.norm(dim=0)[:7], part.U.norm(dim=1)[:7]
    assert ((V / U).log2().abs() <= 1 + 1e-5).all()
    vectors = weight.T if writes else weight
    rank_one = part.V[:, 3, None] @ part.U[None, 3]
    neuron = torch.zeros(7)
    neuron[3] = 1
    assert torch.equal(rank_one, torch.outer(neuron, vectors[3]) if writes else torch.outer(vectors[3], neuron))


# ---- masks


def test_stochastic_masks_lie_between_importance_and_one():
    source = torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    lower = torch.rand(50, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask = interpolate(lower, source)
    assert torch.allclose(mask, lower + (1 - lower) * source)
    assert (mask >= lower).all()
    assert (mask <= 1).all()
    (gradient,) = torch.autograd.grad(mask.sum(), lower)
    assert torch.allclose(gradient, 1 - source)


def test_routing_draws_a_uniform_size_and_a_uniform_subset():
    routed = uniform_subset(60_000, 6, Uniforms(0), CPU)
    sizes = torch.bincount(routed.sum(1), minlength=7)
    assert sizes[0] == 0
    assert ((sizes[1:] - 10_000).abs() < 5 * math.sqrt(60_000 / 6 * 5 / 6)).all()
    pairs = routed[routed.sum(1) == 2].float()
    share = pairs.T @ pairs / len(pairs)
    off = share[~torch.eye(6, dtype=torch.bool)]
    assert ((off - 1 / 15).abs() < 5 * math.sqrt(1 / 15 / len(pairs))).all()


def test_uniform_numbers_are_uniform_reproducible_and_resumable():
    draws = Uniforms(3)
    first = draws.draw(300, 400, device=CPU)
    state = draws.state(CPU)
    second = draws.draw(300, 400, device=CPU)
    assert float(first.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(first.var()) == pytest.approx(1 / 12, abs=0.002)
    assert not torch.equal(first, second)
    again = Uniforms(3)
    assert torch.equal(again.draw(300, 400, device=CPU), first)
    resumed = Uniforms(3)
    resumed.load(state, CPU)
    assert torch.equal(resumed.draw(300, 400, device=CPU), second)


# ---- the method


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
        for options in ({"gate": "scalar", "stochastic": 1.0, "layerwise": 1.0, "penalty": "lp", "p": 1.0, "p_end": 0.5, "beta": 0.1},
                        {"sigmoid": "leaky", "samples": 2, "delta": False}):
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
    monkeypatch.setattr("decomp_bench.methods.spd.uniform_subset", lambda n, maps, *_: torch.ones(n, maps, dtype=torch.bool))
    whole = spd.loss(batch, 0.5)
    assert torch.allclose(chosen["importance"], whole["importance"])
    spd.uniforms = Uniforms(spd.uniforms.seed)
    monkeypatch.undo()
    monkeypatch.setattr("decomp_bench.methods.spd.uniform_subset", lambda n, maps, *_: torch.ones(n, maps, dtype=torch.bool))
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
