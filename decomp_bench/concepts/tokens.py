"""Properties of tokens that a regular expression tells: what is inside a string or brackets, digits, capitals."""

from __future__ import annotations

import re

from decomp_bench.concepts.base import Concept


def token(name: str, pattern: str, group: int | str = 0) -> Concept:
    """A concept that holds at every match (of one line) of a pattern."""
    return Concept(name, "token", pattern=re.compile(pattern), group=group)


TOKEN_CONCEPTS = (
    token("digits", r"\d+"),
    token("capitalised", r"(?<![A-Za-z0-9_])[A-Z][a-z]+"),
    token("upper case", r"(?<![A-Za-z0-9_])[A-Z]{2,}(?![a-z])"),
    token("in a string", r"(?P<quote>[\"'`])(?P<inside>(?:(?!(?P=quote))[^\n]){1,120})(?P=quote)", "inside"),
    token("in brackets", r"[(\[{](?P<inside>[^()\[\]{}\n]{1,200})[)\]}]", "inside"),
    token("in nested brackets", r"[(\[{][^()\[\]{}\n]{0,200}[(\[{](?P<inside>[^()\[\]{}\n]{1,200})[)\]}]", "inside"),
    token("identifier with underscores", r"[A-Za-z0-9]+(?:_[A-Za-z0-9]+)+"),
    token("indented line", r"(?:^|(?<=\n))(?: {4,}|\t+)(?P<inside>\S[^\n]*)", "inside"),
)
