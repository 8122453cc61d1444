"""What a concept is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Concept:
    """A property of text. A `topic` is a property of whole documents, told by their label; `lexicon` and `token` concepts are spans of
    text that a regular expression finds.

    A topic holds for documents whose label is `labels` or lies below one of them (`scipy` for `scipy.signal`).
    """

    name: str
    kind: Literal["topic", "lexicon", "token"]
    labels: tuple[str, ...] = ()
    pattern: re.Pattern[str] | None = None
    group: int | str = 0
    """The group of the pattern that is the span."""

    @property
    def of_documents(self) -> bool:
        """Whether it holds for whole documents rather than at tokens."""
        return self.kind == "topic"

    def in_label(self, label: str) -> bool:
        """Whether a document of this label has the topic."""
        return any(label == own or label.startswith(f"{own}.") for own in self.labels)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where in a text the concept holds: start and end in characters."""
        return [found.span(self.group) for found in self.pattern.finditer(text)] if self.pattern else []

    def share(self, text: str) -> float:
        """Share of a text's characters where the concept holds."""
        return sum(end - start for start, end in self.spans(text)) / max(1, len(text))
