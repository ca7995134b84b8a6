"""The lower packages train with the small set of libraries alone: no scipy, SimpleITK, pydicom, Ray or MLflow."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

from tests.unit.test_architecture import ABSENT, SMALL_SET, closure

ROOT = Path(__file__).parents[2]

SCRIPT = """
from pathlib import Path

import numpy as np
from medray.config.schema import AugmentConfig, Experiment, ModelConfig, TrainConfig
from medray.data.cache import PreparedStore
from medray.data.checks import check
from medray.data.layouts import build_manifest
from medray.data.loader import train_loader
from medray.data.splits import make_splits
from medray.tasks.catalogue import build_loss
from medray.learn.metrics import dice_per_class
from medray.models.catalogue import build_model
from medray.train.fit import fit

experiment = Experiment(
    data="phantom://ct-lesions?cases=6&size=16",
    augment=AugmentConfig(strength=0.5),
    model=ModelConfig(name="unet", feature_size=4, depth=2),
    train=TrainConfig(epochs=2, batch_size=2, patch_size=(16, 16, 16), precision="fp32"),
)
manifest = check(build_manifest(experiment.data))
splits = make_splits(manifest, experiment.split, 0)
store = PreparedStore.open_or_build(manifest, experiment.preprocess, Path("cache"))
classes = len(manifest.classes)
loader = train_loader(store, splits.train, experiment, kind=manifest.task, num_classes=classes)
model = build_model(
    experiment.model, kind=manifest.task, ndim=3, in_channels=1, num_outputs=classes, patch_size=(16, 16, 16)
)
mask = np.asarray(store.mask(splits.val[0]))
dice = float(np.nanmean(dice_per_class(mask, mask, classes)))
loss = build_loss(experiment.loss, kind=manifest.task, num_classes=classes)
result = fit(
    experiment,
    model,
    loader,
    loss,
    validate=lambda model: {"val/dice": dice},
    objective=("val/dice", "max"),
    run_dir=Path("run"),
)
assert result.steps > 0 and result.best["val/dice"] == 1.0
print("trained", result.steps)
"""


def test_the_lower_packages_train_with_the_small_set_alone(tmp_path: Path) -> None:
    present = closure(SMALL_SET)
    blocked = {module for module in metadata.packages_distributions() if module not in present and module != "medray"}
    done = subprocess.run(
        [sys.executable, "-c", ABSENT.format(blocked=blocked) + SCRIPT],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout.startswith("trained"), done.stderr
