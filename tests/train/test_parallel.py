"""Processes that train together exchange the sums of their gradients, and nothing else."""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, distributed, nn

from lit_qlora.errors import UsageError
from lit_qlora.train import parallel
from lit_qlora.train.parallel import DataParallel, processes, strategy, sum_gradients


def together(tmp_path: Path, what: Callable[[Fabric], Any], ranks: int = 2) -> list[Any]:
    """What a function returns in each of several processes."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def enter(rank: int) -> None:
        store = distributed.FileStore(str(tmp_path / "store"), ranks)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        try:
            answers.put((rank, what(Member(rank, ranks))))  # type: ignore[arg-type]
        except BaseException:
            answers.put((rank, traceback.format_exc()))
            raise

    children = [context.Process(target=enter, args=(rank,)) for rank in range(ranks)]
    for child in children:
        child.start()
    found = dict(answers.get() for _ in children)
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * ranks, found
    return [found[rank] for rank in range(ranks)]


class Member:
    """What sum_gradients wants to know of Fabric."""

    device = torch.device("cpu")

    def __init__(self, rank: int, world_size: int) -> None:
        self.global_rank, self.world_size = rank, world_size


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


@pytest.mark.parametrize("at_once", [1, 5, 2**23])
def test_each_gradient_is_the_sum_of_those_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(parallel, "AT_ONCE", at_once)

    def work(fabric: Fabric) -> list[list[float] | None]:
        learners = [nn.Parameter(torch.zeros(n)) for n in (3, 2, 4, 1)]
        for i, parameter in enumerate(learners):
            parameter.grad = torch.full_like(parameter, 10.0 * i + fabric.global_rank)
        sum_gradients(fabric, learners)
        return [listed(p.grad) for p in learners]

    for gradients in together(tmp_path, work, ranks=3):
        assert gradients == [[3.0] * 3, [33.0] * 2, [63.0] * 4, [93.0]]


def test_what_only_some_reach_counts_and_what_none_reaches_stays_without_a_gradient(tmp_path: Path) -> None:
    def work(fabric: Fabric) -> list[list[float] | None]:
        learners = [nn.Parameter(torch.zeros(2)) for _ in range(4)]
        for i in ((0, 3), (1, 3))[fabric.global_rank]:
            learners[i].grad = torch.ones(2) + i
        sum_gradients(fabric, learners)
        return [listed(p.grad) for p in learners]

    for gradients in together(tmp_path, work):
        assert gradients == [[1.0, 1.0], [2.0, 2.0], None, [8.0, 8.0]]


def test_gradients_stay_where_they_are(tmp_path: Path) -> None:
    """The fast path writes them into one tensor."""

    def work(fabric: Fabric) -> list[float] | None:
        home, parameter = torch.ones(6), nn.Parameter(torch.zeros(2))
        parameter.grad = home[2:4]
        sum_gradients(fabric, [parameter])
        return listed(home)

    assert together(tmp_path, work)[0] == [1.0, 1.0, 2.0, 2.0, 1.0, 1.0]


def test_all_start_from_the_adapter_of_the_first(tmp_path: Path) -> None:
    def work(fabric: Fabric) -> list[Any]:
        layer = nn.Linear(1, 2)
        layer.weight.requires_grad = False
        nn.init.constant_(layer.weight, float(fabric.global_rank))
        nn.init.constant_(layer.bias, float(fabric.global_rank))
        assert DataParallel().setup_module(layer) is layer
        return [listed(layer.weight.detach().flatten()), listed(layer.bias.detach())]

    assert together(tmp_path, work)[1] == [[1.0, 1.0], [0.0, 0.0]]


def test_a_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    said = tmp_path / "said"
    reader, writer = os.pipe()
    if not (parent := os.fork()):
        if not os.fork():
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
            with parallel.ends_with_parent(every=0.01):
                os.write(writer, b"watches")
                signal.pause()
        os.read(reader, 7)
        os._exit(0)
    os.close(writer)
    os.waitpid(parent, 0)
    while os.read(reader, 7):
        pass  # until the last process that could write has ended
    assert "error: The process that started this one has ended" in said.read_text()


def test_one_process_exchanges_nothing() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    sum_gradients(Fabric(accelerator="cpu", devices=1), [parameter])
    assert parameter.grad is None


def test_several_devices_or_machines_work_together() -> None:
    assert strategy("auto", 1, 1) == "auto"
    for given in (("auto", 2, 1), ("auto", 1, 2), ("ddp", 1, 1)):
        assert isinstance(strategy(*given), DataParallel)  # type: ignore[arg-type]


def listed(tensor: Tensor | None) -> list[float] | None:
    return None if tensor is None else tensor.tolist()


def test_torchrun_says_how_many_processes_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes(2, 3) == (2, 3)
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert processes(1, 1) == processes("auto", 1) == processes(4, 2) == (4, 2)
    with pytest.raises(UsageError, match="devices is 3, but torchrun started 4 processes on each of 2 machines"):
        processes(3, 1)
    with pytest.raises(UsageError, match="num_nodes is 5, but torchrun started 4 processes on each of 2 machines"):
        processes(4, 5)
