"""Two GPUs learn what one does, on the fast path and on the plain one."""

from pathlib import Path

import pytest
import torch

from lit_qlora.lora.adapter import read_adapter
from tests.gpu.test_resume_gpu import run
from tests.run.forked import ending

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("fast", [True, False])
def test_two_gpus_learn_what_one_does(tmp_path: Path, fast: bool) -> None:
    flags = ["--precision=bf16-true", "--lora.dropout=0", f"--train.fast={str(fast).lower()}", "--optimizer.name=sgd"]
    run(tmp_path / "one", *flags)
    run(tmp_path / "two", *flags, "--devices=2")
    for one, two in zip(ending(tmp_path / "one")[0], ending(tmp_path / "two")[0], strict=True):
        for name in ("loss", "grad_norm", "val_loss"):
            assert one.get(name) == pytest.approx(two.get(name), rel=1e-2)
    mine, whole = (read_adapter(tmp_path / name / "final").peft_tensors for name in ("two", "one"))
    for name in whole:
        assert float((mine[name] - whole[name]).norm()) <= 2e-2 * float(whole[name].norm())
