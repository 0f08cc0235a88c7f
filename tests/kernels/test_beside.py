"""B of many matrices is written beside their weights in one launch, to the last bit what torch copies there."""

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lit_qlora.fused.large_rank import beside
from lit_qlora.kernels.beside import BesideWeights
from lit_qlora.kernels.dequantize import write_b
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.kernels.stack import Stack

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Matrix = tuple[Tensor, Tensor, Stack]


def matrix_of(stack: Stack, k: int, dtype: torch.dtype, room: int = 0) -> Matrix:
    """Weights with zeros beside them and another B, which is part of a larger buffer; rows lie `room` further apart."""
    whole = torch.randn(stack.n, k + stack.rank + room, device=DEVICE).to(dtype)
    whole[:, k : k + stack.rank] = 0
    buffer = torch.randn(stack.adapted_rows * stack.r + room, device=DEVICE).to(dtype)
    out, b = whole[:, : k + stack.rank], buffer[room:].view(stack.adapted_rows, stack.r)
    write_b(torch.full_like(b, torch.nan), out, stack)
    return out, b, stack


def written(matrices: list[Matrix]) -> list[Tensor]:
    """What torch makes of copies of the matrices."""
    copies = [out.clone() for out, *_ in matrices]
    for copy, (_, b, stack) in zip(copies, matrices, strict=True):
        write_b(b, copy, stack)
    return copies


def assert_written(writer: BesideWeights, matrices: list[Matrix]) -> None:
    expected = written(matrices)
    assert any(not torch.equal(out, one) for (out, *_), one in zip(matrices, expected, strict=True))
    writer.write(matrices)
    assert all(torch.equal(out, one) for (out, *_), one in zip(matrices, expected, strict=True))


def random_stacks(seed: int) -> Iterator[tuple[Stack, int]]:
    """Layers of odd rows, some without an adapter, and stacks of odd ranks, some of which share columns."""
    draw = random.Random(seed)
    for _ in range(5):
        rows = tuple(draw.randint(1, 40) for _ in range(draw.randint(1, 4)))
        has = [draw.random() < 0.7 for _ in rows]
        has[draw.randrange(len(rows))] = True
        slots = tuple(sum(has[:i]) if one else -1 for i, one in enumerate(has))
        stack = Stack(rows, slots, draw.choice([1, 3, 8, 16, 70]))
        yield beside(stack) if draw.random() < 0.3 else stack, draw.choice([5, 24, 64])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_each_b_lies_in_its_own_rows_and_columns_and_nothing_else_changes(seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    matrices = [matrix_of(stack, k, dtype, room=(0, 3)[seed % 2]) for stack, k in random_stacks(seed)]
    assert_written(BesideWeights(), matrices)


def test_a_layer_of_many_rows_is_divided_among_programs() -> None:
    writer, matrices = BesideWeights(), [matrix_of(Stack((600, 70), (0, 1), 16), 8, torch.bfloat16)]
    assert_written(writer, matrices)
    assert (len(writer.table), writer.rows, writer.unit) == (3 + 1, 256, 8)


def test_the_table_stays_until_other_weights_lie_there() -> None:
    writer, stacks = BesideWeights(), [Stack((9, 7), (0, 1), 4), Stack((12,), (0,), 4), Stack((5,), (0,), 2)]
    matrices = [matrix_of(stack, 16, torch.float32) for stack in stacks]
    writer.write(matrices)
    table = writer.table
    for _, b, _ in matrices:
        b.normal_()
    assert_written(writer, matrices)
    assert writer.table is table
    for some in (matrices[1:], matrices[:1], [matrices[0], matrix_of(stacks[1], 16, torch.float32)]):
        for _, b, _ in some:
            b.normal_()
        assert_written(writer, some)


def test_a_single_matrix_may_lie_elsewhere_each_time() -> None:
    writer, (first, second) = (
        BesideWeights(),
        [matrix_of(Stack((9, 7), (1, 0), 4), 16, torch.float32) for _ in range(2)],
    )
    assert_written(writer, [first])
    table = writer.table
    assert_written(writer, [second])
    assert writer.table is table


def test_a_table_that_was_not_finished_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = BesideWeights()
    first, second = ([matrix_of(Stack((9,), (0,), r), 16, torch.float32)] for r in (4, 40))

    def full(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError

    for before in ([], first):
        writer.write(before)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "tensor", full)
            with pytest.raises(torch.OutOfMemoryError):
                writer.write(second)
        first[0][1].normal_()
        assert_written(writer, first)


def test_where_no_weight_is_in_memory_nothing_is_launched() -> None:
    BesideWeights().write([])
