"""The divergence of two models at each token of an answer."""

import math
from collections.abc import Iterator, Sequence

import torch

from lit_qlora.errors import NumericalError
from lit_qlora.generation.sequences import evaluating
from lit_qlora.generation.text import TextStream
from lit_qlora.inference import Roster, decoder_of, stop_ids
from lit_qlora.model.gpt import LOGITS_AT_ONCE
from lit_qlora.prompts.style import Style
from lit_qlora.prompts.tokenizer import Tokenizer


def answer_ids(tokenizer: Tokenizer, style: Style | None, answer: str) -> list[int]:
    """Encode an answer as the model says it, without the token that ends it."""
    if style is None:
        return tokenizer.encode(answer, bos=False)
    ids = style.encode_answer(tokenizer, answer)
    return ids[:-1] if ids[-1] in stop_ids(tokenizer, style) else ids


@torch.no_grad()
def divergences(roster: Roster, prompts: dict[str, list[int]], answer: Sequence[int]) -> list[float]:
    """Compute KL(first || second) of two models in nats, at each token of an answer.

    Args:
        prompts: names of both models, and the prompt of each, in its own style.
        answer: at least one id.

    Raises:
        NumericalError: if a model's probabilities are no numbers.
    """
    device = roster.model.embed.weight.device
    hidden = {}
    with evaluating(roster.model):
        for name, prompt in prompts.items():
            with roster.answering(name):
                tokens = torch.tensor([[*prompt, *answer]], device=device)
                hidden[name] = roster.model.hidden(tokens)[0, len(prompt) - 1 : -1]
        at_once = max(1, LOGITS_AT_ONCE // roster.model.config.vocab_size)
        found: list[float] = []
        for start in range(0, len(answer), at_once):
            first, second = (_log_probs(roster, name, part[start : start + at_once]) for name, part in hidden.items())
            found += (first.exp() * (first - second)).sum(dim=-1).clamp(min=0).tolist()
    if not all(map(math.isfinite, found)):
        raise NumericalError("A probability of a token is no number.")
    return found


def _log_probs(roster: Roster, name: str, hidden: torch.Tensor) -> torch.Tensor:
    """(T, d) -> (T, V) float32."""
    with roster.answering(name):
        return roster.model.logits(hidden)[:, : roster.tokenizer.size].float().log_softmax(dim=-1)


def pieces(
    tokenizer: Tokenizer, style: Style | None, answer: Sequence[int], values: Sequence[float]
) -> Iterator[tuple[str, float]]:
    """Yield the text of an answer piece by piece, each with the largest value of its tokens.

    A piece is a token, or several that make one character.
    """
    stream = TextStream(decoder_of(tokenizer, style), *((style.gap, style.tail) if style else ()))
    largest = 0.0
    for token, value in zip(answer, values, strict=True):
        largest = max(largest, value)
        if text := stream.push(token):
            yield text, largest
            largest = 0.0
    if text := stream.end():
        yield text, largest
