"""The fast path is the plain path: the same loss and gradients for every layout, adapter and recompute setting."""

import math
import random
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_qlora.evaluate.score import Scorer
from lit_qlora.fused import Fused, fuse, reader, why_not
from lit_qlora.fused.block import FusedBlock
from lit_qlora.fused.head import Labelled
from lit_qlora.fused.memory import lowest_learning
from lit_qlora.fused.support import copied_bytes
from lit_qlora.kernels.cross_entropy import cross_entropy_
from lit_qlora.kernels.dropout import Dropout, factor_reference
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.lora.embeddings import add_noise
from lit_qlora.lora.layer import LoRALinear, add_lora, count_trainable, lora_state
from lit_qlora.model.gpt import GPT, IGNORE
from lit_qlora.model.rope import rope_table
from lit_qlora.quantize import quantize_linears
from lit_qlora.run.plan import MicroBatches, _rotations
from lit_qlora.settings import LoRAConfig, Scheme, Target, TrainConfig
from tests.conftest import tiny_model

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="needs Triton"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="in float32, so for the interpreter; tests/gpu is for the GPU"
    ),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POLICIES = ["none", "mlp", "attn", "full"]  # offload needs a GPU: tests/gpu
LATENT = {"kv_latent_size": 64, "latent_rope_size": 8, "latent_value_size": 16, "n_kv_head": 4}
SHAPE = {"n_embd": 64, "head_size": 16, "ffn_size": 128, "vocab_size": 160, "block_size": 64}


def adapted_model(
    scheme: Scheme = "none",
    targets: tuple[Target, ...] = ("all",),
    r: int = 4,
    dropout: float = 0.0,
    lora: dict[str, Any] | None = None,
    quantize_head: bool = False,
    layers: dict[str, Scheme] | None = None,
    **changes: Any,
) -> GPT:
    """A small model with adapters that do something."""
    model = tiny_model(**SHAPE | changes)
    quantize_linears(model, scheme, quantize_head, layers or {})
    torch.manual_seed(1)
    add_lora(model, LoRAConfig(r=r, alpha=2 * r, targets=targets, dropout=dropout, **(lora or {})))
    for tensor in lora_state(model).values():
        nn.init.normal_(tensor, std=0.1)
    return model.to(DEVICE).train()


def batch(rows: int = 2, length: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 160, (rows, length + 1), generator=generator).to(DEVICE)
    labels = tokens[:, 1:].clone()
    labels[:, :3] = IGNORE
    return tokens[:, :-1], labels


