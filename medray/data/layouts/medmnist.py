"""One ``.npz`` in MedMNIST's layout: ``train_images``, ``train_labels`` and the same for ``val`` and ``test``."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from medray.data.layouts.base import Draft, ask_task
from medray.data.manifest import Case
from medray.errors import DataError


def draft_medmnist(source: str, path: Path, task: str) -> Draft:
    """Each image of the archive is a case. Labels of shape (n,) or (n, 1) are classes, (n, k) are k findings of 0 or 1.

    Raises:
        DataError: no such archive, arrays missing or of other shapes.
    """
    labels = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for split in ("train", "val", "test"):
                if f"{split}_images" in archive.files:
                    labels[split] = np.atleast_1d(archive[f"{split}_labels"])
    except KeyError as error:
        raise DataError(f"{path}: {error.args[0]}. Each X_images needs X_labels, as in MedMNIST") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: no .npz archive ({error}). Fetch it again") from None
    if "train" not in labels:
        raise DataError(f"{path}: no arrays train_images and train_labels, as in MedMNIST. Add them, or use a table")
    for split, values in labels.items():
        if values.ndim > 2 or values.dtype.kind not in "iub":
            raise DataError(
                f"{path}: {split}_labels is {values.dtype} {values.shape}; whole numbers (n, 1) or (n, k) are needed"
            )
    width = {values.shape[1] if values.ndim == 2 else 1 for values in labels.values()}
    if len(width) != 1:
        raise DataError(f"{path}: labels of the splits have {sorted(width)} columns; all need the same")
    several = width.pop() > 1
    kind = ask_task(task, "labels" if several else "class", source)
    flat = np.concatenate([values.reshape(len(values), -1) for values in labels.values()]).astype(np.int64)
    if flat.min() < 0 or (several and flat.max() > 1) or flat.max() > 10_000:
        raise DataError(
            f"{path}: labels run from {flat.min()} to {flat.max()}; classes from 0, findings 0 or 1 are needed"
        )
    count = flat.shape[1] if several else int(flat.max()) + 1
    root = path.parent.resolve()
    cases = []
    for split, values in labels.items():
        rows = values.reshape(len(values), -1).astype(int).tolist()
        cases += [
            Case.model_validate(
                {
                    "id": f"{split}-{k}",
                    "images": (f"{path.name}#{split}_images/{k}",),
                    "label": tuple(row) if several else row[0],
                    "split": split,
                }
            )
            for k, row in enumerate(rows)
        ]
    return Draft(root=root, task=kind, classes=tuple(str(k) for k in range(count)), cases=cases)
