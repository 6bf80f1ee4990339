"""Telemetry: what Prometheus is told, and a line in the log for each image. Every service has a registry of its own.

The engine's numbers are read when they are asked for; what is over (images, answers) is counted.
"""

import logging
from collections.abc import Iterator
from contextvars import copy_context
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, SummaryMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from sdxl_lab.job import Job, JobState
from sdxl_lab.version import __version__
from service.deployment import Deployment
from service.jobs.registry import Stored
from service.server import logging as logs

# Seconds: from nano on a laptop to a full queue before SDXL.
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)
OUTCOMES = ("done", "failed", "cancelled")
log = logging.getLogger("service.images")


class Telemetry(Collector):
    """The metrics of one service."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._registry = registry = CollectorRegistry(auto_describe=False)
        self.images = Counter("sdxl_images", "Images by what became of them", ["outcome"], registry=registry)
        self.answers = Counter(
            "sdxl_http_answers", "Answers by route and status", ["route", "status"], registry=registry
        )
        self.first_step = Histogram(
            "sdxl_first_step_seconds", "From being accepted to the first step", registry=registry, buckets=BUCKETS
        )
        self.image = Histogram(
            "sdxl_image_seconds", "From being accepted to the image", registry=registry, buckets=BUCKETS
        )
        for outcome in OUTCOMES:
            self.images.labels(outcome)  # there at zero, so that a rate has a beginning
        registry.register(self)
        ProcessCollector(registry=registry)

    def follow(self, job: Job[Stored]) -> None:
        """Have a job counted and logged when it is over, in a line that names the request it is for."""
        logs.note(image=str(job.id))
        context = copy_context()
        job.add_done_callback(lambda job: context.run(self._count, job))

    def _count(self, job: Job[Stored]) -> None:
        self.images.labels(job.state).inc()
        calls, total = job.progress
        fields: dict[str, Any] = {"image": str(job.id), "state": str(job.state), "steps": calls, "of": total}
        if job.first_step_seconds is not None:
            self.first_step.observe(job.first_step_seconds)
            fields["first_step_ms"] = round(1000 * job.first_step_seconds, 1)
        timings = job.result().image.timings if job.state is JobState.DONE else None
        if timings is not None:
            self.image.observe(timings["total_ms"] / 1000)
            fields |= timings
        log.info("image %s", job.state, extra={"fields": fields})

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The metrics in the format that an `Accept` header asks for, and the format's media type."""
        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type

    def collect(self) -> Iterator[Metric]:
        """Called by the registry: what can be read off the engine and the slot."""
        deployment = self._deployment
        engine, slot = deployment.engine, deployment.slot
        weights = engine.weights if engine else {}
        info = {"digest": slot.digest, "slot": slot.folder.name, "version": __version__}
        named = ",".join(f"{role}={value}" for role, value in sorted(weights.items()))
        yield InfoMetricFamily("sdxl_config", "What is served", value=info | {"weights": named})
        yield GaugeMetricFamily(
            "sdxl_attested", "1: the golden images came out as promoted", value=deployment.attestation.passed
        )
        yield GaugeMetricFamily("sdxl_ready", "1: an image can be drawn now", value=deployment.trouble is None)
        if engine is None:
            return
        stats = engine.stats()
        for name, meaning, value in (
            ("sdxl_queue_depth", "Images that wait", stats.queued),
            ("sdxl_images_running", "Images that are being drawn", stats.running),
            ("sdxl_rows_in_flight", "UNet rows of the images being drawn", stats.rows_in_flight),
            ("sdxl_row_budget", "UNet rows that fit into one call", stats.row_budget),
            ("sdxl_batch_occupancy", "Share of the row budget that the last call used", stats.rows / stats.row_budget),
        ):
            yield GaugeMetricFamily(name, meaning, value=value)
        yield SummaryMetricFamily(
            "sdxl_tick_seconds", "UNet calls and their seconds", stats.calls, stats.seconds_in_calls
        )
        yield SummaryMetricFamily("sdxl_tick_rows", "UNet calls and their rows", stats.calls, stats.rows_in_calls)
