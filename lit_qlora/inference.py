"""The common ground of generation, chat and evaluation: the model that they load, and the style of its prompts.

Torch is imported when a model is loaded, so that --help and a mistyped flag are answered at once.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_qlora.errors import CheckpointError, UsageError, did_you_mean
from lit_qlora.files.manifest import MANIFEST
from lit_qlora.files.reading import read_json
from lit_qlora.prompts.answer_parts import PLAIN, MarkedText, Reader
from lit_qlora.prompts.calls import Tool
from lit_qlora.prompts.conversation import NOTHING, Conversation, prompt_of
from lit_qlora.prompts.style import STYLES, TEMPLATE, Style, find_style, read_style
from lit_qlora.settings import (
    DEMO_CHECKPOINT,
    GenerationConfig,
    Precision,
    Quantization,
    Scheme,
    Settings,
    check,
    check_budget,
)
from lit_qlora.settings.limits import Count, Pattern

if TYPE_CHECKING:
    from torch import Tensor

    from lit_qlora.generation import Draft
    from lit_qlora.lora.adapter import Adapter
    from lit_qlora.lora.adapter_switch import AdapterSwitch
    from lit_qlora.model.config import ModelConfig
    from lit_qlora.model.gpt import GPT
    from lit_qlora.model.scoring import Scoring
    from lit_qlora.prompts.tokenizer import Tokenizer


ADAPTER_FILE = "adapter_config.json"
"""The file that each adapter has, whoever wrote it."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """The base that an adapter was trained on, as its manifest tells it."""

    base: Path | None
    """None for an adapter that PEFT wrote."""
    quantization: Quantization

    @classmethod
    def of(cls, adapter: Path) -> "Training":
        """Read it in the folder of an adapter; read_adapter checks the rest of the manifest.

        Raises:
            CheckpointError: if the manifest is damaged, or names a quantisation that is not known.
        """
        path = adapter / MANIFEST
        facts: dict[str, Any] = read_json(path) if path.is_file() else {}
        base = facts.get("base", {})
        try:
            quantization = Quantization.of(facts)
        except UsageError:
            quantization = None
        if not isinstance(base, dict) or quantization is None:
            raise CheckpointError(f"{path} is damaged: it does not say what base the adapter was trained on.")
        known = base.get("path")
        return cls(base=Path(known) if isinstance(known, str) else None, quantization=quantization)


def adapter_folder(path: Path) -> Path:
    """The folder of the adapter that a path names: the final one of a run's folder, and for a file its folder.

    Lit-GPT's out/lora/alpaca/NAME stands for our run folder out/lora/NAME where only this exists.

    Raises:
        CheckpointError: for the folder of a run that has not ended.
    """
    if path.is_dir():
        final = path / "final"
        if (path / ADAPTER_FILE).is_file() or (final / ADAPTER_FILE).is_file():
            return path if (path / ADAPTER_FILE).is_file() else final
        if saved := sorted(path.glob(f"step-*/{ADAPTER_FILE}")):
            raise CheckpointError(
                f"The run in {path} has not ended, so it has no final adapter.\n"
                f"Its newest checkpoint is an adapter too: --lora_path {saved[-1].parent}"
            )
    if path.suffix not in (".pth", ".safetensors") or path.is_dir():
        return path
    folder = path.parent
    known = [folder / "final", folder, Path("out/lora", folder.name, "final")]
    return next((candidate for candidate in known if candidate.is_dir()), folder)


def base_of(adapter: Path) -> Path:
    """The checkpoint that an adapter was trained on.

    Raises:
        CheckpointError: if its manifest does not say it, or says a path where no checkpoint is.
    """
    if not (adapter / ADAPTER_FILE).is_file():
        from lit_qlora.lora.adapter import read_adapter

        read_adapter(adapter)  # says best what is wrong with a folder that is no adapter
    base = Training.of(adapter).base
    if base is None:
        raise CheckpointError(f"{adapter} does not say which base it was trained on. Give --checkpoint_dir.")
    if not base.is_dir():
        raise CheckpointError(
            f"The adapter in {adapter} was trained on {base}, which does not exist here.\n"
            "Give the base's present path as --checkpoint_dir."
        )
    return base


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model that is ready to answer or to be measured."""

    model: "GPT"
    tokenizer: "Tokenizer"
    style: Style | None
    """The prompt style of its adapter, else of its checkpoint; None if neither has one."""
    scoring: "Scoring | None" = None
    """The task of its head, if it has one."""


