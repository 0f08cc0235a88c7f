"""A base that is gathered on GPUs trains as one that is there, to the bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lit_qlora.sharded import HostEmbedding
from tests.conftest import ROOT
from tests.gpu.test_resume_gpu import run
from tests.run.forked import ending

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
SAME = ["--precision=bf16-true", "--deterministic", "--train.keep_dequantized=0", "--train.cuda_graphs=never"]


@pytest.mark.parametrize("scheme", ["none", "bnb.nf4-dq", "bnb.int8"])
@pytest.mark.parametrize(
    "path",
    [["--train.recompute=none"], ["--train.recompute=offload"], ["--train.recompute=full", "--train.fast=false"]],
)
def test_one_process_that_gathers_from_itself_learns_the_same(tmp_path: Path, scheme: str, path: list[str]) -> None:
    flags = [*SAME, *path, f"--quantize={scheme}", "--data.packing=true", "--data.pack_length=512"]
    run(tmp_path / "whole", *flags)
    run(tmp_path / "shared", *flags, "--strategy=sharded")
    assert ending(tmp_path / "shared") == ending(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_reads_an_embedding_of_the_host_without_waiting(dtype: torch.dtype) -> None:
    weight, tokens = torch.randn(300, 64, device="cuda", dtype=dtype), torch.randint(0, 300, (2, 5), device="cuda")
    embedding = HostEmbedding(weight)
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = embedding(tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, weight[tokens])
    assert torch.cuda.memory_allocated() - before < weight.nbytes  # not copied


@TWO
@pytest.mark.parametrize("path", [["--train.recompute=none"], ["--train.recompute=full", "--train.fast=false"]])
def test_two_processes_that_share_a_base_learn_what_two_with_copies_do(tmp_path: Path, path: list[str]) -> None:
    flags = [*SAME, *path, "--devices=2", "--eval.generate=2", "--eval.max_new_tokens=8"]
    run(tmp_path / "copies", *flags)
    run(tmp_path / "shared", *flags, "--strategy=sharded")
    assert ending(tmp_path / "shared") == ending(tmp_path / "copies")


@TWO
@pytest.mark.parametrize("dead", ["first", "other"])
def test_a_process_that_is_killed_ends_the_others(tmp_path: Path, dead: str) -> None:
    out = tmp_path / "out"
    flags = [f"--out_dir={out}", "--train.max_steps=100000", "--train.save_every=1", "--quantize=bnb.nf4"]
    first = subprocess.Popen(
        [sys.executable, "finetune/lora.py", *flags, "--devices=2", "--strategy=sharded", "--data.val_fraction=0"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
    )
    while not list(out.glob("step-??????")):
        assert first.poll() is None
        time.sleep(0.2)
    (other,) = children_of(first.pid)
    os.kill(first.pid if dead == "first" else other, signal.SIGKILL)
    end = time.monotonic() + 60
    first.wait(60)
    while Path(f"/proc/{other}").exists() and "Z" not in Path(f"/proc/{other}/stat").read_text().rpartition(")")[2][:3]:
        assert time.monotonic() < end
        time.sleep(0.2)


def children_of(pid: int) -> list[int]:
    """Processes of this program that `pid` has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"finetune/lora.py" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except (OSError, IndexError):
            continue
    return found
