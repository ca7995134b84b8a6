"""The server's routes, on FastAPI. What they do is the :class:`Service`'s; here is only HTTP."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from medray import __version__, logs
from medray.config.serving import NAME
from medray.engines.ray.serve import bodies, protocol
from medray.engines.ray.serve.intake import TYPES
from medray.engines.ray.serve.journal import Kept
from medray.engines.ray.serve.keys import Key, Scope, from_headers
from medray.engines.ray.serve.page import add_page
from medray.engines.ray.serve.refusal import RefusedError, is_full, no_space
from medray.engines.ray.serve.schemas import (
    ANSWERS,
    PICTURES,
    Health,
    JobState,
    ModelList,
    Prediction,
    Status,
    protocol_refusals,
    refusals,
)
from medray.engines.ray.serve.service import Explain, Job, Service

Named = Annotated[str | None, Query(pattern=NAME, description="a model of /v1/models; left out: the default")]
Versioned = Annotated[str | None, Query(pattern=NAME, description="one of its versions; left out: by their shares")]
JobId = Annotated[str, Path(pattern="^[0-9a-f]{32}$", description="as POST /v1/jobs gave it")]
InPath = Annotated[str, Path(pattern=NAME)]
_MOST_IDEMPOTENCY = 255
_BODY = {
    "requestBody": {
        "required": True,
        "description": "One image: PNG, JPEG, TIFF, NIfTI, DICOM, a zip of one DICOM series, or .npy; as multipart, "
        "several DICOM files are one series, several files of another kind one image's channels.",
        "content": {
            **{
                media: {"schema": {"type": "string", "format": "binary"}}
                for media in ("application/octet-stream", *sorted({name for names in TYPES.values() for name in names}))
            },
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"file": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
        },
    }
}
_TENSORS = {
    "requestBody": {
        "required": True,
        "description": "The Open Inference Protocol's request, as JSON or with its binary extension.",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


def create_app(get_service: Callable[[], Service]) -> FastAPI:
    """The ASGI application.

    Args:
        get_service: the replica's service, asked for with each request.
    """
    app = FastAPI(
        title="medray",
        version=__version__,
        description="Answers on medical images. Research use only. Not a medical device.",
        docs_url=None,  # FastAPI's pages load their scripts from another host
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_health(app, get_service)
    _add_models(app, get_service)
    _add_images(app, get_service)
    _add_jobs(app, get_service)
    _add_tensors(app, get_service)
    add_page(app)
    _add_errors(app)
    app.add_middleware(_Around, get_service=get_service)
    return app


def _key(service: Service, request: Request, scope: Scope, *, counted: bool = False) -> Any:
    """Who asks; looked up on a thread, where a first look costs 40 ms of scrypt. Counted: of its rate."""
    text = from_headers(request.headers.get("authorization"), request.headers.get("x-api-key"))
    return asyncio.to_thread(service.let_in if counted else service.known, text, scope)


def _add_health(app: FastAPI, get_service: Callable[[], Service]) -> None:
    @app.get("/v2/health/live", tags=["health"])
    async def live() -> Health:
        """Whether the server runs."""
        return Health(live=True)

    @app.get("/v2/health/ready", tags=["health"], responses=protocol_refusals(503))
    async def ready() -> Health:
        """Whether models are loaded. Stays so under load: a server that is busy says 429 to predictions alone."""
        if not get_service().fleet.table:
            raise RefusedError(503, "not-ready", "no model is loaded", retry_after=1)
        return Health(live=True, ready=True)

    @app.get("/v2", tags=["protocol v2"])
    async def server() -> dict[str, Any]:
        """The server's metadata, by the Open Inference Protocol."""
        return {"name": "medray", "version": __version__, "extensions": ["binary_tensor_data"]}

    @app.get("/metrics", tags=["operations"], responses=refusals(401, 403), response_class=Response)
    async def metrics(request: Request) -> Response:
        """Counters for Prometheus (scope: metrics)."""
        service = get_service()
        await _key(service, request, "metrics")
        text, media = await asyncio.to_thread(service.meters.render)
        return Response(text, media_type=media)

    @app.get("/v1/status", tags=["operations"], responses=refusals(401, 403))
    async def status(request: Request) -> Status:
        """What the server runs on: where bundles lie, and why a changed configuration was refused (scope: admin)."""
        service = get_service()
        await _key(service, request, "admin")
        return Status(
            versions={f"{one.model}/{one.version}": one.identity[0] for one in service.versions()},
            waiting=service.predictions.inside,
            config_error=service.fleet.error,
        )