def gradients(model: GPT, *arguments: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model.loss(*arguments)
    (loss / 7).backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-4)
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        size = float(other[1][name].norm())
        assert size > 0, name
        assert float((one[1][name] - other[1][name]).norm()) < 2e-4 * size, name


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "multi-head": {"n_kv_head": 4},
    "nf4": {"scheme": "bnb.nf4"},
    "nf4-dq, scales that fill no block": {"scheme": "bnb.nf4-dq"},
    "a storage for each stack": {
        "scheme": "bnb.int8",
        "layers": {"blocks.0.attn.projection": "none", "blocks.0.mlp.(gate|up)": "bnb.nf4-dq", "blocks.1.*": "bnb.fp4"},
    },
    "query and value": {"targets": ("query", "value")},
    "mlp": {"targets": ("mlp",)},
    "projection": {"targets": ("projection",), "scheme": "bnb.fp4"},
    "rank 20": {"r": 20},
    "rank 80": {"r": 80, "scheme": "bnb.nf4"},
    "rank 80, query and value": {"r": 80, "targets": ("query", "value"), "qkv_bias": True},
    "adapted head": {"targets": ("all", "head")},
    "adapted and quantised head": {"targets": ("head", "query"), "scheme": "bnb.nf4", "quantize_head": True},
    "quantised head": {"scheme": "bnb.int8", "quantize_head": True},
    "adapted tied head, capped": {"targets": ("head",), "tied_head": True, "logit_softcap": 3.0},
    "head of rank 80": {"targets": ("head", "mlp"), "r": 80, "head_bias": True},
    "rslora": {"lora": {"rslora": True}},
    "ranks and scales that differ": {
        "lora": {"rank_pattern": {"down": 2, "(gate|up)": 80}, "alpha_pattern": {"projection": 1.0}},
        "dropout": 0.0,
    },
    "ranks and scales that differ in a stack": {
        "lora": {"rank_pattern": {"key": 2, "up": 8}, "alpha_pattern": {"value": 1.0, "(gate|up)": 3.0}},
        "scheme": "bnb.nf4",
    },
    "tokens that learn": {"lora": {"train_tokens": (3, 7, 159)}, "embedding_multiplier": 3.0, "n_layer": 1},
    "tokens that learn, rows of the head": {
        "lora": {"train_tokens": (3, 7, 159), "train_head_rows": True},
        "embedding_multiplier": 3.0,
        "scheme": "bnb.nf4",
        "quantize_head": True,
        "head_bias": True,
        "logit_softcap": 3.0,
        "n_layer": 1,
    },
    "tokens that learn, tied head with a bias": {
        "lora": {"train_tokens": (3, 7, 159)},
        "tied_head": True,
        "head_bias": True,
        "n_layer": 1,
    },
    "embeddings that learn": {"lora": {"train_embeddings": True}, "n_layer": 1},
    "embeddings that learn, tied head": {
        "lora": {"train_embeddings": True},
        "tied_head": True,
        "logit_softcap": 3.0,
        "n_layer": 1,
    },
    "first block": {"lora": {"first_layers": 1}, "scheme": "bnb.nf4"},
    "last block": {"lora": {"last_layers": 1}},
    "biases": {"qkv_bias": True, "projection_bias": True, "mlp_bias": True},
    "partial rope, tied head": {"rope_fraction": 0.5, "tied_head": True},
    "capped scores": {"attention_softcap": 2.0, "sliding_window": 5},
    "sinks": {"attention_sinks": True, "n_kv_head": 4},
    "capped scores and sinks": {"attention_softcap": 2.0, "attention_sinks": True},
    "llama3 rope": {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_block_size": 16},
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_the_plain_path(case: str) -> None:
    model = adapted_model(**CASES[case])
    expected = gradients(model, *batch())
    assert why_not(model) == ""
    fuse(model)
    assert_equal(gradients(model, *batch()), expected)


LOWEST: dict[str, tuple[dict[str, Any], str, int, list[str]]] = {
    "all": ({}, "none", 0, ["_mlp_backward", "_attend_backward"] * 3),
    "the last block": ({"lora": {"last_layers": 1}}, "none", 2, ["_mlp_backward", "_attend_backward"]),
    "MLPs": ({"targets": ("mlp",)}, "none", 0, ["_mlp_backward", "_attend_backward"] * 2 + ["_mlp_backward"]),
    "MLPs, again": ({"targets": ("mlp",)}, "attn", 0, ["_mlp_backward", "_attend_backward"] * 2 + ["_mlp_backward"]),
    "the head": ({"targets": ("head",)}, "none", 3, []),
    "embeddings and the last block": (
        {"lora": {"last_layers": 1, "train_tokens": (3, 7, 159)}}, "none", 0, ["_mlp_backward", "_attend_backward"] * 3
    ),
}  # fmt: skip
"""What learns, how blocks recompute, the first block that learns, and the parts with a backward pass."""


@pytest.mark.parametrize("case", LOWEST)
def test_nothing_is_saved_or_computed_below_the_first_part_that_learns(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, policy, lowest, expected = LOWEST[case]
    model = adapted_model(n_layer=3, **changes)
    assert lowest_learning(model) == lowest
    exact = gradients(model, *batch())
    done: list[str] = []
    for name in ("_mlp_backward", "_attend_backward"):
        run = getattr(FusedBlock, name)
        monkeypatch.setattr(FusedBlock, name, lambda *a, name=name, run=run: done.append(name) or run(*a))
    fused = fuse(model)
    fused.set_recompute([policy] * 3)  # type: ignore[list-item]
    assert_equal(gradients(model, *batch()), exact)
    assert done == expected
    tokens, labels = batch()
    inputs = fused.inputs(tokens, Labelled.of(labels, None), None)
    assert [one is not None for one in fused.forward(inputs)[1].blocks] == [i >= lowest for i in range(3)]


ROPES: dict[str, dict[str, Any]] = {
    "one table": {},
    "one of its own in windows": {"sliding_window": 5, "full_attention_layers": (1,), "rope_local_theta": 100.0},
    "longer heads without a window": {"sliding_window": 5, "full_attention_layers": (1,), "full_head_size": 32},
    "llama3": {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_block_size": 16},
}


@pytest.mark.parametrize("case", ROPES)
def test_tables_of_rope_are_as_long_as_rows_need(case: str) -> None:
    model = adapted_model(**{**ROPES[case], "block_size": 2500})
    fused, config = fuse(model), model.config
    whole = [rope_table(config, torch.arange(2500)[None], local) for local in (False, True)]

    def rows(length: int, positions: Tensor | None = None) -> int:
        tables = fused.inputs(
            torch.zeros(1, length), Labelled.of(torch.zeros(1, length), None), None, positions
        ).run.ropes
        count = len(tables[0][0])
        for ours, theirs in zip(tables, whole, strict=True):
            assert all(torch.equal(one, other[0, 0, :count]) for one, other in zip(ours, theirs, strict=True))
        planned = _rotations(config, MicroBatches(length, 1), TrainConfig(), parts=1)
        held = {table.data_ptr(): table.nbytes for pair in tables for table in pair}
        assert positions is not None or planned == sum(held.values())
        return count

    assert [rows(12), rows(1024), rows(1025)] == [1024, 1024, 2048]
    assert rows(3, torch.tensor([[0, 1, 2]])) == 2048  # what is there stays
    assert rows(3, torch.tensor([[7, 2301, 0]])) == 2500


def test_the_planner_knows_the_bytes_of_padding() -> None:
    model = adapted_model(lora={"rank_pattern": {"key": 2}, "alpha_pattern": {"up": 3.0}})
    planned = copied_bytes(model)
    fused = fuse(model)
    learn_there = count_trainable(model) - sum(padded.b.numel() for padded in fused.padded)
    assert planned == 10 * (fused.master.numel() - learn_there) > 0
    assert copied_bytes(adapted_model()) == 0


@pytest.mark.parametrize("policy", [pytest.param("mlp", marks=pytest.mark.slow), "attn", "full"])
def test_recomputing_changes_no_bit(policy: Any) -> None:
    model = adapted_model(scheme="bnb.nf4", dropout=0.3)
    fused = fuse(model)
    results = []
    for policies in (["none", "none"], [policy, "none"], [policy, policy]):
        fused.set_recompute(policies)
        torch.manual_seed(3)
        results.append(gradients(model, *batch()))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(gradient[name], results[0][1][name]) for name in gradient)


def right_and_wrong(model: GPT, rows: int = 2, length: int = 12) -> tuple[Tensor, Tensor, int]:
    """A batch whose model is right about some labels, and about how many."""
    tokens, labels = batch(rows, length)
    with torch.no_grad():
        likeliest = model.eval()(tokens).argmax(dim=-1)
    labels[:, 5:9] = likeliest[:, 5:9]
    model.train()
    return tokens, labels, int((labels == likeliest).sum())


def test_tokens_that_are_predicted_right_are_counted_as_by_the_plain_path() -> None:
    model = adapted_model(scheme="bnb.nf4", targets=("all", "head"))
    tokens, labels, right = right_and_wrong(model)
    assert 8 <= right < labels.numel()
    model.hits = torch.zeros((), dtype=torch.int64, device=DEVICE)
    plain = gradients(model, tokens, labels)
    assert model.hits == right
    fuse(model)
    assert_equal(gradients(model, tokens, labels), plain)
    assert model.hits == 2 * right
    model.hits = None
    gradients(model, tokens, labels)


def test_weights_of_tokens_weigh_their_losses() -> None:
    model = adapted_model()
    tokens, labels = batch()
    weights = torch.rand(labels.shape, device=DEVICE)
    expected = gradients(model, tokens, labels, weights)
    fuse(model)
    assert_equal(gradients(model, tokens, labels, weights), expected)


def test_documents_in_a_row_see_only_themselves() -> None:
    model = adapted_model(scheme="bnb.nf4")
    tokens, labels = batch(rows=2, length=16)
    lengths = [[5, 7, 4], [9, 3, 4]]
    segments = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in lengths], device=DEVICE)
    positions = torch.tensor([[j for n in row for j in range(n)] for row in lengths], device=DEVICE)
    segments[1, 12:] = -1
    labels[1, 12:] = IGNORE
    expected = gradients(model, tokens, labels, None, positions, segments)
    fuse(model)
    assert_equal(gradients(model, tokens, labels, None, positions, segments), expected)


