"""A run that was stopped, however it was stopped, goes on to the same end, bit for bit."""

import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_qlora.evaluate.measures import Losses
from lit_qlora.files.hashing import hash_file
from lit_qlora.files.manifest import read_manifest
from lit_qlora.run import folder, learning, saver
from lit_qlora.run.resume import checkpoints, newest, read_log, write_log
from lit_qlora.run.states import beside
from lit_qlora.settings import OPTIMIZERS, SCHEMES
from tests.conftest import tiny_model, write_checkpoint, write_tokenizer
from tests.run.forked import STEPS, Start, at_save, ending, signals


def leave(killed: Path, out: Path) -> None:
    """Put the killed run where a test goes on with it."""
    shutil.copytree(killed, out, symlinks=True)


def stopped(start: Start, out: Path, *flags: str, step: int = 5, save: int = 1) -> None:
    """A run of other settings that was killed when it had saved its checkpoint of `step`."""
    child = start(out, *flags, f"--train.save_every={save}", before=at_save(step, signals(signal.SIGKILL)))
    assert child.wait() == -signal.SIGKILL


def as_earlier_versions(out: Path) -> None:
    """Put the state of each checkpoint of a run into the folder of its adapter."""
    for state in out.glob("*.state"):
        adapter = state.with_suffix("")
        facts, own = (json.loads((folder / "manifest.json").read_text()) for folder in (adapter, state))
        (state / "manifest.json").unlink()
        shutil.copytree(state, adapter, dirs_exist_ok=True)
        shutil.rmtree(state)
        del facts["state"]
        facts["files"] |= own["files"]
        (adapter / "manifest.json").write_text(json.dumps(facts))


# kill -9


def kill_and_go_on(start: Start, out: Path, longest: float, kills: int) -> int:
    """Kill runs at random moments and go on with them, until so many were killed; returns how many runs ended."""
    generator, killed, ended = random.Random(7), 0, 0
    while True:
        child = start(out)
        end = time.monotonic() + generator.random() * longest
        while time.monotonic() < end and child.running():
            time.sleep(0.001)
        if child.running() and killed < kills:
            child.kill()
            killed += 1
            child.wait()
            if not (out / "summary.json").exists():  # else it had nothing left to do
                continue
        else:
            assert child.wait() == 0, child.said.read_text()
        ended += 1
        if killed >= kills:
            return ended
        yield_ending(out)


def yield_ending(out: Path) -> None:
    """Make room for the next run, keeping this one."""
    out.rename(out.with_name(f"{out.name}-{time.monotonic_ns()}"))


