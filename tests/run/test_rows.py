"""Processes that share each row learn what one learns."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_qlora.data import read_data
from lit_qlora.evaluate import measures
from lit_qlora.run.banner import plan_run, savings
from lit_qlora.run.resume import newest
from lit_qlora.settings import DataConfig, FinetuneConfig, TrainConfig
from lit_qlora.sharded import RowParts
from tests.conftest import tiny_config
from tests.run.forked import Child, Start, at_save, ending, signals
from tests.run.test_ddp import EQUAL, WITH_TRITON, mixture, relative_difference, start_ranks, take_the_fast_path

__all__ = ["mixture", "start_ranks"]
StartRanks = Callable[..., list[Child]]
PACKED = ["--data.packing=true", "--data.max_length=32", "--data.pack_length=64"]


def learn_the_same(
    start: Start, start_ranks: StartRanks, tmp_path: Path, *flags: str, ranks: int, parts: int, fast: bool = False
) -> str:
    """Let one process learn, and several of which `parts` share each row; what these printed."""
    before = take_the_fast_path if fast else None
    assert start(tmp_path / "one", *flags, before=before).wait() == 0
    shared = [*flags, f"--sequence_parallel={parts}"]
    children = start_ranks(tmp_path / "out", *shared, ranks=ranks, before=lambda rank: before)
    assert [child.wait() for child in children] == [0] * ranks, children[0].said.read_text()
    metrics, tensors = relative_difference(tmp_path / "out", tmp_path / "one")
    assert metrics < 1e-5
    assert tensors < 1e-3  # Adam turns a rounding of a tiny gradient into a step
    return children[0].said.read_text()


def test_processes_that_share_each_row_learn_what_one_does(
    start: Start, start_ranks: StartRanks, tmp_path: Path
) -> None:
    flags = [*EQUAL, "--quantize=bnb.nf4", "--train.max_steps=2"]
    said = learn_the_same(start, start_ranks, tmp_path, *flags, ranks=2, parts=2)
    assert "each row over 2 devices" in said


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
@pytest.mark.parametrize("packed", [[], PACKED])
def test_groups_of_them_take_different_rows(
    start: Start, start_ranks: StartRanks, tmp_path: Path, strategy: str, packed: list[str]
) -> None:
    """With one sample at a time some groups have a micro-batch less."""
    flags = [*EQUAL, *packed, "--train.batch_size=5", "--train.micro_batch_size=1", f"--strategy={strategy}"]
    flags += ["--quantize=bnb.nf4-dq", "--lora.targets=[all,head]", "--eval.generate=3"]
    learn_the_same(start, start_ranks, tmp_path, *flags, ranks=4, parts=2)


@WITH_TRITON
@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], PACKED, ["--strategy=sharded"]])
def test_they_do_on_the_fast_path(start: Start, start_ranks: StartRanks, tmp_path: Path, flags: list[str]) -> None:
    flags = [*EQUAL, *flags, "--quantize=bnb.nf4-dq", "--train.max_steps=1", "--lora.targets=[all]"]
    said = learn_the_same(start, start_ranks, tmp_path, *flags, ranks=2, parts=2, fast=True)
    assert "path    fast" in said
    assert "plain after all" not in said


@pytest.mark.slow
def test_they_balance_the_routers_over_all_tokens(
    start: Start, start_ranks: StartRanks, tmp_path: Path, mixture: Path
) -> None:
    flags = [*EQUAL, f"--checkpoint_dir={mixture}", "--lora.targets=[all,router]", "--eval.train_samples=4"]
    flags += ["--train.router_z_loss=0.001", "--train.router_balance_loss=0.01", "--train.max_steps=1"]
    learn_the_same(start, start_ranks, tmp_path, *flags, ranks=2, parts=2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_to_one_process_stops_all_and_any_number_resumes(
    start: Start, start_ranks: StartRanks, tmp_path: Path, ranks: int
) -> None:
    def before(rank: int) -> Callable[[], object] | None:
        return at_save(3, signals(signal.SIGTERM)) if rank == 1 else None

    shared = [*EQUAL, "--sequence_parallel=2"]
    children = start_ranks(tmp_path / "out", *shared, before=before)
    assert [child.wait() for child in children] == [143, 143]
    assert newest(tmp_path / "out").step in (3, 4)
    again = start_ranks(tmp_path / "out", *EQUAL, f"--sequence_parallel={ranks}", ranks=ranks)
    assert [child.wait() for child in again] == [0] * ranks
    assert start(tmp_path / "one", *EQUAL).wait() == 0
    assert relative_difference(tmp_path / "out", tmp_path / "one")[0] < 1e-5


@pytest.mark.slow
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

    flags = [*EQUAL, "--sequence_parallel=2", "--train.micro_batch_size=1"]
    children = start_ranks(tmp_path / "out", *flags, before=before)
    assert [child.wait() for child in children] == [143, 143], children[0].said.read_text()
    assert [child.wait() for child in start_ranks(tmp_path / "out", *flags)] == [0, 0]
    assert ending(tmp_path / "out")[0][-1]["step"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_where_memory_runs_out_in_one_process_all_end(start_ranks: StartRanks, tmp_path: Path, strategy: str) -> None:
    """The others wait for it in the middle of a row, so nothing can be repeated."""

    def before(rank: int) -> Callable[[], object] | None:
        def patch() -> None:
            exchange, seen = RowParts.exchange, [0]

            def hooked(rows: RowParts, x: torch.Tensor) -> torch.Tensor:
                seen[0] += 1
                if seen[0] == 40:
                    raise torch.OutOfMemoryError("as if")
                return exchange(rows, x)

            RowParts.exchange = hooked  # type: ignore[method-assign]

        return patch if rank == 1 else None

    flags = [*EQUAL, "--sequence_parallel=2", f"--strategy={strategy}", "--eval.before_training=false"]
    children = start_ranks(tmp_path / "out", *flags, before=before)
    assert [child.wait() for child in children] == [6, 6]
    said = children[0].said.read_text()
    assert "error: Out of memory." in said
    assert "error: Another process of this run has ended" in said


def test_what_cannot_be_divided_is_refused(
    finetune: Callable[..., int], capsys: pytest.CaptureFixture[str], no_weights: None
) -> None:
    assert finetune("--sequence_parallel=2") == 2
    assert "sequence_parallel 2 does not divide 1 devices into equal groups" in capsys.readouterr().err
    assert finetune("--sequence_parallel=3", "--devices=6") == 2
    assert (
        "sequence_parallel 3 does not suit test/tiny: so many devices cannot divide its 4 heads"
        in capsys.readouterr().err
    )
    assert finetune("--sequence_parallel=2", "--devices=4", "--train.batch_size=1") == 2
    assert "train.batch_size 1 leaves some of 4 devices without a sample" in capsys.readouterr().err


def test_the_plan_counts_the_activations_of_a_part(tiny_checkpoint: Path, examples_file: Path) -> None:
    data = DataConfig(path=str(examples_file), prompt="qa", cache_dir="none", packing=True, pack_length=96)
    whole = FinetuneConfig(checkpoint_dir=tiny_checkpoint, precision="32-true", data=data, devices=4)
    whole = replace(whole, train=TrainConfig(micro_batch_size=1))
    read = read_data(whole)
    part = replace(whole, sequence_parallel=4)
    config = tiny_config()
    exchanged = 4 * (6 * config.n_head + 8 * 4) * config.head_size * 24
    once = 4 * config.ffn_size * config.n_embd  # of a layer, not of tokens
    of_part, of_whole = (plan_run(one, read).activations for one in (part, whole))
    assert of_part - exchanged - once == (of_whole - once) / 4
    assert "--sequence_parallel 2 saves" in savings(whole, read)
