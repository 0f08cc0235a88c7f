"""Time our training step beside the peers', on one GPU, and append the rows to results.csv.

Each contestant is a process of its own (benchmarks/contestant.py). Ours runs throughout; the peers follow one another
and take turns with ours. So a ratio compares neighbouring rounds on the same card. A peer that is not installed is
reported as missing. There is no padding, so every token counts.

python benchmarks/peers.py --peers unsloth                              # 2 x 2048, r 16 on all layers
python benchmarks/peers.py --workload short --r 8 --targets query,value --steps 2
python benchmarks/peers.py --workload packed --rows 1 --length 8192 --r 8 --targets query,value
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from contestants.task import Task
from results import RESULTS, append_row, current_commit, look_at_card
from shapes import SHAPES

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
}
"""What --peers names: the contestant, whether it computes activations again, our setting to hold it against."""


class MissingError(Exception):
    """A contestant that cannot run here."""


class Contestant:
    """A process that builds a model and then times rounds."""

    def __init__(self, task: Task, log: Path, patience: float) -> None:
        self.name = task.name + ("-checkpointing" if task.checkpointing else "")
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

    def round(self, steps: int, recompute: str) -> dict[str, float]:
        """Time `steps` steps, and read the state of the card while they run."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the answer says why it has stopped
            print(json.dumps({"steps": steps, "recompute": recompute}), file=self.process.stdin, flush=True)
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
        return f"  {name:34} {rate:8,.0f} tok/s ({spread:17}) {each:8.2f} ms/row {peak:6.2f} GiB  {' '.join(card)}"


def compare(task: Task, peers: list[str], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Let ours and each of `peers` take turns; print the tables and yield two rows for each finished peer.

    Raises:
        MissingError: if ours cannot run here.
    """
    logs = Path(task.dir).parent
    ours = Contestant(task, logs / "ours.log", arguments.patience)
    print(f"{ours.facts['gpu']}, torch {ours.facts['torch']}; ours was ready in {ours.facts['ready']} s", flush=True)
    for peer in peers:
        name, checkpointing, against = PEERS[peer]
        setting = arguments.ours or against
        try:
            other = Contestant(
                replace(task, name=name, checkpointing=checkpointing), logs / f"{peer}.log", arguments.patience
            )
            turns = {"ours": Turns([]), peer: Turns([])}
            for _ in range(arguments.rounds):
                turns["ours"].rounds.append(ours.round(arguments.steps, setting))
                turns[peer].rounds.append(other.round(arguments.steps, ""))
            other.end()
        except MissingError as error:
            if ours.process.poll() is not None:
                raise
            print(f"{peer}: missing. {error}", flush=True)
            continue
        ratios = [a / b for a, b in zip(turns["ours"].rates(), turns[peer].rates(), strict=True)]
        kept = f" dequantized {arguments.dequantized}" if arguments.dequantized else ""
        own = f"ours recompute {setting}{kept}{', no graphs' if arguments.no_graphs else ''}"
        version = f"{other.facts['version']}, ready in {other.facts['ready']} s"
        print(f"\n{task.workload}, against {peer} {version}, {other.facts['trainable']:,} parameters learn")
        print(turns["ours"].line(own))
        print(turns[peer].line(peer))
        print(f"  ours / {peer}: {statistics.median(ratios):.3f} ({min(ratios):.3f} - {max(ratios):.3f})", flush=True)
        described = {"ours": f"{own}, beside {peer}", peer: f"{peer} {other.facts['version']}"}
        for who in turns:
            yield row(task, ours.facts, turns[who], described[who], arguments.commit)
    ours.end()


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
        "micro_batch": task.rows if task.workload == "fixed" else 1,
        "tokens": {"fixed": task.length, "short": "40-512", "packed": task.rows * task.length}[task.workload],
        "flags": f"{task.workload} {base} r{task.r} {task.targets} dropout {task.dropout:g} {who}",
        "tokens_per_second": round(statistics.median(rates)),
        "slowest": round(min(rates)),
        "fastest": round(max(rates)),
        "peak_gib": round(max(one["peak_gib"] for one in turns.rounds), 2),
    }


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="whom ours is held against")
    parser.add_argument(
        "--workload", choices=["fixed", "short", "packed"], default="fixed", help="see contestants.task.Task"
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b", help="sizes of the model")
    parser.add_argument("--rows", type=int, default=2, help="samples of a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sample; packed: of a row, times --rows")
    parser.add_argument("--r", type=int, default=16, help="rank of the adapters")
    parser.add_argument("--targets", choices=["all", "query,value"], default="all", help="layers that learn")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters' input")
    parser.add_argument("--no_graphs", action="store_true", help="short: ours launches its kernels one by one")
    parser.add_argument("--dequantized", type=int, default=0, help="blocks whose weights ours keeps in 16 bit as well")
    parser.add_argument("--bf16", action="store_true", help="leave the base in 16 bit")
    parser.add_argument("--ours", default="", help="our recompute; by default what suits the peer's checkpointing")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a turn")
    parser.add_argument("--patience", type=float, default=240, help="seconds until a silent contestant is given up")
    parser.add_argument("--work_dir", type=Path, default=Path("/tmp/lit_qlora_bench"), help="where the weights go")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the table that gets the rows")
    parser.add_argument("--commit", default=current_commit(), help="what was measured")
    arguments = parser.parse_args()

    task = Task(
        name="ours",
        shape=arguments.shape,
        dir=str(arguments.work_dir / f"{arguments.shape}-hf"),
        workload=arguments.workload,
        rows=arguments.rows,
        length=arguments.length,
        r=arguments.r,
        targets=arguments.targets,
        quantize=not arguments.bf16,
        dropout=arguments.dropout,
        graphs=not arguments.no_graphs,
        dequantized=arguments.dequantized,
    )
    program = str(Path(__file__).with_name("contestant.py"))
    subprocess.run([sys.executable, program, json.dumps(asdict(replace(task, name="make")))], check=True)
    measured = False
    try:
        for one in compare(task, arguments.peers, arguments):
            append_row(arguments.results, one)
            measured = True
    except MissingError as error:
        raise SystemExit(f"ours: missing. {error}") from None
    if not measured:
        raise SystemExit("No peer could run.")


if __name__ == "__main__":
    main()
