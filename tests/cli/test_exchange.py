"""Import and export as typed: an imported run is scored, shown and compared like a trained one, and never trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from decomp_bench import runs
from tests.interop.test_formats import random

WIDTH, N, K = 16, 12, 4
SMALL = ("--set", "eval.tokens=300", "--set", "eval.bootstrap=20", "--set", "eval.sweep=false")


def hookpoint(folder: Path, k: int = K, seed: int = 0, **config) -> Path:
    """A sparsify transcoder."""
    folder.mkdir(parents=True)
    weights = {"encoder.weight": random(N, WIDTH, seed=seed), "encoder.bias": random(N, seed=1)}
    save_file({**weights, "W_dec": 0.1 * random(N, WIDTH, seed=2), "b_dec": random(WIDTH, seed=3)}, folder / "sae.safetensors")
    known = {"activation": "topk", "num_latents": N, "k": k, "skip_connection": False, "transcode": True, "d_in": WIDTH}
    (folder / "cfg.json").write_text(json.dumps({**known, **config}))
    return folder


@pytest.fixture
def model(tiny_arcee) -> tuple[str, ...]:
    return ("--target", f"hf:{tiny_arcee}", "--set", f"data.source={tiny_arcee / 'text.jsonl'}", *SMALL)


@pytest.fixture
def imported(bench, tmp_path, model):
    """A run of two layers, from a folder for each."""
    sources = [str(hookpoint(tmp_path / "theirs" / f"layers.{layer}.mlp", seed=layer)) for layer in (0, 2)]
    made = bench("import", *sources, "--from", "sparsify", *model)
    assert made.code == 0, made.err
    assert "next: decomp-bench eval" in made.out
    (run,) = runs.all_runs()
    return run


def test_an_imported_run_is_scored_shown_compared_and_audited(bench, imported, tmp_path, model):
    manifest = imported.manifest
    assert (imported.status, imported.config.layers, manifest["converged"]) == ("done", (0, 2), "unknown")
    assert manifest["imported"]["from"] == "sparsify"
    assert len(manifest["imported"]["files"]) == 4
    assert all(len(value) == 64 for value in manifest["imported"]["files"].values())
    assert bench("eval", imported.id).code == 0
    results = imported.results()
    assert set(results["converged"]) == {"unknown"}
    assert set(results["family"]) == {"transcoder topk (sparsify)"}
    assert set(results["variant"]) == {f"k={K}"}
    shown = bench("show", imported.id)
    assert "transcoder topk" in shown.out
    assert f"k={K}" in shown.out
    other = bench("import", str(hookpoint(tmp_path / "other" / "layers.0.mlp", k=2)), "--from", "sparsify", *model)
    assert other.code == 0, other.err
    second = next(run for run in runs.all_runs() if run.id != imported.id)
    assert bench("eval", second.id).code == 0
    assert json.loads(bench("compare", imported.id, second.id, "--bootstrap", "20", "--json").out)
    assert "agree" in bench("audit", imported.id).out
    assert [row["status"] for row in json.loads(bench("list", "runs", "--json").out)] == ["done", "done"]


def test_an_imported_run_is_never_trained(bench, imported):
    weights = (imported.checkpoint / "decomposer.safetensors").read_bytes()
    config = str(imported.path / "config.yaml")
    assert bench("train", "--config", config).code == 0  # scores what is there
    assert imported.evaluated
    overwritten = bench("train", "--config", config, "--existing", "overwrite")
    assert (overwritten.code, "never trained" in overwritten.err) == (2, True)
    assert (imported.checkpoint / "decomposer.safetensors").read_bytes() == weights
    assert bench("eval", imported.id, "--set", "eval.tokens=200").code == 0
    adopted = next(run for run in runs.all_runs() if run.id != imported.id)
    assert adopted.manifest["imported"] == imported.manifest["imported"]
    for run in (imported, adopted):
        kept = (run.path / "config.yaml").read_text()
        run.remove()
        Path("kept.yaml").write_text(kept)
    result = bench("train", "--config", "kept.yaml")
    assert (result.code, "import its files again" in result.err) == (2, True)
    assert runs.all_runs() == []


def test_the_same_files_are_the_same_run_and_others_are_not(bench, imported, tmp_path, model):
    sources = [f"theirs/layers.{layer}.mlp" for layer in (0, 2)]
    again = bench("import", *sources, "--from", "sparsify", *model)
    assert imported.id in again.out
    file = tmp_path / "theirs" / "layers.2.mlp"
    hookpoint(tmp_path / "moved" / "layers.2.mlp", seed=9)
    (file / "sae.safetensors").write_bytes((tmp_path / "moved" / "layers.2.mlp" / "sae.safetensors").read_bytes())
    assert bench("import", *sources, "--from", "sparsify", *model).code == 0
    assert len(runs.all_runs()) == 2


def test_layers_are_named_where_files_do_not_say(bench, tmp_path, model):
    folder = str(hookpoint(tmp_path / "sae"))
    without = bench("import", folder, "--from", "sparsify", *model)
    assert (without.code, "--layers" in without.err) == (2, True)
    assert runs.all_runs() == []
    assert bench("import", folder, "--from", "sparsify", "--layers", "1", *model).code == 0
    assert runs.all_runs()[0].config.layers == (1,)


def test_thresholds_that_no_file_holds_are_calibrated_on_the_targets_text(bench, tmp_path, model):
    """An autoencoder whose threshold had not begun: k components are active on average on the target's own text."""
    folder = tmp_path / "trainer_0"
    folder.mkdir()
    W = random(N, WIDTH)
    weights = {"encoder.weight": W, "encoder.bias": torch.zeros(N), "decoder.weight": 0.1 * W.T.contiguous(), "b_dec": torch.zeros(WIDTH)}
    torch.save({**weights, "k": torch.tensor(3, dtype=torch.int), "threshold": torch.tensor(-1.0)}, folder / "ae.pt")
    config = {"dict_class": "BatchTopKSAE", "layer": 1, "submodule_name": "mlp_out", "k": 3}
    (folder / "config.json").write_text(json.dumps({"trainer": config}))
    made = bench("import", str(folder), "--from", "dictionary_learning", *model)
    assert made.code == 0, made.err
    (run,) = runs.all_runs()
    assert bench("eval", run.id).code == 0
    rows = run.results()
    (l0,) = rows[(rows["metric"] == "l0_mlp") & (rows["protocol"] == "single") & (rows["gates"] == "self") & (rows["layer"] == "all")][
        "value"
    ]
    assert l0 == pytest.approx(3, rel=0.15)


