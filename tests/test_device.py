"""What is asked of the device, and of which."""

import pytest
import torch

from lit_qlora.device import gpu_bytes


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
