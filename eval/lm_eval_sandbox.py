"""The rights of a task file: it fills in templates in a sandbox, and runs its own Python only if the user allows it."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval_tasks import task_files

from lit_qlora.errors import UsageError
from lit_qlora.files.reading import read_yaml_text

MOST = 10**7
"""Maximum characters or items that an operation of a template may make."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja without a way out, and without `'a' * 10**9`."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Return the product or power, unless it is huge."""
        for text, count in ((left, right), (right, left)):
            if hasattr(text, "__len__") and isinstance(count, int) and len(text) * count > MOST:
                raise SecurityError(f"{operator} would make more than {MOST} items")
        if operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MOST:
            raise SecurityError("** would make a number of millions of digits")
        return super().call_binop(context, operator, left, right)


@contextmanager
def sandboxed_templates() -> Iterator[None]:
    """lm-eval (0.4.13) fills in the templates of tasks with a plain jinja environment; inside it is a Sandbox."""
    from lm_eval import utils

    plain = utils.env
    safe = Sandbox(loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline)
    safe.filters |= plain.filters
    utils.env = safe
    try:
        yield
    finally:
        utils.env = plain


def check_code(tasks: Sequence[str], include_path: Path, allow_code: bool) -> None:
    """Refuse `tasks` of `include_path` that would run Python, or print the names of the Python that runs.

    Raises:
        UsageError: if one would and `allow_code` is false.
    """
    own = task_files(include_path)
    wanted = [own[name] for name in tasks if name in own]
    # A group names its tasks in many ways; each file of the folder may be one of them.
    files = sorted(include_path.rglob("*.yaml")) if None in wanted else [file for file in wanted if file]
    running = sorted({f"{file} ({word})" for file in files for word in _code(file)})
    if running and not allow_code:
        raise UsageError(
            f"The task would run Python: {running[0]}{f' and {len(running) - 1} more' if running[1:] else ''}.\n"
            "Read it, then let it with --allow_code true on the command line."
        )
    for place in running:
        print(f"Runs Python of a task file: {place}.", file=sys.stderr)


def _code(file: Path, seen: frozenset[Path] = frozenset()) -> Iterator[str]:
    """Yield what a YAML file, or one that it includes, would have imported: functions, and metrics from elsewhere.

    Raises:
        UsageError: if a file that it includes is no YAML file within limits.
    """
    import yaml

    file = file.resolve()
    if file in seen or not file.is_file():
        return
    try:
        root = yaml.compose(read_yaml_text(file, UsageError))
    except (yaml.YAMLError, UsageError):
        if seen:  # nobody else reads it before lm-eval does
            raise UsageError(f"{file} is included by a task, and is no YAML file that can be read.") from None
        return  # is refused where it is read
    for node in _nodes(root):
        if node.tag == "!function" or node.tag.startswith("tag:yaml.org,2002:python/"):
            yield str(node.value)[:80]
        if not isinstance(node, yaml.MappingNode):
            continue
        keys = {str(key.value): value for key, value in node.value}
        if "metric" in keys and (keys["metric"].value not in _metrics() or "hf_evaluate" in keys):
            yield f"metric {str(keys['metric'].value)[:80]}"
        for key, value in node.value:  # a key may come twice, and what << merges may include too
            if key.value == "include":
                for path in (item for item in _nodes(value) if isinstance(item, yaml.ScalarNode)):
                    yield from _code(file.parent / path.value, seen | {file})


@cache
def _metrics() -> frozenset[str]:
    """Return the metrics of lm-eval. Any other is a Python file, or a repository, for the evaluate library to run."""
    from lm_eval.api.registry import get_metric, metric_registry

    get_metric("acc")  # fills the registry
    return frozenset(metric_registry.keys())


def _nodes(node: Any) -> Iterator[Any]:
    """Yield the node and all nodes below it, each once: an anchor may stand in many places."""
    waiting, seen = [node], set[int]()
    while waiting:
        here = waiting.pop()
        if here is None or id(here) in seen:
            continue
        seen.add(id(here))
        yield here
        if isinstance(here.value, list):
            for item in here.value:
                waiting += item if isinstance(item, tuple) else [item]
