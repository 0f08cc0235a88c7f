"""Cached and carried over weights give the same bits as weights that are dequantised each time."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lit_qlora.data.batches import Batch, Step
from lit_qlora.errors import UsageError
from lit_qlora.fused import Fused, fuse
from lit_qlora.fused.group import Copies, Group
from lit_qlora.fused.head import Head
from lit_qlora.fused.memory import FastSizes
from lit_qlora.kernels.dequantize import dequantize
from lit_qlora.kernels.launch import AVAILABLE, Card
from lit_qlora.kernels.mlp import mlp_backward
from lit_qlora.lora.layer import add_lora
from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import Storage
from lit_qlora.run.learning import take_path
from lit_qlora.run.plan import HOLES, MicroBatches, Plan, Planner, Room, make_plan
from lit_qlora.settings import LoRAConfig, Scheme, TrainConfig
from lit_qlora.train.loop import Gradients
from tests.conftest import tiny_config, tiny_model
from tests.fused.test_fused import LATENT, adapted_model, batch, gradients

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="needs Triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="in float32, so for the interpreter"),
]
SLOW = pytest.mark.slow
USABLE = 0.97 - 0.05  # share of a GPU's memory that a plan fills with what it could do without
CASES: dict[str, dict[str, Any]] = {
    "nf4": {"scheme": "bnb.nf4", "dropout": 0.2},
    "int8, some layers": {"scheme": "bnb.int8", "targets": ("query", "projection")},
    "no adapter in the first block": {"scheme": "bnb.fp4", "lora": {"last_layers": 1}},
}


def two_steps(model: GPT, *arguments: Tensor) -> list[Tensor]:
    """Losses and gradients of two steps, between which the adapter changes."""
    learners = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learners, lr=0.1)
    found: list[Tensor] = []
    torch.manual_seed(0)
    for _ in range(2):
        loss, grads = gradients(model, *(arguments or batch()))
        found += [loss, *grads.values()]
        optimizer.step()
    return found


@pytest.mark.parametrize(
    ("case", "policy"),
    [
        ("nf4", "none"),
        pytest.param("nf4", "full", marks=pytest.mark.slow),
        pytest.param("int8, some layers", "none", marks=pytest.mark.slow),
        pytest.param("int8, some layers", "full", marks=pytest.mark.slow),
        pytest.param("no adapter in the first block", "none", marks=pytest.mark.slow),
        pytest.param("no adapter in the first block", "full", marks=pytest.mark.slow),
    ],
)
def test_the_bits_are_the_same(case: str, policy: Any) -> None:
    ends = []
    for blocks in (0, 1, 2):
        model = adapted_model(**CASES[case])
        fused = fuse(model, cached_blocks=blocks)
        fused.set_recompute([policy] * 2)
        kept = [all(group.dense is not None for group in block.groups) for block in fused.blocks]
        assert sum(kept) == blocks
        ends.append(two_steps(model))
    for other in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))


@pytest.mark.parametrize(
    ("case", "policy", "kept"),
    [
        ({"scheme": "bnb.nf4", "dropout": 0.2, "targets": ("all", "head")}, "full", 1),
        ({"scheme": "bnb.nf4", "lora": {"last_layers": 1}}, "none", 0),
        pytest.param({"scheme": "bnb.nf4", "targets": ("all", "head")}, "full", 0, marks=SLOW),
        pytest.param({"scheme": "bnb.nf4", "lora": {"last_layers": 1}}, "none", 1, marks=SLOW),
        pytest.param(
            {"targets": ("query", "head"), "quantize_head": True, "scheme": "bnb.int8"}, "attn", 1, marks=SLOW
        ),
        pytest.param({"targets": ("mlp",)}, "none", 0, marks=SLOW),  # a base in 16 bit has B beside it
    ],
    ids=str,
)
def test_copies_of_adapters_made_block_by_block_give_the_same_bits(
    case: dict[str, Any], policy: Any, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for most in (1, 2**26):
        monkeypatch.setattr("lit_qlora.fused.path.COPY_BY_BLOCK", most)
        model = adapted_model(**case)
        fused = fuse(model, cached_blocks=kept)
        fused.set_recompute([policy] * 2)
        assert fused.copies_by_block == (most == 1)
        ends.append(two_steps(model))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("released", [False, pytest.param(True, marks=SLOW)])
def test_large_adapters_copied_at_once_beside_kept_weights_give_the_same_bits(
    released: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_qlora.fused.path.COPY_BY_BLOCK", 1)
    refresh, refreshed, ends = Copies.refresh_beside, Counter[Group](), []

    def counted(copies: Copies) -> None:
        refreshed.update(copies.groups)
        refresh(copies)

    monkeypatch.setattr(Copies, "refresh_beside", counted)
    for at_once in (False, True):
        model = adapted_model(scheme="bnb.nf4", targets=("query", "projection", "head"), ffn_size=64)
        fused = fuse(model, cached_blocks=2, copies_at_once=at_once)
        assert fused.copies_by_block is not at_once
        if released and at_once:
            gradients(model, *batch(1, 5))
            fused.release()
            assert fused.copies_by_block  # which takes less memory
            refreshed.clear()
        ends.append(two_steps(model, *batch(1, 5)))
        assert {refreshed[group] for group in fused.groups} == {2}  # B beside a weight, once in a micro-batch
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize(
    ("case", "policies", "stay"),
    [
        ("nf4", ["full", "attn"], [True, True]),
        pytest.param("int8, some layers", ["none", "none"], [True, False], marks=SLOW),
        pytest.param("nf4", ["none", "none"], [True, False], marks=SLOW),
        pytest.param("nf4", ["mlp", "none"], [False, True], marks=SLOW),
        pytest.param("int8, some layers", ["full", "none"], [True, True], marks=SLOW),
        pytest.param("no adapter in the first block", ["none", "none"], [False, True], marks=SLOW),
    ],
    ids=str,
)
def test_weights_carried_over_to_the_next_forward_pass_give_the_same_bits(
    case: str, policies: Any, stay: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for stays in ([False, False], stay):
        monkeypatch.setattr(FastSizes, "carries", lambda *_, stays=stays: stays)
        fused = fuse(adapted_model(**CASES[case]))
        fused.set_recompute(policies)
        made: Counter[Group] = Counter()
        for group in fused.groups:
            monkeypatch.setattr(group, "matrix", counting(group, made))
        ends.append(two_steps(fused.model))
        for i, (block, one) in enumerate(zip(fused.blocks, stays, strict=True)):
            for group in block.groups:
                # Blocks before the first one that learns are read forward alone, and so is its qkv, unless it is
                # recomputed: no gradient of its input is wanted.
                reads_alone = group is block.qkv and policies[i] in ("none", "mlp")
                forward_alone = i < fused.lowest or (i == fused.lowest and reads_alone)
                assert (group.carried is not None) == (one and not forward_alone)
                assert made[group] == (2 if forward_alone else 3 if one else 4)  # in two steps
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_weights_are_carried_over_in_memory_that_activations_have_freed() -> None:
    fused = fuse(adapted_model(scheme="bnb.nf4", n_layer=3), cached_blocks=1)
    gradients(fused.model, *batch(1, 40))
    stay = fused.sizes.carries(["none"] * 3, 40, cached=1)
    assert stay == [True, False, False]  # the last one has a place of its own
    for block, stays in zip(fused.blocks, stay, strict=True):
        assert [group.carried is not None for group in block.groups[1:]] == [stays] * 3
        assert [group.dense is not None for group in block.groups] == [block is fused.blocks[-1]] * 4


@pytest.mark.parametrize("changes", [{}, {"n_expert": 4, "n_expert_per_token": 2, "expert_size": 64}])
def test_where_all_blocks_are_cached_no_workspace_is_made_and_none_is_planned(changes: dict[str, Any]) -> None:
    model = adapted_model(scheme="bnb.nf4", **changes)
    some, whole = fuse(model, cached_blocks=1), fuse(model, cached_blocks=2)
    assert some.workspaces[0] is not None
    assert bool(some.ahead) == bool(changes)
    assert (whole.workspaces, whole.ahead) == ((None, None, None), [])
    storage, train = Storage(torch.bfloat16, "bnb.nf4"), TrainConfig(recompute="none", keep_dequantized=1)
    both = replace(train, keep_dequantized=2)
    card = Card((9, 0), 227 * 2**10)
    lora = LoRAConfig(r=4, targets=("all",))
    plans = [
        make_plan(model.config, lora, storage, MicroBatches(24), each, Room(2.0**40, card=card))
        for each in (train, both)
    ]
    spared = whole.sizes.spared(["none"] * 2)
    assert plans[0].activations - plans[1].activations == spared > 0
    kept = replace(whole.sizes, quantized_head=True)
    assert (
        kept._workspaces(["none"] * 2) - kept.spared(["none"] * 2) == 2 * model.config.vocab_size * model.config.n_embd
    )


def test_an_interrupted_pass_leaves_no_weight_half_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FastSizes, "carries", lambda *_: [True, True])
    fused = fuse(adapted_model(scheme="bnb.nf4"))
    expected, _ = gradients(fused.model, *batch())
    fused.model.loss(*batch())  # which uses up the carried weights
    whole = dequantize

    def stopped(*arguments: Any, **settings: Any) -> Any:
        monkeypatch.setattr("lit_qlora.fused.group.dequantize", whole)
        raise KeyboardInterrupt

    loss = fused.model.loss(*batch())
    monkeypatch.setattr("lit_qlora.fused.group.dequantize", stopped)
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    assert torch.equal(fused.model.loss(*batch()), expected)


@pytest.mark.parametrize("rows", [1, 2])
def test_after_memory_has_run_out_beside_carried_weights_none_are_carried_over(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FastSizes, "carries", lambda *_: [True, True])
    fused, whole = fuse(adapted_model(scheme="bnb.nf4")), Head.losses
    fused.model.__dict__["module"] = fused.model  # as Fabric's wrapper has it
    add_gradients = Gradients(
        cast(Any, SimpleNamespace(device=torch.device("cpu"), backward=Tensor.backward)),
        cast(Any, fused.model),
        torch.zeros(()),
    )
    step = Step([Batch(*batch(rows))], weight=7.0, labelled=1, tokens=1, samples=1, epoch=0.0)
    expected = add_gradients(step)
    assert fused.carries

    def full(*arguments: Any) -> Any:  # by then the forward pass has used up the carried weights
        assert not fused.extra_bytes
        if fused.carries:
            raise torch.OutOfMemoryError
        return whole(*arguments)

    monkeypatch.setattr(Head, "losses", full)
    assert torch.equal(add_gradients(step), expected)
    assert add_gradients.rows is None


def counting(group: Group, made: "Counter[Group]") -> Callable[[Tensor | None], Tensor]:
    """group.matrix, which counts how often a weight is dequantised."""
    matrix = group.matrix

    def counted(workspace: Tensor | None) -> Tensor:
        made[group] += group.carried is None
        return matrix(workspace)

    return counted


def test_carried_weights_are_released_and_none_are_carried_over_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FastSizes, "carries", lambda *_: [True, True])
    fused = fuse(adapted_model(scheme="bnb.nf4"))
    assert fused.extra_bytes == 0
    gradients(fused.model, *batch())
    groups = [group for block in fused.blocks for group in block.groups if group is not fused.blocks[0].qkv]
    assert fused.extra_bytes == sum(4 * group.n * group.width for group in groups)
    fused.release()
    assert fused.extra_bytes == 0
    gradients(fused.model, *batch())
    assert fused.extra_bytes == 0


def test_a_pass_without_gradients_uses_up_carried_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FastSizes, "carries", lambda *_: [True, True])
    fused = fuse(adapted_model(scheme="bnb.nf4"))
    gradients(fused.model, *batch())
    with torch.no_grad():
        fused.model.loss(*batch())
    assert fused.extra_bytes == 0


def test_where_all_blocks_are_cached_there_is_no_workspace() -> None:
    fused = fuse(adapted_model(scheme="bnb.nf4"), cached_blocks=2)
    assert fused.workspaces == (None, None, None)


def test_released_weights_are_dequantised_each_time() -> None:
    whole = two_steps(fuse(adapted_model(scheme="bnb.nf4")).model)
    fused = fuse(adapted_model(scheme="bnb.nf4"), cached_blocks=2)
    assert fused.extra_bytes == sum(group.dense.nbytes for block in fused.blocks for group in block.groups)
    gradients(fused.model, *batch())
    fused.release()
    assert fused.extra_bytes == 0
    assert all(torch.equal(a, b) for a, b in zip(whole, two_steps(fused.model), strict=True))


def test_they_are_released_before_rows_are_split_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_qlora.fused.path.tell", said.append)
    model = adapted_model(scheme="bnb.nf4", dropout=0.2)
    fused = fuse(model, cached_blocks=2)
    torch.manual_seed(11)
    loss, expected = gradients(model, *batch())

    def full(*arguments: Any) -> None:  # where one sum of down's is waiting for another
        if fused.extra_bytes:
            raise torch.OutOfMemoryError
        mlp_backward(*arguments)

    monkeypatch.setattr("lit_qlora.fused.mlp.mlp_backward", full)
    model.zero_grad()
    fabric: Any = SimpleNamespace(device=torch.device("cpu"), backward=Tensor.backward)
    model.__dict__["module"] = model  # as Fabric's wrapper has it
    add_gradients = Gradients(fabric, cast(Any, model), torch.zeros(()))
    step = Step([Batch(*batch())], weight=7.0, labelled=1, tokens=1, samples=1, epoch=0.0)
    again = add_gradients(step, seed=11)
    assert add_gradients.rows is None
    assert "cached weights are released" in said[0]
    torch.testing.assert_close(again, loss / 7)
    # The failed pass's half-finished sums are not added.
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def planned(
    blocks: Any,
    room: float | None = 2**30,
    quantize: Any = "bnb.nf4",
    tokens: int = 8,
    lora: LoRAConfig | None = None,
    **train: Any,
) -> Plan:
    settings = TrainConfig(keep_dequantized=blocks, **train)
    return make_plan(
        tiny_config(n_layer=4),
        lora or LoRAConfig(),
        Storage(torch.bfloat16, quantize),
        MicroBatches(tokens),
        settings,
        Room(room),
    )


def test_a_plan_counts_the_cached_blocks() -> None:
    none, some, all_ = planned(0), planned(2), planned("auto")
    assert (none.cached_blocks, some.cached_blocks, all_.cached_blocks) == (0, 2, 4)
    assert none.cached == 0
    assert all_.cached == 2 * some.cached == 2 * (some.total - none.total)
    assert some.total < all_.total < none.total + all_.cached  # without a workspace
    assert planned(9).cached_blocks == 4


def test_nobody_has_to_ask_for_them_or_for_graphs() -> None:
    settings: Any = [tiny_config(n_layer=4), LoRAConfig(), Storage(torch.bfloat16, "bnb.nf4")]
    plan = make_plan(*settings, MicroBatches(64, usual=20.0), TrainConfig(), Room(2**30))
    assert plan.cached_blocks == 4
    assert plan.graphs > 0
    eight = make_plan(*settings, MicroBatches(64), TrainConfig(fp8=True), Room(2**30))
    assert (eight.cached_blocks, eight.cached) == (0, 0)  # which are not read in FP8


@pytest.mark.parametrize("blocks", [{}, {"last_layers": 1}], ids=str)
def test_a_plan_counts_copies_made_block_by_block_once(blocks: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lora = LoRAConfig(r=4, targets=("all", "head"), **blocks)

    def learning(most: int) -> float:
        monkeypatch.setattr("lit_qlora.run.plan.COPY_BY_BLOCK", most)
        config = tiny_config(n_layer=4)
        return make_plan(config, lora, Storage(torch.bfloat16), MicroBatches(64), TrainConfig(), Room(2**30)).learning

    model = tiny_model(n_layer=4)
    add_lora(model, lora)
    parts = [sum(p.numel() for p in part.parameters() if p.requires_grad) for part in (*model.blocks, model.head)]
    assert learning(2**26) - learning(1) == 2 * (sum(parts) - max(parts))


@pytest.mark.parametrize("keep", [0, "auto"])
@pytest.mark.parametrize("large", ["none", "adapters with embeddings", "adapters"])
def test_a_plan_counts_copies_of_adapters_and_not_of_embeddings_that_learn(
    large: str, keep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those are read in float32."""
    config, adapters = tiny_config(n_layer=4), planned(0).trainable
    most = {"none": 2**26, "adapters with embeddings": adapters + 1, "adapters": adapters}[large]
    for module in ("run.plan", "fused.path"):
        monkeypatch.setattr(f"lit_qlora.{module}.COPY_BY_BLOCK", most)
    alone, both = (planned(keep, lora=LoRAConfig(train_embeddings=learn)) for learn in (False, True))
    assert both.trainable - adapters == config.vocab_size * config.n_embd
    assert both.learning - alone.learning == 16 * config.vocab_size * config.n_embd  # gradient and moments too


