"""One replica's work, without HTTP: who may ask, what is asked, the answer, and what is written down of it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from medray import logs
from medray.config.serving import ServeConfig
from medray.data.image import Image
from medray.data.preprocess import Preprocessor
from medray.engines.ray.serve import answers, protocol
from medray.engines.ray.serve.fleet import Fleet, MakeBatcher, Version
from medray.engines.ray.serve.intake import Bounds, Part, read_upload, require_small
from medray.engines.ray.serve.jobs import Jobs, Running
from medray.engines.ray.serve.journal import Answers, Audit, Kept
from medray.engines.ray.serve.keys import Key, KeyRing, Scope
from medray.engines.ray.serve.meters import Meters
from medray.engines.ray.serve.rates import Admission, RateLimit
from medray.engines.ray.serve.refusal import RefusedError, is_full, no_space
from medray.engines.ray.serve.work import Work
from medray.errors import DataError, ModelError
from medray.explain.cam import Method, explain
from medray.predict.predictor import Floats, probabilities
from medray.predict.sliding import window_count

_MOST_THREADS = 16
_SHORT = 1 << 20  # bytes: a millisecond's work

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Explain:
    """What is to be explained, and how: see :func:`medray.explain.cam.explain`."""

    method: Method
    target: str | None


@dataclass(frozen=True, kw_only=True)
class Job:
    """A prediction, or an explanation, that is asked for.

    Attributes:
        explain: None for a prediction.
        tell: hears how far it is, 0 to 1.
        folder: private to it, with its files; removed by whoever answers it.
        digest: SHA-256 of all files, in hexadecimal.
        accept: the client's.
        idempotency: the client's key, if any.
    """

    folder: Path
    parts: tuple[Part, ...]
    digest: str
    key: Key
    model: str | None
    version: str | None
    accept: str | None
    idempotency: str | None
    explain: Explain | None = None
    tell: Callable[[float], None] | None = None

    @property
    def asked(self) -> str:
        """Hash of all that is asked for."""
        parts = [self.digest, self.model or "", self.version or "", self.accept or "", str(self.explain)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class Service:
    """Everything that a replica holds.

    Args:
        config: of the server.
        path: of its file, to be followed; None: there is none.
        threads: of each engine.
        make_batcher: see :class:`Fleet`.

    Raises:
        MedrayError: a bundle, the keys or the state folder can't be used.
    """

    def __init__(
        self, config: ServeConfig, *, path: Path | None, threads: int, make_batcher: MakeBatcher, meters: Meters
    ) -> None:
        self.meters = meters
        state = Path(config.state)
        self.audit = Audit(state / "audit.jsonl")
        self._work_folder = Work(state)
        self._answers = Answers(state / "answers", config.kept_answers)
        self.jobs = Jobs(state / "jobs", config.kept_answers)
        self._rates = RateLimit(state / "rates")
        keys = config.security.keys
        self.ring = KeyRing(None if keys is None else Path(keys), self._keys_refused)
        self.limits = config.limits
        self.predictions = Admission(config.limits.waiting)
        self._later = Admission(max(1, config.limits.waiting // 2))  # of jobs: others wait in front of the server
        self.uploads = Admission(8 * config.limits.waiting)
        self._per_minute = config.security.requests_per_minute
        self._executor = ThreadPoolExecutor(min(_MOST_THREADS, config.limits.waiting), thread_name_prefix="prediction")
        self._bounds = Bounds(unpacked=config.limits.unpacked_mb << 20, files=config.limits.files)
        self.fleet = Fleet(config, path=path, threads=threads, make_batcher=make_batcher, ready=self._opened)

        self._tell_refused(None)

    def refresh_keys(self) -> None:
        """Look at the file of keys; called over and over, from a thread of its own: opening bundles takes minutes."""
        self.ring.refresh()

    def refresh(self) -> None:
        """Look at the configuration and its bundles; called over and over, from a thread."""
        self.jobs.sweep()
        self._answers.sweep()
        before = self.fleet.error
        if self.fleet.follow():
            logs.event("serving-changed", versions=[f"{one.model} {one.version}" for one in self.versions()])
        else:
            self._tell_refused(before)
        self.meters.config_refused.set(self.fleet.error is not None)
        self.meters.waiting.set(self.predictions.inside)

    def _tell_refused(self, before: str | None) -> None:
        if self.fleet.error != before and self.fleet.error is not None:
            logs.event("serving-refused", level="error", text=self.fleet.error)

    def close(self) -> None:
        """Answer what was taken in, and stop. It waits: not to be called on the event loop, which answers need."""
        self._executor.shutdown(wait=True)
        self.fleet.close()
        self.audit.close()
        self._work_folder.close()

    @property
    def jobs_inside(self) -> int:
        """Jobs that are computed here, or wait."""
        return self._later.inside

    def versions(self) -> list[Version]:
        """All that answer."""
        return [one for versions in self.fleet.table.values() for one in versions.values()]

    def _opened(self, version: Version) -> None:
        self.meters.baseline(version.model, version.version, version.fingerprint)
        about = version.about
        self.meters.info.labels(
            version.model, version.version, about["model"]["bundle"], about["engine"], about["precision"]
        ).set(1)

    def _keys_refused(self, text: str) -> None:
        logs.event("keys-refused", level="error", text=text)

    # Who ------------------------------------------------------------------------------------------------------------

    def known(self, text: str | None, scope: Scope) -> Key:
        """The key behind a request that costs nothing: it isn't counted.

        Raises:
            RefusedError: 401 or 403.
        """
        return self.ring.who(text, scope)

    def let_in(self, text: str | None, scope: Scope) -> Key:
        """The key behind a request for an answer, counted.

        Raises:
            RefusedError: 401, 403 or 429.
        """
        key = self.known(text, scope)
        per_minute = key.requests_per_minute or self._per_minute
        if per_minute is not None:
            self._rates.take(key.id, per_minute)
        return key

    # Predictions of images ------------------------------------------------------------------------------------------

    def new_folder(self) -> Path:
        """A private one, for one request's files."""
        return self._work_folder.new_folder()

    def start(self, job: Job) -> Any:
        """Have a job answered on a thread; a client that goes away does not stop it. A ``Future[Kept]``.

        Raises:
            RefusedError: 429, too many wait.
        """
        place = self.predictions.admitted()
        place.__enter__()
        self.meters.waiting.set(self.predictions.inside)
        try:
            return self._executor.submit(self._work, job, place)
        except BaseException:
            place.__exit__(None, None, None)
            raise

    def start_later(self, job: Job) -> str:
        """Have a job answered while its client goes its way; its id in :attr:`jobs`.

        Raises:
            RefusedError: 422, its Idempotency-Key was another request's; 409, the first is just beginning or ending;
                429, too many wait.
        """
        running = None
        try:
            token, running = self.jobs.begin(job.key.id, job.asked, job.idempotency)
            if running is None:
                shutil.rmtree(job.folder, ignore_errors=True)
                return token
            place = self._later.admitted()
            place.__enter__()
            try:
                future: Future[Kept] = self.start(replace(job, idempotency=None, tell=running.tell))
            except BaseException:
                place.__exit__(None, None, None)
                raise
        except BaseException:
            shutil.rmtree(job.folder, ignore_errors=True)
            if running is not None:
                running.drop()
            raise

        def ended(future: Future[Kept], running: Running = running) -> None:
            place.__exit__(None, None, None)
            _keep(running, future)

        future.add_done_callback(ended)
        return token

    def _work(self, job: Job, place: Any) -> Kept:
        try:
            if job.idempotency is None:
                return self._answer(job)
            with self._answers.slot(job.key.id, job.idempotency, job.asked) as slot:
                if slot.kept is not None:
                    return replace(slot.kept, headers={**slot.kept.headers, "Idempotency-Replayed": "true"})
                answer = self._answer(job)
                slot.keep(answer)
                return answer
        finally:
            shutil.rmtree(job.folder, ignore_errors=True)
            place.__exit__(None, None, None)
            self.meters.waiting.set(self.predictions.inside)

    def _answer(self, job: Job) -> Kept:
        with self.fleet.chosen(job.model, job.version, job.digest) as version:
            if job.explain is not None:
                return self._explain(job, version, job.explain)
            spec = version.bundle.spec
            form = answers.choose(job.accept, spec.kind)
            begin = time.perf_counter()
            image = read_upload(job.parts, job.folder, ndim=spec.ndim, bounds=self._bounds)
            read = time.perf_counter() - begin
            voxels, shape = self._voxels(version, image, job)
            engine = version if job.tell is None or shape is None else _Counted(version, shape, job.tell)
            with_probabilities = not spec.task.dense or (
                form in ("json", "sr") and 4 * len(spec.classes) * voxels <= answers.PROBABILITY_BYTES
            )
            try:
                found = version.bundle.predict(image, engine, with_probabilities=with_probabilities)
            except (DataError, ModelError) as error:
                raise _unfit("unfit-image", error, image, job) from error
            found = replace(found, seconds={"read": read, **found.seconds})
            noted = answers.flags(version.bundle, version.fingerprint, image, found.labels)
            begin = time.perf_counter()
            if form in ("json", "sr"):
                document = answers.as_json(version.bundle, found, image, noted, version.about)
                body = json.dumps(document, ensure_ascii=False, allow_nan=False).encode()
                if form == "sr":
                    body = answers.as_report(version.bundle, document, image, job.folder)
            else:
                assert found.labels is not None
                body = answers.as_file(form, version.bundle, found.labels, image, job.folder)
            found.seconds["write"] = time.perf_counter() - begin
            classes = _classes(version, found)
            self._count(version, image, found, noted, classes)
            self._account(version, job.key, "predict", job.digest, body)
            return Kept(status=200, headers=self._headers(version, answers.MEDIA[form]), body=body)

    def _explain(self, job: Job, version: Version, asked: Explain) -> Kept:
        """A map of where the network looked, from the bundle's torch twin; one at a time for each version."""
        form = answers.choose_map(job.accept)
        spec = version.bundle.spec
        image = read_upload(job.parts, job.folder, ndim=spec.ndim, bounds=self._bounds)
        self._voxels(version, image, job)
        try:
            with version.twin() as twin:
                found = explain(version.bundle, image, method=asked.method, target=asked.target, model=twin)
        except (DataError, ModelError) as error:
            raise _unfit("not-explained", error, image, job) from error
        note = f"{found.method} of {found.target_name}. {spec.intended_use}"
        body = answers.as_map(form, found.heat, image, job.folder, note)
        self._account(version, job.key, "explain", job.digest, body)
        headers = self._headers(version, answers.MEDIA[form])
        headers |= {"Medray-Method": found.method, "Medray-Target": quote(found.target_name, safe=" ")}
        return Kept(status=200, headers=headers, body=body)

    def _voxels(self, version: Version, image: Image, job: Job) -> tuple[int, tuple[int, ...] | None]:
        """Of one channel, on the image's own grid or as the network sees it, whichever has more; and the latter shape.

        Raises:
            RefusedError: 413, a small image with a large spacing would be too large once it is resampled; 422, it is
                not of the bundle's kind.
        """
        spec = version.bundle.spec
        own = math.prod(image.shape)
        if image.ndim != spec.ndim or len(image.array) != spec.channels:
            return own, None  # which predicting will refuse
        try:
            prepared = Preprocessor(spec.preprocess, ndim=spec.ndim, channels=spec.channels).geometry(image).prepared
        except DataError as error:
            raise _unfit("unfit-image", error, image, job) from error
        require_small(4 * spec.channels * math.prod(prepared), self._bounds, "resampled")
        return max(own, math.prod(prepared)), tuple(prepared)

    def _headers(self, version: Version, media: str) -> dict[str, str]:
        about = version.about
        return {
            "Content-Type": media,
            "Medray-Model": f"{version.model}/{version.version}",
            "Medray-Engine": f"{about['engine']} {about['precision']}",
            "Medray-Intended-Use": version.bundle.spec.intended_use.encode("ascii", "replace")
            .decode()[:200]
            .replace("\n", " ")
            .replace("\r", " "),
        }

    def _count(self, version: Version, image: Image, found: Any, noted: Sequence[Any], classes: Sequence[str]) -> None:
        name = (version.model, version.version)
        for stage, seconds in found.seconds.items():
            self.meters.stage_seconds.labels(*name, stage).observe(seconds)
        for one in classes:
            self.meters.answers.labels(*name, one).inc()
        for flag in noted:
            self.meters.flags.labels(*name, flag.flag).inc()
        if version.fingerprint is not None:
            share = answers.outside(version.fingerprint, image, found.labels)
            if share is not None:
                self.meters.outside.labels(*name).observe(share)

    def _account(self, version: Version, key: Key, what: str, digest: str, body: bytes) -> None:
        self.audit.write(
            who=key.id,
            name=key.name,
            what=what,
            model=version.model,
            version=version.version,
            bundle=version.identity[1],
            engine=version.about["engine"],
            precision=version.about["precision"],
            input=digest,
            result=hashlib.sha256(body).hexdigest(),
        )

    # Tensors --------------------------------------------------------------------------------------------------------

    async def infer(
        self, body: bytes, header_length: str | None, *, model: str, version: str | None, key: Key
    ) -> tuple[bytes, dict[str, str]]:
        """Answer a request of the Open Inference Protocol.

        Raises:
            RefusedError: whatever is wrong with it.
        """
        digest = await _off_the_loop(len(body), lambda: hashlib.sha256(body).hexdigest())
        with self.fleet.chosen(model, version, digest) as one, self.predictions.admitted():
            spec = one.bundle.spec
            asked = await _off_the_loop(
                len(body), lambda: protocol.parse(body, header_length, spec, self._bounds.unpacked)
            )
            begin = time.perf_counter()
            try:
                logits = await one.batcher.infer(asked.array)
            except (ModelError, RuntimeError, ValueError) as error:
                # The array is sound and of the described shape: what is left are sizes that the network can't halve.
                shape = list(asked.array.shape)
                raise RefusedError(422, "wrong-shape", f"the network does not run on the shape {shape}") from error
            self.meters.stage_seconds.labels(one.model, one.version, "network").observe(time.perf_counter() - begin)
            outputs = {"logits": logits}
            if "probabilities" in asked.outputs:
                outputs["probabilities"] = await _off_the_loop(
                    logits.nbytes, lambda: probabilities(logits, spec.kind, spec.temperature)
                )
            about = {
                "engine": one.about["engine"],
                "precision": one.about["precision"],
                "intended_use": spec.intended_use,
            }

            def write() -> tuple[bytes, dict[str, str], str]:
                text, headers = protocol.answer(asked, outputs, name=one.model, version=one.version, parameters=about)
                return text, headers, hashlib.sha256(text).hexdigest()

            answer, headers, result = await _off_the_loop(logits.nbytes, write)
            written = self.audit.submit(
                who=key.id,
                name=key.name,
                what="infer",
                model=one.model,
                version=one.version,
                bundle=one.identity[1],
                engine=one.about["engine"],
                precision=one.about["precision"],
                input=digest,
                result=result,
            )
            await asyncio.wrap_future(written)
            return answer, headers


