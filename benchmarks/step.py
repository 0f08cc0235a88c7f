"""Time the training step alone, on a model of a real shape with random weights made on the GPU.

python benchmarks/step.py --recompute none attn offload
"""

import argparse
import json
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune import RESULTS, SHAPES, append_row
from lit_qlora.config import ModelConfig
from lit_qlora.device import pick_device
from lit_qlora.fused import fuse, why_not
from lit_qlora.fused.graphs import padded_length
from lit_qlora.lora import add_lora
from lit_qlora.model import GPT
from lit_qlora.quantize import QuantizedLinear
from lit_qlora.settings import SCHEMES, LoRAConfig

WARM_UP = 6  # steps: kernels are compiled in the first, a graph is captured in the fifth


def random_model(shape: str, scheme: Any) -> GPT:
    """A bf16 model of `shape`, quantised layer by layer."""
    device = pick_device()
    with torch.device("meta"):
        model = GPT(ModelConfig(name=f"random/{shape}", **SHAPES[shape]))
    for path, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            norm = parameter.ndim == 1
            weight = torch.ones(parameter.shape) if norm else 0.02 * torch.randn(parameter.shape, device=device)
            weight = weight.to(device, torch.bfloat16)
            if scheme != "none" and type(module) is nn.Linear and path != "head":
                model.set_submodule(path, QuantizedLinear(weight, None, scheme))
            else:
                setattr(module, name, nn.Parameter(weight, requires_grad=False))
    return model


def measure(model: GPT, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, ...], steps: int) -> dict[str, float]:
    """Milliseconds of the median, fastest and slowest step, and the peak in GiB; nothing waits inside a step."""
    for _ in range(WARM_UP):
        _step(model, optimizer, batch)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    start = time.perf_counter()
    events[0].record()
    for event in events[1:]:
        _step(model, optimizer, batch)
        event.record()
    host = 1e3 * (time.perf_counter() - start) / steps
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in pairwise(events))
    return {
        "median": statistics.median(times),
        "fastest": times[0],
        "slowest": times[-1],
        "host": host,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def _step(model: GPT, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, ...]) -> None:
    (model.loss(*batch) / batch[1].numel()).backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    """Measure each setting and append its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b", help="sizes of the model")
    parser.add_argument("--quantize", choices=SCHEMES, default="bnb.nf4-dq", help="storage of the base")
    parser.add_argument("--r", type=int, default=16, help="rank of the adapters")
    parser.add_argument("--targets", nargs="+", default=["all"], help="layers that learn")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters' input")
    parser.add_argument("--rows", type=int, default=2, help="samples of a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sample")
    parser.add_argument("--recompute", nargs="+", default=["none"], help="settings to measure, or 'plain'")
    parser.add_argument("--graphs", action="store_true", help="replay CUDA graphs, if there are few tokens")
    parser.add_argument("--steps", type=int, default=16, help="timed steps")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the table that gets the rows")
    parser.add_argument("--commit", default="unknown", help="what was measured")
    parser.add_argument("--profile", action="store_true", help="say where the time of the last setting goes")
    arguments = parser.parse_args()

    model = random_model(arguments.shape, arguments.quantize)
    add_lora(
        model,
        LoRAConfig(r=arguments.r, alpha=2 * arguments.r, targets=tuple(arguments.targets), dropout=arguments.dropout),
    )
    model.train()
    tokens = torch.randint(0, model.config.vocab_size, (arguments.rows, arguments.length + 1), device="cuda")
    batch = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    reason = why_not(model)
    small = arguments.rows * padded_length(arguments.length) if arguments.graphs else 0
    fused = None if reason else fuse(model, graph_tokens=small)
    print(f"fast path: {reason or 'yes'}", flush=True)
    learners = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learners, lr=1e-4, fused=True)
    for setting in arguments.recompute:
        if setting == "plain":
            model.fast = None
        elif fused is not None:
            model.fast = fused.loss
            fused.set_recompute([setting] * len(fused.blocks))
        torch.cuda.empty_cache()
        try:
            figures = measure(model, optimizer, batch, arguments.steps)
        except torch.OutOfMemoryError as error:
            print(f"{setting}: {error}", file=sys.stderr)
            continue
        count = batch[0].numel()
        learns = f"r{arguments.r} {','.join(arguments.targets)} dropout {arguments.dropout:g}"
        described = f"{arguments.quantize} {learns} recompute {setting}{' graphs' if arguments.graphs else ''}"
        row = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": arguments.commit,
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__.split("+")[0],
            "program": "step.py",
            "shape": arguments.shape,
            "micro_batch": arguments.rows,
            "tokens": arguments.length,
            "flags": described,
            "tokens_per_second": round(1e3 * count / figures["median"]),
            "slowest": round(1e3 * count / figures["slowest"]),
            "fastest": round(1e3 * count / figures["fastest"]),
            "peak_gib": round(figures["peak_gib"], 2),
        }
        append_row(arguments.results, row)
        print(
            json.dumps({k: row[k] for k in ("flags", "tokens_per_second", "slowest", "fastest", "peak_gib")}),
            flush=True,
        )
        print(f"  {figures['median']:.1f} ms, host {figures['host']:.1f} ms", flush=True)
    if arguments.profile:
        _profile(model, optimizer, batch)


def _profile(model: GPT, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, ...]) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        _step(model, optimizer, batch)
        torch.cuda.synchronize()
    sums: dict[str, tuple[int, float]] = {}
    for event in recorded.events():
        if "cuda" in str(event.device_type).lower():
            calls, spent = sums.get(event.name, (0, 0.0))
            sums[event.name] = calls + 1, spent + event.time_range.elapsed_us()
    print(f"{sum(s for _, s in sums.values()) / 1e3:.1f} ms in {sum(c for c, _ in sums.values())} kernels")
    for name, (calls, spent) in sorted(sums.items(), key=lambda item: -item[1][1])[:28]:
        print(f"  {spent / 1e3:8.2f} ms {calls:5d} x {spent / calls:8.1f} us  {name[:100]}")


if __name__ == "__main__":
    main()
