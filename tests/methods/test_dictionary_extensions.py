"""Options of sparse coders that came after the first runs, and that leave what was there before as it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from decomp_bench import runs
from decomp_bench.config import RunConfig
from decomp_bench.decomposer import SiteCodes
from decomp_bench.errors import UserError
from decomp_bench.registry import method
from tests.methods.test_dictionary import batches, fit, generator, make
from tests.test_runs import MLP

MOLT = {"sae": {}, "transcoder": {}, "clt": {}, "molt": {"features": 14, "transforms": 2, "groups": 3, "rank": 4}}
"""Config keys by which a method has a size of its own."""


@pytest.mark.parametrize("name", ["sae", "transcoder", "clt", "molt"])
def test_options_at_their_defaults_leave_no_trace_in_a_run_id(name, monkeypatch):
    """The hashed config is the one without these keys; set, they change the id."""
    monkeypatch.setattr("decomp_bench.metrics.metric_versions", dict)
    target = SimpleNamespace(uri="pydocs-4l", identity="identity", layer_tuple=lambda _layers: (0, 1), part=lambda _point: MLP)
    source = SimpleNamespace(name="pydocs", hash="hash")
    config = method(name).Config

    def key(**chosen):
        return runs.resolve(RunConfig(method=name, method_config=chosen), target, source).training_key  # type: ignore[arg-type]

    default = key()
    hashed = runs._hashed(RunConfig(method=name, method_config=config().model_dump(mode="json")), config)
    assert set(hashed["method_config"]) == set(config.model_fields) - set(config.younger)
    assert key(k_by_layer=[4, 8]) != default
    assert key(k_by_layer=None) == default


# ---- each layer's own k


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize("name", ["transcoder", "clt"])
def test_each_layer_has_its_own_k_in_training_and_in_evaluation(name, activation):
    data = batches(rows=256)
    decomposer = make(name, activation=activation, k_by_layer=[2, 6], calibration=4096)
    fit(decomposer, data, steps=60)
    together = [next(data) for _ in range(8)]
    counts = torch.tensor([[float(c.active.float().sum(1).mean()) for c in decomposer.encode(b.clean).values()] for b in together])
    assert counts.mean(0).tolist() == pytest.approx([2, 6], rel=0.06)
    codes = decomposer._codes({s: decomposer.coder(s).normalise(together[0].clean[s.reads[0]]) for s in decomposer.sites}, None)[0]
    assert [float(code.fired().sum()) / 256 for code in codes.values()] == pytest.approx([2, 6], rel=0.02)
    assert decomposer.variant == "k=2/6"


def test_a_layer_with_its_own_k_has_the_weights_that_it_has_alone():
    both, alone = make("transcoder", k_by_layer=[2, 6]), make("transcoder", layers=(1,), k=6)
    for one in (both, alone):
        fit(one, batches(), steps=20)
    for name, value in alone.coders["1"].state_dict().items():
        assert torch.equal(value, both.coders["1"].state_dict()[name]), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"k_by_layer": [4]}, "1 values for 2 layers"),
        ({"k_by_layer": [4, 64]}, "k=64 exceeds features=32"),
        ({"k_by_layer": [4, 4], "activation": "relu"}, "k_by_layer is for"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        make("transcoder", **config)


# ---- stochastic ablation of inactive components


@torch.no_grad()
def let_through(decomposer, batch, draws: int = 8) -> float:
    """Mean unexplained variance of y when inactive components are let through with uniform shares, relative to that of the codes."""
    g, errors = generator(5), []
    codes = decomposer.encode(batch.clean)
    for draw in range(draws + 1):
        shares = {name: torch.rand(c.gate.shape, generator=g) * (draw > 0) for name, c in codes.items()}
        edited = {name: SiteCodes(c.strength, c.gate + (1 - c.gate) * shares[name]) for name, c in codes.items()}
        share = 0.0
        for layer in decomposer.layers:
            y, made = batch.clean[f"{layer}.mlp.out"], decomposer.decode(edited, f"{layer}.mlp.out", batch.clean)
            share += float((made - y).square().sum() / (y - y.mean(0)).square().sum()) / len(decomposer.layers)
        errors.append(share)
    return sum(errors[1:]) / draws / errors[0]


@pytest.mark.parametrize("name", ["sae", "transcoder", "clt", "molt"])
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_the_stochastic_term_is_the_error_with_uniform_shares_of_inactive_components(name, activation, monkeypatch):
    decomposer = make(name, activation=activation, stochastic=0.5, threshold_init=0.2, **MOLT[name]).train()
    data = batches()
    decomposer.before_training(data)
    batch = next(data)
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, 0.25))
    codes, expected = decomposer.encode(batch.clean), 0.0
    shared = {name: SiteCodes(c.strength, c.gate + 0.25 * (1 - c.gate)) for name, c in codes.items()}
    assert all(((c.strength > 0) & (c.gate == 0)).any() for c in codes.values())
    for layer in decomposer.layers:
        point = f"{layer}.mlp.out"
        made, place = decomposer.decode(shared, point, batch.clean), decomposer.output(point)
        expected += 0.5 * ((made - batch.clean[point]) / place.scale).square().mean()
    torch.testing.assert_close(decomposer.loss(batch, 1.0)["stochastic"], expected)


def test_stochastic_training_makes_inactive_components_less_harmful_and_repeats_itself():
    stream = batches(rows=256)
    batch = [next(stream) for _ in range(200)][-1]
    fitted = [fit(make("transcoder", features=256, k=2, stochastic=w), batches(rows=256), steps=100) for w in (0.0, 1.0, 1.0)]
    plain, ours, again = (let_through(one, batch) for one in fitted)
    assert ours < plain - 0.05, "the error with them, relative to that without"
    assert ours == again


def test_end_to_end_training_has_no_stochastic_term():
    with pytest.raises(UserError, match="nor stochastic"):
        make("transcoder", train_on="cascading", stochastic=1.0)


# ---- decoders of low rank


def test_decoders_of_full_rank_are_decoders_and_of_low_rank_have_that_rank():
    for rank in (12, 3):
        coder = make("clt", layers=(0, 1, 2), decoder_rank=rank).coders["0"]
        torch.testing.assert_close(coder.rows.norm(dim=1), torch.ones(32))
        assert [int(torch.linalg.matrix_rank(part)) for part in coder.rows.split(12, 1)] == [12, rank, rank]
    whole, factored = make("clt", layers=(0, 1, 2)).coders["0"], make("clt", layers=(0, 1, 2), decoder_rank=12).coders["0"]
    torch.testing.assert_close(factored.rows, whole.rows)


@pytest.mark.parametrize("decoder_rows", ["unit", "free"])
def test_low_rank_decoders_learn_the_loss_of_encode_and_decode(decoder_rows):
    decomposer = make("clt", layers=(0, 1), decoder_rank=3, decoder_rows=decoder_rows, aux=0.0).train()
    data = batches()
    fit(decomposer, data, steps=40)
    decomposer.train()
    batch = next(data)
    codes, expected = decomposer.encode(batch.clean), 0.0
    for layer in decomposer.layers:
        point = f"{layer}.mlp.out"
        made = decomposer.decode(codes, point, batch.clean)
        expected += ((made - batch.clean[point]) / decomposer.output(point).scale).square().mean()
    loss = decomposer.loss(batch, 1.0)["recon"]
    torch.testing.assert_close(loss, expected)
    coder = decomposer.coders["0"]
    parameters = [coder.W_dec, coder.A[0], coder.B[0], coder.W_enc]
    for one, two in zip(*(torch.autograd.grad(v, parameters, retain_graph=True) for v in (loss, expected)), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)
    if decoder_rows == "unit":
        torch.testing.assert_close(coder.rows.norm(dim=1), torch.ones(32))


def test_a_component_of_a_low_rank_decoder_starts_again_as_near_as_it_can_write():
    coder = make("clt", layers=(0, 1), decoder_rank=3).coders["0"]
    ids, wanted = torch.tensor([4, 9]), torch.randn(2, 24, generator=generator())
    wanted[:, 12:] = wanted[:, 12:] @ coder.B[0].T @ coder.B[0]
    with torch.no_grad():
        coder.restart(ids, torch.randn(2, 12, generator=generator(1)), wanted)
    torch.testing.assert_close(coder.rows[ids], torch.nn.functional.normalize(wanted, dim=1))


def test_a_rank_above_the_width_is_refused():
    with pytest.raises(UserError, match="exceeds the width 12"):
        make("clt", decoder_rank=13)
