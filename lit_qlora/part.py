"""Answers that are kept as they are made, so that a command that was stopped goes on where it was."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from lit_qlora.disk import write_text
from lit_qlora.errors import ResourceError
from lit_qlora.settings import check


class Part:
    """A file OUT.part beside OUT, which is there when all is answered and not before.

    Attributes:
        answered: what was made so far, as JSON has it, by the number of the question.
    """

    def __init__(self, out: Path, *of: object, folders: tuple[Path | None, ...]) -> None:
        """Make OUT's folder, and read what an earlier command has left.

        Args:
            of: what the answers depend on, such as settings and questions.
            folders: those of the model, whose files' times count too.

        Raises:
            ResourceError: if nothing can be written there.
            UsageError: if it is of another command, or of a model or questions that have changed since.
        """
        self.out, self.path = out, out.with_name(f"{out.name}.part")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"out: {out.parent} cannot be made a folder: {error.strerror}.") from None
        check(os.access(out.parent, os.W_OK), f"out: nothing can be written in {out.parent}.")
        self.answered: dict[int, Any] = {}
        changed = [file.stat().st_mtime_ns for folder in folders if folder for file in sorted(folder.glob("*"))]
        self.of = hashlib.sha256(f"{of} {changed}".encode()).hexdigest()
        held = self.path.read_bytes() if self.path.exists() else b""
        whole = held[: held.rfind(b"\n") + 1]  # without what a kill left of a line
        if not whole:
            check(not held or self.of.encode().startswith(held), self._is_anothers)
            return
        first, *lines = whole.split(b"\n")[:-1]
        check(first == self.of.encode(), self._is_anothers)
        os.truncate(self.path, len(whole))
        for line in lines:
            self.answered |= {int(i): answer for i, answer in json.loads(line).items()}
        print(f"{len(self.answered)} prompts are answered in {self.path} already.", file=sys.stderr)

    @property
    def _is_anothers(self) -> str:
        return (
            f"{self.path} holds the answers of another command, or the model or the prompts have changed since.\n"
            "Remove it, or give another --out."
        )

    def _cannot_write(self, error: OSError) -> ResourceError:
        return ResourceError(f"Cannot write {self.out}: {error.strerror or error}.")

    def add(self, answered: dict[int, Any]) -> None:
        """Keep the answers of a batch; before the first one, whose they are."""
        first = "" if self.answered else f"{self.of}\n"
        try:
            with self.path.open("a" if self.answered else "w", encoding="utf-8") as file:
                file.write(f"{first}{json.dumps(answered)}\n")
        except OSError as error:
            raise self._cannot_write(error) from None
        self.answered |= answered

    def end(self, text: str) -> None:
        """Write OUT, whole or not at all, and remove what it was made from.

        Raises:
            ResourceError: if the disk is full; all answers are still in OUT.part.
        """
        try:
            write_text(self.out, text)
        except OSError as error:
            raise self._cannot_write(error) from None
        self.path.unlink(missing_ok=True)
