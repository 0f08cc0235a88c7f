"""Rows whose tokens lie over several processes give the losses and gradients of whole rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from lit_qlora.fused import Fused, fuse
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.lora.layer import add_lora
from lit_qlora.model.gpt import GPT, IGNORE
from lit_qlora.settings import LoRAConfig, Recompute
from lit_qlora.sharded import RowParts
from tests.conftest import tiny_model
from tests.train.test_parallel import loopback, together

__all__ = ["loopback"]
needs_triton = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")

LATENT = {"kv_latent_size": 64, "latent_rope_size": 8, "latent_value_size": 8, "n_kv_head": 4, "n_layer": 1}
CASES: dict[str, dict[str, Any]] = {
    "grouped": {"n_kv_head": 2},
    "one key for all": {"n_kv_head": 1, "n_layer": 1},
    "heads that do not go round evenly": {"n_head": 12, "n_kv_head": 3, "n_layer": 1},
    "windows, sinks": {"sliding_window": 5, "attention_sinks": True, "full_attention_layers": (1,)},
    "caps, gates": {"attention_softcap": 5.0, "attention_gate": True, "n_layer": 1},
    "positions in a table": {"positions": "learned", "n_layer": 1},
    "angles that grow": {"rope_scaling": "dynamic", "rope_factor": 2.0, "rope_original_block_size": 8},
    "keys of another block": {"shared_kv_layers": 1, "qk_norm": "full"},
    "a latent": LATENT,
    "a mixture": {"n_expert": 4, "n_expert_per_token": 2, "expert_size": 32, "n_layer": 1},
}  # fmt: skip
OF_FOUR = ("grouped", "heads that do not go round evenly")
LENGTH = 21  # which neither 2 nor 4 divides


def model_of(changes: dict[str, Any]) -> GPT:
    model = tiny_model(**changes)
    add_lora(model, LoRAConfig(r=2, targets=("all",), dropout=0.0))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def batch(packed: bool) -> list[Tensor | None]:
    """Two rows; the labels of the second end in its first third, so that some processes have none of it."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 300, (2, LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[1, 4:] = labels[0, :2] = IGNORE
    weights = torch.rand(2, LENGTH, generator=generator)
    if not packed:
        return [tokens[:, :-1], labels, weights, None, None]
    lengths = ((9, 8, 4), (6, 11))  # the second row ends with padding
    positions, segments = torch.zeros(2, LENGTH, dtype=torch.int64), torch.full((2, LENGTH), -1)
    for row, documents in enumerate(lengths):
        start = 0
        for number, length in enumerate(documents):
            positions[row, start : start + length] = torch.arange(length)
            segments[row, start : start + length] = number
            start += length
    return [tokens[:, :-1], labels, weights, positions, segments]


