"""The choices of one request as they come from the engine: whole, or as server-sent events."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

from lit_qlora.generation.batching import Request as Question
from lit_qlora.generation.text import TextStream
from lit_qlora.inference import Roster, decoder_of, reader_of
from lit_qlora.prompts.answer_parts import Reader
from lit_qlora.serve import protocol
from lit_qlora.serve.engine import Job
from lit_qlora.serve.protocol import ApiError, Order


class Answers:
    """The choices of one request as they come.

    Args:
        questions: one a choice.
        seconds: how long they may take.

    Attributes:
        jobs: what the engine must do for them.
    """

    def __init__(self, questions: Sequence[Question], order: Order, roster: Roster, seconds: float) -> None:
        self.order, self.questions = order, questions
        style = None if order.texts else roster.styles[order.model]
        gap, tail = (style.gap, style.tail) if style else ("", "")
        tokenizer = roster.tokenizer
        decoder = decoder_of(tokenizer, style)
        self.readers: list[Reader] = [
            reader_of(tokenizer, style, question.prompt, order.tools) for question in questions
        ]
        loop = asyncio.get_running_loop()
        self.coming: asyncio.Queue[tuple[int, str, str | None]] = asyncio.Queue()
        deadline = time.monotonic() + seconds

        def teller(index: int) -> Callable[[str, str | None], None]:
            def tell(piece: str, reason: str | None) -> None:
                with suppress(RuntimeError):  # the loop may have been closed in the meantime
                    loop.call_soon_threadsafe(self.coming.put_nowait, (index, piece, reason))

            return tell

        self.jobs = [
            Job(question, TextStream(decoder, gap, tail, order.stop), teller(i), deadline)
            for i, question in enumerate(questions)
        ]

    def cancel(self) -> None:
        """Nobody waits for them any longer."""
        for job in self.jobs:
            job.cancelled.set()

    async def pieces(self) -> AsyncIterator[tuple[int, str, str | None]]:
        """Index of the choice, text, and the reason with its last piece.

        Raises:
            ApiError: if a choice was given up.
        """
        unfinished = len(self.jobs)
        while unfinished:
            index, piece, reason = await self.coming.get()
            if reason == "timeout":
                raise ApiError(504, "The answer took too long.", code="timeout")
            if reason == "error":
                raise ApiError(500, "The model could not answer this.", code="model_error")
            yield index, piece, reason
            unfinished -= reason is not None

    def usage(self) -> dict[str, int]:
        """Tokens that were read and written so far."""
        prompts = self.questions[:: self.order.choices]
        return protocol.usage(sum(len(q.prompt) for q in prompts), sum(len(q.answer) for q in self.questions))

    async def whole(self, *, chat: bool) -> Any:
        """The answer to the request.

        Raises:
            ApiError: if a choice was given up.
        """
        texts, reasons = [""] * len(self.jobs), [""] * len(self.jobs)
        async for index, piece, reason in self.pieces():
            texts[index] += piece
            reasons[index] = reason or ""
        answers = [reader.whole(text) for reader, text in zip(self.readers, texts, strict=True)]
        return protocol.completion(self.order, answers, reasons, self.usage(), chat=chat)

    async def events(self, *, chat: bool) -> AsyncIterator[str]:
        """Server-sent events; who ends early must see to cancel."""
        head = protocol.envelope(self.order, "chat.completion.chunk" if chat else "text_completion")
        if self.order.stream_usage:
            head["usage"] = None
        try:
            if chat:
                for index in range(len(self.jobs)):
                    yield _event(protocol.first_chunk(head, index))
            async for index, piece, reason in self.pieces():
                reader = self.readers[index]
                for kind, text in (*reader.push(piece), *(reader.end() if reason else ())):
                    key = "content" if kind == "content" else "reasoning_content"
                    yield _event(protocol.chunk(head, index, text, None, chat=chat, key=key))
                if reason and reader.calls:
                    yield _event(protocol.call_chunk(head, index, reader.calls))
                if reason:
                    ended = protocol.finish_reason(reader.calls, reason)
                    yield _event(protocol.chunk(head, index, "", ended, chat=chat))
            if self.order.stream_usage:
                yield _event(head | {"choices": [], "usage": self.usage()})
        except ApiError as error:
            yield _event(error.body)
        yield "data: [DONE]\n\n"


def _event(content: Any) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
