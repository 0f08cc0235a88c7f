"""The choice of the next token: penalties and constraints, truncation of the distribution, and the draw.

All are pure functions of the logits and of the tokens so far, so that rows can be copied, dropped and reordered. The
steps, and their order, are those of transformers' `generate`.
"""

import math
from collections.abc import Collection

import torch
from torch import Tensor

from lit_qlora.errors import NumericalError
from lit_qlora.settings import GenerationConfig

NO_TOKEN = -1
"""Padding of a history, left of the shorter prompts."""


def constrain(
    scores: Tensor, history: Tensor, config: GenerationConfig, stop_ids: Collection[int], answered: int
) -> Tensor:
    """`scores` after repetition_penalty, no_repeat_ngram_size and min_new_tokens; forbidden tokens have -inf.

    Args:
        scores: (B, V) float32, logits or log-probabilities.
        history: (B, T) the tokens of prompt and answer so far, NO_TOKEN where there is none.
        stop_ids: ids that end an answer; ids from V on have no effect.
        answered: tokens that the answers have so far.
    """
    if config.repetition_penalty != 1:
        seen = _marked(history, scores.size(-1))
        # Keskar et al. 2019: a score of either sign becomes less likely.
        scores = torch.where(
            seen,
            torch.where(scores < 0, scores * config.repetition_penalty, scores / config.repetition_penalty),
            scores,
        )
    if 0 < config.no_repeat_ngram_size <= history.size(1):
        scores = scores.masked_fill(
            _completes_a_repeat(history, config.no_repeat_ngram_size, scores.size(-1)), -math.inf
        )
    if answered < config.min_new_tokens:
        ends = torch.tensor([i for i in stop_ids if i < scores.size(-1)], dtype=torch.long, device=scores.device)
        scores = scores.index_fill(-1, ends, -math.inf)
    return scores


def _marked(ids: Tensor, vocab_size: int) -> Tensor:
    """(B, T) ids -> (B, V), True for the ids that occur in the row."""
    ids = torch.where((ids < 0) | (ids > vocab_size), vocab_size, ids)
    marked = torch.zeros(len(ids), vocab_size + 1, dtype=torch.bool, device=ids.device)
    return marked.scatter_(1, ids, True)[:, :vocab_size]


def _completes_a_repeat(history: Tensor, n: int, vocab_size: int) -> Tensor:
    """(B, V), True for the tokens with which the last n tokens of a row would repeat earlier ones."""
    runs = history.unfold(1, n, 1)  # (B, T - n + 1, n)
    beginning = history[:, history.size(1) - n + 1 :]  # (B, n - 1)
    again = ((runs[..., :-1] == beginning[:, None]) & (runs[..., :-1] >= 0)).all(dim=-1)
    return _marked(torch.where(again, runs[..., -1], NO_TOKEN), vocab_size)


def narrow(scores: Tensor, config: GenerationConfig) -> Tensor:
    """`scores` divided by the temperature, -inf for the tokens that top_k, top_p, min_p and typical_p leave out.

    Args:
        scores: (B, V) float32, finite or -inf.
    """
    if config.temperature not in (None, 1):
        # Relative to the largest, a logit divided by a tiny temperature is -inf at worst, and 0 is 0, unless float32
        # makes the temperature 0 too.
        temperature = max(config.temperature, torch.finfo(torch.float32).tiny)
        scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperature
    return leave_out(scores, config)


def leave_out(scores: Tensor, config: GenerationConfig, least: int = 1) -> Tensor:
    """`scores`, -inf for the tokens that top_k, top_p, min_p and typical_p leave out.

    Each sees the tokens that the one before it has left, renormalised. At least `least` tokens are left.

    Args:
        scores: (B, V) float32, finite or -inf.
    """
    if config.top_k is not None and max(config.top_k, least) < scores.size(-1):
        scores = scores.masked_fill(scores < scores.topk(max(config.top_k, least)).values[:, -1:], -math.inf)
    if config.top_p < 1:
        # Holtzman et al. 2020: the smallest set of the likeliest tokens whose probability reaches top_p.
        descending, ids = scores.sort(dim=-1, descending=True)
        probabilities = descending.softmax(dim=-1)
        outside = probabilities.cumsum(dim=-1) - probabilities >= config.top_p
        outside[:, :least] = False
        scores = scores.masked_fill(outside.scatter(1, ids, outside), -math.inf)
    if config.min_p > 0:
        probabilities = scores.softmax(dim=-1)
        unlikely = probabilities < config.min_p * probabilities.amax(dim=-1, keepdim=True)
        unlikely.scatter_(1, probabilities.topk(min(least, scores.size(-1))).indices, False)
        scores = scores.masked_fill(unlikely, -math.inf)
    if config.typical_p < 1:
        # Meister et al. 2023: as top_p, but tokens are sorted by the distance of their surprisal from the entropy.
        log_probabilities = scores.log_softmax(dim=-1)
        probabilities = log_probabilities.exp()
        entropy = -(probabilities * log_probabilities).nansum(dim=-1, keepdim=True)
        distance, ids = (-log_probabilities - entropy).abs().sort(dim=-1)
        mass = probabilities.gather(-1, ids).cumsum(dim=-1)
        last = (mass < config.typical_p).sum(dim=-1, keepdim=True).clamp(max=scores.size(-1) - 1)
        outside = distance > distance.gather(-1, last)
        outside[:, :least] = False
        scores = scores.masked_fill(outside.scatter(1, ids, outside), -math.inf)
    return scores


def choose(scores: Tensor, config: GenerationConfig, generator: torch.Generator | None = None) -> Tensor:
    """The next token of each row.

    Args:
        scores: (B, V), any float dtype.
        generator: on the device of `scores`; torch's own by default.

    Returns:
        (B,) int64.

    Raises:
        NumericalError: if no token has a probability.
    """
    if not config.samples:
        return scores.argmax(dim=-1)
    probabilities = probabilities_of(narrow(scores.float(), config))
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def probabilities_of(scores: Tensor) -> Tensor:
    """(..., V) softmax, checked before a draw: a draw from NaN would make the CUDA device unusable.

    Raises:
        NumericalError: if all scores of a row are -inf, or one of them is inf.
    """
    probabilities = scores.softmax(dim=-1)
    if probabilities[..., 0].isnan().any():  # all of a row are, or none
        raise NumericalError(
            "No token can be drawn: the settings forbid all of them, or the scores are no finite numbers."
        )
    return probabilities
