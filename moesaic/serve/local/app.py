"""The HTTP side: routes, the key, the limits of a body, and errors in OpenAI's form.

Starlette, because it is the small part under FastAPI, which vLLM's own server is built of: routing, streaming
and lifespan, typed, in pure Python. Its own validation is not needed: what a field may hold is said in fields.py.
"""

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ...errors import BusyError, InputError, MoesaicError
from .chat import chat, read_messages, read_tools
from .completions import completions
from .fields import Fields
from .model import Served

Answering = Callable[[Fields, Request, Served], AsyncIterator[dict[str, Any]]]
FREE = ("/health",)  # asked by probes, which have no key
KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def failed(status: int, message: str) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(status)
    return JSONResponse(described(status, message, kind), status, headers)


def described(status: int, message: str, kind: str = "server_error") -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def status_of(error: MoesaicError) -> int:
    """400 for a bad request, 429 when busy, 500 otherwise: a subclass of `InputError` speaks of the checkpoint."""
    return 400 if type(error) is InputError else 429 if isinstance(error, BusyError) else 500


async def read_body(request: Request, served: Served) -> Fields:
    """The JSON of a request, as long as it is no longer than allowed."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        # A page in a browser may send any other kind to this address without asking first.
        raise HTTPException(415, "the body is not declared application/json; set that Content-Type")
    size, parts = 0, []
    async for part in request.stream():
        size += len(part)
        if size > served.limits.body_bytes:
            raise HTTPException(413, f"the body is longer than {served.limits.body_bytes:,} bytes; send less")
        parts.append(part)
    return await asyncio.to_thread(Fields.read, b"".join(parts))


async def answer(request: Request, answering: Answering, served: Served) -> Response:
    """One completion, or a stream of events of which the first is awaited: what is wrong by then has a status."""
    fields = await read_body(request, served)
    chunks = answering(fields, request, served)
    first = await anext(chunks)
    if not fields.flag("stream"):
        return JSONResponse(first)
    return StreamingResponse(
        events(first, chunks), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


async def events(first: Mapping[str, Any], chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    yield event(first)
    try:
        async for chunk in chunks:
            yield event(chunk)
    except ClientDisconnect:
        return
    except MoesaicError as error:
        yield event(described(status_of(error), str(error)))
    yield "data: [DONE]\n\n"


def event(chunk: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


async def tokenize(request: Request, served: Served) -> Response:
    fields = await read_body(request, served)
    if fields.body.get("messages") is not None:
        options = fields.inner("chat_template_kwargs").body
        text, special = served.render(read_messages(fields), read_tools(fields), options), False
    else:
        text, special = fields.text("prompt") or "", fields.body.get("add_special_tokens") is not False
    ids = await asyncio.to_thread(served.encode, text, special)
    words = [served.word(id) for id in ids] if fields.flag("return_token_strs") else None
    return JSONResponse({"count": len(ids), "max_model_len": served.limits.context, "tokens": ids, "token_strs": words})


async def detokenize(request: Request, served: Served) -> Response:
    ids = (await read_body(request, served)).items("tokens", int, "token ids")
    if wrong := [id for id in ids if not 0 <= id < served.checkpoint.architecture.vocab]:
        raise InputError(f"token {str(wrong[0])[:20]} is not in this model's vocabulary")
    return JSONResponse({"prompt": served.decode(ids, skip_special=False)})


async def models(request: Request, served: Served) -> Response:
    one = {
        "id": served.name, "object": "model", "created": int(served.metrics.began), "owned_by": "moesaic",
        "max_model_len": served.limits.context,
    }  # fmt: skip
    if "name" not in request.path_params:
        return JSONResponse({"object": "list", "data": [one]})
    if request.path_params["name"] != served.name:
        raise HTTPException(404, f"there is no such model here; ask for {served.name!r}")
    return JSONResponse(one)


async def health(request: Request, served: Served) -> Response:
    return Response(status_code=200 if served.engine.alive else 503)


async def metrics(request: Request, served: Served) -> Response:
    return Response(served.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


class Guard:
    """Asks for the key, and counts what was answered."""

    def __init__(self, app: ASGIApp, served: Served, key: str | None) -> None:
        self.app, self.served, self.key = app, served, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        allowed = self.key is None or hmac.compare_digest(given, f"Bearer {self.key}".encode())
        app = (
            self.app
            if allowed or scope["path"] in FREE
            else failed(401, "no valid key; send Authorization: Bearer KEY")
        )

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in PATHS else "other"
                self.served.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        await app(scope, receive, counted)


HANDLERS: tuple[tuple[str, str, Callable[[Request, Served], Awaitable[Response]]], ...] = (
    ("GET", "/health", health),
    ("GET", "/metrics", metrics),
    ("GET", "/v1/models", models),
    ("GET", "/v1/models/{name:path}", models),
    ("POST", "/tokenize", tokenize),
    ("POST", "/detokenize", detokenize),
    ("POST", "/v1/chat/completions", lambda request, served: answer(request, chat, served)),
    ("POST", "/v1/completions", lambda request, served: answer(request, completions, served)),
)
PATHS = {path for _, path, _ in HANDLERS}


async def on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return failed(error.status_code, str(error.detail))


async def on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, MoesaicError)
    return failed(status_of(error), str(error))


async def on_bug(request: Request, error: Exception) -> Response:
    return failed(500, "the server made an error, which its log has")


async def on_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


def application(served: Served, key: str | None = None) -> Starlette:
    """The whole server; the engine's thread lives as long as it runs."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        served.engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(served.engine.stop)

    routes = [
        Route(path, partial(endpoint, handle=handle, served=served), methods=[verb]) for verb, path, handle in HANDLERS
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, served=served, key=key)],
        exception_handlers={
            HTTPException: on_http,
            MoesaicError: on_error,
            ClientDisconnect: on_gone,
            Exception: on_bug,
        },
        lifespan=lifespan,
    )


async def endpoint(
    request: Request, handle: Callable[[Request, Served], Awaitable[Response]], served: Served
) -> Response:
    return await handle(request, served)
