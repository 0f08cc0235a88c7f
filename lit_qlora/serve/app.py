"""The routes of the server, and what bounds them: sizes and times; serve/guard.py stands before them."""

import asyncio
import hashlib
import re
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect

from lit_qlora.errors import NumericalError, UserError
from lit_qlora.generation.batching import Request as Question
from lit_qlora.inference import Roster, encode_prompt, stop_ids
from lit_qlora.serve import protocol
from lit_qlora.serve.answers import Answers
from lit_qlora.serve.compare import answer_ids, divergences, pieces
from lit_qlora.serve.engine import Engine, QueueFullError
from lit_qlora.serve.guard import Guard
from lit_qlora.serve.limits import LOOPBACK, Limits
from lit_qlora.serve.metrics import CONTENT_TYPE, Metrics
from lit_qlora.serve.protocol import ApiError, Comparison, Order

T = TypeVar("T")
PAGE = Path(__file__).with_name("page.html")
WRITERS = 4
"""Prompts that are written at a time; further ones wait, and that counts as their prompt_seconds."""


def make_app(
    roster: Roster,
    limits: Limits,
    api_key: str | None = None,
    hosts: tuple[str, ...] = LOOPBACK,
    *,
    metrics: bool = False,
) -> FastAPI:
    """The server's application.

    Args:
        api_key: what clients must send, if anything.
        hosts: names by which it may be called, so that a web page elsewhere cannot have its own name point here; empty
            for any.
        metrics: whether /metrics is answered.
    """
    server = _Server(roster, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.engine.start()
        yield
        await asyncio.to_thread(server.engine.stop)
        server.writers.shutdown(wait=False, cancel_futures=True)

    # Its pages of documentation would load scripts from elsewhere. A redirect would be made from the Host header.
    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Guard, api_key=api_key, hosts=hosts)
    app.state.engine = server.engine

    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(404)
    async def unknown(request: Request, error: Exception) -> Response:
        return await refuse(request, ApiError(404, f"There is nothing at {_path(request)}."))

    @app.exception_handler(405)
    async def wrong_method(request: Request, error: Exception) -> Response:
        return await refuse(request, ApiError(405, f"{request.method} is not what {_path(request)} is for."))

    @app.get("/")
    async def page() -> Response:
        html, policy = _page()
        return HTMLResponse(html, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})

    @app.get("/health")
    async def health() -> Response:
        return server.state("ok" if server.engine.alive else "dead")

    @app.get("/ready")
    async def ready() -> Response:
        return server.state("dead" if not server.engine.alive else "ok" if server.engine.has_room else "full")

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [server.describe(name) for name in roster.names]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Any:
        server.check_model(name)
        return server.describe(name)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await server.respond(request, chat=True)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await server.respond(request, chat=False)

    @app.post("/compare")
    async def compare(request: Request) -> Response:
        return await server.compare(request)

    if metrics:

        @app.get("/metrics")
        async def exposition() -> Response:
            return Response(server.metrics.text(*server.engine.load), media_type=CONTENT_TYPE)

    return app


