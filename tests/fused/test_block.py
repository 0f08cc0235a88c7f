"""A block's attention writes its output where the projection reads it, if it can; not a bit of a result changes."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_qlora.fused import attention, flash_4, fuse
from lit_qlora.fused.block import FusedBlock, SavedBlock
from lit_qlora.fused.passes import Pass
from lit_qlora.kernels import lora_products
from lit_qlora.kernels.launch import AVAILABLE
from tests.fused.test_flash_4 import Library
from tests.fused.test_fused import adapted_model, batch, gradients

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="needs Triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="in float32, so for the interpreter"),
]
ONE: dict[str, Any] = {"n_layer": 1, "targets": ("query", "projection")}
TOKENS = batch(1, 6)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """FlashAttention 4, as if it were installed and taken."""
    one = Library()
    monkeypatch.setattr(flash_4, "_library", lambda: flash_4._Library(one.forward, one.backward))
    monkeypatch.setattr(flash_4, "takes", lambda *_: True)
    monkeypatch.setattr(attention, "has_flash", lambda *_: True)
    return one


def blocks_saved(monkeypatch: pytest.MonkeyPatch) -> list[SavedBlock]:
    """What the attention of each block saves from now on."""
    saved: list[SavedBlock] = []

    def attend(self: FusedBlock, *arguments: Any) -> tuple[SavedBlock, Tensor, Tensor]:
        result = plain(self, *arguments)
        saved.append(result[0])
        return result

    plain = FusedBlock._attend
    monkeypatch.setattr(FusedBlock, "_attend", attend)
    return saved


@pytest.mark.parametrize(
    ("changes", "policy"),
    [
        ({}, "none"),
        ({"dropout": 0.3, "scheme": "bnb.nf4"}, "full"),
        ({"attention_sinks": True, "n_kv_head": 4}, "attn"),
        ({"r": 80, "dropout": 0.3}, "mlp"),
        ({"r": 80}, "full"),
        ({"lora": {"dora": True}, "norm_position": "both"}, "full"),
    ],
    ids=str,
)
def test_the_results_are_those_of_a_copy_beside_z(
    changes: dict[str, Any], policy: Any, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted_model(**ONE | changes)
    fuse(model).set_recompute([policy])
    results = []
    for aligned, outputs in ((True, 2 if policy == "full" else 1), (False, 0)):
        monkeypatch.setattr(flash_4, "_aligned", lambda room, aligned=aligned: aligned)
        library.given.clear()
        torch.manual_seed(3)
        results.append(gradients(model, *TOKENS))
        assert len(library.given) == outputs
    (loss, found), (expected_loss, expected) = results
    assert torch.equal(loss, expected_loss)
    assert {name for name in expected if not torch.equal(found[name], expected[name])} == set()


def test_nothing_is_copied_and_one_tensor_is_saved(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def copies(*_: Any) -> None:
        raise AssertionError

    model, saved = adapted_model(**ONE), blocks_saved(monkeypatch)
    fuse(model).set_recompute(["none"])
    monkeypatch.setattr(lora_products, "copy_rows", copies)
    model.loss(*TOKENS)
    (one,) = saved
    assert isinstance(one.attended, Tensor)
    assert one.z_projection is not None
    storage = one.attended.untyped_storage()
    assert one.z_projection.untyped_storage().data_ptr() == storage.data_ptr()
    assert storage.nbytes() == 6 * (64 + 4) * 4  # as a plan counts both


@pytest.mark.parametrize("policy", ["none", "full"])
def test_what_attention_has_found_is_freed_before_the_gradient_of_its_input(
    policy: Any, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backward(self: FusedBlock, *arguments: Any) -> Tensor | None:
        gc.collect()  # Triton's interpreter holds tensors in cycles
        left.append([storage() is not None for storage in library.given])
        return plain(self, *arguments)

    plain, left = FusedBlock._qkv_backward, list[list[bool]]()
    monkeypatch.setattr(FusedBlock, "_qkv_backward", backward)
    model = adapted_model(**ONE)
    fuse(model).set_recompute([policy])
    model.loss(*TOKENS).backward()
    assert left == [[False] * (2 if policy == "full" else 1)]


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": ("query",)},
        {"attention_gate": True, "qk_norm": "head"},
        {"r": 2},
    ],
    ids=["no adapter of the projection", "a gate", "rows that are not aligned"],
)
def test_attention_has_a_tensor_of_its_own_where_it_cannot_write_there(
    changes: dict[str, Any], library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, saved = adapted_model(**ONE | changes), blocks_saved(monkeypatch)
    fuse(model).set_recompute(["none"])
    model.loss(*TOKENS)
    assert not library.given
    assert isinstance(saved[0].attended, Tensor)
    assert saved[0].attended.is_contiguous()


def test_what_goes_to_the_host_has_rows_that_touch(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Tensor] = []
    monkeypatch.setattr(Pass, "save", lambda self, tensor, policy: sent.append(tensor) or tensor)
    model = adapted_model(**ONE | {"n_layer": 2})
    fused = fuse(model)
    fused.set_recompute(["offload", "none"])
    fused.blocks[1].fetches_below = False
    model.loss(*TOKENS)
    assert sent
    assert all(tensor.is_contiguous() for tensor in sent[:2])
    assert len(library.given) == 1
