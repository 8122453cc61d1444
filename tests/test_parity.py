"""Parity: a sparse autoencoder scored by sae-lens itself, an SPD checkpoint scored by hand, and decompositions that are the target."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from decomp_bench import data, registry
from decomp_bench.config import DataConfig, EvalConfig, TrainConfig, parse
from decomp_bench.data.statistics import OutputStatistics, output_statistics
from decomp_bench.data.streams import with_clean
from decomp_bench.decomposer import Choice, Decomposer
from decomp_bench.evaluate import evaluate
from decomp_bench.replacement import clean_points
from decomp_bench.train import Job, train
from tests import by_hand

TOLERANCE = 1e-5
BOS, NEWLINE = 0, 30


def trained(name, target, source, folder, layers=None, **config) -> Decomposer:
    """A short training, saved and loaded again."""
    kind = registry.method(name)
    decomposer = kind(parse(kind.Config, config, name), target, layers or tuple(range(target.layers)), 0)
    (outcome,) = train([Job(decomposer, folder)], source, TrainConfig(log_every=10))
    assert outcome.error is None
    return Decomposer.load(folder / "checkpoint", target)


def scores(decomposer, source, **config) -> dict[tuple[str, str, str, str], float]:
    """(protocol, gates, metric, site or layer) -> value, of the trained condition and, after it, of each inference-time choice."""
    (found,) = evaluate([decomposer], source, EvalConfig(bootstrap=2, **config))
    return {
        (r["protocol"], r["gates"], r["metric"], r["site"] if r["site"] != "all" else r["layer"]): r["value"]
        for r in sorted(found.rows, key=lambda r: r["curve"] == "inference")
    }


# ---- one SAE, scored by sae-lens


class TokenRows:
    """What sae-lens' evaluation asks of an activation store: the next rows of tokens."""

    def __init__(self, rows: torch.Tensor, batch: int) -> None:
        self.rows, self.store_batch_size_prompts, self.context_size, self.next = rows, batch, rows.shape[1], 0

    def get_batch_tokens(self, count: int) -> torch.Tensor:
        self.next += count
        return self.rows[self.next - count : self.next]

    def reset_input_dataset(self) -> None:
        self.next = 0


