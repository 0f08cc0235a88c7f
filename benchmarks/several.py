"""Train one adapter with several processes, with copies of the base and with shares of it, and time the steps.

Each case starts its processes by itself, one a GPU, over NCCL; where there are fewer GPUs, over gloo on these. It has
random weights, the same for any number of processes, and takes equal rows from one global batch. For a sharded base it
says how long a step takes without the gathers, which then computes nonsense as fast; for several processes also how
long it takes without sums of their gradients. A case that does not fit, or takes too long, is named and stops no other.

python benchmarks/several.py --processes 1 2                       # the first three groups of cases, on two GPUs
python benchmarks/several.py --cases speed --processes 1 2 4
python benchmarks/several.py --cases fits --processes 2 --gib 24
python benchmarks/several.py --cases rows --processes 1 2          # each row over the processes
python benchmarks/several.py --cases killed --processes 2
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

from results import RESULTS, ROOT, append_row, current_commit

LENGTH = 2048
WARM_UP = 3
"""Steps."""


@dataclass(frozen=True)
class Case:
    """A run of some processes.

    Attributes:
        rows: of a micro-batch of a process.
        parts: micro-batches of a process in a step.
        buffers: blocks of a sharded base that are in memory at a time.
        least: processes that it needs at least.
        shares_rows: the processes share each row, instead of each taking rows of its own.
        timed: steps that are timed.
        patience: seconds after which a process that waits for another gives up.
    """

    shape: str
    strategy: str
    rows: int = 2
    parts: int = 2
    buffers: int = 2
    r: int = 16
    quantize: str = "bnb.nf4-dq"
    quantize_head: bool = False
    optimizer: str = "adamw"
    recompute: str = "none"
    length: int = LENGTH
    least: int = 1
    timed: int = 6
    patience: int = 90
    seconds: int = 150
    shares_rows: bool = False
    warm_up: int = WARM_UP

    def describe(self, processes: int, gib: float | None) -> str:
        """The flags of its row."""
        more = f" head {self.quantize}" if self.quantize_head else ""
        more += f" {self.optimizer}" if self.optimizer != "adamw" else ""
        more += f" of {gib:g} GiB" if gib else ""
        more += f" {self.buffers} buffers" if self.buffers > 2 else ""
        more += f", each row over {processes}" if self.shares_rows else ""
        return (
            f"{self.strategy} x {processes}, {self.quantize} r{self.r} all recompute {self.recompute}, "
            f"{self.parts} micro-batches a step{more}"
        )


LONG = Case("llama-3-8b", "ddp", 1, 1, recompute="full", length=2**16, shares_rows=True, timed=2, warm_up=1)
GROUPS: dict[str, tuple[Case, ...]] = {
    "speed": (
        Case("llama-2-7b", "ddp"),
        Case("llama-2-7b", "sharded"),
        Case("llama-2-7b", "sharded", buffers=32, least=2),
        Case("llama-3-8b", "ddp"),
        Case("llama-3-8b", "sharded"),
    ),
    "equal": (Case("tinyllama-1b", "ddp", length=512, timed=17), Case("tinyllama-1b", "sharded", length=512, timed=17)),
    "fits": (
        Case("llama-2-70b", "sharded", rows=1, optimizer="adamw8bit", recompute="offload", least=2, seconds=200),
        Case("llama-2-70b", "sharded", rows=1, r=8, optimizer="adamw8bit", recompute="offload", least=2, seconds=200),
    ),
    "rows": (
        replace(LONG, length=2**15, timed=3),
        LONG,
        replace(LONG, strategy="sharded", least=2, seconds=220),
    ),
    "mixture": (Case("qwen3-30b-a3b-6-blocks", "ddp"), Case("qwen3-30b-a3b-6-blocks", "sharded")),
    "killed": (),
    "tiny": (
        Case("tiny", "ddp", length=32),
        Case("tiny", "sharded", length=32, least=2),
        Case("tiny", "ddp", length=32, shares_rows=True),
    ),
}  # fmt: skip
"""Groups by name; "fits" has 24 GiB for each process, unless --gib says otherwise."""
FIRST = ("speed", "equal", "fits")


# ------------------------------------------------------------------------------------------------ a process of a case


def work(case: Case, gib: float | None, die: bool) -> None:
    """Train as one of the processes, and let the first one print what it measured."""
    import torch
    from shapes import model_config
    from torch import distributed

    from lit_qlora.checkpoint.checkpoint import random_model
    from lit_qlora.device import let_segments_grow
    from lit_qlora.lora.layer import add_lora
    from lit_qlora.quantize import Storage
    from lit_qlora.settings import LoRAConfig, OptimizerConfig, TrainConfig
    from lit_qlora.sharded import RowParts
    from lit_qlora.train.optim import make_optimizer

    let_segments_grow()
    rank, processes, cuda = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), torch.cuda.is_available()
    alone = cuda and processes <= torch.cuda.device_count()  # else some share a GPU, which NCCL refuses
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        if gib:
            share = gib * 2**30 / torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    kind = "nccl" if alone else "gloo"
    own = {"device_id": device} if alone else {}
    distributed.init_process_group(kind, timeout=timedelta(seconds=case.patience), **own)
    config = model_config(case.shape)
    config = replace(config, block_size=max(config.block_size, case.length))
    storage = Storage(torch.bfloat16 if cuda else torch.float32, case.quantize, case.quantize_head)  # type: ignore[arg-type]
    begin = time.monotonic()
    shared = case.strategy == "sharded"
    on_host = shared and not config.tied_head
    model = random_model(config, storage, device, shared, on_host, case.buffers).requires_grad_(False)
    loaded = time.monotonic() - begin
    if case.shares_rows and processes > 1:
        model.rows = RowParts(processes)
    torch.manual_seed(1)
    add_lora(model, LoRAConfig(r=case.r, alpha=2.0 * case.r, targets=("all",), dropout=0.0))
    model.train()
    flatten = None
    if cuda:
        from lit_qlora.fused import fuse

        fused = fuse(model, ahead=model.gathers is None)
        fused.carries = False
        fused.set_recompute([case.recompute] * config.n_layer)  # type: ignore[list-item]
        flatten = fused.flatten
    else:
        model.recompute = True
    chosen, train = OptimizerConfig(name=case.optimizer), TrainConfig(learning_rate=1e-4)  # type: ignore[arg-type]
    optimizer = make_optimizer(model.named_parameters(), chosen, train, flatten=flatten)
    job = Job(case, model, optimizer, device, rank, processes)
    if die:
        job.until_killed(processes - 1)
    facts = job.measure() | {"loaded": round(loaded, 1)}
    if cuda:
        facts["planned_gib"] = planned(case, config, storage, processes)
        free, total = torch.cuda.mem_get_info(device)
        outside = total - free - torch.cuda.memory_reserved(device)
        facts["outside_of_torch_gib"] = round(outside / 2**30, 2)  # of CUDA, kernels and NCCL
    if rank == 0:
        print("FACTS " + json.dumps(facts), flush=True)
    distributed.barrier()
    distributed.destroy_process_group()


def planned(case: Case, config: Any, storage: Any, processes: int) -> float:
    """GiB that a run would plan for this."""
    from lit_qlora.device import pick_device
    from lit_qlora.run.plan import GIB, MicroBatches, Planner, Room
    from lit_qlora.settings import LoRAConfig, OptimizerConfig, TrainConfig
    from lit_qlora.sharded import LEAST_BUFFERS
    from lit_qlora.train.optim import measure_state_bytes

    train = TrainConfig(recompute=case.recompute, keep_dequantized=0, cuda_graphs="never")  # type: ignore[arg-type]
    optimizer = OptimizerConfig(name=case.optimizer)  # type: ignore[arg-type]
    state = measure_state_bytes(optimizer, train, pick_device())
    lora = LoRAConfig(r=case.r, alpha=2.0 * case.r, targets=("all",), dropout=0.0)
    sharded, parts = processes if case.strategy == "sharded" else 0, processes if case.shares_rows else 1
    planner = Planner(config, lora, storage, train, state, sharded=sharded, parts=parts)
    plan = planner.plan(MicroBatches(case.rows * case.length // parts, case.rows), Room(1e12, 1e12))
    more = plan.buffers - LEAST_BUFFERS  # with all this room
    cached = plan.cached * (case.buffers - LEAST_BUFFERS) / more if more else 0
    return round((plan.total - plan.cached + cached) / GIB, 2)


class Job:
    """The steps of a process."""

    def __init__(self, case: Case, model: Any, optimizer: Any, device: Any, rank: int, processes: int) -> None:
        self.case, self.model, self.optimizer, self.device = case, model, optimizer, device
        self.global_rank, self.world_size = rank, processes
        self.learners = [p for group in optimizer.param_groups for p in group["params"]]
        self.sums = True
        self.shares = 1 if case.shares_rows else processes  # of the rows of a step

    def batches(self, step: int) -> Iterator[Any]:
        """The micro-batches of this process: its rows of a global batch, which depends on the step alone."""
        import torch

        case, rows = self.case, self.case.rows * self.case.parts * self.shares
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, self.model.config.vocab_size, (rows, case.length + 1), generator=generator)
        yield from tokens[self.global_rank % self.shares :: self.shares].split(case.rows)

    def step(self, number: int) -> Any:
        """Take one; the sum of the losses of all processes, and of their tokens."""
        import torch
        from torch import distributed

        from lit_qlora.train.parallel import sum_gradients

        case = self.case
        labelled = case.rows * case.parts * self.shares * case.length
        total = torch.zeros((), device=self.device)
        for tokens in self.batches(number):
            if self.model.gathers is not None:
                self.model.gathers.begin()
            loss = self.model.loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()) / labelled
            loss.backward()
            total += loss.detach()
        if self.sums:
            sum_gradients(self, self.learners)  # type: ignore[arg-type]
        distributed.all_reduce(total)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def seconds(self, first: int, steps: int) -> tuple[float, list[Any]]:
        """Time of a step on average, and the losses."""
        self.wait()
        begin = time.monotonic()
        losses = [self.step(first + i) for i in range(steps)]
        self.wait()
        return (time.monotonic() - begin) / steps, losses

    def wait(self) -> None:
        """Let all processes be done with what was launched."""
        import torch
        from torch import distributed

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        distributed.barrier()

    def measure(self) -> dict[str, Any]:
        """Warm up, and time steps with and without gathers, and gathers alone."""
        from lit_qlora.device import peak_gib

        case = self.case
        _, first = self.seconds(0, case.warm_up)
        each, losses = self.seconds(case.warm_up, case.timed)
        tokens = case.rows * case.parts * case.length * self.shares
        facts = {
            "tokens_per_second": round(tokens / each),
            "step": round(each, 4),
            "peak_gib": round(peak_gib(self.device), 2),
            "losses": [round(float(loss), 6) for loss in (*first, *losses)],
        }
        if self.world_size > 1:
            self.sums = False
            facts["step_without_sums"] = round(self.seconds(0, case.timed)[0], 4)
            self.sums = True
        if self.model.rows is not None:
            facts |= self.exchanges()
        base = self.model.gathers
        if base is None:
            return facts
        facts["differs"], sent = base.differs(), base.sent
        self.step(0)
        facts["sent_per_micro_batch"] = (base.sent - sent) // case.parts
        facts["share_gib"] = round(sum(share.nbytes for share in base.shares) / 2**30, 3)
        facts["buffers_gib"] = round(sum(buffer.nbytes for buffer in base.buffers) / 2**30, 3)
        self.wait()
        begin = time.monotonic()
        base.begin()
        base.complete(backward=False)
        self.wait()
        facts["gathers_alone"] = round((time.monotonic() - begin) / len(base.slabs), 5)
        base.need = lambda block: None
        self.seconds(0, 1)
        facts["step_without_gathers"] = round(self.seconds(0, case.timed)[0], 4)
        return facts

    def exchanges(self) -> dict[str, Any]:
        """Bytes that a process sends a micro-batch to share rows, and the time of a step without sending."""
        rows, sent = self.model.rows, self.model.rows.sent
        self.step(0)
        exchange, rows.exchange = rows.exchange, lambda x: x.contiguous()  # as large, and nonsense
        each = self.seconds(0, self.case.timed)[0]
        rows.exchange = exchange
        sent = (rows.sent - sent) // self.case.parts
        return {"exchanged_per_micro_batch": sent, "step_without_exchanges": round(each, 4)}

    def until_killed(self, victim: int) -> None:
        """Take steps; the process `victim` kills itself in the middle of one."""
        for number in range(WARM_UP):
            self.step(number)
        self.wait()
        if self.global_rank == victim:
            need, calls = self.model.gathers.need, count()

            def last(block: int) -> None:
                if next(calls) == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                need(block)

            self.model.gathers.need = last
        self.seconds(WARM_UP, self.case.timed)


# ------------------------------------------------------------------------------------------------ all of them


def start(case: Case, processes: int, gib: float | None, die: bool = False) -> list[subprocess.Popen[str]]:
    """Start the processes of a case."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    given = json.dumps({"case": case.__dict__, "gib": gib, "die": die})
    return [
        subprocess.Popen(
            [sys.executable, __file__, "--work", given],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]


def finish(children: list[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str]]:
    """Status and output of each process. Processes that are left after some seconds are killed."""
    end, found = time.monotonic() + seconds, []
    for child in children:
        try:
            said, _ = child.communicate(timeout=max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            for other in children:
                other.kill()
            said = child.communicate()[0] + f"\nkilled after {seconds:g} s"
        found.append((child.returncode, said))
        if child.returncode:  # the others wait for it
            end = min(end, time.monotonic() + 20)
    return found


def run(case: Case, processes: int, gib: float | None, results: Path, commit: str) -> None:
    """Run a case, print its facts and append its row."""
    found = finish(start(case, processes, gib), case.seconds)
    lines = [line for line in found[0][1].splitlines() if line.startswith("FACTS ")]
    print(f"{case.shape}, {case.rows} x {case.length}: {case.describe(processes, gib)}")
    if not lines or any(status for status, _ in found):
        worst = next((said for status, said in found if status), found[0][1])
        print("  failed: " + "\n          ".join(worst.strip().splitlines()[-6:]), flush=True)
        return
    facts = json.loads(lines[-1].removeprefix("FACTS "))
    print("  " + ", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    row = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "gpu": gpu_name(),
        "torch": torch_version(),
        "program": "several.py",
        "shape": case.shape,
        "micro_batch": case.rows,
        "tokens": case.length,
        "flags": case.describe(processes, gib),
        "tokens_per_second": facts["tokens_per_second"],
        "peak_gib": facts["peak_gib"],
        "startup_s": facts["loaded"],
    }
    append_row(results, row)


def killed(processes: int) -> None:
    """Kill a process in the middle, once in a bare loop and once in a run, which half as many processes resume."""
    case = Case("tiny", "sharded", length=32, patience=20)
    children = start(case, processes, None, die=True)
    found = finish(children, case.patience + 60)
    print(f"killed, bare loop: statuses {[status for status, _ in found]}")
    print("  first process: " + "\n    ".join(found[0][1].strip().splitlines()[-3:]), flush=True)
    out = ROOT / "out" / "several"
    shutil.rmtree(out, ignore_errors=True)
    flags = (
        "--strategy sharded --quantize bnb.nf4-dq --data.path finetune/demo --train.max_steps 60 --train.save_every 5"
    )
    command = ["finetune/lora.py", *shlex.split(flags), "--out_dir", str(out), "--train.batch_size", "8"]
    begin = time.monotonic()
    agent = torchrun(processes, command)
    newest = wait_for(out, agent)
    if newest is None:
        print("the run saved nothing:\n" + agent.communicate()[0][-2000:])
        return
    victim = children_of(agent.pid)[-1]
    os.kill(victim, signal.SIGKILL)
    at = time.monotonic()
    said, _ = agent.communicate(timeout=300)
    print(
        f"killed, a run: status {agent.returncode} {time.monotonic() - at:.1f} s after the kill of one of {processes}"
    )
    print("\n".join(line for line in said.splitlines() if "error" in line.lower())[-1500:], flush=True)
    half = torchrun(max(1, processes // 2), command)
    said, _ = half.communicate(timeout=300)
    print(f"resumed with {max(1, processes // 2)}: status {half.returncode}, {time.monotonic() - begin:.0f} s in all")
    print("\n".join(said.strip().splitlines()[-4:]), flush=True)


def torchrun(processes: int, command: list[str]) -> subprocess.Popen[str]:
    """Start a command as torchrun does."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [*launcher, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(out: Path, agent: subprocess.Popen[str]) -> Path | None:
    """The first checkpoint of a run."""
    for _ in range(2400):
        if found := sorted(out.glob("step-??????")):
            return found[0]
        if agent.poll() is not None:
            return None
        time.sleep(0.1)
    return None


def children_of(pid: int) -> list[int]:
    """Process ids of the children of a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        fields = path.read_text().rpartition(")")[2].split()
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return sorted(found)


def gpu_name() -> str:
    """Name of the first GPU, or "CPU"."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def torch_version() -> str:
    """The version of torch."""
    import torch

    return torch.__version__.split("+")[0]


def main() -> None:
    """Run the cases for each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=GROUPS, default=FIRST, help="groups of cases")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="one case each, on as many GPUs")
    parser.add_argument("--gib", type=float, help="let each process have no more of its GPU than this")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no case after these")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the table that gets the rows")
    parser.add_argument("--commit", default=current_commit(), help="what was measured")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        given = json.loads(arguments.work)
        work(Case(**given["case"]), given["gib"], given["die"])
        return
    end = time.monotonic() + 60 * arguments.minutes
    for group in arguments.cases:
        gib = arguments.gib or (24.0 if group == "fits" else None)
        if group == "killed":
            killed(max(arguments.processes))
        for case in GROUPS[group]:
            for processes in arguments.processes:
                if processes < case.least:
                    continue
                if time.monotonic() + 0.5 * case.seconds > end:
                    print(f"no time: {case.shape}, {case.describe(processes, gib)}")
                    continue
                # One process alone takes as many rows in a step as all would.
                parts = case.parts * (max(arguments.processes) // processes if group == "equal" else 1)
                run(replace(case, parts=parts), processes, gib, arguments.results, arguments.commit)


if __name__ == "__main__":
    main()
