"""Our GPT as a model of lm-eval, so that its tasks measure checkpoints, quantised ones and adapters as they are.

Every request gets what lm-eval's own `hf` model would give it: the same tokens in, the same log-likelihoods out.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from tqdm import tqdm  # disable=None shows a bar on a terminal only

from lit_qlora.errors import CheckpointError, UsageError
from lit_qlora.evaluate.score import BatchSize, Request, Scorer, windows
from lit_qlora.generation import ends_with, generate, text_of
from lit_qlora.inference import stop_ids
from lit_qlora.model.gpt import GPT
from lit_qlora.prompts.chat_template import Renderer
from lit_qlora.prompts.style import Style, TemplateStyle
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.settings import GenerationConfig

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

ANSWERS_AT_ONCE = 64  # with batch size auto, unless memory is short; more seldom end together
DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
"""Settings of sampling, without effect where the likeliest token is taken."""


class GPTModel(TemplateLM):
    """A model and its tokenizer behind lm-eval's interface.

    Texts get BOS where the tokenizer's own files say so, unless they begin with it. The names of control tokens in them
    are control tokens, because chat templates write them. Inputs longer than the model's context lose their beginning.

    Args:
        batch_size: sequences per forward pass; changes memory and speed, not the result.
        seed: of tasks that sample.
        style: prompt style, for tasks that are asked in it.
        add_bos: begin texts with BOS, or do not, whatever the tokenizer's files say.
        max_length: maximum tokens that the model reads at once; by default its whole context.

    Attributes:
        truncated: number of requests that have lost their beginning so far.
        shortened: number of answers that got less room than their task allows, for want of context.
    """

    backend = "causal"

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        batch_size: BatchSize = "auto",
        seed: int = 1234,
        style: Style | None = None,
        add_bos: bool | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = model.eval(), tokenizer
        self.batch_size, self.seed, self.add_bos = batch_size, seed, add_bos
        self.scorer = Scorer(model, batch_size, max_length)
        self.shortened = 0
        self.answers_at_once = ANSWERS_AT_ONCE
        self._device = model.embed.weight.device
        bos, eos = tokenizer.content(tokenizer.bos_id), tokenizer.content(tokenizer.eos_id)
        known = {"bos_token": bos, "eos_token": eos, "tools": None, "documents": None}
        self._style = style
        self._renderer = Renderer(style.source, known) if isinstance(style, TemplateStyle) else None

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context: BOS, or EOS where there is none."""
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """Maximum tokens that the model reads at once."""
        return self.scorer.max_length

    @property
    def truncated(self) -> int:
        """Number of requests that have lost their beginning so far."""
        return self.scorer.truncated

    def get_model_info(self) -> dict[str, Any]:
        """Facts about the model for lm-eval's results."""
        return {
            "model": self.model.config.name,
            "model_dtype": str(self.model.embed.weight.dtype),
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "add_bos_token": self.add_bos,
            "truncated_requests": self.truncated,
            "shortened_answers": self.shortened,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of `string`; see the class about BOS, which `add_special_tokens` overrules if it is False."""
        begun = has_bos_prefix(string, self.tokenizer.content(self.prefix_token_id))
        without = not add_special_tokens if add_special_tokens is not None else begun
        bos = False if without else self.add_bos
        return self.tokenizer.encode_marked(string, bos)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the template; there is one or none, so a name that asks for one of several is refused."""
        if isinstance(chat_template, str):
            raise UsageError(
                f"apply_chat_template: templates have no names here, so {chat_template!r} is none of them."
            )
        return self._style.text if self._style and chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """The name of the model in lm-eval's cache of requests."""
        return self.model.config.name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the conversation as the prompt style writes it.

        Args:
            add_generation_prompt: begin an answer; else the last message is one that goes on, so nothing ends it.
        """
        if self._style is None:
            raise UsageError("This model has neither a prompt style nor a chat template to apply.")
        if self._renderer is None:
            return self._style.as_text(self.tokenizer, chat_history)
        try:
            (text,) = self._renderer.render([(chat_history, add_generation_prompt)])
        except CheckpointError:
            without_system = [message for message in chat_history if message["role"] != "system"]
            if without_system == chat_history:
                raise
            (text,) = self._renderer.render([(without_system, add_generation_prompt)])
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        at = text.rindex(last.strip())
        whole = text[at:].startswith(last.lstrip())  # some templates take the space off its end
        return text[: at + len(last.lstrip() if whole else last.strip())]

    def loglikelihood(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability after its context, and True if greedy decoding would give it."""
        return super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Loglikelihood for ids."""
        asked = [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
        return self._score(asked, disable_tqdm)

    def _score(self, requests: Sequence[Request], disable_tqdm: bool) -> list[tuple[float, bool]]:
        with tqdm(total=len(requests), disable=disable_tqdm or None, desc="Scoring") as progress:
            return self.scorer.score(requests, progress.update)

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of whole texts, in windows of the model's context; each token is predicted once.

        As in the `hf` model, the first token to be predicted is the BOS of the text where texts have one.
        """
        pieces: list[Request] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            found = list(windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length))
            pieces += found
            owners += [index] * len(found)
        totals = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._score(pieces, disable_tqdm), strict=True):
            totals[owner] += log_prob
        return totals

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Return the answers, each up to its task's first stop string, EOS, or its maximum tokens."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or None, desc="Answering") as progress:
            for members in groups.values():
                until, config = self._generation_settings(requests[members[0]].args[1])
                room = config.max_new_tokens
                if room >= self.max_length:
                    room = self.max_length // 2
                    self.shortened += len(members)
                prompts = {}
                for index in members:
                    ids = self.tok_encode(requests[index].args[0]) or [self.prefix_token_id]
                    self.scorer.truncated += len(ids) > self.max_length - room
                    prompts[index] = ids[-(self.max_length - room) :]
                ordered = sorted(members, key=lambda index: len(prompts[index]), reverse=True)
                while ordered:
                    size = self.answers_at_once if self.batch_size == "auto" else self.batch_size
                    batch = ordered[:size]
                    try:
                        made = self._answer([prompts[index] for index in batch], until, config)
                    except torch.OutOfMemoryError:
                        if self.batch_size != "auto" or len(batch) == 1:
                            raise
                        self.answers_at_once = len(batch) // 2
                        continue
                    for index, answer in zip(batch, made, strict=True):
                        answers[index] = answer
                    progress.update(len(batch))
                    del ordered[:size]
        return answers

    def _answer(self, prompts: list[list[int]], until: list[str], config: GenerationConfig) -> list[str]:
        stop = ends_with(self.tokenizer, until)
        made = generate(self.model, prompts, config, stop_ids(self.tokenizer, self._style), stop=stop)
        return [text_of(self.tokenizer, ids, stop=until) for ids in made[:: config.num_return_sequences]]

    def _generation_settings(self, gen_kwargs: Mapping[str, Any]) -> tuple[list[str], GenerationConfig]:
        """Return a task's generation_kwargs as stop strings and settings of ours; name unknown ones on stderr."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(dict(gen_kwargs)))
        until = [text for text in given.pop("until", []) if text]
        settings = {key: value for key, value in given.items() if value is not None}
        settings["max_new_tokens"] = settings.pop("max_gen_toks")
        if not settings["do_sample"] or settings.get("temperature") == 0:  # lm-eval itself sets the temperature
            settings["do_sample"] = False
            settings = {key: value for key, value in settings.items() if key not in DRAWING}
        if settings.get("top_k") == 0:
            del settings["top_k"]
        known = {field.name for field in fields(GenerationConfig)}
        if unknown := sorted(settings.keys() - known):
            print(f"Not understood, so left out of the generation: {', '.join(unknown)}.", file=sys.stderr)
        return until, GenerationConfig(seed=self.seed, **{k: v for k, v in settings.items() if k in known})