def load_for_inference(
    checkpoint_dir: Path,
    lora_path: Path | None = None,
    *,
    quantize: Scheme = "none",
    quantize_head: bool = False,
    quantize_layers: Mapping[str, Scheme] = NOTHING,
    precision: Precision = "auto",
    heads: bool = False,
) -> LoadedModel:
    """A checkpoint, with an adapter on it if one is given, on the best device there is.

    Args:
        heads: take a model with a trained head, and no other; see LoadedModel.scoring.

    Raises:
        UsageError: if there is a head and nobody asked for one, or there is none.
        CheckpointError: if anything is missing or damaged, or base and adapter do not belong together.
    """
    from lit_qlora.checkpoint import score
    from lit_qlora.checkpoint.checkpoint import load_stored
    from lit_qlora.device import pick_device, resolve_precision, weights_dtype
    from lit_qlora.lora.adapter import attach_adapter, check_base, read_adapter
    from lit_qlora.lora.score import fill_score
    from lit_qlora.model.config import ModelConfig
    from lit_qlora.prompts.tokenizer import Tokenizer
    from lit_qlora.quantize import Storage

    ModelConfig.load(checkpoint_dir)  # says best what is wrong with a directory that is no checkpoint
    adapter = read_adapter(lora_path, heads=heads) if lora_path else None
    merged = score.read(checkpoint_dir)
    if merged and not heads:
        raise score.refuse(checkpoint_dir)
    tokenizer = Tokenizer(checkpoint_dir)
    if adapter:
        check_base(adapter, checkpoint_dir)
    scoring = _scoring(adapter, merged, lora_path or checkpoint_dir) if heads else None
    device = pick_device()
    layers = tuple(quantize_layers.items())
    storage = Storage(weights_dtype(resolve_precision(precision, device)), quantize, quantize_head, layers)
    model = load_stored(checkpoint_dir, storage, device)
    if adapter:
        attach_adapter(model, adapter, checkpoint_dir)
    elif merged:
        fill_score(model, merged[0], str(checkpoint_dir))
    style = (read_style(lora_path) if lora_path else None) or read_style(checkpoint_dir)
    return LoadedModel(model=model.eval(), tokenizer=tokenizer, style=style, scoring=scoring)


def scoring_at(checkpoint_dir: Path, lora_path: Path | None) -> "Scoring":
    """The task of a checkpoint or an adapter with a trained head, before any weight of the base is loaded.

    Raises:
        UsageError: if there is no head.
        CheckpointError: if anything is missing or damaged.
    """
    from lit_qlora.checkpoint import score
    from lit_qlora.lora.adapter import read_adapter
    from lit_qlora.model.config import ModelConfig

    ModelConfig.load(checkpoint_dir)
    adapter = read_adapter(lora_path, heads=True) if lora_path else None
    return _scoring(adapter, score.read(checkpoint_dir), lora_path or checkpoint_dir)


def _scoring(adapter: "Adapter | None", merged: "tuple[Tensor, Scoring] | None", folder: Path) -> "Scoring":
    if adapter and adapter.score is not None:
        return adapter.scoring
    check(merged is not None, f"{folder} has no head. finetune/lora.py trains one with --head classify or regress.")
    assert merged
    return merged[1]


