"""From config.yaml to runs, and from runs to a results folder."""

from __future__ import annotations

import json

import pytest
import yaml

from decomp_bench import experiment, launch, results, script, targets
from decomp_bench.cli.making import METHOD
from decomp_bench.errors import UserError
from decomp_bench.experiment import Options

TOY = "toy:resid_mlp1"
CONFIG = {
    "title": "A title",
    "target": TOY,
    "preset": "laptop",
    "seeds": [0],
    "eval": {"tokens": 320, "batch": 160, "bootstrap": 20, "sweep": False},
    "runs": [
        {
            "method": "probe_experiment",
            "config": {"n": 24, "steps": 4, "batch": 64},
            "sweep": {"k": [1, 2]},
            "presets": {"smoke": {"config": {"steps": 2}}, "paper": {"sweep": {"k": [1, 2, 3]}}},
        },
        {"method": "probe_other", "config": {"steps": 3, "batch": 64, "n": 24}},
    ],
    "presets": {"smoke": {"eval": {"tokens": 160}}, "laptop": {}, "paper": {"seeds": [0, 1]}},
}


@pytest.fixture(scope="module")
def toy():
    return targets.load(TOY)


@pytest.fixture
def place(tmp_path, monkeypatch, toy):
    (tmp_path / "methods").mkdir()
    for name in ("probe_experiment", "probe_other"):
        (tmp_path / "methods" / f"{name}.py").write_text(METHOD.format(name=name, title=name.title().replace("_", "")))
    folder = tmp_path / "project" / "experiments" / "007_something"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.setenv("DECOMP_BENCH_METHODS", str(tmp_path / "methods"))
    monkeypatch.setenv("DECOMP_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DECOMP_BENCH_RUNS", raising=False)
    monkeypatch.setattr(targets, "load", lambda uri, device="cpu": toy)
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def here(groups, count, existing, name, report, measurements):
    """Workers' work, done in this process."""
    for group in groups:
        group.runs = launch.execute(group.configs, existing, name, measurements=measurements)
        group.finished = True
    return groups


def test_found_by_number_name_and_folder(place):
    for name in ("007", "something", "007_something", str(place / "experiments" / "007_something")):
        assert experiment.load(name).name == "007_something"
    assert experiment.load("007", place).root == place
    assert experiment.load("007", place / "experiments").root == place
    with pytest.raises(UserError, match=r"no experiment '099'.*known: 007_something"):
        experiment.load("099")


def test_no_experiments_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no \./experiments here.*--dir"):
        experiment.load("011")
    with pytest.raises(UserError, match="--dir takes"):
        experiment.load("011", tmp_path)


def test_configs_span_methods_sweeps_and_seeds(place):
    found = experiment.load("007")
    made = experiment.configs(found, Options())
    assert [(c.method, c.method_config.get("k"), c.method_config["steps"]) for c in made] == [
        ("probe_experiment", 1, 4),
        ("probe_experiment", 2, 4),
        ("probe_other", None, 3),
    ]
    assert len(experiment.configs(found, Options(preset="paper"))) == 8
    assert len(experiment.configs(found, Options(seeds=(3, 4)))) == 6
    smoke = experiment.configs(found, Options(preset="smoke", only=("probe_experiment",)))
    assert [(c.method_config["steps"], c.eval.tokens) for c in smoke] == [(2, 160)] * 2
    swept = experiment.configs(found, Options(only=("probe_other",), set=("method.k=5,6", "eval.tokens=7")))
    assert [(c.method_config["k"], c.eval.tokens) for c in swept] == [(5, 7), (6, 7)]
    assert {c.target for c in experiment.configs(found, Options(target="toy:resid_mlp2"))} == {"toy:resid_mlp2"}


