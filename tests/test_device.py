"""What is asked of the device, and of which."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from lit_qlora.device import (
    Peak,
    counting_graphs,
    forget_graphs,
    gpu_bytes,
    host_bytes,
    let_segments_grow,
    move,
    on_default_stream,
    peak_gib,
    reset_peak,
)
from lit_qlora.quantize import QuantizedLinear
from lit_qlora.settings import OptimizerConfig, TrainConfig
from lit_qlora.train.optim import make_optimizer


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "SLURM_LOCALID"])
@pytest.mark.parametrize(("rank", "expected"), [("", 7 + 2), ("0", 7 + 2), ("1", 5 + 1), ("2", 7 + 2)])
def test_the_memory_of_a_process_is_what_it_has_and_what_is_free_on_its_own_gpu(
    variable: str, rank: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((7, 80), (5, 80))[device])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: (2, 1)[device])
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    if rank:
        monkeypatch.setenv(variable, rank)
    assert gpu_bytes() == expected


def test_without_a_gpu_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_bytes() is None


def segment(total: int, allocated: int, pool: tuple[int, int], device: int = 1) -> dict[str, Any]:
    return {"device": device, "segment_pool_id": pool, "total_size": total, "allocated_size": allocated}


class Allocator:
    """Counts as torch does: what is allocated at most since the last reset, and the segments of its pools."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, allocated: int) -> None:
        self.allocated = self.peak = allocated
        self.segments = [segment(9000, 6000, (0, 0))]
        monkeypatch.setattr("lit_qlora.device.PEAK", Peak())
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(self, "peak", self.allocated))
        monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: self.segments)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.mark.parametrize("device", [torch.device("cuda"), torch.device("cuda", 1)], ids=str)
def test_the_peak_has_what_graphs_hold_from_their_capture_on(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_has = Allocator(monkeypatch, allocated=5775)
    torch_has.peak = 7223  # of passes without graphs
    assert peak_gib(device) * 2**30 == 7223
    with counting_graphs(device):
        torch_has.allocated, torch_has.peak = 5807, 7300
        of_another_gpu = segment(50, 0, (0, 1), device=0)
        torch_has.segments += [segment(1582, 32, (0, 1)), segment(21, 0, (1, 0)), of_another_gpu]
    assert peak_gib(device) * 2**30 == 5807 + 1571
    with counting_graphs(device):
        torch_has.peak = 7370  # in memory that the pools have already
    assert peak_gib(device) * 2**30 == 5807 + 1571
    torch_has.peak = 6500  # of a pass without a graph, beside them
    assert peak_gib(device) * 2**30 == 6500 + 1571
    reset_peak(device)
    assert peak_gib(device) * 2**30 == 5807 + 1571


def test_a_capture_that_fails_leaves_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_has, device = Allocator(monkeypatch, allocated=5), torch.device("cuda")
    torch_has.peak = 8
    with suppress(RuntimeError), counting_graphs(device):
        torch_has.segments.append(segment(4, 0, (0, 1)))
        raise RuntimeError
    assert peak_gib(device) * 2**30 == 5 + 4


def test_the_peak_lacks_what_graphs_held_once_they_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_has, device = Allocator(monkeypatch, allocated=50), torch.device("cuda")
    # The allocator keeps a pool whose graphs are gone until its cache is emptied.
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: torch_has.segments.pop())
    with counting_graphs(device):
        torch_has.segments.append(segment(20, 1, (0, 1)))
    forget_graphs(device)
    assert peak_gib(device) * 2**30 == 50 + 19  # so far
    torch_has.peak = 60  # of a pass in the memory that they held
    assert peak_gib(device) * 2**30 == 50 + 19
    torch_has.peak = 75
    assert peak_gib(device) * 2**30 == 75


def test_on_a_cpu_the_peak_is_that_of_the_process() -> None:
    before = peak_gib(torch.device("cpu"))
    reset_peak(torch.device("cpu"))
    assert peak_gib(torch.device("cpu")) >= before > 0.01