def _add_models(app: FastAPI, get_service: Callable[[], Service]) -> None:
    @app.get("/v1/models", tags=["images"], responses=refusals(401, 403))
    async def models(request: Request) -> ModelList:
        """What there is to ask, and what computes it (scope: predict)."""
        service = get_service()
        await _key(service, request, "predict")
        return ModelList.of(service.versions(), service.fleet.config.default_model)

    async def describe(request: Request, model: str, version: str | None) -> dict[str, Any]:
        service = get_service()
        await _key(service, request, "predict")
        with service.fleet.chosen(model, version, "0" * 12) as one:
            return protocol.describe(one.bundle.spec, one.model, list(service.fleet.table[one.model]))

    async def is_ready(model: str, version: str | None) -> Health:
        try:
            with get_service().fleet.chosen(model, version, "0" * 12):
                return Health(live=True, ready=True)
        except RefusedError as error:
            if error.status != 404:
                raise
            # Asked without a key: what there is is not told.
            raise RefusedError(404, error.reason, "no such model or version answers here") from None

    @app.get("/v2/models/{model}", tags=["protocol v2"], responses=protocol_refusals(401, 403, 404, 422, 503))
    async def metadata(request: Request, model: InPath) -> dict[str, Any]:
        """The model's tensors (scope: predict)."""
        return await describe(request, model, None)

    @app.get(
        "/v2/models/{model}/versions/{version}",
        tags=["protocol v2"],
        responses=protocol_refusals(401, 403, 404, 422, 503),
    )
    async def version_metadata(request: Request, model: InPath, version: InPath) -> dict[str, Any]:
        """The version's tensors (scope: predict)."""
        return await describe(request, model, version)

    @app.get("/v2/models/{model}/ready", tags=["health"], responses=protocol_refusals(404, 422, 503))
    async def model_ready(model: InPath) -> Health:
        """Whether the model answers."""
        return await is_ready(model, None)

    @app.get("/v2/models/{model}/versions/{version}/ready", tags=["health"], responses=protocol_refusals(404, 422, 503))
    async def version_ready(model: InPath, version: InPath) -> Health:
        """Whether the version answers."""
        return await is_ready(model, version)


async def _take_in(
    service: Service,
    request: Request,
    key: Key,
    model: str | None,
    version: str | None,
    explain: Explain | None = None,
) -> Job:
    """The image of a request, written down, and what is asked about it."""
    idempotency = request.headers.get("idempotency-key")
    if idempotency is not None and not 1 <= len(idempotency) <= _MOST_IDEMPOTENCY:
        raise RefusedError(400, "bad-key", f"an Idempotency-Key has 1 to {_MOST_IDEMPOTENCY} characters")
    folder = service.new_folder()
    try:
        with service.uploads.admitted():
            parts, digest = await bodies.save(request, folder, service.limits)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Job(
        folder=folder,
        parts=parts,
        digest=digest,
        key=key,
        model=model,
        version=version,
        accept=request.headers.get("accept"),
        idempotency=idempotency,
        explain=explain,
    )


