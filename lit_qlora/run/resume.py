"""The checkpoint that a run resumes from, if it is a checkpoint of the same run."""

import json
import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import takewhile
from pathlib import Path
from typing import Any

from lit_qlora import cli
from lit_qlora.checkpoint.checkpoint import content_hash
from lit_qlora.checkpoint.identity import PARTS, differing_parts
from lit_qlora.errors import CheckpointError, DataError, UsageError
from lit_qlora.files.atomic import write_text
from lit_qlora.files.manifest import MANIFEST
from lit_qlora.report import Record, read_records, tell
from lit_qlora.run import states
from lit_qlora.run.states import FINAL
from lit_qlora.settings import FinetuneConfig, PreferenceRunConfig

LOG = "log.jsonl"
SEED = "LIT_QLORA_SEED"
SUMMARY = "summary.json"
SAMPLES = "samples.jsonl"
HARMLESS = (
    *("checkpoint_dir", "data.path", "data.val_path"),  # their content is compared, not their paths
    *("quantize_cache", "data.cache_dir"),
    *("out_dir", "resume", "extend", "resume_changed_data", "skip_disk_check", "force", "dry_run", "price_per_hour"),
    *("quiet", "expect_trainable", "published", "allow_code"),
    *("devices", "num_nodes", "strategy", "sequence_parallel", "collective_timeout", "deterministic"),
    *("train.micro_batch_size", "train.recompute", "train.fast", "train.cuda_graphs", "train.keep_dequantized"),
    *("train.save_every", "train.save_minutes", "train.keep_last", "eval", "guard", "log"),
)
"""Settings, or groups of them, that may change when a run resumes: the result does not depend on them."""
LENGTH = ("train.epochs", "train.max_steps")
TABLES = tuple(setting.name for setting in fields(FinetuneConfig) if setting.default_factory is dict)
"""Settings that are tables themselves; other tables are groups of settings."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint of a run."""

    path: Path
    """Of the adapter."""
    state: Path
    """Folder of the state, which is the adapter's in runs of earlier versions."""
    counters: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.counters["step"])


def find(
    config: FinetuneConfig, total: int, files: Mapping[str, str], style: str, versions: Mapping[str, str]
) -> Checkpoint | None:
    """Find the checkpoint that the run resumes from, or None for a new run. It writes nothing.

    Args:
        total: optimizer steps of the run.
        files: source of the data -> sha256.
        style: digest of the prompt style.

    Raises:
        CheckpointError: if no checkpoint is whole, or the base differs.
        DataError: if the data differs.
        UsageError: if settings differ that change the result.
    """
    assert config.out_dir is not None
    if config.resume == "never":
        return None
    automatic = config.resume == "auto"
    folder = _named(config)
    if automatic and not (folder / LOG).exists():
        return None
    over = (_run_of(folder) / SUMMARY).exists()
    if automatic and over and not config.extend:
        return None  # a new run
    checkpoint = newest(folder)
    if checkpoint is None:
        if not automatic:
            raise CheckpointError(f"resume {config.resume} is neither a checkpoint nor a run with checkpoints.")
        return None
    check_same_run(config, files, style, checkpoint)
    then = checkpoint.counters["versions"]
    for name in (name for name in versions if then.get(name) != versions[name]):
        tell(f"  note    the run began with {name} {then.get(name)} and goes on with {versions[name]}", sys.stderr)
    if checkpoint.step > total or (checkpoint.step == total and over):
        raise UsageError(
            f"{checkpoint.path} is at step {checkpoint.step}, and the run has {total} steps: nothing is left to do.\n"
            "--extend goes on with a larger train.epochs or train.max_steps."
        )
    return checkpoint


def settle_seed(config: FinetuneConfig) -> int:
    """Turn seed -1 into that of the run which `config` resumes, else into a drawn one, the same in all its processes.

    Raises:
        UsageError: if several programs, which torchrun or several nodes start, would each draw their own.
        CheckpointError: if all checkpoints of the run are damaged.
    """
    if config.seed != -1:
        return config.seed
    if "TORCHELASTIC_RUN_ID" in os.environ or config.num_nodes > 1:
        raise UsageError("seed -1 is drawn by one program, and here several are started. Give --seed a number.")
    assert config.out_dir is not None
    automatic = config.resume == "auto"
    folder = _named(config)
    over = automatic and (folder / SUMMARY).exists() and not config.extend
    checkpoint = None if config.resume == "never" or over or not folder.exists() else newest(folder)
    if checkpoint:
        return int(checkpoint.counters["config"]["seed"])
    if config.devices == 1:
        return secrets.randbits(32)
    return int(os.environ.setdefault(SEED, str(secrets.randbits(32))))  # Fabric's other processes inherit it


