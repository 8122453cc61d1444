"""Figures as files: PNG, SVG and PDF, the same bytes for the same figure, each written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.figure import Figure

from .style import plain

FORMATS = ("png", "svg", "pdf")


def _metadata(kind: str, caption: str) -> dict[str, str | None]:
    """The caption travels in the file; dates and version numbers do not."""
    return {
        "png": {"Software": None, "Description": caption},
        "svg": {"Date": None, "Creator": None, "Description": caption},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None, "Subject": caption},
    }[kind]


def caption_of(figure: Figure) -> str:
    """The caption that a figure carries, on one line; empty where it has none."""
    texts = [text.get_text() for text in figure.texts if text.get_gid() == "caption"]
    return " ".join(" ".join(texts).split())


def save(figure: Figure, stem: Path | str, dpi: int = 300) -> list[Path]:
    """Write STEM.png, STEM.svg (its text is text) and STEM.pdf; all are complete before the first takes its name."""
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    finals = [stem.with_name(f"{stem.name}.{kind}") for kind in FORMATS]
    temporaries = [path.with_name(f".{path.name}.{os.getpid()}") for path in finals]
    try:
        with plain():
            for kind, temporary in zip(FORMATS, temporaries, strict=True):
                figure.savefig(temporary, format=kind, dpi=dpi, metadata=_metadata(kind, caption_of(figure)))
        for temporary, final in zip(temporaries, finals, strict=True):
            os.replace(temporary, final)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
    return finals
