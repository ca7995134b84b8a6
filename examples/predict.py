"""A bundle in a program of yours: an image in, a mask or probabilities out.

    python examples/predict.py BUNDLE [IMAGE]

On the command line: medray predict BUNDLE IMAGE... -o FOLDER. Without IMAGE, a phantom is drawn.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from medray.bundle.read import Bundle
from medray.data.readers import read_image


def main(place: str, reference: str) -> None:
    # Opening verifies every file's hash: a bundle that was altered or half copied is refused.
    bundle = Bundle.open(place)
    spec = bundle.spec
    print(f"{spec.name}: {spec.kind}, {spec.ndim}-D, classes {spec.classes}. {spec.intended_use}")

    # A picture, NIfTI file, DICOM series' folder or any reference; pre- and post-processing travel with the bundle.
    image = read_image(reference, Path.cwd())
    predictor = bundle.predictor("onnx" if "onnx" in bundle.runtimes else "torch")
    found = bundle.predict(image, predictor)

    if found.labels is not None:  # segmentation: on the image's own grid
        names, counts = np.unique(found.labels, return_counts=True)
        for label, count in zip(names, counts, strict=True):
            print(f"{spec.classes[label]}: {count} of {found.labels.size} pixels")
    if found.probabilities is not None:  # classification: calibrated
        for name, probability in zip(spec.classes, found.probabilities, strict=True):
            print(f"{name}: {probability:.3f}")
    print("seconds:", {stage: round(seconds, 3) for stage, seconds in found.seconds.items()})


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "phantom://fundus-vessels?seed=7&index=3&size=32")