def test_only_labelled_tokens_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = adapted_model(), []
    fuse(model)
    monkeypatch.setattr("lit_qlora.fused.head.cross_entropy_", lambda *a: seen.append(len(a[0])) or cross_entropy_(*a))
    tokens, labels = batch()
    labels[0, :] = IGNORE
    model.loss(tokens.cpu(), labels.cpu()).backward()
    assert seen == [int((labels >= 0).sum())]


@pytest.mark.parametrize("case", ["plain", "adapted and quantised head"])
def test_a_head_that_takes_tokens_in_slices_gives_the_same(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    model, seen = adapted_model(**CASES[case]), []
    expected = gradients(model, *batch())
    fuse(model)
    monkeypatch.setattr("lit_qlora.fused.head.head_tokens", lambda _: 10)
    monkeypatch.setattr("lit_qlora.fused.head.cross_entropy_", lambda *a: seen.append(len(a[0])) or cross_entropy_(*a))
    assert_equal(gradients(model, *batch()), expected)
    assert seen == [10, 8]


@pytest.mark.parametrize("unlabelled", [0, 3])
def test_the_last_stream_is_gone_when_there_are_logits(monkeypatch: pytest.MonkeyPatch, unlabelled: int) -> None:
    model, alive, pairs = adapted_model(), [], []
    fused = fuse(model)
    fused.set_recompute(["full", "full"])  # a block that keeps more would keep a part of it
    losses = fused.head.losses

    def watched(stream: list[Tensor], *others: Any) -> Any:
        pairs.extend(weakref.ref(one) for one in stream)
        return losses(stream, *others)

    monkeypatch.setattr(fused.head, "losses", watched)
    monkeypatch.setattr(
        "lit_qlora.fused.head.cross_entropy_",
        lambda *a: alive.append([one() is not None for one in pairs]) or cross_entropy_(*a),
    )
    tokens, labels = batch()
    labels[:, :3] = tokens[:, :3] if not unlabelled else IGNORE
    model.loss(tokens.cpu(), labels.cpu()).backward()
    assert alive == [[False, False]]


@pytest.mark.parametrize("r", [4, 80])
def test_a_batch_without_labels_has_no_loss_and_no_gradient(r: int) -> None:
    model = adapted_model(r=r)
    fuse(model).gradient.fill_(math.nan)
    tokens, labels = batch()
    loss, gradient = gradients(model, tokens.cpu(), torch.full_like(labels, IGNORE).cpu())
    assert loss == 0
    assert all((tensor == 0).all() for tensor in gradient.values())


class Masked(nn.Module):
    """Dropout that drops what the fast path drops."""

    def __init__(self, rows: int, width: int, dropout: "Dropout") -> None:
        super().__init__()
        self.factor = factor_reference(rows, width, dropout, DEVICE)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return (x.flatten(0, -2) * self.factor).view_as(x)


@pytest.mark.parametrize("r", [4, 80])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_dropout_is_that_of_the_plain_path_with_the_same_elements_dropped(norm: str, r: int) -> None:
    p = 0.3
    model = adapted_model(targets=("all", "head"), r=r, dropout=p, norm=norm)
    torch.manual_seed(5)
    seed = int(torch.randint(1, 2**31 - 1, ()))
    groups = {"query": 0, "key": 0, "value": 0, "projection": 1, "gate": 2, "up": 2, "down": 3, "head": 0}
    adapters = {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}
    own = {path: module.dropout for path, module in adapters.items()}
    for path, module in adapters.items():
        block, name = (2, "head") if path == "head" else (int(path.split(".")[1]), path.split(".")[-1])
        dropout = Dropout(p, torch.tensor([seed], device=DEVICE), offset=4 * block + groups[name])
        module.dropout = Masked(24, module.in_features, dropout)  # type: ignore[assignment]
    tokens, _ = batch()  # all are labelled, so that the head sees them in their places
    expected = gradients(model, tokens, tokens)
    for path, module in adapters.items():
        module.dropout = own[path]
    fuse(model)
    torch.manual_seed(5)
    assert_equal(gradients(model, tokens, tokens), expected)


SLOWLY_ADDED = [
    pytest.param(case, marks=pytest.mark.slow) for case in ("head of rank 80", "ranks and scales that differ")
]


@pytest.mark.parametrize("case", ["plain", "rank 80", *SLOWLY_ADDED])
def test_gradients_add_up_over_micro_batches_and_start_at_zero_after_a_step(case: str) -> None:
    model = adapted_model(**CASES[case], n_layer=1)
    expected = gradients(model, *batch())[1]
    model.zero_grad()
    fused = fuse(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for _ in range(2):
        for _ in range(2):
            (model.loss(*batch()) / 7).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, 2 * expected[name], rtol=1e-3, atol=1e-4)
        optimizer.step()
        optimizer.zero_grad()
        fused.gradient.fill_(math.nan)  # which nobody reads


@pytest.mark.parametrize("r", [4, pytest.param(80, marks=pytest.mark.slow)])
def test_gradients_that_are_there_already_are_added_to(r: int) -> None:
    model = adapted_model(r=r)
    expected = gradients(model, *batch())[1]
    fuse(model)
    (model.loss(*batch()) / 7).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, 2 * expected[name], rtol=1e-3, atol=1e-4)


