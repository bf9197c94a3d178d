"""The server: `lossary serve`."""

import ipaddress
import secrets
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from lossary.errors import BadInput
from lossary.site.app import create_app
from lossary.site.runs import Limits, Runs

GRACE = 3  # seconds for answers that are under way when the server is told to stop


class Server(uvicorn.Server):
    """Ends streams of events as soon as it is told to stop, which otherwise would keep it."""

    def __init__(self, config: uvicorn.Config, runs: Runs) -> None:
        super().__init__(config)
        self.runs = runs

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.runs.closing = True
        super().handle_exit(sig, frame)


def serve(
    folder: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    limits: Limits | None = None,
    protocol: Mapping[str, Any] | None = None,
) -> None:
    """Serves the site until it is interrupted.

    Args:
        folder: what the server writes: uploads and runs.
        host: the address to listen at; any but a loopback one is open to others, who must then show a token.
        port: 0 takes a free one.
        token: what visitors must show; None makes one up where one is needed.
        limits, protocol: of the runs, see `runs.Runs`.

    Raises:
        BadInput: the address cannot be used, or another server works in the folder.
    """
    if token is None and not _loopback(host):
        token = secrets.token_urlsafe(24)
    app = create_app(folder, token=token, limits=limits, protocol=protocol)
    app.state.runs.take()
    listening = _listen(host, port)
    name = f"[{host}]" if ":" in host else host
    asks = "" if token is None else f"?token={token}"
    print(f"Lossary is at http://{name}:{listening.getsockname()[1]}/{asks} (Ctrl-C stops it)", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE, server_header=False)
    with suppress(KeyboardInterrupt):  # raised anew once all has ended
        Server(config, app.state.runs).run(sockets=[listening])


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()  # who comes early waits
    except (OSError, OverflowError) as error:
        raise BadInput(f"--host {host} --port {port}: cannot listen there ({error}); choose another") from None
    return listening
