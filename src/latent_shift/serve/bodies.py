"""Bodies of requests: forms and JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from latent_shift.files import parse_json
from latent_shift.serve.schema import FILE_FIELDS, ApiError
from latent_shift.serve.uploads import UploadLimits, decode_data_url, too_large

if TYPE_CHECKING:
    from latent_shift.serve.service import Service

MAX_BYTES = 48 * 2**20
"""Bytes of a body: an upload as base64, and some text."""
LARGE = 2**20
MAX_BRACKETS = 100
"""Objects and lists in a JSON body."""


async def read_body(request: Request, service: Service) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the fields and the files of a form or of JSON; raise ApiError for a body that is neither."""
    if int(request.headers.get("content-length", LARGE)) < LARGE:
        return await _read_body(request, service.settings.limits.uploads)
    async with service.large_bodies:
        return await _read_body(request, service.settings.limits.uploads)


async def _read_body(request: Request, limits: UploadLimits) -> tuple[dict[str, Any], dict[str, bytes]]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    fields: dict[str, Any] = {}
    inputs: dict[str, bytes] = {}
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        try:
            async with request.form(max_files=4, max_fields=64, max_part_size=64 * 2**10) as form:
                for name, value in form.multi_items():
                    if name in fields or name in inputs:
                        raise ApiError(400, f"{name:.60}: given twice", code="invalid_value", param=name[:60])
                    if isinstance(value, str):
                        fields[name] = value
                    elif name not in FILE_FIELDS:
                        raise ApiError(
                            400,
                            f"{name:.60}: expected text, got a file",
                            code="invalid_value",
                            param=name[:60],
                        )
                    elif (value.size or 0) > limits.bytes:
                        raise too_large(name, limits)
                    else:
                        inputs[name] = await value.read()
        except MultiPartException as error:
            raise ApiError(400, error.message, code="invalid_body") from None
        except (LookupError, UnicodeError):  # a charset that there is not
            raise ApiError(400, "not text in UTF-8", code="invalid_body") from None
    elif kind == "application/json" or not kind:
        body = await request.body()
        if body.count(b"{") + body.count(b"[") > MAX_BRACKETS:  # parsing them would take long
            raise ApiError(400, "expected an object of fields, not of many objects", code="invalid_body")
        try:
            fields = await run_in_threadpool(lambda: parse_json(body.decode(), unique_keys=True))
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"not JSON: {error}"[:300], code="invalid_body") from None
        if not isinstance(fields, dict):
            raise ApiError(400, "expected a JSON object", code="invalid_body")
    else:
        message = f"Content-Type {kind:.60}: expected application/json, multipart/form-data or application/x-www-form-urlencoded"
        raise ApiError(415, message, code="unsupported_media_type")
    for name in [name for name in fields if name in FILE_FIELDS]:
        value = fields.pop(name)
        if isinstance(value, dict) and set(value) == {"image_url"}:  # OpenAI's form in JSON
            value = value["image_url"]
        if value not in (None, ""):
            inputs[name] = await run_in_threadpool(decode_data_url, value, name, limits)
    for name in [name for name, content in inputs.items() if not content]:
        raise ApiError(400, f"{name}: is empty", code="invalid_file", param=name)
    return fields, inputs


def body_schema(schema: type[BaseModel], *, files: bool = True) -> dict[str, Any]:
    """Return the OpenAPI description of a body that is JSON or a form.

    Args:
        schema: of its fields.
        files: whether it may hold pictures and videos: files of a form, data URLs in JSON.
    """
    fields = schema.model_json_schema(ref_template="#/components/schemas/{model}")

    def with_files(file: dict[str, Any]) -> dict[str, Any]:
        properties = {**fields["properties"], **dict.fromkeys(FILE_FIELDS if files else (), file)}
        return {"schema": {**fields, "properties": properties}}

    data_url = {"type": "string", "description": "data URL: data:image/png;base64,..."}
    content = {
        "application/json": with_files(data_url),
        "multipart/form-data": with_files({"type": "string", "format": "binary"}),
        "application/x-www-form-urlencoded": with_files(data_url),
    }
    return {"requestBody": {"required": True, "content": content}}
