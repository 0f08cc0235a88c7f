"""A head that reads a label off the last token of a text, trained in float32 beside the adapter.

It is what transformers calls `score` in AutoModelForSequenceClassification, and PEFT saves as one of modules_to_save.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_qlora.checkpoint.score import NAME
from lit_qlora.errors import CheckpointError
from lit_qlora.model.gpt import GPT

PEFT_NAME = f"base_model.model.{NAME}"
SPREAD = 0.02  # of the initial weights; transformers' own


def add_score(model: GPT, outputs: int) -> None:
    """Give the model a head with random weights; call it after add_lora, which freezes everything."""
    embed = model.embed.weight
    model.score = nn.Linear(model.config.n_embd, outputs, bias=False, device=embed.device, dtype=torch.float32)
    nn.init.normal_(model.score.weight, std=SPREAD)


def fill_score(model: GPT, weight: Tensor, location: str) -> None:
    """Give the model a head with these weights (C, E).

    Raises:
        CheckpointError: if they are of another model.
    """
    if weight.ndim != 2 or weight.size(1) != model.config.n_embd:
        raise CheckpointError(f"{location}: its head has shape {tuple(weight.shape)}, so it is of another model.")
    add_score(model, len(weight))
    assert model.score is not None
    model.score.weight.data.copy_(weight)


def to_peft(weight: Tensor, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """An adapter in PEFT's layout with this head; its configuration says that it classifies sequences."""
    return {**tensors, PEFT_NAME: weight.detach().float().cpu().contiguous()}, {
        **config,
        "task_type": "SEQ_CLS",
        "modules_to_save": ["classifier", "score"],
    }
