"""What operators ask: what is served, is it alive, is it ready."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from sdxl_lab.config import SCHEDULERS, OfferedLora
from sdxl_lab.version import __version__
from service.api.problems import answers
from service.deployment import Deployment

router = APIRouter(tags=["operation"])


@router.get("/config")
async def config(request: Request) -> dict[str, Any]:
    """The promoted configuration and what speaks for it; `runtime` and `weights` once they are loaded."""
    deployment: Deployment = request.app.state.jobs.deployment
    slot, engine = deployment.slot, deployment.engine
    content: dict[str, Any] = {
        "slot": slot.folder.name,
        "config": slot.config.to_dict(),
        "limits": slot.limits.to_dict() | {"loras": [_offer(each) for each in slot.limits.loras]},
        "schedulers": SCHEDULERS,
        "digest": slot.digest,
        "evidence": slot.evidence.to_dict() if slot.evidence else None,
        "runtime": engine.runtime if engine else None,
        "weights": engine.weights if engine else None,
        **deployment.attestation.to_dict(),
        "version": __version__,
    }
    if slot.evidence is None:
        content["evidence_note"] = "this configuration was put here without evidence: nobody has judged its images yet"
    return content


def _offer(lora: OfferedLora) -> dict[str, Any]:
    """What a client is told of a LoRA: not where its file lies."""
    return {"name": lora.name, "weight": list(lora.weight)}


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers; it may still be loading."""
    return {"status": "alive"}


@router.get("/readyz", responses=answers("not-ready"))
async def readyz(request: Request) -> dict[str, Any]:
    """Whether an image can be drawn now; 503 says why not. `attested` false comes with the reason."""
    deployment: Deployment = request.app.state.jobs.deployment
    deployment.ready_engine()
    attestation = deployment.attestation
    told = {"status": "ready", "attested": attestation.passed}
    return told if attestation.passed else told | {"attested_reason": attestation.reason}


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={200: {"content": {"text/plain": {"example": "sdxl_queue_depth 0.0"}}}},
)
async def metrics(request: Request) -> Response:
    """The metrics, in the format of Prometheus."""
    content, media_type = request.app.state.telemetry.exposition(request.headers.get("accept", ""))
    return Response(content, headers={"Content-Type": media_type})
