"""What a sparse coder can be told besides: skip connections, selections over layers, prefixes, free rows, annealing, revival, penalties."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from decomp_bench.config import TrainConfig, parse
from decomp_bench.registry import method
from decomp_bench.train import Job, train
from tests.methods.dictionaries import ACTIVATIONS, batches, fit, generator, make


@torch.no_grad()
def error(decomposer, batch) -> float:
    """Mean unexplained variance over layers, as evaluation computes codes."""
    codes = decomposer.encode(batch.clean)
    shares = []
    for layer in decomposer.layers:
        point = f"{layer}.mlp.out"
        y = batch.clean[point]
        shares.append((decomposer.decode(codes, point, batch.clean) - y).square().sum() / (y - y.mean(0)).square().sum())
    return float(torch.stack(shares).mean())


# ---- skip


@pytest.mark.parametrize("name", ["transcoder", "clt"])
def test_a_skip_connection_is_learned_billed_and_folded(name):
    """y is linear in x but for a rest: a skip connection takes the linear part."""

    def data():
        g = generator(1)
        maps = [torch.randn(12, 12, generator=g) for _ in range(2)]
        for batch in batches(rows=256):
            for layer in range(2):
                batch.clean[f"{layer}.mlp.out"] = batch.clean[f"{layer}.mlp.out"] + 0.02 * batch.clean[f"{layer}.mlp.in"] @ maps[layer].T
            yield batch

    fitted = {skip: fit(make(name, skip=skip), data(), steps=150) for skip in (False, True)}
    stream = data()
    batch = [next(stream) for _ in range(3)][-1]
    assert error(fitted[True], batch) < 0.8 * error(fitted[False], batch)
    ours = fitted[True]
    assert ours.family == f"{name}, skip"
    assert [d.constant_size("1.mlp.out") for d in fitted.values()] == [12, 12 + 144]
    assert [d.constant_coefficients("1.mlp.out") for d in fitted.values()] == [0, 12]
    assert all(ours.component_sizes(site) == fitted[False].component_sizes(site) for site in ours.sites)
    codes = ours.encode(batch.clean)
    first, last = (ours.folded(site) for site in ours.sites)
    by_hand = codes["1"].value @ last["W_dec"] + last["b_dec"] + batch.clean["1.mlp.in"] @ last["W_skip"].T
    if name == "clt":
        by_hand = by_hand + codes["0"].value @ first["W_dec"][:, 12:]
        torch.testing.assert_close(first["b_dec"][12:], last["b_dec"])
    torch.testing.assert_close(ours.decode(codes, "1.mlp.out", batch.clean), by_hand, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["transcoder", "clt"])
def test_the_loss_with_a_skip_connection_is_that_of_encode_and_decode(name):
    decomposer = make(name, skip=True, aux=0.0).train()
    data = batches()
    decomposer.before_training(data)
    with torch.no_grad():
        for site in decomposer.sites:
            decomposer.coder(site).W_skip.normal_(generator=generator())
    batch = next(data)
    codes, terms = decomposer.encode(batch.clean), []
    for layer in decomposer.layers:
        point = f"{layer}.mlp.out"
        difference = decomposer.decode(codes, point, batch.clean) - batch.clean[point]
        terms.append((difference / decomposer.output(point).scale).square().mean())
    torch.testing.assert_close(sum(terms), decomposer.loss(batch, 1.0)["recon"])


# ---- one selection over all layers


@pytest.mark.parametrize("activation", ["batchtopk", "matryoshka"])
def test_a_selection_over_all_layers_takes_the_largest_of_all_and_shares_a_threshold(activation):
    data = batches(layers=3, rows=256)
    decomposer = make("clt", layers=(0, 1, 2), activation=activation, across_layers=True, k=4, batch=256, calibration=4096).train()
    decomposer.before_training(data)
    with torch.no_grad():
        decomposer.coders["1"].W_enc.mul_(3)  # so that layers differ
    batch = next(data)
    codes = decomposer.encode(batch.clean)
    strengths = torch.stack([code.strength for code in codes.values()])
    active = torch.stack([code.active for code in codes.values()])
    assert active.sum() == 3 * 4 * 256
    assert strengths[active].min() >= strengths[~active].max()
    counts = active.sum((1, 2)).tolist()
    assert counts[1] > 1.5 * counts[0], counts
    inputs = {site: decomposer.coder(site).normalise(batch.clean[site.reads[0]]) for site in decomposer.sites}
    (found,) = decomposer._codes(inputs, None)
    for (site, code), gate in zip(found.items(), active, strict=True):
        assert torch.equal(code.support.gate().bool(), gate), site.name
    fit(decomposer, data, steps=60)
    tables = [coder.activation.table_threshold for coder in decomposer.coders.values()]
    assert all(torch.equal(tables[0], table) for table in tables)
    unseen = torch.cat([torch.stack([c.active.float().sum(1) for c in decomposer.encode(next(data).clean).values()]) for _ in range(8)], 1)
    assert float(unseen.mean()) == pytest.approx(4, rel=0.05)
    assert decomposer.family.endswith("across layers")


@pytest.mark.parametrize("hint", [0.0, 0.5, 9.0])
def test_the_largest_of_several_matrices_are_exact(hint):
    from decomp_bench.methods._sparse import top_of_batch, top_of_batches

    pres = [scale * torch.randn(50, 32, generator=generator(seed)) for seed, scale in enumerate((1.0, 2.0, 0.5))]
    found = torch.stack([support.gate() for support in top_of_batches(pres, 300, hint)])
    together = top_of_batch(torch.cat(pres), 300).gate().view(3, 50, 32)
    assert torch.equal(found, together)
    ties = [torch.ones(4, 5), torch.ones(4, 5)]
    assert [support.index.numel() for support in top_of_batches(ties, 23)] == [20, 3]


# ---- matryoshka, groupmax


@pytest.mark.parametrize("name", ["sae", "clt"])
def test_nested_prefixes_are_reconstructions_from_the_first_components_alone(name):
    decomposer = make(name, activation="matryoshka", prefixes=(0.25, 0.5), aux=0.0, k=6).train()
    assert decomposer.config.widths() == [8, 16, 32]
    data = batches()
    decomposer.before_training(data)
    batch = next(data)
    codes, expected = decomposer.encode(batch.clean), []
    for width in (8, 16):
        for layer in decomposer.layers:
            point = f"{layer}.mlp.out"
            prefix = {key: type(code)(code.strength, code.gate * (torch.arange(32) < width)) for key, code in codes.items()}
            difference = decomposer.decode(prefix, point, batch.clean) - batch.clean[point]
            expected.append((difference / decomposer.output(point).scale).square().mean())
    torch.testing.assert_close(decomposer.loss(batch, 1.0)["nested"], torch.stack(expected).sum())


def test_prefixes_of_a_matryoshka_sae_reconstruct_better_than_those_of_batchtopk():
    errors = {}
    for activation in ("batchtopk", "matryoshka"):
        data = batches(rows=256, layers=1)
        decomposer = fit(make("sae", layers=(0,), activation=activation, prefixes=(0.25,), features=32, batch=256), data, steps=200)
        batch = next(data)
        codes = decomposer.encode(batch.clean)
        y, own = batch.clean["0.mlp.out"], codes["0"]
        prefix = {"0": type(own)(own.strength, own.gate * (torch.arange(32) < 8))}
        left = (decomposer.decode(prefix, "0.mlp.out", batch.clean) - y).square().sum()
        errors[activation] = float(left / (y - y.mean(0)).square().sum())
    assert errors["matryoshka"] < 0.9 * errors["batchtopk"], errors


def test_groupmax_lets_through_the_largest_of_each_group():
    decomposer = make("sae", activation="groupmax", k=8).train()
    data = batches()
    decomposer.before_training(data)
    batch = next(data)
    for codes in decomposer.encode(batch.clean).values():
        groups, gates = codes.strength.unflatten(1, (8, 4)), codes.gate.unflatten(1, (8, 4))
        assert gates.sum(-1).max() == 1
        assert torch.equal((groups * gates).amax(-1), groups.amax(-1))
        assert 0 < codes.gate.sum() < 8 * 64
    training = decomposer.encode(batch.clean)["0"].gate
    assert torch.equal(training, decomposer.eval().encode(batch.clean)["0"].gate)


# ---- free rows


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "gated"])
def test_free_rows_are_unit_rows_with_strengths_multiplied_by_their_length(activation):
    free, unit = (make("clt", activation=activation, decoder_rows=rows, l1=0.1, l0=0.1).train() for rows in ("free", "unit"))
    data = batches()
    for decomposer in (free, unit):
        decomposer.before_training(batches())
    with torch.no_grad():
        for site in free.sites:
            own, other = free.coder(site), unit.coder(site)
            lengths = 0.5 + torch.rand(32, generator=generator(4))
            own.b_enc.normal_(generator=generator(5)).mul_(0.1)
            own.W_dec.mul_(lengths[:, None])
            other.W_enc.copy_(own.W_enc * lengths[:, None])
            other.b_enc.copy_(own.b_enc * lengths)
    batch = next(data)
    for (key, found), expected in zip(free.loss(batch, 1.0).items(), unit.loss(batch, 1.0).values(), strict=True):
        torch.testing.assert_close(found, expected, msg=key)
    for site in free.sites:
        for key, value in unit.folded(site).items():
            torch.testing.assert_close(free.folded(site)[key], value, atol=1e-5, rtol=1e-5)
    before = free.coder(free.sites[0]).W_dec.clone()
    free.after_step(0.5)
    assert torch.equal(before, free.coder(free.sites[0]).W_dec)


# ---- selection that changes, and a second one


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "matryoshka"])
def test_k_goes_down_in_a_straight_line_and_evaluation_has_the_final_one(activation):
    decomposer = make("sae", activation=activation, k=4, k_start=12, k_anneal=0.5, features=64).train()
    assert [decomposer.config.k_at(p) for p in (0.0, 0.25, 0.4999, 0.5, 1.0)] == [12, 8, 4, 4, 4]
    data = batches()
    decomposer.before_training(data)
    batch = next(data)
    for progress, k in ((0.0, 12), (0.25, 8), (0.9, 4)):
        decomposer.loss(batch, progress)
        assert decomposer.encode(batch.clean)["0"].active.float().sum(1).mean() <= k
        assert float(decomposer.step_statistics()["l0"]) == pytest.approx(k, rel=0.02)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "matryoshka"])
def test_the_wide_term_is_the_error_with_four_times_as_many_components(activation):
    data = batches()
    decomposer = make("clt", activation=activation, k=3, multi_k=0.125, aux=0.0, features=48).train()
    decomposer.before_training(data)
    batch = next(data)
    terms = decomposer.loss(batch, 1.0)
    wide = make("clt", activation=activation, k=12, aux=0.0, features=48).train()
    wide.before_training(batches())
    torch.testing.assert_close(terms["wide"], 0.125 * wide.loss(batch, 1.0)["recon"])


# ---- revival


@pytest.mark.parametrize(("activation", "config"), [("topk", {}), ("relu", {"l1": 0.02}), ("jumprelu", {}), ("gated", {"l1": 0.02})])
def test_dead_components_start_again_at_badly_reconstructed_rows(activation, config, tmp_path):
    """With resampling, components that never fired come alive; without revival they stay dead."""
    dead = {}
    for revive in ("none", "resample"):
        data = batches(layers=1, rows=128)
        chosen = {"dead_after": 1000, "k": 2, "lr": 1e-2, "resample_every": 20, **config}
        decomposer = make("sae", layers=(0,), activation=activation, revive=revive, **chosen)
        with torch.no_grad():
            decomposer.coder(decomposer.sites[0]).b_enc[4:] = -9.0
        fit(decomposer, data, steps=150)
        batch = next(batches(layers=1, rows=4000))
        dead[revive] = int((~decomposer.encode(batch.clean)["0"].active.any(0)).sum())
    assert dead["none"] >= 26
    assert dead["resample"] <= 16, dead


def test_a_restarted_component_reads_and_writes_along_its_row_and_its_moments_are_cleared(toy, tmp_path):
    target, source = toy
    kind = method("transcoder")
    chosen = {
        "features": 24,
        "k": 2,
        "steps": 12,
        "batch": 64,
        "calibration": 256,
        "revive": "resample",
        "resample_every": 10,
        "dead_after": 300,
    }
    decomposer = kind(parse(kind.Config, {**chosen, "decay_from": 1.0}, "transcoder"), target, (0,), 0)
    coder = decomposer.coder(decomposer.sites[0])
    with torch.no_grad():
        coder.b_enc[6:] = -9.0
    seen, original = [], decomposer.restarted

    def noted():
        found = original()
        if found:
            seen.append({id(parameter): rows.clone() for parameter, rows in found})
            rows = found[0][1]
            assert (coder.b_enc[rows] == 0).all()
            alive = coder.W_enc[:6].norm(dim=1).mean()
            torch.testing.assert_close(coder.W_enc[rows].norm(dim=1), (0.2 * alive).expand(len(rows)), rtol=0.2, atol=1e-3)
            torch.testing.assert_close(coder.W_dec[rows].norm(dim=1), torch.ones(len(rows)))
        return found

    decomposer.restarted = noted
    job = Job(decomposer, tmp_path)
    train([job], source, TrainConfig(log_every=5))
    assert seen
    assert {id(coder.W_enc), id(coder.b_enc), id(coder.W_dec)} == set(seen[0])
    assert coder.W_enc[seen[0][id(coder.W_enc)]].isfinite().all()


def test_the_trainer_clears_the_moments_of_restarted_rows(toy, tmp_path):
    from decomp_bench.train import Streams, Training

    target, source = toy
    kind = method("sae")
    decomposer = kind(parse(kind.Config, {"features": 16, "k": 2, "steps": 9, "batch": 64, "calibration": 256}, "sae"), target, (0,), 0)
    run = Training(Job(decomposer, tmp_path), Streams(source, [decomposer]), TrainConfig(), target.device)
    run.start(False)
    parameter = decomposer.coders["0"].W_enc
    run.advance()
    assert run.optimiser.state[parameter]["exp_avg_sq"].abs().amin(1).max() > 0
    decomposer.restarted = lambda: [(parameter, torch.tensor([2, 5]))]
    run.advance()
    for key in ("exp_avg", "exp_avg_sq"):
        moment = run.optimiser.state[parameter][key]
        assert moment[[2, 5]].abs().max() == 0
        assert moment[[0, 1, 3, 4]].abs().max() > 0


def test_the_pre_activation_penalty_revives_dead_components():
    dead = {}
    for revive in ("none", "pre_act"):
        data = batches(layers=1, rows=128)
        chosen = {"dead_after": 1000, "lr": 1e-2, "pre_act": 0.03, "l0": 1e-4}
        decomposer = make("sae", layers=(0,), activation="jumprelu", revive=revive, **chosen)
        with torch.no_grad():
            decomposer.coder(decomposer.sites[0]).b_enc[4:] = -1.5
            decomposer.coder(decomposer.sites[0]).W_enc[4:] *= 0.01
        fit(decomposer, data, steps=250)
        batch = next(batches(layers=1, rows=4000))
        dead[revive] = int((~decomposer.encode(batch.clean)["0"].active.any(0)).sum())
    assert dead["none"] >= 26
    assert dead["pre_act"] <= 10, dead


# ---- penalties


@pytest.mark.parametrize(("activation", "penalty"), [("relu", "tanh"), ("jumprelu", "tanh"), ("jumprelu", "target_l0"), ("gated", "l1")])
def test_a_heavier_penalty_leaves_fewer_active(activation, penalty):
    active = []
    for weight in (1e-4, 0.1):
        weights = {"target_l0": {"l0": weight, "target_l0": 1.0}, "tanh": {"tanh": weight}, "l1": {"l1": weight}}[penalty]
        decomposer = fit(make("sae", activation=activation, penalty=penalty, **weights), batches(), steps=120)
        active.append(float(decomposer.encode(next(batches(rows=2000)).clean)["0"].active.float().sum(1).mean()))
        assert decomposer.variant.startswith(f"{penalty}=")
    assert active[1] < 0.7 * active[0], active


def test_the_target_of_the_l0_penalty_is_reached():
    decomposer = fit(make("sae", activation="jumprelu", penalty="target_l0", target_l0=2.5, l0=0.05, lr=1e-2), batches(rows=256), steps=300)
    active = decomposer.encode(next(batches(rows=2000)).clean)
    for codes in active.values():
        assert float(codes.active.float().sum(1).mean()) == pytest.approx(2.5, rel=0.25)


@pytest.mark.parametrize("decoder", ["trained", "frozen"])
def test_gates_learn_through_the_decoder_which_may_be_frozen_and_have_one_bias(decoder):
    """The gate's bias takes no part in strengths, and the reconstruction from gates alone trains no decoder that is frozen there."""
    decomposer = make("transcoder", activation="gated", l1=0.0, aux=0.0, gate_decoder=decoder).train()
    data = batches()
    decomposer.before_training(data)
    batch = next(data)
    before = decomposer.encode(batch.clean)["0"].strength
    with torch.no_grad():
        decomposer.coders["0"].b_enc += 0.5
    torch.testing.assert_close(decomposer.encode(batch.clean)["0"].strength, before)
    decomposer.loss(batch, 1.0)["gate"].backward()
    coder = decomposer.coders["0"]
    assert (coder.W_dec.grad is None) == (decomposer.outputs["0"].b_dec.grad is None) == (decoder == "frozen")
    assert coder.activation.r_mag.grad is None
    assert coder.W_enc.grad.abs().max() > 0
    decomposer.zero_grad()
    decomposer.loss(batch, 1.0)["recon"].backward()
    assert F.normalize(coder.W_enc.grad, dim=1).isfinite().all()
    assert coder.b_enc.grad.abs().max() <= 1e-7 * coder.activation.b_mag.grad.abs().max()
