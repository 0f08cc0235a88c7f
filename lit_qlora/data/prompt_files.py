"""Files of prompts that are to be answered."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_qlora.data.sources import Source, find_file, read_records
from lit_qlora.errors import DataError


def read_prompts(path: Path, system: str = "") -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """Place, texts (instruction, input, system) and original row of each prompt.

    Args:
        path: a line each (.txt), or records with instruction or prompt, and perhaps input and system.
        system: what the model is told before all, where a record does not say.

    Raises:
        DataError: if the file cannot be read, holds no prompt, or a row has none.
    """
    source = find_file(path)
    records = _read_lines(source) if path.suffix.lower() == ".txt" else read_records(source)
    found = False
    for place, row in records:
        for value in (row, *(row.values() if isinstance(row, dict) else ())):
            if isinstance(value, DataError):
                raise DataError(f"{place}: {value}")
        if not isinstance(row, dict):
            raise DataError(f"{place}: expected an object with instruction or prompt, found {type(row).__name__}.")
        ask = next((row[name] for name in ("instruction", "prompt") if row.get(name)), None)
        if not isinstance(ask, str):
            raise DataError(f"{place}: no instruction and no prompt (has: {', '.join(map(str, row)) or 'nothing'}).")
        texts = {name: str(row.get(name) or default) for name, default in (("input", ""), ("system", system))}
        found = True
        yield place, {"instruction": ask, **texts}, row
    if not found:
        raise DataError(f"{path} holds no prompt.")


def _read_lines(source: Source) -> Iterator[tuple[str, Any]]:
    """A prompt for each line of a text file that is not blank."""
    for place, row in read_records(source):
        assert isinstance(row, dict)
        for number, line in enumerate(row["text"].split("\n"), start=1):
            if line.strip():
                yield f"{place}:{number}", {"prompt": line.strip()}
