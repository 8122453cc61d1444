"""What names a run, what state its folder is in, and how it is found."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from decomp_bench import runs
from decomp_bench.cli.making import METHOD
from decomp_bench.config import DataConfig, EvalConfig, RunConfig, TrainConfig
from decomp_bench.errors import UserError

BASE = RunConfig(method="probe_runs", target="hf:somewhere/tiny", method_config={"k": 4})


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "probe_runs.py").write_text(METHOD.format(name="probe_runs", title="ProbeRuns"))
    monkeypatch.setenv("DECOMP_BENCH_METHODS", str(tmp_path / "methods"))
    monkeypatch.setenv("DECOMP_BENCH_RUNS", str(tmp_path / "runs"))


def layer_tuple(layers):
    return (0, 1) if layers == "all" else tuple(sorted(layers))


MLP = SimpleNamespace(parameters=lambda: iter([0]))
TARGET = SimpleNamespace(uri="hf:somewhere/tiny", identity="abc", layer_tuple=layer_tuple, part=lambda _point: MLP)
SOURCE = SimpleNamespace(name="text", hash="123")


def resolved(config: RunConfig = BASE, target=TARGET, source=SOURCE) -> runs.ResolvedRun:
    return runs.resolve(config, target, source)  # type: ignore[arg-type]


def test_id_names_method_target_layers_and_seed():
    assert resolved().id.startswith("probe_runs-tiny-all-s0-")
    assert resolved(BASE.model_copy(update={"layers": (1,), "seed": 3})).id.startswith("probe_runs-tiny-1-s3-")


@pytest.mark.parametrize(
    "change",
    [
        {"train": TrainConfig(log_every=3, save_every=7, wandb="offline", device="cpu")},
        {"eval": EvalConfig(batch=3)},
        {"target": "hf:elsewhere/tiny"},
        {"data": DataConfig(source="some/where.txt")},
        {"layers": (0, 1)},
        {"method_config": {"k": 4, "n": 256}},
    ],
)
def test_id_leaves_out_what_changes_no_result(change):
    assert resolved(BASE.model_copy(update=change)).id == resolved().id


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"eval": EvalConfig(tokens=7)}, {"method_config": {"k": 5}}, {"data": DataConfig(seed=1)}, {"layers": (0,)}],
)
def test_id_changes_with_what_changes_a_result(change):
    assert resolved(BASE.model_copy(update=change)).id != resolved().id


def test_ids_of_the_first_runs_stay_what_they_were(monkeypatch):
    """Keys that were added to a config later are outside the id while they are at their defaults."""
    monkeypatch.setattr("decomp_bench.metrics.metric_versions", dict)
    target = SimpleNamespace(uri="pydocs-4l", identity="identity", layer_tuple=lambda layers: (0, 1, 2, 3), part=lambda _point: MLP)
    first = resolved(RunConfig(method="probe_runs"), target, SimpleNamespace(name="pydocs", hash="hash"))
    assert first.id == "probe_runs-pydocs-4l-all-s0-ae659a6a"
    assert first.training_key == "3b7d00f210724601"
    packed = RunConfig(method="probe_runs", data=DataConfig(packing="packed"))
    assert resolved(packed, target, SimpleNamespace(name="pydocs", hash="hash")).id != first.id


def test_id_changes_with_corpus_target_and_versions(monkeypatch):
    assert resolved(source=SimpleNamespace(name="text", hash="124")).id != resolved().id
    assert resolved(target=SimpleNamespace(uri="x", identity="abd", layer_tuple=layer_tuple, part=TARGET.part)).id != resolved().id
    before = resolved()
    monkeypatch.setattr(before.method, "version", 2)
    assert resolved().id != before.id


def test_training_key_ignores_the_evaluation_only():
    assert resolved(BASE.model_copy(update={"eval": EvalConfig(tokens=7)})).training_key == resolved().training_key
    assert resolved(BASE.model_copy(update={"seed": 1})).training_key != resolved().training_key


def test_config_errors_name_the_key():
    with pytest.raises(UserError, match=r"unknown key 'kk'; known keys: .*\bk\b"):
        resolved(BASE.model_copy(update={"method_config": {"kk": 4}}))


def test_create_writes_a_config_that_gives_the_same_run(tmp_path):
    run = runs.create(resolved())
    assert resolved(run.config).id == run.id
    manifest = run.manifest
    assert manifest["schema_version"] == runs.MANIFEST_VERSION
    assert {"argv", "git", "packages", "hardware", "corpus_hash", "metric_versions", "cost", "artifacts"} <= manifest.keys()
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()] == [run.id]


def test_status_reads_as_interrupted_when_nobody_holds_the_lock():
    run = runs.create(resolved())
    assert run.status == "interrupted"
    lock = run.lock()
    with lock:
        run.update(status="training")
        assert runs.Run(run.path).status == "training"
    assert run.status == "interrupted"
    run.update(status="done")
    assert run.status == "done"


def test_remove_refuses_while_somebody_works_on_it():
    run = runs.create(resolved())
    with run.lock(), pytest.raises(UserError, match="another process"):
        run.remove()
    run.remove()
    assert not run.path.exists()


def test_find_takes_a_unique_beginning_or_a_folder():
    one, two = runs.create(resolved()), runs.create(resolved(BASE.model_copy(update={"seed": 1})))
    assert runs.find("probe_runs-tiny-all-s1").id == two.id
    assert runs.find(str(one.path)).id == one.id
    assert runs.find(one.id.rsplit("-", 1)[1]).id == one.id
    with pytest.raises(UserError, match="fits 2 runs"):
        runs.find("probe")
    with pytest.raises(UserError, match="no run 'zzz'"):
        runs.find("zzz")


def test_a_broken_manifest_is_one_line(tmp_path):
    run = runs.create(resolved())
    (run.path / "manifest.json").write_text("{")
    assert run.status == "interrupted"
    with pytest.raises(UserError, match="runs rm"):
        _ = run.manifest


def test_what_is_missing_is_named():
    run = runs.create(resolved())
    with pytest.raises(UserError, match="decomp-bench eval"):
        run.results()
    with pytest.raises(UserError, match="decomp-bench train --config"):
        run.load()


def test_find_trained_wants_weights():
    run = runs.create(resolved())
    key = resolved().training_key
    assert runs.find_trained(key) is None
    run.checkpoint.mkdir()
    (run.checkpoint / "decomposer.json").write_text(json.dumps({}))
    found = runs.find_trained(key)
    assert found is not None
    assert found.id == run.id


@pytest.mark.parametrize(
    ("uri", "slug"),
    [("pydocs-4l", "pydocs-4l"), ("toy:resid_mlp1@7", "toy-resid_mlp1-7"), ("hf:a/b/c/", "c"), ("pydocs-4l@1", "pydocs-4l-1")],
)
def test_target_slug(uri, slug):
    assert runs.target_slug(uri) == slug


def test_folder_at_gives_way_to_the_variable(tmp_path, monkeypatch):
    with runs.folder_at(tmp_path / "other"):
        assert runs.runs_folder() == tmp_path / "runs"
    monkeypatch.delenv("DECOMP_BENCH_RUNS")
    with runs.folder_at(tmp_path / "other"):
        assert runs.runs_folder() == tmp_path / "other"
    assert str(runs.runs_folder()) == "results/runs"


def test_a_manifest_names_no_folder_of_the_machine(monkeypatch, tmp_path):
    from decomp_bench import provenance

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [provenance.__file__, f"{tmp_path}/jobs/job.json", "--seed", "1"])
    assert provenance.made_by()["argv"] == ["decomp_bench/provenance.py", "jobs/job.json", "--seed", "1"]
