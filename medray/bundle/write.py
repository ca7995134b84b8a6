"""Write a bundle: all of it, checked, or nothing."""

from __future__ import annotations

import contextlib
import copy
import datetime
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel
from torch import nn

from medray import __version__
from medray.bundle.card import render_card, render_history
from medray.bundle.ensemble import Rule, combine
from medray.bundle.export import to_onnx
from medray.bundle.files import locate, sha256
from medray.bundle.read import GOLDEN_NAME, ONNX_NAME, Bundle
from medray.bundle.spec import INTENDED_USE, MANIFEST_NAME, BundleSpec, FileEntry, InferenceSpec
from medray.bundle.verify import check_golden
from medray.config.schema import Experiment, ModelConfig, PreprocessConfig
from medray.data.fingerprint import Fingerprint
from medray.data.image import Modality
from medray.errors import BundleError
from medray.models.narrow import Widths
from medray.predict.onnx_runtime import OnnxPredictor
from medray.predict.predictor import Floats
from medray.predict.torch_runtime import TorchPredictor
from medray.tasks.catalogue import find_task

GOLDEN_CASES = 4


def write_bundle(
    directory: Path,
    *,
    kind: str,
    ndim: int,
    channels: int,
    classes: Sequence[str],
    preprocess: PreprocessConfig,
    inference: InferenceSpec,
    models: Sequence[nn.Module],
    configs: Sequence[ModelConfig],
    weights: Sequence[float] | None = None,
    rule: Rule = "mean",
    name: str = "bundle",
    modality: Modality = "other",
    temperature: float = 1.0,
    thresholds: Sequence[float] | None = None,
    golden: Floats | None = None,
    experiment: Experiment | None = None,
    fingerprint: Fingerprint | None = None,
    metrics: Mapping[str, float | None] | None = None,
    notes: Sequence[str] = (),
    intended_use: str = INTENDED_USE,
    onnx: bool = True,
    pruned: Widths | None = None,
) -> Bundle:
    """Write ``directory`` in one step: it appears complete and checked, or stays what it was.

    Args:
        directory: the bundle; an older one there is replaced.
        kind, ndim, channels, classes, modality: of the task; segmentation's classes begin with background.
        preprocess: from an image as read to the network's array.
        inference: how the network is applied.
        models: one network, or an ensemble's members; their weights are copied.
        configs: one catalogue entry for each model.
        weights: of the models in an ensemble's average; None: all alike.
        rule: whether an ensemble averages probabilities or decisions.
        name: shown in cards and answers.
        temperature, thresholds: of the calibration.
        golden: (N, C, *s) prepared arrays; at most four are kept. They travel with the bundle: with images that may not
            leave the building pass None, and seeded noise is used.
        experiment, fingerprint, metrics: written beside the weights and into the card.
        notes: limits to be named in the card, one sentence each.
        intended_use: until an owner changes it, research only.
        onnx: False leaves ONNX out, for networks that the exporter refuses.
        pruned: widths of the layers of the one model that are smaller than its config says.

    Returns:
        The bundle, opened.

    Raises:
        BundleError: models and configs do not pair, the export fails, or ONNX Runtime disagrees with torch.
    """
    if not models or len(models) != len(configs):
        raise BundleError(
            f"{len(models)} models and {len(configs)} model configs: give one config for each of at least one model"
        )
    twins = [copy.deepcopy(model).float().cpu().eval() for model in models]
    network = combine(twins, kind, weights, rule)
    inputs = golden_inputs(golden, channels=channels, ndim=ndim, preprocess=preprocess, inference=inference)
    torch_predictor = TorchPredictor(network)
    logits = torch_predictor(inputs)
    if logits.shape[1] != find_task(kind).outputs(len(classes)) or not np.isfinite(logits).all():
        raise BundleError(
            f"the network gives {logits.shape[1]} outputs for {len(classes)} classes of a {kind} task, or values that "
            "are not finite. "
            "Train it anew before writing a bundle"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        _save(partial, twins, inputs, logits, network if onnx else None, inference, preprocess)
        if experiment is not None:
            _yaml(partial / "experiment.yaml", experiment)
        if fingerprint is not None:
            fingerprint.save(partial / "fingerprint.json")
        spec = BundleSpec(
            name=name,
            kind=kind,
            ndim=2 if ndim == 2 else 3,
            channels=channels,
            classes=tuple(classes),
            modality=modality,
            preprocess=preprocess,
            inference=inference,
            temperature=temperature,
            thresholds=None if thresholds is None else tuple(thresholds),
            # The weights are here: a rebuilt network must not go looking for its pretrained ones.
            members=tuple(config.model_copy(update={"pretrained": None}) for config in configs),
            weights=None if weights is None else tuple(weights),
            vote=rule == "vote",
            files={},
            metrics=dict(metrics or {}),
            versions=_versions(),
            pruned=None if pruned is None else dict(pruned),
            golden="synthetic" if golden is None else "data",
            intended_use=intended_use,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        parameters = sum(p.numel() for p in network.parameters())
        card = render_card(spec, parameters=parameters, experiment=experiment, fingerprint=fingerprint, notes=notes)
        (partial / "card.md").write_text(card, encoding="utf-8")
        seal(partial, spec)
        opened = Bundle.open(partial)
        # The twin that a reader will build, not the one in our hands: config and weights must belong together.
        check_golden(TorchPredictor(opened.model()), inputs, logits, kind, temperature)
        if onnx:
            check_golden(OnnxPredictor(partial / ONNX_NAME), inputs, logits, kind, temperature)
        _replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Bundle.open(directory)


def derive(source: Bundle, directory: Path, *, onnx: Path | None = None, history: Sequence[str] = ()) -> Bundle:
    """A bundle like ``source``, in one step: with an int8 ONNX file where one is given, and more of a history.

    An int8 file has golden logits of its own, by ONNX Runtime. The torch twin stays, for explanations.

    Args:
        source: is left as it is.
        directory: the new bundle; an older one there is replaced.
        onnx: a quantised file of the same input and output.
        history: sentences for ``bundle.json`` and the card.

    Raises:
        BundleError: the file can't be run or gives something else than logits, or ``directory`` is no bundle.
    """
    from safetensors.numpy import save_file

    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        for name in source.spec.files:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(locate(source.directory, name), partial / name)
        changes: dict[str, object] = {
            "history": (*source.spec.history, *history),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": _versions(),
        }
        if onnx is not None:
            shutil.copyfile(onnx, partial / ONNX_NAME)
            changes["precision"] = "int8"
            inputs, before = source.golden()
            engine = OnnxPredictor(partial / ONNX_NAME, precision="int8")
            # One at a time, as a clinic's images come: quantisation by the batch (dynamic) sees the others.
            logits = np.concatenate([engine(inputs[index : index + 1]) for index in range(len(inputs))])
            if logits.shape != before.shape or not np.isfinite(logits).all():
                raise BundleError(f"{onnx}: gives {logits.shape} or values that are not finite, not {before.shape}")
            save_file({"input": inputs, "logits": np.ascontiguousarray(logits)}, str(partial / GOLDEN_NAME))
        if history:
            with (partial / "card.md").open("a", encoding="utf-8") as card:
                card.write(render_history(history))
        seal(partial, source.spec.model_copy(update=changes))
        opened = Bundle.open(partial)
        if onnx is not None:
            engine = OnnxPredictor(partial / ONNX_NAME, precision="int8")
            check_golden(engine, *opened.golden(), opened.spec.kind, opened.spec.temperature)
        _replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Bundle.open(directory)


def seal(directory: Path, spec: BundleSpec) -> BundleSpec:
    """Write ``bundle.json`` with the size and hash of every other file in ``directory``, all flushed to the disk."""
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST_NAME):
        files[path.relative_to(directory).as_posix()] = FileEntry(sha256=sha256(path), bytes=path.stat().st_size)
        _flush(path)
    sealed = spec.model_copy(update={"files": files})
    (directory / MANIFEST_NAME).write_text(sealed.model_dump_json(indent=1) + "\n", encoding="utf-8")
    _flush(directory / MANIFEST_NAME)
    return sealed


def golden_inputs(
    golden: Floats | None, *, channels: int, ndim: int, preprocess: PreprocessConfig, inference: InferenceSpec
) -> Floats:
    """At most four given arrays (N, C, *s), or smooth seeded noise of the network's own input shape."""
    if golden is not None:
        if golden.ndim != ndim + 2 or golden.shape[1] != channels or not len(golden):
            raise BundleError(
                f"golden inputs of shape {golden.shape}: they must be (N, {channels}, {ndim} spatial axes)"
            )
        return np.ascontiguousarray(golden[:GOLDEN_CASES], dtype=np.float32)
    divisor = int(np.lcm(inference.divisor, preprocess.pad_multiple))
    shape = inference.patch_size or preprocess.size or (32,) * ndim
    if inference.patch_size is None:
        shape = tuple(-(-size // divisor) * divisor for size in shape)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn((2, channels, *(max(2, size // 8) for size in shape)), generator=generator)
    smooth = nn.functional.interpolate(coarse, size=shape, mode="bilinear" if ndim == 2 else "trilinear")
    return (smooth + 0.3 * torch.randn(smooth.shape, generator=generator)).numpy()


def _save(
    partial: Path,
    twins: Sequence[nn.Module],
    inputs: Floats,
    logits: Floats,
    exported: nn.Module | None,
    inference: InferenceSpec,
    preprocess: PreprocessConfig,
) -> None:
    from safetensors.numpy import save_file
    from safetensors.torch import save_model

    (partial / "weights").mkdir()
    for index, twin in enumerate(twins):
        save_model(twin, str(partial / f"weights/member-{index}.safetensors"))
    save_file({"input": inputs, "logits": np.ascontiguousarray(logits)}, str(partial / GOLDEN_NAME))
    if exported is not None:
        any_size = inference.patch_size is None and preprocess.size is None
        to_onnx(exported, partial / ONNX_NAME, example=torch.from_numpy(inputs), dynamic_spatial=any_size)


def _yaml(path: Path, section: BaseModel) -> None:
    import yaml

    path.write_text(
        yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False, allow_unicode=True), encoding="utf-8"
    )


def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {"medray": __version__}
    for library in ("torch", "monai", "timm", "onnx", "onnxruntime-gpu", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library)
    return found


def _replace(partial: Path, directory: Path) -> None:
    """Rename into place. A folder can't be replaced in one step, so the old one steps aside first."""
    old = directory.with_name(f".{directory.name}.old-{os.getpid()}")
    if directory.exists():
        if not (directory / MANIFEST_NAME).is_file() and any(directory.iterdir()):
            raise BundleError(
                f"{directory}: is a folder with other files, not a bundle. Choose another place, or empty it"
            )
        directory.rename(old)
    try:
        partial.chmod(0o755)
        partial.rename(directory)
    except OSError:
        if old.exists():
            old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
