"""Scores of answers by a judge, a model behind a server with OpenAI's API; without eval.judge_url nobody is asked."""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from lit_qlora.errors import DataError, UsageError, UserError
from lit_qlora.evaluate.judge_replies import read_score
from lit_qlora.files.reading import parse_json, read_text
from lit_qlora.redact import HIDDEN, scrub
from lit_qlora.settings import EvalConfig, check

TEMPLATE = """You judge the answer of an assistant.

Question:
{prompt}

Reference answer:
{wanted}

Answer to judge:
{answer}

Rate the answer from 0 (wrong, or useless) to 10 (as good as the reference answer, or better).
End with one line: Score: NUMBER
"""
HIGHEST = 10
"""The best score of the template above."""
AT_ONCE = 4
"""Requests that run at the same time."""
SECONDS = 120.0
"""Longest time that a request may take."""
TRIES = 3
PASSING = (429, 500, 502, 503, 504)
"""Statuses of a server that may answer soon."""
MOST_BYTES = 2**20
"""Of a reply; a longer one is refused."""


class JudgeError(UserError):
    """The judge could not be asked, or its reply is of another form than OpenAI's."""


class Judged(NamedTuple):
    """A question and the model's answer to it."""

    prompt: str
    wanted: str
    answer: str


@dataclass(frozen=True)
class Judge:
    """The server that is asked, and how."""

    url: str
    """Base URL, such as http://localhost:8000/v1."""
    model: str
    template: str
    """Request with {prompt}, {answer} and {wanted}."""
    key_variable: str
    """Variable of the environment with the key; no key is sent where it is not set."""
    options: dict[str, Any]
    """Other fields of a request."""

    def scores(self, answers: Sequence[Judged]) -> list[float | None]:
        """The score of each answer; None where the judge's reply holds none.

        Raises:
            JudgeError: if the server cannot be asked.
        """
        return list(map(self.read, self.replies(answers)))

    def read(self, reply: str) -> float | None:
        """The score in a reply; None without one, or with one that the default request does not allow."""
        score = read_score(reply)
        return None if score is not None and self.template == TEMPLATE and score > HIGHEST else score

    def replies(self, answers: Sequence[Judged]) -> list[str]:
        """Ask the judge about each answer, and return its replies.

        Raises:
            JudgeError: if the server cannot be asked.
        """
        with ThreadPoolExecutor(AT_ONCE) as pool:
            waiting = [pool.submit(self._ask, fill(self.template, one)) for one in answers]
            try:
                return [one.result() for one in waiting]
            finally:
                pool.shutdown(cancel_futures=True)

    def _ask(self, text: str) -> str:
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], **self.options}
        key = os.environ.get(self.key_variable, "").strip()
        if not key.isascii() or not key.isprintable():  # which http.client would show
            raise JudgeError(f"The key in {self.key_variable} has characters that no header can hold.")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        for left in range(TRIES - 1, -1, -1):
            try:
                with OPENER.open(request, timeout=SECONDS) as reply:
                    return content_of(reply.read(MOST_BYTES + 1))
            except urllib.error.HTTPError as error:
                with error:
                    if not left or error.code not in PASSING:
                        self._refuse(_told(error), key)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._refuse(str(getattr(error, "reason", error)) or type(error).__name__, key)
            time.sleep(TRIES - left)
        raise AssertionError("The last try has ended.")

    def _refuse(self, reason: str, key: str) -> NoReturn:
        """Raise JudgeError with a reason that may be anything but does not show the key."""
        reason = " ".join(reason.split())[:300]
        reason = reason.replace(key, HIDDEN) if key else reason
        raise JudgeError(f"{self.url} cannot be asked: {scrub(reason, environment=os.environ)}") from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirection, which could take the key to another server."""

    def redirect_request(self, *_: Any) -> None:
        """Let the status be an error."""
        return


OPENER = urllib.request.build_opener(_NoRedirect)


def make_judge(config: EvalConfig) -> Judge | None:
    """The judge of eval.judge_url; None without one.

    Raises:
        UsageError, DataError: if the file of eval.judge_prompt cannot be read or does not name the answer.
    """
    if config.judge_url is None:
        return None
    template = TEMPLATE
    if config.judge_prompt:
        try:
            template = read_text(config.judge_prompt, DataError)
        except OSError as error:
            raise DataError(f"eval.judge_prompt {config.judge_prompt} cannot be read: {error.strerror}.") from None
        check(
            "{answer}" in template,
            f"eval.judge_prompt {config.judge_prompt} does not hold {{answer}}, the place of the answer to judge.\n"
            "It may hold {prompt} and {wanted} too.",
        )
    assert config.judge_model is not None
    return Judge(config.judge_url, config.judge_model, template, config.judge_key_variable, dict(config.judge_options))


def fill(template: str, one: Judged) -> str:
    """The template with the texts at their places; braces in the texts mean nothing."""
    return re.sub(r"\{(prompt|answer|wanted)\}", lambda place: str(getattr(one, place[1])), template)


def content_of(reply: bytes) -> str:
    """The text of the first choice of a reply.

    Raises:
        ValueError: if the reply is of another form.
    """
    if len(reply) > MOST_BYTES:
        raise ValueError(f"the reply has more than {MOST_BYTES:,} bytes")
    try:
        content = parse_json(reply, "the reply", UsageError)["choices"][0]["message"]["content"]
    except (UsageError, KeyError, IndexError, TypeError) as error:
        raise ValueError("the reply is not of the form of OpenAI's chat completions") from error
    return content if isinstance(content, str) else ""


def _told(error: urllib.error.HTTPError) -> str:
    """The status, and what the server says about it."""
    hint = " Does eval.judge_url end as the server's API does, often in /v1?" if error.code == 404 else ""
    try:
        message = parse_json(error.read(MOST_BYTES), "the reply", UsageError)["error"]["message"]
    except (OSError, http.client.HTTPException, UsageError, KeyError, TypeError):
        message = error.reason
    return f"status {error.code}, {message}.{hint}"
