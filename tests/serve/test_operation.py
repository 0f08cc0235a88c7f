"""What those who run the server see: health, readiness, metrics, and how it ends."""

import http.client
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lit_qlora.inference import Roster
from lit_qlora.serve import app as module
from tests.serve.conftest import Running, serving
from tests.serve.test_limits import chat, message, post


def get(server: Running, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request("GET", path, headers={"Host": "localhost"})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def test_a_full_queue_is_healthy_but_not_ready(roster: Roster) -> None:
    with serving(roster, pace=0.05, slots=1, queue=0) as server, ThreadPoolExecutor(1) as pool:
        assert get(server, "/ready")[0] == 200
        asked = pool.submit(post, server, chat(max_tokens=40))
        server.wait_for(lambda: server.load == (1, 0))
        assert get(server, "/health")[0] == 200
        assert (get(server, "/ready")[0], json.loads(get(server, "/ready")[1])["status"]) == (503, "full")
        assert asked.result()[0] == 200
        assert get(server, "/ready")[0] == 200


def test_a_server_whose_engine_has_ended_is_neither(roster: Roster) -> None:
    with serving(roster) as server:
        server.app.state.engine.stop()
        assert [get(server, path)[0] for path in ("/health", "/ready")] == [503, 503]


def test_a_slow_template_is_given_up_and_stops_nobody_else(roster: Roster, monkeypatch: pytest.MonkeyPatch) -> None:
    rendering, release = threading.Semaphore(0), threading.Event()

    def slow(*arguments: Any, **options: Any) -> list[int]:
        rendering.release()
        assert release.wait(60)
        return [1]

    with serving(roster, prompt_seconds=0.3) as server, ThreadPoolExecutor(8) as pool:
        monkeypatch.setattr(module, "encode_prompt", slow)
        asked = [pool.submit(post, server, chat()) for _ in range(6)]
        rendering.acquire()
        assert get(server, "/health")[0] == 200  # while the template still runs
        for answer in asked:
            assert answer.result()[0] == 504
            assert "was not written within 0.3 seconds" in message(answer.result())
        release.set()
        monkeypatch.undo()
        assert post(server, chat(max_tokens=1))[0] == 200


def test_metrics_count_what_was_asked_and_answered(roster: Roster) -> None:
    with serving(roster, metrics=True) as server:
        used = post(server, chat(max_tokens=3))[1]["usage"]
        post(server, chat(max_tokens=3, stream=False, n=99))
        text = get(server, "/metrics")[1]
        values = dict(re.findall(r"^(lit_qlora_\S+) (\S+)$", text, re.MULTILINE))
        assert values['lit_qlora_requests_total{status="200"}'] == "1"
        assert values['lit_qlora_requests_total{status="400"}'] == "1"
        assert float(values["lit_qlora_prompt_tokens_total"]) == used["prompt_tokens"]
        assert float(values["lit_qlora_answer_tokens_total"]) == used["completion_tokens"]
        assert values["lit_qlora_running_answers"] == values["lit_qlora_waiting_answers"] == "0"
        assert values["lit_qlora_request_seconds_count"] == "2"
        kinds = re.findall(r"^# TYPE (\S+) (?:counter|gauge|summary)$", text, re.MULTILINE)
        assert len(kinds) == 6
        assert all(name.startswith(tuple(kinds)) for name in values)


def test_there_are_no_metrics_unless_they_are_asked_for(server: Running) -> None:
    assert get(server, "/metrics")[0] == 404


def test_a_server_that_is_told_to_end_lets_running_answers_end_first(roster: Roster) -> None:
    with ThreadPoolExecutor(1) as pool:
        with serving(roster, pace=0.02, drain_seconds=30) as server:
            asked = pool.submit(post, server, chat(max_tokens=40))
            server.wait_for(lambda: server.load == (1, 0))
        status, body, _ = asked.result()
    assert (status, body["usage"]["completion_tokens"]) == (200, 40)


def test_it_waits_no_longer_for_them_than_it_is_told(roster: Roster) -> None:
    def ask(server: Running) -> Any:
        try:
            return post(server, chat(max_tokens=60))[0]
        except (http.client.HTTPException, OSError, ValueError) as error:
            return error

    with ThreadPoolExecutor(1) as pool:
        with serving(roster, pace=1.0, drain_seconds=0) as server:
            asked = pool.submit(ask, server)
            server.wait_for(lambda: server.load == (1, 0))
        assert asked.result() != 200
