"""What `import lit_qlora` offers: the functions and classes that it names, checked as the commands are."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import lit_qlora
from lit_qlora import cli
from lit_qlora.errors import UsageError
from lit_qlora.settings import DataConfig, FinetuneConfig, GenerationConfig, LoRAConfig, TrainConfig
from tests.conftest import ROOT


@pytest.mark.parametrize("name", lit_qlora.__all__)
def test_every_name_is_the_function_or_class_that_it_promises(name: str) -> None:
    found = getattr(lit_qlora, name)
    assert inspect.isfunction(found) or inspect.isclass(found)
    assert found.__name__ == name
    assert name in dir(lit_qlora)


def test_no_name_is_that_of_a_module_which_would_hide_it() -> None:
    folder = ROOT / "lit_qlora"
    assert not {path.stem for path in folder.iterdir()} & set(lit_qlora.__all__)


def test_another_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'fine_tune'"):
        _ = lit_qlora.fine_tune


@pytest.mark.parametrize(
    ("flags", "make"),
    [
        (["--train.schedule=foo"], lambda: TrainConfig(schedule="foo")),  # type: ignore[arg-type]
        (["--train.epochs=many"], lambda: TrainConfig(epochs="many")),  # type: ignore[arg-type]
        (["--quantize=nf4"], lambda: FinetuneConfig(quantize="nf4")),  # type: ignore[arg-type]
        (["--lora.r=0"], lambda: LoRAConfig(r=0)),
        (["--lora.targets=q_proj"], lambda: LoRAConfig(targets="q_proj")),  # type: ignore[arg-type]
        (["--extend", "--resume=never"], lambda: FinetuneConfig(extend=True, resume="never")),
    ],
    ids=lambda given: str(given[0]) if isinstance(given, list) else "",
)
def test_settings_in_python_are_refused_with_the_words_of_the_command_line(
    flags: list[str], make: Callable[[], object]
) -> None:
    with pytest.raises(UsageError) as told:
        cli.parse(FinetuneConfig, flags)
    with pytest.raises(UsageError) as raised:
        make()
    assert str(raised.value) == str(told.value).removeprefix("--")


def test_ten_lines_train_and_answer(tiny_checkpoint: Path, examples_file: Path, tmp_path: Path) -> None:
    config = FinetuneConfig(
        checkpoint_dir=str(tiny_checkpoint),  # type: ignore[arg-type]
        out_dir=str(tmp_path / "out"),  # type: ignore[arg-type]
        quantize="bnb.nf4",
        data=DataConfig(path=str(examples_file), prompt="qa", cache_dir="none"),  # type: ignore[arg-type]
        train=TrainConfig(max_steps=2),
        quiet=True,
    )
    run = lit_qlora.finetune(config)
    assert run == tmp_path / "out"
    inference = lit_qlora.InferenceConfig(lora_path=run)
    assert inference.storage == ("bnb.nf4", False, ())
    few = GenerationConfig(max_new_tokens=5, do_sample=False)
    both = ["What is 1 plus 2?", "What is 3 plus 4?"]
    answers = lit_qlora.generate(inference.load(), both, few)
    assert answers == [lit_qlora.generate(inference.load(), [one], few)[0] for one in both]
    assert any(answers)


def test_what_generate_and_finetune_cannot_do_is_said(tiny_checkpoint: Path) -> None:
    model = lit_qlora.InferenceConfig(checkpoint_dir=tiny_checkpoint).load()
    with pytest.raises(UsageError, match="takes a list of prompts, got one text: 'Hi'"):
        lit_qlora.generate(model, "Hi")
    with pytest.raises(UsageError, match="are asked by finetune/lora"):
        lit_qlora.finetune(cli.parse(FinetuneConfig, ["--eval.tasks=[mmlu]"]))


@pytest.mark.slow
def test_the_code_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("checkpoints", "finetune"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL):
        exec(block, names)
    assert Path("out/python/merged/merge_report.json").is_file()
    assert names["sampled"]
    assert "train.schedule: expected one of" in capsys.readouterr().out
