"""The reseed noise of an experiment's results, beside them and in the metric catalogue. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from decomp_bench.errors import UserError
from decomp_bench.files import write_text

if TYPE_CHECKING:
    import pandas as pd

STEM = "seed_noise"
HEADLINE = ("cascading", "clean")
"""Protocol and gates that the catalogue's table shows, where they were measured."""
SHOWN = ("protocol", "gates", "sd", "sd_lo", "sd_hi", "document_half_width", "resolved_1", "resolved_3", "configs", "runs")


def write_noise(folder: Path, manifests: dict[str, dict[str, Any]]) -> pd.DataFrame | None:
    """Write seed_noise.csv and seed_noise.md beside the results of a folder; None, and neither file, where no config has two seeds."""
    from decomp_bench import analysis, results

    files = [folder / f"{STEM}.{kind}" for kind in ("csv", "md")]
    noise = analysis.seed_noise(results.read(folder / "results.parquet"), manifests)
    if noise.empty:
        for file in files:
            file.unlink(missing_ok=True)
        return None
    results.write(noise, files[0])
    write_text(analysis.noise_markdown(noise), files[1])
    return noise


def known_noise(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Metric -> what is known of its reseed noise over all trained families together, from every results folder under ROOT/results.

    One entry for each folder, protocol and gate source: those of the headline condition first, toys after other targets, and those of most
    degrees of freedom first.
    Raises UserError for a broken file.
    """
    import pandas as pd

    from decomp_bench import analysis

    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted((root / "results").glob(f"*/*/{STEM}.csv")):
        try:
            data = pd.read_csv(file, keep_default_na=False, na_values=[""])
            rows = data[data["family"] == analysis.EVERY_FAMILY].to_dict("records")
            for row in rows:
                about = {"results": f"{file.parent.parent.name}/{file.parent.name}", "target": row["target"], "degrees": row["degrees"]}
                numbers = {name: None if pd.isna(row[name]) else row[name] for name in SHOWN}
                found.setdefault(str(row["metric"]), []).append(about | numbers)
        except (ValueError, KeyError) as error:
            raise UserError(f"{file} is broken ({error}): decomp-bench plot {file.parent.parent.name[:3]} writes it again") from None
    for entries in found.values():
        entries.sort(key=lambda one: ((one["protocol"], one["gates"]) != HEADLINE, one["target"].startswith("toy:"), -one["degrees"]))
    return found
