"""Make the tables in docs/measured.md from results.csv; the newest row of each setting counts.

python benchmarks/tables.py [--check]        # --check writes nothing; status 1 if docs/measured.md differs
"""

import argparse
import re
import sys
from dataclasses import dataclass
from itertools import pairwise

from results import ROOT, TABLE, read_rows

Row = dict[str, str]
GPU = "NVIDIA H100 80GB HBM3"
BEGIN, END = "<!-- made by benchmarks/tables.py -->\n", "<!-- end of what it made -->\n"


@dataclass(frozen=True)
class Setting:
    """A row of the tables, and the columns by which it finds its rows of results.csv."""

    model: str
    label: str
    program: str
    shape: str
    micro_batch: str
    tokens: str
    flags: str
    shows_peak: bool = True

    def newest(self, rows: list[Row]) -> Row | None:
        """Last of `rows` that measured this setting."""
        columns = ("program", "shape", "micro_batch", "tokens", "flags")
        wanted = {name: getattr(self, name) for name in columns}
        return next((row for row in reversed(rows) if wanted.items() <= row.items()), None)


def _step(
    label: str, recompute: str, rows: int = 2, length: int = 2048, base: str = "bnb.nf4-dq", **more: str
) -> Setting:
    """Describe a step of Llama-2-7B with adapters of rank 16 on all layers, or as `more` says."""
    learns = more.get("learns", "r16 all")
    return Setting(
        model=more.get("model", "Llama-2-7B"),
        label=label,
        program="step.py",
        shape=more.get("shape", "llama-2-7b"),
        micro_batch=str(rows),
        tokens=str(length),
        flags=f"{base} {learns} dropout 0 recompute {recompute}",
        shows_peak="graphs" not in recompute,  # whose memory was not counted in the older rows
    )


LLAMA_3 = {"model": "Llama-3-8B", "shape": "llama-3-8b"}
TINYLLAMA = {"model": "TinyLlama 1.1B", "shape": "tinyllama-1b", "base": "bnb.nf4"}
LLAMA_13B = {"model": "Llama-2-13B", "shape": "llama-2-13b"}
LLAMA_65B = {"model": "Llama-65B", "shape": "llama-1-65b", "learns": "r64 all"}
TRAINING = (
    *(_step(setting, setting) for setting in ("none", "attn", "offload", "full")),
    _step("none, 4 x 2048", "none", rows=4),
    _step("none, 4 x 2048, weights kept dequantised", "none dequantized 32", rows=4),
    _step("none, 1 x 4096", "none", rows=1, length=4096),
    _step("none, 1 x 8192", "none", rows=1, length=8192),
    _step("none, `--train.fp8 true`", "none fp8"),
    _step("none, weights kept dequantised", "none dequantized 32"),
    _step("none, bf16 base", "none", base="none"),
    _step("none, int8 base", "none", base="bnb.int8"),
    _step("none, packed row of 8,192, r 8 on query and value", "none packed", 1, 8192, learns="r8 query,value"),
    _step("the same, weights kept dequantised", "none packed dequantized 32", 1, 8192, learns="r8 query,value"),
    _step("none, packed row of 16,384, r 8 on query and value", "none packed", 1, 16384, learns="r8 query,value"),
    _step("none, one sample of 135 tokens, r 8 on query and value", "none", 1, 135, learns="r8 query,value"),
    _step("the same as CUDA graphs", "none graphs", 1, 135, learns="r8 query,value"),
    _step("the same, weights kept dequantised", "none graphs dequantized 32", 1, 135, learns="r8 query,value"),
    _step("plain path, `--train.fast false`", "plain"),
    Setting(
        model="Llama-2-7B",
        label="none, through `finetune/lora.py`, dropout 0.05",
        program="finetune/lora.py",
        shape="llama-2-7b",
        micro_batch="2",
        tokens="2048",
        flags="--quantize bnb.nf4-dq --lora.targets all --lora.r 16",
    ),
    _step("none, packed row of 2,048, weights kept dequantised", "none packed dequantized 22", 1, **TINYLLAMA),
    _step("the same as CUDA graphs", "none packed graphs dequantized 22", 1, **TINYLLAMA),
    *(_step(setting, setting, **LLAMA_3) for setting in ("none", "offload")),
    *(_step(f"{setting}, 1 x 8192", setting, 1, 8192, **LLAMA_3) for setting in ("none", "offload")),
    *(_step(setting, setting, **LLAMA_13B) for setting in ("none", "offload")),
    _step("full, 1 x 512, r 64, 8-bit paged AdamW", "full paged-adamw8bit", 1, 512, **LLAMA_65B),
    _step("offload, 1 x 512, r 64, 8-bit paged AdamW", "offload paged-adamw8bit", 1, 512, **LLAMA_65B),
)
ANSWERS = tuple(
    Setting("Llama-2-7B", label, "generate.py", "llama-2-7b", rows, "512", flags)
    for label, rows, flags in (
        ("nf4", "1", "ours bnb.nf4 default, 128 new tokens"),
        ("nf4-dq", "1", "ours bnb.nf4-dq default, 128 new tokens"),
        ("nf4-dq, eight texts together", "8", "ours bnb.nf4-dq default, 128 new tokens"),
        ("bf16", "1", "ours none default, 128 new tokens"),
        ("transformers and bitsandbytes, nf4-dq", "1", "transformers bnb.nf4-dq default, 64 new tokens"),
        ("transformers, bf16", "1", "transformers none default, 64 new tokens"),
    )
)
WORKLOADS = {
    "fixed nf4-dq r16 all dropout 0": "2 x 2048, r 16 on all linears",
    "packed nf4-dq r8 query,value dropout 0": "packed rows of 8,192, r 8 on query and value",
    "short nf4-dq r8 query,value dropout 0": "one short sample at a time, r 8 on query and value",
}
"""How the flags of a row of peers.py begin, and what that is called."""


