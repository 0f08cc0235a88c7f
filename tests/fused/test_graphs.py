"""Padding, capturing and replaying a micro-batch changes neither its loss nor its gradients.

On a CPU a function that runs again stands in for the graph that would launch its kernels again; the GPU's own are in
tests/gpu.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_qlora.fused import Fused, fuse
from lit_qlora.fused.graphs import DOCUMENTS, MOST_TOKENS, Graphs, most_tokens, padded_length
from lit_qlora.fused.memory import FastSizes
from lit_qlora.fused.micro_batch import Eager
from lit_qlora.kernels.cross_entropy import cross_entropy_
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.model.gpt import GPT, IGNORE
from lit_qlora.quantize import Storage
from lit_qlora.run.plan import MicroBatches, Plan, Room, make_plan
from lit_qlora.settings import LoRAConfig, TrainConfig
from tests.conftest import tiny_config
from tests.fused import test_fused
from tests.fused.test_fused import assert_equal, gradients

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")


LLAMA_2_7B = {
    "n_layer": 32,
    "vocab_size": 32000,
    "n_embd": 4096,
    "n_head": 32,
    "n_kv_head": 32,
    "head_size": 128,
    "ffn_size": 11008,
}
SIGHTINGS = 1  # fewer than for graphs that cost something


@pytest.fixture(autouse=True)
def _few_sightings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_qlora.fused.graphs.SIGHTINGS", SIGHTINGS)


def adapted_model(**changes: Any) -> GPT:
    """One block is enough here."""
    return test_fused.adapted_model(**{"n_layer": 1} | changes)


class Recording:
    """Counts what is captured and what is replayed."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """`function`, to be run again."""
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            function()

        return replay


def with_graphs(model: GPT, most: int = 96) -> tuple[Fused, Recording]:
    fused, recording = fuse(model), Recording()
    fused.graphs = Graphs(fused, most, recording)
    return fused, recording


def batch(rows: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 160, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    labels = tokens[:, 1:].clone()
    labels[:, :3] = IGNORE
    return tokens[:, :-1], labels


def seen_often(model: GPT, *arguments: Any) -> None:
    for _ in range(SIGHTINGS):
        gradients(model, *arguments)


def replayed(model: GPT, batches: Sequence[tuple[Tensor | None, ...]]) -> Recording:
    """The first of `batches` is seen often, and then each gives what it gives on the plain path."""
    expected = [gradients(model, *one) for one in batches]
    _, recording = with_graphs(model, most=128)
    seen_often(model, *batches[0])
    for one, other in zip(batches, expected, strict=True):
        assert_equal(gradients(model, *one), other)
    return recording


@pytest.mark.parametrize("parts", [8, 16])
def test_padding_is_short_and_lengths_are_few(parts: int) -> None:
    lengths, least = range(1, 2049), 512 // parts
    padded = [padded_length(length, parts) for length in lengths]
    assert all(
        0 <= more - length < max(least, 2 * length / parts) for length, more in zip(lengths, padded, strict=True)
    )
    assert all(padded_length(length, parts) == length and length % least == 0 for length in padded)
    assert len(set(padded)) == 2 * parts


CASES: dict[str, dict[str, Any]] = {
    "nf4": {"scheme": "bnb.nf4"},
    "16 bit, adapted head": {"targets": ("all", "head")},
    "windows": {"sliding_window": 5},
    "learned positions": {"positions": "learned"},
    "recomputed": {"scheme": "bnb.nf4", "n_layer": 2},
    "tokens that learn": {"lora": {"train_tokens": (3, 7)}, "tied_head": True},
    "tokens and rows of the head": {"lora": {"train_tokens": tuple(range(80)), "train_head_rows": True}},
    "ranks that differ": {"lora": {"rank_pattern": {"key": 2}}},
    "rank 80": {"r": 80},
}


def test_rows_of_more_than_a_chunk_have_no_graph() -> None:
    config = tiny_config(sliding_window=32, chunked_window=True)
    assert most_tokens(config) == 32
    assert most_tokens(replace(config, chunked_window=False)) > 32


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if "16 bit" in case else [pytest.mark.slow]) for case in CASES]
)
def test_a_replay_computes_what_the_plain_path_does(case: str) -> None:
    model = adapted_model(**CASES[case])
    batches = [batch(2, 9 + i, seed=i) for i in range(2)]
    expected = [gradients(model, *one) for one in batches]
    fused, recording = with_graphs(model)
    if case == "recomputed":
        fused.set_recompute(["full", "mlp"])
    seen_often(model, *batches[0])
    assert recording.captured == 0
    for one, other in zip(batches, expected, strict=True):
        assert_equal(gradients(model, *one), other)
    assert (recording.captured, recording.replayed) == (2, 4)


def test_capturing_changes_no_bit() -> None:
    model = adapted_model(dropout=0.3)
    _, recording = with_graphs(model)
    results = []
    for _ in range(SIGHTINGS + 2):
        torch.manual_seed(3)
        results.append(gradients(model, *batch(1, 20)))
    assert recording.replayed == 4
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(gradient[name], results[0][1][name]) for name in gradient)


def test_a_capture_counts_no_token_and_a_replay_each_that_is_predicted_right() -> None:
    model = adapted_model()
    tokens, labels, right = test_fused.right_and_wrong(model, 1, 20)
    _, recording = with_graphs(model)
    model.hits = torch.zeros((), dtype=torch.int64)
    for _ in range(SIGHTINGS + 2):
        gradients(model, tokens, labels)
    assert recording.replayed == 4
    assert model.hits == (SIGHTINGS + 2) * right > 0


def test_padding_drops_the_same_elements_of_a_single_row() -> None:
    model = adapted_model(dropout=0.3)
    torch.manual_seed(3)
    fused = fuse(model)
    expected = gradients(model, *batch(1, 20))
    fused.graphs = Graphs(fused, 96, Recording())
    torch.manual_seed(3)
    assert_equal(gradients(model, *batch(1, 20)), expected)


def test_every_replay_drops_other_elements() -> None:
    model = adapted_model(dropout=0.3)
    with_graphs(model)
    seen_often(model, *batch(1, 20))
    assert gradients(model, *batch(1, 20))[0] != gradients(model, *batch(1, 20))[0]


def test_no_weight_is_carried_over_whose_address_a_graph_would_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FastSizes, "carries", lambda *_: [True, True])
    model = adapted_model(scheme="bnb.nf4")
    fused = fuse(model)
    gradients(model, *batch(1, 20))
    assert fused.extra_bytes > 0
    fused.graphs = Graphs(fused, 96, Recording())
    for _ in range(2):
        gradients(model, *batch(1, 20))
        assert fused.extra_bytes == 0


def test_evaluation_with_gradients_has_a_graph_of_its_own() -> None:
    model = adapted_model(dropout=0.3)
    _, recording = with_graphs(model)
    seen_often(model, *batch(1, 20))
    gradients(model, *batch(1, 20))
    before = recording.replayed
    gradients(model.eval(), *batch(1, 20))
    assert recording.replayed == before


def test_gradients_add_up_over_eager_and_replayed_micro_batches() -> None:
    model = adapted_model()
    expected = gradients(model, *batch(2, 12))[1]
    model.zero_grad()
    with_graphs(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    micro = SIGHTINGS + 1
    for _ in range(2):
        for _ in range(micro):
            (model.loss(*batch(2, 12)) / 7).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, micro * expected[name], rtol=1e-3, atol=1e-4)
        optimizer.step()
        optimizer.zero_grad()


def test_a_step_of_the_optimizer_is_seen_by_the_next_replay() -> None:
    model = adapted_model()
    with_graphs(model)
    seen_often(model, *batch(1, 12))
    before = gradients(model, *batch(1, 12))[0]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    after = gradients(model, *batch(1, 12))
    model.fast = None
    assert after[0] != before
    assert_equal(after, gradients(model, *batch(1, 12)))


def test_a_loss_that_waits_for_its_backward_pass_keeps_its_activations() -> None:
    model = adapted_model()
    one, other = batch(1, 12), batch(1, 12, seed=1)
    expected = [gradients(model, *arguments) for arguments in (one, other)]
    _, recording = with_graphs(model)
    seen_often(model, *one)
    model.zero_grad()
    first = model.loss(*one)
    second = model.loss(*other)
    (first / 7).backward()
    (second / 7).backward()
    assert recording.replayed == 2
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            both = expected[0][1][name] + expected[1][1][name]
            torch.testing.assert_close(parameter.grad, both, rtol=1e-3, atol=1e-4)
    gradients(model, *one)
    assert recording.replayed == 4


def test_a_loss_that_is_thrown_away_does_not_hold_the_graphs() -> None:
    model = adapted_model()
    _, recording = with_graphs(model)
    seen_often(model, *batch(1, 12))
    model.loss(*batch(1, 12))
    gradients(model, *batch(1, 12))
    assert recording.replayed == 3


def test_weights_of_tokens_are_those_of_the_replayed_batch() -> None:
    model = adapted_model()
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(1, 12, generator=generator) for _ in range(2)]
    assert replayed(model, [(*batch(1, 12), one) for one in weights]).replayed == 4


def works(fused: Fused, *arguments: Any, times: int = SIGHTINGS + 1) -> Any:
    assert fused.graphs is not None
    for _ in range(times):
        work = fused.graphs.work(*arguments, None, None)
    return work


def test_what_gets_no_graph() -> None:
    fused, recording = with_graphs(adapted_model())
    assert works(fused, *batch(4, 30)) is None  # too many tokens
    assert works(fused, *batch(1, 65)) is None  # longer than the model's rows, where plain torch says so
    fused.set_recompute(["offload"])
    work = works(fused, *batch(1, 12))
    assert isinstance(work, Eager)
    assert work.inputs.run.layout.length == 32  # so that the numbers are the same
    fused.set_recompute(["none"])
    fused.ropes = None  # angles that depend on the length
    assert works(fused, *batch(1, 12)) is None
    assert recording.captured == 0


def test_padding_ends_where_the_model_does() -> None:
    fused, _ = with_graphs(adapted_model(block_size=40))
    work = works(fused, *batch(1, 36), times=1)
    assert isinstance(work, Eager)
    assert work.inputs.run.layout.length == 40


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has graphs")
def test_there_are_no_graphs_without_a_gpu() -> None:
    assert fuse(adapted_model(), graph_tokens=96).graphs is None


def packed(*documents: int, width: int = 40, weights: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """A row of documents of so many tokens, and padding behind them."""
    tokens, labels = batch(1, width, seed=sum(documents))
    lengths = torch.tensor([*documents, width - sum(documents)])
    positions = torch.cat([*(torch.arange(n) for n in documents), torch.zeros(lengths[-1], dtype=torch.int64)])[None]
    segments = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)[None]
    segments[:, sum(documents) :] = -1
    labels[:, sum(documents) :] = IGNORE
    return tokens, labels, weights, positions, segments


PACKED: dict[str, dict[str, Any]] = {
    "as it is": {"scheme": "bnb.nf4"},
    "learned positions": {"positions": "learned"},
    "windows": {"sliding_window": 5},
    "queries that grow": {"query_scale_beta": 0.1, "rope_original_block_size": 8},
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == "as it is" else [pytest.mark.slow]) for case in PACKED]
)
def test_packed_rows_are_replayed_whatever_their_documents(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Positions get tensors of their own, as on a GPU.
    monkeypatch.setattr("lit_qlora.fused.path.to_device", lambda x, device: x.clone() if x.dtype == torch.int32 else x)
    model = adapted_model(**PACKED[case])
    rows = [packed(7, 12, 9), packed(20, 15), packed(5, 5, 5, 5, 5, 5, 4)]
    recording = replayed(model, rows)
    assert (recording.captured, recording.replayed) == (2, 6)


def test_weights_of_packed_tokens_are_those_of_the_replayed_row() -> None:
    model = adapted_model()
    weights = [torch.rand(1, 40, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    rows = [packed(9, 11, weights=one) for one in weights]
    recording = replayed(model, rows)
    assert recording.replayed == 4


def test_rows_with_many_documents_are_another_shape() -> None:
    fused, _ = with_graphs(adapted_model())
    for documents in (DOCUMENTS - 1, DOCUMENTS, 2 * DOCUMENTS - 1):  # padding is one, too
        gradients(fused.model, *packed(*[1] * documents))
    assert fused.graphs is not None
    assert [shape[:3] for shape in fused.graphs.seen] == [(1, 64, DOCUMENTS), (1, 64, 2 * DOCUMENTS)]


def test_rows_with_a_long_document_are_another_shape() -> None:
    fused, _ = with_graphs(adapted_model(block_size=1024), most=1024)
    assert fused.graphs is not None
    fused.graphs.off = "none is made here"
    for documents in ((300, 100), (90, 310, 40), (100, 100, 200)):
        tokens, labels, weights, positions, segments = packed(*documents, width=512)
        fused.graphs.work(tokens, labels, weights, None, positions, segments)
    assert [(shape[3], count) for shape, count in fused.graphs.seen.items()] == [(512, 2), (256, 1)]


def test_rows_of_which_positions_alone_are_known_get_no_graph() -> None:
    fused, _ = with_graphs(adapted_model())
    tokens, labels, _, positions, _ = packed(9, 11)
    gradients(fused.model, tokens, labels, None, positions)
    assert fused.graphs is not None
    assert not fused.graphs.seen


@pytest.mark.parametrize("case", ["16 bit, adapted head", "windows"])
def test_of_many_tokens_the_head_reads_those_with_a_label_and_some_that_fill_a_quarter(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_qlora.fused.graphs.MANY", 32)
    read: list[int] = []
    monkeypatch.setattr("lit_qlora.fused.head.cross_entropy_", lambda *a: read.append(len(a[0])) or cross_entropy_(*a))
    model = adapted_model(**CASES[case])
    batches = []
    for count in (10, 13, 16):
        tokens, labels = batch(2, 12, seed=count)
        labels.view(-1)[torch.randperm(24, generator=torch.Generator().manual_seed(count))[count:]] = IGNORE
        batches.append((tokens, labels, torch.rand(2, 12, generator=torch.Generator().manual_seed(count))))
    labelled = [int((labels >= 0).sum()) for _, labels, _ in batches]
    recording = replayed(model, batches)
    assert set(read) == {16}  # of 2 x 32
    assert max(labelled) <= 16
    assert len(set(labelled)) == 3
    assert recording.replayed == 6


@pytest.mark.parametrize(
    "documents", [pytest.param((50, 20), marks=pytest.mark.slow), (9,)]
)  # with padding of more than a row in the second case
def test_packed_rows_may_be_longer_than_the_model_s(documents: tuple[int, ...]) -> None:
    model = adapted_model(block_size=64)
    assert replayed(model, [packed(*documents, width=80)]).replayed == 2


def test_rows_of_a_batch_are_packed_each_by_itself() -> None:
    model = adapted_model()
    rows = [packed(*documents, width=32) for documents in ((7, 12, 9), (20, 11), (), (32,))]
    pairs = [
        [torch.cat(both) for both in zip(*pair, strict=True) if both[0] is not None] for pair in (rows[:2], rows[2:])
    ]
    batches = [(tokens, labels, None, positions, segments) for tokens, labels, positions, segments in pairs]
    recording = replayed(model, batches)
    assert recording.replayed == 4


def test_what_is_planned_for_graphs_gets_them() -> None:
    model, settings = tiny_config(block_size=2048), TrainConfig(micro_batch_size=1)
    fused, _ = with_graphs(adapted_model(block_size=2048, vocab_size=model.vocab_size))
    assert fused.graphs is not None
    fused.graphs.off = "none is made here"
    for length in (*range(16, 2048, 97), 2047, 2048, 2049, 4000, 4096, 4097):
        for is_packed in (False, True):
            batches = MicroBatches(length, usual=float(length), packed=is_packed)
            plan = make_plan(fused.config, LoRAConfig(), Storage(torch.bfloat16), batches, settings, Room(2**34))
            row = packed(length // 2, width=length) if is_packed else batch(1, length)
            fused.graphs.most = plan.graph_tokens
            taken = is_packed or length <= 2048
            tokens, labels, weights, positions, segments = (*row, None, None, None)[:5]
            work = fused.graphs.work(tokens, labels, weights, None, positions, segments)
            assert (work is not None) == (plan.graph_tokens > 0 and taken), (length, is_packed)


def test_smaller_models_have_graphs_of_more_tokens() -> None:
    assert most_tokens(tiny_config(**LLAMA_2_7B)) == 1280
    assert most_tokens(tiny_config()) == MOST_TOKENS


def test_models_whose_blocks_have_more_launches_have_graphs_of_more_tokens() -> None:
    delta = {"delta_layers": (0,), "delta_key_heads": 1, "delta_value_heads": 1}
    delta |= {"delta_key_size": 128, "delta_value_size": 128}
    assert most_tokens(tiny_config(**LLAMA_2_7B, **delta)) == 3 * most_tokens(tiny_config(**LLAMA_2_7B))


def test_graphs_are_forgotten_when_workspaces_change_and_so_is_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, recording = with_graphs(adapted_model(scheme="bnb.nf4"))
    works(fused, *batch(1, 12))
    assert recording.captured == 2
    assert fused.graphs is not None
    graphs, left = fused.graphs, list[int]()
    monkeypatch.setattr("lit_qlora.fused.graphs.forget_graphs", lambda device: left.append(len(graphs.captured)))
    fused.set_recompute(["full"])
    assert left == [0]
    assert isinstance(works(fused, *batch(1, 12), times=1), Eager)


def test_what_cannot_be_captured_goes_on_without_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(function: Callable[[], None]) -> Callable[[], None]:
        raise torch.OutOfMemoryError("no room\nat all")

    model = adapted_model()
    expected = gradients(model, *batch(1, 12))
    fused = fuse(model)
    fused.graphs = Graphs(fused, 96, fails)
    seen_often(model, *batch(1, 12))
    for _ in range(2):
        assert_equal(gradients(model, *batch(1, 12)), expected)
    assert capsys.readouterr().out.count("no room") == 1


def planned(usual: float | None = 20.0, room: float = 2**30, tokens: int = 4 * 50, **train: Any) -> Plan:
    settings = TrainConfig(**{"micro_batch_size": 4, "cuda_graphs": "auto"} | train)
    model = tiny_config(block_size=4096)
    return make_plan(
        model, LoRAConfig(), Storage(torch.bfloat16), MicroBatches(tokens, usual=usual), settings, Room(room)
    )


def test_a_plan_has_graphs_for_the_longest_rows_and_counts_their_memory() -> None:
    plan = planned()
    assert plan.graph_tokens == 4 * 64
    assert plan.graphs > 0
    assert plan.total == planned(tokens=4 * 64, cuda_graphs="never").total + plan.graphs  # with rows that are padded
    most = most_tokens(tiny_config())
    assert planned(tokens=4 * most).graph_tokens == most  # the longest run without


def test_the_memory_of_graphs_is_that_of_a_micro_batch_but_for_the_workspaces() -> None:
    plan = planned(tokens=4 * 64)
    assert plan.graphs == plan.activations


@pytest.mark.parametrize(
    "changes",
    [
        {"usual": None},
        {"usual": most_tokens(tiny_config()) + 1.0},
        {"cuda_graphs": "never"},
        {"fast": False},
        {"room": None},
    ],
    ids=str,
)
def test_a_plan_without_graphs(changes: dict[str, Any]) -> None:
    plan = planned(**changes)
    assert (plan.graph_tokens, plan.graphs) == (0, 0)


def test_graphs_take_only_memory_that_is_left() -> None:
    plan = planned()
    tight, enough, away = (
        planned(room=(plan.total - plan.graphs / 2) / 0.97),
        planned(room=(plan.total + 2**16) / 0.97),
        planned(recompute="offload"),
    )
    assert tight.graphs == away.graphs == 0
    assert enough.graphs == plan.graphs
    # Rows are padded in any case, or the numbers would depend on the memory that is left.
    assert {one.graph_tokens for one in (tight, enough, away)} == {4 * 64}


def test_weights_are_carried_over_where_no_shape_is_captured() -> None:
    model = adapted_model(scheme="bnb.nf4")
    fused, _ = with_graphs(model)
    assert fused.graphs is not None
    work = works(fused, *batch(1, 12), times=1)
    assert isinstance(work, Eager)
    assert not work.inputs.run.carries
    fused.graphs.off = "there is no memory left for them"
    work = works(fused, *batch(1, 12), times=1)
    assert isinstance(work, Eager)
    assert work.inputs.run.carries


def test_what_a_plan_has_no_memory_for_is_not_captured() -> None:
    model = adapted_model()
    expected = gradients(model, *batch(1, 12))
    fused, recording = with_graphs(model)
    assert fused.graphs is not None
    fused.graphs.off = "there is no memory left for them"
    assert isinstance(works(fused, *batch(1, 12)), Eager)
    assert recording.captured == 0
    assert_equal(gradients(model, *batch(1, 12)), expected)
