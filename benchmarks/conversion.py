"""Compare the time of a conversion with `cp` of the same bytes, and measure its host memory.

python benchmarks/conversion.py --folder HUGGING_FACE_FOLDER --scratch EMPTY_FOLDER
"""

import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from lit_qlora import cli


@dataclass(frozen=True, kw_only=True)
class Config:
    """Convert a Hugging Face folder and copy it, in turns. Both end when the bytes are on the disk."""

    folder: Path
    """The model to convert."""
    scratch: Path
    """Where the copies go; on the disk that is to be measured. They are removed."""
    repeats: int = 3
    """Times that each is done."""
    measure_memory: bool = False
    """Convert once, in this process, and print the peak; what the program itself calls."""


def main(config: Config) -> None:
    """Print a row for each."""
    if config.measure_memory:
        print_peak(config)
        return
    files = [path for path in config.folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    size = sum(path.stat().st_size for path in files) / 1e9
    for _ in range(config.repeats):
        target = config.scratch / "copy"
        target.mkdir(parents=True)
        start = time.perf_counter()
        subprocess.run(["cp", *map(str, files), str(target)], check=True)
        subprocess.run(["sync", *map(str, target.iterdir())], check=True)
        copied = time.perf_counter() - start
        shutil.rmtree(target)
        again = [sys.executable, __file__, "--folder", str(config.folder), "--scratch", str(config.scratch)]
        shown = subprocess.run([*again, "--measure_memory"], check=True, capture_output=True, text=True).stdout.split()
        seconds, peak, anonymous = map(float, shown)
        print(
            f"{size:.2f} GB: cp {copied:.1f} s, conversion {seconds:.1f} s ({seconds / copied:.2f} x), "
            f"peak over the start {peak:.2f} GiB, of which {anonymous:.2f} not mapped files",
            flush=True,
        )


def print_peak(config: Config) -> None:
    """Convert; print the seconds, and the GiB by which resident and anonymous memory grew."""
    from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint

    def resident() -> tuple[int, int]:
        rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(rows["VmRSS"].split()[0]), int(rows["RssAnon"].split()[0])

    before = peak = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = tuple(map(max, peak, resident()))  # type: ignore[assignment]

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    convert_hf_checkpoint(config.folder, config.scratch / "converted", name="x/y")
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    shutil.rmtree(config.scratch / "converted")
    print(seconds, *((now - then) / 2**20 for now, then in zip(peak, before, strict=True)))


if __name__ == "__main__":
    cli.run(main, Config)
