"""Servers as separate processes on the loopback interface, each ended by its process id."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.clients import request
from bench.settings import LIMITS
from sdxl_lab.config import GenerationConfig

ROOT = Path(__file__).parent.parent


@contextmanager
def server(kind: str, config: GenerationConfig, **environment: str) -> Iterator[int]:
    """Start "service", "locked", "inline" or "litserve" with the configuration's model. Yields its port after it has
    drawn a first image."""
    port = free_port()
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "log")
        if kind == "service":
            command = service(port)
            environment = service_environment(config, Path(scratch)) | environment
        else:
            command = [sys.executable, "-m", "bench.baselines", kind, "--model", config.model.base, "--port", str(port)]
        process = start(command, log, environment)
        first = {"prompt": "a red circle", "seed": 0, "steps": LIMITS.steps[0]}
        first |= {"guidance_scale": config.guidance_scale, "width": config.width, "height": config.height}
        try:
            until(lambda: request(port, "POST", "/generate", first).status == 200, process, log)
            yield port
        finally:
            end(process)


def service(port: int) -> list[str]:
    """The command that starts our service."""
    return [sys.executable, "-m", "service", "--port", str(port)]


def service_environment(config: GenerationConfig, folder: Path) -> dict[str, str]:
    """The environment of our service: this configuration in a slot without goldens, all its files in `folder`."""
    slot = folder / "slot"
    slot.mkdir()
    (slot / "config.toml").write_text(config.to_toml())
    (slot / "serving.toml").write_text(LIMITS.to_toml())
    return {
        "SDXL_CONFIG": str(slot),
        "SDXL_ATTEST": "off",
        "SDXL_STORE": str(folder / "images"),
        "SDXL_LOG_LEVEL": "warning",
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a process in a group of its own. Its output is appended to `log`."""
    ours = {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | ours | dict(environment or {}),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def until(holds: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until `holds()` is true. Raises RuntimeError with the end of the log if the process ends or never gets
    there."""
    ends = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < ends:
        with suppress(OSError, http.client.HTTPException):
            if holds():
                return
        time.sleep(0.1)
    output = log.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"the server {'does not come up' if process.poll() is None else 'ended'}: {output}")


def end(process: subprocess.Popen[bytes]) -> None:
    """End the whole process group, since LitServe's workers outlive their parent."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signum)
            process.wait(12)
