"""Serves the page: who may come in, and what may be asked for."""

import hmac
from html import escape
from typing import Any
from urllib.parse import parse_qs

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import FileResponse, HTMLResponse, Response

from sdjax.app.folders import chosen
from sdjax.app.page import CSS, SCRIPT, page, theme
from sdjax.app.shared import Shared
from sdjax.errors import SdjaxError

LOCAL = ("127.0.0.1", "localhost", "::1")
_COOKIE = "sdjax_token"
_API = ("queue/", "upload", "upload_progress", "heartbeat/", "cancel", "info", "startup-events", "app_id", "file=")
"""What the page uses of Gradio's server. The rest is closed: it fetches addresses, records calls or edits code."""
_HEADERS = {
    # The page can neither load from nor send to any other host, whatever Gradio's files ask for.
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_MOST_UPLOADED = "100mb"


def application(shared: Shared, host: str, token: str) -> FastAPI:
    """Returns the web application. token: what visitors must show; empty: the address must be of this machine."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.get("/report")
    def report(run: str) -> HTMLResponse:
        from sdjax.train.report import html

        try:
            text = html(chosen(shared.folders.runs_by_name(), run, "run"))
        except SdjaxError as error:
            return HTMLResponse(f"<p>{escape(str(error))}</p>", 404)
        return HTMLResponse(text)

    @app.get("/result")
    def result(name: str) -> Response:
        try:
            path = chosen(shared.folders.results_by_name(), name, "result")
        except SdjaxError as error:
            return HTMLResponse(f"<p>{escape(str(error))}</p>", 404)
        return FileResponse(path, filename=f"{'-'.join(name.split('/')[1:])}{path.suffix}")

    blocks = page(shared)
    app = gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        theme=theme(),
        css=CSS,
        js=SCRIPT,
        footer_links=[],
        run_history=False,
        show_error=True,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=_MOST_UPLOADED,
    )
    blocks.has_launched = True  # or else Gradio takes any path as that of an uploaded file
    app.add_middleware(Guard, host=host, token=token)
    return app


class Guard:
    """Lets requests pass that show the token, or come to this machine by its own name, and ask for what is open."""

    def __init__(self, app: Any, host: str, token: str) -> None:
        self._app, self._host, self._token = app, host, token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if refusal := self._refusal(scope["path"], headers, given):
            await HTMLResponse(f"<p>{refusal[1]}</p>", refusal[0])(scope, receive, send)
            return

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = dict(_HEADERS)
                if self._token and given:
                    more["Set-Cookie"] = f"{_COOKIE}={self._token}; HttpOnly; SameSite=Strict; Path=/"
                own = [(name.lower().encode(), value.encode()) for name, value in more.items()]
                kept = [(n, v) for n, v in message["headers"] if n.lower() != b"content-security-policy"]
                message = {**message, "headers": [*kept, *own]}
            await send(message)

        await self._app(scope, receive, answer)

    def _refusal(self, path: str, headers: dict[str, str], given: str) -> tuple[int, str] | None:
        """Returns the status and the words of a refusal, or None."""
        host = _name(headers.get("host", ""))
        if self._host in LOCAL and host not in LOCAL:  # another site that has its name point here
            return 403, "this page answers to 127.0.0.1 and localhost only"
        if (origin := headers.get("origin")) and _name(origin.partition("://")[2]) != host:
            return 403, "another site may not use this page"
        if self._token:
            pairs = (part.strip().partition("=") for part in headers.get("cookie", "").split(";"))
            shown = given or next((value for name, _, value in pairs if name == _COOKIE), "")
            if not hmac.compare_digest(shown.encode(), self._token.encode()):
                return 401, "open the address with its token, as sdjax app printed it: /?token=..."
        under = path.removeprefix("/gradio_api/")
        if under != path and (not under.startswith(_API) or under.startswith(("file=http", "file=//"))):
            return 404, "not part of this page"
        return None


def _name(host: str) -> str:
    """A host without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
