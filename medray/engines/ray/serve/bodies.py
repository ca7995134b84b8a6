"""Bodies as they arrive: counted, timed, hashed and written down, never held in memory whole."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from medray.config.serving import LimitsConfig
from medray.engines.ray.serve.intake import Part
from medray.engines.ray.serve.refusal import RefusedError

_CHUNK = 1 << 20
_MOST_FIELDS = 16


async def _bounded(request: Request, limits: LimitsConfig) -> AsyncIterator[bytes]:
    """The body's chunks, as long as they come in time and are not too many."""
    most = limits.body_mb << 20
    claimed = request.headers.get("content-length", "")
    if claimed.isascii() and claimed.isdigit() and int(claimed) > most:
        raise _too_large(limits)
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise RefusedError(415, "encoded", "Content-Encoding is not taken; send .nii.gz as it is, others as they are")
    loop = asyncio.get_running_loop()
    until = loop.time() + limits.body_seconds
    count = 0
    stream = request.stream().__aiter__()
    while True:
        try:
            async with asyncio.timeout_at(until):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise RefusedError(
                408, "too-slow", f"the body did not arrive within {limits.body_seconds:g} s (limits.body_seconds)"
            ) from None
        except ClientDisconnect:
            raise RefusedError(400, "gone", "the client went away before its body had arrived") from None
        count += len(chunk)
        if count > most:
            raise _too_large(limits)
        yield chunk


def _too_large(limits: LimitsConfig) -> RefusedError:
    return RefusedError(413, "too-large", f"the body is larger than {limits.body_mb} MiB (limits.body_mb)")


async def whole(request: Request, limits: LimitsConfig) -> bytes:
    """The body in memory, for tensors.

    Raises:
        RefusedError: 400, 408, 413 or 415.
    """
    return b"".join([chunk async for chunk in _bounded(request, limits)])


async def save(request: Request, folder: Path, limits: LimitsConfig) -> tuple[tuple[Part, ...], str]:
    """Write what was sent into ``folder``; files of a multipart body one by one, in their order.

    Returns:
        The files, and the SHA-256 of their bytes one after the other.

    Raises:
        RefusedError: 400, 408, 413 or 415.
    """
    media = request.headers.get("content-type", "")
    if media.partition(";")[0].strip().lower() == "multipart/form-data":
        return await _save_parts(request, folder, limits)
    digest, path = hashlib.sha256(), folder / "body"
    with path.open("wb") as file:
        async for chunk in _bounded(request, limits):
            digest.update(chunk)
            # Pages of a file are written behind our back; only large chunks are worth a thread.
            await asyncio.to_thread(file.write, chunk) if len(chunk) > _CHUNK else file.write(chunk)
    return (Part(path=path, content_type=media),), digest.hexdigest()


async def _save_parts(request: Request, folder: Path, limits: LimitsConfig) -> tuple[tuple[Part, ...], str]:
    headers = Headers({"content-type": request.headers.get("content-type", "")})
    parser = MultiPartParser(headers, _bounded(request, limits), max_files=limits.files, max_fields=_MOST_FIELDS)
    try:
        form = await parser.parse()
    except RefusedError:
        raise
    except (MultiPartException, KeyError, ValueError, UnicodeDecodeError) as error:
        text = str(error)[:200] if isinstance(error, MultiPartException) else "its boundary or headers are damaged"
        raise RefusedError(400, "bad-multipart", f"the multipart body can't be read: {text}") from error
    try:
        return await asyncio.to_thread(_write, form, folder)
    finally:
        await form.close()


def _write(form: Any, folder: Path) -> tuple[tuple[Part, ...], str]:
    digest, parts = hashlib.sha256(), []
    for number, (_, value) in enumerate(form.multi_items()):
        if isinstance(value, str):
            continue
        path = folder / f"part-{number:05}"
        with path.open("wb") as file:
            while chunk := value.file.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
        parts.append(Part(path=path, content_type=value.content_type or ""))
    return tuple(parts), digest.hexdigest()
