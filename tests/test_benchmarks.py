"""The programs in benchmarks/ that compare with other libraries run, on a toy and without a GPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_qlora.kernels.launch import AVAILABLE
from tests.conftest import ROOT

pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not AVAILABLE, reason="needs Triton")]


@pytest.mark.parametrize("workload", ["fixed", "packed"])
def test_peers_take_turns_and_one_that_is_absent_is_said_to_be(workload: str, tmp_path: Path) -> None:
    flags = f"--shape tiny --bf16 --workload {workload} --rows 1 --length 24 --r 4 --steps 1 --rounds 2"
    places = ["--work_dir", str(tmp_path), "--results", str(tmp_path / "rows.csv"), "--peers", "litgpt", "peft"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/peers.py"), *flags.split(), *places],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "litgpt: missing." in done.stdout
    assert "ours / peft:" in done.stdout
    ours, theirs = csv.DictReader((tmp_path / "rows.csv").read_text().splitlines())
    assert "ours" in ours["flags"]
    assert "peft" in theirs["flags"]
    assert all(int(row["tokens_per_second"]) > 0 for row in (ours, theirs))
