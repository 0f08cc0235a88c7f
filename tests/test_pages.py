"""Each command that README and docs show is understood by its script, and each link leads to a file."""

import re
import shlex
from functools import cache
from typing import Any, get_type_hints

import pytest
import yaml

from lit_qlora import cli
from lit_qlora.commands import COMMANDS
from tests.conftest import ROOT, load_script

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[tuple[str, str]]:
    """Page and line of each command in a block of code."""
    blocks = [(page, block) for page in PAGES for block in re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL)]
    lines = [(page.name, line) for page, block in blocks for line in block.splitlines()]
    return [(page, line) for page, line in lines if re.match(r"(python (finetune|scripts|eval)/|lit-qlora \w)", line)]


@cache
def settings_of(script: str) -> type[Any]:
    """The settings of a script's command."""
    kind: type[Any] = get_type_hints(load_script(script).main)["config"]
    return kind


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_of_a_page_is_understood(page: str, line: str) -> None:
    program, name, *flags = shlex.split(line, comments=True)
    cli.parse(settings_of(COMMANDS[name] if program == "lit-qlora" else name), flags)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_of_a_page_leads_to_a_file(page: Any) -> None:
    links = re.findall(r"\]\(([^)#:\s]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_site_has_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    assert {f"docs/{name}" for name in re.findall(r": (\w+\.md)$", text, re.MULTILINE)} == {
        str(page.relative_to(ROOT)) for page in PAGES[1:]
    }
    assert yaml.safe_load(text)["docs_dir"] == "docs"