def test_copies_of_large_adapters_are_made_at_once_where_kept_weights_leave_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("run.plan", "fused.path"):
        monkeypatch.setattr(f"lit_qlora.{module}.COPY_BY_BLOCK", 1)
    lora = LoRAConfig(r=64, targets=("all",))
    three, most = planned(3, lora=lora), planned("auto", lora=lora)
    assert (three.cached_blocks, three.copies_at_once) == (3, False)
    assert (most.cached_blocks, most.copies_at_once) == (4, True)
    more, spared = most.learning - three.learning, three.activations - most.activations
    assert more == 2 * most.trainable * 3 / 4 > spared > 0  # of the other blocks
    assert planned("auto", room=most.total / USABLE + 1, lora=lora) == most
    fewer = planned("auto", room=most.total / USABLE - 1, lora=lora)  # copies are given up before a block
    assert (fewer.cached_blocks, fewer.copies_at_once, fewer.total) == (4, False, most.total - more)
    for plan in (fewer, most):
        model = adapted_model(scheme="bnb.nf4", n_layer=4)
        take_path(model, plan)
        assert cast(Fused, model.fast).copies_by_block is not plan.copies_at_once


def test_only_memory_that_is_left_is_taken_for_them() -> None:
    one, most = planned(1), planned("auto")
    assert planned("auto", room=(most.total - one.cached / 2) / USABLE).cached_blocks == 3
    assert planned("auto", room=planned(0).total / 0.97).cached_blocks == 0


