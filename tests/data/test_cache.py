"""The cache of encoded sources: found again, never believed when it is not whole, never in the way."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_qlora.data import cache
from lit_qlora.data.cache import Encoded
from lit_qlora.data.load import encode_source
from lit_qlora.data.sources import Source
from lit_qlora.errors import DataError
from lit_qlora.prompts.style import STYLES, TemplateStyle
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.settings import DataConfig
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def _everything_is_worth_keeping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "WORTH_KEEPING", 1)


@pytest.fixture
def encode(tiny_checkpoint: Path, examples_file: Path, tmp_path: Path):
    """Encodes the examples, or another file, with the cache in tmp_path/cache."""

    def run(
        style: Any = STYLES["qa"],
        checkpoint: Path = tiny_checkpoint,
        max_length: int = 96,
        file: Path = examples_file,
        **settings: Any,
    ) -> Encoded:
        data = DataConfig(**{"path": str(file), "cache_dir": str(tmp_path / "cache")} | settings)
        return encode_source(Source(str(file)), data, checkpoint, Tokenizer(checkpoint), style, max_length)

    return run


def same(one: Encoded, other: Encoded) -> bool:
    arrays = [
        (getattr(one.samples, n), getattr(other.samples, n))
        for n in ("tokens", "trained", "starts", "ends", "labelled", "weight_sums")
    ]
    arrays += [(one.lengths, other.lengths), (one.digests, other.digests)]
    return all(np.array_equal(a, b) for a, b in arrays) and one.facts == other.facts


def test_what_was_encoded_is_found_again_and_is_the_same(encode) -> None:
    first, second = encode(), encode()
    assert (first.cached, second.cached) == (False, True)
    assert same(first, second)
    assert isinstance(second.samples.tokens, np.memmap)


def test_a_change_of_anything_that_matters_is_another_entry(
    encode, examples_file: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    encode()
    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    (other / "tokenizer_config.json").write_text("{}")
    for change in (
        {"style": STYLES["plain"]},
        {"checkpoint": other},
        {"max_length": 95},
        {"max_length_prompt": 90},
        {"max_length_answer": 90},
        {"overlong": "drop"},
        {"mask_prompt": False},
        {"only_last_answer": True},
        {"system": "Be kind."},
        {"format": "alpaca"},
        {"columns": "instruction:instruction,output:output"},
        {"on_error": "skip"},
        {"allow": "empty_answers"},
    ):
        assert not encode(**change).cached, change
        assert encode(**change).cached, change
    examples_file.write_text(examples_file.read_text().replace("plus", "and"))
    assert not encode().cached


def test_what_does_not_matter_is_the_same_entry(encode) -> None:
    encode()
    assert encode(seed=5, packing=True, weighting="samples", val_fraction=0.5, max_samples=3).cached


def test_a_template_that_says_the_date_is_encoded_again_on_another_day(encode, monkeypatch: pytest.MonkeyPatch) -> None:
    style = TemplateStyle("{{ strftime_now('') }}{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    assert not encode(style).cached
    assert encode(style).cached

    class Tomorrow:
        @staticmethod
        def today() -> str:
            return "tomorrow"

    monkeypatch.setattr("lit_qlora.data.load.date", Tomorrow)
    assert not encode(style).cached


@pytest.mark.parametrize("name", [*(f"{array}.bin" for array in cache.ARRAYS), "facts.json"])
@pytest.mark.parametrize("damage", ["missing", "shorter", "empty", "a byte"])
def test_an_entry_that_is_not_whole_is_not_believed_and_made_anew(
    encode, tmp_path: Path, name: str, damage: str
) -> None:
    spoken = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "weight": 0.5}]
    light = tmp_path / "light.jsonl"
    light.write_text(f"{json.dumps({'messages': spoken})}\n" * 4)
    whole = encode(file=light, val_fraction=0)
    assert whole.samples.weights is not None
    (folder,) = (tmp_path / "cache").iterdir()
    file = folder / name
    content = file.read_bytes()
    file.unlink()
    if damage == "a byte":
        at = content.index(b"sha256") if name == "facts.json" else len(content) // 2
        content = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    if damage != "missing":
        file.write_bytes({"a byte": content, "shorter": content[: len(content) // 2], "empty": b""}[damage])
    again = encode(file=light, val_fraction=0)
    assert not again.cached
    assert same(again, whole)
    assert encode(file=light, val_fraction=0).cached


def test_the_cache_may_be_deleted_while_it_is_used(encode, tmp_path: Path) -> None:
    first = encode()
    second = encode()
    shutil.rmtree(tmp_path / "cache")
    assert same(first, second)
    assert not encode().cached


@pytest.mark.parametrize("moment", ["_append", "_publish"])
def test_the_cache_may_be_deleted_while_it_is_written(
    encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    whole = encode(cache_dir="none")
    monkeypatch.setattr(cache, "AT_ONCE", 16)
    act, times = getattr(cache.Store, moment), []

    def after_deletion(self: cache.Store, *arguments: Any) -> None:
        times.append(moment)
        if moment == "_publish" or len(times) == 10:  # in the middle of the second round
            shutil.rmtree(tmp_path / "cache")
        act(self, *arguments)

    monkeypatch.setattr(cache.Store, moment, after_deletion)
    assert same(encode(), whole)
    monkeypatch.undo()
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("other", ["removes it", "has the same"])
def test_what_another_run_does_to_an_entry_at_its_birth_does_no_harm(
    encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    whole = encode(cache_dir="none")
    prune = cache.prune

    def meddle(folder: Path, keep: Path, mark: str) -> None:
        prune(folder, keep, mark)
        shutil.rmtree(keep)

    if other == "removes it":
        monkeypatch.setattr(cache, "prune", meddle)
        assert same(encode(), whole)
        return
    encode()
    found = cache.load
    monkeypatch.setattr(cache, "load", lambda *where: None)  # the other entry appears a moment later
    monkeypatch.setattr(cache.shutil, "rmtree", lambda *where, **how: None)
    assert same(encode(), whole)
    monkeypatch.setattr(cache, "load", found)
    assert encode().cached


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(encode, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    assert not encode(cache_dir=str(tmp_path / "file/cache")).cached
    assert not encode(cache_dir=str(tmp_path / "file/cache")).cached


@pytest.mark.parametrize("failing", range(1, 12))
def test_a_disk_that_fills_up_costs_the_entry_and_nothing_else(
    encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    whole = encode(cache_dir="none")
    monkeypatch.setattr(cache, "AT_ONCE", 16)
    calls = []

    class Filling(FileIO):
        def write(self, data: Any) -> int:
            calls.append(self.name)
            if len(calls) == failing:
                super().write(data[: len(data) // 2])  # some of it still had room
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(cache, "FileIO", Filling)
    assert same(encode(), whole)
    assert len(calls) >= failing
    assert not list((tmp_path / "cache").iterdir())


def test_the_cache_can_be_done_without(encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert not encode(cache_dir="none").cached
    assert not (tmp_path / "home").exists()
    encode(cache_dir="auto")
    assert encode(cache_dir="auto").cached
    assert (tmp_path / "home/lit_qlora/data").is_dir()


def test_few_samples_are_not_kept(encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "WORTH_KEEPING", 10**6)
    encode()
    assert not (tmp_path / "cache").exists()


def test_a_run_that_is_refused_leaves_nothing(encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "AT_ONCE", 16)
    add, taken = cache.Store.add, []

    def fail(self: cache.Store, sample: Any) -> None:
        taken.append(sample)
        if len(taken) > 30:
            raise DataError("too long")
        add(self, sample)

    monkeypatch.setattr(cache.Store, "add", fail)
    with pytest.raises(DataError):
        encode()
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_a_killed_run_left_is_removed_after_a_day(encode, tmp_path: Path) -> None:
    left = [tmp_path / "cache" / f"{name * 64}.1.unfinished" for name in ("a", "b")]
    for folder in left:
        folder.mkdir(parents=True)
    os.utime(left[0], (0, 0))
    encode()
    assert [folder.exists() for folder in left] == [False, True]


def test_an_entry_that_is_used_stays_and_one_that_is_not_goes_when_another_is_made(encode, tmp_path: Path) -> None:
    encode()
    encode(max_length=90)
    for entry in (tmp_path / "cache").iterdir():
        os.utime(entry, (0, 0))
    assert encode().cached
    encode(max_length=80)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert encode().cached
    assert not encode(max_length=90).cached


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_an_entry_whole_or_none(
    tiny_checkpoint: Path, examples_file: Path, tmp_path: Path
) -> None:
    rows = examples_file.read_text() * 400
    examples_file.write_text(rows)
    code = f"""
