"""Token streams, splits and the activation stream. Importing this imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from decomp_bench.config import DataConfig
    from decomp_bench.data.sources import Source
    from decomp_bench.targets import TargetModel

__all__ = ["source"]


def source(target: TargetModel, config: DataConfig) -> Source:
    """The data that a target is decomposed and scored on; raises UserError where there is none."""
    from decomp_bench.data.sources import open_source

    return open_source(target, config)
