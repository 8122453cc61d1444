"""The same as `decomp-bench experiment run` with this folder; takes the same options."""

import sys
from pathlib import Path

from decomp_bench import run_experiment

if __name__ == "__main__":
    run_experiment(Path(__file__).resolve().parent, sys.argv[1:])
