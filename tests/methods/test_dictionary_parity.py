"""Sparse coders against numbers recorded from sae-lens and nn_decompositions: codes, every loss term, gradients.

sae-lens subtracts the decoder's bias from what is read, so there coders are handed x - b_dec, and its losses sum over the width where
ours are means in normalised coordinates. Whole decomposers are compared to nn_decompositions, which has no such subtraction.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from decomp_bench.config import parse
from decomp_bench.decomposer import Batch
from decomp_bench.registry import method
from decomp_bench.targets.base import Architecture, TargetModel
from decomp_bench.targets.toy import ResidualMLP
from tests.golden.recorded import Golden

BOTH_WAYS = pytest.mark.parametrize("dense_above", [-1.0, 1.0], ids=["dense", "sparse"])
"""Products over all entries, and over active entries alone."""


class Peer:
    """A coder of ours with the weights of a recorded sae-lens case, and a bias that is also subtracted from what is read."""

    def __init__(self, case: str, variant: str, subtract: bool = True, **config) -> None:
        from decomp_bench.methods._coder import SparseCoder
        from decomp_bench.methods._dictionary_config import DictionaryConfig

        self.golden, self.variant = Golden(f"sae_saelens_{case}"), variant
        own = parse(DictionaryConfig, {"features": 10, "k": 2, **config}, case)
        self.coder = SparseCoder(own, 6, 6, False, torch.Generator())
        self.bias = self.golden["param.b_dec"].clone().requires_grad_()
        with torch.no_grad():
            self.coder.W_enc.copy_(self.golden["param.W_enc"].T)
            self.coder.W_dec.copy_(self.golden["param.W_dec"])
            self.coder.b_enc.copy_(self.golden["param.b_gate" if case == "gated" else "param.b_enc"])
        self.x = self.golden["in.x"]
        self.read = self.x - self.bias if subtract else self.x

    def code(self, count: int | None = None):
        """The codes; of a batch-wide selection of `count` entries, where given, since sae-lens allows a fractional k."""
        if count is None:
            return self.coder.codes(self.read, None)[0]
        from decomp_bench.methods._sparse import top_of_batch

        raw = self.coder.raw(self.read).detach()
        pre = raw * self.coder.lengths.detach() if self.coder.free else raw
        support = top_of_batch(pre, count)
        return self.coder.code_at(self.read, support.of(raw), support)

    def reconstruct(self, code) -> Tensor:
        return code.decode(self.coder.decoder()) + self.bias

    def error(self, recon: Tensor) -> Tensor:
        return (recon - self.x).square().sum(1).mean()

    def revival(self, recon: Tensor) -> Tensor:
        """The aux loss in sae-lens' units: ours is relative to the residual."""
        self.coder.dead.copy_(self.golden["in.dead_mask"])
        self.coder.forget_dead_ids()
        residual = (self.x - recon).detach()
        return 0.5 * self.coder.revival(self.read, residual, 3) * residual.square().sum() / len(self.x)

    def agrees(self, key: str, value: Tensor) -> None:
        self.golden.agrees(f"out.{self.variant}.{key}", value)

    def gradients_agree(self, loss: str, value: Tensor) -> None:
        """The term and its gradients with respect to every parameter."""
        self.agrees(f"loss.{loss}", value)
        coder, gate = self.coder, self.golden.about["variants"] == {"default": {"l1_coefficient": 0.3}}
        named = {"W_enc": coder.W_enc, "W_dec": coder.W_dec, "b_dec": self.bias, "b_gate" if gate else "b_enc": coder.b_enc}
        own = dict(coder.activation.named_parameters())
        named |= {"threshold": own["log_threshold"]} if "log_threshold" in own else own
        found = torch.autograd.grad(value, list(named.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
        for name, gradient in zip(named, found, strict=True):
            gradient = gradient.T if name == "W_enc" else gradient
            if name == "threshold":  # by the threshold, where ours is by its logarithm
                gradient = gradient / self.golden["param.threshold"]
            self.golden.agrees(f"grad.{self.variant}.{loss}.{name}", gradient)

    def export_agrees(self, **scaled: Tensor) -> None:
        lengths = self.coder.lengths if self.coder.free else torch.ones(10)
        self.agrees("export.W_enc", (self.coder.W_enc * lengths[:, None]).T)
        self.agrees("export.b_enc", self.coder.b_enc * lengths)
        self.agrees("export.W_dec", self.coder.decoder())


@BOTH_WAYS
@pytest.mark.parametrize("variant", ["l1_lp1", "l1_lp2_layernorm_nobdec"])
def test_relu_is_sae_lens_standard(variant, dense_above, monkeypatch):
    """Of the second variant its input normalisation is left to sae-lens and its p=2 norm is not ours: codes and errors are compared."""
    monkeypatch.setattr("decomp_bench.methods._activations.DENSE_ABOVE", dense_above)
    plain = variant == "l1_lp1"
    peer = Peer("standard", variant, subtract=plain, activation="relu", l1=0.3)
    mean, std = peer.x.mean(1, keepdim=True), peer.x.std(1, keepdim=True)
    peer.read = peer.read if plain else (peer.x - mean) / (std + 1e-5)
    code = peer.code()
    peer.agrees("feature_acts", peer.coder.activation.value(peer.coder.pre(peer.read)))
    recon = peer.reconstruct(code) if plain else peer.reconstruct(code) * std + mean
    peer.agrees("sae_out", recon)
    peer.gradients_agree("mse_loss", peer.error(recon))
    if plain:
        peer.gradients_agree("l1_loss", peer.coder.activation.penalty(code, peer.coder.decoder()))
        peer.gradients_agree("total", peer.error(recon) + peer.coder.activation.penalty(code, peer.coder.decoder()))


@pytest.mark.parametrize("variant", ["rescale", "norescale"])
def test_topk_is_sae_lens_topk(variant):
    peer = Peer("topk", variant, activation="topk", k=3, decoder_rows="free" if variant == "rescale" else "unit")
    code = peer.code()
    recon = peer.reconstruct(code)
    peer.agrees("hidden_pre", peer.coder.pre(peer.read))
    peer.agrees("feature_acts", code.support.gate() * peer.coder.pre(peer.read).relu())
    peer.agrees("sae_out", recon)
    error, aux = peer.error(recon), peer.revival(recon)
    for loss, value in (("mse_loss", error), ("auxiliary_reconstruction_loss", aux), ("total", error + aux)):
        peer.gradients_agree(loss, value)
    peer.export_agrees()


@pytest.mark.parametrize(("variant", "k"), [("rescale", 2.5), ("norescale", 2.0)])
def test_batchtopk_is_sae_lens_batchtopk(variant, k):
    """The running threshold starts at the first batch's own: sae-lens starts at 0, which leaves it too low for tens of steps."""
    peer = Peer("batchtopk", variant, activation="batchtopk", decoder_rows="free" if variant == "rescale" else "unit")
    code = peer.code(int(k * 5))
    recon = peer.reconstruct(code)
    peer.agrees("feature_acts", code.support.gate() * peer.coder.pre(peer.read).relu())
    peer.agrees("sae_out", recon)
    error, aux = peer.error(recon), peer.revival(recon)
    for loss, value in (("mse_loss", error), ("auxiliary_reconstruction_loss", aux), ("total", error + aux)):
        peer.gradients_agree(loss, value)
    peer.export_agrees()
    activation = peer.coder.activation
    activation.observe(code.value)
    torch.testing.assert_close(activation.threshold(2), code.value.min())
    activation.table_threshold.fill_(float(peer.golden[f"out.{variant}.topk_threshold_after1"]))
    for step in (0, 1):
        peer.read = peer.golden[f"in.x_extra{step}"] - peer.bias
        activation.observe(peer.code(int(k * 5)).value.detach())
        peer.agrees(f"topk_threshold_after{step + 2}", activation.threshold(2))


@pytest.mark.parametrize("variant", ["plain_aux", "level_aux_norescale"])
def test_matryoshka_is_sae_lens_matryoshka(variant):
    """An aux loss for each level, which sae-lens offers besides, is not offered here: dead components predict the whole residual."""
    free = variant == "plain_aux"
    peer = Peer("matryoshka", variant, activation="matryoshka", prefixes=(0.4, 0.7), decoder_rows="free" if free else "unit")
    assert peer.coder.activation.config.widths() == [4, 7, 10]
    code, decoder = peer.code(12), peer.coder.decoder()
    recon = peer.reconstruct(code)
    peer.agrees("feature_acts", code.support.gate() * peer.coder.pre(peer.read).relu())
    peer.agrees("sae_out", recon)
    peer.gradients_agree("mse_loss", peer.error(recon))
    for width in (4, 7):
        prefix = code.between(0, width).decode(decoder[:width]) + peer.bias
        peer.gradients_agree(f"inner_mse_loss_{width}", peer.error(prefix))
    if free:
        peer.gradients_agree("auxiliary_reconstruction_loss", peer.revival(recon))
    peer.export_agrees()


@BOTH_WAYS
@pytest.mark.parametrize("variant", ["step", "quadratic", "tanh_preact_ste", "step_ste_to_input"])
def test_jumprelu_is_sae_lens_jumprelu(variant, dense_above, monkeypatch):
    monkeypatch.setattr("decomp_bench.methods._activations.DENSE_ABOVE", dense_above)
    penalty = {"quadratic": "target_l0", "tanh_preact_ste": "tanh"}.get(variant, "l0")
    settings = {
        "bandwidth": 0.6,
        "l0": 0.2,
        "tanh": 0.2,
        "target_l0": 3.0,
        "penalty": penalty,
        "ste_to_input": variant.endswith(("ste", "input")),
    }
    peer = Peer("jumprelu", variant, activation="jumprelu", **settings)
    activation = peer.coder.activation
    with torch.no_grad():
        activation.log_threshold.copy_(peer.golden["param.threshold"].log())
    code = peer.code()
    recon = peer.reconstruct(code)
    peer.agrees("feature_acts", activation.value(peer.coder.pre(peer.read)))
    peer.agrees("sae_out", recon)
    peer.gradients_agree("mse_loss", peer.error(recon))
    peer.gradients_agree("l0_loss", activation.penalty(code, peer.coder.decoder()))
    if variant == "tanh_preact_ste":
        ids = peer.golden["in.dead_mask"].nonzero().squeeze(1)
        peer.gradients_agree("pre_act_loss", 0.05 * activation.below(peer.coder.pre_of(peer.read, ids), ids, peer.coder.decoder()))


@BOTH_WAYS
@pytest.mark.parametrize("frozen", [False, True])
def test_gated_is_sae_lens_gated_whose_decoder_may_be_frozen(dense_above, frozen, monkeypatch):
    """sae-lens trains the decoder on what the gates alone reconstruct; the paper freezes it there. The term and the gradients of the
    encoder agree either way; the decoder's are sae-lens' or none."""
    monkeypatch.setattr("decomp_bench.methods._activations.DENSE_ABOVE", dense_above)
    peer = Peer("gated", "default", activation="gated", l1=0.3)
    activation, decoder = peer.coder.activation, peer.coder.decoder()
    with torch.no_grad():
        activation.r_mag.copy_(peer.golden["param.r_mag"])
        activation.b_mag.copy_(peer.golden["param.b_mag"])
    code, pre = peer.code(), peer.coder.pre(peer.read)
    recon = peer.reconstruct(code)
    peer.agrees("feature_acts", activation.value(pre))
    peer.agrees("sae_out", recon)
    peer.gradients_agree("mse_loss", peer.error(recon))
    peer.gradients_agree("l1_loss", activation.penalty(code, decoder))
    if not frozen:
        whole = peer.error(activation.open(code).decode(decoder) + peer.bias)
        peer.agrees("loss.auxiliary_reconstruction_loss", whole)
        peer.gradients_agree("auxiliary_reconstruction_loss", whole)
        return
    gates = peer.error(activation.open(code).decode(decoder.detach()) + peer.bias.detach())
    peer.agrees("loss.auxiliary_reconstruction_loss", gates)
    named = {"W_enc": peer.coder.W_enc, "b_gate": peer.coder.b_enc}
    for (name, _), gradient in zip(named.items(), torch.autograd.grad(gates, list(named.values()), retain_graph=True), strict=True):
        peer.golden.agrees(f"grad.default.auxiliary_reconstruction_loss.{name}", gradient.T if name == "W_enc" else gradient)
    assert torch.autograd.grad(gates, [peer.coder.W_dec], allow_unused=True) == (None,)


# ---- nn_decompositions


class Uneven(TargetModel):
    """A target whose MLPs read six numbers and write five."""

    def size(self, point: str) -> int:
        return 6 if point.endswith(".in") else 5


def decomposer(golden: Golden, name: str, layers: int):
    """Our decomposer with a recorded case's weights, and the batch."""
    about = golden.about
    activation = {"vanilla": "relu"}.get(about["encoder_type"], about["encoder_type"])
    chosen = {"features": about["dict_size"], "k": about.get("top_k", 1), "activation": activation, "dead_after": 200, "aux": 1 / 32}
    chosen |= {"l1": about["l1_coeff"], "l0": about["l1_coeff"]} if about.get("l1_coeff") else {}
    chosen |= {"bandwidth": about["bandwidth"]} if "bandwidth" in about else {}
    kind = method(name)
    module = ResidualMLP(8, 6, 16, layers, torch.Generator().manual_seed(0))
    maps = {"mlp.up": "blocks.{}.mlp.up", "mlp.down": "blocks.{}.mlp.down"}
    target = Uneven("toy:none", module, Architecture("blocks.{}", "blocks.{}.mlp", None, maps), layers, 6, "regression")
    made = kind(parse(kind.Config, chosen, name), target, tuple(range(layers)), 0).train()
    end = [""] if name == "transcoder" else [f".{i}" for i in range(layers)]
    with torch.no_grad():
        for site, i in zip(made.sites, end, strict=True):
            coder = made.coder(site)
            coder.W_enc.copy_(golden[f"param.W_enc{i}"].T)
            coder.b_enc.copy_(golden[f"param.b_enc{i}"])
            weight = golden[f"param.W_dec{i}"]
            coder.W_dec.copy_(weight if weight.ndim == 2 else weight.transpose(0, 1).flatten(1))
            made.output(f"{site.layer}.mlp.out").b_dec.copy_(golden[f"param.b_dec{i}"])
            if activation == "jumprelu":
                key = "param.jumprelu.log_threshold" if i == "" else f"param.jumprelu_log_thresholds{i}"
                coder.activation.log_threshold.copy_(golden[key])
            coder.idle.copy_(4 * golden[f"in.tracker{i}"])  # counted in rows here, in batches of four there
    clean = {f"{n}.mlp.in": golden[f"in.x{i}"] for n, i in enumerate(end)} | {f"{n}.mlp.out": golden[f"in.y{i}"] for n, i in enumerate(end)}
    return made, Batch(clean=clean), end


def gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def gradients_agree(golden: Golden, made, end: list[str], loss: str, value: Tensor) -> None:
    """Gradients of a term. Those by the logarithm of a threshold lack a factor in the reference: the threshold, by the chain rule. They
    are compared where the kernel does not reach zero: there the reference counts every negative pre-activation as if it were zero."""
    made.zero_grad()
    value.backward(retain_graph=True)
    for site, i in zip(made.sites, end, strict=True):
        coder, width = made.coder(site), 5
        golden.agrees(f"grad.{loss}.W_enc{i}", gradient(coder.W_enc).T)
        golden.agrees(f"grad.{loss}.b_enc{i}", gradient(coder.b_enc))
        decoder = gradient(coder.W_dec)
        shape = golden[f"grad.{loss}.W_dec{i}"].shape
        golden.agrees(f"grad.{loss}.W_dec{i}", decoder if len(shape) == 2 else decoder.unflatten(1, (-1, width)).transpose(0, 1))
        golden.agrees(f"grad.{loss}.b_dec{i}", gradient(made.output(f"{site.layer}.mlp.out").b_dec))
        if hasattr(coder.activation, "log_threshold"):
            name = "jumprelu.log_threshold" if i == "" else f"jumprelu_log_thresholds{i}"
            threshold = coder.activation.log_threshold.exp()
            clear = threshold > golden.about["bandwidth"] / 2
            assert clear.sum() > 2
            golden.agrees(f"grad.{loss}.{name}", gradient(coder.activation.log_threshold) / threshold, clear)


CASES = {
    "transcoder": ["vanilla", "topk_nodead", "topk_dead", "batchtopk_dead", "jumprelu"],
    "clt": ["vanilla", "topk_dead", "batchtopk_dead", "jumprelu"],
}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases])
def test_transcoders_and_clts_are_those_of_nn_decompositions(name, case):
    """The same codes, outputs, reconstruction errors, L0 penalties and gradients. What differs on purpose:

    - an L1 penalty counts the length of the write vector; the reference's does not, so decoders of unit rows are handed to ours;
    - a CLT's error is the sum over layers, not their mean, and so is its L0 penalty (the reference divides that one alone);
    - BatchTopK and TopK agree entry by entry, as both select each layer for itself.
    """
    golden, layers = Golden(f"nnd_{name}_{case}"), 3 if name == "clt" else 1
    made, batch, end = decomposer(golden, name, layers)
    inputs = {site: batch.clean[site.reads[0]] for site in made.sites}
    (codes,) = made._codes(inputs, None)
    selected = [
        code.value if code.support is None else torch.zeros(len(x) * site.n).index_add(0, code.support.index, code.value).view(-1, site.n)
        for (site, code), x in zip(codes.items(), inputs.values(), strict=True)
    ]
    golden.agrees("out.feature_acts", torch.cat(selected, 1))
    totals = made._totals(made._constants(inputs), codes)[-1]
    for i, (write, total) in zip(end, totals.items(), strict=True):
        golden.agrees(f"out.output{i}", made.output(write).restore(total - made.output(write).b_dec))
    terms = made.loss(batch, 1.0)
    golden.agrees("out.l2_loss", terms["recon"] / layers)
    gradients_agree(golden, made, end, "l2_loss", terms["recon"] / layers)
    if case == "jumprelu":
        golden.agrees("out.sparsity_loss", terms["sparsity"] / layers)
        gradients_agree(golden, made, end, "sparsity_loss", terms["sparsity"] / layers)
    elif case == "vanilla":
        unit = {site: F.normalize(made.coder(site).decoder().detach(), dim=1) for site in codes}
        l1 = torch.stack([made.coder(site).activation.penalty(code, unit[site]) for site, code in codes.items()]).sum()
        golden.agrees("out.l1_loss", l1)
        gradients_agree(golden, made, end, "l1_loss", l1)
    for site, i in zip(made.sites, end, strict=True):
        golden.agrees(f"out.tracker_after{i}", made.coder(site).idle / 4)
    made.after_step(1.0)
    if name == "transcoder":
        golden.agrees("out.W_dec_after_unit_norm", made.coder(made.sites[0]).W_dec)


