"""Every switch of ModelConfig, in every family that has it: it does something, and keeps the promises of the model."""

import json
from copy import deepcopy
from dataclasses import fields, replace
from functools import cache
from operator import attrgetter
from typing import Any, get_args, get_origin

import pytest
import torch
from torch import Tensor

from lit_qlora.convert.families import read_config
from lit_qlora.errors import CheckpointError
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT, KVCache
from tests.reference import CASES, EVERY_CASE, SMALL, transformers

NO_SWITCHES = {
    *("name", "family", "wrapper", "block_size"),  # what it is called, and how long texts may be
    *("n_layer", "n_embd", "n_head", "n_kv_head", "head_size", "ffn_size", "vocab_size"),
    *("kv_latent_size", "q_latent_size", "latent_rope_size", "latent_value_size", "expert_size", "shared_expert_size"),
    *("delta_key_heads", "delta_value_heads", "delta_key_size", "delta_value_size", "delta_conv_size", "conv_size"),
    *("n_expert", "per_layer_size", "per_layer_vocab", "shared_kv_ffn_size", "full_head_size", "full_kv_heads"),
    *("tied_head", "positions", "state_space"),  # other weights, not another function of the same
}


NAME = attrgetter("name")


@cache
def config_of(case: str) -> ModelConfig:
    """The configuration of `case`."""
    family, changes = CASES[case]
    theirs = transformers.AutoConfig.for_model(family, **SMALL | changes)
    return read_config(json.loads(theirs.to_json_string(use_diff=False)), case)


@cache
def model_of(case: str) -> GPT:
    """A random model with the configuration of `case`."""
    config = config_of(case)
    torch.manual_seed(0)
    model = GPT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model.eval()


def tokens(length: int, seed: int = 0) -> Tensor:
    """A text."""
    return torch.randint(0, 96, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: GPT, *args: Any) -> Tensor:
    """What the model says, without gradients."""
    out: Tensor = model(*args)
    return out


def others(kind: Any, value: Any) -> list[Any]:
    """Other values that a field of this type could have."""
    if get_origin(kind) is tuple:
        return [(), (0,), tuple(2 * item for item in value)]
    if get_origin(kind) is not None and type(value) is str:
        return [choice for choice in get_args(kind) if choice != value]
    if isinstance(value, bool):
        return [not value]
    if value is None:
        return [3, 0.7]
    return [value - 1, value + 1, value * 2] if isinstance(value, int) else [value * 1.5 + 0.1, value / 2]


@pytest.mark.parametrize("field", [field for field in fields(ModelConfig) if field.name not in NO_SWITCHES], ids=NAME)
def test_every_switch_changes_the_logits_of_some_case(field: Any) -> None:
    texts = tokens(9), tokens(23)
    # Those that use it come first: each of the others costs a few passes.
    for case in sorted(CASES, key=lambda case: getattr(config_of(case), field.name) == field.default):
        model = model_of(case)
        said = [logits(model, text) for text in texts]
        for value in others(field.type, getattr(model.config, field.name)):
            try:
                other = GPT(replace(model.config, **{field.name: value})).eval()
                other.load_state_dict(model.state_dict(), strict=False)
            except (CheckpointError, RuntimeError, ValueError):  # impossible together with the rest
                continue
            if not all(
                torch.allclose(logits(other, text), old, rtol=1e-3) for text, old in zip(texts, said, strict=True)
            ):
                return
    pytest.fail(f"{field.name} is accepted and ignored")


@pytest.mark.parametrize("case", EVERY_CASE)
def test_left_padding_changes_nothing(case: str) -> None:
    model, long, short, following = model_of(case), tokens(9), tokens(4, 1), torch.cat([tokens(8, 2), tokens(8, 3)])
    batch = torch.cat([long, torch.cat([torch.zeros(1, 5, dtype=torch.long), short], dim=1)])
    cache = KVCache(model.config, 2, 17, torch.float32, left_pad=torch.tensor([0, 5]))
    alone = KVCache(model.config, 1, 12, torch.float32)
    together = torch.cat([logits(model, batch, cache), logits(model, following, cache)], dim=1)[1:, 5:]
    expected = torch.cat([logits(model, short, alone), logits(model, following[1:], alone)], dim=1)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("case", EVERY_CASE)
def test_documents_laid_end_to_end_do_not_see_each_other(case: str) -> None:
    model, documents = model_of(case), [tokens(13), tokens(17, 1), tokens(5, 2)]
    positions = torch.cat([torch.arange(d.size(1)) for d in documents] + [torch.zeros(2, dtype=torch.long)])[None]
    numbers = [torch.full((d.size(1),), i) for i, d in enumerate(documents)]
    segments = torch.cat([*numbers, torch.tensor([-1, -1])])[None]
    row = torch.cat([*documents, torch.zeros(1, 2, dtype=torch.long)], dim=1)
    with torch.no_grad():
        packed = model.logits(model.hidden(row, positions=positions, segments=segments))
    start = 0
    for document in documents:
        expected = logits(model, document)
        got = packed[:, start : start + document.size(1)]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        start += document.size(1)


@pytest.mark.parametrize("case", EVERY_CASE)
def test_documents_that_begin_alike_share_their_beginning(case: str) -> None:
    model = model_of(case)
    if model.config.rope_scaling in ("dynamic", "longrope") or model.config.state_layers:
        pytest.skip("turns the same beginning otherwise in a longer text, or has no state of it any more")
    beginning, first, second, other = tokens(11), tokens(6, 1), tokens(4, 2), tokens(5, 3)
    row = torch.cat([beginning, first, second, other, torch.zeros(1, 2, dtype=torch.long)], dim=1)
    positions = torch.tensor([*range(17), *range(11, 15), *range(5), 0, 0])[None]
    seen_until = torch.tensor([21] * 11 + [17] * 6 + [21] * 4 + [26] * 5 + [27, 28])[None]
    # Rows of a batch are laid out each in its own way.
    rows, places = torch.cat([row, row.flip(1)]), torch.cat([positions, torch.arange(28)[None]])
    until = torch.cat([seen_until, torch.full((1, 28), 28)])
    with torch.no_grad():
        shared, plain = model.logits(model.hidden(rows, positions=places, seen_until=until))
    for got, document in (
        (shared[:17], torch.cat([beginning, first], dim=1)),
        (torch.cat([shared[:11], shared[17:21]]), torch.cat([beginning, second], dim=1)),
        (shared[21:26], other),
        (plain, row.flip(1)),
    ):
        expected = logits(model, document)[0]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("case", ["qwen3_5", "gemma4-E", "gemma4_moe"])
def test_recomputing_activations_leaves_the_gradients_bit_equal(case: str) -> None:
    model, text = deepcopy(model_of(case)).train(), tokens(23)

    def gradients(recompute: bool) -> list[Tensor]:
        model.recompute = recompute
        return list(torch.autograd.grad(model.loss(text[:, :-1], text[:, 1:]), learning))

    learning = [p for p in model.parameters() if p is not model.embed.weight]
    model.loss(text[:, :-1], text[:, 1:]).backward()
    learning = [p for p in learning if p.grad is not None]
    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("case", EVERY_CASE)
def test_bfloat16_stays_bfloat16_and_learns(case: str) -> None:
    model = GPT(model_of(case).config).bfloat16()
    text = tokens(23)
    cache = KVCache(model.config, 1, 23, torch.bfloat16)
    assert logits(model, text, cache).dtype == torch.bfloat16
    model.loss(text[:, :-1], text[:, 1:]).backward()
    mix = model.blocks[0].attn or model.blocks[0].delta or model.blocks[0].conv
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in mix.parameters())
