"""FlashAttention 4 gets rows and documents as it takes them, and is left out where it does not do what it should."""

import sys
from inspect import signature
from itertools import pairwise
from types import ModuleType
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

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **options: Any) -> tuple[Any, ...]:
        """See flash_4.forward."""
        assert return_lse
        outs, sums = [], []
        for q_, k_, v_ in self.documents(options, q, k, v):
            scores = scores_of(q_, self.grouped(k_, q_), *self.options(q, options))
            outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), self.grouped(v_, q_)))
            sums.append(scores.logsumexp(-1))
        packed = options["cu_seqlens_q"] is not None
        return torch.cat(outs).view_as(q), torch.cat(sums, 1) if packed else torch.stack(sums), None, None, None

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


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """The library, as if it were installed on this machine, and taken."""
    interface, one = ModuleType("interface"), Library()
    interface._flash_attn_fwd, interface._flash_attn_bwd = one.forward, one.backward  # type: ignore[attr-defined]
    package = ModuleType("flash_attn.cute")
    package.interface = interface  # type: ignore[attr-defined]
    for name, module in (("flash_attn", ModuleType("flash_attn")), ("flash_attn.cute", package)):
        monkeypatch.setitem(sys.modules, name, module)
    flash_4._library.cache_clear()
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
    assert takes.__wrapped__(KIND, torch.device("cuda")) == (said == "")
    assert said in capsys.readouterr().out


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
    for function, own in ((library.forward, {"return_lse"}), (library.backward, {"deterministic"})):
        assert shared | own <= set(signature(function).parameters)
