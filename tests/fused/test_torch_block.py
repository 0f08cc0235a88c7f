"""Blocks whose attention torch computes: the same loss and gradients as the plain path, whatever is recomputed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_qlora.fused import fuse
from lit_qlora.fused.graphs import Graphs
from lit_qlora.fused.memory import FastSizes
from lit_qlora.fused.torch_block import TorchBlock
from lit_qlora.fused.torch_stack import MOST_STACKS
from lit_qlora.generation.decode_step import why_not as why_not_decoded
from lit_qlora.kernels.dropout import Dropout
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.lora.layer import LoRALinear
from lit_qlora.model.gpt import GPT
from tests.fused.test_fused import DEVICE, Masked, adapted_model, assert_equal, batch, gradients
from tests.fused.test_graphs import Recording

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="needs Triton"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="in float32, so for the interpreter; tests/gpu is for the GPU"
    ),
]
LATENT = {
    "n_layer": 1,
    "n_kv_head": 4,
    "head_size": 32,
    "kv_latent_size": 64,
    "q_latent_size": 64,
    "latent_rope_size": 16,
    "latent_value_size": 16,
}


def latent_model(**changes: Any) -> GPT:
    """A model with latent attention, whose heads have wider keys than values."""
    return adapted_model(**{"targets": ("query", "latent", "key", "value", "projection")} | LATENT | changes)


def test_recomputing_changes_no_bit() -> None:
    model, results = latent_model(scheme="bnb.nf4", dropout=0.3), []
    fused = fuse(model)
    for policy in ("none", "full"):  # and attn in tests/fused/test_families.py
        fused.set_recompute([policy])  # type: ignore[list-item]
        torch.manual_seed(3)
        results.append(gradients(model, *batch()))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(gradient[name], results[0][1][name]) for name in gradient)


def test_adapters_on_some_layers_of_a_stack_and_none_of_a_block_suffice() -> None:
    model = latent_model(targets=("value", "latent"), scheme="bnb.nf4", n_layer=2, lora={"last_layers": 1})
    expected = gradients(model, *batch())
    fuse(model)
    assert_equal(gradients(model, *batch()), expected)


def test_dropout_is_that_of_the_plain_path_with_the_same_elements_dropped() -> None:
    model = latent_model(dropout=0.3)
    torch.manual_seed(5)
    seed = torch.randint(1, 2**31 - 1, (1,), device=DEVICE)
    numbers = {"down": 0, "latent": 0, "up": 1, "key": 2, "value": 2, "projection": 3}
    adapters = [(path, module) for path, module in model.named_modules() if isinstance(module, LoRALinear)]
    own = [module.dropout for _, module in adapters]
    for path, module in adapters:
        dropout = Dropout(0.3, seed, offset=MOST_STACKS * 2 + numbers[path.rpartition(".")[2]])
        module.dropout = Masked(24, module.in_features, dropout)  # type: ignore[assignment]
    expected = gradients(model, *batch())
    for (_, module), dropout in zip(adapters, own, strict=True):
        module.dropout = dropout
    fuse(model)
    torch.manual_seed(5)
    assert_equal(gradients(model, *batch()), expected)


@pytest.mark.slow
def test_a_replay_computes_what_the_plain_path_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_qlora.fused.graphs.SIGHTINGS", 1)
    model = latent_model(query_scale_beta=0.5, rope_original_block_size=4)
    batches = []
    for lengths in ([5, 7, 8], [9, 3, 8]):  # the replay has other positions and documents than the capture
        segments = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        batches.append((*batch(1, 20), None, positions, segments))
    expected = [gradients(model, *one) for one in batches]
    fused, recording = fuse(model), Recording()
    fused.graphs = Graphs(fused, 128, recording)
    gradients(model, *batches[0])
    for one, other in zip(batches, expected, strict=True):
        assert_equal(gradients(model, *one), other)
    assert (recording.captured, recording.replayed) == (2, 4)


def test_carried_weights_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, results = latent_model(scheme="bnb.nf4"), []
    fused = fuse(model)
    for carries in (False, True, True):  # the third pass reads what the second has carried over
        monkeypatch.setattr(FastSizes, "carries", lambda *_, carries=carries: [carries])
        results.append(gradients(model, *batch()))
        assert (fused.extra_bytes > 0) == carries
    assert all(torch.equal(loss, results[0][0]) for loss, _ in results)


def test_the_planner_knows_the_bytes_that_autograd_saves() -> None:
    model, length = latent_model(targets=("projection",), r=16), 48
    fused = fuse(model)
    (block,) = fused.blocks
    assert isinstance(block, TorchBlock)
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.nbytes >= length * 8 * tensor.element_size():  # neither a statistic nor a table of angles
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens, labels = batch(1, length)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.loss(tokens, labels)
    loss.backward()
    planned = 4 * length * fused.sizes._qkv - 4 * length * 64  # the output lies where the hooks do not see it
    assert planned <= sum(storages.values()) < 1.1 * planned


def test_decoding_takes_the_plain_path() -> None:
    assert why_not_decoded(latent_model()) == "kv_latent_size 64"
