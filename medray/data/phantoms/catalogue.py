"""The phantoms by name, and the reading and writing of single ones."""

from __future__ import annotations

import difflib
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import parse_qsl

import numpy as np

from medray.data.image import Image, Mask
from medray.data.manifest import Case, Manifest
from medray.data.phantoms.base import PhantomSpec, Rendered, Scanner
from medray.data.phantoms.ct import render_abdomen, render_nodule
from medray.data.phantoms.fundus import render_lesions, render_vessels
from medray.data.phantoms.mr import render_head
from medray.data.phantoms.xray import render_effusion_film, render_findings_film, render_nodule_film
from medray.errors import DataError
from medray.tasks.catalogue import find_task

SCHEME = "phantom://"
_LARGEST = 1024  # per axis: a reference may come from a file that someone else wrote
_VOXELS = 1 << 27

_CT = (
    Scanner(site="north", noise=14, blur=1.0),
    Scanner(site="east", noise=22, blur=0.8, contrast=0.9, matrix=(1.0, 1.0, 0.75)),
    Scanner(site="south", noise=18, blur=1.3, contrast=0.8, matrix=(0.875, 0.875, 1.0)),
)
_MR = (
    Scanner(site="north", noise=0.03, blur=1.0, gain=1.0),
    Scanner(site="east", noise=0.06, blur=1.2, contrast=0.85, gain=0.45, matrix=(0.875, 0.875, 0.875)),
    Scanner(site="south", noise=0.045, blur=0.9, gain=1.7, matrix=(1.0, 1.0, 0.8)),
)
_FILM = (
    Scanner(site="north", noise=0.008, blur=1.0),
    Scanner(site="east", noise=0.013, blur=0.8, contrast=0.9),
    Scanner(site="south", noise=0.010, blur=1.6, contrast=1.1, gain=1.8),
)
_CAMERA = (
    Scanner(site="north", noise=5, blur=0.9),
    Scanner(site="east", noise=8, blur=1.3, contrast=0.9, gain=0.85),
    Scanner(site="south", noise=6, blur=0.6, gain=1.12),
)

PHANTOMS: dict[str, PhantomSpec] = {
    spec.name: spec
    for spec in (
        PhantomSpec(
            name="ct-lesions",
            description="abdominal CT with liver and liver lesions",
            task="segmentation",
            modality="CT",
            channels=1,
            classes=("background", "liver", "lesion"),
            size=(48, 48, 32),
            cases=48,
            scanners=_CT,
            render=render_abdomen,
        ),
        PhantomSpec(
            name="mr-lesions",
            description="FLAIR head with oedema and tumour core",
            task="segmentation",
            modality="MR",
            channels=1,
            classes=("background", "oedema", "core"),
            size=(48, 48, 32),
            cases=48,
            scanners=_MR,
            render=render_head,
        ),
        PhantomSpec(
            name="fundus-vessels",
            description="retinal photographs with vessels and their field of view",
            task="segmentation",
            modality="fundus",
            channels=3,
            classes=("background", "vessel"),
            size=(64, 64),
            cases=60,
            scanners=_CAMERA,
            render=render_vessels,
            has_valid=True,
        ),
        PhantomSpec(
            name="fundus-lesions",
            description="retinal photographs with haemorrhages and exudates",
            task="segmentation",
            modality="fundus",
            channels=3,
            classes=("background", "haemorrhage", "exudate"),
            size=(64, 64),
            cases=60,
            scanners=_CAMERA,
            render=render_lesions,
        ),
        PhantomSpec(
            name="xray-nodules",
            description="chest films with and without a nodule",
            task="classification",
            modality="XR",
            channels=1,
            classes=("normal", "nodule"),
            size=(64, 64),
            cases=200,
            scanners=_FILM,
            render=render_nodule_film,
        ),
        PhantomSpec(
            name="xray-findings",
            description="chest films with cardiomegaly, effusion, nodule in any combination",
            task="multilabel",
            modality="XR",
            channels=1,
            classes=("cardiomegaly", "effusion", "nodule"),
            size=(64, 64),
            cases=200,
            scanners=_FILM,
            render=render_findings_film,
        ),
        PhantomSpec(
            name="xray-effusion",
            description="chest films with a pleural effusion of four grades",
            task="ordinal",
            modality="XR",
            channels=1,
            classes=("none", "small", "moderate", "large"),
            size=(64, 64),
            cases=200,
            scanners=_FILM,
            render=render_effusion_film,
        ),
        PhantomSpec(
            name="ct-nodule-type",
            description="cubes of lung CT around a solid, part-solid or ground-glass nodule",
            task="classification",
            modality="CT",
            channels=1,
            classes=("solid", "part-solid", "ground-glass"),
            size=(32, 32, 32),
            cases=120,
            scanners=tuple(Scanner(site=s.site, noise=2 * s.noise, blur=s.blur) for s in _CT),
            render=render_nodule,
        ),
    )
}


