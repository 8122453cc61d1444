"""Pareto figures: what is drawn, what is refused, what the caption says."""

import re
import subprocess
import sys
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from synthetic import FAMILIES, METRICS, line, point, realistic, row

from decomp_bench import results
from decomp_bench.analysis import View, caption_of, described, pareto, paretos, points, save, styles
from decomp_bench.analysis.pareto import y_scale

CLEAN = View(protocols=("clean",))


@pytest.fixture(scope="module")
def frame():
    return realistic(ks=(4, 16, 64))


@pytest.fixture(scope="module")
def figure(frame):
    return pareto(frame)


def drawn(figure, *parts):
    """Lines whose gid holds all of these parts."""
    return [line for axes in figure.axes for line in axes.get_lines() if set(parts) <= set((line.get_gid() or "").split("/"))]


def curve(figure, *parts):
    """The one line, not its markers, that these parts name."""
    found = [line for line in drawn(figure, *parts) if line.get_linestyle() != "None"]
    assert len(found) == 1
    return found[0]


def small(**values):
    return line("a", (100, 200, 400), (0.4, 0.2, 0.1), **values)


def test_one_panel_per_protocol_on_shared_axes(figure):
    assert [axes.get_title() for axes in figure.axes] == ["protocol: cascading", "protocol: clean", "protocol: single"]
    assert len({(axes.get_xlim(), axes.get_ylim()) for axes in figure.axes}) == 1
    assert {axes.get_xscale() for axes in figure.axes} == {"log"}
    assert figure.get_figwidth() == 7.0


def test_trained_is_solid_and_sweeps_and_floors_are_dashed(figure):
    assert curve(figure, "cascading", "clean", "sae", "trained").get_linestyle() == "-"
    assert curve(figure, "cascading", "clean", "sae", "inference").get_linestyle() == "--"
    floor = curve(figure, "cascading", "clean", "neurons", "floor")
    assert floor.get_linestyle() == "--"
    red, green, blue = matplotlib.colors.to_rgb(floor.get_color())
    assert red == green == blue
    assert floor.get_linewidth() < curve(figure, "cascading", "clean", "sae", "trained").get_linewidth()


def test_sweeps_are_of_one_checkpoint_of_each_family_unless_all_are_wanted(frame):
    def sweeps(option):
        figure = pareto(frame[frame["family"] == "sae"], CLEAN, sweeps=option)
        return {line.get_gid() for line in drawn(figure, "clean", "sae", "inference") if line.get_linestyle() != "None"}

    assert sweeps("none") == set()
    assert sweeps("middle") == {"clean/clean/sae/autoencoding/inference/k=16"}
    assert len(sweeps("all")) == 3
    with pytest.raises(ValueError, match="choose middle, all, none"):
        pareto(frame, CLEAN, sweeps="some")


def test_unconverged_points_are_hollow(figure):
    own = drawn(figure, "clean", "spd_init=random", "trained")
    hollow = [line for line in own if line.get_gid().endswith("/unconverged") and line.axes.get_title().endswith("clean")]
    filled = [line for line in own if line.get_gid().endswith("/converged") and line.axes.get_title().endswith("clean")]
    assert [len(line.get_xdata()) for line in (*hollow, *filled)] == [1, 2]
    assert to_hex(hollow[0].get_markerfacecolor()) == "#ffffff"
    assert to_hex(filled[0].get_markerfacecolor()) != "#ffffff"
    assert not drawn(figure, "sae", "unconverged")
    assert "hollow: a run had not converged" in caption_of(figure)


def test_gates_share_a_panel_and_are_drawn_once_where_they_agree(figure):
    clean, own = (curve(figure, "cascading", gates, "transcoder", "trained") for gates in ("clean", "self"))
    assert clean.axes is own.axes
    assert clean.get_color() != own.get_color()
    assert clean.get_zorder() > own.get_zorder()
    assert not drawn(figure, "self", "sae")
    assert "equal for both gates are drawn once" in caption_of(figure)


def test_intervals_are_drawn_in_both_directions(figure):
    bars = {collection.get_gid() for axes in figure.axes for collection in axes.collections}
    assert {"cascading/clean/sae/autoencoding/trained/interval-y", "cascading/clean/sae/autoencoding/trained/interval-x"} <= bars


def test_one_seed_has_its_document_interval_and_several_the_wider_one():
    alone = points(results.frame(small(protocol="clean")), CLEAN).data
    assert alone[["y_lo", "y_hi"]].to_numpy() == pytest.approx(np.outer([0.4, 0.2, 0.1], [0.95, 1.05]))
    rows = [one for seed, value in enumerate((0.1, 0.2, 0.3)) for one in point(100, value, seed=seed, run_id=f"r{seed}")]
    seeds = points(results.frame(rows), CLEAN).data.iloc[0]
    assert (seeds["y"], seeds["y_hi"] - seeds["y"]) == pytest.approx((0.2, 4.3027 * 0.1 / 3**0.5))
    assert (seeds["x_lo"], seeds["x_hi"]) == pytest.approx((95, 105))  # no variation over seeds, so the documents' interval stays


