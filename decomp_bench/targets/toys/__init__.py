"""Toy targets whose mechanisms are known, trained here once and kept in the cache folder. Importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TOYS", "Listed"]


@dataclass(frozen=True)
class Listed:
    """A toy by name: what it is, what its training costs on one core, and the seeds known to give the published solution, best first."""

    about: str
    cost: str
    seeds: tuple[int, ...]


_SUPERPOSITION = "sparse features in {} hidden units, autoencoded (TMS, SPD)"
_RESID = "residual MLP of {} computing {} features in {} neurons a layer (SPD)"
_SYNTH = "activations of {} frequent, nested and correlated features in {} dimensions (SynthSAEBench), handed on as they are"
TOYS = {
    "tms_5-2": Listed("5 " + _SUPERPOSITION.format(2), "seconds", (2, 10, 22)),
    "tms_5-2-id": Listed("5 " + _SUPERPOSITION.format(2) + ", with a fixed identity layer between", "seconds", (2, 10, 22)),
    "tms_40-10": Listed("40 " + _SUPERPOSITION.format(10), "two minutes", (0, 1)),
    "tms_40-10-id": Listed("40 " + _SUPERPOSITION.format(10) + ", with a fixed identity layer between", "two minutes", (0, 1)),
    "resid_mlp_1l": Listed(_RESID.format("one layer", 100, 50), "seconds", (0, 1)),
    "resid_mlp_2l": Listed(_RESID.format("two layers", 100, 25), "seconds", (0, 1)),
    "resid_mlp_3l": Listed(_RESID.format("three layers", 102, 17), "two minutes", (0,)),
    "ih": Listed("induction heads: an attention-only model of two layers that recalls what followed a token (SPD)", "a minute", (0,)),
    "two_hop": Listed("two MLPs, the second of which reads only variables that the first wrote: planted edges", "seconds", (0, 1)),
    "hierarchy": Listed("an autoencoder of features along known directions, some only on beside their parent", "seconds", (0, 1)),
    "synth_1k": Listed(_SYNTH.format("1,000", 128), "seconds", (0, 1)),
    "synth_16k": Listed(_SYNTH.format("16,384", 768), "minutes; 13 GB of memory", (0,)),
}
