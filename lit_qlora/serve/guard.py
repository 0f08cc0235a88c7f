"""Refuse requests by the fields that the server routes by, before anything else reads them."""

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from fastapi.responses import JSONResponse

from lit_qlora.serve.protocol import ApiError

OPEN = frozenset({"/", "/health", "/ready"})
"""Paths that need no key: the page, which holds no secret, and the two that tell whether the server is well."""
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Guard:
    """Refuses requests by their host and key; wraps an ASGI application.

    It reads scope["path"], by which requests are routed. A framework's `request.url` is made from the Host header,
    which the client chooses (CVE-2026-48710).

    Args:
        api_key: what clients must send, if anything; for every path that is not in OPEN.
        hosts: names by which the server may be called; empty for any.
    """

    def __init__(self, app: Any, api_key: str | None, hosts: tuple[str, ...]) -> None:
        self.app, self.hosts = app, hosts
        self.keys = [] if api_key is None else [_digest(key) for key in encodings(api_key)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with the reason why not."""
        if scope["type"] == "http" and (refusal := self._refusal(scope)):
            await JSONResponse(refusal.body, refusal.status, refusal.headers)(scope, receive, send)
        elif scope["type"] in ("http", "lifespan"):
            await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])  # h11 refuses two Host headers
        host = _host(headers.get(b"host", b"").decode("latin-1"))
        if self.hosts and host not in self.hosts:
            return ApiError(421, f"This server is not called {host[:80]!r}.")
        if self.keys and scope["path"] not in OPEN and not self._knows(headers.get(b"authorization", b"")):
            return ApiError(401, "The API key is missing or wrong.", code="invalid_api_key", WWW_Authenticate="Bearer")
        return None

    def _knows(self, authorization: bytes) -> bool:
        kind, _, given = authorization.partition(b" ")
        # Digests, compared in constant time: neither the first wrong byte nor the length can be told from the time.
        same = [hmac.compare_digest(_digest(given.strip()), key) for key in self.keys]
        return kind.lower() == b"bearer" and any(same)


def encodings(api_key: str) -> Iterable[bytes]:
    """The bytes that clients send for a key: UTF-8 mostly, Latin-1 some (RFC 9110, section 5.5, allows both)."""
    return {api_key.encode(encoding) for encoding in ("utf-8", "latin-1") if _fits(api_key, encoding)}


def _fits(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _host(host: str) -> str:
    return host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