@pytest.mark.parametrize("kills", [12, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_f01_kill_9_at_any_moment_costs_nothing(start: Start, tmp_path: Path, kills: int) -> None:
    begin = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    longest = 1.2 * (time.monotonic() - begin)
    expected = ending(tmp_path / "whole")
    runs = kill_and_go_on(start, tmp_path / "killed", longest, kills)
    ends = [ending(path) for path in tmp_path.glob("killed*") if (path / "summary.json").exists()]
    assert len(ends) == runs
    assert [number for number, end in enumerate(ends) if end != expected] == []
    assert not list(tmp_path.glob("killed*/*.tmp-*"))


TOUCHES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink"}


def at_touch(number: int, out: Path, begin: Callable[[Callable[[], None]], None]) -> Callable[[], None]:
    """For `before`: kill -9 at the touch of this number of a file in OUT.

    Args:
        begin: has what it is given called when the count is to begin.
    """

    def patch() -> None:
        left, counts = [number], [False]

        def hook(name: str, arguments: tuple[object, ...]) -> None:
            if counts[0] and name in TOUCHES and str(out) in str(arguments[0]):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        begin(lambda: counts.__setitem__(0, True))
        sys.addaudithook(hook)

    return patch


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_f02_f03_kill_9_at_each_touch_of_a_file_costs_nothing(
    start: Start, tmp_path: Path, whole: tuple[list[dict], bytes]
) -> None:
    """Saving, replacing OUT/best and removing old checkpoints: every audited operation of the fourth save on."""
    event, out = 1, tmp_path / "out"
    while True:
        shutil.rmtree(out, ignore_errors=True)
        killer = at_touch(event, out, lambda count: at_save(5, count)())
        killed = start(out, before=killer).wait() == -signal.SIGKILL
        assert newest(out)
        if not killed:
            break
        assert start(out).wait() == 0, (event, start(out).said.read_text())
        assert ending(out) == whole, event
        assert pairs(out) == {"step-000006", "step-000007", "final"}, event
        event += 1
    assert event > 60


def pairs(out: Path) -> set[str]:
    """Names of the adapters in a run that have their state beside them; there is no state besides."""
    adapters = {path.parent for path in out.glob("*/adapter_config.json") if not path.parent.is_symlink()}
    assert {newest(adapter).state for adapter in adapters} == set(out.glob("*.state"))
    return {adapter.name for adapter in adapters}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kept", [1, 9])
def test_kill_9_at_each_touch_while_a_lengthened_run_replaces_its_end_costs_nothing(
    start: Start, tmp_path: Path, kept: int
) -> None:
    def begin(count: Callable[[], None]) -> None:
        keep = saver.Saver._keep_earlier_final
        saver.Saver._keep_earlier_final = lambda self: (count(), keep(self))

    longer = ["--extend", "--train.max_steps=10", f"--train.keep_last={kept}"]
    assert start(tmp_path / "whole").wait() == 0
    event, out = 1, tmp_path / "out"
    shutil.copytree(tmp_path / "whole", tmp_path / "end", symlinks=True)
    assert start(tmp_path / "end", *longer).wait() == 0
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", out, symlinks=True)
        start(out, *longer, before=at_touch(event, out, begin)).wait()
        if (out / "summary.json").exists():
            break
        assert newest(out).step in (9, 10), event  # the validation after nine steps has saved the best
        assert newest(out / "final").step in (STEPS, 10), event
        assert start(out, *longer).wait() == 0, (event, start(out).said.read_text())
        assert ending(out) == ending(tmp_path / "end"), event
        assert pairs(out) == pairs(tmp_path / "end"), event
        event += 1
    assert event > 30


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kill_9_at_each_touch_while_later_checkpoints_are_set_aside_loses_none(
    start: Start, tmp_path: Path, whole: tuple[list[dict], bytes]
) -> None:
    def begin(count: Callable[[], None]) -> None:
        clean = folder._clean
        folder._clean = lambda out_dir: (clean(out_dir), count())

    assert start(tmp_path / "whole", "--train.keep_last=9").wait() == 0
    before, event, out = contents(tmp_path / "whole"), 1, tmp_path / "out"
    flags = [f"--resume={out / 'step-000005'}", "--train.keep_last=9"]
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", out, symlinks=True)
        assert start(out, *flags, before=at_touch(event, out, begin)).wait() == -signal.SIGKILL
        assert contents(out) >= before, event
        if contents(out) > before:
            break
        assert start(out, *flags).wait() == 0, (event, start(out).said.read_text())
        assert ending(out) == whole, event
        assert contents(out) > before, event
        event += 1
    assert event > 10


def contents(out: Path) -> Counter[tuple[str, str]]:
    """Hashes of adapter and state of each whole checkpoint of a run, wherever they lie in it."""
    adapters = [path.parent for path in out.glob("*/adapter_config.json") if ".tmp-" not in str(path)]
    found = [newest(adapter) for adapter in adapters if not adapter.is_symlink()]
    return Counter((hash_file(c.path / "manifest.json"), hash_file(c.state / "manifest.json")) for c in found)


# The same run


QUICK = {("adamw", "bnb.nf4-dq"), ("sgd", "none"), ("paged-adamw8bit", "bnb.nf4"), ("lion8bit", "bnb.int8")}
MATRIX = [
    pytest.param(name, scheme, marks=() if (name, scheme) in QUICK else pytest.mark.slow)
    for name in OPTIMIZERS
    for scheme in SCHEMES
]


@pytest.mark.parametrize(("optimizer", "scheme"), MATRIX)
def test_the_end_is_the_same_for_every_optimizer_and_quantisation(
    start: Start, tmp_path: Path, optimizer: str, scheme: str
) -> None:
    flags = [f"--optimizer.name={optimizer}", f"--quantize={scheme}", "--train.max_steps=5", "--eval.every=5"]
    child = start(tmp_path / "whole", *flags, "--train.save_every=0")
    assert child.wait() == 0, child.said.read_text()
    stopped(start, tmp_path / "out", *flags, step=2)
    assert start(tmp_path / "out", *flags).wait() == 0
    assert ending(tmp_path / "out") == ending(tmp_path / "whole")


VARIANTS = {
    "rslora": ["--lora.rslora"],
    "dora": ["--lora.dora", "--quantize=bnb.nf4"],
    "pissa": [
        "--lora.init=pissa",
        "--lora.r=4",
        "--quantize=bnb.nf4",
        "--quantize_layers={value: bnb.int8, down: none}",
    ],
    "olora": ["--lora.init=olora", "--lora.r=4"],
    "loftq": ["--lora.init=loftq", "--lora.r=4", "--lora.loftq_steps=2", "--quantize=bnb.nf4"],
    "patterns": ["--lora.rank_pattern={attn.query: 2}", "--lora.alpha_pattern={value: 3.5}", "--lora.last_layers=1"],
    "neftune": ["--train.neftune=5"],
    "dropout": ["--train.hidden_dropout=0.1", "--data.token_dropout=0.2", "--data.length_quantile=0.7"],
    "tokens": ["--lora.train_tokens=[5,7]", "--lora.train_head_rows=true"],
    "embeddings": ["--lora.train_embeddings", "--optimizer.lora_plus=4"],
    "schedule": ["--train.schedule=cosine-restarts", "--train.cycles=2", "--train.floor=0.1", "--train.warmup=1"],
}
QUICK_VARIANTS = ("dora", "pissa", "neftune")


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=() if v in QUICK_VARIANTS else pytest.mark.slow) for v in VARIANTS]
)
def test_the_end_is_the_same_for_every_variant(start: Start, tmp_path: Path, variant: str) -> None:
    flags = [*VARIANTS[variant], "--train.max_steps=5", "--eval.every=5"]
    child = start(tmp_path / "whole", *flags, "--train.save_every=0")
    assert child.wait() == 0, child.said.read_text()
    stopped(start, tmp_path / "out", *flags, step=2)
    assert start(tmp_path / "out", *flags).wait() == 0
    assert ending(tmp_path / "out") == ending(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_that_started_from_an_adapter_goes_on_to_the_same_end(start: Start, tmp_path: Path) -> None:
    assert start(tmp_path / "first", "--lora.r=3", "--lora.dora", "--train.max_steps=2").wait() == 0
    flags = [f"--lora.start={tmp_path / 'first/final'}", "--train.max_steps=5"]
    child = start(tmp_path / "whole", *flags)
    assert child.wait() == 0, child.said.read_text()
    stopped(start, tmp_path / "out", *flags, step=2)
    assert start(tmp_path / "out", *flags).wait() == 0
    assert ending(tmp_path / "out") == ending(tmp_path / "whole")


@pytest.mark.parametrize("threads", [2, 4])
def test_f37_the_number_of_threads_does_not_change_the_end(
    start: Start, tmp_path: Path, killed: Path, whole: tuple[list[dict], bytes], threads: int
) -> None:
    import torch

    leave(killed, tmp_path / "out")
    assert start(tmp_path / "out", before=lambda: torch.set_num_threads(threads)).wait() == 0
    assert ending(tmp_path / "out") == whole


def test_what_is_saved_and_when_does_not_change_the_end(
    start: Start, tmp_path: Path, whole: tuple[list[dict], bytes]
) -> None:
    stopped(start, tmp_path / "out", step=4, save=4)
    flags = ["--train.save_every=3", "--train.keep_last=1", "--eval.best=none", "--train.micro_batch_size=2"]
    assert start(tmp_path / "out", *flags).wait() == 0
    assert ending(tmp_path / "out") == whole


def test_a_run_that_is_over_is_not_gone_on_with(start: Start, tmp_path: Path) -> None:
    for _ in range(2):
        assert start(tmp_path / "out").wait() == 0
    assert ending(tmp_path / "out.1") == ending(tmp_path / "out")
    assert start(tmp_path / "new", f"--resume={tmp_path / 'out'}").wait() == 2
    assert "nothing is left to do" in (tmp_path / "new.txt").read_text()
    assert start(tmp_path / "new", f"--resume={tmp_path / 'out'}", "--lora.r=4").wait() == 2
    assert "is over, and began with other settings:" in (tmp_path / "new.txt").read_text()


def test_a_run_that_was_killed_in_its_last_validation_still_gets_its_report(
    start: Start, tmp_path: Path, whole: tuple[list[dict], bytes]
) -> None:
    child = start(tmp_path / "out", before=at_save(STEPS, signals(signal.SIGKILL)))
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "out/summary.json").exists()
    assert start(tmp_path / "out").wait() == 0
    assert ending(tmp_path / "out") == whole
    assert json.loads((tmp_path / "out/summary.json").read_text())["steps"] == STEPS


