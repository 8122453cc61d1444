"""Every verb as typed, every error as one line."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest

from decomp_bench import api, results, runs

SMALL = ("--set", "method.n=24", "--set", "method.steps=6", "--set", "method.batch=64")
SMALL = (*SMALL, "--set", "eval.tokens=320", "--set", "eval.batch=160", "--set", "eval.bootstrap=20", "--set", "eval.sweep=false")
TOY = ("--target", "toy:resid_mlp1")


def test_help_imports_nothing_heavy():
    code = "import sys, decomp_bench.cli; print([m for m in ('torch', 'pandas', 'pydantic', 'numpy', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_package_imports_no_torch():
    code = "import sys, decomp_bench; assert 'torch' not in sys.modules; from decomp_bench import results; results.frame"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("trian",), "Did you mean 'train'"),
        (("train", "--nonsense"), "No such option"),
        (("train",), "list methods"),
        (("train", "probe_cil", *TOY), "did you mean 'probe_cli'"),
        (("train", "probe_cli", *TOY, "--layers", "7"), "layers 0 to 0"),
        (("train", "probe_cli", *TOY, "--layers", "a"), "--layers takes"),
        (("train", "probe_cli", *TOY, "--set", "method.kk=3"), "unknown key 'kk'"),
        (("train", "probe_cli", *TOY, "--set", "k=3"), "method.k"),
        (("train", "probe_cli", *TOY, "--set", "method.k"), "key=value"),
        (("train", "probe_cli", *TOY, "--set", "method.k=abc"), "'k'"),
        (("train", "probe_cli", *TOY, "--preset", "laptop"), "no preset 'laptop'"),
        (("train", "probe_cli", *TOY, "--device", "abacus"), "device 'abacus'"),
        (("train", "probe_cli", *TOY, "--existing", "maybe"), "--existing takes"),
        (("train", "probe_cli", "--config", "absent.yaml"), "no config file at absent.yaml"),
        (("train", "probe_cli", "--target", "toyy:x"), "unknown target"),
        (("train", "probe_cli", "--target", "hf:./absent"), "absent"),
        (("show", "absent"), "no run 'absent'"),
        (("eval", "absent"), "no run 'absent'"),
        (("compare", "a", "b"), "no run 'a'"),
        (("align", "a", "b"), "no run 'a'"),
        (("align", "a", "b", "--out", "x.txt"), "--out takes a .parquet or .csv file"),
        (("audit", "absent"), "no run 'absent'"),
        (("runs", "rm", "absent"), "no run 'absent'"),
        (("experiment", "run", "011"), "--dir"),
        (("plot", "011"), "--dir"),
        (("new", "method", "9lives"), "no name for a method"),
        (("new", "method", "probe_cli", "--dir", "methods"), "exists already"),
        (("target", "train", "gpt-5"), "no recipe"),
        (("cache", "evict", "--days", "-1"), "--days"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(bench, arguments, says):
    result = bench(*arguments)
    assert result.code == 2
    assert says in result.err
    lines = [line for line in result.err.strip().splitlines() if not line.startswith("loading")]
    assert len(lines) == 1
    assert runs.all_runs() == []


def test_a_broken_config_is_one_line(bench, tmp_path):
    (tmp_path / "broken.yaml").write_text("method: [")
    result = bench("train", "--config", "broken.yaml")
    assert (result.code, len(result.err.strip().splitlines())) == (2, 1)
    assert "not valid YAML" in result.err


def test_train_show_compare_audit_and_remove(bench, tmp_path):
    trained = bench("train", "probe_cli", *TOY, "--set", "method.k=2,3", *SMALL)
    assert trained.code == 0, trained.err
    assert "next: decomp-bench compare" in trained.out
    listed = json.loads(bench("list", "runs", "--json").out)
    assert [row["status"] for row in listed] == ["done", "done"]
    first, second = (row["run"] for row in listed)
    again = bench("train", "--config", str(tmp_path / "runs" / first / "config.yaml"))
    assert "it was there already" in again.out
    shown = json.loads(bench("show", first, "--json").out)
    assert shown["config"]["method_config"]["k"] in (2, 3)
    assert "FVU" in bench("show", first).out
    audited = bench("audit", first)
    assert audited.code == 0, audited.err
    assert "agree" in audited.out
    behind = runs.find(first).results()
    figure = tmp_path / "figures" / "ce_delta.png"
    figure.parent.mkdir()
    figure.touch()
    results.write(behind, tmp_path / "results.parquet")
    assert "agree" in bench("audit", str(figure)).out
    results.write(behind.assign(value=behind["value"] * 1.01), tmp_path / "results.parquet")
    assert "differ by up to 0.0099" in bench("audit", str(figure)).err
    assert "no figure beside results" in bench("audit", "absent.png").err
    evaluated = bench("eval", first, "--set", "eval.tokens=160")
    assert evaluated.code == 0, evaluated.err
    assert len(runs.all_runs()) == 3
    assert "eval.* keys only" in bench("eval", first, "--set", "method.k=9").err
    assert bench("runs", "rm", first, "--yes").code == 0
    assert len(runs.all_runs()) == 2
    assert runs.find(second).status == "done"


def test_compare_gives_paired_intervals(bench):
    assert bench("train", "probe_cli", *TOY, "--set", "method.k=2,3", *SMALL).code == 0
    one, two = runs.all_runs()
    result = bench("compare", one.id, two.id, "--bootstrap", "50", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)


def test_align_shows_and_writes_what_two_runs_have_in_common(bench, tmp_path):
    assert bench("train", "probe_cli", *TOY, "--set", "method.k=2,3", *SMALL, "--no-eval").code == 0
    one, two = runs.all_runs()
    result = bench("align", one.id, two.id, "--tokens", "200", "--out", "same.csv")
    assert result.code == 0, result.err
    assert "nearest of second" in result.out
    assert "mse first second" in result.out
    written = (tmp_path / "same.csv").read_text().splitlines()
    rows = json.loads(bench("align", one.id, two.id, "--tokens", "200", "--json").out)
    assert written[0].split(",") == list(rows[0]) == ["site", "aspect", "measure", "value", "null", "n_first", "n_second"]
    assert len(written) == len(rows) + 1


def test_audit_notices_a_changed_checkpoint(bench):
    from safetensors.torch import load_file, save_file

    assert bench("train", "probe_cli", *TOY, "--set", "method.k=2", *SMALL).code == 0
    (run,) = runs.all_runs()
    path = run.checkpoint / "decomposer.safetensors"
    weights = {key: value * 1.5 for key, value in load_file(path).items()}
    save_file(weights, path)
    result = bench("audit", run.id)
    assert result.code == 1
    assert "differ" in result.err


def test_a_failed_run_is_one_line_and_exit_1(bench):
    result = bench("train", "probe_cli", *TOY, *SMALL, "--set", "method.lr=1e30", "--set", "method.clip=null")
    assert result.code == 1
    assert result.err.strip().splitlines()[-1].startswith("failed: 1 of 1 runs")


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "no space left"),
        (RuntimeError("surprise\nsecond line"), 1, "unexpected RuntimeError: surprise; the traceback is in"),
        (KeyboardInterrupt(), 130, "continue with: decomp-bench list targets"),
    ],
)
def test_other_errors_are_one_line_too(bench, monkeypatch, error, code, says):
    def fail():
        raise error

    monkeypatch.setattr("decomp_bench.targets.known", fail)
    result = bench("list", "targets")
    assert result.code == code
    assert says in result.err
    assert len(result.err.strip().splitlines()) == 1


@pytest.mark.parametrize("what", ["methods", "targets", "metrics", "runs"])
def test_listings_in_both_forms(bench, what):
    assert bench("list", what).code == 0
    assert isinstance(json.loads(bench("list", what, "--json").out), list)


def test_a_new_method_is_one_file_that_trains(bench):
    made = bench("new", "method", "my_idea", "--dir", "methods")
    assert made.code == 0, made.err
    assert "decomp-bench train my_idea" in made.out
    assert "my_idea" in [row["method"] for row in json.loads(bench("list", "methods", "--json").out)]
    assert bench("train", "my_idea", *TOY, *SMALL, "--no-eval").code == 0


def test_new_experiment_is_listed(bench, tmp_path):
    (tmp_path / "experiments").mkdir()
    assert bench("experiment", "new", "idea").code == 0
    assert [row["experiment"] for row in json.loads(bench("experiment", "list", "--json").out)] == ["001_idea"]
    assert "What is the question?" in bench("experiment", "show", "001").out


def test_cache_shows_and_evicts(bench, tmp_path):
    (tmp_path / "cache" / "rows").mkdir(parents=True)
    (tmp_path / "cache" / "rows" / "a.npz").write_bytes(b"1234")
    assert json.loads(bench("cache", "show", "--json").out) == [{"kind": "rows", "files": 1, "mb": 0.0}]
    assert "deleted 1" in bench("cache", "evict", "--yes").out
    assert json.loads(bench("cache", "show", "--json").out) == []


def test_the_same_from_python(bench):
    run = api.train_run("probe_cli", target="toy:resid_mlp1", k=2, n=24, steps=6, batch=64)
    assert run.decomposer().name == "probe_cli"
    frame = api.evaluate_run(run, tokens=320, batch=160, bootstrap=20, sweep=False)
    assert len(frame) > 0
    assert api.load_run(run.id).id == run.id
    import decomp_bench

    assert callable(decomp_bench.train_run)
    assert callable(decomp_bench.load_results)
    assert decomp_bench.train.Job
    assert decomp_bench.load_target("toy:resid_mlp1").layers == 1
