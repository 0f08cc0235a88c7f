"""The kernels of mixtures of experts compute what their references compute, however unevenly tokens choose."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_qlora.kernels import experts_products
from lit_qlora.kernels.dropout import NONE, Dropout
from lit_qlora.kernels.experts import (
    Choices,
    Counts,
    choose,
    choose_backward,
    choose_backward_reference,
    choose_reference,
    combine,
    combine_reference,
    of_tokens,
    sort,
    sort_reference,
)
from lit_qlora.kernels.experts_dequantize import Matrices, dequantize, dequantize_reference
from lit_qlora.kernels.experts_lora import Folds, add_gradient, gradient_reference, project, project_reference
from lit_qlora.kernels.experts_mlp import mlp_backward, mlp_backward_reference
from lit_qlora.kernels.experts_products import (
    LowRank,
    gate_up,
    gate_up_reference,
    product,
    product_reference,
)
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.kernels.stack import EightBit, FourBit
from lit_qlora.quantize import QuantizedLinear

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="needs Triton"),
    # Triton's interpreter computes the power for a sigmoid whose x is very negative, and then 1 / inf.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # the interpreter rounds bfloat16 wrongly
NEAR = 1e-2 if DEVICE == "cuda" else 1e-5
TILE = 128 if DEVICE == "cuda" else 32
EXPERTS, TOKENS, K = 5, 45, 2
DROPOUTS = [NONE, Dropout(0.3, torch.tensor([12345], device=DEVICE), offset=7)]
FUNCTIONS = ["silu", "gelu", "gelu_tanh", "clamped"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(DTYPE)


def exact(value: Any) -> Any:
    """The same in float64."""
    if isinstance(value, LowRank):
        return LowRank(value.z.double(), value.b.double(), value.dropout)
    if isinstance(value, tuple):
        return tuple(map(exact, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Equal up to rounding, measured over the whole tensor; a NaN is never near."""
    assert actual.shape == expected.shape
    assert float((actual.double() - expected).norm()) <= NEAR * float(expected.norm())


def choices_of(
    tokens: int = TOKENS, k: int = K, experts: int = EXPERTS, uneven: bool = False, chunk: int = 16
) -> Choices:
    """Choices, of which uneven ones leave the first expert without a token and give another one all of them."""
    scores = torch.randn(tokens, experts, device=DEVICE)
    if uneven:
        scores[:, 0], scores[:, 1] = -9.0, 9.0
    return sort(*choose(scores, k), experts, tile=TILE, chunk=chunk)


@pytest.mark.parametrize(("experts", "k"), [(5, 2), (16, 1), (8, 8), (128, 6)])
def test_the_best_experts_are_chosen_and_share_by_softmax(experts: int, k: int) -> None:
    scores = torch.randn(70, experts, device=DEVICE)
    weights, chosen = choose(scores, k, 2.5)
    expected, best = choose_reference(scores, k, 2.5)
    assert torch.equal(chosen, best)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize(("value", "broken"), [("nan", slice(1, 3)), ("nan", slice(None)), ("-inf", slice(None))])
def test_a_token_whose_scores_are_no_numbers_has_experts_and_weights_that_are_none(value: str, broken: slice) -> None:
    """So that its loss is no number, and no row of another token is read or left out."""
    scores = torch.randn(3, 5, device=DEVICE)
    expected = choose(scores, 4)
    scores[1, broken] = float(value)
    weights, chosen = choose(scores, 4)
    assert sorted(set(chosen[1].tolist())) == sorted(chosen[1].tolist())
    assert int(chosen.min()) >= 0
    assert int(chosen.max()) < 5
    assert weights[1].isnan().all()
    for others in (0, 2):
        assert torch.equal(weights[others], expected[0][others])
        assert torch.equal(chosen[others], expected[1][others])
    assert sort(weights, chosen, 5).position.flatten().sort().values.tolist() == list(range(12))


def test_scores_of_minus_infinity_are_chosen_last_and_count_nothing() -> None:
    scores = torch.tensor([[float("-inf"), 1.0, float("-inf"), float("-inf"), 2.0]], device=DEVICE)
    weights, chosen = choose(scores, 4)
    assert chosen.tolist() == [[4, 1, 0, 2]]
    torch.testing.assert_close(weights, F.pad(torch.tensor([[2.0, 1.0]], device=DEVICE).softmax(dim=1), (0, 2)))


