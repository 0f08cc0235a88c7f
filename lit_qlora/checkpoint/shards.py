"""Weights in one file, or in several with an index that says which tensor lies where.

The layout is Hugging Face's, for their names and ours: STEM.safetensors, or STEM-00001-of-00003.safetensors, ... and
STEM.safetensors.index.json.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType

from torch import Tensor
from tqdm import tqdm

from lit_qlora.checkpoint import pickle_io, safetensors_io
from lit_qlora.errors import CheckpointError, ResourceError
from lit_qlora.files.reading import read_json

SHARD_BYTES = 5_000_000_000
"""Most bytes of tensors in a file; a tensor that is larger has a file of its own."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Tensors on disk; only their names, dtypes and shapes have been read."""

    location: Path
    """The one file, or the index, which messages name."""
    specs: dict[str, Tensor]
    """Name -> an empty tensor on the meta device, file after file in the order of the tensors."""
    files: dict[str, Path]
    """Name -> the file that holds it."""

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        tensor: Tensor = _reader(self.files[name]).read_tensor(self.files[name], name)
        return tensor

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return list(dict.fromkeys(self.files.values()))


def find(directory: Path, *names: str) -> Path | None:
    """The first of `names`, or of their indices, that is in `directory`.

    Raises:
        CheckpointError: if there is a file of this name, and an index that names others.
    """
    for name in names:
        single, index = directory / name, directory / f"{name}.index.json"
        if single.is_file() and index.is_file() and set(read_index(index).values()) != {name}:
            raise CheckpointError(
                f"{directory} has two sets of weights: {name}, and the files that {index.name} names. "
                "Remove the set that is left over from an earlier save."
            )
        if index.is_file() or single.is_file():
            return index if index.is_file() else single
    return None


def open_weights(location: Path) -> Weights:
    """The weights in the file `location`, or in the files of the index `location`.

    Raises:
        CheckpointError: if a file is absent or damaged, holds a tensor that another holds too, or is not where the
            index says; or if the index points outside its folder.
    """
    index = read_index(location) if location.name.endswith(".index.json") else {}
    absent = sorted({file for file in index.values() if not (location.parent / file).is_file()})
    if absent:
        raise CheckpointError(f"{location} names {len(absent)} files that are absent: {', '.join(absent[:3])}.")
    specs: dict[str, Tensor] = {}
    files: dict[str, Path] = {}
    for path in [location.parent / name for name in dict.fromkeys(index.values())] or [location]:
        found = _reader(path).read_specs(path)
        if twice := found.keys() & specs.keys():
            raise CheckpointError(
                f"{path}: these tensors are in another file too:\n  {safetensors_io.name_some(twice)}"
            )
        specs |= found
        files |= dict.fromkeys(found, path)
    if strayed := [name for name, file in index.items() if name not in files or files[name].name != file]:
        raise CheckpointError(
            f"{location} names tensors that are not where it says:\n  {safetensors_io.name_some(strayed)}"
        )
    return Weights(location=location, specs=specs, files=files)


def write(
    directory: Path,
    name: str,
    specs: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    limit: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write safetensors files as the tensors come, with a progress bar where a person is watching.

    Args:
        name: of the file if there is one, such as "model.safetensors"; several are numbered.
        tensors: the tensors of `specs`, in their order.
        limit: most bytes of tensors in a file.

    Returns:
        Name of each weight file -> its sha256.

    Raises:
        CheckpointError: if the tensors differ from `specs`.
        ResourceError: if there is not enough room, or the disk may not be written.
    """
    parts = _divide(specs, limit)
    total = sum(map(safetensors_io.count_bytes, specs.values()))
    free = shutil.disk_usage(directory).free
    if total > free:
        raise ResourceError(f"{directory} needs {total / 1e9:.1f} GB for {name}; {free / 1e9:.1f} GB are free.")
    stem = name.removesuffix(".safetensors")
    names = [f"{stem}-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    names = names if len(parts) > 1 else [name]
    hashes: dict[str, str] = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc=name, disable=None) as bar:

        def watched() -> Iterator[tuple[str, Tensor]]:
            for tensor_name, tensor in tensors:
                size = safetensors_io.count_bytes(tensor)
                yield tensor_name, tensor
                del tensor  # before the next one is made
                bar.update(size)

        stream = watched()
        for i, (file, part) in enumerate(zip(names, parts, strict=True), start=1):
            # The last file takes all that is left, so that a tensor too many is found.
            mine = stream if i == len(parts) else islice(stream, len(part))
            hashes[file] = safetensors_io.write(directory / file, part, mine)
    if len(parts) > 1:
        weight_map = {tensor: file for file, part in zip(names, parts, strict=True) for tensor in part}
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / f"{name}.index.json").write_text(json.dumps(content, indent=2) + "\n")
    return hashes


def _divide(specs: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """`specs` in order, cut where the next tensor would make a part exceed `limit` bytes."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, spec in specs.items():
        more = safetensors_io.count_bytes(spec)
        if parts[-1] and size + more > limit:
            parts.append({})
            size = 0
        parts[-1][name] = spec
        size += more
    return parts


def read_index(path: Path) -> dict[str, str]:
    """Name of each tensor -> the file that an index says holds it.

    Raises:
        CheckpointError: if it is none, or points outside its folder.
    """
    weight_map = read_json(path, unique=True).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path} is not an index of weights (no weight_map).")
    files = {name: str(file) for name, file in weight_map.items()}
    outside = sorted({file for file in files.values() if Path(file).name != file or len(file) > 255})
    if outside:
        raise CheckpointError(f"{path} points outside its folder: {outside[0][:80]!r}. Do not trust this model.")
    if not files:
        raise CheckpointError(f"{path} names no tensors.")
    return files


def _reader(path: Path) -> ModuleType:
    return pickle_io if path.suffix == ".bin" else safetensors_io
