"""Models and an engine that the laboratory's tests share: loaded once, since loading takes longer than drawing."""

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sdxl_lab.config import ModelRef, RuntimeProfile
from sdxl_lab.diffusion.latency import LatencyModel
from tests.made import SettledLatency


@pytest.fixture(scope="session")
def lively_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model`, whose refiner listens to the aesthetic score as a trained one does: a fresh one has zeros there."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("lively")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    path = folder / "refiner" / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    weights = load_file(path)
    first = weights["add_embedding.linear_1.weight"]
    score = first[:, -32:]
    assert not score.any()
    score.copy_(torch.randn(score.shape, generator=torch.Generator().manual_seed(0)))
    save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def tiny_models(tiny_model: Path) -> Any:
    """The random model's parts, loaded once, in float32."""
    from sdxl_lab.diffusion.models import load

    return load(
        ModelRef(base=str(tiny_model / "base"), refiner=str(tiny_model / "refiner")),
        RuntimeProfile(device="cpu", dtype="float32"),
    )


@pytest.fixture(scope="session")
def nano() -> Iterator[Any]:
    """An engine on the shipped miniature, in float32."""
    from sdxl_lab.config import GenerationConfig
    from sdxl_lab.diffusion.engine import Engine

    with Engine.load(GenerationConfig(), RuntimeProfile(device="cpu", dtype="float32")) as engine:
        yield engine


@pytest.fixture
def start(tiny_models: Any) -> Iterator[Callable[..., Any]]:
    """Starts engines on the random model, which takes no time, and closes them after the test. What a call takes is
    settled, so that who shares it does not depend on the machine; `options` are the profile's."""
    from sdxl_lab.diffusion.engine import Engine

    with ExitStack() as stack:

        def start(rows: int = 64, max_queue: int = 1000, latency: LatencyModel | None = None, **options: Any) -> Engine:
            profile = RuntimeProfile(device="cpu", dtype="float32", rows=rows, **options)
            known = SettledLatency() if latency is None else latency
            return stack.enter_context(Engine(tiny_models, profile, {"base": "random"}, max_queue, known))

        yield start


@pytest.fixture
def engine(start: Callable[..., Any]) -> Any:
    """One of those, as it starts."""
    return start()


@pytest.fixture
def submitted(engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every request that reaches `engine`."""
    requests: list[Any] = []
    submit = engine.submit
    monkeypatch.setattr(
        engine, "submit", lambda request, **more: (requests.append(request), submit(request, **more))[1]
    )
    return requests


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes as soon as cells are drawn."""
    from sdxl_lab.research.cache import ImageCache

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageCache, "complete", stop)


@pytest.fixture
def at_hand(monkeypatch: pytest.MonkeyPatch, tiny_models: Any, tiny_config: Any) -> None:
    """Whoever loads the random model has it at once; a foreign one is loaded in earnest."""
    from sdxl_lab.diffusion import engine

    load = engine.load
    monkeypatch.setattr(
        engine, "load", lambda ref, profile: tiny_models if ref == tiny_config.model else load(ref, profile)
    )


@pytest.fixture
def clean_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work tree has a commit and no changes, whatever this one has."""
    from sdxl_lab.evaluation import comparison
    from sdxl_lab.release import promote as promotion

    for module in (promotion, comparison):
        monkeypatch.setattr(module, "git_state", lambda: ("c0ffee", False))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as a terminal leaves it: a shell that runs the tests in the background ignores it, also for children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
