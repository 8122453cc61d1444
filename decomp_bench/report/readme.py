"""What an experiment's README.md says of it: its title and its sections, as safe HTML."""

from __future__ import annotations

import re
from pathlib import Path

from markupsafe import Markup, escape

SECTION = re.compile(r"^\*\*([A-Z][A-Za-z ]*)\.\*\*\s*", re.MULTILINE)


def texts(path: Path) -> dict[str, str]:
    """Section -> Markdown of a file in which sections begin with `**Name.**`; empty where there is no file."""
    text = path.read_text() if path.is_file() else ""
    starts = list(SECTION.finditer(text))
    ends = [start.start() for start in starts[1:]] + [len(text)] * bool(starts)
    return {start[1]: text[start.end() : end] for start, end in zip(starts, ends, strict=True)}


def sections(path: Path) -> dict[str, Markup]:
    """Section -> HTML, as `texts`."""
    return {name: html(text) for name, text in texts(path).items()}


def html(text: str) -> Markup:
    """Paragraphs, lists, indented code, bold and inline code of Markdown. A link keeps its words only: it would lead astray elsewhere."""
    blocks = [block for block in re.split(r"\n\s*\n", text.rstrip()) if block.strip()]
    return Markup("\n").join(_block(block.strip("\n")) for block in blocks)


def _block(block: str) -> Markup:
    lines = block.split("\n")
    if all(line.startswith("    ") for line in lines):
        return Markup("<pre>{}</pre>").format("\n".join(line[4:] for line in lines))
    if lines[0].startswith(("- ", "* ")):
        items = re.split(r"(?m)^[-*] ", block)[1:]
        return Markup("<ul>{}</ul>").format(Markup("").join(Markup("<li>{}</li>").format(_inline(item)) for item in items))
    return Markup("<p>{}</p>").format(_inline(block))


def _inline(text: str) -> Markup:
    words = str(escape(" ".join(text.split())))
    for pattern, made in ((r"\[([^\]]+)\]\([^)]*\)", r"\1"), (r"`([^`]+)`", r"<code>\1</code>"), (r"\*\*([^*]+)\*\*", r"<b>\1</b>")):
        words = re.sub(pattern, made, words)
    return Markup(words)
