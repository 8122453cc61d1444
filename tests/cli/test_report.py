"""`decomp-bench report` as typed."""

from __future__ import annotations

import pytest
import yaml

from decomp_bench import runs
from tests.report.reading import sound

SMALL = ("--set", "method.n=24", "--set", "method.steps=4", "--set", "method.batch=64", "--set", "eval.sweep=false")
SMALL = (*SMALL, "--set", "eval.tokens=320", "--set", "eval.batch=160", "--set", "eval.bootstrap=20")
TOY = ("--target", "toy:resid_mlp1")


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "experiments" / "007_something"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"title": "Title", "runs": [{"method": "probe_cli"}]}))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("absent",), "no run or experiment 'absent'"),
        (("008",), "no run or experiment '008'"),
        (("007",), "007_something has no results: decomp-bench experiment run 007"),
        ((), "decomp-bench experiment run 007"),
        (("007", "--dir", "absent"), "--dir takes"),
        (("007", "--tokens", "0"), "--tokens"),
        (("007", "--components", "-1"), "--components"),
    ],
)
def test_bad_input_is_one_line_and_exit_2_and_leaves_nothing(bench, project, arguments, says):
    result = bench("report", *arguments)
    assert (result.code, len(result.err.strip().splitlines())) == (2, 1)
    assert says in result.err
    assert not list(project.rglob("*.html"))


def test_without_experiments_a_runs_name_is_asked_for(bench):
    result = bench("report")
    assert (result.code, len(result.err.strip().splitlines())) == (2, 1)
    assert "no ./experiments here" in result.err
    assert "no run or experiment 'absent'" in bench("report", "absent").err


def test_a_run_that_was_not_scored_says_which_command_scores_it(bench, project):
    assert bench("train", "probe_cli", *TOY, *SMALL, "--no-eval").code == 0
    (run,) = runs.all_runs()
    result = bench("report", run.id)
    assert result.code == 2
    assert f"make them: decomp-bench eval {run.id}" in result.err
    assert not list(project.rglob("*.html"))


def test_a_run_by_the_beginning_of_its_id(bench, project):
    assert bench("train", "probe_cli", *TOY, *SMALL).code == 0
    (run,) = runs.all_runs()
    result = bench("report", run.id[:-3], "--tokens", "200", "--components", "5")
    assert result.code == 0, result.err
    path = run.path / "report.html"
    assert result.out.strip() == str(path)
    page = sound(path)
    assert len([1 for tag, _ in page.tags if tag == "article"]) == 5
    assert bench("report", str(run.path), "--components", "0").code == 0
    assert sound(path).tags


def test_the_report_of_everything_makes_the_tables_of_the_summary_again(bench, project):
    (project / "experiments" / "007_something" / "config.yaml").write_text(yaml.safe_dump({"title": "Title", "script": "own.py"}))
    folder = project / "results" / "007_something" / "default"
    folder.mkdir(parents=True)
    (folder / "rates.csv").write_text("name,rate\na,12.5\n")
    page = project / "results" / "README.md"
    page.write_text("Prose.\n\n<!-- table: file 007_something/default/rates.csv name rate -->\n<!-- end -->\n")
    result = bench("report")
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1] == str(page)
    assert "| a | 12.5 |" in page.read_text()
    page.write_text(page.read_text().replace("file 007", "absent 007"))
    result = bench("report")
    assert (result.code, len(result.err.strip().splitlines())) == (2, 1)
    assert "no table 'absent'" in result.err
