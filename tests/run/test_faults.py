"""Whatever goes wrong, nothing is lost, and what to do is said. The numbers F.. are those of docs/faults.md."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.evaluate.measures import Losses
from lit_qlora.files.manifest import read_manifest
from lit_qlora.generation import decode
from lit_qlora.lora.adapter import read_adapter
from lit_qlora.run import saver, summary
from lit_qlora.run.resume import newest, read_log
from lit_qlora.signals import describe
from lit_qlora.train import loop
from tests.conftest import FSYNC
from tests.run.forked import STEPS, Start, at_save, ending, signals


def at_step(step: int, what: Callable[[], object]) -> Callable[[], None]:
    """For `before`: do something when the gradients of that step have been computed, before the update."""

    def patch() -> None:
        clip, seen = torch.nn.utils.clip_grad_norm_, [0]

        def hooked(*given: object, **options: object) -> object:
            seen[0] += 1
            norm = clip(*given, **options)
            result = what() if seen[0] == step else None
            return norm if result is None else result

        torch.nn.utils.clip_grad_norm_ = hooked  # what Fabric calls

    return patch


def slow_saves(seconds: float) -> Callable[[], None]:
    """For `before`: a disk that takes its time."""

    def patch() -> None:
        write = saver.state_files

        def hooked(*given: object) -> object:
            time.sleep(seconds)
            return write(*given)

        saver.state_files = hooked

    return patch


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name)
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_f06_f07_f08_f10_a_signal_saves_and_ends_the_run_after_its_step(
    start: Start, tmp_path: Path, whole: tuple[list[dict], bytes], number: signal.Signals, step: int
) -> None:
    out = tmp_path / "out"
    child = start(out, "--train.save_every=0", "--eval.best=none", before=at_step(step, signals(number)))
    assert child.wait() == 128 + number
    said = child.said.read_text()
    assert f"{describe(number)} at step {step}; go on with --resume auto" in said
    assert "Traceback" not in said
    assert newest(out).step == step
    assert start(out).wait() == 0
    assert ending(out) == whole


def test_f08_ctrl_c_twice_ends_at_once_and_leaves_the_checkpoints(start: Start, tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    child = start(tmp_path / "out", before=at_step(3, twice))
    assert child.wait() == 130
    assert "stopped by Ctrl-C" in child.said.read_text()
    assert newest(tmp_path / "out").step == 2


def test_f09_a_signal_during_a_save_lets_it_end(start: Start, tmp_path: Path, whole: tuple[list[dict], bytes]) -> None:
    out = tmp_path / "out"
    child = start(out, "--train.save_every=4", "--eval.best=none", before=slow_saves(0.5))
    child.wait_for(out / "log.jsonl")
    while len(read_log(out / "log.jsonl", 99)) < 6:  # two validations, four steps: it is saving
        time.sleep(0.005)
    child.kill(signal.SIGTERM)
    assert child.wait() == 143
    assert newest(out).step in (4, 5)
    assert start(out).wait() == 0
    assert ending(out) == whole


def test_f09_a_signal_during_a_validation_ends_it(
    start: Start, tmp_path: Path, whole: tuple[list[dict], bytes]
) -> None:
    out = tmp_path / "out"

    def patch() -> None:
        evaluate, seen = Losses.__call__, [0]

        def hooked(self: Losses, step: int) -> object:
            seen[0] += 1
            if seen[0] == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(self, step)

        Losses.__call__ = hooked

    child = start(out, "--train.save_every=0", before=patch)
    assert child.wait() == 143
    assert newest(out).step == 3
    assert [r["step"] for r in read_log(out / "log.jsonl", 99) if "val_loss" in r] == [0]
    assert start(out).wait() == 0
    assert ending(out) == whole


@pytest.mark.parametrize("where", ["the last step", "the last validation"])
def test_f09_a_signal_at_the_end_leaves_the_last_validation_to_the_same_command(
    start: Start, tmp_path: Path, whole: tuple[list[dict], bytes], where: str
) -> None:
    def patch() -> None:
        evaluate = Losses.__call__

        def hooked(self: Losses, step: int) -> object:
            if step == STEPS:
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(self, step)

        Losses.__call__ = hooked

    out = tmp_path / "out"
    child = start(out, before=at_step(STEPS, signals(signal.SIGTERM)) if where == "the last step" else patch)
    assert child.wait() == 143
    assert f"stopped by SIGTERM at step {STEPS}; go on with" in child.said.read_text()
    assert newest(out).path == out / "final"
    assert not (out / "summary.json").exists()
    assert start(out).wait() == 0
    assert ending(out) == whole
    assert not (tmp_path / "out.1").exists()


def test_f08_ctrl_c_twice_ends_at_once_also_after_another_signal(start: Start, tmp_path: Path) -> None:
    def thrice() -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)

    assert start(tmp_path / "out", before=at_step(3, thrice)).wait() == 130
    assert newest(tmp_path / "out").step == 2


def test_f09_a_signal_while_the_model_is_loaded_ends_at_once(start: Start, tmp_path: Path) -> None:
    from lit_qlora.checkpoint import quantized_cache

    def patch() -> None:
        quantized_cache.load_stored = lambda *given: os.kill(os.getpid(), signal.SIGTERM)

    child = start(tmp_path / "out", before=patch)
    assert child.wait() == 143
    assert child.said.read_text().endswith("\nstopped by SIGTERM\n")


def test_f10_nohup_keeps_the_run_going(start: Start, tmp_path: Path, whole: tuple[list[dict], bytes]) -> None:
    def patch() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        at_step(3, signals(signal.SIGHUP))()

    assert start(tmp_path / "out", before=patch).wait() == 0
    assert ending(tmp_path / "out") == whole


def test_f10_a_closed_stdout_does_not_end_the_run(
    start: Start, tmp_path: Path, whole: tuple[list[dict], bytes]
) -> None:
    def patch() -> None:
        read, write = os.pipe()
        os.dup2(write, 1)
        os.close(read)

    child = start(tmp_path / "out", before=patch)
    assert child.wait() == 0
    assert child.said.read_text() == ""
    assert ending(tmp_path / "out") == whole


def test_f10_a_terminal_that_is_gone_does_not_keep_a_signal_from_saving(
    start: Start, tmp_path: Path, whole: tuple[list[dict], bytes]
) -> None:
    def patch() -> None:
        read, write = os.pipe()
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.close(read)
        at_step(3, signals(signal.SIGHUP))()

    out = tmp_path / "out"
    assert start(out, "--train.save_every=0", "--eval.best=none", before=patch).wait() == 129
    assert newest(out).step == 3
    assert start(out).wait() == 0
    assert ending(out) == whole


def test_f09_a_signal_among_the_answers_of_a_validation_ends_them_after_a_token(start: Start, tmp_path: Path) -> None:
    def patch() -> None:
        chosen, seen = decode.choose, [0]

        def hooked(*given: object) -> torch.Tensor:
            seen[0] += 1
            (tmp_path / "seen").write_text(str(seen[0]))
            if seen[0] == 20:  # of the second validation; the first has 16
                os.kill(os.getpid(), signal.SIGTERM)
            return chosen(*given)

        decode.choose = hooked

    out, flags = tmp_path / "out", ["--eval.generate=1", "--eval.max_new_tokens=16", "--train.save_every=0"]
    child = start(out, *flags, before=patch)
    assert child.wait() == 143
    assert (tmp_path / "seen").read_text() == "20"
    assert child.said.read_text().endswith("stopped by SIGTERM at step 3; go on with --resume auto\n")
    assert newest(out).step == 3
    assert start(out, *flags).wait() == start(tmp_path / "unbroken", *flags).wait() == 0
    assert ending(out) == ending(tmp_path / "unbroken")


def test_f06_a_signal_among_the_micro_batches_of_a_step_gives_it_up_and_saves_the_one_before(
    start: Start, tmp_path: Path, whole: tuple[list[dict], bytes]
) -> None:
    def patch() -> None:
        pin, seen = loop.pinned, [0]

        def hooked(*given: object) -> object:
            seen[0] += 1
            (tmp_path / "seen").write_text(str(seen[0]))
            if seen[0] == 5:  # the first micro-batch of two in the third step
                os.kill(os.getpid(), signal.SIGTERM)
            return pin(*given)

        loop.pinned = hooked

    out = tmp_path / "out"
    child = start(out, "--train.save_every=0", "--eval.best=none", before=patch)
    assert child.wait() == 143
    assert (tmp_path / "seen").read_text() == "5"
    assert "stopped by SIGTERM at step 2; go on" in child.said.read_text()
    assert newest(out).step == 2
    assert start(out).wait() == 0
    assert ending(out) == whole


def test_f39_a_second_signal_during_a_slow_save_does_not_damage_it(
    start: Start, tmp_path: Path, whole: tuple[list[dict], bytes]
) -> None:
    out = tmp_path / "out"
    child = start(out, "--train.save_every=3", "--eval.best=none", before=slow_saves(0.6))
    child.wait_for(out / "log.jsonl")
    while len(read_log(out / "log.jsonl", 99)) < 4:
        time.sleep(0.005)
    for _ in range(2):
        child.kill(signal.SIGTERM)
        time.sleep(0.2)
    assert child.wait() == 143
    assert start(out).wait() == 0
    assert ending(out) == whole


# Disks


@pytest.mark.parametrize(
    "number",
    [
        errno.ENOSPC,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (errno.EFBIG, errno.EDQUOT, errno.EROFS)),
        errno.EIO,
    ],
)
@pytest.mark.parametrize("failing", ["open", "fsync", "rename"])
def test_f11_f13_a_save_that_fails_costs_only_itself(
    start: Start, tmp_path: Path, whole: tuple[list[dict], bytes], number: int, failing: str
) -> None:
    out = tmp_path / "out"

    def patch() -> None:
        import builtins

        home = builtins if failing == "open" else os
        real = getattr(home, failing)

        def fail(what: object, *rest: object, **options: object) -> object:
            place = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else str(what)
            if "step-000004" in place:
                raise OSError(number, os.strerror(number), place)
            return real(what, *rest, **options)

        setattr(home, failing, fail)

    child = start(out, before=patch)
    assert child.wait() == 6
    said = child.said.read_text()
    assert "step-000004" in said
    assert os.strerror(number) in said
    assert "Traceback" not in said
    assert not list(out.glob("*.tmp-*"))
    assert newest(out).step == 3
    assert start(out).wait() == 0
    assert ending(out) == whole


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_f11_a_disk_that_is_full_is_named(start: Start, tmp_path: Path, whole: tuple[list[dict], bytes]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        child = start(disk / "out", "--train.keep_last=9", "--skip_disk_check")
        assert child.wait() == 6
        said = (disk.parent / "disk" / "out.txt").read_text()
        assert "No space left on device" in said
        last = newest(disk / "out").step
        assert 0 < last < STEPS
        subprocess.run(["mount", "-o", "remount,size=40m", str(disk)], check=True)
        assert start(disk / "out", "--train.keep_last=9").wait() == 0
        assert ending(disk / "out") == whole
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_f12_a_disk_without_room_is_refused_before_anything_is_loaded(start: Start, tmp_path: Path) -> None:
    def patch() -> None:
        usage = shutil.disk_usage
        shutil.disk_usage = lambda path: usage(path)._replace(free=1_000)

    child = start(tmp_path / "out", before=patch)
    assert child.wait() == 6
    assert re.search(r"the checkpoints need up to [\d.]+ MB, and 0.0 MB are free", child.said.read_text())
    assert start(tmp_path / "out", "--skip_disk_check", before=patch).wait() == 0


def test_f28_two_runs_in_one_folder(start: Start, tmp_path: Path, whole: tuple[list[dict], bytes]) -> None:
    out, over = tmp_path / "out", tmp_path / "over"

    def stay() -> None:
        end = time.monotonic() + 60
        while not over.exists() and time.monotonic() < end:
            time.sleep(0.01)

    first = start(out, before=at_save(1, stay))
    first.wait_for(out / "step-000001")
    second = start(out)
    status = second.wait()
    over.touch()
    assert status == 6
    assert f"in use by the run with process id {first.pid}" in second.said.read_text()
    assert first.wait() == 0
    assert ending(out) == whole


def test_f33_a_log_that_is_moved_away_is_written_anew(
    start: Start, tmp_path: Path, whole: tuple[list[dict], bytes]
) -> None:
    out = tmp_path / "out"
    child = start(out, before=at_save(3, lambda: (out / "log.jsonl").rename(out / "log.jsonl.old")))
    assert child.wait() == 0
    assert child.said.read_text().count("was moved away; it is written anew") == 1
    assert ending(out) == whole


def wait_for_a_tracer() -> None:
    """Come back when another process traces this one, or none has in twenty seconds."""
    os.fsync = FSYNC
    end = time.monotonic() + 20
    while "TracerPid:\t0\n" in Path("/proc/self/status").read_text() and time.monotonic() < end:
        time.sleep(0.01)


def test_f38_everything_is_on_the_disk_before_it_gets_its_name(start: Start, tmp_path: Path) -> None:
    strace = shutil.which("strace")
    if not strace:
        pytest.skip("strace is not installed")
    out, trace = tmp_path / "out", tmp_path / "trace"
    child = start(out, "--train.save_every=4", "--eval.best=none", before=wait_for_a_tracer)
    tracer = subprocess.Popen(
        [strace, "-f", "-y", "-e", "trace=fsync,rename,renameat,renameat2", "-o", str(trace), "-p", str(child.pid)],
        stderr=subprocess.DEVNULL,
    )
    assert child.wait() == 0
    tracer.wait()
    calls = trace.read_text().splitlines()
    if not any("step-000004" in call for call in calls):
        pytest.skip("strace may not look at other processes here")
    saved = {
        r"step-000004\.state": {"train_state.safetensors", "state.json", "manifest.json"},
        "step-000004": {"adapter_model.safetensors", "manifest.json"},
    }
    named = []
    for name, files in saved.items():
        matches = [re.search(rf"fsync\(\d+<.*?/out/{name}\.tmp-[0-9a-f]+/?([^>]*)>", call) for call in calls]
        synced = [match[1] for match in matches if match]
        assert files <= set(synced)
        assert synced[-1] == ""  # the names in the directory, last
        named.append(next(i for i, call in enumerate(calls) if re.search(rf'rename.*{name}"', call)))
        assert re.search(rf"fsync\(\d+<{re.escape(str(out))}>", calls[named[-1] + 1])
    assert named == sorted(named)  # the state before the adapter


# Numbers


def test_f22_a_loss_that_is_not_finite_keeps_the_checkpoint_and_the_batch(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def patch() -> None:
        take, seen = loop.Gradients.__call__, [0]

        def hooked(*given: object) -> torch.Tensor:
            seen[0] += 1
            return take(*given) * (math.nan if seen[0] == 5 else 1)

        loop.Gradients.__call__ = hooked

    child = start(out, before=patch)
    assert child.wait() == 5
    said = child.said.read_text()
    assert "The loss is nan at step 5; the step was not taken." in said
    assert f"the newest checkpoint is {out / 'step-000004'}" in said
    bad = json.loads((out / "bad_batch.json").read_text())
    assert len(bad["samples"]) == len(bad["rows"]) == 4
    assert all("What is" in row["text"] for row in bad["rows"])
    assert newest(out).step == 4


def test_f23_gradients_that_are_not_finite_are_skipped_and_counted(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = at_step(3, lambda: torch.tensor(math.inf))
    assert start(out, "--train.keep_last=9", before=before).wait() == 0
    records = [r for r in read_log(out / "log.jsonl", 99) if "loss" in r]
    assert [r["step"] for r in records if r.get("skipped")] == [3]
    assert json.loads((out / "summary.json").read_text())["skipped_steps"] == 1
    second, third, fourth = (read_adapter(out / f"step-00000{n}").peft_tensors for n in (2, 3, 4))
    assert all(torch.equal(second[name], third[name]) for name in second)
    assert not all(torch.equal(third[name], fourth[name]) for name in second)


def test_f23_three_such_steps_in_a_row_end_the_run(start: Start, tmp_path: Path) -> None:
    def patch() -> None:
        torch.nn.utils.clip_grad_norm_ = lambda *given, **options: torch.tensor(math.nan)

    child = start(tmp_path / "out", before=patch)
    assert child.wait() == 5
    assert "not finite for 3 steps in a row, up to step 3" in child.said.read_text()


def test_f24_a_run_that_diverges_ends_and_names_its_last_checkpoint(start: Start, tmp_path: Path) -> None:
    def patch() -> None:
        take, seen = loop.Gradients.__call__, [0]

        def hooked(*given: object) -> torch.Tensor:
            seen[0] += 1
            return take(*given) * (4 if seen[0] > 6 else 1)

        loop.Gradients.__call__ = hooked

    child = start(tmp_path / "out", "--train.max_steps=40", "--guard.patience=3", before=patch)
    assert child.wait() == 5
    said = child.said.read_text()
    assert re.search(r"The loss diverged: [\d.]+ at step 9, for 3 steps more than 3 times its best average", said)
    assert f"the newest checkpoint is {tmp_path / 'out/step-000008'}" in said


def test_f29_a_validation_does_not_change_the_gradients(tiny_checkpoint: Path) -> None:
    """As bitsandbytes' 4-bit layers once did on processors with AVX512_BF16."""
    from lit_qlora.lora.layer import add_lora
    from lit_qlora.settings import LoRAConfig

    model = load_model(tiny_checkpoint, quantize="bnb.nf4")
    add_lora(model, LoRAConfig(dropout=0.0, targets=("all",)))
    tokens = torch.randint(1, 300, (2, 12), generator=torch.Generator().manual_seed(0))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model.train()
        model.loss(tokens, tokens).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    model.eval()
    with torch.no_grad():
        model.loss(tokens, tokens)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))


