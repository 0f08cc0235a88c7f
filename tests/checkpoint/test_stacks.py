"""Experts that are read from disk lie end to end at once, so that no block of them is ever in memory twice."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_qlora.checkpoint import quantized_cache
from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.checkpoint.stacks import Stacks
from lit_qlora.fused import fuse
from lit_qlora.fused.kernel_block import mixture_of
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.model.gpt import GPT
from lit_qlora.model.mlp import KINDS
from lit_qlora.quantize import QuantizedLinear, storage_bytes
from lit_qlora.settings import Scheme
from tests.conftest import tiny_model, write_checkpoint

EXPERTS = {"n_layer": 2, "n_expert": 6, "n_expert_per_token": 2, "expert_size": 192, "router_normalized": True}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mixture"), tiny_model(**EXPERTS))


def parts_of(model: GPT) -> list[list[Tensor]]:
    """What is to lie end to end: of each kind of layer of each block's experts each buffer, or the weights."""
    experts: list[Any] = [mixture_of(block).experts for block in model.blocks]
    kinds = [[getattr(expert, name) for expert in of for name in kind] for of in experts for kind in KINDS]
    names = ("packed", "absmax", "absmax_scale") if isinstance(kinds[0][0], QuantizedLinear) else ("weight",)
    return [[getattr(x, name).data for x in layers] for layers in kinds for name in names if hasattr(layers[0], name)]


@pytest.mark.parametrize("scheme", ["none", "bnb.nf4-dq", "bnb.int8"])
def test_experts_lie_end_to_end_and_are_what_each_is_by_itself(scheme: Scheme, mixture: Path) -> None:
    model, plain = load_model(mixture, quantize=scheme), load_model(mixture)
    for parts in parts_of(model):
        end = parts[0].storage_offset()
        for part in parts:
            assert part.untyped_storage().data_ptr() == parts[0].untyped_storage().data_ptr()
            assert part.storage_offset() == end
            end += part.numel()
        assert parts[0].untyped_storage().nbytes() == sum(part.nbytes for part in parts)
    for path, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear) and path != "head":
            alone = QuantizedLinear(plain.get_submodule(path).weight.data, None, scheme)
            assert torch.equal(layer.packed, alone.packed)
            assert torch.equal(layer.absmax, alone.absmax)


def test_experts_beside_an_mlp_lie_end_to_end_too(tmp_path: Path) -> None:
    model = load_model(write_checkpoint(tmp_path, tiny_model(**EXPERTS, experts_beside=True, router_norm=True)))
    assert all(len({part.untyped_storage().data_ptr() for part in parts}) == 1 for parts in parts_of(model))


@pytest.mark.skipif(not AVAILABLE or torch.cuda.is_available(), reason="the fast path on a CPU")
@pytest.mark.parametrize("scheme", ["none", "bnb.nf4-dq"])
def test_the_fast_path_takes_them_as_they_lie(scheme: Scheme, mixture: Path) -> None:
    model = load_model(mixture, quantize=scheme)
    before = [part.data_ptr() for parts in parts_of(model) for part in parts]
    fuse(model)
    assert [part.data_ptr() for parts in parts_of(model) for part in parts] == before


def bytes_now() -> int:
    """Of all storages of tensors that Python knows, outside the meta device."""
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter) and x.device.type != "meta"]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.parametrize("scheme", ["none", "bnb.nf4"])
def test_while_a_block_is_read_one_layer_is_there_twice(
    scheme: Scheme, mixture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, found = Stacks.place, []

    def placed(self: Stacks, path: str, layer: nn.Module) -> None:
        if path == "blocks.1.mlp.experts.5.up":  # behind it comes down, whose stack is there already
            found.append(bytes_now())
        place(self, path, layer)

    monkeypatch.setattr(Stacks, "place", placed)
    gc.collect()
    before = bytes_now()
    model = load_model(mixture, quantize=scheme)
    layer = 4 * 192 * 64
    assert found[0] - before <= sum(storage_bytes(model).values()) + 2 * layer
    del model


@pytest.mark.parametrize("scheme", ["bnb.nf4-dq", "bnb.int8"])
def test_the_cache_of_quantised_weights_holds_them(scheme: Scheme, tmp_path: Path) -> None:
    experts = EXPERTS | {"n_layer": 1, "n_expert": 3, "expert_size": 64}  # one scale of scales each: 4 bytes
    model = load_model(write_checkpoint(tmp_path / "model", tiny_model(**experts)), quantize=scheme)
    quantized_cache.write(tmp_path / "cache", model)
    read = quantized_cache.read(tmp_path / "cache", model.config, torch.float32, torch.device("cpu"))
    assert read is not None
    state, back = model.state_dict(), read.state_dict()
    assert state.keys() == back.keys()
    assert all(torch.equal(state[name], back[name]) for name in state)
