"""The tables of results/README.md: made from the results, again and again, around prose that stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from decomp_bench import experiment, results
from decomp_bench.errors import UserError
from decomp_bench.report import summary

ROOT = Path(__file__).resolve().parent.parent.parent
PROSE = "# Title\n\nBefore.\n\n<!-- table: {} -->\nold numbers\n<!-- end -->\n\nAfter.\n"
ABOUT = {
    "experiment": "007_something", "kind": "replacement", "curve": "trained", "target": "t", "target_hash": "3f", "dataset": "d",
    "token_hash": "ab", "split": "test", "layers": "0", "layer": "all", "site": "all", "mask": "binary", "delta": "off", "base": "",
    "positions": "1:", "condition": "", "metric_version": 1, "n": 1000, "applicable": "yes", "converged": "no", "seed": 0,
}  # fmt: skip


@pytest.fixture
def project(tmp_path):
    """An experiment with two families of one kind, one of them a floor, and one of another kind."""
    folder = tmp_path / "experiments" / "007_something"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("title: T\nruns: [{method: m}]\n")
    (folder / "README.md").write_text("# T\n\n**Result.** Some.\n\n**Verdict.** It is\nso | so.\n\nMore.\n")
    shutil.copytree(folder, tmp_path / "experiments" / "008_idle")
    save(tmp_path)
    return tmp_path


def save(project: Path, times: float = 1.0) -> None:
    rows = []
    for family, trainable, worse in (("good", True, 1.0), ("floor", False, 3.0), ("seeing", True, 0.5)):
        for k in (4, 8):
            for gates in ("clean", "self"):
                for metric, value in (("l0_mlp", k), ("active_params", 100 * k), ("ce_delta", times * worse / k)):
                    own = {"run_id": f"{family}{k}", "family": family, "variant": f"k={k}", "trainable": trainable, "gates": gates}
                    own |= {"kind": "autoencoding"} if family == "seeing" else {}
                    ends = {"value": value, "lo": 0.9 * value, "hi": 1.1 * value}
                    rows.append({**ABOUT, **own, **ends, "method": family, "metric": metric, "protocol": "cascading"})
    results.write(results.frame(rows), project / "results" / "007_something" / "t" / "results.parquet")


def made(project: Path, words: str) -> str:
    path = project / "results" / "README.md"
    path.write_text(PROSE.format(words))
    assert summary.update(project, experiment.all_experiments(project)) == [path]
    text = path.read_text()
    summary.update(project, experiment.all_experiments(project))
    assert path.read_text() == text
    assert text.startswith("# Title\n\nBefore.\n\n")
    assert text.endswith("<!-- end -->\n\nAfter.\n")
    assert "old numbers" not in text
    return text


def test_numbers_are_those_of_the_results_and_kinds_are_kept_apart(project):
    text = made(project, "points 007_something/t")
    assert "| good | k=4 | 4 | 400 | 0.250 ±0.025 | 0.250 ±0.025 | 1 | no |" in text
    assert text.index("| replacement |") < text.index("| floor |") < text.index("| good |") < text.index("| autoencoding |")
    assert text.index("| autoencoding |") < text.index("| seeing |")
    save(project, times=2.0)
    assert "| good | k=4 | 4 | 400 | 0.500 ±0.050 |" in made(project, "points 007_something/t")


def test_a_family_is_held_against_floors_and_what_is_named(project):
    text = made(project, "floors 007_something/t active_params")
    assert "| good | floor | clean | 400 to 800 | 100% | 100% | 0% | -0.3" in text
    assert "seeing" not in text
    with pytest.raises(UserError, match="no family no one in the results"):
        made(project, "floors 007_something/t active_params no one")


def test_every_experiment_has_its_results_and_verdict(project):
    text = made(project, "experiments")
    assert "| [007_something](../experiments/007_something/README.md) | t | It is so / so. |" in text
    assert "| [008_idle](../experiments/008_idle/README.md) | not yet | It is so / so. |" in text


def test_a_file_is_shown_as_it_is(project):
    (project / "results" / "007_something" / "own.csv").write_text("name,other,rate_x\na,1,1234.5\nb,2,\n")
    assert "| name | rate x |\n| --- | ---: |\n| a | 1,234 |\n\n" in made(project, "file 007_something/own.csv name rate_x name!=b")
    assert "| name | rate x |\n| --- | ---: |\n| a | 1,234 |\n\n" in made(project, "file 007_something/own.csv name rate_x name=a")
    assert "| b | – |" in made(project, "file 007_something/own.csv name rate_x")


@pytest.mark.parametrize(
    "words", ["absent", "points 007_something/absent", "points", "file 007_something/absent.csv a", "floors 007_something/t bits"]
)
def test_a_table_that_cannot_be_made_is_one_line_and_the_page_stays(project, words):
    path = project / "results" / "README.md"
    path.write_text(PROSE.format(words))
    with pytest.raises(UserError, match=r"README\.md: ") as raised:
        summary.update(project, experiment.all_experiments(project))
    assert "\n" not in str(raised.value)
    assert path.read_text() == PROSE.format(words)


def test_without_a_page_nothing_is_written(project):
    assert summary.update(project, []) == []
    assert not (project / "results" / "README.md").exists()


def test_every_table_of_the_projects_own_pages_can_be_made(tmp_path):
    """From what is committed; the pages themselves are left as they are."""
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    (tmp_path / "results").mkdir()
    for folder in (ROOT / "results").glob("0*"):
        (tmp_path / "results" / folder.name).symlink_to(folder)
    shutil.copy(ROOT / "results" / "README.md", tmp_path / "results" / "README.md")
    pages = summary.update(tmp_path, experiment.all_experiments(tmp_path))
    marks = {path.relative_to(tmp_path): path.read_text().count("<!-- table: ") for path in pages}
    assert marks[Path("results/README.md")] >= 5
    for path in pages:
        assert len(summary.MARKED.findall(path.read_text())) == marks[path.relative_to(tmp_path)]


def test_families_are_read_off_their_curves_at_one_size(project):
    runs = {f"{family}{k}": {"cost": {"train_cpu_s": k}} for family in ("good", "floor", "seeing") for k in (4, 8)}
    (project / "results" / "007_something" / "t" / "manifest.json").write_text(json.dumps({"runs": runs}))
    text = made(project, "matched 007_something/t l0_mlp 4")
    assert "| good | replacement | 0.250 ±0.025 | 0.250 ±0.025 | 0% | 1 | 6 |" in text
    assert "| good | replacement |  |  |  | 0 | 6 |" in made(project, "matched 007_something/t l0_mlp 9")


def test_tables_of_an_experiments_page_are_made_too(project):
    page = project / "experiments" / "007_something" / "README.md"
    page.write_text(page.read_text() + "\n<!-- table: points 007_something/t -->\n<!-- end -->\n")
    assert summary.update(project, experiment.all_experiments(project)) == [page]
    assert "| good | k=4 | 4 | 400 | 0.250 ±0.025 |" in page.read_text()
