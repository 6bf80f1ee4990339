"""Images: draw, refine, list, download, cancel, delete."""

import asyncio
import hashlib
import io
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import JSONResponse, Response

from sdxl_lab.config import ConfigError
from sdxl_lab.images import open_image
from service.api.negotiation import EVENTS, FORMS, JSON, Wish, wish
from service.api.problems import answers
from service.api.schemas import (
    Accepted,
    Drawn,
    GenerateRequest,
    ImageInfo,
    ImagePage,
    Refined,
    RefineRequest,
    Wanted,
)
from service.api.sse import EventStream, described, told
from service.jobs.job import Drawing, Order, fingerprint
from service.jobs.manager import Studio
from service.jobs.store import CURSOR, UnknownImage
from service.server.middleware import ClientGone

router = APIRouter(tags=["images"])
Asked = Annotated[Wish, Depends(wish)]

NOT_DRAWING = ("not-ready", "stopping", "engine-stopped", "queue-full", "store-refused", "store-unreachable")
STREAM = """\
event: queued
data: {"id": "0b8f...", "position": 1, "eta": 2.4}

event: step
data: {"step": 1, "steps": 25}

event: done
data: {"id": "0b8f...", "url": "/download/0b8f...", "seed": 7, ...}
"""


def _header(description: str, kind: str = "string") -> dict[str, Any]:
    return {"description": description, "schema": {"type": kind}}


def _link(operation: str) -> dict[str, Any]:
    return {"operationId": operation, "parameters": {"id": "$response.body#/id"}}


def _drawing_answers(model: type[Drawn], *kinds: str) -> dict[int | str, dict[str, Any]]:
    """What a path that draws answers, for OpenAPI."""
    binary = {form: {"schema": {"type": "string", "format": "binary"}} for form in FORMS}
    events = {EVENTS: described(STREAM, "queued", "step", "done", "error")}
    return {
        200: {
            "model": model,
            "description": "The image is drawn and stored. By `Accept`: JSON, the image itself, or its events",
            "content": {**binary, **events},
            "headers": {
                "X-Image-Id": _header("the image's id, where the answer is the image itself"),
                "X-Seed": _header("its seed, where the answer is the image itself", "integer"),
                "X-Config-Digest": _header("the promoted configuration's digest"),
                "X-Accel-Buffering": _header("`no`, where the answer is a stream of events"),
            },
            "links": {name: _link(name) for name in ("image", "download", "delete")}
            | {"refine": {"operationId": "refine", "requestBody": {"id": "$response.body#/id"}}},
        },
        202: {
            "model": Accepted,
            "description": "With `Prefer: respond-async`: the image will be drawn",
            "headers": {
                "Location": _header("where its state is told"),
                "Preference-Applied": _header("`respond-async`"),
            },
            "links": {name: _link(name) for name in ("image", "cancel")},
        },
        **answers(
            "invalid-value",
            "body-too-large",
            "body-too-slow",
            "key-reused",
            "cancelled-by-client",
            *NOT_DRAWING,
            *kinds,
        ),
    }


@router.post(
    "/generate",
    response_model=Drawn,
    response_model_exclude_defaults=True,
    responses=_drawing_answers(Drawn),
)
async def generate(asked: GenerateRequest, request: Request, wish: Asked) -> Any:
    """Draw one image from a prompt."""
    studio: Studio = request.app.state.studio

    async def order() -> Order:
        slot = studio.served.slot
        return Order(asked.over(slot.config, slot.limits), asked.prompt, asked.seed, **_terms(wish, asked))

    return await _answer(request, wish, await _submitted(studio, wish, asked, order), Drawn)


@router.post(
    "/refine",
    response_model=Refined,
    response_model_exclude_defaults=True,
    responses=_drawing_answers(Refined, "unknown-image", "still-drawing"),
)
async def refine(asked: RefineRequest, request: Request, wish: Asked) -> Any:
    """Go over a stored image again with the refiner."""
    studio: Studio = request.app.state.studio
    studio.served.ready_engine()

    async def order() -> Order:
        source = await studio.source(asked.id, asked.strength)
        slot = studio.served.slot
        config = asked.over(slot.config, slot.limits, source.record, source.image.size)
        prompt = source.record.prompt if asked.prompt is None else asked.prompt
        return Order(config, prompt, asked.seed, source, **_terms(wish, asked))

    return await _answer(request, wish, await _submitted(studio, wish, asked, order), Refined)


async def _submitted(
    studio: Studio, wish: Wish, asked: GenerateRequest | RefineRequest, order: Callable[[], Awaitable[Order]]
) -> Drawing:
    """The order's drawing. A key that was seen before stands for its image even where the order could not be made
    any more: the source was deleted, or a promotion narrowed the limits."""
    try:
        made = await order()
    except (ConfigError, UnknownImage):
        terms = _terms(wish, asked)
        drawing = None if wish.key is None else await studio.repeated(wish.scope, wish.key, terms["fingerprint"])
        if drawing is None:
            raise
        return drawing
    return await studio.submit(made)


def _terms(wish: Wish, asked: GenerateRequest | RefineRequest) -> dict[str, Any]:
    body = {"request": type(asked).__name__, **asked.model_dump(exclude_none=True)}
    return {"key": wish.key, "scope": wish.scope, "lasting": wish.later, "fingerprint": fingerprint(body)}


