"""Time the training step alone, on a model of a real shape with random weights made on the GPU.

python benchmarks/step.py --recompute none attn offload
"""

import argparse
import json
import math
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from contestants.ours import as_batch
from contestants.task import Micro, example_lengths, pack
from floors import STATE_BYTES, beside
from results import RESULTS, append_row, current_commit
from shapes import random_model
from torch import Tensor

from lit_qlora.device import let_segments_grow, peak_gib, pick_device, precede_other_streams, reset_peak
from lit_qlora.fused import fuse, why_not
from lit_qlora.fused.graphs import row_width
from lit_qlora.lora.layer import add_lora
from lit_qlora.model.gpt import GPT
from lit_qlora.settings import SCHEMES, LoRAConfig, OptimizerConfig, TrainConfig
from lit_qlora.train.optim import count_state_bytes, make_optimizer

WARM_UP = 6  # steps: kernels are compiled in the first, a graph is captured in the fifth
LONG = 3000.0  # milliseconds of a step whose launches are not worth another one


def measure(
    model: GPT, optimizer: torch.optim.Optimizer, batch: tuple[Tensor | None, ...], steps: tuple[int, int]
) -> dict[str, float]:
    """Milliseconds of the median, fastest and slowest step, and the peak in GiB; no step waits for the device.

    Args:
        steps: that warm up, and that are timed.
    """
    warm_up, timed = steps
    for _ in range(warm_up):
        _step(model, optimizer, batch)
    torch.cuda.synchronize()
    reset_peak(pick_device())
    events = [torch.cuda.Event(enable_timing=True) for _ in range(timed + 1)]
    events[0].record()
    for event in events[1:]:
        _step(model, optimizer, batch)
        event.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in pairwise(events))
    return {
        "median": statistics.median(times),
        "fastest": times[0],
        "slowest": times[-1],
        "host": _host_time(model, optimizer, batch) if statistics.median(times) < LONG else math.nan,
        "peak_gib": peak_gib(pick_device()),
    }


def _host_time(model: GPT, optimizer: torch.optim.Optimizer, batch: tuple[Tensor | None, ...]) -> float:
    """Milliseconds of the host to launch a step on an idle device, the median.

    Some 1,000 launches fit into a device's queue. Over several steps the host waits for the device at the next one.
    Five steps are timed, or as many as three seconds hold.
    """
    times: list[float] = []
    while len(times) < 5 and sum(times) < 3000:
        torch.cuda.synchronize()
        start = time.perf_counter()
        _step(model, optimizer, batch)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _step(model: GPT, optimizer: torch.optim.Optimizer, batch: tuple[Tensor | None, ...]) -> None:
    (model.loss(*batch) / batch[0].numel()).backward()
    optimizer.step()
    optimizer.zero_grad()


def describe(arguments: argparse.Namespace, setting: str) -> str:
    """Write the flags of a row as floors.py and tables.py read them."""
    learns = f"r{arguments.r} {','.join(arguments.targets)} dropout {arguments.dropout:g}"
    described = f"{arguments.quantize} {learns} recompute {setting}{' packed' if arguments.packed else ''}"
    described += " graphs" if arguments.graphs else ""
    if arguments.dequantized and setting != "plain":
        described += f" dequantized {arguments.dequantized}"
    if arguments.fp8 and setting != "plain":
        described += " fp8"
    if arguments.optimizer != "adamw":
        described += f" {arguments.optimizer}"
    return described


