"""`python docs/plan.py`: what a real `dstack server` plans for each *.dstack.yml, on loopback and with nothing to pay.

Server and command line run with a temporary home, so the user's projects and clouds are not touched. Without a backend
the server finds no offer, and says so in the place of a price list. The fleet is created, the other files are planned,
and `service.gateway.dstack.yml` is submitted, to show that it is refused without a gateway. `plan.txt` is the output.
"""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
DSTACK = Path(sys.executable).with_name("dstack")
# Names that the files take from the caller's shell.
CALLER = ("JUPYTER_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
SUBMIT = ("-y", "-d")
FILES: dict[str, tuple[str, ...]] = {
    "fleet.dstack.yml": SUBMIT,
    "dev.dstack.yml": (),
    "service.dstack.yml": (),
    "service.gateway.dstack.yml": SUBMIT,
    "sweep.dstack.yml": (),
}


@contextmanager
def server(home: Path) -> Iterator[dict[str, str]]:
    """A dstack server with its whole state in `home`. Yields the environment in which the command line finds it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DSTACK_", "AWS_"))}
    environment |= {"HOME": str(home), "DSTACK_SERVER_DIR": str(home / "server"), "DSTACK_DEFAULT_CREDS_DISABLED": "1"}
    environment |= dict.fromkeys(CALLER, "none") | {"COLUMNS": "100", "NO_COLOR": "1"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, token = f"http://127.0.0.1:{port}", secrets.token_hex(16)
    log = home / "server.log"
    with log.open("w") as written:
        command = [str(DSTACK), "server", "--host", "127.0.0.1", "--port", str(port), "--yes", "--token", token]
        process = subprocess.Popen(command, env=environment, stdout=written, stderr=subprocess.STDOUT)
    try:
        _wait(process, f"{url}/healthcheck", log)
        add = ["project", "add", "--name", "main", "--url", url, "--token", token, "-y"]
        subprocess.run([str(DSTACK), *add], env=environment, check=True, capture_output=True)
        yield environment
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"dstack server did not come up: {log.read_text()[-2000:]}")


def plan(name: str, options: tuple[str, ...], environment: dict[str, str]) -> str:
    """The output of `dstack apply` for one file; it is answered `n` where it asks."""
    command = ["dstack", "apply", *options, "-f", name]
    done = subprocess.run(
        [str(DSTACK), *command[1:]],
        cwd=ROOT, env=environment,
        input="n\n", text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    output = "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines())
    return f"$ {' '.join(command)}\n{output}\n[exit status {done.returncode}]\n"


def main() -> str:
    with tempfile.TemporaryDirectory() as home, server(Path(home)) as environment:
        return "\n".join(plan(name, options, environment) for name, options in FILES.items())


if __name__ == "__main__":
    print(main(), end="")
