"""Finding lm-eval's tasks: by today's and yesterday's names, one's own and its own, with data beside their YAML files.

lm-eval's index of all its tasks takes 17 s to build, so it is built only for a group or a tag. A search through the
lines of its YAML files finds a single task by its name in a second, and loads it from its file. Files of one's own may
have any form of YAML, and are read as such.
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_qlora.errors import DataError, UsageError
from lit_qlora.files.atomic import temporary_directory
from lit_qlora.files.reading import MOST_YAML, read_yaml_text

if TYPE_CHECKING:
    from lm_eval.tasks import TaskDict
    from yaml import Node

OLD_NAMES = {"truthfulqa_mc": ("truthfulqa_mc1", "truthfulqa_mc2")}
"""Names of lm-eval 0.3 that have no pattern."""
OLD_MMLU = "hendrycksTest-"
"""The prefix of the parts of MMLU in lm-eval 0.3; today it is mmlu_, as in mmlu_anatomy."""

_NAME = re.compile(r"^[\"']?(task|group|class)[\"']?:[ \t]*[\"']?([^\s\"'#\[{]+)", re.MULTILINE)
_TAG = re.compile(r"^[\"']?tag[\"']?:[ \t]*(?:[\"']?([^\s\"'#\[{]+)|((?:\n[ \t]*- *\S+)+))", re.MULTILINE)


def resolve(tasks: Sequence[str], include_path: Path | None) -> list[str]:
    """Return today's names of `tasks`, checked.

    Raises:
        UsageError: for a name that neither `include_path` nor lm-eval has; the message gives the nearest names.
    """
    own = task_files(include_path) if include_path else {}
    names: list[str] = []
    for task in tasks:
        today = (task,) if task in own else _today(task)
        if today != (task,):
            print(f"{task} is called {' and '.join(today)} today.", file=sys.stderr)
        for name in today:
            if name not in own:
                _check_known(name, own)
            if name not in names:
                names.append(name)
    return names


def task_files(directory: Path) -> dict[str, Path | None]:
    """Names of the tasks, groups and tags below `directory`, and the YAML file of each single task.

    Raises:
        UsageError: if there is no such directory.
    """
    if not directory.is_dir():
        raise UsageError(f"include_path: {directory} is not a directory.")
    found: dict[str, Path | None] = {}
    for path in _files(directory):
        if path.suffix == ".yaml":
            fields = _fields(path, frozenset())
            _add(found, path, {key: node.value for key, node in fields.items() if isinstance(node.value, str)})
            if "tag" in fields:
                found |= {scalar.value: None for scalar in _scalars(fields["tag"]) if scalar.value not in found}
    return found


@cache
def lm_eval_task_files() -> dict[str, Path | None]:
    """task_files of lm-eval's own tasks, by a search for lines, for to read 14,000 files as YAML takes 17 s."""
    spec = find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    found: dict[str, Path | None] = {}
    for path in _files(Path(spec.submodule_search_locations[0]) / "tasks"):
        if path.suffix not in (".yaml", ""):
            continue
        text = path.read_bytes()[:MOST_YAML].decode(errors="replace")
        if path.suffix:  # without one, it is a template that others include, and only its tags are inherited
            _add(found, path, dict(reversed(_NAME.findall(text))))
        for scalar, block in _TAG.findall(text):
            for tag in [scalar] if scalar else re.findall(r"- *[\"']?([^\s\"']+)", block):
                found.setdefault(tag, None)
    return found


def _add(found: dict[str, Path | None], path: Path, names: dict[str, str]) -> None:
    """Add the group or the task that a file describes."""
    if "group" in names and "class" not in names:
        found[names["group"]] = None
    elif "task" in names:
        found.setdefault(names["task"], path)


def _fields(path: Path, within: frozenset[Path]) -> "dict[str, Any]":
    """The top-level fields of a YAML file, whatever its form, and those of the files that it includes, as nodes.

    Args:
        within: the files that include it.
    """
    import yaml

    try:
        root = yaml.compose(read_yaml_text(path, UsageError))
        if isinstance(root, yaml.MappingNode):
            yaml.constructor.SafeConstructor().flatten_mapping(root)  # resolves `<<: *other`
    except (OSError, yaml.YAMLError, UsageError):  # is refused where it is read
        text = path.read_bytes()[:MOST_YAML].decode(errors="replace") if path.is_file() else ""
        return {name: yaml.ScalarNode("", value) for name, value in reversed(_NAME.findall(text))}
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    own = {key.value: node for key, node in pairs if isinstance(key, yaml.ScalarNode)}
    found: dict[str, Any] = {}
    for scalar in _scalars(own["include"]) if "include" in own else ():
        included = (path.parent / scalar.value).resolve()
        if included not in within:
            found |= _fields(included, within | {path.resolve()})
    return found | own


