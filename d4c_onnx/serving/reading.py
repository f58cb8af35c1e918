"""What a request says: images as a body of their own, as parts of a form, or as base64 in JSON; texts as JSON.

A text is a text and an image its bytes: nothing of a request is ever taken for a path, a part's file name included.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from d4c_onnx.runtime.clip_session import TEMPLATES
from d4c_onnx.serving.limits import Limits
from d4c_onnx.serving.refused import Refused
from d4c_onnx.untrusted_json import short

JSON, FORM = "application/json", "multipart/form-data"
_BYTES = "application/octet-stream"


class Images(BaseModel):
    """Images as JSON."""

    model_config = ConfigDict(extra="forbid", strict=True)
    images: list[str] = Field(min_length=1, description="base64 of JPEG, PNG, WebP ... files, or data: URLs")


class Texts(BaseModel):
    """Texts as JSON."""

    model_config = ConfigDict(extra="forbid", strict=True)
    texts: list[str] = Field(min_length=1, description="what is longer than the model's context is cut")


class ZeroShot(Images):
    """Images, labels, and templates with a {} where the label goes."""

    labels: list[str] = Field(min_length=1)
    templates: list[str] = Field(default=list(TEMPLATES), min_length=1)


Asked = TypeVar("Asked", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Question:
    """A zero-shot request: encoded images, and what they may show."""

    images: list[bytes]
    labels: list[str]
    templates: list[str]


async def read_images(request: Request, limits: Limits) -> list[bytes]:
    """Encoded images of `POST /embed/image`.

    Raises:
        Refused: there are none or too many, or their form is unknown.
    """
    kind = _content_type(request)
    if kind == JSON:
        return _decoded((await _json(request, Images)).images, limits)
    if kind == FORM:
        return (await _form(request, limits))[0]
    if kind.startswith("image/") or kind == _BYTES:
        body = await request.body()
        if not body:
            raise Refused(400, "The body is empty; it takes an image.")
        return [body]
    raise _unknown(kind, "image/*", FORM, JSON)


async def read_texts(request: Request, limits: Limits) -> list[str]:
    """Texts of `POST /embed/text`.

    Raises:
        Refused: there are none, too many, or too long ones.
    """
    kind = _content_type(request)
    if kind != JSON:
        raise _unknown(kind, JSON)
    texts = (await _json(request, Texts)).texts
    _check(texts, "texts", limits)
    return texts


async def read_question(request: Request, limits: Limits) -> Question:
    """Images, labels and templates of `POST /zero-shot`.

    Raises:
        Refused: something lacks, is too much, or a template has no place for the label.
    """
    kind = _content_type(request)
    if kind == JSON:
        asked = await _json(request, ZeroShot)
        question = Question(_decoded(asked.images, limits), asked.labels, asked.templates)
    elif kind == FORM:
        images, fields = await _form(request, limits, ("labels", "templates"))
        question = Question(images, fields["labels"], fields["templates"] or list(TEMPLATES))
    else:
        raise _unknown(kind, FORM, JSON)
    if not question.labels:
        raise Refused(422, "labels: name at least one.")
    _check(question.labels, "labels", limits)
    _check(question.templates, "templates", limits)
    if len(question.labels) * len(question.templates) > limits.texts:
        raise Refused(422, f"labels x templates: at most {limits.texts} prompts a request.")
    if any("{}" not in template for template in question.templates):
        raise Refused(422, "templates: each needs a {} where the label goes.")
    longest = max(map(len, question.labels)) - len("{}")
    if any(len(one) + one.count("{}") * longest > limits.letters for one in question.templates):
        raise Refused(422, f"labels x templates: a prompt has at most {limits.letters} letters.")
    return question


def _content_type(request: Request) -> str:
    """Without its parameters."""
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


def _unknown(kind: str, *takes: str) -> Refused:
    return Refused(415, f"Content-Type {short(ascii(kind))}: takes {' or '.join(takes)}.")


async def _json(request: Request, form: type[Asked]) -> Asked:
    try:
        return form.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "body"
        status = 400 if first["type"] == "json_invalid" else 422
        raise Refused(status, f"{short(ascii(place)[1:-1])}: {short(first['msg'])}.") from error


def _decoded(images: list[str], limits: Limits) -> list[bytes]:
    _count(len(images), limits)
    found = []
    for number, image in enumerate(images):
        text = image.partition(",")[2] if image.startswith("data:") else image
        try:
            found.append(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError) as error:
            raise Refused(422, f"images.{number}: is no base64 of an image file.") from error
    return found


async def _form(
    request: Request, limits: Limits, names: tuple[str, ...] = ()
) -> tuple[list[bytes], dict[str, list[str]]]:
    """The files of a form, whatever they are called, and the texts under these names."""
    fields: dict[str, list[str]] = {name: [] for name in names}
    images = []
    if not (await request.body()).rstrip().endswith(b"--"):
        raise Refused(400, "The form is cut off: its last boundary lacks.")
    try:
        async with request.form(max_files=limits.images, max_fields=2 * limits.texts) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    images.append(await value.read())
                elif name in fields:
                    fields[name].append(value)
                else:
                    takes = " and ".join(["images (files)", *names])
                    raise Refused(422, f"{short(ascii(name))}: is no field of this form, which has {takes}.")
    except (HTTPException, FormParserError) as error:  # older starlettes let the parser's own through
        why = error.detail if isinstance(error, HTTPException) else error
        raise Refused(400, f"The form cannot be read: {short(why)}") from error
    _count(len(images), limits)
    return images, fields


def _count(images: int, limits: Limits) -> None:
    if not 1 <= images <= limits.images:
        raise Refused(422, f"images: takes 1 to {limits.images} a request, and found {images}.")


def _check(texts: list[str], name: str, limits: Limits) -> None:
    if len(texts) > limits.texts:
        raise Refused(422, f"{name}: takes at most {limits.texts}, and found {len(texts)}.")
    for number, text in enumerate(texts):
        if len(text) > limits.letters:
            raise Refused(422, f"{name}.{number}: takes at most {limits.letters} letters, and found {len(text):,}.")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise Refused(422, f"{name}.{number}: is no valid Unicode.")
