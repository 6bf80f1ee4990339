"""Three replicas of the service behind nginx, on one object store: real processes on the loopback interface.

Every process is ended by its process id. `python -m bench replicas` draws with the cluster and breaks it.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.clients import request
from bench.servers import end, free_port, service, service_environment, start, until
from sdxl_lab.config import GenerationConfig

REPLICAS = 3
LEASE = 5  # seconds; short, so that a killed replica is noticed soon
BUCKET = "images"

# A request that could not be sent goes to the next replica. nginx never repeats a POST that was sent, since it does not
# know idempotency keys: the client gets a 502 and repeats it.
NGINX = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log warn;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  upstream replicas {{
{servers}
  }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://replicas;
      proxy_http_version 1.1;
      proxy_buffering off;
      proxy_connect_timeout 2s;
      proxy_read_timeout 300s;
      proxy_next_upstream error timeout;
    }}
  }}
}}
"""


class Replica:
    """One `python -m service`, which can be killed and started again on its port."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self.environment, self.log, self.port = environment, log, free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = start(service(self.port), self.log, self.environment)

    def wait_until_ready(self) -> None:
        assert self.process is not None
        until(lambda: request(self.port, "GET", "/readyz").status == 200, self.process, self.log)

    def stop(self, number: signal.Signals) -> None:
        """Stop it at once with SIGKILL, or after it has drained with SIGTERM."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(60)

    def log_lines(self) -> list[dict[str, Any]]:
        """The lines of its log, over all restarts."""
        lines = []
        for line in self.log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return [line for line in lines if isinstance(line, dict)]


class StoreLink:
    """A TCP link to the store that can be cut: open connections are aborted, new ones refused."""

    def __init__(self, to: int) -> None:
        self.to, self.port = to, free_port()
        self._loop = asyncio.new_event_loop()
        self._ends: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="link", daemon=True)
        self._thread.start()
        self.mend()

    def mend(self) -> None:
        self._do(self._listen()).result()

    def cut(self) -> None:
        self._do(self._abort()).result()

    def close(self) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Any) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", self.port)

    async def _abort(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._ends):
            writer.transport.abort()
        await asyncio.sleep(0.05)  # so that the carrying tasks notice

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._ends.add(writer)
        try:
            store, to_store = await asyncio.open_connection("127.0.0.1", self.to)
            self._ends.add(to_store)
            try:
                await asyncio.gather(self._pump(reader, to_store), self._pump(store, writer))
            finally:
                self._ends.discard(to_store)
                to_store.transport.abort()
        except OSError:
            pass
        finally:
            self._ends.discard(writer)
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while content := await reader.read(1 << 16):
                writer.write(content)
                await writer.drain()
            writer.write_eof()


class Cluster:
    """The running processes. Clients use `ports` in turns: nginx's, or without nginx those of the replicas."""

    def __init__(
        self, replicas: list[Replica], moto: subprocess.Popen[bytes], link: StoreLink, front: int | None
    ) -> None:
        self.replicas, self.moto, self.link, self.front = replicas, moto, link, front
        self.ports = [front] if front is not None else [replica.port for replica in replicas]

    @contextmanager
    def outage(self, stalls: bool) -> Iterator[None]:
        """Make the store unreachable: it `stalls` and answers later, or the link to it is cut."""
        if stalls:
            self.moto.send_signal(signal.SIGSTOP)
        else:
            self.link.cut()
        try:
            yield
        finally:
            if stalls:
                self.moto.send_signal(signal.SIGCONT)
            else:
                self.link.mend()

    def job_records(self) -> list[str]:
        """The names of the job records that the store still has."""
        listed = request(self.link.to, "GET", f"/{BUCKET}?list-type=2&prefix=lab/jobs/").content.decode()
        return [part.partition("<")[0] for part in listed.split("<Key>")[1:]]


@contextmanager
def cluster(config: GenerationConfig) -> Iterator[Cluster]:
    """Three ready replicas with one thread each, moto as an S3 store in memory, and nginx in front."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        port = free_port()
        moto = start([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], folder / "moto")
        stack.callback(end, moto)
        until(lambda: request(port, "PUT", f"/{BUCKET}").status == 200, moto, folder / "moto")
        link = StoreLink(port)
        stack.callback(link.close)
        ours = service_environment(config, folder) | {
            "OMP_NUM_THREADS": "1",
            "SDXL_LOG_LEVEL": "info",
            "SDXL_STORE": f"s3://{BUCKET}/lab",
            "SDXL_LEASE": str(LEASE),
            "SDXL_EXACT": "true",
            "AWS_ENDPOINT": f"http://127.0.0.1:{link.port}",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
        }
        running = [Replica(ours, folder / f"replica-{number}") for number in range(REPLICAS)]
        for replica in running:
            stack.callback(replica.stop, signal.SIGKILL)
            replica.start()
        made = Cluster(running, moto, link, _front(stack, running, folder))
        for replica in running:
            replica.wait_until_ready()
        yield made


def _front(stack: ExitStack, replicas: list[Replica], folder: Path) -> int | None:
    nginx = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if nginx is None:
        print("nginx is missing (make system installs it): clients use the replicas in turns")
        return None
    port = free_port()
    servers = "\n".join(f"    server 127.0.0.1:{replica.port} max_fails=1 fail_timeout=1s;" for replica in replicas)
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, servers=servers, port=port))
    command = [nginx, "-e", str(folder / "nginx.log"), "-c", str(folder / "nginx.conf")]
    stack.callback(end, start(command, folder / "nginx.out"))
    return port
