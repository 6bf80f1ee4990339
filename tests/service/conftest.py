"""A slot with the tiny model, and services that serve it."""

import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import uvicorn
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from sdxl_lab.config import GenerationConfig, ModelRef, ServingLimits
from sdxl_lab.release.promote import promote
from service.app import create_app
from service.jobs.manager import JobManager
from service.jobs.records import JobRecord
from service.server.connection import Connection
from service.settings import Settings
from tests.made import SettledLatency, evidence

LIMITS = ServingLimits(side=(64, 512))  # of the slots of these tests
Serve = Callable[..., TestClient]
NOBODYS = "5f2b8c1e-3d47-4a6b-9e0f-7c1d2a3b4c5d"  # a well-formed id that no image has


class Live(NamedTuple):
    port: int
    jobs: JobManager
    server: uvicorn.Server


@contextmanager
def settled_latency() -> Iterator[None]:
    """What a call takes is settled for the engines loaded meanwhile, so that who shares one does not depend on the
    machine."""
    from sdxl_lab.diffusion.latency import LatencyModel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatencyModel, "remembered", lambda **_: SettledLatency())
        yield


@pytest.fixture(autouse=True)
def engines_are_settled() -> Iterator[None]:
    with settled_latency():
        yield


@pytest.fixture(scope="session")
def promoted(tiny_model: Path) -> GenerationConfig:
    """What the slot of these tests holds."""
    model = ModelRef(base=str(tiny_model / "base"), refiner=str(tiny_model / "refiner"))
    return GenerationConfig(model=model, steps=4, width=64, height=64)


@pytest.fixture(scope="session")
def slot(promoted: GenerationConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Promoted with two goldens, so that a service that starts on it is attested in a moment."""
    from sdxl_lab.diffusion.engine import Engine
    from sdxl_lab.job import ImageRequest

    folder = tmp_path_factory.mktemp("promoted") / "tiny"
    with Engine.load(promoted) as engine:
        goldens = [engine.draw(ImageRequest(promoted, prompt, seed)) for prompt, seed in (("a ring", 3), ("a boat", 4))]
    promote(promoted, folder, images=goldens, why="a test", who="the tests", allow_dirty=True)
    (folder / "serving.toml").write_text(LIMITS.to_toml())
    return folder


def left_behind(config: GenerationConfig, age: float = 0.0, **more: Any) -> JobRecord:
    """The record of a job as a replica leaves it that was killed so many seconds ago."""
    lease = {"state": "running", "holder": "another", "renewed": time.time() - age, "lease": 30}
    asked = {"fingerprint": "", "prompt": "a ring", "seed": 1, "config": config.to_dict(), "promoted": config.digest}
    begun = {"id": uuid.uuid4(), "created": 1.0, "attempts": 1, "overridden": ()}
    return JobRecord(**asked | begun | lease | more)


def write_slot(folder: Path, config: GenerationConfig, **said: Any) -> Path:
    """A slot without goldens: to be served it takes `attest="off"`."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(config.to_toml())
    (folder / "serving.toml").write_text(LIMITS.to_toml())
    (folder / "evidence.json").write_text(evidence(config, **said).to_json())
    return folder


@pytest.fixture(scope="session")
def client(slot: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A ready service that all tests share which leave it as it was."""
    with ExitStack() as stack:
        with settled_latency():
            app = create_app(Settings(slot=slot, store=tmp_path_factory.mktemp("shared")))
            client = wait_until_ready(stack.enter_context(TestClient(app)))
        yield client


@pytest.fixture
def serve(slot: Path, tmp_path: Path) -> Iterator[Serve]:
    """Start a service with settings of its own."""
    with ExitStack() as stack:

        def start(*, ready: bool = True, **settings: Any) -> TestClient:
            chosen = Settings(**{"slot": slot, "store": tmp_path / "images"} | settings)
            client = stack.enter_context(TestClient(create_app(chosen)))
            jobs = client.app.state.jobs
            # Two loads at a time in a process mix up: transformers builds modules under a global meta device.
            stack.callback(wait_for, lambda: bool(jobs.deployment.engine or jobs.deployment.failure))
            return wait_until_ready(client) if ready else client

        yield start


def wait_until_ready(client: TestClient) -> TestClient:
    wait_for(lambda: client.get("/readyz").status_code == 200)
    return client


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.02)


@pytest.fixture
def live(slot: Path, tmp_path: Path) -> Iterator[Live]:
    """A service on a real socket."""
    with serving(Settings(slot=slot, store=tmp_path / "images")) as live:
        yield live


@contextmanager
def serving(settings: Settings, front: Callable[[ASGIApp], ASGIApp] = lambda app: app) -> Iterator[Live]:
    """A ready service on a real socket, behind `front`."""
    app = create_app(settings)
    options = uvicorn.Config(
        front(app), http=Connection, log_config=None, access_log=False, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(options)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    jobs = app.state.jobs
    try:
        with settled_latency():
            thread.start()
            wait_for(lambda: jobs.deployment.trouble is None)
        yield Live(port, jobs, server)
    finally:
        server.should_exit = True
        thread.join()