def test_a_step_of_the_optimizer_is_seen_by_the_next_pass_and_by_the_plain_path() -> None:
    model = adapted_model(scheme="bnb.nf4")
    fuse(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model.loss(*batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    with torch.no_grad():
        fast = model.eval().loss(*batch())
        model.fast = None
        torch.testing.assert_close(fast, model.loss(*batch()), rtol=1e-4, atol=1e-4)


def test_dropout_is_off_in_evaluation() -> None:
    model = adapted_model(dropout=0.5).eval()
    with torch.no_grad():
        expected = model.loss(*batch())
        fuse(model)
        torch.testing.assert_close(model.loss(*batch()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_expert": 4, "n_expert_per_token": 2, "expert_size": 32, "ffn": "gelu"}, "ffn 'gelu'"),
        ({"n_expert": 4, "n_expert_per_token": 2, "expert_size": 24}, "a layer with 24 outputs"),
        ({"ffn": "swiglu_clamped"}, "ffn 'swiglu_clamped'"),
        ({"targets": ("head",), "vocab_size": 161}, "a layer with 161 outputs"),
    ],
)
def test_what_it_cannot_take_is_named(changes: dict[str, Any], reason: str) -> None:
    assert reason in why_not(adapted_model(**changes))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"targets": ("query", "head")}, "DoRA in the head"),
        ({"n_expert": 4, "n_expert_per_token": 2, "expert_size": 32}, "DoRA in a model with experts"),
    ],
    ids=str,
)
def test_variants_that_the_fast_path_does_not_compute_take_the_plain_one(settings: dict[str, Any], reason: str) -> None:
    assert why_not(adapted_model(lora={"dora": True}, **settings)) == reason


