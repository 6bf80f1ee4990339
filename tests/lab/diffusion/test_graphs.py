"""Graphs without a GPU: the recorder is a stand-in that keeps a call and repeats it on the same buffers."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sdxl_lab.config import RuntimeProfile
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.diffusion.graphs import Graphed
from sdxl_lab.diffusion.models import laid_out
from sdxl_lab.job import ImageRequest
from tests.lab.diffusion.conftest import trajectory_of


class Repeater:
    """Like CUDA's recorder it runs the call once to warm up and once to record. A replay runs it again on the buffers
    as they are then, and overwrites the one answer."""

    def __init__(self, error=None):
        self.recorded, self.replayed, self.error = 0, 0, error

    def __call__(self, call):
        self.recorded += 1
        if self.error is not None:
            raise self.error
        call()
        answer = call()

        def replay():
            self.replayed += 1
            with torch.inference_mode():  # which alone may write what was made in it, as a GPU does without asking
                answer.copy_(call())

        return replay, answer


class SmallUNet:
    """Its answer depends on every input."""

    config = SimpleNamespace(time_cond_proj_dim=None)

    def __init__(self):
        self.rows = []

    def __call__(self, sample, timestep, *, encoder_hidden_states, added_cond_kwargs, timestep_cond=None, return_dict):
        assert not return_dict
        self.rows.append(len(sample))
        cond = () if timestep_cond is None else (3 * timestep_cond,)
        added = sum(each.flatten(1).sum(1) for each in (encoder_hidden_states, *added_cond_kwargs.values(), *cond))
        return (sample * (timestep + added)[:, None],)


def inputs(rows, seed, width=3):
    draw = torch.Generator().manual_seed(seed)
    sample, timestep, hidden = (torch.randn(*shape, generator=draw) for shape in ((rows, width), (rows,), (rows, 2, 2)))
    added = {"text_embeds": torch.randn(rows, 2, generator=draw), "time_ids": torch.randn(rows, 6, generator=draw)}
    return {"sample": sample, "timestep": timestep, "encoder_hidden_states": hidden, "added_cond_kwargs": added}


@pytest.fixture
def repeater():
    return Repeater()


@pytest.fixture
def graphed(repeater):
    return Graphed(SmallUNet(), lambda _: repeater)


def plainly(given):
    sample, timestep = given["sample"], given["timestep"]
    named = {name: value for name, value in given.items() if name not in ("sample", "timestep")}
    return SmallUNet()(sample, timestep, **named, return_dict=False)[0]


def test_each_shape_is_recorded_once_and_then_replayed(graphed, repeater):
    for seed, rows in enumerate((2, 16, 2, 16, 2)):
        given = inputs(rows, seed)
        assert torch.equal(graphed(**given)[0], plainly(given))
    assert (repeater.recorded, repeater.replayed) == (2, 5)
    assert graphed.shapes == [(16, 3), (2, 3)]


def test_an_answer_outlives_the_next_replay(graphed):
    first, second = inputs(2, 1), inputs(2, 2)
    answer = graphed(**first)[0]
    assert not torch.equal(graphed(**second)[0], answer)
    assert torch.equal(answer, plainly(first))


def test_the_callers_tensors_are_not_the_buffers(graphed):
    first = inputs(2, 1)
    expected = plainly(first)
    graphed(**first)
    graphed(**inputs(2, 2))
    assert torch.equal(plainly(first), expected)
    first["sample"].zero_()
    assert graphed(**inputs(2, 2))[0].any()


def test_another_dtype_or_another_size_is_another_shape(graphed, repeater):
    given = inputs(2, 1)
    for each in (given, given | {"sample": given["sample"].double()}, inputs(2, 1, width=5)):
        assert torch.equal(graphed(**each)[0], plainly(each))
    assert repeater.recorded == 3


def test_what_tells_a_distilled_unet_the_guidance_scale_is_an_input_like_the_others(graphed, repeater):
    for scale in (1.0, 2.0):
        given = inputs(2, 1) | {"timestep_cond": torch.full((2, 4), scale)}
        assert torch.equal(graphed(**given)[0], plainly(given))
    assert repeater.recorded == 1
    graphed(**inputs(2, 1))
    assert repeater.recorded == 2, "a call without it is another"


def test_the_shape_used_longest_ago_is_forgotten(repeater):
    graphed = Graphed(SmallUNet(), lambda _: repeater, most=2)
    for rows in (1, 2, 1, 3):
        graphed(**inputs(rows, rows))
    assert graphed.shapes == [(1, 3), (3, 3)]
    given = inputs(2, 5)
    assert torch.equal(graphed(**given)[0], plainly(given))
    assert repeater.recorded == 4


def test_without_cuda_the_unet_is_called_as_usual():
    graphed = Graphed(SmallUNet())
    given = inputs(2, 1)
    for _ in range(2):
        assert torch.equal(graphed(**given)[0], plainly(given))
    assert graphed.unet.rows == [2, 2]
    assert graphed.shapes == []
    assert graphed.config.time_cond_proj_dim is None


def test_where_recording_fails_the_unet_is_called_as_usual_from_then_on(caplog):
    repeater = Repeater(RuntimeError("operation not permitted when stream is capturing"))
    graphed, given = Graphed(SmallUNet(), lambda _: repeater), inputs(2, 1)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(graphed(**given)[0], plainly(given))
    assert repeater.recorded == 1
    assert [record.message for record in caplog.records] == [
        "CUDA graphs are off, since recording the UNet failed: RuntimeError: operation not permitted when stream is "
        "capturing"
    ]


@pytest.mark.parametrize("hidden", [False, True], ids=["plain", "behind the error of the recording's end"])
def test_memory_that_runs_out_while_recording_is_the_engines_to_handle(graphed, repeater, hidden):
    """It halves its rows. What was recorded is dropped, and recorded again when it is asked for."""
    graphed(**inputs(2, 1))
    exhausted = torch.OutOfMemoryError("tried to allocate 20 GiB")
    repeater.error = exhausted
    if hidden:
        repeater.error = RuntimeError("the recording was invalidated")
        repeater.error.__context__ = exhausted
    with pytest.raises(torch.OutOfMemoryError):
        graphed(**inputs(16, 1))
    assert graphed.shapes == []
    repeater.error = None
    given = inputs(2, 3)
    assert torch.equal(graphed(**given)[0], plainly(given))
    assert graphed.shapes == [(2, 3)]


def test_an_error_of_the_inputs_is_raised_and_ends_no_graphs(graphed, repeater):
    broken = inputs(2, 1) | {"timestep": torch.zeros(3)}
    with pytest.raises(RuntimeError, match="size"):
        graphed(**broken)
    assert repeater.recorded == 0
    graphed(**inputs(2, 1))
    assert repeater.recorded == 1


def test_a_call_that_wants_no_tuple_is_refused(graphed):
    with pytest.raises(ValueError, match="return_dict must be false"):
        graphed(**inputs(2, 1), return_dict=True)


def test_buffers_made_in_inference_mode_can_be_used_outside_it(graphed):
    with torch.inference_mode():
        graphed(**inputs(2, 1))
    given = inputs(2, 2)
    assert torch.equal(graphed(**given)[0], plainly(given))


def test_a_profile_with_graphs_wraps_the_unet_and_one_without_does_not(tiny_models):
    unet = tiny_models.base.unet
    assert laid_out(unet, RuntimeProfile(device="cpu")) is unet
    assert laid_out(unet, RuntimeProfile(device="cpu", graphs=True)).unet is unet


def test_the_engine_draws_the_same_latents_through_graphs(tiny_models, tiny_config, repeater):
    """Guided and unguided images, which share calls of several row counts."""
    asked = [
        ImageRequest(tiny_config.with_(guidance_scale=scale, steps=steps), "a cat", seed)
        for seed, (scale, steps) in enumerate([(3.0, 4), (1.0, 3), (5.0, 2)])
    ]

    def drawn(models):
        with Engine(models, RuntimeProfile(device="cpu", dtype="float32"), {"base": "random"}) as engine:
            latents = []
            for request in asked:  # one after the other: the same calls with and without graphs
                latents.append(trajectory_of(engine.submit(request)).latents)
            return latents

    graphed = Graphed(tiny_models.base.unet, lambda _: repeater)
    wrapped = replace(tiny_models, base=replace(tiny_models.base, unet=graphed))
    for mine, theirs in zip(drawn(wrapped), drawn(tiny_models), strict=True):
        assert torch.equal(mine, theirs)
    assert repeater.replayed == 9
    assert [shape[0] for shape in graphed.shapes] == [1, 2]
