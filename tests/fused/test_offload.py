"""Activations in the host's memory. Here streams and events do nothing; copies beside kernels need a GPU."""

import contextlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_qlora.errors import ResourceError
from lit_qlora.fused import Fused, fuse
from lit_qlora.fused.block import FusedBlock
from lit_qlora.fused.head import Head
from lit_qlora.fused.memory import ON_HOST, FastSizes
from lit_qlora.fused.mlp import DenseMlp
from lit_qlora.fused.offload import MOST_LEAVING, Offload, OnHost, pin
from lit_qlora.kernels.launch import AVAILABLE
from tests.fused.test_fused import adapted_model, batch, gradients

ON_CPU = pytest.mark.skipif(not AVAILABLE or torch.cuda.is_available(), reason="in float32, so for the interpreter")


class Nothing:
    """A stream or an event."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    empty_like = torch.empty_like
    for name in ("Stream", "Event", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch, "empty_like", lambda like, device="", **layout: empty_like(like, **layout))
    monkeypatch.setattr("lit_qlora.fused.offload.pin", lambda numbers, dtype: torch.empty(numbers, dtype=dtype))


@ON_CPU
@pytest.mark.parametrize(
    ("policies", "keeps"),
    [
        (["full-offload", "offload", "none", "offload"], True),
        pytest.param(["offload"] * 4, True, marks=pytest.mark.slow),
        pytest.param(["offload", "full-offload", "offload", "none"], False, marks=pytest.mark.slow),
        pytest.param(["offload", "offload", "none", "none"], False, marks=pytest.mark.slow),
        pytest.param(["offload"] * 4, False, marks=pytest.mark.slow),
        pytest.param(["none", "offload", "full", "offload"], False, marks=pytest.mark.slow),
        pytest.param(["full-offload"] * 4, False, marks=pytest.mark.slow),
        pytest.param(["full-offload", "full-offload", "full", "none"], False, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.usefixtures("streams")
def test_tensors_come_back_as_they_were_and_none_is_on_its_way_where_most_memory_is_needed(
    policies: Any, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = fuse(adapted_model(n_layer=4))
    expected = gradients(fused.model, *batch())
    monkeypatch.setattr(FastSizes, "sends_qkv", lambda self, block: block % 2 == 1)
    monkeypatch.setattr(FastSizes, "keeps_mlp", lambda self, tokens: keeps)
    fused.set_recompute(policies)
    off, head, backward, of_mlp = fused.offload, Head.losses, FusedBlock.backward, DenseMlp.backward
    held: list[tuple[str, int, int]] = []

    def watched_head(self: Head, *arguments: Any) -> Any:
        held.append(("head", len(off.leaving), len(off.coming)))
        return head(self, *arguments)

    def watched_mlp(self: DenseMlp, *arguments: Any) -> Tensor:
        assert not off.leaving
        return of_mlp(self, *arguments)

    def watched_backward(self: FusedBlock, *arguments: Any, **settings: Any) -> Tensor | None:
        found = backward(self, *arguments, **settings)
        held.append((self.recompute, len(off.leaving), len(off.coming)))
        return found

    monkeypatch.setattr(Head, "losses", watched_head)
    monkeypatch.setattr(DenseMlp, "backward", watched_mlp)
    monkeypatch.setattr(FusedBlock, "backward", watched_backward)
    for tokens in (batch(), batch()):
        loss, found = gradients(fused.model, *tokens)
        assert torch.equal(loss, expected[0])
        assert all(torch.equal(found[name], expected[1][name]) for name in expected[1])
    # Only where a block is followed by one that offloads is something on its way.
    below = [policies[i - 1] if i else "" for i in reversed(range(4))]
    leaving = 0 if keeps else MOST_LEAVING - 2
    leaving_last, held_last = {"offload": (leaving, 2), "full-offload": (0, 1)}.get(policies[-1], (0, 0))
    assert held[0] == ("head", leaving_last, 0)
    assert off.held == held_last
    assert [(leaving, coming) for _, leaving, coming in held[1:5]] == [(0, int(one in ON_HOST)) for one in below]


@pytest.mark.slow
@ON_CPU
@pytest.mark.usefixtures("streams")
def test_pinned_memory_is_used_again_for_shorter_rows() -> None:
    fused = fuse(adapted_model())
    expected = [gradients(fused.model, *(part[:, :length] for part in batch()[:2])) for length in (12, 5, 9)]
    fused.set_recompute(["offload", "offload"])
    addresses = []
    for length, (loss, each) in zip((12, 5, 9), expected, strict=True):
        found = gradients(fused.model, *(part[:, :length] for part in batch()[:2]))
        assert torch.equal(found[0], loss)
        assert all(torch.equal(found[1][name], each[name]) for name in each)
        addresses.append([buffer.data_ptr() for buffer in fused.offload.pinned])
    assert addresses[0] == addresses[1] == addresses[2]
    assert len(addresses[0]) == 5  # input and attended of two blocks, and one's middle


def test_pinned_memory_is_as_large_as_asked_for_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[int, int] = {}

    def register(address: int, size: int, flags: int) -> int:
        registered[address] = size
        return flags

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=registered.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    buffer = pin(3, torch.bfloat16)
    assert registered == {buffer.data_ptr(): 6}
    del buffer
    assert not registered


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs Linux with huge pages")
def test_pinned_memory_is_in_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 times fewer pages to get and to pin."""
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    buffer = pin(2**22, torch.bfloat16)
    of_mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    spans = [(*(int(end, 16) for end in text.split(" ")[0].split("-")), text) for text in of_mappings if text]
    (flags,) = (text.split("VmFlags:")[1].split() for low, high, text in spans if low <= buffer.data_ptr() < high)
    assert "hg" in flags


def test_a_host_without_pinned_memory_gets_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 2)  # cudaErrorMemoryAllocation
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with pytest.raises(ResourceError, match=r"no 0\.50 GiB of pinned memory left\.\nTake"):
        pin(2**28, torch.bfloat16)
    with pytest.raises(ResourceError, match="of pinned memory left"):  # nor so many addresses
        pin(2**50, torch.bfloat16)


def offloading() -> Fused:
    fused = fuse(adapted_model())
    fused.set_recompute(["none", "offload"])
    return fused


@ON_CPU
def test_a_loss_is_refused_whose_tensors_on_the_host_were_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Offload, "put", lambda self, x: OnHost(0))
    fused = offloading()
    first = fused.model.loss(*batch())
    with torch.no_grad():
        fused.model.loss(*batch())  # which saves nothing
    fused.model.loss(*batch())
    with pytest.raises(RuntimeError, match="a loss needs its backward pass before the next"):
        first.backward()
    fused.set_recompute(["none", "none"])
    first, second = fused.model.loss(*batch()), fused.model.loss(*batch())
    first.backward()
    second.backward()
