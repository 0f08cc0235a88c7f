"""B beside weights that are in memory is that of the adapters in every pass, which one launch sees to."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from lit_qlora.fused import fuse
from lit_qlora.fused.group import Group
from lit_qlora.kernels import beside
from lit_qlora.kernels.dequantize import write_b
from lit_qlora.kernels.launch import AVAILABLE
from tests.fused.test_fused import adapted_model, batch, gradients
from tests.fused.test_graphs import with_graphs

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="needs Triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="in float32, so for the interpreter"),
]
ALL = ("all", "head")
EXPERTS: dict[str, Any] = {"n_expert": 4, "n_expert_per_token": 2, "expert_size": 64}
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "16 bit": ({"targets": ALL}, 0, 9),
    "some layers of 16 bit": ({"targets": ("query", "value", "projection")}, 0, 4),
    "a block of int8 is cached": ({"targets": ALL, "scheme": "bnb.int8"}, 1, 5),
    "ranks that differ": ({"lora": {"rank_pattern": {"key": 2, "up": 9, "projection": 5}}}, 0, 8),
    "large adapters that share columns": ({"r": 80, "n_layer": 1}, 0, 4),
    "DoRA": ({"lora": {"dora": True}, "n_layer": 1}, 0, 4),
    "experts, beside whose weights there is no B": (EXPERTS, 0, 4),
}
Launches = list[tuple[int, ...]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """The grid of each launch of the kernel."""
    kernel, grids = beside._write, Launches()

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(beside, "_write", Counted())
    return grids


def assert_beside(groups: Sequence[Any], count: int) -> None:
    """The adapters' B lie beside the weights of so many groups, which are in memory."""
    found = [group for group in groups if group.rank and isinstance(group, Group) and group.dense is not None]
    assert len(found) == count
    for group in found:
        b = [
            torch.nn.functional.pad(layer.lora_b, (0, group.stack.r - layer.lora_b.size(1))) for layer in group.adapters
        ]
        factors = [layer.scale / group.scale for layer in group.adapters]
        matrix = group.dense.clone()
        write_b(torch.cat([factor * one for factor, one in zip(factors, b, strict=True)]), matrix, group.beside)
        assert torch.equal(group.dense, matrix)


@pytest.mark.parametrize("case", CASES)
def test_one_launch_writes_b_beside_all_weights_that_are_in_memory(case: str, launches: Launches) -> None:
    changes, cached, count = CASES[case]
    fused = fuse(adapted_model(**changes), cached_blocks=cached)
    assert not fused.copies_by_block
    for _ in range(2):
        for parameter in fused.model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
        launches.clear()
        dora = [group.gains for group in fused.copies[0].groups if group.gains is not None]
        for gains in dora:
            gains.stale = False
        fused.copies[0].refresh()
        assert len(launches) == 1
        assert_beside(fused.groups, count)
        assert all(gains.stale for gains in dora)


def test_copies_made_block_by_block_are_a_launch_a_block(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_qlora.fused.path.COPY_BY_BLOCK", 1)
    fused = fuse(adapted_model(targets=ALL))
    fused.model.loss(*batch(1, 6))
    assert len(launches) == 2 + 1  # of the head
    assert_beside(fused.groups, 2 * 4 + 1)


def test_nothing_is_written_beside_weights_in_fp8(launches: Launches) -> None:
    fused = fuse(adapted_model(targets=("all",), n_layer=1).to(torch.bfloat16), fp8=True)
    before = [group.dense.clone() for group in fused.copies[0].groups]
    fused.copies[0].refresh()
    assert launches == []
    assert all(torch.equal(group.dense, one) for group, one in zip(fused.copies[0].groups, before, strict=True))


def test_nothing_is_written_where_cached_weights_were_released(launches: Launches) -> None:
    fused = fuse(adapted_model(scheme="bnb.int8", n_layer=1), cached_blocks=1)
    fused.copies[0].refresh()
    fused.release()
    fused.copies[0].refresh()
    assert len(launches) == 1


def test_weights_that_are_carried_over_get_b_on_their_own() -> None:
    fused = fuse(adapted_model(scheme="bnb.int8", n_layer=1, r=80))
    fused.copies[0].refresh()
    for group in fused.copies[0].groups:
        group.matrix(None)
        for adapter in group.adapters:
            adapter.lora_b.data.normal_()
    fused.copies[0].refresh()
    for group in (group for group in fused.copies[0].groups if group.rank):
        carried = group.matrix(None)
        assert group.carried is None
        assert torch.equal(carried, group.matrix(None))  # made anew
        assert group.carried is not None


def test_the_table_that_a_graph_reads_is_that_of_all_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_qlora.fused.graphs.SIGHTINGS", 0)
    fused, recording = with_graphs(adapted_model(targets=("projection",), n_layer=1, ffn_size=64), most=32)
    fused.copies[0].refresh()
    table = fused.copies[0].beside_weights.table
    gradients(fused.model, *batch(1, 12))
    with torch.no_grad():
        fused.model.loss(*batch(1, 6))
    assert recording.replayed == 2
    assert fused.copies[0].beside_weights.table is table
