"""The command line: settings in, one readable line for every mistake, and a quick --help that explains every flag."""

import errno
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch

from lit_qlora import cli
from lit_qlora.errors import (
    OTHER_NAMES,
    CheckpointError,
    DataError,
    NumericalError,
    ResourceError,
    UsageError,
    UserError,
    did_you_mean,
)
from lit_qlora.settings import FinetuneConfig, GenerationConfig, PreferenceConfig
from tests.conftest import ROOT, load_script

ENTRY_POINTS = sorted(
    path.relative_to(ROOT)
    for folder in ("finetune", "scripts", "eval")
    for path in (ROOT / folder).glob("*.py")
    if "cli.run(" in path.read_text()
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A small command."""

    number: int = 1
    """A number."""


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        cli.parse(FinetuneConfig, argv)
    return str(caught.value)


@contextmanager
def pipe_of(content: bytes) -> Iterator[str]:
    """A path from which `content` can be read once, as bash makes it for `<(...)`."""
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    yield f"/dev/fd/{reading}"
    os.close(reading)


def end(main: Callable[[Config], None], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """Exit status and stderr of a command that does `main`."""
    with pytest.raises(SystemExit) as caught:
        cli.run(main, Config, [])
    return caught.value.code, capsys.readouterr().err


def raising(error: BaseException) -> Callable[[Config], None]:
    def main(config: Config) -> None:
        raise error

    return main


# What is typed wrongly.


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--train.lerning_rate", "1"],
            "--train.lerning_rate is not a flag of this command. Did you mean --train.learn",
        ),
        (["--quantise=none"], "--quantise is not a flag of this command. Did you mean --quantize?"),
        (["word"], "word is not a flag of this command. Did you mean --data.path word? --help all lists them."),
        (
            ["--train.gradient_accumulation_steps=4"],
            "steps is not a flag of this command. Did you mean --train.batch_size,",
        ),
        (["--load_in_4bit=true"], "--load_in_4bit is not a flag of this command. Did you mean --quantize bnb.nf4?"),
        (["--base_model=x"], "--base_model is not a flag of this command. Did you mean --checkpoint_dir?"),
        (["--sample_packing=true"], "--sample_packing is not a flag of this command. Did you mean --data.packing?"),
        (["--lora.targets=query,q_proj"], "got 'q_proj'. Did you mean query?"),
        (
            ["--quantize", "bnb.nf5"],
            "--quantize: expected one of auto, none, bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq, bnb.i",
        ),
        (["--quantize", "bnb.nf5"], "got 'bnb.nf5'. Did you mean bnb.nf4?"),
        (
            ["--train.schedule", "cosin"],
            "expected one of constant, linear, cosine, cosine-restarts, polynomial, inverse-sqrt, wsd, "
            "got 'cosin'. Did you mean cosine?",
        ),
        (["--lora.targets", "[query,valu]"], "got 'valu'. Did you mean value?"),
        (["--lora.targets", "valu"], "got 'valu'. Did you mean value?"),
        (["--lora.r", "x"], "--lora.r: expected int, got 'x'."),
        (["--lora.r", "2.5"], "--lora.r: expected int, got '2.5'."),
        (["--lora.r"], "--lora.r: expected one argument"),
        (["--lora.r", "0"], "lora.r must be at least 1, got 0."),
        (["--lora.dropout", "1"], "lora.dropout must be at least 0 and below 1, got 1.0."),
        (["--train.learning_rate", "fast"], "--train.learning_rate: expected float, got 'fast'."),
        (["--train.max_steps", "many"], "--train.max_steps: expected int, got 'many'."),
        (["--data.mask_prompt", "maybe"], "--data.mask_prompt: expected bool, got 'maybe'."),
        (["--devices", "two"], "--devices: expected int or one of auto, got 'two'."),
        (["--optimizer.betas", "0.9,x"], "--optimizer.betas: expected list, got '0.9,x'."),
        (["--bits", "4"], "--bits is not a flag of this command. Did you mean --quantize bnb.nf4 (4 bit) or bnb.int8"),
        (["--gradient_checkpointing"], "Did you mean --train.recompute full?"),
        (["--lora_query", "True"], "Did you mean --lora.targets?"),
        (["--lora.targets", "[q_proj,v_proj]"], "got 'q_proj'. Did you mean query?"),
        (["--quantize", "nf4"], "got 'nf4'. Did you mean bnb.nf4?"),
        (["--precision", "bfloat16"], "Did you mean bf16-true?"),
        (["--config", "absent.yaml"], "--config: File does not exist: "),
        (["--config", "."], "--config: Path is not a file: "),
    ],
)
def test_a_mistyped_flag_is_answered_in_one_line_with_what_was_meant(argv: list[str], message: str) -> None:
    answer = refusal(*argv)
    assert message in answer
    assert "\n" not in answer


@pytest.mark.parametrize("joined", [False, True], ids=["--config FILE", "--config=FILE"])
@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        (
            "seed: 1\ntrain:\n  # lerning_rate: 2\n  lerning_rate: 1\n",
            ":4: train.lerning_rate is not a setting. Did you",
        ),
        ("quantise: none\n", ":1: quantise is not a setting. Did you mean --quantize?"),
        (
            "eval:\n  every: 1\ntrain:\n  learning_rate: fast\n",
            ":4: --train.learning_rate: expected float, got 'fast'.",
        ),
        (
            "data:\n  max_length: 9\nlora: {r: 4,\n  targets: [query, valu]}\n",
            ":4: --lora.targets: expected list or one",
        ),
        ("train: [\n  x: : 1\n", ": not valid YAML: while parsing"),
        ("seed: 'x\n", ": not valid YAML: while scanning a quoted scalar"),
        ("- 1\n", " holds no settings."),
        ("hello\n", " holds no settings."),
        ("", " holds no settings."),
    ],
)
def test_a_mistake_in_a_config_file_is_placed(tmp_path: Path, yaml: str, message: str, joined: bool) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml)
    answer = refusal(*([f"--config={file}"] if joined else ["--config", str(file)]))
    assert answer.startswith(f"{file}{message}")
    assert "\n" not in answer


def test_a_mistyped_flag_is_not_blamed_on_the_config_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("lora:\n  r: 4\n")
    assert refusal("--config", str(tmp_path / "run.yaml"), "--lora.r", "x") == "--lora.r: expected int, got 'x'."


def test_a_config_file_cannot_run_code(tmp_path: Path) -> None:
    marker, file = tmp_path / "marker", tmp_path / "run.yaml"
    file.write_text(f'seed: !!python/object/apply:os.system ["touch {marker}"]\n')
    assert "could not determine a constructor for the tag" in refusal("--config", str(file))
    assert not marker.exists()


@pytest.mark.parametrize(
    "yaml", ["lora: this.x", "lora: {class_path: this.x}", "lora.class_path: this.x", "{lora: [class_path, this.x]}"]
)
def test_a_config_file_cannot_import_a_module(tmp_path: Path, yaml: str) -> None:
    sys.modules.pop("this", None)
    (tmp_path / "run.yaml").write_text(yaml)
    assert "lora" in refusal("--config", str(tmp_path / "run.yaml"))
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    "argv", [["--lora=this.x"], ["--lora", "deep.yaml"], ["--lor=deep.yaml"], ["--conf=deep.yaml"]]
)
def test_only_config_names_a_file_of_settings(argv: list[str]) -> None:
    assert "is not a flag of this command" in refusal(*argv)


def test_every_config_file_is_read_within_limits(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: 1")
    (tmp_path / "deep.yaml").write_text("[" * 200_000)
    assert "nested more than 64 deep" in refusal(
        f"--config={tmp_path / 'run.yaml'}", f"--config={tmp_path / 'deep.yaml'}"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 4000, "nested more than 64 deep"),
        (b"seed: \xff", "is not UTF-8"),
        (b"lora: {class_path: this.x}", "class_path is not a setting"),
        (b"sed: 1", "sed is not a setting. Did you mean --seed?"),
        (b"seed: 1\nseed: 2", "--config:2: seed is given twice."),
    ],
)
@pytest.mark.parametrize("joined", [True, False])
def test_a_pipe_of_settings_is_read_within_the_same_limits(content: bytes, message: str, joined: bool) -> None:
    with pipe_of(content) as name:
        assert message in refusal(*([f"--config={name}"] if joined else ["--config", name]))


def test_settings_may_come_through_a_pipe() -> None:
    with pipe_of(b"seed: 7\n") as first, pipe_of(b"") as second:
        assert cli.parse(FinetuneConfig, ["--config", first, "--config", second, "--lora.r", "2"]).seed == 7


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("seed: 1\nseed: 2", ":2: seed is given twice. Leave one out."),
        ("lora: {r: 4}\nlora.r: 8", ":2: lora.r is given twice. Leave one out."),
        ("seed: 1\nlora:", ":2: lora is a section: its settings are lines below it, indented."),
        ("lora: 5", ":1: lora is a section: its settings are lines below it, indented."),
        ("config: other.yaml", ":1: a --config file names no other. Give --config several times."),
        ("lora: {1: 2}", ":1: lora.1 is not a name. In quotation marks, YAML takes it as one."),
        ("seed: 1\n---\nseed: 2", ": not valid YAML: it holds a second document"),
    ],
)
def test_what_a_config_file_cannot_mean_is_refused(tmp_path: Path, yaml: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(yaml)
    assert refusal("--config", str(tmp_path / "run.yaml")).startswith(f"{tmp_path / 'run.yaml'}{message}")


def test_what_others_call_a_flag_is_a_flag_of_ours() -> None:
    flags = {flag for action in cli._parser(FinetuneConfig)._actions for flag in action.option_strings}
    flags |= {f"--preference.{setting.name}" for setting in fields(PreferenceConfig)}  # of another command
    named = {ours.split()[0].rstrip(",") for theirs, ours in OTHER_NAMES.items() if theirs.startswith("--")}
    assert named <= flags
    assert not flags & OTHER_NAMES.keys()


def test_a_note_is_printed_before_the_work_begins(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(lambda config: None, GenerationConfig, ["--do_sample", "false", "--temperature", "0.3"])
    assert capsys.readouterr().err == "note: do_sample is false, so temperature has no effect.\n"


@pytest.mark.parametrize("flag", ["--config", "--seed", "--out_dir", "--lora.targets", "--nothing"])
def test_a_flag_without_a_value_is_refused(flag: str) -> None:
    assert refusal(f"{flag}=--") == f"{flag} must be given a value; -- is none."


def test_near_words_are_found_and_far_ones_are_not() -> None:
    assert did_you_mean("quere", ["query", "key"]) == " Did you mean query?"
    assert did_you_mean("zzzz", ["query", "key"]) == ""


def test_a_missing_flag_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Needy:
        """A command that needs to know something."""

        checkpoint_dir: Path
        """A directory."""

    with pytest.raises(UsageError, match=r"^--checkpoint_dir must be given\.$"):
        cli.parse(Needy, [])


# What is typed rightly.


@pytest.mark.parametrize("joined", [True, False])
def test_commas_make_a_list_for_flags_that_take_one(joined: bool) -> None:
    given = {"--lora.targets": "query,value", "--eval.tasks": "mmlu,arc_easy", "--data.path": "a.jsonl,b.csv*0.5"}
    given |= {"--optimizer.betas": "0.9,0.95", "--lora.train_tokens": "1,2"}
    argv = [word for flag, value in given.items() for word in ([f"{flag}={value}"] if joined else [flag, value])]
    config = cli.parse(FinetuneConfig, argv)
    assert (config.lora.targets, config.eval.tasks) == (("query", "value"), ("mmlu", "arc_easy"))
    assert (config.data.path, config.optimizer.betas) == (("a.jsonl", "b.csv*0.5"), (0.9, 0.95))
    assert config.lora.train_tokens == (1, 2)


@pytest.mark.parametrize("given", ["[12,yes,</s>]", "['12',\"yes\",</s>]", '["12","yes","</s>"]'])
def test_texts_of_a_list_may_look_like_numbers_and_truths(given: str) -> None:
    config = load_script("scripts/add_tokens.py").AddTokensConfig
    for argv in (["--tokens", given], [f"--tokens={given}"]):
        assert cli.parse(config, ["--checkpoint_dir", "x", *argv]).tokens == ("12", "yes", "</s>")
    assert cli.parse(FinetuneConfig, ["--eval.tasks", "1,2"]).eval.tasks == ("1", "2")


@pytest.mark.parametrize("flag", ["--data", "--data_path", "--file", "--csv_path", "--data.path"])
def test_a_data_file_has_one_name_in_all_commands(flag: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    merge = cli.parse(load_script("scripts/merge_lora.py").MergeConfig, ["--lora_path=x", f"{flag}=a.jsonl"])
    assert merge.verify == "a.jsonl"
    assert cli.parse(FinetuneConfig, [flag, "a.jsonl"]).data.path == ("a.jsonl",)
    assert cli.parse(load_script("eval/answers.py").Config, [f"{flag}=a.jsonl"]).data == "a.jsonl"
    assert cli.parse(load_script("eval/perplexity.py").Config, [flag, str(tmp_path / "a.txt")]).file.name == "a.txt"


def test_commas_in_a_text_or_in_the_name_of_a_file_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a,b.jsonl").touch()
    config = cli.parse(FinetuneConfig, ["--data.path", "a,b.jsonl", "--data.columns", "q:instruction,r:output"])
    assert (config.data.path, config.data.columns) == (("a,b.jsonl",), "q:instruction,r:output")


def test_flags_win_over_the_config_file_and_that_over_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: 5\nlora:\n  r: 4\n  alpha: 2\n")
    config = cli.parse(FinetuneConfig, ["--config", str(tmp_path / "run.yaml"), "--lora.r", "16"])
    assert (config.seed, config.lora.r, config.lora.alpha, config.lora.dropout) == (5, 16, 2.0, 0.05)


def test_a_config_file_may_set_nothing_but_one_nested_value(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("train:\n  batch_size: 8\n")
    train = cli.parse(FinetuneConfig, ["--config", str(tmp_path / "run.yaml")]).train
    assert (train.batch_size, train.micro_batch_size) == (8, FinetuneConfig().train.micro_batch_size)


def test_what_print_config_prints_is_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--lora.targets", "[key,mlp]", "--train.learning_rate", "1e-5", "--data.path", "a b.json", "--dry_run"]
    with pytest.raises(SystemExit) as caught:
        cli.parse(FinetuneConfig, [*argv, "--print_config"])
    assert caught.value.code == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    config = cli.parse(FinetuneConfig, ["--config", str(tmp_path / "run.yaml")])
    assert config == cli.parse(FinetuneConfig, argv)
    assert config.dry_run


@pytest.mark.parametrize(
    "argv", [["--dry_run"], ["--dry_run", "--seed", "1"], ["--dry_run", "true"], ["--dry_run=true"]]
)
def test_a_switch_alone_means_yes(argv: list[str]) -> None:
    assert cli.parse(FinetuneConfig, argv).dry_run is True
    assert cli.parse(FinetuneConfig, ["--dry_run", "false"]).dry_run is False


# How a command ends.


@pytest.mark.parametrize(
    ("kind", "status"),
    [(UserError, 2), (UsageError, 2), (DataError, 3), (CheckpointError, 4), (NumericalError, 5), (ResourceError, 6)],
)
def test_each_kind_of_mistake_has_its_exit_status(
    kind: type[UserError], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end(raising(kind("place: what.\nDo this.")), capsys) == (status, "error: place: what.\nDo this.\n")


def test_what_the_system_refuses_is_one_line_with_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "/data/x")
    assert end(raising(error), capsys) == (6, "error: /data/x: No space left on device.\n")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.\nmore\nmore"),
        MemoryError(),
    ],
)
def test_exhausted_memory_is_no_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    status, message = end(raising(error), capsys)
    assert status == 6
    assert message.startswith("error: Out of memory.")
    assert "--train" not in message  # this command has no such flag


def test_advice_against_exhausted_memory_names_flags_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    def main(config: FinetuneConfig) -> None:
        raise MemoryError

    with pytest.raises(SystemExit):
        cli.run(main, FinetuneConfig, [])
    flags = re.findall(r"--([\w.]+) (\S+)", capsys.readouterr().err.replace(" or ", " ").replace(",", ""))
    assert {name for name, _ in flags} >= {"train.micro_batch_size", "train.recompute", "quantize"}
    for name, _ in flags:
        cli.parse(FinetuneConfig, [f"--{name}", {"train.recompute": "full", "quantize": "bnb.nf4"}.get(name, "8")])


def test_a_notebook_may_start_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    backends: list[str | None] = []
    cli.run(lambda config: backends.append(os.environ.get("MPLBACKEND")), Config, [])
    assert backends == [None]
    monkeypatch.setenv("MPLBACKEND", "svg")  # a choice of the user's
    cli.run(lambda config: backends.append(os.environ.get("MPLBACKEND")), Config, [])
    assert backends[1] == "svg"


def test_ctrl_c_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert end(raising(KeyboardInterrupt()), capsys) == (130, "stopped by Ctrl-C\n")


@pytest.mark.parametrize("error", [RuntimeError("bug"), ValueError("bug"), OSError("no number, so no system's")])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        cli.run(raising(error), Config, [])
    assert caught.value is error


@pytest.mark.parametrize("error", [UsageError("x"), OSError(errno.EIO, "x"), MemoryError()])
def test_every_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setenv("LIT_QLORA_DEBUG", "1")
    with pytest.raises(type(error)) as caught:
        cli.run(raising(error), Config, [])
    assert caught.value is error


def test_a_reader_who_goes_away_is_no_error() -> None:
    code = (
        "from dataclasses import dataclass\nfrom lit_qlora import cli\n"
        "@dataclass\nclass C:\n    '''A.'''\n    n: int = 1\n    '''B.'''\n"
        "cli.run(lambda c: [print(i) for i in range(99999)], C, [])"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def help_text(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, list[str]]:
    """The help, and the flags that it explains."""
    with pytest.raises(SystemExit, match="0"):
        cli.parse(FinetuneConfig, argv)
    said = capsys.readouterr().out
    return said, re.findall(r"^  (?:-h, )?(--[\w.]+)", said, re.MULTILINE)


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_begins_with_twenty_flags_and_names_the_way_to_all(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    said, flags = help_text([word], capsys)
    assert len(flags) == 22
    assert {"--checkpoint_dir", "--quantize", "--data.path", "--lora.r", "--train.learning_rate"} <= {*flags}
    count = sum(action.help != "==SUPPRESS==" for action in cli._parser(FinetuneConfig)._actions)
    assert said.endswith(
        f"{count - 22} more flags: --help all explains them, --help WORD those with WORD in their names.\n"
    )
    assert len(help_text(["--help", "all"], capsys)[1]) == count
    assert len(help_text(["--help=all"], capsys)[1]) == count


def test_help_with_a_word_explains_the_flags_that_hold_it(capsys: pytest.CaptureFixture[str]) -> None:
    flags = help_text(["--help", "judge"], capsys)[1]
    assert len(flags) == 5
    assert all("judge" in flag for flag in flags)
    assert refusal("--help", "epohcs") == "--help epohcs: no flag has this in its name. Did you mean --eval.epochs?"


def test_help_and_messages_call_a_data_file_by_its_one_name(capsys: pytest.CaptureFixture[str]) -> None:
    answers = load_script("eval/answers.py").Config
    with pytest.raises(SystemExit):
        cli.parse(answers, ["--help"])
    assert "  --data.path DATA, --data DATA\n" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"^--data\.path must be given\.$"):
        cli.parse(answers, [])


# Every entry point.

PROBE = """
import os, runpy, sys
from lit_qlora import cli

folder, *scripts = sys.argv[1:]
for script in scripts:
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{script.replace('/', '-')}.{kind}", os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [script, "--help", "all"]
    sys.path[0] = script.rpartition("/")[0]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        heavy = sorted({"torch", "lightning", "bitsandbytes", "transformers", "lm_eval", "numpy"} & set(sys.modules))
        print(end.code, heavy, len(sys.modules), file=sys.stderr)
        sys.stdout.flush()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(0)
"""
"""Asks scripts for help in processes forked from one, which has imported what each of them does."""


@pytest.fixture(scope="module")
def help_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("help")
    scripts = [str(ROOT / script) for script in ENTRY_POINTS]
    subprocess.run([sys.executable, "-c", PROBE, str(folder), *scripts], check=True)

    def ask(script: Path) -> subprocess.CompletedProcess[str]:
        name = str(ROOT / script).replace("/", "-")
        out, err = ((folder / f"{name}.{kind}").read_text(encoding="utf-8") for kind in ("out", "err"))
        return subprocess.CompletedProcess([script], 0, out, err)

    return ask


def test_there_are_entry_points() -> None:
    assert {Path("finetune/lora.py"), Path("scripts/merge_lora.py"), Path("eval/lm_eval_harness.py")} <= {*ENTRY_POINTS}


@pytest.mark.parametrize("script", ENTRY_POINTS, ids=str)
def test_help_ends_well_and_imports_nothing_heavy(script: Path, help_of: Callable) -> None:
    assert help_of(script).stderr.startswith("0 [] ")


@pytest.mark.parametrize("script", ENTRY_POINTS, ids=str)
def test_help_imports_few_modules(script: Path, help_of: Callable) -> None:
    """Imports are nearly all of its time: 270 to 290 modules take 0.3 s, and torch alone brings 1,100."""
    assert int(help_of(script).stderr.split()[-1]) < 400


@pytest.mark.parametrize("script", ENTRY_POINTS, ids=str)
def test_help_shows_types_as_a_reader_writes_them(script: Path, help_of: Callable) -> None:
    assert not re.findall(r"Annotated|Limit\(|<function|Optional", help_of(script).stdout)


@pytest.mark.parametrize("script", ENTRY_POINTS, ids=str)
def test_help_explains_every_flag(script: Path, help_of: Callable) -> None:
    text = help_of(script).stdout.partition("\noptions:\n")[2]
    entries = re.findall(r"^  (?:-h, )?(--[\w.]+)\b(.*(?:\n {10,}.*)*)", text, re.MULTILINE)
    assert len(entries) > 3
    for flag, entry in entries:
        prose = re.sub(r"\(type: .*", "", " ".join(entry.split()))  # what jsonargparse adds of its own
        assert re.search(r"\w+ \w+ \w+", re.sub(r"\{.*?\}|\b[A-Z_]+\b", "", prose)), f"{flag} is not explained: {entry}"


@pytest.mark.parametrize("flag", ["--lora", "--seed", "--lora.dropout", "--data.path", "--eval.tasks"])
@pytest.mark.parametrize(
    "value",
    ["\0", "\udce9", "7" * 5000, "0x" + "f" * 5000, "1:" * 3000 + "1", "- " * 3000, "[" * 3000, "a: &a [*a]"],
    ids=lambda value: ascii(value[:6]),
)
def test_a_value_that_nobody_writes_is_taken_or_refused_in_words(flag: str, value: str) -> None:
    with suppress(UsageError):
        cli.parse(FinetuneConfig, [f"{flag}={value}"])


def test_a_config_of_thousands_of_digits_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"seed: {'7' * 5000}")
    with pytest.raises(UsageError, match="A value on the command line or in the --config file cannot be read"):
        cli.parse(FinetuneConfig, [f"--config={tmp_path / 'a.yaml'}"])


@pytest.mark.parametrize("value", ["[a, b]", "{a: 1}"])
def test_a_secret_is_one_text(value: str) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Config:
        """A command with a secret."""

        token: cli.SecretStr | None = None
        """It."""

    with pytest.raises(UsageError, match="--token must be one text") as caught:
        cli.parse(Config, [f"--token={value}"])
    assert value not in str(caught.value)


def test_no_config_file_alone_decides_which_server_gets_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "eval: {judge_url: 'http://elsewhere/v1', judge_model: m, generate: 1, judge_key_variable: MY_KEY}\n"
    )
    argv = ["--config", str(file)]
    monkeypatch.delenv("MY_KEY", raising=False)
    assert cli.parse(FinetuneConfig, argv).eval.judge_url == "http://elsewhere/v1"
    monkeypatch.setenv("MY_KEY", "sk-0123456789")
    with pytest.raises(
        UsageError, match=r"run.yaml: eval.judge_url would be sent the key in MY_KEY(?s:.*)--eval.judge_url"
    ):
        cli.parse(FinetuneConfig, argv)
    assert cli.parse(FinetuneConfig, [*argv, "--eval.judge_url=http://mine/v1"]).eval.judge_url == "http://mine/v1"


def test_what_is_printed_has_a_terminal_do_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    hostile = "\x1b]52;c;eA==\x07 \x1b[6n \x9b6n \x08 \x1b[31mred\x1b[0m \x1b["

    def main(config: Config) -> None:
        print(hostile, "\r\x1b[2K")
        print(hostile, end="", file=sys.stderr, flush=True)

    with os.fdopen(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stderr", pipe)
        cli.run(main, Config, [])
        shown = b""
        while not shown.endswith(b"\n"):  # a terminal gives what it has at the moment
            shown += os.read(ours, 1000)
    os.close(ours)
    assert shown.decode() == "\\x1b]52;c;eA==\\x07 \\x1b[6n \\x9b6n \\x08 \x1b[31mred\x1b[0m \\x1b[ \r\x1b[2K\r\n"
    assert pipe.buffer.getvalue().decode() == hostile  # type: ignore[attr-defined] # a file gets what was printed