@pytest.mark.parametrize(("name", "case"), [("transcoder", "topk_dead"), ("transcoder", "batchtopk_dead"), ("clt", "topk_dead")])
def test_the_aux_loss_leaves_living_components_alone_unlike_nn_decompositions(name, case):
    """There the residual is not detached, a ReLU keeps most dead components without gradient, and a CLT's dead components predict their
    own layer only. Ours predict the detached residual of every place that they write to, from pre-activations as they are."""
    golden = Golden(f"nnd_{name}_{case}")
    made, batch, end = decomposer(golden, name, 3 if name == "clt" else 1)
    site, i = made.sites[0], end[0]
    coder, k = made.coder(site), golden.about["top_k_aux"]
    dead = golden[f"out.tracker_after{i}"] >= golden.about["n_batches_to_dead"]
    coder.dead.copy_(dead)
    coder.forget_dead_ids()
    x, ids = batch.clean["0.mlp.in"], dead.nonzero().squeeze(1)
    residual = torch.randn(4, coder.W_dec.shape[1], generator=torch.Generator().manual_seed(0))
    loss = coder.revival(x, residual, k)
    pre = x @ coder.W_enc[ids].T + coder.b_enc[ids]
    best = pre.topk(min(k, len(ids)), 1)
    by_hand = (torch.zeros_like(pre).scatter(1, best.indices, best.values) @ coder.W_dec[ids] - residual).square().sum()
    torch.testing.assert_close(loss, min(1.0, len(ids) / k) * by_hand / residual.square().sum())
    loss.backward()
    assert len(ids)
    assert coder.W_enc.grad[~dead].abs().max() == 0
    assert coder.W_dec.grad[~dead].abs().max() == 0
    assert golden[f"grad.aux_loss.W_dec{i}"].reshape(-1, len(dead), 5)[:, ~dead].abs().max() > 0