def test_never_begins_anew_and_loses_nothing(
    start: Start, tmp_path: Path, killed: Path, whole: tuple[list[dict], bytes]
) -> None:
    leave(killed, tmp_path / "out")
    assert start(tmp_path / "out", "--resume=never").wait() == 0
    assert ending(tmp_path / "out") == whole
    assert (tmp_path / "out.1/step-000005").is_dir()


def test_a_run_goes_on_from_the_checkpoint_that_is_named(
    start: Start, tmp_path: Path, whole: tuple[list[dict], bytes]
) -> None:
    stopped(start, tmp_path / "out", "--train.keep_last=5")
    assert start(tmp_path / "new", f"--resume={tmp_path / 'out/step-000003'}").wait() == 0
    assert ending(tmp_path / "new") == whole
    before = sorted(path.name for path in (tmp_path / "out").glob("step-*"))
    assert before[-2:] == ["step-000005", "step-000005.state"]
    assert start(tmp_path / "out", f"--resume={tmp_path / 'out/step-000003'}", "--train.keep_last=9").wait() == 0
    assert ending(tmp_path / "out") == whole
    assert newest(tmp_path / "out/aside-step-000005.1").state.name == "aside-step-000005.1.state"
    assert "is newer than what the run resumes from, and is now" in (tmp_path / "out.txt").read_text()


