"""``dataset.json`` of the Medical Segmentation Decathlon and of nnU-Net (v2).

MSD lists its cases under ``training``; nnU-Net names channels and file ending, and finds ``imagesTr/CASE_0000.nii.gz``
and ``labelsTr/CASE.nii.gz`` (or takes them from ``dataset``). Labels are ``{name: number}`` or ``{number: name}``.
Test images count where ``labelsTs`` has their masks. A ``split.json`` beside it is heeded: ``{"train": [cases], …}``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from medray.data.image import Modality
from medray.data.layouts.base import (
    Draft,
    ask_task,
    natural,
    numbered_names,
    read_json,
    relative,
    split_of,
    stem_of,
    visible,
)
from medray.data.manifest import Case, Finding, Split
from medray.errors import DataError


def draft_nnunet(source: str, path: Path, task: str) -> Draft:
    """The cases of a folder with ``dataset.json``.

    Raises:
        DataError: the file lacks ``labels``, or neither lists cases nor has ``imagesTr``.
    """
    kind = ask_task(task, "mask", source)
    spec = read_json(path)
    root = path.parent.resolve()
    if not isinstance(spec, dict) or not isinstance(spec.get("labels"), dict):
        raise DataError(f"{path}: needs 'labels', such as {{'background': 0, 'lesion': 1}}. Add it")
    classes = numbered_names(spec["labels"], path)
    channels = spec.get("channel_names", spec.get("modality", {}))
    names = [str(n) for n in channels.values()] if isinstance(channels, dict) else []
    findings: list[Finding] = []
    if isinstance(spec.get("training"), list) and spec["training"]:
        cases = _listed(spec["training"], root, path)
    elif isinstance(spec.get("dataset"), dict):
        cases = [_entry(key, root, e.get("images"), e.get("label"), path) for key, e in spec["dataset"].items()]
    else:
        cases = _scanned(root, spec, path, "Tr", findings)
    test = _scanned(root, spec, path, "Ts", findings) if (root / "labelsTs").is_dir() else []
    if test:
        cases = [c.model_copy(update={"split": "train"}) for c in cases]
        cases += [c.model_copy(update={"split": "test"}) for c in test]
    return Draft(
        root=root,
        task=kind,
        classes=classes,
        cases=_heed_split(cases, root / "split.json"),
        modality=_modality(names),
        findings=findings,
    )


def _listed(entries: list[Any], root: Path, path: Path) -> list[Case]:
    cases = []
    for entry in entries:
        if not isinstance(entry, dict) or "image" not in entry:
            raise DataError(f"{path}: an entry of 'training' is {entry!r}; it must be {{'image': …, 'label': …}}")
        images = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
        cases.append(
            _entry(re.sub(r"_0000$", "", stem_of(Path(str(images[0])))), root, images, entry.get("label"), path)
        )
    return cases


def _entry(name: str, root: Path, images: Any, label: Any, path: Path) -> Case:
    if not isinstance(images, list) or not images or not all(isinstance(i, str) for i in images):
        raise DataError(f"{path}: case {name!r} lists images {images!r}; it must be a list of paths")
    mask = relative(root / label, root) if isinstance(label, str) else None
    return Case(id=name, images=tuple(relative(root / i, root) for i in images), mask=mask)


def _scanned(root: Path, spec: dict[str, Any], path: Path, part: str, findings: list[Finding]) -> list[Case]:
    folder, masks = root / f"images{part}", root / f"labels{part}"
    if not folder.is_dir():
        raise DataError(f"{path}: lists no 'training' cases and there is no folder {folder.name}/. Add either")
    ending = str(spec.get("file_ending", ""))
    groups: dict[str, list[tuple[int, Path]]] = {}
    for file in visible(folder):
        if not file.is_file() or (ending and not file.name.endswith(ending)):
            continue
        stem = file.name[: -len(ending)] if ending else stem_of(file)
        match = re.fullmatch(r"(.+)_(\d{4})", stem)
        name, channel = (match[1], int(match[2])) if match else (stem, 0)
        groups.setdefault(name, []).append((channel, file))
    by_stem = {}
    if masks.is_dir():
        by_stem = {
            p.name[: -len(ending)] if ending and p.name.endswith(ending) else stem_of(p): p for p in visible(masks)
        }
    cases = []
    for name in sorted(groups, key=natural):
        images = tuple(relative(p, root) for _, p in sorted(groups[name]))
        mask = by_stem.pop(name, None)
        cases.append(Case(id=name, images=images, mask=relative(mask, root) if mask else None))
    findings += [
        Finding(
            rule="unpaired",
            severity="warning",
            case=None,
            message=f"{relative(p, root)}: a mask without an image",
            fix=f"add the image to {folder.name}/, or delete the mask",
        )
        for p in by_stem.values()
    ]
    return cases


def _heed_split(cases: list[Case], path: Path) -> list[Case]:
    if not path.is_file():
        return cases
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: must be {{'train': [cases], 'test': [cases]}}. Correct or remove it")
    sides: dict[str, Split] = {}
    for name, members in content.items():
        side = split_of(name)
        if side is None or not isinstance(members, list):
            continue
        for member in members:
            if sides.setdefault(str(member), side) != side:
                raise DataError(
                    f"{path}: case {member!r} stands in {sides[str(member)]} and in {side}. Leave it in one"
                )
    without = [c.id for c in cases if c.id not in sides]
    if without:
        raise DataError(
            f"{path}: {len(without)} cases stand in no split, first {without[0]!r}. Add them, or remove the file"
        )
    return [c.model_copy(update={"split": sides[c.id]}) for c in cases]


def _modality(names: list[str]) -> Modality:
    text = " ".join(names).upper()
    if re.search(r"\bCT\b|^CT", text):
        return "CT"
    if re.search(r"MR|T1|T2|FLAIR|ADC|DWI|\bPD\b", text):
        return "MR"
    if re.search(r"X-?RAY|\bCR\b|\bDX\b", text):
        return "XR"
    return "US" if re.search(r"ULTRASOUND|\bUS\b", text) else "other"