def test_the_gradient_of_the_choice_is_that_of_autograd() -> None:
    scores = torch.randn(70, 8, device=DEVICE, requires_grad=True)
    weights, chosen = choose_reference(scores, 3, 2.5)
    d_weights = torch.randn_like(weights)
    weights.backward(d_weights)
    choices = sort(weights.detach(), chosen, 8)
    torch.testing.assert_close(choose_backward(choices, d_weights, 2.5, torch.float32), scores.grad)
    torch.testing.assert_close(choose_backward_reference(choices, d_weights, 2.5), scores.grad)


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("tokens", [1, 45, 200])
def test_choices_are_sorted_by_expert_and_then_by_token(tokens: int, uneven: bool) -> None:
    choices = choices_of(tokens, uneven=uneven)
    position, token, weight, ends = sort_reference(choices.weights, choices.chosen, EXPERTS)
    assert torch.equal(choices.position, position)
    assert torch.equal(choices.token, token)
    assert torch.equal(choices.weight, weight)
    assert choices.ends.tolist() == [0, *ends.tolist()]


@pytest.mark.parametrize("tokens", [1, 70])
def test_choices_that_were_counted_as_they_were_made_are_sorted_alike(tokens: int) -> None:
    counts = Counts.room(tokens, K, EXPERTS, DEVICE)
    weights, chosen = choose(torch.randn(tokens, EXPERTS, device=DEVICE), K, counts=counts)
    one, other = sort(weights, chosen, EXPERTS), sort(weights, chosen, EXPERTS, counts=counts)
    for name in ("position", "token", "weight", "ends"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_how_many_tokens_took_an_expert_is_added_up() -> None:
    taken = torch.full((EXPERTS,), 2**40, device=DEVICE)
    choices = choices_of(200, uneven=True)
    for _ in range(2):
        sort(choices.weights, choices.chosen, EXPERTS, taken=taken)
    assert (taken - 2**40).tolist() == [2 * count for count in choices.ends.diff().tolist()]


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("what", ["tile", "chunk"])
def test_tiles_and_chunks_cover_each_expert_and_never_two(what: str, uneven: bool) -> None:
    choices = choices_of(200, uneven=uneven)
    each, most = getattr(choices, what), getattr(choices, f"most_{what}s")
    table = getattr(choices, f"{what}s").tolist()
    expected = [(e, row) for e, rows in choices.each() for row in range(rows.start, rows.stop, each)]
    assert list(zip(table[:most], table[most : 2 * most], strict=True))[: table[2 * most]] == expected
    if what == "chunk":
        first = table[2 * most + 1 :]
        assert all(expected[first[e]][0] == e for e, _ in choices.each())


def test_a_token_gets_the_sum_of_its_choices() -> None:
    choices, y, more = choices_of(), rand(TOKENS * K, 200), rand(TOKENS, 230)[:, :200]
    for beside in (None, more):
        assert_near(combine(y, choices, beside), combine_reference(exact(y), choices, exact(beside)))
    for splits in (3, 40):
        parts = torch.randn(splits, TOKENS * K, device=DEVICE)
        torch.testing.assert_close(of_tokens(parts, choices), parts.sum(0)[choices.position.long()])


@pytest.mark.parametrize("width", [64, 80, 128])  # blocks of 64: 80 rows have scales for half a block of 256 more
@pytest.mark.parametrize("scheme", ["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.int8"])
def test_dequantised_matrices_are_those_of_their_layers_to_the_last_bit(scheme: Any, width: int) -> None:
    layers = [QuantizedLinear(rand(width, 192), None, scheme) for _ in range(3)]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(layer, name).flatten() for layer in layers])

    stored: FourBit | EightBit
    if scheme == "bnb.int8":
        stored = EightBit(torch.cat([layer.packed for layer in layers]), joined("absmax"))
    else:
        nested = None
        if scheme.endswith("-dq"):
            nested = (layers[0].absmax_code, joined("absmax_scale"), joined("absmax_offset"))
        stored = FourBit(joined("packed"), joined("absmax"), layers[0].code, nested)
    weight = Matrices(stored, (3, width, 192))
    expected = torch.stack([layer.dequantize(DTYPE) for layer in layers])
    for function in (dequantize, dequantize_reference):
        assert torch.equal(function(weight, torch.empty_like(expected)), expected)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gate_and_up_with_their_activation(function: str, uneven: bool, before: bool) -> None:
    choices, x, weight = choices_of(uneven=uneven), rand(TOKENS, 80), rand(EXPERTS, 2 * 48, 80) / 8
    bias = rand(EXPERTS, 2 * 48)
    for branches, h in zip(
        gate_up(x, weight, choices, function, bias=bias, before=before),
        gate_up_reference(exact(x), exact(weight), choices, function, bias=exact(bias), before=before),
        strict=True,
    ):
        assert_near(branches, h)


