"""What the plan says that the plain path saves is what autograd saves."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_qlora.lora.layer import add_lora
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT
from lit_qlora.run.plain_memory import Rows, adapted_sizes, saved
from lit_qlora.settings import LoRAConfig

SIZES: dict[str, Any] = {
    "name": "x",
    "n_layer": 2,
    "n_embd": 256,
    "n_head": 8,
    "n_kv_head": 4,
    "head_size": 32,
    "ffn_size": 512,
    "vocab_size": 64,
    "block_size": 512,
}
EXPERTS: dict[str, Any] = {"n_expert": 8, "n_expert_per_token": 2, "expert_size": 192}
ROWS = Rows(tokens=256, length=128, packed=False)
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"qk_norm": "head"},
    "gemma2": {"norm": "rms_plus_one", "norm_position": "both", "ffn": "geglu_tanh", "attention_softcap": 50.0},
    "mixtral": EXPERTS,
    "one dense block": EXPERTS | {"dense_layers": (0,)},
    "gpt-oss": EXPERTS | {"attention_sinks": True, "router": "softmax_chosen", "router_bias": True},
    "qwen2-moe": EXPERTS | {"shared_expert_size": 192},
    "gemma4-moe": EXPERTS
    | {"norm_position": "both", "qk_norm": "head", "value_norm": True, "ffn": "geglu_tanh", "experts_beside": True}
    | {"router_norm": True, "router_normalized": True, "block_scale": True},
}


def count_saved(model: GPT, tokens: Tensor) -> int:
    """Bytes of what autograd saves in the blocks, but for parameters."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, tuple[Tensor, int]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (tensor, storage.nbytes())  # alive, so that its address stays its own
        return tensor

    model.norm = torch.nn.Identity()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.hidden(tokens)
    return sum(size for _, size in found.values())


@pytest.mark.parametrize(
    ("case", "dtype"), [*((name, torch.float32) for name in CASES), ("layer norms", torch.bfloat16)]
)
def test_the_plain_path_saves_what_the_plan_counts(case: str, dtype: torch.dtype) -> None:
    config = ModelConfig(**SIZES | CASES.get(case, {"norm": "layer", "ffn": "gelu_tanh"}))
    lora = LoRAConfig(r=8, alpha=16.0, targets=("all",), dropout=0.0)
    model = GPT(config).to(dtype)
    add_lora(model, lora)
    counted = count_saved(model.train(), torch.randint(0, 64, (2, 128)))
    planned = sum(saved(model, lora, adapted_sizes(model, dora=False), dtype.itemsize, ROWS))
    if not (config.attention_softcap or config.attention_sinks):
        # Attention on a CPU gives its output by heads, so that the projection reads a copy.
        planned += config.n_layer * ROWS.tokens * config.n_head * config.head_size * dtype.itemsize
    assert planned == pytest.approx(counted, rel=0.03)


def test_large_heads_that_share_keys_keep_their_scores_without_a_mask_alone() -> None:
    def scores(rows: Rows, **sizes: int) -> float:
        model = GPT.skeleton(ModelConfig(**SIZES | sizes))
        lora = LoRAConfig(targets=("all",), dropout=0.0)
        add_lora(model, lora)
        longer = Rows(2 * rows.tokens, 2 * rows.length, rows.packed)
        one, two = (sum(saved(model, lora, adapted_sizes(model, dora=False), 4, some)) for some in (rows, longer))
        return (two - 2 * one) / (2 * 2 * rows.tokens)  # what a token more in a row costs a token in a block

    packed = Rows(ROWS.tokens, ROWS.length, packed=True)
    assert scores(ROWS, head_size=512) / ROWS.length == 8 * 4.0
    assert scores(ROWS, head_size=512, n_kv_head=8) == scores(ROWS) == 0
    assert scores(packed, head_size=512) / ROWS.length == 4.0  # the mask