@contextmanager
def overlay(include_path: Path | None) -> Iterator[Path]:
    """A temporary directory that mirrors `include_path`, in which data files are named by absolute paths.

    lm-eval would look for them in the working directory. Tables made from them live in the temporary directory too,
    so that a changed file can never be answered from a cache.

    Raises:
        UsageError: for a file that is not YAML.
    """
    # Its like of a command that was killed goes first; the name keeps users of one machine apart.
    with temporary_directory(Path(tempfile.gettempdir()) / f"lm-eval-{os.getuid()}") as folder:
        folder.chmod(0o700)
        source = include_path.resolve() if include_path else folder
        for path in [] if include_path is None else _files(source):
            target = folder / "tasks" / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".yaml":
                target.write_text(with_absolute_paths(path, folder / "cache"), encoding="utf-8")
            else:
                target.symlink_to(path)  # Python modules that a task calls, and whatever they read
        yield folder


def with_absolute_paths(path: Path, cache_dir: Path) -> str:
    """The YAML of the task in `path`, its relative data files absolute and its tables cached in `cache_dir`.

    Raises:
        UsageError: if it is not YAML.
    """
    import yaml

    task = yaml.compose(read_yaml_text(path, UsageError))  # as nodes, because tags such as !function have to survive
    if not isinstance(task, yaml.MappingNode):
        raise UsageError(f"{path} describes no task: it is not a mapping of names to values.")
    arguments = _value(task, "dataset_kwargs")
    local = [node for key in ("data_files", "data_dir") if (node := _value(arguments, key)) is not None]
    for scalar in (scalar for node in local for scalar in _scalars(node)):
        if "://" not in scalar.value:
            scalar.value = str(path.parent / scalar.value)  # an absolute path stays what it is
    if local:
        text = [yaml.ScalarNode("tag:yaml.org,2002:str", word) for word in ("cache_dir", str(cache_dir))]
        arguments.value.append(tuple(text))
    return yaml.serialize(task)


def load_tasks(names: Sequence[str], folder: Path) -> "TaskDict":
    """The tasks of these names, in the overlay `folder` or in lm-eval, with their data.

    Raises:
        DataError: if their data is missing, damaged or not reachable.
    """
    from datasets.exceptions import DatasetsError
    from lm_eval.tasks import TaskManager

    own = task_files(folder / "tasks") if (folder / "tasks").is_dir() else {}
    files = {name: own[name] if name in own else lm_eval_task_files()[name] for name in names}
    specs = {name: str(file) if file else name for name, file in files.items()}
    several = [name for name, file in files.items() if file is None]
    if several:
        print(f"{', '.join(several)}: several tasks, so lm-eval's whole list is read (17 s).", file=sys.stderr)
    # Only files that were asked for are read, and so were looked through for code: another could have their name.
    groups = any(own.get(name, folder) is None for name in names)
    manager = TaskManager(include_path=str(folder / "tasks") if groups else None, include_defaults=bool(several))
    loaded: TaskDict = {"tasks": {}, "groups": {}, "group_map": {}}
    for name, spec in specs.items():
        try:
            found = manager.load([spec])
        except Exception as error:  # datasets, the hub, its HTTP client and a task's code have no error in common
            hub_cache = os.environ.get("HF_HOME", "~/.cache/huggingface")
            cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
            raise DataError(
                f"{name} cannot be loaded: {type(cause).__name__}: {' '.join(str(cause).split())}\n"
                f"Data is looked for beside the task's YAML file, in {hub_cache} and, unless HF_HUB_OFFLINE is set, "
                "on the Hugging Face hub."
            ) from error
        loaded["tasks"] |= found["tasks"]
        loaded["groups"] |= found.get("groups", {})
        loaded["group_map"] |= found.get("group_map", {})
    return loaded


def without_folders(value: Any, folders: Sequence[Path]) -> Any:
    """`value` with every path below one of `folders` relative to it, so that it says nothing about the machine."""
    if isinstance(value, dict):
        return {key: without_folders(item, folders) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item, folders) for item in value]
    for folder in folders:
        if isinstance(value, str) and value.startswith(f"{folder}{os.sep}"):
            return value.removeprefix(f"{folder}{os.sep}")
    return value


def _files(directory: Path) -> Iterator[Path]:
    """Every file below `directory`, except hidden files and Python's compiled ones."""
    for path in sorted(directory.rglob("*")):
        inside = path.relative_to(directory).parts
        if path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in inside):
            yield path


def _today(name: str) -> tuple[str, ...]:
    if name.startswith(OLD_MMLU):
        return (name.replace(OLD_MMLU, "mmlu_", 1),)
    return OLD_NAMES.get(name, (name,))


def _check_known(name: str, own: dict[str, Path | None]) -> None:
    known = lm_eval_task_files()
    if name in known:
        return
    near = get_close_matches(name, own, n=1) + get_close_matches(name, known, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    here = f" Your own: {', '.join(sorted(own)[:10])}." if own else ""
    raise UsageError(f"{name!r} is neither a task of lm-eval nor one of your own.{hint}{here}")


def _value(node: "Node | None", key: str) -> "Node | None":
    import yaml

    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for name, value in pairs if name.value == key), None)


def _scalars(node: "Node") -> "Iterator[Any]":
    import yaml

    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            yield from _scalars(value)
    else:
        for value in node.value:
            yield from _scalars(value)
