"""Attention asks what the GPU has, and plain torch computes what its fast implementations do not."""

import pytest
import torch

from lit_qlora.fused.attention import has_flash

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("capability", "size", "runs"),
    [
        ((7, 5), 128, False),
        ((8, 0), 128, True),
        ((8, 9), 208, False),
        ((9, 0), 208, True),
        ((12, 0), 256, True),
        ((9, 0), 320, False),
        ((9, 0), 100, False),
    ],
)
def test_flash_attention_is_taken_where_it_runs(
    capability: tuple[int, int], size: int, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_flash.__wrapped__(size, CUDA) == runs


def test_a_cpu_has_no_flash_attention() -> None:
    assert not has_flash(128, torch.device("cpu"))