def test_autoencoding_has_its_own_group_label_and_marker(frame, figure):
    looks = styles(frame)
    assert looks["sae", "autoencoding"].label == "sae (sees y)"
    titles = {legend.get_title().get_text(): [text.get_text() for text in legend.get_texts()] for legend in figure.legends}
    assert "sae (sees y)" in next(labels for title, labels in titles.items() if title.startswith("Autoencoding"))
    assert not any("sees y" in label for label in next(labels for title, labels in titles.items() if title.startswith("Replacement")))
    markers = {kind: {look.marker for (_, own), look in looks.items() if own == kind} for kind in ("replacement", "autoencoding")}
    assert not markers["replacement"] & markers["autoencoding"]


def test_styles_depend_on_the_sorted_families_only(frame):
    shuffled = frame.sample(frac=1.0, random_state=1)
    assert styles(frame) == styles(shuffled)
    trainable = [look for (family, _), look in styles(frame).items() if FAMILIES[family][3]]
    assert len({look.colour for look in trainable}) == len(trainable)


def shown_ticks(axis):
    low, high = axis.get_view_interval()
    return [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


def test_nothing_is_smaller_than_six_points_or_outside_the_figure(frame, figure):
    for one in (figure, pareto(frame, View(y="fvu", protocols=("cascading",)))):
        one.draw_without_rendering()
        width, height = one.get_size_inches() * one.dpi
        texts = [*one.texts, *(text for legend in one.legends for text in legend.get_texts())]
        for axes in one.axes:
            texts += [axes.xaxis.label, axes.yaxis.label, axes.title, *shown_ticks(axes.xaxis), *shown_ticks(axes.yaxis)]
        for text in (text for text in texts if text.get_text()):
            box = text.get_window_extent()
            assert text.get_fontsize() >= 6
            assert box.x0 >= 0
            assert box.x1 <= width
            assert box.y0 >= 0
            assert box.y1 <= height


def test_panels_legends_and_caption_do_not_overlap(frame):
    figure = pareto(frame, View(protocols=("cascading",)))
    figure.draw_without_rendering()
    boxes = [figure.axes[0].get_tightbbox(), *(legend.get_window_extent() for legend in figure.legends)]
    boxes.append(next(text for text in figure.texts if text.get_gid() == "caption").get_window_extent())
    for above, below in pairwise(boxes):
        assert above.y0 >= below.y1
    assert figure.get_figwidth() == 3.3


def test_the_caption_is_written_from_the_rows(figure):
    caption = caption_of(figure)
    for part in ("pydocs-4l", "3f3f3f3f", "abababab", "312,448 scored tokens", "positions 1:", "cascading, clean, single", "mask binary"):
        assert part in caption
    for part in (
        "gates clean and self",
        "Cross-entropy increase",
        "metric versions ce_delta 1, active_params 1",
        "t over 3 seeds (descriptive)",
    ):
        assert part in caption
    other = pareto(results.frame(small(target="hf:x", n=1234, positions="0:", mask="soft")), View(protocols=("clean",), mask="soft"))
    for part in ("hf:x", "1,234 scored", "positions 0:", "mask soft", "gates clean;", "1 seed"):
        assert part in caption_of(other)


def test_what_cannot_be_drawn_is_counted_in_the_caption():
    rows = small() + point(50, float("nan"), family="a", variant="k=9", run_id="n") + point(0.0, 1.0, family="a", variant="k=0", run_id="z")
    rows += point(60, 1.0, family="a", variant="k=7", run_id="i", applicable="no", reason="no such gates")
    rows += [row(family="a", variant="k=5", run_id="y", value=0.3)]
    rows += point(70, float("nan"), family="lost", run_id="lost")
    figure = pareto(results.frame(rows), CLEAN)
    caption = caption_of(figure)
    assert "1 not applicable, 1 measured on one axis only, 2 not finite, 1 nothing active (x of 0)" in caption
    assert "Not drawn at all: lost." in caption
    assert len(curve(figure, "a", "trained").get_xdata()) == 3


@pytest.mark.parametrize(
    ("view", "fix"),
    [
        (View(), "no results with protocol 'cascading', 'single' (there are: clean): evaluate the runs under it or pass another protocols"),
        (View(protocols=("clean",), x="bits"), "no results with metric 'bits'"),
        (View(protocols=("clean",), split="validation"), "no results with split 'validation' (there are: test)"),
        (View(protocols=("clean",), gates=("self",)), "no results with gates self"),
        (View(protocols=("clean",), x="ce_delta"), "x and y are both ce_delta"),
    ],
)
def test_missing_rows_are_one_line_that_names_the_fix(view, fix):
    with pytest.raises(ValueError, match=r".+") as error:
        pareto(results.frame(small()), view)
    assert fix in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("column", ["token_hash", "target_hash", "target", "dataset", "positions", "layers"])
def test_rows_that_cannot_be_compared_are_refused(column):
    rows = small() + line("b", (100, 200), (0.4, 0.3), **{column: "another"})
    with pytest.raises(ValueError, match=rf"rows of different {column}.*keep one, such as frame\[frame.{column} == ") as error:
        pareto(results.frame(rows), CLEAN)
    assert "\n" not in str(error.value)


def test_versions_and_conflicting_evaluations_are_refused_and_repetitions_are_not():
    with pytest.raises(ValueError, match="different metric_version of active_params"):
        pareto(results.frame(small() + line("b", (100,), (0.4,), metric_version=2)), CLEAN)
    with pytest.raises(ValueError, match="two different values of active_params for run a-0"):
        pareto(results.frame(small() + line("a", (101,), (0.4,))), CLEAN)
    assert points(results.frame(small() * 2), CLEAN).data.equals(points(results.frame(small()), CLEAN).data)


def test_the_y_axis_is_honest_about_values_that_are_not_positive():
    assert y_scale(*np.array([[0.01, 1.0]] * 3)).name == "log"
    assert y_scale(*np.array([[0.5, 1.0]] * 3)).name == "linear"
    scale = y_scale(np.array([-0.003, 0.01, 1.0]), np.array([-0.004, 0.0, 0.9]), np.array([0.0, 0.02, 1.1]))
    assert (scale.name, scale.linear) == ("symlog", 0.005)
    assert "linear between -0.005 and 0.005" in scale.note
    assert "run out" in y_scale(np.array([0.5, 1.0]), np.array([-3.0, 0.9]), np.array([4.0, 1.1])).note


def test_files_are_the_same_bytes_whatever_the_users_settings(tmp_path):
    frame = results.frame(small() + line("b", (100, 200), (0.5, 0.3), kind="autoencoding"))
    first = [path.read_bytes() for path in save(pareto(frame, CLEAN), tmp_path / "one.v1")]
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.hashsalt": "other", "lines.linewidth": 9}):
        second = save(pareto(frame, CLEAN), tmp_path / "sub" / "two.v1")
    assert first == [path.read_bytes() for path in second]
    assert [path.name for path in second] == ["two.v1.png", "two.v1.svg", "two.v1.pdf"]
    assert len(list(tmp_path.rglob("*"))) == 7  # six files and a folder: nothing temporary stays
    assert b"Cross-entropy increase (nats/token)" in first[1]
    assert len(names := re.findall(rb' id="([^"]+)"', first[1])) == len(set(names))
    assert b"<text" in first[1]


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    figure = pareto(results.frame(small()), CLEAN)
    before = [path.read_bytes() for path in save(figure, tmp_path / "one")]
    write, calls = type(figure).savefig, []

    def broken(self, path, **options):
        calls.append(path)
        if len(calls) == 2:
            raise OSError("disk full")
        write(self, path, **options)

    monkeypatch.setattr(type(figure), "savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        save(figure, tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.pdf", "one.png", "one.svg"]
    assert before == [(tmp_path / f"one.{kind}").read_bytes() for kind in ("png", "svg", "pdf")]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_frame_read_from_a_file_gives_the_same_points(tmp_path, suffix):
    frame = results.frame(small(seed=None) + line("f", (100, 300), (2.0, 1.0), trainable=False, converged="unknown"))
    results.write(frame, tmp_path / f"r{suffix}")
    assert points(results.read(tmp_path / f"r{suffix}"), CLEAN).data.equals(points(frame, CLEAN).data)


def test_a_floor_that_its_sweep_meets_again_is_one_point():
    rows = point(100, 0.5, trainable=False) + point(100, 0.5000001, trainable=False, curve="inference")
    rows += point(200, 0.3, trainable=False, curve="inference", variant="k=16")
    found = points(results.frame(rows), CLEAN).data
    assert list(found["curve"]) == ["floor", "floor"]
    assert list(found["y"]) == [0.5, 0.3]


def test_a_catalogue_names_axes_and_definitions():
    catalogue = [
        {"key": "ce_delta", "title": "Worse", "unit": "nats", "formula": "a - b"},
        {"key": "active_params", "title": "Size", "unit": "", "formula": "sum"},
    ]
    figure = pareto(results.frame(small()), CLEAN, measures=described(catalogue))
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("Size", "Worse (nats)")
    assert caption_of(figure).startswith("Worse (nats): a - b; against Size: sum (")


def test_every_pair_of_axes_and_the_narrow_versions():
    rows = [row(metric=metric, value=value) for value, metric in enumerate(METRICS, 1)]
    rows += [one | {"protocol": "single"} for one in rows]
    frame = results.frame(rows)
    figures = paretos(frame, View(protocols=("clean", "single")), xs=("l0_mlp", "bits"), ys=("kl",), narrow=("single",))
    assert list(figures) == ["kl_by_l0_mlp", "kl_by_l0_mlp_single", "kl_by_bits", "kl_by_bits_single"]
    assert figures["kl_by_bits_single"].get_figwidth() == 3.3


def test_importing_the_analysis_imports_no_torch():
    code = "import sys, decomp_bench.analysis; sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
