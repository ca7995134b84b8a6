"""The plain baseline: one published-style recipe a task, no search, in plain PyTorch, MONAI and torchvision.

What a careful engineer gets from the tutorials in the same wall clock: trained on the training cases, the best epoch by
validation, the test cases measured once. Nothing of medray is used but its metrics, so that both are measured alike.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medray.learn.metrics import classification_metrics, dice_per_class, mean_over_cases

RESERVE = 0.04
"""Share of the wall clock kept back for measuring the test cases."""
IGNORE = 255


@dataclass(frozen=True, kw_only=True)
class Part:
    """Cases of one split, padded to one shape.

    Attributes:
        images: (N, C, *spatial) float32.
        targets: (N, *spatial) uint8 labels with IGNORE where nothing counts, or (N,) classes.
    """

    images: Tensor
    targets: Tensor


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is fixed before anything is seen.

    Attributes:
        network: makes it.
        loss: of (logits, targets).
        batch: samples of a step.
        epochs: at most; None for as many as the time allows.
        decays: shares of the run (by epochs or by time, whichever is further) at which the rate falls to a tenth.
        flips: spatial axes that are mirrored at random.
        metric: of the validation cases that chooses the epoch.
        measure: (probabilities (N, K, *spatial), targets) to metrics.
    """

    network: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    measure: Callable[[npt.NDArray[Any], npt.NDArray[Any]], dict[str, float]]
    metric: str
    batch: int
    epochs: int | None = None
    decays: tuple[float, ...] = ()
    flips: tuple[int, ...] = ()


def train(recipe: Recipe, parts: dict[str, Part], *, seconds: float, started: float, seed: int = 0) -> dict[str, float]:
    """Train with Adam 1e-3 until the time or the epochs are over; the test metrics of the best epoch.

    Args:
        recipe: what to train.
        parts: ``train``, ``val``, ``test``.
        seconds: wall clock for all of it, reading included.
        started: ``time.monotonic()`` at which it began.
        seed: of weights and order.
    """
    torch.manual_seed(seed)
    network = recipe.network()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    end = started + (1.0 - RESERVE) * seconds
    best, weights, epoch, pass_seconds = -1.0, network.state_dict(), 0, 0.0
    while recipe.epochs is None or epoch < recipe.epochs:
        begun = time.monotonic()
        if epoch and begun + pass_seconds > end:
            break
        by_time = (begun - started) / (end - started)
        done = by_time if recipe.epochs is None else max(by_time, epoch / recipe.epochs)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 0.1 ** sum(done >= share for share in recipe.decays)
        network.train()
        for images, targets in _batches(parts["train"], recipe):
            optimizer.zero_grad()
            recipe.loss(network(images), targets).backward()
            optimizer.step()
            if epoch and time.monotonic() > end:
                break
        value = evaluate(recipe, network, parts["val"])[recipe.metric]
        if value > best:
            best, weights = value, {name: tensor.clone() for name, tensor in network.state_dict().items()}
        epoch += 1
        pass_seconds = time.monotonic() - begun
    network.load_state_dict(weights)
    return evaluate(recipe, network, parts["test"]) | {"epochs": float(epoch), "seconds": time.monotonic() - started}


def evaluate(recipe: Recipe, network: nn.Module, part: Part) -> dict[str, float]:
    """The recipe's metrics of some cases."""
    network.eval()
    found = []
    with torch.inference_mode():
        for start in range(0, len(part.images), recipe.batch):
            found.append(network(part.images[start : start + recipe.batch]).softmax(1).numpy())
    return recipe.measure(np.concatenate(found), part.targets.numpy())


def _batches(part: Part, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(part.images))
    # A last batch of one sample has no batch statistics.
    for chosen in order.split(recipe.batch) if len(order) % recipe.batch != 1 else order[:-1].split(recipe.batch):
        images, targets = part.images[chosen], part.targets[chosen].long()
        for axis in recipe.flips:
            if torch.rand(()) < 0.5:
                images = images.flip(2 + axis)
                targets = targets.flip(1 + axis)
        yield images, targets


# Recipes -------------------------------------------------------------------------------------------------------------


def segmentation(ndim: int, channels: int, classes: int, *, batch: int, flips: tuple[int, ...] = ()) -> Recipe:
    """MONAI's tutorial network: UNet (16, 32, 64, 128, 256), two residual units, batch norm; Dice and cross-entropy."""
    from monai.losses.dice import DiceLoss
    from monai.networks.nets.unet import UNet

    dice = DiceLoss(softmax=True, include_background=False)

    def network() -> nn.Module:
        return UNet(
            spatial_dims=ndim,
            in_channels=channels,
            out_channels=classes,
            channels=(16, 32, 64, 128, 256),
            strides=(2, 2, 2, 2),
            num_res_units=2,
            norm="batch",
        )

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        inside = targets != IGNORE
        labels = targets.where(inside, 0)
        one_hot = F.one_hot(labels, classes).movedim(-1, 1).float()
        # Outside of what counts, the background is what the network is asked for, and all it can be.
        entropy = F.cross_entropy(logits, labels)
        return dice(logits, one_hot) + entropy

    def measure(probabilities: npt.NDArray[Any], targets: npt.NDArray[Any]) -> dict[str, float]:
        rows = [
            dice_per_class(found.argmax(0), truth, classes) for found, truth in zip(probabilities, targets, strict=True)
        ]
        return {"dice": mean_over_cases(np.stack(rows))}

    return Recipe(network=network, loss=loss, measure=measure, metric="dice", batch=batch, flips=flips)