@dataclass(frozen=True)
class Reference:
    """A parsed ``phantom://`` reference."""

    spec: PhantomSpec
    seed: int
    index: int
    cases: int
    size: tuple[int, ...]
    part: str

    def text(self, index: int, part: str = "") -> str:
        """The reference of one case of the same set."""
        size = "" if self.size == self.spec.size else "&size=" + "x".join(map(str, self.size))
        return f"{SCHEME}{self.spec.name}?seed={self.seed}&index={index}{size}{part and '&part=' + part}"


def parse(reference: str) -> Reference:
    """``phantom://NAME?seed=0&index=3&cases=48&size=48`` (or ``size=48x48x32``) to its parts, all but NAME optional.

    One number for ``size`` scales the default shape so that its first axis has that many pixels.

    Raises:
        DataError: an unknown phantom, key or value.
    """
    body = reference.removeprefix(SCHEME)
    name, _, query = body.partition("?")
    spec = PHANTOMS.get(name.strip("/"))
    if spec is None:
        near = difflib.get_close_matches(name, PHANTOMS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise DataError(f"{reference}: no phantom is called {name!r}.{hint} There are: {', '.join(PHANTOMS)}")
    values = {"seed": "0", "index": "0", "cases": str(spec.cases), "size": "", "part": ""}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in values:
            raise DataError(f"{reference}: unknown key {key!r}; use {', '.join(values)}")
        values[key] = value
    numbers = {}
    for key, low in (("seed", 0), ("index", 0), ("cases", 1)):
        if not re.fullmatch(r"\d{1,9}", values[key]) or int(values[key]) < low:
            raise DataError(f"{reference}: {key}={values[key]!r} must be a whole number from {low} to 999999999")
        numbers[key] = int(values[key])
    if values["part"] not in ("", "valid") or (values["part"] and not spec.has_valid):
        raise DataError(f"{reference}: part={values['part']!r} does not exist; only fundus-vessels has part=valid")
    return Reference(spec=spec, size=_size(reference, spec, values["size"]), part=values["part"], **numbers)


def _size(reference: str, spec: PhantomSpec, text: str) -> tuple[int, ...]:
    if not text:
        return spec.size
    parts = text.lower().split("x")
    if len(parts) not in (1, spec.ndim) or not all(re.fullmatch(r"\d{1,4}", p) for p in parts):
        example = "x".join(map(str, spec.size))
        raise DataError(f"{reference}: size={text!r} must be one number or {spec.ndim} joined by x, such as {example}")
    given = [int(p) for p in parts]
    shape = tuple(given) if len(given) > 1 else tuple(round(n * given[0] / spec.size[0]) for n in spec.size)
    if min(shape) < 8 or max(shape) > _LARGEST or int(np.prod(shape)) > _VOXELS:
        raise DataError(f"{reference}: size={text!r} must be 8 to {_LARGEST} pixels along each axis, {_VOXELS} in all")
    return shape


def _rng(seed: int, number: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, number, zlib.crc32(name.encode())])


