"""How docstrings are written; CONTRIBUTING has the rules and the vocabulary."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

FOLDERS = ("lit_qlora", "finetune", "scripts", "eval", "chat", "benchmarks")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and docstring of the module, of each class and of each function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_docstring_begins_with_a_verb_or_the_name_of_a_thing(path: Path) -> None:
    riddles = [(line, text) for line, text in docstrings(path) if re.match(r"(What|Whether|Which|How|Where)\b", text)]
    assert riddles == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_docstring_makes_its_reader_look_back_for_a_noun(path: Path) -> None:
    found = [(line, text) for line, text in docstrings(path) if re.search(r"\b(of which|those that|those who)\b", text)]
    assert found == []
