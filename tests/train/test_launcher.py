"""Where one process of a machine fails, all end, and its messages are the last that the user reads."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric import Fabric

from lit_qlora.errors import DataError, ResourceError
from lit_qlora.train import launcher
from lit_qlora.train.launcher import LOST, Children, FailedProcessError, Launcher, LostProcessError
from lit_qlora.train.parallel import DataParallel
from tests.conftest import ROOT

FAILS = "import sys; print('error: no such data', file=sys.stderr); sys.exit(3)"
IS_LOST = f"import sys; print('error: {LOST}', file=sys.stderr); sys.exit(6)"
IS_KILLED = "import os; os.kill(os.getpid(), 9)"
WAITS = "import sys, time; print('I wait', file=sys.stderr, flush=True); time.sleep(600)"
ENDS_WELL = "import sys; print('a warning', file=sys.stderr)"


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[Children]:
    """They may fail without ending the tests."""
    monkeypatch.setattr(launcher, "GRACE", 600.0)
    found = Children()
    yield found
    found.over.set()


def start(children: Children, *programs: str) -> Children:
    for rank, program in enumerate(programs, start=1):
        children.start(rank, [sys.executable, "-S", "-c", program], os.environ)
    return children


def ended(children: Children) -> list[int]:
    return [child.process.wait() for child in children.every]


def outcome(tmp_path: Path, *programs: str) -> tuple[int, str]:
    """The status of a first process that waits for ever, and what it says, where the others run these programs."""
    said = tmp_path / "said"
    if not (first := os.fork()):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w")
        launcher.GRACE = 0.01
        with start(Children(), *programs).led():
            signal.pause()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]), said.read_text()


def test_the_messages_of_a_process_that_failed_come_last_and_its_status_is_that_of_the_run(tmp_path: Path) -> None:
    assert outcome(tmp_path, WAITS, FAILS) == (
        3,
        "\nerror: Process 2 of this run ended with status 3, so all of it ends. Its last messages:\n"
        "error: no such data\n",
    )


def test_a_process_that_is_killed_is_named(tmp_path: Path) -> None:
    status, said = outcome(tmp_path, IS_KILLED)
    assert status == ResourceError.status
    assert said == (
        "\nerror: Process 1 of this run was ended by SIGKILL, as by Linux where memory runs out, so all of it ends.\n"
    )


def test_a_first_process_that_lost_another_one_tells_the_error_of_that(children: Children) -> None:
    with pytest.raises(FailedProcessError, match="status 3, so all of it ends") as found, start(children, FAILS).led():
        raise LostProcessError("Resume.")
    assert str(found.value).endswith("\nerror: no such data")
    assert found.value.status == 3


def test_a_first_process_that_lost_one_that_ended_well_names_it(
    monkeypatch: pytest.MonkeyPatch, children: Children
) -> None:
    monkeypatch.setattr(launcher, "LEAVING", 0.0)
    start(children, WAITS, ENDS_WELL).every[1].process.wait()
    with pytest.raises(FailedProcessError) as found, children.led():
        raise LostProcessError("Resume.")
    assert str(found.value) == (
        "Process 2 of this run ended with status 0, before the others were done, so all of it ends. "
        "Its last messages:\na warning"
    )
    assert found.value.status == ResourceError.status


def test_the_error_of_the_first_process_is_told_alone_and_the_others_are_ended_before(children: Children) -> None:
    start(children, WAITS, FAILS).every[1].process.wait()
    with pytest.raises(DataError, match="of its own"), children.led():
        raise DataError("of its own")
    assert ended(children) == [-signal.SIGKILL, 3]


def test_processes_that_ended_because_of_one_are_not_taken_for_it(children: Children) -> None:
    start(children, IS_LOST, FAILS, IS_LOST)
    assert ended(children) == [6, 3, 6]
    failure = children.failure()
    assert failure
    assert str(failure).startswith("Process 2 ")


def test_processes_that_end_well_change_nothing_and_what_they_say_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, children: Children, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher, "GRACE", 0.0)
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    with start(children, ENDS_WELL).led():
        assert ended(children) == [0]
        for thread in threading.enumerate():
            if thread.name == "process 1":
                thread.join()
    assert children.failure() is None
    assert exits == []
    assert capfd.readouterr() == ("", "")
    assert children.every[0].messages() == "a warning"


def test_of_many_messages_the_last_whole_lines_are_shown(children: Children) -> None:
    start(children, "import sys\nfor i in range(9999): print(f'no. {i}', file=sys.stderr)")
    ended(children)
    lines = children.every[0].messages().splitlines()
    assert lines == [f"no. {i}" for i in range(9999 - len(lines), 9999)]
    assert 100 < len(lines) < 1000


def test_other_processes_get_what_lightning_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"A": "b"})
    monkeypatch.setattr(sys, "argv", ["finetune/lora.py", "--devices=3"])
    started: list[tuple[Any, ...]] = []
    cluster = SimpleNamespace(main_address="there", main_port=7, node_rank=lambda: 2, local_rank=lambda: 0)
    Launcher(SimpleNamespace(start=lambda *given: started.append(given)), cluster, 3, 4)._call_children_scripts()  # type: ignore[arg-type]
    assert [(rank, environment["LOCAL_RANK"]) for rank, _, environment in started] == [(7, "1"), (8, "2")]
    for _, command, environment in started:
        assert command[-1] == "--devices=3"
        common = {"MASTER_ADDR": "there", "MASTER_PORT": "7", "NODE_RANK": "2", "WORLD_SIZE": "12", "A": "b"}
        assert common.items() <= environment.items()


def test_several_devices_without_torchrun_are_started_like_this() -> None:
    strategy = Fabric(accelerator="cpu", devices=2, strategy=DataParallel()).strategy
    assert isinstance(strategy, DataParallel)
    assert isinstance(strategy.launcher, Launcher)
    assert strategy.launcher.children is strategy.children


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "status", "told"),
    [
        ("raise DataError('this record is bad')", 3, "\nerror: this record is bad\n"),
        ("os.kill(os.getpid(), 9)", 6, " was ended by SIGKILL, as by Linux where memory runs out, so all of it ends."),
    ],
)
def test_a_run_ends_with_the_message_of_the_process_that_failed(
    tmp_path: Path, examples_file: Path, end: str, status: int, told: str
) -> None:
    script = tmp_path / "lora.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "finetune")!r}]
        from lit_qlora import cli
        from lit_qlora.errors import DataError
        from lit_qlora.run.finetune import finetune
        from lit_qlora.settings import FinetuneConfig
        from lit_qlora.train import loop

        sum_gradients, seen = loop.sum_gradients, []

        def fails(*given):
            seen.append(given)
            if os.environ.get("LOCAL_RANK") == "1" and len(seen) == 2:
                {end}
            sum_gradients(*given)

        def main(config: FinetuneConfig) -> None:
            finetune(config)

        loop.sum_gradients = fails
        cli.run(main, FinetuneConfig)
        """)
    )
    flags = ["--devices=2", f"--data.path={examples_file}", f"--out_dir={tmp_path / 'out'}", "--train.max_steps=4"]
    known = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, script, *flags], env=known, capture_output=True, text=True, check=False)
    assert ran.returncode == status, ran.stderr
    _, last = ran.stderr.split("error: Process 1 of this run")
    assert told in last
    assert LOST not in ran.stderr
