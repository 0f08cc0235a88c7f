"""Measure as many settings as some minutes on a GPU allow, the most important first.

Each command is a process of its own; one that fails or takes too long is recorded and stops no other. A command that
ended well for this commit on this kind of GPU is not repeated; failed commands come last. --out receives results.csv
with the measurements, sessions.csv with the outcome of each command, and a folder of logs.

python benchmarks/session.py --minutes 8
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from results import ROOT, append_row, current_commit, look_at_card, read_rows

HERE = Path(__file__).parent
COLUMNS = ("date", "commit", "gpu", "command", "outcome", "seconds")
ATTEMPTS = 3  # times its usual seconds that a command may take
PEERS = "--rounds 2 --steps 6"
SHORT = "--r 8 --targets query,value"
SMALL = "--shape tinyllama-1b --quantize bnb.nf4 --rows 1 --packed --dequantized 22"
COMMANDS: tuple[tuple[int, str], ...] = (
    (90, "step.py --recompute none attn offload full"),
    (40, "step.py --rows 4 --recompute none offload"),
    (30, "step.py --rows 4 --dequantized 32"),
    (150, f"peers.py --peers unsloth {PEERS}"),
    (120, f"peers.py --peers unsloth --dequantized 32 {PEERS}"),
    (45, "generate.py --quantize bnb.nf4-dq"),
    (45, "step.py --rows 1 --length 4096 --recompute none offload full"),
    (45, "step.py --rows 1 --length 8192 --recompute none offload full"),
    (45, "step.py --rows 1 --recompute none offload full"),
    (45, "step.py --rows 1 --length 8192 --packed --r 8 --targets query value"),
    (45, "step.py --rows 1 --length 8192 --packed --r 8 --targets query value --dequantized 32"),
    (45, "step.py --rows 1 --length 16384 --packed --r 8 --targets query value"),
    (45, "step.py --fp8"),
    (45, "step.py --dequantized 32"),
    (60, "step.py --shape llama-3-8b --recompute none attn offload full"),
    (50, "step.py --shape llama-3-8b --rows 1 --recompute none offload full"),
    (50, "step.py --shape llama-3-8b --rows 1 --length 8192 --recompute none offload full"),
    (120, f"peers.py --peers unsloth --workload packed --rows 1 --length 8192 --dequantized 32 {SHORT} {PEERS}"),
    (120, f"peers.py --peers unsloth --workload short --dequantized 32 {SHORT} --rounds 2 --steps 2"),
    (150, f"peers.py --peers unsloth-checkpointing peft-liger-checkpointing litgpt-checkpointing {PEERS}"),
    (
        90,
        "step.py --shape llama-1-65b --r 64 --rows 1 --length 512 --optimizer paged-adamw8bit --recompute offload full",
    ),
    (60, "step.py --shape llama-2-13b --recompute none offload"),
    (45, "generate.py --quantize bnb.nf4"),
    (45, "generate.py --quantize none"),
    (45, "generate.py --quantize bnb.nf4-dq --rows 8"),
    (60, "generate.py --library transformers --quantize bnb.nf4-dq --tokens 64"),
    (60, "load.py"),
    (40, "step.py --rows 1 --length 135 --r 8 --targets query value"),
    (40, "step.py --rows 1 --length 135 --r 8 --targets query value --graphs"),
    (40, "step.py --rows 1 --length 135 --r 8 --targets query value --graphs --dequantized 32"),
    (120, 'finetune.py --flags "--quantize bnb.nf4-dq --lora.targets all --lora.r 16"'),
    (120, "curves.py"),
    (120, "evaluation.py --quantize bnb.nf4 --questions 64"),
    (40, f"step.py {SMALL}"),
    (40, f"step.py {SMALL} --graphs"),
    (40, "step.py --quantize none"),
    (40, "step.py --quantize bnb.int8"),
    (40, "step.py --recompute plain"),
    (40, "step.py --dropout 0.05"),
    (150, f"peers.py --peers peft peft-checkpointing peft-liger litgpt {PEERS}"),
    (120, f"peers.py --peers unsloth-varlen --workload packed --rows 1 --length 8192 {SHORT} {PEERS}"),
    (60, "generate.py --library transformers --quantize none --tokens 64"),
    (90, "step.py --shape llama-1-33b --recompute offload full"),
    (40, "speed.py --check"),
)
"""Usual seconds of a command, and the command; it is begun only if so much time is left."""


def session(commands: tuple[tuple[int, str], ...], arguments: argparse.Namespace, gpu: str, programs: Path) -> None:
    """Run the remaining commands until the time is over."""
    end = time.monotonic() + 60 * arguments.minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    table = arguments.out / "sessions.csv"
    known = {
        row["command"]: row["outcome"]
        for row in (*read_rows(HERE / "sessions.csv"), *read_rows(table))
        if (row["commit"], row["gpu"]) == (arguments.commit, gpu)
    }
    waiting = [one for one in commands if known.get(one[1]) != "done"]
    for seconds, command in sorted(waiting, key=lambda one: one[1] in known):
        left = end - time.monotonic()
        if left < seconds:
            print(f"no time for {command}, which takes {seconds} s", flush=True)
            continue
        print(f"\n== {command}", flush=True)
        start = time.monotonic()
        outcome = run(command, min(left, ATTEMPTS * seconds), arguments, programs)
        took = round(time.monotonic() - start)
        what = {"commit": arguments.commit, "gpu": gpu, "command": command, "outcome": outcome, "seconds": took}
        append_row(table, {"date": time.strftime("%Y-%m-%d")} | what, COLUMNS)
        print(f"-- {outcome}, {took} s", flush=True)


def run(command: str, limit: float, arguments: argparse.Namespace, programs: Path) -> str:
    """Run a command and its child processes for at most `limit` seconds, and return its outcome."""
    logs = arguments.out / "logs"
    logs.mkdir(exist_ok=True)
    log = logs / ("".join(letter if letter.isalnum() else "-" for letter in command)[:120] + ".log")
    environment = os.environ | {"COMMIT": arguments.commit, "RESULTS": str((arguments.out / "results.csv").resolve())}
    program, *flags = shlex.split(command)
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(programs / program), *flags],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit)
            outcome = "done" if status == 0 else f"status {status}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit:.0f} s"
        finally:  # also when this program is interrupted
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the contestants of peers.py too
            process.wait()
    print("\n".join(log.read_text(errors="replace").splitlines()[-12:]), flush=True)
    return outcome


def main() -> None:
    """Run a session on this machine's first GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="time that all may take together")
    parser.add_argument("--out", type=Path, default=HERE, help="where the two tables and the logs go")
    parser.add_argument("--commit", default=current_commit(), help="what is measured")
    arguments = parser.parse_args()
    if not (gpu := look_at_card().get("name", "")):
        raise SystemExit("There is no GPU here that nvidia-smi can see.")
    session(COMMANDS, arguments, gpu, HERE)


if __name__ == "__main__":
    main()
