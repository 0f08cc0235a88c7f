"""Texts with a label each: a class or a number, which a small head learns to read off the last token.

A label is a number of a table: of a class, or of a value. It takes the place of a token behind its text, so texts are
split, ordered, packed and counted like all samples. Of such a sample only that last "token" is labelled.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain, islice
from typing import Any

import numpy as np

from lit_qlora.data.audit import Audit, audit
from lit_qlora.data.batches import Batch, collate, validation_batches
from lit_qlora.data.cache import Encoded, Facts, Store
from lit_qlora.data.encode import CONTROL, Counts, EncodedSample
from lit_qlora.data.examples import LOOKED_AT, refusal
from lit_qlora.data.exclude import hash_of, leave_out
from lit_qlora.data.labels import class_of, number_of, scoring_of
from lit_qlora.data.load import RunData, batching_of, excluded, length_limit, limited, model_of, split
from lit_qlora.data.messages import names_of, text_of
from lit_qlora.data.samples import Sample, Samples
from lit_qlora.data.sources import Source, find_sources, fingerprint, read_records
from lit_qlora.data.unread import Unread
from lit_qlora.errors import DataError, UsageError, did_you_mean
from lit_qlora.model.scoring import Scoring
from lit_qlora.prompts.style import STYLES
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.settings import DataConfig, FinetuneConfig, check

TEXTS = ("text", "sentence", "content", "review", "prompt", "instruction")
LABELS = ("label", "labels", "class", "category", "score", "rating")
"""Names of the columns with text and label, in the order in which they are tried."""
SKIP = "Mend them, or leave them out with --data.on_error skip."
RARE = 0.1  # of the share that each class would have if all had the same; a class below it is rare


@dataclass(frozen=True)
class Columns:
    """The columns with text and label; see data.unread.Form."""

    text: str
    label: str
    chosen: bool = False
    reads: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ("idx", "id")
    gather: None = None

    @property
    def needs(self) -> tuple[str, str]:
        """Both."""
        return self.text, self.label


@dataclass(frozen=True)
class Texts:
    """The records of a source."""

    texts: list[str]
    labels: list[Any]
    columns: Columns
    skipped: int
    unread: Unread


def read_scored(config: FinetuneConfig) -> RunData:
    """Read, encode, split and audit texts and their labels, as data.load.read_data does with conversations.

    Raises:
        UsageError, DataError, CheckpointError: for everything that can be known before a weight is loaded.
    """
    data, tokenizer = config.data, Tokenizer(config.checkpoint_dir)
    most, seed = length_limit(data, model_of(config)), config.seed if data.seed is None else data.seed
    sources, val_source = find_sources(data.path, data.val_path)
    if data.validation_strategy == "automatic":
        val_source = None
    everything = [*sources, *([val_source] if val_source else [])]
    read = [read_texts(source, data, config.head) for source in everything]
    scoring = scoring_of(config.head, [one.labels for one in read])
    encoded = [
        encode_texts(source, one, scoring, data, tokenizer, most) for source, one in zip(everything, read, strict=True)
    ]
    train, val = encoded[: len(sources)], encoded[len(sources)] if val_source else None
    chosen, held_out = split(train, val, data, seed)
    if data.exclude:
        chosen = leave_out(data.exclude, [list(map(hash_of, one.samples)) for one in train], chosen)
    chosen = limited(chosen, data, seed)
    samples = Samples.joined([one.samples.take(some) for one, some in zip(train, chosen, strict=True)])
    kept = Samples.joined([one.samples.take(some) for one, some in zip(train, held_out, strict=True)])
    kept = (val.samples if val else kept).take(range(len(val.samples if val else kept))[: config.eval.max_samples])
    times = [source.times for source in sources]
    found = audit(samples, train, val, chosen, held_out, data, most, times)
    found = replace(found, max_length=most)
    if found.red:
        raise DataError("\n       ".join(found.red))
    mixed = any(each != 1 for each in times)
    shares = tuple((len(some), each) for some, each in zip(chosen, times, strict=True)) if mixed else ()
    return RunData(
        train=samples,
        val_batches=validation_batches(kept, config.train.micro_batch_size),
        val_samples=len(kept),
        batching=batching_of(config, seed, most, shares, tokenizer),
        style=STYLES["text"],
        max_length=most,
        tokenizer=tokenizer,
        audit=with_labels(found, samples, scoring),
        files={one.facts.source: one.facts.sha256 for one in encoded} | excluded(data),
        held_out=kept,
        scoring=scoring,
    )


def read_texts(source: Source, data: DataConfig, kind: str, advice: str = SKIP) -> Texts:
    """Read all texts and labels of a source.

    Args:
        kind: of the task; numbers to regress on are read as such.
        advice: what to do about records that cannot be read.

    Raises:
        UsageError: if data.columns is not of the form NAME:text,NAME:label.
        DataError: listing the first few things that are wrong, with their locations, and counting all.
    """
    records = iter(read_records(source))
    first = list(islice(records, LOOKED_AT))
    columns = pick_columns(data.columns, [record for _, record in first if isinstance(record, dict)], str(source))
    texts, labels, complaints = list[str](), list[Any](), list[str]()
    unread = Unread(columns)
    for location, record in chain(first, records):
        try:
            text, label = _read(record, columns)
            if kind == "regress":
                number_of(label)
        except DataError as error:
            complaints.append(f"{location}: {error}" if location else str(error))
            continue
        unread.look(location, record)
        texts.append(text)
        labels.append(label)
    if complaints and data.on_error != "skip":
        raise refusal(complaints, advice)
    if not texts:
        raise DataError(f"{source} holds no text with a label.")
    return Texts(texts, labels, columns, len(complaints), unread)


def pick_columns(setting: str, records: Sequence[Mapping[str, Any]], source: str) -> Columns:
    """The columns that data.columns names, or the usual ones that the first records have."""
    if not records:
        raise DataError(f"{source} holds no record.")
    names = list(map(str, records[0]))
    if setting:
        pairs = dict(part.strip().rpartition(":")[::-2] for part in setting.split(","))
        if pairs.keys() != {"text", "label"} or not all(pairs.values()):
            raise UsageError(f"data.columns: {setting!r} is not of the form NAME:text,NAME:label, as --head needs it.")
        if pairs["text"] == pairs["label"]:
            raise UsageError(f"data.columns: {setting!r} names the text as its own label.")
        for name in pairs.values():
            if names and not any(name in record for record in records):
                raise DataError(f"data.columns: no record has a column {name!r}.{did_you_mean(name, names)}")
        return Columns(pairs["text"], pairs["label"], chosen=True)
    text, label = (next((name for name in some if name in names), "") for some in (TEXTS, LABELS))
    if not text or not label:
        raise DataError(
            f"{source}: --head needs a text and a label; the columns are {names_of(records[0])}.\n"
            "Say which is which, e.g. --data.columns review:text,stars:label."
        )
    return Columns(text, label)


def _read(record: Any, columns: Columns) -> tuple[str, Any]:
    if isinstance(record, DataError):
        raise record
    if not isinstance(record, dict):
        raise DataError(f"expected an object with {columns.text} and {columns.label}, found {type(record).__name__}")
    text, label = text_of(record, columns.text), record.get(columns.label)
    if not text.strip():
        raise DataError(f"{columns.text!r} is empty")
    if isinstance(label, DataError):  # such as NaN in JSON
        raise label
    if isinstance(label, str):
        text_of(record, columns.label)  # holds characters
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if label is None or (isinstance(label, str) and not label.strip()):
        raise DataError(f"{columns.label!r} is empty")
    if isinstance(label, float) and not math.isfinite(label):
        raise DataError(f"{columns.label!r} is {label}, no label")
    if not isinstance(label, str | int | float):
        raise DataError(f"{columns.label!r} is {type(label).__name__}, not a class or a number")
    return text, label


def read_plain(path: str, columns: str) -> tuple[list[str], list[Any] | None]:
    """Texts of a file, and their labels if it has any; see read_texts.

    Raises:
        UsageError, DataError: as read_texts.
    """
    source = one_source(path)
    first = next((record for _, record in read_records(source) if isinstance(record, dict)), {})
    given = dict(part.strip().rpartition(":")[::-2] for part in columns.split(",")) if columns else {}
    text = given.get("text") or next((name for name in TEXTS if name in first), "")
    label = given.get("label") or next((name for name in LABELS if name in first and not given), "")
    if label:
        data = DataConfig(path=path, columns=f"{text}:text,{label}:label" if given else "")
        read = read_texts(source, data, "classify", f"Mend them, or read texts alone: --data.columns {text}:text.")
        return read.texts, read.labels
    if not first:
        raise DataError(f"{source} holds no record.")
    if not text or given.keys() - {"text"}:
        raise DataError(f"{source}: no column with texts; it has {names_of(first)}. Say it: --data.columns NAME:text.")
    return [_text(record, text, location) for location, record in read_records(source)], None


def one_source(path: str) -> Source:
    """The source of texts to read, whole and once.

    Raises:
        UsageError: if `path` names more than that.
        DataError: as find_sources.
    """
    (source,), rest = find_sources([path], None)
    check(source.times == 1, f"data.path {path}: each text is read once. Leave the factor out.")
    check(
        rest is None or bool(rest.split),
        f"data.path {path} has a part to learn from and one to validate on. Name the file of one, such as {rest}.",
    )
    return source


def _text(record: Any, name: str, location: str) -> str:
    if not isinstance(record, dict):
        raise record if isinstance(record, DataError) else DataError(f"{location}: {name!r} is empty or no text.")
    try:
        text = text_of(record, name)
    except DataError as error:
        raise DataError(f"{location}: {error}.") from None
    if not text.strip():
        raise DataError(f"{location}: {name!r} is empty.")
    return text


def ids_of(texts: Sequence[str], tokenizer: Tokenizer, most: int) -> list[list[int]]:
    """The ids of texts as encode_texts has them; what is too long loses its beginning."""
    begin = begin_of(tokenizer, most)
    return [[*begin, *ids[-(most - len(begin)) :]] for ids in tokenizer.encode_many(texts)]


def begin_of(tokenizer: Tokenizer, most: int) -> list[int]:
    """The beginning of a text: BOS, or nothing. Raises UsageError if `most` tokens have no room for more."""
    begin = [tokenizer.bos_id] if tokenizer.use_bos and tokenizer.bos_id is not None else []
    check(most > len(begin), f"max_length {most} has no room for a text behind {tokenizer.bos_id}, its beginning.")
    return begin


def text_batches(ids: Sequence[Sequence[int]], rows: int) -> Iterator[tuple[list[int], Batch]]:
    """Batches of texts by length, each with the numbers of its texts; the last token of each is labelled, with 0."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), rows):
        numbers = order[start : start + rows]
        batch = collate([[Sample.of([*ids[i], 0], len(ids[i]))] for i in numbers])
        assert isinstance(batch, Batch)
        yield numbers, batch


