"""The baselines: diffusers' pipeline by itself, and three ways to serve it.

`python -m bench.baselines locked|inline|litserve --port N` starts one of the servers. All answer `POST /generate` with
a PNG, and build the requested scheduler from the pristine config, as the engine does.
"""

import argparse
import io
import logging
import threading
from collections.abc import Sequence
from typing import Any

import diffusers
import litserve
import torch
import uvicorn
from diffusers import StableDiffusionXLPipeline
from fastapi import FastAPI, Response
from pydantic import BaseModel

from sdxl_lab.config import GenerationConfig
from sdxl_lab.diffusion import schedulers
from sdxl_lab.diffusion.inventory import folder_of


class PipelineRequest(BaseModel):
    """A request, with the fields that the benchmarks vary."""

    prompt: str
    seed: int
    steps: int
    guidance_scale: float
    scheduler: str = "euler"
    width: int = 256
    height: int = 256


class Pipeline:
    """diffusers' own pipeline in float32, one static batch a call."""

    def __init__(self, model: str) -> None:
        diffusers.utils.logging.disable_progress_bar()
        folder = folder_of(model, "base")
        self.pipe = StableDiffusionXLPipeline.from_pretrained(
            folder, variant="fp16", dtype=torch.float32, add_watermarker=False
        )
        self.pipe.set_progress_bar_config(disable=True)
        logging.getLogger("diffusers.configuration_utils").setLevel(logging.ERROR)  # fields that a scheduler ignores
        self.pristine = dict(self.pipe.scheduler.config)

    def draw(self, batch: Sequence[PipelineRequest], output_type: str = "pil") -> Any:
        """Images of one setting, that of the first request."""
        first = batch[0]
        self.pipe.scheduler = schedulers.build(
            GenerationConfig(scheduler=first.scheduler), self.pristine, seed=first.seed
        )
        return self.pipe(
            [request.prompt for request in batch],
            num_inference_steps=first.steps,
            guidance_scale=first.guidance_scale,
            width=first.width,
            height=first.height,
            output_type=output_type,
            generator=[torch.Generator("cpu").manual_seed(request.seed) for request in batch],
        ).images


def png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _app() -> FastAPI:
    app = FastAPI()

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    return app


def locked(model: str) -> FastAPI:
    """The server most people write: the pipeline behind a lock, in FastAPI's thread pool."""
    app, pipeline, lock = _app(), Pipeline(model), threading.Lock()

    @app.post("/generate")
    def generate(request: PipelineRequest) -> Response:
        with lock:
            return Response(png(pipeline.draw([request])[0]), media_type="image/png")

    return app


def inline(model: str) -> FastAPI:
    """The form of dstack's SDXL example: the pipeline called inside `async def`."""
    app, pipeline = _app(), Pipeline(model)

    @app.post("/generate")
    async def generate(request: PipelineRequest) -> Response:
        return Response(png(pipeline.draw([request])[0]), media_type="image/png")

    return app


class Batched(litserve.LitAPI):
    """LitServe with dynamic batching; requests of equal settings are grouped within a batch."""

    def __init__(self, model: str) -> None:
        super().__init__(max_batch_size=16, batch_timeout=0.05, api_path="/generate")
        self.model = model

    def setup(self, device: str) -> None:
        self.pipeline = Pipeline(self.model)

    def decode_request(self, request: dict[str, Any]) -> PipelineRequest:
        return PipelineRequest(**request)

    def batch(self, inputs: list[PipelineRequest]) -> list[PipelineRequest]:
        return inputs

    def predict(self, batch: list[PipelineRequest] | PipelineRequest) -> list[bytes]:
        requests = batch if isinstance(batch, list) else [batch]
        groups: dict[tuple[object, ...], list[int]] = {}
        for index, one in enumerate(requests):
            settings = (one.steps, one.guidance_scale, one.scheduler, one.width, one.height)
            groups.setdefault(settings, []).append(index)
        drawn: dict[int, bytes] = {}
        for indices in groups.values():
            images = self.pipeline.draw([requests[index] for index in indices])
            drawn |= {index: png(image) for index, image in zip(indices, images, strict=True)}
        return [drawn[index] for index in range(len(requests))]

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes | list[bytes]) -> Response:
        return Response(output if isinstance(output, bytes) else output[0], media_type="image/png")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.baselines", description=__doc__)
    parser.add_argument("kind", choices=["locked", "inline", "litserve"])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    if options.kind == "litserve":
        server = litserve.LitServer(
            Batched(options.model), accelerator="cpu", devices=1, workers_per_device=1, timeout=600
        )
        server.run("127.0.0.1", options.port, log_level="warning", generate_client_file=False)
    else:
        app = (locked if options.kind == "locked" else inline)(options.model)
        uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
