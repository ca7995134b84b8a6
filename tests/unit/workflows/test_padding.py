"""What a network sees beyond the image is the same in training and in use."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medray.config.schema import Experiment, TrainConfig
from medray.data.cache import PreparedStore
from medray.data.layouts import build_manifest
from medray.data.loader import train_loader
from medray.data.manifest import IGNORE
from medray.predict.sliding import segment


def test_beyond_the_image_training_and_prediction_agree(tmp_path: Path) -> None:
    """Each pads in code of its own; when they differed, a network that had learnt well segmented badly."""
    manifest = build_manifest("phantom://fundus-vessels?cases=4&size=24")
    experiment = Experiment.model_validate(
        {"augment": {"strength": 0.0}, "train": TrainConfig(patch_size=(32, 32), batch_size=2, foreground=0.0)}
    )
    store = PreparedStore.open_or_build(manifest, experiment.preprocess, tmp_path)
    loader = train_loader(store, (0, 1, 2, 3), experiment, kind="segmentation", num_classes=2)
    batch = next(iter(loader))
    seen = []

    def network(array: np.ndarray) -> np.ndarray:
        seen.append(array.copy())
        return np.zeros((len(array), 2, *array.shape[2:]), np.float32)

    index = int(batch["index"][0])
    segment(network, np.asarray(store.image(index)), patch_size=(32, 32))
    trained, used = batch["image"][0].numpy(), seen[0][0]
    assert (np.ptp(trained[:, :2, :2], axis=(1, 2)) == 0).all(), "the corner lies beyond the image"
    assert (batch["target"][0][:2, :2] == IGNORE).all()
    np.testing.assert_array_equal(trained[:, 0, 0], used[:, 0, 0])
