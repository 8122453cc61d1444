"""The table of runs: what is one row, where its numbers come from, and how it is typeset."""

from __future__ import annotations

import math

import pytest
from synthetic import row

from decomp_bench import results
from decomp_bench.analysis import latex, markdown, model_table


def rows(run: str, seed: int, k: int, shift: float = 0.0):
    """A run with two sites, scored under cascading with both gate sources."""
    about = {"run_id": run, "seed": seed, "family": "alpha", "variant": f"k={k}", "protocol": "cascading", "n": 1000}
    for gates, value in (("clean", 0.5 + shift), ("self", 0.7 + shift)):
        yield row(**about, gates=gates, metric="ce_delta", value=value, lo=value - 0.1, hi=value + 0.2)
        yield row(**about, gates=gates, metric="fvu", value=0.3, lo=0.3, hi=0.3)
    for site, alive in (("0", 30.0), ("1", 10.0)):
        yield row(**about, gates="clean", metric="alive", value=alive, layer=site, site=site)
        yield row(**about, gates="clean", metric="dead", value=1 - alive / 40, layer=site, site=site)
    for metric, value in (("alive", 40.0), ("dead", 0.5), ("dense", 0.1), ("l0_mlp", float(k))):
        yield row(**about, gates="clean", metric=metric, value=value)
    yield row(**{**about, "variant": "k=99"}, gates="clean", metric="ce_delta", value=9.0, curve="inference")


def manifest(k: int, seed: int, wall: float):
    config = {"method": "alpha", "method_config": {"k": k}, "seed": seed, "train": {"threads": 1 + seed}}
    return {"config": config, "parameters": 1234, "cost": {"train_wall_s": wall, "tokens": 2_000_000, "flops": 3e12}}


@pytest.fixture
def table():
    data = results.frame([*rows("a", 0, 8), *rows("b", 1, 8, 0.1), *rows("c", 0, 16)])
    return model_table(data, {"a": manifest(8, 0, 10.0), "b": manifest(8, 1, 30.0), "c": manifest(16, 0, 5.0)})


def test_seeds_of_one_setup_are_one_row(table):
    assert list(table["variant"]) == ["k=8", "k=16"]
    first = table.iloc[0]
    assert (first["seeds"], first["components"], first["alive"], first["dead"], first["l0_mlp"]) == (2, 80, 40, 0.5, 8)
    assert (first["parameters"], first["train_tokens"], first["wall_s"]) == (1234, 2_000_000, 20.0)
    assert first["ce_delta cascading clean"] == pytest.approx(0.55)
    assert first["ce_delta cascading self lo"] < first["ce_delta cascading self"] < first["ce_delta cascading self hi"]
    assert "t over 2 seeds" in first["interval"]


def test_text_has_every_run_and_its_intervals(table):
    text = markdown(table)
    assert "| alpha | k=16 | 1 | 80 | 40 | 50% | 10% | 16 | 1.23k |" in text
    assert "0.500 ±0.200" in text
    assert "95% document bootstrap, 1 seed; 95%, at each end the wider of t over 2 seeds" in text
    assert "| = |" in text  # FVU does not depend on the gates
    typeset = latex(table)
    assert typeset.count(r"\toprule") == typeset.count(r"\bottomrule") == 2
    assert r"50\%" in typeset
    assert "±" not in typeset


def test_runs_on_other_tokens_stand_apart():
    other = results.frame(rows("d", 0, 8)).assign(token_hash="cd" * 16)
    import pandas as pd

    found = model_table(pd.concat([results.frame(rows("a", 0, 8)), other]), {})
    assert len(found) == 2
    assert markdown(found).count("## What they are") == 2


def test_a_site_without_a_live_component_leaves_the_number_open():
    data = results.frame(rows("a", 0, 8))
    data.loc[(data["site"] == "0") & (data["metric"] == "alive"), "value"] = 0.0
    data.loc[(data["site"] == "0") & (data["metric"] == "dead"), "value"] = 1.0
    found = model_table(data, {})
    assert math.isnan(found.get("components", [math.nan])[0])


def test_nothing_at_hand_is_one_line():
    with pytest.raises(ValueError, match="no runs at hand"):
        model_table(results.frame([]), {})