def _patient(index: int) -> int:
    """The patient of a case: of each five cases the first two are the same person's."""
    return 4 * (index // 5) + max(0, index % 5 - 1)


def _flags(spec: PhantomSpec, seed: int, index: int) -> tuple[int, ...]:
    """Which classes the case shows. Within each block of cases all combinations come equally often, in random order."""
    form = find_task(spec.task).target
    if form == "mask":
        return ()
    count = len(spec.classes)
    options = 2**count if form == "labels" else count
    block = np.tile(np.arange(options), 2)
    choice = int(_rng(seed, index // len(block), f"{spec.name}/label").permutation(block)[index % len(block)])
    if form == "labels":
        return tuple(choice >> bit & 1 for bit in range(count))
    return tuple(int(k == choice) for k in range(count))


def _label(spec: PhantomSpec, flags: tuple[int, ...]) -> int | tuple[int, ...] | None:
    form = find_task(spec.task).target
    if form == "mask":
        return None
    return flags if form == "labels" else flags.index(1)


def _scanner(spec: PhantomSpec, seed: int, patient: int) -> Scanner:
    count = len(spec.scanners)
    order = _rng(seed, patient // count, f"{spec.name}/site").permutation(count)
    return spec.scanners[int(order[patient % count])]


@lru_cache(maxsize=2)
def _rendered(spec_name: str, seed: int, index: int, size: tuple[int, ...]) -> Rendered:
    """The image and its masks are asked for one after the other: the last ones are kept."""
    spec = PHANTOMS[spec_name]
    patient = _patient(index)
    scanner = _scanner(spec, seed, patient)
    shape = tuple(max(8, round(n * f)) for n, f in zip(size, scanner.matrix or (1.0,) * len(size), strict=True))
    person, picture = _rng(seed, patient, f"{spec_name}/patient"), _rng(seed, index, spec_name)
    return spec.render(person, picture, scanner, shape, _flags(spec, seed, index))


def read_phantom(reference: str) -> tuple[Image, Mask | None, int | tuple[int, ...] | None]:
    """Make one phantom.

    Returns:
        Image (C, *spatial), for segmentation its mask (*spatial) uint8, else its label (an index, or 0/1s).
        With ``part=valid`` the mask is the field of view.

    Raises:
        DataError: the reference names no phantom, or a size or key that there is not.
    """
    ref = parse(reference)
    made = _rendered(ref.spec.name, ref.seed, ref.index, ref.size)
    affine = None
    if made.spacing is not None:
        affine = np.diag([*made.spacing, 1.0])
        affine[:3, 3] = [-0.5 * s * (n - 1) for s, n in zip(made.spacing, made.array.shape[1:], strict=True)]
    image = Image(
        array=made.array + np.float32(0),
        spacing=made.spacing,
        affine=affine,
        modality=ref.spec.modality,
        source=reference,
    )
    chosen = made.valid if ref.part == "valid" else made.mask
    mask = None
    if chosen is not None:
        mask = Mask(array=chosen.copy(), spacing=made.spacing, affine=affine, source=reference)
    return image, mask, _label(ref.spec, _flags(ref.spec, ref.seed, ref.index))


def phantom_manifest(source: str) -> Manifest:
    """The manifest of ``phantom://NAME?seed=..&cases=..&size=..``; nothing is rendered."""
    ref = parse(source)
    spec = ref.spec
    cases = []
    for index in range(ref.cases):
        patient = _patient(index)
        person = _rng(ref.seed, patient, f"{spec.name}/person")
        here = ref.text(index)
        cases.append(
            Case(
                id=f"{spec.name}-{index:04d}",
                images=(here,),
                label=_label(spec, _flags(spec, ref.seed, index)),
                mask=here if find_task(spec.task).dense else None,
                valid=ref.text(index, "valid") if spec.has_valid else None,
                patient=f"P{patient:04d}",
                site=_scanner(spec, ref.seed, patient).site,
                columns={
                    "age": float(np.clip(round(person.normal(58, 14)), 18, 95)),
                    "sex": str(person.choice(["F", "M"])),
                },
            )
        )
    return Manifest(
        source=source,
        root=".",
        task=spec.task,
        ndim=3 if spec.ndim == 3 else 2,
        channels=spec.channels,
        classes=spec.classes,
        modality=spec.modality,
        cases=tuple(cases),
    )
