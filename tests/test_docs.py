"""What the documents promise is held by tests that exist."""

import re

from tests.conftest import ROOT

ROWS = [line.split("|")[1:-1] for line in (ROOT / "docs/faults.md").read_text().splitlines() if line.startswith("| F")]


DEFINED = set(
    re.findall(
        r"^def (test_\w+)\(",
        "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py")),
        re.MULTILINE,
    )
)


def test_every_promise_of_security_names_tests_that_exist() -> None:
    promises = (ROOT / "docs/security.md").read_text().split("\n\n")[2].splitlines()[2:]
    named = [set(re.findall(r"test_\w+", row.split("|")[3])) for row in promises]
    assert all(named)
    assert set().union(*named) - DEFINED == set()


def test_every_fault_has_a_row() -> None:
    assert [row[0].strip() for row in ROWS] == [f"F{number:02}" for number in range(1, 41)]


def test_every_fault_names_tests_that_exist_or_says_why_there_is_none() -> None:
    named = {row[0].strip(): set(re.findall(r"test_\w+", row[3])) for row in ROWS}
    assert {fault for fault, names in named.items() if not names} == {"F27"}
    assert {name for names in named.values() for name in names} - DEFINED == set()
