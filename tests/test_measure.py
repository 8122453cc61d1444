"""Measurements that an experiment asks for: made once for each run, gathered, and no reason for a run to change or to fail."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import yaml

from decomp_bench import experiment, gather, launch, measurements, results
from decomp_bench.config import Config, RunConfig
from decomp_bench.errors import UserError
from decomp_bench.experiment import Options
from decomp_bench.measurements import Measured, Measurement
from tests.test_experiment import CONFIG, here, place, toy  # noqa: F401 - fixtures

FILE = "007_something/config.yaml"


class Settings(Config):
    factor: float = 1.0
    fails: tuple[int, ...] = ()


def probe(decomposer, source, settings, progress):
    """One row about the run and one about the target; fails at some k."""
    calls.append(decomposer.config.k)
    if decomposer.config.k in settings.fails:
        raise RuntimeError("no luck\nsecond line")
    progress(1, 2)
    row = {
        "metric": "probe",
        "value": settings.factor * decomposer.config.k,
        "lo": 0.0,
        "hi": 9.0,
        "n": 5,
        "protocol": "clean",
        "gates": "self",
    }
    base = {**row, "run_id": "", "method": "baseline", "family": "baseline", "metric": "base", "value": settings.factor}
    return [{**row, "condition": results.condition(concept="a b", factor=settings.factor)}, base]


calls: list[int] = []
PROBE = Measurement(3, Settings, probe, (Measured("probe", "Probe", "", "higher", "factor times k"),), lambda settings: 2.0)


@pytest.fixture
def project(place, monkeypatch):  # noqa: F811
    """A project whose experiment 007 asks for a measurement of another package."""
    point = SimpleNamespace(name="probing", load=lambda: PROBE)
    monkeypatch.setattr(measurements, "entry_points", lambda group: [point] if group == "decomp_bench.measurements" else [])
    monkeypatch.setattr("decomp_bench.workers.launch", here)
    monkeypatch.setattr(experiment, "draw", lambda folder: [])
    calls.clear()
    write(place, probing={})
    return place


def write(folder, *, condition=None, **measure):
    runs = [{**CONFIG["runs"][0], **({"condition": condition} if condition else {})}]
    presets = {"laptop": {}, "smoke": {"measure": {"probing": {"factor": 5.0}}}}
    config = {**CONFIG, "runs": runs, "measure": measure, "presets": presets}
    (folder / "experiments" / FILE).write_text(yaml.safe_dump(config))


def run(**options):
    return experiment.run(experiment.load("007"), Options(**options))


def rows(folder):
    return results.read(folder / "results" / "007_something" / "toy-resid_mlp1" / "probing.parquet")


def test_rows_of_every_run_are_gathered_with_the_columns_of_the_results(project):
    outcome = run()
    assert outcome.failures == []
    frame = rows(project)
    assert list(frame.columns) == list(results.COLUMNS)
    own = frame[frame["metric"] == "probe"]
    assert sorted(own["value"]) == [1.0, 2.0]
    assert set(own["run_id"]) == {one.id for one in outcome.plan.wanted}
    assert set(own["experiment"]) == {"007_something"}
    assert (set(own["target"]), set(own["seed"]), set(own["metric_version"]), set(own["applicable"])) == (
        {CONFIG["target"]},
        {0},
        {3},
        {"yes"},
    )
    assert results.unfolded(own)[["concept", "factor"]].drop_duplicates().to_numpy().tolist() == [["a b", "1"]]
    assert len(frame[frame["run_id"] == ""]) == 1  # what is about the target is there once
    assert (project / "results" / "007_something" / "toy-resid_mlp1" / "probing.csv").is_file()


def test_what_tells_runs_apart_tells_their_measured_rows_apart(project):
    write(project, condition={"taught": "with {k}"}, probing={})
    run()
    run()  # gathered again, from rows that say it already
    own = rows(project)[lambda frame: frame["metric"] == "probe"]
    assert sorted(family.partition(", ")[2] for family in own["family"]) == ["with 1", "with 2"]
    assert set(results.unfolded(own)["concept"]) == {"a b"}  # the measurement's own conditions stay


def test_nothing_is_measured_twice_and_other_settings_are(project):
    run()
    assert sorted(calls) == [1, 2]
    again = run()
    assert (again.executed, sorted(calls)) == (0, [1, 2])
    changed = run(set=("measure.probing.factor=3",))
    assert (changed.executed, sorted(calls)) == (2, [1, 1, 2, 2])
    assert sorted(rows(project)[lambda f: f["metric"] == "probe"]["value"]) == [3.0, 6.0]  # rows of other settings are not mixed in
    files = sorted((project / "results" / "runs").glob("*/probing-*.parquet"))
    assert len(files) == 4


def test_another_version_is_measured_again(project, monkeypatch):
    run()
    monkeypatch.setattr("tests.test_measure.PROBE", Measurement(4, Settings, probe, PROBE.metrics, PROBE.seconds))
    assert run().executed == 2


def test_runs_are_the_same_whatever_is_measured(project):
    measured = [one.id for one in run().plan.wanted]
    weights = [(project / "results" / "runs" / one / "results.parquet").stat().st_mtime_ns for one in measured]
    write(project)
    assert [one.id for one in experiment.plan(experiment.load("007"), Options()).wanted] == measured
    write(project, probing={"factor": 2.0})
    assert [one.id for one in run().plan.wanted] == measured
    assert [(project / "results" / "runs" / one / "results.parquet").stat().st_mtime_ns for one in measured] == weights


def test_a_failure_is_reported_and_tried_again(project):
    outcome = run(set=("measure.probing.fails=[2]",))
    assert len(outcome.failures) == 1
    assert outcome.failures[0].endswith(", probing: RuntimeError: no luck")
    assert rows(project)[lambda f: f["metric"] == "probe"]["value"].tolist() == [1.0]
    assert outcome.frame is not None
    assert len(set(outcome.frame["run_id"])) == 2  # the run itself stands
    assert [row["status"] for row in experiment.status(outcome.plan)].count("unmeasured") == 1
    calls.clear()
    run(set=("measure.probing.fails=[2]",))
    assert calls == [2]


def test_rows_of_deleted_runs_stay(project):
    import shutil

    run()
    shutil.rmtree(project / "results" / "runs")
    run(only=("probe_experiment",), set=("method.k=1",))
    assert sorted(rows(project)[lambda f: f["metric"] == "probe"]["value"]) == [1.0]  # --set: only what is asked for belongs
    run()
    assert sorted(rows(project)[lambda f: f["metric"] == "probe"]["value"]) == [1.0, 2.0]


def test_presets_change_settings(project):
    found = experiment.load("007")
    assert [one.settings.factor for one in experiment.measurements(found, Options(preset="smoke"))] == [5.0]  # type: ignore[attr-defined]
    assert [row["seconds"] > 2 for row in experiment.status(experiment.plan(found, Options()))] == [True, True]


def test_progress_counts_every_part(project):
    told: list[dict] = []
    made = experiment.plan(experiment.load("007"), Options())
    launch.execute([one.config for one in made.wanted], progress=told.append, measurements={"probing": {}})
    steps = [event["step"] / event["steps"] for event in told if event["phase"] == "measure"]
    assert steps == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        ({"probingg": {}}, "unknown measurement 'probingg'; did you mean 'probing'"),
        ({"probing": {"facto": 2}}, "measure probing: unknown key 'facto'; known keys: factor, fails"),
        ({"probing": {"factor": "much"}}, "measure probing: 'factor'"),
    ],
)
def test_bad_settings_name_the_fix_before_anything_runs(project, measure, message):
    write(project, **measure)
    with pytest.raises(UserError, match=message):
        run()
    assert not (project / "results" / "runs").exists() or not list((project / "results" / "runs").glob("probe*"))


def test_a_setting_that_is_none_is_refused(project):
    for item in ("measure.probing=3", "measure=3"):
        with pytest.raises(UserError):
            run(set=(item,))


def test_the_manifest_says_what_was_measured_and_how_long(project):
    outcome = run()
    manifest = json.loads((outcome.plan.folder / "manifest.json").read_text())
    assert manifest["measurements"]["probing"]["settings"] == {"factor": 1.0, "fails": []}
    assert manifest["measurements"]["probing"]["version"] == 3
    about = manifest["runs"][outcome.plan.wanted[0].id]["measurements"]["probing"]
    assert about["error"] is None
    assert about["wall_s"] >= 0


def test_a_run_made_by_hand_is_not_measured(project):
    config = experiment.configs(experiment.load("007"), Options())[0]
    assert isinstance(config, RunConfig)
    (made,) = launch.execute([config], mode="train", measurements={"probing": {}})
    assert calls == []
    assert gather.Run(made.path).trained
