"""The weights of a block lie in a slab as the fast path takes them, and are cut evenly."""

import json
from itertools import pairwise

import pytest
import torch

from lit_qlora.convert.families import read_config
from lit_qlora.fused.kernel_block import dense_mlp_of, mixer_of, mixing_layers, mlp_layers
from lit_qlora.fused.support import stacks_of_experts
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import SCHEMES, QuantizedLinear, Storage, part_specs
from lit_qlora.sharded import Slab
from tests.conftest import tiny_config

MIXTURE = {"family": "qwen3_moe", "n_expert": 3, "n_expert_per_token": 2, "expert_size": 64, "shared_expert_size": 64}


def slab_of(scheme: str, processes: int, **changes: object) -> Slab:
    config: ModelConfig = tiny_config(**changes)
    return Slab.of(GPT.skeleton(config).blocks[0], 0, Storage(torch.bfloat16, scheme), processes)  # type: ignore[arg-type]


def follow(slab: Slab, part: str, *layers: str) -> bool:
    """Whether a buffer of each layer begins where that of the one before ends, or none has it."""
    spans = {span.layer: span for span in slab.spans if span.part == part and span.layer in layers}
    ends = [(spans[one].start + spans[one].size, spans[other].start) for one, other in pairwise(layers) if spans]
    return all(end == start for end, start in ends)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_that_share_an_input_lie_end_to_end(scheme: str) -> None:
    slab = slab_of(scheme, 2)
    for part in {span.part for span in slab.spans}:
        assert follow(slab, part, "attn.query", "attn.key", "attn.value")
        assert follow(slab, part, "mlp.gate", "mlp.up")


def test_experts_lie_end_to_end_by_kind() -> None:
    slab = slab_of("bnb.nf4-dq", 2, **MIXTURE)
    experts = [f"mlp.experts.{i}" for i in range(3)]
    for part in ("packed", "absmax", "absmax_scale"):
        assert follow(slab, part, *(f"{expert}.{name}" for expert in experts for name in ("gate", "up")))
        assert follow(slab, part, *(f"{expert}.down" for expert in experts))


def test_no_bytes_are_two_layers() -> None:
    slab = slab_of("bnb.nf4", 1, **MIXTURE)
    spans = sorted(slab.spans, key=lambda span: span.start)
    assert all(one.start + one.size <= other.start for one, other in pairwise(spans))
    assert spans[-1].start + spans[-1].size <= slab.size


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_shares_are_equal(processes: int) -> None:
    slab = slab_of("bnb.nf4-dq", processes)
    assert slab.share * processes == slab.size
    assert slab.share % 256 == 0


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "none"])
@pytest.mark.parametrize("shape", [(3, 70), (128, 256)])
def test_the_buffers_of_a_layer_are_known_before_it_is_quantised(scheme: str, shape: tuple[int, int]) -> None:
    layer = QuantizedLinear(torch.randn(shape), None, scheme)  # type: ignore[arg-type]
    for name, spec in part_specs(scheme, shape, torch.float32).items():  # type: ignore[arg-type]
        assert (getattr(layer, name).shape, getattr(layer, name).dtype) == (spec.shape, spec.dtype)


@pytest.mark.slow
def test_the_stacks_of_every_family_lie_end_to_end() -> None:
    """Or the fast path would copy the bytes of whatever lies in a buffer when it is made."""
    from tests.reference import CASES, SMALL, transformers

    found = set()
    for case, (family, changes) in CASES.items():
        theirs = transformers.AutoConfig.for_model(family, **SMALL | changes)
        model = GPT.skeleton(read_config(json.loads(theirs.to_json_string(use_diff=False)), case))
        for i, block in enumerate(model.blocks):
            names = {layer: path for path, layer in block.named_modules()}
            dense = dense_mlp_of(block)
            stacks = [*mixing_layers(mixer_of(block)), *(mlp_layers(dense) if dense is not None else ())]
            stacks += stacks_of_experts(block)
            slab = Slab.of(block, i, Storage(torch.bfloat16), 2)
            for layers in stacks:
                paths = [names[layer] for layer in layers]
                if not follow(slab, "packed", *paths):
                    found.add((case, *paths))
    assert not found
