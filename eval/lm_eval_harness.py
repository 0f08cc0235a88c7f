"""Evaluate a checkpoint, a quantised checkpoint or a base with its adapter on tasks of lm-eval.

python eval/lm_eval_harness.py --checkpoint_dir checkpoints/meta-llama/Llama-2-7b-hf --eval_tasks "[arithmetic_2ds]"
"""

import json
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from chance import against_chance, like_chance
from lm_eval_sandbox import check_code, sandboxed_templates
from lm_eval_tasks import load_tasks, overlay, resolve, task_files, without_folders

from lit_qlora import cli
from lit_qlora.errors import ResourceError, UsageError
from lit_qlora.files.atomic import write_text
from lit_qlora.files.reading import read_json
from lit_qlora.inference import InferenceConfig, LoadedModel, TemplateConfig, peak_memory
from lit_qlora.model.config import FILE_NAME as MODEL_CONFIG
from lit_qlora.prompts.style import read_style
from lit_qlora.settings import DEMO_CHECKPOINT, check

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task

DEMO_TASKS = Path(__file__).resolve().parent / "demo"


@dataclass(frozen=True, kw_only=True)
class Asking:
    """The form in which the questions of a task are asked."""

    num_fewshot: int | None = None
    """Examples before each question. By default the task's own number."""
    limit: float | None = None
    """Ask only the first N questions of each task; below 1, this share of them. By default all."""
    apply_chat_template: bool = False
    """Ask in the recorded prompt style of adapter or checkpoint, else in the checkpoint's chat template."""
    fewshot_as_multiturn: bool = False
    """In a chat template, make each example a turn of its own."""
    system_instruction: str | None = None
    """System message before each question. By default none."""
    allow_code: bool = False
    """Let tasks in include_path run their own Python (!function). Only the command line may say so, never a config
    file. lm-eval's own tasks always may."""
    seed: int = 1234
    """Seed of few-shot examples, sampled answers and intervals; 1234 is lm-eval's own."""

    def __post_init__(self) -> None:
        """Check the settings before anything is loaded."""
        check(self.num_fewshot is None or self.num_fewshot >= 0, f"num_fewshot is {self.num_fewshot}, below 0.")
        check(self.limit is None or self.limit > 0, f"limit must be above 0, got {self.limit}.")
        check(
            self.apply_chat_template or not self.fewshot_as_multiturn,
            "fewshot_as_multiturn makes turns of a chat template, so it needs --apply_chat_template.",
        )


@dataclass(frozen=True, kw_only=True)
class Config(Asking, TemplateConfig, InferenceConfig):
    """Evaluate a model on tasks of lm-eval, and write results.json in lm-eval's own schema."""

    checkpoint_dir: Path | None = None
    """Model to evaluate. By default the adapter's base; without an adapter the newest out/lora/*/merged, else the demo
    checkpoint."""
    eval_tasks: tuple[str, ...] | str = ("tiny_world_qa",)
    """Names of tasks, groups or tags, e.g. [arithmetic_2ds,truthfulqa_mc1]."""
    compare: bool = False
    """Evaluate five models: base, quantised base, quantised base with the adapter of lora_path, merged model, and
    quantised merged model. The report gives the cost of quantising, the gain of training and the loss of merging."""
    include_path: Path | None = None
    """Directory with tasks of your own (YAML files). Paths of data files are relative to the YAML file. By default the
    demo's tasks."""
    batch_size: int | Literal["auto"] = "auto"
    """Sequences per forward pass; 'auto' takes as many as suit the device. Changes memory and speed, not the result."""
    max_length: int | None = None
    """Maximum tokens that the model reads at once. By default its whole context. Longer inputs lose their beginning."""
    add_bos_token: bool | None = None
    """Begin texts with BOS. By default as the tokenizer's own files say."""
    save_filepath: Path | None = None
    """File for the results. By default results.json (compare.json) in the run folder, for OUT/merged and for adapters
    in OUT, else in out/eval/<checkpoint name>."""

    def __post_init__(self) -> None:
        """Check the settings before anything is loaded."""
        super().__post_init__()
        if isinstance(self.eval_tasks, str):
            object.__setattr__(self, "eval_tasks", (self.eval_tasks,))
        check(bool(self.eval_tasks), "eval_tasks is empty. Name at least one task, e.g. [tiny_world_qa].")
        for name in ("batch_size", "max_length"):
            value = getattr(self, name)
            check(value in (None, "auto") or value >= 1, f"{name} must be at least 1, got {value}.")
        check(
            self.apply_chat_template or not self.template_variables,
            "template_variables are those of a chat template, so they need --apply_chat_template.",
        )
        check(not self.compare or self.lora_path is not None, "compare needs an adapter: --lora_path OUT/final.")

    def default_base(self) -> Path:
        """Return the newest merged model, else the demo checkpoint."""
        return newest_merged()


