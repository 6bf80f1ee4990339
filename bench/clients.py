"""Clients of one server or several: one request, many at once, and the server's metrics."""

import http.client
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from email.message import Message
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from bench.settings import Body


class Answer(NamedTuple):
    status: int
    content: bytes
    headers: Message

    def json(self) -> Any:
        return json.loads(self.content)


def request(
    port: int,
    method: str,
    path: str,
    body: Body | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> Answer:
    """Send one request to a server on this machine, over a new connection."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)) as connection:
        sent = None if body is None else json.dumps(body)
        connection.request(method, path, sent, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        return Answer(answer.status, answer.read(), answer.headers)


def post(port: int, body: Body) -> float:
    """Request one image. Returns the seconds until the answer."""
    began = time.monotonic()
    answer = request(port, "POST", "/generate", body)
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {answer.content[:300]!r}")
    return time.monotonic() - began


def rate(ports: Sequence[int], bodies: Sequence[Body]) -> float:
    """Images a second when all are requested at once, round robin."""
    began = time.monotonic()
    with ThreadPoolExecutor(len(bodies)) as pool:
        list(pool.map(lambda index: post(ports[index % len(ports)], bodies[index]), range(len(bodies))))
    return len(bodies) / (time.monotonic() - began)


def metrics(port: int, *names: str) -> list[float]:
    """Metrics at one moment, each summed over its labels."""
    text = request(port, "GET", "/metrics", timeout=60).content.decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return [sum(sample.value for sample in samples if sample.name == name) for name in names]
