"""The checkpoints of a run: when they are saved, which one is the best, and which are removed."""

import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from lit_qlora import __version__
from lit_qlora.checkpoint.checkpoint import content_hash
from lit_qlora.checkpoint.identity import base_facts
from lit_qlora.checkpoint.score import facts_of
from lit_qlora.data import RunData
from lit_qlora.files.atomic import publish, remove_directory, temporary_directory, write_link
from lit_qlora.lora.adapter import STATE, save_adapter
from lit_qlora.prompts import tokenizer
from lit_qlora.prompts.added_tokens import read_new_tokens
from lit_qlora.prompts.style import Style
from lit_qlora.report import RunLog
from lit_qlora.run import states
from lit_qlora.run.resume import numbered, plain
from lit_qlora.run.states import FINAL
from lit_qlora.settings import FinetuneConfig, LoRAConfig, TrainConfig
from lit_qlora.train.loop import Learner
from lit_qlora.train.training_state import state_files

BEST = "best"


@dataclass(frozen=True)
class Contents:
    """The parts of a run's checkpoints that do not change from one to the next."""

    lora: LoRAConfig
    style: Style
    facts: Mapping[str, Any]
    """For the manifest: base, data and versions."""
    counters: Mapping[str, Any]
    """For the state: the facts, with which a resumed run must agree, the settings and the length of the run."""
    tokenizer: tuple[Path, ...] = ()
    """Files of the tokenizer of a base with new tokens, which the published base lacks."""

    @classmethod
    def of(cls, config: FinetuneConfig, data: RunData, learner: Learner, total: int) -> Self:
        """Collect them for a run of `total` steps; only the first process hashes the base."""
        new_tokens = read_new_tokens(config.checkpoint_dir)
        names = tokenizer.FILES if new_tokens else ()
        files = tuple(path for path in (config.checkpoint_dir / name for name in names) if path.is_file())
        teacher = config.teacher_dir if learner.fabric.is_global_zero else None
        facts = {
            **({"new_tokens": new_tokens} if new_tokens else {}),
            "base": base_facts(config.checkpoint_dir) if learner.fabric.is_global_zero else {},
            **({"teacher": content_hash(teacher)} if teacher else {}),
            **({"head": facts_of(data.scoring)} if data.scoring else {}),
            "style": data.style.digest,
            "data": data.files,
            **config.quantization.facts(),
            "precision": config.precision,
            "versions": versions(),
        }
        return cls(config.lora, data.style, facts, {**facts, "config": plain(config), "total": total}, files)

    def write(self, folder: Path, learner: Learner, step: int, seconds: float) -> None:
        """Write the checkpoint after `step` steps, which took so many seconds: the state, then the adapter."""
        counters = {**self.counters, "step": step, "seconds": seconds}
        also = {file.name: partial(shutil.copyfile, file) for file in self.tokenizer}
        files = state_files(learner.fabric, learner.module, learner.optimizer, counters)
        with states.saved(folder, files) as state:
            facts = {**self.facts, "step": step, STATE: state}
            save_adapter(folder, learner.module, self.lora, self.style, facts, also)


class Saver:
    """Saves the checkpoints of a run, and removes old ones.

    Args:
        last: step and path of the checkpoint in OUT that the run resumes from, if it does.

    Attributes:
        last: step and path of the newest checkpoint.
        best: the checkpoint that OUT/best links to.
    """

    def __init__(
        self,
        out_dir: Path,
        config: TrainConfig,
        learner: Learner,
        contents: Contents,
        log: RunLog,
        last: tuple[int, Path] | None = None,
    ) -> None:
        self.out_dir, self.config, self.learner, self.contents, self.log = out_dir, config, learner, contents, log
        self.fabric = learner.fabric
        self.best = self._recall_best()
        self.last, self.saved = last, time.monotonic()

    def due(self, step: int) -> bool:
        """Say whether train.save_every or train.save_minutes asks for a checkpoint after `step` steps."""
        every, minutes = self.config.save_every, self.config.save_minutes
        return bool((every and step % every == 0) or (minutes and time.monotonic() - self.saved >= 60 * minutes))

    def __call__(self, step: int, over: bool) -> None:
        """Save the state after `step` steps, as OUT/final if the run is over."""
        folder = self.out_dir / (FINAL if over else step_name(step))
        if (step, folder) != self.last and self.fabric.is_global_zero:
            states.make_way(folder)
            if over:
                self._keep_earlier_final()
            self.log.flush()  # a checkpoint must not be newer than the log
            self.contents.write(folder, self.learner, step, self.log.seconds)
            self._prune()
        self.last, self.saved = (step, folder), time.monotonic()
        self.fabric.barrier()

    def keep(self, step: int) -> None:
        """Let OUT/best link to the state after `step` steps, which is the current one."""
        if self.last is None or self.last[0] != step:
            self(step, False)
        assert self.last is not None
        self._call_best(self.last[1])
        if self.fabric.is_global_zero:
            self._prune()

    def _call_best(self, folder: Path) -> None:
        self.best = folder
        if self.fabric.is_global_zero:
            write_link(self.out_dir / BEST, folder.name)

    def _recall_best(self) -> Path | None:
        """Find the target of OUT/best in a resumed run; it may have been set aside."""
        link = self.out_dir / BEST
        if not link.is_symlink():
            return None
        if link.exists():
            return link.resolve()
        if self.fabric.is_global_zero:
            link.unlink()
        return None

    def _keep_earlier_final(self) -> None:
        """Copy OUT/final to an adapter of its step, to which its state moves when an extended run replaces it.

        It may be the best checkpoint, and it is the only one until the new one is there.
        """
        final = self.out_dir / FINAL
        if not final.exists():
            return
        folder = self.out_dir / step_name(states.step_of(final))
        if not folder.exists() or states.find(folder) is None:
            with temporary_directory(folder) as temporary:
                for file in final.iterdir():
                    shutil.copyfile(file, temporary / file.name)
                publish(temporary, folder)
        if self.best and self.best.name == FINAL:
            self._call_best(folder)

    def _prune(self) -> None:
        best = self.best.name if self.best else None
        for _, old in numbered(self.out_dir)[: -self.config.keep_last]:
            if old.name != best:
                remove_directory(old)
        states.remove_alone(self.out_dir)


def step_name(step: int) -> str:
    """Name the checkpoint after so many steps."""
    return f"step-{step:06d}"


def versions() -> dict[str, str]:
    """Collect the versions of the libraries that results depend on."""
    from importlib.metadata import version

    names = ("torch", "lightning", "bitsandbytes", "safetensors")
    return {"lit_qlora": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}
