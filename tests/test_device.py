"""What is asked of the device, and of which."""

import os
from pathlib import Path

import pytest
import torch

from lit_qlora.device import gpu_bytes, host_bytes, let_segments_grow


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