def _add_images(app: FastAPI, get_service: Callable[[], Service]) -> None:
    @app.post(
        "/v1/predict",
        tags=["images"],
        response_model=Prediction,
        responses={**ANSWERS, **refusals(400, 401, 403, 404, 406, 408, 409, 413, 415, 422, 429, 503)},
        openapi_extra=_BODY,
    )
    async def predict(request: Request, model: Named = None, version: Versioned = None) -> Response:
        """Answer one image (scope: predict): JSON, or by Accept a NIfTI mask, a PNG overlay, a DICOM-SEG or -SR."""
        service = get_service()
        key = await _key(service, request, "predict", counted=True)
        return await _answered(await _take_in(service, request, key, model, version), service)

    @app.post(
        "/v1/explain",
        tags=["images"],
        response_class=Response,
        responses={**PICTURES, **refusals(400, 401, 403, 404, 406, 408, 409, 413, 415, 422, 429, 503)},
        openapi_extra=_BODY,
    )
    async def explain(
        request: Request,
        model: Named = None,
        version: Versioned = None,
        method: Literal["gradcam", "gradcam++"] = "gradcam",
        target: Annotated[str | None, Query(max_length=200, description="a class; left out: the answer's own")] = None,
    ) -> Response:
        """Where the network looked (scope: explain): a picture, or by Accept a NIfTI map on the scan's own grid."""
        service = get_service()
        key = await _key(service, request, "explain", counted=True)
        wanted = Explain(method=method, target=target)
        return await _answered(await _take_in(service, request, key, model, version, wanted), service)


def _add_jobs(app: FastAPI, get_service: Callable[[], Service]) -> None:
    async def state(service: Service, key: Key, token: str) -> JobState:
        return JobState.model_validate(await asyncio.to_thread(service.jobs.state, key.id, token))

    @app.post(
        "/v1/jobs",
        tags=["images"],
        status_code=202,
        responses=refusals(400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 503),
        openapi_extra=_BODY,
    )
    async def begin(request: Request, response: Response, model: Named = None, version: Versioned = None) -> JobState:
        """Answer one image while the client goes its way (scope: predict); Accept decides what is answered then."""
        service = get_service()
        key = await _key(service, request, "predict", counted=True)
        asked = await _take_in(service, request, key, model, version)
        # Shielded: a client that goes away doesn't take the image from the thread that begins its job.
        token = await asyncio.shield(asyncio.to_thread(service.start_later, asked))
        response.headers["Location"] = f"/v1/jobs/{token}"
        return await state(service, key, token)

    @app.get("/v1/jobs/{job}", tags=["images"], responses=refusals(401, 403, 404, 422))
    async def look(request: Request, job: JobId) -> JobState:
        """How far a job is (scope: predict)."""
        service = get_service()
        return await state(service, await _key(service, request, "predict"), job)

    @app.get(
        "/v1/jobs/{job}/answer",
        tags=["images"],
        response_model=Prediction,
        responses={**ANSWERS, **refusals(400, 401, 403, 404, 406, 409, 413, 415, 422, 500, 503)},
    )
    async def answer(request: Request, job: JobId) -> Response:
        """What a job has come to, as /v1/predict answers; 409 while it runs (scope: predict)."""
        service = get_service()
        key = await _key(service, request, "predict")
        kept = await asyncio.to_thread(service.jobs.answer, key.id, job)
        return Response(kept.body, status_code=kept.status, headers=dict(kept.headers))

    @app.delete("/v1/jobs/{job}", tags=["images"], status_code=204, responses=refusals(401, 403, 404, 422))
    async def forget(request: Request, job: JobId) -> Response:
        """Remove a job and its answer (scope: predict)."""
        service = get_service()
        key = await _key(service, request, "predict")
        await asyncio.to_thread(service.jobs.forget, key.id, job)
        return Response(status_code=204)


