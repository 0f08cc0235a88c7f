"""Serve a model and its adapters to clients of the OpenAI API, with a page for chats at /.

python scripts/serve.py --lora_path out/lora/tiny-world
"""

import socket
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import TYPE_CHECKING

from jsonargparse.typing import SecretStr

from lit_qlora import cli
from lit_qlora.errors import ResourceError, UsageError
from lit_qlora.files.reading import read_text
from lit_qlora.inference import RosterConfig, TemplateConfig, check_style, load_roster, peak_memory
from lit_qlora.serve.limits import LOOPBACK, Limits
from lit_qlora.settings import check
from lit_qlora.signals import left_to

if TYPE_CHECKING:
    from fastapi import FastAPI

UNSENDABLE_KEY = "The API key holds a control character or begins or ends with a space, which no client can send."


@dataclass(frozen=True, kw_only=True)
class Config(Limits, TemplateConfig, RosterConfig):
    """Serve a model and its adapters: /v1/chat/completions, /v1/completions, /v1/models, and a page at /.

    The base has the name of its directory, each adapter its own. All share the weights of the base.
    """

    host: str = "127.0.0.1"
    """Address to listen at. An address other than the loopback lets other machines in, so it needs an api_key."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    api_key: SecretStr | None = None
    """Key that clients must send as 'Authorization: Bearer KEY'."""
    api_key_file: Path | None = None
    """File that holds the api_key, so that no list of processes shows it."""
    metrics: bool = False
    """Serve /metrics too, in Prometheus' format. If there is an api_key, /metrics needs it."""
    style: str = "auto"
    """Prompt style of chats, such as alpaca or chatml; 'template' is the checkpoint's own chat template. 'auto' is the
    recorded style of adapter or checkpoint, else the chat template, else none."""

    def __post_init__(self) -> None:
        """Check the settings before the model is loaded."""
        check_style(self.style)
        super().__post_init__()
        check(0 <= self.port < 2**16, f"port must be in [0, 65535], got {self.port}.")
        check(self.api_key is None or self.api_key_file is None, "Give api_key or api_key_file, not both.")
        check(
            self.host in LOOPBACK or bool(self.api_key or self.api_key_file),
            f"host {self.host} lets other machines in. Give --api_key_file a file with a key that they must send.",
        )

    def key(self) -> str | None:
        """Return the key that clients must send, if there is one.

        Raises:
            UsageError: if the file cannot be read, or the key is one that can be guessed.
        """
        key = self.api_key.get_secret_value() if self.api_key else None
        if self.api_key_file:
            try:
                key = read_text(self.api_key_file, UsageError, most=2**16).strip()
            except OSError as error:
                raise UsageError(f"api_key_file {self.api_key_file} cannot be read: {error}.") from None
        check(key is None or len(key) >= 8, "The API key must have at least 8 characters.")
        check(key is None or (key.isprintable() and key == key.strip()), UNSENDABLE_KEY)
        return key


def main(config: Config) -> None:
    """Load everything, then serve until Ctrl-C."""
    key = config.key()
    try:
        from lit_qlora.serve.app import make_app
        from lit_qlora.serve.listen import open_socket
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed. pip install 'lit_qlora[serve]' installs it.") from None

    with closing(open_socket(config.host, config.port)) as listener:  # before the weights are loaded
        roster = load_roster(config, config.adapters, config.style, config.template_variables)
        if len(roster.names) > 1 and not roster.switch.by_row:
            raise UsageError(
                "An adapter of a mixture of experts cannot share a batch. Merge it, and serve the merged model."
            )
        hosts = LOOPBACK if config.host in LOOPBACK else ()
        answer(make_app(roster, config, key, hosts, metrics=config.metrics), config, listener, roster.names)


def answer(app: "FastAPI", config: Config, listener: socket.socket, names: list[str]) -> None:
    """Run the application on the socket until a signal comes."""
    from lit_qlora.serve.listen import make_server

    server = make_server(app, config.read_seconds, config.drain_seconds)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(
        f"Serving {', '.join(names)} at http://{shown}:{port}   {peak_memory()}   Ctrl-C ends it.",
        file=sys.stderr,
    )
    with left_to(lambda *_: None, SIGINT, SIGTERM):  # uvicorn ends by them, and then raises them again
        server.run([listener])
    if not server.started:
        raise ResourceError(f"The server could not start at {shown}:{port}.")


if __name__ == "__main__":
    cli.run(main, Config)
