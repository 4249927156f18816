"""A server for looking at a built site on one's own machine. It listens on 127.0.0.1 only."""

from __future__ import annotations

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from taxonomy.site.output import MARKER, SiteError

POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'"
"""The pages need nothing else: no inline script or style, no other server."""


class _Handler(SimpleHTTPRequestHandler):
    """Files of one folder, as they are now (never from the browser's cache)."""

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: the terminal shows the address, not every request."""


def open_server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of the site in ``folder``; the caller runs and closes it.

    Raises:
        SiteError: there is no site in ``folder``, or the port is taken.
    """
    if not (folder / MARKER).is_file():
        raise SiteError(f"there is no site in {folder}; make it with: zoo site build")
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, directory=str(folder)))
    except OSError as error:
        raise SiteError(
            f"port {port} cannot be used ({error.strerror}); choose another one with --port"
        ) from None
