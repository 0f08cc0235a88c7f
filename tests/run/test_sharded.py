"""Processes that share a base learn what one learns, and make the same gathers whatever happens in one of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_qlora.checkpoint.cut import Cut
from lit_qlora.evaluate import measures
from lit_qlora.run.resume import newest
from lit_qlora.sharded import ShardedBase
from lit_qlora.train import loop
from tests.conftest import ROOT, tiny_model, write_checkpoint, write_tokenizer
from tests.run.forked import Child, Start, at_save, ending, signals
from tests.run.test_ddp import EQUAL, WITH_TRITON, mixture, relative_difference, start_ranks, take_the_fast_path

__all__ = ["mixture", "start_ranks"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
StartRanks = Callable[..., list[Child]]
NO_VALIDATION = ["--eval.every=99", "--eval.before_training=false"]
BLOCKS = 5
SHARDED = [*EQUAL, "--strategy=sharded", "--quantize=bnb.nf4-dq"]


@pytest.fixture
def start(start: Start, tmp_path: Path) -> Start:
    """As elsewhere, with a base that has more blocks than there are buffers."""
    directory = write_checkpoint(tmp_path / "deep", tiny_model(n_layer=BLOCKS))
    write_tokenizer(directory)

    def begin(out: Path, *flags: str, before: Callable[[], object] | None = None) -> Child:
        base = [] if any(flag.startswith("--checkpoint_dir") for flag in flags) else [f"--checkpoint_dir={directory}"]
        return start(out, *base, *flags, before=before)

    return begin


def learns_the_same(
    start: Start,
    start_ranks: StartRanks,
    tmp_path: Path,
    *flags: str,
    ranks: int = 2,
    before: Callable[[int], Callable[[], object] | None] = lambda rank: None,
    fast: bool = False,
) -> str:
    """Let one process learn, and several that share the base; what these printed."""

    def entering(rank: int) -> Callable[[], object]:
        def enter() -> None:
            if fast:
                take_the_fast_path()
            if patch := before(rank):
                patch()

        return enter

    whole = [flag for flag in flags if flag != "--strategy=sharded"]
    one = start(tmp_path / "one", *whole, before=take_the_fast_path if fast else None)
    assert one.wait() == 0, one.said.read_text()
    children = start_ranks(tmp_path / "out", *flags, ranks=ranks, before=entering)
    assert [child.wait() for child in children] == [0] * ranks, children[0].said.read_text()
    metrics, tensors = relative_difference(tmp_path / "out", tmp_path / "one")
    assert metrics < 1e-5
    assert tensors < 1e-3  # Adam turns a rounding of a tiny gradient into a step
    said = children[0].said.read_text()
    assert f"path    {'fast' if fast else 'plain'}" in said
    assert "plain after all" not in said
    return said


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("scheme", ["none", "bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.int8"])
def test_processes_that_share_a_base_learn_what_one_does(
    start: Start, start_ranks: StartRanks, tmp_path: Path, scheme: str, ranks: int
) -> None:
    learns_the_same(start, start_ranks, tmp_path, *SHARDED, f"--quantize={scheme}", ranks=ranks)


@WITH_TRITON
@pytest.mark.parametrize("scheme", ["none", "bnb.nf4-dq", "bnb.int8"])
def test_they_do_on_the_fast_path(start: Start, start_ranks: StartRanks, tmp_path: Path, scheme: str) -> None:
    flags = [*SHARDED, f"--quantize={scheme}", "--train.max_steps=1", "--lora.targets=[all]", *NO_VALIDATION]
    learns_the_same(start, start_ranks, tmp_path, *flags, fast=True)


@WITH_TRITON
@pytest.mark.parametrize("fast", [False, True])
def test_they_do_with_experts(start: Start, start_ranks: StartRanks, tmp_path: Path, mixture: Path, fast: bool) -> None:
    flags = [*SHARDED, f"--checkpoint_dir={mixture}", "--lora.targets=[all,router]", "--train.max_steps=1"]
    flags += [*NO_VALIDATION, "--train.router_z_loss=0.001", "--train.router_balance_loss=0.01"]
    learns_the_same(start, start_ranks, tmp_path, *flags, fast=fast)


def test_they_do_with_packed_rows_and_a_head_that_learns(start: Start, start_ranks: StartRanks, tmp_path: Path) -> None:
    flags = [
        *SHARDED,
        "--data.packing=true",
        "--data.max_length=32",
        "--data.pack_length=64",
        "--lora.targets=[all,head]",
    ]
    learns_the_same(start, start_ranks, tmp_path, *flags, "--quantize_head=true")


def test_micro_batches_may_be_uneven(start: Start, start_ranks: StartRanks, tmp_path: Path) -> None:
    """Five samples, one at a time, are two micro-batches for one process and three for another."""
    flags = [*SHARDED, "--train.batch_size=5", "--train.micro_batch_size=1"]
    learns_the_same(start, start_ranks, tmp_path, *flags)


def runs_out(at: str, call: int) -> Callable[[], object]:
    """Let the memory of a process run out once, in its `call`th gather for a forward or a backward pass."""

    def patch() -> None:
        need, seen = ShardedBase.need, [0]

        def small(self: ShardedBase, block: int) -> None:
            need(self, block)
            inside = torch._C._current_graph_task_id() != -1
            seen[0] += inside == (at == "backward") and (inside or torch.is_grad_enabled())
            if seen[0] == call:
                seen[0] += 1
                raise torch.OutOfMemoryError("as if")

        ShardedBase.need = small  # type: ignore[method-assign]

    return patch


@pytest.mark.parametrize("at", ["forward", "backward"])
@pytest.mark.parametrize("call", [1, 2, 5])
def test_memory_may_run_out_in_one_process_at_any_block(
    start: Start, start_ranks: StartRanks, tmp_path: Path, at: str, call: int
) -> None:
    said = learns_the_same(
        start, start_ranks, tmp_path, *SHARDED, before=lambda rank: runs_out(at, call) if rank == 1 else None
    )
    assert said.count("2 rows at a time did not fit; the step is repeated with 1") == 1


def test_where_single_rows_do_not_fit_one_process_all_end(start_ranks: StartRanks, tmp_path: Path) -> None:
    def before(rank: int) -> Callable[[], object] | None:
        def patch() -> None:
            def never(*given: Any) -> torch.Tensor:
                raise torch.OutOfMemoryError("as if")

            loop.Gradients._pass = never  # type: ignore[method-assign]

        return patch if rank == 1 else None

    children = start_ranks(tmp_path / "out", *SHARDED, before=before)
    assert [child.wait() for child in children] == [6, 6]
    assert children[0].said.read_text().count("error: Out of memory.") == 2


def test_a_process_that_gathers_another_block_ends_the_run_before_an_update(
    start_ranks: StartRanks, tmp_path: Path
) -> None:
    """Both gather as often, so that nothing but the order tells."""

    def before(rank: int) -> Callable[[], object] | None:
        def patch() -> None:
            launch, seen = ShardedBase._launch, [0]

            def mistaken(self: ShardedBase, block: int, place: int) -> None:
                seen[0] += 1
                taken = (block + 2) % BLOCKS if seen[0] == 9 else block
                launch(self, taken, place)
                self._inside[place], self._work[block] = block, self._work.pop(taken)

            ShardedBase._launch = mistaken  # type: ignore[method-assign]

        return patch if rank == 1 else None

    flags = [*SHARDED, *NO_VALIDATION]
    children = start_ranks(tmp_path / "out", *flags, before=before)
    assert [child.wait() for child in children] == [6, 6]
    assert "error: The processes gathered different blocks" in children[0].said.read_text()


def test_answers_of_the_first_process_are_those_of_one(start: Start, start_ranks: StartRanks, tmp_path: Path) -> None:
    flags = [*SHARDED, "--eval.generate=2", "--eval.max_new_tokens=4"]
    learns_the_same(start, start_ranks, tmp_path, *flags)
    whole, shared = ((tmp_path / name / "samples.jsonl").read_text() for name in ("one", "out"))
    assert whole == shared


def test_tasks_of_lm_eval_are_asked_of_a_shared_base(
    start: Start, start_ranks: StartRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "finetune")
    flags = [*SHARDED, "--eval.tasks=[tiny_world_qa]", "--eval.tasks_limit=4", "--train.max_steps=1"]
    learns_the_same(start, start_ranks, tmp_path, *flags)
    one, several = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "out")
    )
    values = [[(key, record[key]) for record in log for key in record if "/" in key] for log in (one, several)]
    assert values[0]
    assert [key for key, _ in values[0]] == [key for key, _ in values[1]]
    assert [value for _, value in values[1]] == pytest.approx([value for _, value in values[0]], rel=1e-4)


def test_a_measure_that_fails_in_the_middle_leaves_the_others_in_step(
    start: Start, start_ranks: StartRanks, tmp_path: Path
) -> None:
    def before(rank: int) -> Callable[[], object] | None:
        def patch() -> None:
            answers = measures.answer

            def fails(model: Any, *given: Any) -> list[str]:
                model.gathers.need(0)
                model.gathers.need(1)
                raise ValueError("as if")

            assert answers
            measures.answer = fails

        return patch

    said = learns_the_same(
        start, start_ranks, tmp_path, *SHARDED, "--eval.generate=2", "--eval.max_new_tokens=4", before=before
    )
    assert "the answers after step 0 failed: ValueError: as if" in said


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_process_stops_all_and_any_number_resumes(
    start: Start, start_ranks: StartRanks, tmp_path: Path, signalled: int
) -> None:
    def before(rank: int) -> Callable[[], object] | None:
        return at_save(3, signals(signal.SIGTERM)) if rank == signalled else None

    children = start_ranks(tmp_path / "out", *SHARDED, before=before)
    assert [child.wait() for child in children] == [143, 143]
    assert newest(tmp_path / "out").step in (3, 4)
    whole = [flag for flag in SHARDED if flag != "--strategy=sharded"]
    if signalled:
        assert start(tmp_path / "out", *whole).wait() == 0
    else:
        assert [child.wait() for child in start_ranks(tmp_path / "out", *SHARDED, ranks=3)] == [0, 0, 0]
    assert start(tmp_path / "one", *whole).wait() == 0
    assert relative_difference(tmp_path / "out", tmp_path / "one")[0] < 1e-5


def test_a_signal_during_a_validation_stops_all(start_ranks: StartRanks, tmp_path: Path) -> None:
    def before(rank: int) -> Callable[[], object] | None:
        def patch() -> None:
            score, seen = measures._add_scores, [0]

            def hooked(*given: Any) -> None:
                seen[0] += 1
                if seen[0] == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                score(*given)

            measures._add_scores = hooked

        return patch if rank == 1 else None

    flags = [*SHARDED, "--train.micro_batch_size=1"]
    children = start_ranks(tmp_path / "out", *flags, before=before)
    assert [child.wait() for child in children] == [143, 143], children[0].said.read_text()
    assert [child.wait() for child in start_ranks(tmp_path / "out", *flags)] == [0, 0]
    assert ending(tmp_path / "out")[0][-1]["step"] == 8


@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_that_is_killed_in_a_pass_ends_the_run_with_a_message(
    start_ranks: StartRanks, tmp_path: Path, dead: int
) -> None:
    def before(rank: int) -> Callable[[], object] | None:
        def patch() -> None:
            need, seen = ShardedBase.need, [0]

            def hooked(self: ShardedBase, block: int) -> None:
                seen[0] += 1
                if seen[0] == 25:
                    os.kill(os.getpid(), signal.SIGKILL)
                need(self, block)

            ShardedBase.need = hooked  # type: ignore[method-assign]

        return patch if rank == dead else None

    children = start_ranks(tmp_path / "out", *SHARDED, before=before)
    begin = time.monotonic()
    statuses = [child.wait() for child in children]
    assert time.monotonic() - begin < 600
    assert statuses[dead] == -signal.SIGKILL
    assert statuses[1 - dead] == 6
    assert "error: Another process of this run has ended" in children[1 - dead].said.read_text()


def test_processes_under_two_agents_of_torchrun_are_one_run(start: Start, tmp_path: Path, examples_file: Path) -> None:
    """As on two machines with two GPUs each."""
    flags = ["--train.max_steps=3", "--train.batch_size=8", "--lora.dropout=0", "--quantize=bnb.nf4-dq"]
    assert start(tmp_path / "one", *flags).wait() == 0
    defaults = [f"--checkpoint_dir={tmp_path / 'deep'}", f"--data.path={examples_file}", "--data.prompt=qa"]
    defaults += ["--data.val_fraction=0.1", "--train.micro_batch_size=2", "--train.learning_rate=0.01"]
    defaults += ["--eval.every=3", f"--data.cache_dir={tmp_path / 'cache'}", f"--out_dir={tmp_path / 'out'}"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2"]
    agent += ["--master_addr=127.0.0.1", f"--master_port={port}"]
    command = [str(ROOT / "finetune/lora.py"), *defaults, *flags, "--strategy=sharded"]
    known = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    machines = [
        subprocess.Popen([*agent, f"--node_rank={i}", *command], env=known, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    said = [machine.communicate()[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "in each of 4 processes that share it" in said[0]
    metrics, tensors = relative_difference(tmp_path / "out", tmp_path / "one")
    assert metrics < 1e-5
    assert tensors < 1e-3


def test_a_process_that_is_killed_while_the_base_is_read_ends_the_run_with_a_message(
    start_ranks: StartRanks, tmp_path: Path
) -> None:
    def before(rank: int) -> Callable[[], object] | None:
        def patch() -> None:
            Cut._end = lambda self: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]

        return patch if rank == 1 else None

    children = start_ranks(tmp_path / "out", *SHARDED, before=before)
    assert [child.wait() for child in children] == [6, -signal.SIGKILL]
    assert "error: Another process of this run has ended" in children[0].said.read_text()
