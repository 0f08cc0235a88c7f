"""Prompts that wait at the same time are read together, and none of them suffers from another."""

import queue
import threading
import time
from typing import Any

import pytest

from lit_qlora.errors import NumericalError
from lit_qlora.generation.batching import Request
from lit_qlora.generation.text import TextStream
from lit_qlora.inference import Roster
from lit_qlora.serve import engine as engines
from lit_qlora.serve.engine import Engine, Job
from lit_qlora.settings import GenerationConfig

PROMPTS = [[5, 9, 20], [7], [3, 1, 4, 1, 5], [8, 8]]


def answer(
    roster: Roster, monkeypatch: pytest.MonkeyPatch, bad: int | None = None, hopeless: int | None = None
) -> tuple[list[Any], list[int]]:
    """What each prompt was told last, with its text, and how many prompts were read at a time.

    Args:
        bad: the prompt that has no logits.
        hopeless: the prompt whose settings make the probabilities of all tokens overflow.
    """
    engine = Engine(roster, slots=4, queue=4, context=64)
    join, told, read = engine._batcher.join, [""] * len(PROMPTS), []
    reasons: list[str | None] = [None] * len(PROMPTS)
    done = threading.Semaphore(0)

    def watched(*requests: Request) -> None:
        read.append(len(requests))
        if bad is not None and any(request.prompt == PROMPTS[bad] for request in requests):
            raise NumericalError("no numbers")
        join(*requests)

    monkeypatch.setattr(engine._batcher, "join", watched)

    def job(i: int) -> Job:
        def tell(piece: str, reason: str | None) -> None:
            told[i] += piece
            if reason:
                reasons[i] = reason
                done.release()

        config = GenerationConfig(do_sample=True, repetition_penalty=1e-45) if i == hopeless else GenerationConfig()
        request = Request(PROMPTS[i], config, (), room=6)
        return Job(request, TextStream(roster.tokenizer), tell, time.monotonic() + 60)

    engine.submit([job(i) for i in range(len(PROMPTS))])
    engine.start()
    for _ in PROMPTS:
        assert done.acquire(timeout=30)
    engine.stop()
    return list(zip(reasons, told, strict=True)), read


def test_prompts_that_wait_are_read_at_once_up_to_a_number_of_tokens(
    roster: Roster, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, read = answer(roster, monkeypatch)
    assert read == [4]
    monkeypatch.setattr(engines, "READ_AT_ONCE", 7)  # 2 x 3 fit, 3 x 5 and 2 x 5 do not
    apart, read = answer(roster, monkeypatch)
    assert read == [2, 1, 1]
    assert together == apart
    assert {reason for reason, _ in together} == {"length"}


def test_a_prompt_that_cannot_be_read_ends_alone(roster: Roster, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy, _ = answer(roster, monkeypatch)
    told, read = answer(roster, monkeypatch, bad=1)
    assert read == [4, 1, 1, 1, 1]
    assert told[1] == ("error", "")
    assert [*told[:1], *told[2:]] == [*healthy[:1], *healthy[2:]]


def test_a_request_for_which_no_token_is_left_ends_alone(roster: Roster, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy, _ = answer(roster, monkeypatch)
    told, _ = answer(roster, monkeypatch, hopeless=2)
    assert told[2] == ("error", "")
    assert [*told[:2], told[3]] == [*healthy[:2], healthy[3]]


def test_an_error_of_ours_ends_the_answers_that_were_being_made_and_not_the_engine(
    roster: Roster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    push = TextStream.push
    monkeypatch.setattr(TextStream, "push", lambda stream, token: 1 / 0)
    engine = Engine(roster, slots=2, queue=4, context=64)
    engine.start()
    assert ask(engine, roster) == "error"
    assert engine.load == (0, 0)
    assert "ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.setattr(TextStream, "push", push)
    assert ask(engine, roster) == "length"
    engine.stop()


def ask(engine: Engine, roster: Roster) -> str | None:
    """Why the answer to a prompt ended."""
    ended: queue.Queue[str | None] = queue.Queue()
    request = Request(PROMPTS[0], GenerationConfig(), (), room=3)
    tell = lambda piece, reason: ended.put(reason) if reason else None  # noqa: E731
    engine.submit([Job(request, TextStream(roster.tokenizer), tell, time.monotonic() + 60)])
    return ended.get(timeout=30)
