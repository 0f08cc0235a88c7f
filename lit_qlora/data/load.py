"""The data of a run: read, encoded or found in the cache, split, and audited."""

import gc
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from lit_qlora.data import cache
from lit_qlora.data.audit import Audit, audit
from lit_qlora.data.batches import Batching, Content, SampleBatch, order, validation_batches
from lit_qlora.data.cache import Encoded
from lit_qlora.data.comparisons import Comparisons
from lit_qlora.data.encode import Encoder, Encoding
from lit_qlora.data.examples import read_examples
from lit_qlora.data.exclude import hash_of, leave_out
from lit_qlora.data.judged import encode_judged, read_judged
from lit_qlora.data.judged import singly as unpaired
from lit_qlora.data.samples import Samples
from lit_qlora.data.sources import Source, find_sources, fingerprint, sha256
from lit_qlora.errors import DataError, UsageError
from lit_qlora.files import cache_folder
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.rope_scaling import scaled
from lit_qlora.model.scoring import Scoring
from lit_qlora.prompts.style import STYLES, Style, find_style, read_style
from lit_qlora.prompts.tokenizer import FILES, Tokenizer
from lit_qlora.settings import DataConfig, FinetuneConfig

DEFAULT_MAX_LENGTH = 2048
VERSION = 6  # of what the cache holds; whoever changes how examples are encoded changes this
SPLIT, CHOICE = -1, -2  # epochs of the order that no training has, so that these depend on the seed alone


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Data, encoded and split."""

    train: Samples
    val: Samples
    shares: tuple[tuple[int, float], ...]
    """See Batching."""
    style: Style
    audit: Audit
    files: dict[str, str]
    """Source -> sha256."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The data of a run."""

    train: Content
    val_batches: list[SampleBatch]
    """Validation samples; of comparisons the chosen answers."""
    val_samples: int
    batching: Batching
    style: Style
    max_length: int
    tokenizer: Tokenizer
    audit: Audit
    files: dict[str, str]
    """Source -> sha256."""
    val: Comparisons | None = None
    """Comparisons to validate on; None where samples are trained on."""
    held_out: Samples | None = None
    """The samples of val_batches; None where comparisons are trained on."""
    scoring: Scoring | None = None
    """The task of a head; None where the model learns what to write."""


def read_data(config: FinetuneConfig) -> RunData:
    """Read, encode, split and audit the data.

    Raises:
        UsageError, DataError, CheckpointError: for everything that can be known before a weight is loaded.
    """
    model, data = model_of(config), config.data
    max_length = length_limit(data, model)
    tokenizer = Tokenizer(config.checkpoint_dir)
    seed = config.seed if data.seed is None else data.seed
    loaded = load(data, config.checkpoint_dir, tokenizer, max_length, seed)
    if loaded.audit.red:
        raise DataError("\n       ".join(loaded.audit.red))
    if tokenizer.without_embedding:  # what the cache holds was encoded for another model
        for samples in (loaded.train, loaded.val):
            tokenizer.require_embedding(np.unique(samples.tokens).tolist())
    val = loaded.val.take(range(len(loaded.val))[: config.eval.max_samples])
    return RunData(
        train=loaded.train,
        val_batches=validation_batches(val, config.train.micro_batch_size),
        val_samples=len(val),
        batching=batching_of(config, seed, max_length, loaded.shares, tokenizer),
        style=loaded.style,
        max_length=max_length,
        tokenizer=tokenizer,
        audit=loaded.audit,
        files=loaded.files,
        held_out=val,
    )


def model_of(config: FinetuneConfig) -> ModelConfig:
    """The base of a run with the context that it gets.

    Raises:
        CheckpointError: if there is no checkpoint.
        UsageError: if its positions cannot be scaled.
    """
    return scaled(ModelConfig.load(config.checkpoint_dir), *config.lora.rope)


def batching_of(
    config: FinetuneConfig, seed: int, longest: int, shares: tuple[tuple[int, float], ...], tokenizer: Tokenizer
) -> Batching:
    """The settings that make steps.

    Args:
        longest: tokens of packed rows, unless data.pack_length says it.
        shares: see Batching.
    """
    data = config.data
    return Batching(
        batch_size=config.train.batch_size,
        micro_batch_size=config.train.micro_batch_size,
        seed=seed,
        shuffle=data.shuffle,
        drop_last=data.drop_last,
        group_by_length=data.group_by_length,
        weighting=data.weighting,
        row_length=(data.pack_length or longest) if data.packing else None,
        multiple=data.pad_to_multiple_of,
        shares=shares,
        length_quantile=data.length_quantile,
        token_dropout=data.token_dropout,
        mask_id=tokenizer.mask_id,
    )