def main(config: Config) -> None:
    """Check, load, evaluate, write and print."""
    checkpoint_dir, lora_path = config.base, config.adapter
    include_path = config.include_path or DEMO_TASKS
    tasks = resolve(config.eval_tasks, include_path)
    check_code(tasks, include_path, config.allow_code)
    default = "compare.json" if config.compare else "results.json"
    save_filepath = config.save_filepath or default_save_filepath(checkpoint_dir, lora_path, default)
    check_replaceable(save_filepath)
    if set(tasks) <= set(task_files(include_path)):  # everything is here, so nothing has to be asked for elsewhere
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a log file has no use for progress bars
    note(f"Evaluating {lora_path or checkpoint_dir} on {', '.join(tasks)}")
    style = None
    if config.apply_chat_template:
        style = (read_style(lora_path) if lora_path else None) or read_style(checkpoint_dir)
        if style is None:
            raise UsageError(f"apply_chat_template: {checkpoint_dir} has neither a prompt style nor a chat template.")
        style = style.with_variables(config.template_variables)

    from lm_eval_model import GPTModel

    from lit_qlora.fused import reader

    def measure(loaded: LoadedModel, log_samples: bool = False) -> dict[str, Any]:
        lm = GPTModel(
            loaded.model,
            loaded.tokenizer,
            config.batch_size,
            config.seed,
            style,
            config.add_bos_token,
            config.max_length,
        )
        lm.scorer.hidden = reader(loaded.model)
        return evaluate(lm, tasks, include_path, config, log_samples)

    if config.compare:
        import five_ways

        assert lora_path is not None
        results = five_ways.compare(config, lora_path, measure, config.seed)
        lines = [five_ways.table(results)]
    else:
        results = measure(config.load())
        results["config"]["model_args"] = {
            "checkpoint_dir": str(checkpoint_dir),
            "lora_path": lora_path and str(lora_path),
            **config.storage.facts(),
            "precision": config.precision,
        }
        lines = [table(results), *remarks(results)]
    save(results, save_filepath)
    print(*lines, sep="\n")
    note(f"{results['total_evaluation_time_seconds']} s, {peak_memory()}. Results: {save_filepath}")


def evaluate(
    lm: "LM",
    tasks: Sequence[str],
    include_path: Path | None = None,
    how: Asking = Asking(),
    log_samples: bool = False,
) -> dict[str, Any]:
    """Return the results of `lm` on `tasks`, in lm-eval's schema, without anything about the machine.

    Two keys are ours. "chance" has, for each multiple-choice task, its accuracy and that of guessing (see
    against_chance). "config" counts the requests that did not fit into the model's context.

    Args:
        lm: ours, or any other model of lm-eval.
        tasks: names of tasks, groups or tags, in `include_path` or in lm-eval's own list.
        include_path: directory with tasks of one's own; data files are relative to the YAML file that names them.
        log_samples: keep each question and its answer under "samples".

    Raises:
        UsageError: for a task that does not exist.
        DataError: if a task's data cannot be had.
    """
    import numpy as np
    from lm_eval import __version__, evaluator
    from lm_eval.utils import handle_non_serializable

    start = time.time()
    random.seed(how.seed)  # some tasks shuffle their choices
    np.random.seed(how.seed)
    if include_path:
        check_code(resolve(tasks, include_path), include_path, how.allow_code)
    with overlay(include_path) as folder, sandboxed_templates():
        loaded = load_tasks(resolve(tasks, include_path), folder)
        for name, task in loaded["tasks"].items():
            set_fewshot(name, task, how.num_fewshot, how.seed)
        results: dict[str, Any] = evaluator.evaluate(
            lm,
            loaded,
            limit=how.limit,
            bootstrap_iters=1000,  # enough for the few metrics whose error is bootstrapped; an accuracy's is computed
            log_samples=log_samples,
            system_instruction=how.system_instruction,
            apply_chat_template=how.apply_chat_template,
            fewshot_as_multiturn=how.fewshot_as_multiturn,
        )
        chance = {name: against_chance(task, results["results"][name]) for name, task in loaded["tasks"].items()}
    folders = [folder, *([include_path.resolve()] if include_path else [])]
    results["configs"] = without_folders(results["configs"], folders)
    results["chance"] = {name: figures for name, figures in chance.items() if figures}
    results["config"] = {
        **lm.get_model_info(),
        **{setting.name: getattr(how, setting.name) for setting in fields(Asking)},
    }
    results["lm_eval_version"] = __version__
    results["date"] = start
    results["total_evaluation_time_seconds"] = f"{time.time() - start:.1f}"
    plain: dict[str, Any] = json.loads(json.dumps(results, default=handle_non_serializable))
    return plain


