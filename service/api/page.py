"""The playground: plain files, with the headers that a page of ours needs. It asks the service through the same calls
as everybody else."""

from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parent.parent / "page"
HEADERS = {
    "Cache-Control": "no-cache",  # asked for again each time, answered with 304 while nothing changed
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Files(StaticFiles):
    """The folder's files; previews come as `data:`, images behind a key as `blob:`."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


files = Files(directory=FOLDER)
router = APIRouter(include_in_schema=False)


@router.get("/")
async def index(request: Request) -> Response:
    """The playground. Every address in it is relative, so that it works under any prefix."""
    return await files.get_response("index.html", request.scope)


@router.get("/page/{name}")
async def part(name: str, request: Request) -> Response:
    """What the playground consists of."""
    return await files.get_response(name, request.scope)