def test_of_the_hosts_memory_a_container_may_have_less(tmp_path: Path) -> None:
    assert host_bytes(tmp_path) is None

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    write("proc/meminfo", "MemTotal:  900 kB\nMemAvailable:    500 kB\nCached: 7 kB\n")
    assert host_bytes(tmp_path) == 500 * 1024
    write("proc/self/cgroup", "0::/job/step\n")
    stat = "anon 7\nactive_file 20000\ninactive_file 30000\n"  # of files that were read
    for group, limit, used in (("job/step", "max", 90_000), ("job", "400000", 150_000), ("", "600000", 170_000)):
        write(f"sys/fs/cgroup/{group}/memory.max", f"{limit}\n")
        write(f"sys/fs/cgroup/{group}/memory.current", f"{used}\n")
        write(f"sys/fs/cgroup/{group}/memory.stat", stat)
    assert host_bytes(tmp_path) == 400_000 - 150_000 + 50_000
    write("proc/self/cgroup", "0::/../elsewhere\n")  # a container's own is where the root is
    assert host_bytes(tmp_path) == 600_000 - 170_000 + 50_000
    write("proc/self/cgroup", "5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n")
    write("sys/fs/cgroup/memory.max", "max\n")
    write("sys/fs/cgroup/memory/job/memory.limit_in_bytes", "1000\n")
    write("sys/fs/cgroup/memory/job/memory.usage_in_bytes", "500\n")
    write("sys/fs/cgroup/memory/job/memory.stat", "inactive_file 1\ntotal_inactive_file 200\ntotal_active_file 3\n")
    assert host_bytes(tmp_path) == 703


def test_this_machine_says_how_much_it_has() -> None:
    found = host_bytes()
    assert found is None or 0 < found < 2**50


def test_a_users_own_setting_of_the_allocator_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    let_segments_grow()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    let_segments_grow()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    let_segments_grow()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64"


class Stream:
    """Notes what waits for what."""

    done: ClassVar[list[str]] = []
    current: ClassVar[list["Stream"]] = []

    def __init__(self, name: str) -> None:
        self.name = name

    def wait_stream(self, other: "Stream") -> None:
        """Note it."""
        self.done.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def made_current(self) -> Iterator[None]:
        """Let it be the current one."""
        self.current.append(self)
        yield
        self.current.pop()


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> type[Stream]:
    """A GPU whose current stream is not the default one."""
    default = Stream("default")
    monkeypatch.setattr(Stream, "current", [Stream("own")])
    monkeypatch.setattr(Stream, "done", [])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream.current[-1])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: default)
    monkeypatch.setattr(torch.cuda, "stream", Stream.made_current)
    return Stream


def test_on_the_default_stream_work_is_in_the_order_of_the_current_one(streams: type[Stream]) -> None:
    with on_default_stream():
        assert streams.current[-1].name == "default"
        streams.done.append("works")
        with on_default_stream():  # which is the current one now
            streams.done.append("works on")
    assert streams.done == ["default waits for own", "works", "works on", "own waits for default"]


def quantize() -> None:
    QuantizedLinear(torch.ones(64, 64), None, "bnb.nf4-dq")


def update() -> None:
    parameter = nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    optimizer = make_optimizer([("a", parameter)], OptimizerConfig(name="adamw8bit"), TrainConfig())
    optimizer.step()


@pytest.mark.parametrize("use", [quantize, update])
def test_bitsandbytes_which_knows_no_other_stream_is_called_on_the_default_one(
    streams: type[Stream], use: Callable[[], None]
) -> None:
    use()
    assert streams.done == ["default waits for own", "own waits for default"]


@contextmanager
def full() -> Iterator[None]:
    """A place without memory."""
    raise torch.OutOfMemoryError
    yield


@pytest.mark.parametrize("elsewhere", [nullcontext, full])
def test_memory_is_exchanged_below_tensors_and_their_views(elsewhere: Callable[[], Any]) -> None:
    weight = torch.arange(12.0).view(3, 4)
    parameter, view = nn.Parameter(weight), weight[1:].T
    move(weight.untyped_storage(), elsewhere)
    assert torch.equal(weight, torch.arange(12.0).view(3, 4))
    weight[1, 2] = -1
    assert parameter[1, 2] == view[2, 0] == -1
