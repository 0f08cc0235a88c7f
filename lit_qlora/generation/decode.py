"""Answers to prompts, a token at a time: batches of unequal prompts, several answers to each, streams."""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from lit_qlora.generation.assisted import Draft, assisted_tokens
from lit_qlora.generation.beams import beam_search
from lit_qlora.generation.sampling import choose, constrain
from lit_qlora.generation.sequences import Decoding, evaluating, room_for_answer
from lit_qlora.model.gpt import GPT
from lit_qlora.settings import GenerationConfig

WORTH_A_GRAPH = 16
"""Steps from which on a capture takes less time than it saves."""


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    stop_ids: Collection[int],
    vocab_size: int | None = None,
    stop: Callable[[Sequence[int]], bool] | None = None,
    fixed_shapes: bool | None = None,
    draft: Draft | None = None,
) -> list[list[int]]:
    """The answers to the prompts, without the stop ids that ended them.

    The prompts share one forward pass per new token. The likeliest answer does not depend on the other prompts; a drawn
    one does, because all draw from the same generator.

    Args:
        prompts: ids, of any lengths.
        stop_ids: ids that end an answer.
        vocab_size: ids from here on are never chosen; the tokenizer's size, where the model's vocabulary is padded.
        stop: called with the ids of an answer after each token; True ends that answer, its last token included.
        fixed_shapes: decode in steps whose shapes never change, see lit_qlora.generation.graphed_step; by default on a
            GPU. Beam search does not.
        draft: guesses tokens, see lit_qlora.generation.assisted; prompts are then answered one by one, without beams.

    Returns:
        num_return_sequences answers to the first prompt, then to the second, and so on; the best first from a
        beam search.

    Raises:
        UsageError: if a prompt is empty, or fills the model's context alone.
        NumericalError: if a logit is not a number, or the settings leave no token to draw.
    """
    room = [room_for_answer(model, len(prompt), config.max_new_tokens) for prompt in prompts]
    if not prompts:
        return []
    if config.num_beams > 1:
        return beam_search(model, prompts, room, config, stop_ids, vocab_size, stop)
    if draft:
        return [
            list(_until_stopped(steps, stop_ids, stop))
            for steps in _assisted(model, draft, prompts, room, config, stop_ids, vocab_size)
        ]
    room = [tokens for tokens in room for _ in range(config.num_return_sequences)]
    answers: list[list[int]] = [[] for _ in room]
    unfinished = set(range(len(answers)))
    for tokens in _steps(model, prompts, config, stop_ids, vocab_size, max(room), fixed_shapes):
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
    config: GenerationConfig,
    stop_ids: Collection[int],
    vocab_size: int | None = None,
    draft: Draft | None = None,
) -> Iterator[int]:
    """The answer that generate gives to this prompt alone, each id as soon as it is chosen; without beams."""
    assert config.num_beams == config.num_return_sequences == 1, "a search knows its answer only at its end"
    room = room_for_answer(model, len(prompt), config.max_new_tokens)
    if draft:
        steps = next(_assisted(model, draft, [prompt], [room], config, stop_ids, vocab_size))
    else:
        steps = (token for (token,) in _steps(model, [prompt], config, stop_ids, vocab_size, room, None))
    yield from _until_stopped(steps, stop_ids, None)


def _until_stopped(
    tokens: Iterator[int], stop_ids: Collection[int], stop: Callable[[Sequence[int]], bool] | None
) -> Iterator[int]:
    """The tokens of an answer up to its end."""
    answer: list[int] = []
    for token in tokens:
        if token in stop_ids:
            return
        answer.append(token)
        yield token
        if stop and stop(answer):
            return


def _assisted(
    model: GPT,
    draft: Draft,
    prompts: Sequence[Sequence[int]],
    room: Sequence[int],
    config: GenerationConfig,
    stop_ids: Collection[int],
    vocab_size: int | None,
) -> Iterator[Iterator[int]]:
    """The tokens of each answer to each prompt; all are drawn with one generator."""
    generator = torch.Generator(model.embed.weight.device).manual_seed(config.seed)
    for prompt, most in zip(prompts, room, strict=True):
        for _ in range(config.num_return_sequences):
            yield assisted_tokens(model, draft, prompt, config, stop_ids, vocab_size, generator, most)


def _steps(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    stop_ids: Collection[int],
    vocab_size: int | None,
    steps: int,
    fixed_shapes: bool | None,
) -> Iterator[list[int]]:
    """The next token of every row, `steps` times; the caller ignores rows that are finished."""
    with evaluating(model):
        rows = Decoding(model, prompts, steps, vocab_size)
        rows.select([row for row in range(len(prompts)) for _ in range(config.num_return_sequences)])
        generator = torch.Generator(rows.logits.device).manual_seed(config.seed)
        alike = rows.logits.is_cuda and steps >= WORTH_A_GRAPH and model.gathers is None
        if alike if fixed_shapes is None else fixed_shapes:
            rows.settle()
        for step in range(steps):
            if step:
                rows.advance()
            scores = constrain(rows.logits, rows.history, config, stop_ids, step)
            chosen = choose(scores, config, generator)
            yield chosen.tolist()
            rows.append(chosen)
