"""DoRA on a GPU in bf16: about as near to float64 as the plain path, the same bits whatever is recomputed."""

from typing import Any

import pytest
import torch
from torch import nn

from lit_qlora.lora.layer import LoRALinear, add_lora
from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import quantize_linears
from lit_qlora.settings import LoRAConfig
from tests.conftest import tiny_model
from tests.gpu.test_fused_gpu import (
    LAYOUTS,
    SHAPE,
    assert_as_near_as_plain,
    assert_recomputing_changes_no_bit,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODELS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "bf16": {"scheme": "none"},
    "rank 128": {"r": 128},
    "norms behind, heads of 128": {"norm_position": "both", "qk_norm": "head", "head_size": 128},
}


def model_of(scheme: Any = "bnb.nf4", r: int = 16, dropout: float = 0.0, **changes: Any) -> GPT:
    model = tiny_model(std=0.05, **SHAPE | changes).to("cuda", torch.bfloat16)
    quantize_linears(model, scheme)
    torch.manual_seed(1)
    add_lora(model, LoRAConfig(r=r, alpha=2 * r, targets=("all",), dropout=dropout, dora=True))
    for module in model.modules():
        if isinstance(module, LoRALinear) and module.magnitude is not None:
            nn.init.normal_(module.lora_b, std=0.05)
            module.magnitude.data *= 1 + 0.2 * torch.rand_like(module.magnitude)
    return model.train()


@pytest.mark.parametrize("layout", ["cudnn", "packed"])
@pytest.mark.parametrize("kind", MODELS)
def test_errors_are_about_those_of_the_plain_path(kind: str, layout: str) -> None:
    assert_as_near_as_plain(model_of(**MODELS[kind]), layout, most=1.2)


@pytest.mark.parametrize("policy", ["attn", "offload", "full", "full-offload"])
def test_recomputing_and_offloading_change_no_bit(policy: Any) -> None:
    from lit_qlora.fused import fuse

    model = model_of(dropout=0.1)
    assert_recomputing_changes_no_bit(model, fuse(model), LAYOUTS["packed"](), policy)
