"""Embeddings that learn, and noise on them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lit_qlora.errors import UsageError
from lit_qlora.lora.embeddings import TrainedEmbedding, add_noise
from lit_qlora.lora.layer import add_lora, count_trainable, lora_state, without_adapters
from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import quantize_linears
from lit_qlora.settings import LoRAConfig, Scheme
from tests.conftest import tiny_model

TOKENS = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(0))
TOKENS[0, :3] = torch.tensor([7, 300, 7])
SETTINGS = [{"train_tokens": (300, 7)}, {"train_embeddings": True}]


def learning(settings: dict, **changes: object) -> GPT:
    model = tiny_model(**changes)
    add_lora(model, LoRAConfig(dropout=0.0, **settings))
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_trained_embeddings_begin_as_they_were(settings: dict, tied: bool) -> None:
    expected = tiny_model(tied_head=tied)(TOKENS)
    torch.testing.assert_close(learning(settings, tied_head=tied)(TOKENS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_they_compute_what_a_model_with_their_rows_computes(settings: dict, tied: bool) -> None:
    model, plain = (
        learning(settings, tied_head=tied, head_bias=not tied),
        tiny_model(tied_head=tied, head_bias=not tied),
    )
    rows = lora_state(model)["embed.rows"]
    torch.nn.init.normal_(rows, std=0.3)
    with torch.no_grad():
        tokens = list(settings.get("train_tokens", range(320)))
        plain.embed.weight[tokens] = rows
        torch.testing.assert_close(model(TOKENS), plain(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ["none", "bnb.int8"])
def test_rows_of_a_head_of_its_own_are_computed_with_and_get_their_gradient(scheme: Scheme) -> None:
    model, plain = (tiny_model(head_bias=True) for _ in range(2))
    if scheme != "none":
        for one in (model, plain):
            quantize_linears(one, scheme, head=True)
        plain.head = linear(plain.head)
    add_lora(model, LoRAConfig(dropout=0.0, train_tokens=(300, 7), train_head_rows=True))
    rows = lora_state(model)["head.rows"]
    torch.testing.assert_close(rows, plain.head.weight[[300, 7]].detach())
    with torch.no_grad():
        torch.nn.init.normal_(rows, std=0.3)
        plain.head.weight[[300, 7]] = rows
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), rtol=1e-5, atol=1e-5)
    plain.head.weight.requires_grad_(True)
    for one in (model, plain):
        one.loss(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    assert plain.head.weight.grad is not None
    torch.testing.assert_close(model.head.rows.grad, plain.head.weight.grad[[300, 7]], rtol=1e-4, atol=1e-5)
    with without_adapters(model):
        assert not any(name.endswith("rows") for name, _ in model.named_parameters())


def linear(head: Any) -> torch.nn.Linear:
    """A quantised head as a plain one."""
    made = torch.nn.Linear(head.in_features, head.out_features)
    made.weight, made.bias = torch.nn.Parameter(head.dequantize()), head.bias
    return made


def test_their_gradient_is_that_of_the_rows() -> None:
    model, plain = learning({"train_tokens": (300, 7)}, tied_head=True), tiny_model(tied_head=True)
    for one in (model, plain):
        one.loss(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    assert isinstance(model.embed, TrainedEmbedding)
    assert model.embed.rows.grad is not None
    assert plain.embed.weight.grad is not None
    torch.testing.assert_close(model.embed.rows.grad, plain.embed.weight.grad[[300, 7]], rtol=1e-4, atol=1e-5)
    assert model.embed.weight.grad is None


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_named_rows_learn_and_they_are_float32(tied: bool) -> None:
    model = tiny_model(tied_head=tied).to(torch.bfloat16)
    add_lora(model, LoRAConfig(train_tokens=(3, 4, 5)))
    adapters = sum(tensor.numel() for name, tensor in lora_state(model).items() if "lora_" in name)
    assert count_trainable(model) == adapters + 3 * 64
    assert {tensor.dtype for tensor in lora_state(model).values()} == {torch.float32}
    assert set(lora_state(model)) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert model(TOKENS).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_tokens": (320,)}, "lora.train_tokens: 320 is no token; the model has 320"),
        ({"train_tokens": (1,), "targets": "head"}, "cannot have an adapter and be trained as well"),
        ({"train_tokens": (1,), "train_embeddings": True}, "lora.train_tokens would have no effect"),
        ({"train_tokens": (1, 1)}, "different ids"),
        ({"train_tokens": (-1,)}, "must be at least 0"),
        ({"train_head_rows": True}, "train_head_rows has no effect without"),
        ({"train_tokens": (1,), "train_head_rows": True, "targets": "head"}, "the head cannot have an adapter and"),
    ],
)
def test_what_cannot_be_trained_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        learning(settings, tied_head=True)


def test_noise_is_uniform_and_shrinks_with_tokens_and_width() -> None:
    """Within alpha / sqrt(T * E), as in Jain et al. 2023, sec. 2."""
    model = tiny_model().train()
    add_noise(model, 5.0)
    torch.manual_seed(0)
    tokens = torch.zeros(64, 25, dtype=torch.int64)
    noise = (model.embed(tokens) - F.embedding(tokens, model.embed.weight)).detach()
    most = 5 / (25 * 64) ** 0.5
    assert 0.99 * most < noise.abs().max() <= most
    assert float(noise.mean()) == pytest.approx(0, abs=0.01 * most)
    assert float(noise.std()) == pytest.approx(most / 3**0.5, rel=0.02)


def test_noise_is_for_training_alone() -> None:
    model, plain = tiny_model(), tiny_model()
    add_noise(model, 5.0)
    assert torch.equal(model(TOKENS), plain(TOKENS))
    torch.manual_seed(0)
    first = model.train()(TOKENS)
    assert not torch.equal(first, plain(TOKENS))
    torch.manual_seed(0)
    assert torch.equal(model(TOKENS), first)


def test_no_noise_leaves_the_model_as_it_is() -> None:
    model = tiny_model()
    add_noise(model, 0.0)
    assert not model.embed._forward_hooks