def classification(channels: int, classes: int) -> Recipe:
    """MedMNIST v2's own recipe at 28 px: ResNet-18 with a stem for small images, Adam 1e-3, batches of 128, 100 epochs,
    the rate a tenth from epochs 50 and 75 (Yang et al., Scientific Data 2023)."""
    from torchvision.models import resnet18

    def network() -> nn.Module:
        model = resnet18(num_classes=classes)
        model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
        return model

    def measure(probabilities: npt.NDArray[Any], targets: npt.NDArray[Any]) -> dict[str, float]:
        return classification_metrics(targets, probabilities)

    return Recipe(
        network=network,
        loss=F.cross_entropy,
        measure=measure,
        metric="auc",
        batch=128,
        epochs=100,
        decays=(0.5, 0.75),
    )


# Data ----------------------------------------------------------------------------------------------------------------


def hippocampus(folder: Path, *, limit: int | None = None) -> dict[str, Part]:
    """MSD hippocampus by its given split: z-scored volumes, padded to one multiple of 16; a fifth validates."""
    import nibabel as nib

    split = json.loads((folder / "split.json").read_text(encoding="utf-8"))
    held_back = next(value for key, value in split.items() if key != "train")
    names = {
        "train": [name for i, name in enumerate(split["train"][:limit]) if i % 5],
        "val": [name for i, name in enumerate(split["train"][:limit]) if i % 5 == 0],
        "test": held_back[:limit],
    }

    def volume(kind: str, name: str) -> npt.NDArray[Any]:
        image: Any = nib.load(folder / kind / f"{name}.nii.gz")  # type: ignore[attr-defined]
        return np.asarray(nib.as_closest_canonical(image).dataobj)  # type: ignore[attr-defined]

    loaded = {
        part: ([volume("imagesTr", n)[None] for n in chosen], [volume("labelsTr", n) for n in chosen])
        for part, chosen in names.items()
    }
    return _padded(loaded)


def drive(folder: Path) -> dict[str, Part]:
    """DRIVE by its official halves; four of the 20 training images validate; what lies outside the field is ignored."""
    from PIL import Image

    def half(name: str) -> tuple[list[npt.NDArray[Any]], list[npt.NDArray[Any]]]:
        images, masks = [], []
        for path in sorted((folder / name / "images").iterdir()):
            number = path.stem.split("_")[0]
            truth = next((folder / name / "1st_manual").glob(f"{number}_*"))
            field = next((folder / name / "mask").glob(f"{number}_*"))
            images.append(np.moveaxis(np.asarray(Image.open(path).convert("RGB")), -1, 0))
            vessel, inside = (np.asarray(Image.open(place).convert("L")) > 127 for place in (truth, field))
            masks.append(np.where(inside, vessel, IGNORE).astype(np.uint8))
        return images, masks

    images, masks = half("training")
    validates = [i for i in range(len(images)) if i % 5 == 0]
    trains = [i for i in range(len(images)) if i % 5]
    loaded = {
        "train": ([images[i] for i in trains], [masks[i] for i in trains]),
        "val": ([images[i] for i in validates], [masks[i] for i in validates]),
        "test": half("test"),
    }
    return _padded(loaded)


def medmnist(path: Path) -> dict[str, Part]:
    """A MedMNIST archive by its official splits, scaled to -1..1 as its authors do."""
    parts = {}
    with np.load(path, allow_pickle=False) as archive:
        for part in ("train", "val", "test"):
            images = archive[f"{part}_images"].astype(np.float32)
            images = images[:, None] if images.ndim == 3 else np.moveaxis(images, -1, 1)
            labels = archive[f"{part}_labels"][:, 0].astype(np.int64)
            parts[part] = Part(images=torch.from_numpy(images / 127.5 - 1.0), targets=torch.from_numpy(labels))
    return parts


def _padded(
    loaded: Mapping[str, tuple[Sequence[npt.NDArray[Any]], Sequence[npt.NDArray[Any]]]], multiple: int = 16
) -> dict[str, Part]:
    """Z-score each image and channel, and pad all to the same multiple of 16; what is padded is ignored."""
    shapes = [mask.shape for _, masks in loaded.values() for mask in masks]
    common = [-(-max(sizes) // multiple) * multiple for sizes in zip(*shapes, strict=True)]
    parts = {}
    for part, (images, masks) in loaded.items():
        arrays, targets = [], []
        for image, mask in zip(images, masks, strict=True):
            axes = tuple(range(1, image.ndim))
            scaled = (image - image.mean(axes, keepdims=True)) / (image.std(axes, keepdims=True) + 1e-6)
            margin = [(0, most - size) for size, most in zip(mask.shape, common, strict=True)]
            arrays.append(np.pad(scaled, [(0, 0), *margin]).astype(np.float32))
            targets.append(np.pad(mask.astype(np.uint8), margin, constant_values=IGNORE))
        parts[part] = Part(images=torch.from_numpy(np.stack(arrays)), targets=torch.from_numpy(np.stack(targets)))
    return parts