def test_a_checkpoint_is_found_by_any_name_that_it_has(
    start: Start, tmp_path: Path, whole: tuple[list[dict], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert start(out, "--train.keep_last=5", before=scripted(9, 8, 8.5)).wait() == 0
    assert (out / "best").readlink() == Path("step-000003")
    (out / "step-000004").rename(out / "mine")  # without its state
    assert newest(out / "mine").step == 4
    monkeypatch.chdir(out / "step-000005")
    for number, place in enumerate([f"{out}/best", f"{out}/mine/", ".", f"{out}/step-000003.state"]):
        assert start(tmp_path / f"new{number}", f"--resume={place}").wait() == 0
        assert ending(tmp_path / f"new{number}")[1] == whole[1]


@pytest.mark.parametrize("name", ["final", "step-1"])
def test_a_run_whose_folder_is_called_like_a_checkpoint_is_a_run(
    start: Start, tmp_path: Path, killed: Path, whole: tuple[list[dict], bytes], name: str
) -> None:
    leave(killed, tmp_path / name)
    assert start(tmp_path / name).wait() == 0
    assert ending(tmp_path / name) == whole
    assert start(tmp_path / name).wait() == 0
    assert ending(tmp_path / f"{name}.1") == whole


def test_a_run_that_is_over_can_be_done_again_from_a_checkpoint(
    start: Start, tmp_path: Path, whole: tuple[list[dict], bytes]
) -> None:
    out = tmp_path / "out"
    assert start(out, "--train.keep_last=5").wait() == 0
    killer = at_save(6, signals(signal.SIGKILL))
    assert start(out, f"--resume={out / 'step-000004'}", before=killer).wait() == -signal.SIGKILL
    assert (out / "aside-final.1").is_dir()  # it would be the newest
    assert newest(out).step == 6
    assert start(out).wait() == 0
    assert ending(out) == whole


def test_a_run_that_is_killed_while_it_is_wound_back_has_a_log_up_to_its_newest_checkpoint(
    start: Start, tmp_path: Path
) -> None:
    def killer() -> None:
        folder.write_log = lambda *given: (write_log(*given), os.kill(os.getpid(), signal.SIGKILL))

    out = tmp_path / "out"
    assert start(out, "--train.keep_last=5").wait() == 0
    assert start(out, f"--resume={out / 'step-000004'}", before=killer).wait() == -signal.SIGKILL
    assert read_log(out / "log.jsonl", 99)[-1]["step"] == newest(out).step == 4


def test_a_run_can_be_lengthened_also_when_it_is_over(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert start(out).wait() == 0
    assert start(out, "--extend", "--train.max_steps=11").wait() == 0
    records, _ = ending(out)
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 12))
    assert records[-1]["step"] == 11
    assert newest(out).step == 11
    stopped(start, out, "--extend", "--train.max_steps=14", step=12)
    assert start(out, "--train.max_steps=14").wait() == 0  # it is the length that the checkpoint has
    assert newest(out).step == 14


@pytest.mark.parametrize(("replaced", "step"), [("final", 11), ("final.state", STEPS)])
def test_a_lengthened_run_that_is_killed_while_it_replaces_its_only_checkpoint_loses_nothing(
    start: Start, tmp_path: Path, replaced: str, step: int
) -> None:
    def killer() -> None:
        remove = shutil.rmtree

        def hooked(path: Path, **how: bool) -> None:
            if path.name.startswith(f"{replaced}.tmp-"):  # the old one, whose name the new one has
                os.kill(os.getpid(), signal.SIGKILL)
            remove(path, **how)

        shutil.rmtree = hooked

    out, flags = tmp_path / "out", ["--train.save_every=0", "--eval.best=none"]
    assert start(out, *flags).wait() == 0
    assert start(out, *flags, "--extend", "--train.max_steps=11", before=killer).wait() == -signal.SIGKILL
    assert newest(out).step == step
    assert start(out, *flags, "--extend", "--train.max_steps=11").wait() == 0
    assert newest(out).step == 11


def test_a_run_of_an_earlier_version_goes_on_to_the_same_end_and_can_be_lengthened(
    start: Start, tmp_path: Path, killed: Path, whole: tuple[list[dict], bytes]
) -> None:
    out = tmp_path / "out"
    leave(killed, out)
    as_earlier_versions(out)
    assert (newest(out).step, newest(out).state) == (5, out / "step-000005")
    assert start(out).wait() == 0
    assert ending(out) == whole
    as_earlier_versions(out)
    assert start(out, "--extend", "--train.max_steps=9", "--train.keep_last=9").wait() == 0
    assert [newest(out / name).state.name for name in ("final", f"step-{STEPS:06d}")] == ["final.state", "step-000008"]
    assert (newest(out).step, newest(out / "step-000008").step) == (9, STEPS)


def test_a_disk_that_is_full_when_a_lengthened_run_ends_costs_no_checkpoint(start: Start, tmp_path: Path) -> None:
    def full() -> None:
        def fail(*given: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        shutil.copyfile = fail

    out, flags = tmp_path / "out", ["--train.save_every=0", "--eval.best=none"]
    assert start(out, *flags).wait() == 0
    child = start(out, *flags, "--extend", "--train.max_steps=11", before=full)
    assert child.wait() == 6, child.said.read_text()
    assert "No space left on device" in child.said.read_text()
    assert newest(out).step == STEPS


# Another run


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--lora.r=4", "lora.r  8 -> 4"),
        ("--lora.targets=all", "lora.targets  ['query', 'value'] -> ['all']"),
        ("--quantize=bnb.nf4", "quantize  none -> bnb.nf4"),
        ("--train.learning_rate=0.1", "train.learning_rate  0.01 -> 0.1"),
        ("--train.batch_size=8", "train.batch_size  4 -> 8"),
        ("--seed=1", "seed  1337 -> 1"),
        ("--data.mask_prompt=false", "data.mask_prompt  True -> False"),
        ("--lora.alpha_pattern={query: 64}", "lora.alpha_pattern  {} -> {'query': 64.0}"),
        ("--optimizer.options={amsgrad: true}", "optimizer.options  {} -> {'amsgrad': True}"),
    ],
)
def test_f20_another_setting_is_refused_with_a_diff(
    start: Start, tmp_path: Path, killed: Path, flag: str, line: str
) -> None:
    leave(killed, tmp_path / "out")
    before = sorted(tmp_path.rglob("out/**"))
    assert start(tmp_path / "out", flag).wait() == 2
    said = (tmp_path / "out.txt").read_text()
    assert "is not finished, and began with other settings" in said
    assert line in said
    assert "--resume never" in said
    assert sorted(tmp_path.rglob("out/**")) == before