def main() -> None:
    """Measure each setting and append its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b", help="sizes of the model, see shapes.model_config")
    parser.add_argument("--quantize", choices=SCHEMES, default="bnb.nf4-dq", help="storage of the base")
    parser.add_argument("--r", type=int, default=16, help="rank of the adapters")
    parser.add_argument("--targets", nargs="+", default=["all"], help="layers that learn")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters' input")
    parser.add_argument("--rows", type=int, default=2, help="samples of a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sample")
    parser.add_argument("--packed", action="store_true", help="fill one row of rows x length tokens with short samples")
    parser.add_argument("--recompute", nargs="+", default=["none"], help="settings to measure, or 'plain'")
    parser.add_argument("--graphs", action="store_true", help="replay CUDA graphs, if there are few tokens")
    parser.add_argument("--dequantized", type=int, default=0, help="blocks whose weights are kept in 16 bit as well")
    parser.add_argument("--fp8", action="store_true", help="multiply with the frozen weights of the blocks in FP8")
    parser.add_argument("--optimizer", choices=STATE_BYTES, default="adamw", help="of the adapters")
    parser.add_argument("--steps", type=int, default=16, help="timed steps")
    parser.add_argument("--warm_up", type=int, default=WARM_UP, help="steps before them")
    parser.add_argument("--gib", type=float, help="let the GPU have no more memory than this")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the table that gets the rows")
    parser.add_argument("--commit", default=current_commit(), help="what was measured")
    parser.add_argument("--profile", action="store_true", help="say where the time of the last setting goes")
    arguments = parser.parse_args()

    let_segments_grow()  # as a run does
    if arguments.gib:
        share = arguments.gib * 2**30 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    model = random_model(arguments.shape, arguments.quantize, arguments.length)
    lora = LoRAConfig(r=arguments.r, alpha=2 * arguments.r, targets=tuple(arguments.targets), dropout=arguments.dropout)
    add_lora(model, lora)
    model.train()
    tokens = torch.randint(0, model.config.vocab_size, (arguments.rows, arguments.length + 1), device="cuda")
    batch: tuple[Tensor | None, ...] = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    samples = arguments.rows
    if arguments.packed:
        documents = pack(arguments.rows * arguments.length, iter(example_lengths(100_000)))
        batch, samples = as_batch(Micro(tokens[:, :-1].reshape(1, -1), documents)), len(documents)
    reason = why_not(model)
    if reason and set(arguments.recompute) != {"plain"}:
        raise SystemExit(f"The fast path is not taken: {reason}.")
    rows, length = tokens[:, :-1].shape if not arguments.packed else (1, arguments.rows * arguments.length)
    small = rows * row_width(model.config, length, arguments.packed) if arguments.graphs else 0
    if arguments.fp8 and (reason or arguments.dequantized):
        parser.error(f"--fp8 needs the fast path: {reason}" if reason else "--dequantized has no effect with --fp8.")
    fused = None if reason else fuse(model, small, arguments.fp8, arguments.dequantized)
    if fused and fused.ahead:
        precede_other_streams()
    chosen, train = OptimizerConfig(name=arguments.optimizer), TrainConfig(learning_rate=1e-4)
    flatten = fused.flatten if fused and "plain" not in arguments.recompute else None
    optimizer = make_optimizer(model.named_parameters(), chosen, train, flatten=flatten)
    for setting in arguments.recompute:
        if setting == "plain":
            model.fast = None
        elif fused:
            model.fast = fused
            fused.set_recompute([setting] * len(fused.blocks))
        torch.cuda.empty_cache()
        try:
            figures = measure(model, optimizer, batch, (arguments.warm_up, arguments.steps))
        except torch.OutOfMemoryError as error:
            print(f"{setting}: {error}", file=sys.stderr)
            continue
        with torch.no_grad():
            loss = model.loss(*batch)
        if not loss.isfinite():  # which would be as fast
            print(f"{setting}: the loss is no finite number", file=sys.stderr)
            continue
        count = arguments.rows * arguments.length
        row = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": arguments.commit,
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__.split("+")[0],
            "program": "step.py",
            "shape": arguments.shape,
            "micro_batch": arguments.rows,
            "tokens": arguments.length,
            "flags": describe(arguments, setting),
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
        each = f", {figures['median'] / samples:.2f} for a sample" if arguments.packed else ""
        print(f"  {figures['median']:.1f} ms{each}, host {figures['host']:.1f} ms", flush=True)
        pages = count_state_bytes(optimizer) if getattr(optimizer, "is_paged", False) else 0
        reserved = f", {torch.cuda.max_memory_reserved() / 1e9:.2f} GB reserved"
        print(f"  {beside(row)}{reserved}{f', and {pages / 1e9:.2f} GB in pages' if pages else ''}", flush=True)
    if arguments.profile:
        _profile(model, optimizer, batch)


def _profile(model: GPT, optimizer: torch.optim.Optimizer, batch: tuple[Tensor | None, ...]) -> None:
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
