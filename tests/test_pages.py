"""Each command and flag that README and docs show is understood by its script, and each link leads to a file."""

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from lit_qlora import cli
from lit_qlora.commands import COMMANDS
from tests.conftest import ROOT, load_script

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FILES = ("book.txt", "questions.txt")  # of a reader, which commands of the pages read
OTHERS = {"--extra-index-url", "--build-arg", "--signal"}  # flags of pip, docker and Slurm


def commands() -> list[tuple[str, str]]:
    """Page and line of each command in a block of code."""
    blocks = [(page, block) for page in PAGES for block in re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL)]
    lines = [(page.name, line) for page, block in blocks for line in block.splitlines()]
    start = r"((python|torchrun .*?) (?=(finetune|scripts|eval|chat)/)|(docker run .* )?lit-qlora (?=[a-z]))"
    return [(page, line[found.end() :]) for page, line in lines if (found := re.match(start, line))]


@cache
def settings_of(script: str) -> type[Any]:
    """The settings of a script's command."""
    kind: type[Any] = get_type_hints(load_script(script).main)["config"]
    return kind


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from which a reader starts commands."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("checkpoints", "eval", "finetune"):
        (folder / name).symlink_to(ROOT / name)
    for name in FILES:
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_of_a_page_is_understood(page: str, line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    name, *flags = shlex.split(line, comments=True)
    script = COMMANDS.get(name, "scripts/chat.py" if name == "chat/base.py" else name)
    cli.parse(settings_of(script), flags)


def test_each_flag_that_a_page_names_is_one_of_a_command() -> None:
    """Flags of other programs stand in the first cells of the tables of articles.md."""
    known = {flag for script in COMMANDS.values() for flag in cli._parser(settings_of(script))._option_string_actions}
    for page in PAGES:
        text = re.sub(r"(?m)^\|[^|]*", "", page.read_text()) if page.name == "articles.md" else page.read_text()
        named = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", " ".join(re.findall(r"`[^`\n]+`", text))))
        named -= {flag for flag in named if flag.startswith("--adapters.")}  # followed by a name of the user's
        assert named - known - OTHERS == set(), page.name


def test_each_command_is_shown_on_a_page() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    shown = set(re.findall(r"lit-qlora ([a-z-]+)", text)) | set(re.findall(r"(?:finetune|scripts|eval)/\w+\.py", text))
    assert [name for name, script in COMMANDS.items() if not {name, script} & shown] == []


def test_each_target_of_make_that_a_page_names_is_there() -> None:
    targets = set(re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text()))
    named = {name for page in PAGES for name in re.findall(r"(?:`|\n)make ([a-z-]+)", page.read_text())}
    assert named
    assert named <= targets


def anchors(page: Path) -> set[str]:
    """The anchors that a site and GitHub give the headings of a page, but for repeated ones."""
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text())
    words = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in re.findall(r"(?m)^#+ (.*)", text))
    return {re.sub(r"[\s-]+", "-", heading) for heading in words}


def lost(page: Path) -> list[str]:
    """The links of a page that lead to no file, to no heading, or out of the folder of a page of the site."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)[^)]*\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        inside = page.parent.name != "docs" or target.parent == page.parent
        if not re.match(r"https?://|mailto:", link) and not (
            inside and target.exists() and (not anchor or anchor in anchors(target))
        ):
            found.append(link)
    return found


@pytest.mark.parametrize("page", sorted({*PAGES, *ROOT.glob("*.md")}), ids=lambda page: page.name)
def test_a_link_of_a_page_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert lost(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "docs/page.md"
    page.parent.mkdir()
    page.write_text(
        "# A `b`: c\n[a](#a-b-c) [b](#none) [c](page.md#a-b-c) [d](no.md) [e](../docs) [f](https://x.y#z)\n"
    )
    assert lost(page) == ["#none", "no.md", "../docs"]


def test_the_site_has_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    assert {f"docs/{name}" for name in re.findall(r": (\w+\.md)$", text, re.MULTILINE)} == {
        str(page.relative_to(ROOT)) for page in PAGES[1:]
    }
    assert yaml.safe_load(text)["docs_dir"] == "docs"


def test_the_parts_that_how_it_works_names_exist() -> None:
    named = set(re.findall(r"`([\w/]+/|[\w/]+\.py)`", (ROOT / "docs/how_it_works.md").read_text()))
    assert len(named) > 20
    assert [name for name in named if not ((ROOT / name).exists() or (ROOT / "lit_qlora" / name).exists())] == []


def test_the_picture_of_how_it_works_has_the_words_of_the_modules() -> None:
    """When it fails: python docs/draw_way.py."""
    assert load_script("docs/draw_way.py").drawing() == (ROOT / "docs/way.svg").read_text(encoding="utf-8")
