"""FlashAttention 4 gets rows and documents as it takes them, and is left out where it does not do what it should."""

import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from inspect import signature
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_qlora.fused import attention, flash_4
from lit_qlora.fused.attention import Heads, Layout
from lit_qlora.fused.flash_4 import Kind, takes, why_not
from lit_qlora.kernels.launch import Card
from lit_qlora.quantize import Storage
from lit_qlora.run.banner import _path
from lit_qlora.run.plan import MicroBatches, Room, make_plan
from lit_qlora.settings import LoRAConfig, TrainConfig
from tests.conftest import tiny_config

CPU, HOPPER = torch.device("cpu"), (9, 0)
KIND = Kind(4, 2, 64, torch.bfloat16, packed=False, windowed=False)


def scores_of(q: Tensor, k: Tensor, scale: float, window: int | None) -> Tensor:
    """(H, Q, K) of queries (Q, H, D) and keys (K, H, D), the last of which belong together; else minus infinity."""
    before = k.size(0) - q.size(0)
    seen = torch.ones(q.size(0), k.size(0), dtype=torch.bool).tril(before)
    seen = seen if window is None else seen.triu(before + 1 - window)
    return (scale * torch.einsum("qhd,khd->hqk", q, k)).masked_fill(~seen, -torch.inf)


class Library:
    """What flash_attn.cute.interface has, in plain torch: documents one by one, the backward pass from sums."""

    def __init__(self) -> None:
        self.given: list[weakref.ref[torch.UntypedStorage]] = []
        """The memory that outputs were written into, and no tensor of its own."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, out: Tensor | None, **options: Any
    ) -> tuple[Any, ...]:
        """See flash_4.forward."""
        assert return_lse
        outs, sums = [], []
        for q_, k_, v_ in self.documents(options, q, k, v):
            scores = scores_of(q_, self.grouped(k_, q_), *self.options(q, options))
            outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), self.grouped(v_, q_)))
            sums.append(scores.logsumexp(-1))
        packed = options["cu_seqlens_q"] is not None
        attended = torch.cat(outs).view_as(q)
        if out is not None:
            assert (out.shape, out.dtype) == (q.shape, q.dtype)
            assert not out.data_ptr() % 16
            assert not any(stride * out.element_size() % 16 for stride in out.stride()[:-1])
            self.given.append(weakref.ref(out.untyped_storage()))
            attended = out.copy_(attended)
        return attended, torch.cat(sums, 1) if packed else torch.stack(sums), None, None, None

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, d_out: Tensor, log_sum: Tensor,
        *, deterministic: bool, **options: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """See flash_4.backward."""
        assert deterministic is torch.are_deterministic_algorithms_enabled()
        gradients = []
        log_sum = log_sum if log_sum.dim() == 2 else log_sum.transpose(0, 1).flatten(1)
        first = 0
        for q_, k_, v_, out_, d_ in self.documents(options, q, k, v, out, d_out):
            scale, window = self.options(q, options)
            keys, values = self.grouped(k_, q_), self.grouped(v_, q_)
            p = (scores_of(q_, keys, scale, window) - log_sum[:, first : first + len(q_), None]).exp()
            d_p = torch.einsum("qhd,khd->hqk", d_, values) - (d_ * out_).sum(-1).T[..., None]
            d_scores, first = scale * p * d_p, first + len(q_)
            dk, dv = torch.einsum("hqk,qhd->khd", d_scores, q_), torch.einsum("hqk,qhd->khd", p, d_)
            d_keys = (x.unflatten(1, (k.size(-2), -1)).sum(2) for x in (dk, dv))
            gradients.append((torch.einsum("hqk,khd->qhd", d_scores, keys), *d_keys))
        return tuple(
            torch.cat(parts).view_as(x) for parts, x in zip(zip(*gradients, strict=True), (q, k, v), strict=True)
        )

    def options(self, q: Tensor, options: dict[str, Any]) -> tuple[float, int | None]:
        """The scale and the window."""
        assert options["causal"] is True
        left = options["window_size_left"]
        return options["softmax_scale"] or q.size(-1) ** -0.5, None if left is None else left + 1

    def grouped(self, x: Tensor, q: Tensor) -> Tensor:
        """Keys or values of each head of queries."""
        return x.repeat_interleave(q.size(1) // x.size(1), dim=1)

    def documents(self, options: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> list[list[Tensor]]:
        """Each document's part of all, (S, H, D)."""
        bounds = options["cu_seqlens_q"], options["cu_seqlens_k"]
        assert all(x.stride(-1) == 1 for x in (q, k, v, *more))
        if bounds[0] is None:
            assert q.dim() == 4
            assert (options["max_seqlen_q"], options["max_seqlen_k"]) == (q.size(1), k.size(1))
            return [list(row) for row in zip(q, k, v, *more, strict=True)]
        assert q.dim() == 3
        own, keys = ([slice(*pair) for pair in pairwise(ends.tolist())] for ends in bounds)
        assert max(part.stop - part.start for part in own) <= options["max_seqlen_q"]
        assert max(part.stop - part.start for part in keys) <= options["max_seqlen_k"]
        return [[q[a], k[b], v[b], *(x[a] for x in more)] for a, b in zip(own, keys, strict=True) if a.start < a.stop]


