"""The README's tables come from the results files, and the README holds what they say."""

from __future__ import annotations

import pytest

from flashcocos.benchmarks import tables
from flashcocos.errors import InputError


def test_insert_replaces_what_stands_between_the_markers() -> None:
    readme = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter"
    assert tables.insert(readme, r"new \1") == f"before\n{tables.BEGIN}\n\nnew \\1\n\n{tables.END}\nafter"


def test_insert_wants_markers() -> None:
    with pytest.raises(InputError, match="expected the markers"):
        tables.insert("no markers", "new")


def test_the_readme_holds_the_results() -> None:
    sections = [section(tables._load(name)) for name, section in tables.SECTIONS.items()]
    readme = tables.README.read_text()
    assert tables.insert(readme, "\n\n".join(sections)) == readme
