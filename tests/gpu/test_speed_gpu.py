"""The training step does not become slower, nor larger, unnoticed."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_step_is_within_a_tenth_of_the_speed_that_was_recorded() -> None:
    """Measured against a large product on the same GPU in the same run; see benchmarks/speed.py."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/speed.py"), "--check"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("length", [2048, 4096])
def test_the_memory_of_a_step_is_within_a_tenth_of_its_floor(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama-2-7B in nf4 with double quantisation, r 16 on all layers; see benchmarks/floors.py."""
    flags = ["--rows", "1", "--length", str(length), "--recompute", "none", "offload", "full", "--steps", "1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/step.py"), *flags, "--results", str(tmp_path / "rows.csv")],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    floors, results = importlib.import_module("floors"), importlib.import_module("results")
    sizes = [floors.sizes(row) for row in results.read_rows(tmp_path / "rows.csv")]
    assert len(sizes) == 3
    for peak, plan, floor in sizes:
        assert peak <= 1.10 * floor
        assert peak == pytest.approx(plan, rel=0.1)
