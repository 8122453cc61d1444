"""Figures and tables of measurements: what is drawn where, what the caption says, what is refused."""

from __future__ import annotations

import math

import pytest
from synthetic import row

from decomp_bench import results
from decomp_bench.analysis import caption_of, measured_figures, measured_table

FAMILIES = {"alpha": ("replacement", True, 0.5), "beta": ("autoencoding", True, 0.3), "gamma": ("replacement", False, 0.2)}
GRID = {"steering": ("factor", (0.5, 1.0)), "topic_ablation": ("damage", (0.001, 0.01))}
METRICS = {
    "steering": ("steering_concept", "steering_fluency", "steering_score"),
    "topic_ablation": ("ablation_on_at_damage", "ablation_selectivity_at_damage"),
}


def rows(name: str, seed: int = 0, **own):
    """A measurement's rows: every family above its random control, a baseline, and a concept that was left out."""
    key, grid = GRID[name]
    gain = "steering_gain" if name == "steering" else "ablation_gain"
    overs = ("concepts", "prompts" if name == "steering" else "documents")
    for family, (kind, trainable, value) in {**FAMILIES, "difference in means": ("baseline", True, 0.4)}.items():
        about = {"family": family, "kind": kind, "trainable": trainable, "seed": seed, "protocol": "cascading", "gates": "self", **own}
        form = "direction" if kind == "baseline" else "write"
        for at in (*grid, "chosen") if name == "steering" else grid:
            for over in overs:
                for way, less in (("component", 0.0), ("random components", 0.1)):
                    where = results.condition(concept="all", form=form, way=way, **{key: at}, over=over)
                    for metric in METRICS[name]:
                        shown = value - less + 0.1 * (at == grid[1])
                        yield row(**about, condition=where, metric=metric, value=shown, lo=shown - 0.05, hi=shown + 0.05, n=7)
                where = results.condition(concept="all", form=form, way="component", **{key: at}, over=over)
                yield row(**about, condition=where, metric=gain, value=0.1, lo=0.05, hi=0.15, n=7)
        where = results.condition(concept="graphs", form=form, way="component", **{key: grid[0]})
        yield row(**about, condition=where, metric=METRICS[name][-1], value=value, lo=0.0, hi=1.0, n=7)
    out = {"family": "detector", "kind": "baseline", "protocol": "cascading", "gates": "self", **own}
    where = results.condition(concept="wandb", sort="topic")
    yield row(**out, condition=where, metric="steering_score", value=math.nan, lo=None, hi=None, n=3, reason="left out: its AUROC is 0.83")


def frame(name: str, *seeds: int):
    return results.frame([one for seed in seeds or (0,) for one in rows(name, seed)])


