"""What is installed has no fault that is known and mended."""

import re
import tomllib

import pytest

from tests.conftest import ROOT

MENDED = {
    "aiohttp": "3.14.3",
    "gitpython": "3.1.61",
    "h11": "0.16.0",  # CVE-2025-43859
    "jinja2": "3.1.6",  # CVE-2025-27516
    "mlflow-skinny": "3.16.0",
    "nltk": "3.10.3",
    "pyasn1": "0.6.4",
    "requests": "2.32.4",  # CVE-2024-47081
    "starlette": "1.3.1",  # CVE-2026-48710 and others
    "torch": "2.10",  # CVE-2025-32434 and later ones of torch.load(weights_only=True)
    "transformers": "5.10",
    "urllib3": "2.6.0",  # CVE-2025-66418
    "werkzeug": "3.0.6",  # CVE-2024-49767
}
"""The first version without the advisories that are known of a package."""


def version(text: str) -> tuple[int, ...]:
    parts = [int(part) for part in re.findall(r"\d+", text)]
    return (*parts, 0, 0, 0)[:3]


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=!~ ;]", requirement)[0].lower().replace("_", "-")


PINS = {
    name_of(line): line.split("==")[1]
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line and not line.startswith("#")
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    *PROJECT["dependencies"],
    *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
]


@pytest.mark.parametrize("package", MENDED)
def test_no_pin_is_older_than_the_version_that_mended_a_known_fault(package: str) -> None:
    assert version(PINS[package]) >= version(MENDED[package])


def test_no_requirement_admits_an_older_one() -> None:
    floors = {name_of(line): re.search(r">=([\d.]+)", line) for line in REQUIREMENTS}
    known = {name: floor[1] for name, floor in floors.items() if floor and name in MENDED}
    assert {"jinja2", "starlette", "torch", "h11"} <= set(known)
    assert [name for name, floor in known.items() if version(floor) < version(MENDED[name])] == []


def test_every_direct_dependency_is_pinned() -> None:
    direct = {name_of(line) for line in REQUIREMENTS} - {"lit-qlora"}
    # Trackio 0.43 does not take the pillow 13 that is pinned, so its extra is installed without constraints.
    assert direct - set(PINS) == {"trackio"}
