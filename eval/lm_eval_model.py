"""Our GPT as a model of lm-eval, so that its tasks measure checkpoints, quantised ones and adapters as they are."""

import json
import sys
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm  # disable=None shows a bar on a terminal only

from lit_qlora.errors import DataError
from lit_qlora.generate import generate
from lit_qlora.model import GPT, LOGITS_AT_ONCE
from lit_qlora.settings import GenerationConfig
from lit_qlora.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""What is asked for in words (if it was), then the ids of the context and of the continuation to be scored."""


class GPTModel(TemplateLM):
    """A model and its tokenizer behind lm-eval's interface.

    Texts get BOS where the tokenizer's own files say so, once. What is longer than the model's context loses its
    beginning, as in lm-eval's own models.

    Args:
        batch_size: sequences per forward pass; changes memory and speed, not the result.
        seed: of tasks that sample.

    Attributes:
        truncated: how many requests have lost their beginning so far.
        shortened: how many answers got less room than their task allows, because the context is not longer.
    """

    backend = "causal"

    def __init__(self, model: GPT, tokenizer: Tokenizer, batch_size: int = 16, seed: int = 1234) -> None:
        super().__init__()
        self.model, self.tokenizer = model.eval(), tokenizer
        self.batch_size, self.seed = batch_size, seed
        self.truncated = self.shortened = 0
        self._device = model.embed.weight.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: BOS, or EOS where there is none."""
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """Most tokens that the model reads at once."""
        return self.model.config.block_size

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results about the model."""
        return {
            "model": self.model.config.name,
            "model_dtype": str(self.model.embed.weight.dtype),
            "batch_size": self.batch_size,
            "truncated_requests": self.truncated,
            "shortened_answers": self.shortened,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of `string`, with BOS where the model uses it, unless `add_special_tokens` is False."""
        return self.tokenizer.encode(string, bos=False if add_special_tokens is False else None)

    def loglikelihood(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether greedy decoding would give it."""
        return super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """As loglikelihood, for ids.

        Requests that the model reads alike, such as choices that differ in their last token only, share a row.
        """
        by_input: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            by_input.setdefault(self._input(context, continuation), []).append(index)
        results = [(0.0, True)] * len(requests)
        inputs = iter(sorted(by_input, key=len, reverse=True))  # alike in length, little padding; memory peaks at once
        with tqdm(total=len(requests), disable=disable_tqdm or None, desc="Scoring") as progress:
            while batch := list(islice(inputs, self.batch_size)):
                hidden = self._hidden(batch)
                asked = [(row, index) for row, ids in enumerate(batch) for index in by_input[ids]]
                picked, targets = [], []
                for row, index in asked:
                    continuation, end = requests[index][2], len(batch[row])
                    picked.append(hidden[row, end - len(continuation) : end])  # the positions that predict it
                    targets += continuation
                log_probs, greedy = self._score(torch.cat(picked), torch.tensor(targets, dtype=torch.long))
                start = 0
                for _, index in asked:
                    span = slice(start, start + len(requests[index][2]))
                    results[index] = (float(log_probs[span].sum()), bool(greedy[span].all()))
                    start = span.stop
                progress.update(len(asked))
        return results

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of the model's context; every token is predicted once."""
        windows: list[Request] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            # The prefix is the BOS of these texts, so they are encoded without one.
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += log_prob
        return totals

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """The model's answers, each up to the first of its task's stop strings, EOS, or its most tokens."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or None, desc="Answering") as progress:
            for members in groups.values():
                until, sampling = self._generation_settings(requests[members[0]].args[1])
                shortened = sampling.max_new_tokens >= self.max_length
                room = min(sampling.max_new_tokens, self.max_length // 2) if shortened else sampling.max_new_tokens
                self.shortened += len(members) * shortened
                prompts = {}
                for index in members:
                    ids = self.tok_encode(requests[index].args[0]) or [self.prefix_token_id]
                    self.truncated += len(ids) > self.max_length - room
                    prompts[index] = ids[-(self.max_length - room) :]
                ordered = iter(sorted(members, key=lambda index: len(prompts[index]), reverse=True))
                while batch := list(islice(ordered, self.batch_size)):
                    ids = self._answer([prompts[index] for index in batch], sampling, until)
                    for index, answer in zip(batch, ids, strict=True):
                        answers[index] = cut(self.tokenizer.decode(answer), until)
                    progress.update(len(batch))
        return answers

    def _input(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """What the model reads: context and continuation without its last token, cut from the left to max_length."""
        if len(continuation) > self.max_length:
            raise DataError(
                f"A continuation of {len(continuation)} tokens is to be scored, "
                f"and the model's context holds {self.max_length}. Leave this task out for this model."
            )
        ids = [*(context or [self.prefix_token_id]), *continuation]
        self.truncated += len(ids) > self.max_length + 1
        return tuple(ids[-(self.max_length + 1) :][:-1])

    @torch.no_grad()
    def _hidden(self, inputs: Sequence[tuple[int, ...]]) -> Tensor:
        """(B, T, E) for inputs of unequal length, padded on the right, where nothing before the padding sees it."""
        longest = max(1, *map(len, inputs))
        tokens = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in inputs], device=self.device)
        return self.model.hidden(tokens)

    @torch.no_grad()
    def _score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """For (N, E) and (N,): the float32 log-probability of each target, and whether it is the likeliest token."""
        targets = targets.to(hidden.device)
        rows = max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        log_probs, greedy = [], []
        for some, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
            scores = self.model.logits(some).float().log_softmax(dim=-1)
            log_probs.append(scores.gather(-1, wanted[:, None])[:, 0])
            greedy.append(scores.argmax(dim=-1) == wanted)
        return torch.cat(log_probs).cpu(), torch.cat(greedy).cpu()

    def _generation_settings(self, gen_kwargs: dict[str, Any]) -> tuple[list[str], GenerationConfig]:
        """A task's generation_kwargs as stop strings and sampling; what has no meaning here is named on stderr."""
        settings: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs))
        until = [text for text in settings.pop("until") if text]
        sampling = GenerationConfig(
            max_new_tokens=settings.pop("max_gen_toks"),
            temperature=settings.pop("temperature", 0.0) if settings.pop("do_sample") else 0.0,
            top_k=settings.pop("top_k", None) or None,
            top_p=settings.pop("top_p", None) or 1.0,
            seed=self.seed,
        )
        if settings:
            print(f"Not understood, so left out of the generation: {', '.join(sorted(settings))}.", file=sys.stderr)
        return until, sampling

    def _answer(self, prompts: list[list[int]], sampling: GenerationConfig, until: list[str]) -> list[list[int]]:
        # A character is at most four tokens, so these last tokens hold any stop string that has just been completed.
        tail = 4 * max(map(len, until), default=0) + 1

        def stop(ids: list[int]) -> bool:
            text = self.tokenizer.decode(ids[-tail:])
            return any(ending in text for ending in until)

        return generate(
            self.model, prompts, sampling, self.tokenizer.stop_ids, self.tokenizer.size, stop if until else None
        )


def cut(text: str, endings: Sequence[str]) -> str:
    """`text` up to the first of `endings`."""
    return text[: min((at for ending in endings if (at := text.find(ending)) >= 0), default=len(text))]
