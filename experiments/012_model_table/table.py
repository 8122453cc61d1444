"""Every run at hand in one table."""

from pathlib import Path

from decomp_bench import results
from decomp_bench.analysis import latex, markdown, model_table
from decomp_bench.errors import UserError
from decomp_bench.files import write_text
from decomp_bench.gather import at_hand
from decomp_bench.runs import folder_at


def main(settings: dict, folder: Path) -> None:
    """Write runs.csv, runs.parquet, runs.md and runs.tex."""
    root = folder.parents[2]
    with folder_at(root / "results" / "runs"):
        frame, manifests = at_hand(root)
    for column, wanted in (("experiment", settings["experiments"]), ("target", settings["targets"])):
        frame = frame[frame[column].isin(wanted)] if wanted else frame
    frame = frame[frame.groupby("run_id")["n"].transform("max") >= settings["tokens"]]
    try:
        table = model_table(frame, manifests)
    except ValueError as error:
        raise UserError(f"{error} (of at least {settings['tokens']:,} scored tokens; --set tokens=0 takes all)") from None
    for kind in ("csv", "parquet"):
        results.write(table, folder / f"runs.{kind}")
    write_text(markdown(table), folder / "runs.md")
    write_text(latex(table), folder / "runs.tex")
    print(markdown(table))
