"""Read and append the rows of results.csv, the table of all measurements."""

import csv
import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "results.csv"
RESULTS = Path(os.environ.get("RESULTS") or TABLE)
"""Where programs append by default; session.py sets the variable."""
COLUMNS = (
    *("date", "commit", "gpu", "torch", "bitsandbytes", "program", "shape", "micro_batch", "tokens", "flags"),
    *("tokens_per_second", "slowest", "fastest", "peak_gib", "startup_s"),
)


def append_row(results: Path, row: dict[str, Any], columns: tuple[str, ...] = COLUMNS) -> None:
    """Append a row to the table; unknown columns stay empty."""
    new = not results.is_file()
    with results.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def read_rows(results: Path) -> list[dict[str, str]]:
    """All rows, oldest first; none without a file."""
    if not results.is_file():
        return []
    with results.open(newline="") as file:
        return list(csv.DictReader(file))


def current_commit() -> str:
    """Name the measured commit: the variable COMMIT, or the commit of this working tree, or "unknown"."""
    if given := os.environ.get("COMMIT"):
        return given
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:  # a machine without git
        return "unknown"
    return done.stdout.strip() or "unknown"


def look_at_card() -> dict[str, str]:
    """Name, clock in MHz, power in W and temperature of the first GPU, as nvidia-smi reads them; nothing without it."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    names = ("name", "clocks.sm", "power.draw", "temperature.gpu")
    command = ["nvidia-smi", "-i", first, f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    try:
        values = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split(", ")
        return dict(zip(names, values, strict=True))
    except (OSError, subprocess.CalledProcessError, ValueError):
        return {}
