"""Topics of `pydocs`: the packages whose documentation a document comes from. Chosen by size alone, before any result."""

from __future__ import annotations

from decomp_bench.concepts.base import Concept


def topic(name: str, *labels: str) -> Concept:
    """A topic by the labels of its documents."""
    return Concept(name, "topic", labels or (name,))


TOPICS = (
    topic("networkx"),
    topic("pandas"),
    topic("scipy"),
    topic("sklearn"),
    topic("matplotlib"),
    topic("numpy"),
    topic("wandb"),
    topic("huggingface_hub"),
    topic("transformers"),
    topic("torch.distributed"),
    topic("compilers", "torch._inductor", "torch._dynamo", "torch.fx", "torch._functorch", "torch._export"),
    topic("language reference", "pydoc_data.topics"),
    topic("network protocols", "email", "http", "urllib", "smtplib", "ftplib", "imaplib", "socket", "ssl", "xmlrpc", "wsgiref"),
    topic("concurrency", "asyncio", "multiprocessing", "threading", "concurrent", "queue"),
)
