"""The application: settings in, ASGI out. Nothing is loaded before its lifespan begins.

`uvicorn --factory service.app:create_app`, or `python -m service`.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from sdxl_lab import __version__
from service.edge import Edge
from service.problems import MEDIA_TYPE, ProblemBody, problem_of
from service.routes import images, ops, page
from service.settings import Settings
from service.studio import Studio

PROBLEM = {"description": "A problem (RFC 9457)", "content": {MEDIA_TYPE: {"schema": ProblemBody.model_json_schema()}}}


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service for a slot; without `settings`, those of the environment.

    Raises `SettingsError`, `SlotError` or `ConfigError`. The weights are loaded by the lifespan, in a thread.
    """
    studio = Studio(settings or Settings.from_mapping())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        studio.start()
        yield
        await studio.stop()

    app = FastAPI(title="SDXL Lab", version=__version__, lifespan=lifespan, responses={"4XX": PROBLEM, "5XX": PROBLEM})
    app.state.studio = studio
    app.add_middleware(Edge, studio=studio)
    app.add_exception_handler(HTTPException, _problem)
    app.add_exception_handler(RequestValidationError, _problem)
    app.include_router(images.router)
    app.include_router(ops.router)
    app.include_router(page.router)
    app.mount("/page", page.files)
    return app


async def _problem(request: Request, error: Exception) -> Response:
    """What FastAPI raises itself; all else comes to the edge."""
    return problem_of(error, request.state.request_id).response()
