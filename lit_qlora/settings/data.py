"""What a model learns from."""

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from lit_qlora.settings.checks import Settings, check
from lit_qlora.settings.limits import Count, Seed, at_least

Overlong = Literal["truncate_left", "truncate_right", "drop", "error"]
Finding = Literal["cut_answers", "dropped", "masked", "no_eos", "empty_answers"]


@dataclass(frozen=True, kw_only=True)
class PromptKnobs(Settings):
    """The prompt style 'knobs', made of these texts; the names are those of H2O LLM Studio."""

    prefix = "data."

    text_system_start: str = ""
    """Style 'knobs': text before a system message."""
    text_prompt_start: str = ""
    """Style 'knobs': text before each prompt."""
    text_answer_separator: str = ""
    """Style 'knobs': text between prompt and answer."""
    add_eos_token_to_system: bool = True
    """Style 'knobs': end a system message with the end-of-text token."""
    add_eos_token_to_prompt: bool = True
    """Style 'knobs': end a prompt with the end-of-text token."""
    add_eos_token_to_answer: bool = True
    """Style 'knobs': end an answer with the end-of-text token, without which a model does not learn to stop."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(PromptKnobs):
    """What it learns from."""

    path: tuple[str, ...] | str = "finetune/demo"
    """A .json, .jsonl, .csv, .tsv, .parquet or .txt file, a directory with train and val files of these kinds, or
    hf:ORG/NAME or hf:ORG/NAME:CONFIG; or several, e.g. [a.jsonl,b.csv*0.5,c.json*2], where a number says how often an
    epoch sees each sample of that source (0.5: another half of it in each epoch)."""
    val_path: str | None = None
    """Validation file; by default the directory's own, else a share of the training data."""
    format: str = "auto"
    """What a record looks like: alpaca, dolly, sharegpt, messages, oasst1, text, ...; 'auto' recognises it and says
    what it saw."""
    columns: str = ""
    """Which column is what, e.g. question:instruction,reply:output; known are instruction, input, output, system."""
    on_error: Literal["stop", "skip"] = "stop"
    """'skip' leaves out the records that cannot be read or hold no answer, and counts them."""
    max_samples: Count | None = None
    """Learn from so many samples only, chosen at random."""
    validation_strategy: Literal["auto", "automatic", "custom"] = "auto"
    """Where validation samples come from: a validation file ('custom'), a share of the training data ('automatic'), or
    a file if there is one ('auto')."""
    val_fraction: float = 0.05
    """What is held out of the training data for validation: a share if below 1, else a number of samples."""
    validation_size: float | None = None
    """Another name of val_fraction, that of H2O LLM Studio."""
    prompt: str = "auto"
    """Prompt style: alpaca, alpaca-end, plain, qa, text, llama2, llama3, chatml, mistral, vicuna, zephyr, phi, phi3,
    gemma, guanaco, knobs (see text_prompt_start), or template, the tokenizer's own chat template; 'auto' is the style
    that the checkpoint was made with, else its chat template if it has one, else alpaca."""
    system: str = ""
    """What the model is told before all, where a sample does not say."""
    max_length: Annotated[int, at_least(8)] | None = None
    """Most tokens of a sample, prompt, answer and end of text together; by default the model's context, at most
    2048."""
    max_length_prompt: Annotated[int, at_least(2)] | None = None
    """Most tokens of a prompt (the source)."""
    max_length_answer: Annotated[int, at_least(2)] | None = None
    """Most tokens of an answer (the target), its end included."""
    overlong: Overlong = "truncate_left"
    """What becomes of a sample that is too long: its prompt's own words are cut at their beginning or their end, never
    those of the style, and of a conversation the first or last turns go; then the answer's end is cut, but never the
    end-of-text token. Or the sample is dropped, or the run refused."""
    mask_prompt: bool = True
    """Learn the answers only, not the prompts."""
    only_last_answer: bool = False
    """Of a conversation, learn the last answer only."""
    packing: bool = False
    """Lay several samples into each row, each seeing itself alone; the gradient is the same, padding hardly any."""
    pack_length: Count | None = None
    """Most tokens of a packed row, train.micro_batch_size of which make a forward pass; by default max_length."""
    weighting: Literal["tokens", "samples"] = "tokens"
    """The loss of a step is the mean over its labelled tokens, or the mean over its samples of such means."""
    group_by_length: bool = False
    """Make steps of samples of similar length, so that less is padding."""
    pad_to_multiple_of: Count = 1
    """Pad rows that are not packed to a multiple of so many tokens."""
    shuffle: bool = True
    """Another random order in each epoch; false keeps that of the files."""
    drop_last: bool = False
    """Leave out the last step of an epoch where it would be smaller than the others."""
    seed: Seed | None = None
    """Seed of the order, of the split and of what max_samples chooses; by default the run's."""
    cache_dir: str = "auto"
    """Where encoded data is kept for the next run; by default ~/.cache/lit_qlora, and 'none' keeps nothing.
    What nobody has used for 30 days goes, and the longest unused if together they take more than a tenth of the free
    space."""
    allow: tuple[Finding, ...] | Finding = ()
    """Go on in spite of these findings, which else stop the run."""

    @property
    def knobs(self) -> PromptKnobs:
        """The settings of the style 'knobs'."""
        return PromptKnobs(**{setting.name: getattr(self, setting.name) for setting in fields(PromptKnobs)})

    def __post_init__(self) -> None:
        """Check that no setting would be without effect."""
        super().__post_init__()
        check(bool(self.path), "data.path names no file.")
        if self.validation_size is not None:
            standard = DataConfig.val_fraction
            check(self.val_fraction == standard, "data.validation_size and data.val_fraction are the same. Give one.")
            check(self.val_path is None, "data.val_path is what to validate on, so data.validation_size has no effect.")
            object.__setattr__(self, "val_fraction", self.validation_size)
            object.__setattr__(self, "validation_size", None)  # so that a config.yaml holds it once
        share = self.val_fraction
        check(
            0 <= share < 1 or share % 1 == 0 <= share,
            f"data.val_fraction must be a share below 1 or a whole number of samples, got {share}.",
        )
        check(
            not self.columns or self.format == "auto",
            "data.columns says what is what, so data.format would have no effect. Leave one out.",
        )
        check(
            self.validation_strategy != "custom" or self.val_path is not None,
            "data.validation_strategy is custom, so data.val_path must name a file.",
        )
        check(
            self.validation_strategy != "automatic" or self.val_path is None,
            "data.validation_strategy is automatic, so data.val_path would have no effect. Leave one out.",
        )
        check(self.packing or self.pack_length is None, "data.pack_length has no effect without --data.packing.")
        check(
            not (self.packing and self.pad_to_multiple_of > 1),
            "data.pad_to_multiple_of has no effect with data.packing, whose rows are data.pack_length long.",
        )
        check(self.shuffle or not self.group_by_length, "data.group_by_length needs data.shuffle.")
        check(
            self.prompt == "knobs" or self.knobs == PromptKnobs(),
            "data.text_... and data.add_eos_... need --data.prompt knobs.",
        )