class _Counted:
    """A version's engine, telling which share of an image's windows it has seen."""

    def __init__(self, version: Version, shape: Sequence[int], tell: Callable[[float], None]) -> None:
        how = version.bundle.spec.inference
        self.name, self.precision = version.name, version.precision
        self._version, self._tell, self._seen = version, tell, 0
        self._all = 1
        if version.bundle.spec.task.dense:
            self._all = window_count(shape, patch_size=how.patch_size, overlap=how.overlap, flip_axes=how.flip_axes)

    def __call__(self, batch: Floats) -> Floats:
        logits = self._version(batch)
        self._seen += len(batch)
        self._tell(min(0.99, self._seen / self._all))  # what is too large for memory sees some windows twice
        return logits


def _keep(running: Running, ended: Future[Kept]) -> None:
    """What became of a job, for whoever asks for it."""
    error = ended.exception()
    if error is None:
        running.done(ended.result())
    elif isinstance(error, RefusedError):
        running.failed(error)
    elif is_full(error):
        running.failed(no_space())
    else:
        logs.event("defect", level="error", error=type(error).__name__, route="/v1/jobs")
        running.failed(RefusedError(500, "defect", "the server met a defect of its own; its log says where"))


async def _off_the_loop(size: int, work: Callable[[], T]) -> T:
    """What takes long goes to a thread, so that health is answered meanwhile; what is short is done here, sooner."""
    return work() if size < _SHORT else await asyncio.to_thread(work)


def _unfit(reason: str, error: Exception, image: Image, job: Job) -> RefusedError:
    """422, without our own paths."""
    text = str(error).replace(str(job.folder), "").replace(image.source or "\0", "the image")
    return RefusedError(422, reason, text)


def _classes(version: Version, found: Any) -> list[str]:
    spec = version.bundle.spec
    if found.labels is None:
        return [spec.classes[index] for index in found.decisions]
    return [spec.classes[value] for value in range(1, len(spec.classes)) if (found.labels == value).any()]
