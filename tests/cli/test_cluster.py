"""`decomp-bench cluster` as typed."""

from __future__ import annotations

import json


def test_the_command_names_every_alive_component_once(bench, tmp_path):
    small = ("--set", "method.n=12", "--set", "method.steps=3", "--set", "method.batch=64", "--no-eval")
    assert bench("train", "probe_cli", "--target", "toy:resid_mlp1", *small).code == 0
    (run,) = json.loads(bench("list", "runs", "--json").out)
    result = bench("cluster", run["run"], "--tokens", "256", "--out", "clusters.json")
    assert result.code == 0, result.err
    written = json.loads((tmp_path / "clusters.json").read_text())
    members = [name for one in written["clusters"] for name in one["members"]]
    assert len(members) == len(set(members)) == written["components"]
    assert written["bits_after"] <= written["bits_before"]
    assert f"{written['components']} components" in result.out
    assert "--out takes a .json file" in bench("cluster", run["run"], "--out", "x.txt").err
