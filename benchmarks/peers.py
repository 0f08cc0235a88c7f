"""Time our training step beside the peers', on one GPU, and append the rows to results.csv.

Each contestant is a process of its own (benchmarks/contestant.py). Ours runs throughout; the peers follow one another
and take turns with ours. So a ratio compares neighbouring rounds on the same card. A peer that is not installed is
reported as missing. There is no padding, so every token counts.

python benchmarks/peers.py --peers unsloth                              # 2 x 2048, r 16 on all layers
python benchmarks/peers.py --workload short --r 8 --targets query,value --steps 2
python benchmarks/peers.py --workload packed --rows 1 --length 8192 --r 8 --targets query,value
python benchmarks/peers.py --workload pairs --shape meta-llama/Llama-3.1-8B@8 --rows 4 --length 512 --peers trl-unsloth
python benchmarks/peers.py --peers unsloth ours-quantized --dequantized 32    # as a run does where there is memory
python benchmarks/peers.py --peers unsloth --shape Qwen/Qwen3-8B@12 --also '{"shape": "microsoft/phi-4@8"}' '{"r": 8}'
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from contestants.hf import HF_NAMES
from contestants.task import Task
from results import RESULTS, append_row, current_commit, look_at_card
from shapes import model_config

PEERS: dict[str, tuple[str, bool, str]] = {
    "unsloth": ("unsloth", False, "none"),
    "unsloth-checkpointing": ("unsloth", True, "offload"),
    "unsloth-varlen": ("unsloth-varlen", False, "none"),
    "peft": ("peft", False, "none"),
    "peft-checkpointing": ("peft", True, "offload"),
    "peft-liger": ("peft-liger", False, "none"),
    "peft-liger-checkpointing": ("peft-liger", True, "offload"),
    "litgpt": ("litgpt", False, "none"),
    "litgpt-checkpointing": ("litgpt", True, "offload"),
    "ours-quantized": ("ours", False, "none"),
    "trl-unsloth": ("trl-unsloth", False, "none"),
    "trl-unsloth-checkpointing": ("trl-unsloth", True, "offload"),
    "trl-unsloth-precomputed": ("trl-unsloth-precomputed", False, "none"),
    "trl-unsloth-precomputed-checkpointing": ("trl-unsloth-precomputed", True, "offload"),
}
"""What --peers names: the contestant, whether it computes activations again, our setting to hold it against.

Those of TRL are for the workload "pairs", and are the only ones for it. "ours-quantized" is ours without the weights
that --dequantized keeps in 16 bit."""

OTHERS = [name for name in PEERS if not name.startswith("ours")]


class MissingError(Exception):
    """A contestant that cannot run here."""


class Contestant:
    """A process that builds a model and then times rounds."""

    def __init__(self, task: Task, log: Path, patience: float) -> None:
        self.log, self.patience = log, patience
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("contestant.py")), json.dumps(asdict(task))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.facts = self._answer()

    def round(self, steps: int, seconds: float, recompute: str) -> dict[str, float]:
        """Time `steps` steps, again until `seconds` are over, and read the state of the card while they run."""
        assert self.process.stdin is not None
        wanted = {"steps": steps, "seconds": seconds, "recompute": recompute}
        with suppress(BrokenPipeError):  # the answer says why it has stopped
            print(json.dumps(wanted), file=self.process.stdin, flush=True)
        time.sleep(1.0)  # past the warm-up
        card = {name: float(value) for name, value in look_at_card().items() if value.replace(".", "", 1).isdigit()}
        return self._answer() | card

    def end(self) -> None:
        """Let the process end by itself."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _answer(self) -> dict[str, Any]:
        """Read the next line that begins with RESULT."""
        assert self.process.stdout is not None
        watch = threading.Timer(self.patience, self.process.kill)
        watch.start()
        try:
            for line in self.process.stdout:
                if line.startswith("RESULT "):
                    answer: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
                    if "missing" in answer:
                        raise MissingError(answer["missing"])
                    return answer
        finally:
            watch.cancel()
        last = self.log.read_text().strip().splitlines()[-1:]
        raise MissingError(f"stopped with status {self.process.wait()}: {' '.join(last)[:300]}  (see {self.log})")