def set_fewshot(name: str, task: "Task", num_fewshot: int | None, seed: int) -> None:
    """Give `task` its number of examples; one that fixes it at 0, as lm-eval has it, keeps its 0."""
    fixed = task.get_config("num_fewshot")
    if num_fewshot is None:
        task.set_config("num_fewshot", fixed or 0)
    elif fixed == 0 and num_fewshot:
        note(f"{name} is made for no examples, so num_fewshot is left out.")
    else:
        task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(seed)


def remarks(results: Mapping[str, Any]) -> list[str]:
    """Return lines for below the table: scores like chance, and requests that were cut."""
    lines = []
    for name, x in results["chance"].items():
        if like_chance(x):
            lines.append(
                f"{name}: an accuracy of {x['accuracy']:.3f} is within noise of chance, {x['chance']:.3f} +- "
                f"{x['noise']:.3f} (two standard deviations, {x['questions']} questions)."
            )
    if truncated := results["config"]["truncated_requests"]:
        lines.append(f"{truncated} requests did not fit into the model's context and lost their beginning.")
    if shortened := results["config"]["shortened_answers"]:
        lines.append(f"{shortened} answers had less room than their task allows; the model's context is not longer.")
    return lines


def table(results: dict[str, Any]) -> str:
    """Return the values as markdown, tasks first, then groups."""
    from lm_eval.utils import make_table

    return "\n".join(make_table(results, column) for column in ("results", "groups") if results.get(column)).rstrip()


def newest_merged() -> Path:
    """Return the newest merged model at the default path of merge_lora.py, else the demo checkpoint."""
    merged = [path.parent for path in Path("out/lora").glob(f"*/merged/{MODEL_CONFIG}")]
    return max(merged, key=lambda path: path.stat().st_mtime, default=DEMO_CHECKPOINT)


def default_save_filepath(checkpoint_dir: Path, lora_path: Path | None, name: str = "results.json") -> Path:
    """Return a file in the run folder, or under out/eval for a model that no run has made."""
    if lora_path:
        return lora_path.parent / name
    if checkpoint_dir.name == "merged":
        return checkpoint_dir.parent / name
    return Path("out/eval") / checkpoint_dir.name / name


def check_replaceable(path: Path) -> None:
    """Raise UsageError if writing results to `path` would destroy anything but results."""
    if not path.exists():
        return
    try:
        if "results" in read_json(path, UsageError):
            note(f"{path} holds earlier results, which will be replaced.")
            return
    except (OSError, UsageError):
        pass
    raise UsageError(f"save_filepath: {path} exists and holds no results. Name another file.")


def save(results: Mapping[str, Any], path: Path) -> None:
    """Write `results` as JSON, atomically.

    Raises:
        ResourceError: if the disk is full or may not be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(results, indent=2) + "\n", follow=True)
    except OSError as error:
        raise ResourceError(f"Cannot write {path}: {error.strerror or error}.") from None


def note(text: str) -> None:
    """Print a note on stderr; stdout is for the values."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main, Config)
