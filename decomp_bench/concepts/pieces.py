"""Between token ids and text: the piece of text that each token stands for, and where in a text each token lies."""

from __future__ import annotations

from typing import Any

import numpy as np

from decomp_bench.concepts.base import Concept


class Pieces:
    """The pieces of a tokenizer's whole vocabulary; special tokens stand for nothing."""

    def __init__(self, tokenizer: Any) -> None:
        anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]  # decoding alone drops a leading space in some tokenizers
        special = set(tokenizer.all_special_ids)
        pairs = [[*anchor, i] for i in range(len(tokenizer))]
        start = len(tokenizer.decode(anchor, clean_up_tokenization_spaces=False))
        texts = tokenizer.batch_decode(pairs, clean_up_tokenization_spaces=False)
        self.of = ["" if i in special else text[start:] for i, text in enumerate(texts)]

    def text(self, ids: Any) -> str:
        """The text of some ids."""
        return "".join(self.of[int(i)] for i in ids)

    def holds(self, concept: Concept, ids: Any) -> np.ndarray:
        """At which of these tokens [T] a concept's spans have a character."""
        ends = np.cumsum([len(self.of[int(i)]) for i in ids], dtype=np.int64)
        inside = np.zeros(int(ends[-1]) + 1 if len(ends) else 1, np.int64)
        for start, end in concept.spans(self.text(ids)):
            inside[start + 1 : end + 1] = 1
        counted = np.concatenate([[0], np.cumsum(inside)[ends]]) if len(ends) else np.zeros(1, np.int64)
        return np.diff(counted) > 0
