"""V01 to V12: what a client may do to the server, and what it may not."""

import asyncio
import hmac
import http.client
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lit_qlora.errors import CheckpointError, UsageError
from lit_qlora.inference import Roster
from lit_qlora.serve.listen import open_socket
from tests.conftest import load_script
from tests.serve.conftest import Running, serving

JSON = {"Content-Type": "application/json"}


def post(
    server: Running, body: Any, path: str = "/v1/chat/completions", headers: dict[str, str] = JSON
) -> tuple[int, Any, http.client.HTTPResponse]:
    """Status, parsed body and response."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response
    finally:
        connection.close()


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, **fields}


def message(answer: tuple[int, Any, Any]) -> str:
    text: str = answer[1]["error"]["message"]
    return text


def test_v01_a_body_above_the_limit_is_refused_with_413(server: Running) -> None:
    status, body, _ = post(server, b" " * (2**20 + 1))
    assert (status, body["error"]["type"]) == (413, "invalid_request_error")
    # Without a length, as much is read as is allowed, and no more.
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        try:
            for _ in range(1000):
                raw.sendall(b"10000\r\n" + b" " * 2**16 + b"\r\n")
            pytest.fail("the server has read 64 MiB")
        except OSError:  # it has closed the connection already
            with suppress(ConnectionResetError):
                assert b" 413 " in raw.recv(1000)
    assert post(server, b" " * (2**20 - 200) + json.dumps(chat(max_tokens=1)).encode())[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b'{"model": NaN}',
        b"[" * 100_000,
        b'{"a": "\\ud800"}',
        b'{"a": "\\udcff"}',
    ],
)
def test_v02_what_is_not_a_json_object_is_refused_with_400(server: Running, body: bytes) -> None:
    answer = post(server, body)
    assert answer[0] == 400
    assert "JSON" in message(answer)


def test_v03_an_unknown_model_is_refused_with_404_and_the_known_ones(server: Running) -> None:
    answer = post(server, chat(model="gpt-9"))
    assert (answer[0], answer[1]["error"]["code"]) == (404, "model_not_found")
    assert "'gpt-9'. There are: tiny, sums, other." in message(answer)
    assert post(server, b"", path="/v1/nothing")[0] == 404


def test_v04_more_tokens_than_there_is_room_for_are_refused_with_the_numbers(server: Running) -> None:
    answer = post(server, {"model": "tiny", "prompt": "Hi", "max_tokens": 96}, path="/v1/completions")
    assert (answer[0], answer[1]["error"]["code"]) == (400, "context_length_exceeded")
    assert "the answer may have 96, but the model's context holds 96, so there is room for 9" in message(answer)
    answer = post(server, chat(messages=[{"role": "user", "content": "What is 1 plus 1?" * 40}]))
    assert answer[0] == 400
    assert "there is room for 0" in message(answer)


def test_a_smaller_context_than_the_models_is_kept_to(roster: Roster) -> None:
    with serving(roster, context=20, slots=2) as server:
        body = {"model": "tiny", "prompt": "What is 1 plus 1?", "temperature": 0}
        status, reply, _ = post(server, body, path="/v1/completions")
        assert (status, reply["choices"][0]["finish_reason"]) == (200, "length")
        assert reply["usage"]["total_tokens"] == 20
        answer = post(server, body | {"max_tokens": 20}, path="/v1/completions")
        assert answer[0] == 400
        assert "context holds 20" in message(answer)


def test_a_text_that_the_tokenizer_refuses_is_refused_with_400(
    server: Running, roster: Roster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> None:
        raise CheckpointError("cannot encode a text")

    monkeypatch.setattr(roster.tokenizer, "encode_many", refuse)
    completion = post(server, {"model": "tiny", "prompt": "x"}, "/v1/completions")
    for answer, field in ((completion, "prompt"), (post(server, chat()), "messages")):
        assert (answer[0], message(answer), answer[1]["error"]["param"]) == (400, "cannot encode a text", field)


@pytest.mark.parametrize(
    "temperature", ["1" + "0" * 400, "-1", "NaN", '"x"', "2.1", "Infinity", "true", "[1]", "1e999"]
)
def test_v05_a_temperature_out_of_range_is_refused_with_400(server: Running, temperature: str) -> None:
    body = json.dumps(chat()).replace('"temperature": 0', f'"temperature": {temperature}')
    assert post(server, body.encode())[0] == 400


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1e-42},
        {"temperature": 1e-300},
        {"temperature": 1, "repetition_penalty": 1e-40},
        {"temperature": 0, "repetition_penalty": 1e-40},
        {"temperature": 1, "top_p": 5e-324, "typical_p": 5e-324},
    ],
    ids=str,
)
def test_no_setting_however_extreme_ends_the_answers_of_others(server: Running, settings: dict[str, float]) -> None:
    healthy = post(server, chat(max_tokens=5))[1]["choices"]
    assert post(server, chat(max_tokens=5, **settings))[0] in (200, 500)
    assert post(server, chat(max_tokens=5))[1]["choices"] == healthy
    assert server.load == (0, 0)


def test_more_answers_than_could_ever_wait_are_refused_for_good(roster: Roster) -> None:
    with serving(roster, slots=2, queue=1) as server:
        answer = post(server, chat(max_tokens=1, n=4))
        assert answer[0] == 400
        assert "4 answers" in message(answer)
        assert post(server, chat(max_tokens=1, n=3))[0] == 200


def test_v06_when_the_queue_is_full_clients_are_told_to_come_back(roster: Roster) -> None:
    with serving(roster, pace=0.03, slots=2, queue=3) as server, ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: post(server, chat(max_tokens=12)), range(20)))
        statuses = [status for status, _, _ in answers]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 5
        for status, body, response in answers:
            if status == 429:
                assert int(response.headers["Retry-After"]) > 0
                assert body["error"]["code"] == "queue_full"
        texts = {body["choices"][0]["message"]["content"] for status, body, _ in answers if status == 200}
        assert len(texts) == 1
        assert post(server, chat(max_tokens=1))[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_v07_a_client_that_goes_away_frees_its_slot(roster: Roster, stream: bool) -> None:
    with serving(roster, pace=0.1, slots=1, queue=4) as server:
        connections = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=30) for _ in range(2)]
        for i, connection in enumerate(connections):  # one is being answered, one waits
            connection.request("POST", "/v1/chat/completions", json.dumps(chat(max_tokens=60, stream=stream)), JSON)
            server.wait_for(lambda i=i: sum(server.load) == i + 1)  # type: ignore[misc]
        server.wait_for(lambda: server.load == (1, 1))
        for connection, left in zip(reversed(connections), ((1, 0), (0, 0)), strict=True):
            connection.close()
            server.wait_for(lambda left=left: server.load == left)  # type: ignore[misc]
        assert server.steps < 60  # which one answer alone would have taken
        assert post(server, chat(max_tokens=1))[0] == 200


def test_a_client_that_has_gone_before_its_stream_begins_frees_its_slot(roster: Roster) -> None:
    async def ask() -> None:
        body = json.dumps(chat(max_tokens=60, stream=True)).encode()
        told = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            return next(told, {"type": "http.disconnect"})

        async def send(event: dict[str, Any]) -> None:
            await asyncio.sleep(0)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/chat/completions",
            "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }
        await server.app(scope, receive, send)

    with serving(roster, pace=0.1, slots=1) as server:
        asyncio.run(ask())
        server.wait_for(lambda: server.load == (0, 0))
        assert server.steps < 60  # which the answer would have taken


def test_a_client_that_goes_in_the_middle_of_its_request_is_no_error_of_ours(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(head + b"Content-Length: 500\r\n\r\n{")
        time.sleep(0.2)
    assert post(server, chat(max_tokens=1))[0] == 200
    time.sleep(0.2)
    assert not caplog.records


def test_v08_a_request_that_comes_too_slowly_is_ended(roster: Roster) -> None:
    with serving(roster, read_seconds=1.0) as server:
        for line in (b"", b"X-Slow: 1\r\n"):  # a client that says nothing, and one that says a line now and then
            with socket.create_connection(("127.0.0.1", server.port), timeout=0.1) as raw:
                raw.sendall(line and b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
                start, answer = time.monotonic(), None
                while answer is None and time.monotonic() - start < 60:
                    try:
                        answer = raw.recv(1000)
                    except TimeoutError:
                        raw.sendall(line)
                assert answer is not None
                assert b" 408 " in answer.splitlines()[0]
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as raw:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            raw.sendall(head + b"Content-Length: 500\r\n\r\n{")
            assert b" 408 " in raw.recv(1000).splitlines()[0]
        assert post(server, chat(max_tokens=1))[0] == 200


def test_a_client_that_does_not_read_is_left(roster: Roster, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_small(host: str, port: int) -> socket.socket:
        listener = open_socket(host, port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listener

    monkeypatch.setattr("tests.serve.conftest.open_socket", open_small)
    with serving(roster, read_seconds=0.5) as server, socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.settimeout(60)
        raw.connect(("127.0.0.1", server.port))
        body = json.dumps(chat(max_tokens=60, n=8, stream=True)).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        server.wait_for(lambda: server.load != (0, 0))
        server.wait_for(lambda: server.load == (0, 0))
        server.wait_for(lambda: server.connections == 0)
        received = b""
        with suppress(ConnectionResetError):
            while part := raw.recv(2**16):
                received += part
        assert received.startswith(b"HTTP/1.1 200 OK")
        assert b"[DONE]" not in received


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_v09_other_machines_are_let_in_only_with_a_key(host: str, tmp_path: Path) -> None:
    script = load_script("scripts/serve.py")
    with pytest.raises(UsageError, match="lets other machines in"):
        script.Config(host=host)
    key = tmp_path / "key"
    key.write_text("0123456789abcdef\n")
    assert script.Config(host=host, api_key_file=key).key() == "0123456789abcdef"
    key.write_text("short")
    with pytest.raises(UsageError, match="at least 8 characters"):
        script.Config(host=host, api_key_file=key).key()


def test_v10_a_wrong_key_is_refused_with_401_in_constant_time(roster: Roster, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def spy(a: Any, b: Any) -> bool:
        compared.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr("hmac.compare_digest", spy)
    with serving(roster, api_key="correct horse") as server:
        for given in (None, "Bearer wrong", "Bearer correct horses", "Bearer ", "Basic correct horse", "Bearer é"):
            headers = JSON if given is None else JSON | {"Authorization": given}
            status, body, response = post(server, chat(max_tokens=1), headers=headers)
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
            assert response.headers["WWW-Authenticate"] == "Bearer"
        headers = JSON | {"Authorization": "Bearer correct horse"}
        assert post(server, chat(max_tokens=1), headers=headers)[0] == 200
    assert compared == [(32, 32)] * 7  # hashes of one length, whatever was given


def test_v11_control_tokens_in_what_a_user_says_are_text(
    roster: Roster, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, prompts = server.app.state.engine, []
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda jobs: (prompts.extend(j.request.prompt for j in jobs), submit(jobs)))
    control = {roster.tokenizer.eos_id, roster.tokenizer.bos_id}
    for said in ("</s>", "<s>", "x</s><s>y"):
        for path, body in (
            ("/v1/chat/completions", chat(max_tokens=1, messages=[{"role": "user", "content": said}])),
            ("/v1/completions", {"model": "tiny", "prompt": said, "max_tokens": 1}),
        ):
            assert post(server, body, path)[0] == 200
            prompt = list(prompts[-1])
            if roster.tokenizer.use_bos:
                assert prompt.pop(0) == roster.tokenizer.bos_id
            assert not control & set(prompt)
            assert said in roster.tokenizer.decode(prompt)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:PORT/image.png"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "file", "file": {"file_id": "x"}},
        "text",
        {"type": "text", "text": 5},
    ],
    ids=str,
)
def test_v12_nothing_but_text_is_read_and_nothing_is_fetched(server: Running, part: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.3)
        body = json.dumps(chat(messages=[{"role": "user", "content": [part]}]))
        answer = post(server, body.replace("PORT", str(trap.getsockname()[1])).encode())
        assert answer[0] == 400
        assert "this model reads text" in message(answer)
        with pytest.raises(TimeoutError):
            trap.accept()


def test_another_page_in_the_browser_cannot_use_the_server(server: Running) -> None:
    body = json.dumps(chat(max_tokens=1)).encode()
    assert post(server, body, headers={"Content-Type": "text/plain"})[0] == 415
    assert post(server, body, headers=JSON | {"Host": "evil.example"})[0] == 421
    _, _, response = post(server, body, headers=JSON | {"Origin": "http://evil.example"})
    assert "Access-Control-Allow-Origin" not in response.headers


def test_an_answer_that_takes_too_long_is_given_up(roster: Roster) -> None:
    with serving(roster, pace=0.05, answer_seconds=0.5) as server:
        answer = post(server, chat(max_tokens=60))
        assert (answer[0], answer[1]["error"]["code"]) == (504, "timeout")
        server.wait_for(lambda: server.load == (0, 0))
