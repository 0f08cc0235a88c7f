"""Rows over two GPUs learn what rows on one do."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.test_resume_gpu import run
from tests.run.forked import ending

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
SAME = ["--quantize=bnb.nf4", "--lora.dropout=0", "--train.keep_dequantized=0", "--train.cuda_graphs=never"]
PACKED = ["--data.packing=true", "--data.pack_length=512"]
NEAR = {"--precision=32-true": 1e-4, "--precision=bf16-true": 1e-2}
"""Relative difference of the first losses and gradient norms."""


def metrics(path: Path) -> list[float]:
    """Losses and norms of the first steps, and of the validation before."""
    records: list[dict[str, Any]] = ending(path)[0][:4]
    return [record[key] for record in records for key in ("val_loss", "loss", "grad_norm") if key in record]


@pytest.mark.parametrize(
    ("precision", "flags"),
    [
        ("--precision=bf16-true", ["--train.recompute=none"]),
        ("--precision=bf16-true", [*PACKED, "--train.recompute=full"]),
        ("--precision=bf16-true", [*PACKED, "--train.recompute=offload", "--eval.generate=2"]),
        ("--precision=bf16-true", [*PACKED, "--strategy=sharded"]),
        ("--precision=32-true", [*PACKED, "--train.fast=false"]),
    ],
)
def test_two_gpus_that_share_rows_learn_what_one_does(tmp_path: Path, precision: str, flags: list[str]) -> None:
    run(tmp_path / "one", *SAME, precision, *(flag for flag in flags if flag != "--strategy=sharded"))
    run(tmp_path / "two", *SAME, precision, *flags, "--devices=2", "--sequence_parallel=2")
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert two == pytest.approx(one, rel=NEAR[precision])
