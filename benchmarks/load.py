"""Time the load of a quantised model from the disk onto the GPU: read, written to the cache, and read from the cache.

Each load is a process of its own; its imports do not count. The weights are random and just written, so the page cache
holds them.

python benchmarks/load.py
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from results import RESULTS, append_row, current_commit
from shapes import SHAPES, make_checkpoint

KINDS = {"read and quantised": "none", "read, quantised and kept": "CACHE", "from the cache": "CACHE"}


def load(arguments: argparse.Namespace, setting: str) -> dict[str, Any]:
    """Load once, in this process."""
    import torch

    from lit_qlora.checkpoint import quantized_cache
    from lit_qlora.quantize import Storage, bitsandbytes

    bitsandbytes()
    torch.zeros(1, device="cuda").item()  # starts the device
    start = time.perf_counter()
    storage = Storage(torch.bfloat16, arguments.quantize)
    model = quantized_cache.load(arguments.work_dir / arguments.shape, storage, torch.device("cuda"), setting)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    weights = sum(tensor.numel() * tensor.element_size() for tensor in quantized_cache.contents(model).values())
    return {
        "seconds": round(seconds, 2),
        "weights_gib": round(weights / 2**30, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__.split("+")[0],
    }


def main() -> None:
    """Load in each way, print a line for each time and append a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b", help="sizes of the model")
    parser.add_argument("--quantize", default="bnb.nf4-dq", help="storage of the base")
    parser.add_argument("--work_dir", type=Path, default=Path("/tmp/lit_qlora_bench"), help="where the weights go")
    parser.add_argument("--repeats", type=int, default=2, help="loads of each kind that reads; the first may be cold")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the table that gets the rows")
    parser.add_argument("--commit", default=current_commit(), help="what was measured")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(load(arguments, arguments.one)))
        return
    start = time.perf_counter()
    make_checkpoint(arguments.shape, arguments.work_dir / arguments.shape)
    print(f"the weights were made in {time.perf_counter() - start:.0f} s", flush=True)
    cache = arguments.work_dir / "quantized"
    shutil.rmtree(cache, ignore_errors=True)
    for kind, setting in KINDS.items():
        loads = []
        for _ in range(1 if kind == "read, quantised and kept" else arguments.repeats):
            command = [sys.executable, __file__, *_flags(arguments), "--one", setting.replace("CACHE", str(cache))]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            loads.append(json.loads(out.strip().splitlines()[-1]))
            print(f"  {kind:26} {loads[-1]}", flush=True)
        best = min(loads, key=lambda one: one["seconds"])
        row = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": arguments.commit,
            "gpu": best["gpu"],
            "torch": best["torch"],
            "bitsandbytes": version("bitsandbytes"),
            "program": "load.py",
            "shape": arguments.shape,
            "flags": f"{arguments.quantize} {kind}, best of {len(loads)}",
            "peak_gib": best["peak_gib"],
            "startup_s": best["seconds"],
        }
        append_row(arguments.results, row)


def _flags(arguments: argparse.Namespace) -> list[str]:
    return [
        *("--shape", arguments.shape, "--quantize", arguments.quantize),
        *("--work_dir", str(arguments.work_dir)),
    ]


if __name__ == "__main__":
    main()