def test_a_run_does_what_its_plan_says() -> None:
    for tokens, stays in ((128, True), (8, False)):
        model, plan = adapted_model(scheme="bnb.nf4", n_layer=4), planned(1, tokens=tokens)
        assert plan.carries == stays
        take_path(model, plan)
        fused = cast(Fused, model.fast)
        assert (fused.carries, fused.cached_blocks) == (stays, 1)
        assert [block.groups[0].dense is not None for block in fused.blocks] == [False, False, False, True]


def test_all_blocks_are_cached_where_more_are_asked_for() -> None:
    fused = fuse(adapted_model(scheme="bnb.nf4"), cached_blocks=9)
    assert all(group.dense is not None for block in fused.blocks for group in block.groups)


@pytest.mark.parametrize("quantize_head", [False, True])
@pytest.mark.parametrize("policy", ["none", "full"])
def test_workspaces_are_as_large_as_planned(quantize_head: bool, policy: Any) -> None:
    fused = fuse(adapted_model(scheme="bnb.nf4", vocab_size=1600, quantize_head=quantize_head))
    fused.set_recompute([policy] * len(fused.blocks))
    made = {space.data_ptr(): space.nbytes for space in fused.workspaces if space is not None}
    planned = 2 * fused.sizes._workspaces([policy])  # float32 here; and there is room for B, which is small elsewhere
    assert planned <= sum(made.values()) < 1.2 * planned


