"""The OpenAI images API, for the clients people already have."""

import asyncio
import base64
import io
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image
from sse_starlette import ServerSentEvent
from starlette.responses import Response

from sdxl_lab.job import ImageRequest, Job
from service.api.images import NOT_DRAWING, convert, while_connected
from service.api.negotiation import EVENTS, IdempotencyKey, client_of
from service.api.openai_schemas import (
    PREFIX,
    ImagesAnswer,
    ImagesRequest,
    Model,
    ModelList,
    answers,
    check_model,
    error_of,
)
from service.api.openai_schemas import Image as Answered
from service.api.problems import known, problem_of
from service.api.sse import EventStream, described
from service.deployment import Stopping
from service.jobs.errors import CancelledByClient
from service.jobs.events import Done, Event, Step, events
from service.jobs.manager import JobManager, Key, Terms, fingerprint
from service.jobs.registry import Stored

router = APIRouter(prefix=PREFIX, tags=["OpenAI"])
log = logging.getLogger(__name__)

NOTHING_METERED = {
    "input_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
STREAM = """\
event: image_generation.partial_image
data: {"type": "image_generation.partial_image", "partial_image_index": 0, "b64_json": "iVBORw0KGgo...", ...}

event: image_generation.completed
data: {"type": "image_generation.completed", "b64_json": "iVBORw0KGgo...", ...}
"""


@router.post(
    "/images/generations",
    response_model=ImagesAnswer,
    response_model_exclude_none=True,
    responses={
        200: {
            "description": "The images; with `stream` their events",
            "content": {
                EVENTS: described(STREAM, "image_generation.partial_image", "image_generation.completed", "error")
            },
            "headers": {"X-Image-Id": {"description": "their ids, in order", "schema": {"type": "string"}}},
        },
        **answers(
            "invalid-value",
            "model-not-found",
            "key-reused",
            "cancelled-by-client",
            "body-too-large",
            "body-too-slow",
            *NOT_DRAWING,
        ),
    },
)
async def generations(asked: ImagesRequest, request: Request, idempotency_key: IdempotencyKey = None) -> Any:
    """Draw one to ten images of a prompt. They share the engine's calls, each has a seed of its own, and if one of
    them fails the others are cancelled."""
    manager: JobManager = request.app.state.jobs
    check_model(asked.model, manager.deployment.slot.folder.name)
    jobs = await _submitted(manager, _requests(asked, manager, request, idempotency_key))
    ids = {"X-Image-Id": ", ".join(str(job.id) for job in jobs)}
    if asked.stream:
        return EventStream(_told(asked, request, jobs), lambda: _leave(manager, jobs), ids)
    try:
        outcomes = await while_connected(request, _all(jobs))
    finally:
        _leave(manager, jobs)
    images = await asyncio.gather(*(_answered(asked, request, outcome) for outcome in outcomes))
    answer = ImagesAnswer(
        created=int(max(outcome.image.created for outcome in outcomes)),
        data=images,
        output_format=asked.form,
        size=_size(jobs[0]),
        quality=asked.told_quality,
        warnings=list(outcomes[0].image.warnings) or None,  # all have the same prompt
    )
    return Response(answer.model_dump_json(exclude_none=True), headers=ids, media_type="application/json")


@router.get("/models", response_model=ModelList, responses=answers())
async def models(request: Request) -> ModelList:
    """The slot that is served. Its name and `auto` mean it."""
    return ModelList(data=[_model(request.app.state.jobs)])


@router.get("/models/{name}", response_model=Model, responses=answers("model-not-found"))
async def model(name: str, request: Request) -> Model:
    """The slot that is served, by its name or as `auto`."""
    manager: JobManager = request.app.state.jobs
    check_model(name, manager.deployment.slot.folder.name)
    return _model(manager)


def _model(manager: JobManager) -> Model:
    evidence = manager.deployment.slot.evidence
    promoted = datetime.fromisoformat(evidence.when).timestamp() if evidence else 0
    return Model(id=manager.deployment.slot.folder.name, created=int(promoted))


def _requests(
    asked: ImagesRequest, manager: JobManager, request: Request, key: str | None
) -> list[tuple[ImageRequest, Terms]]:
    """A request for each image: neighbouring seeds, and with an idempotency key a key for each."""
    slot = manager.deployment.slot
    config = asked.over(slot.config, slot.limits)
    scope = f"{PREFIX} {client_of(request)}"  # keys of /generate are others
    seed = secrets.randbelow(2**32) if key is None else Key(scope, key).seed
    mark = fingerprint({"request": type(asked).__name__, **asked.model_dump(exclude_none=True)})
    return [
        (
            ImageRequest(config, asked.prompt, seed + index),
            Terms(mark, None if key is None else Key(scope, f"{key}/{index}")),
        )
        for index in range(asked.count)
    ]


async def _submitted(manager: JobManager, requests: Sequence[tuple[ImageRequest, Terms]]) -> list[Job[Stored]]:
    """All of them, or none and what went wrong."""
    jobs: list[Job[Stored]] = []
    try:
        for each in requests:
            jobs.append(await manager.submit(*each))
    except BaseException as error:
        _cancel(jobs, Stopping() if manager.deployment.closing else error)
        _leave(manager, jobs)
        raise
    return jobs


async def _all(jobs: Sequence[Job[Stored]]) -> list[Stored]:
    """The outcomes of all, or what went wrong first."""
    try:
        return await asyncio.gather(*jobs)
    except Exception as error:
        _cancel(jobs, error)
        raise


def _cancel(jobs: Sequence[Job[Stored]], error: BaseException) -> None:
    """One image failed: nobody gets the others. A service that stops draws those with a key once it is back."""
    reason = error if isinstance(error, Stopping) else CancelledByClient("another image of the request failed")
    for job in jobs:
        job.cancel(reason)


def _leave(manager: JobManager, jobs: Sequence[Job[Stored]]) -> None:
    for job in jobs:
        manager.leave(job)


def _size(job: Job[Stored]) -> str:
    width, height = job.request.size
    return f"{width}x{height}"


async def _answered(asked: ImagesRequest, request: Request, outcome: Stored) -> Answered:
    if asked.response_format == "url":
        url = request.url_for("download", id=str(outcome.image.id))
        wanted = {} if asked.form == "png" else {"format": asked.form, "quality": asked.compression}
        return Answered(url=str(url.include_query_params(**wanted)))
    return Answered(b64_json=await _encoded(asked, request.app.state.jobs, outcome))


async def _encoded(asked: ImagesRequest, manager: JobManager, outcome: Stored) -> str:
    png = await manager.png_of(outcome)
    if asked.form != "png":
        png = await asyncio.to_thread(convert, png, asked.form, asked.compression)
    return base64.b64encode(png).decode()


# --- events ----------------------------------------------------------------------------------------------------------


async def _told(asked: ImagesRequest, request: Request, jobs: Sequence[Job[Stored]]) -> AsyncIterator[ServerSentEvent]:
    """`image_generation.partial_image` with each preview, `image_generation.completed` with each image, or an error.

    `image_index`, which is ours, says which of several images an event is about.
    """
    manager: JobManager = request.app.state.jobs
    shown = [0] * len(jobs)
    try:
        async for index, event in _merged(jobs, asked.partial_images or 0):
            more: dict[str, Any] = {"image_index": index}
            if isinstance(event, Step) and event.preview is not None:
                kind = "partial_image"
                more["b64_json"] = await asyncio.to_thread(_partial, asked, event.preview, jobs[index])
                more["partial_image_index"] = shown[index]
                shown[index] += 1
            elif isinstance(event, Done):
                kind = "completed"
                more["b64_json"] = await _encoded(asked, manager, event.stored)
                more["usage"] = NOTHING_METERED
                if event.stored.image.warnings:
                    more["warnings"] = list(event.stored.image.warnings)
            else:
                continue
            content = {
                "type": f"image_generation.{kind}",
                "created_at": int(time.time()),
                "size": _size(jobs[index]),
                "quality": asked.told_quality,
                "background": "opaque",
                "output_format": asked.form,
                **more,
            }
            yield ServerSentEvent(json.dumps(content), event=content["type"])
    except Exception as error:
        _cancel(jobs, error)
        request_id = request.state.request_id
        if known(error) is None:
            log.error("request %s failed", request_id, exc_info=error)
        yield ServerSentEvent(
            json.dumps(error_of(problem_of(error, request_id, manager.deployment.retry_after))), event="error"
        )


async def _merged(jobs: Sequence[Job[Stored]], previews: int) -> AsyncIterator[tuple[int, Event]]:
    """The events of all, as they happen, each with its image's index; or what went wrong first."""
    happened: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()

    async def watch(index: int, job: Job[Stored]) -> None:
        try:
            async for event in events(job, previews):
                happened.put_nowait((index, event))
        except Exception as error:
            happened.put_nowait((index, error))

    watching = [asyncio.create_task(watch(index, job)) for index, job in enumerate(jobs)]
    left = len(jobs)
    try:
        while left:
            index, event = await happened.get()
            if isinstance(event, Exception):
                raise event
            left -= isinstance(event, Done)
            yield index, event
    finally:
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)


def _partial(asked: ImagesRequest, preview: Image.Image, job: Job[Stored]) -> str:
    """A preview in the size and form of the image that it announces."""
    image = preview.resize(job.request.size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    options = {} if asked.compression is None else {"quality": asked.compression}
    image.save(buffer, asked.form.upper(), **options)
    return base64.b64encode(buffer.getvalue()).decode()