def test_f20_another_length_asks_for_extend(start: Start, tmp_path: Path, killed: Path) -> None:
    leave(killed, tmp_path / "out")
    assert start(tmp_path / "out", "--train.max_steps=9").wait() == 2
    assert "train.max_steps  8 -> 9" in (tmp_path / "out.txt").read_text()
    assert "--extend" in (tmp_path / "out.txt").read_text()


def test_f18_another_base_is_refused(start: Start, tmp_path: Path, killed: Path) -> None:
    leave(killed, tmp_path / "out")
    other = write_checkpoint(tmp_path / "other", tiny_model(seed=9))
    write_tokenizer(other)
    assert start(tmp_path / "out", f"--checkpoint_dir={other}").wait() == 4
    assert "is not the base of the run in" in (tmp_path / "out.txt").read_text()


def rope_theta(base: Path) -> None:
    config = json.loads((base / "model_config.json").read_text())
    (base / "model_config.json").write_text(json.dumps(config | {"rope_theta": 500.0}))


def no_bos(base: Path) -> None:
    (base / "tokenizer_config.json").write_text('{"add_bos_token": false}')


def style(base: Path) -> None:
    (base / "prompt_style.json").write_text('{"style": "plain"}')


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        (rope_theta, 4, "it holds another model_config.json"),
        (no_bos, 4, "it holds another tokenizer"),
        (style, 2, "began with another prompt style"),
    ],
)
def test_f18_a_base_that_changed_in_place_is_refused(
    start: Start, tmp_path: Path, tiny_checkpoint: Path, change: Callable[[Path], None], status: int, words: str
) -> None:
    base = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    (base / "prompt_style.json").write_text('{"style": "qa"}')
    flags = (f"--checkpoint_dir={base}", "--data.prompt=auto")
    stopped(start, tmp_path / "out", *flags)
    change(base)
    assert start(tmp_path / "out", *flags).wait() == status
    assert words in (tmp_path / "out.txt").read_text()