@pytest.mark.parametrize("rank", [4, 16, 80])
@pytest.mark.parametrize("halves", [(0, 1), (0, -1), (-1, 0)])
def test_adapters_of_gate_and_up(halves: tuple[int, int], rank: int) -> None:
    choices, x, weight = choices_of(), rand(TOKENS, 64), rand(EXPERTS, 2 * 48, 64) / 8
    count = 1 + max(halves)
    z, b = rand(TOKENS * K, count * rank), rand(EXPERTS, count * 48, rank) / 4
    low = tuple(
        LowRank(z[:, i * rank : (i + 1) * rank], b[:, i * 48 : (i + 1) * 48].mT) if i >= 0 else None for i in halves
    )
    actual = gate_up(x, weight, choices, "silu", low)
    expected = gate_up_reference(exact(x), exact(weight), choices, "silu", exact(low))
    for one, other in zip(actual, expected, strict=True):
        assert_near(one, other)


def test_what_is_not_wanted_of_gate_and_up_is_not_there() -> None:
    choices, x, weight = choices_of(), rand(TOKENS, 64), rand(EXPERTS, 2 * 48, 64)
    branches, h = gate_up(x, weight, choices, "silu")
    for wanted in ((True, False), (False, True)):
        some = gate_up(x, weight, choices, "silu", wants_branches=wanted[0], wants_h=wanted[1])
        assert [len(part) for part in some] == [len(choices.token) * wants for wants in wanted]
        assert torch.equal(some[0], branches) or torch.equal(some[1], h)


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("k", [64, 80])  # the second fills no whole block
def test_a_product_meets_the_weights_of_each_choices_expert(
    k: int, gathered: bool, transposed: bool, uneven: bool
) -> None:
    choices = choices_of(uneven=uneven)
    x = rand(TOKENS if gathered else TOKENS * K, k)
    weight = rand(EXPERTS, *((k, 272) if transposed else (272, k)))
    bias = rand(EXPERTS, 272)
    actual = product(x, weight, choices, None, bias, gathered, transposed)
    assert_near(actual, product_reference(exact(x), exact(weight), choices, None, exact(bias), gathered, transposed))


