"""The wrapper of sae-lens' training SAEs: the same losses, gradients, steps and files as sae-lens itself."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch

from decomp_bench.config import TrainConfig, parse
from decomp_bench.data.streams import ActivationStream
from decomp_bench.decomposer import Batch, Decomposer
from decomp_bench.errors import UserError
from decomp_bench.interop._plain import as_decomposer, as_plain, keep_thresholds
from decomp_bench.registry import method
from decomp_bench.train import Job, train
from tests.golden.recorded import Golden
from tests.methods.dictionaries import target

OUT = "0.mlp.out"
CASES = {
    "standard": ["l1_lp1", "l1_lp2_layernorm_nobdec"],
    "topk": ["rescale", "norescale"],
    "batchtopk": ["rescale", "norescale"],
    "matryoshka": ["plain_aux", "level_aux_norescale"],
    "jumprelu": ["step", "tanh_preact_ste", "quadratic", "step_ste_to_input"],
    "gated": ["default"],
}
RECORDED = [(case, variant) for case, variants in CASES.items() for variant in variants]
OWN = {"k": "k", "l1_coefficient": "l1", "l0_coefficient": "l0"}
WHITENED = {"normalize_activations": "covariance_whitening", "apply_b_dec_to_input": False}
SCALED = {"normalize_activations": "expected_average_only_in"}
STEEP = {"jumprelu_init_threshold": 0.4, "pre_act_loss_coefficient": 0.01, "normalize_activations": "layer_norm"}
RECIPES = {
    "standard": {"l1": 0.02, "options": {"l1_warm_up_steps": 7, **SCALED}},
    "gated": {"l1": 0.02, "options": {"l1_warm_up_steps": 7, **WHITENED}},
    "topk": {"k": 1, "options": WHITENED},
    "jumprelu": {"l0": 0.01, "options": {"l0_warm_up_steps": 7, **STEEP}},
    "batchtopk": {"k": 3.5, "options": SCALED},
    "matryoshka_batchtopk": {"k": 4, "options": {"matryoshka_widths": [12, 40], "use_matryoshka_aux_loss": True}},
}


def make(world, layers=(0,), seed=0, **config) -> Decomposer:
    kind = method("saelens")
    return kind(parse(kind.Config, {"features": 40, "batch": 128, "calibration": 1024, **config}, "saelens"), world, layers, seed)


def recipe(world, architecture: str, **more) -> Decomposer:
    return make(world, architecture=architecture, dead_feature_window=2, norm_batches=3, lr=3e-3, **RECIPES[architecture], **more)


def sae_of(decomposer: Decomposer):
    return decomposer.coders["0"].sae


def recorded(case: str, variant: str) -> tuple[Golden, Decomposer]:
    golden = Golden(f"sae_saelens_{case}")
    given = golden.about["variants"][variant]
    own = {OWN[key]: value for key, value in given.items() if key in OWN}
    options = {key: value for key, value in given.items() if key not in OWN}
    architecture = "matryoshka_batchtopk" if case == "matryoshka" else case
    made = make(target(6, 1), architecture=architecture, features=10, options=options, dead_feature_window=5, **own).train()
    for name, parameter in sae_of(made).named_parameters():
        parameter.data.copy_(golden[f"param.{name}"])
    made.coders["0"].idle.copy_(golden["in.dead_mask"] * 6)
    return golden, made


# ---- against recorded numbers


@pytest.mark.parametrize(("case", "variant"), RECORDED)
def test_losses_and_gradients_are_the_recorded_ones(case, variant):
    golden, made = recorded(case, variant)
    x = golden["in.x"]
    for loss in [*made.loss(Batch(clean={OUT: x}), 1.0), "total"]:
        terms = made.loss(Batch(clean={OUT: x}), 1.0)
        value = sum(terms.values()) if loss == "total" else terms[loss]
        golden.agrees(f"out.{variant}.loss.{loss}", value)
        made.zero_grad()
        value.backward()
        for name, parameter in sae_of(made).named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            golden.agrees(f"grad.{variant}.{loss}.{name}", gradient)


@pytest.mark.parametrize(("case", "variant"), RECORDED)
def test_codes_and_reconstructions_are_the_recorded_ones(case, variant):
    """In training, and then as sae-lens' own inference SAE: batchtopk through the threshold that three batches have moved."""
    golden, made = recorded(case, variant)
    codes = made.encode({OUT: golden["in.x"]})
    golden.agrees(f"out.{variant}.feature_acts", codes["0"].value)
    golden.agrees(f"out.{variant}.sae_out", made.decode(codes, OUT, {OUT: golden["in.x"]}))
    for number, key in enumerate(["in.x", "in.x_extra0", "in.x_extra1"], 1):
        made.loss(Batch(clean={OUT: golden[key]}), 1.0)
        if f"out.{variant}.topk_threshold_after{number}" in golden.tensors:
            golden.agrees(f"out.{variant}.topk_threshold_after{number}", sae_of(made).topk_threshold)
    made.eval()
    for key in ("x", "x_extra0"):
        inputs = {OUT: golden[f"in.{key}"]}
        codes = made.encode(inputs)
        golden.agrees(f"out.{variant}.infer.{key}.feature_acts", codes["0"].value)
        golden.agrees(f"out.{variant}.infer.{key}.recon", made.decode(codes, OUT, inputs))


