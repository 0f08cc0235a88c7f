"""The state of a run beside each adapter that it saves: OUT/step-000120.state beside OUT/step-000120.

An adapter's folder holds what others need of it; the state from which a run resumes has a folder of its own. It is
saved before its adapter, whose manifest has the hash of the state's manifest, and removed after it. So a kill in
between leaves a state that no adapter names, and never an adapter without its state.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lit_qlora.errors import CheckpointError
from lit_qlora.files.atomic import flush, remove_directory
from lit_qlora.files.hashing import hash_file
from lit_qlora.files.manifest import MANIFEST, read_manifest, save_directory
from lit_qlora.files.reading import read_json
from lit_qlora.lora.adapter import PEFT_CONFIG, STATE
from lit_qlora.report import tell
from lit_qlora.train.training_state import COUNTERS, Writers, read_counters

FINAL = "final"
SUFFIX = ".state"
_OF_A_RUN = re.compile(rf"({FINAL}|step-\d+)\{SUFFIX}")


def beside(adapter: Path) -> Path:
    """Name the folder of an adapter's state."""
    return adapter.with_name(adapter.name + SUFFIX)


def adapter_of(folder: Path) -> Path:
    """Return the folder of the adapter that a state lies beside, also a renamed one; any other folder as it is.

    Raises:
        CheckpointError: if there is no such adapter.
    """
    is_state = folder.suffix == SUFFIX and (folder / COUNTERS).is_file() and not (folder / PEFT_CONFIG).is_file()
    if not is_state:
        return folder
    if (adapter := folder.with_suffix("")).is_dir():
        return adapter
    if owner := _owner(folder):
        return owner
    raise CheckpointError(
        f"{folder} is the state of the adapter {adapter.name}, which is not beside it.\nA run resumes from both: copy "
        f"{adapter.name} there too."
    )


@contextmanager
def saved(adapter: Path, files: Writers) -> Iterator[str]:
    """Save the state of an adapter atomically, yield the hash for its manifest, and remove it if no adapter is saved.

    Raises:
        ResourceError: if it cannot be written.
    """
    state = beside(adapter)
    make_way(state)
    _move_to_owner(state)
    save_directory(state, files, {})
    try:
        yield hash_file(state / MANIFEST)
    except BaseException:
        if find(adapter) != state.resolve():
            with suppress(OSError):
                remove_directory(state)
        raise


def make_way(folder: Path) -> None:
    """Give another name to a file that lies where a folder of a run is to be saved, and remove a link.

    The folder that a link points to would be replaced; a file would end the run.
    """
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_file():
        aside = free_name(folder)
        folder.rename(aside)
        tell(f"  note    {folder} was a file, and is now {aside}: the run saves a folder of this name", sys.stderr)


def free_name(path: Path) -> Path:
    """A name beside `path` for what is set aside; nothing has it, nor would its state's folder be another's."""
    names = (path.with_name(f"aside-{path.name}.{number}") for number in range(1, 10_000))
    return next(name for name in names if not name.exists() and not beside(name).exists())


def find(adapter: Path) -> Path | None:
    """Find the state of an adapter by its hash, also where one of them was renamed; None if it is not there.

    Runs of earlier versions have it in the adapter's own folder.
    """
    adapter = adapter.resolve()
    if (named := _named_by(adapter)) is None:
        return adapter if (adapter / COUNTERS).is_file() else None
    folders = (beside(adapter), *sorted(adapter.parent.glob(f"*{SUFFIX}")))
    return next((folder for folder in folders if _hash(folder) == named), None)


def read(adapter: Path) -> tuple[Path, dict[str, Any]]:
    """Check an adapter and its state, file by file, and return the folder and the counters of the state.

    Raises:
        CheckpointError: if one of them is missing or damaged.
    """
    if read_manifest(adapter) is None:
        raise CheckpointError(f"{adapter} is incomplete: it has no {MANIFEST}.")
    if (state := find(adapter)) is None:
        there = "is another's" if beside(adapter).is_dir() else "is not beside it"
        raise CheckpointError(
            f"{adapter} is an adapter alone: the state to resume from, {beside(adapter).name}, {there}."
        )
    if state != adapter.resolve():
        read_manifest(state)
    return state, read_counters(state)


def step_of(adapter: Path) -> int:
    """Read after how many steps an adapter was saved.

    Raises:
        CheckpointError: if it does not say it.
    """
    step = _manifest(adapter).get("step")
    return step if type(step) is int else int(read_counters(adapter)["step"])


def remove_alone(out_dir: Path) -> None:
    """Remove the states of a run whose adapter was never saved, or is gone."""
    folders = [folder for folder in out_dir.glob(f"*{SUFFIX}") if _OF_A_RUN.fullmatch(folder.name)]
    if alone := [folder for folder in folders if not folder.is_symlink() and not folder.with_suffix("").exists()]:
        named = {None, *_named(out_dir).values()}
        for folder in alone:
            if _hash(folder) not in named:
                remove_directory(folder)


def _move_to_owner(state: Path) -> None:
    """Give a state that another adapter names the name that belongs to that one."""
    if owner := _owner(state):
        if beside(owner).exists():
            remove_directory(beside(owner))  # it is not its own
        state.rename(beside(owner))
        flush(state.parent)


def _owner(state: Path) -> Path | None:
    """Find the adapter of another name that names this state."""
    digest = _hash(state)
    named = {} if digest is None else _named(state.parent)
    return next((adapter for adapter in named if named[adapter] == digest and beside(adapter) != state), None)


def _named(folder: Path) -> dict[Path, str | None]:
    """Read the hash of its state in the manifest of each adapter in a folder."""
    adapters = [path.parent for path in folder.glob(f"*/{MANIFEST}")]
    return {adapter: _named_by(adapter) for adapter in adapters if not adapter.is_symlink()}


def _named_by(adapter: Path) -> str | None:
    named = _manifest(adapter).get(STATE)
    return named if isinstance(named, str) else None


def _hash(state: Path) -> str | None:
    path = state / MANIFEST
    return hash_file(path) if path.is_file() else None


def _manifest(adapter: Path) -> Mapping[str, Any]:
    """Read the manifest of an adapter; a damaged one says nothing."""
    path = adapter / MANIFEST
    try:
        facts: Mapping[str, Any] = read_json(path) if path.is_file() else {}
    except CheckpointError:
        return {}
    return facts
