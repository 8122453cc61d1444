"""APD: attributions against autograd, planted components chosen and scored as the truth, a threshold that gives k, toys alone."""

from __future__ import annotations

import pytest
import torch

from decomp_bench import data, registry
from decomp_bench.config import DataConfig, TrainConfig, parse
from decomp_bench.data.streams import SequenceStream
from decomp_bench.decomposer import Slot
from decomp_bench.errors import UserError
from decomp_bench.methods.apd import APD, APDConfig
from decomp_bench.recovery import _matrix_part, _part, recovered
from decomp_bench.replacement import clean_points, clean_reads, replaced
from decomp_bench.train import Job, train
from tests.targets.test_toys import recorded


@pytest.fixture(scope="module")
def tms():
    """An accepted TMS 5-2 from its recorded weights, and its data."""
    target = recorded(4)
    return target, data.source(target, DataConfig())


def planted(target) -> APD:
    """Component f holds mechanism f of both maps; a sixth holds nothing."""
    made = APD(APDConfig(components=6, rank=1, k=0.25), target, (0,))
    weight = target.weight("0.mlp.up")  # [2, 5]
    with torch.no_grad():
        for point in ("0.mlp.up", "0.mlp.down"):
            A, B = made.part(point)
            A.zero_(), B.zero_()
            for f in range(5):
                feature, hidden = torch.eye(5)[f], weight[:, f]
                A[f, :, 0], B[f, 0] = (feature, hidden) if point == "0.mlp.up" else (hidden, feature)
    return made.eval()


def batch_of(decomposer, source, rows=64):
    return SequenceStream(source, clean_points(decomposer), rows).batch(0)


def test_an_attribution_is_the_first_order_effect_of_a_components_weights(tms):
    target, source = tms
    decomposer = APD(APDConfig(components=3, init_scale=5.0), target, (0,))
    batch = batch_of(decomposer, source)
    row = int(batch.x.sum(1).argmax())
    maps = [target.part(point) for point in ("0.mlp.up", "0.mlp.down")]
    matrices = [decomposer.matrices(site, site.slots[0]) for site in decomposer.sites]
    expected = []
    for c in range(3):
        effects = []
        for o in range(5):
            with torch.enable_grad():
                weights = [m.weight.detach().clone().requires_grad_() for m in maps]
                out = torch.relu(batch.x[row] @ weights[0].T @ weights[1].T + maps[1].bias)
                gradients = torch.autograd.grad(out[o], weights)
            effects.append(sum((g * P[c].T).sum() for g, P in zip(gradients, matrices, strict=True)))
        expected.append(torch.stack(effects).square().mean().sqrt())
    found = decomposer.attributions(clean_reads(decomposer, batch))[row]
    assert torch.allclose(found, torch.stack(expected).detach(), rtol=1e-4)


def test_planted_mechanisms_are_chosen_and_give_the_targets_output(tms):
    target, source = tms
    decomposer = planted(target)
    batch = batch_of(decomposer, source, 256)
    chosen = decomposer.at(k=1).replaced(batch, gates="clean")
    open_output = (batch.logits * (batch.x > 0)).sum(1) > 0  # behind a closed relu nothing has an effect
    alone = ((batch.x > 0).sum(1) == 1) & open_output
    assert int(alone.sum()) > 20
    assert torch.equal(chosen.codes["0.mlp.up"].gate[alone].argmax(1), batch.x[alone].argmax(1))
    own = batch.x[alone] > 0
    assert torch.allclose(chosen.logits[alone][own], batch.logits[alone][own], atol=1e-5)


def test_planted_mechanisms_score_full_marks(tms):
    target, _ = tms
    values = recovered(planted(target), {"0.mlp.up": torch.ones(6), "0.mlp.down": torch.ones(6)})
    for point in ("0.mlp.up", "0.mlp.down"):
        assert values["recovery_f1", point] == pytest.approx(1)
        assert values["mmcs", point] == pytest.approx(1, abs=1e-5)
        assert values["ml2r", point] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("side", ["read", "write"])