class _Server:
    def __init__(self, roster: Roster, limits: Limits) -> None:
        self.roster, self.limits = roster, limits
        self.context = min(limits.context or roster.model.config.block_size, roster.model.config.block_size)
        self.engine = Engine(roster, limits.slots, limits.queue, self.context)
        self.started = int(time.time())
        self.metrics = Metrics()
        self.writers = ThreadPoolExecutor(WRITERS, "writer")

    def describe(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "lit_qlora",
            "parent": None if name == self.roster.base else self.roster.base,
            "max_model_len": self.context,
        }

    def check_model(self, name: str) -> None:
        if name not in self.roster.names:
            known = ", ".join(self.roster.names)
            raise ApiError(404, f"There is no model {name[:80]!r}. There are: {known}.", "model", "model_not_found")

    def state(self, status: str) -> Response:
        """Answer /health and /ready: 200 if all is well, else 503."""
        running, waiting = self.engine.load
        body = {"status": status, "running": running, "waiting": waiting}
        return JSONResponse(body, 200 if status == "ok" else 503)

    async def respond(self, request: Request, *, chat: bool) -> Response:
        """Read a request, have it answered, and count it."""
        start = time.monotonic()

        def count(status: int, answers: Answers | None = None) -> None:
            self.metrics.count(status, time.monotonic() - start, answers.usage() if answers else {})

        try:
            answers = await self._answers(request, chat=chat)
            if answers.order.stream:
                return _Stream(answers, count, chat=chat)
            response = await self._whole(request, answers, chat=chat)
        except ApiError as error:
            count(error.status)
            raise
        count(200, answers)
        return response

    async def _answers(self, request: Request, *, chat: bool) -> Answers:
        """The answers to a request, which the engine has begun to make."""
        order, questions = await self._understood(request, partial(self._read, chat=chat))
        answers = Answers(questions, order, self.roster, self.limits.answer_seconds)
        try:
            self.engine.submit(answers.jobs)
        except QueueFullError:
            raise ApiError(429, "The queue is full. Try again soon.", code="queue_full", Retry_After="2") from None
        return answers

    async def _understood(self, request: Request, read: Callable[[bytes], T]) -> T:
        """Read the body of a request, in another thread."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # A web page elsewhere can send other types without asking first.
            raise ApiError(415, "Content-Type must be application/json.")
        body = await self._body(request)
        # In another thread: a chat template is a program, and a long text takes a while; /health does not wait.
        reading = asyncio.get_running_loop().run_in_executor(self.writers, read, body)
        try:
            return await asyncio.wait_for(reading, self.limits.prompt_seconds)
        except TimeoutError:
            seconds = self.limits.prompt_seconds
            raise ApiError(504, f"The prompt was not written within {seconds:g} seconds.", code="timeout") from None

    async def compare(self, request: Request) -> Response:
        """Answer /compare: the answer in pieces, and how far the two models are apart at each."""
        comparison, prompts, answer = await self._understood(request, self._read_comparison)
        try:
            task = self.engine.run(partial(divergences, self.roster, prompts, answer))
            values = await asyncio.wait_for(asyncio.wrap_future(task), self.limits.answer_seconds)
        except QueueFullError:
            raise ApiError(429, "The queue is full. Try again soon.", code="queue_full", Retry_After="2") from None
        except TimeoutError:
            raise ApiError(504, "The comparison took too long.", code="timeout") from None
        except (NumericalError, RuntimeError):
            raise ApiError(500, "The models could not be compared on this.", code="model_error") from None
        parts = pieces(self.roster.tokenizer, self.roster.styles[comparison.model], answer, values)
        return JSONResponse({"object": "comparison", "tokens": [{"text": text, "kl": value} for text, value in parts]})

    def _read_comparison(self, body: bytes) -> tuple[Comparison, dict[str, list[int]], list[int]]:
        """Read what is to be compared, the prompts of both models, and the ids of the answer."""
        comparison = protocol.read_comparison(protocol.parse_json(body))
        names = (comparison.model, comparison.other)
        for name in names:
            self.check_model(name)
        if comparison.model == comparison.other:
            raise ApiError(400, f"{comparison.other} is compared with itself.", "with")
        tokenizer, styles = self.roster.tokenizer, self.roster.styles
        try:
            prompts = {name: encode_prompt(tokenizer, styles[name], comparison.conversation) for name in names}
            answer = answer_ids(tokenizer, styles[comparison.model], comparison.answer)
        except UserError as error:
            raise ApiError(400, str(error), "messages") from None
        longest = max(map(len, prompts.values())) + len(answer)
        if not all(prompts.values()) or longest > self.context:
            raise ApiError(
                400, f"Prompt and answer have {longest} tokens; the model's context holds {self.context}.", "answer"
            )
        return comparison, prompts, answer

    def _read(self, body: bytes, *, chat: bool) -> tuple[Order, list[Question]]:
        """Read the order in the body, and make a question for each answer to it."""
        order = protocol.read_order(protocol.parse_json(body), chat=chat)
        self.check_model(order.model)
        questions, most = self._questions(order), self.limits.slots + self.limits.queue
        if len(questions) > most:
            raise ApiError(
                400, f"{len(questions)} answers are asked for; this server makes at most {most} at once.", "n"
            )
        return order, questions

    async def _whole(self, request: Request, answers: Answers, *, chat: bool) -> Response:
        """The answers when all are there, or none once the client has gone."""
        gone = asyncio.create_task(_disconnected(request))
        whole = asyncio.create_task(answers.whole(chat=chat))
        try:
            await asyncio.wait([gone, whole], return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                raise ApiError(499, "The client has gone.")
            return JSONResponse(whole.result())
        finally:
            answers.cancel()
            gone.cancel()
            whole.cancel()

    async def _body(self, request: Request) -> bytes:
        most = self.limits.body_bytes
        length = request.headers.get("content-length", "0")
        read, body = 0, bytearray()
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                async for part in request.stream():
                    read += len(part)
                    if read <= most:
                        body += part
                    # A client reads the answer when it has sent all, so a little more is read, and thrown away.
                    elif read > 8 * most or not length.isdigit() or int(length) > 8 * most:
                        break
        except TimeoutError:
            seconds = self.limits.read_seconds
            raise ApiError(408, f"The body did not come within {seconds:g} seconds.", connection="close") from None
        except ClientDisconnect:
            raise ApiError(499, "The client has gone.") from None
        if read > most:
            raise ApiError(413, f"The body is larger than {most} bytes.", connection="close")
        return bytes(body)

    def _questions(self, order: Order) -> list[Question]:
        """A question for each choice of each prompt.

        Raises:
            ApiError: if the answer does not fit behind a prompt.
        """
        tokenizer, style = self.roster.tokenizer, self.roster.styles[order.model]
        try:
            if order.texts:
                prompts = [tokenizer.encode(text) for text in order.texts]
                stops = tokenizer.stop_ids
            else:
                for name, value in order.conversation.variables.items():
                    if style is None or not style.reads(name, False, value):
                        raise ApiError(400, f"The prompt style of {order.model} does not write {name}.", name)
                prompts = [encode_prompt(tokenizer, style, order.conversation)]
                stops = stop_ids(tokenizer, style)
        except UserError as error:
            raise ApiError(400, str(error), "prompt" if order.texts else "messages") from None
        questions = []
        for prompt in prompts:
            room = self._room(len(prompt), order)
            questions += [
                Question(prompt, order.config(room, choice), stops, room, self.roster.adapter(order.model))
                for choice in range(order.choices)
            ]
        return questions

    def _room(self, length: int, order: Order) -> int:
        wanted = order.max_tokens or 1
        if length < 1:
            raise ApiError(400, "The prompt is empty, so there is nothing to continue.", "prompt")
        if length + wanted > self.context:
            raise ApiError(
                400,
                f"The prompt has {length} tokens and the answer may have {wanted}, but the model's context holds "
                f"{self.context}, so there is room for {max(self.context - length, 0)}.",
                "max_tokens" if order.max_tokens else "messages",
                "context_length_exceeded",
            )
        return order.max_tokens or self.context - length


class _Stream(StreamingResponse):
    """The events of answers, which are given up when the client goes, even if it does before the first event."""

    def __init__(self, answers: Answers, count: Callable[[int, Answers], None], *, chat: bool) -> None:
        events, headers = answers.events(chat=chat), {"Cache-Control": "no-store"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.answers, self.count = answers, count

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            self.answers.cancel()
            self.count(200, self.answers)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _path(request: Request) -> str:
    """The path that was asked for, as far as it is worth repeating."""
    return repr(str(request.scope["path"])[:80])


def _page() -> tuple[str, str]:
    """The web page, and a policy by which a browser runs nothing but the page's own script."""
    html = PAGE.read_text(encoding="utf-8")
    allowed = []
    for directive, tag in (("script-src", "script"), ("style-src", "style")):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = hashlib.sha256(content.encode()).digest()
        allowed.append(f"{directive} 'sha256-{b64encode(digest).decode()}'")
    policy = f"default-src 'none'; connect-src 'self'; img-src data:; {'; '.join(allowed)}; frame-ancestors 'none'"
    return html, policy