@dataclass(frozen=True, kw_only=True)
class InferenceConfig(Settings):
    """The model that a command loads."""

    first = ("checkpoint_dir", "lora_path", "quantize")

    checkpoint_dir: Path | None = None
    """The model: a directory written by scripts/convert_hf_checkpoint.py or
    scripts/merge_lora.py. By default the base that the adapter was trained on, and without an adapter the demo
    checkpoint."""
    lora_path: Path | None = None
    """An adapter, such as OUT/final of finetune/lora.py; a run folder OUT stands for it."""
    quantize: Literal["auto"] | Scheme = "auto"
    """Storage of the weights; bnb.nf4 needs about a quarter of the 16-bit memory. 'auto' is the storage that the
    adapter was trained on, and without an adapter that of the files: none, unless they were published in 4 bits. With
    a quantize_budget it chooses for each layer."""
    quantize_head: bool = False
    """Quantise the output head too; --quantize auto does if the training did."""
    quantize_layers: dict[Pattern, Scheme] = field(default_factory=dict)
    """Other storage of some layers, as in training; --quantize auto does as the training did."""
    quantize_budget: str | None = None
    """With quantize auto, the room for the weights, e.g. 14GB or 5.2bits, as in training."""
    precision: Precision = "auto"
    """Dtype of weights and activations. 'auto' is bf16-true on a GPU that has it, 32-true elsewhere."""

    @cached_property
    def adapter(self) -> Path | None:
        """The folder of lora_path's adapter, if there is one."""
        return adapter_folder(self.lora_path) if self.lora_path else None

    @cached_property
    def base(self) -> Path:
        """The directory of the model.

        Raises:
            CheckpointError: if it is that of an adapter which does not say it.
        """
        leading = self.leading_adapter()
        return self.checkpoint_dir or (base_of(leading) if leading else self.default_base())

    def __post_init__(self) -> None:
        """Check combinations of settings."""
        super().__post_init__()
        check_budget(self.quantize, self.quantize_head, self.quantize_layers, self.quantize_budget)
        check(
            self.quantize != "auto" or not self.quantize_layers,
            "quantize_layers differ from --quantize, which is auto: it decides about them. Name the storage of others.",
        )

    @cached_property
    def storage(self) -> Quantization:
        """The storage of the weights.

        Raises:
            CheckpointError: for a budget, if the effects of quantisation are not measured.
            UsageError: if the budget is too small.
        """
        leading = self.leading_adapter()
        if self.quantize != "auto":
            return Quantization(self.quantize, self.quantize_head, tuple(self.quantize_layers.items()))
        if self.quantize_budget is not None:
            from lit_qlora.checkpoint.quantization_table import choose
            from lit_qlora.device import pick_device, resolve_precision, weights_dtype

            dtype = weights_dtype(resolve_precision(self.precision, pick_device()))
            return choose(self.base, self.quantize_budget, dtype)
        if leading is None:
            from lit_qlora.checkpoint.checkpoint import published_scheme

            return Quantization(published_scheme(self.base), self.quantize_head)
        trained = Training.of(leading).quantization
        return trained._replace(quantize_head=self.quantize_head or trained.quantize_head)

    def leading_adapter(self) -> Path | None:
        """The folder of the adapter whose training says how the model is loaded."""
        return self.adapter

    def default_base(self) -> Path:
        """The model without an adapter."""
        return DEMO_CHECKPOINT

    def notes(self) -> list[str]:
        """Say what the adapter's manifest has decided."""
        leading = self.leading_adapter()
        if leading is None or (self.checkpoint_dir and self.quantize != "auto"):
            return super().notes()
        trained = "" if self.quantize_budget is not None else f", on which {leading} was trained"
        return [*super().notes(), f"The base is {self.base} with --quantize {self.storage.describe()}{trained}."]

    def load(self, heads: bool = False) -> LoadedModel:
        """The model, its tokenizer and its prompt style, on the best device there is.

        Args:
            heads: see load_for_inference.

        Raises:
            CheckpointError: if anything is missing or damaged, or checkpoint and adapter do not belong together.
        """
        return load_for_inference(
            self.base, self.adapter, precision=self.precision, heads=heads, **self.storage.facts()
        )


@dataclass(frozen=True, kw_only=True)
class RosterConfig(InferenceConfig):
    """A model with several adapters."""

    adapters: dict[str, Path] = field(default_factory=dict)
    """More adapters of the same base, each by a name, e.g. --adapters.legal out/legal/final."""

    def leading_adapter(self) -> Path | None:
        """The adapter of lora_path, else the first of the others."""
        return self.adapter or next(map(adapter_folder, self.adapters.values()), None)


