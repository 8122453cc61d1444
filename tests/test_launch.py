"""Runs executed here and in workers: what is done, left alone, resumed, adopted; and that one failure stops nothing else."""

from __future__ import annotations

import os
import signal

import pytest

from decomp_bench import launch, runs, targets, workers
from decomp_bench.cli.making import METHOD
from decomp_bench.config import EvalConfig, RunConfig, TrainConfig
from decomp_bench.errors import UserError

TOY = "toy:resid_mlp1"


@pytest.fixture(scope="module")
def toy():
    return targets.load(TOY)


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch, toy):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "probe_launch.py").write_text(METHOD.format(name="probe_launch", title="ProbeLaunch"))
    monkeypatch.setenv("DECOMP_BENCH_METHODS", str(tmp_path / "methods"))
    monkeypatch.setenv("DECOMP_BENCH_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("DECOMP_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(targets, "load", lambda uri, device="cpu": toy)


def config(k: int = 2, steps: int = 8, seed: int = 0, **own) -> RunConfig:
    return RunConfig(
        method="probe_launch",
        target=TOY,
        seed=seed,
        method_config={"k": k, "n": 24, "steps": steps, "batch": 64, **own},
        eval=EvalConfig(tokens=320, batch=160, bootstrap=20, sweep=False),
        train=TrainConfig(log_every=2, save_every=100),
    )


def weights(run: runs.Run) -> bytes:
    return (run.checkpoint / "decomposer.safetensors").read_bytes()


def test_a_run_leaves_everything_behind_and_is_not_repeated():
    (run,) = launch.execute([config()])
    assert run.status == "done"
    rows = run.results()
    assert set(rows["run_id"]) == {run.id}
    assert set(rows["step"]) == {8}
    assert set(run.documents()["run_id"]) == {run.id}
    manifest = run.manifest
    assert {"train_wall_s", "train_cpu_s", "tokens", "flops", "peak_memory_mb", "evaluate_wall_s"} <= manifest["cost"].keys()
    assert {"checkpoint/decomposer.safetensors", "results.parquet", "config.yaml"} <= manifest["artifacts"].keys()
    assert [line["step"] for line in _metrics(run)] == [2, 4, 6, 8]
    stamp = (run.path / "results.parquet").stat().st_mtime_ns
    launch.execute([config()])
    assert (run.path / "results.parquet").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="--existing"):
        launch.execute([config()], existing="error")
    launch.execute([config()], existing="overwrite")
    assert (run.path / "results.parquet").stat().st_mtime_ns != stamp


def _metrics(run):
    from decomp_bench.tracking import read

    return read(run.path / "metrics.jsonl")


def test_an_interrupted_run_continues_to_the_same_weights(tmp_path, monkeypatch):
    (whole,) = launch.execute([config(steps=12)], mode="train")
    expected = weights(whole)
    monkeypatch.setenv("DECOMP_BENCH_RUNS", str(tmp_path / "again"))

    def stop(event):
        if event.get("step", 0) >= 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        launch.execute([config(steps=12)], progress=stop)
    run = runs.find(whole.id)
    assert run.status == "interrupted"
    assert not run.trained
    launch.execute([config(steps=12)], existing="skip")
    assert run.status == "interrupted"
    launch.execute([config(steps=12)])
    assert run.status == "done"
    assert weights(run) == expected
    assert [line["step"] for line in _metrics(run)] == [2, 4, 6, 8, 10, 12]


def test_another_evaluation_takes_the_weights_over():
    (run,) = launch.execute([config()], mode="train")
    assert run.status == "done"
    assert not run.evaluated
    launch.execute([config()], mode="evaluate")
    assert run.evaluated
    other = config().model_copy(update={"eval": EvalConfig(tokens=160, batch=160, bootstrap=20, sweep=False)})
    (copy,) = launch.execute([other])
    assert copy.id != run.id
    assert copy.manifest["trained_in"]["run"] == run.id
    assert weights(copy) == weights(run)
    with pytest.raises(UserError, match="nothing trained fits"):
        launch.execute([config(k=3)], mode="evaluate")
    assert len(runs.all_runs()) == 2


def test_one_failure_does_not_stop_the_others():
    done, failed = launch.execute([config(k=2), config(k=3, lr=1e30, clip=None)])
    assert done.status == "done"
    assert failed.status == "failed"
    assert "\n" not in failed.manifest["error"]


def test_an_exception_in_one_run_is_its_own(monkeypatch):
    from decomp_bench import train

    real = train.train

    def broken(jobs, *arguments):
        if any(job.decomposer.config.k == 3 for job in jobs):
            raise RuntimeError("out of luck\nand more")
        return real(jobs, *arguments)

    monkeypatch.setattr(train, "train", broken)
    done, failed = launch.execute([config(k=2), config(k=3)])
    assert done.status == "done"
    assert failed.status == "failed"
    assert failed.manifest["error"] == "RuntimeError: out of luck"
    assert "Traceback" in (failed.path / "log.txt").read_text()


def test_bad_input_writes_nothing(tmp_path):
    with pytest.raises(UserError, match="unknown key"):
        launch.execute([config(), config(nonsense=1)])
    with pytest.raises(UserError, match="layers 0 to 0"):
        launch.execute([config().model_copy(update={"layers": (5,)})])
    assert runs.all_runs() == []


def test_a_locked_run_is_left_alone():
    (run,) = launch.execute([config()], mode="train")
    with run.lock():
        launch.execute([config()], mode="all")
    assert not run.evaluated


def test_groups_are_balanced_and_kept_apart():
    configs = [config(k=k) for k in range(1, 9)] + [config(k=k, seed=1) for k in range(1, 3)]
    groups = workers.chunked(configs, lambda c: 100.0 * (1 + c.seed), lambda c: c.seed, 2)
    assert sum(len(group.configs) for group in groups) == len(configs)
    assert all(len({c.seed for c in group.configs}) == 1 for group in groups)
    assert max(group.cost for group in groups) <= 300
    assert [group.cost for group in groups] == sorted((group.cost for group in groups), reverse=True)
    assert workers.chunked([], lambda c: 1.0, lambda c: 0, 2) == []


def test_workers_execute_groups_and_report(tmp_path):
    seen = []
    bad = RunConfig(method="probe_launch", target="toy:nothing")
    groups = workers.launch([workers.Group([config()], "good"), workers.Group([bad], "bad")], 2, report=seen.append, every=0.1)
    good, bad_group = groups
    assert [run.status for run in good.runs] == ["done"]
    assert "unknown toy" in bad_group.error
    assert seen[-1].left is not None
    assert good.fraction == 1.0
