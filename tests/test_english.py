"""How docstrings are written; CONTRIBUTING has the rules and the vocabulary."""

import ast
import inspect
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


def sentences(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each sentence of a docstring, those of attributes included; commands are none."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            text = re.sub(r"(?m)^python .*$", "", inspect.cleandoc(node.value.value))
            for part in re.split(r"\n\s*\n|\n {4}|(?<=[.:;])\s", text):
                yield node.lineno, " ".join(part.split())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_sentence_of_a_docstring_has_at_most_25_words(path: Path) -> None:
    found = [(line, text) for line, text in sentences(path) if len(re.findall(r"[^\W\d_][\w'-]*", text)) > 25]
    assert found == []
