"""What a decomposer is measured under: protocol, gate source, and an inference-time choice."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from decomp_bench.config import EvalConfig
from decomp_bench.decomposer import Choice, Decomposer, Protocol
from decomp_bench.targets.base import JACOBIAN

GLOBAL_GATE = "a gate reads what runs after its site, which the replaced stream has not reached"
UNIT_INPUTS = (".mlp.in", ".mlp.out", ".attn.in")
_ORDER = ("resid", "attn.in", "", "attn.o", "attn.out", "mlp.in", "mlp.", "mlp.down", "mlp.out")
"""Points of a layer as they run; those of one unit that are not named run in between, in an order of the target's own."""

TRAINED = Choice()
"""No choice at inference: the sparsity that the run was trained at."""


@dataclass(frozen=True)
class Condition:
    """What a row was measured under."""

    protocol: Protocol
    gates: str
    choice: Choice = TRAINED

    @property
    def curve(self) -> str:
        return "inference" if self.choice != TRAINED else "trained"


def conditions(decomposer: Decomposer, config: EvalConfig) -> list[Condition]:
    """Every protocol and gate source; everything on, and the dense remainder on, where a method has them; then the sweep at inference.

    A method that nothing was trained for is swept under every protocol, since its sweep is its curve.
    """
    found = [Condition(p, g) for p in config.protocols for g in _measured_gates(decomposer, p, config.gates)]
    whole = {"mask": Choice(mask="all"), "delta": Choice(delta=True)}
    found += [Condition(config.protocols[0], "clean", choice) for key, choice in whole.items() if key in decomposer.swept]
    if config.sweep or not decomposer.trainable:
        protocols, gates = (config.sweep_protocols, config.sweep_gates) if decomposer.trainable else (config.protocols, config.gates)
        choices = decomposer.sweep()
        found += [Condition(p, g, choice) for choice in choices for p in protocols for g in _measured_gates(decomposer, p, gates)]
    return found


def _measured_gates(decomposer: Decomposer, protocol: Protocol, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The gate sources to run: one where all are the same by construction, none that the replaced stream cannot compute."""
    if same_gates(decomposer, protocol):
        return ("self",) if upstream(decomposer) else ("clean",)
    return tuple(gates for gates in wanted if gates != "self" or upstream(decomposer))


def gate_labels(decomposer: Decomposer, condition: Condition, config: EvalConfig) -> tuple[str, ...]:
    """The gate sources that a measurement stands for: all where they are the same by construction."""
    if not same_gates(decomposer, condition.protocol):
        return (condition.gates,)
    swept = condition.choice != TRAINED and decomposer.trainable
    return config.sweep_gates if swept else config.gates


def same_gates(decomposer: Decomposer, protocol: Protocol) -> bool:
    """Whether clean and self gates are the same by construction: clean unit inputs, and gates computed from nothing else."""
    return protocol != "cascading" and all(p.endswith(UNIT_INPUTS) for site in decomposer.sites for p in site.gates_from)


def upstream(decomposer: Decomposer) -> bool:
    """Whether every gate reads only what its site reads or what runs before that."""
    return all(p in site.reads or _place(p) < max(map(_place, site.reads)) for site in decomposer.sites for p in site.gates_from)


def _place(point: str) -> tuple[int, int]:
    layer, _, part = point.partition(".")
    if part.endswith(JACOBIAN):  # known once the whole target has run
        return sys.maxsize, 0
    return int(layer), _ORDER.index(part) if part in _ORDER else _ORDER.index("mlp." if part.startswith("mlp.") else "")


def view_of(decomposer: Decomposer, condition: Condition) -> Decomposer:
    """The decomposer at the condition's inference-time choice."""
    return decomposer if condition.choice == TRAINED else decomposer.at(**vars(condition.choice))


def columns(decomposer: Decomposer, condition: Condition) -> dict[str, Any]:
    """The condition as columns of the results schema."""
    own = decomposer.label or decomposer.variant
    variant = ", ".join(filter(None, (own if decomposer.trainable else "", condition.choice.label))) or own
    return {
        "protocol": condition.protocol,
        "gates": condition.gates,
        "curve": condition.curve,
        "variant": variant,
        "mask": condition.choice.mask or "binary",
        "delta": "on" if condition.choice.delta else "off",
    }
