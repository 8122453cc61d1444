"""The sparse coder: gradients, revival, recovery of planted truth, and agreement with sae-lens."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from decomp_bench.decomposer import Batch
from decomp_bench.errors import UserError
from tests.methods.dictionaries import ACTIVATIONS, batches, fit, generator, joined, make


@pytest.mark.parametrize("name", ["sae", "transcoder", "clt"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_loss_is_that_of_encode_and_decode_with_the_same_gradients(name, activation):
    decomposer = make(name, activation=activation, aux=0.0, l1=0.0, l0=0.0).train()
    data = batches()
    decomposer.before_training(data)
    batch = next(data)
    decomposer.loss(batch, 1.0)["recon"].backward()
    found = {key: p.grad.clone() for key, p in decomposer.named_parameters() if p.grad is not None and "threshold" not in key}
    decomposer.zero_grad()
    codes = decomposer.encode(batch.clean)
    terms = []
    for layer in decomposer.layers:
        point = f"{layer}.mlp.out"
        y = batch.clean[point]
        scale = decomposer.output(point).scale
        terms.append(((decomposer.decode(codes, point, batch.clean) - y) / scale).square().mean())
    torch.testing.assert_close(sum(terms), decomposer.loss(batch, 1.0)["recon"])
    sum(terms).backward()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, dict(decomposer.named_parameters())[key].grad, atol=1e-6, rtol=1e-4, msg=key)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "gated"])
def test_dense_and_sparse_steps_agree(activation, monkeypatch):
    from decomp_bench.methods import _activations

    data = batches()
    decomposer = make("clt", activation=activation, l1=0.1, l0=0.1, aux=0.0).train()
    decomposer.before_training(data)
    batch, found = next(data), []
    for share in (-1.0, 1.0):
        monkeypatch.setattr(_activations, "DENSE_ABOVE", share)
        terms = decomposer.loss(batch, 1.0)
        sum(terms.values()).backward()
        found.append((terms, {key: p.grad.clone() for key, p in decomposer.named_parameters()}))
        decomposer.zero_grad()
    for dense, sparse in zip(*found, strict=True):
        torch.testing.assert_close(dense, sparse, atol=1e-6, rtol=1e-4)


def test_jumprelu_threshold_gradients_are_those_of_the_smoothed_functions():
    from decomp_bench.methods._jumprelu import _Jump, _Step

    width, g = 0.3, generator(1)
    z = torch.rand(4000, 5, generator=g, dtype=torch.float64) * 2
    weight = torch.randn(z.shape, generator=g, dtype=torch.float64)
    log_threshold = torch.tensor([-0.5, 0.0, -0.2, 0.1, 0.3], dtype=torch.float64, requires_grad=True)

    def smoothed(log_theta):
        """The rectangle kernel integrated: of the step, and of the threshold times the step's slope."""
        theta = torch.minimum(torch.maximum(log_theta.exp(), z - width / 2), z + width / 2)
        step = (z + width / 2 - theta) / width
        jump = ((z + width / 2).square() - theta.square()) / (2 * width)
        return (weight * step).sum(0), (weight * jump).sum(0)

    step, jump = ((weight * f.apply(z, log_threshold.expand_as(z), width, False)).sum() for f in (_Step, _Jump))
    for index, value in enumerate((step, jump)):
        (gradient,) = torch.autograd.grad(value, log_threshold)
        h = 1e-7
        difference = (smoothed(log_threshold.detach() + h)[index] - smoothed(log_threshold.detach() - h)[index]) / (2 * h)
        torch.testing.assert_close(gradient, difference, rtol=1e-3, atol=0.5)  # some z lie within h of the kernel's edge


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("sae", {"activation": "groupmax", "k": 5}, "features=32 is no multiple of k=5"),
        ("sae", {"activation": "relu", "k_start": 8}, "k_start and multi_k are for topk, batchtopk, matryoshka, not for relu"),
        ("sae", {"k_start": 64}, "k_start=64 exceeds features=32"),
        ("sae", {"activation": "gated", "penalty": "l0"}, "gated has no penalty 'l0'; it has: l1"),
        ("sae", {"penalty": "l1"}, "batchtopk has no penalty 'l1'; it has: none"),
        ("sae", {"revive": "pre_act"}, "revive=pre_act is for jumprelu"),
        ("sae", {"activation": "gated", "decoder_rows": "free"}, "gated has unit decoder rows"),
        ("sae", {"activation": "matryoshka", "prefixes": (0.5, 0.25)}, "prefixes must rise"),
        ("sae", {"skip": True}, "unknown key 'skip'"),
        ("random_directions", {"skip": True}, "unknown key 'skip'"),
        ("transcoder", {"across_layers": True}, "unknown key 'across_layers'"),
        ("clt", {"activation": "topk", "across_layers": True}, "across_layers is for batchtopk and matryoshka, not for topk"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(name, config, words):
    with pytest.raises(UserError, match=words):
        make(name, **config)


def test_the_aux_loss_revives_dead_components():
    """Biases of most components start so low that they never fire; without the aux loss they stay dead."""
    dead = {}
    for aux in (0.0, 1.0):
        data = batches(layers=1, rows=128)
        decomposer = make("sae", layers=(0,), aux=aux, dead_after=1000, k=2, lr=1e-2)
        with torch.no_grad():
            decomposer.coder(decomposer.sites[0]).b_enc[4:] = -9.0
        fit(decomposer, data, steps=150)
        batch = Batch(clean={key: torch.cat(value) for key, value in joined(itertools.islice(data, 30)).items()})
        dead[aux] = int((~decomposer.encode(batch.clean)["0"].active.any(0)).sum())
    assert dead[0.0] >= 26
    assert dead[1.0] <= 14


@pytest.mark.parametrize(
    ("activation", "config", "junk"),
    [("batchtopk", {"k": 1}, 0), ("relu", {"l1": 0.1, "features": 12}, 0), ("topk", {"k": 3}, 1), ("jumprelu", {"l0": 0.1}, 1)],
)
def test_a_planted_dictionary_is_recovered(activation, config, junk):
    """Every planted direction is found; of the four spare components, at most `junk` come alive."""
    width, planted, g = 32, 12, generator(3)
    truth = F.normalize(torch.randn(planted, width, generator=g), dim=1)

    def rows(count=256):
        while True:
            active = torch.rand(count, planted, generator=g) < 1 / planted
            yield Batch(clean={"0.mlp.out": (active * (0.5 + torch.rand(count, planted, generator=g))) @ truth + 0.3})

    decomposer = make("sae", width, (0,), activation=activation, batch=256, **{"features": 16, **config})
    fit(decomposer, rows(), steps=300)
    site = decomposer.sites[0]
    alive = decomposer.encode(next(rows(5000)).clean)["0"].active.float().mean(0) > 0.005
    matched = truth @ F.normalize(decomposer.directions(site, site.slots[0])[1][alive], dim=1).T > 0.9
    assert matched.any(1).all(), "a planted direction is missing"
    assert int((~matched.any(0)).sum()) <= junk


@pytest.mark.parametrize("name", ["sae", "transcoder", "clt"])
def test_no_bias_is_forgotten(name):
    data = batches()
    decomposer = make(name).eval()
    decomposer.before_training(data)
    batch = next(data)
    codes = decomposer.encode(batch.clean)
    before = decomposer.decode(codes, "1.mlp.out", batch.clean)
    with torch.no_grad():
        decomposer.coders["1"].b_enc += 0.5
        decomposer.outputs["1"].b_dec += 1.0
    assert torch.allclose(decomposer.decode(codes, "1.mlp.out", batch.clean), before + decomposer.outputs["1"].scale, atol=1e-6)
    moved = decomposer.encode(batch.clean)["1"].strength
    both = (moved > 0) & (codes["1"].strength > 0)
    torch.testing.assert_close(moved[both], codes["1"].strength[both] + 0.5)
    assert torch.equal(decomposer.encode(batch.clean)["0"].strength, codes["0"].strength)


def test_with_nothing_active_the_output_starts_at_the_mean_of_y():
    data = batches()
    decomposer = make("transcoder")
    decomposer.before_training(data)
    batch = next(data)
    codes = decomposer.encode(batch.clean)
    for code in codes.values():
        code.gate = torch.zeros_like(code.gate)
    mean = torch.cat(joined(itertools.islice(batches(), 16))["1.mlp.out"]).mean(0)
    torch.testing.assert_close(decomposer.decode(codes, "1.mlp.out", batch.clean)[0], mean, atol=1e-4, rtol=1e-4)


def test_a_clt_of_one_layer_is_the_transcoder():
    made = [fit(make(name, layers=(1,)), batches(), steps=25) for name in ("clt", "transcoder")]
    batch = next(batches(seed=9))
    codes = [d.encode(batch.clean) for d in made]
    assert torch.equal(codes[0]["1"].value, codes[1]["1"].value)
    outputs = [d.decode(c, "1.mlp.out", batch.clean) for d, c in zip(made, codes, strict=True)]
    assert torch.equal(*outputs)
    assert [d.component_sizes(d.sites[0]) for d in made] == [24, 24]


def test_layers_trained_together_are_as_if_trained_alone():
    together = fit(make("transcoder", dead_after=300), batches(), steps=40)
    alone = fit(make("transcoder", layers=(1,), dead_after=300), batches(), steps=40)
    for key, value in alone.state_dict().items():
        assert torch.equal(value, together.state_dict()[key]), key


def test_clt_decoders_are_triangular_with_unit_rows_over_all_targets_together():
    decomposer = fit(make("clt", layers=(0, 1, 2)), batches(layers=3), steps=5)
    assert [[slot.write for slot in site.slots] for site in decomposer.sites] == [
        [f"{later}.mlp.out" for later in range(layer, 3)] for layer in range(3)
    ]
    assert [decomposer.component_sizes(site) for site in decomposer.sites] == [12 * 4, 12 * 3, 12 * 2]
    for site in decomposer.sites:
        weight = decomposer.coder(site).W_dec
        assert torch.allclose(weight.norm(dim=1), torch.ones(32), atol=1e-6)
        if len(site.slots) > 1:
            assert weight[:, :12].norm(dim=1).std() > 1e-4


@pytest.mark.parametrize("name", ["sae", "transcoder", "clt"])
def test_directions_are_in_the_targets_own_coordinates(name):
    data = batches()
    decomposer = fit(make(name), data, steps=10)
    batch = next(data)
    codes = decomposer.encode(batch.clean)
    total, bias = torch.zeros(64, 12), None
    for site in decomposer.sites:
        folded = decomposer.folded(site)
        strength = (batch.clean[site.reads[0]] @ folded["W_enc"].T + folded["b_enc"]).relu()
        torch.testing.assert_close(strength, codes[site.name].strength, atol=1e-4, rtol=1e-4)
        for slot in site.slots:
            if slot.write == "1.mlp.out":
                total = total + codes[site.name].value @ decomposer.directions(site, slot)[1]
                bias = folded["b_dec"][-12:]
    torch.testing.assert_close(total + bias, decomposer.decode(codes, "1.mlp.out", batch.clean), atol=1e-4, rtol=1e-4)


def test_evaluation_leaves_the_training_state_alone_and_a_resume_continues_it():
    data = batches()
    decomposer = make("transcoder", dead_after=100)
    fit(decomposer, data, steps=20)
    before = {key: value.clone() for key, value in decomposer.train_state().items()}
    weights = {key: value.clone() for key, value in decomposer.state_dict().items()}
    batch = next(data)
    decomposer.encode(batch.clean)
    decomposer.loss(batch, 1.0)
    assert all(torch.equal(value, decomposer.train_state()[key]) for key, value in before.items())
    assert all(torch.equal(value, decomposer.state_dict()[key]) for key, value in weights.items())
    assert any(bool(value.any()) for key, value in before.items() if key.endswith("idle"))
    other = make("transcoder", dead_after=100)
    other.load_state_dict(weights)
    other.load_train_state(before)
    losses = [sum(d.train().loss(batch, 1.0).values()) for d in (decomposer, other)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_step_names_the_same_terms(activation):
    data = batches()
    decomposer = make("transcoder", activation=activation, dead_after=64, k=1).train()
    decomposer.before_training(data)
    keys = {tuple(sorted(decomposer.loss(next(data), step / 20))) for step in range(20)}
    assert len(keys) == 1
    assert {"l0", "dead"} <= decomposer.step_statistics().keys()


@pytest.mark.parametrize(
    ("activation", "rows"),
    [*((name, "unit") for name in ACTIVATIONS if name != "groupmax"), ("topk", "free"), ("batchtopk", "free"), ("jumprelu", "free")],
)
def test_codes_and_reconstructions_agree_with_sae_lens(activation, rows):
    from sae_lens.saes import (
        GatedSAE,
        GatedSAEConfig,
        JumpReLUSAE,
        JumpReLUSAEConfig,
        StandardSAE,
        StandardSAEConfig,
        TopKSAE,
        TopKSAEConfig,
    )

    data = batches(rows=128)
    ours = fit(make("sae", layers=(0,), activation=activation, decoder_rows=rows), data, steps=60)
    site, plain = ours.sites[0], ours.folded(ours.sites[0])
    sizes = {"d_in": 12, "d_sae": 32, "apply_b_dec_to_input": False}
    peers = {
        "relu": lambda: StandardSAE(StandardSAEConfig(**sizes)),
        "topk": lambda: TopKSAE(TopKSAEConfig(k=3, **sizes)),
        "gated": lambda: GatedSAE(GatedSAEConfig(**sizes)),
    }
    peer = peers.get(activation, lambda: JumpReLUSAE(JumpReLUSAEConfig(**sizes)))()
    weights = {**plain, "W_enc": plain["W_enc"].T}
    if activation in ("batchtopk", "matryoshka"):  # sae-lens saves its own as jumprelu with one threshold
        weights["threshold"] = ours.coder(site).activation.threshold(3).expand(32)
    elif activation == "jumprelu":
        weights["threshold"] = ours.coder(site).activation.log_threshold.exp()
    elif activation == "gated":
        weights["b_gate"] = weights.pop("b_enc")
    peer.load_state_dict({key: value.detach().contiguous() for key, value in weights.items()})
    batch = next(data)
    y = batch.clean["0.mlp.out"]
    codes = ours.encode(batch.clean)
    theirs = peer.encode(y)
    assert torch.equal(codes["0"].active, theirs > 0)
    assert codes["0"].active.any()
    torch.testing.assert_close(codes["0"].value, theirs.to_dense(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(codes, "0.mlp.out", batch.clean), peer.decode(theirs), atol=1e-5, rtol=1e-5)
