"""Checks of a data set. Each finding names the case, what is wrong and what to do.

| rule | severity | what |
|---|---|---|
| missing | warning | a table's column that lacks values |
| unreadable | error | a file that can't be decoded |
| empty | error | no pixels, or not one finite value |
| nonfinite | warning | some pixels are NaN or infinite |
| constant | warning | all pixels alike |
| shape | error | other axes or channels than the rest |
| geometry | error | mask, region or channels of another shape, spacing or place than the image |
| label-range | error | a label that no class has |
| target | error, in a test split warning | no label or mask |
| duplicate | warning | the same pixels twice, within a split or across (published sets have such) |
| leak | error | the same patient in two splits |
| no-cases | error where only training lacks it, else warning | a class without cases |
| spacing | warning | a voxel size far from the others' |
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medray.data.image import Image, Mask
from medray.data.manifest import IGNORE, Case, Finding, Manifest
from medray.data.readers import read_image, read_mask
from medray.data.sweep import Progress, sweep
from medray.errors import DataError, LeakError, UnreadableError
from medray.tasks.catalogue import find_task

_KEPT = ("unpaired", "missing")  # findings of the layout: a check of the cases can't see them again
_SHOWN = 20


@dataclass
class _Seen:
    """What one case showed; small, so that all of them fit in memory."""

    findings: list[Finding] = field(default_factory=list)
    digest: str = ""
    spacing: tuple[float, ...] | None = None
    classes: frozenset[int] = frozenset()


def check(manifest: Manifest, *, progress: Progress | None = None) -> Manifest:
    """Read every case and look at all together.

    Args:
        manifest: as a layout built it.
        progress: called with (done, all, case id).

    Returns:
        The same manifest with its findings, errors first. Nothing is raised for bad data: see :func:`require_sound`.
    """
    root = Path(manifest.root)
    seen = list(sweep(lambda case: _look(manifest, case, root), manifest.cases, progress, name=lambda case: case.id))
    findings = [f for f in manifest.findings if f.rule in _KEPT]
    for one in seen:
        findings += one.findings
    findings += _leaks(manifest)
    findings += _duplicates(manifest, seen)
    findings += _classes(manifest, seen)
    findings += _spacings(manifest, seen)
    findings.sort(key=lambda f: f.severity != "error")
    return manifest.model_copy(update={"findings": tuple(findings)})


def require_sound(manifest: Manifest, *, strict: bool = False) -> None:
    """Refuse a manifest with errors (``strict``: with any finding).

    Raises:
        LeakError: a patient stands on two sides of a split.
        DataError: any other error.
    """
    bad = [f for f in manifest.findings if strict or f.severity == "error"]
    if not bad:
        return
    lines = [
        f"  {f.rule}{f' [{f.case}]' if f.case else ''}: {f.message}. {f.fix[:1].upper()}{f.fix[1:]}"
        for f in bad[:_SHOWN]
    ]
    more = f"\n  and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    leaks = any(f.rule == "leak" for f in bad)
    text = f"{manifest.source}: {len(bad)} finding{'s' * (len(bad) > 1)} to resolve:\n" + "\n".join(lines) + more
    raise (LeakError if leaks else DataError)(text)


def _error(rule: str, case: Case | None, message: str, fix: str) -> Finding:
    return Finding(rule=rule, severity="error", case=case.id if case else None, message=message, fix=fix)


def _warning(rule: str, case: Case | None, message: str, fix: str) -> Finding:
    return Finding(rule=rule, severity="warning", case=case.id if case else None, message=message, fix=fix)


def _look(manifest: Manifest, case: Case, root: Path) -> _Seen:
    seen = _Seen()
    seen.findings += _target(manifest, case)
    if case.label is not None:
        seen.classes = _positive(case.label)
    images = []
    for reference in case.images:
        try:
            images.append(read_image(reference, root))
        except UnreadableError as error:
            seen.findings.append(
                _error("unreadable", case, str(error), "repair or replace the file, or remove the case")
            )
            return seen
    first = images[0]
    for other in images[1:]:
        seen.findings += _same_place(case, first, other, f"channel {other.source}")
    seen.findings += _pixels(manifest, case, images)
    seen.spacing = first.spacing
    seen.digest = _digest(images)
    valid = None
    if case.valid is not None:
        valid = _mask(case, case.valid, root, first, "region of interest", seen)
    if case.mask is not None:
        mask = _mask(case, case.mask, root, first, "mask", seen)
        if mask is not None:
            seen.findings += _labels(manifest, case, mask)
            inside = mask if valid is None or valid.shape != mask.shape else mask[valid > 0]
            seen.classes = frozenset(int(v) for v in np.unique(inside) if v != IGNORE)
    return seen


def _positive(label: int | tuple[int, ...]) -> frozenset[int]:
    return frozenset({label} if isinstance(label, int) else {k for k, flag in enumerate(label) if flag})


def _target(manifest: Manifest, case: Case) -> Iterator[Finding]:
    count = len(manifest.classes)
    form = find_task(manifest.task).target
    if form == "mask":
        missing, what = case.mask is None, "mask"
    else:
        missing, what = case.label is None, "label"
    if missing:
        make = _warning if case.split == "test" else _error
        yield make("target", case, f"no {what}", f"add the {what}, or remove the case")
    elif form == "class" and not (isinstance(case.label, int) and 0 <= case.label < count):
        yield _error("label-range", case, f"label {case.label} with {count} classes", f"use 0 to {count - 1}")
    elif form == "labels":
        flags = case.label
        if not isinstance(flags, tuple) or len(flags) != count or not set(flags) <= {0, 1}:
            yield _error("label-range", case, f"labels {flags} for {count} findings", f"give {count} values of 0 or 1")


def _pixels(manifest: Manifest, case: Case, images: list[Image]) -> Iterator[Finding]:
    channels = sum(image.array.shape[0] for image in images)
    ndim = images[0].ndim
    if ndim != manifest.ndim:
        yield _error("shape", case, f"{ndim} spatial axes, the data set has {manifest.ndim}", "remove the case")
    elif channels != manifest.channels:
        text = f"{channels} channels, the data set has {manifest.channels}"
        yield _error("shape", case, text, "convert it to the same channels (grey or colour), or remove the case")
    for image in images if not manifest.columns else ():  # of a table the layout has said what is missing
        if image.array.size == 0:
            yield _error(
                "empty", case, f"{image.source}: shape {image.array.shape}", "export the image anew, or remove the case"
            )
            continue
        low, high = float(image.array.min()), float(image.array.max())
        # A reader may have replaced values that are not finite; it then says how many.
        lost = int(image.original.get("nonfinite", 0) or 0)
        if not np.isfinite(low + high):
            lost = int(image.array.size - np.isfinite(image.array).sum())
        if lost >= image.array.size:
            yield _error(
                "empty", case, f"{image.source}: not one finite value", "export the image anew, or remove the case"
            )
        elif lost:
            yield _warning(
                "nonfinite", case, f"{image.source}: {lost} pixels are NaN or infinite", "export the image anew"
            )
        if low == high:
            yield _warning(
                "constant", case, f"{image.source}: all pixels are {low:g}", "look at the image; remove it if blank"
            )


def _mask(case: Case, reference: str, root: Path, image: Image, what: str, seen: _Seen) -> Any:
    try:
        mask = read_mask(reference, root)
    except UnreadableError as error:
        seen.findings.append(_error("unreadable", case, str(error), f"export the {what} anew, or remove the case"))
        return None
    seen.findings += _same_place(case, image, mask, what)
    return mask.array


def _same_place(case: Case, image: Image, other: Image | Mask, what: str) -> Iterator[Finding]:
    """Whether two grids are the same: in shape, in spacing to 1 %, in place to half a voxel."""
    shape = other.shape if isinstance(other, Image) else tuple(other.array.shape)
    fix = "resample it to the image's grid, or remove the case"
    if shape != image.shape:
        yield _error("geometry", case, f"{what} has shape {shape}, the image {image.shape}", fix)
        return
    if image.spacing and other.spacing and not np.allclose(image.spacing, other.spacing, rtol=0.01, atol=0):
        yield _error("geometry", case, f"{what} has spacing {_mm(other.spacing)}, the image {_mm(image.spacing)}", fix)
        return
    if image.affine is not None and other.affine is not None and len(shape) == 3 and image.spacing:
        corners = np.array([[x, y, z, 1] for x in (0, shape[0]) for y in (0, shape[1]) for z in (0, shape[2])])
        apart = float(np.abs((corners @ (image.affine - other.affine).T)[:, :3]).max())
        if apart > 0.5 * min(image.spacing):
            yield _error("geometry", case, f"{what} lies up to {apart:.1f} mm away from the image", fix)


def _labels(manifest: Manifest, case: Case, mask: Any) -> Iterator[Finding]:
    count = len(manifest.classes)
    stray = [int(v) for v in np.unique(mask) if v != IGNORE and not 0 <= v < count]
    if stray:
        text = f"{case.mask}: labels {stray[:8]} with {count} classes"
        yield _error(
            "label-range", case, text, f"use 0 to {count - 1} ({IGNORE}: ignored), or name the class in the data set"
        )


def _digest(images: list[Image]) -> str:
    state = hashlib.sha256()
    for image in images:
        state.update(str(image.array.shape).encode())
        state.update(np.ascontiguousarray(image.array).view(np.uint8).data)
    return state.hexdigest()


def _leaks(manifest: Manifest) -> Iterator[Finding]:
    sides: dict[str, dict[str, Case]] = defaultdict(dict)
    for case in manifest.cases:
        if case.split is not None and case.patient:
            sides[case.patient].setdefault(case.split, case)
    for patient, found in sides.items():
        if len(found) > 1:
            where = ", ".join(f"{split} ({case.id})" for split, case in found.items())
            fix = "move all images of the patient to one split"
            yield _error("leak", next(iter(found.values())), f"patient {patient} stands in {where}", fix)


def _duplicates(manifest: Manifest, seen: list[_Seen]) -> Iterator[Finding]:
    groups: dict[str, list[Case]] = defaultdict(list)
    for case, one in zip(manifest.cases, seen, strict=True):
        if one.digest:
            groups[one.digest].append(case)
    for cases in groups.values():
        if len(cases) == 1:
            continue
        names = ", ".join(case.id for case in cases[:6]) + (", …" if len(cases) > 6 else "")
        splits = sorted({case.split for case in cases if case.split})
        targets = {case.label for case in cases}
        odd = " with different labels" if len(targets) > 1 else ""
        if len(splits) > 1:
            text = f"the same image stands in {' and '.join(splits)}{odd}: {names}"
            yield _warning(
                "duplicate", cases[0], text, "keep it in one split: it makes the score of the other optimistic"
            )
        else:
            groups_differ = len({case.group for case in cases}) > 1
            risk = ", and may fall on both sides of a split" if groups_differ and not splits else ""
            text = f"the same image {len(cases)} times{odd}{risk}: {names}"
            yield _warning("duplicate", cases[0], text, "keep one, or give all the same patient")


def _classes(manifest: Manifest, seen: list[_Seen]) -> Iterator[Finding]:
    shown: dict[str | None, set[int]] = defaultdict(set)
    for case, one in zip(manifest.cases, seen, strict=True):
        shown[case.split] |= one.classes
    everywhere = set().union(*shown.values())
    first = 1 if find_task(manifest.task).dense else 0  # nobody looks for background
    for index, name in list(enumerate(manifest.classes))[first:]:
        if index not in everywhere:
            yield _warning(
                "no-cases", None, f"class {name!r} has no cases", "add cases that show it, or drop the class"
            )
        elif "train" in shown and index not in shown["train"]:
            text = f"class {name!r} has no cases in train, but elsewhere"
            yield _error("no-cases", None, text, "move cases that show it to train, or drop the class")


def _spacings(manifest: Manifest, seen: list[_Seen]) -> Iterator[Finding]:
    """Voxel sizes off the median by more than a factor of two and five robust standard deviations."""
    known = [(case, one.spacing) for case, one in zip(manifest.cases, seen, strict=True) if one.spacing]
    known = [(case, spacing) for case, spacing in known if len(spacing) == manifest.ndim]
    if len(known) < 5:
        return
    logs = np.log([spacing for _, spacing in known])
    middle = np.median(logs, axis=0)
    spread = 1.4826 * np.median(np.abs(logs - middle), axis=0)
    far = np.abs(logs - middle) > np.maximum(np.log(2), 5 * spread)
    for (case, spacing), axes in zip(known, far, strict=True):
        if axes.any():
            text = f"spacing {_mm(spacing)}, the median is {_mm(np.exp(middle))}"
            yield _warning("spacing", case, text, "check the header's voxel size; remove the case if it is wrong")


def _mm(spacing: Any) -> str:
    return " x ".join(f"{s:.3g}" for s in spacing) + " mm"
