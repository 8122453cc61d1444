"""Mixtures of linear transforms: by hand, at the start of training, what is penalised and billed, and recovery of planted maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from decomp_bench.decomposer import Batch
from decomp_bench.errors import UserError
from tests.methods import test_dictionary
from tests.methods.test_dictionary import batches, fit, generator

ROUTES = {"together": 1e9, "apart": -1e9}
"""Costs of an entry at which all maps run on all rows, and at which each runs on its own."""


def make(layers=(0, 1), width=12, **config):
    chosen = {"transforms": 2, "groups": 3, "rank": 4, "k": 3, "features": 7 * config.get("transforms", 2), **config}
    return test_dictionary.make("molt", width, layers, **chosen)


def matrices(coder) -> torch.Tensor:
    """Every map U_t V_t, formed: [n, d_out, d_in]."""
    return torch.cat([torch.einsum("nro,nri->noi", U, V) for V, U in zip(coder.maps.V, coder.maps.U, strict=True)])


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("route", ROUTES)
def test_encode_decode_and_loss_are_the_published_sum(activation, route, monkeypatch):
    monkeypatch.setattr("decomp_bench.methods._molt.ENTRY_COST", ROUTES[route])
    monkeypatch.setattr("decomp_bench.methods._activations.DENSE_ABOVE", 1.0)
    molt = make(activation=activation, aux=0.0, l1=0.0, l0=0.0).train()
    data = batches()
    molt.before_training(data)
    batch = next(data)
    site, codes = molt.sites[1], molt.encode(batch.clean)
    coder, place, x = molt.coder(site), molt.output("1.mlp.out"), batch.clean["1.mlp.in"]
    z = (x - coder.normalise.mean) / coder.normalise.scale
    phi = F.linear(z, coder.W_enc, coder.b_enc).relu() * codes["1"].gate
    by_hand = torch.einsum("bt,toi,bi->bo", phi, matrices(coder), z) + place.b_dec
    decoded = molt.decode(codes, "1.mlp.out", batch.clean)
    torch.testing.assert_close(decoded, by_hand * place.scale + place.mean, atol=1e-5, rtol=1e-5)
    wanted = [molt.output(f"{m}.mlp.out")(batch.clean[f"{m}.mlp.out"]) for m in range(2)]
    made = [molt.output(f"{m}.mlp.out")(molt.decode(codes, f"{m}.mlp.out", batch.clean)) for m in range(2)]
    expected = sum(F.mse_loss(a, b) for a, b in zip(made, wanted, strict=True))
    loss = molt.loss(batch, 1.0)["recon"]
    torch.testing.assert_close(loss, expected)
    names = ["W_enc", "b_enc", *(f"maps.{side}.{i}" for side in "UV" for i in range(3))]
    parameters = [dict(coder.named_parameters())[name] for name in names]
    for name, one, two in zip(names, *(torch.autograd.grad(v, parameters, retain_graph=True) for v in (loss, expected)), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4, msg=name)


def test_lengths_are_frobenius_norms_and_inactive_maps_cost_nothing():
    from decomp_bench.methods._molt import LowRankMaps
    from decomp_bench.methods._sparse import top_of_batch

    maps = LowRankMaps([(4, 32)], 64, 64, generator())
    whole = torch.einsum("nro,nri->noi", maps.U[0], maps.V[0])
    torch.testing.assert_close(maps.lengths(), whole.flatten(1).norm(dim=1))
    x, gates = torch.randn(256, 64, generator=generator(1)), torch.rand(256, 4, generator=generator(2))
    few = top_of_batch(gates, 32)
    with FlopCounterMode(display=False) as dense:
        expected = maps(x, gates * few.gate(), None)
    with FlopCounterMode(display=False) as sparse:
        found = maps(x, gates.flatten()[few.index], few)
    torch.testing.assert_close(found, expected)
    assert sparse.get_total_flops() == dense.get_total_flops() * 32 / (256 * 4)


def test_training_starts_with_outputs_of_variance_one():
    coder = make(width=48, layers=(0,), rank=12, transforms=8, activation="relu").coders["0"]
    x = torch.randn(4096, 48, generator=generator())
    with torch.no_grad():
        each = x @ matrices(coder).mT
        pre = coder.pre(x)
        whole = coder.write(x, pre.relu(), None)
    assert each.var() == pytest.approx(1, rel=0.1)
    assert whole.var() == pytest.approx(1, rel=0.25)


def test_penalties_weigh_gates_by_the_norm_of_their_map_and_cannot_be_avoided_by_scaling():
    x = torch.randn(64, 12, generator=generator())
    for config in ({"activation": "relu"}, {"activation": "relu", "penalty": "tanh"}, {"activation": "jumprelu", "threshold_init": 0.2}):
        coder = make(layers=(0,), **config).coders["0"]

        def penalty(coder=coder):
            return coder.activation.penalty(coder.codes(x, None)[0], coder.decoder())

        norms, phi = matrices(coder).flatten(1).norm(dim=1), F.linear(x, coder.W_enc, coder.b_enc).relu()
        expected = {
            "l1": 0.01 * (phi * norms).sum(1).mean(),
            "tanh": 1e-3 * torch.tanh(4 * phi * norms).sum(1).mean(),
            "l0": 1e-3 * ((phi * norms > 0.2) * norms * coder.W_enc.norm(dim=1)).sum(1).mean(),
        }[coder.activation.config.sparsity]
        torch.testing.assert_close(penalty(), expected)
        with torch.no_grad():
            coder.W_enc.mul_(5)
            for U in coder.maps.U:
                U.mul_(1 / 5)
        torch.testing.assert_close(penalty(), expected)


def test_dead_transforms_learn_from_the_residual():
    molt = make(layers=(0,), aux=1.0, aux_k=2).train()
    data = batches(layers=1)
    molt.before_training(data)
    with torch.no_grad():
        molt.coders["0"].b_enc[:4] = -100.0
    molt.coders["0"].dead[:4] = True
    molt.coders["0"].forget_dead_ids()
    terms = molt.loss(next(data), 0.5)
    (gradient,) = torch.autograd.grad(terms["aux"], molt.coders["0"].maps.V[1])
    assert terms["aux"] > 0
    assert gradient[:2].abs().sum() > 0, "transforms 2 and 3, the first of the second group, are dead"
    assert gradient[2:].abs().sum() == 0


def test_transforms_are_billed_by_their_rank():
    molt = make(layers=(0,))
    assert molt.component_sizes(molt.sites[0]).tolist() == [4 * 24 + 12] * 2 + [2 * 24 + 12] * 4 + [24 + 12] * 8
    assert molt.component_coefficients(molt.sites[0]).tolist() == [4] * 2 + [2] * 4 + [1] * 8
    assert molt.sites[0].n == 14
    assert molt.directions(molt.sites[0], molt.sites[0].slots[0]) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [({"features": 100}, "does not follow"), ({"rank": 13}, "exceeds the width 12"), ({"activation": "gated"}, "activation")],
)
def test_what_does_not_fit_is_refused_in_one_line(config, message):
    with pytest.raises(UserError, match=message) as caught:
        make(**config)
    assert "\n" not in str(caught.value)


def test_it_is_not_taken_for_a_dictionary_of_vectors():
    from decomp_bench.interop._plain import as_plain, dictionary

    assert dictionary("in", False).name == "transcoder"
    with pytest.raises(UserError, match="molt gives no encoder and decoder"):
        as_plain(make())


# ---- planted truth


def planted(width=12, rows=256, seed=3):
    """Four maps of rank three, each switched on by its own direction of the input, and the stream of data that they make."""
    g = generator(seed)
    gates = torch.linalg.qr(torch.randn(width, 4, generator=g)).Q.T
    maps = torch.randn(4, width, 3, generator=g) @ torch.randn(4, 3, width, generator=g)

    def data():
        while True:
            x = torch.randn(rows, width, generator=g)
            y = torch.einsum("bt,toi,bi->bo", (x @ gates.T - 1).relu(), maps, x)
            yield Batch(clean={"0.mlp.in": x, "0.mlp.out": y})

    return maps, data()


def similarity(maps: torch.Tensor, coder) -> float:
    """For each true map the largest cosine to one that is there, on average."""
    found = F.normalize(matrices(coder).detach().flatten(1), dim=1)
    return float((F.normalize(maps.flatten(1), dim=1) @ found.T).max(1).values.mean())


def test_planted_maps_are_recovered_and_random_ones_do_not_do_instead():
    maps, data = planted()
    chosen = {"layers": (0,), "transforms": 4, "groups": 2, "rank": 3, "features": 12, "k": 2, "batch": 256, "lr": 1e-2}
    ours, control = make(**chosen), make(**chosen)
    control.coders["0"].maps.requires_grad_(False)
    for one in (ours, control):
        fit(one, data, steps=400)
    batch = next(data)
    errors = []
    for one in (ours, control):
        y = batch.clean["0.mlp.out"]
        with torch.no_grad():
            made = one.decode(one.encode(batch.clean), "0.mlp.out", batch.clean)
        errors.append(float((made - y).square().sum() / (y - y.mean(0)).square().sum()))
    found, by_chance = (similarity(maps, one.coders["0"]) for one in (ours, control))
    assert found > (1 + by_chance) / 2
    assert errors[0] < errors[1] / 4
