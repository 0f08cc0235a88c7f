"""The routes of the server, and what guards them: sizes, times, keys, and who may ask from where."""

import asyncio
import hashlib
import hmac
import re
import time
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect

from lit_qlora.errors import UserError
from lit_qlora.generation.batching import Request as Question
from lit_qlora.inference import Roster, encode_prompt, stop_ids
from lit_qlora.serve import protocol
from lit_qlora.serve.answers import Answers
from lit_qlora.serve.engine import Engine, QueueFullError
from lit_qlora.serve.limits import LOOPBACK, Limits
from lit_qlora.serve.protocol import ApiError, Order

PAGE = Path(__file__).with_name("page.html")


def make_app(roster: Roster, limits: Limits, api_key: str | None = None, hosts: tuple[str, ...] = LOOPBACK) -> FastAPI:
    """The server's application.

    Args:
        api_key: what clients must send, if anything.
        hosts: names by which it may be called, so that a web page elsewhere cannot have its own name point here; empty
            for any.
    """
    server = _Server(roster, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.engine.start()
        yield
        await asyncio.to_thread(server.engine.stop)

    async def guard(request: Request) -> None:
        if hosts and _host(request) not in hosts:
            raise ApiError(421, f"This server is not called {_host(request)!r}.")
        if api_key is not None and request.url.path.startswith("/v1/"):
            _check_key(request, api_key)

    # Its pages of documentation would load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, dependencies=[Depends(guard)], openapi_url=None, docs_url=None, redoc_url=None)
    app.state.engine = server.engine

    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> Response:
        return _refusal(error)

    @app.exception_handler(404)
    async def unknown(request: Request, error: Exception) -> Response:
        return _refusal(ApiError(404, f"There is nothing at {request.url.path}."))

    @app.exception_handler(405)
    async def wrong_method(request: Request, error: Exception) -> Response:
        return _refusal(ApiError(405, f"{request.method} is not what {request.url.path} is for."))

    @app.get("/")
    async def page() -> Response:
        html, policy = _page()
        return HTMLResponse(html, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})

    @app.get("/health")
    async def health() -> Any:
        running, waiting = server.engine.load
        return {"status": "ok", "running": running, "waiting": waiting}

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

    return app


class _Server:
    def __init__(self, roster: Roster, limits: Limits) -> None:
        self.roster, self.limits = roster, limits
        self.context = min(limits.context or roster.model.config.block_size, roster.model.config.block_size)
        self.engine = Engine(roster, limits.slots, limits.queue, self.context)
        self.started = int(time.time())

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

    async def respond(self, request: Request, *, chat: bool) -> Response:
        """Read a request, have it answered, and give up what nobody waits for any longer."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # A web page elsewhere can send other types without asking first.
            raise ApiError(415, "Content-Type must be application/json.")
        order = protocol.read_order(protocol.parse_json(await self._body(request)), chat=chat)
        self.check_model(order.model)
        questions, most = self._questions(order), self.limits.slots + self.limits.queue
        if len(questions) > most:
            raise ApiError(
                400, f"{len(questions)} answers are asked for; this server makes at most {most} at once.", "n"
            )
        answers = Answers(questions, order, self.roster, self.limits.answer_seconds)
        try:
            self.engine.submit(answers.jobs)
        except QueueFullError:
            raise ApiError(429, "The queue is full. Try again soon.", code="queue_full", Retry_After="2") from None
        if order.stream:
            return _Stream(answers, chat=chat)
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
        if order.texts:
            prompts = [tokenizer.encode(text) for text in order.texts]
            stops = tokenizer.stop_ids
        else:
            try:
                prompts = [encode_prompt(tokenizer, style, order.question, system=order.system, history=order.history)]
            except UserError as error:
                raise ApiError(400, str(error), "messages") from None
            stops = stop_ids(tokenizer, style)
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

    def __init__(self, answers: Answers, *, chat: bool) -> None:
        events, headers = answers.events(chat=chat), {"Cache-Control": "no-store"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.answers = answers

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            self.answers.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refusal(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


def _host(request: Request) -> str:
    host = request.headers.get("host", "")
    return host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]


def _check_key(request: Request, api_key: str) -> None:
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    # Compared in the same time wherever they differ; their hashes, so that not even the length can be told.
    same = hmac.compare_digest(*(hashlib.sha256(key.encode()).digest() for key in (given.strip(), api_key)))
    if kind.lower() != "bearer" or not same:
        raise ApiError(401, "The API key is missing or wrong.", code="invalid_api_key", WWW_Authenticate="Bearer")


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
