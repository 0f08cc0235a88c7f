"""Answers of a command so far, on disk, so that a command that was stopped goes on with them."""

import fcntl
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, BinaryIO

from lit_qlora.errors import CheckpointError, ResourceError, UsageError
from lit_qlora.files.atomic import not_a_link, write_text
from lit_qlora.files.hashing import hash_files
from lit_qlora.files.reading import parse_json
from lit_qlora.settings import check


class Part:
    """A file OUT.part with the answers so far. OUT appears when all is answered. One command at a time locks it.

    Attributes:
        answered: the answers so far, as JSON has them, by the number of the question.
    """

    def __init__(self, out: Path, *of: object, folders: tuple[Path | None, ...]) -> None:
        """Make OUT's folder, and read the answers of an earlier command.

        Args:
            of: settings and questions, which the answers depend on.
            folders: of model and adapter; the answers depend on their files too.

        Raises:
            ResourceError: if nothing can be written there, or another command is making OUT.
            UsageError: if it is of another command, or of a model or questions that have changed since.
        """
        self.out, self.path = out, out.with_name(f"{out.name}.part")
        self.answered: dict[int, Any] = {}
        facts = [self._hashes(folder) for folder in folders if folder]
        self.of = hashlib.sha256(f"{of} {facts}".encode()).hexdigest()
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"out: {out.parent} cannot be made a folder: {error.strerror}.") from None
        self.file = self._open()
        try:
            self._read()
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *_: object) -> None:
        """Unlock the file; remove it if it has no answers."""
        if not self.answered:
            self.path.unlink(missing_ok=True)
        self.file.close()

    def _hashes(self, folder: Path) -> dict[str, str]:
        files = [file for file in sorted(folder.glob("[!.]*")) if file.is_file() and not self._is_own(file)]
        return hash_files(files) if files else {}

    def _is_own(self, file: Path) -> bool:
        return file.name.startswith(self.out.name)

    def _open(self) -> BinaryIO:
        while True:
            try:
                file = open(self.path, "a+b", opener=not_a_link)  # noqa: SIM115 - returned
            except OSError as error:
                raise self._cannot_write(error) from None
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.close()
                if not isinstance(error, BlockingIOError):
                    raise self._cannot_write(error) from None
                raise ResourceError(
                    f"out: another command is making {self.out}.\nWait for it, or give another --out."
                ) from None
            if os.fstat(file.fileno()).st_nlink:
                return file
            file.close()  # the command that had locked it has just removed it

    def _read(self) -> None:
        self.file.seek(0)
        content = self.file.read()
        whole = content[: content.rfind(b"\n") + 1]  # without the half of a line that a kill leaves
        first, *lines = whole.split(b"\n")[:-1] or [b""]
        if not lines:  # no answers, so nothing is lost
            begun = re.fullmatch(rb"[0-9a-f]{64}\n", whole) if whole else re.fullmatch(rb"[0-9a-f]{0,64}", content)
            check(begun is not None, self._is_anothers)
            self.file.truncate(0)
            self._write(f"{self.of}\n")
            return
        check(first == self.of.encode(), self._is_anothers)
        self.file.truncate(len(whole))
        for number, line in enumerate(lines, start=2):
            try:
                self.answered |= {int(i): answer for i, answer in parse_json(line, str(self.path)).items()}
            except (CheckpointError, ValueError):
                raise UsageError(f"{self.path}:{number} is damaged. Remove the file, or that line.") from None
        print(f"{len(self.answered)} prompts are answered in {self.path} already.", file=sys.stderr)

    @property
    def _is_anothers(self) -> str:
        return (
            f"{self.path} holds the answers of another command, or the model or the prompts have changed since.\n"
            "Remove it, or give another --out."
        )

    def _cannot_write(self, error: OSError) -> ResourceError:
        return ResourceError(f"Cannot write {error.filename or self.path}: {error.strerror or error}.")

    def _write(self, text: str) -> None:
        try:
            self.file.write(text.encode())
            self.file.flush()
        except OSError as error:
            raise self._cannot_write(error) from None

    def add(self, answered: dict[int, Any]) -> None:
        """Append the answers of a batch.

        Raises:
            ResourceError: if the disk is full.
        """
        self._write(f"{json.dumps(answered)}\n")
        self.answered |= answered

    def end(self, text: str) -> None:
        """Write OUT, atomically, and remove OUT.part.

        Raises:
            ResourceError: if the disk is full; all answers are still in OUT.part.
        """
        try:
            write_text(self.out, text, follow=True)
        except OSError as error:
            raise self._cannot_write(error) from None
        self.path.unlink(missing_ok=True)
