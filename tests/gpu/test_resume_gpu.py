"""On a GPU too, a run that was killed ends as the one that was not: to the bit with --deterministic."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_qlora.lora.adapter import read_adapter
from tests.conftest import ROOT
from tests.run.forked import ending

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KILLED = (
    "from tests.run.forked import *; from lit_qlora.settings import FinetuneConfig; "
    "at_save(4, signals(signal.SIGKILL))(); "
    "cli.run(load_script('finetune/lora.py').main, FinetuneConfig, sys.argv[1:])"
)


def run(out: Path, *flags: str, killed: bool = False) -> None:
    start = ["-c", KILLED] if killed else ["finetune/lora.py"]
    mine = [
        f"--out_dir={out}",
        "--train.max_steps=10",
        "--train.save_every=1",
        "--eval.every=5",
        "--eval.max_samples=16",
    ]
    mine += ["--train.batch_size=16", "--quantize=bnb.nf4", "--lora.targets=all", "--quantize_cache=none"]
    done = subprocess.run(
        [sys.executable, *start, *mine, *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (-9 if killed else 0), done.stderr + done.stdout


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision=bf16-true", "--deterministic"],
        ["--precision=bf16-true", "--train.fast=false", "--optimizer.name=paged-adamw8bit", "--deterministic"],
        ["--precision=16-mixed", "--deterministic"],
        ["--precision=bf16-true"],
        ["--precision=bf16-true", "--deterministic", "--data.packing=true", "--data.pack_length=1024"],
    ],
    ids=["fast", "plain, paged 8-bit Adam", "fp16 with its scale", "fast, not deterministic", "packed, with graphs"],
)
def test_a_killed_run_ends_as_the_one_that_was_not(tmp_path: Path, flags: list[str]) -> None:
    run(tmp_path / "whole", *flags)
    run(tmp_path / "out", *flags, killed=True)
    run(tmp_path / "out", *flags)
    mine, whole = ending(tmp_path / "out"), ending(tmp_path / "whole")
    if "--deterministic" in flags:
        assert mine == whole
        return
    one, other = (read_adapter(tmp_path / name / "final").peft_tensors for name in ("out", "whole"))
    for name in other:
        assert float((one[name] - other[name]).norm()) <= 1e-5 * float(other[name].norm())
