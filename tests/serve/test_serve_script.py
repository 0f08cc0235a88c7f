"""scripts/serve.py as it is started by hand."""

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from lit_qlora.cli import parse
from lit_qlora.errors import ResourceError, UsageError
from lit_qlora.serve.listen import open_socket
from tests.conftest import ROOT, load_script
from tests.scripts.test_chat import write_adapter


def test_it_serves_until_ctrl_c(tiny_checkpoint: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "sums", tiny_checkpoint)
    key = tmp_path / "key"
    key.write_text("correct horse\n")
    model = ["--checkpoint_dir", tiny_checkpoint, "--quantize", "none", "--adapters.sums", adapter]
    flags = [*model, "--port", "0", "--api_key_file", key]
    process = subprocess.Popen(
        [sys.executable, "scripts/serve.py", *map(str, flags)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr
        line = process.stderr.readline()
        found = re.match(r"Serving tiny, sums at (http://127\.0\.0\.1:\d+) ", line)
        assert found, line
        request = urllib.request.Request(f"{found[1]}/v1/models", headers={"Authorization": "Bearer correct horse"})
        with urllib.request.urlopen(request, timeout=60) as response:
            assert [model["id"] for model in json.load(response)["data"]] == ["tiny", "sums"]
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
        assert (process.returncode, rest) == (0, "")
    finally:
        process.kill()
        process.wait()


def test_a_port_in_use_is_known_before_anything_is_loaded(tmp_path: Path) -> None:
    script = load_script("scripts/serve.py")
    with open_socket("127.0.0.1", 0) as taken:
        config = script.Config(checkpoint_dir=tmp_path / "absent", port=taken.getsockname()[1])
        with pytest.raises(ResourceError, match=r"Cannot listen at 127\.0\.0\.1, port \d+: Address already in use"):
            script.main(config)


def test_a_host_that_there_is_not_is_the_one_that_is_to_be_changed() -> None:
    for host in ("no.such.host.invalid", "a" * 100):
        with pytest.raises(ResourceError, match=f"Cannot listen at {host}.*another --host"):
            open_socket(host, 0)


def test_the_key_is_never_printed(capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script("scripts/serve.py")
    config = parse(script.Config, ["--api_key", "correct horse", "--host", "0.0.0.0"])
    assert config.key() == "correct horse"
    assert "correct" not in repr(config)
    with pytest.raises(SystemExit):
        parse(script.Config, ["--api_key", "correct horse", "--print_config"])
    printed = capsys.readouterr().out
    assert "api_key:" in printed
    assert "correct" not in printed
    with pytest.raises(UsageError, match="not both"):
        parse(script.Config, ["--api_key", "correct horse", "--api_key_file", "x"])
    with pytest.raises(UsageError, match="cannot be read"):
        parse(script.Config, ["--api_key_file", "/absent/key"]).key()


@pytest.mark.parametrize("flag", ["slots", "context", "queue", "body_bytes", "read_seconds", "answer_seconds", "port"])
def test_a_limit_out_of_range_is_refused_by_its_name(flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        parse(load_script("scripts/serve.py").Config, [f"--{flag}", "-1"])
