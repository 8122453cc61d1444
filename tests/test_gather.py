"""What is drawn of an experiment's results folder."""

from __future__ import annotations

import json

import pandas as pd

from decomp_bench import gather, results
from tests.test_noise import write


def test_curves_are_drawn_beside_measurements_of_several_trained_settings(tmp_path):
    folder = write(tmp_path / "results" / "007_something" / "t", 0)
    frame = results.read(folder / "results.parquet")
    size = frame[frame["metric"] == "l0_mlp"]
    frame = pd.concat([frame, size.assign(metric="active_params"), size.assign(metric="bits", applicable="no")], ignore_index=True)
    for name in ("results", "probing"):
        results.write(frame, folder / f"{name}.parquet")
    (folder / "manifest.json").write_text(json.dumps({"runs": {}, "measurements": {"probing": {}}}))
    names = {path.name for path in gather.draw(folder)}
    assert {"ce_delta_by_l0_mlp.png", "ce_delta_by_active_params.png"} <= names
    assert "ce_delta_by_bits.png" not in names  # it applies to none of them
    results.write(frame[frame["variant"] == "k=4"], folder / "results.parquet")
    assert gather.draw(folder) == []  # one point makes no curve
