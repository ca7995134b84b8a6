"""Where scalars, pictures and artifacts of a run are written: TensorBoard, MLflow, both, or nowhere; and MLflow's
registry, where a study's bundle has a name and a version.

Callers are handed a :class:`Tracker` and know no vendor. Behind :class:`Trackers`, a store that fails (a full disk, a
lock) ends no run.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote, urlsplit

from medray.errors import MissingDependencyError, StorageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Picture = npt.NDArray[np.uint8] | Path
    """(H, W) or (H, W, 3) uint8, or a picture's file."""

_log = logging.getLogger(__name__)

CHAMPION = "champion"
"""Alias of the version that a study registered last."""
_DATABASE = "mlflow.db"
_BUNDLE = "bundle"
_DIGEST = "medray.bundle"
"""Tag of a version: SHA-256 of its bundle's bundle.json, which names the hash of every other file."""


class Tracker(Protocol):
    """What a run tells. All methods may be called at any time before :meth:`close`."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Settings of the run; nested mappings become dotted names."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Measurements at an optimiser step."""

    def picture(self, name: str, picture: Picture, step: int = 0) -> None:
        """A picture, (H, W) or (H, W, 3) uint8, or a file."""

    def artifact(self, path: Path) -> None:
        """A file or folder to keep with the run."""

    def close(self) -> None:
        """Write out what is buffered; a second call does nothing."""


class NullTracker:
    """Writes nothing."""

    def params(self, values: Mapping[str, Any]) -> None:
        pass

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        pass

    def picture(self, name: str, picture: Picture, step: int = 0) -> None:
        pass

    def artifact(self, path: Path) -> None:
        pass

    def close(self) -> None:
        pass


