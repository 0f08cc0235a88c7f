"""On a GPU in float16 the fast path is no farther from float64 than the plain one, and learns the same curve."""

import copy
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_qlora.fused import fuse
from lit_qlora.model.gpt import GPT
from tests.gpu.test_fused_gpu import (
    LAYOUTS,
    MODELS,
    adapted,
    assert_as_near_as_plain,
    batch,
    errors,
    gradients,
    pytestmark,
)

__all__ = ["pytestmark"]
STEPS = 200
RATE = 3e-4
"""At 1e-3 the norms of gradients jump between 1.3 and 3.6, and the losses of both paths with them."""


def adapted_half(**changes: Any) -> GPT:
    """As adapted, with weights in float16."""
    model = adapted(**changes)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.bfloat16:
            tensor.data = tensor.data.half()
    for module in model.modules():
        if getattr(module, "dtype", None) == torch.bfloat16:
            module.dtype = torch.float16  # what a quantised weight is read back in
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MODELS)
def test_errors_are_no_larger_than_those_of_the_plain_path(kind: str, layout: str) -> None:
    assert_as_near_as_plain(adapted_half(**MODELS[kind]), layout, of_loss=5e-4)


def curve(model: GPT, scale: float) -> Tensor:
    """Losses of STEPS updates on the same few batches, with a scaler that begins at `scale`; how often it skipped."""
    scaler = torch.amp.GradScaler("cuda", init_scale=scale, growth_interval=50)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=3e-4
    )  # at 1e-3 the norms of gradients jump, and both paths with them
    torch.manual_seed(0)
    batches, losses = [batch(2, 256) for _ in range(4)], []
    for step in range(STEPS):
        tokens, labels = batches[step % len(batches)]
        loss = model.loss(tokens, labels) / labels.numel()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_two_hundred_steps_are_those_of_the_plain_path() -> None:
    model = adapted_half()
    plain, fast = copy.deepcopy(model), model
    fuse(fast)
    theirs, ours = curve(plain, 2.0**16), curve(fast, 2.0**16)
    assert ours[-20:].mean() < 0.8 * ours[:4].mean()
    torch.testing.assert_close(ours.view(-1, 4).mean(1), theirs.view(-1, 4).mean(1), rtol=1e-2, atol=1e-2)


def test_a_step_that_overflows_is_left_out() -> None:
    model = adapted_half()
    fuse(model)
    losses = curve(model, 2.0**40)
    assert torch.isfinite(losses).all()
    assert losses[-20:].mean() < 0.9 * losses[:4].mean()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [64, 99, 163])
def test_blocks_for_cards_with_less_shared_memory_compute_the_same(
    shared: int, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_qlora.kernels import launch

    model = adapted(r=64)
    fuse(model)
    arguments = LAYOUTS[layout]()
    loss, expected = gradients(model, *arguments)
    monkeypatch.setattr(launch, "_of_card", lambda index: shared * 2**10)
    small_loss, found = gradients(model, *arguments)
    assert torch.equal(small_loss, loss) or abs(small_loss - loss) < 1e-3 * loss
    assert max(errors(found, expected)) < 1e-2


@pytest.mark.parametrize("kind", ["nf4", "one key head", "windows"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_in_plain_torch_is_that_of_the_fast_implementations(
    layout: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_qlora.fused import attention

    model = adapted(**MODELS[kind])
    fuse(model)
    arguments = LAYOUTS[layout]()
    loss, expected = gradients(model, *arguments)
    monkeypatch.setattr(attention, "has_flash", lambda *_: False)
    plain_loss, found = gradients(model, *arguments)
    assert abs(plain_loss - loss) < 1e-3 * loss
    assert statistics.median(errors(found, expected)) < 2e-2