@pytest.mark.parametrize("change", ["a line more", "a line less", "another order"])
def test_f19_other_data_is_refused(
    start: Start, tmp_path: Path, killed: Path, examples_file: Path, change: str
) -> None:
    leave(killed, tmp_path / "out")
    lines = examples_file.read_text().splitlines(keepends=True)
    new = {"a line more": [*lines, lines[0]], "a line less": lines[1:], "another order": lines[::-1]}[change]
    examples_file.write_text("".join(new))
    assert start(tmp_path / "out").wait() == 3
    assert f"{examples_file} changed or is new" in (tmp_path / "out.txt").read_text()
    assert start(tmp_path / "out", "--resume_changed_data").wait() == 0


def test_the_same_data_and_base_may_have_moved(
    start: Start,
    tmp_path: Path,
    killed: Path,
    examples_file: Path,
    tiny_checkpoint: Path,
    whole: tuple[list[dict], bytes],
) -> None:
    leave(killed, tmp_path / "out")
    data, base = shutil.copy(examples_file, tmp_path / "b.jsonl"), shutil.copytree(tiny_checkpoint, tmp_path / "base")
    assert start(tmp_path / "out", f"--data.path={data}", f"--checkpoint_dir={base}").wait() == 0
    assert ending(tmp_path / "out") == whole


def test_other_caches_may_be_taken_in_the_middle(
    start: Start, tmp_path: Path, killed: Path, whole: tuple[list[dict], bytes]
) -> None:
    leave(killed, tmp_path / "out")
    assert start(tmp_path / "out", "--quantize_cache=none", "--data.cache_dir=none").wait() == 0
    assert ending(tmp_path / "out") == whole


def test_f40_other_versions_are_named_and_the_run_goes_on(start: Start, tmp_path: Path, killed: Path) -> None:
    leave(killed, tmp_path / "out")

    def older() -> None:
        real = saver.versions
        saver.versions = lambda: {**real(), "bitsandbytes": "0.1"}

    assert start(tmp_path / "out", before=older).wait() == 0
    assert "goes on with 0.1" in (tmp_path / "out.txt").read_text()


# Damage


def flip_a_bit(folder: Path) -> str:
    path = beside(folder) / "train_state.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)
    return str(path)


def truncate(folder: Path) -> str:
    path = folder / "adapter_model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    return str(path)


def remove(folder: Path) -> str:
    (beside(folder) / "state.json").unlink()
    return "state.json is absent"


def no_state(folder: Path) -> str:
    shutil.rmtree(beside(folder))
    return "an adapter alone: the state to resume from, step-000005.state, is not beside it"


def state_of_another(folder: Path) -> str:
    no_state(folder)
    shutil.copytree(beside(folder.with_name("step-000004")), beside(folder))
    return "an adapter alone: the state to resume from, step-000005.state, is another's"


def empty_manifest(folder: Path) -> str:
    (folder / "manifest.json").write_text("")
    return "manifest.json: not valid JSON"


def no_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "has no manifest.json"


