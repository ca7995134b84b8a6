"""From a source as a person writes it to a Manifest. One layout a file; here it is decided which one it is."""

from __future__ import annotations

from pathlib import Path

from medray.data.layouts.base import Draft, ask_task, exists, finish, images_under
from medray.data.layouts.dicom import draft_patients, holds_dicom, patient_table, resolve_series
from medray.data.layouts.folders import draft_classes, draft_pairs, has_classes, has_pairs
from medray.data.layouts.medmnist import draft_medmnist
from medray.data.layouts.nnunet import draft_nnunet
from medray.data.layouts.table import draft_table, find_table, split_query
from medray.data.manifest import Manifest
from medray.data.phantoms import phantom_manifest
from medray.data.sweep import Progress
from medray.data.tablefile import is_table
from medray.errors import DataError
from medray.tasks.catalogue import find_task

__all__ = ["build_manifest"]

_LAYOUTS = (
    "a folder per class, a table (cases.csv), dataset.json of MSD or nnU-Net, images/ beside masks/, a DICOM tree "
    "with a table or a folder per class, a MedMNIST .npz, or phantom://NAME"
)


def build_manifest(source: str, *, task: str = "auto", progress: Progress | None = None) -> Manifest:
    """Find the cases of ``source``; images are not decoded but for what their headers say.

    Args:
        source: ``phantom://NAME?seed=0&cases=48&size=48``; a folder; a table (``cases.csv?image=file&label=dx`` names
            its columns); ``dataset.json``; an ``.npz``; a ``manifest.json`` that was saved before.
        task: the kind that the targets shall be, or ``auto``.
        progress: called with (done, all, name) while headers are read.

    Raises:
        ConfigError: there is no such task.
        DataError: nothing is there, no layout fits, or its files contradict each other.
    """
    if task != "auto":
        find_task(task)  # of an unknown one nothing else is worth telling
    if source.startswith("phantom://"):
        manifest = phantom_manifest(source)
        if task == "auto":
            return manifest
        return manifest.model_copy(update={"task": ask_task(task, find_task(manifest.task).target, source)})
    text, naming = split_query(source)
    path = Path.home() / text[2:] if text.startswith("~/") else Path(text)
    if not exists(path):
        raise DataError(f"{source}: there is no such file or folder. Give {_LAYOUTS}")
    if path.name == "manifest.json" and path.is_file():
        return Manifest.load(path)
    draft = (
        _file(source, path, task, progress, naming) if path.is_file() else _folder(source, path, task, progress, naming)
    )
    return finish(draft, source, progress)


def _file(source: str, path: Path, task: str, progress: Progress | None, naming: dict[str, str]) -> Draft:
    if is_table(path):
        return resolve_series(draft_table(path, task, naming), progress)
    if path.suffix.lower() == ".json":
        return draft_nnunet(source, path, task)
    if path.suffix.lower() == ".npz":
        return draft_medmnist(source, path, task)
    raise DataError(f"{source}: a single {path.suffix or 'file'} is no data set. Give {_LAYOUTS}")


def _folder(source: str, path: Path, task: str, progress: Progress | None, naming: dict[str, str]) -> Draft:
    if (path / "dataset.json").is_file():
        return draft_nnunet(source, path / "dataset.json", task)
    table = find_table(path)
    if table is not None:
        return _file(source, table, task, progress, naming)
    if has_pairs(path):
        return draft_pairs(source, path, task)
    patients = patient_table(path)
    if patients is not None and holds_dicom(path):
        return draft_patients(source, path, patients, task, progress)
    if has_classes(path):
        return draft_classes(source, path, task, progress)
    archives = sorted(path.glob("*.npz"))
    if len(archives) == 1:
        return draft_medmnist(source, archives[0], task)
    if archives:
        raise DataError(f"{source}: holds {', '.join(p.name for p in archives)}. Give one of them as data=")
    if next(images_under(path), None) is None and not holds_dicom(path):
        raise DataError(f"{source}: no images below this folder. Give {_LAYOUTS}")
    raise DataError(f"{source}: images, but nothing that labels them. Give {_LAYOUTS}")