@pytest.fixture(scope="module", params=["arcee", "llama"])
def bridged(request, tmp_path_factory):
    """(target, source of full rows, the rows of its test split, another copy of the model as sae-lens runs it)

    Every row has the full 32 tokens, so no padding is scored by anyone, and ends in a newline that stands nowhere else.
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    folder = request.getfixturevalue(f"tiny_{request.param}")
    target, _ = request.getfixturevalue("lm" if request.param == "arcee" else "gated_lm")
    lines = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    text = tmp_path_factory.mktemp("full") / "full.jsonl"
    kept = [line[:30] + "\n" + line[30:60] + "\n" for line in lines if len(line) >= 60]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in kept))
    source = data.source(target, DataConfig(source=str(text)))
    rows = source.rows("test")
    assert (rows.length == target.context).all()
    assert len(rows.tokens) > 20
    assert ((rows.tokens == BOS).sum(1) == 1).all()
    assert (rows.tokens[:, -1] == NEWLINE).all()
    assert ((rows.tokens == NEWLINE).sum(1) == 1).all()
    copy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # bridging renames the keys of its state dict
    bridge = TransformerBridge.boot_transformers(str(folder), hf_model=copy, tokenizer=target.tokenizer)
    return target, source, torch.from_numpy(rows.tokens.astype(np.int64)), bridge


def as_sae_lens(sae, layer: int):
    """The same function as an SAE of sae-lens: our centring and scaling folded into its weights, in float64."""
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    state = {key: value.double() for key, value in sae.state_dict().items()}
    coder, out = (
        {key.split(".", 2)[2]: v for key, v in state.items() if key.startswith(f"{part}.{layer}.")} for part in ("coders", "outputs")
    )
    about = {"d_in": sae.target.width, "d_sae": sae.config.features, "apply_b_dec_to_input": False}
    about["metadata"] = SAEMetadata(hook_name=f"blocks.{layer}.mlp.hook_out")
    kind = sae.config.activation
    if kind == "topk":
        made = TopKSAE(TopKSAEConfig(k=sae.config.k, **about))
    elif kind == "relu":
        made = StandardSAE(StandardSAEConfig(**about))
    else:
        made = JumpReLUSAE(JumpReLUSAEConfig(**about))
        threshold = (
            sae.coders[str(layer)].activation.threshold(sae.config.k) if kind == "batchtopk" else coder["activation.log_threshold"].exp()
        )
        made.threshold.data = threshold.float().expand(sae.config.features).clone()
    encoder = coder["W_enc"] / coder["normalise.scale"]
    made.W_enc.data = encoder.T.float().contiguous()
    made.b_enc.data = (coder["b_enc"] - encoder @ coder["normalise.mean"]).float()
    made.W_dec.data = (coder["W_dec"] * out["scale"]).float()
    made.b_dec.data = (out["mean"] + out["scale"] * out["b_dec"]).float()
    return made.eval()


def sae_lens_scores(sae, bridge, tokens: torch.Tensor, excluded: list[int]) -> dict[str, float]:
    """sae-lens' own evaluation in two batches; tokens of these ids are neither replaced nor scored."""
    from sae_lens.evals import EvalConfig as SAELensConfig
    from sae_lens.evals import run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    half = len(tokens) // 2
    config = SAELensConfig(
        batch_size_prompts=half,
        n_eval_reconstruction_batches=2,
        n_eval_sparsity_variance_batches=2,
        compute_kl=True,
        compute_ce_loss=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )
    found, _ = run_evals(sae, TokenRows(tokens[: 2 * half], half), bridge, ActivationScaler(), config, exclude_special_tokens=excluded)
    return {key: value for group in found.values() for key, value in group.items()}


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
def test_an_sae_scores_as_in_sae_lens(bridged, activation, tmp_path, monkeypatch):
    """Position 0, the only BOS of a row, is excluded there and kept here. The definitions then are the same but for two points.

    KL: sae-lens also counts the last position of a row, which has no next token. Its KL is taken from a run that excludes the last
    token's id as well (replacing nothing there changes no earlier position).
    Explained variance: sae-lens centres on the mean of the scored tokens, we on the training split's. Its squared error is compared
    over the variance about our mean; then our evaluation is given the scored tokens' mean and must give 1 - explained variance.
    """
    target, source, tokens, bridge = bridged
    layer = 1
    tokens = tokens[: len(tokens) // 2 * 2]
    sae = trained(
        "sae", target, source, tmp_path, (layer,), activation=activation, features=40, k=6, l1=0.05, steps=40, batch=256, calibration=2048
    )
    monkeypatch.setattr(source, "evaluation_rows", lambda _split, _tokens: len(tokens))
    theirs = as_sae_lens(sae, layer)
    known = sae_lens_scores(theirs, bridge, tokens, [BOS])
    known["kl_div_with_sae"] = sae_lens_scores(theirs, bridge, tokens, [BOS, NEWLINE])["kl_div_with_sae"]
    y = bridge.run_with_cache(tokens, prepend_bos=False)[1][f"blocks.{layer}.mlp.hook_out"][:, 1:].double().detach().flatten(0, 1)
    known["fvu"] = known["mse"] / float((y - output_statistics(source).mean[layer]).square().sum(1).mean())
    assert 1 < known["l0"] < 35, "neither empty nor dense"
    assert known["kl_div_with_sae"] > 0.01, "the replacement must matter"
    ours = scores(sae, source, sweep=False, batch=7)
    pairs = {"l0_module": "l0", "l0_mlp": "l0", "fvu": "fvu", "ce": "ce_loss_with_sae", "ce_clean": "ce_loss_without_sae"}
    for protocol in ("single", "clean", "cascading"):  # one layer: the stream before it is clean under all of them
        of = lambda metric, protocol=protocol: ours[protocol, "self", metric, "all"]
        for mine, other in (pairs | {"kl": "kl_div_with_sae"}).items():
            assert of(mine) == pytest.approx(known[other], abs=TOLERANCE, rel=0), (protocol, mine)
        assert of("ce_delta") == pytest.approx(known["ce_loss_with_sae"] - known["ce_loss_without_sae"], abs=TOLERANCE, rel=0)
    usual = output_statistics(source)
    centred = OutputStatistics({**usual.mean, layer: y.mean(0).float()}, usual.largest)
    monkeypatch.setattr("decomp_bench.evaluate.output_statistics", lambda _source: centred)
    again = scores(sae, source, sweep=False, protocols=("single",))
    assert again["single", "self", "fvu", "all"] == pytest.approx(1 - known["explained_variance"], abs=TOLERANCE, rel=0)


def test_folded_weights_are_those_that_sae_lens_was_given(bridged, tmp_path):
    target, source, _, _ = bridged
    sae = trained("sae", target, source, tmp_path, (0,), features=40, k=6, steps=5, batch=256, calibration=512)
    theirs, folded = as_sae_lens(sae, 0), sae.folded(sae.sites[0])
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        other = getattr(theirs, name)
        assert torch.allclose(folded[name], other.T if name == "W_enc" else other, atol=1e-5, rtol=1e-5), name


# ---- one SPD checkpoint, scored by hand


@pytest.mark.parametrize("gate", ["shared", "scalar"])
@pytest.mark.parametrize("shape", ["arcee", "llama"])
def test_an_spd_checkpoint_scores_as_by_hand(shape, gate, request, tmp_path):
    """Rows of this text differ in length, so padding and documents of several rows are in it too."""
    folder = request.getfixturevalue(f"tiny_{shape}")
    target, source = request.getfixturevalue("lm" if shape == "arcee" else "gated_lm")
    config = {"gate": gate, "gate_hidden": (8,), "components": 20, "init": "random", "importance": 0.05, "steps": 20, "warmup_faith": 50}
    spd = trained("spd", target, source, tmp_path, **config, batch=8, gate_bias=0.1, gate_lr=2e-2)
    spd.sweep = lambda: [Choice(mask="all", delta=True)]
    (found,) = evaluate([spd], source, EvalConfig(bootstrap=2, sweep_gates=("clean", "self"), tokens=600))
    model = by_hand.Model(folder)
    train_rows = source.rows("train")
    means = by_hand.mean_outputs(model, by_hand.full_rows(train_rows.tokens, train_rows.length))
    test_rows = source.rows("test").first(600)
    rows = by_hand.full_rows(test_rows.tokens, test_rows.length)
    assert len(rows) > 3, "rows of several lengths"
    masked, everything = (by_hand.SPD(tmp_path / "checkpoint", model, on, on) for on in (False, True))
    compared = 0
    for curve, hand in (("trained", masked), ("inference", everything)):
        for protocol, gates in sorted({(r["protocol"], r["gates"]) for r in found.rows if r["curve"] == curve}):
            known = by_hand.spd_scores(hand, rows, means, protocol, gates)
            ours = {
                (r["metric"], r["site"] if r["site"] != "all" else r["layer"]): r["value"]
                for r in found.rows
                if (r["curve"], r["protocol"], r["gates"]) == (curve, protocol, gates)
            }
            for key, value in known.items():
                assert ours[key] == pytest.approx(value, abs=TOLERANCE, rel=TOLERANCE), (curve, protocol, gates, key)
                compared += 1
            if curve == "trained":
                l0 = [value for (metric, _), value in known.items() if metric == "l0_module"]
                assert 1 < np.mean(l0) < 19, "some components on, some off"
                assert known["kl", "all"] > 0.01, "the replacement must matter"
            else:
                assert known["kl", "all"] == pytest.approx(0, abs=1e-9), "all masks and the remainder are the target"
    assert compared > 60


# ---- decompositions that are the target (that a CLT of one layer is a transcoder is in methods/test_dictionary.py)


@pytest.mark.parametrize("world", ["lm", "gated_lm", "toy"])
@pytest.mark.parametrize("protocol", ["cascading", "clean", "single"])
@pytest.mark.parametrize("name", ["neurons", "spd"])
def test_everything_on_is_the_target(world, protocol, name, request):
    """Neurons at k = all; SPD with random components, every mask and the remainder on, and with neurons, which need no remainder."""
    target, source = request.getfixturevalue(world)
    kind = registry.method(name)
    if name == "neurons":
        views = [kind(kind.Config(), target, tuple(range(target.layers))).eval()]
        views = [views[0].at(k=views[0].sites[0].n)]
    else:
        made = [kind(kind.Config(init=init), target, tuple(range(target.layers))).eval() for init in ("random", "neuron")]
        views = [made[0].at(mask="all", delta=True), made[1].at(mask="all")]
    for view in views:
        batch = with_clean(source, source.batch("test", np.arange(12)), clean_points(view))
        for layers in [view.layers] if protocol != "single" else [(layer,) for layer in view.layers]:
            for gates in ("self", "clean"):
                out = view.replaced(batch, layers, protocol, gates)
                assert torch.allclose(out.logits, batch.logits, atol=TOLERANCE, rtol=0)
                for layer, value in out.outputs.items():
                    wanted = batch.clean[f"{layer}.mlp.out"]
                    assert torch.allclose(value, wanted[:, 1:] if target.keeps_first else wanted, atol=TOLERANCE, rtol=0)
