"""Beam search: each step extends several beginnings of an answer, and continues with the likeliest of all extensions.

Where tokens are drawn, extensions are drawn among all, by the probability of the whole beginning.

The rules are those of transformers' `generate`, so that the same weights give the same answers. Groups follow
Vijayakumar et al. 2018, "Diverse beam search".
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_qlora.generation.sampling import constrain, leave_out, probabilities_of
from lit_qlora.generation.sequences import PAD, Decoding, evaluating
from lit_qlora.model.gpt import GPT
from lit_qlora.settings import GenerationConfig

OUT_OF_THE_RUNNING = -1e9
"""Score of a beam that does not count, such as all but one while all are the same. It is far below any answer's, and
finite, so that there is always a beam to continue."""

Candidate = tuple[float, int, int]
"""Log-probability of an extension, the beam that it extends, and its token."""


def beam_search(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    room: Sequence[int],
    config: GenerationConfig,
    stop_ids: Collection[int],
    vocab_size: int | None,
    stop: Callable[[Sequence[int]], bool] | None,
) -> list[list[int]]:
    """As generate, for num_beams above 1.

    Args:
        room: most tokens of the answer to each prompt.
    """
    groups, size = config.num_beam_groups, config.num_beams // config.num_beam_groups
    searches = [[_Search(size, tokens, config) for _ in range(groups)] for tokens in room]
    finishes = _finishes(stop_ids, stop)
    with evaluating(model):
        rows = Decoding(model, prompts, max(room), vocab_size)
        rows.select([row for row in range(len(prompts)) for _ in range(config.num_beams)])
        generator = torch.Generator(rows.logits.device).manual_seed(config.seed)
        for step in range(max(room)):
            if step:
                rows.advance()
            scores = rows.logits.log_softmax(dim=-1).view(len(prompts), groups, size, -1)
            history = rows.history.view(len(prompts), groups, size, -1)
            # As many as could end all the beams at once, and as many again to continue.
            count = min(size * max(2, 1 + len(stop_ids)), size * scores.size(-1))
            chosen = torch.zeros_like(scores[:, 0, 0])  # count of each token in earlier groups' choices
            for group in range(groups):
                here = (scores[:, group] - config.diversity_penalty * chosen[:, None]).flatten(0, 1)
                here = constrain(here, history[:, group].flatten(0, 1), config, stop_ids, step)
                if config.samples:
                    # Not relative to the largest, as without beams: beams are compared with each other.
                    here = here / (1 if config.temperature is None else config.temperature)
                    here = leave_out(here, config, least=max(2, 1 + len(stop_ids)))
                own = [search[group] for search in searches]
                drawn_with = generator if config.samples else None
                for i, candidates in enumerate(_candidates(here.unflatten(0, (-1, size)), own, count, drawn_with)):
                    if not own[i].done:
                        own[i].advance(candidates, finishes)
                        newest = torch.tensor(own[i].newest, device=chosen.device)
                        chosen[i].scatter_add_(0, newest, torch.ones_like(newest, dtype=chosen.dtype))
            flat = [search for of_prompt in searches for search in of_prompt]
            if all(search.done for search in flat):
                break
            rows.select([i * size + parent for i, search in enumerate(flat) for parent in search.parents])
            rows.append(torch.tensor([token for search in flat for token in search.newest], device=rows.history.device))
    answers = []
    for of_prompt in searches:
        finished = sorted((end for search in of_prompt for end in search.finished), key=lambda end: -end[0])
        answers += [_without_end(answer, stop_ids) for _, answer in finished[: config.num_return_sequences]]
    return answers


@dataclass
class _Search:
    """The search for the answers to one prompt by one group of beams."""

    size: int
    room: int
    config: GenerationConfig
    scores: list[float] = field(init=False)
    answers: list[list[int]] = field(init=False)
    """The unfinished answers, best first, and their log-probabilities."""
    parents: list[int] = field(init=False)
    """The beams of the step before that they extend."""
    finished: list[tuple[float, list[int]]] = field(default_factory=list)
    """Finished answers with their scores, best first, stop ids included."""
    done: bool = False

    def __post_init__(self) -> None:
        self.scores = [0.0] + [OUT_OF_THE_RUNNING] * (self.size - 1)
        self.answers = [[] for _ in range(self.size)]
        self.parents = list(range(self.size))

    @property
    def newest(self) -> list[int]:
        """The last token of each unfinished answer."""
        return [answer[-1] if answer else PAD for answer in self.answers]

    def advance(self, candidates: Sequence[Candidate], finishes: Callable[[list[int]], bool]) -> None:
        """Continue with the best candidates, which are given best first."""
        going_on: list[tuple[float, int, list[int]]] = []
        length = len(self.answers[0]) + 1
        for rank, (score, parent, token) in enumerate(candidates):
            answer = [*self.answers[parent], token]
            ended = finishes(answer)
            if not ended:
                going_on.append((score, parent, answer))
            if (ended or length == self.room) and rank < self.size and score > OUT_OF_THE_RUNNING / 2:
                self.finished.append((score / length**self.config.length_penalty, answer))
        self.finished = sorted(self.finished, key=lambda end: -end[0])[: self.size]  # the older of equals
        going_on.sort(key=lambda one: -one[0])
        if going_on:
            # Where stop strings leave too few, copies of the last one fill up, with no chance.
            filler = (OUT_OF_THE_RUNNING, *going_on[-1][1:])
            chosen = (going_on + [filler] * self.size)[: self.size]
            self.scores, self.parents, self.answers = (list(part) for part in zip(*chosen, strict=True))
        full = len(self.finished) == self.size
        self.done = not going_on or length == self.room or (full and not self._could_improve(length))
        if self.done:
            self.parents = list(range(self.size))

    def _could_improve(self, length: int) -> bool:
        if self.config.early_stopping is True:
            return False
        if self.config.early_stopping == "never" and self.config.length_penalty > 0:
            length = self.room
        return self.scores[0] / length**self.config.length_penalty > self.finished[-1][0]


def _candidates(
    scores: Tensor, searches: Sequence[_Search], count: int, generator: torch.Generator | None
) -> list[list[Candidate]]:
    """`count` extensions of each search, best first: the likeliest, or drawn without replacement by a generator.

    Args:
        scores: (searches, beams, V), log-probabilities of the next token.
    """
    so_far = torch.tensor([search.scores for search in searches], dtype=torch.float32).to(scores.device)
    total = (scores + so_far[:, :, None]).flatten(1)
    if generator:
        drawn = torch.multinomial(probabilities_of(total), count, generator=generator)
        indices = drawn.gather(1, total.gather(1, drawn).argsort(dim=1, descending=True, stable=True))
    else:
        indices = total.topk(count).indices
    vocab_size = scores.size(-1)
    return [
        [(score, at // vocab_size, at % vocab_size) for score, at in zip(*row, strict=True)]
        for row in zip(total.gather(1, indices).tolist(), indices.tolist(), strict=True)
    ]


def _finishes(stop_ids: Collection[int], stop: Callable[[Sequence[int]], bool] | None) -> Callable[[list[int]], bool]:
    return lambda answer: answer[-1] in stop_ids or bool(stop and stop(answer))


def _without_end(answer: list[int], stop_ids: Collection[int]) -> list[int]:
    return answer[:-1] if answer and answer[-1] in stop_ids else answer
