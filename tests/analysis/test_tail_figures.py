"""Figures and table of tails, and the sweeps that an experiment can ask for."""

from __future__ import annotations

import pandas as pd
import pytest
from synthetic import realistic, row

from decomp_bench import results
from decomp_bench.analysis import DRAWINGS, caption_of, measured_figures, measured_table


def frame():
    about = {"protocol": "clean", "gates": "self", "n": 12}
    found = []
    for family, scale in (("alpha", 0.9), ("beta", 0.5)):
        for rank in (1, 4, 16):
            value = scale / rank
            ends = {"value": value, "lo": value * 0.9, "hi": value * 1.1, "condition": results.condition(rank=rank)}
            found += [row(**about, family=family, metric=metric, **ends) for metric in ("tail_share", "tail_active")]
    for layer in ("0", "1", "10"):
        for end in ("in", "out"):
            where = {"run_id": "", "family": "target", "kind": "baseline", "layer": layer, "site": end}
            found.append(
                row(**{**about, **where}, metric="token_share", value=0.2, lo=0.1, hi=0.3, condition=results.condition(share=0.01))
            )
    return results.frame(found)


def test_a_line_for_each_family_and_the_target_by_layer():
    figures = measured_figures("tails", frame())
    assert set(figures) == {"tails_share", "tails_active", "tails_tokens"}
    lines = {line.get_gid(): line for line in figures["tails_share"].axes[0].get_lines() if line.get_gid()}
    assert lines["tail_share/alpha/k=8"].get_ydata().tolist() == pytest.approx([0.9, 0.225, 0.05625])
    layers = [line for line in figures["tails_tokens"].axes[0].get_lines() if line.get_gid() == "token_share/out/0.01"]
    assert layers[0].get_xdata().tolist() == [0, 1, 10]
    assert "12 documents" in caption_of(figures["tails_share"])
    rows = measured_table("tails", frame())
    assert {one["family"] for one in rows} == {"alpha", "beta"}
    assert rows[0]["> 1"] == "0.900"


def test_sweeps_have_three_axes_and_families_that_conditions_tell_apart():
    data = realistic(1, ks=(8, 16))
    data = data[data["family"] == "transcoder"]
    parts = [data.assign(condition=results.condition(matrices=part), run_id=data["run_id"] + part) for part in ("up", "both")]
    figures = DRAWINGS["sweeps"](pd.concat(parts, ignore_index=True)).figures
    names = [f"{y}_by_{x}" for y in ("ce_delta", "fvu") for x in ("l0_module", "l0_mlp", "active_params")]
    assert set(figures) == {*names, *(f"{name}_cascading" for name in names)}
    drawn = {line.get_gid() or "" for line in figures["ce_delta_by_l0_module"].axes[0].get_lines()}
    for part in ("up", "both"):
        curves = {gid.split("/")[4] for gid in drawn if f"/transcoder,_{part}/" in gid}
        assert curves == {"trained", "inference"}
