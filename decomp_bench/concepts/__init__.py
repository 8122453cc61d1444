"""Concepts that programs can recognise, fixed before any result is looked at: topics, word lists, properties of tokens."""

from __future__ import annotations

from decomp_bench.concepts.base import Concept
from decomp_bench.concepts.lexicons import PYDOCS_LEXICONS, STORY_LEXICONS, WEB_LEXICONS
from decomp_bench.concepts.tokens import TOKEN_CONCEPTS
from decomp_bench.concepts.topics import TOPICS
from decomp_bench.errors import UserError

__all__ = ["Concept", "concepts_of"]


def concepts_of(dataset: str, names: tuple[str, ...] = ()) -> list[Concept]:
    """The concepts of a data set, or those named; raises UserError for a name that it does not have.

    Topics need labelled documents, which `pydocs` has. Word lists go with documentation, stories or other text, and can be named for any;
    token properties are everywhere.
    """
    topics = TOPICS if dataset == "pydocs" else ()
    own = PYDOCS_LEXICONS if topics else STORY_LEXICONS if "stories" in dataset.lower() else WEB_LEXICONS
    known = {concept.name: concept for concept in (*WEB_LEXICONS, *STORY_LEXICONS, *PYDOCS_LEXICONS, *own, *TOKEN_CONCEPTS, *topics)}
    wrong = [name for name in names if name not in known]
    if wrong:
        raise UserError(f"{dataset} has no concept '{wrong[0]}'; it has {', '.join(known)}")
    return [known[name] for name in names] if names else [*topics, *own, *TOKEN_CONCEPTS]
