"""The engine's promises: company changes nothing, one failure is one image's, nobody starves, nothing is lost."""

import copy
import itertools
import logging
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_lab.config import ConfigError, GenerationConfig, HiresConfig, ModelRef, RefinerConfig, RuntimeProfile
from sdxl_lab.diffusion import engine as engines
from sdxl_lab.diffusion.batching import TRIALS
from sdxl_lab.diffusion.denoising import Trajectory
from sdxl_lab.diffusion.engine import Engine, EngineStats
from sdxl_lab.diffusion.latency import LatencyModel
from sdxl_lab.errors import Cancelled, EngineStopped, ModelMismatch, QueueFull
from sdxl_lab.images import ImageError, max_difference, read_watermark
from sdxl_lab.job import ImageRequest, Job
from sdxl_lab.record import ImageRecord
from sdxl_lab.source import SourceImage
from tests.lab.diffusion.conftest import trajectory_of
from tests.made import SettledLatency, image_record

# Other images in the call move float32 sums by 1e-6 at most; rounded, a pixel may fall to the other side.
ROUNDING = 1 / 255 + 1e-9
SECONDS = 120


def requests(config: GenerationConfig, count: int) -> list[ImageRequest]:
    names = ("euler", "ddim", "dpmpp_2m", "euler_a")
    return [ImageRequest(config.with_(scheduler=names[i % 4], steps=3 + i % 3), f"image {i}", i) for i in range(count)]


def latents(job: Job) -> torch.Tensor:
    return trajectory_of(job).latents