def length_limit(data: DataConfig, model: ModelConfig | None) -> int:
    """Most tokens of a sample, for a model if it is known.

    Raises:
        UsageError: if that is more than the model or a packed row has room for.
    """
    max_length = data.max_length or min(model.block_size if model else DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    if model and max_length > model.block_size:
        can_grow = model.positions == "rope" and model.rope_scaling == "none"
        longer = "\n--lora.rope_scaling yarn --lora.rope_factor 4 makes it four times as long." if can_grow else ""
        raise UsageError(
            f"data.max_length {max_length} exceeds the {model.block_size} tokens of {model.name}'s context.{longer}"
        )
    if data.pack_length is not None and data.pack_length < max_length - 1:
        raise UsageError(f"data.pack_length {data.pack_length} has no room for a sample of {max_length} tokens.")
    return max_length


def load(data: DataConfig, checkpoint_dir: Path, tokenizer: Tokenizer, max_length: int, seed: int) -> Loaded:
    """As read_data, for what concerns the data alone; red findings are in the audit.

    Raises:
        UsageError, DataError, CheckpointError: if the data cannot be read, or nothing of it is left.
    """
    style = choose_style(data, checkpoint_dir)
    sources, val_source = find_sources(data.path, data.val_path)
    if data.validation_strategy == "automatic":
        val_source = None
    encoded = [encode_source(source, data, checkpoint_dir, tokenizer, style, max_length) for source in sources]
    val = encode_source(val_source, data, checkpoint_dir, tokenizer, style, max_length) if val_source else None
    if all(source.facts.format == "text" for source in encoded):
        style = STYLES["text"]
    chosen, held_out = split(encoded, val, data, seed)
    if data.exclude:
        chosen = leave_out(data.exclude, [list(map(hash_of, source.samples)) for source in encoded], chosen)
    chosen = limited(chosen, data, seed)
    parts = [source.samples.take(some) for source, some in zip(encoded, chosen, strict=True)]
    kept = [source.samples.take(some) for source, some in zip(encoded, held_out, strict=True)]
    for part, source in zip(parts, sources, strict=True):
        if len(part) and not round(len(part) * source.times):
            raise DataError(
                f"data.path {source}*{source.times:g}: an epoch would see none of its {len(part)} samples. "
                "Write a larger number."
            )
    train = Samples.joined(parts)
    mixed = any(source.times != 1 for source in sources)
    return Loaded(
        train=train,
        val=val.samples if val else Samples.joined(kept),
        shares=tuple((len(p), s.times) for p, s in zip(parts, sources, strict=True)) if mixed else (),
        style=style,
        audit=audit(train, encoded, val, chosen, held_out, data, max_length, [source.times for source in sources]),
        files={
            **{source.facts.source: source.facts.sha256 for source in [*encoded, *([val] if val else [])]},
            **excluded(data),
        },
    )


def excluded(data: DataConfig) -> dict[str, str]:
    """The file of data.exclude and its sha256; nothing without one."""
    return {str(data.exclude): sha256(data.exclude)} if data.exclude else {}


def choose_style(data: DataConfig, checkpoint_dir: Path) -> Style:
    """The style that data.prompt names; for "auto", that of the checkpoint, else alpaca."""
    if data.prompt == "auto":
        style = read_style(checkpoint_dir) or STYLES["alpaca"]
    else:
        style = find_style(data.prompt, data.knobs, checkpoint_dir)
    return style.with_variables(data.template_variables)


def encode_source(
    source: Source,
    data: DataConfig,
    checkpoint_dir: Path,
    tokenizer: Tokenizer,
    style: Style,
    max_length: int,
    judged: Literal["", "pairs", "singly"] = "",
) -> Encoded:
    """The samples of a source, from the cache if they are there. Raw text is encoded as it is, whatever the style.

    Args:
        judged: the records are judged answers, to be compared or taken singly.
    """
    encoding = Encoding(
        max_length=max_length,
        max_length_prompt=data.max_length_prompt,
        max_length_answer=data.max_length_answer,
        overlong=data.overlong,
        label_cut_ends=data.label_cut_ends,
        mask_prompt=data.mask_prompt,
        only_last_answer=data.only_last_answer,
        split_rewritten=data.split_rewritten,
        system=data.system,
        on_error=data.on_error,
    )
    content = fingerprint(source)
    everything_that_matters = {
        "version": VERSION,
        "source": [content, str(source)],
        "tokenizer": [sha256(checkpoint_dir / name) for name in FILES if (checkpoint_dir / name).is_file()],
        "style": style.facts(),
        "today": str(date.today()) if "strftime_now" in style.text else "",
        "encoding": asdict(encoding),
        "reading": [data.format, data.columns, data.templates, "empty_answers" in data.allow, judged],
    }
    key = hashlib.sha256(json.dumps(everything_that_matters, sort_keys=True).encode()).hexdigest()
    directory = cache_folder.directory(data.cache_dir, "data")
    if directory and (found := cache.load(directory, key)):
        return found
    store = cache.Store(directory, key)
    with _no_garbage(), closing(store):
        if judged:
            return _encode_judged(source, data, Encoder(tokenizer, style, encoding), judged == "singly", store, content)
        reading = read_examples(
            source,
            format=data.format,
            columns=data.columns,
            templates=data.templates,
            skip=data.on_error == "skip",
            allow=data.allow,
        )
        encoder = Encoder(tokenizer, STYLES["text"] if reading.format == "text" else style, encoding)
        encoder.counts.skipped = reading.skipped
        for sample in chain(encoder.encode(reading.examples), encoder.take(reading.tokenized)):
            store.add(sample)
        unread = reading.unread.joined(encoder.unread).facts()
        return store.finish(cache.Facts(str(source), content, reading.format, reading.saw, encoder.counts, unread))


def _encode_judged(
    source: Source, data: DataConfig, encoder: Encoder, singly: bool, store: cache.Store, content: str
) -> Encoded:
    reading = read_judged(source, data)
    answers = unpaired(reading.judged) if singly else reading.judged
    if not singly and any(one.good is not None for one in answers):
        raise DataError(f"{source}: its answers are good or bad, each by itself. Take --preference.loss kto.")
    encoder.counts.skipped = reading.skipped
    for sample in encode_judged(encoder, answers):
        store.add(sample)
    unread = reading.unread.joined(encoder.unread).facts()
    return store.finish(cache.Facts(str(source), content, reading.format, reading.saw, encoder.counts, unread))


def split(
    train: Sequence[Encoded], val: Encoded | None, data: DataConfig, seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the samples of each training source to learn from, and the samples held out to validate on.

    Args:
        seed: of the data; data.split_seed takes its place.
    """
    seed = seed if data.split_seed is None else data.split_seed
    owners = np.repeat(np.arange(len(train)), [len(source.samples) for source in train])
    numbers = np.concatenate([np.arange(len(source.samples)) for source in train])
    held_out = 0
    if val is None and data.val_fraction:
        wanted = round(data.val_fraction * len(owners)) if data.val_fraction < 1 else int(data.val_fraction)
        held_out = min(max(1, wanted), len(owners) - 1)
    shuffled = order(len(owners), seed, SPLIT)
    held = _held_out(shuffled, held_out, train)
    kept = sorted(i for i in shuffled if i not in held)

    def by_source(some: Sequence[int]) -> list[list[int]]:
        at = np.asarray(some, np.int64)
        return [numbers[at][owners[at] == number].tolist() for number in range(len(train))]

    return by_source(kept), by_source(sorted(held))


def limited(chosen: list[list[int]], data: DataConfig, seed: int) -> list[list[int]]:
    """Take data.max_samples of the chosen samples of all sources; fewer ones are among more.

    Args:
        seed: see split.
    """
    total = sum(map(len, chosen))
    if data.max_samples is None or data.max_samples >= total:
        return chosen
    seed = seed if data.split_seed is None else data.split_seed
    taken, places = set(order(total, seed, CHOICE)[: data.max_samples]), iter(range(total))
    return [[number for number in part if next(places) in taken] for part in chosen]


def _held_out(shuffled: Sequence[int], count: int, train: Sequence[Encoded]) -> set[int]:
    """The first samples in this order, at least so many of them, each with its whole group.

    A group larger than `count` is taken if there is nothing else, and never all samples.
    """
    groups = _groups(train)
    order, sizes = np.argsort(groups, kind="stable"), np.bincount(groups, minlength=1)
    starts = np.cumsum(sizes) - sizes
    held: set[int] = set()
    for most in (count, len(groups) - 1):
        for i in shuffled:
            if len(held) >= count:
                return held
            start, size = starts[groups[i]], int(sizes[groups[i]])
            if i not in held and size <= most and len(held) + size < len(groups):
                held.update(order[start : start + size].tolist())
    return held


def _groups(train: Sequence[Encoded]) -> npt.NDArray[np.int64]:
    """(S,) the number of the group of each sample: the same for a whole conversation, and for samples that are equal.

    So nothing that is validated on is also learnt.
    """
    talk = np.cumsum(~np.concatenate([source.joined for source in train])) - 1
    digests = np.concatenate([source.digests for source in train])
    equal = np.unique(digests, return_inverse=True)[1]
    if len(digests) == equal.max(initial=-1) + 1:
        return talk
    groups = talk
    while True:
        before = groups
        for kind in (equal, talk):
            least = np.full(kind.max() + 1, len(groups))
            np.minimum.at(least, kind, groups)
            groups = least[kind]
        if np.array_equal(groups, before):
            return groups


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Leave out the search for garbage: among a million samples it takes a third of the time and finds nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
