"""VPD: one recorded step of the reference, and what an adversary must do."""

from __future__ import annotations

import pytest
import torch

from decomp_bench.config import TrainConfig, parse
from decomp_bench.data.streams import with_clean
from decomp_bench.decomposer import Batch, Decomposer
from decomp_bench.errors import UserError
from decomp_bench.registry import method
from decomp_bench.replacement import clean_points
from decomp_bench.targets.base import Architecture
from decomp_bench.train import Job, learning_rate, train
from tests.golden.recorded import Golden
from tests.interop.test_spd_recorded import NANO, Nano, Whole

SITES = {"0.mlp.up": "fc", "0.mlp.down": "down"}
SMALL = {"components": 6, "gate_width": 8, "gate_blocks": 1, "gate_heads": 2, "warmup_faith": 20, "batch": 2, "lr": 1e-3, "gate_lr": 1e-3}


def make(target, **config) -> Decomposer:
    kind = method("vpd")
    return kind(parse(kind.Config, config, "vpd"), target, tuple(range(target.layers)), 0).train()


# ---- one step of nano_param_decomp


def recorded() -> tuple[Golden, Decomposer, Batch]:
    """The recorded weights in our method, and the recorded batch."""
    golden = Golden("vpd_nano_step")
    about = golden.about
    target = Whole("test:nano", Nano(golden), Architecture("layers.{}", "layers.{}.mlp", None, NANO), 1, 6, "lm", context=3)
    made = make(
        target, components={"*.up": 7, "*.down": 5}, init="random", gate_width=8, gate_blocks=1, gate_heads=2, gate_hidden=(12,),
        penalty="lp", p_end=about["p_end"], beta=about["imp_beta"], p_eps=about["imp_eps"], importance=about["coeff_imp"],
        faithfulness=about["coeff_faith"], subset=about["coeff_stoch"], adversarial=about["coeff_ppgd"], steps=about["n_steps"],
        batch=about["batch_size"], lr=about["main_lr"], gate_lr=about["main_lr"], lr_end=about["main_lr_final_frac"], warmup=0,
        clip=about["grad_clip_components"], gate_clip=None, adversary_lr=about["ppgd_lr"], adversary_warmup=about["ppgd_warmup_pct"],
        adversary_betas=(about["ppgd_beta1"], about["ppgd_beta2"]), adversary_steps=about["ppgd_inner_steps"],
    )  # fmt: skip
    with torch.no_grad():
        for key, parameter in parameters(made, golden, "param.").items():
            parameter.copy_(key)
    batch = Batch(x=golden["in.ids"], length=torch.full((4,), 3))
    batch.clean, batch.logits = target.clean(golden["in.ids"], clean_points(made))
    return golden, made, batch


def parameters(made, golden: Golden, prefix: str) -> dict[torch.Tensor, torch.Tensor]:
    """Recorded tensors, in our order of maps and layout, to the parameters that they belong to."""
    found = {}
    for site, name in SITES.items():
        found |= {golden[f"{prefix}{name}.{part}"]: getattr(made.components[site], part) for part in "VU"}
    network = made.gates["all"]
    weight, out, bias = (golden[f"{prefix}ci.{name}"] for name in ("proj_in.weight", "proj_out.weight", "proj_out.bias"))
    found[torch.cat([weight[:, 5:], weight[:, :5]], 1)] = network.inward.weight  # theirs: down, then fc
    found[golden[f"{prefix}ci.proj_in.bias"]] = network.inward.bias
    for site, rows in (("0_mlp_down", slice(0, 5)), ("0_mlp_up", slice(5, 12))):
        found |= {out[rows].clone(): network.out[site].weight, bias[rows].clone(): network.out[site].bias}
    block = network.blocks[0]
    for ours, theirs in ((block.hidden[0], "mlp.0"), (block.out, "mlp.2")):
        found |= {golden[f"{prefix}ci.blocks.0.{theirs}.{part}"]: getattr(ours, part) for part in ("weight", "bias")}
    return found | {golden[f"{prefix}ci.blocks.0.attn.{name}_proj.weight"]: getattr(block, name).weight for name in "qkvo"}


