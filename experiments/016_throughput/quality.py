"""Final FVU at equal tokens: every library, this one too, at the rate that is its best on the first seed."""

import json
from pathlib import Path

import pandas as pd

from decomp_bench.files import write_text

from .libraries import ARCHITECTURES, OURS, Settings, Worker, job_of

KEY = ["architecture", "library", "lr", "seed"]


class Quality:
    """Trains from scratch and scores on held-out rows; what `file` has already, under the same settings, is not trained again."""

    def __init__(self, pythons: dict[str, Path], chosen: Settings, activations: Path, file: Path) -> None:
        self.pythons, self.chosen, self.activations, self.file = pythons, chosen, activations, file
        about, settings = file.with_suffix(".json"), json.dumps(chosen.model_dump(mode="json"), sort_keys=True)
        same = file.is_file() and about.is_file() and about.read_text() == settings
        self.rows = pd.read_csv(file, dtype={"lr": str}).to_dict("records") if same else []
        if not same:  # first, so that rows of other settings are never taken for those of these
            file.unlink(missing_ok=True)
        write_text(settings, about)

    def compare(self, libraries: list[str]) -> pd.DataFrame:
        """One row for each training."""
        first, *others = self.chosen.seeds
        for architecture in self.chosen.architectures:
            for name in (library for library in libraries if architecture in ARCHITECTURES[library]):
                tried = {lr: self.score(name, architecture, first, lr)["fvu"] for lr in (None, *self.chosen.quality_lrs)}
                for seed in others:
                    self.score(name, architecture, seed, min(tried, key=lambda lr: tried[lr]))
        return pd.DataFrame(self.rows)

    def score(self, name: str, architecture: str, seed: int, lr: float | None) -> dict:
        """FVU and L0 of one training."""
        key = dict(zip(KEY, (architecture, name, str(lr or "default"), seed), strict=True))
        done = [row for row in self.rows if all(row[part] == value for part, value in key.items())]
        if done:
            return done[0]
        worker = Worker(name, self.pythons[name], job_of(self.chosen, architecture, self.activations, self.chosen.quality_steps, seed, lr))
        try:
            worker.ask(f"train {self.chosen.quality_steps}")
            row = {**key, **worker.ask("score")}
        finally:
            worker.close()
        self.rows.append(row)
        write_text(pd.DataFrame(self.rows).to_csv(index=False), self.file)
        print(f"{architecture:12} {name:20} lr {row['lr']:7}  seed {seed}  FVU {row['fvu']:.4f}  L0 {row['l0']:.1f}", flush=True)
        return row


def best(found: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of each library at the rate chosen on the first, and the paired ratio of FVUs, library to this project."""
    grouped = found.groupby(["architecture", "library", "lr"], sort=False)["fvu"].agg(["mean", "size"]).reset_index()
    whole = grouped[grouped["size"] == found["seed"].nunique()].rename(columns={"mean": "fvu"}).drop(columns="size")
    chosen = whole.loc[whole.groupby(["architecture", "library"], sort=False)["fvu"].idxmin()]
    picked = found.merge(chosen[KEY[:3]])
    of = {key: rows.set_index("seed")["fvu"] for key, rows in picked.groupby(["architecture", "library"])}
    rows = []
    for entry in chosen.to_dict("records"):
        ratio = of[entry["architecture"], entry["library"]] / of[entry["architecture"], OURS]
        rows.append({**entry, "fvu_over_ours": ratio.mean(), "least": ratio.min(), "most": ratio.max(), "seeds": len(ratio)})
    return pd.DataFrame(rows)
