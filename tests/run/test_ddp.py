"""Several processes learn what one learns."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_qlora.data import Batch, Step
from lit_qlora.evaluate import measures
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.lora.adapter import read_adapter
from lit_qlora.run import learning, plan
from lit_qlora.run.resume import newest
from lit_qlora.train import loop, watch
from tests.conftest import tiny_model, write_checkpoint, write_tokenizer
from tests.run.forked import STEPS, Child, Start, at_save, ending, signals

WITH_TRITON = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")


@pytest.fixture
def start_ranks(start: Start) -> Callable[..., list[Child]]:
    """Begins a run in several processes, as torchrun does."""

    def begin(
        out: Path, *flags: str, ranks: int = 2, before: Callable[[int], Callable[[], object] | None] | None = None
    ) -> list[Child]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def enter(rank: int) -> None:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "GROUP_RANK": "0",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": "none",
                "TORCHELASTIC_USE_AGENT_STORE": "False",
            }
            if before and (patch := before(rank)):
                patch()

        return [start(out, *flags, before=lambda rank=rank: enter(rank)) for rank in range(ranks)]

    return begin


def relative_difference(one: Path, other: Path) -> tuple[float, float]:
    """The largest of the losses, norms and validations, and of the adapters' tensors."""
    records = zip(ending(one)[0], ending(other)[0], strict=True)
    metrics = [(a[key], b[key]) for a, b in records for key in ("loss", "grad_norm", "val_loss") if key in a]
    mine, theirs = (read_adapter(path / "final").peft_tensors for path in (one, other))
    return (
        max(abs(a - b) / abs(b) for a, b in metrics),
        max(float((mine[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs),
    )


EQUAL = ["--lora.dropout=0", "--train.batch_size=6"]


@pytest.mark.parametrize(
    ("scheme", "ranks"), [("none", 2), ("bnb.nf4", 2), pytest.param("bnb.int8", 3, marks=pytest.mark.slow)]
)
def test_several_processes_learn_what_one_does(
    start: Start, start_ranks: Callable[..., list[Child]], tmp_path: Path, scheme: str, ranks: int
) -> None:
    flags = [*EQUAL, f"--quantize={scheme}"]
    assert start(tmp_path / "one", *flags).wait() == 0
    children = start_ranks(tmp_path / "out", *flags, ranks=ranks)
    assert [child.wait() for child in children] == [0] * ranks, children[0].said.read_text()
    metrics, tensors = relative_difference(tmp_path / "out", tmp_path / "one")
    assert metrics < 1e-5
    assert tensors < 1e-3  # Adam turns a rounding of a tiny gradient into a step
    assert children[0].said.read_text().count("next    python scripts/merge_lora.py") == 1


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A complete checkpoint of a model with experts."""
    experts = {"n_expert": 4, "n_expert_per_token": 2, "expert_size": 64, "router_normalized": True}
    model = tiny_model(family="qwen3_moe", qk_norm="head", **experts)
    directory = write_checkpoint(tmp_path / "mixture", model)
    write_tokenizer(directory)
    return directory


def take_the_fast_path() -> None:
    """Without a GPU, for kernels in the interpreter."""
    plan.Planner._slow_because = lambda self, room: ""  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["plain", pytest.param("fast", marks=[WITH_TRITON, pytest.mark.timeout(900)])])
def test_several_processes_learn_with_experts_what_one_does(
    start: Start, start_ranks: Callable[..., list[Child]], tmp_path: Path, mixture: Path, path: str
) -> None:
    flags = [*EQUAL, f"--checkpoint_dir={mixture}", "--lora.targets=[all,router]", "--quantize=bnb.nf4"]
    flags += ["--train.router_balance_loss=0.01", "--train.router_z_loss=0.001"]
    before = take_the_fast_path if path == "fast" else None
    one = start(tmp_path / "one", *flags, before=before)
    assert one.wait() == 0
    children = start_ranks(tmp_path / "out", *flags, before=lambda rank: before)
    assert [child.wait() for child in children] == [0, 0], children[0].said.read_text()
    assert all(f"path    {path}" in child.said.read_text() for child in (one, children[0]))
    metrics, tensors = relative_difference(tmp_path / "out", tmp_path / "one")
    assert metrics < 1e-5
    assert tensors < 1e-3


def test_nothing_but_gradients_and_a_few_metrics_travels(
    start_ranks: Callable[..., list[Child]], tmp_path: Path
) -> None:
    """Quantised weights are buffers, which torch's own DDP would send before every forward pass."""

    def before(rank: int) -> Callable[[], object]:
        def patch() -> None:
            wrapper = torch.nn.parallel.DistributedDataParallel
            wrapper.__init__ = lambda *given, **more: pytest.fail("this one sends buffers")
            for name in ("all_reduce", "broadcast"):
                real = getattr(torch.distributed, name)

                def counted(tensor: torch.Tensor, *given: Any, real: Any = real, **more: Any) -> Any:
                    with open(tmp_path / f"sent-{rank}", "a") as file:
                        print(tensor.numel(), file=file)
                    return real(tensor, *given, **more)

                setattr(torch.distributed, name, counted)

        return patch

    children = start_ranks(tmp_path / "out", *EQUAL, "--quantize=bnb.nf4", "--eval.every=99", before=before)
    assert [child.wait() for child in children] == [0, 0], children[0].said.read_text()
    trainable = sum(tensor.numel() for tensor in read_adapter(tmp_path / "out/final").peft_tensors.values())
    for rank in range(2):
        sent = sum(int(line) for line in (tmp_path / f"sent-{rank}").read_text().split())
        assert trainable * (STEPS + 1) <= sent < 1.05 * trainable * (STEPS + 1)


def test_the_fast_path_learns_the_same_in_several_processes(
    start: Start, start_ranks: Callable[..., list[Child]], tmp_path: Path
) -> None:
    def fast(rank: int = 0) -> Callable[[], object]:
        def patch() -> None:
            plan.Planner._slow_because = lambda *given: ""  # type: ignore[method-assign]  # Triton's interpreter takes what a GPU would

        return patch

    flags = [*EQUAL, "--train.max_steps=3"]
    assert start(tmp_path / "one", *flags).wait() == 0
    children = start_ranks(tmp_path / "out", *flags, before=fast)
    said = children[0].said
    assert [child.wait() for child in children] == [0, 0], said.read_text()
    assert "path    fast" in said.read_text()
    assert "plain after all" not in said.read_text()
    metrics, tensors = relative_difference(tmp_path / "out", tmp_path / "one")
    assert metrics < 1e-4
    assert tensors < 1e-2


def test_memory_may_run_out_in_one_process_alone(
    start: Start, start_ranks: Callable[..., list[Child]], tmp_path: Path
) -> None:
    def before(rank: int) -> Callable[[], object] | None:
        def patch() -> None:
            take = loop.Gradients._take

            def small(self: loop.Gradients, step: Any, batches: list[Batch], *given: Any) -> torch.Tensor | None:
                if max(len(batch.tokens) for batch in batches) > 1:
                    raise torch.OutOfMemoryError
                return take(self, step, batches, *given)

            loop.Gradients._take = small  # type: ignore[method-assign]

        return patch if rank == 1 else None

    assert start(tmp_path / "one", *EQUAL).wait() == 0
    children = start_ranks(tmp_path / "out", *EQUAL, before=before)
    assert [child.wait() for child in children] == [0, 0], children[0].said.read_text()
    assert "the step is repeated with 1" in children[1].said.read_text()
    metrics, tensors = relative_difference(tmp_path / "out", tmp_path / "one")
    assert metrics < 1e-5
    assert tensors < 1e-3


def test_a_run_goes_on_with_another_number_of_processes(
    start: Start, start_ranks: Callable[..., list[Child]], tmp_path: Path
) -> None:
    assert start(tmp_path / "one", *EQUAL).wait() == 0
    assert start(tmp_path / "out", *EQUAL, before=at_save(5, signals(signal.SIGKILL))).wait() == -signal.SIGKILL
    assert [child.wait() for child in start_ranks(tmp_path / "out", *EQUAL)] == [0, 0]
    metrics, tensors = relative_difference(tmp_path / "out", tmp_path / "one")
    assert metrics < 1e-5
    assert tensors < 1e-3


def test_a_signal_to_one_process_stops_all_after_the_same_step(
    start: Start, start_ranks: Callable[..., list[Child]], tmp_path: Path
) -> None:
    def before(rank: int) -> Callable[[], object] | None:
        return at_save(3, signals(signal.SIGTERM)) if rank == 1 else None

    children = start_ranks(tmp_path / "out", *EQUAL, before=before)
    assert [child.wait() for child in children] == [143, 143]
    assert newest(tmp_path / "out").step in (3, 4)  # it comes while the others may be a step further
    assert [child.wait() for child in start_ranks(tmp_path / "out", *EQUAL)] == [0, 0]
    assert start(tmp_path / "one", *EQUAL).wait() == 0
    assert relative_difference(tmp_path / "out", tmp_path / "one")[0] < 1e-5


@pytest.mark.parametrize("signalled", [0, 1])
@pytest.mark.slow
def test_a_signal_to_one_process_during_the_answers_of_a_validation_stops_all(
    start_ranks: Callable[..., list[Child]], tmp_path: Path, signalled: int
) -> None:
    def before(rank: int) -> Callable[[], object] | None:
        def patch() -> None:
            measure, seen = measures.Dispensable.__call__, [0]

            def hooked(self: measures.Dispensable, step: int) -> object:
                seen[0] += 1
                if seen[0] == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                return measure(self, step)

            measures.Dispensable.__call__ = hooked  # type: ignore[method-assign]

        return patch if rank == signalled else None

    flags = [*EQUAL, "--eval.generate=1", "--eval.max_new_tokens=4", "--train.save_every=0"]
    children = start_ranks(tmp_path / "out", *flags, before=before)
    assert [child.wait() for child in children] == [143, 143], children[0].said.read_text()
    assert newest(tmp_path / "out").step == 3
    for name in ("out", "whole"):
        assert [child.wait() for child in start_ranks(tmp_path / name, *flags)] == [0, 0]
    assert ending(tmp_path / "out") == ending(tmp_path / "whole")


def test_where_the_folder_cannot_be_taken_no_process_begins(
    start_ranks: Callable[..., list[Child]], tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("a file")
    children = start_ranks(tmp_path / "out", *EQUAL)
    assert [child.wait() for child in children] == [6, 6]
    said = children[0].said.read_text()
    assert f"error: out_dir {tmp_path / 'out'} cannot be written" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_that_dies_ends_the_run_with_a_message_and_without_a_hang(
    start_ranks: Callable[..., list[Child]], tmp_path: Path, dead: int
) -> None:
    def before(rank: int) -> Callable[[], object] | None:
        return at_save(3, signals(signal.SIGKILL)) if rank == dead else None

    children = start_ranks(tmp_path / "out", *EQUAL, before=before)
    statuses = [child.wait() for child in children]
    assert statuses[dead] == -signal.SIGKILL
    assert statuses[1 - dead] == 6
    assert "error: Another process of this run has ended" in children[0].said.read_text()
    assert newest(tmp_path / "out").step == 3


@pytest.mark.slow
def test_a_process_that_never_comes_to_a_step_ends_the_run_and_is_named(
    start_ranks: Callable[..., list[Child]], tmp_path: Path
) -> None:
    def before(rank: int) -> Callable[[], object]:
        def patch() -> None:
            watch.EVERY = 0.1
            steps = learning.steps

            def stuck(*given: Any) -> Iterator[Step]:
                for number, step in enumerate(steps(*given)):
                    if rank and number == 2:
                        os.read(os.pipe()[0], 1)
                    yield step

            learning.steps = stuck

        return patch

    children = start_ranks(tmp_path / "out", *EQUAL, "--collective_timeout=3", before=before)
    assert [child.wait() for child in children] == [6, 6]
    for child in children:
        said = child.said.read_text()
        assert "error: Process 1 has not moved for 3 s (collective_timeout), and others wait for it." in said
        assert ", in stuck (test_ddp.py:" in said
        assert "; process 0 is in " in said
