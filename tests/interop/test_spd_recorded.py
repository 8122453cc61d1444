"""Runs of SPD and VPD whose numbers were recorded from the reference implementations, read from the published layouts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decomp_bench.decomposer import Batch, SiteCodes
from decomp_bench.interop.spd import read
from decomp_bench.replacement import clean_codes, clean_points, clean_reads
from decomp_bench.targets.base import Architecture, TargetModel
from tests.golden.recorded import Golden
from tests.interop.runs import write


class Block(nn.Module):
    """An MLP whose neurons add the mean of those at the positions so far."""

    def __init__(self, golden: Golden) -> None:
        super().__init__()
        self.fc, self.down = nn.Linear(6, 5), nn.Linear(5, 6, bias=False)
        for name in ("fc.weight", "fc.bias", "down.weight"):
            self.get_parameter(name).data.copy_(golden[f"target.{name}"])

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.fc(x))
        return self.down(hidden + hidden.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])


class Nano(nn.Module):
    """The recorded target: embedding, one residual MLP, unembedding."""

    def __init__(self, golden: Golden) -> None:
        super().__init__()
        self.embed, self.unembed = (nn.Parameter(golden[f"target.{name}.weight"]) for name in ("embed", "unembed"))
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].mlp = Block(golden)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        x = self.embed[input_ids]
        return SimpleNamespace(logits=(x + self.layers[0].mlp(x)) @ self.unembed.T)


class Whole(TargetModel):
    """A target whose first positions are replaced too, as the reference does."""

    @property
    def keeps_first(self) -> bool:
        return False


NANO = {"mlp.up": "layers.{}.mlp.fc", "mlp.down": "layers.{}.mlp.down"}


@pytest.fixture(params=["vpd_nano_step", "vpd_nano_eval"])
def nano(request, tmp_path):
    """(golden, decomposer read from the recorded weights in the published layout, batch)"""
    golden = Golden(request.param)
    target = Whole("test:nano", Nano(golden), Architecture("layers.{}", "layers.{}.mlp", None, NANO), 1, 6, "lm")
    state = {f"target_model.{name}": value for name, value in target.module.state_dict().items()}
    for name in ("fc", "down"):
        state |= {f"_components.layers-0-mlp-{name}.{part}": golden[f"param.{name}.{part}"] for part in "VU"}
    network = "ci_fn._global_ci_fn."
    for ours, theirs in (("proj_in", "_input_projector"), ("proj_out", "_output_head"), ("mlp.0", "mlp.0"), ("mlp.2", "mlp.2")):
        prefix = "blocks.0." if "mlp" in ours else ""
        name = f"_{prefix}{theirs}" if prefix else theirs
        state[f"{network}{name}.W"] = golden[f"param.ci.{prefix}{ours}.weight"].T.contiguous()
        state[f"{network}{name}.b"] = golden[f"param.ci.{prefix}{ours}.bias"]
    for ours, theirs in zip("qkvo", ("q_proj", "k_proj", "v_proj", "out_proj"), strict=True):
        state[f"{network}_blocks.0.attn.{theirs}.weight"] = golden[f"param.ci.blocks.0.attn.{ours}_proj.weight"]
    state[f"{network}_blocks.0.attn.rope.inv_freq"] = torch.ones(2)
    cfg = {"d_model": 8, "n_blocks": 1, "mlp_hidden_dim": [12], "attn_config": {"n_heads": 2}}
    config = {
        "ci_config": {"mode": "global", "fn_type": "global_shared_transformer", "simple_transformer_ci_cfg": cfg},
        "module_info": [{"module_pattern": "layers.*.mlp.fc", "C": 7}, {"module_pattern": "layers.*.mlp.down", "C": 5}],
        "sigmoid_type": "leaky_hard",
        "use_delta_component": True,
    }
    made = read(write(tmp_path / "run", state, config), target)
    batch = Batch(x=golden["in.ids"])
    batch.clean, batch.logits = target.clean(golden["in.ids"], clean_points(made))
    return golden, made, batch


def kl(logits: Tensor, target: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="sum") / logits[..., 0].numel()


def ce(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def name_of(site: str) -> str:
    return {"0.mlp.up": "fc", "0.mlp.down": "down"}[site]


def test_codes_and_the_stochastic_loss_of_the_recorded_run(nano):
    golden, made, batch = nano
    soft = clean_codes(made.at(mask="soft"), batch)
    for site, codes in soft.items():
        golden.agrees(f"out.ci_lower.{name_of(site)}", codes.gate)
    golden.agrees("out.target_logits", batch.logits)
    if "out.loss.stoch" not in golden.tensors:
        return
    logits = made.logits(clean_reads(made, batch), {name: codes.strength for name, codes in soft.items()})
    gates = {}
    for site, codes in soft.items():
        name = name_of(site)
        golden.agrees(f"out.ci_logit.{name}", logits[site])
        routed = golden[f"out.stoch_routing.{name}"].bool()
        mask = codes.gate + (1 - codes.gate) * golden[f"draw.stoch.u.{name}"]
        delta = torch.where(routed, golden[f"draw.stoch.delta.{name}"], 1.0)
        gates[site] = SiteCodes(codes.strength, torch.where(routed[..., None], mask, 1.0), delta)
    golden.agrees("out.loss.stoch", kl(made.replaced(batch, gates=gates).logits, batch.logits))


@pytest.mark.parametrize("nano", ["vpd_nano_eval"], indirect=True)
def test_l0_and_the_six_masks_of_the_recorded_evaluation(nano):
    golden, made, batch = nano
    codes = clean_codes(made, batch)
    found = {name_of(site): one.active.float().sum(-1).mean() for site, one in codes.items()}
    for name, value in [*found.items(), ("total", sum(found.values()))]:
        golden.agrees(f"out.eval.l0.0.0_{name}", value)

    def drawn(key: str, between: bool):
        def edit(site, one):
            draw = golden[f"draw.{key}.{name_of(site.name)}"]
            mask = one.gate + (1 - one.gate) * draw if between else draw
            return replace(one, gate=mask, delta=golden[f"draw.ce_stoch.delta.{name_of(site.name)}"] if between else None)

        return edit

    soft = made.at(mask="soft")
    outputs = {
        "ci_masked": soft.replaced(batch, gates="clean"),
        "unmasked": made.at(mask="all").replaced(batch, gates="clean"),
        "rounded_masked": made.at(threshold=0.0).replaced(batch, gates="clean"),
        "stoch_masked": soft.replaced(batch, gates="clean", edit=drawn("ce_stoch.u", True)),
        "random_masked": soft.replaced(batch, gates="clean", edit=drawn("random_mask", False)),
        "zero_masked": soft.replaced(batch, gates="clean", edit=lambda _site, one: replace(one, gate=torch.zeros_like(one.gate))),
    }
    clean, zero = ce(batch.logits, batch.x), ce(outputs["zero_masked"].logits, batch.x)
    golden.agrees("out.target_ce", clean)
    for name, out in outputs.items():
        golden.agrees(f"out.eval.ce_kl.kl_{name}", kl(out.logits, batch.logits))
        if name != "zero_masked":
            difference = ce(out.logits, batch.x) - clean
            golden.agrees(f"out.eval.ce_kl.ce_difference_{name}", difference)
            golden.agrees(f"out.eval.ce_kl.ce_unrecovered_{name}", difference / (zero - clean))


def test_a_run_of_the_paper_s_branch(tmp_path):
    golden = Golden("spd_paper_losses_mse")
    net, mlp = nn.Module(), nn.Module()
    mlp.linear1, mlp.linear2 = nn.Linear(6, 4, bias=False), nn.Linear(4, 5)
    for name in ("linear1.weight", "linear2.weight", "linear2.bias"):
        mlp.get_parameter(name).data.copy_(golden[f"target.{name}"])
    mlp.forward = lambda x: mlp.linear2(torch.relu(mlp.linear1(x)))
    net.mlp = mlp
    net.forward = lambda x: torch.relu(net.mlp(x))
    places = {"mlp.up": "mlp.linear1", "mlp.down": "mlp.linear2"}
    target = TargetModel("test:paper", net, Architecture("mlp", "mlp", None, places), 1, 6, "regression")
    state = {f"model.{name}": value for name, value in net.state_dict().items()}
    for name in ("linear1", "linear2"):
        state |= {f"components.mlp-{name}.{ours}": golden[f"out.init.{name}.{part}"] for ours, part in (("A", "V"), ("B", "U"))}
        for part in ("mlp_in", "in_bias", "mlp_out", "out_bias"):
            state[f"gates.mlp-{name}.{part}"] = golden[f"param.{name}.gate.{part}"]
    config = {"C": 7, "n_ci_mlp_neurons": 3, "target_module_patterns": ["mlp.linear1", "mlp.linear2"], "pnorm": 0.9,
              "importance_minimality_coeff": 0.05}
    made = read(write(tmp_path / "run", state, config), target)
    assert (made.config.gate, made.config.sigmoid, made.config.delta, made.config.importance, made.config.p) == (
        "scalar", "leaky", False, 0.05, 0.9,
    )  # fmt: skip
    batch = Batch(x=golden["in.x"])
    batch.clean, batch.logits = target.clean(batch.x, clean_points(made))
    codes = clean_codes(made.at(mask="soft"), batch)
    logits = made.logits(batch.clean, {name: one.strength for name, one in codes.items()})
    for site, name in (("0.mlp.up", "linear1"), ("0.mlp.down", "linear2")):
        golden.agrees(f"out.ci_logit.{name}", logits[site])
        assert torch.allclose(codes[site].gate, golden[f"out.ci_lower.{name}"].clamp(min=0), atol=1e-6)
        codes[site] = replace(codes[site], gate=golden[f"out.mask_stoch.{name}"])
    golden.agrees("out.masked_model_output", made.replaced(batch, gates=codes).logits)