def close_to(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool((first - second).abs().max() <= 1e-5 * second.abs().max())


class Gate:
    """An `on_step` that holds the engine at its first call until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, calls: int, total: int) -> None:
        self.reached.set()
        assert self.opened.wait(SECONDS)


def hold(engine: Engine, config: GenerationConfig) -> tuple[Gate, Job]:
    """The engine held at the one step of an image, so that what comes next waits together."""
    gate = Gate()
    held = engine.submit(ImageRequest(config.with_(steps=1), "gate", 0), on_step=gate)
    assert gate.reached.wait(SECONDS)
    return gate, held


@pytest.fixture
def config(tiny_config: GenerationConfig) -> GenerationConfig:
    return tiny_config.with_(steps=3, guidance_scale=3.0)


# --- queue, forecast, preview ----------------------------------------------------------------------------------------


def test_a_higher_priority_goes_first_and_equals_keep_their_order(start, config, monkeypatch):
    """By a clock that stands still: nobody is overdue for having waited."""
    monkeypatch.setattr(engines, "time", SimpleNamespace(monotonic=lambda: 0.0))
    engine, order = start(rows=2), []
    gate, held = hold(engine, config)

    def ask(name: str, priority: int) -> Job:
        request = ImageRequest(config.with_(steps=1), name, 0)
        return engine.submit(request, on_step=lambda *_: order.append(name), priority=priority)

    jobs = [ask("a", 0), ask("b", 0), ask("c", 5), ask("d", 5), ask("e", -1)]
    assert [job.position for job in jobs] == [3, 4, 1, 2, 5]
    assert held.position == 0
    now = engine.stats()
    assert now == EngineStats(5, 1, 2, 2, now.ticks, 2, now.seconds, 1, 2, now.seconds)
    gate.opened.set()
    for job in jobs:
        job.result(SECONDS)
    assert order == ["c", "d", "a", "b", "e"]
    assert [job.position for job in jobs] == [0] * 5
    while (stats := engine.stats()).running:  # an image is sent off just before its place is free
        time.sleep(0.01)
    assert (stats.queued, stats.running, stats.rows_in_flight, stats.rows) == (0, 0, 0, 2)
    assert (stats.calls, stats.rows_in_calls) == (6, 12)


def test_the_eta_is_what_the_wait_turns_out_to_be(start, config, monkeypatch):
    """Five images, at most two in a call, a call in 30 ms whatever its rows, by a clock of our own."""
    engine = start(rows=4, latency=LatencyModel())
    predict, clock = engine._predict, [0.0]

    def measured(name, inputs):
        time.sleep(0.005)
        clock[0] += 0.03
        return predict(name, inputs)

    monkeypatch.setattr(engine, "_predict", measured)
    monkeypatch.setattr(engines, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    fresh = engine.submit(ImageRequest(config, "never measured", 0))
    assert fresh.eta is None
    fresh.result(SECONDS)
    assert fresh.eta == 0.0
    for warm in [engine.submit(ImageRequest(config.with_(steps=12), "two at a time", seed)) for seed in range(2)]:
        warm.result(SECONDS)
    asked = [ImageRequest(config.with_(steps=10 + 5 * (seed % 2)), "a cat", seed) for seed in range(5)]
    began = clock[0]
    jobs = [engine.submit(request) for request in asked]
    etas = [job.eta for job in jobs]
    took = {}
    for index, job in enumerate(jobs):
        job.add_done_callback(lambda _, index=index: took.setdefault(index, clock[0] - began))
    for job in jobs:
        job.result(SECONDS)
    for index, eta in enumerate(etas):
        assert took[index] / 2 < eta < took[index] * 2
    assert etas[4] > etas[2] >= etas[0], "of equal images the first goes first"
    assert etas[1] > etas[4], "the longer ones after the shorter ones"


def test_a_preview_comes_to_look_like_the_image(nano):
    config = GenerationConfig(steps=12, guidance_scale=3.0)
    likeness = []

    def look(calls: int, total: int) -> None:
        likeness.append(job.preview())

    gate, held = hold(nano, config)
    job = nano.submit(ImageRequest(config, "a red circle on a white background", 3), on_step=look)
    assert job.preview() is None
    gate.opened.set()
    image = job.result(SECONDS).image.resize((128, 128), Image.Resampling.BOX)
    assert held.result(SECONDS)
    errors = [np.abs(np.asarray(each, float) - np.asarray(image, float)).mean() / 255 for each in likeness]
    assert len(errors) == 12
    assert all(each.size == (128, 128) for each in likeness)
    assert errors[-1] < 0.1
    assert errors[-1] < errors[0] - 0.01


@pytest.mark.parametrize("scheduler", ["euler", "ddim", "dpmpp_2m_karras", "heun", "tcd"])
def test_what_the_last_step_points_to_is_the_final_latent(start, config, scheduler):
    """At the end of the schedule hardly any noise is left, so the last prediction is where the image ends."""
    job = start().submit(ImageRequest(config.with_(scheduler=scheduler, steps=8), "a cat", 1))
    final = latents(job)
    pointed = trajectory_of(job).denoised()
    assert (pointed - final).abs().max() <= 0.1 * final.abs().max()


# --- runtime ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)  # the compiler, on a machine that does other things too
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"dtype": "bfloat16"}, 0.02),
        ({"channels_last": True}, ROUNDING),
        ({"fuse_qkv": True}, ROUNDING),
        ({"threads": 1}, ROUNDING),
        ({"compile": True}, ROUNDING),
    ],
    ids=lambda value: str(value),
)
def test_no_runtime_option_changes_what_is_drawn(nano, options, tolerance, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    config = GenerationConfig(width=64, height=64, steps=4)
    # One number of rows is enough of the compiler, which takes half a minute for each.
    scales = (3.0,) if "compile" in options else (3.0, 1.0)
    asked = [ImageRequest(config.with_(guidance_scale=scale), "a cat", 5) for scale in scales]
    threads = torch.get_num_threads()
    try:
        with Engine.load(config, RuntimeProfile(device="cpu", **options)) as engine:
            jobs = [engine.submit(request) for request in asked]
            for request, job in zip(asked, jobs, strict=True):
                assert max_difference(job.result(800).image, nano.draw(request).image) <= tolerance
                assert trajectory_of(job).latents.dtype == torch.float32
                assert job.result().record.runtime.items() >= options.items()
    finally:
        torch.set_num_threads(threads)


def test_models_load_in_a_thread_that_ends(tiny_models, config, monkeypatch):
    """It would keep an OpenMP pool, and two pools on one machine's cores slow each other down."""
    threads = []
    monkeypatch.setattr(engines, "load", lambda *_: threads.append(threading.current_thread()) or tiny_models)
    with Engine.load(config) as engine:
        assert threads[0] is not threading.current_thread()
        assert threads[0] is not engine._thread
        assert not threads[0].is_alive()


def test_a_compiled_unet_sees_row_counts_of_powers_of_two(tiny_models, config, monkeypatch):
    sizes, forward = [], tiny_models.base.unet.forward
    monkeypatch.setattr(
        tiny_models.base.unet,
        "forward",
        lambda sample, *rest, **options: sizes.append(len(sample)) or forward(sample, *rest, **options),
    )
    with Engine(tiny_models, RuntimeProfile(device="cpu", compile=True), {}, latency=SettledLatency()) as engine:
        gate, held = hold(engine, config)
        asked = [ImageRequest(config.with_(steps=2, guidance_scale=scale), "a cat", 1) for scale in (3, 3, 1)]
        jobs = [engine.submit(request) for request in asked]
        gate.opened.set()
        apart = [latents(job) for job in jobs]
        held.result(SECONDS)
    assert sizes == [2, 8, 8]
    with Engine(tiny_models, RuntimeProfile(device="cpu"), {}) as plain:
        for request, one in zip(asked, apart, strict=True):
            assert close_to(latents(plain.submit(request)), one)


# --- calibration ----------------------------------------------------------------------------------------------------


def test_a_calibration_measures_row_counts_before_the_first_image(start, config):
    latency = LatencyModel()
    engine = start(rows=8, latency=latency)
    engine.calibrate(config, seconds=60.0)
    (group,) = latency._seconds
    assert group == ("base", 8, 8)
    assert {2, 4} <= latency.counts(group).keys() <= {2, 4, 8}, "8 where 4 rows were cheaper than 2, a row"
    assert min(latency.counts(group).values()) == TRIALS
    assert engine.stats().calls == 0
    known = latency.to_dict()
    engine.calibrate(config)
    assert latency.to_dict() == known, "what is known is not measured again"


def test_a_calibration_measures_the_size_of_the_second_pass_too(start, config):
    latency = LatencyModel()
    start(rows=2, latency=latency).calibrate(config.with_(hires=HiresConfig(scale=1.5)), seconds=60.0)
    assert set(latency._seconds) == {("base", 8, 8), ("base", 12, 12)}


def test_a_calibration_ends_in_time(start, config):
    latency = LatencyModel()
    start(latency=latency).calibrate(config, seconds=0.0)
    assert sum(latency.counts(("base", 8, 8)).values()) <= 1


def test_a_calibration_that_runs_out_of_memory_lowers_the_rows(start, config, monkeypatch):
    engine = start(rows=8, latency=LatencyModel())
    predict = engine._predict

    def small(name, inputs):
        if len(inputs[0].timesteps) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(name, inputs)

    monkeypatch.setattr(engine, "_predict", small)
    engine.calibrate(config)
    assert engine.rows == 2


@pytest.mark.parametrize("place", ["before", "meanwhile"])
def test_a_closed_engine_calibrates_nothing(start, config, monkeypatch, place):
    engine = start(latency=LatencyModel())
    if place == "meanwhile":
        monkeypatch.setattr(engine, "_do_chores", lambda: setattr(engine, "_closed", True))
    else:
        engine.close()
    with pytest.raises(EngineStopped, match="the engine is closed"):
        engine.calibrate(config)


def test_what_was_measured_is_known_at_the_next_start(tiny_models, config, monkeypatch):
    monkeypatch.setattr(engines, "load", lambda *_: tiny_models)
    for start_number in range(2):
        with Engine.load(config, RuntimeProfile(device="cpu", dtype="float32", threads=1)) as engine:
            counts = engine._latency.counts(("base", 8, 8))
            assert bool(counts) == bool(start_number)
            engine.draw(ImageRequest(config, "a cat", 1))
    with Engine.load(config, RuntimeProfile(device="cpu", dtype="float32", threads=2)) as engine:
        assert not engine._latency, "another number of threads is another machine"


# --- company ---------------------------------------------------------------------------------------------------------


def test_a_image_is_the_same_alone_and_in_company(start, config):
    engine = start()
    asked = requests(config, 5)
    alone = [latents(engine.submit(request)) for request in asked]
    jobs = [engine.submit(request) for request in asked]
    for one, job in zip(alone, jobs, strict=True):
        assert close_to(latents(job), one)
        assert max_difference(job.result().image, engine.draw(job.request).image) <= ROUNDING


def test_a_image_that_joins_midway_is_the_same_and_leaves_the_other_so(start, config, monkeypatch):
    engine, long, short = (
        start(),
        ImageRequest(config.with_(steps=6), "a long one", 1),
        ImageRequest(config, "a short one", 2),
    )
    expected = [latents(engine.submit(request)) for request in (long, short)]
    sizes, predict = [], engine._predict
    monkeypatch.setattr(engine, "_predict", lambda name, inputs: sizes.append(len(inputs)) or predict(name, inputs))
    joined = []

    def join(calls: int, total: int) -> None:
        if calls == 2:
            joined.append(engine.submit(short))

    first = engine.submit(long, on_step=join)
    assert close_to(latents(first), expected[0])
    assert close_to(latents(joined[0]), expected[1])
    assert sizes == [1, 1, 2, 2, 2, 1]


def test_eight_threads_each_get_their_own_image(start, config):
    engine = start()
    asked = requests(config, 8)
    with ThreadPoolExecutor(8) as threads:
        images = list(threads.map(engine.draw, asked))
    assert [image.record.prompt for image in images] == [request.prompt for request in asked]
    for request, image in zip(asked, images, strict=True):
        assert max_difference(image.image, engine.draw(request).image) <= ROUNDING
    assert len({image.image.tobytes() for image in images}) == 8


def test_equal_images_of_two_sizes_are_drawn_one_size_after_the_other(start, config):
    """Two sizes share no call: alternating would let both end late."""
    engine, order = start(), []
    gate, held = hold(engine, config)
    sizes = [64] * 4 + [72]
    jobs = [
        engine.submit(
            ImageRequest(config.with_(width=size, steps=4), "sizes", seed),
            on_step=lambda *_, size=size: order.append(size),
        )
        for seed, size in enumerate(sizes)
    ]
    gate.opened.set()
    for job in (held, *jobs):
        job.result(SECONDS)
    assert order == [64] * 16 + [72] * 4


def test_a_short_image_passes_the_long_ones_under_way(start, config):
    engine, ends = start(rows=4), []
    jobs = [engine.submit(ImageRequest(config.with_(steps=60), "long", seed)) for seed in range(4)]
    while engine.stats().calls < 3:
        time.sleep(0.005)
    assert [job.state for job in jobs] == ["running", "running", "queued", "queued"]
    jobs.append(engine.submit(ImageRequest(config.with_(steps=2), "short", 9)))
    for job in jobs:
        job.add_done_callback(lambda job: ends.append(job.request.prompt))
    for job in jobs:
        job.result(SECONDS)
    assert ends == ["short", "long", "long", "long", "long"]


def test_first_come_first_served_stays_available(start, config):
    engine, ends = start(rows=2, order="fifo"), []
    gate, held = hold(engine, config)
    jobs = [engine.submit(ImageRequest(config.with_(steps=steps), "a cat", steps)) for steps in (9, 2, 5)]
    for job in jobs:
        job.add_done_callback(lambda job: ends.append(job.request.seed))
    gate.opened.set()
    for job in (held, *jobs):
        job.result(SECONDS)
    assert ends == [9, 2, 5]


def test_no_more_images_are_under_way_than_the_profile_says(start, config):
    engine, most = start(rows=2, active=3), []
    jobs = []

    def look(calls: int, total: int) -> None:
        most.append(engine.stats().running)
        if total > 3 and calls == 1:  # a shorter one, which passes
            jobs.append(engine.submit(ImageRequest(config.with_(steps=total - 3), "next", total), on_step=look))

    jobs.append(engine.submit(ImageRequest(config.with_(steps=21), "first", 0), on_step=look))
    while len(jobs) < 7 or not all(job.over for job in jobs):
        time.sleep(0.01)
    assert max(most) == 3


def test_nobody_starves_among_many_sizes_and_endless_newcomers(start, config):
    """One image of an odd size against a crowd of another size that is renewed whenever a member is done: the odd one
    still has every second call."""
    engine, served, crowd, stop = start(rows=4), [], [], threading.Event()

    def renew(calls: int, total: int) -> None:
        served.append("crowd")
        if calls == total and not stop.is_set():
            crowd.append(
                engine.submit(ImageRequest(config.with_(steps=2), "crowd", len(crowd)), on_step=renew, priority=1)
            )

    gate, held = hold(engine, config)
    odd = engine.submit(
        ImageRequest(config.with_(steps=10, height=128), "odd", 0), on_step=lambda *_: served.append("odd"), priority=2
    )
    crowd += [engine.submit(ImageRequest(config.with_(steps=2), "crowd", i), on_step=renew) for i in range(6)]
    gate.opened.set()
    odd.result(SECONDS)
    stop.set()
    for job in [held, *crowd]:
        job.result(SECONDS)
    turns = [index for index, name in enumerate(served) if name == "odd"]
    assert len(turns) == 10
    assert max(after - before for before, after in itertools.pairwise(turns)) <= 3


def test_images_beyond_the_row_budget_wait_for_a_place_in_order(start, config, monkeypatch):
    engine, finished = start(rows=4), []
    rows, predict = [], engine._predict

    def counted(name, inputs):
        rows.append(sum(len(each.timesteps) for each in inputs))
        return predict(name, inputs)

    monkeypatch.setattr(engine, "_predict", counted)
    gate, held = hold(engine, config)
    jobs = [engine.submit(ImageRequest(config, "a crowd", seed)) for seed in range(5)]
    for index, job in enumerate(jobs):
        job.add_done_callback(lambda _, index=index: finished.append(index))
    assert [job.state for job in jobs] == ["queued"] * 5
    assert engine.queued == 5
    gate.opened.set()
    for job in (held, *jobs):
        job.result(SECONDS)
    assert max(rows) == 4
    assert finished == sorted(finished)


def test_an_unguided_image_takes_one_row(start, config, monkeypatch):
    engine, rows = start(), []
    predict = engine._predict
    monkeypatch.setattr(
        engine, "_predict", lambda name, inputs: rows.append(len(inputs[0].timesteps)) or predict(name, inputs)
    )
    engine.draw(ImageRequest(config.with_(guidance_scale=1.0), "a cat", 1))
    engine.draw(ImageRequest(config, "a cat", 1))
    assert rows == [1, 1, 1, 2, 2, 2]


# --- progress, cancel, close -----------------------------------------------------------------------------------------


def test_progress_is_honest_through_both_stages(start, config):
    seen = []
    request = ImageRequest(config.with_(steps=5, refiner=RefinerConfig(handover=0.5)), "a cat", 1)
    engine = start()
    job = engine.submit(request, on_step=lambda *step: seen.append(step))
    image = job.result(SECONDS)
    assert seen == [(call, 5) for call in range(1, 6)]
    assert job.progress == (5, 5)
    assert sum(image.record.unet_calls.values()) == 5
    assert set(image.record.unet_calls) == {"base", "refiner"}


def test_a_running_image_is_cancelled_within_a_step(start, config):
    engine, calls = start(), []
    others = [engine.submit(request) for request in requests(config, 2)]
    job = engine.submit(
        ImageRequest(config.with_(steps=50), "a long one", 1),
        on_step=lambda call, _: (calls.append(call), job.cancel()),
    )
    with pytest.raises(Cancelled):
        job.result(SECONDS)
    assert job.state == "cancelled"
    assert [other.result(SECONDS) is not None for other in others] == [True, True]
    assert calls == [1]


def test_a_queued_image_is_cancelled_without_a_step(start, config):
    engine, calls = start(rows=2), []
    gate, held = hold(engine, config)
    waiting = engine.submit(ImageRequest(config, "waiting", 1), on_step=lambda *step: calls.append(step))
    assert waiting.state == "queued"
    assert waiting.progress == (0, 0)
    waiting.cancel()
    gate.opened.set()
    with pytest.raises(Cancelled):
        waiting.result(SECONDS)
    assert (waiting.state, calls) == ("cancelled", [])
    assert held.result(SECONDS) is not None


def test_cancelling_a_finished_image_leaves_it_finished(start, config):
    engine = start()
    job = engine.submit(ImageRequest(config, "a cat", 1))
    image = job.result(SECONDS)
    job.cancel()
    engine.draw(ImageRequest(config, "another", 2))
    assert (job.state, job.result()) == ("done", image)


def test_a_job_that_others_ended_does_not_stop_the_engine(start, config):
    """A service that stops waits for no step."""
    engine, gate = start(), Gate()
    job = engine.submit(ImageRequest(config, "a cat", 1), on_step=gate)
    assert gate.reached.wait(SECONDS)
    assert job.fail(Cancelled("the service stops"))
    gate.opened.set()
    with pytest.raises(Cancelled):
        job.result(SECONDS)
    assert engine.draw(ImageRequest(config, "another", 2)).image.size == (64, 64)
    assert engine.healthy


def test_an_interrupted_draw_cancels_its_image(start, config, monkeypatch):
    engine, jobs, submit = start(), [], Engine.submit

    def interrupted(self, request, on_step=None):
        job = submit(self, request, on_step)
        jobs.append(job)
        monkeypatch.setattr(job, "result", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        return job

    monkeypatch.setattr(Engine, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.draw(ImageRequest(config.with_(steps=200), "a cat", 1))
    assert isinstance(jobs[0].exception(SECONDS), Cancelled)


def test_close_cancels_what_is_left_and_refuses_more(start, config):
    engine, gate = start(rows=2), Gate()
    jobs = [engine.submit(ImageRequest(config.with_(steps=50), "a cat", seed), on_step=gate) for seed in range(3)]
    assert gate.reached.wait(SECONDS)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while engine.healthy:
        time.sleep(0.001)
    gate.opened.set()
    closing.join(SECONDS)
    assert not closing.is_alive()
    assert [type(job.exception(0)) for job in jobs] == [Cancelled] * 3
    with pytest.raises(EngineStopped, match="the engine is closed"):
        engine.submit(ImageRequest(config, "a cat", 1))


def test_a_image_that_is_being_admitted_is_cancelled_by_close_too(start, config, monkeypatch):
    engine, inside, go = start(), threading.Event(), threading.Event()

    class Slow(Trajectory):
        def __init__(self, *arguments) -> None:
            inside.set()
            assert go.wait(SECONDS)
            super().__init__(*arguments)

    monkeypatch.setattr(engines, "Trajectory", Slow)
    job = engine.submit(ImageRequest(config.with_(steps=500), "a cat", 1))
    assert inside.wait(SECONDS)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while engine.healthy:
        time.sleep(0.001)
    go.set()
    closing.join(SECONDS)
    assert isinstance(job.exception(0), Cancelled)


def test_a_full_queue_refuses_at_once(start, config):
    engine = start(rows=2, max_queue=2)
    gate, held = hold(engine, config)
    jobs = [engine.submit(ImageRequest(config, "waiting", seed)) for seed in range(2)]
    with pytest.raises(QueueFull, match="2 images are waiting, and no more are taken"):
        engine.submit(ImageRequest(config, "one too many", 3))
    gate.opened.set()
    assert [job.result(SECONDS).image.size for job in (held, *jobs)] == [(64, 64)] * 3


# --- failure ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["inputs", "take"])
def test_a_image_that_fails_fails_alone(start, config, monkeypatch, method):
    engine = start()
    asked = requests(config, 4)
    undisturbed = [latents(engine.submit(request)) for request in asked]
    honest = getattr(Trajectory, method)

    def broken(self, *arguments):
        if self.request.prompt == "culprit" and self.calls == 1:
            raise ArithmeticError("the culprit's own")
        return honest(self, *arguments)

    monkeypatch.setattr(Trajectory, method, broken)
    gate, held = hold(engine, config)
    jobs = [engine.submit(request) for request in (*asked[:2], ImageRequest(config, "culprit", 9), *asked[2:])]
    gate.opened.set()
    held.result(SECONDS)
    culprit = jobs.pop(2)
    with pytest.raises(ArithmeticError, match="the culprit's own"):
        culprit.result(SECONDS)
    assert culprit.state == "failed"
    for job, expected in zip(jobs, undisturbed, strict=True):
        assert close_to(latents(job), expected)
    assert engine.healthy


def test_a_job_that_cannot_start_fails_alone(start, config):
    engine = start()
    hopeless = ImageRequest(
        config.with_(scheduler="dpmpp_2m", refiner=RefinerConfig(handover=0.9999)), "no step for the refiner", 1
    )
    job, other = engine.submit(hopeless), engine.submit(ImageRequest(config, "a cat", 1))
    with pytest.raises(ConfigError, match="refiner has none"):
        job.result(SECONDS)
    assert other.result(SECONDS).image.size == (64, 64)


def test_out_of_memory_halves_the_row_budget_and_loses_nothing(start, config, monkeypatch, caplog):
    engine = start(rows=16)
    asked = requests(config, 6)
    undisturbed = [latents(engine.submit(request)) for request in asked]
    predict, sizes = engine._predict, []

    def small(name, inputs):
        rows = sum(len(each.timesteps) for each in inputs)
        sizes.append(rows)
        if rows > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(name, inputs)

    monkeypatch.setattr(engine, "_predict", small)
    gate, held = hold(engine, config)
    jobs = [engine.submit(request) for request in asked]
    with caplog.at_level(logging.WARNING):
        gate.opened.set()
        held.result(SECONDS)
        for job, expected in zip(jobs, undisturbed, strict=True):
            assert close_to(latents(job), expected)
    assert [size for size in sizes if size > 5] == [12, 6, 6], "once whole, once in halves, never again"
    assert engine.rows == 3
    assert f"a call has at most {engine.rows} rows" in caplog.text
    assert engine.healthy


def test_what_a_call_held_that_ran_out_of_memory_is_free_before_the_next(start, config, monkeypatch):
    engine, held = start(), []
    predict = engine._predict

    def small(name, inputs):
        assert not any(reference() is not None for reference in held), "memory is still held"
        if len(inputs) > 1:
            activations = torch.zeros(8)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(name, inputs)

    monkeypatch.setattr(engine, "_predict", small)
    gate, first = hold(engine, config)
    jobs = [engine.submit(ImageRequest(config, "a cat", seed)) for seed in range(3)]
    gate.opened.set()
    assert [job.result(SECONDS).image.size for job in (first, *jobs)] == [(64, 64)] * 4
    assert held


def test_out_of_memory_of_a_single_image_is_its_failure(start, config, monkeypatch):
    engine = start()

    def never(name, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_predict", never)
        with pytest.raises(torch.OutOfMemoryError):
            engine.draw(ImageRequest(config, "a cat", 1))
    assert engine.draw(ImageRequest(config, "a cat", 1)).image.size == (64, 64)


def test_a_callback_that_fails_harms_nobody(start, config, caplog):
    engine, calls = start(), []

    def bad(*step: int) -> None:
        calls.append(step)
        raise RuntimeError("the callback's own")

    job = engine.submit(ImageRequest(config, "a cat", 1), on_step=bad)
    assert job.result(SECONDS).image.size == (64, 64)
    assert calls == [(1, 3)]
    assert "the image goes on without it" in caplog.text


def test_a_vae_that_overflows_is_named(start, config, monkeypatch):
    engine = start()
    honest = type(engine.models).decode

    def overflowing(self, latent):
        pixels = honest(self, latent)
        pixels[0] = np.nan
        return pixels

    gate, held = hold(engine, config)
    bad, good = (engine.submit(ImageRequest(config, "a cat", seed)) for seed in (1, 2))
    monkeypatch.setattr(type(engine.models), "decode", overflowing)
    gate.opened.set()
    for job in (held, bad):
        with pytest.raises(ImageError, match=r"the VAE overflowed.*float16.*use float32 or bfloat16"):
            job.result(SECONDS)
    assert good.result(SECONDS).image.size == (64, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_vae_that_overflows_decodes_again_in_float32(tiny_models, caplog, monkeypatch, dtype):
    models = replace(tiny_models, vae=copy.deepcopy(tiny_models.vae).to(dtype))
    honest, dtypes = models.vae.decode, []

    def overflowing(latents, **options):  # a CPU decodes image by image: the second of each round overflows
        dtypes.append(latents.dtype)
        answer = honest(latents, **options)
        if latents.dtype != torch.float32 and len(dtypes) % 3 == 2:
            answer[0][:] *= torch.inf
        return answer

    some = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    undisturbed = models.decode(some)
    monkeypatch.setattr(models.vae, "decode", overflowing)
    pixels = models.decode(some)
    assert np.isfinite(pixels).all()
    assert [bool((pixels[index] == undisturbed[index]).all()) for index in range(3)] == [True, False, True]
    assert np.abs(pixels[1] - tiny_models.decode(some)[1]).max() < 0.02
    assert dtypes == [dtype] * 3 + [torch.float32]
    assert "the VAE overflowed" in caplog.text
    assert models.vae.dtype == dtype
    dtypes.clear()
    monkeypatch.setattr(models.vae, "decode", lambda latents, **_: overflowing(latents) if latents.dtype == dtype else 1 / 0)  # noqa: E501  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        models.decode(some)
    assert models.vae.dtype == dtype


def test_a_decode_that_fails_for_one_is_tried_apart(start, config, monkeypatch):
    engine, sizes = start(), []
    honest = type(engine.models).decode

    def small(self, latent):
        sizes.append(len(latent))
        if len(latent) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(self, latent)

    monkeypatch.setattr(type(engine.models), "decode", small)
    gate, held = hold(engine, config)
    jobs = [engine.submit(ImageRequest(config, "a cat", seed)) for seed in range(3)]
    gate.opened.set()
    assert [job.result(SECONDS).image.size for job in (held, *jobs)] == [(64, 64)] * 4
    assert sizes == [1, 3, 1, 1, 1]


class Catastrophe(BaseException):
    """What no `except Exception` stops."""


@pytest.mark.parametrize("place", ["_started", "_use_threads", "_step", "_decode", "Trajectory"])
def test_when_the_thread_fails_everybody_learns_it(start, config, monkeypatch, place):
    engine, gate = start(rows=4), Gate()
    asked = [ImageRequest(config.with_(steps=1), "a cat", seed) for seed in range(4)]
    jobs = [engine.submit(asked[0], on_step=gate)]
    assert gate.reached.wait(SECONDS)

    def fails(*_):
        raise Catastrophe("the ground is gone")

    monkeypatch.setattr(engines if place == "Trajectory" else engine, place, fails)
    jobs += [engine.submit(request) for request in asked[1:]]
    gate.opened.set()
    failures = [job.exception(SECONDS) for job in jobs[0 if place == "_decode" else 1 :]]
    assert {type(failure) for failure in failures} == {EngineStopped}
    assert all("the ground is gone" in str(failure) for failure in failures)
    assert all(isinstance(failure.__cause__, Catastrophe) for failure in failures)
    assert not engine.healthy
    assert "the ground is gone" in engine.failure
    with pytest.raises(EngineStopped, match="the ground is gone"):
        engine.submit(asked[0])
    engine.close()


# --- what an engine refuses, and what it records ---------------------------------------------------------------------


OTHER_MODELS = {
    "base": {"base": "nano"},
    "revision": {"revision": "0" * 40},
    "vae": {"vae": "nano"},
    "revision of the vae": {"vae_revision": "0" * 40},
    "checksum": {"sha256": "0" * 64},
    "checksum of the vae": {"vae_sha256": "0" * 64},
    "configurations": {"config": "nano"},
    "revision of the configurations": {"config_revision": "0" * 40},
    "prediction": {"prediction_type": "v_prediction"},
    "terminal signal": {"zero_snr": True},
}
OTHER_REFINERS = {
    "refiner": {"refiner": "nano"},
    "revision of the refiner": {"refiner_revision": "0" * 40},
    "checksum of the refiner": {"refiner_sha256": "0" * 64},
}


def refined(config):
    return ImageRequest(
        config, "a cat", 1, SourceImage(Image.new("RGB", (64, 64)), 0.5, image_record(), stage="refiner")
    )


def test_the_record_names_what_the_processor_can_do(engine, config):
    record = engine.draw(ImageRequest(config.with_(steps=1), "a cat", 1)).record
    assert record.runtime["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert engine.runtime.items() >= engine.profile.to_dict().items()


@pytest.mark.parametrize("change", OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_a_request_of_another_model_is_refused_at_once(engine, config, change):
    asked = config.with_(model=config.model.with_(**change))
    with pytest.raises(ModelMismatch, match="model must be the one that this engine was loaded for") as caught:
        engine.submit(ImageRequest(asked, "a cat", 1))
    assert str(asked.model.to_dict()) in str(caught.value)
    assert engine.stats().queued == engine.stats().running == 0


@pytest.mark.parametrize("change", OTHER_REFINERS.values(), ids=OTHER_REFINERS)
def test_another_refiner_is_refused_where_the_request_uses_it(engine, config, change):
    other = config.with_(model=config.model.with_(**change))
    for request in (ImageRequest(other.with_(refiner=RefinerConfig()), "a cat", 1), refined(other)):
        with pytest.raises(ModelMismatch, match="loaded for"):
            engine.submit(request)
    assert (
        max_difference(
            engine.draw(ImageRequest(other, "a cat", 1)).image, engine.draw(ImageRequest(config, "a cat", 1)).image
        )
        == 0
    )


def test_a_refiner_that_the_engine_does_not_have_is_refused_at_once(tiny_models, config):
    alone = replace(tiny_models, refiner=None, ref=tiny_models.ref.with_(refiner=None))
    with Engine(alone, RuntimeProfile(device="cpu", dtype="float32"), {}) as engine:
        for request in (ImageRequest(config.with_(refiner=RefinerConfig()), "a cat", 1), refined(config)):
            with pytest.raises(ModelMismatch, match="loaded for"):
                engine.submit(request)
        assert engine.healthy


def test_the_record_says_all_that_decides_the_pixels(start, config):
    request = ImageRequest(config.with_(scheduler="dpmpp_2m_karras", negative_prompt="blurry"), "a cat", 17)
    image = start().draw(request)
    record = image.record
    assert (record.config, record.digest) == (request.config, request.config.digest)
    assert (record.prompt, record.seed, record.config.negative_prompt) == ("a cat", 17, "blurry")
    assert record.sampler == "DPM++ 2M Karras"
    assert record.scheduler["class"] == "DPMSolverMultistepScheduler"
    assert record.scheduler["use_karras_sigmas"] is True
    assert record.weights == {"base": "random"}
    assert record.runtime["dtype"] == "float32"
    assert set(record.libraries) == {"diffusers", "torch", "transformers"}
    assert (record.source, record.strength, record.id) == (None, None, None)
    assert set(image.timings) == {"queued_ms", "denoise_ms", "total_ms"}
    assert ImageRecord.read(record.to_dict(), "a test") == record, "it comes back from its file"


def test_options_of_one_scheduler_do_not_leak_into_the_next(start, config):
    engine = start()
    names = ("euler", "dpmpp_2m_sde_karras", "dpmpp_2m", "euler")
    records = [engine.draw(ImageRequest(config.with_(scheduler=name), "a cat", 1)).record.scheduler for name in names]
    assert [record["use_karras_sigmas"] for record in records] == [False, True, False, False]
    assert records[2]["algorithm_type"] == "dpmsolver++"
    assert records[0] == records[3]


def test_a_watermark_moves_pixels(start, config):
    engine = start()
    plain = config.with_(width=256, height=256, steps=1)
    one, marked = (engine.draw(ImageRequest(asked, "a cat", 1)).image for asked in (plain, plain.with_(watermark=True)))
    assert max_difference(one, marked) > 1e-3
    assert read_watermark(marked) != read_watermark(one)


def test_another_model_draws_another_image(start, config, lively_model):
    request = ImageRequest(config.with_(refiner=RefinerConfig(handover=0.5)), "a cat", 1)
    ref = ModelRef(base=str(lively_model / "base"), refiner=str(lively_model / "refiner"))
    profile = RuntimeProfile(device="cpu", dtype="float32")
    with Engine.load(config.with_(model=ref), profile) as other:
        theirs = other.draw(replace(request, config=request.config.with_(model=ref)))
    mine = start().draw(request)
    assert max_difference(mine.image, theirs.image) > 1e-3
    assert mine.record.digest != theirs.record.digest
    assert theirs.record.weights["refiner"].startswith("sha256 ")
