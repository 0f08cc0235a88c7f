"""Assisted generation: a small draft model guesses some tokens, and the model checks all of them in one pass.

A guess is accepted as often as the model itself would have chosen it. So the answers have exactly the model's
distribution with any draft model, and the likeliest answer is the same, token for token. Leviathan et al. 2023, "Fast
inference from transformers via speculative decoding"; Chen et al. 2023.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_qlora.errors import UsageError
from lit_qlora.generation.sampling import constrain, narrow, probabilities_of
from lit_qlora.generation.sequences import check_finite, evaluating
from lit_qlora.model.cache import KVCache
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT
from lit_qlora.settings import GenerationConfig


@dataclass(frozen=True)
class Draft:
    """The model that guesses, and the tokens that it guesses at a time."""

    model: GPT
    tokens: int = 5


def check_can_forget(config: ModelConfig) -> None:
    """Raise UsageError for a model that cannot forget a rejected guess."""
    if config.state_layers:
        kind = (
            "state space" if config.state_space else "gated delta net" if config.delta_layers else "short convolution"
        )
        raise UsageError(
            f"{config.name} keeps a state instead of keys and values ({kind}), which a rejected guess would "
            "stay in, so it takes no part in assisted generation.\nLeave out draft_checkpoint_dir."
        )


def assisted_tokens(
    model: GPT,
    draft: Draft,
    prompt: Sequence[int],
    config: GenerationConfig,
    stop_ids: Collection[int],
    vocab_size: int | None,
    generator: torch.Generator,
    room: int,
) -> Iterator[int]:
    """The tokens of an answer, `room` of them; the caller ends it earlier.

    Args:
        vocab_size: ids from here on are never chosen; None where both models have the same vocabulary.
    """
    size = min(model.config.vocab_size, draft.model.config.vocab_size, vocab_size or model.config.vocab_size)
    ids, target = list(prompt), _Reader(model, len(prompt) + room, size)
    guesser = _Reader(draft.model, min(len(prompt) + room, draft.model.config.block_size), size)

    def probabilities(logits: Tensor, history: Sequence[int]) -> Tensor:
        """(V,) of the next token; 1 for the likeliest token where none is drawn."""
        answered = len(history) - len(prompt)
        scores = constrain(logits[None], torch.tensor([history], device=logits.device), config, stop_ids, answered)
        if not config.samples:
            return F.one_hot(scores[0].argmax(), size).float()
        return probabilities_of(narrow(scores, config)[0])

    with evaluating(model), evaluating(draft.model):
        while len(ids) < len(prompt) + room:
            # The last token is never guessed: the check itself gives one more.
            left = min(len(prompt) + room, guesser.room) - len(ids)
            guesses: list[int] = []
            guessed_with: list[Tensor] = []
            for _ in range(min(draft.tokens, left - 1)):
                logits = guesser.read(ids + guesses)[-1]
                guessed_with.append(probabilities(logits, ids + guesses))
                guesses.append(int(torch.multinomial(guessed_with[-1], 1, generator=generator)))
            logits = target.read(ids + guesses)[-len(guesses) - 1 :]
            wanted = [probabilities(row, ids + guesses[:i]) for i, row in enumerate(logits)]
            tokens = check(guesses, guessed_with, wanted, generator)
            yield from tokens
            ids += tokens
            target.forget(len(ids) - 1)
            guesser.forget(len(ids) - 1)


def check(
    guesses: Sequence[int],
    guessed_with: Sequence[Tensor],
    wanted: Sequence[Tensor],
    generator: torch.Generator | None = None,
) -> list[int]:
    """The guesses up to the first that is rejected, and one token more.

    Args:
        guessed_with: for each guess the probabilities (V,) that it was drawn with.
        wanted: for each guess, and for the token after the last, the probabilities (V,) that it should have.

    Returns:
        1 to len(guesses) + 1 tokens, distributed as if each had been drawn with `wanted`.
    """
    device = wanted[0].device
    accepted: list[int] = []
    for guess, q, p in zip(guesses, guessed_with, wanted, strict=False):
        if torch.rand((), generator=generator, device=device) * q[guess] < p[guess]:
            accepted.append(guess)
            continue
        missing = (p - q).clamp(min=0)  # probability that the accepted guesses lack
        missing = missing if missing.any() else p  # equal but for rounding
        return [*accepted, int(torch.multinomial(missing, 1, generator=generator))]
    return [*accepted, int(torch.multinomial(wanted[-1], 1, generator=generator))]


class _Reader:
    """A model that reads a text that grows, and whose end changes."""

    def __init__(self, model: GPT, room: int, vocab_size: int) -> None:
        check_can_forget(model.config)
        weight = model.embed.weight
        self.model, self.vocab_size, self.room = model, vocab_size, room
        self.cache = KVCache(model.config, 1, room, weight.dtype, weight.device)

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> Tensor:
        """Logits (N, V) float32 behind each of the tokens that were not read before."""
        unread = torch.tensor([ids[self.cache.size :]], device=self.cache.device)
        return check_finite(self.model(unread, self.cache)[0, :, : self.vocab_size].float())

    def forget(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.cache.size = min(self.cache.size, length)
