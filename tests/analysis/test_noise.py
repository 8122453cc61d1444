"""Reseed noise: planted noise is found again, and what is called resolved is exceeded by noise in one case of twenty."""

from __future__ import annotations

import math

import numpy as np
import pytest
from synthetic import row

from decomp_bench import results
from decomp_bench.analysis import noise_markdown, seed_noise
from decomp_bench.analysis.noise import EVERY, sd_interval

HALF = 0.02


def planted(sd: float, seeds: int, configs: int = 4, draw: int = 0, family: str = "family", **own):
    """Runs of several configs, far apart from each other, whose seeds differ by normal noise."""
    random = np.random.default_rng(draw)
    rows = []
    for config in range(configs):
        for seed in range(seeds):
            value = 10.0 * config + sd * random.standard_normal()
            about = {"run_id": f"{family}-{config}-{seed}", "family": family, "variant": f"k={config}", "seed": seed}
            rows.append(row(**about | {"value": value, "lo": value - HALF, "hi": value + HALF} | own))
    return rows


def one(rows, family: str = EVERY):
    found = seed_noise(results.frame(rows))
    found = found[found["family"] == family]
    assert len(found) == 1
    return found.iloc[0]


def every(draws: int, **about):
    """What is found for each of so many draws, taken together as so many metrics."""
    found = seed_noise(results.frame([one for draw in range(draws) for one in planted(0.3, 3, draw=draw, metric=f"{draw}", **about)]))
    found = found[found["family"] == EVERY]
    assert len(found) == draws
    return found


def test_the_planted_noise_is_found_within_its_interval_as_often_as_it_says():
    found = every(200)
    assert 0.9 <= ((found["sd_lo"] < 0.3) & (found["sd_hi"] > 0.3)).mean() <= 0.99
    assert one(planted(0.3, 200, configs=10))["sd"] == pytest.approx(0.3, rel=0.05)  # and the distance of configs is not in it


def test_two_runs_or_means_of_one_config_pass_what_is_resolved_in_one_case_of_twenty():
    random, found = np.random.default_rng(1), every(400, configs=2)
    for seeds in (1, 3):
        means = 0.3 * random.standard_normal((2, 400, seeds)).mean(2)
        assert 0.025 <= (abs(means[0] - means[1]) > found[f"resolved_{seeds}"]).mean() <= 0.085


def test_numbers_by_hand():
    values = {("a", 0): 1.0, ("a", 1): 1.2, ("b", 0): 5.0, ("b", 1): 5.1, ("b", 2): 5.2, ("c", 0): 9.0}
    rows = [row(run_id=f"{v}{s}", variant=v, seed=s, value=x, lo=x - 0.1, hi=x + 0.3) for (v, s), x in values.items()]
    found = one(rows, "family")
    sd = math.sqrt((0.02 + 0.02) / 3)
    assert found["sd"] == pytest.approx(sd)
    assert (found["configs"], found["runs"], found["degrees"]) == (2, 5, 3)  # c has one seed and says nothing
    assert found["document_half_width"] == pytest.approx(0.2)
    assert found["resolved_1"] == pytest.approx(3.1824 * sd * math.sqrt(2), rel=1e-4)
    assert found["resolved_3"] == pytest.approx(3.1824 * sd * math.sqrt(2 / 3), rel=1e-4)
    assert sd_interval(1.0, 10) == pytest.approx((0.6987, 1.7549), abs=1e-4)  # chi-square tables: 20.483 and 3.247


def test_families_have_their_own_noise_and_one_together():
    rows = planted(0.1, 3, family="calm") + planted(1.0, 3, draw=1, family="wild")
    calm, both, wild = (one(rows, name)["sd"] for name in ("calm", EVERY, "wild"))
    assert calm < both < wild
    assert both == pytest.approx(math.sqrt((calm**2 + wild**2) / 2))


def test_what_is_no_reseeding_of_a_training_is_left_out():
    rows = planted(0.3, 3)
    plain = one(rows)["sd"]
    noisy = {"value": 99.0, "seed": 1}
    rows += [row(**noisy, run_id="f", trainable=False), row(**noisy, run_id="family-0-1", curve="inference"), row(**noisy, mask="all")]
    rows += [row(**noisy, layer="0"), row(**noisy | {"value": math.nan}, run_id="n"), row(**noisy, applicable="no")]
    assert one(rows)["sd"] == plain
    assert seed_noise(results.frame(planted(0.3, 1))).empty
    assert "| metric |" not in noise_markdown(seed_noise(results.frame(planted(0.3, 1))))


def test_configs_are_told_apart_by_what_they_are_also_where_their_names_are_the_same():
    rows = planted(0.1, 2, configs=1) + [dict(one, run_id=f"other{i}", value=50.0 + 0.1 * i) for i, one in enumerate(planted(0.1, 2, 1))]
    with pytest.raises(ValueError, match="two runs of family, k=0 have seed 0"):
        seed_noise(results.frame(rows))
    manifests = {one["run_id"]: {"config": {"steps": 1 + one["run_id"].startswith("other"), "seed": one["seed"]}} for one in rows}
    found = seed_noise(results.frame(rows), manifests)
    assert set(found["configs"]) == {2}
    assert found["sd"].max() < 1


def test_protocols_and_gates_are_kept_apart_and_the_text_has_a_line_for_each():
    rows = []
    for protocol in ("single", "cascading"):
        for draw, gates in enumerate(("clean", "self")):
            rows += planted(0.1, 2, draw=draw * (protocol == "cascading"), protocol=protocol, gates=gates)
    found = seed_noise(results.frame(rows))
    assert list(found[found["family"] == EVERY][["protocol", "gates"]].itertuples(index=False, name=None)) == [
        (protocol, gates) for protocol in ("cascading", "single") for gates in ("clean", "self")
    ]
    text = noise_markdown(found)
    assert text.count("| ce_delta |") == 3 + 1  # all families together, equal gates once; the headline condition of the family
    assert "8 of 4" in text
