"""On a GPU a micro-batch gives the same bits before and after its shape is captured, over many shapes and steps."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_qlora.model.gpt import GPT, IGNORE
from tests.gpu.test_fused_gpu import MODELS, adapted, errors, gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = (20, 61, 32, 90, 128, 97, 250, 256)
"""Flash attention adds up the gradient of queries in any order where a text has more than one stripe of 128 keys, and
cuDNN takes multiples of 256; what is padded to 288 could differ in a bit without graphs too."""
KINDS = ["nf4", "nf4, query and value", "bf16", "rank 128", "adapted head", "nf4-dq", "biases, all heads"]
DELTA = {"delta_key_heads": 2, "delta_value_heads": 4, "delta_key_size": 32, "delta_value_size": 32}
KNOWN = MODELS | {
    "learned positions": {"positions": "learned"},
    "a short convolution": {"conv_layers": (0,)},
    "a delta net": {"delta_layers": (0,), **DELTA},
}
KINDS += ["layer norms, parallel, GELU", "norms around and on queries, GeGLU", "windows"]
STATES = ["a short convolution", "a delta net"]


def fused_model(kind: str, graphs: bool, dropout: float = 0.1, policy: Any = "none") -> tuple[GPT, Any]:
    from lit_qlora.fused import fuse
    from lit_qlora.fused.graphs import Graphs

    model = adapted(**KNOWN[kind] | {"dropout": dropout})
    fused = fuse(model, graph_tokens=1024)
    fused.set_recompute([policy] * 2)
    if not graphs:
        fused.graphs = Graphs(fused, 1024)
        fused.graphs.off = "the same, but launched one by one"
    return model, fused


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches on the host, every length often enough to be captured."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        rows, length = 1 + i // len(LENGTHS) % 2, LENGTHS[i % len(LENGTHS)]
        tokens = torch.randint(0, 1024, (rows, length + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[:, : 1 + i % 7] = IGNORE
        made.append((tokens[:, :-1].contiguous(), labels))
    return made


def packed_rows(count: int, first: int = 0) -> list[tuple[Any, ...]]:
    """Rows of 512 tokens, of 4 to 30 documents of no more than 128 tokens, with padding behind them.

    Args:
        first: tokens of one more document, which comes before the others.
    """
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        tokens = torch.randint(0, 1024, (1, 513), generator=generator)
        lengths = torch.randint(1, (20, 60, 128)[i % 3], (30,), generator=generator)
        lengths[0] = first or lengths[0]
        lengths = lengths[lengths.cumsum(0) <= 512]
        lengths = torch.cat([lengths, 512 - lengths.sum()[None]])
        segments = torch.arange(len(lengths), dtype=torch.int32)
        segments[-1] = -1
        segments = segments.repeat_interleave(lengths)[None]
        unlabelled = (segments < 0) | (torch.rand(1, 512, generator=generator) < 0.5)
        labels = tokens[:, 1:].masked_fill(unlabelled, IGNORE)
        positions = torch.cat([torch.arange(int(n)) for n in lengths])[None] * (segments >= 0)
        made.append((tokens[:, :-1].contiguous(), labels, None, positions, segments))
    return made


def train(model: GPT, count: int, each: int = 4, packed: bool = False) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of all micro-batches, and the adapter after a step for every `each` of them."""
    torch.manual_seed(5)
    learners = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(learners.values(), lr=1e-3, fused=True)
    losses = []
    for i, batch in enumerate(packed_rows(count) if packed else batches(count), start=1):
        loss = model.loss(*batch)
        (loss / 100).backward()
        losses.append(loss.detach())
        if i % each == 0:
            optimizer.step()
            optimizer.zero_grad()
    return torch.stack(losses).tolist(), {name: p.detach().clone() for name, p in learners.items()}


@pytest.mark.parametrize("kind", KINDS + STATES)
def test_training_with_graphs_is_training_without_to_the_last_bit(kind: str) -> None:
    count = 16 * 8
    model, fused = fused_model(kind, graphs=True)
    losses, adapter = train(model, count)
    assert not fused.graphs.off
    assert len(fused.graphs.captured) >= 8
    plain, _ = fused_model(kind, graphs=False)
    eager_losses, eager = train(plain, count)
    assert losses == eager_losses
    assert [name for name in adapter if not torch.equal(adapter[name], eager[name])] == []