def install(functions: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a library with these functions be installed on this machine, which seems to be a Hopper."""
    package = ModuleType("flash_attn.cute")
    package.interface = SimpleNamespace(**functions)  # type: ignore[attr-defined]
    for name, module in (("flash_attn", ModuleType("flash_attn")), ("flash_attn.cute", package)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(flash_4, "_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(flash_4, "_told", set())
    known = (takes, flash_4._library)  # of which a test may replace one
    for function in known:
        function.cache_clear()
    yield
    for function in known:
        function.cache_clear()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """The library, as if it were installed on this machine, and taken."""
    one = Library()
    install({"_flash_attn_fwd": one.forward, "_flash_attn_bwd": one.backward}, monkeypatch)
    monkeypatch.setattr(attention, "has_flash", lambda *_: True)
    monkeypatch.setattr(flash_4, "takes", lambda *_: True)
    return one


def one_row() -> Layout:
    return Layout.of(2, 24, None, CPU)


def documents() -> Layout:
    return Layout.of(2, 24, torch.tensor([[0] * 5 + [1] * 19, [0] * 23 + [1]]), CPU)


def with_empty_documents() -> Layout:
    return Layout(2, 24, 32, torch.tensor([0, 5, 24, 47, 48, 48, 48], dtype=torch.int32))


def sharing_a_beginning() -> Layout:
    """Two answers of 8 and 9 tokens behind a prompt of 7, twice."""
    segments = torch.tensor([[0] * 7 + [0] * 8 + [1] * 9] * 2)
    positions = torch.tensor([[*range(15), *range(7, 16)]] * 2)
    return Layout.of(2, 24, segments, CPU, shared=positions)


@pytest.mark.parametrize("layout", [one_row, documents, with_empty_documents, sharing_a_beginning])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_it_gets_rows_and_documents_and_gives_the_same_attention(
    layout: Any, window: int | None, sinks: bool, scale: float | None, request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(0)
    qkv, d_out = torch.randn(48, (4 + 2 * 2) * 8, dtype=torch.float64), torch.randn(48, 4 * 8, dtype=torch.float64)
    heads = Heads(4, 2, 8, scale, window, sinks=torch.randn(4, dtype=torch.float64) if sinks else None)
    parts, where = heads.split(qkv), layout()
    expected, saved = attention.attention(*parts, heads, where)
    gradients = attention.attention_backward(d_out, *parts, expected, saved, heads, where)

    request.getfixturevalue("library")
    out, saved = attention.attention(*parts, heads, where)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)  # sinks are added in float32
    found = attention.attention_backward(d_out, *parts, out, saved, heads, where)
    torch.testing.assert_close(found, gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [one_row, documents, with_empty_documents, sharing_a_beginning])
@pytest.mark.parametrize("sinks", [False, True])
def test_it_writes_into_the_first_columns_of_wider_rows(layout: Any, sinks: bool, library: Library) -> None:
    torch.manual_seed(0)
    qkv, d_out = torch.randn(48, (4 + 2 * 2) * 8), torch.randn(48, 4 * 8)
    heads = Heads(4, 2, 8, sinks=torch.randn(4) if sinks else None)
    parts, where, wide = heads.split(qkv), layout(), torch.ones(48, 4 * 8 + 4)
    expected, saved = attention.attention(*parts, heads, where)
    gradients = attention.attention_backward(d_out, *parts, expected, saved, heads, where)

    out, saved = attention.attention(*parts, heads, where, wide[:, :32])
    assert out.data_ptr() == wide.data_ptr()
    assert len(library.given) == 1
    found = attention.attention_backward(d_out, *parts, out, saved, heads, where)
    assert all(torch.equal(one, other) for one, other in zip((out, *found), (expected, *gradients), strict=True))
    assert torch.equal(wide[:, 32:], torch.ones(48, 4))


@pytest.mark.parametrize(("width", "first"), [(35, 0), (36, 1)], ids=["rows", "first row"])
def test_it_gives_a_tensor_of_its_own_where_rows_are_not_aligned(width: int, first: int, library: Library) -> None:
    qkv, heads, wide = torch.randn(48, 64), Heads(4, 2, 8), torch.ones(48, width)
    out, _ = attention.attention(*heads.split(qkv), heads, one_row(), wide[:, first : first + 32])
    assert out.is_contiguous()
    assert not library.given
    assert torch.equal(wide, torch.ones(48, width))


@pytest.mark.usefixtures("library")
def test_it_is_asked_for_a_deterministic_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    seen = []
    monkeypatch.setattr(
        flash_4,
        "_library",
        lambda: flash_4._Library(None, lambda *_, **options: seen.append(options) or (1, 2, 3)),  # type: ignore[arg-type]
    )
    flash_4.backward(*[torch.empty(0)] * 6, (None, None, 0, 0), None, None)
    assert seen[0]["deterministic"] is True


@pytest.mark.parametrize(
    ("capability", "size", "installed", "taken"),
    [
        ((9, 0), 128, True, True),
        ((10, 0), 64, True, True),
        ((9, 0), 128, False, False),
        ((8, 0), 128, True, False),
        ((12, 0), 128, True, False),
        ((9, 0), 256, True, False),
        ((9, 0), 100, True, False),
    ],
)
def test_it_is_for_gpus_and_heads_that_its_kernels_take(
    capability: tuple[int, int], size: int, installed: bool, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash_4, "_installed", lambda: installed)
    assert (why_not(capability, size) == "") == taken
    assert ("lit_qlora[flash]" in why_not(capability, size)) == (not installed)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (0.001, ""),
        (0.5, "it differs by 0.500 of the norm"),
        (float("nan"), "differs by nan"),
        (RuntimeError("no ptxas"), "RuntimeError: no ptxas"),
    ],
)
def test_a_library_that_fails_on_a_few_tokens_is_left_out_with_the_reason(
    result: float | Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def difference(kind: Kind, device: torch.device) -> float:
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(flash_4, "_difference", difference)
    monkeypatch.setattr(flash_4, "_library", lambda: None)
    monkeypatch.setattr(flash_4, "_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    assert takes(KIND, torch.device("cuda")) == (said == "")
    assert said in capsys.readouterr().out


def fails(*_: Any) -> None:
    raise OSError("libcuda.so.1: cannot open\nshared object file")


@pytest.mark.parametrize(
    ("functions", "said"),
    [
        (None, "ModuleNotFoundError: "),
        ({"_flash_attn_fwd": fails}, "AttributeError: "),
        ({"_flash_attn_fwd": fails, "_flash_attn_bwd": fails}, "OSError: libcuda.so.1: cannot open\n"),
        ({"_flash_attn_fwd": lambda q: q, "_flash_attn_bwd": fails}, "TypeError: "),
    ],
    ids=["none", "other names", "broken", "other arguments"],
)
def test_of_a_library_that_fails_for_all_kinds_one_line_is_said(
    functions: dict[str, Any] | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(functions or {}, monkeypatch)
    if functions is None:
        monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    monkeypatch.setattr(flash_4, "_difference", lambda *_: flash_4._library().forward(None, None, None))
    for kind in (KIND, replace(KIND, packed=True), replace(KIND, queries=8, keys=8)):
        assert not takes(kind, torch.device("cuda"))
    line = capsys.readouterr().out
    assert said in line
    assert line.count("\n") == 1


def test_a_kind_that_there_is_no_memory_to_try_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the step is repeated with less memory, and not all steps are slower."""
    tries = iter([torch.OutOfMemoryError, 0.0])

    def difference(kind: Kind, device: torch.device) -> float:
        result = next(tries)
        if isinstance(result, float):
            return result
        raise result

    install({"_flash_attn_fwd": fails, "_flash_attn_bwd": fails}, monkeypatch)
    monkeypatch.setattr(flash_4, "_difference", difference)
    with pytest.raises(torch.OutOfMemoryError):
        takes(KIND, torch.device("cuda"))
    assert takes(KIND, torch.device("cuda"))


def kind_of(layout: Layout, monkeypatch: pytest.MonkeyPatch, window: int | None = None) -> Kind:
    """The kind that is asked for."""
    asked: list[Kind] = []
    monkeypatch.setattr(flash_4, "takes", lambda kind, device: asked.append(kind))
    attention._takes_flash_4(torch.empty(0, dtype=torch.bfloat16), Heads(4, 2, 64, window=window), layout)
    return asked[0]


def of_lengths(*lengths: int) -> Layout:
    """One row with documents of these lengths."""
    segments = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return Layout.of(1, len(segments), segments[None], CPU)


@pytest.mark.parametrize(
    ("length", "tried"), [(1, 8), (8, 8), (9, 16), (64, 64), (65, 128), (128, 128), (129, 256), (5000, 256)]
)
def test_short_rows_and_documents_are_kinds_of_their_own(
    length: int, tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, packed = Layout.of(2, length, None, CPU), of_lengths(1, length)
    assert kind_of(rows, monkeypatch) == replace(KIND, queries=tried, keys=tried)
    assert kind_of(packed, monkeypatch) == replace(KIND, packed=True, queries=tried, keys=tried)
    for window, windowed in ((length - 1, True), (length, False), (length + 1, False)):
        assert kind_of(packed, monkeypatch, window).windowed == windowed


def test_runs_of_fewer_queries_than_keys_and_many_documents_are_kinds_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tree = kind_of(sharing_a_beginning(), monkeypatch)
    assert (tree.queries, tree.keys) == (16, 16)
    deep = torch.tensor([[*range(6), *range(6, 12), *range(12, 18)]])
    runs = Layout.of(1, 18, torch.tensor([[0] * 6 + [1] * 6 + [2] * 6]), CPU, shared=deep)
    assert (kind_of(runs, monkeypatch).queries, kind_of(runs, monkeypatch).keys) == (8, 32)
    assert [kind_of(of_lengths(*[2] * n), monkeypatch).many for n in (256, 257)] == [False, True]


def test_a_backward_pass_that_is_to_be_deterministic_is_a_kind_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = of_lengths(300)
    before = kind_of(layout, monkeypatch)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert kind_of(layout, monkeypatch) == replace(before, deterministic=True) != before


class Torchs:
    """What torch.ops.aten has, by the same plain torch."""

    def __init__(self, library: Library) -> None:
        self.library, self.asked = library, list[tuple[Any, ...]]()

    def options(self, *bounds: Any, **sides: int) -> dict[str, Any]:
        """As flash_4 has them."""
        window = sides["window_size_left"] + 1 if sides else None
        self.asked.append((*bounds, window))
        return flash_4._options(bounds, None, window)  # type: ignore[arg-type]

    def _flash_attention_forward(self, *arguments: Any, **sides: int) -> tuple[Any, ...]:
        q, k, v, *bounds = arguments[:7]
        options = self.options(*bounds, **sides)
        return *self.library.forward(q, k, v, return_lse=True, out=None, **options)[:2], 0, 0, None

    def _flash_attention_backward(self, *arguments: Any, **sides: int) -> tuple[Tensor, ...]:
        d_out, q, k, v, out, log_sum, *bounds = arguments[:10]
        options = self.options(*bounds, **sides)
        return self.library.backward(q, k, v, out, d_out, log_sum, deterministic=False, **options)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"windowed": True},
        {"queries": 8, "keys": 8, "windowed": True},
        {"packed": True, "many": True, "windowed": True, "queries": 64, "keys": 64},
        {"packed": True, "queries": 8, "keys": 32},
    ],
    ids=str,
)
def test_a_kind_is_tried_on_documents_as_long_and_as_many(
    changes: dict[str, Any], library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchs, kind = Torchs(library), replace(KIND, dtype=torch.float64, size=8, **changes)
    monkeypatch.setattr(flash_4, "_aten", torchs)
    assert flash_4._difference(kind, CPU) == 0
    assert len(torchs.asked) == 2
    for ends, of_keys, longest, most_keys, window in torchs.asked:
        assert (longest, most_keys) == (kind.queries, kind.keys)
        assert (window is not None and window < most_keys) == kind.windowed
        for bounds, most in ((ends, longest), (of_keys, most_keys)):
            assert (bounds is not None) == kind.packed
            if bounds is not None:
                assert sorted({0, most} & {*bounds.diff().tolist()}) == [0, most]
                assert (len(bounds) - 1 > flash_4.MANY) == kind.many


@pytest.mark.parametrize("wrong", range(5), ids=["output", "sums", "queries", "keys", "values"])
@pytest.mark.parametrize("value", [float("nan"), 1e4])
@pytest.mark.parametrize("dense", [True, False], ids=["a tensor of its own", "wider rows"])
def test_one_wrong_number_in_any_result_is_seen(
    dense: bool, value: float, wrong: int, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        results = forward(*arguments, **options)
        if wrong < 2 and results[0].is_contiguous() == dense:
            results[wrong][(0,) * results[wrong].dim()] = value
        return tuple(results)

    def broken_backward(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        results = [one.clone() for one in backward(*arguments, **options)]
        if wrong >= 2 and arguments[4].is_contiguous() == dense:
            results[wrong - 2].view(-1)[0] = value
        return tuple(results)

    forward, backward = flash_4.forward, flash_4.backward
    monkeypatch.setattr(flash_4, "_aten", Torchs(library))
    monkeypatch.setattr(flash_4, "forward", broken)
    monkeypatch.setattr(flash_4, "backward", broken_backward)
    assert not flash_4._difference(replace(KIND, dtype=torch.float64, size=8), CPU) <= flash_4.TOLERATED


def test_a_number_behind_its_columns_that_changes_is_seen(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> tuple[Tensor, ...]:
        out, log_sum = forward(*arguments)
        if not out.is_contiguous():
            out.as_strided((1,), (1,), out.stride(-3) - 1).zero_()
        return out, log_sum

    forward = flash_4.forward
    monkeypatch.setattr(flash_4, "_aten", Torchs(library))
    monkeypatch.setattr(flash_4, "forward", broken)
    kind = replace(KIND, dtype=torch.float64, size=8, queries=8, keys=8)
    assert not flash_4._difference(kind, CPU) <= flash_4.TOLERATED


def test_a_cpu_has_none() -> None:
    assert not takes(KIND, CPU)


@pytest.mark.parametrize(
    ("changes", "capability", "installed", "said"),
    [
        ({}, (9, 0), True, ", attention by FlashAttention 4"),
        ({}, (9, 0), False, ', attention by torch (pip install "lit_qlora[flash]" is faster)'),
        ({}, (8, 6), True, ""),
        ({}, (7, 5), True, ", attention in plain torch"),
        ({"attention_softcap": 50.0}, (9, 0), True, ""),
        ({"head_size": 320}, (9, 0), True, ""),
    ],
)
def test_a_plan_says_how_attention_is_computed(
    changes: dict[str, Any],
    capability: tuple[int, int],
    installed: bool,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flash_4, "_installed", lambda: installed)
    batches, room = MicroBatches(tokens=128, rows=2), Room(2**34, None, Card(capability, 227 * 2**10))
    storage, train = Storage(torch.float16, "bnb.nf4"), TrainConfig(micro_batch_size=2)
    plan = make_plan(tiny_config(**changes), LoRAConfig(), storage, batches, train, room)
    assert not plan.slow_because
    assert _path(plan).startswith(f"fast{said}")
    assert ("attention" in _path(plan)) == bool(said)


def test_the_library_takes_the_arguments_that_it_gets() -> None:
    pytest.importorskip("flash_attn.cute.interface")
    library, shared = flash_4._library(), set(flash_4._options((None, None, 0, 0), None, None))
    for function, own in ((library.forward, {"return_lse", "out"}), (library.backward, {"deterministic"})):
        assert shared | own <= set(signature(function).parameters)
