"""Servers as processes of their own, and clients that keep them busy. Every server is ended by its process id."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdxl_lab.config import GenerationConfig

ROOT = Path(__file__).parent.parent
Body = Mapping[str, Any]


@contextmanager
def server(kind: str, config: GenerationConfig, **environment: str) -> Iterator[int]:
    """Start "service", "locked", "inline" or "litserve" with the configuration's model; yields its port when it has
    drawn a first picture."""
    port = free_port()
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "bench.baselines", kind, "--model", config.model.base, "--port", str(port)]
        settings = {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
        if kind == "service":
            command = [sys.executable, "-m", "service", "--port", str(port)]
            settings |= {"SDXL_CONFIG": str(slot_of(config, Path(scratch, "slot"))), "SDXL_ATTEST": "off"}
            settings |= {"SDXL_STORE": str(Path(scratch, "images")), "SDXL_LOG_LEVEL": "warning"}
        with Path(scratch, "log").open("w+") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | settings | environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                _wait(process, port, first_body(config), Path(scratch, "log"))
                yield port
            finally:
                end(process)


def slot_of(config: GenerationConfig, folder: Path) -> Path:
    """A slot without goldens, which is served with SDXL_ATTEST=off."""
    folder.mkdir()
    (folder / "config.toml").write_text(config.to_toml())
    return folder


def first_body(config: GenerationConfig) -> Body:
    return {
        "prompt": "a red circle",
        "seed": 0,
        "steps": config.limits.steps[0],
        "guidance_scale": config.guidance_scale,
        "width": config.width,
        "height": config.height,
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], port: int, body: Body, log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {log.read_text()[-2000:]}")
        try:
            post(port, body)
            return
        except (OSError, http.client.HTTPException, RuntimeError):
            time.sleep(0.2)
    raise RuntimeError(f"the server does not answer: {log.read_text()[-2000:]}")


def end(process: subprocess.Popen[bytes]) -> None:
    """Its own group, since LitServe has workers that outlive their parent."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signum)
            process.wait(12)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def request(port: int, method: str, path: str, body: Body | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def post(port: int, body: Body) -> float:
    """Ask for one picture; the seconds until the answer."""
    began = time.monotonic()
    status, content = request(port, "POST", "/generate", body)
    if status != 200:
        raise RuntimeError(f"{status}: {content[:300]!r}")
    return time.monotonic() - began


def rate(port: int, bodies: Sequence[Body]) -> float:
    """Pictures a second with all of them asked for at once."""
    began = time.monotonic()
    with ThreadPoolExecutor(len(bodies)) as pool:
        list(pool.map(lambda body: post(port, body), bodies))
    return len(bodies) / (time.monotonic() - began)
