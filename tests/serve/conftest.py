"""A server of the tiny checkpoint and two adapters on a free port of the loopback."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lit_qlora.inference import InferenceConfig, Roster, load_roster
from tests.scripts.test_chat import write_adapter

pytest.importorskip("fastapi", reason="the server is an extra: pip install 'lit_qlora[serve]'")
pytest.importorskip("uvicorn", reason="the server is an extra: pip install 'lit_qlora[serve]'")

from lit_qlora.serve.app import make_app
from lit_qlora.serve.limits import Limits
from lit_qlora.serve.listen import make_server, open_socket


@dataclass
class Running:
    """A server that is up."""

    port: int
    app: Any
    steps: int = 0
    """Steps of the batch so far."""
    listening: Any = None
    """uvicorn's server."""

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def load(self) -> tuple[int, int]:
        """Answers that are being made, and that wait."""
        load: tuple[int, int] = self.app.state.engine.load
        return load

    @property
    def connections(self) -> int:
        """Connections that are open."""
        return len(self.listening.server_state.connections)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Come back when `condition` holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited {seconds} s in vain; load {self.load}"
            time.sleep(0.01)


@contextmanager
def serving(
    roster: Roster, api_key: str | None = None, pace: float = 0.0, metrics: bool = False, **limits: Any
) -> Iterator[Running]:
    """A server with these limits.

    Args:
        pace: seconds that each step of the batch takes longer.
    """
    app = make_app(roster, Limits(**limits), api_key, metrics=metrics)
    batcher = app.state.engine._batcher
    look_ahead = batcher.look_ahead

    def slowly() -> None:
        running.steps += 1
        time.sleep(pace)
        look_ahead()

    batcher.look_ahead = slowly
    listener = open_socket("127.0.0.1", 0)
    running = Running(listener.getsockname()[1], app)
    server = make_server(app, limits.get("read_seconds", 10.0), limits.get("drain_seconds", 5.0))
    running.listening = server
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        running.wait_for(lambda: server.started)
        yield running
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="session")
def roster(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Roster:
    """The tiny checkpoint as "tiny", and random adapters of it as "sums" and "other"."""
    folder = tmp_path_factory.mktemp("served")
    adapters = {
        "sums": write_adapter(folder / "sums", tiny_checkpoint, 1),
        "other": write_adapter(folder / "other", tiny_checkpoint, 2, targets="all"),
    }
    return load_roster(InferenceConfig(checkpoint_dir=tiny_checkpoint, quantize="bnb.nf4"), adapters)


@pytest.fixture
def server(roster: Roster) -> Iterator[Running]:
    """A server with the limits that it has by itself."""
    with serving(roster) as running:
        yield running
