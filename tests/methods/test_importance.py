"""Causal importances: sigmoids and penalties against the reference implementation's recorded numbers."""

from __future__ import annotations

import pytest
import torch

from decomp_bench.methods import _importance as importance_module
from decomp_bench.methods._importance import Penalty, annealed, importances
from tests.golden.recorded import Golden

MAPS = ("a", "b", "c")


def lower_and_upper(z: torch.Tensor, straight: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Both importances of logits [rows, C]; the upper one from an L1 penalty of one row at a time."""
    lower = importances(z, torch.ones(len(z)), 1.0, Penalty("lp", 1.0, eps=0.0), straight)[0]
    columns = [importances(row[:, None], torch.ones(len(row)), 1.0, Penalty("lp", 1.0, eps=0.0), straight)[1] for row in z.reshape(-1, 1)]
    return lower, torch.stack(columns).view_as(z)


@pytest.mark.parametrize("case", ["spd_main_sigmoids", "spd_paper_sigmoids"])
def test_sigmoids_and_their_gradients_are_the_reference_s(case):
    golden, main = Golden(case), case == "spd_main_sigmoids"
    names = ("lower_leaky_hard", "upper_leaky_hard") if main else ("lower", "upper")
    z = golden["in.z"][:, None]
    smooth = (z[:, 0] != 0) & (z[:, 0] != 1)  # at the kinks the reference's slope depends on its torch version
    for upstream in ("plus1", "minus1", "upstream"):
        g = golden["in.upstream"][:, None] if upstream == "upstream" else torch.full_like(z, 1.0 if upstream == "plus1" else -1.0)
        leaf = z.clone().requires_grad_()
        for name, value in zip(names, lower_and_upper(leaf, straight=main), strict=True):
            golden.agrees(f"out.{name}", value[:, 0])
            (gradient,) = torch.autograd.grad(value, leaf, g, retain_graph=True)
            golden.agrees(f"grad.{name}.{upstream}", gradient[:, 0], smooth)


def test_slopes_at_the_kinks_are_those_documented():
    z = torch.tensor([[0.0], [1.0]], requires_grad=True)
    lower, upper = lower_and_upper(z)
    assert torch.autograd.grad(lower.sum(), z, retain_graph=True)[0].flatten().tolist() == [0.0, 1.0]
    assert torch.autograd.grad(-lower.sum(), z, retain_graph=True)[0].flatten().tolist() == pytest.approx([-0.01, -1.0])
    assert torch.autograd.grad(upper.sum(), z)[0].flatten().tolist() == [0.0, 1.0]


def test_importance_minimality_is_the_reference_s():
    golden = Golden("spd_main_importance_minimality")
    about = golden.about
    cases = {f"beta{b}.frac{f}": (None, b, f) for b in (0.0, 0.1, 0.5) for f in (0.0, 0.5, 0.75)}
    cases |= {f"fixed_p{p}.beta0.1": (p, 0.1, 0.0) for p in (0.9, 1.0, 2.0)}
    for key, (p, beta, progress) in cases.items():
        p = p or annealed(about["pnorm"], about["p_anneal_final_p"], progress, about["p_anneal_start_frac"], about["p_anneal_end_frac"])
        total = torch.zeros(())
        logits = {}
        for name in MAPS:
            upper = golden[f"in.ci_upper.{name}"]
            z = torch.where(upper > 1, 1 + (upper - 1) / 0.01, upper).flatten(0, 1).requires_grad_()
            logits[name] = z
            total = total + importances(z, torch.full((len(z),), 1 / len(z)), float(len(z)), Penalty("lp", p, beta))[1]
        golden.agrees(f"out.loss.{key}", total)
        total.backward()
        for name, z in logits.items():
            upper = golden[f"in.ci_upper.{name}"].flatten(0, 1)
            gradient = z.grad / torch.where(upper > 1, 0.01, 1.0)
            expected = golden[f"grad.{key}.{name}"].flatten(0, 1)
            assert torch.allclose(gradient[upper > 0], expected[upper > 0], rtol=2e-4), (key, name)


def test_annealing_is_the_reference_s_for_p_and_geometric_for_gamma():
    golden = Golden("spd_main_importance_minimality")
    found = [annealed(2.0, 0.3, f, 0.25, 0.75) for f in golden["in.fracs"].tolist()]
    assert found == pytest.approx(golden["out.p_at_frac"].tolist(), abs=1e-9)
    assert annealed(1.0, 0.1, 0.5, 0.0, 1.0, geometric=True) == pytest.approx(0.1**0.5)
    assert annealed(2.0, None, 0.9, 0.0, 1.0) == 2.0


def test_smooth_l0_and_its_gradient_with_chunks_padding_and_frequency(monkeypatch):
    monkeypatch.setattr(importance_module, "_CHUNK", 40)
    z = (torch.randn(23, 7, generator=torch.Generator().manual_seed(0)) * 1.5).requires_grad_()
    real = torch.arange(23) < 19
    weight, gamma, beta = real / 19, 0.3, 0.5
    upstream = torch.randn(23, 7, generator=torch.Generator().manual_seed(1))
    lower, cost, frequency = importances(z, weight, 19.0, Penalty("smooth_l0", gamma, beta))
    (cost + (lower * upstream).sum()).backward()
    by_hand = z.detach().clone().requires_grad_()
    upper = torch.where(by_hand > 1, 1 + 0.01 * (by_hand - 1), by_hand.clamp(min=0))[:19]
    s = (upper**2 / (upper**2 + gamma**2)).sum(0)
    expected = (s / 19 * (1 + beta * torch.log2(1 + s))).sum()
    expected.backward()
    straight = upstream * ((by_hand > 0) & (by_hand <= 1)) + 0.01 * upstream.clamp(max=0) * (by_hand <= 0)
    assert torch.allclose(cost, expected)
    assert torch.allclose(z.grad, by_hand.grad + straight, atol=1e-6)
    assert torch.allclose(frequency, (by_hand[:19] > 0).float().mean(0))
