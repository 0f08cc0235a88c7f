"""Embeddings for each block, and blocks that read the keys of earlier ones: loss and gradients of the plain path."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_qlora.fused import Fused, fuse, why_not
from lit_qlora.fused.graphs import Graphs
from lit_qlora.fused.group import Copies, Group
from lit_qlora.fused.head import Labelled
from lit_qlora.fused.memory import FastSizes, lowest_learning
from lit_qlora.fused.micro_batch import Inputs
from lit_qlora.fused.passes import Shared
from lit_qlora.fused.torch_stack import MOST_STACKS
from lit_qlora.kernels.dropout import Dropout
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.lora.layer import LoRALinear
from lit_qlora.model.gpt import GPT
from lit_qlora.settings import Recompute
from tests.fused.test_fused import DEVICE, Masked, adapted_model, assert_equal, batch, forest, gradients, weighed
from tests.fused.test_graphs import Recording
from tests.fused.test_offload import ON_CPU, streams

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="needs Triton"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="in float32, so for the interpreter; tests/gpu is for the GPU"
    ),
]
__all__ = ["streams"]
SLOW = pytest.mark.slow
OWN = {"per_layer_size": 64, "per_layer_vocab": 160, "norm_position": "both", "block_scale": True}
LENT = {"shared_kv_layers": 2, "qk_norm": "head", "value_norm": True, "shared_kv_ffn_size": 192}


def model_of(**changes: Any) -> GPT:
    """A model whose last two blocks of three read the keys and values of the first."""
    return adapted_model(**{"n_layer": 3, "ffn_size": 64} | OWN | LENT | changes)


CASES: dict[str, dict[str, Any]] = {
    "all layers learn": {"scheme": "bnb.nf4"},
    "embeddings learn through frozen layers": {
        "lora": {"train_embeddings": True}, "targets": ("query",), "embedding_multiplier": 3.0,
    },
    "layers of the embeddings alone": {"targets": ("per_layer",), "n_layer": 2, "shared_kv_layers": 1},
    "the last block alone": {"lora": {"last_layers": 1}, "targets": ("query", "mlp"), "scheme": "bnb.nf4"},
    "keys of the first block": {"lora": {"first_layers": 1}, "targets": ("key",), "per_layer_size": 0},
}  # fmt: skip


QUICK = "all layers learn"


@pytest.mark.parametrize("case", [QUICK, *(pytest.param(case, marks=SLOW) for case in CASES if case != QUICK)])
def test_loss_and_gradients_are_those_of_the_plain_path(case: str) -> None:
    model = model_of(**CASES[case])
    expected = gradients(model, *batch(1, 6))
    assert why_not(model) == ""
    fuse(model)
    assert_equal(gradients(model, *batch(1, 6)), expected)


def test_b_is_written_beside_the_heads_weights_once_where_adapters_are_copied_block_by_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lit_qlora.fused.path.COPY_BY_BLOCK", 1)
    model = model_of(n_layer=1, shared_kv_layers=0, targets=("per_layer", "head"))
    expected, refreshed = gradients(model, *batch(1, 6)), Counter[Group]()
    fused, refresh = fuse(model), Copies.refresh_beside

    def counted(copies: Copies) -> None:
        refreshed.update(copies.groups)
        refresh(copies)

    monkeypatch.setattr(Copies, "refresh_beside", counted)
    assert_equal(gradients(model, *batch(1, 6)), expected)
    assert {refreshed[group] for group in fused.groups} == {1}


@SLOW
@ON_CPU
@pytest.mark.usefixtures("streams")
def test_recomputing_or_offloading_changes_no_bit() -> None:
    model, results = model_of(scheme="bnb.nf4", dropout=0.3), []
    fused = fuse(model)
    for policies in (["none"] * 3, ["full", "full", "attn"], ["full-offload", "offload", "mlp"]):
        fused.set_recompute(policies)  # type: ignore[arg-type]
        torch.manual_seed(3)
        results.append(gradients(model, *batch(1)))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(gradient[name], results[0][1][name]) for name in gradient)


@SLOW
def test_documents_of_a_packed_row_have_the_gradients_that_they_have_alone() -> None:
    model = model_of(sliding_window=5)
    tokens, labels = batch(1, 16)
    fuse(model)
    parts = [gradients(model, tokens[:, part], labels[:, part]) for part in (slice(0, 9), slice(9, 16))]
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None]
    segments = torch.tensor([0, 1]).repeat_interleave(torch.tensor([9, 7]))[None]
    loss, found = gradients(model, tokens, labels, None, positions, segments)
    (first, ones), (second, others) = parts
    assert_equal((loss, found), (first + second, {name: ones[name] + others[name] for name in ones}))


@SLOW
def test_losses_behind_shared_beginnings_are_those_of_the_plain_path() -> None:
    model = model_of(sliding_window=4)
    expected = weighed(model, forest())
    fuse(model)
    assert_equal(weighed(model, forest()), expected)
    with torch.no_grad():
        torch.testing.assert_close(model.token_losses(*forest()), expected[0], rtol=1e-4, atol=1e-4)


@SLOW
def test_long_rows_have_their_embeddings_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(n_layer=1, shared_kv_layers=0)
    expected = gradients(model, *batch(1, 14))
    fuse(model)
    monkeypatch.setattr("lit_qlora.fused.sliced.slice_tokens", lambda tokens: 5)
    assert_equal(gradients(model, *batch(1, 14)), expected)


def test_dropout_is_that_of_the_plain_path_with_the_same_elements_dropped() -> None:
    model = model_of(dropout=0.3, targets=("per_layer",), n_layer=1, shared_kv_layers=0)
    torch.manual_seed(5)
    seed = torch.randint(1, 2**31 - 1, (1,), device=DEVICE)
    numbers = {"gate": MOST_STACKS * 3 - 2, "widen": MOST_STACKS * 3 - 1, "narrow": MOST_STACKS * 3}
    adapters = [(path, module) for path, module in model.named_modules() if isinstance(module, LoRALinear)]
    own = [module.dropout for _, module in adapters]
    for path, module in adapters:
        dropout = Dropout(0.3, seed, offset=numbers[path.rpartition(".")[2]])
        module.dropout = Masked(24, module.in_features, dropout)  # type: ignore[assignment]
    expected = gradients(model, *batch())
    for (_, module), dropout in zip(adapters, own, strict=True):
        module.dropout = dropout
    fuse(model)
    torch.manual_seed(5)
    assert_equal(gradients(model, *batch()), expected)


@SLOW
def test_a_replay_computes_what_the_plain_path_does_and_leaves_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_qlora.fused.graphs.SIGHTINGS", 1)
    model = model_of(n_layer=2, shared_kv_layers=1)
    batches = [(*(part[:, begin : begin + 12] for part in batch(1, 20)), None) for begin in (0, 8)]
    expected = [gradients(model, *one) for one in batches]
    fused, recording = fuse(model), Recording()
    fused.graphs = Graphs(fused, 32, recording)
    gradients(model, *batches[0])
    for one, other in zip(batches, expected, strict=True):
        assert_equal(gradients(model, *one), other)
    assert (recording.captured, recording.replayed) == (2, 4)
    (captured,) = fused.graphs.captured.values()
    assert captured.inputs.run.shared == Shared()


@SLOW
def test_carried_weights_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, results = model_of(scheme="bnb.nf4", n_layer=2, shared_kv_layers=1), []
    fused = fuse(model)
    for carries in (False, True, True):  # the third pass reads what the second has carried over
        monkeypatch.setattr(FastSizes, "carries", lambda *_, carries=carries: [carries] * 2)
        results.append(gradients(model, *batch(1)))
        assert (fused.extra_bytes > 0) == carries
    assert all(torch.equal(loss, results[0][0]) for loss, _ in results)


def test_the_first_block_has_a_backward_pass_where_an_adapter_of_all_embeddings_learns() -> None:
    last: dict[str, Any] = {"lora": {"last_layers": 1}}
    assert lowest_learning(model_of(targets=("query",), **last)) == 2
    assert lowest_learning(model_of(targets=("query", "per_layer"))) == 0


@SLOW
@pytest.mark.parametrize("policy", ["none", "attn", "full"])
def test_the_planner_knows_the_bytes_that_are_saved(policy: Recompute) -> None:
    fused = fuse(model_of(n_embd=128, head_size=32))
    fused.set_recompute([policy] * 3)
    tokens, labels = batch(1)
    inputs = fused.inputs(tokens, Labelled.of(labels, None), None)
    held = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in _held(fused, inputs)}
    sizes, reuses = fused.sizes, [fused.config.reuses(i) for i in range(3)]
    summed = tokens.numel() * 2 * 4 * 2 * 32  # gradients of lent keys and values, which are not there yet
    planned = sizes._shared * tokens.numel() + sum(sizes.saved(policy, tokens.numel(), False, one) for one in reuses)
    planned = 2 * (planned - summed)  # it counts for 16 bit
    assert 0.88 * planned < sum(one.nbytes() for one in held.values()) <= planned


def _held(fused: Fused, inputs: Inputs) -> Iterator[Tensor]:
    """The tensors that a forward pass over the blocks leaves to the backward pass."""

    def within(found: Any) -> Iterator[Tensor]:
        if isinstance(found, Tensor):
            yield found
        elif isinstance(found, list | tuple):
            for one in found:
                yield from within(one)
        elif isinstance(found, dict) or hasattr(found, "__dict__"):
            yield from within([*(found if isinstance(found, dict) else vars(found)).values()])

    with torch.no_grad():
        yield from within([fused._blocks(inputs.tokens, inputs.positions, inputs.run)[1], inputs.run.shared])


@SLOW
def test_kept_keys_hold_no_queries() -> None:
    fused, kept = fuse(model_of(targets=("query",))), []
    forward = fused.blocks[-1].forward

    def watched(stream: list[Tensor], run: Any) -> Any:
        (lent,) = run.shared.lent.values()
        kept.extend((tensor.untyped_storage().nbytes(), tensor.nbytes) for tensor in (lent.k, lent.v))
        return forward(stream, run)

    fused.blocks[-1].forward = watched  # type: ignore[method-assign]
    gradients(fused.model, *batch(1))
    assert kept == [(4 * 12 * 2 * 16,) * 2] * 2


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "norms of queries": ({"qk_norm": "none", "value_norm": False}, "keys and values of other blocks, without norms"),
    "norms behind": ({"norm_position": "before"}, "embeddings for each block, without a norm behind its MLP"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_without_the_norms_that_the_kernels_need_are_refused(case: str) -> None:
    changes, reason = REFUSED[case]
    assert why_not(model_of(**changes)).startswith(reason)


@pytest.mark.parametrize(("cached", "fp8"), [(0, False), (4, False), (0, True)])
def test_the_planner_knows_the_workspace_of_the_product_that_makes_all_embeddings(cached: int, fp8: bool) -> None:
    model = model_of(scheme="bnb.nf4", targets=("query",), n_layer=4, per_layer_size=128, shared_kv_ffn_size=0)
    fused = fuse(model.to(torch.bfloat16), fp8=fp8, cached_blocks=cached)
    space, policies = fused.workspaces[0], fused.recompute
    assert space is not None
    planned = fused.sizes._workspaces(policies) - (fused.sizes.spared(policies) if cached else 0)
    assert space.nbytes == planned == 2 * 4 * 128 * 64  # wider than qkv, and than gate and up
