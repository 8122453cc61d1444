"""Whether a training still works, judged from its log lines: a loss that is not finite, or a collapse that a sum of losses would hide.

A collapse is what trainings of adversarial parameter decompositions were seen to end in long after they had converged: one loss term and
the gradient of a parameter group grow tenfold and more within a few log lines, or the number of active components, or of those that are
ever active, falls to a tenth while a term doubles. Each is judged against the median of the lines before, and only when it stays so for
several lines.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median

import torch
from torch import Tensor

HISTORY, LEAST, PATIENCE = 50, 10, 3
"""Log lines that the median is over, lines before anything is judged, and lines in a row that must look collapsed."""
RISE, DOUBLED, FALL = 10.0, 2.0, 0.1
TINY = 1e-3
"""Share of the total from which on a term's rise counts."""
NORM = "grad_norm_"


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """Norm of the gradients of a group as they are now."""
    return torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


class Watch:
    """Takes a training's log lines, in which `terms` are its losses; those `on_demand` must be finite, but may rise."""

    def __init__(self, on_demand: Iterable[str] = ()) -> None:
        self.on_demand = {"loss", *on_demand}
        self.lines: deque[Mapping[str, float]] = deque(maxlen=HISTORY)
        self.suspicious = 0
        """Lines in a row that looked collapsed."""

    def judge(self, line: Mapping[str, float], terms: Iterable[str]) -> str | None:
        """Why the training is to be stopped, naming the term, or None."""
        wrong = {name: line[name] for name in terms if not math.isfinite(line[name])}
        if wrong:
            name, value = next(iter(wrong.items()))
            return f"the loss '{name}' was {value} at step {line['step']:.0f}: lower method.lr or the penalty"
        collapse = self._collapse(line, [name for name in terms if name not in self.on_demand]) if len(self.lines) >= LEAST else None
        self.suspicious = self.suspicious + 1 if collapse else 0
        if not collapse:
            self.lines.append(line)
        if collapse and self.suspicious >= PATIENCE:
            return f"{collapse} at step {line['step']:.0f}: lower method.lr or the penalty"
        return None

    def _collapse(self, line: Mapping[str, float], terms: list[str]) -> str | None:
        usual = {key: median(values) for key in line if (values := [past[key] for past in self.lines if key in past])}
        total = sum(abs(line[name]) for name in terms)
        large = [name for name in terms if usual.get(name, 0.0) > TINY * total]
        if not large:
            return None
        worst = max(large, key=lambda name: line[name] / usual[name])
        rise = line[worst] / usual[worst]
        told = f"the loss '{worst}' rose from {usual[worst]:.3g} to {line[worst]:.3g}"
        steep = [key for key in line if key.startswith(NORM) and line[key] > RISE * usual.get(key, math.inf)]
        if rise > RISE and steep:
            return f"{told} and a gradient's norm from {usual[steep[0]]:.3g} to {line[steep[0]]:.3g}"
        if rise > DOUBLED and line.get("l0", math.inf) < FALL * usual.get("l0", 0.0):
            return f"{told} and L0 fell from {usual['l0']:.3g} to {line['l0']:.3g}"
        alive, before = 1 - line.get("dead", 0.0), 1 - usual.get("dead", 0.0)
        if rise > DOUBLED and alive < FALL * before:
            return f"{told} and live components fell from {before:.1%} to {alive:.1%}"
        return None