@dataclass
class Turns:
    """Rounds of one contestant."""

    rounds: list[dict[str, float]]

    def rates(self) -> list[float]:
        """Tokens per second of each round."""
        return [1e3 * one["tokens"] / one["milliseconds"] for one in self.rounds]

    def line(self, name: str) -> str:
        """Format a line of the table."""
        rates, peak = self.rates(), max(one["peak_gib"] for one in self.rounds)
        each = statistics.median(one["milliseconds"] / one["examples"] for one in self.rounds)
        card = [
            f"{statistics.median(one[key] for one in self.rounds if key in one):.0f} {unit}"
            for key, unit in (("clocks.sm", "MHz"), ("power.draw", "W"), ("temperature.gpu", "C"))
            if any(key in one for one in self.rounds)
        ]
        spread = f"{min(rates):,.0f} - {max(rates):,.0f}"
        rate = statistics.median(rates)
        if watts := [one["power.draw"] for one in self.rounds if "power.draw" in one]:
            card.append(f"{1e3 * statistics.median(watts) / rate:.1f} J/1,000 tok")
        return f"  {name:34} {rate:8,.0f} tok/s ({spread:17}) {each:8.2f} ms/row {peak:6.2f} GiB  {' '.join(card)}"


Start = Callable[[Task], Contestant]


