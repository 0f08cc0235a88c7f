"""Answers to prompts, a token at a time: batches, streams, and the choice of the next token."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lit_qlora.errors import NumericalError, UsageError
from lit_qlora.model import GPT, KVCache
from lit_qlora.settings import SamplingConfig

PAD = 0  # what fills the left of the shorter prompts; no other token looks at it


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    stop_ids: Collection[int],
    vocab_size: int | None = None,
    stop: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """The answer to each prompt, without the stop id that ended it.

    The prompts share one forward pass per new token. A greedy answer does not depend on the prompts beside it; a
    sampled one does, because they all draw from the same generator.

    Args:
        prompts: ids, of any lengths.
        stop_ids: ids that end an answer.
        vocab_size: ids from here on are never chosen; the tokenizer's size, where the model's vocabulary is padded.
        stop: asked with the ids of an answer after each token; True ends that answer, its last token included.

    Raises:
        UsageError: if a prompt is empty, or fills the model's context alone.
        NumericalError: if a logit is not a number.
    """
    room = [room_for_answer(model, len(prompt), sampling.max_new_tokens) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    if not prompts:
        return answers
    for tokens in _steps(model, prompts, sampling, vocab_size, max(room)):
        for row in sorted(unfinished):
            answer, token = answers[row], tokens[row]
            if token not in stop_ids:
                answer.append(token)
            if token in stop_ids or len(answer) == room[row] or (stop and stop(answer)):
                unfinished.remove(row)
        if not unfinished:
            break
    return answers


def stream(
    model: GPT,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    stop_ids: Collection[int],
    vocab_size: int | None = None,
) -> Iterator[int]:
    """The answer that generate gives to this prompt alone, each id as soon as it is known."""
    room = room_for_answer(model, len(prompt), sampling.max_new_tokens)
    for (token,) in _steps(model, [prompt], sampling, vocab_size, room):
        if token in stop_ids:
            return
        yield token


def room_for_answer(model: GPT, prompt_length: int, wanted: int) -> int:
    """How many of `wanted` new tokens fit behind a prompt: the two together never exceed block_size.

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


def sample(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator | None = None) -> Tensor:
    """The next token of each row.

    top_k cuts first, and top_p then cuts what is left, by its own probabilities. The likeliest token always stays.

    Args:
        logits: (B, V), any float dtype.
        sampling: its temperature, top_k and top_p.
        generator: on the device of `logits`; torch's own by default.

    Returns:
        (B,) int64.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    # Relative to the largest, a logit divided by a tiny temperature is -inf at worst, never inf or nan.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is None and sampling.top_p == 1:
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
    largest, ids = logits.topk(min(sampling.top_k or logits.size(-1), logits.size(-1)))  # sorted
    probabilities = largest.softmax(dim=-1)
    if sampling.top_p < 1:
        likelier = probabilities.cumsum(dim=-1) - probabilities  # probability of all the tokens before each one
        likelier[:, 0] = 0
        probabilities = probabilities.masked_fill(likelier >= sampling.top_p, 0)
    chosen = torch.multinomial(probabilities, 1, generator=generator)  # takes weights that do not sum to 1
    return ids.gather(-1, chosen)[:, 0]


class _Decodes(Protocol):
    def decode(self, ids: Sequence[int]) -> str:
        """As lit_qlora.tokenizer.Tokenizer.decode."""
        ...


def stream_text(tokenizer: _Decodes, ids: Iterable[int], gap: str = "") -> Iterator[str]:
    """The text of `ids` in pieces, each as soon as it is certain; together they are what decode gives for all ids.

    A token may be part of a character, and its text may depend on its place (SentencePiece drops a leading space),
    so all ids so far are decoded together, and an unfinished character at the end is held back.

    Args:
        tokenizer: what decodes them.
        ids: consumed one by one.
        gap: left out where the text begins with it, see lit_qlora.prompts.Style.gap.
    """
    seen: list[int] = []
    text, written = "", 0
    for token in ids:
        seen.append(token)
        text = tokenizer.decode(seen)
        if gap.startswith(text):
            continue
        start, end = max(written, _gap_length(text, gap)), len(text.rstrip("\ufffd"))
        if end > start:
            yield text[start:end]
            written = end
    if rest := text[max(written, _gap_length(text, gap)) :]:
        yield rest


def _gap_length(text: str, gap: str) -> int:
    return len(gap) if text.startswith(gap) else 0


def _steps(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    vocab_size: int | None,
    steps: int,
) -> Iterator[list[int]]:
    """The next token of every row, `steps` times; who asks decides which rows are still of interest."""
    embedding = model.embed.weight
    generator = torch.Generator(embedding.device).manual_seed(sampling.seed)
    longest = max(len(prompt) for prompt in prompts)
    padding = [longest - len(prompt) for prompt in prompts]
    tokens = torch.tensor([[PAD] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)])
    tokens = tokens.to(embedding.device)
    left_pad = torch.tensor(padding, device=embedding.device) if any(padding) else None
    cache = KVCache(model.config, len(prompts), longest + steps, embedding.dtype, embedding.device, left_pad)

    was_training = model.training
    model.eval()
    try:
        for _ in range(steps):
            with torch.no_grad():  # not around the yield, where it would reach into the caller
                logits = model.head(model.hidden(tokens, cache)[:, -1])[:, :vocab_size]
            if logits.isnan().any():
                raise NumericalError("The model's logits are not numbers. A damaged checkpoint, or 16-bit overflow?")
            chosen = sample(logits, sampling, generator)
            yield chosen.tolist()
            tokens = chosen[:, None]
    finally:
        model.train(was_training)