@pytest.mark.parametrize("form", ["sparsify", "circuit-tracer", "hub"])
def test_export_and_import_again_scores_the_same(bench, tmp_path, model, form):
    sources = [str(hookpoint(tmp_path / "theirs" / f"layers.{layer}.mlp", seed=layer)) for layer in range(3)]
    assert bench("import", *sources, "--from", "sparsify", *model).code == 0
    (first,) = runs.all_runs()
    assert bench("eval", first.id).code == 0
    written = bench("export", first.id, "--to", form, "--out", "out")
    assert written.code == 0, written.err
    assert all(Path(line).exists() for line in written.out.split())
    assert "there already" in bench("export", first.id, "--to", form, "--out", "out").err
    again = bench("import", "out", "--from", form, *model)
    assert again.code == 0, again.err
    second = next(run for run in runs.all_runs() if run.id != first.id)
    assert bench("eval", second.id).code == 0
    keys = ["protocol", "gates", "metric", "layer", "site", "base"]
    both = first.results().merge(second.results(), on=keys).dropna(subset=["value_x"])
    assert len(both) > 100
    assert (both["value_x"] - both["value_y"]).abs().max() < 1e-3


def test_a_published_run_has_a_card(bench, imported):
    assert bench("eval", imported.id).code == 0
    assert bench("export", imported.id, "--to", "hub", "--out", "out", "--name", "me/mine", "--dry-run").code == 0
    card = Path("out/README.md").read_text()
    assert card.startswith("---\nlibrary_name: decomp-bench")
    assert "| cascading |" in card
    assert str(Path.cwd()) not in card
    assert Path("out/checkpoint/decomposer.safetensors").read_bytes() == (imported.checkpoint / "decomposer.safetensors").read_bytes()
    refused = bench("export", imported.id, "--to", "hub", "--out", "again", "--name", "me/mine")
    assert (refused.code, "cannot upload to me/mine" in refused.err) == (2, True)


