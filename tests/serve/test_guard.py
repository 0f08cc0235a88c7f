"""Who is let in."""

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from lit_qlora.cli import SecretStr
from lit_qlora.errors import UsageError
from lit_qlora.inference import Roster
from lit_qlora.serve.guard import Guard, encodings
from tests.conftest import load_script
from tests.serve.conftest import Running, serving

KEY = "correct horse"


@pytest.fixture(scope="module")
def guarded(roster: Roster) -> Iterator[Running]:
    """A server that asks for KEY."""
    with serving(roster, api_key=KEY, metrics=True) as server:
        yield server


def status(server: Running, path: str, *, host: str = "localhost", key: bytes | None = None) -> int:
    """The status of GET `path`, whose bytes no client library has put in order."""
    head = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n".encode()
    head += b"" if key is None else b"Authorization: Bearer " + key + b"\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(head + b"\r\n")
        return int(raw.recv(1000).split()[1])


@pytest.mark.parametrize(
    "path", ["/v1/models", "/metrics", "/v1/models/", "/V1/models", "//v1/models", "/x/../v1/models"]
)
@pytest.mark.parametrize("host", ["localhost", "localhost:1/?", "localhost:1#", "[::1]?/"])
def test_no_host_and_no_spelling_of_a_path_passes_by_the_key(guarded: Running, path: str, host: str) -> None:
    assert status(guarded, path, host=host) == 401


@pytest.mark.parametrize("path", ["/", "/health", "/ready"])
def test_the_page_and_the_state_need_no_key(guarded: Running, path: str) -> None:
    assert status(guarded, path) == 200


def test_the_key_is_asked_for_before_anything_is_routed(guarded: Running) -> None:
    assert status(guarded, "/absent") == 401
    assert status(guarded, "/absent", key=KEY.encode()) == 404
    assert status(guarded, "/v1/models/", key=KEY.encode()) == 404  # and not a redirect to another host


def test_the_path_decides_whatever_a_framework_makes_of_the_host() -> None:
    said: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        said.append("let in")

    async def send(event: Any) -> None:
        said.append(event.get("status"))

    scope = {"type": "http", "path": "/v1/models", "headers": [(b"host", b"x/?")]}
    asyncio.run(Guard(app, KEY, ())(scope, lambda: None, send))  # type: ignore[arg-type, return-value]
    assert said[0] == 401
    assert "let in" not in said


@pytest.mark.parametrize("kind", ["websocket", "anything"])
def test_what_is_no_http_is_not_passed_on(kind: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        pytest.fail("let in")

    asyncio.run(Guard(app, None, ())({"type": kind, "path": "/", "headers": []}, None, None))  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["schlüssel", "ключ-секрет", "鍵鍵鍵鍵鍵鍵鍵鍵", "a b:c=d/e+f~"])
def test_a_key_may_have_any_characters(roster: Roster, key: str) -> None:
    with serving(roster, api_key=key) as server:
        for sent in encodings(key):
            assert status(server, "/v1/models", key=sent) == 200
        assert status(server, "/v1/models", key=key.encode() + b"x") == 401


@pytest.mark.parametrize("key", ["correct\nhorse", "correct\0horse", " correct horse", "correct\u2028horse"])
def test_a_key_that_no_client_can_send_is_refused_at_the_start(key: str) -> None:
    with pytest.raises(UsageError, match="no client can send"):
        load_script("scripts/serve.py").Config(api_key=SecretStr(key)).key()
