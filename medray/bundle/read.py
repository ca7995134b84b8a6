"""Bundle: open one, and turn images into answers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from medray.bundle.engines import (
    ONNX_NAME,
    Device,
    RuntimeChoice,
    RuntimeName,
    Selection,
    make_predictor,
    runtimes_here,
    select,
)
from medray.bundle.ensemble import combine
from medray.bundle.files import check_files, locate
from medray.bundle.spec import BundleSpec
from medray.data.image import Image
from medray.data.preprocess import Geometry, Preprocessor
from medray.errors import BundleError, DataError, MedrayError, ModelError
from medray.models.catalogue import build_model
from medray.models.narrow import narrow_to
from medray.predict.calibration import temper
from medray.predict.postprocess import keep_largest
from medray.predict.predictor import Floats, Precision, Predictor, probabilities
from medray.predict.sliding import classify, segment, segment_labels

__all__ = ["GOLDEN_NAME", "ONNX_NAME", "Bundle", "Prediction", "RuntimeChoice", "RuntimeName", "Selection"]

GOLDEN_NAME = "golden.safetensors"
MEMORY_LIMIT = 4 << 30
"""Bytes of class probabilities that one answer may hold at once; beyond, labels are taken slab by slab."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer for one image.

    Attributes:
        labels: segmentation: (*s) uint8 on the image's own grid (``Image.array``'s axes); else None.
        probabilities: (K,) calibrated; segmentation: (K, *s) where asked for, else None.
        decisions: the index of the class; of several labels those at or over their thresholds; none of a segmentation.
        seconds: of ``prepare``, ``network`` and ``finish``.
    """

    labels: npt.NDArray[np.integer[Any]] | None
    probabilities: Floats | None
    decisions: tuple[int, ...]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. Its files were found unaltered when it was opened."""

    directory: Path
    spec: BundleSpec
    _predictors: dict[tuple[Any, ...], Predictor] = field(default_factory=dict, repr=False, compare=False)
    _selections: dict[tuple[Any, ...], Selection] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, directory: Path | str) -> Bundle:
        """Read ``bundle.json`` and verify every file that it names.

        Raises:
            BundleError: missing, malformed, incomplete or altered.
        """
        place = Path(directory)
        if not place.is_dir():
            raise BundleError(
                f"{place}: no such folder. Give the folder that holds bundle.json, such as runs/NAME/bundle"
            )
        spec = BundleSpec.load(place)
        check_files(place, spec)
        return cls(place, spec)

    @property
    def runtimes(self) -> tuple[RuntimeName, ...]:
        """What this bundle has files for and this machine has the library of."""
        return runtimes_here(self)

    def model(self) -> nn.Module:
        """The network (or the ensemble as one) with its weights, on the CPU, in evaluation mode.

        Raises:
            BundleError: weights and model config do not belong together.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_model

        spec, members = self.spec, []
        for config, name in zip(spec.members, spec.weight_files, strict=True):
            member = build_model(
                config,
                kind=spec.kind,
                ndim=spec.ndim,
                in_channels=spec.channels,
                num_outputs=spec.outputs,
                patch_size=spec.inference.patch_size or spec.preprocess.size,
            )
            path = locate(self.directory, name)
            try:
                if spec.pruned is not None:
                    narrow_to(member, spec.pruned)
                load_model(member, str(path), strict=True)
            except (ModelError, RuntimeError, SafetensorError, KeyError, ValueError) as error:
                first = (str(error).strip().splitlines() or ["?"])[0][:300]
                raise BundleError(
                    f"{path}: these are not weights of {config.name!r} as configured ({first})"
                ) from error
            members.append(member)
        return combine(members, spec.kind, spec.weights, "vote" if spec.vote else "mean")

    def golden(self) -> tuple[Floats, Floats]:
        """Golden inputs (N, C, *s) and torch's fp32 logits for them (N, O[, *s]).

        Raises:
            BundleError: absent or of the wrong shape.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = locate(self.directory, GOLDEN_NAME)
        try:
            tensors = load_file(str(path))
            inputs, logits = tensors["input"], tensors["logits"]
        except (SafetensorError, KeyError, ValueError) as error:
            raise BundleError(f"{path}: no golden inputs and logits ({error}). Write the bundle anew") from None
        want = (len(inputs), self.spec.outputs, *(inputs.shape[2:] if self.spec.task.dense else ()))
        if inputs.ndim != self.spec.ndim + 2 or not len(inputs) or logits.shape != want:
            raise BundleError(f"{path}: golden arrays of shapes {inputs.shape}, {logits.shape}. Write the bundle anew")
        return inputs.astype(np.float32), logits.astype(np.float32)

    def predictor(
        self,
        runtime: RuntimeChoice = "torch",
        *,
        device: Device = "cpu",
        precision: Precision | None = None,
        threads: int | None = None,
    ) -> Predictor:
        """An engine that has just reproduced the golden outputs here. The same arguments give the same engine.

        Args:
            runtime: torch, onnx, openvino, tensorrt; auto for the one that :meth:`select` chooses.
            device: cpu or cuda.
            precision: of the arithmetic; None for the bundle's own (fp32 or int8), and with auto for any.
            threads: of ONNX Runtime and OpenVINO; None for all usable CPUs. (torch's are the process's own.)

        Raises:
            BundleError: the bundle lacks this runtime's file, or the golden outputs are not reproduced.
            ModelError: device or precision aren't to be had here.
            MissingDependencyError: the runtime isn't installed.
        """
        if runtime == "auto":
            chosen = self.select(runtime, device=device, precision=precision, threads=threads)
            try:
                return self._engine(chosen.engine, device, chosen.precision, threads)
            except MedrayError:  # what was remembered no longer holds (a driver, a library): measure anew
                chosen = select(self, device=device, precision=precision, threads=threads, fresh=True)
                self._selections[device, precision, threads] = chosen
                return self._engine(chosen.engine, device, chosen.precision, threads)
        return self._engine(runtime, device, precision, threads)

    def select(
        self,
        runtime: RuntimeChoice = "auto",
        *,
        device: Device = "cpu",
        precision: Precision | None = None,
        threads: int | None = None,
    ) -> Selection:
        """Which engine :meth:`predictor` gives for these arguments, in which precision, and why not another.

        ``auto`` measures the engines that are here with the golden inputs and keeps the fastest that agrees with the
        golden outputs (see :mod:`medray.bundle.verify`). The choice is remembered for this machine, in the user's
        cache.

        Raises:
            BundleError: no engine agrees.
        """
        if runtime != "auto":
            made = self.predictor(runtime, device=device, precision=precision, threads=threads)
            return Selection(engine=runtime, precision=made.precision)
        key = (device, precision, threads)
        if key not in self._selections:
            self._selections[key] = select(self, device=device, precision=precision, threads=threads)
        return self._selections[key]

    def _engine(self, runtime: RuntimeName, device: Device, precision: str | None, threads: int | None) -> Predictor:
        key = (runtime, device, precision or self.spec.precision, threads)
        if key not in self._predictors:
            self._predictors[key] = make_predictor(self, runtime, device=device, precision=precision, threads=threads)
        return self._predictors[key]

    def prepare(self, image: Image) -> tuple[Floats, Geometry]:
        """An image as read to the array (C, *s) that the network sees.

        Raises:
            DataError: the image has other axes or channels than the bundle was made for.
        """
        spec = self.spec
        if image.ndim != spec.ndim or len(image.array) != spec.channels:
            raise DataError(
                f"{image.source or 'image'}: {image.ndim}-D with {len(image.array)} channels; bundle {spec.name!r} "
                f"takes {spec.ndim}-D images with {spec.channels}. Give images like those it was trained on"
            )
        return self._preprocessor.prepare(image)

    @property
    def _preprocessor(self) -> Preprocessor:
        return Preprocessor(self.spec.preprocess, ndim=self.spec.ndim, channels=self.spec.channels)

    def restore_map(self, values: Floats, geometry: Geometry) -> Floats:
        """A map (*s) on the prepared grid, linearly back to the image's own: (*o) float32, 0 where it was cropped."""
        return self._preprocessor.restore(values[None], geometry)[0]

    def predict(
        self, image: Image, predictor: Predictor | None = None, *, with_probabilities: bool = False
    ) -> Prediction:
        """The answer for one image, in the image's own geometry.

        Args:
            image: as a reader gives it.
            predictor: from :meth:`predictor`; None for torch on the CPU (int8 bundles: ONNX Runtime).
            with_probabilities: segmentation: also give (K, *s), whatever memory it takes.

        Raises:
            DataError: the image isn't of the bundle's kind.
        """
        engine = predictor or self.predictor("torch" if self.spec.precision == "fp32" else "onnx")
        begin = time.perf_counter()
        array, geometry = self.prepare(image)
        prepared = time.perf_counter()
        if self.spec.task.dense:
            labels, probability, network = self._segment(engine, array, geometry, with_probabilities)
            end = time.perf_counter()
            seconds = {"prepare": prepared - begin, "network": network, "finish": end - prepared - network}
            return Prediction(labels=labels, probabilities=probability, decisions=(), seconds=seconds)
        logits = classify(engine, array[None], flip_axes=self.spec.inference.flip_axes)
        ran = time.perf_counter()
        calibrated = probabilities(logits, self.spec.kind, self.spec.temperature)[0]
        (decided,) = self.spec.task.decide(calibrated[None], self.spec.thresholds)
        decisions = tuple(int(index) for index in (np.flatnonzero(decided) if decided.ndim else [decided]))
        seconds = {"prepare": prepared - begin, "network": ran - prepared, "finish": time.perf_counter() - ran}
        return Prediction(labels=None, probabilities=calibrated, decisions=decisions, seconds=seconds)

    def _segment(
        self, engine: Predictor, array: Floats, geometry: Geometry, with_probabilities: bool
    ) -> tuple[npt.NDArray[np.integer[Any]], Floats | None, float]:
        how, classes = self.spec.inference, len(self.spec.classes)
        windows: dict[str, Any] = {"overlap": how.overlap, "batch_size": how.batch_size, "flip_axes": how.flip_axes}
        begin = time.perf_counter()
        blended: Floats | None = None
        too_large = 4 * classes * int(np.prod(array.shape[1:])) > MEMORY_LIMIT
        if how.patch_size is not None and too_large and not with_probabilities:
            flat = segment_labels(
                engine, array, patch_size=how.patch_size, num_classes=classes, limit_bytes=MEMORY_LIMIT // 4, **windows
            )
            network = time.perf_counter() - begin
            labels = self._preprocessor.restore_labels(flat, geometry)
        else:
            blended = segment(engine, array, patch_size=how.patch_size, divisor=how.divisor, **windows)
            network = time.perf_counter() - begin
            labels = self._preprocessor.restore_argmax(blended, geometry)
        if how.keep_largest:
            labels = keep_largest(labels, classes)
        if blended is None or not with_probabilities:
            return labels, None, network
        restored = self._preprocessor.restore(blended, geometry)
        restored[0][~restored.any(axis=0)] = 1.0  # cropped away before the network: background for certain
        return labels, temper(restored, self.spec.temperature), network
