"""One token of each text, rotated, stored and looked up, gives what the plain formulas give."""

import pytest
import torch

from lit_qlora.kernels import decode_attention
from lit_qlora.kernels.decode_attention import attend, attend_reference, store
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.kernels.rope import rotate_reference

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("half", [0, 4, 12])
def test_queries_and_keys_are_rotated_and_stored_behind_the_text(
    half: int, interleaved: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    heads, groups, size, lengths = 4, 2, 24, torch.tensor([3, 0, 9], device=DEVICE)
    qkv = torch.randn(3, (heads + 2 * groups) * size, device=DEVICE, dtype=dtype)
    keys, values = torch.randn(2, 3, groups, 10, size, device=DEVICE, dtype=dtype)
    angle = torch.randn(3, half, device=DEVICE)
    rope = (angle.cos(), angle.sin()) if half else None
    expected_keys, expected_values = keys.clone(), values.clone()
    q, k, v = qkv.view(3, -1, size).split((heads, groups, groups), dim=1)
    if half:
        q, k = (rotate_reference(t, angle.cos()[:, None], angle.sin()[:, None], interleaved) for t in (q, k))
    expected_keys[torch.arange(3), :, lengths], expected_values[torch.arange(3), :, lengths] = k, v
    queries = store(qkv, lengths, rope, keys, values, heads, interleaved)
    for tensor, expected in ((queries, q), (keys, expected_keys), (values, expected_values)):
        assert torch.allclose(tensor, expected, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("most_parts", [1, 3, 64])
@pytest.mark.parametrize(("window", "chunked"), [(None, False), (5, False), (70, False), (21, True)])
@pytest.mark.parametrize(("heads", "groups", "size"), [(2, 2, 16), (6, 2, 24), (4, 1, 32)])
def test_a_token_takes_what_attention_gives_it(
    heads: int,
    groups: int,
    size: int,
    window: int | None,
    chunked: bool,
    most_parts: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode_attention, "MOST_PARTS", most_parts)  # parts have all, several or one of the pieces
    torch.manual_seed(0)
    lengths = torch.tensor([0, 63, 64, 300], device=DEVICE)
    queries = torch.randn(4, heads, size, device=DEVICE, dtype=dtype)
    whole = torch.randn(2, 4, groups, 310, size, device=DEVICE, dtype=dtype)
    keys, values = whole
    for row, length in enumerate(lengths.tolist()):
        whole[:, row, :, length + 1 :] = torch.nan  # what is not there yet is not looked at
    out = attend(queries, keys, values, lengths, 301, 0.3, window, chunked=chunked)
    expected = attend_reference(queries, keys.nan_to_num(), values.nan_to_num(), lengths, 0.3, window, chunked=chunked)
    if chunked:  # 63 = 3 x 21 begins a chunk
        assert torch.allclose(out[1].float(), values[1, :, 63].float().repeat_interleave(heads // groups, 0).flatten())
    assert torch.allclose(
        out.float(),
        expected,
        rtol=1e-5 if dtype == torch.float32 else 2e-2,
        atol=1e-5 if dtype == torch.float32 else 2e-2,
    )


@pytest.mark.parametrize(
    ("limit", "heads", "each"),
    [
        (639, 1, 32),  # few heads: as many programs as keys allow
        (640, 32, 96),
        (512, 256, 512),  # many heads: a program for each
        (8192, 512, 512),  # one of the texts may be long
        (131072, 512, 2048),
    ],
)
def test_keys_are_split_over_as_many_programs_as_keep_a_gpu_busy(limit: int, heads: int, each: int) -> None:
    assert decode_attention._keys_of_a_program(limit, heads) == each


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "cap", "sunk"), [(None, 2.0, False), (5, None, True), (None, 2.0, True)])
def test_scores_are_capped_and_sinks_take_their_share(
    window: int | None, cap: float | None, sunk: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([0, 70], device=DEVICE)
    queries = torch.randn(2, 4, 16, device=DEVICE, dtype=dtype)
    keys, values = torch.randn(2, 2, 2, 80, 16, device=DEVICE, dtype=dtype)
    sinks = torch.tensor([-20.0, 0.0, 3.0, 80.0], device=DEVICE, dtype=dtype) if sunk else None
    out = attend(queries, keys, values, lengths, 71, 1.5, window, cap, sinks)
    expected = attend_reference(queries, keys, values, lengths, 1.5, window, cap, sinks)
    exact = dtype == torch.float32
    assert torch.allclose(out.float(), expected, rtol=1e-5 if exact else 2e-2, atol=1e-5 if exact else 2e-2)
