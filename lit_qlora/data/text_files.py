"""Text as people have it: compressed, and tables in the encodings of spreadsheets. It is read a piece at a time."""

import codecs
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from lit_qlora.errors import DataError

PIECE = 2**22  # bytes that are read at a time
FREE, MOST_TIMES = 2**28, 250
"""A file may unpack to FREE bytes, and MOST_TIMES its own size more; text of records reaches some thirty times."""
UTF8, UTF16, WINDOWS = "UTF-8", "UTF-16", "Windows-1252"
CODECS = {UTF8: "utf-8-sig", UTF16: "utf-16", WINDOWS: "cp1252"}

# As one string, a gigabyte of text with a single emoji takes four.


def open_gzip(path: Path) -> IO[bytes]:
    """Open a file that gzip has made."""
    import gzip

    return gzip.open(path)  # type: ignore[return-value]


def open_bzip2(path: Path) -> IO[bytes]:
    """Open a file that bzip2 has made."""
    import bz2

    return bz2.open(path)


def open_xz(path: Path) -> IO[bytes]:
    """Open a file that xz has made."""
    import lzma

    return lzma.open(path)


def open_zstandard(path: Path) -> IO[bytes]:
    """Open a file that zstd has made; Python has it from 3.14 on only."""
    import pyarrow

    if not pyarrow.Codec.is_available("zstd"):
        raise DataError(f"{path} is compressed with Zstandard, which this pyarrow cannot read. Decompress it first.")
    opened: IO[bytes] = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return opened


OPENERS: dict[bytes, Callable[[Path], IO[bytes]]] = {
    b"\x1f\x8b": open_gzip,
    b"BZh": open_bzip2,
    b"\xfd7zXZ": open_xz,
    b"\x28\xb5\x2f\xfd": open_zstandard,
}
"""First bytes of a compressed file -> how it is opened."""
PACKED = (".gz", ".bz2", ".xz", ".zst")
"""Ends of the names of compressed files."""


def kind_of(path: Path | str) -> str:
    """The end of a file's name that tells its type: '.jsonl' of a.jsonl, and of A.JSONL.gz."""
    path = Path(path)
    return Path(path.stem if path.suffix.lower() in PACKED else path.name).suffix.lower()


class _Unpacked(io.RawIOBase):
    """The content of a compressed file, within limits; a damaged one is a DataError."""

    def __init__(self, path: Path, inner: IO[bytes]) -> None:
        self.path, self.inner = path, inner
        self.left = FREE + MOST_TIMES * path.stat().st_size

    def readable(self) -> bool:
        return True

    def readinto(self, room: Any) -> int:
        try:
            content = self.inner.read(len(room))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise self._damaged(error) from None
        except Exception as error:  # lzma's error is no OSError; its module may be absent from a Python
            if type(error).__name__ != "LZMAError":
                raise
            raise self._damaged(error) from None
        self.left -= len(content)
        if self.left < 0:
            raise DataError(f"{self.path} unpacks to more than {MOST_TIMES} times its size. Decompress it first.")
        room[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self.inner.close()
        super().close()

    def _damaged(self, error: Exception) -> DataError:
        return DataError(f"{self.path} is compressed and damaged: {str(error).partition(chr(10))[0]}.")


def open_bytes(path: Path) -> io.BufferedReader:
    """Open a file, and unpack what its first bytes show to be compressed."""
    file = open(path, "rb")  # noqa: SIM115 - returned
    opener = next((one for beginning, one in OPENERS.items() if file.peek(6).startswith(beginning)), None)
    if opener is None:
        return file
    file.close()
    return io.BufferedReader(_Unpacked(path, opener(path)), 2**16)


def find_encoding(path: Path) -> str:
    """The encoding of a table or text: UTF-8 if its bytes can be, UTF-16 if it says so, else that of older Windows.

    Windows-1252 is the usual one of Western Europe, and holds Latin-1. There a letter with an accent stands among plain
    ones, so that two of them side by side are rare. Files in other encodings, and damaged ones, count as UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    single = side_by_side = 0
    is_utf8 = True
    with open_bytes(path) as file:
        beginning = file.peek(3)
        if beginning[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return UTF16
        if beginning.startswith(codecs.BOM_UTF8):
            return UTF8
        while content := file.read(PIECE):
            if is_utf8:
                try:
                    decoder.decode(content)
                except UnicodeDecodeError:
                    is_utf8 = False
            if content.isascii():
                continue
            if any(byte in content for byte in UNUSED):
                return UTF8  # as far as there is an encoding at all
            runs = [len(run) for run in content.translate(HIGH).split()]
            single += sum(run == 1 for run in runs)
            side_by_side += sum(run for run in runs if run > 1)
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        is_utf8 = False
    return UTF8 if is_utf8 or side_by_side > single else WINDOWS


UNUSED = b"\x81\x8d\x8f\x90\x9d"  # bytes that Windows-1252 gives no meaning
HIGH = bytes(ord("x") if byte >= 0x80 else ord(" ") for byte in range(256))


def pieces(path: Path, encoding: str = UTF8) -> Iterator[str]:
    """The text of a file, in pieces."""
    decoder = codecs.getincrementaldecoder(CODECS[encoding])()
    with open_bytes(path) as file:
        _refuse_utf16(path, file, encoding)
        try:
            while content := file.read(PIECE):
                yield decoder.decode(content)
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            for _ in lines(path, encoding):  # which knows the location
                pass
            raise DataError(f"{path} is not {encoding}. Save it as UTF-8.") from None


def byte_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file in UTF-8; only a newline ends one, other separators are text."""
    with open_bytes(path) as file:
        _refuse_utf16(path, file, UTF8)
        if file.peek(3).startswith(codecs.BOM_UTF8):
            file.read(3)
        yield from file


def lines(path: Path, encoding: str = UTF8) -> Iterator[str]:
    """The lines of a file as text."""
    if encoding != UTF8:
        yield from _other_lines(path, encoding)
        return
    for number, line in enumerate(byte_lines(path), start=1):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: {not_utf8(error)}") from None


def _other_lines(path: Path, encoding: str) -> Iterator[str]:
    with io.TextIOWrapper(open_bytes(path), CODECS[encoding], newline="\n") as file:
        try:
            yield from file
        except UnicodeDecodeError:
            raise DataError(f"{path} is not {encoding}. Save it as UTF-8.") from None


def _refuse_utf16(path: Path, file: io.BufferedReader, encoding: str) -> None:
    if encoding == UTF8 and file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise DataError(f"{path} looks like UTF-16. Save it as UTF-8.")


def not_utf8(error: UnicodeDecodeError) -> str:
    """Describe the byte of a line that is not UTF-8."""
    byte = f"byte 0x{error.object[error.start]:02x}"
    return f"{byte} is not UTF-8 (column {error.start + 1}). Save the file as UTF-8."
