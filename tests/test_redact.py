"""No secret in a message."""

import subprocess
import sys
from pathlib import Path

import pytest

from lit_qlora import cli
from lit_qlora.redact import HIDDEN, scrub
from lit_qlora.settings import FinetuneConfig
from tests.conftest import ROOT, load_script
from tests.test_cli import pipe_of

CANARY = "canary-0123456789"
DOWNLOAD = ("scripts/download.py", "DownloadConfig", "--repo_id", "a/b")
SERVE = ("scripts/serve.py", "Config", "--port", "0")


@pytest.mark.parametrize(
    "flags",
    [
        (*DOWNLOAD, "--access_token=", CANARY),
        (*DOWNLOAD, "--access_token", CANARY, CANARY),
        (*DOWNLOAD, f"--acces_token={CANARY}"),
        (*DOWNLOAD, f"--access-token={CANARY}x", "--revisionn", CANARY + "x"),
        (*DOWNLOAD, "--access_token", f"[{CANARY},b]", "--nothing"),
        (*SERVE, "--api_key=", CANARY),
        (*SERVE, "--api_key", CANARY, "--queue", CANARY),
        (*SERVE, "--api_key", CANARY, "--checkpoint_dir", f"/absent/{CANARY}"),
    ],
    ids=" ".join,
)
def test_no_spelling_of_a_flag_prints_its_secret(flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script(flags[0])
    with pytest.raises(SystemExit):
        cli.run(script.main, getattr(script, flags[1]), list(flags[2:]))
    said = "".join(capsys.readouterr())
    assert "error" in said
    assert CANARY not in said


def test_a_secret_of_the_environment_is_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    with pytest.raises(SystemExit):
        cli.run(lambda config: None, FinetuneConfig, ["--seed", CANARY])
    assert HIDDEN in capsys.readouterr().err


def test_a_secret_of_a_config_file_is_hidden(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script("scripts/download.py")
    config = tmp_path / "run.yaml"
    config.write_text(f"access_token:\n  nested: 1\napi_key: {CANARY}\nrepo_id: [{CANARY}]\n")
    with pytest.raises(SystemExit):
        cli.run(script.main, script.DownloadConfig, ["--config", str(config)])
    assert CANARY not in "".join(capsys.readouterr())


def test_a_secret_of_settings_that_come_through_a_pipe_is_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script("scripts/download.py")
    text = f"access_token: {CANARY}\nrepo_id: [{CANARY}]\n".encode()
    with pipe_of(text) as name, pytest.raises(SystemExit):
        cli.run(script.main, script.DownloadConfig, ["--config", name])
    said = "".join(capsys.readouterr())
    assert "error" in said
    assert CANARY not in said


def test_looking_for_secrets_never_reads_a_file_without_end(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.run(lambda config: None, FinetuneConfig, ["--config", "/dev/zero"])
    assert "Path is not a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "hf_abcdefghijklmnop",
        "sk-proj-abcdefghijk",
        "https://user:hunter2hunter2@example.org/x",
        "https://example.org/x?a=1&access_token=abcdef123&b=2",
        "Authorization: Bearer abcdef.123456",
        "eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl",
    ],
)
def test_a_secret_is_known_by_its_shape(text: str) -> None:
    assert HIDDEN in scrub(f"cannot open {text}.")
    assert "hunter2" not in scrub(text)
    assert "abcdef" not in scrub(text)


@pytest.mark.parametrize(
    "text",
    [
        "--max_new_tokens must be at least 1, got 0.",
        "The tokenizer has no token <|im_end|>, and the head_size is 128.",
        "https://example.org/meta-llama/Llama-2-7b-hf: 404",
        "Check the connection, HF_ENDPOINT and the proxy.",
        "lora.train_tokens must be different ids, got (32000, 32000).",
    ],
)
def test_an_innocent_message_is_left_alone(text: str) -> None:
    assert scrub(text, ["--lora.train_tokens", "32000", "--max_new_tokens", "128"], {"PATH": "/usr/bin"}) == text


def test_not_even_a_traceback_of_a_bug_shows_a_secret() -> None:
    program = (
        "from lit_qlora import cli\nfrom lit_qlora.settings import LogConfig\n"
        f"def main(config):\n    raise KeyError('{CANARY}')\ncli.run(main, LogConfig, [])"
    )
    env = {"PATH": "", "PYTHONPATH": str(ROOT), "WANDB_API_KEY": CANARY}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert f"KeyError: '{HIDDEN}'" in ended.stderr


def test_looking_for_secrets_takes_no_time_in_a_config_of_blanks(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("\n" * 2**20)
    assert scrub("x", ["--config", str(tmp_path / "run.yaml")]) == "x"