def test_results_as_saebench_json(bench, imported):
    without = bench("export", imported.id, "--to", "saebench", "--out", "out")
    assert (without.code, "has no results" in without.err) == (2, True)
    assert bench("eval", imported.id).code == 0
    assert bench("export", imported.id, "--to", "saebench", "--out", "out").code == 0
    files = sorted(Path("out/core").glob("*_eval_results.json"))
    assert len(files) == 2
    rows = imported.results()
    for file, layer in zip(files, ("0", "2"), strict=True):
        document = json.loads(file.read_text())
        assert document["eval_type_id"] == "core"
        found = document["eval_result_metrics"]
        own = rows[(rows["protocol"] == "single") & (rows["layer"] == layer) & (rows["site"] == "all") & (rows["gates"] == "self")]
        value = own.set_index("metric")["value"]
        clean = rows[(rows["metric"] == "ce_clean") & (rows["protocol"] == "single")]["value"].iloc[0]
        performance = found["model_performance_preservation"]
        assert performance["ce_loss_with_sae"] == pytest.approx(value["ce"])
        assert performance["ce_loss_without_sae"] == pytest.approx(clean)
        lost, ablated = (performance[f"ce_loss_with_{what}"] - clean for what in ("sae", "ablation"))
        expected = 1 - lost / ablated
        assert performance["ce_loss_score"] == pytest.approx(expected)
        assert found["reconstruction_quality"]["explained_variance"] == pytest.approx(1 - value["fvu"])
        assert found["model_behavior_preservation"]["kl_div_with_sae"] == pytest.approx(value["kl"])
        assert 0 < found["sparsity"]["l0"] <= K
        assert all(isinstance(number, (int, float)) for group in found.values() for number in group.values())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("import", "absent", "--from", "sparsify"), "no folder or file absent"),
        (("import", "me/absent", "--from", "sparsify"), "cannot fetch 'me/absent' from the hub"),
        (("import", "x", "--from", "sparsifi"), "did you mean 'sparsify'"),
        (("import", "x", "--from", "saebench"), "no format 'saebench' to import"),
        (("import", "x", "--from", "npz", "--reads", "both"), "--reads takes"),
        (("import", "x", "--from", "npz", "--set", "method.k=3"), "the rest is in the files"),
        (("import", "x", "--from", "npz", "--set", "eval.tokens=3,4"), "one value"),
        (("export", "absent", "--to", "sparsify"), "no run 'absent'"),
        (("export", "absent", "--to", "nonsense"), "no format 'nonsense' to export"),
        (("export", "absent", "--to", "hub", "--name", "mine"), "ORG/NAME"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(bench, arguments, says):
    result = bench(*arguments, *(("--target", "toy:resid_mlp1") if arguments[0] == "import" else ()))
    assert result.code == 2
    assert says in result.err
    lines = [line for line in result.err.strip().splitlines() if not line.startswith("loading")]
    assert len(lines) == 1
    assert runs.all_runs() == []


def test_parameter_decompositions_are_published_as_they_are(bench):
    """A method without encoder and decoder fits no other tool, and is exported as a run of this suite."""
    small = ("--set", "method.steps=2", "--set", "method.batch=32", "--set", "eval.tokens=320", "--set", "eval.bootstrap=20")
    assert bench("train", "probe_cli", "--target", "toy:resid_mlp1", "--no-eval", *small, "--set", "method.n=24").code == 0
    (run,) = runs.all_runs()
    for form in ("saelens", "dictionary_learning", "sparsify", "circuit-tracer", "npz"):
        refused = bench("export", run.id, "--to", form, "--out", "out")
        assert (refused.code, "no encoder and decoder" in refused.err) == (2, True)
    assert not Path("out").exists()
    assert bench("export", run.id, "--to", "hub", "--out", "out").code == 0
    again = bench("import", "out", "--from", "hub", "--target", "toy:resid_mlp1")
    assert again.code == 0, again.err
    assert len(runs.all_runs()) == 2


def test_formats_are_listed(bench):
    rows = {row["format"]: row for row in json.loads(bench("list", "formats", "--json").out)}
    assert (rows["nn_decompositions"]["import"], rows["nn_decompositions"]["export"]) == ("yes", "no")
    assert (rows["saebench"]["import"], rows["saebench"]["export"]) == ("no", "yes")
