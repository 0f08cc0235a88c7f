"""Dropout inside the frozen model: where it is, and when."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint
from tests.conftest import tiny_model
from tests.reference import hugging_face_model

TOKENS = torch.arange(38).view(2, 19)


@pytest.mark.parametrize("case", ["gpt_neox", "gpt_neox-sequential-tanh"])
def test_the_same_elements_are_dropped_as_in_gpt_neox_of_transformers(tmp_path: Path, case: str) -> None:
    theirs = hugging_face_model(tmp_path, case)
    convert_hf_checkpoint(tmp_path, tmp_path / "ours")
    ours = load_model(tmp_path / "ours").train()
    ours.set_dropout(0.3)
    for module in theirs.train().modules():
        if isinstance(module, nn.Dropout):  # hidden_dropout
            module.p = 0.3
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    logits = []
    for model in (ours, lambda tokens: theirs(tokens).logits):
        torch.manual_seed(7)
        with torch.no_grad():
            logits.append(model(TOKENS))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_softcap": 2.0},
        {"attention_sinks": True, "n_kv_head": 4},
        {"n_expert": 4, "n_expert_per_token": 2, "expert_size": 32},
    ],
    ids=str,
)
def test_it_is_random_in_training_alone_and_a_seed_repeats_it(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    expected = model.eval()(TOKENS)
    model.set_dropout(0.5)
    assert torch.equal(model(TOKENS), expected)
    first, again, other = (torch.manual_seed(seed) and model.train()(TOKENS) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    model.set_dropout(0.0)
    assert torch.equal(model(TOKENS), expected)


def test_recomputed_blocks_drop_the_same_elements_again() -> None:
    model = tiny_model().train()
    model.set_dropout(0.5)
    gradients = []
    for model.recompute in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        model.loss(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
