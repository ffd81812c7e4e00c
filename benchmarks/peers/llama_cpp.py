"""llama.cpp's server with one slot a request in flight, asked over HTTP by as many threads."""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import Done, Row, run


def load(args: argparse.Namespace, rows: list[Row]) -> tuple[subprocess.Popen[bytes], str]:
    """Start the server; return its process and address once it says that it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    longest = max(len(row["prompt_token_ids"]) + row["max_new_tokens"] for row in rows) + 8
    binaries = Path(sys.prefix, "bin", "avx2" if args.avx2 else "")
    server = subprocess.Popen([
        str(binaries / "llama-server"), "--model", str(args.converted), "--port", str(port), "--no-webui",
        "--parallel", str(args.batch_size), "--ctx-size", str(args.batch_size * longest),
        "--threads", os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
    ], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    while True:
        if server.poll() is not None:
            raise RuntimeError(f"llama-server ended with status {server.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return server, url
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.05)


def generate(
    args: argparse.Namespace, both: tuple[subprocess.Popen[bytes], str], rows: list[Row]
) -> Iterator[Done]:
    server, url = both
    try:
        with ThreadPoolExecutor(args.batch_size) as threads:
            yield from threads.map(lambda row: complete(url, row), rows)
    finally:
        server.terminate()
        server.wait()  # its memory is counted with this process's children


def complete(url: str, row: Row) -> Done:
    body: dict[str, Any] = {
        "prompt": row["prompt_token_ids"], "n_predict": row["max_new_tokens"], "temperature": 0,
        "ignore_eos": row["ignore_eos"], "cache_prompt": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=3600) as reply:
        answer = json.load(reply)
    return row, answer["content"], answer["tokens_predicted"] - (answer["stop_type"] == "eos")


if __name__ == "__main__":
    run("llama.cpp 11434", load, generate)
