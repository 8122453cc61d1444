"""SAEBench: a run's results as the JSON of its core evaluation, a file for each layer, with the metrics that are measured here.

Each layer's MLP is replaced alone (protocol single), which is what SAEBench does. What we do not measure is left out.
"""

from __future__ import annotations

import uuid
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decomp_bench.errors import UserError
from decomp_bench.files import write_json
from decomp_bench.runs import Run

if TYPE_CHECKING:
    import pandas as pd

METRICS: dict[str, dict[str, str]] = {
    "model_behavior_preservation": {"kl_div_with_sae": "kl"},
    "model_performance_preservation": {
        "ce_loss_score": "ce_recovered_zero",
        "ce_loss_with_ablation": "ce_zero",
        "ce_loss_with_sae": "ce",
        "ce_loss_without_sae": "ce_clean",
    },
    "reconstruction_quality": {"explained_variance": "fvu"},
    "sparsity": {"l0": "l0_mlp"},
}
"""Category -> SAEBench's metric -> ours. Explained variance is 1 - fvu, over all tokens, centred on the training split's mean."""
ABOUT = "each MLP replaced alone; zero ablation; explained variance is 1 - sum of squared errors / sum of squared deviations"


def write_run(run: Run, folder: Path) -> list[Path]:
    """core/RUN_LAYER_eval_results.json for each layer; raises UserError for a run without results or not on a language model."""
    frame = run.results()
    own = frame[(frame["protocol"] == "single") & (frame["curve"] == "trained") & (frame["mask"] != "all") & (frame["delta"] != "on")]
    own = own[own["gates"] == ("self" if (own["gates"] == "self").any() else "clean")]
    if "ce" not in set(own["metric"]):
        raise UserError(f"run {run.id} has no cross-entropy under protocol single; SAEBench's core evaluation is of language models")
    layers = sorted(set(own["layer"]) - {"all"}, key=int)
    return [_write(run, own, layer, folder) for layer in layers]


def _write(run: Run, frame: pd.DataFrame, layer: str, folder: Path) -> Path:
    found: dict[str, dict[str, float]] = {}
    for category, names in METRICS.items():
        values = {theirs: _value(frame, ours, layer) for theirs, ours in names.items()}
        found[category] = {name: value for name, value in values.items() if value == value}
    tokens = int(frame["n"].max())
    found["token_stats"] = {"total_tokens_eval_reconstruction": tokens, "total_tokens_eval_sparsity_variance": tokens}
    path = folder / "core" / f"{run.id}_{layer}_eval_results.json"
    write_json(_document(run, layer, found), path)
    return path


def _value(frame: pd.DataFrame, metric: str, layer: str) -> float:
    """A metric of a layer, or of the model where that is the same for all layers."""
    rows = frame[(frame["metric"] == metric) & (frame["site"] == "all") & frame["layer"].isin([layer, "all"])].sort_values("layer")
    value = float(rows["value"].iloc[0]) if len(rows) else float("nan")
    return 1 - value if metric == "fvu" else value


def _document(run: Run, layer: str, metrics: dict[str, Any]) -> dict[str, Any]:
    import time

    import decomp_bench

    config = run.config
    return {
        "eval_type_id": "core",
        "eval_config": {
            "model_name": config.target,
            "context_size": config.data.context,
            "dataset": run.manifest.get("corpus"),
            "llm_dtype": "float32",
        },
        "eval_id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{run.id}/{layer}")),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": metrics,
        "eval_result_details": [],
        "eval_result_unstructured": {"made_by": f"decomp-bench {decomp_bench.__version__}", "definitions": ABOUT},
        "sae_bench_commit_hash": "",
        "sae_lens_id": f"layer_{layer}",
        "sae_lens_release_id": run.id,
        "sae_lens_version": version("sae-lens"),
        "sae_cfg_dict": {"architecture": config.method, "hook_layer": int(layer), **config.method_config},
    }