def test_an_entry_takes_only_its_own_seeds_of_the_experiment(place):
    config = place / "experiments" / "007_something" / "config.yaml"
    raw = yaml.safe_load(config.read_text())
    raw["seeds"], raw["runs"][0]["seeds"] = [0, 1], [1, 2]
    config.write_text(yaml.safe_dump(raw))
    found = experiment.load("007")
    assert [(c.method_config.get("k"), c.seed) for c in experiment.configs(found, Options())] == [(1, 1), (2, 1), (None, 0), (None, 1)]
    raw["runs"][0]["presets"]["paper"]["seeds"] = [0]
    config.write_text(yaml.safe_dump(raw))
    assert {c.seed for c in experiment.configs(experiment.load("007"), Options(preset="paper", only=("probe_experiment",)))} == {0}
    assert {c.seed for c in experiment.configs(found, Options(seeds=(3, 4)))} == {3, 4}
    assert len(experiment.configs(found, Options(seeds=(3, 4)))) == 6


def test_only_takes_a_condition_as_well(place):
    config = place / "experiments" / "007_something" / "config.yaml"
    raw = yaml.safe_load(config.read_text())
    raw["runs"][0]["condition"] = {"form": "ours"}
    config.write_text(yaml.safe_dump(raw))
    found = experiment.load("007")
    ours = experiment.configs(found, Options(only=("ours",)))
    assert ours
    assert ours == [c for c in experiment.configs(found, Options()) if c.method == raw["runs"][0]["method"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(preset="huge"), "no preset 'huge'; known: laptop, paper, smoke"),
        (Options(only=("spdd",)), "no run.s method or condition"),
        (Options(set=("eval.tokns=3",)), "unknown key 'eval.tokns'"),
        (Options(set=("target=toy:resid_mlp1,toy:resid_mlp2",)), "one target"),
        (Options(set=("method.kk=3",)), "unknown key 'kk'"),
    ],
)
def test_bad_options_name_the_fix(place, options, message):
    with pytest.raises(UserError, match=message):
        experiment.plan(experiment.load("007"), options)


def test_bad_config_names_file_and_key(place):
    path = place / "experiments" / "007_something" / "config.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "seedz": [1]}))
    with pytest.raises(UserError, match=r"config\.yaml: unknown key 'seedz'"):
        experiment.load("007")
    path.write_text("title: [")
    with pytest.raises(UserError, match="not valid YAML"):
        experiment.load("007")


def test_run_executes_what_is_missing_and_gathers_it(place, monkeypatch):
    monkeypatch.setattr("decomp_bench.workers.launch", here)
    drawn = []
    monkeypatch.setattr(experiment, "draw", lambda folder: drawn.append(folder) or [folder / "a.png"])
    found = experiment.load("007")
    outcome = experiment.run(found, Options(only=("probe_experiment",)))
    folder = place / "results" / "007_something" / "toy-resid_mlp1"
    assert (outcome.executed, outcome.failures, drawn) == (2, [], [folder])
    again = experiment.run(found, Options())
    assert again.executed == 1
    frame = results.read(folder / "results.parquet")
    assert set(frame["method"]) == {"probe_experiment", "probe_other"}
    assert set(frame["experiment"]) == {"007_something"}
    assert len(json.loads((folder / "manifest.json").read_text())["runs"]) == 3
    assert (folder / "results.csv").is_file()
    assert (folder / "documents.parquet").is_file()
    assert (place / "results" / "runs").is_dir()


def test_results_of_deleted_runs_stay_and_those_of_other_configs_go(place, monkeypatch):
    import shutil

    monkeypatch.setattr("decomp_bench.workers.launch", here)
    monkeypatch.setattr(experiment, "draw", lambda folder: [])
    found = experiment.load("007")
    first = experiment.run(found, Options())
    assert first.frame is not None
    shutil.rmtree(place / "results" / "runs")
    second = experiment.run(found, Options(seeds=(1,), only=("probe_other",)))
    assert second.executed == 1
    assert second.frame is not None
    assert set(second.frame["run_id"]) == set(first.frame["run_id"]) | {second.plan.wanted[0].id}
    changed = {**CONFIG, "runs": CONFIG["runs"][1:]}
    (found.path / "config.yaml").write_text(yaml.safe_dump(changed))
    third = experiment.collect(experiment.plan(experiment.load("007"), Options()))
    assert third is not None
    assert set(third["method"]) == {"probe_other"}


