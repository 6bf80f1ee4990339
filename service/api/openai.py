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

from service.api.images import NOT_DRAWING, convert, while_connected
from service.api.negotiation import EVENTS, IdempotencyKey
from service.api.openai_schemas import (
    PREFIX,
    ImagesAnswer,
    ImagesRequest,
    Model,
    Models,
    answers,
    check_model,
    error_of,
)
from service.api.openai_schemas import Image as Answered
from service.api.problems import Stopping, known, problem_of
from service.api.sse import EventStream, described
from service.jobs.job import CancelledByClient, Done, Drawing, Event, Order, Step, derived, fingerprint
from service.jobs.manager import Studio

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
    studio: Studio = request.app.state.studio
    check_model(asked.model, studio.served.slot.folder.name)
    drawings = await _submitted(studio, _orders(asked, studio, request, idempotency_key))
    ids = {"X-Image-Id": ", ".join(str(drawing.id) for drawing in drawings)}
    if asked.stream:
        return EventStream(_told(asked, request, drawings), lambda: _leave(drawings), ids)
    try:
        records = await while_connected(request, _all(drawings))
    finally:
        _leave(drawings)
    images = await asyncio.gather(*(_answered(asked, request, record) for record in records))
    answer = ImagesAnswer(
        created=int(max(record["created"] for record in records)),
        data=images,
        output_format=asked.form,
        size=_size(drawings[0]),
        quality=asked.told_quality,
    )
    return Response(answer.model_dump_json(exclude_none=True), headers=ids, media_type="application/json")


@router.get("/models", response_model=Models, responses=answers())
async def models(request: Request) -> Models:
    """The slot that is served. Its name and `auto` mean it."""
    return Models(data=[_model(request.app.state.studio)])


@router.get("/models/{name}", response_model=Model, responses=answers("model-not-found"))
async def model(name: str, request: Request) -> Model:
    """The slot that is served, by its name or as `auto`."""
    studio: Studio = request.app.state.studio
    check_model(name, studio.served.slot.folder.name)
    return _model(studio)


def _model(studio: Studio) -> Model:
    evidence = studio.served.slot.evidence
    promoted = datetime.fromisoformat(evidence.when).timestamp() if evidence else 0
    return Model(id=studio.served.slot.folder.name, created=int(promoted))


def _orders(asked: ImagesRequest, studio: Studio, request: Request, key: str | None) -> list[Order]:
    """An order for each image: neighbouring seeds, and with an idempotency key a key for each."""
    slot = studio.served.slot
    config = asked.over(slot.config, slot.limits)
    scope = f"{PREFIX} {getattr(request.state, 'client', '')}"  # keys of /generate are others
    seed = secrets.randbelow(2**32) if key is None else derived(scope, key)[1]
    mark = fingerprint({"request": type(asked).__name__, **asked.model_dump(exclude_none=True)})
    return [
        Order(
            config,
            asked.prompt,
            seed + index,
            key=None if key is None else f"{key}/{index}",
            scope=scope,
            fingerprint=mark,
        )
        for index in range(asked.count)
    ]


async def _submitted(studio: Studio, orders: Sequence[Order]) -> list[Drawing]:
    """All of them, or none and what went wrong."""
    drawings: list[Drawing] = []
    try:
        for order in orders:
            drawings.append(await studio.submit(order))
    except BaseException as error:
        _cancel(drawings, Stopping("the service stops") if studio.served.closing else error)
        raise
    return drawings


async def _all(drawings: Sequence[Drawing]) -> list[Any]:
    """The records of all, or what went wrong first."""
    try:
        return await asyncio.gather(*(drawing.result() for drawing in drawings))
    except Exception as error:
        _cancel(drawings, error)
        raise


def _cancel(drawings: Sequence[Drawing], error: BaseException) -> None:
    """One image failed: nobody gets the others. A service that stops draws those with a key once it is back."""
    why = error if isinstance(error, Stopping) else CancelledByClient("another image of the request failed")
    for drawing in drawings:
        drawing.cancel(why)


def _leave(drawings: Sequence[Drawing]) -> None:
    for drawing in drawings:
        drawing.leave()


def _size(drawing: Drawing) -> str:
    config = drawing.asked["config"]
    return f"{config['width']}x{config['height']}"


async def _answered(asked: ImagesRequest, request: Request, record: Any) -> Answered:
    if asked.response_format == "url":
        url = request.url_for("download", id=record["id"])
        wanted = {} if asked.form == "png" else {"format": asked.form, "quality": asked.compression}
        return Answered(url=str(url.include_query_params(**wanted)))
    return Answered(b64_json=await _stored(asked, request.app.state.studio, record["id"]))


async def _stored(asked: ImagesRequest, studio: Studio, image: str) -> str:
    png = await studio.stored(image)
    if asked.form != "png":
        png = await asyncio.to_thread(convert, png, asked.form, asked.compression)
    return base64.b64encode(png).decode()


# --- events ----------------------------------------------------------------------------------------------------------


async def _told(asked: ImagesRequest, request: Request, drawings: Sequence[Drawing]) -> AsyncIterator[ServerSentEvent]:
    """`image_generation.partial_image` with each preview, `image_generation.completed` with each image, or an error.

    `image_index`, which is ours, says which of several images an event is about.
    """
    studio: Studio = request.app.state.studio
    shown = [0] * len(drawings)
    try:
        async for index, event in _merged(drawings, asked.partial_images or 0):
            more: dict[str, Any] = {"image_index": index}
            if isinstance(event, Step) and event.preview is not None:
                kind = "partial_image"
                more["b64_json"] = await asyncio.to_thread(_partial, asked, event.preview, drawings[index])
                more["partial_image_index"] = shown[index]
                shown[index] += 1
            elif isinstance(event, Done):
                kind = "completed"
                more["b64_json"] = await _stored(asked, studio, event.record["id"])
                more["usage"] = NOTHING_METERED
            else:
                continue
            content = {
                "type": f"image_generation.{kind}",
                "created_at": int(time.time()),
                "size": _size(drawings[index]),
                "quality": asked.told_quality,
                "background": "opaque",
                "output_format": asked.form,
                **more,
            }
            yield ServerSentEvent(json.dumps(content), event=content["type"])
    except Exception as error:
        _cancel(drawings, error)
        request_id = request.state.request_id
        if known(error) is None:
            log.error("request %s failed", request_id, exc_info=error)
        yield ServerSentEvent(
            json.dumps(error_of(problem_of(error, request_id, studio.served.retry_after))), event="error"
        )


async def _merged(drawings: Sequence[Drawing], previews: int) -> AsyncIterator[tuple[int, Event]]:
    """The events of all, as they happen, each with its image's index; or what went wrong first."""
    happened: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()

    async def watch(index: int, drawing: Drawing) -> None:
        try:
            async for event in drawing.events(previews):
                happened.put_nowait((index, event))
        except Exception as error:
            happened.put_nowait((index, error))

    watching = [asyncio.create_task(watch(index, drawing)) for index, drawing in enumerate(drawings)]
    left = len(drawings)
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


def _partial(asked: ImagesRequest, preview: Image.Image, drawing: Drawing) -> str:
    """A preview in the size and form of the image that it announces."""
    config = drawing.asked["config"]
    image = preview.resize((config["width"], config["height"]), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    options = {} if asked.compression is None else {"quality": asked.compression}
    image.save(buffer, asked.form.upper(), **options)
    return base64.b64encode(buffer.getvalue()).decode()