def marks(figure, kind: str) -> dict[str, tuple[float, float]]:
    """Label -> the point that is drawn."""
    found = {}
    for line in figure.axes[0].get_lines():
        which, _, label = (line.get_gid() or "").partition("/")
        if which == kind:
            found[label] = (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
    return found


@pytest.mark.parametrize("name", GRID)
def test_every_entry_has_its_line_beside_its_control(name):
    forest = next(iter(measured_figures(name, frame(name)).values()))
    selected, control = marks(forest, "selected"), marks(forest, "control")
    at = 0.0 if name == "steering" else 0.1  # the largest damage that all reach
    expected = {"alpha": 0.5, "beta (sees y)": 0.3, "gamma": 0.2, "difference in means": 0.4}
    assert {label: x for label, (x, _) in selected.items()} == pytest.approx({label: x + at for label, x in expected.items()})
    assert all(control[label][0] == pytest.approx(selected[label][0] - 0.1) for label in expected)
    order = sorted(selected, key=lambda label: selected[label][1])
    assert order == ["alpha", "beta (sees y)", "gamma", "difference in means"]  # by group; what sees y stands apart
    assert [tick.get_text() for tick in forest.axes[0].get_yticklabels()] == ["alpha", "beta", "gamma", "difference in means"]


@pytest.mark.parametrize("name", GRID)
def test_curves_go_along_the_grid(name):
    tracks = list(measured_figures(name, frame(name)).values())[1]
    lines = {line.get_gid(): list(line.get_ydata()) for line in tracks.axes[0].get_lines() if (line.get_gid() or "").startswith("selected")}
    assert lines["selected/alpha"] == pytest.approx([0.5, 0.6])
    controls = [line for line in tracks.axes[0].get_lines() if (line.get_gid() or "").startswith("control")]
    assert len(controls) == (4 if name == "topic_ablation" else 0)


@pytest.mark.parametrize("name", GRID)
def test_captions_say_on_what_under_what_and_what_is_missing(name):
    for figure in measured_figures(name, frame(name)).values():
        text = caption_of(figure)
        for part in (
            "pydocs-4l",
            "(tokens abababab)",
            "Protocol cascading, gates self",
            "1 seed",
            "Concepts: 7 (graphs)",
            "bootstrap over concepts",
        ):
            assert part in text
        assert "Left out: wandb: its AUROC is 0.83." in text
        assert figure.get_figwidth() == pytest.approx(3.3)


def test_seeds_are_averaged_and_counted():
    found = frame("steering", 0, 1)
    found.loc[(found["seed"] == 1) & (found["metric"] == "steering_score"), ["value", "lo", "hi"]] += 0.1
    forest = measured_figures("steering", found)["steering_score"]
    assert marks(forest, "selected")["alpha"][0] == pytest.approx(0.55)
    assert "t over 2 seeds" in caption_of(forest)


def test_forms_of_one_family_are_told_apart():
    found = frame("steering")
    other = found[found["family"] == "alpha"].assign(condition=lambda f: f["condition"].str.replace("form=write", "form=gate"))
    import pandas as pd

    forest = measured_figures("steering", pd.concat([found, other], ignore_index=True))["steering_score"]
    assert {"alpha, gate", "alpha, write"} <= {tick.get_text() for tick in forest.axes[0].get_yticklabels()}


def test_settings_of_a_family_share_its_colour_and_have_a_marker_each_in_all_families():
    import pandas as pd

    found = frame("topic_ablation")
    ours = found["family"].isin(["alpha", "gamma"])
    several = [found[ours].assign(variant=f"imp={value}", run_id=f"{value:032d}") for value in (10, 9)]
    tracks = list(measured_figures("topic_ablation", pd.concat([*several, found[~ours]], ignore_index=True)).values())[1]
    lines = {(line.get_gid() or "").partition("selected/")[2]: line for line in tracks.axes[0].get_lines()}
    look = {name: (lines[name].get_color(), lines[name].get_marker()) for name in lines if name}
    assert look["alpha, imp=9"][0] == look["alpha, imp=10"][0] != look["gamma, imp=9"][0] == look["gamma, imp=10"][0]
    assert look["alpha, imp=9"][1] == look["gamma, imp=9"][1] != look["alpha, imp=10"][1] == look["gamma, imp=10"][1]
    assert look["beta (sees y)"][1] not in (look["alpha, imp=9"][1], look["alpha, imp=10"][1])
    legends = {legend.get_title().get_text(): [text.get_text() for text in legend.get_texts()] for legend in tracks.legends}
    assert legends["Settings"] == ["imp=9", "imp=10"]
    assert legends["Replacement"] == ["alpha"]


@pytest.mark.parametrize("name", GRID)
def test_the_table_has_value_control_and_gain(name):
    table = {entry["family"]: entry for entry in measured_table(name, frame(name))}
    assert table["alpha"]["gain"] == "0.1 [0.05, 0.15]"
    assert float(table["alpha"]["random"]) == pytest.approx(0.4 if name == "steering" else 0.5)


def test_what_cannot_share_axes_is_refused():
    import pandas as pd

    other = frame("steering").assign(token_hash="cd" * 16)
    with pytest.raises(ValueError, match="different token_hash"):
        measured_figures("steering", pd.concat([frame("steering"), other], ignore_index=True))
    with pytest.raises(ValueError, match="no concept could be measured"):
        measured_figures("steering", frame("steering")[lambda f: f["family"] == "detector"])


def test_a_measurement_without_figures_has_none():
    assert measured_figures("probing", frame("steering")) == {}
    assert measured_table("probing", frame("steering")) == []
