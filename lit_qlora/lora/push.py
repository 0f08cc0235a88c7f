"""The files of an adapter or a model that go to the hub: all that others need, nothing of the training's machine."""

import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lit_qlora.convert.to_hugging_face import export_hf
from lit_qlora.errors import CheckpointError
from lit_qlora.files.manifest import MANIFEST, read_manifest
from lit_qlora.lora.adapter import PEFT_CONFIG, STATE, read_adapter
from lit_qlora.lora.card import CARD
from lit_qlora.model.config import FILE_NAME as OURS
from lit_qlora.model.config import missing_checkpoint
from lit_qlora.prompts import tokenizer
from lit_qlora.prompts.style import FILE_NAME as STYLE_FILE

OF_ADAPTER = (PEFT_CONFIG, "adapter_model*", CARD, STYLE_FILE, *tokenizer.FILES)


def stage_adapter(folder: Path, staged: Path) -> None:
    """Copy an adapter's files to the empty folder `staged`, without the state of its training and paths of files.

    Raises:
        CheckpointError: if it is no adapter, or damaged.
    """
    read_adapter(folder, heads=True)
    for file in sorted(folder.iterdir()):
        if any(fnmatch(file.name, pattern) for pattern in OF_ADAPTER):
            shutil.copyfile(file, staged / file.name)
    if manifest := read_manifest(folder):
        kept = {name: known for name, known in manifest["files"].items() if (staged / name).is_file()}
        content = without_paths({**manifest, "files": kept})
        content.pop(STATE, None)
        (staged / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")


def stage_model(folder: Path, staged: Path) -> Path:
    """Return the Hugging Face folder of a model: `folder` itself if it is one, else its export to `staged`.

    Raises:
        CheckpointError: if it is no checkpoint, or damaged.
    """
    if (folder / OURS).is_file():
        export_hf(folder, staged)
        return staged
    weights = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
    if not (folder / "config.json").is_file() or not weights:
        raise CheckpointError(missing_checkpoint(folder))
    return folder


def without_paths(value: Any) -> Any:
    """The facts of a manifest with names of files in place of their paths."""
    if isinstance(value, Mapping):
        return {_name(key): without_paths(item) for key, item in value.items() if key != "path"}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return _name(value) if isinstance(value, str) else value


def _name(text: str) -> str:
    """The last part of an absolute path; any other text as it is."""
    paths = (PurePosixPath(text), PureWindowsPath(text))
    return next((path.name for path in paths if path.is_absolute()), text)
