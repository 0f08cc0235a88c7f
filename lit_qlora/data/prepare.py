"""Splitting a data set once and for all, into files that training reads as they are."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lit_qlora.commands import spell
from lit_qlora.data.examples import Example, Reading, read_examples, refusal
from lit_qlora.data.load import DEFAULT_MAX_LENGTH, load
from lit_qlora.data.prepared import record
from lit_qlora.data.sources import BESIDE_TRAIN, REPORT, TRAIN, find_file, find_sources, is_hub
from lit_qlora.errors import DataError, ResourceError, UsageError
from lit_qlora.files.atomic import replace_files, temporary_directory, write_text
from lit_qlora.prompts.conversation import Message
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.settings import DataConfig, PrepareConfig


def read(path: str | Path, out_dir: Path, config: PrepareConfig) -> Reading:
    """Read the records of a file, or of the training split of a data set of the hub.

    Raises:
        DataError: as read_examples, with the flags that there are here.
    """
    skip = config.on_error == "skip"
    if Path(path).resolve() in [(out_dir / f"{name}.jsonl").resolve() for name in ("train", "val")]:
        raise UsageError(f"out_dir {out_dir}: {path} would be overwritten with a part of itself. Name another.")
    try:
        source = find_sources([str(path)], None)[0][0] if is_hub(str(path)) else find_file(Path(path))
        reading = read_examples(source, format=config.format, columns=config.columns, skip=skip)
        if reading.tokenized:
            raise DataError(f"{path} holds token ids already. Train on it as it is, with --data.path {path}.")
        if unread := reading.unread.red():
            raise refusal([f"{reason}." for reason in unread])
    except DataError as error:
        raise DataError(re.sub(r"--data\.(columns|format|on_error)", r"--\1", str(error))) from None
    return reading


def prepare(reading: Reading, out_dir: Path, config: PrepareConfig) -> str:
    """Write train.jsonl, val.jsonl and report.md, and the checkpoint that they are for.

    The split is that of torch.utils.data.random_split, as in Lit-GPT's script of the same name. So the same seed holds
    out the same samples.

    Returns:
        The report.

    Raises:
        ResourceError: if they cannot be written.
    """
    examples = reading.examples
    held_out = int(config.test_split_fraction * len(examples))
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(config.seed)).tolist()
    parts = {"train": order[: len(examples) - held_out], "val": order[len(examples) - held_out :]}
    lines = [
        f"format    {reading.format} ({reading.saw})",
        f"samples   {len(parts['train']):,} train / {len(parts['val']):,} val, {reading.skipped:,} left out",
        f"split     share {config.test_split_fraction:g}, seed {config.seed}",
        *([f"not read  {', '.join(names)}"] if (names := reading.unread.names()) else []),
    ]
    try:
        with temporary_directory(out_dir / "data") as staged:
            for name, numbers in parts.items():
                _write(staged / f"{name}.jsonl", [examples[i] for i in numbers], raw=reading.format == "text")
            if config.checkpoint_dir:
                record(staged, config.checkpoint_dir)
                lines += _lengths(staged, config.checkpoint_dir, config)
            flag = f" --checkpoint_dir {config.checkpoint_dir}" if config.checkpoint_dir else ""
            lines += ["", f"next      {spell('finetune/lora.py')}{flag} --data.path {out_dir}"]
            report = "\n".join(lines)
            write_text(staged / REPORT, f"# Data\n\n```\n{report}\n```\n")
            replace_files(staged, out_dir, TRAIN, BESIDE_TRAIN)
    except OSError as error:
        raise ResourceError(f"out_dir {out_dir} cannot be written: {error.strerror}.") from None
    return report


def _lengths(folder: Path, checkpoint_dir: Path, config: PrepareConfig) -> list[str]:
    limit = config.max_seq_length or DEFAULT_MAX_LENGTH
    data = DataConfig(path=str(folder / "train.jsonl"), val_fraction=0.0, prompt=config.prompt, cache_dir="none")
    found = load(data, checkpoint_dir, Tokenizer(checkpoint_dir), limit, config.seed).audit
    notes = [f"note      {note}" for note in found.notes() if "validate" not in note]
    return [f"train     {found.describe()}", *notes, "", found.histogram()]


def _write(path: Path, examples: Sequence[Example], raw: bool) -> None:
    if not examples:
        return  # an empty file would be refused by whoever reads it
    records = ({"text": example.output} if raw else _record(example) for example in examples)
    write_text(path, (json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _record(example: Example) -> dict[str, Any]:
    """The example in Alpaca's columns, or as messages if these cannot say it."""
    *asked, last = example.messages
    roles = [message.role for message in asked]
    opening, bare = roles[:1] == ["system"], roles[-1:] == ["user"] and last.weight == 1 and example.plain
    if bare and len(roles) == 1 + opening and example.system != "":
        system = {"system": example.system} if opening else {}
        return {"instruction": example.instruction, "input": example.input, "output": example.output, **system}
    messages = [
        {"role": message.role, "content": message.content, **message.keys, **_weight(message)}
        for message in example.messages
    ]
    variables = dict(example.variables)
    known = {name: variables.pop(name) for name in ("tools", "documents") if name in variables}
    return {"messages": messages} | known | ({"chat_template_kwargs": variables} if variables else {})


def _weight(message: Message) -> dict[str, float]:
    return {"weight": message.weight} if message.weight != 1 else {}