def encode_texts(
    source: Source, read: Texts, scoring: Scoring, data: DataConfig, tokenizer: Tokenizer, most: int
) -> Encoded:
    """The samples of texts, with BOS where the model's own files put it and without EOS, as transformers reads them."""
    table = {name: number for number, name in enumerate(scoring.classes or scoring.values)}
    counts = Counts(skipped=read.skipped)
    store = Store(None, "")
    with closing(store):
        ids = tokenizer.encode_many(read.texts)
        for text, tokens, label in zip(read.texts, ids, read.labels, strict=True):
            number = table[class_of(label) if scoring.classes else number_of(label)]
            for sample in _encoded(text, tokens, number, data, tokenizer, most, counts):
                store.add(sample)
        saw = f"columns {read.columns.text}, {read.columns.label}"
        facts = Facts(str(source), fingerprint(source), scoring.kind, saw, counts, read.unread.facts())
        return store.finish(facts)


def _encoded(
    text: str, ids: list[int], label: int, data: DataConfig, tokenizer: Tokenizer, most: int, counts: Counts
) -> Iterator[EncodedSample]:
    begin = begin_of(tokenizer, most)
    room, length = most - len(begin), len(ids) + len(begin)
    counts.examples += 1
    counts.control_characters += bool(CONTROL.search(text))
    if length > most:
        if data.overlong == "error":
            raise DataError(f"a text of {length:,} tokens does not fit into {most}: {text[:60]!r}...")
        if data.overlong == "drop":
            counts.dropped += 1
            return
        counts.cut_prompts += 1
        ids = ids[-room:] if data.overlong == "truncate_left" else ids[:room]
    counts.turns += 1
    counts.ended += 1
    tokens = np.asarray([*begin, *ids, label], np.int32)
    digest = int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
    yield EncodedSample(Sample(tokens, np.arange(len(tokens)) == len(tokens) - 1), length, digest)