def training(rows: list[Row]) -> tuple[list[str], list[Row]]:
    """Format the lines of a table; also return their rows."""
    lines = ["| model | recompute | tokens/s | slowest - fastest | peak GiB |", "|---|---|---:|---:|---:|"]
    used: list[Row] = []
    model = ""
    for setting in TRAINING:
        if row := setting.newest(rows):
            spread = f"{figure(row['slowest'])} - {figure(row['fastest'])}"
            peak = f"{float(row['peak_gib']):.1f}" if setting.shows_peak else ""
            named = "" if setting.model == model else setting.model
            lines.append(f"| {named} | {setting.label} | {figure(row['tokens_per_second'])} | {spread} | {peak} |")
            model = setting.model
            used.append(row)
    return lines, used


def beside(rows: list[Row]) -> tuple[list[str], list[Row]]:
    """Format ours beside each peer: the newest pair of rows, which peers.py appends one after the other."""
    lines = ["| | tokens/s | GiB | peer | tokens/s | GiB | ratio |", "|---|---:|---:|---|---:|---:|---:|"]
    used: list[Row] = []
    for begin, label in WORKLOADS.items():
        pairs: dict[tuple[str, bool], tuple[Row, Row]] = {}
        for ours, theirs in pairwise(rows):
            peer = re.fullmatch(re.escape(begin) + r" (\S+) \S+", theirs["flags"])
            if theirs["program"] == "peers.py" and peer and ours["flags"].endswith(f", beside {peer[1]}"):
                pairs[peer[1], "dequantized" in ours["flags"]] = ours, theirs
        for (_, kept), pair in pairs.items():
            used += pair
            ours_rate, their_rate = (float(row["tokens_per_second"]) for row in pair)
            ours_told, they_told = (
                f"{figure(row['tokens_per_second'])} | {float(row['peak_gib']):.1f}" for row in pair
            )
            name = pair[1]["flags"].removeprefix(begin).strip()
            workload = f"{label}, weights kept dequantised" if kept else label
            lines.append(f"| {workload} | {ours_told} | {name} | {they_told} | {ours_rate / their_rate:.3f} |")
    return lines, used


def answers(rows: list[Row]) -> tuple[list[str], list[Row]]:
    """Format the tokens per second of answers."""
    lines, used = ["| answers | tokens/s |", "|---|---:|"], []
    for setting in ANSWERS:
        if row := setting.newest(rows):
            lines.append(f"| {setting.label} | {figure(row['tokens_per_second'])} |")
            used.append(row)
    return lines, used


def figure(text: str) -> str:
    """Format a value with about four digits."""
    return f"{float(text):,.0f}" if float(text) >= 1000 else f"{float(text):.1f}"


def make(rows: list[Row]) -> str:
    """Text between the two markers."""
    rows = [row for row in rows if row["gpu"] == GPU]
    tables = [table(rows) for table in (training, beside, answers)]
    used = [id(row) for _, some in tables for row in some]

    def all_of(column: str) -> str:
        return ", ".join(dict.fromkeys(row[column] for row in rows if row[column] and id(row) in used))

    intros = (
        f"On one {GPU} with torch {all_of('torch')} and bitsandbytes {all_of('bitsandbytes')}, random weights, "
        f"{all_of('date')}; commits\n{all_of('commit')}. The training step (`benchmarks/step.py`), nf4-dq, LoRA r 16\n"
        "on all linears, 2 x 2048 tokens where nothing else is said: the median, the slowest and the fastest.\n"
        "`--train.recompute` is the dial; `auto` takes the fastest mix that fits.",
        "Beside others on the same card, in turns (`benchmarks/peers.py`):",
        "Answers of Llama-2-7B after 512 tokens, one text where nothing else is said (`benchmarks/generate.py`);\n"
        "newer ones of several texts are below:",
    )
    return "".join(f"{intro}\n\n" + "\n".join(lines) + "\n\n" for intro, (lines, _) in zip(intros, tables, strict=True))


def renew(readme: str, rows: list[Row]) -> str:
    """Return the page with new text between the markers."""
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, "docs/measured.md has lost a marker"
    return before + BEGIN + "\n" + make(rows) + END + after


def main() -> int:
    """Write docs/measured.md, or with --check compare it with the new text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    path, rows = ROOT / "docs/measured.md", read_rows(TABLE)
    text = path.read_text(encoding="utf-8")
    renewed = renew(text, rows)
    if check and renewed != text:
        print(
            "docs/measured.md is not what benchmarks/results.csv says. Run python benchmarks/tables.py.",
            file=sys.stderr,
        )
        return 1
    if not check:
        path.write_text(renewed, encoding="utf-8")
    for setting in (*TRAINING, *ANSWERS):
        if not setting.newest(rows):
            print(f"not measured yet: {setting.program}, {setting.model}, {setting.label}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
