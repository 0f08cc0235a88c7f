"""Settings of training and validation data."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from lit_qlora.settings.checks import Settings, check, check_cache_folder
from lit_qlora.settings.limits import Count, Seed, ShareAboveZero, ShareBelowOne, at_least

Overlong = Literal["truncate_left", "truncate_right", "drop", "error"]
Finding = Literal[
    "cut_answers",
    "dropped",
    "masked",
    "no_eos",
    "empty_answers",
    "unread",
    "control_tokens",
    "begun",
    "prompts_differ",
]


@dataclass(frozen=True, kw_only=True)
class PromptKnobs(Settings):
    """The texts of prompt style 'knobs', with the names of H2O LLM Studio."""

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
    """Style 'knobs': end an answer with the end-of-text token. A model needs it to learn when to stop."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(PromptKnobs):
    """Training and validation data, and how records become token ids."""

    first = ("path", "columns", "prompt", "max_length", "packing")

    path: tuple[str, ...] | str = "auto"
    """A .json, .jsonl, .csv, .tsv, .parquet, .arrow or .txt file, which may be compressed (.gz, .zst, .xz, .bz2); a
    pattern such as "data/*.jsonl"; a folder with train and val files, of several files of one format, or saved by the
    library datasets; hf:ORG/NAME or hf:ORG/NAME:CONFIG; a data set by name: alpaca, alpaca-clean, alpaca-gpt4, chip2,
    dolly, flan, flan-v2, hh-rlhf, lima, longform, oasst1, oasst1-trees, red-dot or self-instruct (see
    docs/data_sets.md); or a list such as [a.jsonl,b.csv*0.5,c.json*2]. The factor says how often an epoch visits each
    sample of a source; 0.5 takes another half in each epoch. 'auto' is the folder that scripts/prepare_alpaca.py or
    prepare_csv.py left for this checkpoint; for the demo's checkpoint, finetune/demo."""
    val_path: str | None = None
    """Validation file. By default the directory's own, else a share of the training data (val_fraction)."""
    format: str = "auto"
    """Record format: alpaca, dolly, sharegpt, messages, oasst1, text, ... 'auto' recognises it and prints the
    result."""
    columns: str = ""
    """Meaning of columns, e.g. question:instruction,reply:output. The known meanings are instruction, input, output and
    system."""
    template: str = ""
    """Prompts made of columns, e.g. "Describe {product}, a {category}."; with data.answer_template."""
    answer_template: str = ""
    """Answers made of columns, e.g. "{description}"."""
    on_error: Literal["stop", "skip"] = "stop"
    """'stop' ends the run at a record that cannot be read or has no answer; 'skip' leaves such records out and counts
    them."""
    max_samples: Count | None = None
    """Train on N samples only, chosen at random among those that data.exclude leaves. By default on all."""
    validation_strategy: Literal["auto", "automatic", "custom"] = "auto"
    """Source of validation samples: a validation file ('custom'), a share of the training data ('automatic'), or a file
    if there is one ('auto')."""
    val_fraction: float = 0.05
    """Held out of the training data for validation: a share if below 1, else a number of samples."""
    validation_size: float | None = None
    """H2O LLM Studio's name for val_fraction."""
    prompt: str = "auto"
    """Prompt style: alpaca, alpaca-end, plain, qa, text, llama2, llama3, chatml, mistral, vicuna, zephyr, phi, phi3,
    gemma, guanaco, knobs (see text_prompt_start), or template, the tokenizer's own chat template. 'auto' takes the
    checkpoint's recorded style, else its chat template, else alpaca."""
    template_variables: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, e.g. {enable_thinking: false}, for records whose chat_template_kwargs do not say
    them. The adapter is asked with them too."""
    system: str = ""
    """System message of samples that have none. By default none."""
    max_length: Annotated[int, at_least(8)] | None = None
    """Maximum tokens of a sample: prompt, answer and end of text. By default the model's context, at most 2048."""
    max_length_prompt: Annotated[int, at_least(2)] | None = None
    """Maximum tokens of a prompt (the source). By default no limit of its own."""
    max_length_answer: Annotated[int, at_least(2)] | None = None
    """Maximum tokens of an answer (the target), end included. By default no limit of its own."""
    overlong: Overlong = "truncate_left"
    """Treatment of a sample that is too long. truncate_left cuts the prompt's text at its beginning, truncate_right at
    its end; a conversation loses its first or last turns. The style's own text stays. Then the answer is cut at its
    end. 'drop' leaves the sample out; 'error' refuses the run."""
    label_cut_ends: bool = False
    """Label the end-of-text token of an answer that was cut. This teaches a model to stop too early."""
    mask_prompt: bool = True
    """Label the answers only, not the prompts."""
    only_last_answer: bool = False
    """Label only the last answer of a conversation."""
    split_rewritten: bool = True
    """Make several samples of a conversation if the chat template rewrites what was said before, as those do that leave
    out earlier thoughts. Each answer is then labelled behind the prompt that asks for it. false makes one sample of it;
    answers that are not as they were said are not labelled."""
    packing: bool = False
    """Put several samples into each row, without attention between them. The gradient is the same, with hardly any
    padding."""
    pack_length: Count | None = None
    """Maximum tokens of a packed row; a micro-batch has train.micro_batch_size rows. By default max_length."""
    weighting: Literal["tokens", "samples"] = "tokens"
    """The loss of a step: the mean over its labelled tokens ('tokens'), or the mean of its samples' own means
    ('samples')."""
    group_by_length: bool = False
    """Form steps from samples of similar length, which saves padding."""
    pad_to_multiple_of: Count = 1
    """Pad rows that are not packed to a multiple of N tokens."""
    length_quantile: ShareAboveZero = 1.0
    """Cut the beginnings of a step's samples, so that none is longer than this quantile of their lengths. Lower values
    save padding and lose text. Validation samples stay whole. By default nothing is cut."""
    token_dropout: ShareBelowOne = 0.0
    """Probability of replacing a token of a training sample by the tokenizer's unknown token (else its mask, padding or
    end-of-text token). A replaced token is not labelled."""
    shuffle: bool = True
    """Shuffle anew in each epoch; false keeps the order of the files."""
    drop_last: bool = False
    """Leave out the last step of an epoch if it is smaller than the others."""
    seed: Seed | None = None
    """Seed of the order, the split and max_samples. By default the run's seed."""
    exclude: Path | None = None
    """File of samples to leave out of training, as scripts/review_data.py writes it. Validation samples stay."""
    split_seed: Seed | None = None
    """Seed of the split and max_samples alone, so that runs in other orders validate on the same samples. By default
    the data's seed."""
    cache_dir: str = "auto"
    """Folder that caches encoded data. 'auto' is ~/.cache/lit_qlora; 'none' caches nothing. Entries unused for 30 days
    are deleted; so are the longest unused ones if the cache exceeds a tenth of the free space."""
    allow: tuple[Finding, ...] | Finding = ()
    """Findings that do not stop the run, e.g. [masked]. By default all do."""

    @property
    def templates(self) -> tuple[str, str] | None:
        """The texts that columns are put into, if there are any."""
        return (self.template, self.answer_template) if self.template else None

    @property
    def knobs(self) -> PromptKnobs:
        """Return the settings of style 'knobs'."""
        return PromptKnobs(**{setting.name: getattr(self, setting.name) for setting in fields(PromptKnobs)})

    def __post_init__(self) -> None:
        """Check that no setting would be without effect."""
        super().__post_init__()
        check(bool(self.path) and all(path.strip() for path in self.path), "data.path names no file.")
        for path in self.path:
            check(
                path[:1] + path[-1:] not in ("[]", "{}"),
                f"data.path {path} is no list of names, such as [a.jsonl,b.csv]. A name that is a number, or holds a "
                'comma or a colon, stands in quotation marks: ["1","b,c.csv"].',
            )
        check_cache_folder("data.cache_dir", self.cache_dir)
        if self.validation_size is not None:
            standard = DataConfig.val_fraction
            check(
                self.val_fraction == standard,
                "data.validation_size and data.val_fraction are two names of one setting. Give one.",
            )
            check(
                self.val_path is None,
                "data.val_path names the validation file, so data.validation_size would have no effect. Leave one out.",
            )
            object.__setattr__(self, "val_fraction", self.validation_size)
        given = "val_fraction" if self.validation_size is None else "validation_size"
        share = self.val_fraction
        check(
            0 <= share < 1 or share % 1 == 0 <= share,
            f"data.{given} must be a share below 1 or a whole number of samples, got {share}.",
        )
        object.__setattr__(self, "validation_size", None)  # so that a config.yaml holds it once
        check(
            not self.columns or self.format == "auto",
            "data.columns gives the meaning of columns, so data.format would have no effect. Leave one out.",
        )
        check(
            bool(self.template) == bool(self.answer_template),
            "data.template makes prompts and data.answer_template makes answers. Give both.",
        )
        check(
            not self.template or (self.format == "auto" and not self.columns),
            "data.template says how columns are read, so data.format and data.columns would have no effect. Leave them "
            "out.",
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
            "data.pad_to_multiple_of has no effect with data.packing: packed rows have data.pack_length tokens.",
        )
        check(
            not (self.packing and self.length_quantile < 1),
            "data.length_quantile saves padding, and packed rows have hardly any. Leave it or data.packing out.",
        )
        check(self.shuffle or not self.group_by_length, "data.group_by_length needs data.shuffle.")
        texts = [setting.name for setting in fields(PromptKnobs) if getattr(self, setting.name) != setting.default]
        check(
            self.prompt == "knobs" or not texts,
            f"data.{' and data.'.join(texts)} belong{'' if texts[1:] else 's'} to prompt style knobs, and data.prompt "
            f"is {self.prompt}. Add --data.prompt knobs.",
        )
