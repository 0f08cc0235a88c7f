"""inspect_data, prepare_alpaca and prepare_csv: what they print and leave."""

import json
from pathlib import Path

import pytest
import torch

from lit_qlora import cli
from lit_qlora.data import read_examples
from lit_qlora.data.prepared import choose_data
from lit_qlora.errors import CheckpointError, UsageError
from lit_qlora.settings import DEMO_CHECKPOINT, DataConfig
from tests.conftest import ROOT, load_script

ROWS = [{"instruction": f"What is {i} plus 1?", "input": "", "output": str(i + 1)} for i in range(60)]


def run(script: str, *flags: str) -> int:
    """Run a script in this process; returns the exit status."""
    module = load_script(f"scripts/{script}.py")
    try:
        cli.run(module.main, module.Config, list(flags))
    except SystemExit as end:
        return end.code  # type: ignore[return-value]
    return 0


@pytest.fixture
def alpaca(tmp_path: Path) -> Path:
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(ROWS))
    return path


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_inspect_data_tells_all_and_draws_the_lengths(
    alpaca: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = tmp_path / "lengths.png"
    flags = [f"--checkpoint_dir={tiny_checkpoint}", f"--data.path={alpaca}", "--data.prompt=qa", f"--png={png}"]
    assert run("inspect_data", *flags) == 0
    printed = capsys.readouterr().out
    for text in (
        f"source    {alpaca}   format alpaca (columns instruction, input, output)   60 of 60 kept",
        "samples   57 train / 3 val   median",
        "limits    96 tokens: 0 prompts, 0 turns and 0 answers cut, 0 samples dropped",
        "twice     0 in training, 0 in both training and validation",
        "ends      60 of 60 answers end with an end-of-text token",
        "sample    [Q: What is 0 plus 1?\\nA:] -> 1<end>",
        "prompt || answer: ",
        "█",
    ):
        assert text in printed
    assert png.read_bytes().startswith(b"\x89PNG")


def test_inspect_data_tells_all_before_it_refuses(
    alpaca: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--checkpoint_dir={tiny_checkpoint}", f"--data.path={alpaca}", "--data.prompt=knobs"]
    assert run("inspect_data", *flags, "--data.add_eos_token_to_answer=false") == 3
    captured = capsys.readouterr()
    assert "ends      0 of 60 answers end" in captured.out
    assert "error: 60 of 60 answers do not end with an end-of-text token" in captured.err


def test_inspect_data_needs_no_more_than_a_tokenizer(
    alpaca: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/tokenizer.model").write_bytes((tiny_checkpoint / "tokenizer.model").read_bytes())
    assert run("inspect_data", f"--checkpoint_dir={tmp_path / 'bare'}", f"--data.path={alpaca}") == 0
    assert "limits    2048 tokens" in capsys.readouterr().out


def test_inspect_data_refuses_a_length_that_a_run_would_refuse(
    alpaca: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--checkpoint_dir={tiny_checkpoint}", f"--data.path={alpaca}", "--data.max_length=97"]
    assert run("inspect_data", *flags) == 2
    assert "data.max_length 97 exceeds the 96 tokens of test/tiny's context" in capsys.readouterr().err


def test_prepare_alpaca_splits_as_random_split_does(alpaca: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("prepare_alpaca", f"--data_path={alpaca}", f"--out_dir={out}", "--test_split_fraction=0.1") == 0
    generator = torch.Generator().manual_seed(42)
    train, test = torch.utils.data.random_split(ROWS, [0.9, 0.1], generator=generator)  # type: ignore[arg-type]
    assert rows(out / "train.jsonl") == list(train)
    assert rows(out / "val.jsonl") == list(test)
    assert "54 train / 6 val" in (out / "report.md").read_text()


def test_the_default_share_holds_out_two_thousand_of_alpaca() -> None:
    config = load_script("scripts/prepare_alpaca.py").Config(data_path="a", out_dir=Path("b"))
    assert int(config.test_split_fraction * 51_760) == 2000
    assert config.seed == 42


def test_prepare_counts_tokens_where_there_is_a_tokenizer(alpaca: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    flags = [f"--data_path={alpaca}", f"--out_dir={tmp_path / 'out'}", f"--checkpoint_dir={tiny_checkpoint}"]
    assert run("prepare_alpaca", *flags, "--prompt=qa", "--max_seq_length=64") == 0
    assert "58 train / 0 val   median " in (tmp_path / "out/report.md").read_text()


def test_prepare_csv_takes_any_columns(tmp_path: Path) -> None:
    table = tmp_path / "faq.csv"
    table.write_text("frage,antwort,notiz\n" + "".join(f"Was ist {i}?,{i},x\n" for i in range(20)))
    columns = "--columns=frage:instruction,antwort:output"
    assert run("prepare_csv", f"--csv_path={table}", f"--out_dir={tmp_path / 'out'}", columns) == 0
    found = rows(tmp_path / "out/train.jsonl") + rows(tmp_path / "out/val.jsonl")
    assert len(found) == 20
    assert {"instruction": "Was ist 3?", "input": "", "output": "3"} in found
    assert len(rows(tmp_path / "out/val.jsonl")) == 2


def test_prepare_csv_wants_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prepare_csv") == 2
    assert run("prepare_csv", "--csv_dir=a.csv", "--csv_path=b.csv") == 2
    assert capsys.readouterr().err.count("Name one table, with --data.path or --csv_dir.") == 2


def test_training_takes_what_was_prepared_for_its_checkpoint(
    alpaca: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UsageError, match=r"no data was prepared for .*\nOr prepare some: python scripts/prepare_alpaca"
    ):
        choose_data(DataConfig(), tiny_checkpoint)
    with pytest.raises(CheckpointError, match="absent does not exist"):
        choose_data(DataConfig(), Path("absent"))
    assert run("prepare_alpaca", f"--data_path={alpaca}", "--out_dir=data/other") == 0  # for no checkpoint
    assert run("prepare_alpaca", f"--data_path={alpaca}", f"--checkpoint_dir={tiny_checkpoint}") == 0
    assert choose_data(DataConfig(), tiny_checkpoint).path == ("data/alpaca",)
    assert choose_data(DataConfig(path="mine.json"), tiny_checkpoint).path == ("mine.json",)
    table = tmp_path / "faq.csv"
    table.write_text("instruction,output\na,b\nc,d\n")
    assert run("prepare_csv", f"--csv_dir={table}", f"--checkpoint_dir={tiny_checkpoint}") == 0
    with pytest.raises(UsageError, match=r"Several folders .*: data/alpaca, data/faq\. Give --data\.path\."):
        choose_data(DataConfig(), tiny_checkpoint)


def test_only_the_demos_checkpoint_is_trained_on_the_demo_by_default(tiny_checkpoint: Path) -> None:
    assert choose_data(DataConfig(), ROOT / DEMO_CHECKPOINT).path == ("finetune/demo",)
    with pytest.raises(UsageError, match=r"--data\.path must be given"):
        choose_data(DataConfig(), tiny_checkpoint)


def test_alpaca_comes_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None) -> dict:
        asked.append(name)
        return {"train": ROWS}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert run("prepare_alpaca", f"--out_dir={tmp_path}", "--test_split_fraction=0.1") == 0
    assert asked == ["yahma/alpaca-cleaned"]
    assert len(rows(tmp_path / "train.jsonl")) == 54


def test_without_a_network_prepare_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_dataset(name: str, config: str | None) -> None:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert run("prepare_alpaca", "--data_path=hf:org/absent", f"--out_dir={tmp_path}") == 3
    assert "cannot be loaded: Couldn't reach the hub\nIf this machine is offline" in capsys.readouterr().err


def test_what_was_prepared_is_read_as_it_was(tmp_path: Path) -> None:
    spoken = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo", "weight": 0},
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
    ]
    talk = tmp_path / "talk.jsonl"
    talk.write_text(json.dumps({"messages": spoken}) + "\n")
    assert run("prepare_alpaca", f"--data_path={talk}", f"--out_dir={tmp_path / 'out'}") == 0
    one, other = (read_examples(path).examples[0] for path in (talk, tmp_path / "out/train.jsonl"))
    assert one.messages == other.messages
    assert not (tmp_path / "out/val.jsonl").exists()
    talk.write_text(json.dumps({"messages": spoken[:3]}) + "\n")  # a lone turn that is not labelled
    assert run("prepare_alpaca", f"--data_path={talk}", f"--out_dir={tmp_path / 'out'}") == 0
    assert [message.weight for message in read_examples(tmp_path / "out/train.jsonl").examples[0].answers] == [0]
    (tmp_path / "raw.txt").write_text("Once upon a time.")
    assert run("prepare_alpaca", f"--data_path={tmp_path / 'raw.txt'}", f"--out_dir={tmp_path / 'out'}") == 0
    assert read_examples(tmp_path / "out/train.jsonl").format == "text"


def test_prepare_keeps_tools_calls_thoughts_and_weights(tmp_path: Path) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    spoken = [
        {"role": "developer", "content": ""},
        {"role": "user", "content": "Hi"},
        {**called, "thinking": "Hm.", "weight": 0.5},
        {"role": "tool", "content": "1", "tool_call_id": "a"},
        {"role": "assistant", "content": "One."},
    ]
    record = {"messages": spoken, "tools": [{"function": {"name": "f"}}], "chat_template_kwargs": {"date": "today"}}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    assert run("prepare_alpaca", f"--data_path={tmp_path / 'a.jsonl'}", f"--out_dir={tmp_path / 'out'}") == 0
    assert rows(tmp_path / "out/train.jsonl") == [record]


def test_prepare_refuses_what_would_be_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for row, reason in (
        ({"prompt": "a", "completion": "b", "label": False}, "'label' (false) is not read"),
        ({"input_ids": [1, 2]}, "holds token ids already"),
    ):
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        assert run("prepare_alpaca", f"--data_path={tmp_path / 'a.jsonl'}", f"--out_dir={tmp_path / 'out'}") == 3
        assert reason in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_prepare_leaves_a_file_whole_or_not_at_all(
    alpaca: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_qlora.data.prepare.Path.replace", stop)
    run("prepare_alpaca", f"--data_path={alpaca}", f"--out_dir={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_prepare_never_overwrites_what_it_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "train.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert run("prepare_alpaca", f"--data_path={source}", f"--out_dir={tmp_path}/../{tmp_path.name}") == 2
    assert "would be overwritten with a part of itself" in capsys.readouterr().err
    assert len(rows(source)) == len(ROWS)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--data_path=absent.json"], 3, "absent.json does not exist."),
        (["--data_path=faq.csv"], 3, "e.g. --columns frage:instruction,antwort:output, or name a --format: alpaca"),
        (["--data_path=bad.jsonl"], 3, "leave them out with --on_error skip."),
        (["--format=alpca"], 2, "'alpca' is not known. Did you mean alpaca?"),
        (["--test_split_fraction=1"], 2, "test_split_fraction must be at least 0 and below 1, got 1.0."),
        (
            ["--max_seq_length=9"],
            2,
            "max_seq_length counts tokens, so --checkpoint_dir must name a directory with a tokenizer.",
        ),
        (["--prompt=qa"], 2, "prompt is the style of the counted tokens, so --checkpoint_dir must name"),
        (["--format=alpaca", "--columns=a:instruction,b:output"], 2, "so format would have no effect"),
        (["--out_dir=alpaca.json/x"], 6, "cannot be written: "),
    ],
)
def test_prepare_says_what_is_wrong(
    alpaca: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("faq.csv").write_text("frage,antwort\na,b\n")
    Path("bad.jsonl").write_text(json.dumps(ROWS[0]) + "\n{\n")
    given = {flag.split("=")[0] for flag in flags}
    defaults = [flag for flag in (f"--data_path={alpaca}", "--out_dir=out") if flag.split("=")[0] not in given]
    assert run("prepare_alpaca", *defaults, *flags) == status
    assert message in capsys.readouterr().err
