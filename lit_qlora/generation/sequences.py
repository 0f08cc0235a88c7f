"""Rows that are continued together: their cache, their tokens, and the scores of the next tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lit_qlora.errors import NumericalError, UsageError
from lit_qlora.generation.graphed_step import FixedStep
from lit_qlora.generation.sampling import NO_TOKEN
from lit_qlora.generation.slot_cache import SlotCache
from lit_qlora.model.gpt import GPT, KVCache

PAD = 0  # padding left of the shorter prompts; no other token attends to it


class Decoding:
    """Prompts of any lengths, and the tokens appended to them.

    Args:
        prompts: ids; none of them empty.
        new_tokens: most tokens that will be appended to each prompt.
        vocab_size: ids from here on have no scores.

    Attributes:
        logits: (B, V) float32, of the next token of each row.
        history: (B, T) the tokens so far, NO_TOKEN left of the shorter prompts.
    """

    def __init__(self, model: GPT, prompts: Sequence[Sequence[int]], new_tokens: int, vocab_size: int | None) -> None:
        self.model, self.vocab_size = model, vocab_size
        device, dtype = model.embed.weight.device, model.embed.weight.dtype
        longest = max(len(prompt) for prompt in prompts)
        padding = [longest - len(prompt) for prompt in prompts]
        self.history = torch.tensor(
            [[NO_TOKEN] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)], device=device
        )
        left_pad = torch.tensor(padding, device=device) if any(padding) else None
        # The last token that is chosen is never read.
        self.cache = KVCache(model.config, len(prompts), longest + new_tokens - 1, dtype, device, left_pad)
        self.logits = self._read(torch.where(self.history == NO_TOKEN, PAD, self.history))
        self._fixed: FixedStep | None = None

    @property
    def last(self) -> Tensor:
        """(B,) the newest token of each row."""
        return self.history[:, -1]

    def append(self, tokens: Tensor) -> None:
        """Append a token (B,) to each row, without computing the next logits."""
        self.history = torch.cat((self.history, tokens[:, None]), dim=1)

    def advance(self) -> None:
        """Compute the logits behind the newest tokens."""
        if self._fixed:
            self.logits = check_finite(self._fixed(self.last))
        else:
            self.logits = self._read(self.last[:, None])

    def settle(self) -> None:
        """Continue in steps whose shapes and memory never change; rows can no longer be selected."""
        before = self.cache
        slots = SlotCache(self.model.config, before.batch, before.length, before.dtype, before.device)
        for row in range(before.batch):
            slots.put(row, before, row)
        self.cache = slots
        self._fixed = FixedStep(self.model, slots, before.size, self.vocab_size)

    def select(self, rows: Sequence[int]) -> None:
        """Continue with these rows, in this order; a row may occur several times."""
        if list(rows) == list(range(len(self.history))):
            return
        index = torch.tensor(rows, device=self.history.device)
        self.history, self.logits = self.history[index], self.logits[index]
        self.cache.select(index)

    @torch.no_grad()
    def _read(self, tokens: Tensor) -> Tensor:
        logits = self.model.logits(self.model.hidden(tokens, self.cache)[:, -1])[:, : self.vocab_size].float()
        return check_finite(logits)


def check_finite(logits: Tensor) -> Tensor:
    """`logits` unchanged. Raises NumericalError if one of them is not a number."""
    if logits.isnan().any():
        raise NumericalError("The model's logits are not numbers. A damaged checkpoint, or 16-bit overflow?")
    return logits


def room_for_answer(model: GPT, prompt_length: int, wanted: int) -> int:
    """The number of new tokens, at most `wanted`, with which a prompt fits into block_size.

    Raises:
        UsageError: if the prompt is empty or leaves no room at all.
    """
    block_size = model.config.block_size
    if prompt_length < 1:
        raise UsageError("The prompt is empty, so there is nothing to continue.")
    if prompt_length >= block_size:
        raise UsageError(
            f"The prompt has {prompt_length} tokens, and the model's context holds {block_size}, the answer included."
            "\nShorten the prompt."
        )
    return min(wanted, block_size - prompt_length)


@contextmanager
def evaluating(model: GPT) -> Iterator[None]:
    """Switch dropout off inside, and restore it afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
