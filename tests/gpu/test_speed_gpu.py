"""The training step does not become slower unnoticed."""

import subprocess
import sys

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
