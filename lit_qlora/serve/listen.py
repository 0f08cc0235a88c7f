"""Running the application on a socket."""

import asyncio
import socket
from math import ceil
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lit_qlora.errors import ResourceError

MOST_CONNECTIONS = 256


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ResourceError: if the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(MOST_CONNECTIONS)
    except (socket.gaierror, UnicodeError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or "not a name"
        raise ResourceError(f"Cannot listen at {host}: {reason}. Give another --host.") from None
    except OSError as error:
        listener.close()
        raise ResourceError(f"Cannot listen at {host}, port {port}: {error.strerror}. Give another --port.") from None
    return listener


def make_server(app: Any, read_seconds: float, drain_seconds: float) -> uvicorn.Server:
    """A server that is ready to run on sockets.

    Args:
        read_seconds: how long a client may take to send the head of a request, or to take what waits for it; uvicorn
            itself would wait for ever.
        drain_seconds: how long running requests may go on after a signal, while no new connection is accepted.
    """

    class Protocol(_ImpatientProtocol):
        seconds = read_seconds

    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            log_level="warning",
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=ceil(drain_seconds),
            limit_concurrency=MOST_CONNECTIONS,
        )
    )


class _ImpatientProtocol(H11Protocol):
    """Closes a connection on which no whole request head comes in time, or whose client does not read."""

    seconds: float
    _clock: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that pause_writing tells of anything that waits
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_waiting()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        self._stop_waiting()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self._in_request():
            self._stop_clock()
        elif self._clock is None:
            self._clock = self.loop.call_later(self.seconds, self._too_late)

    def _too_late(self) -> None:
        self._clock = None
        if not self._in_request() and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            self.transport.close()

    def _in_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _stop_waiting(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