def wrong_manifest(folder: Path) -> str:
    (folder / "manifest.json").write_text('{"files": {"state.json": 5}}')
    return "manifest.json is damaged"


def wrong_state(folder: Path) -> str:
    """With the manifests mended, as no accident would do."""
    state = json.loads((beside(folder) / "state.json").read_text())
    (beside(folder) / "state.json").write_text(json.dumps(state | {"step": "five"}))
    (beside(folder) / "manifest.json").write_text('{"files": {}}')
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"state": hash_file(beside(folder) / "manifest.json")}))
    return "state.json is damaged: step is 'five'"


DAMAGES = [
    flip_a_bit,
    truncate,
    remove,
    no_state,
    state_of_another,
    empty_manifest,
    no_manifest,
    wrong_manifest,
    wrong_state,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_f16_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    start: Start, tmp_path: Path, killed: Path, whole: tuple[list[dict], bytes], damage: Callable[[Path], str]
) -> None:
    out = tmp_path / "out"
    leave(killed, out)
    named = damage(out / "step-000005")
    assert start(out).wait() == 0
    said = (tmp_path / "out.txt").read_text()
    assert named in said
    assert "The one before it is used." in said
    assert "steps 5 to 8" in said
    assert f"  resume  from {out}/step-000004, after step 4 of 8; --resume never starts anew\n" in said
    assert ending(out) == whole


def test_f17_if_all_checkpoints_are_damaged_the_run_does_not_begin_anew(
    start: Start, tmp_path: Path, killed: Path
) -> None:
    out = tmp_path / "out"
    leave(killed, out)
    damaged = {folder: flip_a_bit(folder) for folder in out.glob("step-??????")}
    assert start(out).wait() == 4
    said = (tmp_path / "out.txt").read_text()
    assert "No checkpoint of this run is whole" in said
    assert all(name in said for name in damaged.values())
    assert sorted(out.glob("step-??????")) == sorted(damaged)


def test_a_log_with_half_a_line_is_mended(
    start: Start, tmp_path: Path, killed: Path, whole: tuple[list[dict], bytes]
) -> None:
    leave(killed, tmp_path / "out")
    with open(tmp_path / "out/log.jsonl", "a") as log:
        log.write('{"step": 6, "loss": 4.')
    assert read_log(tmp_path / "out/log.jsonl", 99)[-1]["step"] == 5
    assert start(tmp_path / "out").wait() == 0
    assert ending(tmp_path / "out") == whole