class Trackers:
    """Several trackers as one. One that fails is dropped, with a warning, and the others go on."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)

    def _each(self, method: str, *arguments: Any) -> None:
        for tracker in tuple(self._trackers):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # a vendor's store may raise anything, and none of it is worth a training run
                _log.warning("%s: stopped tracking: %s", type(tracker).__name__, error)
                self._trackers.remove(tracker)

    def params(self, values: Mapping[str, Any]) -> None:
        self._each("params", values)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._each("scalars", values, step)

    def picture(self, name: str, picture: Picture, step: int = 0) -> None:
        self._each("picture", name, picture, step)

    def artifact(self, path: Path) -> None:
        self._each("artifact", path)

    def close(self) -> None:
        self._each("close")


class TensorBoardTracker:
    """Events for TensorBoard: ``tensorboard --logdir runs``.

    Args:
        directory: where the event file goes; made if missing.

    Raises:
        MissingDependencyError: TensorBoard is not installed.
    """

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            raise MissingDependencyError("tensorboard", "Tracking", "pip install tensorboard") from None
        self._writer: SummaryWriter | None = SummaryWriter(str(directory), flush_secs=10)

    def params(self, values: Mapping[str, Any]) -> None:
        if self._writer is not None:
            rows = "\n".join(
                f"| {name} | {str(value).replace('|', '&#124;')} |" for name, value in flatten(values).items()
            )
            self._writer.add_text("params", f"| field | value |\n|---|---|\n{rows}")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def picture(self, name: str, picture: Picture, step: int = 0) -> None:
        if self._writer is not None:
            array = _pixels(picture)
            self._writer.add_image(name, array, step, dataformats="HW" if array.ndim == 2 else "HWC")

    def artifact(self, path: Path) -> None:
        if self._writer is not None:
            self._writer.add_text("artifacts", str(path))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class MlflowTracker:
    """A run in an MLflow store that lies beside the runs: ``mlflow ui --backend-store-uri sqlite:///runs/mlflow.db``.

    Args:
        folder: holds ``mlflow.db`` and ``mlartifacts/``; made if missing.
        experiment: the MLflow experiment's name (the study's).
        run: the run's name.
        parent: id of the run that this one belongs to (a trial to its study).
        tags: further tags.

    Raises:
        MissingDependencyError: MLflow is not installed.
    """

    def __init__(
        self,
        folder: Path,
        experiment: str,
        run: str,
        *,
        parent: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        self._client = _client(folder)
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(experiment)
        if found is None:
            try:
                place = (folder / "mlartifacts" / experiment).as_uri()
                experiment_id = self._client.create_experiment(experiment, artifact_location=place)
            except MlflowException:  # another process was faster
                found = self._client.get_experiment_by_name(experiment)
                if found is None:
                    raise
        if found is not None:
            experiment_id = found.experiment_id
        own = {"mlflow.runName": run, **({"mlflow.parentRunId": parent} if parent else {}), **(tags or {})}
        self.run_id: str = self._client.create_run(experiment_id, run_name=run, tags=own).info.run_id
        self._open = True

    def params(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        # MLflow takes 100 a call and 6,000 characters a value.
        rows = [Param(name, str(value)[:6000]) for name, value in flatten(values).items()]
        for start in range(0, len(rows), 100):
            self._client.log_batch(self.run_id, params=rows[start : start + 100])

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows = [Metric(name, float(value), now, step) for name, value in values.items() if math.isfinite(value)]
        if rows:
            self._client.log_batch(self.run_id, metrics=rows)

    def picture(self, name: str, picture: Picture, step: int = 0) -> None:
        self._client.log_image(self.run_id, _pixels(picture), artifact_file=f"pictures/{name}-{step:06d}.png")

    def artifact(self, path: Path) -> None:
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), path.name)
        else:
            self._client.log_artifact(self.run_id, str(path))

    def register(self, name: str, bundle: Path, digest: str) -> str:
        """Keep a copy of a bundle with the run, as a new version of a registered model, its champion from now on.

        Args:
            name: of the model.
            bundle: its folder.
            digest: SHA-256 of its ``bundle.json``.

        Returns:
            The version's number.
        """
        from mlflow.exceptions import MlflowException

        self._client.log_artifacts(self.run_id, str(bundle), _BUNDLE)
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{self._client.get_run(self.run_id).info.artifact_uri}/{_BUNDLE}"
        made = self._client.create_model_version(
            name, source, run_id=self.run_id, tags={_DIGEST: digest}, await_creation_for=0
        )
        version = str(made.version)
        self._client.set_registered_model_alias(name, CHAMPION, version)
        return version

    def close(self, status: str = "FINISHED") -> None:
        """End the run; ``status`` is MLflow's: FINISHED, FAILED or KILLED."""
        if self._open:
            self._open = False
            self._client.set_terminated(self.run_id, status)


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A version of a registered model.

    Attributes:
        folder: of its bundle.
        digest: SHA-256 that the bundle's ``bundle.json`` had when it was registered.
    """

    name: str
    version: str
    folder: Path
    digest: str


def registered(folder: Path, name: str, *, alias: str | None = None, version: str | None = None) -> Registered:
    """Look a model's version up in the registry of ``folder``, by its alias or by its number.

    Raises:
        StorageError: no registry, no such model, alias or version, one that medray didn't register, or a bundle that
            isn't on this machine.
        MissingDependencyError: MLflow is not installed.
    """
    if not (folder / _DATABASE).is_file():
        raise StorageError(
            f"{folder}: holds no {_DATABASE}, the registry that studies write. Give the folder of the runs"
        )
    client = _client(folder.absolute())
    from mlflow.exceptions import MlflowException

    asked = f"models:/{name}@{alias}" if alias is not None else f"models:/{name}/{version}"
    try:
        found = (
            client.get_model_version_by_alias(name, alias)
            if alias is not None
            else client.get_model_version(name, str(version))
        )
    except MlflowException as error:
        known = ", ".join(sorted(one.name for one in client.search_registered_models())[:10]) or "none"
        raise StorageError(
            f"{asked}: {folder / _DATABASE} has no such version ({error}). Models there: {known}"
        ) from None
    digest, source = found.tags.get(_DIGEST), str(found.source)
    if not digest:
        raise StorageError(
            f"{asked} (version {found.version}): was not registered by medray, so nothing says that its files are "
            "unaltered. Give the bundle's folder"
        )
    parts = urlsplit(source)
    place = Path(unquote(parts.path))
    if parts.scheme not in ("", "file") or not place.is_dir():
        raise StorageError(
            f"{asked} (version {found.version}): its bundle lies at {source}, which is no folder of this machine. "
            "Fetch it, and give its folder"
        )
    return Registered(name=name, version=str(found.version), folder=place, digest=digest)


def _client(folder: Path) -> Any:
    """MLflow's client of the store in ``folder``, an absolute path."""
    # MLflow would report its use to its makers; nothing leaves a hospital unasked.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    try:
        from mlflow import MlflowClient
    except ImportError:
        raise MissingDependencyError("mlflow", "Tracking with MLflow", "pip install mlflow") from None
    for chatty in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=f"sqlite:///{folder / _DATABASE}", registry_uri=f"sqlite:///{folder / _DATABASE}")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"optim": {"lr": 0.1}}`` to ``{"optim.lr": 0.1}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _pixels(picture: Picture) -> npt.NDArray[np.uint8]:
    import numpy as np

    if isinstance(picture, Path):
        from PIL import Image as Pillow

        with Pillow.open(picture) as file:
            return np.asarray(file.convert("RGB"))
    return picture
