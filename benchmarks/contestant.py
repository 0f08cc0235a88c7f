"""Run one contestant of benchmarks/peers.py: build its model once, then time a round of steps for each line of input.

A line of standard input is a JSON object {"steps": 8, "seconds": 3, "recompute": "none"}. The answer is a line that
begins with "RESULT". Output of libraries may stand between answers. All contestants do the same work: the same random
tokens, adapters in float32 or the library's dtype, fused AdamW, one micro-batch after the other, no clipping. The peak
is that of allocated memory in the timed steps, and what CUDA graphs hold beside it.

python benchmarks/contestant.py '{"name": "peft", "dir": "/tmp/lit_qlora_bench/llama-2-7b-hf", ...}'  (see Task)
"""

import importlib
import json
import os
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

from contestants.task import Micro, Task, make_steps
from shapes import make_hf_checkpoint

CONTESTANTS: dict[str, tuple[str, dict[str, bool], str]] = {
    "ours": ("ours", {}, "bitsandbytes"),
    "peft": ("peft", {}, "peft"),
    "peft-liger": ("peft", {"liger": True}, "liger-kernel"),
    "unsloth": ("unsloth", {}, "unsloth"),
    "unsloth-varlen": ("unsloth", {"varlen": True}, "unsloth"),
    "litgpt": ("litgpt", {}, "litgpt"),
    "trl-unsloth": ("trl", {}, "trl"),
    "trl-unsloth-precomputed": ("trl", {"precomputed": True}, "trl"),
}
"""For each name its module in contestants, what else that is told, and the distribution whose version counts."""
WARM_UP = 5  # times that the first steps are not timed, in which ours sees a shape often enough to capture it


def tell(**facts: Any) -> None:
    """Answer the lines of peers.py."""
    print("\nRESULT " + json.dumps(facts), flush=True)


def compete(task: Task) -> None:
    """Build, then answer line by line until the input ends."""
    start = time.monotonic()
    try:
        module, options, distribution = CONTESTANTS[task.name]
        built = importlib.import_module(f"contestants.{module}").build(task, **options)
        library = version(distribution)
    except Exception as error:  # whatever a library of others may raise
        traceback.print_exc()
        reason = str(error).strip() or "no reason given"
        tell(missing=f"{type(error).__name__}: {reason.splitlines()[0][:200]}")
        return
    model, loss = built.model, built.loss
    import torch

    from lit_qlora.device import peak_gib, pick_device, reset_peak
    from lit_qlora.fused import flash_4

    device, adapters = pick_device(), [p for p in model.parameters() if p.requires_grad]
    optimizer = built.optimizer or torch.optim.AdamW(adapters, lr=1e-4, fused=True)
    data: list[list[Micro]] = []

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def step(micros: list[Micro]) -> None:
        for micro in micros:
            (loss(micro) / len(micros)).backward()
        optimizer.step()
        optimizer.zero_grad()

    for micros in make_steps(task, 1) * 2:
        step(micros)  # compiles and tunes what is not yet; several contestants can do so at once
    wait()
    torch.cuda.empty_cache()
    tell(
        ready=round(time.monotonic() - start, 1),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        torch=torch.__version__.split("+")[0],
        version=library,
        trainable=sum(p.numel() for p in adapters),
        flash_4=torch.cuda.is_available() and not flash_4.why_not(torch.cuda.get_device_capability(), 128),
    )
    recompute, first = "none", True
    for line in sys.stdin:
        wanted = json.loads(line)
        data = data or make_steps(task, wanted["steps"])
        if built.set_recompute and wanted["recompute"] != recompute:
            recompute, first = wanted["recompute"], True  # graphs of other passes are of no use
            built.set_recompute(recompute)
        # Warms the card, and at first what is compiled or captured on first use.
        untimed = data if task.workload == "short" else data[:2]
        for micros in untimed * WARM_UP if first else data[:2]:
            step(micros)
        first = False
        wait()
        reset_peak(device)
        begin = time.perf_counter()  # a round takes seconds, so events would say the same
        spent, times = 0.0, 0
        while not times or spent < wanted["seconds"]:
            for micros in data:
                step(micros)
            wait()
            spent, times = time.perf_counter() - begin, times + 1
        if not loss(data[0][0]).isfinite():  # which would be as fast
            tell(missing=f"the loss of {task.name} is no finite number")
            return
        tell(
            milliseconds=1e3 * spent,
            tokens=times * sum(micro.ids.numel() for micros in data for micro in micros),
            examples=times * sum(len(micro.documents or micro.ids) for micros in data for micro in micros),
            peak_gib=peak_gib(device),
        )
        torch.cuda.empty_cache()  # for the other, whose turn it is; does nothing without a GPU


if __name__ == "__main__":
    asked = Task(**json.loads(sys.argv[1]))
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", f"{asked.dir}-compiled-{os.getpid()}")  # several run at once
    make_hf_checkpoint(asked.shape, Path(asked.dir)) if asked.name == "make" else compete(asked)
