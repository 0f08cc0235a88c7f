"""The kernels of flash-linear-attention get documents as they take them, and compute the same rule."""

import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch import Tensor

from lit_qlora.fused import delta_rule as kernels_of
from lit_qlora.fused.attention import Layout
from lit_qlora.fused.delta_rule import by_kernels, library_on, why_no_kernels
from lit_qlora.fused.documents import Documents
from lit_qlora.model.delta_net import delta_rule
from tests.model.test_delta_net import inputs


@pytest.mark.parametrize("packed", [False, True])
def test_a_library_of_kernels_gets_documents_end_to_end(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [part[:, :32].float() for part in inputs()]
    segments = torch.tensor([[0] * 9 + [1] * 23, [0] * 7 + [1] * 25]) if packed else None

    def chunk_gated_delta_rule(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
        scale: float, cu_seqlens: Tensor | None, chunk_indices: Tensor | None,
    ) -> tuple[Tensor, None]:  # fmt: skip
        assert scale == 1.0
        bounds = [0, q.size(1)] if cu_seqlens is None else cu_seqlens.tolist()
        pieces = [delta_rule(*(x[:, a:b] for x in (q, k, v, g, beta)), None)[0] for a, b in pairwise(bounds) if a < b]
        return torch.cat(pieces, dim=1), None

    kernels = ModuleType("kernels")
    kernels.chunk_gated_delta_rule = chunk_gated_delta_rule  # type: ignore[attr-defined]
    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule"):
        monkeypatch.setitem(sys.modules, name, kernels)
    cpu = torch.device("cpu")
    q, k, v, kept, beta = parts
    library_on.cache_clear()
    found = by_kernels(q, k, v, kept, beta, Documents.of(Layout.of(2, 32, segments, cpu), cpu))
    library_on.cache_clear()
    torch.testing.assert_close(found, delta_rule(*parts, segments)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("triton", "capability", "size", "installed", "reason"),
    [
        ("3.6.0", (9, 0), 64, ("fla",), "wrong for keys of 64 on a Hopper with Triton 3.6.0"),
        ("3.7.0+git1", (9, 0), 40, ("fla",), "wrong for keys of 40"),
        ("3.6.0", (9, 0), 128, ("fla",), ""),
        ("3.6.0", (9, 0), 32, ("fla",), ""),
        ("3.6.0", (9, 0), 64, ("fla", "tilelang"), ""),
        ("3.7.1", (9, 0), 64, ("fla",), ""),
        ("3.6.0", (8, 0), 64, ("fla",), ""),
        ("3.8.0", (9, 0), 128, (), 'pip install "lit_qlora[delta]"'),
    ],
)
def test_a_library_that_would_be_wrong_is_not_used(
    triton: str,
    capability: tuple[int, int],
    size: int,
    installed: tuple[str, ...],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels_of, "version", lambda name: triton)
    monkeypatch.setattr(kernels_of, "find_spec", lambda name: name if name in installed else None)
    kernels_of.are_refused.cache_clear()
    found = why_no_kernels(capability, size)
    kernels_of.are_refused.cache_clear()
    assert reason in found
    assert bool(reason) == bool(found)