@pytest.mark.parametrize("uneven", [False, True])
def test_rows_may_be_gathered_before_a_product(uneven: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    choices, x, weight = choices_of(uneven=uneven), rand(TOKENS, 64), rand(EXPERTS, 2 * 48, 64)
    gathered = x.index_select(0, choices.token)
    monkeypatch.setattr(experts_products, "is_hopper", lambda _: True)
    ways = []
    for columns in (experts_products.MANY_COLUMNS, 96):
        monkeypatch.setattr(experts_products, "MANY_COLUMNS", columns)
        assert torch.equal(experts_products.gather(x, choices, 96)[0], x if columns > 96 else gathered)
        ways.append([product(x, weight, choices, gathered=True), *gate_up(x, weight, choices, "silu")])
    assert all(torch.equal(*pair) for pair in zip(*ways, strict=True))


AROUND = [0, 1, 31, 32, 33, 64, 65, 127, 128, 129]
"""Rows of experts: none, a quarter, a half and all of a tile, which kernels compute in other ways, and one more."""


def choices_around() -> Choices:
    """One choice a token, so that experts have these numbers of rows."""
    chosen = torch.arange(len(AROUND)).repeat_interleave(torch.tensor(AROUND))
    chosen = chosen[torch.randperm(len(chosen))].to(DEVICE, torch.int32)
    return sort(torch.rand(len(chosen), 1, device=DEVICE), chosen[:, None], len(AROUND), tile=128)


@pytest.mark.parametrize(("k", "rank"), [(64, 4), (80, 0), (80, 80)])  # of 80, the second block is not whole
def test_gate_and_up_of_an_expert_with_any_number_of_rows(k: int, rank: int) -> None:
    choices, experts = choices_around(), len(AROUND)
    x, weight, bias = rand(choices.rows, k), rand(experts, 2 * 48, k) / 8, rand(experts, 2 * 48)
    low = tuple(LowRank(rand(choices.rows, rank), rand(experts, rank, 48) / 4) if rank else None for _ in range(2))
    for actual, expected in zip(
        gate_up(x, weight, choices, "silu", low, bias),
        gate_up_reference(exact(x), exact(weight), choices, "silu", exact(low), exact(bias)),
        strict=True,
    ):
        assert_near(actual, expected)


@pytest.mark.parametrize(("k", "dropout"), [(64, NONE), (80, DROPOUTS[1])], ids=["", "dropout"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
def test_a_product_of_an_expert_with_any_number_of_rows(
    k: int, gathered: bool, transposed: bool, dropout: Dropout
) -> None:
    choices, experts = choices_around(), len(AROUND)
    x, weight = rand(choices.rows, k), rand(experts, *((k, 96) if transposed else (96, k)))
    low, bias = LowRank(rand(choices.rows, 4), rand(experts, 4, 96), dropout), rand(experts, 96)
    actual = product(x, weight, choices, low, bias, gathered, transposed)
    expected = product_reference(exact(x), exact(weight), choices, exact(low), exact(bias), gathered, transposed)
    assert_near(actual, expected)


@pytest.mark.parametrize("group", [2, 8])
def test_the_order_of_tiles_changes_nothing(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    choices, x, weight = choices_of(), rand(TOKENS, 64), rand(EXPERTS, 528, 64)
    plain = product(x, weight, choices, gathered=True), *gate_up(x, weight, choices, "silu")
    monkeypatch.setattr(experts_products, "GROUP", group)
    monkeypatch.setattr(experts_products, "LARGE", 0)
    grouped = product(x, weight, choices, gathered=True), *gate_up(x, weight, choices, "silu")
    assert all(torch.equal(a, b) for a, b in zip(plain, grouped, strict=True))


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["", "dropout"])
@pytest.mark.parametrize("rank", [4, 16, 80])
def test_adapters_beside_a_product(rank: int, dropout: Dropout) -> None:
    choices, x, weight = choices_of(), rand(TOKENS * K, 64), rand(EXPERTS, 48, 64)
    for b in (rand(EXPERTS, rank, 48), rand(EXPERTS, 48, rank).mT):
        low = LowRank(rand(TOKENS * K, rank), b, dropout)
        assert_near(product(x, weight, choices, low), product_reference(exact(x), exact(weight), choices, exact(low)))


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["", "dropout"])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(("rank", "width"), [(4, 64), (16, 80), (80, 96)])
def test_what_adapters_make_of_each_choice_and_what_they_learn(
    rank: int, width: int, gathered: bool, dropout: Dropout
) -> None:
    choices = choices_of(uneven=rank == 4)
    x, a = rand(TOKENS if gathered else TOKENS * K, width), rand(EXPERTS, 1, rank, width)
    z = project(x, a, choices, gathered, dropout)
    assert_near(z, project_reference(exact(x), exact(a), choices, gathered, dropout))
    for shape, turned in (((EXPERTS, width, rank), False), ((EXPERTS, rank, width), True)):
        actual = torch.ones(shape, device=DEVICE)
        expected = torch.ones(shape, device=DEVICE, dtype=torch.float64)
        add_gradient(x, z, actual.mT if turned else actual, choices, 0.5, gathered, dropout)
        own = expected.mT if turned else expected
        gradient_reference(exact(x), exact(z), own, choices, 0.5, gathered, dropout)
        assert_near(actual, expected)


def test_sums_of_the_chunks_of_an_expert_with_many_rows_are_added_up() -> None:
    choices = choices_of(300, uneven=True)
    assert max(choices.ends.diff().tolist()) > choices.chunk
    x, q, folds = rand(300, 96), rand(300 * K, 16), Folds(choices)
    actual = [torch.ones(EXPERTS, 96, 16, device=DEVICE) for _ in range(3)]
    expected = torch.ones(EXPERTS, 96, 16, device=DEVICE, dtype=torch.float64)
    for gradient in actual:
        add_gradient(x, q, gradient, choices, 0.5, gathered=True, folds=folds)
    folds.flush()
    gradient_reference(exact(x), exact(q), expected, choices, 0.5, gathered=True)
    for gradient in actual:
        assert_near(gradient, expected)


@pytest.mark.parametrize("uneven", [False, True])
def test_programs_may_share_a_tile_in_what_adapters_make(uneven: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    choices, x, a = choices_of(uneven=uneven), rand(TOKENS, 64), rand(EXPERTS, 1, 4, 64)
    monkeypatch.setattr("lit_qlora.kernels.experts_lora.LEAST_ROWS", 16)  # of tiles with 32 here
    z = project(x, a, choices, gathered=True)
    assert_near(z, project_reference(exact(x), exact(a), choices, gathered=True))


@pytest.mark.parametrize("parts", [1, 2])
def test_programs_take_more_columns_of_long_rows_at_a_time(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    choices, x, a = choices_of(), rand(TOKENS * K, parts * 320), rand(EXPERTS, parts, 4, 320)
    monkeypatch.setattr("lit_qlora.kernels.experts_lora.LONG", 320)
    asked: list[int] = []
    monkeypatch.setattr("lit_qlora.kernels.experts_lora.fitting", lambda block, *_: asked.append(block) or block)
    assert_near(project(x, a, choices), project_reference(exact(x), exact(a), choices))
    assert asked == [256]


def test_two_parts_of_a_row_meet_two_parts_of_a() -> None:
    choices, x, b = choices_of(), rand(TOKENS * K, 96), rand(EXPERTS, 2, 48, 4)
    actual = project(x, b.mT, choices)
    assert_near(actual, project_reference(exact(x), exact(b.mT), choices))
    assert_near(project(x[:, 48:], b[:, 1:].mT, choices), exact(actual[:, 4:]))


def test_a_weight_before_gate_and_up_is_one_of_what_the_expert_reads() -> None:
    choices, x, weight = choices_of(k=1), rand(TOKENS, 64), rand(EXPERTS, 2 * 48, 64) / 8
    h = gate_up(x, weight, choices, "silu", before=True)[1]
    weighted = x * choices.weights
    ones = replace(choices, weight=torch.ones_like(choices.weight))
    assert_near(h, gate_up_reference(exact(weighted), exact(weight), ones, "silu")[1])


BACK = [
    *((function, 4, (0, 1), before) for function in FUNCTIONS for before in (False, True)),
    *(
        ("silu", rank, slots, False)
        for rank, slots in ((16, (0, -1)), (0, (-1, 0)), (4, (-1, -1)), (0, (-1, -1)), (20, (0, 1)))
    ),
]


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["", "dropout"])
@pytest.mark.parametrize(("function", "rank", "slots", "before"), BACK)
def test_back_through_the_activation(
    function: str, rank: int, slots: tuple[int, int], before: bool, dropout: Dropout
) -> None:
    rows, width, r, count = TOKENS * K, 48, 8, 1 + max(slots)
    choices, branches, dh = choices_of(uneven=rank == 4), 4 * rand(rows, 2 * width), rand(rows, width)
    dz, z = rand(rows, max(rank, 1)), rand(rows, 2 * r)

    def run(function_: Any, dtype: torch.dtype) -> list[Tensor]:
        grad_a = torch.ones(EXPERTS, rank, width, device=DEVICE, dtype=dtype)
        grad_b = torch.ones(EXPERTS, count * width, r, device=DEVICE, dtype=dtype)
        tensors = [branches, dh, dz, z, torch.empty_like(dh)]
        own, d, dz_, z_, h = [exact(x) if dtype == torch.float64 else x.clone() for x in tensors]
        down, gate_up_ = (dz_, grad_a, 0.5) if rank else None, (z_, grad_b, slots) if count else None
        d_weight = function_(own, d, choices, function, down, gate_up_, dropout, h, before=before)
        return [own, d_weight.sum(0), h, grad_a, grad_b]

    both = run(mlp_backward, torch.float32), run(mlp_backward_reference, torch.float64)
    for actual, expected in zip(*both, strict=True):
        if expected.numel():
            assert_near(actual, expected)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("function", ["silu", "clamped"])
def test_back_through_the_activation_without_adapters(function: str, before: bool) -> None:
    rows, width = TOKENS * K, 300
    choices, branches, dh = choices_of(uneven=True), 4 * rand(rows, 2 * width), rand(rows, width)
    whole, expected = branches.clone(), exact(branches)
    parts = mlp_backward(whole, dh, choices, function, before=before)
    assert_near(parts.sum(0), mlp_backward_reference(expected, exact(dh), choices, function, before=before).sum(0))
    assert_near(whole, expected)
