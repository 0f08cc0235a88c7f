"""A model whose base is shared computes the same bits as one that holds it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_qlora.checkpoint.checkpoint import load_stored
from lit_qlora.fused import fuse
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.lora.layer import add_lora
from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import SCHEMES, Storage
from lit_qlora.settings import LoRAConfig
from tests.conftest import tiny_model, write_checkpoint
from tests.train.test_parallel import loopback, together

__all__ = ["loopback"]
HERE = torch.device("cpu")
SOME, ALL = ("query", "value"), ("all",)
TORCH = {"n_layer": 3, "kv_latent_size": 64, "latent_rope_size": 8, "latent_value_size": 16, "n_kv_head": 4}
OWN = {
    "n_layer": 3, "shared_kv_layers": 1, "qk_norm": "head", "norm_position": "both", "per_layer_size": 64,
    "per_layer_vocab": 320,
}  # fmt: skip
MIXTURE = {"family": "qwen3_moe", "qk_norm": "head", "n_expert": 4, "n_expert_per_token": 2, "expert_size": 64}
CASES = [("plain", "bnb.nf4-dq", SOME, {"n_layer": 5})]
MORE = [
    *(("plain", scheme, ALL, {"n_layer": 5}) for scheme in SCHEMES),
    ("plain", "bnb.nf4-dq", ALL, {"n_layer": 3, **MIXTURE}),
    *((policy, "bnb.nf4-dq", ALL, {"n_layer": 3}) for policy in ("none", "attn", "full")),
    *(("full", scheme, ALL, {"n_layer": 3}) for scheme in ("none", "bnb.int8", "bnb.fp4")),
    ("full", "none", ALL, {"n_layer": 3, **MIXTURE}),
    ("none", "bnb.nf4-dq", ALL, {"n_layer": 3, **MIXTURE}),
    ("full", "bnb.nf4-dq", ALL, TORCH),
    ("full", "bnb.nf4-dq", ALL, OWN),
]
"""Path (of the fast one its policy), scheme, targets and changes of the model."""


def gradients(model: GPT, path: str, targets: tuple[Any, ...]) -> dict[str, Tensor]:
    """Those of two equal micro-batches, and the losses."""
    torch.manual_seed(1)
    add_lora(model, LoRAConfig(r=4, targets=targets, dropout=0.0))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.05)
    model.train()
    model.recompute = True
    if path != "plain":
        fused = fuse(model, ahead=False)
        fused.carries = False
        fused.set_recompute([path] * len(model.blocks))  # type: ignore[list-item]
    tokens = torch.randint(0, 300, (2, 17))
    losses = []
    for _ in range(2):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        losses.append(loss.detach())
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "losses": torch.stack(losses)}


@pytest.mark.parametrize(
    ("path", "scheme", "targets", "changes"),
    [*CASES, *(pytest.param(*case, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]) for case in MORE)],
)
def test_gradients_are_those_of_a_base_in_one_process_to_the_bit(
    tmp_path: Path, path: str, scheme: str, targets: tuple[str, ...], changes: dict[str, Any]
) -> None:
    if path != "plain" and not AVAILABLE:
        pytest.skip("needs Triton")
    directory = write_checkpoint(tmp_path / "base", tiny_model(**changes))
    storage = Storage(torch.float32, scheme)  # type: ignore[arg-type]

    def work(fabric: Any) -> list[str]:
        shared = gradients(load_stored(directory, storage, HERE, sharded=True, embedding_on_host=True), path, targets)
        if fabric.global_rank:
            return []
        whole = gradients(load_stored(directory, storage, HERE), path, targets)
        assert any(bool(tensor.any()) for tensor in whole.values())
        return [name for name in whole if not torch.equal(shared[name], whole[name])]

    assert together(tmp_path, work) == [[], []]
