"""The page of a folder of results, served on this machine alone and made anew as results land.

serve(Path("results"), port=8765)          # until it is interrupted

Starlette answers, on uvicorn: at the loopback address, and only requests that name it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llm_coreml.errors import ConfigError
from llm_coreml.eval.failed_cells import cell_files
from llm_coreml.eval.report.page import INSTALL, check_installed, render
from llm_coreml.eval.report.rows import Collected, collect
from llm_coreml.eval.result_places import result_files

if TYPE_CHECKING:  # an optional extra
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

HOST = "127.0.0.1"
# Seconds between two looks at the folder, and between two signs of life to a page.
_LOOK, _SIGN = 1.0, 15.0

Signature = tuple[tuple[str, int, int], ...]


class LivePage:
    """The page of a folder, made when it is asked for and the folder has changed.

    Args:
        place: The folder.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self._lock = asyncio.Lock()
        self._made: tuple[Signature, str] | None = None

    def signature(self) -> Signature:
        """Return what changes when a result lands; nothing of a folder that cannot be read."""
        found = []
        with contextlib.suppress(ConfigError):
            for path in (*result_files(self.place), *cell_files(self.place)):
                with contextlib.suppress(OSError):
                    status = path.stat()
                    found.append((str(path), status.st_size, status.st_mtime_ns))
        return tuple(found)

    async def html(self) -> str:
        """Return the page."""
        async with self._lock:
            now = self.signature()
            if self._made is None or self._made[0] != now:
                self._made = now, await asyncio.to_thread(self._render)
            return self._made[1]

    def _render(self) -> str:
        try:
            found = collect(self.place)
        except ConfigError as error:
            found = Collected((), (str(error),))
        return render(found, self.place.resolve().name, live=True)

    async def changes(self, shown: Signature) -> AsyncIterator[str]:
        """Yield server-sent events: one when the folder is not as `shown`, and signs of life."""
        waited = 0.0
        while True:
            if self.signature() != shown:
                yield "event: results\ndata: changed\n\n"
                return
            if waited % _SIGN == 0:
                yield ": still here\n\n"
            await asyncio.sleep(_LOOK)
            waited += _LOOK


def application(place: Path) -> Starlette:
    """Return the application that serves the page of `place`."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, StreamingResponse
    from starlette.routing import Route

    page = LivePage(place)

    async def show(_: Request) -> Response:
        return HTMLResponse(await page.html(), headers={"Cache-Control": "no-store"})

    async def events(_: Request) -> Response:
        return StreamingResponse(
            page.changes(page.signature()),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store"},
        )

    # A page of somebody else's may know the port, but not call itself by this name.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return Starlette(routes=[Route("/", show), Route("/events", events)], middleware=[hosts])


def serve(place: Path, port: int, on_start: Callable[[str], None] = lambda _: None) -> None:
    """Serve the page of `place` until the process is interrupted.

    Args:
        place: A folder of results, which may be empty yet.
        port: Where to listen; 0 takes a free one.
        on_start: Given the address, once it is listened at.

    Raises:
        ConfigError: no such folder, the port is taken, or the extra is not installed.
    """
    check_installed()
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ConfigError(
            f"What serves the dashboard is not installed ({error}); get it by {INSTALL}."
        ) from None
    if not place.is_dir():
        raise ConfigError(f"'{place}' is no folder; give the one that evaluations append to.")
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with contextlib.closing(listening):
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"Nobody can listen at port {port} of {HOST}: {error}. Give another --port."
            ) from None
        settings = uvicorn.Config(
            application(place), log_level="critical", lifespan="off", timeout_graceful_shutdown=1
        )
        on_start(f"http://{HOST}:{listening.getsockname()[1]}/")
        uvicorn.Server(settings).run(sockets=[listening])
