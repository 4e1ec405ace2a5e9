"""Opens a page to draw and train on: `sdjax app`, then http://127.0.0.1:7860 in a browser.

The page is for this machine alone. With --host others may come, if they have the token. It reads and writes the folders
named here and nothing else. Runs go on when the page is closed.
"""

import argparse
import gc
import importlib.util
import os
import re
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

from sdjax.errors import ConfigError
from sdjax.runtime import command
from sdjax.settings import Dtype, Range, read_value


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; see `command.run`."""
    return command.run(_run, argv, (signal.SIGINT, signal.SIGTERM))


def _run(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    read_value(Dtype, args.dtype, "--dtype")
    read_value(Annotated[int, Range(1, 65535)], args.port, "--port")
    read_value(Annotated[int, Range(1)], args.batch_size, "--batch-size")
    if args.token is not None and not re.fullmatch(r"[\w-]{16,}", args.token, re.ASCII):
        raise ConfigError("--token: expected at least 16 letters, digits, '_' and '-', so that it cannot be guessed")
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError('the page needs Gradio: pip install "sdjax[app]"')
    from sdjax.draw.numbered import writable_folder

    named = ("out", "loras", "words", "data", "runs")
    folders = {name: writable_folder(getattr(args, name).resolve(), f"--{name}") for name in named}
    token = args.token or ("" if args.host in ("127.0.0.1", "localhost", "::1") else secrets.token_urlsafe(24))
    with tempfile.TemporaryDirectory(prefix="sdjax-app-") as temporary:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": temporary}
        _serve(args, folders, token, Path(temporary))


def _serve(args: argparse.Namespace, named: dict[str, Path], token: str, temporary: Path) -> None:
    """Serves the page until Ctrl-C. Gradio's settings are in the environment."""
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:
        listening = socket.create_server((args.host, args.port), family=family, backlog=128)
    except OSError as error:
        raise ConfigError(f"--host {args.host} --port {args.port}: {error.strerror or error}") from None
    gc.disable()  # Gradio's modules make objects that stay: looking through them takes half a second
    from sdjax.app import gradio_import

    gradio_import.quickly()
    import uvicorn

    from sdjax.app.drawing import Painter
    from sdjax.app.folders import Folders
    from sdjax.app.queue import Queue, Task
    from sdjax.app.server import application
    from sdjax.app.shared import Shared
    from sdjax.runtime import compilation_cache

    folders = Folders(named["out"], named["loras"], named["words"], named["data"], named["runs"])
    painter = Painter(folders, args.dtype, args.batch_size)
    shared = Shared(folders, tuple(args.model), args.dtype, Queue(), painter, temporary)
    app = application(shared, args.host, token)
    shown = f"[{args.host}]" if ":" in args.host else args.host
    print(f"http://{shown}:{args.port}/{f'?token={token}' if token else ''}", flush=True)
    quiet = {"log_level": "warning", "access_log": False, "ws": "none", "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(uvicorn.Config(app, **quiet))

    def prepare(task: Task) -> None:
        while not server.started:
            task.wait(0.05)
        task.wait(1)  # the first page goes out before JAX is imported
        gc.enable()
        compilation_cache.enable()

    shared.queue.put(prepare)
    server.run([listening])


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(
        prog="sdjax app",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", nargs="+", default=["tiny"], metavar="MODEL", help="models to choose from (default: tiny, embedded)")
    add(
        "--dtype",
        default="float32",
        metavar="TYPE",
        help=f"number type: {', '.join(get_args(Dtype))} (default: float32)",
    )
    add("--batch-size", type=int, default=1, metavar="N", help="pictures to draw at once (default: 1)")
    for flag, default, what in (
        ("--out", "outputs", "pictures that are drawn"),
        ("--loras", "loras", "LoRAs to choose from"),
        ("--words", "words", "embedding files to choose from"),
        ("--data", "data", "training pictures, one folder for each set"),
        ("--runs", "runs", "runs, one folder for each"),
    ):
        add(flag, type=Path, default=Path(default), metavar="DIR", help=f"folder of {what} (default: {default})")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen at (default: 127.0.0.1)")
    add("--port", type=int, default=7860, metavar="N", help="port (default: 7860)")
    add("--token", metavar="TEXT", help="token that visitors must show (default: none on this machine, else made up)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":
    sys.exit(main())