def test_a_square_transcoder_with_the_bias_subtracted_from_its_input():
    """Of nn_decompositions' option to scale each row, which needs y to invert, only the part between the two scalings is compared."""
    golden = Golden("nnd_transcoder_topk_square_preencbias_unitnorm")
    from decomp_bench.methods._coder import SparseCoder
    from decomp_bench.methods._dictionary_config import DictionaryConfig

    coder = SparseCoder(parse(DictionaryConfig, {"features": 12, "k": 3, "activation": "topk"}, "sae"), 6, 6, False, torch.Generator())
    bias = golden["param.b_dec"].clone().requires_grad_()
    with torch.no_grad():
        coder.W_enc.copy_(golden["param.W_enc"].T)
        coder.b_enc.copy_(golden["param.b_enc"])
        coder.W_dec.copy_(golden["param.W_dec"])
    x, y = ((v - v.mean(1, keepdim=True)) / (v.std(1, keepdim=True) + 1e-5) for v in (golden["in.x"], golden["in.y"]))
    (code,) = coder.codes(x - bias, None)
    total = code.decode(coder.decoder()) + bias
    golden.agrees("out.acts_dense", coder.pre(x - bias).relu())
    golden.agrees("out.feature_acts", code.support.gate() * coder.pre(x - bias).relu())
    golden.agrees("out.output", total * golden["in.y"].std(1, keepdim=True) + golden["in.y"].mean(1, keepdim=True))
    loss = F.mse_loss(total, y)
    golden.agrees("out.l2_loss", loss)
    named = {"W_enc": coder.W_enc, "b_enc": coder.b_enc, "W_dec": coder.W_dec, "b_dec": bias}
    for name, gradient in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
        golden.agrees(f"grad.l2_loss.{name}", gradient.T if name == "W_enc" else gradient)