import sys
from pathlib import Path
from lit_qlora.data import cache
cache.WORTH_KEEPING = 1
from lit_qlora.data.load import encode_source
from lit_qlora.data.sources import Source
from lit_qlora.prompts.style import STYLES
from lit_qlora.settings import DataConfig
from lit_qlora.prompts.tokenizer import Tokenizer
base = Path({str(tiny_checkpoint)!r})
print("begin", flush=True)
found = encode_source(Source({str(examples_file)!r}), DataConfig(cache_dir={str(tmp_path / "cache")!r}), base,
                      Tokenizer(base), STYLES["qa"], 96)
print(found.cached, len(found.samples), int(found.samples.tokens.sum()), flush=True)
"""

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)

    expected = start().communicate()[0].split()[2:]
    shutil.rmtree(tmp_path / "cache")
    for delay in (0.05, 0.3, 0.6, 0.9, 1.1, 1.3):
        run = start()
        assert run.stdout
        run.stdout.readline()
        time.sleep(delay)
        os.kill(run.pid, signal.SIGKILL)
        run.communicate()
        entries = [folder for folder in (tmp_path / "cache").glob("*") if not folder.name.endswith(".unfinished")]
        for folder in entries:
            assert json.loads((folder / "facts.json").read_text())["arrays"]["ends"][0] == 16_000
        assert start().communicate()[0].split()[2:] == expected
        shutil.rmtree(tmp_path / "cache")
