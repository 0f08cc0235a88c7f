"""Runs of any settings that are killed at any moment end as they would have; a seed draws settings and moments.

LIT_QLORA_FUZZ_EXAMPLES=2000 LIT_QLORA_FUZZ_SEED=7 python -m pytest -s tests/run/test_kills.py -m slow
"""

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_qlora.data import cache
from lit_qlora.errors import UsageError
from lit_qlora.settings import OPTIMIZERS, SCHEMES
from tests.fuzz.property import EXAMPLES, SEED
from tests.run.forked import Child, Start, ending

KILLS = 20
"""For each choice of settings."""
CHOICES = [
    [[f"--quantize={scheme}"] for scheme in SCHEMES],
    [[f"--optimizer.name={name}"] for name in OPTIMIZERS],
    [[f"--train.batch_size={rows}", f"--train.micro_batch_size={at_once}"] for rows in (2, 4, 6) for at_once in (1, 2)],
    [["--train.max_steps=3"], ["--train.max_steps=8"], ["--train.epochs=0.5"]],
    [[f"--train.save_every={every}", f"--train.keep_last={kept}"] for every in (1, 2, 5) for kept in (1, 2)],
    [["--eval.every=1"], ["--eval.every=3"], ["--eval.every=0.2"], ["--eval.every=1", "--eval.generate=1"]],
    [["--eval.best=val_loss"], ["--eval.best=none"], ["--eval.best=val_loss", "--eval.patience=2"]],
    [[], ["--data.packing", "--data.max_length=64"], ["--data.group_by_length"], ["--data.length_quantile=0.7"]],
    [[], ["--data.token_dropout=0.2"], ["--data.weighting=samples"], ["--data.drop_last"], ["--data.shuffle=false"]],
    [[], ["--train.neftune=5"], ["--train.hidden_dropout=0.1"], ["--train.recompute=full"]],
    [
        *([], ["--train.schedule=constant"], ["--train.schedule=wsd", "--train.decay=0.3"], ["--train.warmup=2"]),
        *(["--train.schedule=cosine-restarts", "--train.cycles=2"], ["--train.schedule=polynomial"]),
    ],
    [["--lora.targets=all"], ["--lora.targets=[query,value]"], ["--lora.targets=[head,mlp]"]],
    [
        *([], ["--lora.dora"], ["--lora.init=pissa"], ["--lora.init=olora"], ["--optimizer.lora_plus=4"]),
        *(["--lora.train_tokens=[5,7]"], ["--lora.train_embeddings"], ["--lora.rank_pattern={blocks.1.*: 3}"]),
    ],
    [["--data.val_fraction=0.1"], ["--data.val_fraction=7"]],
]
"""Of each list of settings one is taken."""


def draw(rng: random.Random) -> list[str]:
    """The flags of a run; group_by_length needs that data is shuffled."""
    flags = [flag for choices in CHOICES for flag in rng.choice(choices)]
    return [flag for flag in flags if flag != "--data.shuffle=false" or "--data.group_by_length" not in flags]


def kill_and_go_on(begin: Callable[[Path], Child], out: Path, longest: float, rng: random.Random) -> int:
    """Kill a run KILLS times and go on with it; where it ends before, begin another. Returns how many ended."""
    killed, ended = 0, 0
    while True:
        child = begin(out)
        end = time.monotonic() + rng.random() * longest
        while time.monotonic() < end and child.running():
            time.sleep(0.001)
        if child.running() and killed < KILLS:
            child.kill()
            child.wait()
            killed += 1
            if not (out / "summary.json").exists():
                continue
        else:
            assert child.wait() == 0, child.said.read_text()
        ended += 1
        if killed == KILLS:
            return ended
        out.rename(out.with_name(f"out-{ended}"))


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_run_of_any_settings_that_is_killed_at_any_moment_ends_as_it_would_have(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "WORTH_KEEPING", 1)
    rng, runs, refused = random.Random(SEED), 0, 0
    numbers = range(max(1, EXAMPLES // KILLS))
    for number in numbers:
        flags = [*draw(rng), f"--quantize_cache={tmp_path / 'quantized'}"]
        folder = tmp_path / str(number)
        folder.mkdir()
        before = time.monotonic()
        child = start(folder / "whole", *flags)
        if (status := child.wait()) == UsageError.status:  # these settings exclude each other
            refused += 1
            continue
        assert status == 0, child.said.read_text()
        longest = 1.2 * (time.monotonic() - before)
        whole = ending(folder / "whole")
        ended = kill_and_go_on(lambda out, flags=flags: start(out, *flags), folder / "out", longest, rng)  # type: ignore[misc]
        outs = [path for path in folder.glob("out*") if (path / "summary.json").exists()]
        assert len(outs) == ended
        assert [ending(path) == whole for path in outs] == [True] * ended, flags
        assert not list(folder.glob("out*/*.tmp-*"))
        runs += ended
        shutil.rmtree(folder)
    tried = len(numbers) - refused
    print(f"{tried * KILLS} kills in {runs} runs of {tried} settings")
    assert tried > refused
