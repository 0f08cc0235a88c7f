"""lm-eval's tasks for a model that is being trained (--eval.tasks), asked as eval/lm_eval_harness.py asks them."""

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lit_qlora.settings import EvalConfig

if TYPE_CHECKING:
    from lit_qlora.model.gpt import GPT
    from lit_qlora.prompts.tokenizer import Tokenizer

EVAL = Path(__file__).resolve().parents[1] / "eval"


def make_ask(
    config: EvalConfig, tokenizer: "Tokenizer", allow_code: bool = False
) -> "Callable[[GPT], dict[str, float]]":
    """Make a function that asks a model the tasks of `config`: TASK/METRIC -> value.

    Raises:
        UsageError: for an unknown task, or one that would run Python without allow_code, before anything is loaded.
        DataError: if the data of a task is missing.
    """
    _script("chance")  # the harness imports it by its name, as it does the two that follow
    finding, sandbox, harness = _script("lm_eval_tasks"), _script("lm_eval_sandbox"), _script("lm_eval_harness")
    include_path = config.tasks_include_path or harness.DEMO_TASKS
    tasks = finding.resolve(config.tasks, include_path)
    sandbox.check_code(tasks, include_path, allow_code)
    if set(tasks) <= set(finding.task_files(include_path)):
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with (
        finding.overlay(include_path) as folder,
        sandbox.sandboxed_templates(),
    ):  # fetches the data, so that a run does not begin without it
        finding.load_tasks(tasks, folder)
    how = harness.Asking(limit=config.tasks_limit, num_fewshot=config.tasks_num_fewshot, allow_code=allow_code)

    def ask(model: "GPT") -> dict[str, float]:
        import numpy as np

        state = np.random.get_state()
        try:
            # Progress bars would break the run's own line.
            with open(os.devnull, "w") as nobody, redirect_stderr(nobody):
                lm = _script("lm_eval_model").GPTModel(model, tokenizer)
                return metrics(harness.evaluate(lm, tasks, include_path, how), tasks)
        finally:
            np.random.set_state(state)

    return ask


def metrics(results: Mapping[str, Any], tasks: list[str]) -> dict[str, float]:
    """Collect the metrics of each task or group that was asked; a tag has none, so its tasks' are taken."""
    found = {}
    for task, values in results["results"].items():
        if task not in tasks and set(tasks) <= set(results["results"]):
            continue
        for key, value in values.items():
            metric = key.removesuffix(",none")
            if isinstance(value, float) and "_stderr" not in key:
                found[f"{task}/{metric}"] = value
    return found


def _script(name: str) -> ModuleType:
    """Import a module of eval/, which is a folder of programs and not a package."""
    if name in sys.modules:
        return sys.modules[name]
    spec = PathFinder.find_spec(name, [str(EVAL)])
    assert spec
    assert spec.loader
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
