"""What a task file may do."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from jinja2.exceptions import SecurityError

from lit_qlora import cli
from lit_qlora.errors import UsageError
from lit_qlora.files.reading import MOST_YAML
from lit_qlora.settings import EvalConfig, FinetuneConfig
from tests.conftest import load_script

pytest.importorskip("lm_eval")
tasks = load_script("eval/lm_eval_tasks.py")  # is imported by the next by its name
sandbox = load_script("eval/lm_eval_sandbox.py")

TASK = """\
task: quiz
dataset_path: json
dataset_kwargs: {data_files: {test: quiz.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A task without code, and a module beside it that would leave a mark."""
    (tmp_path / "quiz.yaml").write_text(TASK)
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"question": "a", "choices": ["b", "c"], "answer": 0}) + "\n")
    (tmp_path / "utils.py").write_text(
        f"open({str(tmp_path / 'RAN')!r}, 'w').close()\ndef keep(docs):\n    return docs\n"
    )
    return tmp_path


def test_a_template_reaches_nothing_outside_itself() -> None:
    from lm_eval import utils

    with sandbox.sandboxed_templates():
        assert utils.apply_template("{{ question|regex_replace('a', 'b') }}\n", {"question": "a"}) == "b\n"
        with pytest.raises(SecurityError):
            utils.apply_template("{{ cycler.__init__.__globals__.os.system('true') }}", {})
    assert type(utils.env).__name__ == "Environment"


@pytest.mark.parametrize("text", ["{{ 'a ' * 10**8 }}", "{{ 10**8 * [0] }}", "{{ 9 ** (9 ** 9) }}"])
def test_a_template_cannot_take_all_memory(text: str) -> None:
    with pytest.raises(SecurityError):
        sandbox.Sandbox().from_string(text).render()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("quiz.yaml", TASK + "process_docs: !function utils.keep\n"),
        ("quiz.yaml", TASK + "metric_list: [{metric: acc, aggregation: !function utils.keep}]\n"),
        ("quiz.yaml", TASK + "include: base\n"),
        ("quiz.yaml", TASK + "x: !!python/object/apply:os.system [true]\n"),
        ("group.yaml", "group: quiz\ntask: [a]\n"),
        ("quiz.yaml", TASK + "include: base.txt\n"),
        ("quiz.yaml", TASK + "<<: {include: base}\n"),
        ("quiz.yaml", TASK + "include: x\ninclude: base\n"),
        ("quiz.yaml", TASK + "metric_list: [{metric: ./metric.py}]\n"),
        ("quiz.yaml", TASK + "metric_list: [{metric: someone/metric}]\n"),
        ("quiz.yaml", TASK + "metric_list: [{metric: acc, hf_evaluate: true}]\n"),
        ("quiz.yaml", TASK + "metric_list: [&m {metric: acc}, {<<: *m, metric: ./metric.py}]\n"),
    ],
)
def test_a_task_that_would_run_python_is_refused_by_name(folder: Path, name: str, content: str) -> None:
    for base in ("base", "base.txt"):
        (folder / base).write_text("process_docs: !function utils.keep\n")
    if name == "group.yaml":
        (folder / "quiz.yaml").write_text("task: a\nprocess_docs: !function utils.keep\n")
    (folder / name).write_text(content)
    with pytest.raises(UsageError, match=r"(?s)would run Python: .*--allow_code"):
        sandbox.check_code(["quiz"], folder, False)
    assert not (folder / "RAN").exists()


def test_a_file_that_a_task_includes_must_be_readable_within_limits(folder: Path) -> None:
    (folder / "quiz.yaml").write_text(TASK + "include: base\n")
    (folder / "base").write_text("#" * MOST_YAML + "\nprocess_docs: !function utils.keep\n")
    with pytest.raises(UsageError, match="base is included by a task, and is no YAML file that can be read"):
        sandbox.check_code(["quiz"], folder, False)


def test_no_other_file_takes_the_place_of_the_task_that_was_asked_for(folder: Path) -> None:
    """Of two files with its name the first is looked through and loaded."""
    content = '{"task": quiz, "process_docs": !function utils.keep}'
    (folder / "z.yaml").write_text(content)
    sandbox.check_code(["quiz"], folder, False)
    with tasks.overlay(folder) as overlay:
        (task,) = tasks.load_tasks(["quiz"], overlay)["tasks"].values()
    assert task.config.output_type == "multiple_choice"
    (folder / "a.yaml").write_text(content)
    with pytest.raises(UsageError, match=r"would run Python: .*a\.yaml"):
        sandbox.check_code(["quiz"], folder, False)
    assert not (folder / "RAN").exists()


def test_the_mirror_of_a_command_that_was_killed_is_removed(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    left = temporary / f"lm-eval-{os.getuid()}.tmp-0badbeef"
    (left / "tasks").mkdir(parents=True)
    with tasks.overlay(folder) as overlay:
        assert list(temporary.iterdir()) == [overlay]
        assert overlay.stat().st_mode & 0o777 == 0o700
    assert list(temporary.iterdir()) == []


def test_metrics_of_lm_eval_need_no_leave(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "quiz.yaml").write_text(TASK + "metric_list: [{metric: acc}, {metric: acc_norm}, {metric: chrf++}]\n")
    sandbox.check_code(["quiz"], folder, False)
    assert capsys.readouterr().err == ""


def test_python_that_is_allowed_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "quiz.yaml").write_text(TASK + "process_docs: !function utils.keep\n")
    sandbox.check_code(["quiz"], folder, True)
    assert "quiz.yaml (utils.keep)" in capsys.readouterr().err


def test_a_task_without_code_needs_no_leave(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "other.yaml").write_text("task: other\nprocess_docs: !function utils.keep\n")
    sandbox.check_code(["quiz"], folder, False)
    assert capsys.readouterr().err == ""


def test_a_training_run_asks_no_such_task_either(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("chance", "lm_eval_tasks", "lm_eval_sandbox", "lm_eval_harness"):
        monkeypatch.delitem(sys.modules, name, raising=False)  # as in a new process
    (folder / "quiz.yaml").write_text(TASK + "process_docs: !function utils.keep\n")
    make_ask = load_script("finetune/ask_tasks.py").make_ask
    config = EvalConfig(tasks=("quiz",), tasks_include_path=folder)
    with pytest.raises(UsageError, match="would run Python"):
        make_ask(config, SimpleNamespace())
    assert callable(make_ask(config, SimpleNamespace(), allow_code=True))


def test_no_config_file_can_allow_code(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("allow_code: true\n")
    with pytest.raises(UsageError, match="allow_code counts on the command line alone"):
        cli.parse(FinetuneConfig, ["--config", str(config)])
    assert cli.parse(FinetuneConfig, ["--allow_code"]).allow_code
    assert "allow_code" not in cli.to_yaml(FinetuneConfig(allow_code=True))
