"""The corpus: what is read from a source file, splits by name, and the manifest that guards it."""

import warnings

import pytest

from decomp_bench.data import pydocs
from decomp_bench.data.documents import Document

SOURCE = '''
"""A module about nothing.

    Indented prose.
"""
import os
raise SystemExit("a source file is read, never run")

class Thing(os.PathLike):
    """A thing."""

    def turn(self, angle, /, *rest, slow=False, **more):
        """Turn it.

        Twice.
        """

if os.name == "posix":
    async def wait(*, seconds):
        """Wait for it."""
'''


def test_docstrings_come_in_file_order_with_readable_headings() -> None:
    assert pydocs.docstrings(SOURCE, "package.module") == [
        ("package.module", "A module about nothing.\n\nIndented prose."),
        ("class Thing", "A thing."),
        ("Thing.turn(self, angle, *rest, slow, **more)", "Turn it.\n\nTwice."),
        ("wait(*, seconds)", "Wait for it."),
    ]
    assert pydocs.docstrings("def broken(:", "m") == []


def test_a_docstring_counts_in_the_first_file_only_and_short_files_are_dropped() -> None:
    shared, own = '"""' + "Shared by both. " * 20 + '"""', '\ndef f():\n    """' + "Only here. " * 30 + '"""'
    found = pydocs.merge([("a", "a", shared), ("b", "b", shared + own), ("c", "c", '"""Short."""')])
    assert [d.name for d in found] == ["a", "b"]
    assert "Shared" in found[0].text
    assert "Shared" not in found[1].text
    assert found[1].text.startswith("f()\n\nOnly here.")


def test_topics_are_one_document_each() -> None:
    source = "topics = {" + ", ".join(f"'t{i:02d}': 'text {i}'" for i in range(12)) + "}"
    found = pydocs.topics(source)
    assert [d.name for d in found][:2] == ["pydoc_data.topics.t00", "pydoc_data.topics.t01"]
    assert found[3].text == "text 3"


def test_splits_follow_the_name_alone_with_the_stated_shares() -> None:
    names = [f"package.module_{i}" for i in range(20_000)]
    shares = {split: sum(pydocs.split_of(name) == split for name in names) / len(names) for split in pydocs.SPLITS}
    assert shares["test"] == pytest.approx(0.025, abs=0.004)
    assert shares["validation"] == pytest.approx(0.025, abs=0.004)
    assert shares["train"] == pytest.approx(0.95, abs=0.006)
    with pytest.raises(ValueError, match="train, validation, test"):
        pydocs.documents("dev")


def record(documents: list[Document]) -> dict:
    return {"versions": pydocs.versions(), "documents": {d.name: pydocs.text_hash(d.text) for d in documents}}


def test_a_changed_a_missing_and_a_new_file_are_left_out_with_one_warning() -> None:
    known = [Document(f"m{i}", "m", f"text {i}") for i in range(5)]
    here = [Document("m0", "m", "edited"), *known[2:], Document("new", "m", "text")]
    with pytest.warns(UserWarning, match="2 of 5 files are not the manifest's") as caught:
        kept = pydocs.checked(here, record(known))
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert kept == known[2:]
    assert pydocs.hash_of(kept) != pydocs.hash_of(known)
    assert pydocs.hash_of(reversed(known)) == pydocs.hash_of(known)


def test_the_warning_names_the_version_that_differs() -> None:
    known = [Document("m", "m", "text")]
    with pytest.warns(UserWarning, match="numpy .* for 0.0.1"):
        pydocs.checked([], {**record(known), "versions": {**pydocs.versions(), "numpy": "0.0.1"}})


def test_the_installed_corpus_is_the_manifests() -> None:
    manifest = pydocs.manifest()
    assert manifest is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # another version of Python has another standard library
        splits = {split: pydocs.documents(split) for split in pydocs.SPLITS}
    names = [d.name for found in splits.values() for d in found]
    assert len(names) == len(set(names))
    assert set(names) <= set(manifest["documents"])
    assert all(splits.values())
    if len(names) == len(manifest["documents"]):
        assert pydocs.corpus_hash() == manifest["hash"]
    labels = {d.label for d in splits["train"]}
    assert {"asyncio", "email", "scipy.signal", "sklearn.cluster", "torch.nn", "pydoc_data.topics"} <= labels