async def _answered(asked: Job, service: Service) -> Response:
    try:
        future: Future[Kept] = service.start(asked)
    except BaseException:
        shutil.rmtree(asked.folder, ignore_errors=True)
        raise
    try:
        # Shielded: a client that goes away, or is told to come again, finds the answer kept under its key.
        kept = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), service.limits.answer_seconds)
    except TimeoutError:
        raise RefusedError(
            503,
            "too-long",
            f"no answer within {service.limits.answer_seconds:g} s (limits.answer_seconds); with the same "
            "Idempotency-Key it can be fetched once it is there",
            retry_after=10,
        ) from None
    return Response(kept.body, status_code=kept.status, headers=dict(kept.headers))


def _add_tensors(app: FastAPI, get_service: Callable[[], Service]) -> None:
    async def infer_any(request: Request, model: str, version: str | None) -> Response:
        service = get_service()
        key = await _key(service, request, "predict", counted=True)
        with service.uploads.admitted():
            body = await bodies.whole(request, service.limits)
        length = request.headers.get(protocol.HEADER)
        answer, headers = await service.infer(body, length, model=model, version=version, key=key)
        return Response(answer, headers=headers)

    responses = protocol_refusals(400, 401, 403, 404, 408, 413, 415, 422, 429, 503)

    @app.post("/v2/models/{model}/infer", tags=["protocol v2"], responses=responses, openapi_extra=_TENSORS)
    async def infer(request: Request, model: InPath) -> Response:
        """Run prepared arrays through the network (scope: predict)."""
        return await infer_any(request, model, None)

    @app.post(
        "/v2/models/{model}/versions/{version}/infer",
        tags=["protocol v2"],
        responses=responses,
        openapi_extra=_TENSORS,
    )
    async def infer_version(request: Request, model: InPath, version: InPath) -> Response:
        """Run prepared arrays through the network, in one version (scope: predict)."""
        return await infer_any(request, model, version)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> JSONResponse:
        return _error(error, request.url.path)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
        return await refused(request, RefusedError(422, "invalid", f"{where}: {first['msg']}"))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        text = f"{error.detail}: {request.method} {request.url.path[:200]}; see /openapi.json"
        answer = await refused(request, RefusedError(error.status_code, "no-such-route", text))
        answer.headers.update(error.headers or {})
        return answer


def _error(error: RefusedError, path: str) -> JSONResponse:
    # The protocol's own clients want text where ours is an object.
    body = {"error": error.message} if path.startswith("/v2") else error.body
    return JSONResponse(body, status_code=error.status, headers=error.headers)


def _where(error: BaseException) -> str | None:
    trace, last = error.__traceback__, None
    while trace is not None:
        last, trace = trace, trace.tb_next
    return None if last is None else f"{last.tb_frame.f_code.co_filename}:{last.tb_lineno}"


def _route(scope: Any) -> str:
    """The route's own pattern: what a client wrote into the path is in no metric and no log."""
    return str(getattr(scope.get("route"), "path", "other"))


class _Around:
    """Counts and times each request, and says how its answer is to be handled."""

    def __init__(self, app: Any, get_service: Callable[[], Service]) -> None:
        self._app, self._get_service = app, get_service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status, started = time.perf_counter(), 500, False

        async def watched(message: Any) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"cache-control", b"no-store"),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if is_full(error) and not started:
                logs.event("no-space", level="error", route=_route(scope), where=_where(error))
                await _error(no_space(), scope["path"])(scope, receive, watched)
                return
            # Caught here, since what is above would log it, and an error's text may quote what a client sent.
            kind, where = type(error).__name__, _where(error)
            logs.event("defect", level="error", error=kind, route=_route(scope), where=where)
            if not started:
                defect = RefusedError(500, "defect", "the server met a defect of its own; its log says where")
                await _error(defect, scope["path"])(scope, receive, watched)
        finally:
            meters, route = self._get_service().meters, _route(scope)
            meters.requests.labels(route, str(status)).inc()
            meters.request_seconds.labels(route).observe(time.perf_counter() - begin)
