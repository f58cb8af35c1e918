"""The paths of a server, and how an answer is told: JSON, errors included."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route

import d4c_onnx
from d4c_onnx.runtime.clip_session import ClipSession
from d4c_onnx.serving.batcher import Busy
from d4c_onnx.serving.bodies import BoundedBodies
from d4c_onnx.serving.limits import Limits
from d4c_onnx.serving.metered import Metered
from d4c_onnx.serving.meters import CONTENT_TYPE, Meters
from d4c_onnx.serving.reading import FORM, JSON, Images, Texts, ZeroShot, read_images, read_question, read_texts
from d4c_onnx.serving.refused import Refused
from d4c_onnx.serving.served import Served
from d4c_onnx.web_page import SERVER, content_security_policy, page_of

_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}}
_WORDS = {"type": "array", "items": {"type": "string"}}


class Fault(BaseModel):
    """What went wrong, in one sentence."""

    error: str


class Health(BaseModel):
    """The server answers, and for what."""

    status: str
    model: str
    bundles: list[str]


class ImageEmbeds(BaseModel):
    """Unit vectors, one an image."""

    image_embeds: list[list[float]]


class TextEmbeds(BaseModel):
    """Unit vectors, one a text."""

    text_embeds: list[list[float]]


class BundleScores(BaseModel):
    """A bundle's scores, [images][labels], and the milliseconds that its encoders took."""

    bundle: str
    scores: list[list[float]]
    image_milliseconds: float
    text_milliseconds: float


class ZeroShotScores(BaseModel):
    """What each bundle that is served makes of the images, the served one first."""

    labels: list[str]
    results: list[BundleScores]


def create_app(session: ClipSession, fp32: ClipSession | None = None, limits: Limits | None = None) -> FastAPI:
    """A server's ASGI application; every encoder is loaded.

    Args:
        session: of the bundle that is served.
        fp32: of its FP32 original, whose scores /zero-shot gives beside.
        limits: other ones than the default.

    Raises:
        BundleError: `fp32` is no original of it, or an encoder cannot be loaded.
    """
    limits, meters = limits or Limits(), Meters()
    served = Served(session, fp32, limits, meters)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with served.running():
            yield

    app = FastAPI(
        title=f"d4c-onnx: {session.bundle.model_name}",
        version=d4c_onnx.__version__,
        lifespan=lifespan,
        docs_url=None,  # those pages load scripts from elsewhere
        redoc_url=None,
        responses={status: {"model": Fault} for status in (400, 408, 413, 415, 422, 503)},
    )
    _add_encoders(app, served, limits)
    _add_others(app, served, meters, session.bundle.model_name)
    _add_errors(app)
    paths = frozenset(route.path for route in app.routes if isinstance(route, Route))
    app.add_middleware(BoundedBodies, limits=limits)
    app.add_middleware(Metered, meters=meters, paths=paths)  # the outermost
    return app


def _add_encoders(app: FastAPI, served: Served, limits: Limits) -> None:
    async def within(work: Awaitable[Any]) -> Any:
        try:
            async with asyncio.timeout(limits.answer_seconds):
                return await work
        except (Busy, TimeoutError) as error:
            raise Refused(503, "Too many requests wait for an encoder; try again in a moment.") from error

    form = {"properties": {"images": _FILES}, "required": ["images"]}
    takes = {FORM: form, JSON: Images.model_json_schema(), "image/*": {"type": "string", "format": "binary"}}

    @app.post("/embed/image", response_model=ImageEmbeds, openapi_extra=_body(takes))
    async def embed_image(request: Request) -> Response:
        """Embed one image (the body itself) or several (files of a form, or base64 in JSON)."""
        found = await within(served.image_embeds(await read_images(request, limits)))
        return JSONResponse({"image_embeds": found.vectors.tolist()})

    @app.post("/embed/text", response_model=TextEmbeds, openapi_extra=_body({JSON: Texts.model_json_schema()}))
    async def embed_text(request: Request) -> Response:
        """Embed texts."""
        found = await within(served.text_embeds(await read_texts(request, limits)))
        return JSONResponse({"text_embeds": found.vectors.tolist()})

    fields = {"images": _FILES, "labels": _WORDS, "templates": _WORDS}
    takes = {FORM: {"properties": fields, "required": ["images", "labels"]}, JSON: ZeroShot.model_json_schema()}

    @app.post("/zero-shot", response_model=ZeroShotScores, openapi_extra=_body(takes))
    async def zero_shot(request: Request) -> Response:
        """How likely each label is for each image."""
        question = await read_question(request, limits)
        results = [
            {
                "bundle": found.name,
                "scores": found.scores.tolist(),
                "image_milliseconds": round(found.image_milliseconds, 3),
                "text_milliseconds": round(found.text_milliseconds, 3),
            }
            for found in await within(served.zero_shot(question))
        ]
        return JSONResponse({"labels": question.labels, "results": results})


def _body(kinds: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    content = {kind: {"schema": {"type": "object", **schema}} for kind, schema in kinds.items()}
    return {"requestBody": {"required": True, "content": content}}


def _add_others(app: FastAPI, served: Served, meters: Meters, model: str) -> None:
    page = page_of(SERVER)
    headers = {"Content-Security-Policy": content_security_policy(page), "X-Content-Type-Options": "nosniff"}

    @app.get("/healthz")
    async def healthz() -> Health:
        """Whether the server answers, and for what."""
        return Health(status="ok", model=model, bundles=served.names)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(meters.text(), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return JSONResponse(
            {"error": f"{error.detail}: /openapi.json says what there is."}, error.status_code, error.headers
        )