# Memory


def out_of_memory_above(rows: int) -> Callable[[], None]:
    """For `before`: a device on which so many rows fit."""
    from lit_qlora.model.gpt import GPT

    def patch() -> None:
        loss = GPT.loss

        def hooked(self: GPT, tokens: torch.Tensor, *rest: object) -> torch.Tensor:
            value = loss(self, tokens, *rest)
            if torch.is_grad_enabled() and len(tokens) > rows:
                value.backward()  # gradients are there already when memory runs out
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return value

        GPT.loss = hooked

    return patch


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_f25_where_memory_runs_out_the_step_is_done_again_with_fewer_rows(
    start: Start, tmp_path: Path, rows: int
) -> None:
    flags = ["--train.micro_batch_size=4", "--lora.dropout=0"]
    assert start(tmp_path / "whole", *flags).wait() == 0
    child = start(tmp_path / "out", *flags, before=out_of_memory_above(rows))
    assert child.wait() == 0
    assert "4 rows at a time did not fit; the step is repeated with 2" in child.said.read_text()
    records, expected = (ending(tmp_path / name)[0] for name in ("out", "whole"))
    for mine, theirs in zip(records, expected, strict=True):
        assert mine.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=1e-5)
        assert mine.get("grad_norm", 0) == pytest.approx(theirs.get("grad_norm", 0), rel=1e-4)


