"""The application: settings in, ASGI out. Nothing is loaded before its lifespan begins.

`uvicorn --factory service.app:create_app`, or `python -m service`.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Match

from sdxl_lab.version import __version__
from service.api import images, openai, ops, page
from service.api.problems import MEDIA_TYPE, ProblemBody
from service.api.schemas import bounded
from service.deployment import Deployment
from service.jobs.manager import JobManager
from service.server.auth import Auth, describe
from service.server.middleware import Middleware, problem_response
from service.server.telemetry import Telemetry
from service.settings import Settings

METHODS = ("GET", "POST", "DELETE")
CORS: dict[str, Any] = {
    "allow_methods": METHODS,
    "allow_headers": (
        *("Accept", "Authorization", "Content-Type", "Idempotency-Key", "If-None-Match", "Last-Event-ID", "Prefer"),
        *("X-API-Key", "X-Request-Id"),
    ),
    "expose_headers": (
        *("ETag", "Location", "Preference-Applied", "Retry-After", "WWW-Authenticate"),
        *("X-Config-Digest", "X-Image-Id", "X-Request-Id", "X-Seed"),
    ),
}
PROBLEM = {"description": "A problem (RFC 9457)", "content": {MEDIA_TYPE: {"schema": ProblemBody.model_json_schema()}}}


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service for a slot; without `settings`, those of the environment.

    Raises `SettingsError`, `SlotError` or `ConfigError`. The weights are loaded by the lifespan, in a thread.
    """
    settings = settings or Settings.from_mapping()
    deployment = Deployment(settings)
    jobs = JobManager(settings, deployment)
    telemetry = Telemetry(deployment)
    jobs.registry.observers.append(telemetry.follow)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        jobs.start()
        yield
        await jobs.stop()

    app = FastAPI(
        title="SDXL Lab",
        version=__version__,
        lifespan=lifespan,
        responses={"4XX": PROBLEM, "5XX": PROBLEM},
        generate_unique_id_function=lambda route: route.name,  # what OpenAPI's links name
    )
    app.state.jobs, app.state.telemetry = jobs, telemetry
    # From the innermost to the outermost: what the middleware answers has to carry the headers of CORS as well.
    app.add_middleware(Auth, keys=settings.api_keys)
    app.add_middleware(Middleware, settings=settings, deployment=deployment, telemetry=telemetry)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, **CORS)
    app.add_exception_handler(HTTPException, _problem)
    app.add_exception_handler(RequestValidationError, _problem)
    app.include_router(images.router)
    app.include_router(openai.router)
    app.include_router(ops.router)
    app.include_router(page.router)
    undescribed = app.openapi

    def openapi() -> dict[str, Any]:
        document = bounded(undescribed(), deployment.slot.limits)
        return describe(document) if settings.api_keys else document

    app.openapi = openapi  # type: ignore[method-assign]
    return app


async def _problem(request: Request, error: Exception) -> Response:
    """What FastAPI raises itself; all else comes to the middleware."""
    if isinstance(error, HTTPException) and error.status_code == 405:
        # The router names only the methods of the first route of the path.
        error = HTTPException(405, headers={"Allow": ", ".join(filter(partial(_allows, request), METHODS))})
    return problem_response(request.scope, error)


def _allows(request: Request, method: str) -> bool:
    scope = {**request.scope, "method": method}
    return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)
