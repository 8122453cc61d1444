"""An experiment's page and the page of all of them, from stored results alone."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from decomp_bench import analysis, experiment, results
from decomp_bench.errors import UserError
from decomp_bench.report import readme, tables
from decomp_bench.report.experiments import experiment_page, suite_page
from decomp_bench.report.page import number
from tests.analysis.synthetic import line, row
from tests.report.reading import sound

HOSTILE = '<script>alert("x")</script>'
README = """# 007 A title

**Question.** Which is `better`, **and** why? See [the list](README.md).

**Prediction.** One of <b>them</b>.

- the first
- the second

**Verdict.** Open.

    decomp-bench experiment run 007
"""


def draw(folder: Path) -> None:
    """The headline figure of a results folder."""
    frame = results.read(folder / "results.parquet")
    analysis.save(analysis.pareto(frame, analysis.View(protocols=("clean",))), folder / "figures" / "ce_delta_by_active_params")


def rows() -> list[dict]:
    found = line("sparse", (10, 100, 1000), (3.0, 1.0, 0.2), run_id="run-a") + line(HOSTILE, (20, 200), (4.0, 2.0), run_id="run-b")
    return [*found, row(family="sparse", variant="k=0", metric="bits", value=float("nan"), applicable="no", reason="no bound")]


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("DECOMP_BENCH_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("007_something", "008_later"):
        folder = tmp_path / "experiments" / name
        folder.mkdir(parents=True)
        config = {"title": f"Title of {name}", "runs": [{"method": "probe"}], "preset": "laptop", "presets": {"laptop": {}}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "README.md").write_text(README)
    place = tmp_path / "results" / "007_something" / "pydocs-4l"
    results.write(results.frame(rows()), place / "results.parquet")
    made = {"status": "done", "steps": 10, "converged": "no", "cost": {"train_wall_s": 60.0, "tokens": 1000}, "packages": {"torch": "2.9"}}
    made |= {"git": {"commit": "c0ffee" * 6, "dirty": True}, "hardware": {"cpu": "a processor", "cores": 2}}
    about = {"preset": "laptop", "target": "pydocs-4l", "runs": {"run-a": made, "run-b": made}}
    (place / "manifest.json").write_text(json.dumps(about))
    return tmp_path


def test_a_page_holds_what_the_results_say_and_asks_nothing_of_the_network(project):
    draw(project / "results" / "007_something" / "pydocs-4l")
    path = experiment_page(experiment.load("007"))
    page, text = sound(path), path.read_text()
    assert path == project / "results" / "007_something" / "report.html"
    assert len([1 for tag, about in page.tags if tag == "img" and str(about["src"]).startswith("data:image/svg")]) >= 1
    for said in ("Title of 007_something", "<code>better</code>", "<b>and</b>", "0.950 to 1.05", "no bound", "c0ffee", "with changes"):
        assert said in text
    assert "decomp-bench experiment run 007\ndecomp-bench report 007" in text
    cells = [about for tag, about in page.tags if tag == "td"]
    assert cells
    assert all("data-sort" in about for about in cells)
    assert ("table", {"data-sortable": None}) in page.tags


def test_what_comes_from_data_is_escaped(project):
    text = experiment_page(experiment.load("007")).read_text()
    assert HOSTILE not in text
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;" in text
    assert "One of &lt;b&gt;them&lt;/b&gt;." in text
    assert text.count("<script>") == 1


def test_the_same_results_give_the_same_bytes(project):
    pages = []
    for _ in range(2):
        draw(project / "results" / "007_something" / "pydocs-4l")
        pages.append(experiment_page(experiment.load("007")).read_bytes())
    assert pages[0] == pages[1]


def test_a_figure_is_drawn_whole_with_its_caption_and_without_what_nobody_sees(project):
    folder = project / "results" / "007_something" / "pydocs-4l"
    draw(folder)
    stored = (folder / "figures" / "ce_delta_by_active_params.svg").read_text()
    page = sound(experiment_page(experiment.load("007")))
    (first, *_) = [about for tag, about in page.tags if tag == "img"]
    assert "CE of the replaced model minus CE of the target" in str(first["alt"])
    drawn = base64.b64decode(str(first["src"]).partition(",")[2]).decode()
    assert "<metadata>" not in drawn
    words = re.compile(r"<text[^>]*>([^<]*)")
    assert words.findall(drawn) == words.findall(stored)
    shapes = [
        [float(v) for tag in re.findall(r"<(?:path|use)[^>]*>", text) for v in re.findall(r"-?\d+\.\d+", tag)] for text in (drawn, stored)
    ]
    ours, theirs = shapes
    assert len(ours) > 100
    assert ours == pytest.approx(theirs, abs=0.0101)


def test_failed_runs_of_the_experiment_are_listed_and_those_of_others_are_not(project):
    for name, method, status in (("probe-1", "probe", "failed"), ("other-1", "other", "failed"), ("probe-2", "probe", "done")):
        folder = project / "results" / "runs" / name
        folder.mkdir(parents=True)
        config = {"method": method, "method_config": {"k": 3}, "target": "pydocs-4l"}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "manifest.json").write_text(json.dumps({"id": name, "status": status, "error": f"loss of {name}"}))
    text = experiment_page(experiment.load("007")).read_text()
    assert "loss of probe-1" in text
    assert "other-1" not in text
    assert "probe-2" not in text


def test_a_run_with_a_page_is_linked_from_its_experiment_and_from_the_suite(project):
    page = project / "results" / "runs" / "run-a" / "report.html"
    page.parent.mkdir(parents=True)
    page.write_text("a page")
    suite, pages = suite_page(experiment.all_experiments(), project)
    assert "../runs/run-a/report.html" in sound(pages[0]).addresses
    found = sound(suite)
    assert {"007_something/report.html", "runs/run-a/report.html"} <= set(found.addresses)
    assert all((suite.parent / one).is_file() for one in found.addresses if one and not one.startswith("data:"))
    text = suite.read_text()
    assert "Title of 008_later: <code>decomp-bench experiment run 008</code>" in text
    assert "<p>Open.</p>" in text
    assert suite_page(experiment.all_experiments(), project)[0].read_text() == text


def test_results_of_a_program_of_its_own_are_shown_as_they_are(project):
    shutil.rmtree(project / "results" / "007_something" / "pydocs-4l")
    folder = project / "results" / "007_something" / "quick"
    folder.mkdir()
    (folder / "rates.csv").write_text("library,rate\n<i>ours</i>,12.5\ntheirs,\n")
    pd.DataFrame({"concept": ["weather"], "gain": [0.25]}).to_parquet(folder / "results.parquet")
    place = project / "experiments" / "007_something"
    (place / "config.yaml").write_text(yaml.safe_dump({"title": "Title", "script": "main.py"}))
    (folder / "machine.json").write_text('{"gemm": "<b>"}')
    path = experiment_page(experiment.load("007"))
    text = path.read_text()
    sound(path)
    assert "&lt;i&gt;ours&lt;/i&gt;" in text
    assert "12.5" in text
    assert "weather" in text
    assert "&lt;b&gt;" in text
    assert "decomp-bench experiment run 007 --preset quick" in text


def test_broken_results_are_one_line_and_leave_the_page_that_was_there(project):
    path = experiment_page(experiment.load("007"))
    before = path.read_bytes()
    (project / "results" / "007_something" / "pydocs-4l" / "results.parquet").write_text("broken")
    with pytest.raises(UserError, match=r"results\.parquet is not a results file"):
        experiment_page(experiment.load("007"))
    assert path.read_bytes() == before


@pytest.mark.parametrize(("value", "text"), [(0.17704, "0.177"), (8192, "8,192"), (1152.0, "1,152"), (2.13e-5, "2.13e-05")])
def test_numbers_read_well(value, text):
    assert number(value) == text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_what_is_no_number_is_a_dash_and_sorts_last(value):
    assert number(value) == "–"
    if value is not None:
        assert tables.cell(value).key == ""


def test_an_interval_that_is_the_value_is_not_repeated():
    assert tables.interval(1152.0, 1152.0, 1152.0).note == ""
    assert tables.interval(1.0, 0.5, 2.0).note == "0.500 to 2"


def test_sections_of_a_readme(tmp_path):
    (tmp_path / "README.md").write_text(README)
    found = readme.sections(tmp_path / "README.md")
    assert list(found) == ["Question", "Prediction", "Verdict"]
    assert found["Question"] == "<p>Which is <code>better</code>, <b>and</b> why? See the list.</p>"
    assert "<ul><li>the first</li><li>the second</li></ul>" in found["Prediction"]
    assert found["Verdict"].endswith("<pre>decomp-bench experiment run 007</pre>")
    assert readme.sections(tmp_path / "absent.md") == {}


def test_where_the_page_is_drawn_from_does_not_matter(project, tmp_path_factory):
    first = experiment_page(experiment.load("007")).read_bytes()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert experiment_page(experiment.load("007", project)).read_bytes() == first
