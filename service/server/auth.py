"""Keys: who may ask for what.

Without keys everyone may. With some, everything is closed but what a prober asks and what a browser loads before its
user can enter a key. It is plain ASGI and stands before the routes: a stranger's body is not even read.
"""

import hashlib
import hmac
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.problems import Unauthorized, answers

OPEN = ("/healthz", "/readyz", "/", "/docs", "/docs/oauth2-redirect", "/openapi.json")
OPEN_FOLDER = "/page/"  # the playground's own files

SCHEMES = {
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "bearer": {"type": "http", "scheme": "bearer"},
}


class Auth:
    """Lets a request through that brings one of the keys, or that needs none; raises `Unauthorized` otherwise.

    `X-API-Key` is looked at beside `Authorization: Bearer`, not instead of it: a proxy that has its own bearer token
    passes it on.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self._hashes = [_hash(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            holder = self._holder(Headers(scope=scope))
            if (
                self._hashes
                and holder is None
                and not is_open(scope["path"].removeprefix(scope.get("root_path", "")) or "/")
            ):
                raise Unauthorized
            scope.setdefault("state", {})["client"] = "anyone" if holder is None else holder
        await self.app(scope, receive, send)

    def _holder(self, headers: Headers) -> str | None:
        """Whose key it is; None for a request without one. Every key is compared with everything given, all the way:
        how long it takes says nothing."""
        kind, _, token = headers.get("authorization", "").partition(" ")
        given = [_hash(headers.get("x-api-key", "")), _hash(token.strip() if kind.lower() == "bearer" else "")]
        found = None
        for known in self._hashes:
            for each in given:
                if hmac.compare_digest(known, each):
                    found = client_name(known)
        return found


def client_name(key_hash: bytes) -> str:
    """A name for a key's holder that may be stored and logged: the key does not follow from it."""
    return hashlib.sha256(b"client" + key_hash).hexdigest()[:16]


def is_open(path: str) -> bool:
    """Whether a path, without the prefix of a proxy, needs no key."""
    return path in OPEN or path.startswith(OPEN_FOLDER)


def describe(document: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI document with the ways to send a key, and on which paths one is needed."""
    document.setdefault("components", {})["securitySchemes"] = SCHEMES
    refused = answers("unauthorized")[401]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["security"] = [] if is_open(path) else [{name: []} for name in SCHEMES]
            if not is_open(path):
                operation["responses"]["401"] = refused
    return document


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