def test_no_weights_are_carried_over_where_graphs_are_usual_or_no_cache_is_wanted() -> None:
    def plan(room: float, usual: float | None = 128.0, **train: Any) -> Plan:
        model, storage = tiny_config(n_layer=4), Storage(torch.bfloat16, "bnb.nf4")
        return make_plan(model, LoRAConfig(), storage, MicroBatches(128, usual=usual), TrainConfig(**train), Room(room))

    alone = planned(0, tokens=128)
    room = (alone.total + HOLES * alone.activations + 1.1 * planned(1).cached) / USABLE
    assert plan(room, cuda_graphs="never").carries
    graphs = plan(2 * room, keep_dequantized=0).graphs
    padded = plan(room + graphs / USABLE)
    assert padded.graphs == graphs > 0
    assert not padded.carries
    assert plan(room).carries  # where graphs have no room
    assert not plan(room, usual=8.0, cuda_graphs="never").carries  # which makes no place
    assert not plan(room, usual=None, keep_dequantized=0).carries


def test_weights_are_carried_over_where_that_saves_more() -> None:
    many = 128  # tokens, whose activations make room for weights

    def with_spare(spare: float) -> Plan:
        return planned("auto", (planned(0, tokens=many).total + spare) / USABLE, tokens=many)

    one = planned(1).cached
    holes = HOLES * planned(0, tokens=many).activations
    assert 2 * one > holes > one
    found = [with_spare(spare) for spare in (0.9 * holes, holes + 0.1 * one, holes + 1.1 * one, 4.1 * one)]
    assert [(plan.cached_blocks, plan.carries) for plan in found] == [(1, False), (0, True), (1, True), (4, False)]
    assert not planned(1).carries  # activations of a few tokens leave no room
    assert planned(1, tokens=many).carries
    assert not planned(0, tokens=many, quantize="none").carries
    assert not planned(0, tokens=many, fp8=True).carries


