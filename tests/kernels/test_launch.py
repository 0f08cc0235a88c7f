"""A run asks before it begins if kernels run on the card, and blocks shrink until they fit."""

from types import SimpleNamespace

import pytest
import torch

from lit_qlora.kernels import launch
from lit_qlora.kernels.launch import fitting, stages, why_no_kernels

pytestmark = pytest.mark.skipif(not launch.AVAILABLE, reason="needs Triton")
CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("capability", "shared", "dtype", "reason"),
    [
        ((7, 0), 96, torch.float16, "compute capability 7.0, kernels need 7.5"),
        ((7, 5), 64, torch.bfloat16, "compute capability 7.5, bfloat16 needs 8.0"),
        ((13, 0), 48, torch.bfloat16, "49,152 bytes of shared memory, kernels need 65,536"),
        ((7, 5), 64, torch.float16, ""),
        ((8, 6), 99, torch.bfloat16, ""),
        ((9, 0), 227, torch.float16, ""),
    ],
)
def test_a_card_that_kernels_do_not_run_on_has_a_reason(
    capability: tuple[int, int], shared: int, dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(shared_memory_per_block_optin=shared * 2**10)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(launch, "_of_card", launch._of_card.__wrapped__)
    assert why_no_kernels.__wrapped__(CUDA, dtype).endswith(reason)
    assert bool(why_no_kernels.__wrapped__(CUDA, dtype)) == bool(reason)


def test_a_card_of_another_maker_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert why_no_kernels.__wrapped__(CUDA, torch.float16) == "the GPU is not NVIDIA's"


def test_a_block_is_the_largest_half_that_fits_twice() -> None:
    assert [fitting(256, 100, room) for room in (51_200, 51_199, 6_400, 6_399)] == [256, 128, 32, 16]
    assert [stages(1000, 4, room) for room in (10_000, 3_999, 1_000, 10)] == [4, 3, 1, 1]


@pytest.mark.parametrize("room", [3_200, 100, 0, -1])
def test_no_block_is_smaller_than_an_instruction_takes(room: int) -> None:
    assert fitting(256, 100, room, least=32) == 32
