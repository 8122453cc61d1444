"""Causal-importance networks against the reference implementations' recorded numbers, and what a network of whole rows may see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from decomp_bench.conditions import conditions, upstream
from decomp_bench.config import EvalConfig
from decomp_bench.data.streams import with_clean
from decomp_bench.errors import UserError
from decomp_bench.methods._gates import ScalarGates, SharedGates, TransformerGates, VectorGates
from decomp_bench.methods._importance import Penalty, importances
from decomp_bench.methods.spd import SPD, SPDConfig
from decomp_bench.replacement import clean_codes, clean_points
from tests.golden.recorded import Golden

MAPS = ("a", "b", "c")
TRANSFORMER = {"gate": "global_shared_transformer", "gate_width": 8, "gate_blocks": 2, "gate_heads": 2}


def network(kind: str, name: str, n: int, d_in: int, hidden: list[int]):
    generator = torch.Generator()
    if kind == "mlp":
        return ScalarGates(n, hidden, 0.0, generator)
    return VectorGates(n, d_in, hidden, 0.0, generator) if kind == "vector_mlp" else SharedGates(d_in, hidden, {name: n}, 0.0, generator)


def places(gates, name: str, i: int):
    """Weight and bias of a network's layer i."""
    if isinstance(gates, ScalarGates):
        return gates.weights[i], gates.biases[i]
    layer = gates.out[name] if i == len(gates.hidden) else gates.hidden[i]
    return layer.weight, layer.bias


@pytest.mark.parametrize("kind", ["mlp", "vector_mlp", "shared_mlp"])
def test_networks_of_a_map_are_the_reference_s(kind):
    golden = Golden(f"spd_main_ci_{kind}")
    hidden = golden.about["hidden"]
    x, total, parameters = golden["in.x"], torch.zeros(()), {}
    for name in MAPS:
        weight, bias = golden[f"target.{name}.weight"], golden.tensors.get(f"target.{name}.bias")
        V = golden[f"param.comp.{name}.V"].clone().requires_grad_()
        gates = network(kind, name, V.shape[1], x.shape[-1], hidden)
        for i in range(len(hidden) + 1):
            W, b = (golden[f"param.ci.{name}.layers.{2 * i}.{part}"] for part in "Wb")
            turned = isinstance(gates, SharedGates)
            for part, place, value in zip("Wb", places(gates, name, i), (W.T if turned else W, b), strict=True):
                place.data.copy_(value)
                parameters[f"ci.{name}.layers.{2 * i}.{part}"] = (place, turned and part == "W")
        parameters[f"comp.{name}.V"] = (V, False)
        logits = gates(x, name) if isinstance(gates, SharedGates) else gates(x @ V if kind == "mlp" else x)
        golden.agrees(f"out.ci_logit.{name}", logits)
        flat = logits.flatten(0, 1)
        upstream_gradient = golden[f"in.upstream.{name}"].flatten(0, 1)
        lower, _, _ = importances(flat, torch.ones(len(flat)), 1.0, Penalty("lp", 1.0))
        upper = torch.where(flat > 1, 1 + 0.01 * (flat - 1), flat.clamp(0, 1))
        golden.agrees(f"out.ci_lower.{name}", lower.view_as(logits))
        total = total + (upstream_gradient * (lower + 0.5 * upper)).sum()
        x = torch.relu(F.linear(x, weight, bias))
    golden.agrees("out.test_scalar", total)
    found = torch.autograd.grad(total, [place for place, _ in parameters.values()], allow_unused=True)
    for (key, (place, turned)), gradient in zip(parameters.items(), found, strict=True):
        gradient = torch.zeros_like(place) if gradient is None else gradient
        golden.agrees(f"grad.test_scalar.{key}", gradient.T if turned else gradient)


def test_the_transformer_is_the_reference_s():
    """Importances of the reference's clean activations, and the gradients of importance minimality in every parameter."""
    golden = Golden("vpd_nano_step")
    order, sizes = ("down", "fc"), {"down": 5, "fc": 7}
    gates = TransformerGates(11, 8, 1, 2, (12,), 10_000.0, sizes, 0.0, torch.Generator())
    block = gates.blocks[0]
    named = {
        "proj_in": gates.inward,
        **{f"blocks.0.attn.{name}_proj": getattr(block, name) for name in "qkvo"},
        "blocks.0.mlp.0": block.hidden[0],
        "blocks.0.mlp.2": block.out,
    }
    for name, layer in named.items():
        layer.weight.data.copy_(golden[f"param.ci.{name}.weight"])
        if layer.bias is not None:
            layer.bias.data.copy_(golden[f"param.ci.{name}.bias"])
    for part in ("weight", "bias"):
        for name, value in zip(order, golden[f"param.ci.proj_out.{part}"].split([5, 7]), strict=True):
            getattr(gates.out[name], part).data.copy_(value)
    hidden = gates.features([golden[f"out.ci_input_acts.{name}"] for name in order])
    penalty = Penalty("lp", float(golden["out.p"]), golden.about["imp_beta"], golden.about["imp_eps"])
    loss = torch.zeros(())
    for name in order:
        logits = gates.out[name](hidden)
        golden.agrees(f"out.ci_logit.{name}", logits)
        flat = logits.flatten(0, 1)
        lower, cost, _ = importances(flat, torch.full((len(flat),), 1 / len(flat)), float(len(flat)), penalty)
        golden.agrees(f"out.ci_lower.{name}", lower.view_as(logits))
        loss = loss + cost
    golden.agrees("out.loss.imp", loss)
    loss.backward()
    for name, layer in named.items():
        golden.agrees(f"grad.imp.ci.{name}.weight", layer.weight.grad)
        if layer.bias is not None:
            golden.agrees(f"grad.imp.ci.{name}.bias", layer.bias.grad)
    for part in ("weight", "bias"):
        golden.agrees(f"grad.imp.ci.proj_out.{part}", torch.cat([getattr(gates.out[name], part).grad for name in order]))