@pytest.mark.parametrize("layers", [{}, {r"blocks.1.mlp.*": "none", r"blocks.0.attn.projection": "none"}], ids=str)
@pytest.mark.parametrize("blocks", [1, 2])
def test_what_blocks_take_is_what_their_quantised_weights_are(layers: dict[str, Scheme], blocks: int) -> None:
    model = adapted_model(scheme="bnb.nf4", layers=layers)
    fused = fuse(model, cached_blocks=blocks)
    groups = [group for block in fused.blocks[-blocks:] for group in block.groups if group.weight is not None]
    held = sum(group.dense.numel() for group in groups)
    plan = make_plan(
        model.config,
        LoRAConfig(r=4, targets="all"),
        Storage(torch.bfloat16, "bnb.nf4", layers=tuple(layers.items())),
        MicroBatches(64),
        TrainConfig(keep_dequantized=blocks),
        Room(2**30),
    )
    assert plan.cached == 2 * held


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quantize": "none"}, "the base is not quantised"),
        ({"fast": False}, "train.fast is false"),
        ({"room": None}, "the fast one needs a CUDA device"),
    ],
    ids=str,
)
def test_they_are_refused_where_nothing_is_dequantised(changes: dict[str, Any], reason: str) -> None:
    assert planned("auto", **changes).cached_blocks == 0
    with pytest.raises(UsageError, match=reason):
        planned(1, **changes)