def _named(config: FinetuneConfig) -> Path:
    """Return the run or the checkpoint that `config` resumes; the state of a checkpoint stands for it."""
    assert config.out_dir is not None
    if config.resume == "auto":
        return config.out_dir
    return states.adapter_of(Path(config.resume).resolve())  # OUT/best is a link


def newest(folder: Path) -> Checkpoint | None:
    """Return the newest whole checkpoint of a run, or `folder` itself if it is one; None if there is none.

    It names damaged checkpoints and skips them.

    Raises:
        CheckpointError: if all checkpoints are damaged.
    """
    found = checkpoints(folder) if _run_of(folder) == folder else [folder]
    damages = []
    for path in found:
        try:
            state, counters = states.read(path)
            return Checkpoint(path, state, _complete(counters, path))
        except CheckpointError as error:
            damages.append(str(error))
            if len(damages) < len(found):
                tell(f"  note    {error} The one before it is used.", sys.stderr)
    if damages:
        alone = [path for path in found if (path / MANIFEST).is_file() and states.find(path) is None]
        hint = f" --lora.start {alone[0]} begins a new run from an adapter." if alone else ""
        listed = "\n  ".join(damages)
        raise CheckpointError(f"No checkpoint of this run is whole:\n  {listed}\nTo start anew: --resume never.{hint}")
    return None


