"""What is drawn of a run on a toy: planted truth shows as the identity, on the target's own vectors, and the page carries the figures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from analysis import toy_figures
from analysis.toys import order
from decomp_bench import launch, targets
from decomp_bench.config import MethodConfig, RunConfig, parse
from decomp_bench.report import components
from decomp_bench.report.components import Settings
from decomp_bench.report.run import run_page
from decomp_bench.report.toy import look
from tests.planted import Basis, make
from tests.report.reading import sound
from tests.targets.test_toys import recorded
from tests.test_recovery import Planted


class Shuffled(Planted):
    """The planted components in another order, each turned and of another split of its length."""

    def build(self, generator):
        super().build(generator)
        for name, (read, write) in self.parts.items():
            self.parts[name] = -2 * read.flip(0), -write.flip(0) / 2

    def _on(self, site, truth, x):
        return super()._on(site, truth, x).flip(1)


@pytest.fixture(scope="module")
def planted():
    target = recorded(4)
    return json.loads(json.dumps(look(Shuffled(MethodConfig(steps=0), target, (0,))))), target


def test_planted_truth_is_the_identity_on_the_targets_columns(planted):
    found, target = planted
    for site in found["sites"]:
        importance = np.array(site["importance"])
        assert (importance != np.eye(5)).any()
        assert (importance[:, order(importance)] == np.eye(5)).all()
        plane = {name: np.array(site["plane"][name]) for name in ("target", "components")}
        assert plane["components"] == pytest.approx(plane["target"][::-1], rel=1e-3)
    weight = target.weight("0.mlp.up").numpy()
    assert np.array(found["sites"][0]["plane"]["target"]) == pytest.approx(weight.T, rel=1e-3)
    assert found["sites"][0]["of"] == ["features", "dimensions"]
    assert found["sites"][1]["of"] == ["dimensions", "features"]


def test_the_order_puts_partners_on_the_diagonal_and_the_rest_by_their_sums():
    importance = np.array([[0.1, 0, 0.9, 0, 0.2], [0.8, 0, 0.1, 0, 0.3]])
    assert order(importance).tolist() == [2, 0, 4, 1, 3]
    assert sorted(order(np.eye(6)[:, :3])) == [0, 1, 2]
    assert order(importance, dense=True).tolist() == [2, 0, 4, 1, 3]
    shared = np.array([[0.0, 0.9, 0.2], [0.1, 1.0, 0.0]])
    assert order(shared).tolist() == [2, 1, 0]
    assert order(shared, dense=True).tolist() == [1, 2, 0]


def test_components_that_features_share_come_first(planted):
    found, _ = planted
    sites = [{**site, "dense": bool(place)} for place, site in enumerate(found["sites"])]
    (caption,) = [text.get_text() for text in toy_figures({**found, "sites": sites})["importances"].texts if text.get_gid() == "caption"]
    assert "Those of 0.mlp.down are in the order of their sums" in " ".join(caption.split())


def test_figures_fit_a_column_and_say_what_they_show(planted):
    found, _ = planted
    made = toy_figures(found)
    assert set(made) == {"importances", "vectors_1", "vectors_2", "hidden_plane"}
    for figure in made.values():
        assert figure.get_figwidth() == pytest.approx(3.3)
        (caption,) = [text.get_text() for text in figure.texts if text.get_gid() == "caption"]
        assert "toy:tms_5-2" in " ".join(caption.split())
        texts = [axes.title for axes in figure.axes] + [label for axes in figure.axes for label in axes.get_xticklabels()]
        assert min(text.get_fontsize() for text in texts) >= 6
    neurons = [{"layer": 0, "target": [0.0, 1.0], "components": [0.1, 0.9], "correlation": 1.0}]
    assert set(toy_figures({**found, "sites": [], "by_neuron": neurons})) == {"neuron_contributions"}


def test_a_target_without_known_features_has_none(lm, toy):
    for target, _ in (lm, toy):
        assert look(make(Basis, target)) is None


def test_the_page_of_a_toy_run_has_the_figures_and_is_drawn_again_without_the_model(tmp_path, monkeypatch):
    target = recorded(4)
    monkeypatch.setenv("DECOMP_BENCH_RUNS", str(tmp_path))
    monkeypatch.setattr(targets, "load", lambda *_: target)
    config = {"components": 6, "init": "random", "gate": "scalar", "steps": 3, "batch": 64, "warmup_faith": 5}
    scored = {"tokens": 300, "bootstrap": 5, "sweep": False, "protocols": ["clean"], "gates": ["clean"]}
    (run,) = launch.execute([parse(RunConfig, {"method": "spd", "target": target.uri, "method_config": config, "eval": scored}, "test")])
    page = run_page(run, Settings(tokens=300, shown=4, contexts=2))
    pictures = [attributes for tag, attributes in sound(page).tags if tag == "img"]
    assert len(pictures) == 4
    assert all(str(one["src"]).startswith("data:image/svg+xml") for one in pictures)
    assert {path.name for path in (run.path / "figures").glob("imp*")} == {"importances.pdf", "importances.png", "importances.svg"}
    shown = json.loads((run.path / components.FILE).read_text())["toy"]["sites"][0]
    assert torch.tensor(shown["importance"]).shape == (5, 6)
    before = page.read_text()
    monkeypatch.setattr(targets, "load", lambda *_: pytest.fail("the model was loaded again"))
    assert run_page(run, None).read_text() == before