def test_noise_on_the_embeddings_is_that_of_the_plain_path() -> None:
    model = adapted_model(embedding_multiplier=2.0)
    quiet = gradients(model, *batch())[0]
    add_noise(model, 5.0)
    torch.manual_seed(6)
    expected = gradients(model, *batch())
    assert not torch.allclose(expected[0], quiet)
    fuse(model)
    torch.manual_seed(6)
    assert_equal(gradients(model, *batch()), expected)


READ = {
    "llama": {},
    "grouped queries": {"n_kv_head": 2},
    "window": {"sliding_window": 6, "full_attention_layers": (1,)},
    "learned positions": {"positions": "learned", "norm": "layer", "parallel_residual": True},
    "dynamic": {"rope_scaling": "dynamic", "rope_factor": 2.0, "rope_original_block_size": 8},
    "latent": LATENT,
}


CHUNKS = {"sliding_window": 4, "chunked_window": True, "full_attention_layers": (1,)}


@pytest.mark.parametrize("scheme", ["none", "bnb.nf4"])
@pytest.mark.parametrize(
    "changes", [*READ.values(), pytest.param(CHUNKS, marks=pytest.mark.slow)], ids=[*READ, "chunks"]
)
def test_what_it_reads_without_learning_is_scored_as_by_the_plain_model(
    changes: dict[str, Any], scheme: Scheme
) -> None:
    model = adapted_model(scheme, **changes).eval()
    draw = random.Random(3)
    context, other = [draw.choices(range(160), k=k) for k in (14, 20)]
    asked = [(context, draw.choices(range(160), k=k)) for k in (1, 4, 2)] + [(other, [7, 8]), (context[:9], [1, 2])]
    plain, fast = Scorer(model), Scorer(model)
    fused = Fused(model)
    fast.hidden = fused.hidden
    one = [(other, [1])]  # a row of its own takes no mask
    for requests in (asked, one):
        expected, actual = plain.score(requests), fast.score(requests)
        assert [x for x, _ in actual] == pytest.approx([x for x, _ in expected], abs=1e-4)
        assert [x for _, x in actual] == [x for _, x in expected]
    assert reader(model) == model.hidden  # on a CPU there is nothing to gain


