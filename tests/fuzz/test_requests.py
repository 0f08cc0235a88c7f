"""Any request gets a whole answer, or a status below 500 with one message, and the server goes on."""

import asyncio
import http.client
import json
import os
import random
import resource
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_qlora.inference import InferenceConfig, load_roster
from tests.fuzz.property import EXAMPLES, SEED, BrokenError, cases, kept, quick, slow
from tests.fuzz.strategies import HOSTILE, changed_often, spoilt
from tests.fuzz.targets import Target
from tests.serve.conftest import Running, serving

KIND = "requests"
CHAT: dict[str, Any] = {
    "model": "base",
    "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "Hi"}],
    "max_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "stop": ["x"],
    "seed": 1,
    "n": 1,
    "stream": False,
}
TOOLS = CHAT | {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], "n": 2}
COMPLETION = {
    "model": "base",
    "prompt": "Q: 1?",
    "max_tokens": 2,
    "stream": True,
    "stream_options": {"include_usage": True},
}
COMPARISON = {"model": "base", "with": "base", "messages": [{"role": "user", "content": "Q: 1?"}], "answer": "2"}
PATHS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/compare",
    "/v1/models",
    "/v1/models/x",
    "/health",
    "/",
    "/x",
    "//",
    "/v1/%00",
]
HEADERS = [
    *({}, {"Content-Type": "text/plain"}, {"Authorization": "Bearer x"}, {"Accept": "x"}, {"X-Long": "a" * 4000}),
    *({"Transfer-Encoding": "x"}, {"Content-Encoding": "gzip"}, {"Origin": "http://evil"}, {"Expect": "100-continue"}),
]
BODIES = [CHAT, TOOLS, COMPLETION, COMPARISON]
bodies = st.one_of(
    st.sampled_from(BODIES).map(lambda body: json.dumps(body).encode()),
    st.sampled_from(BODIES).flatmap(changed_often).map(lambda body: json.dumps(body).encode()),
    st.sampled_from(BODIES).map(lambda body: json.dumps(body).encode()).flatmap(spoilt),
)
requests = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["POST"] * 30 + ["GET", "PUT", "OPTIONS", "HEAD"]),
        "path": st.sampled_from(PATHS[:3] * 10 + PATHS),
        "headers": st.sampled_from([{}] * 10 + HEADERS),
        "body": bodies.map(lambda body: body.decode("latin-1")),
    }
)


@pytest.fixture(scope="module")
def server(targets: Mapping[str, Target]) -> Iterator[Running]:
    """A server of a tiny model."""
    with serving(load_roster(InferenceConfig(checkpoint_dir=targets["weights"].folder), {})) as running:
        yield running


def judge(status: int, body: bytes, request: bytes) -> int:
    """Return the status of an answer that is whole, or that says in words what is wrong."""
    is_whole = status == 200 and (b"data:" not in body or b"data: [DONE]" in body)
    if is_whole or status in (204, 307) or 400 <= status < 500 or (status in (503, 504) and b"message" in body):
        return status
    raise BrokenError(KIND, request, f"status {status}: {body[:200]!r}")


def ask(server: Running, content: bytes) -> int:
    """Send a request; return the status of its answer."""
    request = json.loads(content)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    try:
        headers = {"Content-Type": "application/json", **request["headers"]}
        connection.request(request["method"], request["path"], request["body"].encode("latin-1"), headers)
        response = connection.getresponse()
        return judge(response.status, response.read(), content)
    except (OSError, http.client.HTTPException) as error:
        raise BrokenError(KIND, content, repr(error)) from error
    finally:
        connection.close()


def test_a_request_is_answered_or_refused_in_words(server: Running) -> None:
    statuses: Counter[int] = Counter()

    @quick(40)
    @given(requests)
    def run(request: Any) -> None:
        statuses[ask(server, json.dumps(request).encode())] += 1

    with kept():
        run()
    assert {200, 400} <= statuses.keys()
    assert server.load == (0, 0)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_thousands_of_requests_are_answered_or_refused_in_words(server: Running) -> None:
    statuses: Counter[int] = Counter()

    @slow
    @given(requests)
    def run(request: Any) -> None:
        statuses[ask(server, json.dumps(request).encode())] += 1

    with kept():
        for _ in range(10):
            run()
    print(f"{KIND}: {sum(statuses.values())} tried, {dict(statuses)}")


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_two_hundred_clients_at_once_are_answered_or_refused_in_words(server: Running) -> None:
    """Some leave before their answer comes; memory and open files are then as they were."""
    statuses = asyncio.run(crowd(server, 200, 25 * EXAMPLES))
    print(f"200 clients: {sum(statuses.values())} tried, {dict(statuses)}")
    server.wait_for(lambda: server.load == (0, 0))
    assert ask(server, json.dumps({"method": "GET", "path": "/health", "headers": {}, "body": ""}).encode()) == 200


async def crowd(server: Running, clients: int, count: int) -> Counter[str]:
    """Send `count` requests from so many clients."""
    statuses: Counter[str] = Counter()
    rng, left = random.Random(SEED), iter(range(count))
    start: tuple[int, int] | None = None

    async def client() -> None:
        for _ in left:
            body = a_body(rng)
            path = rng.choice(PATHS[:2])
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            try:
                writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                if rng.random() < 0.05:
                    statuses["left"] += 1
                    continue
                answer = await asyncio.wait_for(reader.read(), 600)
                first, _, rest = answer.partition(b"\r\n\r\n")
                if not first:
                    raise BrokenError(KIND, body, f"no answer at all; so far {dict(statuses)}")
                request = {"method": "POST", "path": path, "headers": {}, "body": body.decode("latin-1")}
                statuses[str(judge(int(first.split()[1]), rest, json.dumps(request).encode()))] += 1
            except (ConnectionError, TimeoutError) as error:
                statuses[type(error).__name__] += 1
            finally:
                writer.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
        start = _open_files_and_memory()
    await asyncio.sleep(0.5)
    assert start
    files, memory = (now - then for now, then in zip(_open_files_and_memory(), start, strict=True))
    assert files <= 5, f"{files} more open files"
    assert memory < 2**28, f"{memory / 2**20:.0f} MiB more"
    return statuses


def a_body(rng: random.Random) -> bytes:
    """A good body, or one with a field or a byte changed."""
    body = dict(rng.choice(BODIES))
    if rng.random() < 0.4:
        key = rng.choice([*body, "logit_bias", "top_k", "min_p", "x", "response_format"])
        body[key] = rng.choice(HOSTILE)
    content = json.dumps(body).encode()
    if rng.random() < 0.2:
        at = rng.randrange(len(content))
        content = content[:at] + bytes([rng.randrange(256)]) + content[at + rng.randrange(3) :]
    return content


def _open_files_and_memory() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_what_once_broke_the_server_no_longer_does(server: Running) -> None:
    for case in cases(KIND):
        ask(server, case.read_bytes())
