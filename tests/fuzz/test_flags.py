"""Every flag of every command takes any value, or refuses it with one message."""

import io
import sys
from ast import literal_eval
from functools import cache
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_qlora import cli
from lit_qlora.settings import FinetuneConfig
from tests.conftest import load_script
from tests.fuzz.property import cases, holds, kept, quick, slow
from tests.test_cli import ENTRY_POINTS

KIND = "flags"
VALUES = [
    *(
        "",
        " ",
        "-",
        "--",
        "=",
        "x",
        "none",
        "null",
        "true",
        "yes",
        "auto",
        "0",
        "1",
        "-1",
        "1e3",
        "1e400",
        "nan",
        "inf",
    ),
    *("7" * 5000, "0x" + "f" * 5000, "1:" * 3000 + "1", "9" * 25, "[" * 3000, "{a: " * 500, "- " * 3000, "[]", "{}"),
    *(
        "\0",
        "\udce9",
        "\ud800",
        "\x85",
        "\ufeff",
        "\u2028",
        "'",
        '"',
        '"\\ud800"',
        "? ",
        "*a",
        "&a",
        "a: &a [*a]",
        "!!x",
    ),
    *(
        "!!python/object:os.system x",
        "{class_path: os.system}",
        "[[[]]]",
        "{7: 8}",
        "[1, x, null]",
        "{x: }",
        "a,b",
        "\n",
    ),
    *(
        "/dev/zero",
        "/dev/fd/0",
        "/",
        ".",
        "..",
        "~",
        "a" * 5000,
        "a/" * 2000,
        "<(x)",
        "%s",
        "$HOME",
        "2024-01-01",
        "1_0",
    ),
    *("query", "[query, x]", "bnb.nf4", "bf16-true", "qa", "cpu", "localhost:99999", "0.0.0.0", "https://u:p@h/x"),
]


@pytest.fixture(autouse=True)
def nothing_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The value "-" reads what is typed, which pytest does not allow."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())


@cache
def command(script: str) -> tuple[type[Any], list[str]]:
    """The settings of a command, and its flags."""
    config = get_type_hints(load_script(script).main)["config"]
    parser = cli._parser(config)
    flags = sorted({flag for action in parser._actions for flag in action.option_strings})
    return config, [flag for flag in flags if flag not in ("--help", "-h") and not flag.startswith("--print_config")]


words = st.one_of(st.sampled_from(VALUES), st.text(max_size=20))


@st.composite
def arguments(draw: st.DrawFn, script: str) -> list[str]:
    """A few flags of a command, joined to their values or not."""
    argv: list[str] = []
    for _ in range(draw(st.integers(1, 3))):
        flag, value = draw(st.sampled_from(command(script)[1])), draw(words)
        argv += draw(st.sampled_from([[f"{flag}={value}"], [flag, value], [flag], [f"{flag}x", value]]))
    return argv


def takes(script: str, argv: list[str]) -> bool:
    """property.holds for what is typed."""

    def use() -> None:
        config = cli.parse(command(script)[0], argv)
        getattr(config, "notes", list)()
        if isinstance(config, FinetuneConfig):
            cli.to_yaml(config)

    content = "\n".join([script, *map(ascii, argv)]).encode()
    return holds(KIND, content, use)


@pytest.mark.parametrize("script", ENTRY_POINTS, ids=str)
def test_a_command_takes_what_is_typed_or_refuses_it_in_words(script: Any) -> None:
    @quick(6)
    @given(arguments(str(script)))
    def run(argv: list[str]) -> None:
        takes(str(script), argv)

    with kept():
        run()


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("script", ENTRY_POINTS, ids=str)
def test_each_flag_takes_each_value_or_refuses_it_in_words(script: Any) -> None:
    flags = command(str(script))[1]
    with kept():
        accepted = [takes(str(script), [f"{flag}={value}"]) for flag in flags for value in VALUES]
    print(f"{script}: {len(accepted)} tried, {sum(accepted)} accepted")


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("script", ENTRY_POINTS, ids=str)
def test_thousands_of_lines_are_taken_or_refused_in_words(script: Any) -> None:
    accepted: list[bool] = []

    @slow
    @given(arguments(str(script)))
    def run(argv: list[str]) -> None:
        accepted.append(takes(str(script), argv))

    with kept():
        run()
    print(f"{script}: {len(accepted)} tried, {sum(accepted)} accepted")


def test_what_once_broke_a_command_no_longer_does() -> None:
    for case in cases(KIND):
        script, *argv = case.read_text().split("\n")
        takes(script, [literal_eval(word) for word in argv])