def _complete(counters: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the counters if they hold everything from which a run resumes.

    Raises:
        CheckpointError: if a part is missing or no hash.
    """
    missing = [name for name in ("step", "base", "data", "config", "versions") if name not in counters]
    if missing or not all(isinstance(digest, str) for digest in counters["data"].values()):
        raise CheckpointError(f"{path}: its state is damaged; {(missing or ['data'])[0]} is missing or no hash.")
    if type(counters["config"].get("seed")) is not int:
        raise CheckpointError(f"{path}: its state is damaged; its config has no seed.")
    return counters


def _run_of(folder: Path) -> Path:
    """Return the run of a checkpoint; a folder with a log is a run itself, whatever its name."""
    is_checkpoint = folder.name == FINAL or folder.name.startswith("step-") or (folder / MANIFEST).exists()
    return folder.parent if is_checkpoint and not (folder / LOG).exists() else folder


def checkpoints(out_dir: Path) -> list[Path]:
    """List the checkpoints of a run, newest first; in an extended run, final is not the newest."""
    steps = numbered(out_dir)[::-1]
    final = out_dir / FINAL
    if not final.is_dir():
        return [path for _, path in steps]
    try:
        end = states.step_of(final)
    except (CheckpointError, ValueError, KeyError):
        end = steps[0][0] if steps else 0  # damaged; reading it says so
    newer = [path for step, path in steps if step > end]
    return [*newer, final, *(path for step, path in steps if step <= end)]


def advice(out_dir: Path) -> str:
    """The way on for a run that another process has ended."""
    return f"{out_dir} holds the checkpoints; the same command resumes from the newest."


def before(out_dir: Path, checkpoint: Checkpoint) -> list[Path]:
    """List the checkpoints in `out_dir` newer than `checkpoint`; all of them if it is another run's."""
    return list(takewhile(lambda path: not path.samefile(checkpoint.path), checkpoints(out_dir)))


def numbered(out_dir: Path) -> list[tuple[int, Path]]:
    """List the checkpoints named after their steps, with these steps, oldest first."""
    found = [path for path in out_dir.glob("step-*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted((int(path.name[5:]), path) for path in found)


def check_same_run(config: FinetuneConfig, files: Mapping[str, str], style: str, checkpoint: Checkpoint) -> None:
    """Raise a UserError that names the difference unless `checkpoint` belongs to the same run."""
    then = checkpoint.counters
    if differing := differing_parts(then["base"], config.checkpoint_dir):
        raise CheckpointError(
            f"{config.checkpoint_dir} is not the base of the run in {checkpoint.path.parent}: "
            f"it holds {' and '.join(PARTS[part] for part in differing)}.\nTo start anew: --resume never."
        )
    if ("preference" in then["config"]) != isinstance(config, PreferenceRunConfig):
        raise UsageError(
            f"The run in {checkpoint.path.parent} is of the other command: finetune/lora.py and finetune/preference.py "
            "go on with their own runs alone.\nGive another --out_dir, or --resume never starts anew."
        )
    allowed = (*HARMLESS, *LENGTH) if config.extend else HARMLESS
    if changed := changed_settings(then["config"], plain(config), allowed):
        hint = " --extend goes on with another length." if set(changed) <= set(LENGTH) else ""
        over = (checkpoint.path.parent / SUMMARY).exists()
        raise UsageError(
            f"The run in {checkpoint.path.parent} is {'over' if over else 'not finished'}, and began with other "
            f"settings:\n{as_rows(changed)}\nTo start anew and move it aside: --resume never.{hint}"
        )
    if config.teacher_dir and then.get("teacher") != content_hash(config.teacher_dir):
        raise CheckpointError(
            f"distill.teacher {config.teacher_dir} holds other weights than the teacher of the run in "
            f"{checkpoint.path.parent}.\nTo start anew: --resume never."
        )
    if style != then.get("style", style):
        raise UsageError(
            f"The run in {checkpoint.path.parent} began with another prompt style than today's (--data.prompt "
            f"{config.data.prompt}).\nPut it back, or start anew with --resume never."
        )
    if list(files.values()) != list(then["data"].values()) and not config.resume_changed_data:
        raise DataError(
            f"The data is not what the run in {checkpoint.path.parent} began with: "
            f"{_differences(then['data'], files)}.\n"
            "--resume_changed_data goes on anyway; --resume never is a new start."
        )


def changed_settings(
    then: Mapping[str, Any], now: Mapping[str, Any], allowed: tuple[str, ...] = HARMLESS
) -> dict[str, tuple[Any, Any]]:
    """Find the settings that differ, but for those, or groups of them, that may: full name -> values then and now.

    Args:
        then, now: see plain.
    """
    before, after = flat(then), flat(now)
    return {
        key: (before[key], after[key])
        for key in after
        if key in before and before[key] != after[key] and not _is_part_of(key, allowed)
    }


def as_rows(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Write changed settings, a line each, and of a table its entries that differ."""
    width = max(len(key) for key in changed)
    pairs = {key: _differing(*both) for key, both in changed.items()}
    return "\n".join(f"  {key:<{width}}  {then} -> {now}" for key, (then, now) in pairs.items())


def _differing(then: Any, now: Any) -> tuple[Any, Any]:
    if not isinstance(then, dict) or not isinstance(now, dict):
        return then, now
    keys = [key for key in {**then, **now} if key not in then or key not in now or then[key] != now[key]]
    return tuple({key: table[key] for key in keys if key in table} for table in (then, now))  # type: ignore[return-value]


def plain(config: FinetuneConfig) -> dict[str, Any]:
    """Convert the settings to values that JSON keeps."""
    values: dict[str, Any] = json.loads(json.dumps(cli.plain(asdict(config))))
    return values


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten groups of settings to {"train.epochs": 3, ...}; a setting that is a table remains whole."""
    rows: dict[str, Any] = {}
    for name, value in values.items():
        is_group = isinstance(value, dict) and name not in TABLES
        rows |= {f"{name}.{key}": one for key, one in value.items()} if is_group else {name: value}
    return rows


def read_log(path: Path, step: int) -> list[Record]:
    """Read the records of a log up to `step`, without later or half-written ones."""
    return [record for record in read_records(path) if record["step"] <= step] if path.exists() else []


def write_log(path: Path, records: list[Record]) -> None:
    """Replace a log with these records."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def _is_part_of(key: str, groups: tuple[str, ...]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _differences(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    old, new = set(then.values()), set(now.values())
    words = [f"{name} changed or is new" for name, digest in now.items() if digest not in old]
    words += [f"{name} is gone" for name, digest in then.items() if digest not in new and name not in now]
    return ", ".join(words) or "its files are in another order"
