"""The unit of text that every corpus hands out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text with a name that is unique in its corpus and a topic.

    `name` decides the split, `label` is the topic that probes and steering use, `text` is what the tokenizer reads.
    """

    name: str
    label: str
    text: str
