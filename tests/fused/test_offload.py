"""Activations in the host's memory; what is copied, and when, is tested where there is a GPU."""

import pytest
import torch

from lit_qlora.errors import ResourceError
from lit_qlora.fused import fuse
from lit_qlora.fused.offload import Offload, pin
from lit_qlora.kernels.launch import AVAILABLE
from tests.fused.test_fused import adapted_model, batch

ON_CPU = pytest.mark.skipif(not AVAILABLE or torch.cuda.is_available(), reason="in float32, so for the interpreter")


def test_where_the_host_has_no_pinned_memory_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **settings: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(
        ResourceError, match=r"no 0\.50 GiB of pinned memory left \(CUDA error: out of memory\)\.\nTake"
    ):
        pin(2**28, torch.bfloat16)


@ON_CPU
def test_what_another_loss_has_overwritten_is_not_taken_for_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Offload, "put", lambda self, x: 0)
    fused = fuse(adapted_model())
    fused.set_recompute(["none", "offload"])
    first = fused.model.loss(*batch())
    with torch.no_grad():
        fused.model.loss(*batch())  # which keeps nothing
    fused.model.loss(*batch())
    with pytest.raises(RuntimeError, match="a loss needs its backward pass before the next"):
        first.backward()
    fused.set_recompute(["none", "none"])
    first, second = fused.model.loss(*batch()), fused.model.loss(*batch())
    first.backward()
    second.backward()