def small(target, layers=None, **config) -> SPD:
    return SPD(SPDConfig(**{"components": 6, "init": "random", **config}), target, layers or tuple(range(target.layers)), 0).eval()


def padded(decomposer: SPD, source, rows):
    return with_clean(source, source.batch("train", np.array(rows)), clean_points(decomposer))


def test_padding_and_other_rows_do_not_reach_a_transformer_and_the_future_and_the_first_position_do(lm):
    target, source = lm
    spd = small(target, **TRANSFORMER).at(mask="soft")
    lengths = source.rows("train").length
    short, long = int(lengths.argmin()), int(lengths.argmax())
    alone, both = padded(spd, source, [short]), padded(spd, source, [short, long])
    n = int(alone.length)
    codes = {name: value.gate[:, : n - 1] for name, value in clean_codes(spd, alone).items()}
    together = clean_codes(spd, both)
    assert all(torch.allclose(together[name].gate[:1, : n - 1], gate, atol=1e-6) for name, gate in codes.items())
    for point in both.clean:
        both.clean[point] = both.clean[point].clone()
        both.clean[point][0, n:] = 1e3  # what stands at padding
        both.clean[point][1] = -1e3  # what stands in another row
    changed = clean_codes(spd, both)
    assert all(torch.allclose(changed[name].gate[:1, : n - 1], gate, atol=1e-6) for name, gate in codes.items())
    for place in (0, n - 1):
        seen = padded(spd, source, [short])
        seen.clean = {point: value.index_fill(1, torch.tensor(place), 3.0) for point, value in seen.clean.items()}
        changed = clean_codes(spd, seen)
        assert any(not torch.allclose(changed[name].gate[:, : n - 2], codes[name][:, : n - 2]) for name in codes), place


@pytest.mark.parametrize("gate", ["global_shared_mlp", "global_shared_transformer"])
def test_gates_of_all_maps_come_from_the_clean_pass_only(gated_lm, gate):
    target, source = gated_lm
    for layers in ((0, 1, 2), (1,)):
        spd = small(target, layers, **{**TRANSFORMER, "gate": gate})
        assert not upstream(spd)
        assert {one.gates for one in conditions(spd, EvalConfig())} == {"clean"}
        batch = padded(spd, source, [0, 1])
        with pytest.raises(UserError, match="clean pass only"):
            spd.replaced(batch)
        assert spd.replaced(batch, gates="clean").logits.isfinite().all()
    assert upstream(small(target, gate="shared_mlp", attention=True))
    assert upstream(small(target, gate="shared", attention=True))


def test_a_map_s_own_network_reads_the_map_s_own_input(gated_lm):
    target, source = gated_lm
    for gate in ("mlp", "vector_mlp", "shared_mlp"):
        spd = small(target, gate=gate, attention=True)
        batch = padded(spd, source, [0, 1])
        clean, own = (spd.replaced(batch, (1,), "single", gates).logits for gates in ("clean", "self"))
        assert not torch.allclose(clean, own, atol=1e-4)  # down reads a hidden layer that is replaced
        sum(spd.loss(batch, 0.5).values()).backward()
        assert all(parameter.grad is not None for parameter in spd.gates.parameters())
    assert small(target, gate="mlp").config.gate == "scalar"


def test_numbers_of_components_by_matrix(gated_lm):
    target, _ = gated_lm
    spd = small(target, (0, 2), components={"*.mlp.up": 5, "*.mlp.down": 7, "2.attn.q": 3})
    assert {site.name: site.n for site in spd.sites} == {"0.mlp.up": 5, "0.mlp.down": 7, "2.mlp.up": 5, "2.mlp.down": 7, "2.attn.q": 3}
    for counts, reason in (
        ({"*.mlp.up": 5, "*.mlp.c_fc": 5}, "matches no matrix"),
        ({"*.mlp.up": 5, "0.mlp.*": 6}, "one pattern may match"),
        ({"0.mlp.up": 5, "2.attn.q": 3}, "no MLP matrix of layer 2"),
    ):
        with pytest.raises(UserError, match=reason):
            small(target, (0, 2), components=counts)
    with pytest.raises(UserError, match="multiple of 6"):
        small(target, **{**TRANSFORMER, "gate_heads": 3})


def test_a_shared_gate_of_the_last_map_alone_reads_what_the_mlp_reads(lm):
    target, source = lm
    spd = SPD(SPDConfig(components={"*.mlp.down": 9}, gate="shared"), target, tuple(range(target.layers)))
    batch = with_clean(source, source.batch("train", np.arange(2)), clean_points(spd))
    assert all(term.isfinite() for term in spd.loss(batch, 0.0).values())