def test_a_failed_run_is_reported(place, monkeypatch):
    monkeypatch.setattr("decomp_bench.workers.launch", here)
    monkeypatch.setattr(experiment, "draw", lambda folder: [])
    options = Options(set=("method.lr=1e30", "method.clip=null"), only=("probe_other",))
    outcome = experiment.run(experiment.load("007"), options)
    assert len(outcome.failures) == 1
    assert outcome.frame is None


def test_runs_are_told_apart_by_their_condition_and_drawn_as_asked(place, monkeypatch):
    from decomp_bench import analysis

    monkeypatch.setattr("decomp_bench.workers.launch", here)
    path = place / "experiments" / "007_something" / "config.yaml"
    plain = experiment.plan(experiment.load("007"), Options()).wanted
    path.write_text(yaml.safe_dump({**CONFIG, "runs": [{**CONFIG["runs"][0], "condition": {"taught": "with {k}"}}], "figures": ["told"]}))
    with pytest.raises(UserError, match="no figure 'told'"):
        experiment.plan(experiment.load("007"), Options())
    monkeypatch.setitem(analysis.DRAWINGS, "told", lambda frame: analysis.Drawing({}, {"told": frame[["run_id", "condition"]]}))
    outcome = experiment.run(experiment.load("007"), Options())
    assert {one.id for one in outcome.plan.wanted} < {one.id for one in plain}
    assert outcome.frame is not None
    assert set(outcome.frame["condition"]) == {"taught=with 1", "taught=with 2"}
    assert (outcome.plan.folder / "told.csv").is_file()
    path.write_text(yaml.safe_dump({**CONFIG, "runs": [{**CONFIG["runs"][0], "condition": {"taught": "{kk}"}}]}))
    with pytest.raises(UserError, match=r"condition of probe_experiment: 'kk' is no key"):
        experiment.configs(experiment.load("007"), Options())


def test_every_run_at_hand_counts_once_also_when_its_folder_is_gone(place, monkeypatch):
    import shutil

    from safetensors.torch import load_file

    from decomp_bench import gather
    from decomp_bench.runs import all_runs, folder_at

    monkeypatch.setattr("decomp_bench.workers.launch", here)
    monkeypatch.setattr(experiment, "draw", lambda folder: [])
    with pytest.raises(UserError, match="no runs at hand"):
        gather.at_hand(place)
    outcome = experiment.run(experiment.load("007"), Options())
    ids = sorted(one.id for one in outcome.plan.wanted)
    with folder_at(place / "results" / "runs"):
        frame, manifests = gather.at_hand(place)
        for run in all_runs():
            held = sum(value.numel() for value in load_file(run.checkpoint / "decomposer.safetensors").values())
            assert manifests[run.id]["parameters"] == run.parameters == held > 0
    assert sorted(manifests) == ids
    assert frame.duplicated(["run_id", "protocol", "gates", "mask", "delta", "variant", "layer", "site", "metric", "base"]).sum() == 0
    shutil.rmtree(place / "results" / "runs")
    again, kept = gather.at_hand(place)
    assert sorted(kept) == ids
    assert len(again) == len(frame)
    assert all(one["parameters"] for one in kept.values())


def test_results_that_are_older_than_conditions_are_read(tmp_path):
    results.write(results.frame([{"run_id": "a", "value": 1.0}]).drop(columns="condition"), tmp_path / "old.parquet")
    assert list(results.read(tmp_path / "old.parquet")["condition"]) == [""]


def test_results_of_other_presets_lie_apart(place):
    found = experiment.load("007")
    assert found.results_folder(TOY, "laptop").name == "toy-resid_mlp1"
    assert found.results_folder(TOY, "smoke").name == "toy-resid_mlp1-smoke"


def test_experiments_of_the_project_are_sound():
    from pathlib import Path

    root = Path(__file__).resolve().parent.parent
    for found in experiment.all_experiments(root):
        assert (found.path / "README.md").is_file()
        assert len((found.path / "run.py").read_text().splitlines()) <= 60
        for preset in found.config.presets:
            options = Options(preset=preset)
            assert script.settings(found, options) if found.config.script else experiment.configs(found, options)
            wanted = {**found.config.measure, **found.config.presets[preset].get("measure", {})}
            assert {one.name for one in experiment.measurements(found, options)} == set(wanted)
