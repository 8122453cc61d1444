"""A run's page, for every registered method on a language model and on a toy, and drawn again without either."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from decomp_bench import launch, registry, runs, targets
from decomp_bench.config import RunConfig, parse
from decomp_bench.errors import UserError
from decomp_bench.report import components
from decomp_bench.report.components import Settings
from decomp_bench.report.figures import curve
from decomp_bench.report.lens import residual_writes, through_output
from decomp_bench.report.run import context, run_page
from decomp_bench.report.survey import choose, histogram
from tests.report.reading import sound

SMALL = Settings(tokens=300, shown=12, contexts=3, words=4)
EVAL = {"tokens": 300, "bootstrap": 5, "sweep": False, "protocols": ["clean"], "gates": ["clean"]}


@pytest.fixture(scope="module", params=["lm", pytest.param("toy", marks=pytest.mark.slow)])
def made(request, tmp_path_factory, lm, toy):
    """The kind of target, and a scored run of every method that applies to it, by method; trained for a few steps in one place."""
    target, source = {"lm": lm, "toy": toy}[request.param]
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DECOMP_BENCH_RUNS", str(folder))
        patch.setattr(targets, "load", lambda uri, _device="cpu": {one.uri: one for one, _ in (lm, toy)}[uri])
        wanted = []
        for name in registry.names():
            kind = registry.method(name)
            chosen = dict(getattr(kind, "presets", {}).get("smoke", {}))
            chosen |= {"steps": 3, "batch": 4 if kind.trains_on == "sequences" else 64} if kind.trainable else {}
            config = {"method": name, "target": target.uri, "method_config": chosen, "eval": EVAL, "data": {"source": source.config.source}}
            if kind.skip(target, target.layer_tuple("all")) is None:
                wanted.append(parse(RunConfig, config, name))
        found = {run.config.method: run for run in launch.execute(wanted)}
        yield request.param, found


@pytest.fixture
def run(made, request):
    kind, found = made
    if request.param not in found:
        pytest.skip("the method does not apply")
    return kind, found[request.param]


@pytest.mark.parametrize("run", registry.names(), indirect=True)
def test_every_method_has_a_page_that_is_drawn_again_without_the_model(run, monkeypatch):
    kind, done = run
    first = run_page(done, SMALL)
    page, text = sound(first), first.read_text()
    found = json.loads((done.path / components.FILE).read_text())
    assert found["tokens"] >= 300
    assert all(0 < one["density"] <= 1 for site in found["sites"] for one in site["components"])
    assert sum(len(site["components"]) for site in found["sites"]) == text.count('<article class="component">') > 0
    assert f"{found['tokens']}" in text
    assert "lowers" in text
    assert len([1 for tag, _ in page.tags if tag == "article"]) <= max(SMALL.shown, 4 * len(found["sites"]))
    if kind == "toy":
        assert "x0 = " in text or "x1 = " in text
    else:
        tokens = {token for site in found["sites"] for one in site["components"] for at in one["contexts"] for token in at["tokens"]}
        assert {"a", "e", " "} <= tokens
    before = text
    monkeypatch.setattr(targets, "load", lambda *_: pytest.fail("the model was loaded again"))
    assert run_page(done, SMALL).read_text() == before
    assert run_page(done, None).read_text() == before


def one_of(made, wanted: str):
    kind, found = made
    if kind != wanted:
        pytest.skip(f"on {wanted} only")
    return found


def test_densities_are_the_scored_sparsity_and_contexts_hold_the_codes(made, lm):
    from decomp_bench.data.streams import with_clean
    from decomp_bench.replacement import clean_codes

    done = one_of(made, "lm")["transcoder"]
    found = components.compute(done, Settings(tokens=300, shown=10_000, contexts=2))
    frame = done.results()
    for site in found["sites"]:
        scored = frame[(frame["metric"] == "l0_module") & (frame["site"] == site["name"]) & (frame["curve"] == "trained")]["value"]
        assert sum(one["density"] for one in site["components"]) == pytest.approx(float(scored.iloc[0]), rel=1e-3)
        assert sum(site["densities"]) == site["alive"] == len(site["components"])
    target, source = lm
    decomposer = done.load(target)
    rows = source.rows("test")
    batch = with_clean(source, source.batch("test", np.arange(found["rows"])), decomposer.points())
    with torch.no_grad():
        codes = clean_codes(decomposer, batch)
    mask = (torch.arange(1, int(batch.length.max()))[None] < batch.length[:, None])[..., None]
    site = found["sites"][1]
    value = codes[site["name"]].value * mask
    for one in site["components"]:
        own = value[..., one["index"]]
        assert one["peak"] == pytest.approx(float(own.abs().max()), rel=1e-3)
        first = one["contexts"][0]
        row, place = divmod(int(own.abs().argmax()), own.shape[1])
        assert first["value"] == pytest.approx(float(own[row, place]), rel=1e-3)
        at = first["at"]
        around = own[row, place - min(at - 1, place) : place + len(first["values"]) - at] if at else own[row, : len(first["values"])]
        assert first["values"][-len(around) :] == pytest.approx(around.tolist(), rel=1e-3, abs=1e-6)
        piece = lm[0].tokenizer.decode([int(rows.tokens[row, place + 1])])
        assert first["tokens"][at] == piece


def test_output_words_are_the_logit_lens(made, lm):
    target, _ = lm
    decomposer = one_of(made, "lm")["transcoder"].load(target)
    site = decomposer.sites[0]
    writes = residual_writes(decomposer, site)
    model = target.module
    by_hand = (writes * model.model.norm.weight) @ model.lm_head.weight.T
    found = through_output(target, writes, 0)
    assert found.shape == by_hand.shape
    assert torch.nn.functional.cosine_similarity(found, by_hand).min() > 1 - 1e-5
    assert torch.equal(found.topk(4).indices, by_hand.topk(4).indices)


def test_a_toys_outputs_are_its_own_map_of_the_write_vectors(made, toy):
    target, _ = toy
    decomposer = one_of(made, "toy")["transcoder"].load(target)
    writes = residual_writes(decomposer, decomposer.sites[0])
    assert torch.allclose(through_output(target, writes, 20), writes @ target.module.embed.T, atol=1e-5)


def test_maps_that_do_not_write_into_the_stream_have_no_output_words(made, lm):
    decomposer = one_of(made, "lm")["spd"].load(lm[0])
    found = {site.name: residual_writes(decomposer, site) is not None for site in decomposer.sites}
    assert found["0.mlp.down"]
    assert not found["0.mlp.up"]


def test_other_weights_or_settings_are_looked_at_anew(made, tmp_path):
    _, found = made
    done = found["transcoder"]
    copy = runs.Run(shutil.copytree(done.path, tmp_path / done.id))
    (copy.path / components.FILE).unlink(missing_ok=True)
    assert components.stored(copy) is None
    assert "Not computed." in run_page(copy, None).read_text()
    components.compute(copy, SMALL)
    assert components.stored(copy, SMALL) is not None
    assert components.stored(copy, Settings(tokens=301)) is None
    with (copy.checkpoint / "decomposer.safetensors").open("ab") as file:
        file.write(b" ")
    assert components.stored(copy) is None
    (copy.path / components.FILE).write_text("{")
    assert components.stored(copy) is None


def test_hostile_tokens_and_names_are_escaped(made, tmp_path):
    _, found = made
    done = found["transcoder"]
    copy = runs.Run(shutil.copytree(done.path, tmp_path / done.id))
    hostile = "</b><script>alert(1)</script>\"'&"
    stored = components.stored(copy) or components.compute(copy, SMALL)
    one = stored["sites"][0]["components"][0]
    one["contexts"] = [{"from": hostile, "tokens": [hostile, hostile], "values": [0.0, one["peak"]], "at": 1, "value": one["peak"]}]
    one["up"] = [(hostile, 1.0)]
    stored["sites"][0]["name"] = hostile
    (copy.path / components.FILE).write_text(json.dumps(stored))
    path = run_page(copy, None)
    sound(path)
    text = path.read_text()
    assert "alert(1)" in text
    assert hostile not in text
    assert "<script>alert" not in text
    assert text.count("<script>") == 1


def test_a_run_without_results_names_the_command_that_makes_them(made, tmp_path):
    _, found = made
    done = found["transcoder"]
    copy = runs.Run(shutil.copytree(done.path, tmp_path / done.id))
    (copy.path / "results.parquet").unlink()
    with pytest.raises(UserError, match=f"make them: decomp-bench eval {copy.id}"):
        run_page(copy, SMALL)


def test_a_context_joins_what_is_off_and_shades_what_is_on():
    given = {"from": "a", "tokens": ["a", "b", "\n", "d", "e", "f"], "values": [0, 0, 2.0, -0.1, 0, 0], "at": 2, "value": 2.0}
    pieces = context(given, 2.0)["pieces"]
    assert [(one.text, one.shade) for one in pieces] == [("ab", ""), ("↵", "u9 peak"), ("d", "d1"), ("ef", "")]


def test_components_shown_are_spread_over_the_densities_of_those_that_fire():
    active = torch.cat([torch.zeros(50, dtype=torch.long), torch.arange(1, 101)])
    chosen = choose(active, 10)
    assert active[chosen].tolist() == [95, 85, 75, 65, 55, 45, 35, 25, 15, 5]
    assert sorted(active[choose(active, 200)].tolist()) == list(range(1, 101))
    assert len(choose(torch.zeros(5, dtype=torch.long), 3)) == 0


def test_the_histogram_counts_what_fires():
    found = histogram(np.array([0.0, 1e-9, 0.5, 0.999, 1.0, 0.011]))
    assert sum(found) == 5
    assert found[0] == 1
    assert found[-1] == 3
    assert found[-6] == 1


def test_a_curve_ends_where_its_values_do():
    panel = curve("loss", [20, 40, 60], [4.0, 1.0, 0.01])
    assert panel is not None
    assert panel.path.startswith("M0.0 0.0L")
    assert panel.path.endswith("240.0 120.0")
    assert panel.title == "loss (logarithmic)"
    assert "4 at step 20, 0.0100 at step 60" in panel.alt
    assert curve("loss", [20], [4.0]) is None
    flat = curve("l0", [1, 2], [8.0, 8.0])
    assert flat is not None
    assert "nan" not in flat.path