async def _answer(request: Request, wish: Wish, drawing: Drawing, shape: type[Drawn]) -> Response | Drawn:
    """Wait for the drawing, and answer as it is wished."""
    studio: Studio = request.app.state.studio
    prefix = request.scope.get("root_path", "")
    if wish.later:
        place = f"{prefix}/images/{drawing.id}"
        headers = {"Location": place, "Preference-Applied": "respond-async"}
        return JSONResponse(Accepted(id=str(drawing.id), url=place).model_dump(), 202, headers)
    if wish.form == EVENTS:

        def answer(record: Mapping[str, Any]) -> dict[str, Any]:
            return shape.of(record, prefix).model_dump(exclude_defaults=True)

        request_id = request.state.request_id
        return EventStream(told(drawing, answer, wish.previews, request_id, studio.served.retry_after), drawing.leave)
    try:
        record = await while_connected(request, drawing.result())
    finally:
        drawing.leave()
    if wish.form == JSON:
        return shape.of(record, prefix)
    content = await _formed(await studio.stored(record["id"]), wish.form.removeprefix("image/"), None)
    return Response(content, headers={"X-Image-Id": record["id"], "X-Seed": str(record["seed"])}, media_type=wish.form)


@router.get(
    "/images",
    response_model=ImagePage,
    response_model_exclude_none=True,
    responses=answers("invalid-value", "store-unreachable"),
)
async def images(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100, description="images on a page")] = 24,
    cursor: Annotated[str | None, Query(pattern=CURSOR, description="`next` of the page before")] = None,
) -> ImagePage:
    """The stored images, the newest first."""
    page = await request.app.state.studio.page(limit, cursor)
    prefix = request.scope.get("root_path", "")
    return ImagePage(images=[ImageInfo.of(record, prefix) for record in page.records], next=page.cursor)


@router.get(
    "/images/{id}",
    response_model=ImageInfo,
    response_model_exclude_none=True,
    responses=answers("unknown-image", "store-unreachable"),
)
async def image(id: str, request: Request) -> ImageInfo:
    """What is known of an image: stored, on its way, failed or cancelled. Those without an image are forgotten after
    some minutes, or a day if they were to last."""
    state, found = await request.app.state.studio.find(id)
    prefix = request.scope.get("root_path", "")
    if isinstance(found, Drawing):
        step, steps = found.progress
        on_its_way = {} if found.over else {"position": found.position, "eta": found.eta, "step": step, "steps": steps}
        return ImageInfo.of(found.asked, prefix, state, **on_its_way)
    return ImageInfo.of(found, prefix, state, **({"record": found} if state == "done" else {}))


@router.delete(
    "/images/{id}",
    status_code=204,
    responses=answers("unknown-image", "not-over", "store-refused", "store-unreachable"),
)
async def delete(id: str, request: Request) -> Response:
    """Delete a stored image and its record."""
    await request.app.state.studio.delete(id)
    return Response(status_code=204)


@router.delete("/jobs/{id}", status_code=204, responses=answers("unknown-image", "already-over", "store-unreachable"))
async def cancel(id: str, request: Request) -> Response:
    """Cancel an image that is queued or running, at its next step. Whoever waits for it is told."""
    await request.app.state.studio.cancel(id)
    return Response(status_code=204)


@router.get(
    "/download/{id}",
    response_class=Response,
    responses={
        200: {
            "description": "The image",
            "content": {form: {"schema": {"type": "string", "format": "binary"}} for form in FORMS},
            "headers": {"ETag": _header("of this form"), "Cache-Control": _header("the image never changes")},
        },
        304: {"description": "The client has this form already", "headers": {"ETag": _header("of this form")}},
        **answers("unknown-image", "still-drawing", "invalid-value", "store-unreachable"),
    },
)
async def download(id: str, request: Request, wanted: Annotated[Wanted, Query()]) -> Response:
    """A stored image: the very PNG, or a WebP or JPEG made of it."""
    png = await request.app.state.studio.stored(id)
    form = "" if wanted.format == "png" else f"-{wanted.format}{wanted.quality or ''}"
    tag = f'"{hashlib.sha256(png).hexdigest()[:32]}{form}"'
    headers = {"ETag": tag, "Cache-Control": "private, max-age=31536000, immutable"}
    if _matches(request.headers.get("if-none-match", ""), tag):
        return Response(status_code=304, headers=headers)
    content = await _formed(png, wanted.format, wanted.quality)
    return Response(content, headers=headers, media_type=f"image/{wanted.format}")


async def while_connected(request: Request, drawing: Coroutine[Any, Any, Any]) -> Any:
    """Await the drawing; raise `ClientGone` if the client leaves first."""
    task = asyncio.ensure_future(drawing)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return await task
    finally:
        task.cancel()
        leaving.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _formed(png: bytes, form: str, quality: int | None) -> bytes:
    return png if form == "png" else await asyncio.to_thread(convert, png, form, quality)


def convert(png: bytes, form: str, quality: int | None) -> bytes:
    """The image as WebP or JPEG; without `quality`, Pillow's own for the form. The record stays in the PNG."""
    buffer = io.BytesIO()
    options = {} if quality is None else {"quality": quality}
    open_image(png).convert("RGB").save(buffer, form.upper(), **options)
    return buffer.getvalue()


def _matches(header: str, tag: str) -> bool:
    """`If-None-Match` by weak comparison (RFC 9110, section 13.1.2)."""
    given = [part.strip().removeprefix("W/") for part in header.split(",")]
    return tag in given or "*" in given
