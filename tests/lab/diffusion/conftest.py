"""What the engine lets go of when an image is done: the tests look at its last latents."""

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import pytest

from sdxl_lab.diffusion.denoising import Trajectory
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.job import Job

TRAJECTORIES: WeakKeyDictionary[Job[Any], Trajectory] = WeakKeyDictionary()


def trajectory_of(job: Job[Any]) -> Trajectory:
    """The trajectory of a finished job of this test."""
    job.result(240)
    return TRAJECTORIES[job]


@pytest.fixture(autouse=True, scope="module")
def trajectories_are_kept() -> Iterator[None]:
    """For a whole module: its images are drawn by fixtures, too."""
    decode = Engine._decode

    def keep(self: Engine, finished: list[Any]) -> None:
        TRAJECTORIES.update({work.job: work.trajectory for work in finished})
        decode(self, finished)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_decode", keep)
        yield
    TRAJECTORIES.clear()