def forest() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A row of documents that share beginnings: three that begin with 5 tokens, two that begin with 4, and padding.

    Returns:
        Tokens, labels, positions, segments and seen_until, see GPT.token_losses.
    """
    runs = [(0, 9, 16), (5, 3, 12), (5, 4, 16), (0, 7, 27), (4, 4, 27), (0, 2, 29)]
    """First position, tokens, and the column from which on the shared tokens are not seen."""
    position, segment, until, total = [], [], [], 0
    for number, (first, length, shared_until) in enumerate(runs):
        position += range(first, first + length)
        segment += [number] * length
        total += length
        share = {0: 5, 3: 4}.get(number, 0)
        until += [shared_until] * share + [total] * (length - share)
    generator = torch.Generator().manual_seed(5)
    tokens, labels = torch.randint(0, 160, (2, 1, total), generator=generator)
    positions, segments, seen_until = (torch.tensor([column]) for column in (position, segment, until))
    labels[positions < 4] = IGNORE
    segments[:, -2:], labels[:, -2:] = -1, IGNORE
    return tokens, labels, positions, segments, seen_until


def weighed(model: GPT, arguments: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of tokens, and the gradients of a function of them that is no sum."""
    model.zero_grad()
    losses = model.token_losses(*arguments)
    (losses.sin() * torch.arange(losses.numel()).view(losses.shape)).sum().backward()
    return losses.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "case",
    [
        "windows",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("plain", "nf4", "rank 80", "sinks", "latent", "chunks")
        ),
    ],
)
def test_losses_of_tokens_behind_shared_beginnings_are_those_of_the_plain_path(case: str) -> None:
    model = adapted_model(**{**CASES, "windows": {"sliding_window": 4}, "latent": LATENT, "chunks": CHUNKS}[case])
    expected = weighed(model, forest())
    fuse(model)
    assert_equal(weighed(model, forest()), expected)
    with torch.no_grad():
        torch.testing.assert_close(model.token_losses(*forest()), expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_losses_of_tokens_sum_to_the_loss_of_their_documents() -> None:
    model, (tokens, labels) = adapted_model(), batch()
    expected = gradients(model, tokens, labels)
    for fast in (False, True):
        if fast:
            fuse(model)
        model.zero_grad()
        losses = model.token_losses(tokens, labels)
        (losses.sum() / 7).backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert_equal((losses.sum().detach(), found), expected)
