"""A judge of answers: our own server and others, scores in replies, and faults that end no run."""
# ruff: noqa: F811 - fixtures are arguments

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric import Fabric

from lit_qlora.data import RunData
from lit_qlora.errors import DataError, UsageError
from lit_qlora.evaluate.judge import TEMPLATE, Judge, Judged, JudgeError, fill, make_judge
from lit_qlora.evaluate.measures import more_measures
from lit_qlora.evaluate.validation_inputs import read_probes
from lit_qlora.generation import generate, text_of
from lit_qlora.inference import InferenceConfig, encode_prompt, load_roster, stop_ids
from lit_qlora.prompts.conversation import prompt_of
from lit_qlora.settings import EvalConfig, FinetuneConfig, GenerationConfig
from tests.evaluate.test_measures import adapted
from tests.evaluate.test_validation_inputs import config, data  # noqa: F401 - fixtures

KEY = "sk-private-key-7"
ONE = Judged("What is 1 plus 1?", "2", "two")


@dataclass
class Scripted:
    """A server that answers as `reply` says: a status and a body, or a text that becomes a chat completion."""

    reply: Callable[[dict[str, Any]], str | tuple[int, Any]]
    requests: list[tuple[str, str | None, dict[str, Any]]] = field(default_factory=list)
    url: str = ""

    def judge(self, **changes: Any) -> Judge:
        """A judge that asks it."""
        settings = {"judge_url": f"{self.url}/v1", "judge_model": "m", "generate": 1} | changes
        judge = make_judge(EvalConfig(**settings))
        assert judge
        return judge


@pytest.fixture
def script() -> Iterator[Callable[[Any], Scripted]]:
    """Starts a scripted server."""
    servers: list[HTTPServer] = []

    def start(reply: Any) -> Scripted:
        scripted = Scripted(reply)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                scripted.requests.append((self.path, self.headers.get("Authorization"), body))
                said = scripted.reply(body)
                choice = {"choices": [{"message": {"role": "assistant", "content": said}}]}
                status, content = said if isinstance(said, tuple) else (200, choice)
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", content)
                self.end_headers()
                self.wfile.write(content.encode() if isinstance(content, str) else json.dumps(content).encode())

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        scripted.url = f"http://127.0.0.1:{server.server_port}"
        return scripted

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_score_that_the_default_request_does_not_allow_is_none(tmp_path: Path) -> None:
    (tmp_path / "judge.txt").write_text("Rate {answer} from 0 to 100.")
    for given, score in ({}, None), ({"judge_prompt": tmp_path / "judge.txt"}, 80.0):
        judge = make_judge(EvalConfig(**URL | given))
        assert judge
        assert judge.read("Score: 80") == score


def test_braces_in_texts_mean_nothing() -> None:
    one = Judged("{answer}", "{x}", "{wanted} \\1")
    assert fill("{prompt}|{wanted}|{answer}|{other}", one) == "{answer}|{x}|{wanted} \\1|{other}"
    assert all(text in fill(TEMPLATE, ONE) for text in ONE)


