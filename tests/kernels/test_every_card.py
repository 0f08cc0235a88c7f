"""Every kernel takes no more shared memory than the cards have, from Turing on."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lit_qlora import kernels
from lit_qlora.kernels import launch
from tests.conftest import ROOT
from tests.kernels.compile_for_card import SHARED

QUICK = [(75, 32), (89, 16)]
"""Cards and ranks."""
pytestmark = pytest.mark.skipif(not launch.AVAILABLE, reason="needs Triton")


def compiled(arch: int, widths: list[int], ranks: list[int], *flags: str) -> dict[str, tuple[int, str]]:
    """Of each kernel, compiled for a card, the most bytes of shared memory and what they were launched with."""
    sizes = [f"--width={width}" for width in widths] + [f"--rank={rank}" for rank in ranks]
    command = [sys.executable, "-m", "tests.kernels.compile_for_card", str(arch), *sizes, *flags]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: (size, settings) for name, (size, settings) in json.loads(done.stdout).items()}


def launched_in_the_package() -> set[str]:
    """Names of all kernels that a function of the package launches."""
    files = Path(kernels.__path__[0]).glob("*.py")
    return {f"{file.stem}.{name}" for file in files for name in re.findall(r"\b(\w+)\[\(", file.read_text())}


def assert_fits(arch: int, widths: list[int], ranks: list[int], *flags: str) -> None:
    most = compiled(arch, widths, ranks, *flags)
    assert {name: it for name, it in most.items() if it[0] > SHARED[arch] * 2**10} == {}
    missing = launched_in_the_package() - set(most)
    assert missing == ({"fp8._weights", "fp8._rows"} if arch < 89 else set())


@pytest.mark.parametrize(("arch", "rank"), QUICK)
def test_every_kernel_fits_a_card(arch: int, rank: int) -> None:
    assert_fits(arch, [4096], [rank], "--few")


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "rank"), [*QUICK, (90, 16)])
def test_few_launches_of_a_kernel_take_as_much_as_all(arch: int, rank: int) -> None:
    few, all_ = (compiled(arch, [4096], [rank], *flags) for flags in (("--few",), ()))
    assert {name: size for name, (size, _) in few.items()} == {name: size for name, (size, _) in all_.items()}


@pytest.mark.slow
@pytest.mark.parametrize("width", [1024, 2048, 5120, 8192])
@pytest.mark.parametrize("arch", SHARED)
def test_every_kernel_of_any_width_and_rank_fits_every_card(arch: int, width: int) -> None:
    assert_fits(arch, [width], [4, 8, 16, 32, 64, 128, 256])


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED)
def test_every_kernel_becomes_machine_code(arch: int) -> None:
    assert launched_in_the_package() - set(compiled(arch, [4096], [16], "--machine-code")) <= {
        "fp8._weights",
        "fp8._rows",
    }


@pytest.mark.slow
def test_products_of_experts_never_wait_for_an_instruction_of_the_matrix_units() -> None:
    made = compiled(90, [4096], [16, 64], "--few", "--experts", "--machine-code")
    assert [name for name in made if name.startswith("experts_products") and "serialized" in name] == []
