"""A page as a browser takes it apart."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "img", "input", "br", "path", "rect"}


class Page(HTMLParser):
    """Addresses that a page names, its headings and texts by tag, and whether every element is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.headings: list[int] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(path.read_text())
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data", "poster")]
        if tag[0] == "h" and tag[1:].isdigit():
            self.headings.append(int(tag[1:]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)


def sound(path: Path) -> Page:
    """The page, which asks nothing of the network, has its headings in order and a text for every picture."""
    page = Page(path)
    assert not [one for one in page.addresses if ":" in one and not one.startswith("data:")]
    assert not [one for one in page.addresses if one.startswith("//")]
    style = "".join(page.text["style"])
    assert "url(" not in style
    assert "@import" not in style
    assert page.headings[0] == 1
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert all(about.get("alt") for tag, about in page.tags if tag == "img")
    assert all(about.get("aria-label") for tag, about in page.tags if tag == "svg")
    return page