def test_a_request_is_openai_s_and_has_the_key_of_the_environment(
    script: Callable[[Any], Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = script(lambda body: f"Score: {len(body['messages'][0]['content']) % 10}")
    monkeypatch.setenv("JUDGE", KEY)
    judge = server.judge(judge_key_variable="JUDGE", judge_options={"temperature": 0, "max_tokens": 9})
    answers = [ONE, ONE._replace(answer="three"), ONE]
    expected = [float(len(fill(TEMPLATE, one)) % 10) for one in answers]
    assert judge.scores(answers) == expected
    message = {"role": "user", "content": fill(TEMPLATE, ONE)}
    body = {"model": "m", "messages": [message], "temperature": 0, "max_tokens": 9}
    assert ("/v1/chat/completions", f"Bearer {KEY}", body) in server.requests
    monkeypatch.delenv("JUDGE")
    judge.scores([ONE])
    assert server.requests[-1][1] is None


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}), "status 401, Incorrect .*: .hidden."),
        ((404, "not here"), r"status 404, Not Found\. Does eval\.judge_url end as .* in /v1\?"),
        ((302, "http://192.0.2.1/v1"), "status 302"),
        ((200, "no json"), "the reply is not of the form of OpenAI's chat completions"),
        ((200, {"choices": []}), "the reply is not of the form of OpenAI's chat completions"),
        ((200, "x" * 2**21), "the reply has more than 1,048,576 bytes"),
    ],
    ids=["key", "path", "redirection", "text", "empty", "long"],
)
def test_a_server_that_refuses_is_named_without_the_key(
    script: Callable[[Any], Scripted], monkeypatch: pytest.MonkeyPatch, reply: Any, message: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = script(lambda body: reply)
    with pytest.raises(JudgeError, match=rf"^{server.url}/v1 cannot be asked: .*{message}") as caught:
        server.judge().scores([ONE])
    assert KEY not in str(caught.value)
    assert len(server.requests) == 1


def test_a_server_that_is_busy_is_asked_again(
    script: Callable[[Any], Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    replies: list[Any] = [(503, "busy"), (429, "slowly"), "Score: 5"]
    assert script(lambda body: replies.pop(0)).judge().scores([ONE]) == [5.0]
    with pytest.raises(JudgeError, match="status 503"):
        script(lambda body: (503, "busy")).judge().scores([ONE])


def test_a_key_that_no_header_can_hold_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-ключ")
    judge = Judge("http://127.0.0.1:9/v1", "m", TEMPLATE, "OPENAI_API_KEY", {})
    with pytest.raises(JudgeError, match=r"^The key in OPENAI_API_KEY has characters that no header can hold\.$"):
        judge.scores([ONE])


def test_our_own_server_is_a_judge(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.serve.conftest import serving

    roster = load_roster(InferenceConfig(checkpoint_dir=tiny_checkpoint), {})
    (tmp_path / "judge.txt").write_text("Q: {prompt} {answer}")
    with serving(roster, api_key=KEY) as server:
        judge = make_judge(
            EvalConfig(
                generate=1,
                judge_url=f"{server.url}/v1",
                judge_model="tiny",
                judge_prompt=tmp_path / "judge.txt",
                judge_options={"temperature": 0, "max_tokens": 4},
            )
        )
        assert judge
        with pytest.raises(JudgeError, match="status 401"):
            judge.scores([ONE])
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        prompt = encode_prompt(roster.tokenizer, roster.styles["tiny"], prompt_of("Q: What is 1 plus 1? two"))
        stops = stop_ids(roster.tokenizer, roster.styles["tiny"])
        (ids,) = generate(roster.model, [prompt], GenerationConfig(max_new_tokens=4), stops, roster.tokenizer.size)
        said = text_of(roster.tokenizer, ids)
        heard: list[str] = []
        monkeypatch.setattr("lit_qlora.evaluate.judge.read_score", lambda reply: heard.append(reply) or 7.0)
        assert judge.scores([ONE, ONE]) == [7.0, 7.0]
        assert [text.strip() for text in heard] == [said.strip()] * 2
        with pytest.raises(JudgeError, match="status 404"):
            replace(judge, model="other").scores([ONE])


def validated(config: FinetuneConfig, data: RunData, **judge: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The record of a validation with two answers, and what is written of them."""
    settings = replace(config, eval=EvalConfig(generate=2, max_new_tokens=3, judge_model="m", **judge))
    written: list[dict[str, Any]] = []
    (measure,) = more_measures(
        Fabric(accelerator="cpu", devices=1),
        adapted(),
        data,
        read_probes(settings, data),
        settings.eval.answers,
        lambda step, rows: written.extend(rows),
    )
    return measure(3), written


def test_the_metric_is_the_mean_of_the_scores_and_each_is_written(
    config: FinetuneConfig, data: RunData, script: Callable[[Any], Scripted], capsys: pytest.CaptureFixture[str]
) -> None:
    replies = ["Score: 8", "Score: 3"]
    server = script(lambda body: replies.pop())
    record, rows = validated(config, data, judge_url=server.url, best="judge")
    assert record["judge"] == 5.5
    assert sorted(row["judge"] for row in rows) == [3.0, 8.0]
    asked = {body["messages"][0]["content"] for _, _, body in server.requests}
    assert asked == {fill(TEMPLATE, Judged(row["prompt"], row["wanted"], row["answer"])) for row in rows}
    replies += ["I do not know.", "Score: 4"]
    record, rows = validated(config, data, judge_url=server.url)
    assert record["judge"] == 4.0
    assert sum("judge" in row for row in rows) == 1
    note = "after step 3 the judge gave no score to 1 of 2 answers; it replied 'I do not know.'"
    assert note in capsys.readouterr().err
    assert [row["judge_reply"] for row in rows if "judge_reply" in row] == ["I do not know."]


def test_without_the_server_there_is_a_note_and_every_other_metric(
    config: FinetuneConfig, data: RunData, capsys: pytest.CaptureFixture[str]
) -> None:
    record, rows = validated(config, data, judge_url="http://127.0.0.1:9/v1")
    assert "chrf" in record
    assert "judge" not in record
    assert all(row.keys() == {"step", "prompt", "answer", "wanted", "chrf"} for row in rows)
    assert "  note    no judgement after step 3: http://127.0.0.1:9/v1 cannot be asked: " in capsys.readouterr().err


URL = {"judge_url": "http://localhost/v1", "judge_model": "m", "generate": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"judge_model": "m"}, "eval.judge_model has no effect without eval.judge_url"),
        (URL | {"judge_url": "localhost:8000"}, "eval.judge_url must be of the form"),
        (URL | {"judge_url": f"http://me:{KEY}@localhost/v1"}, "eval.judge_url must be of the form"),
        (URL | {"judge_url": f"http://localhost/v1?api_key={KEY}"}, "eval.judge_url must be of the form"),
        (URL | {"judge_key_variable": KEY}, "eval.judge_key_variable must be the name of a variable"),
        (URL | {"judge_options": {"stream": True}}, "eval.judge_options: stream is no option"),
        (URL | {"judge_model": None}, "eval.judge_url needs eval.judge_model"),
        (URL | {"generate": 0}, "eval.judge_url scores answers to validation samples, so it needs eval.generate"),
    ],
)
def test_settings_of_a_judge_that_cannot_be_meant_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        EvalConfig(**settings)
    assert KEY not in str(caught.value)


def test_a_request_without_the_answer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "judge.txt").write_text("Rate it.")
    with pytest.raises(UsageError, match=r"judge\.txt does not hold \{answer\}, the place of the answer to judge"):
        make_judge(EvalConfig(**URL | {"judge_prompt": tmp_path / "judge.txt"}))
    with pytest.raises(DataError, match=r"eval\.judge_prompt .*absent\.txt cannot be read"):
        make_judge(EvalConfig(**URL | {"judge_prompt": tmp_path / "absent.txt"}))


def test_without_a_url_there_is_no_judge() -> None:
    assert make_judge(EvalConfig(generate=1)) is None
