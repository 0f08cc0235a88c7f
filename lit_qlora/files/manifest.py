"""Directories with a manifest, which has the size and sha256 of every file in them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lit_qlora.errors import CheckpointError
from lit_qlora.files.atomic import publish, temporary_directory, writing
from lit_qlora.files.hashing import hash_file
from lit_qlora.files.reading import read_json

MANIFEST = "manifest.json"


def save_directory(
    final: Path,
    write: Mapping[str, Callable[[Path], Any]],
    facts: Mapping[str, Any],
    free: Mapping[str, str] | None = None,
) -> None:
    """Write a directory that is either complete or absent, whatever stops the program.

    Files go to a temporary directory beside `final`, and each is flushed to the disk. manifest.json comes last, with
    bytes and sha256 of each and with `facts`. Then the directory gets its name.

    Args:
        write: file name -> a function that writes it to the path it is given.
        free: file name -> text of files that people may change, which manifest.json leaves out.

    Raises:
        ResourceError: if the disk is full or may not be written; `final` is then as it was.
    """
    with writing(final), temporary_directory(final) as temporary:
        files = {}
        for name, write_to in write.items():
            path = temporary / name
            write_to(path)
            files[name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        for name, text in (free or {}).items():
            (temporary / name).write_text(text, encoding="utf-8", errors="backslashreplace")  # of paths, say
        (temporary / MANIFEST).write_text(json.dumps({"format": 1, "files": files, **facts}, indent=2) + "\n")
        publish(temporary, final)


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a directory, after checking every file against it; None where there is no manifest.

    Raises:
        CheckpointError: naming the first file that is absent or differs.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return None
    manifest: dict[str, Any] = read_json(path)
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(known, dict) for known in files.values()):
        raise CheckpointError(f"{path} is damaged: it does not list its files.")
    for name, known in files.items():
        file = directory / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{directory} is incomplete: {name} is absent.")
        if file.stat().st_size != known.get("bytes") or hash_file(file) != known.get("sha256"):
            raise CheckpointError(f"{file} is damaged: it is not the file that was saved (sha256 differs).")
    return manifest