@dataclass(frozen=True, kw_only=True)
class DraftConfig(Settings):
    """A small model that guesses the next tokens of a large one."""

    draft_checkpoint_dir: Path | None = None
    """A small model with the same tokenizer that guesses some tokens, which the model then checks in one pass: the same
    answers, sooner where most guesses are right."""
    draft_tokens: Count = 5
    """Tokens that are guessed at a time."""

    def check_draft(self, num_beams: int) -> None:
        """Raise UsageError for settings that contradict each other, before anything is loaded."""
        check(
            self.draft_checkpoint_dir is not None or self.draft_tokens == DraftConfig.draft_tokens,
            "draft_tokens has no effect without a draft_checkpoint_dir.",
        )
        check(
            self.draft_checkpoint_dir is None or num_beams == 1,
            "A search with beams cannot be assisted: draft_checkpoint_dir or num_beams.",
        )

    def load_draft(
        self, tokenizer: "Tokenizer", target: "ModelConfig", precision: Precision = "auto"
    ) -> "Draft | None":
        """The draft model, if there is one.

        Args:
            target: the model that it guesses for.

        Raises:
            UsageError: if one of the two cannot forget a guess.
            CheckpointError: if it is damaged, or its tokenizer is another one.
        """
        if self.draft_checkpoint_dir is None:
            return None
        from lit_qlora.generation import Draft
        from lit_qlora.generation.assisted import check_can_forget
        from lit_qlora.model.config import ModelConfig

        for config in (target, ModelConfig.load(self.draft_checkpoint_dir)):
            check_can_forget(config)
        loaded = load_for_inference(self.draft_checkpoint_dir, precision=precision)
        own = loaded.tokenizer
        probe = "The quick brown fox: 1234567890, \u00e9\u4f60\n\tif (x) { return y; }"
        if (own.size, own.eos_id, own.encode(probe)) != (tokenizer.size, tokenizer.eos_id, tokenizer.encode(probe)):
            raise CheckpointError(
                f"{self.draft_checkpoint_dir} has another tokenizer, so it cannot guess for this model."
            )
        return Draft(loaded.model, self.draft_tokens)


