"""Draws pictures through the page of `sdjax app`, as a browser asks for them, and shows the memory of its process.

    python tests/benchmarks/app_memory.py [--count 200] [--visitors 200] [--steps 4]

The pictures are asked for by so many visitors in turn, who never say that they leave. Prints, after every ten
pictures, the resident memory of the process and the files that it keeps for browsers. 200 pictures take about two
minutes on two cores.
"""

import argparse
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--visitors", type=int, default=200)
    args = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-m", "sdjax", "app", "--port", str(port)]
        (Path(home) / "tmp").mkdir()
        server = subprocess.Popen(command, cwd=home, env=os.environ | {"TMPDIR": f"{home}/tmp"})
        try:
            measured = measure(address, server, Path(home), args)
        finally:
            server.terminate()
            server.wait()
    slope, _ = statistics.linear_regression(*zip(*measured[len(measured) // 2 :], strict=True))
    print(f"in the second half: {1000 * slope:+.1f} kB a picture")


def measure(address: str, server: subprocess.Popen, home: Path, args: argparse.Namespace) -> list[tuple[int, float]]:
    """Returns (pictures so far, resident MB), after every picture."""
    config = json.load(asked(f"{address}/config"))
    (draw,) = (each for each in config["dependencies"] if each["api_name"] == "draw")
    fields = {each["id"]: each["props"] for each in config["components"]}
    labels = [fields[number].get("label") for number in draw["inputs"]]
    values = [fields[number].get("value") for number in draw["inputs"]]
    values[labels.index("Steps")] = args.steps
    visitors = [secrets.token_hex(6) for _ in range(args.visitors)]
    measured = []
    for i in range(args.count):
        values[labels.index("Prompt")] = ("red heart", "a yellow cat", "green apple, blue plate")[i % 3]
        values[labels.index("Seed")] = i
        visitor = visitors[i % len(visitors)]
        body = {"data": values, "fn_index": draw["id"], "session_hash": visitor, "trigger_id": None, "event_data": None}
        asked(f"{address}/gradio_api/queue/join", json.dumps(body).encode()).close()
        with asked(f"{address}/gradio_api/queue/data?session_hash={visitor}") as events:
            last = [line for line in events if b"process_completed" in line][-1]
        assert b"done in" in last, last
        measured.append((i + 1, resident(server.pid)))
        if i % 10 == 9:
            kept = [path for path in (home / "tmp").rglob("*") if path.is_file()]
            size = sum(path.stat().st_size for path in kept) / 1e6
            print(f"{i + 1:4} pictures: {measured[-1][1]:.1f} MB, {len(kept)} files ({size:.1f} MB)", flush=True)
    assert len(list((home / "outputs").glob("*.png"))) == args.count
    return measured


def asked(address: str, body: bytes | None = None):
    """The answer of the server, which may still be starting."""
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    for _ in range(200):
        try:
            return urllib.request.urlopen(request, timeout=600)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{address}: {error.read().decode()}") from None
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"{address} does not answer")


def resident(process: int) -> float:
    """The memory of a process in MB."""
    text = Path(f"/proc/{process}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) / 1000


if __name__ == "__main__":
    main()
