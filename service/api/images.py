"""Images: draw, refine, list, download, cancel, delete."""

import asyncio
import hashlib
import io
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import JSONResponse, Response

from sdxl_lab.config import ConfigError
from sdxl_lab.images import open_image
from sdxl_lab.job import ImageRequest, Job
from service.api.negotiation import EVENTS, FORMS, JSON, Negotiated, negotiate
from service.api.problems import ClientGone, answers
from service.api.schemas import (
    TOLD,
    Accepted,
    DrawnImage,
    GenerateRequest,
    ImageInfo,
    ImagePage,
    RefinedImage,
    RefineRequest,
    Wanted,
)
from service.api.sse import EventStream, described, stream
from service.jobs.manager import Found, JobManager, Terms, fingerprint
from service.jobs.records import StoredImage
from service.jobs.registry import Stored
from service.jobs.store import CURSOR, UnknownImage

router = APIRouter(tags=["images"])
Asked = Annotated[Negotiated, Depends(negotiate)]

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


def _drawing_answers(model: type[DrawnImage], *kinds: str) -> dict[int | str, dict[str, Any]]:
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
    response_model=DrawnImage,
    response_model_exclude_defaults=True,
    responses=_drawing_answers(DrawnImage),
)
async def generate(asked: GenerateRequest, request: Request, negotiated: Asked) -> Any:
    """Draw one image from a prompt."""
    jobs: JobManager = request.app.state.jobs

    async def made() -> ImageRequest:
        slot = jobs.deployment.slot
        config = asked.over(slot.config, slot.limits)
        return ImageRequest(config, asked.prompt, _seed(asked.seed, negotiated), prompt_2=asked.prompt_2)

    return await _answer(request, negotiated, await _submitted(jobs, negotiated, asked, made), DrawnImage)


@router.post(
    "/refine",
    response_model=RefinedImage,
    response_model_exclude_defaults=True,
    responses=_drawing_answers(RefinedImage, "unknown-image", "still-drawing"),
)
async def refine(asked: RefineRequest, request: Request, negotiated: Asked) -> Any:
    """Go over a stored image again with the refiner."""
    jobs: JobManager = request.app.state.jobs
    jobs.deployment.ready_engine()

    async def made() -> ImageRequest:
        source = await jobs.source(asked.id, asked.strength)
        assert source.record is not None, "a stored image has one"
        slot = jobs.deployment.slot
        config = asked.over(slot.config, slot.limits, source.record, source.image.size)
        return ImageRequest(config, seed=_seed(asked.seed, negotiated), source=source, **asked.prompts(source.record))

    return await _answer(request, negotiated, await _submitted(jobs, negotiated, asked, made), RefinedImage)


def _seed(asked: int | None, negotiated: Negotiated) -> int:
    if asked is not None:
        return asked
    return secrets.randbelow(2**32) if negotiated.key is None else negotiated.key.seed  # JavaScript's numbers hold it


async def _submitted(
    jobs: JobManager,
    negotiated: Negotiated,
    asked: GenerateRequest | RefineRequest,
    made: Callable[[], Awaitable[ImageRequest]],
) -> Job[Stored]:
    """The job. A key that was seen before stands for its image even where the request could not be made any more: the
    source was deleted, or a promotion narrowed the limits."""
    body = {"request": type(asked).__name__, **asked.model_dump(exclude_none=True)}
    terms = Terms(fingerprint(body), negotiated.key, durable=negotiated.later)
    try:
        request = await made()
    except (ConfigError, UnknownImage):
        job = None if terms.key is None else await jobs.repeated(terms)
        if job is None:
            raise
        return job
    return await jobs.submit(request, terms)


async def _answer(
    request: Request, negotiated: Negotiated, job: Job[Stored], shape: type[DrawnImage]
) -> Response | DrawnImage:
    """Wait for the job, and answer in the form that was negotiated."""
    jobs: JobManager = request.app.state.jobs
    prefix = request.scope.get("root_path", "")
    if negotiated.later:
        jobs.leave(job)
        place = f"{prefix}/images/{job.id}"
        headers = {"Location": place, "Preference-Applied": "respond-async"}
        return JSONResponse(Accepted(id=str(job.id), url=place).model_dump(), 202, headers)
    if negotiated.form == EVENTS:

        def answer(image: StoredImage) -> dict[str, Any]:
            return shape.of(image, prefix).model_dump(exclude_defaults=True)

        told = stream(job, answer, negotiated.previews, request.state.request_id, jobs.deployment.retry_after)
        return EventStream(told, lambda: jobs.leave(job))
    try:
        stored = await while_connected(request, _outcome(job))
    finally:
        jobs.leave(job)
    if negotiated.form == JSON:
        return shape.of(stored.image, prefix)
    content = await _formed(await jobs.png_of(stored), negotiated.form.removeprefix("image/"), None)
    headers = {"X-Image-Id": str(job.id), "X-Seed": str(job.request.seed)}
    return Response(content, headers=headers, media_type=negotiated.form)


async def _outcome(job: Job[Stored]) -> Stored:
    return await job


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
    page = await request.app.state.jobs.page(limit, cursor)
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
    found: Found = await request.app.state.jobs.find(id)
    prefix, job = request.scope.get("root_path", ""), found.job
    if isinstance(found.record, StoredImage):
        return ImageInfo.of(found.record, prefix, record=found.record.flat())
    on_its_way: dict[str, Any] = {}
    if job is not None and not job.over:
        step, steps = job.progress
        on_its_way = {"position": job.position, "eta": job.eta, "step": step, "steps": steps}
    return ImageInfo.of_job(found.record, TOLD[found.state], prefix, **on_its_way)


@router.delete(
    "/images/{id}",
    status_code=204,
    responses=answers("unknown-image", "not-over", "store-refused", "store-unreachable"),
)
async def delete(id: str, request: Request) -> Response:
    """Delete a stored image and its record."""
    await request.app.state.jobs.delete(id)
    return Response(status_code=204)


@router.delete("/jobs/{id}", status_code=204, responses=answers("unknown-image", "already-over", "store-unreachable"))
async def cancel(id: str, request: Request) -> Response:
    """Cancel an image that is queued or running, at its next step. Whoever waits for it is told."""
    await request.app.state.jobs.cancel(id)
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
    png = await request.app.state.jobs.png(id)
    form = "" if wanted.format == "png" else f"-{wanted.format}{wanted.quality or ''}"
    tag = f'"{hashlib.sha256(png).hexdigest()[:32]}{form}"'
    headers = {"ETag": tag, "Cache-Control": "private, max-age=31536000, immutable"}
    if _matches(request.headers.get("if-none-match", ""), tag):
        return Response(status_code=304, headers=headers)
    content = await _formed(png, wanted.format, wanted.quality)
    return Response(content, headers=headers, media_type=f"image/{wanted.format}")


async def while_connected(request: Request, outcome: Coroutine[Any, Any, Any]) -> Any:
    """Await the outcome; raise `ClientGone` if the client leaves first."""
    task = asyncio.ensure_future(outcome)
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
