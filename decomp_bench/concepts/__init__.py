"""Concepts that programs can recognise, fixed before any result is looked at: topics, word lists, properties of tokens."""

from __future__ import annotations

from decomp_bench.concepts.base import Concept
from decomp_bench.concepts.lexicons import PYDOCS_LEXICONS, STORY_LEXICONS
from decomp_bench.concepts.tokens import TOKEN_CONCEPTS
from decomp_bench.concepts.topics import TOPICS
from decomp_bench.errors import UserError

__all__ = ["Concept", "concepts_of"]


def concepts_of(dataset: str, names: tuple[str, ...] = ()) -> list[Concept]:
    """The concepts of a data set, or those named; raises UserError for a name that it does not have.

    Topics need labelled documents, which `pydocs` has; other text has the lexicons of stories. Token properties are everywhere.
    """
    found = [*TOPICS, *PYDOCS_LEXICONS, *TOKEN_CONCEPTS] if dataset == "pydocs" else [*STORY_LEXICONS, *TOKEN_CONCEPTS]
    known = {concept.name: concept for concept in found}
    wrong = [name for name in names if name not in known]
    if wrong:
        raise UserError(f"{dataset} has no concept '{wrong[0]}'; it has {', '.join(known)}")
    return [known[name] for name in names] if names else found
