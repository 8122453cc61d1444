"""Rows and outputs as words: pieces of text for a language model, named inputs and outputs for a toy."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from decomp_bench.concepts.pieces import Pieces
from decomp_bench.data.sources import Source
from decomp_bench.report.firing import BEFORE, Peaks

INPUTS = 6
"""Inputs of a toy's row that are shown, the largest."""


def rounded(value: float) -> float:
    """To four digits, as many as a page needs; zero without a sign."""
    return float(f"{value:.4g}") or 0.0


class Reader:
    """Reads the rows of a split, and what comes out of the target. `inputs` is the number of a toy's inputs, 0 for a language model."""

    def __init__(self, source: Source, split: str) -> None:
        self.source, self.split, self.target = source, split, source.target
        tokenizer = self.target.tokenizer
        self.pieces = Pieces(tokenizer).of if tokenizer is not None else []
        self.inputs = 0 if self.target.is_lm else int(self._row(0).shape[0])

    def token(self, index: int) -> str:
        """What a token reads as; a special one by its name, one without a tokenizer by its number."""
        if not self.pieces or index >= len(self.pieces):
            return f"[{index}]"
        return self.pieces[index] or str(self.target.tokenizer.convert_ids_to_tokens(index))

    def words(self, outputs: Float[Tensor, " out"], most: int) -> list[tuple[str, float]]:
        """The outputs with the largest values, and the values; only positive ones."""
        values, places = outputs.topk(min(most, len(outputs)))
        name = self._word if self.target.is_lm else "y{}".format
        return [(name(int(place)), rounded(float(value))) for value, place in zip(values, places, strict=True) if value > 0]

    def _word(self, index: int) -> str:
        """A token by itself; a part of a character, which reads as nothing, with its number."""
        word = self.token(index)
        return f"{word}[{index}]" if "\ufffd" in word else word

    def contexts(self, best: Peaks, place: int) -> list[dict[str, Any]]:
        """The stretches of text around a component's peaks, each with the component's coefficients."""
        found = []
        for slot in range(best.row.shape[1]):
            row = int(best.row[place, slot])
            if row >= 0:
                around = self._text(row, int(best.place[place, slot]), best.window[place, slot]) if self.target.is_lm else self._inputs(row)
                found.append({**around, "value": rounded(float(best.window[place, slot, BEFORE]))})
        return found

    def _text(self, row: int, peak: int, window: Tensor) -> dict[str, Any]:
        rows = self.source.rows(self.split)
        first = peak + int(self.target.keeps_first) - BEFORE
        at = [place for place in range(first, first + len(window)) if 0 <= place < int(rows.length[row])]
        tokens = [self.token(int(rows.tokens[row, place])) for place in at]
        values = [rounded(float(window[place - first])) for place in at]
        return {"from": str(rows.documents[int(rows.doc[row])]), "tokens": tokens, "values": values, "at": at.index(first + BEFORE)}

    def _inputs(self, row: int) -> dict[str, Any]:
        x = self._row(row)
        largest = [int(place) for place in x.abs().argsort(descending=True)[:INPUTS] if x[place] != 0]
        return {
            "from": f"row {row}",
            "tokens": [f"x{place} = {float(x[place]):.3g}  " for place in largest],
            "values": [0.0] * len(largest),
            "at": -1,
        }

    def _row(self, row: int) -> Tensor:
        x = self.source.batch(self.split, np.array([row])).x
        assert x is not None
        return x[0]