def test_a_run_without_a_checkpoint_begins_anew_beside_what_is_left(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = start(out, "--train.save_every=0", "--eval.best=none")
    child.wait_for(out / "log.jsonl")
    child.kill()
    assert child.wait() in (-signal.SIGKILL, 0)
    assert start(out).wait() == 0
    assert (tmp_path / "out.1/log.jsonl").exists()


# What is kept


def scripted(*values: float) -> Callable[[], None]:
    """For `before`: the losses that validations find; the last one stays."""

    def patch() -> None:
        coming = list(values)
        Losses.__call__ = lambda *given: {"val_loss": coming.pop(0) if len(coming) > 1 else coming[0]}

    return patch


def test_the_best_checkpoint_stays_and_is_found_again(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--eval.every=1", "--train.save_every=0", "--train.keep_last=1"]
    assert start(out, *flags, before=scripted(9, 8, 7, 8, 8, 8)).wait() == 0
    assert (out / "best").readlink() == Path("step-000002")
    assert read_manifest(out / "best")["step"] == 2


def test_a_lengthened_run_keeps_its_best_and_finds_a_better_one(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert start(out, "--train.max_steps=4", before=scripted(9, 8, 7)).wait() == 0
    assert (out / "best").readlink() == Path("final")
    more = ["--extend", "--train.save_every=0"]
    assert start(out, *more, before=scripted(8)).wait() == 0  # validated after 6 and 8 steps
    assert read_manifest(out / "best")["step"] == 4
    assert read_manifest(out / "final")["step"] == STEPS
    assert start(out, *more, "--train.max_steps=11", before=scripted(5, 6)).wait() == 0  # after 9 and 11 steps
    assert read_manifest(out / "best")["step"] == 9
    assert read_manifest(out / "final")["step"] == 11


def test_the_best_of_a_run_that_goes_on_elsewhere_is_there_too(start: Start, tmp_path: Path) -> None:
    killer = at_save(3, signals(signal.SIGKILL))  # before the validation after three steps
    assert start(tmp_path / "out", before=lambda: (scripted(9)(), killer())).wait() == -signal.SIGKILL
    new = tmp_path / "new"
    assert start(new, f"--resume={tmp_path / 'out/step-000003'}", before=scripted(7, 8)).wait() == 0
    assert read_manifest(new / "best")["step"] == 3


def test_a_run_that_was_killed_before_it_named_its_best_names_it_when_it_goes_on(start: Start, tmp_path: Path) -> None:
    def killer() -> None:
        saver.Saver.keep = lambda *given: os.kill(os.getpid(), signal.SIGKILL)

    out = tmp_path / "out"
    assert start(out, before=lambda: (scripted(9, 7)(), killer())).wait() == -signal.SIGKILL
    assert start(out, before=scripted(8)).wait() == 0
    assert (out / "best").readlink() == Path("step-000003")


def test_more_than_a_million_steps_are_counted_too(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for step in (20, 999_999, 1_000_000):
        (out / f"step-{step:06d}").mkdir(parents=True)
    assert [path.name for path in checkpoints(out)] == ["step-1000000", "step-999999", "step-000020"]


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_run_that_gets_no_better_ends_early(start: Start, tmp_path: Path, interrupted: bool) -> None:
    out = tmp_path / "out"
    flags = ["--eval.every=1", "--eval.patience=2"]
    values = [9, 8, 7, 8, 8, 8]
    if interrupted:
        killer = at_save(4, signals(signal.SIGKILL))
        assert start(out, *flags, before=lambda: (scripted(*values)(), killer())).wait() == -signal.SIGKILL
        values = values[4:]  # that of step 4 is missing in the log
    assert start(out, *flags, before=scripted(*values)).wait() == 0
    assert [r["val_loss"] for r in read_log(out / "log.jsonl", 99) if "val_loss" in r] == [9, 8, 7, 8, 8]
    assert read_manifest(out / "final")["step"] == 4
    said = "ended early: val_loss did not improve after step 2"
    assert said in (tmp_path / "out.txt").read_text()
    longer = [*flags, "--extend", "--train.max_steps=11"]
    assert start(out, *longer).wait() == 0
    assert (tmp_path / "out.txt").read_text().count(said) == 2
    assert start(out, *longer, "--eval.patience=3", before=scripted(6, 5, 4, 3)).wait() == 0
    assert read_manifest(out / "final")["step"] == 11
    assert start(out, *flags, before=scripted(1)).wait() == 0  # it is over, so this is another run
    assert (tmp_path / "out.1").exists()


def test_minutes_decide_too(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--train.save_every=0", "--train.save_minutes=0.0001", "--eval.minutes=0.0001", "--eval.every=100"]
    assert start(out, *flags, "--eval.best=none", "--train.keep_last=99").wait() == 0
    assert len(list(out.glob("step-??????"))) >= 3
    assert len([r for r in read_log(out / "log.jsonl", 99) if "val_loss" in r]) >= 3


# What validations measure


def test_every_metric_and_answer_of_validations_is_as_if_nothing_had_happened(start: Start, tmp_path: Path) -> None:
    """Killed after the validation of step 3 had been answered, while that of step 6 had only begun to be."""
    flags = ["--eval.generate=3", "--eval.max_new_tokens=6", "--eval.kl_text=default", "--train.save_every=2"]

    def killer() -> None:
        keep = learning.keep_answers

        def hooked(out_dir: Path, log: object, frames: object, step: int, records: list[dict]) -> None:
            keep(out_dir, log, frames, step, records)
            if step == 6:
                os.kill(os.getpid(), signal.SIGKILL)

        learning.keep_answers = hooked

    whole, out = tmp_path / "whole", tmp_path / "out"
    assert start(whole, *flags).wait() == 0
    assert start(out, *flags, before=killer).wait() == -signal.SIGKILL
    assert len((out / "samples.jsonl").read_text().splitlines()) == 9
    elsewhere = tmp_path / "elsewhere"
    assert start(elsewhere, *flags, f"--resume={out / 'step-000006'}").wait() == 0
    assert (elsewhere / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert start(out, *flags).wait() == 0
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    one, two = ([r for r in read_log(path / "log.jsonl", 99) if "loss" not in r] for path in (whole, out))
    assert [r["step"] for r in one] == [0, 3, 6, 8]
    assert one == two
