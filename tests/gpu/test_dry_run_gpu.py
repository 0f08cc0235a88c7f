"""A dry run on a GPU foretells time and memory of the run, on the fast path and on the plain one."""

import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

from tests.conftest import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision=bf16-true", "--train.cuda_graphs=never"],
        ["--precision=bf16-true", "--data.packing=true"],
        ["--precision=16-mixed"],
    ],
    ids=["fast", "fast, packed, with graphs", "plain, with a scale"],
)
def test_a_dry_run_foretells_the_run(tmp_path: Path, flags: list[str]) -> None:
    command = [sys.executable, "finetune/lora.py", f"--out_dir={tmp_path / 'out'}", "--quantize=bnb.nf4"]
    command += ["--lora.targets=all", "--train.max_steps=60", "--eval.every=1000", "--quantize_cache=none", *flags]
    dry = subprocess.run([*command, "--dry_run"], cwd=ROOT, capture_output=True, text=True, check=True)
    told = re.search(r"steps of ([\d.e-]+) s .* ([\d.]+) GiB at the peak", dry.stdout)
    assert told, dry.stdout
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    taken = [record for record in records if "tokens_per_second" in record][30:]
    seconds = median(record["tokens"] / record["tokens_per_second"] for record in taken)
    assert 0.2 < float(told[1]) / seconds < 5  # steps of milliseconds, on a host that others use too
    assert float(told[2]) == pytest.approx(taken[-1]["peak_gib"], rel=0.15, abs=0.02)