def test_components_as_matrices_score_as_their_vectors_do(tms, side):
    known = next(m for m in tms[0].toy.truth.mechanisms.values() if m.side == side)
    d = {"read": (known.basis.shape[1], known.vectors.shape[1]), "write": (known.vectors.shape[1], known.basis.shape[1])}[side]
    generator = torch.Generator().manual_seed(0)
    read, write = torch.randn(9, d[0], generator=generator), torch.randn(9, d[1], generator=generator)
    vectors, whole = _part(read, write, known), _matrix_part(read[:, :, None] * write[:, None], known)
    assert torch.allclose(vectors.lengths, whole.lengths, rtol=1e-4)
    for first, second in zip((*vectors.whole(), *vectors.columns()), (*whole.whole(), *whole.columns()), strict=True):
        assert torch.allclose(first, second, atol=1e-4)


def test_training_finds_what_to_switch_and_the_threshold_gives_k(tms, tmp_path):
    target, source = tms
    config = APDConfig(components=8, k=0.25, steps=150, batch=128, lr=3e-2, warmup=10, simplicity=0.3, calibration=4096)
    decomposer = APD(config, target, (0,), seed=1)
    lines = []
    (outcome,) = train([Job(decomposer, tmp_path, lines.append)], source, TrainConfig(log_every=50))
    assert outcome.error is None
    assert lines[-1]["faithfulness"] < 0.01 * float(target.weight("0.mlp.up").square().mean())
    decomposer.eval()
    batch = batch_of(decomposer, source, 4096)
    out = decomposer.replaced(batch, gates="clean")
    assert float(out.codes["0.mlp.up"].gate.sum(1).mean()) == pytest.approx(0.25, abs=0.05)
    shuffled = {n: type(c)(c.strength, c.gate.roll(1, 0)) for n, c in out.codes.items()}
    errors = [float((o.logits.detach() - batch.logits).square().mean()) for o in (out, decomposer.replaced(batch, gates=shuffled))]
    assert errors[0] < 0.5 * errors[1], "the components chosen for an input serve it better than those of another"


def test_unit_norm_keeps_read_vectors_at_length_one(tms, tmp_path):
    target, source = tms
    config = APDConfig(components=4, k=0.5, steps=5, batch=64, unit_norm=True, activation=1.0, warmup=0, calibration=64)
    decomposer = APD(config, target, (0,))
    (outcome,) = train([Job(decomposer, tmp_path)], source, TrainConfig())
    assert outcome.error is None
    for A in decomposer.A.values():
        assert torch.allclose(A.norm(dim=1), torch.ones(4, A.shape[2]), atol=1e-6)


def test_a_language_model_is_skipped_with_the_reason(lm):
    assert "toys only" in registry.method("apd").skip(lm[0], (0,))


def test_the_paper_form_and_its_fixed_numbers_parse():
    for preset in APD.presets.values():
        assert isinstance(parse(APDConfig, preset, "apd"), APDConfig)


def test_with_the_remainder_everything_off_is_the_target(tms):
    target, source = tms
    decomposer = APD(APDConfig(components=3, init_scale=5.0), target, (0,)).eval()
    batch = batch_of(decomposer, source)
    everything = decomposer.at(threshold=-1.0, delta=True)
    out = replaced(everything, batch, (0,), gates="clean")
    assert torch.allclose(out.logits, batch.logits, atol=1e-5)
    assert decomposer.directions(decomposer.sites[0], Slot("0.mlp.up", "0.mlp.up")) is None


def test_a_k_that_turns_nothing_on_is_refused():
    with pytest.raises(UserError, match="k x batch at least 1"):
        parse(APDConfig, {"k": 0.004, "batch": 128}, "apd")
    assert parse(APDConfig, {"k": 0.008, "batch": 128}, "apd").k == 0.008