def compare(task: Task, peers: list[str], start: Start, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Let ours and each peer take turns; print the tables and yield two rows for each finished peer.

    Raises:
        MissingError: if ours cannot run here.
    """
    ours = start(task)
    print(f"{ours.facts['gpu']}, torch {ours.facts['torch']}; ours was ready in {ours.facts['ready']} s", flush=True)
    for peer in peers:
        setting = arguments.ours or PEERS[peer][2]
        try:
            other = start(as_peer(task, peer))
            turns = {"ours": Turns([]), peer: Turns([])}
            for _ in range(arguments.rounds):
                turns["ours"].rounds.append(ours.round(arguments.steps, arguments.seconds, setting))
                turns[peer].rounds.append(other.round(arguments.steps, arguments.seconds, setting))
            other.end()
        except MissingError as error:
            if ours.process.poll() is not None:
                raise
            print(f"{task.shape}, {peer}: missing. {error}", flush=True)
            continue
        ratios = [a / b for a, b in zip(turns["ours"].rates(), turns[peer].rates(), strict=True)]
        kept = f" dequantized {task.dequantized}" if task.dequantized else ""
        own = f"ours recompute {setting}{kept}{', no graphs' if arguments.no_graphs else ''}"
        own += ", FlashAttention 4" if ours.facts["flash_4"] else ""
        version = f"{other.facts['version']}, ready in {other.facts['ready']} s"
        learns = (
            f"r {task.r} on {task.targets}, {ours.facts['trainable']:,} and {other.facts['trainable']:,} parameters"
        )
        tokens = f"{task.rows} x {task.length}, {task.workload}, {'nf4-dq' if task.quantize else 'bf16'}"
        print(f"\n{task.shape}, {tokens}, {learns}, against {peer} {version}")
        print(turns["ours"].line(own))
        print(turns[peer].line(peer))
        print(f"  ours / {peer}: {statistics.median(ratios):.3f} ({min(ratios):.3f} - {max(ratios):.3f})", flush=True)
        described = {"ours": f"{own}, beside {peer}", peer: f"{peer} {other.facts['version']}"}
        for who in turns:
            yield row(task, ours.facts, turns[who], described[who], arguments.commit)
    ours.end()


def as_peer(task: Task, peer: str) -> Task:
    """The task as one of PEERS does it."""
    name, checkpointing, _ = PEERS[peer]
    return replace(task, name=name, checkpointing=checkpointing, dequantized=0)


def row(task: Task, facts: dict[str, Any], turns: Turns, who: str, commit: str) -> dict[str, Any]:
    """Make a row of results.csv from the rates of whole rounds."""
    base = "nf4-dq" if task.quantize else "bf16"
    rates = turns.rates()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "gpu": facts["gpu"],
        "torch": facts["torch"],
        "bitsandbytes": facts["version"],  # which is what ours tells
        "program": "peers.py",
        "shape": task.shape,
        "micro_batch": task.rows if task.workload in ("fixed", "pairs") else 1,
        "tokens": {
            "fixed": task.length,
            "short": "40-512",
            "packed": task.rows * task.length,
            "pairs": f"{task.length}+2x{task.answer}",
        }[task.workload],
        "flags": f"{task.workload} {base} r{task.r} {task.targets} dropout {task.dropout:g} {who}",
        "tokens_per_second": round(statistics.median(rates)),
        "slowest": round(min(rates)),
        "fastest": round(max(rates)),
        "peak_gib": round(max(one["peak_gib"] for one in turns.rounds), 2),
    }


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=OTHERS, help="whom ours is held against")
    parser.add_argument(
        "--workload", choices=["fixed", "short", "packed", "pairs"], default="fixed", help="see contestants.task.Task"
    )
    parser.add_argument("--shape", default="llama-2-7b", help="sizes of the model, see shapes.model_config")
    parser.add_argument(
        "--also",
        nargs="+",
        type=json.loads,
        default=[],
        help="JSON objects for further comparisons: fields of Task, and peers; then all start before the first turn",
    )
    parser.add_argument("--at_once", type=int, default=8, help="how many of them start at a time")
    parser.add_argument("--rows", type=int, default=2, help="samples of a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sample; packed: of a row, times --rows")
    parser.add_argument(
        "--answer", type=int, default=256, help="pairs: tokens of an answer behind --length of a prompt"
    )
    parser.add_argument("--r", type=int, default=16, help="rank of the adapters")
    parser.add_argument("--targets", choices=HF_NAMES, default="all", help="layers that learn")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters' input")
    parser.add_argument("--no_graphs", action="store_true", help="short: ours launches its kernels one by one")
    parser.add_argument("--dequantized", type=int, default=0, help="blocks whose weights ours keeps in 16 bit as well")
    parser.add_argument("--bf16", action="store_true", help="leave the base in 16 bit")
    parser.add_argument("--ours", default="", help="our recompute; by default what suits the peer's checkpointing")
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns of each; after many starts the first is often slow"
    )
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a turn")
    parser.add_argument("--seconds", type=float, default=3.0, help="least time of a turn; the steps are done again")
    parser.add_argument("--patience", type=float, default=240, help="seconds until a silent contestant is given up")
    parser.add_argument("--work_dir", type=Path, default=Path("/tmp/lit_qlora_bench"), help="where the weights go")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the table that gets the rows")
    parser.add_argument("--commit", default=current_commit(), help="what was measured")
    arguments = parser.parse_args()

    first = Task(
        name="ours",
        shape=arguments.shape,
        dir="",
        workload=arguments.workload,
        rows=arguments.rows,
        length=arguments.length,
        answer=arguments.answer,
        r=arguments.r,
        targets=arguments.targets,
        quantize=not arguments.bf16,
        dropout=arguments.dropout,
        graphs=not arguments.no_graphs,
        dequantized=arguments.dequantized,
    )
    peers = [changes.pop("peers", arguments.peers) for changes in ({}, *arguments.also)]
    tasks = [replace(first, **changes) for changes in ({}, *arguments.also)]
    tasks = [replace(task, dir=str(arguments.work_dir / f"{task.shape.replace('/', '--')}-hf")) for task in tasks]
    for task in tasks:
        model_config(task.shape)  # a name that is not known ends the program here
    wanted = list(zip(tasks, peers, strict=True))
    with ThreadPoolExecutor(arguments.at_once) as pool:
        folders = {task.dir: task for task in tasks}
        made = dict(zip(folders, pool.map(make, folders.values()), strict=True))
        wanted = [(task, peers) for task, peers in wanted if made[task.dir]]
        start = starter(wanted, arguments, pool)
        measured = sum([show(task, peers, start, arguments) for task, peers in wanted])
    if not measured:
        raise SystemExit("No peer could run.")


def make(task: Task) -> bool:
    """Write the checkpoint of a task in a process of its own, and tell whether that could be done."""
    program = str(Path(__file__).with_name("contestant.py"))
    done = subprocess.run([sys.executable, program, json.dumps(asdict(replace(task, name="make")))], check=False)
    if done.returncode:
        print(f"{task.shape}: missing. No checkpoint of it could be written, see above.", flush=True)
    return done.returncode == 0


def starter(wanted: list[tuple[Task, list[str]]], arguments: argparse.Namespace, pool: ThreadPoolExecutor) -> Start:
    """A function that returns a task's next contestant; those of several tasks were started before the first turn."""

    def start(task: Task, log: str) -> Contestant:
        return Contestant(task, arguments.work_dir / log, arguments.patience)

    if len(wanted) == 1:
        return lambda task: start(task, f"{task.name}{'-checkpointing' * task.checkpointing}.log")
    every = [one for task, peers in wanted for one in (task, *(as_peer(task, peer) for peer in peers))]
    started = [(task, pool.submit(start, task, f"{i}-{task.name}.log")) for i, task in enumerate(every)]
    wait([contestant for _, contestant in started])  # nothing else runs beside a turn
    ready: dict[Task, list[Future[Contestant]]] = {}
    for task, contestant in started:  # equal tasks have a process each, since each is ended
        ready.setdefault(task, []).append(contestant)
    return lambda task: ready[task].pop(0).result()


def show(task: Task, peers: list[str], start: Start, arguments: argparse.Namespace) -> int:
    """Compare, append the rows, and count them; a reason why ours cannot run here is printed."""
    measured = 0
    try:
        for one in compare(task, peers, start, arguments):
            append_row(arguments.results, one)
            measured += 1
    except MissingError as error:
        print(f"{task.shape}, ours: missing. {error}", flush=True)
    return measured


if __name__ == "__main__":
    main()
