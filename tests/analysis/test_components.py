"""Figures and tables of what is measured over components and over layers."""

from __future__ import annotations

import math

import pytest
from synthetic import row

from decomp_bench import results
from decomp_bench.analysis import caption_of, measured_figures, measured_table

FAMILIES = {"alpha": ("replacement", 0.8), "beta": ("autoencoding", 0.6)}
WAYS = {"component": 0.0, "random directions": 0.1, "shifted": 0.3}
PROXIES = ("rule_auroc", "intruder_words", "purity_token")


def mean(metric, each, label, value, over, **about):
    where = results.condition(**{each: "all"}, **label, over=over)
    return row(**about, condition=where, metric=metric, value=value, lo=value - 0.05, hi=value + 0.05, n=9)


def proxies():
    for family, (kind, value) in FAMILIES.items():
        about = {"family": family, "kind": kind, "trainable": True, "seed": 0, "protocol": "clean", "gates": "clean"}
        for form in ("mlp.up", "mlp.down") if family == "alpha" else ("mlp.out",):
            for way, less in WAYS.items():
                for metric in PROXIES:
                    for at in ("all", 0.25, 0.75) if metric == "rule_auroc" and way != "shifted" else ("all",):
                        shown = value - less + (0.1 if at == 0.75 else 0)
                        yield mean(metric, "component", {"form": form, "way": way, "at": at}, shown, "components", **about)
            label = {"form": form, "way": "component", "at": "all"}
            yield mean("rule_auroc_gain", "component", label, 0.1, "components", **about)
            where = results.condition(component="0/3", **label, density=0.1)
            yield row(**about, condition=where, metric="rule_auroc", value=value, lo=None, hi=None, n=1)


def jacobians():
    for family, (kind, value) in FAMILIES.items():
        about = {"family": family, "kind": kind, "trainable": True, "seed": 0, "protocol": "single", "gates": "clean"}
        label = {"form": "gates held", "at": "all"}
        if kind == "autoencoding":
            where = results.condition(mlp="all", **label, way="component", over="documents")
            yield row(**about, condition=where, metric="jacobian_cosine", value=math.nan, lo=None, hi=None, n=0, reason="it is given y")
            continue
        for way, less in (("component", 0.0), ("random positions", 0.2), ("turned", 0.8)):
            yield mean("jacobian_cosine", "mlp", {**label, "way": way}, value - less, "documents", **about)
            where = results.condition(mlp="0", **label, way=way, over="documents")
            yield row(**about, condition=where, metric="jacobian_cosine", value=0.123, lo=0.1, hi=0.2, n=9)
        yield mean("jacobian_gain", "mlp", {**label, "way": "component"}, 0.2, "documents", **about)


def marks(figure, kind):
    lines = [line for line in figure.axes[0].get_lines() if (line.get_gid() or "").startswith(f"{kind}/")]
    return sorted(float(line.get_xdata()[0]) for line in lines)


def test_every_place_of_a_family_has_its_line_beside_its_random_directions_and_shifted_activity_has_none():
    figures = measured_figures("interpretability", results.frame(proxies()))
    assert set(figures) == {*PROXIES, "rule_auroc_by_size"}
    for name in PROXIES:
        assert marks(figures[name], "selected") == pytest.approx([0.6, 0.8, 0.8])
        assert marks(figures[name], "control") == pytest.approx([0.5, 0.7, 0.7])
    labels = {tick.get_text() for tick in figures["rule_auroc"].axes[0].get_yticklabels()}
    assert labels == {"alpha, mlp.up", "alpha, mlp.down", "beta"}
    zero = [line.get_xdata()[0] for line in figures["intruder_words"].axes[0].get_lines() if line.get_gid() == "zero"]
    assert zero == [0.2]
    text = caption_of(figures["rule_auroc"])
    for part in ("Proxies", "(tokens abababab)", "95% bootstrap over components", "At most 9 components", "1 seed"):
        assert part in text
    legends = " ".join(text.get_text() for legend in figures["rule_auroc"].legends for text in legend.get_texts())
    assert "random directions as dense" in legends
    assert "concepts" not in legends


def test_along_sizes_there_are_the_bands_alone():
    figure = measured_figures("interpretability", results.frame(proxies()))["rule_auroc_by_size"]
    lines = [line for line in figure.axes[0].get_lines() if (line.get_gid() or "").startswith("selected/beta")]
    assert list(lines[0].get_xdata()) == [0.25, 0.75]
    assert list(lines[0].get_ydata()) == pytest.approx([0.6, 0.7])


def test_the_jacobians_mean_over_layers_is_drawn_and_who_has_none_is_named():
    (figure,) = measured_figures("jacobian", results.frame(jacobians())).values()
    assert marks(figure, "selected") == pytest.approx([0.8])
    assert marks(figure, "control") == pytest.approx([0.6])
    assert "Left out: beta: it is given y." in caption_of(figure)


def test_tables_have_value_control_and_gain():
    (alpha, _, beta) = measured_table("interpretability", results.frame(proxies()))
    assert (alpha["family"], alpha["rule_auroc"], alpha["random"], alpha["gain"]) == (
        "alpha",
        "0.8 [0.75, 0.85]",
        "0.7",
        "0.1 [0.05, 0.15]",
    )
    assert beta["form"] == "mlp.out"
    (only,) = measured_table("jacobian", results.frame(jacobians()))
    assert (only["family"], only["random"], only["gain"]) == ("alpha", "0.6", "0.2 [0.15, 0.25]")