EXPERTS: dict[str, Any] = {
    "n_expert": 4,
    "n_expert_per_token": 2,
    "expert_size": 64,
    "shared_expert_size": 64,
    "shared_expert_gate": True,
}
MIXED: dict[str, Scheme] = {r"blocks.1.mlp.*": "none", r"blocks.0.attn.projection": "bnb.int8"}


@pytest.mark.parametrize("targets", [("query", "mlp"), pytest.param(("all",), marks=SLOW)], ids=str)
def test_a_plan_of_a_mixed_base_counts_the_weights_that_are_carried_over(
    targets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FastSizes, "carries", lambda *_: [True, True])
    fused = fuse(adapted_model(scheme="bnb.nf4", layers=MIXED, targets=targets))
    fused.set_recompute(["full", "none"])  # which reads each weight of the first block too
    gradients(fused.model, *batch())
    held = [
        sum(group.carried.nbytes // 2 for group in block.groups if group.carried is not None) for block in fused.blocks
    ]
    storage = Storage(torch.bfloat16, "bnb.nf4", layers=tuple(MIXED.items()))
    planner = Planner(fused.config, LoRAConfig(r=4, targets=targets), storage, TrainConfig())
    assert 0 < held[1] < held[0] / 2
    assert list(planner.sizes.carried) == list(fused.sizes.carried) == held


@pytest.mark.parametrize("changes", [LATENT, EXPERTS], ids=["latent attention", "a shared expert with a gate"])
def test_a_plan_counts_carried_weights_of_other_blocks_too(changes: dict[str, Any]) -> None:
    fused = fuse(adapted_model(scheme="bnb.nf4", **changes))
    storage = Storage(torch.bfloat16, "bnb.nf4")
    planner = Planner(fused.config, LoRAConfig(r=4, targets="all"), storage, TrainConfig())
    assert 0 < sum(planner.sizes.carried) == sum(fused.sizes.carried)
