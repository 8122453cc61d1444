"""Tables and checks on curves whose answers are known by construction."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import line, point, realistic, row

from decomp_bench import results
from decomp_bench.analysis import View, crossings, floor_check, matched, monotone_check, table
from decomp_bench.analysis.curves import Curve, mean, overlap, roots, share_below_zero
from decomp_bench.analysis.intervals import t_quantile

CLEAN = View(protocols=("clean",))
XS = (100, 200, 400, 800)


def frame(*curves):
    return results.frame([row for curve in curves for row in curve])


def test_runs_that_an_experiment_tells_apart_are_not_averaged():
    told = [("a", "taught=gently; at=home"), ("b", "taught=harshly"), ("c", "taught=family")]
    rows = [row(run_id=run, value=float(i), condition=words) for i, (run, words) in enumerate(told)]
    found = table(results.frame(rows), view=CLEAN)
    assert dict(zip(found["family"], found["mean"], strict=True)) == {"family": 2.0, "family, gently, home": 0.0, "family, harshly": 1.0}


def test_the_table_gives_mean_interval_and_what_was_left_out():
    rows = [row(seed=seed, run_id=f"r{seed}", value=value, lo=value - 0.01, hi=value + 0.01) for seed, value in enumerate((0.1, 0.2, 0.3))]
    rows += [row(seed=3, run_id="r3", value=float("nan"), converged="no")]
    rows += [row(metric="ce_recovered", base=base, value=0.9, lo=0.8, hi=1.0) for base in ("mean", "zero")]
    found = table(results.frame(rows), view=CLEAN)
    assert list(found["base"]) == ["", "mean", "zero"]
    one = found.iloc[0]
    half = 4.3027 * 0.1 / math.sqrt(3)
    assert (one["mean"], one["lo"], one["hi"]) == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    assert (one["seeds"], one["left_out"], one["converged"]) == (3, 1, "no")
    assert "3 seeds (descriptive)" in one["interval"]
    assert found.iloc[1]["interval"] == "95% document bootstrap, 1 seed"
    assert table(results.frame(rows), ["ce_recovered"], CLEAN).shape[0] == 2
    with pytest.raises(ValueError, match="no results with metric 'kl'"):
        table(results.frame(rows), ["kl"], CLEAN)


def test_a_line_of_nan_only_stays_in_the_table():
    found = table(results.frame([row(value=float("nan"))]), view=CLEAN)
    assert math.isnan(found.iloc[0]["mean"])
    assert (found.iloc[0]["seeds"], found.iloc[0]["left_out"]) == (0, 1)


def test_curves_are_read_at_one_size_seed_by_seed_and_never_beyond_their_ends():
    seeds = [line("a", (100, 400), ys, seed=seed) for seed, ys in enumerate(((1.0, 0.0), (3.0, 2.0)))]
    short = [line("b", xs, (1.0, 0.0), seed=seed) for seed, xs in enumerate(((100, 150), (100, 400)))]
    found = {one.family: one for one in matched(frame(*seeds, *short), 200, CLEAN)}
    half = 12.7062 / math.sqrt(2) * math.sqrt(2)
    assert (found["a"].mean, found["a"].lo, found["a"].hi) == pytest.approx((1.5, 1.5 - half, 1.5 + half))
    assert (found["a"].seeds, found["a"].beyond) == (2, 0)
    assert (found["b"].mean, found["b"].seeds, found["b"].beyond) == (pytest.approx(0.5), 1, 1)
    swept = line("a", (100, 400), (5.0, 4.0), curve="inference", run_id="a-1")
    (one,) = matched(frame(seeds[0], swept), 200, CLEAN, sweeps=True)
    assert (one.family, one.origin, one.mean) == ("a", "k=1", pytest.approx(4.5))
    (alone,) = matched(frame(short[0]), 200, CLEAN)
    assert math.isnan(alone.mean)
    assert (alone.seeds, alone.beyond) == (0, 1)


def test_a_family_wins_loses_or_crosses_against_floors_and_controls_of_its_kind():
    data = frame(
        line("good", XS, (0.4, 0.3, 0.2, 0.1)),
        line("bad", (200, 1600), (3.0, 2.0)),
        line("mixed", XS, (1.6, 1.2, 0.7, 0.1)),
        line("far", (5000, 9000), (0.1, 0.05)),
        line("neurons", XS, (1.0, 1.0, 1.0, 1.0), trainable=False),
        line("random", XS, (2.0, 1.9, 1.8, 1.7)),
        line("encoder", XS, (0.01, 0.01, 0.01, 0.01), kind="autoencoding"),
    )
    found = {(one.family, one.against): one for one in floor_check(data, ["random"], CLEAN)}
    assert {pair: one.verdict for pair, one in found.items()} == {
        ("good", "neurons"): "wins",
        ("bad", "neurons"): "loses",
        ("mixed", "neurons"): "crosses",
        ("far", "neurons"): "no overlap",
        ("good", "random"): "wins",
        ("bad", "random"): "loses",
        ("mixed", "random"): "wins",
        ("far", "random"): "no overlap",
    }
    good, bad, mixed = (found[name, "neurons"] for name in ("good", "bad", "mixed"))
    assert (good.role, found["good", "random"].role) == ("floor", "control")
    assert (good.lower, good.clearly_lower, good.clearly_higher) == (1, 1, 0)
    assert (good.x_low, good.x_high) == pytest.approx((100, 800))
    assert good.mean_difference == pytest.approx(-0.75)
    assert (bad.x_low, bad.x_high) == pytest.approx((200, 800))  # the overlap only
    assert mixed.lower == pytest.approx((1 + 0.6) / 3)  # from 1.2 to 0.7 it passes 1.0 after 0.4 of the octave
    assert mixed.clearly_lower < mixed.lower


def test_unknown_controls_are_refused():
    with pytest.raises(ValueError, match=r"no family noise in the results \(there are: a\)"):
        floor_check(frame(line("a", XS, XS)), ["noise"], CLEAN)


def test_more_active_components_that_hurt_beyond_the_interval_are_found():
    falling = line("fine", XS, (0.4, 0.3, 0.2, 0.1))
    within = line("noisy", XS, (0.40, 0.30, 0.31, 0.29))
    rising = line("broken", XS, (0.4, 0.2, 0.3, 0.1))
    unconverged = line("early", XS, (0.1, 0.2, 0.3, 0.4), converged="no")
    floor = line("floor", XS, (1, 2, 3, 4), trainable=False)
    (found,) = monotone_check(frame(falling, within, rising, unconverged, floor), CLEAN)
    assert (found.family, found.fewer, found.more, found.converged) == ("broken", "k=1", "k=2", "yes")
    assert found.excess == pytest.approx(0.3 * 0.95 - 0.2 * 1.05)
    assert (found.x_fewer, found.x_more, found.y_fewer, found.y_more) == (200, 400, 0.2, 0.3)


def test_crossings_are_found_where_they_are_and_only_within_a_kind():
    steep, flat = line("steep", (100, 400), (0.4, 0.0)), line("flat", (100, 400), (0.2, 0.2))
    other = line("other", (100, 400), (0.3, 0.1), kind="autoencoding")
    (found,) = crossings(frame(steep, flat, other), CLEAN)
    assert {found.first, found.second} == {"steep", "flat"}
    assert found.at == pytest.approx((200,))
    assert found.clear
    assert crossings(frame(line("a", (100, 200), (0.4, 0.3)), line("b", (300, 400), (0.3, 0.4))), CLEAN) == []
    (close,) = crossings(frame(line("a", (100, 400), (0.201, 0.199)), flat), CLEAN)
    assert not close.clear


def test_checks_keep_protocols_and_gates_apart():
    low, high = line("a", XS, (0.4, 0.3, 0.2, 0.1)), line("b", XS, (1, 1, 1, 1), gates="self")
    assert crossings(frame(low, high), CLEAN) == []
    assert floor_check(frame(low, line("n", XS, (1, 1, 1, 1), trainable=False, gates="self")), view=CLEAN) == []


def test_checks_on_realistic_results():
    data = realistic(ks=(4, 64), sweeps=False)
    assert monotone_check(data) == []
    against = [one for one in floor_check(data, ["random_directions"]) if one.against == "random_directions" and one.family == "transcoder"]
    assert {(one.protocol, one.gates, one.verdict) for one in against} == {
        (protocol, gates, "wins") for protocol in ("cascading", "clean", "single") for gates in ("clean", "self")
    }


def test_t_quantiles_follow_the_table_and_approach_the_normal():
    assert [t_quantile(degrees) for degrees in (1, 2, 4, 30)] == [12.7062, 4.3027, 2.7764, 2.0423]
    assert t_quantile(31) == pytest.approx(2.0395, abs=1e-4)
    assert t_quantile(10**9) == pytest.approx(1.959964)


knots = st.lists(st.tuples(st.integers(0, 40), st.integers(-8, 8)), min_size=2, max_size=8, unique_by=lambda knot: knot[0]).map(sorted)


def as_curve(points, width=0.25):
    places, values = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    return Curve(places, values, values - width, values + width)


@settings(deadline=None)
@given(knots, knots)
def test_shares_means_and_roots_agree_with_a_fine_grid(one, other):
    both = overlap(as_curve(one), as_curve(other))
    if both is None:
        assert one[-1][0] < other[0][0] or other[-1][0] < one[0][0]
        return
    difference = both.first.y - both.second.y
    lower, higher = share_below_zero(both.log_x, difference), share_below_zero(both.log_x, -difference)
    assert 0 <= lower <= 1
    assert lower + higher <= 1 + 1e-9
    if len(both.log_x) > 1:
        grid = np.linspace(both.log_x[0], both.log_x[-1], 20001)
        values = np.interp(grid, both.log_x, difference)
        assert lower == pytest.approx((values < -1e-12).mean(), abs=2e-3)
        assert mean(both.log_x, difference) == pytest.approx(values.mean(), abs=2e-2)
    assert bool(roots(both.log_x, difference)) == (lower > 0 and higher > 0)
    for place in roots(both.log_x, difference):
        assert np.interp(place, both.log_x, difference) == pytest.approx(0, abs=1e-9)


@settings(max_examples=6, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=5), st.floats(0.5, 2))
def test_a_falling_curve_never_violates_and_its_mirror_does(values, factor):
    falling = sorted(values, reverse=True)
    xs = [100 * 2**index for index in range(len(values))]
    assert monotone_check(frame(line("a", xs, [value * factor for value in falling])), CLEAN) == []
    rising = frame(line("a", xs, falling[::-1]))
    assert bool(monotone_check(rising, CLEAN)) == (falling[0] * 0.95 > falling[-1] * 1.05)


def test_seeds_of_one_point_average_before_curves_are_compared():
    rows = [
        one
        for seed in range(3)
        for x, y in ((100, 0.4), (200, 0.2))
        for one in point(x, y, seed=seed, variant=f"x={x}", run_id=f"{x}-{seed}")
    ]
    assert monotone_check(results.frame(rows), CLEAN) == []
