"""Continuous batching: requests join a running batch between any two of its steps, and leave it when they are answered.

Each request has a slot of the cache, a generator and settings of its own. So its answer does not depend on the other
requests in the batch.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_qlora.errors import NumericalError
from lit_qlora.generation.decode_step import why_not
from lit_qlora.generation.sampling import choose, constrain
from lit_qlora.generation.sequences import PAD, check_finite
from lit_qlora.generation.slot_cache import SlotCache
from lit_qlora.generation.slot_step import SlotStep
from lit_qlora.model.cache import KVCache
from lit_qlora.model.gpt import GPT
from lit_qlora.settings import GenerationConfig

COLUMNS = 64
"""The columns of the cache that a step reads are a multiple of it."""


@dataclass(eq=False)
class Request:
    """A prompt that is being answered.

    Attributes:
        room: most tokens of the answer; prompt and answer fit into the context.
        adapter: the name of the adapter that answers; None is the base.
        answer: its tokens so far, a stop id at its end included.
        failed: no token could be chosen.
    """

    prompt: Sequence[int]
    config: GenerationConfig
    stop_ids: Collection[int]
    room: int
    adapter: str | None = None
    answer: list[int] = field(default_factory=list)
    failed: bool = False
    generator: torch.Generator | None = None

    @property
    def finish_reason(self) -> str | None:
        """'stop' after a stop id, 'length' without room for more, 'error' if it failed, None while it is unfinished."""
        if self.failed:
            return "error"
        if self.answer and self.answer[-1] in self.stop_ids:
            return "stop"
        return "length" if len(self.answer) == self.room else None


class Batcher:
    """The running batch of a model.

    Args:
        slots: most requests in the batch.
        select: called before each forward pass of the model itself with the adapter of each of its rows.
        vocab_size: ids from here on are never chosen.
        context: most tokens of a prompt and its answer; by default the model's block_size.
        fast: decode as slot_step does; by default on a GPU, where it can take the model and its adapters.

    Attributes:
        active: the requests in the batch; request i is in slot i.
    """

    def __init__(
        self,
        model: GPT,
        slots: int,
        select: Callable[[Sequence[str | None]], None],
        vocab_size: int | None = None,
        context: int | None = None,
        fast: bool | None = None,
    ) -> None:
        self.model, self.slots, self.select, self.vocab_size = model, slots, select, vocab_size
        weight = model.embed.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.context = context or model.config.block_size
        self.cache = SlotCache(model.config, slots, self.context, self.dtype, self.device)
        if fast is None:
            fast = self.device.type == "cuda" and not why_not(model, by_row=True)
        self._fast = SlotStep(model, self.cache, vocab_size) if fast else None
        self.active: list[Request] = []
        self.logits = torch.empty(0)

    @torch.no_grad()
    def join(self, *requests: Request) -> None:
        """Read the prompts of some requests, in one forward pass, and let them take part in the following steps.

        Raises:
            NumericalError: if a logit is not a number; the batch is as it was.
        """
        assert len(self.active) + len(requests) <= self.slots
        assert all(len(request.prompt) + request.room <= self.context for request in requests)
        self.select([request.adapter for request in requests])
        longest = max(len(request.prompt) for request in requests)
        padding = [longest - len(request.prompt) for request in requests]
        left_pad = torch.tensor(padding, device=self.device) if any(padding) else None
        own = KVCache(self.model.config, len(requests), longest, self.dtype, self.device, left_pad)
        ids = [[PAD] * pad + list(request.prompt) for pad, request in zip(padding, requests, strict=True)]
        logits = self._scores(self.model.hidden(torch.tensor(ids, device=self.device), own))
        for row, request in enumerate(requests):
            request.generator = torch.Generator(self.device).manual_seed(request.config.seed)
            self.cache.put(len(self.active) + row, own, row)
        self.logits = torch.cat((self.logits, logits)) if self.active else logits
        self.active.extend(requests)

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Put a token behind each answer; requests that are finished then leave.

        Returns:
            All that took part, each with a new token unless it failed.
        """
        took_part = list(self.active)
        likeliest = self.logits.argmax(dim=-1).tolist()
        for i, request in enumerate(took_part):
            try:
                plain = _is_plain(request)
                request.answer.append(likeliest[i] if plain else self._choose_for(request, self.logits[i : i + 1]))
            except NumericalError:  # caused by its own settings, so no other request is concerned
                request.failed = True
        for request in took_part:
            if request.finish_reason:
                self.leave(request)
        return took_part

    @torch.no_grad()
    def look_ahead(self) -> None:
        """Read the newest token of each answer, for the next step.

        Raises:
            NumericalError: if a logit is not a number.
        """
        if not self.active:
            return
        adapters = [request.adapter for request in self.active]
        newest = [request.answer[-1] for request in self.active]
        longest = max(len(request.prompt) + len(request.answer) for request in self.active)
        if self._fast:
            self.logits = check_finite(self._fast(newest, adapters, longest))
            return
        self.select(adapters)
        self.cache.rows = len(self.active)
        self.cache.limit = min(-(-longest // COLUMNS) * COLUMNS, self.context)
        tokens = torch.tensor(newest, device=self.device)[:, None]
        self.logits = self._scores(self.model.hidden(tokens, self.cache))

    def leave(self, request: Request) -> None:
        """Take a request out, finished or not; the last one moves into its slot."""
        slot, last = self.active.index(request), len(self.active) - 1
        if slot != last:
            self.cache.move(last, slot)
            self.active[slot] = self.active[last]
            self.logits[slot] = self.logits[last]
        self.active.pop()
        self.logits = self.logits[:last]

    def _choose_for(self, request: Request, logits: Tensor) -> int:
        history = torch.tensor([[*request.prompt, *request.answer]], device=self.device)
        scores = constrain(logits, history, request.config, request.stop_ids, len(request.answer))
        return int(choose(scores, request.config, request.generator))

    def _scores(self, hidden: Tensor) -> Tensor:
        return check_finite(self.model.logits(hidden[:, -1])[:, : self.vocab_size].float())


def _is_plain(request: Request) -> bool:
    """Tell whether the likeliest token is chosen without regard to earlier tokens."""
    config = request.config
    return not config.samples and (
        config.repetition_penalty,
        config.no_repeat_ngram_size,
        config.min_new_tokens > len(request.answer),
    ) == (1, 0, False)
