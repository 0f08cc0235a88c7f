"""Time finetune/lora.py itself on a model of a real shape with random weights, and append a row to results.csv.

python benchmarks/finetune.py --shape llama-2-7b --flags "--quantize bnb.nf4-dq --lora.targets all --lora.r 16"

The weights are random, because speed and memory do not depend on them; they are made one tensor at a time.
Every sample has exactly --tokens tokens, so no padding is counted.
"""

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from results import RESULTS, ROOT, append_row, current_commit
from shapes import SHAPES, make_checkpoint


def make_data(path: Path, samples: int, tokens: int) -> None:
    """Write samples with prompts longer than `tokens`; cutting makes them fit exactly."""
    with path.open("w") as file:
        for i in range(samples):
            text = " ".join(str((i * 7919 + j * 104729) % 9973) for j in range(tokens))
            file.write(json.dumps({"instruction": text, "output": "The end."}) + "\n")


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run the command and read its log; the first three steps warm up and do not count."""
    checkpoint, data, out = work / arguments.shape, work / "data.jsonl", work / "out"
    make_checkpoint(arguments.shape, checkpoint)
    make_data(data, arguments.steps * arguments.micro_batch, arguments.tokens)
    shutil.rmtree(out, ignore_errors=True)
    settings = {
        "checkpoint_dir": checkpoint,
        "out_dir": out,
        "data.path": data,
        "data.prompt": "plain",
        "data.mask_prompt": "false",
        "data.max_length": arguments.tokens + 1,
        "data.val_fraction": 0,
        "train.batch_size": arguments.micro_batch,
        "train.micro_batch_size": arguments.micro_batch,
        "train.epochs": 1,
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    start = time.monotonic()
    subprocess.run([sys.executable, str(ROOT / "finetune/lora.py"), *flags, *shlex.split(arguments.flags)], check=True)
    total = time.monotonic() - start
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    rates = sorted(record["tokens_per_second"] for record in log[3:])
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": arguments.commit,
        "gpu": summary["gpu"],
        "torch": summary["versions"]["torch"],
        "bitsandbytes": summary["versions"]["bitsandbytes"],
        "program": "finetune/lora.py",
        "shape": arguments.shape,
        "micro_batch": arguments.micro_batch,
        "tokens": arguments.tokens,
        "flags": arguments.flags,
        "tokens_per_second": round(statistics.median(rates)),
        "slowest": round(rates[0]),
        "fastest": round(rates[-1]),
        "peak_gib": round(summary["peak_gib"], 2),
        "startup_s": round(total - summary["seconds"], 1),
    }


def main() -> None:
    """Measure once and append the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b", help="sizes of the model")
    parser.add_argument("--micro_batch", type=int, default=2, help="samples of a step")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a sample")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--flags", default="--quantize bnb.nf4-dq", help="further flags of finetune/lora.py")
    parser.add_argument("--work_dir", type=Path, default=Path("/tmp/lit_qlora_bench"), help="where the weights go")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the table that gets the row")
    parser.add_argument("--commit", default=current_commit(), help="what was measured")
    arguments = parser.parse_args()
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    row = measure(arguments, arguments.work_dir)
    append_row(arguments.results, row)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
