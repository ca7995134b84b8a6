"""plan(): fingerprints made by hand, and what the default makes of them on a small computer and on a large GPU."""

from __future__ import annotations

import math

import pytest
import torch

from medray.config.compose import build_experiment
from medray.config.schema import Experiment
from medray.data.fingerprint import ChannelStats, Fingerprint
from medray.errors import ModelError
from medray.models.catalogue import CATALOGUE, build_model, lookup, names
from medray.plan.machine import GIB, Machine
from medray.plan.plan import plan, target_geometry

LAPTOP = Machine(cpus=2, memory=8 * GIB)
TINY = Machine(cpus=1, memory=GIB // 2)
SERVER = Machine(cpus=32, memory=256 * GIB, gpus=1, gpu_memory=80 * GIB)
MACHINES = pytest.mark.parametrize("machine", [LAPTOP, TINY, SERVER], ids=["laptop", "tiny", "gpu"])


def fingerprint(task="segmentation", modality="CT", shape=(96, 96, 48), spacing=(1.0, 1.0, 1.0), **changes):
    """One that is consistent in itself; ``changes`` override any field."""
    ndim = len(shape)
    channels = 3 if modality in ("fundus", "dermoscopy") else 1
    classes = changes.get("classes") or (("background", "lesion") if task == "segmentation" else ("no", "yes"))
    cases = changes.get("cases", 40)
    stats = ChannelStats(mean=50.0, std=20.0, p005=-100.123456, p50=48.0, p995=240.0)
    fields = {
        "task": task, "ndim": ndim, "channels": channels, "modality": modality, "classes": classes, "cases": cases,
        "patients": cases, "sites": {}, "shape_min": shape, "shape_median": shape, "shape_max": shape,
        "spacing_min": spacing, "spacing_median": spacing, "spacing_max": spacing, "intensity": (stats,) * channels,
        "class_cases": {name: max(1, cases // len(classes)) for name in classes},
        "class_fraction": {name: 1 / len(classes) for name in classes},
        "bytes_total": cases * math.prod(shape) * 4 * channels, "digest": "0" * 64,
    }  # fmt: skip
    return Fingerprint.model_validate(fields | changes)


def planned(found: Fingerprint, machine: Machine = LAPTOP, **asked) -> Experiment:
    return build_experiment(plan(found, machine, **asked))


FINGERPRINTS = {
    "ct": fingerprint(),
    "mr": fingerprint(modality="MR", shape=(240, 240, 155)),
    "anisotropic": fingerprint(shape=(512, 512, 20), spacing=(0.7, 0.7, 6.0), spacing_min=(0.5, 0.5, 3.0)),
    "flat volume": fingerprint(shape=(256, 256, 3), spacing=(1.0, 1.0, 10.0)),
    "hippocampus": fingerprint(modality="MR", shape=(35, 51, 36)),
    "one slab": fingerprint(shape=(7, 5, 3)),
    "whole body": fingerprint(shape=(512, 512, 900), cases=3),
    "fundus": fingerprint(modality="fundus", shape=(584, 565), spacing=None, spacing_min=None, spacing_max=None),
    "tiny picture": fingerprint(modality="microscopy", shape=(9, 33), spacing=None, spacing_min=None, spacing_max=None),
    "one case": fingerprint(cases=1),
    "medmnist": fingerprint("classification", "XR", (28, 28), None, spacing_min=None, spacing_max=None, cases=4000),
    "chest film": fingerprint("classification", "XR", (2048, 2500), None, spacing_min=None, spacing_max=None),
    "strip": fingerprint("classification", "US", (40, 900), None, spacing_min=None, spacing_max=None),
    "nodule": fingerprint("classification", "CT", (32, 32, 32)),
    "chest ct": fingerprint("classification", "CT", (512, 512, 300), cases=5),
    "three files": fingerprint("classification", "CT", (512, 512, 2), cases=3),
    "findings": fingerprint("multilabel", "XR", (300, 256), None, spacing_min=None, spacing_max=None),
}  # fmt: skip


@MACHINES
@pytest.mark.parametrize("name", FINGERPRINTS)
def test_every_plan_is_an_experiment_whose_network_takes_its_patch(name, machine):
    found = FINGERPRINTS[name]
    experiment = planned(found, machine)
    patch = experiment.train.patch_size or experiment.preprocess.size
    with torch.device("meta"):  # the whole network is built; no memory is asked for
        build_model(
            experiment.model, kind=found.task, ndim=found.ndim, in_channels=found.channels,
            num_outputs=len(found.classes), patch_size=patch,
        )  # fmt: skip
    assert experiment.task.kind == found.task
    assert patch is not None and len(patch) == found.ndim and min(patch) >= 1
    assert 1 <= experiment.train.batch_size <= max(2, found.cases)


@pytest.mark.parametrize("name", ["hippocampus", "one slab", "tiny picture", "nodule", "medmnist"])
def test_a_planned_network_gives_logits_of_the_patch(name):
    found = FINGERPRINTS[name]
    experiment = planned(found)
    patch = experiment.train.patch_size or experiment.preprocess.size
    model = build_model(
        experiment.model, kind=found.task, ndim=found.ndim, in_channels=found.channels,
        num_outputs=len(found.classes), patch_size=patch,
    ).eval()  # fmt: skip
    with torch.inference_mode():
        logits = model(torch.zeros(1, found.channels, *patch))
    grid = patch if found.task == "segmentation" else ()
    assert logits.shape == (1, len(found.classes), *grid)


@MACHINES
@pytest.mark.parametrize("kind", ["segmentation", "classification"])
@pytest.mark.parametrize("shape", [(70, 45), (28, 28), (12, 9), (70, 45, 33), (8, 8, 8), (40, 30, 5)], ids=str)
def test_another_model_replans_what_depends_on_it(kind, shape, machine):
    """Every network of the catalogue that can do the task gets a patch, a depth and a batch that it accepts."""
    ndim = len(shape)
    found = fingerprint(kind, "MR", shape, (1.0,) * ndim)
    for name in names(kind, ndim):
        experiment = planned(found, machine, model=name)
        assert experiment.model.name == name
        patch = experiment.train.patch_size or experiment.preprocess.size
        lookup(name).check(experiment.model, kind=kind, ndim=ndim, patch_size=patch)


def test_deep_supervision_and_width_are_asked_of_those_that_have_them():
    tree = plan(fingerprint(), LAPTOP, model="dynunet" if "dynunet" in CATALOGUE else "unet")
    assert tree["model"]["deep_supervision"] is True
    other = next(n for n in names("segmentation", 3) if "deep_supervision" not in lookup(n).options)
    assert "deep_supervision" not in plan(fingerprint(), LAPTOP, model=other)["model"]


def test_an_unknown_model_is_named_with_its_neighbours():
    with pytest.raises(ModelError, match="unet"):
        plan(fingerprint(), LAPTOP, model="unett")


# Normalisation and geometry ------------------------------------------------------------------------------------------


def test_ct_is_scaled_by_the_data_sets_own_percentiles():
    pre = planned(fingerprint()).preprocess
    assert (pre.normalize, pre.clip, pre.mean, pre.std) == ("ct", ((-100.123, 240.0),), (50.0,), (20.0,))


def test_a_constant_ct_still_has_a_scale():
    flat = ChannelStats(mean=0.0, std=0.0, p005=0.0, p50=0.0, p995=0.0)
    assert planned(fingerprint(intensity=(flat,))).preprocess.std == (1e-3,)


@pytest.mark.parametrize("modality", ["MR", "fundus", "XR", "US", "other"])
def test_what_has_no_units_is_scaled_image_by_image(modality):
    shape = (64, 64) if modality != "MR" else (64, 64, 64)
    pre = planned(fingerprint(modality=modality, shape=shape, spacing=(1.0,) * len(shape))).preprocess
    assert (pre.normalize, pre.clip, pre.mean) == ("zscore", None, None)


def test_equal_spacings_are_left_alone():
    assert target_geometry(fingerprint(spacing=(0.7, 0.7, 5.0))).spacing is None


def test_unequal_spacings_come_to_the_median():
    found = fingerprint(spacing=(1.0, 1.0, 1.5), spacing_min=(0.8, 0.8, 1.0), spacing_max=(1.2, 1.2, 3.0))
    assert target_geometry(found) == ((1.0, 1.0, 1.5), (96.0, 96.0, 48.0))


def test_thin_slices_of_a_coarse_axis_are_kept():
    """The median would be 5 mm; scans of 2.5 mm would lose every other slice."""
    found = fingerprint(shape=(200, 200, 20), spacing=(0.8, 0.8, 5.0), spacing_min=(0.6, 0.6, 2.5))
    geometry = target_geometry(found)
    assert geometry.spacing == (0.8, 0.8, 2.5)
    assert geometry.shape == (200.0, 200.0, 40.0)


def test_photographs_have_no_spacing():
    assert target_geometry(FINGERPRINTS["fundus"]).spacing is None


# Machine and data ----------------------------------------------------------------------------------------------------


def test_a_gpu_gets_larger_patches_and_batches():
    found = fingerprint(modality="MR", shape=(240, 240, 155))
    small, large = planned(found, LAPTOP), planned(found, SERVER)
    assert math.prod(large.train.patch_size) > 4 * math.prod(small.train.patch_size)
    assert large.train.batch_size > small.train.batch_size


def test_the_batch_fits_the_memory():
    found = fingerprint(modality="MR", shape=(240, 240, 155))
    assert planned(found, TINY).train.batch_size == 1
    assert planned(found, LAPTOP).train.batch_size == 2


def test_checkpointing_is_for_a_batch_that_does_not_fit():
    found = fingerprint(modality="MR", shape=(240, 240, 155))
    tight = Machine(cpus=2, memory=int(1.4 * GIB))
    assert planned(found, LAPTOP).train.checkpointing == "off"
    assert (planned(found, tight).train.checkpointing, planned(found, tight).train.batch_size) == ("auto", 2)
    assert planned(FINGERPRINTS["medmnist"], LAPTOP).train.checkpointing == "off"
    assert planned(FINGERPRINTS["medmnist"], TINY).train.checkpointing == "auto"


def test_the_patch_follows_the_images_shape():
    """A flat volume gets a flat patch; no axis is larger than the image by more than its padding."""
    patch = planned(FINGERPRINTS["flat volume"]).train.patch_size
    assert patch[2] < patch[0] / 4
    experiment = planned(FINGERPRINTS["hippocampus"])
    divisor = lookup(experiment.model.name).divisor(experiment.model, 3)
    assert all(n <= p < n + divisor for n, p in zip((35, 51, 36), experiment.train.patch_size, strict=True))


def test_the_width_follows_the_time_that_a_network_will_have():
    """On a CPU; a trial of a long study is planned as its champion will be."""
    found = FINGERPRINTS["hippocampus"]
    assert planned(found, budget=300).model.feature_size == 16
    assert planned(found, budget=300, horizon=3600).model.feature_size == 32
    assert planned(found).model.feature_size == planned(found, SERVER, budget=300).model.feature_size == 32


def test_thumbnails_get_a_small_network_where_there_is_no_gpu():
    assert planned(FINGERPRINTS["medmnist"], LAPTOP).model.name == "small_cnn"
    assert planned(FINGERPRINTS["medmnist"], SERVER).model.name == "resnet18"
    assert (
        planned(FINGERPRINTS["chest film"], LAPTOP).model.name
        == planned(FINGERPRINTS["nodule"]).model.name
        == "resnet18"
    )


def test_a_volume_that_fits_is_seen_whole_and_a_larger_one_in_patches():
    whole, parts = planned(FINGERPRINTS["hippocampus"]).train, planned(FINGERPRINTS["mr"]).train
    assert (whole.samples_per_case, whole.foreground) == (1, 0.0)
    assert 2 <= parts.samples_per_case <= 16 and parts.foreground > 0


def test_rare_foreground_is_drawn_more_often():
    rare = {"background": 0.999, "lesion": 0.001}
    large = (240, 240, 155)
    common = planned(fingerprint(modality="MR", shape=large)).train.foreground
    assert planned(fingerprint(modality="MR", shape=large, class_fraction=rare)).train.foreground > common


def test_tiny_data_sets_get_small_batches():
    found = fingerprint("classification", "XR", (28, 28), None, spacing_min=None, spacing_max=None, cases=20)
    assert planned(found).train.batch_size == 2
    assert planned(FINGERPRINTS["medmnist"]).train.batch_size > 64


def test_small_pictures_keep_their_size_and_large_ones_come_to_a_common_one():
    assert planned(FINGERPRINTS["medmnist"]).preprocess.size == (28, 28)
    assert planned(FINGERPRINTS["chest film"], LAPTOP).preprocess.size == (128, 128)
    assert planned(FINGERPRINTS["chest film"], SERVER).preprocess.size == (224, 224)
    mixed = fingerprint("classification", "XR", (28, 28), None, spacing_min=None, spacing_max=None, shape_max=(60, 60))
    assert planned(mixed).preprocess.size == (32, 32)


# Imbalance -----------------------------------------------------------------------------------------------------------


def test_imbalance_weighs_the_rare_class_by_the_root_of_its_rarity():
    found = fingerprint("classification", "XR", (28, 28), None, spacing_min=None, spacing_max=None,
                        class_cases={"no": 900, "yes": 100})  # fmt: skip
    weights = planned(found).loss.class_weights
    assert weights[1] / weights[0] == pytest.approx(3.0, rel=1e-3) and sum(weights) == pytest.approx(2.0, abs=1e-3)


def test_balanced_classes_and_several_labels_are_not_weighted():
    balanced = fingerprint("classification", "XR", (28, 28), None, spacing_min=None, spacing_max=None,
                           class_cases={"no": 51, "yes": 49})  # fmt: skip
    assert planned(balanced).loss.class_weights is None
    several = fingerprint("multilabel", "XR", (28, 28), None, spacing_min=None, spacing_max=None,
                          class_cases={"no": 900, "yes": 1})  # fmt: skip
    loss = planned(several).loss
    assert (loss.name, loss.class_weights) == ("bce", None)


def test_a_class_without_cases_gets_a_finite_weight():
    found = fingerprint("classification", "XR", (28, 28), None, spacing_min=None, spacing_max=None,
                        classes=("a", "b", "c"), class_cases={"a": 90, "b": 10})  # fmt: skip
    weights = planned(found).loss.class_weights
    assert len(weights) == 3 and all(math.isfinite(w) and w > 0 for w in weights)


# Augmentation and budget ---------------------------------------------------------------------------------------------


def test_bodies_are_not_mirrored_and_photographs_are():
    assert planned(fingerprint()).augment.flip_axes == ()
    assert planned(FINGERPRINTS["fundus"]).augment.flip_axes == (0, 1)
    assert planned(FINGERPRINTS["strip"]).augment.flip_axes == (1,)
    assert planned(FINGERPRINTS["mr"]).augment.p_bias_field > 0


def test_a_budget_is_handed_on():
    assert planned(fingerprint(), budget=90.0).train.budget == 90.0
    assert planned(fingerprint()).train.budget is None


# The machine ---------------------------------------------------------------------------------------------------------


def test_the_machine_at_hand_is_described():
    here = Machine.here()
    assert here.cpus >= 1 and here.memory > GIB // 8
    assert here.device == ("cuda" if torch.cuda.is_available() else "cpu")


def test_training_memory_is_the_gpus_or_half_of_main_memory():
    assert LAPTOP.training_memory == 4 * GIB and LAPTOP.device == "cpu"
    assert SERVER.training_memory == int(80 * GIB * 0.85) and SERVER.device == "cuda"
    assert SERVER.note == "32 cores, 256 GiB, 1 GPU, 80 GiB"