def draws(made, golden: Golden, monkeypatch) -> None:
    """Let our random masks, routing and first sources be the recorded ones."""
    from decomp_bench.methods._components import RoutedCodes
    from decomp_bench.methods._masks import interpolate
    from decomp_bench.methods._reconstruction import gathers

    def draw(_spd, _mask, _rows, lower, _chosen):
        codes = {}
        for site, g in lower.items():
            name = SITES[site]
            chosen = golden[f"out.stoch_routing.{name}"].bool().flatten().nonzero().squeeze(1)
            mask = interpolate(g[chosen], golden[f"draw.stoch.u.{name}"].flatten(0, 1)[chosen])
            assert gathers(g.device)
            codes[site] = RoutedCodes(mask, mask, golden[f"draw.stoch.delta.{name}"].flatten()[chosen], chosen)
        return codes

    monkeypatch.setattr("decomp_bench.methods._spd_losses._codes", draw)
    made.adversary.sources.start(torch.Generator(), torch.device("cpu"))
    for site, name in SITES.items():
        made.adversary.sources.value[site].copy_(golden[f"draw.ppgd_init.{name}"])


def test_the_recorded_step_is_taken(monkeypatch):
    """Losses, gradients, sources with their moments after each ascent, clipping, and the weights after the step."""
    golden, made, batch = recorded()
    draws(made, golden, monkeypatch)
    seen = []
    climb = made.adversary.sources.ascend

    def ascend(gradients, rate):
        climb(gradients, rate)
        seen.append((gradients, rate, {k: v.clone() for k, v in made.adversary.sources.value.items()}))

    made.adversary.sources.ascend = ascend
    step = golden.about["step"]
    progress = step / made.config.steps
    optimiser = torch.optim.AdamW(made.parameter_groups(), weight_decay=0.0)
    terms = made.loss(batch, progress)
    for ours, theirs, weight in (("faithfulness", "faith", "faith"), ("importance", "imp", "imp"), ("subset", "stoch", "stoch"),
                                 ("adversarial", "ppgd", "ppgd")):  # fmt: skip
        golden.agrees(f"out.loss.{theirs}", terms[ours] / golden.about[f"coeff_{weight}"])
        made.zero_grad()
        wanted = parameters(made, golden, f"grad.{theirs}.")
        found = torch.autograd.grad(terms[ours], list(wanted.values()), retain_graph=True, allow_unused=True)
        for (expected, _), gradient in zip(wanted.items(), found, strict=True):
            gradient = torch.zeros_like(expected) if gradient is None else gradient / golden.about[f"coeff_{weight}"]
            assert float((gradient - expected).abs().max()) <= 3e-5 * max(float(expected.abs().max()), 1e-8), theirs
    for leaf in made.adversary.leaves.values():
        leaf.grad = None
    sum(terms.values()).backward()
    components = list(made.parts.parameters())
    torch.nn.utils.clip_grad_norm_(components, made.config.clip)
    for group in optimiser.param_groups:
        group["lr"] = float(golden["out.main_lr"])  # ours reaches its end a step later than theirs
        assert group["lr"] == pytest.approx(made.config.lr * learning_rate(made.config, step), rel=0.01)
    optimiser.step()
    for expected, parameter in parameters(made, golden, "out.param_after_step.").items():
        assert float((parameter.detach() - expected).abs().max()) <= 1e-5
    made.after_step(progress)
    assert len(seen) == 3
    for (gradients, rate, sources), (moment, gradient) in zip(
        seen, [("after_warmup1", "grad_warmup_step1"), ("after_warmup2", "grad_warmup_step2"), ("after_external_step", "grad_main_loss")],
        strict=True,
    ):  # fmt: skip
        assert rate == pytest.approx(float(golden["out.ppgd_lr"]))
        for site, name in SITES.items():
            expected = golden[f"out.ppgd.{gradient}.{name}"]
            assert float((gradients[site] - expected).abs().max()) <= 3e-5 * float(expected.abs().max())
            assert torch.allclose(sources[site], golden[f"out.ppgd.{moment}.sources.{name}"], atol=1e-5)
    for site, name in SITES.items():
        for mine, part in zip(made.adversary.sources.moments[site], "mv", strict=True):
            expected = golden[f"out.ppgd.after_external_step.adam_{part}.{name}"]
            assert float((mine - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_the_schedules_of_p_and_of_the_adversary():
    golden = Golden("lr_schedules_vpd_nano")
    _, made, _ = recorded()
    for step, p in zip(golden["in.steps"].tolist(), golden["out.anneal_p"].tolist(), strict=True):
        assert made._penalty(step / golden.about["total"]).value == pytest.approx(p)
    rise = golden["out.cosine.final1.0.warmup0.25"].tolist()  # 10 steps: int(2.5) of them rise
    made.config = made.config.model_copy(update={"adversary_lr": golden.about["start"], "adversary_warmup": 0.2})
    found = [made.adversary.rate_at(made, step / golden.about["total"]) for step in golden["in.steps"].tolist()]
    assert found == pytest.approx(rise)


# ---- what an adversary must do


@pytest.mark.parametrize("scope", ["position", "row", "place", "shared"])
@pytest.mark.parametrize("adversary", ["persistent", "fresh"])
def test_masks_that_climb_are_worse_than_random_ones(lm, scope, adversary):
    """At frozen weights, and however the sources are shared; every source stays between 0 and 1."""
    target, source = lm
    made = make(target, adversary=adversary, adversary_scope=scope, adversary_steps=0, adversary_lr=0.1, adversary_warmup=0, **SMALL)
    batch = with_clean(source, source.batch("train", torch.arange(2).numpy()), clean_points(made))
    errors = []
    for steps in (0, 12):
        made.config = made.config.model_copy(update={"adversary_steps": steps})
        made.adversary.sources.value = {}
        errors.append(float(made.loss(batch, 0.5)["adversarial"].detach()))
    assert errors[1] > 1.2 * errors[0]
    for value in made.adversary.sources.value.values():
        assert 0 <= float(value.min()) <= float(value.max()) <= 1
        assert value.shape[:2] == (2 if scope in ("position", "row") else 1, target.context if scope in ("position", "place") else 1)
    assert all(parameter.requires_grad for parameter in made.parts.parameters())


def test_ascents_leave_the_weights_without_gradients(lm):
    target, source = lm
    made = make(target, adversarial=0.0, **SMALL)
    batch = with_clean(source, source.batch("train", torch.arange(2).numpy()), clean_points(made))
    assert "adversarial" not in made.loss(batch, 0.5)
    made.config = made.config.model_copy(update={"adversarial": 1.0})
    made.loss(batch, 0.5)
    assert all(parameter.grad is None for parameter in made.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_killed_training_goes_on_with_the_same_adversary(lm, dtype, tmp_path):
    target, source = lm
    config = {**SMALL, "steps": 8, "adversary_dtype": dtype}

    def stop(event):
        if event["step"] == 4:
            raise KeyboardInterrupt

    whole, first = make(target, **config), make(target, **config)
    train([Job(whole, tmp_path / "whole")], source, TrainConfig(save_every=4))
    with pytest.raises(KeyboardInterrupt):
        train([Job(first, tmp_path / "cut")], source, TrainConfig(save_every=4, log_every=1), progress=stop)
    resumed = make(target, **config)
    train([Job(resumed, tmp_path / "cut")], source, TrainConfig(save_every=4), resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert all(torch.equal(value, resumed.adversary.sources.value[name]) for name, value in whole.adversary.sources.value.items())
    assert next(iter(resumed.adversary.sources.value.values())).dtype == getattr(torch, dtype)


def test_a_longer_row_than_any_before_gets_sources(lm):
    target, _ = lm
    made = make(target, **SMALL)
    generator, device = torch.Generator(), torch.device("cpu")
    made.adversary.sources.start(generator, device)
    before = {name: value.clone() for name, value in made.adversary.sources.value.items()}
    made.adversary.sources.reach(target.context + 3, generator, device)
    for name, value in made.adversary.sources.value.items():
        assert value.shape[1] == target.context + 3
        assert torch.equal(value[:, :-3], before[name])
        assert made.adversary.sources.moments[name][0].shape == value.shape


def test_persistent_sources_are_of_whole_batches(lm):
    with pytest.raises(UserError, match="set accumulate=1, or adversary=fresh"):
        make(lm[0], accumulate=2)