def learn(model: GPT, *inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradients of the adapters."""
    model.zero_grad(set_to_none=model.fast is None)
    loss = model.loss(*inputs)
    loss.backward()
    grads = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    return loss.detach(), {name: grads[name].clone() for name, p in model.named_parameters() if p.requires_grad}


def errors(rows: RowParts, changes: dict[str, Any], packed: bool, recompute: bool) -> tuple[float, float]:
    """Of loss and gradients, the largest, beside the largest gradient."""
    model = model_of(changes).double()
    model.recompute = recompute
    return compared(model, batch(packed), rows)


def errors_of_fast_path(rows: RowParts, changes: dict[str, Any], packed: bool, policy: Recompute) -> float:
    """As errors, of gradients in float32, beside the plain path."""
    model = model_of(changes)
    fused = fuse(model, ahead=False)
    fused.carries = False
    fused.set_recompute([policy] * len(model.blocks))
    model.fast = None
    return compared(model, batch(packed), rows, fused)[1]


def compared(model: GPT, inputs: list[Tensor | None], rows: RowParts, fast: Fused | None = None) -> tuple[float, float]:
    loss, whole = learn(model, *inputs)
    model.rows, model.fast = rows, fast
    part, mine = learn(model, *inputs)
    for tensor in (part, *mine.values()):
        distributed.all_reduce(tensor)
    largest = max(float(grad.abs().max()) for grad in whole.values())
    assert largest > 0.01
    apart = max(float((mine[name] - whole[name]).abs().max()) for name in whole)
    return float((part - loss).abs() / loss), apart / largest


OWN_EMBEDDINGS = {
    "shared_kv_layers": 1, "qk_norm": "head", "norm_position": "both", "per_layer_size": 16, "per_layer_vocab": 320
}  # fmt: skip
FAST: list[tuple[dict[str, Any], bool, Recompute]] = [
    ({}, False, "none"),
    ({}, True, "mlp"),
    ({"n_kv_head": 1}, True, "attn"),
    ({"n_head": 12, "n_kv_head": 3}, True, "none"),
    ({"sliding_window": 5, "attention_sinks": True}, True, "full"),
    ({"sliding_window": 5, "chunked_window": True}, True, "none"),
    ({"attention_softcap": 5.0}, True, "none"),
    ({"attention_gate": True}, True, "full"),
    ({"qk_norm": "head"}, True, "none"),
    (OWN_EMBEDDINGS, True, "full"),
    ({"qk_norm": "full"}, True, "full"),
    ({**LATENT, "n_layer": 2}, True, "none"),
    ({**LATENT, "n_layer": 2}, True, "full"),
    ({"qk_norm": "head", "n_expert": 4, "n_expert_per_token": 2, "expert_size": 64}, True, "full"),
]
"""Changes of a model, whether rows are packed, and how blocks recompute."""


def facts_of(fabric: Any) -> dict[str, Any]:
    """What tests look at, from one start of the processes."""
    rows, facts = RowParts(fabric.world_size), {}
    cases = CASES if fabric.world_size == 2 else {name: CASES[name] for name in OF_FOUR}
    facts["errors"] = {name: errors(rows, changes, True, False) for name, changes in cases.items()}
    if fabric.world_size == 2:
        facts["errors"]["a row a document"] = errors(rows, {}, False, False)
        facts["errors"]["recomputed"] = errors(rows, {"n_layer": 1}, True, True)
    if AVAILABLE and fabric.world_size == 2:
        facts["fast"] = errors_of_fast_path(rows, {"n_layer": 1}, True, "full")
    model, (tokens, labels, *_) = model_of({"n_layer": 1}).double(), batch(False)
    model.rows, before = rows, rows.sent
    learn(model, tokens, labels)
    facts["sent"] = rows.sent - before
    facts["part"] = rows.part(torch.arange(LENGTH)[None], -1)[0].tolist()
    if fabric.world_size == 4:
        pairs = RowParts(2)
        facts["pairs"] = (pairs.groups, pairs.group, pairs.number)
    return facts


@pytest.fixture(scope="module", params=[2, 4])
def facts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        work: Callable[..., Any] = facts_of
        path: Path = tmp_path_factory.mktemp("store")
        return together(path, work, ranks=request.param)


def test_losses_and_gradients_are_those_of_whole_rows(facts: list[dict[str, Any]]) -> None:
    for name, (loss, gradient) in facts[0]["errors"].items():
        assert loss < 1e-6, name  # the sum of the losses is in float32
        assert gradient < 1e-12, name


@needs_triton
def test_gradients_of_the_fast_path_are_those_of_whole_rows_on_the_plain_one(facts: list[dict[str, Any]]) -> None:
    if len(facts) == 2:
        assert facts[0]["fast"] < 1e-5


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_they_are_with_any_attention_and_policy(tmp_path: Path, ranks: int, loopback: None) -> None:
    def work(fabric: Any) -> list[float]:
        rows = RowParts(fabric.world_size)
        return [errors_of_fast_path(rows, *case) for case in FAST]

    for found in together(tmp_path, work, ranks):
        assert max(found) < 1e-5


def test_a_part_is_as_many_columns_and_the_last_is_filled_up(facts: list[dict[str, Any]]) -> None:
    length = -(-LENGTH // len(facts))
    whole = [*range(LENGTH), *[-1] * (length * len(facts) - LENGTH)]
    assert [column for fact in facts for column in fact["part"]] == whole
    assert {len(fact["part"]) for fact in facts} == {length}


def test_a_process_sends_its_queries_keys_values_and_outputs_but_its_own_part_and_their_gradients(
    facts: list[dict[str, Any]],
) -> None:
    n, heads, keys, size = len(facts), 4, 2, 16
    tokens = 2 * -(-LENGTH // n)
    elements = 2 * (heads + max(keys, n)) * size * tokens  # of a pass: 2 heads and 4 keys, if those are no fewer
    assert {fact["sent"] for fact in facts} == {2 * 8 * elements * (n - 1) // n}


def test_several_rows_lie_each_over_a_group_of_processes(facts: list[dict[str, Any]]) -> None:
    if len(facts) == 4:
        assert [fact["pairs"] for fact in facts] == [(2, 0, 0), (2, 0, 1), (2, 1, 0), (2, 1, 1)]
