"""Pictures: draw, refine, download."""

import asyncio
import hashlib
import io
import uuid
from collections.abc import Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from sdxl_lab.config import ConfigError
from sdxl_lab.images import PictureError, open_picture, read_record
from service.edge import ClientGone
from service.schemas import EXAMPLES, Drawn, GenerateRequest, Refined, RefineRequest, Timings, Wanted
from service.studio import Kept, Studio

router = APIRouter(tags=["pictures"])


@router.post("/generate", response_model_exclude_defaults=True)
async def generate(asked: GenerateRequest, request: Request) -> Drawn:
    """Draw one picture from a prompt."""
    studio: Studio = request.app.state.studio
    config = asked.over(studio.slot.config)
    kept = await while_connected(request, studio.draw(config, asked.prompt, asked.seed))
    return Drawn(**_answer(studio, kept))


@router.post("/refine", response_model_exclude_defaults=True)
async def refine(asked: RefineRequest, request: Request) -> Refined:
    """Go over a stored picture again with the refiner."""
    studio: Studio = request.app.state.studio
    studio.ready_engine()
    png = await studio.stored(asked.id)
    try:
        image, record = await asyncio.to_thread(lambda: (open_picture(png), read_record(png)))
    except PictureError as error:
        raise ConfigError("id", asked.id, f"a picture that SDXL Lab drew ({error})", EXAMPLES["id"]) from error
    config = asked.over(studio.slot.config, record, image.size)
    prompt = record["prompt"] if asked.prompt is None else asked.prompt
    drawing = studio.draw(config, prompt, asked.seed, (image, asked.strength, record))
    kept = await while_connected(request, drawing)
    return Refined(**_answer(studio, kept), source=str(uuid.UUID(asked.id)))


@router.get("/download/{id}", response_class=Response, responses={200: {"content": {"image/png": {}}}})
async def download(id: str, request: Request, wanted: Annotated[Wanted, Query()]) -> Response:
    """A stored picture: the very PNG, or a WebP or JPEG made of it."""
    studio: Studio = request.app.state.studio
    png = await studio.stored(id)
    form = "" if wanted.format == "png" else f"-{wanted.format}{wanted.quality or ''}"
    tag = f'"{hashlib.sha256(png).hexdigest()[:32]}{form}"'
    headers = {"ETag": tag, "Cache-Control": "private, max-age=31536000, immutable"}
    if _matches(request.headers.get("if-none-match", ""), tag):
        return Response(status_code=304, headers=headers)
    content = png if wanted.format == "png" else await asyncio.to_thread(convert, png, wanted.format, wanted.quality)
    return Response(content, headers=headers, media_type=f"image/{wanted.format}")


async def while_connected(request: Request, drawing: Coroutine[Any, Any, Kept]) -> Kept:
    """Await the drawing; cancel it and raise `ClientGone` if the client leaves first."""
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


def convert(png: bytes, form: str, quality: int | None) -> bytes:
    """The picture as WebP or JPEG; without `quality`, Pillow's own for the form. The record stays in the PNG."""
    buffer = io.BytesIO()
    options = {} if quality is None else {"quality": quality}
    open_picture(png).convert("RGB").save(buffer, form.upper(), **options)
    return buffer.getvalue()


def _matches(header: str, tag: str) -> bool:
    """`If-None-Match` by weak comparison (RFC 9110, section 13.1.2)."""
    given = [part.strip().removeprefix("W/") for part in header.split(",")]
    return tag in given or "*" in given


def _answer(studio: Studio, kept: Kept) -> dict[str, Any]:
    width, height = kept.picture.image.size
    return {
        "id": str(kept.id),
        "url": f"/download/{kept.id}",
        "seed": kept.seed,
        "width": width,
        "height": height,
        "config": studio.slot.digest,
        "overridden": kept.overridden,
        "timings": Timings(**kept.picture.timings),
        "warnings": kept.warnings,
    }
