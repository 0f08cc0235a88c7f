"""Gated delta nets: chunks compute what one token after another computes, and no document meets another."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint
from lit_qlora.model import delta_net
from lit_qlora.model.delta_net import CHUNK, delta_rule, delta_step
from lit_qlora.model.gpt import KVCache
from lit_qlora.model.short_conv import causal_convolution
from tests.model.test_switches import model_of, tokens
from tests.reference import hugging_face_model

LENGTH = 2 * CHUNK + 23


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys, values, logarithms of what is kept, and shares that are corrected."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, LENGTH, 3, size, dtype=dtype) for size in (5, 5, 7))
    kept, beta = (torch.rand(2, LENGTH, 3, dtype=dtype) for _ in range(2))
    return [q, k / k.norm(dim=-1, keepdim=True), v, -kept, beta]


def token_by_token(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The same one after another."""
    state, out = torch.zeros(2, 3, 5, 7, dtype=parts[0].dtype), []
    for i in range(parts[0].size(1)):
        y, state = delta_step(*(part[:, i : i + 1] for part in parts), None, state)
        out.append(y)
    return torch.cat(out, dim=1), state


def test_chunks_compute_what_one_token_after_another_does_with_the_same_gradients() -> None:
    parts = [part.requires_grad_() for part in inputs()]
    weight = torch.randn(2, LENGTH, 3, 7, dtype=torch.float64)
    ours, reference = delta_rule(*parts, None), token_by_token(parts)
    for got, expected in zip(ours, reference, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    gradients, expected = (torch.autograd.grad((y * weight).sum(), parts) for y, _ in (ours, reference))
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_autocast_leaves_the_rule_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = model_of("qwen3_5"), []
    monkeypatch.setattr(
        delta_net, "delta_rule", lambda *args: (seen.append(torch.is_autocast_enabled("cpu")), delta_rule(*args))[1]
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert model(tokens(9)).dtype == torch.bfloat16
    assert seen == [False] * len(model.config.delta_layers)


@pytest.mark.parametrize("first", [1, CHUNK, CHUNK + 9])
def test_a_text_can_be_read_in_pieces(first: int) -> None:
    parts = inputs()
    whole, behind = delta_rule(*parts, None)
    begun, state = delta_rule(*(part[:, :first] for part in parts), None)
    rest, state = delta_rule(*(part[:, first:] for part in parts), None, state)
    torch.testing.assert_close(torch.cat((begun, rest), dim=1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, behind, rtol=1e-12, atol=1e-12)


ENDS = [0, 9, CHUNK, CHUNK + 30, LENGTH - 4, LENGTH]


def test_documents_in_a_row_compute_what_each_computes_alone() -> None:
    parts, lengths = inputs(), torch.tensor(ENDS).diff()
    documents = torch.arange(len(lengths)).repeat_interleave(lengths).expand(2, -1)
    packed, _ = delta_rule(*parts, documents)
    alone = [delta_rule(*(p[:, a:b] for p in parts), None)[0] for a, b in pairwise(ENDS)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-12, atol=1e-12)
    x, weight = torch.randn(2, LENGTH + 3, 6), torch.randn(6, 1, 4)
    x[:, :3] = 0
    convolved = causal_convolution(x, weight, documents)
    for a, b in pairwise(ENDS):
        own = torch.cat((torch.zeros(2, 3, 6), x[:, 3 + a : 3 + b]), dim=1)
        torch.testing.assert_close(convolved[:, a:b], causal_convolution(own, weight, None))


@pytest.mark.parametrize("case", ["qwen3_5", pytest.param("granitemoehybrid-spaces", marks=pytest.mark.slow)])
def test_another_document_changes_no_bit_of_its_neighbours(case: str) -> None:
    model = model_of(case)
    lengths = torch.tensor([CHUNK - 3, CHUNK + 5, 40])
    segments = torch.tensor([0, 1, 2]).repeat_interleave(lengths)[None]
    positions = torch.cat([torch.arange(int(n)) for n in lengths])[None]
    row, other = tokens(int(lengths.sum())), tokens(int(lengths.sum()), seed=1)
    changed = torch.where(segments == 1, other, row)
    with torch.no_grad():
        one, two = (model.hidden(each, positions=positions, segments=segments) for each in (row, changed))
    same = (one == two).all(dim=-1)
    assert torch.equal(same, segments != 1)


@pytest.mark.parametrize("case", ["qwen3_next", pytest.param("granitemoehybrid-spaces", marks=pytest.mark.slow)])
@torch.no_grad()
def test_long_texts_with_padding_and_a_cache_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    theirs = hugging_face_model(tmp_path, case)
    convert_hf_checkpoint(tmp_path, tmp_path)
    model = load_model(tmp_path).eval()
    lengths, more = (CHUNK + 7, CHUNK + 3, 2), torch.cat([tokens(CHUNK + 3, seed=seed) for seed in (3, 4, 5)])
    left_pad = max(lengths) - torch.tensor(lengths)
    texts = [tokens(length, seed=length) for length in lengths]
    batch = torch.cat([F.pad(text, (int(pad), 0)) for text, pad in zip(texts, left_pad, strict=True)])
    cache = KVCache(model.config, 3, batch.size(1) + more.size(1), torch.float32, left_pad=left_pad)
    got = torch.cat([model(part, cache) for part in (batch, more[:, :1], more[:, 1:2], more[:, 2:])], dim=1)
    for row, text in enumerate(texts):
        expected = theirs(torch.cat((text, more[row : row + 1]), dim=1)).logits[0]
        torch.testing.assert_close(
            got[row, left_pad[row] :], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
        )