@dataclass(frozen=True, kw_only=True)
class TemplateConfig(Settings):
    """Variables of the chat template."""

    template_variables: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, e.g. {enable_thinking: false}. A variable that it does not use is refused."""


@dataclass(frozen=True, kw_only=True)
class ToolsConfig(TemplateConfig):
    """Variables of the chat template besides the messages, and tools and documents among them."""

    tools: Path | None = None
    """JSON file with a list of tools that the model may call, as OpenAI has them. The style must be a chat template
    that writes tools."""
    documents: Path | None = None
    """JSON file with a list of documents, for chat templates that write documents."""

    def variables(self) -> dict[str, Any]:
        """The variables, by name.

        Raises:
            DataError: if a file cannot be read, or holds something else.
        """
        if self.tools is None and self.documents is None:
            return {}
        from lit_qlora.data.prompt_files import read_variables

        return read_variables(self.tools, self.documents)


def check_style(name: str) -> None:
    """Raise UsageError unless choose_style knows `name`."""
    known = ["auto", "none", TEMPLATE, *STYLES]
    if name not in known:
        raise UsageError(f"style {name!r} is not known.{did_you_mean(name, known)} Known: {', '.join(known)}.")


def choose_style(
    name: str,
    recorded: Style | None,
    checkpoint_dir: Path | None = None,
    variables: Mapping[str, Any] = NOTHING,
) -> Style | None:
    """The style that --style `name` stands for; None leaves prompts as they are typed.

    Args:
        recorded: what "auto" stands for.
        checkpoint_dir: has the chat template that "template" stands for.
        variables: of the chat template.

    Raises:
        UsageError: for a variable that the style does not use.
    """
    check_style(name)
    style = recorded
    if name != "auto":
        style = None if name == "none" else find_style(name, directory=checkpoint_dir)
    check(style is not None or not variables, f"Without a prompt style there is no variable {', '.join(variables)}.")
    return style.with_variables(variables) if style else None


def encode_prompt(tokenizer: "Tokenizer", style: Style | None, conversation: Conversation) -> list[int]:
    """Ids of a conversation that is to be answered; without a style of its bare texts, a line each.

    Raises:
        UsageError: if a text holds what is no character, such as a byte of a command line that is no UTF-8, or if the
            style has no words for something in the conversation.
    """
    texts = [message.text for message in conversation.messages]
    try:
        "".join((conversation.input, *texts)).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"The prompt holds {error.object[error.start]!a}, which is no character.") from None
    if style:
        return style.encode_prompt(tokenizer, conversation)
    if not conversation.plain:
        raise UsageError("Without a prompt style there are no words for tools or thoughts.")
    return tokenizer.encode("\n".join(text for text in (*texts, conversation.input) if text))


def stop_ids(tokenizer: "Tokenizer", style: Style | None) -> frozenset[int]:
    """Ids that end an answer, of the model and of the style."""
    return tokenizer.stop_ids | (style.stop_ids(tokenizer) if style else frozenset())


def decoder_of(tokenizer: "Tokenizer", style: Style | None) -> MarkedText:
    """See Style.decoder."""
    return style.decoder(tokenizer) if style else MarkedText(tokenizer, ())


def reader_of(tokenizer: "Tokenizer", style: Style | None, prompt: Sequence[int], tools: Iterable[Tool] = ()) -> Reader:
    """See Style.reader."""
    return style.reader(tokenizer, prompt, tools) if style else PLAIN.reader(tools)


@dataclass(frozen=True)
class Roster:
    """A model that answers as itself and as each of several adapters."""

    model: "GPT"
    tokenizer: "Tokenizer"
    switch: "AdapterSwitch"
    base: str
    """The name of the model itself."""
    styles: dict[str, Style | None]
    """The prompt style of each, by name."""

    @property
    def names(self) -> list[str]:
        """The base, then the adapters."""
        return [self.base, *self.switch.names]

    def adapter(self, name: str) -> str | None:
        """The name of an adapter for the switch; None for the base."""
        return None if name == self.base else name

    def answering(self, name: str) -> AbstractContextManager[None]:
        """Let the base or the adapter with this name answer inside."""
        return self.switch.using(self.adapter(name))


def load_roster(
    config: InferenceConfig,
    adapters: Mapping[str, Path],
    style: str = "auto",
    variables: Mapping[str, Any] = NOTHING,
) -> Roster:
    """The model of `config` without its adapter, and beside it this adapter and others, by names.

    Args:
        style: see choose_style; "auto" is for each the style that it was trained with. A base that has none is asked
            as its first adapter is, so that answers can be compared.
        variables: of the chat template.

    Raises:
        UsageError: if two have the same name.
        CheckpointError: if anything is missing or damaged, or checkpoint and adapters do not belong together.
    """
    from lit_qlora.lora.adapter import check_base, read_adapter
    from lit_qlora.lora.adapter_switch import AdapterSwitch
    from lit_qlora.model.rope_scaling import scale

    base = config.base.resolve().name
    paths = {name: adapter_folder(path) for name, path in adapters.items()}
    if config.adapter:
        folder = config.adapter.resolve()
        own = folder.parent.name if folder.name == "final" or folder.name.startswith("step-") else folder.name
        own = f"{own}-lora" if own == base else own
        check(own not in paths, f"lora_path is called {own}, as one of the adapters is.")
        paths = {own: config.adapter, **paths}
    check(base not in paths, f"adapters.{base} has the name of the base. Give it another.")
    read = {}
    for name, path in paths.items():
        read[name] = read_adapter(path)
        check_base(read[name], config.base)
    loaded = load_for_inference(config.base, precision=config.precision, **config.storage.facts())
    contexts = {adapter.config.rope for adapter in read.values()}
    if len(contexts) == 1:  # the base answers with the context of its adapters, so that they share it
        scale(loaded.model, *contexts.pop())
    switch = AdapterSwitch(loaded.model)
    for name, adapter in read.items():
        switch.add(name, adapter)
    recorded = {name: read_style(path) or loaded.style for name, path in paths.items()}
    of_base = loaded.style or next(iter(recorded.values()), None)
    styles = {
        name: choose_style(style, own, config.base, variables) for name, own in {base: of_base, **recorded}.items()
    }
    return Roster(loaded.model, loaded.tokenizer, switch, base, styles)


def generate(loaded: LoadedModel, prompts: Sequence[str], config: GenerationConfig | None = None) -> list[str]:
    """The answers to prompts, without thoughts, in the prompt style of the model.

    Args:
        prompts: as a person types them; they are answered together.

    Returns:
        num_return_sequences answers to the first prompt, then to the second, and so on.

    Raises:
        UsageError: if a prompt fills the model's context alone.
    """
    from lit_qlora import generation

    check(not isinstance(prompts, str), f"generate takes a list of prompts, got one text: {prompts!r}.")
    config, style, tokenizer = config or GenerationConfig(), loaded.style, loaded.tokenizer
    asked = [encode_prompt(tokenizer, style, prompt_of(prompt)) for prompt in prompts]
    answers = generation.generate(loaded.model, asked, config, stop_ids(tokenizer, style), tokenizer.size)
    decoder, gap, tail = decoder_of(tokenizer, style), *((style.gap, style.tail) if style else ("", ""))
    texts = [generation.text_of(decoder, ids, gap, tail) for ids in answers]
    several = config.num_return_sequences
    return [reader_of(tokenizer, style, asked[i // several]).whole(text).content for i, text in enumerate(texts)]


def peak_memory() -> str:
    """The peak memory of this process, on the GPU if it uses one: '1.23 GiB of GPU memory'."""
    from lit_qlora.device import peak_gib, pick_device

    device = pick_device()
    return f"{peak_gib(device):.2f} GiB of {'GPU ' if device.type == 'cuda' else ''}memory"
