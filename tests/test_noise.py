"""Reseed noise beside an experiment's results, and in the metric catalogue."""

from __future__ import annotations

import json

import pytest

from decomp_bench import gather, noise, results
from decomp_bench.errors import UserError

ABOUT = {
    "experiment": "007_something", "method": "m", "family": "family", "kind": "replacement", "trainable": True, "curve": "trained",
    "target": "t", "target_hash": "3f", "dataset": "d", "token_hash": "ab", "split": "test", "layers": "0", "layer": "all", "site": "all",
    "mask": "binary", "delta": "off", "init": "", "base": "", "positions": "1:", "condition": "trained=local", "metric_version": 1,
    "n": 1000, "applicable": "yes", "reason": "", "converged": "yes", "step": 10,
}  # fmt: skip


def write(folder, *seeds: int, offset: float = 0.1, target: str = "t"):
    """Two points of a curve, each with these seeds, whose values are `offset` apart."""
    rows = []
    for k in (4, 8):
        for seed in seeds:
            for protocol in ("cascading", "single"):
                for metric, value in (("ce_delta", 1 / k + offset * seed), ("l0_mlp", k)):
                    own = {"run_id": f"{k}-{seed}", "variant": f"k={k}", "seed": seed, "protocol": protocol, "gates": "clean"}
                    rows.append({**ABOUT, **own, "target": target, "metric": metric, "value": value, "lo": value * 0.9, "hi": value * 1.1})
    results.write(results.frame(rows), folder / "results.parquet")
    runs = {row["run_id"]: {"config": {"k": row["variant"], "seed": row["seed"], "train": {"threads": row["seed"]}}} for row in rows}
    (folder / "manifest.json").write_text(json.dumps({"runs": runs, "figures": ["protocol_grid"]}))
    return folder


@pytest.fixture
def project(tmp_path):
    (tmp_path / "experiments" / "007_something").mkdir(parents=True)
    (tmp_path / "experiments" / "007_something" / "config.yaml").write_text("title: T\nruns: [{method: m}]\n")
    return tmp_path


def test_drawing_again_gives_the_same_bytes_noise_among_them_which_goes_where_seeds_are_gone(project):
    folder = write(project / "results" / "007_something" / "t", 0, 1, 2)
    figures = gather.draw(folder)
    assert {path.suffix for path in figures} == {".png", ".svg", ".pdf"}
    assert "| ce_delta | cascading | clean |" in (folder / "seed_noise.md").read_text()
    files = [path for path in folder.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    for path in files:
        if path.name not in ("results.parquet", "manifest.json"):
            path.unlink()
    assert gather.draw(folder) == figures
    assert before == {path: path.read_bytes() for path in files}
    assert noise.write_noise(write(folder, 0), {}) is None
    assert not list(folder.glob("seed_noise.*"))


def test_the_catalogue_states_the_noise_where_it_was_measured(project, monkeypatch, capsys):
    from decomp_bench.cli import main

    for name, seeds, offset in (("t", (0, 1), 0.1), ("t-long", (0, 1, 2), 0.2)):
        folder = write(project / "results" / "007_something" / name, *seeds, offset=offset)
        noise.write_noise(folder, json.loads((folder / "manifest.json").read_text())["runs"])
    monkeypatch.chdir(project)
    with pytest.raises(SystemExit):
        main(["list", "metrics", "--json"])
    listed = {row["key"]: row["noise"] for row in json.loads(capsys.readouterr().out)}
    first = listed["ce_delta"][0]
    assert (first["results"], first["protocol"], first["runs"]) == ("007_something/t-long", "cascading", 6)
    assert first["sd"] == pytest.approx(0.2)
    assert len(listed["ce_delta"]) == 4
    assert listed["l0_mlp"][0]["sd"] == 0
    assert listed["kl"] == []
    with pytest.raises(SystemExit):
        main(["list", "metrics"])
    shown = capsys.readouterr().out
    assert "007_something/t-long" in shown
    assert "0.2" in next(line for line in shown.splitlines() if line.startswith("ce_delta"))


def test_toys_come_after_other_targets_however_many_their_seeds(project):
    for name, seeds, target in (("a", (0, 1, 2, 3), "toy:tms_5-2@0"), ("b", (0, 1), "t"), ("c", (0, 1, 2), "t")):
        folder = write(project / "results" / "007_something" / name, *seeds, target=target)
        noise.write_noise(folder, json.loads((folder / "manifest.json").read_text())["runs"])
    headline = [entry for entry in noise.known_noise(project)["ce_delta"] if entry["protocol"] == "cascading"]
    assert [entry["results"][-1] for entry in headline] == ["c", "b", "a"]


def test_a_broken_file_is_one_line_that_names_the_fix(project):
    folder = write(project / "results" / "007_something" / "t", 0, 1)
    (folder / "seed_noise.csv").write_text("family\nall\n")
    with pytest.raises(UserError, match="decomp-bench plot 007 writes it again"):
        noise.known_noise(project)