# ---- against sae-lens as it is installed


def rows_of(source, batch: int):
    """The activation rows that training on layer 0 sees, from the first step on."""
    stream = ActivationStream(source, {"0.mlp.in", OUT}, batch)
    return (stream.batch(step).clean[OUT] for step in itertools.count())


def fitted_by_sae_lens(made: Decomposer, source, steps: int):
    """An SAE with the same initial weights after its own trainer's steps on the same rows."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = made.config
    sae = made._made(0, made.seed)
    sae.load_state_dict(sae_of(made).state_dict())
    settings = SAETrainerConfig(
        total_training_samples=steps * config.batch,
        train_batch_size_samples=config.batch,
        lr=config.lr,
        lr_end=config.lr,
        dead_feature_window=config.dead_feature_window,
        n_batches_for_norm_estimate=config.norm_batches,
    )
    first = config.norm_batches if sae.cfg.normalize_activations in ("expected_average_only_in", "covariance_whitening") else 0
    rows = itertools.chain(itertools.islice(rows_of(source, config.batch), first), rows_of(source, config.batch))
    return SAETrainer(settings, sae, rows).fit()


@pytest.mark.parametrize("architecture", RECIPES)
def test_a_training_here_is_a_training_there(lm, architecture, tmp_path):
    """Same initial weights, same rows: after 40 steps with dead components, warm-ups and normalisation, the same SAE."""
    world, source = lm
    made = recipe(world, architecture, recalibrate=False, steps=40)
    theirs = fitted_by_sae_lens(made, source, 40)
    start = sae_of(made).W_dec.detach().clone()
    lines: list[dict] = []
    (outcome,) = train([Job(made, tmp_path, lines.append)], source, TrainConfig(log_every=4))
    assert outcome.error is None
    made.eval()
    ours = made.inference(made.sites[0])
    assert (sae_of(made).W_dec - start).abs().max() > 0.01
    assert architecture in ("standard", "gated") or max(line["dead"] for line in lines) > 0, "what revives them must be compared too"
    for name, value in theirs.state_dict().items():
        difference = (getattr(ours, name).double() - value.double()).abs().max()
        assert difference < 1e-5 * max(1.0, float(value.abs().max())), (name, difference)
    x = next(itertools.islice(rows_of(source, 512), 5, None))
    error = {who: (y - x).square().sum() for who, y in (("here", through(made, x)), ("there", inference(theirs, tmp_path / "theirs")(x)))}
    assert error["here"] < (x - x.mean(0)).square().sum(), "better than the mean"
    assert error["here"] == pytest.approx(error["there"].item(), rel=1e-4)


def through(made: Decomposer, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return made.decode(made.encode({OUT: x}), OUT, {OUT: x})


def inference(sae, folder):
    """What sae-lens reads back from the files that it saves for inference."""
    from sae_lens import SAE

    sae.save_inference_model(folder)
    return SAE.load_from_disk(folder)


@pytest.mark.parametrize("architecture", RECIPES)
def test_saved_for_sae_lens_it_gives_the_same_codes_up_to_units_and_the_same_output(lm, architecture, tmp_path):
    from sae_lens import SAE

    world, source = lm
    made = recipe(world, architecture, steps=30)
    train([Job(made, tmp_path)], source, TrainConfig())
    made.eval()
    (folder,) = made.save_inference(tmp_path / "files")
    x = next(itertools.islice(rows_of(source, 512), 3, None))
    loaded = SAE.load_from_disk(folder)
    assert loaded.cfg.metadata.hook_name == "blocks.0.mlp.hook_out"
    with torch.no_grad():
        ours, theirs = made.encode({OUT: x})["0"].active, loaded.encode(x) > 0
        differ = (ours != theirs).any(1)
        assert differ.float().mean() < 0.02, "but for pre-activations at a threshold"
        assert torch.allclose(through(made, x)[~differ], loaded(x)[~differ], atol=2e-4)
    again = Decomposer.load(tmp_path / "checkpoint", world)
    assert torch.equal(through(made, x), through(again, x))
    if architecture == "jumprelu":  # its recipe has layer_norm
        with pytest.raises(UserError, match="normalises its inputs each row by its own mean and deviation"):
            as_plain(made)
        return
    plain = as_decomposer(as_plain(made), world)
    plain.finish(iter([Batch(clean={OUT: x})]))
    keep_thresholds(plain, as_plain(made))
    with torch.no_grad():
        differ = ((plain.encode({OUT: x})["0"].value > 0) != ours).any(1)
        assert differ.float().mean() < 0.02
        assert torch.allclose(through(made, x)[~differ], through(plain, x)[~differ], atol=2e-4)


@pytest.mark.parametrize("architecture", ["gated", "topk", "batchtopk"])
def test_directions_rebuild_strengths_and_outputs(lm, architecture, tmp_path):
    world, source = lm
    made = recipe(world, architecture, steps=20)
    train([Job(made, tmp_path)], source, TrainConfig())
    made.eval()
    site = made.sites[0]
    read, write = made.directions(site, site.slots[0])
    x, y = next(rows_of(source, 64)).split(32)
    with torch.no_grad():
        (pre, _), (other, _) = (made._pre(made.coder(site), part) for part in (x, y))
        assert torch.allclose(pre - other, (x - y) @ read.T, atol=1e-3)
        here, there = (made.encode({OUT: part})["0"].value for part in (x, y))
        assert torch.allclose(through(made, x) - through(made, y), (here - there) @ write, atol=1e-3)


# ---- what is ours


def test_the_threshold_is_recalibrated_unless_theirs_is_asked_for(lm, tmp_path):
    world, source = lm
    x = next(itertools.islice(rows_of(source, 1024), 1, None))
    active = {}
    for recalibrate in (True, False):
        made = make(world, k=4, steps=30, lr=3e-3, recalibrate=recalibrate)
        train([Job(made, tmp_path / str(recalibrate))], source, TrainConfig())
        active[recalibrate] = made.eval().encode({OUT: x})["0"].active.sum(1).float().mean()
    assert active[True] == pytest.approx(4, rel=0.1)
    assert active[False] > 6, "a moving average that starts at 0 is far from where it goes after 30 steps"
    with pytest.raises(UserError, match="no inference-time k"):
        made.at(k=3)
    assert make(world).at(k=3).choice.k == 3


@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu"])
def test_dead_components_are_remembered_by_a_resumed_training(lm, architecture, tmp_path):
    world, source = lm

    def stop(line: dict) -> None:
        if line["step"] > 12:
            raise KeyboardInterrupt

    whole, part, resumed = (recipe(world, architecture, steps=24) for _ in range(3))
    train([Job(whole, tmp_path / "whole")], source, TrainConfig())
    with pytest.raises(KeyboardInterrupt):
        train([Job(part, tmp_path / "part", stop)], source, TrainConfig(log_every=4, save_every=12))
    train([Job(resumed, tmp_path / "part")], source, TrainConfig(), resume=True)
    assert whole.step_statistics()["dead"] > 0
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_micro_batches_count_as_one_step(lm, tmp_path):
    world, source = lm
    made = recipe(world, "standard", steps=3, accumulate=4)
    train([Job(made, tmp_path)], source, TrainConfig())
    assert made.coders["0"].idle.max() <= 3


def test_initial_weights_come_from_the_seed_alone(lm):
    world, _ = lm
    torch.manual_seed(5)
    before = torch.get_rng_state()
    both = make(world, (0, 1))
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    alone, other = make(world, (1,)), make(world, (1,), seed=1)
    assert torch.equal(both.coders["1"].sae.W_dec, alone.coders["1"].sae.W_dec)
    assert not torch.equal(other.coders["1"].sae.W_dec, alone.coders["1"].sae.W_dec)
    assert not torch.equal(both.coders["0"].sae.W_dec, alone.coders["1"].sae.W_dec)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"options": {"sparsity": 1}}, "batchtopk of sae-lens has no option 'sparsity' to set; it has: apply_b_dec_to_input"),
        ({"options": {"l1_warm_up_steps": 1}}, "has no option 'l1_warm_up_steps'"),
        ({"options": {"dtype": "bfloat16"}}, "has no option 'dtype'"),
        ({"options": {"k": 3}}, "'k' is set as method.k"),
        ({"options": {"aux_loss_coefficient": "much"}}, "'aux_loss_coefficient'.*valid number"),
        ({"options": {"normalize_activations": "sometimes"}}, "normalize_activations must be none"),
        ({"options": {"normalize_activations": "layer_norm"}}, "does not support normalize_activations=layer_norm"),
        ({"architecture": "jumprelu", "options": {"jumprelu_sparsity_loss_mode": "quadratic"}}, "target_l0 must be set"),
        ({"architecture": "matryoshka_batchtopk", "options": {"matryoshka_widths": [9, 4, 40]}}, "strictly increasing"),
        ({"architecture": "topk", "k": 2.5}, "must be a whole number for topk"),
        ({"k": 41}, "k=41 exceeds features=40"),
        ({"architecture": "dense"}, "architecture"),
    ],
)
def test_a_config_that_sae_lens_would_not_take_is_refused_in_one_line(lm, config, message):
    with pytest.raises(UserError, match=message) as caught:
        make(lm[0], **config)
    assert "\n" not in str(caught.value)


def test_importing_the_method_does_not_import_sae_lens():
    code = "import sys; from decomp_bench import registry; registry.method('saelens').Config(); sys.exit('sae_lens' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