def with_labels(found: Audit, samples: Samples, scoring: Scoring) -> Audit:
    """The audit with notes on the labels, and a warning if classes are rare or absent."""
    labels = np.asarray([int(samples.tokens[end - 1]) for end in samples.ends], np.int64)
    if not scoring.classes:
        values = np.asarray(scoring.values)[labels]
        note = (
            f"labels from {values.min():g} to {values.max():g}, mean {values.mean():.4g}, deviation {values.std():.4g}"
        )
        return replace(found, further=(note,))
    counts = np.bincount(labels, minlength=len(scoring.classes))
    order = np.argsort(-counts, kind="stable")[:10]
    more = f" and {len(counts) - 10} more" if len(counts) > 10 else ""
    note = f"classes: {', '.join(f'{scoring.classes[i]} {counts[i]:,}' for i in order)}{more}"
    rare = [i for i in np.argsort(counts, kind="stable") if counts[i] < RARE * len(labels) / len(counts)]
    if not rare:
        return replace(found, further=(note,))
    named = ", ".join(f"{scoring.classes[i]} ({counts[i]:,})" for i in rare[:5])
    warning = (
        f"classes are far from even: of {len(labels):,} training samples few are of {named}. Accuracy says little "
        "then, so look at val_f1; more samples of these classes, or FILE*3 for a file of them, help."
    )
    return replace(found, further=(note,), warnings=[*found.warnings, warning])
