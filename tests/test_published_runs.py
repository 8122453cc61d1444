"""A finished run is logged with Weights & Biases, and can be named and used like a local one wherever it is fetched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import decomp_bench
from decomp_bench import launch, runs, targets
from decomp_bench.cli import main
from decomp_bench.cli.making import METHOD
from decomp_bench.config import EvalConfig, RunConfig, TrainConfig
from decomp_bench.errors import UserError

TOY = "toy:resid_mlp1"


@pytest.fixture(scope="module", autouse=True)
def _one_toy():
    """The toy is trained once."""
    toy = targets.load(TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "load", lambda uri, device="cpu": toy)
        yield


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """(id of a run that was trained with --wandb offline, its folder, the files of its artifact by name, folder of its method)"""
    import wandb

    place, made = tmp_path_factory.mktemp("published"), []
    (place / "methods").mkdir()
    (place / "methods" / "probe_published.py").write_text(METHOD.format(name="probe_published", title="ProbePublished"))

    class Recorded(wandb.Artifact):
        def __init__(self, *given, **named) -> None:
            super().__init__(*given, **named)
            made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DECOMP_BENCH_METHODS", str(place / "methods"))
        patch.setenv("DECOMP_BENCH_RUNS", str(place / "runs"))
        patch.setenv("WANDB_DATA_DIR", str(place / "staging"))
        patch.setattr(wandb, "Artifact", Recorded)
        config = RunConfig(
            method="probe_published",
            target=TOY,
            method_config={"k": 2, "n": 24, "steps": 4, "batch": 64},
            eval=EvalConfig(tokens=320, batch=160, bootstrap=20, sweep=False),
            train=TrainConfig(log_every=2, wandb="offline"),
        )
        (run,) = launch.execute([config])
    (one,) = made
    assert one.type == "decomp-bench-run"
    kept = place / "artifact"
    for name, entry in one.manifest.entries.items():
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(entry.local_path, kept / name)
    return run.id, run.path, kept, place / "methods"


class FakeArtifact:
    def __init__(self, folder: Path, kind: str = "decomp-bench-run", version: int = 0) -> None:
        names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        self.type, self.version, self.folder, self.downloads = kind, f"v{version}", folder, 0
        self.manifest = SimpleNamespace(entries=dict.fromkeys(names))

    def download(self, root: str) -> None:
        self.downloads += 1
        shutil.copytree(self.folder, root)


@pytest.fixture
def served(logged, monkeypatch, tmp_path):
    """Serve these artifacts as those of any run, in another place: returns the list to put them in, and the paths asked for."""
    import wandb

    artifacts, asked = [], []
    run = SimpleNamespace(logged_artifacts=lambda: iter(artifacts))
    monkeypatch.setattr(wandb, "Api", lambda timeout: SimpleNamespace(run=lambda path: asked.append(path) or run))
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("DECOMP_BENCH_METHODS", str(logged[3]))
    monkeypatch.setenv("DECOMP_BENCH_RUNS", str(tmp_path / "runs"))
    return artifacts, asked


def altered(folder: Path, to: Path, name: str, text: str | None) -> FakeArtifact:
    """A copy of an artifact in which one file is changed, or absent."""
    shutil.copytree(folder, to)
    (to / name).unlink(missing_ok=True)
    if text is not None:
        (to / name).write_text(text)
    return FakeArtifact(to)


def test_a_finished_run_is_logged_offline_with_all_that_it_takes_to_use_it(logged):
    name, folder, kept, _ = logged
    files = {str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()}
    checkpoint = {"checkpoint/decomposer.json", "checkpoint/decomposer.safetensors"}
    assert files == {"config.yaml", "manifest.json", "results.parquet", "documents.parquet"} | checkpoint
    assert json.loads((kept / "manifest.json").read_text())["status"] == "done"
    assert list((folder / "wandb").glob(f"offline-run-*-{name}/*.wandb"))


def test_a_published_run_is_fetched_once_and_treated_like_any_run(logged, served, capsys):
    name, folder, kept, _ = logged
    artifacts, asked = served
    artifacts += [FakeArtifact(kept, version=9), newest := FakeArtifact(kept, version=10), FakeArtifact(kept, kind="model", version=11)]
    uri = f"wandb:me/decomp-bench/{name}"
    run = decomp_bench.load_run(uri)
    assert (run.id, run.status, asked) == (name, "done", [f"me/decomp-bench/{name}"])
    assert run.results().equals(runs.Run(folder).results())
    assert run.decomposer().config.k == 2
    for arguments in (["show", uri], ["eval", uri], ["compare", uri, name]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0, capsys.readouterr().err
    assert [run.id for run in runs.all_runs()] == [name]
    assert newest.downloads == 1
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.yaml", "method: [", "config.yaml is not valid YAML"),
        ("config.yaml", "colour: red", "'method': Field required"),
        ("manifest.json", "no", "no readable manifest.json"),
        ("manifest.json", '{"id": "another"}', "its manifest names another run"),
        ("checkpoint/decomposer.json", None, "it has no checkpoint"),
        ("checkpoint/decomposer.safetensors", "weights", "not those that its manifest lists"),
        ("run.py", "print()", "none of ours: it holds run.py"),
    ],
)
def test_an_artifact_that_is_no_run_of_ours_is_refused_and_leaves_nothing(logged, served, tmp_path, file, text, message):
    served[0].append(altered(logged[2], tmp_path / "altered", file, text))
    with pytest.raises(UserError, match=message) as caught:
        runs.find(f"wandb:me/decomp-bench/{logged[0]}")
    assert "\n" not in str(caught.value)
    assert not runs.all_runs()
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_a_run_without_artifact_and_an_unfinished_one_in_the_way_are_said(logged, served, tmp_path):
    uri = f"wandb:me/decomp-bench/{logged[0]}"
    with pytest.raises(UserError, match=r"has no artifact of type decomp-bench-run; .*--wandb online"):
        runs.find(uri)
    (tmp_path / "runs" / logged[0]).mkdir(parents=True)
    with pytest.raises(UserError, match="is in the way"):
        runs.find(uri)


@pytest.mark.parametrize("name", ["wandb:a/b", "wandb:a/b/..", "wandb:a/../c", "wandb:a/b/c/d"])
def test_a_malformed_name_is_refused(name):
    with pytest.raises(UserError, match="wandb:ENTITY/PROJECT/RUN"):
        runs.find(name)


def test_without_network_or_key_one_line_says_so(served, monkeypatch):
    import wandb

    def fail(timeout):
        raise wandb.errors.UsageError("api_key not configured (no-tty).\nRun wandb login")

    monkeypatch.setattr(wandb, "Api", fail)
    with pytest.raises(UserError, match=r"^cannot fetch a/b/c from wandb \(api_key not configured \(no-tty\)\.\); without network"):
        runs.find("wandb:a/b/c")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(UserError, match="WANDB_MODE is offline"):
        runs.find("wandb:a/b/c")


def test_a_run_that_is_not_taken_stays_done(logged, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("DECOMP_BENCH_METHODS", str(logged[3]))
    monkeypatch.setenv("DECOMP_BENCH_RUNS", str(tmp_path / "runs"))
    config = runs.Run(logged[1]).config

    def refuse(*_given, **_named):
        raise OSError("quota exceeded")

    monkeypatch.setattr(wandb.Artifact, "add_dir", refuse)
    with pytest.raises(UserError, match=rf"run {logged[0]} is done, but .*quota exceeded.*decomp-bench eval {logged[0]}"):
        launch.execute([config])
    assert runs.find(logged[0]).status == "done"
