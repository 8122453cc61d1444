"""The synthetic world: its data follow the seed alone, and its directions are those that score full marks."""

from __future__ import annotations

import pytest
import torch

from decomp_bench import data, matching
from decomp_bench.config import DataConfig
from decomp_bench.targets.toys.synth import Synth

SMALL = Synth(features=120, hidden=32, trees=1, correlation_rank=4, rows=8192)


@pytest.fixture(scope="module")
def world():
    weights, figures = SMALL.train(3, lambda _done, _steps: None)
    return SMALL.build(weights, "toy:synth_small", "cpu"), weights, figures


def test_the_same_generator_state_draws_the_same_rows_whatever_the_global_one(world):
    draw = world[0].toy.draw
    torch.manual_seed(1)
    first, before = draw(64, torch.Generator().manual_seed(5)), torch.get_rng_state()
    second = draw(64, torch.Generator().manual_seed(5))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state()), "the global generator is left as it was"
    assert not torch.equal(first, draw(64, torch.Generator().manual_seed(6)))


def test_rows_are_sums_of_the_directions_and_the_target_hands_them_on(world):
    target, weights, figures = world
    source = data.source(target, DataConfig())
    assert source.size("train") == 8192
    batch = source.batch("train", torch.arange(256).numpy())
    assert torch.allclose(target(batch.x), batch.x)
    directions = weights["directions"]
    assert torch.allclose(directions.norm(dim=1), torch.ones(120), atol=1e-4)
    share = (batch.x @ torch.linalg.pinv(directions) @ directions - batch.x).square().sum() / batch.x.square().sum()
    assert share < 1e-6
    assert figures["active"] > 1


def test_matched_cosine_is_the_mean_correlation_coefficient_of_sae_lens(world):
    from sae_lens.synthetic import mean_correlation_coefficient

    directions = world[1]["directions"]
    found = directions.abs() + 0.1  # no cosine of these with any other is negative
    cosine = matching.cosines(found, directions.abs())
    assert matching.matched_cosine(cosine) == pytest.approx(mean_correlation_coefficient(found, directions.abs()), abs=1e-5)


def test_random_directions_of_the_same_seed_are_not_the_features(world):
    """They were: the generator of sae-lens and a decomposer of equal seed draw the same normal numbers."""
    drawn = torch.nn.functional.normalize(torch.randn(60, 32, generator=torch.Generator().manual_seed(3)), dim=1)
    nearest = (drawn @ world[1]["directions"].T).abs().max(1).values
    assert nearest.max() < 0.9
    same = Synth(**{**SMALL.__dict__, "apart": 0}).train(3, lambda _done, _steps: None)[0]["directions"]
    assert (drawn @ same.T).abs().max(1).values.min() > 0.9