@pytest.mark.parametrize("kind", ["nf4", "adapted head"])
def test_reading_tokens_with_a_label_alone_in_a_graph_changes_no_bit(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_qlora.fused.graphs.MANY", 32)
    model, fused = fused_model(kind, graphs=True)
    losses, adapter = train(model, 256)
    assert not fused.graphs.off
    assert any(one.batch.labelled.indices is not None for one in fused.graphs.captured.values())
    plain, _ = fused_model(kind, graphs=False)
    eager_losses, eager = train(plain, 256)
    assert losses == eager_losses
    assert [name for name in adapter if not torch.equal(adapter[name], eager[name])] == []


@pytest.mark.parametrize("kind", ["nf4", "windows", "layer norms, parallel, GELU", "learned positions", *STATES])
def test_training_on_packed_rows_with_graphs_is_training_without_to_the_last_bit(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_qlora.fused.graphs.MANY", 256)
    count = 48
    model, fused = fused_model(kind, graphs=True)
    losses, adapter = train(model, count, packed=True)
    assert not fused.graphs.off
    assert len(fused.graphs.captured) >= 2
    plain, _ = fused_model(kind, graphs=False)
    eager_losses, eager = train(plain, count, packed=True)
    assert losses == eager_losses
    assert [name for name in adapter if not torch.equal(adapter[name], eager[name])] == []


def test_packed_rows_padded_with_empty_documents_have_the_gradient_of_those_that_are_not() -> None:
    from lit_qlora.fused import fuse

    model, fused = fused_model("nf4", graphs=True, dropout=0.0)
    plain = adapted(**MODELS["nf4"])
    fuse(plain)
    for _ in range(6):
        one, other, long = packed_rows(3, first=300)
        two = tuple(None if a is None or b is None else torch.cat((a, b)) for a, b in zip(one, other, strict=True))
        for batch in (*packed_rows(3), long, two):
            loss, padded = gradients(model, *batch)
            other, exact = gradients(plain, *batch)
            torch.testing.assert_close(loss, other, rtol=2e-3, atol=1e-2)
            assert max(errors(padded, exact)) < 3e-2
    assert fused.graphs.captured


@pytest.mark.parametrize("policy", ["mlp", "attn", "full"])
def test_recomputing_in_a_graph_changes_no_bit(policy: Any) -> None:
    adapters = [train(fused_model("nf4", graphs=True, policy=one)[0], 64)[1] for one in ("none", policy)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


@pytest.mark.parametrize("kind", ["nf4", "bf16"])
def test_padding_is_no_farther_from_the_unpadded_gradient_than_rounding(kind: str) -> None:
    from lit_qlora.fused import fuse

    model, _ = fused_model(kind, graphs=True, dropout=0.0)
    plain = adapted(**MODELS[kind])
    fuse(plain)
    for _ in range(6):
        for tokens, labels in batches(8):
            loss, padded = gradients(model, tokens, labels)
            other, exact = gradients(plain, tokens, labels)
            torch.testing.assert_close(loss, other, rtol=2e-3, atol=1e-2)
            assert max(errors(padded, exact)) < 3e-2


def test_graphs_share_their_memory() -> None:
    model, fused = fused_model("nf4", graphs=True)
    train(model, 16 * 8)
    assert len(fused.graphs.captured) >= 8
    pool = tuple(fused.graphs.record.pool)
    held = sum(one["total_size"] for one in torch.cuda.memory_snapshot() if tuple(one["segment_pool_id"]) == pool)
    room = fused.graph_bytes(1024)
    assert 0 < held < 2 * room + 2**26, (held / 2**20, room / 2**20)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_replay_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_qlora.fused.graphs.MANY", 256)
    model, fused = fused_model("nf4", graphs=True)
    both = (*batches(8), *packed_rows(3))
    micro: list[Any] = [tuple(None if tensor is None else tensor.pin_memory() for tensor in one) for one in both]
    for _ in range(6):
        for one in micro:
            gradients(model, *one)
    assert fused.graphs.captured
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for one in micro:
            (model.loss(*one) / 100).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("fault", ["synchronise", "raise"])
def test_a_capture_that_fails_leaves_the_device_as_it_was(fault: str) -> None:
    from lit_qlora.fused.graphs import Recorder

    def cannot_be_captured() -> None:
        torch.ones(2, device="cuda").mul_(2)
        if fault == "synchronise":
            torch.cuda.synchronize()
        raise RuntimeError("no")

    record, stream = Recorder(2**20), torch.cuda.current_stream()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            record(cannot_be_captured)
    assert torch.cuda.current_stream() == stream
    assert float(torch.randn(1000, device="cuda").std()) > 0.5
    ones = torch.zeros(3, device="cuda")

    def add_one() -> None:
        ones.add_(1)

    replay = Recorder(2**20)(add_one)
    replay()
    assert ones.tolist() == [1.0] * 3
    torch.cuda.empty_cache()
    assert torch.ones(2**26, device="cuda").sum().item() == 2**26