def test_f25_where_not_even_one_row_fits_what_would_help_is_said(start: Start, tmp_path: Path) -> None:
    child = start(tmp_path / "out", before=out_of_memory_above(0))
    assert child.wait() == 6
    said = child.said.read_text()
    assert "error: Out of memory. CUDA out of memory. Tried to allocate 2.00 GiB." in said
    assert re.search(r"To need less: .*--train.recompute full saves about [\d.e-]+ GiB", said)
    assert "Traceback" not in said


def test_f26_a_plan_that_does_not_fit_is_refused_before_anything_is_loaded(start: Start, tmp_path: Path) -> None:
    from lit_qlora.run import banner

    def patch() -> None:
        banner.gpu_bytes = lambda: 100_000

    child = start(tmp_path / "out", before=patch)
    assert child.wait() == 6
    assert re.search(r"The run needs about [\d.]+ GiB and the GPU has 0.0", child.said.read_text())
    assert "saves about" in child.said.read_text()
    assert not (tmp_path / "out").exists()


# Clocks and pictures


def test_f34_a_clock_that_is_set_back_does_not_matter(
    start: Start, tmp_path: Path, whole: tuple[list[dict], bytes]
) -> None:
    def patch() -> None:
        now, shift = time.time, [0.0]
        time.time = lambda: now() + shift[0]
        at_save(3, lambda: shift.__setitem__(0, -3600.0))()

    assert start(tmp_path / "out", before=patch).wait() == 0
    assert ending(tmp_path / "out") == whole
    assert all(r["seconds"] > 0 for r in read_log(tmp_path / "out/log.jsonl", 99) if "loss" in r)


def test_f36_a_report_that_fails_leaves_the_adapter(start: Start, tmp_path: Path) -> None:
    def patch() -> None:
        summary.write_pages = lambda *given: 1 / 0

    child = start(tmp_path / "out", before=patch)
    assert child.wait() == 0
    assert "there is no whole report (ZeroDivisionError: division by zero)" in child.said.read_text()
    assert read_manifest(tmp_path / "out/final")
    assert (tmp_path / "out/summary.json").exists()
