"""Data that scripts/prepare_alpaca.py and scripts/prepare_csv.py have left for a checkpoint."""

import json
from dataclasses import replace
from pathlib import Path

from lit_qlora.commands import find, spell
from lit_qlora.data.sources import RECORD
from lit_qlora.errors import CheckpointError, UsageError
from lit_qlora.files.atomic import write_text
from lit_qlora.files.reading import read_json
from lit_qlora.model.config import missing_checkpoint
from lit_qlora.settings import DEMO_CHECKPOINT, DataConfig


def record(folder: Path, checkpoint_dir: Path) -> None:
    """Write into `folder` that its data is for this checkpoint."""
    write_text(folder / RECORD, [json.dumps({"checkpoint_dir": str(checkpoint_dir.resolve())}) + "\n"])


def choose_data(data: DataConfig, checkpoint_dir: Path) -> DataConfig:
    """Replace data.path 'auto' by the folder that was prepared for this checkpoint, or by the demo's for its own.

    Raises:
        UsageError: if there is no such folder, or more than one.
        CheckpointError: if there is no such checkpoint either.
    """
    if data.path != ("auto",):
        return data
    found = [str(file.parent) for file in sorted(Path("data").glob(f"*/{RECORD}")) if _is_for(file, checkpoint_dir)]
    if len(found) > 1:
        raise UsageError(f"Several folders were prepared for {checkpoint_dir}: {', '.join(found)}. Give --data.path.")
    if not found and checkpoint_dir.resolve().parts[-2:] == DEMO_CHECKPOINT.parts[-2:]:
        found = [str(find("finetune/demo"))]
    if not found and not checkpoint_dir.is_dir():
        raise CheckpointError(missing_checkpoint(checkpoint_dir))
    if not found:
        raise UsageError(
            f"--data.path must be given: no data was prepared for {checkpoint_dir}.\n"
            f"Or prepare some: {spell('scripts/prepare_alpaca.py')} --checkpoint_dir {checkpoint_dir}"
        )
    return replace(data, path=(found[0],))


def _is_for(file: Path, checkpoint_dir: Path) -> bool:
    try:
        return bool(read_json(file, UsageError).get("checkpoint_dir") == str(checkpoint_dir.resolve()))
    except (OSError, UsageError):  # not ours
        return False
