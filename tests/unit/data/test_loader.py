"""TrainLoader: what is in a batch, what an epoch is, and that (seed, epoch, batch) decide everything."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medray.config.schema import AugmentConfig, Experiment, PreprocessConfig, TrainConfig
from medray.data.cache import PreparedStore
from medray.data.loader import Batch, TrainLoader, train_loader
from medray.data.manifest import IGNORE, Case, Manifest
from medray.errors import ConfigError, DataError

PLAIN = AugmentConfig(strength=0.0)


def store_of(
    root: Path, arrays: list[np.ndarray[Any, Any]], masks: list[np.ndarray[Any, Any]] | None = None, **fields: Any
) -> PreparedStore:
    """A store of volumes written as NIfTI (3-D) or pictures from an archive (2-D)."""
    import nibabel as nib

    ndim, labels = arrays[0].ndim, fields.pop("labels", None)
    cases = []
    for i, array in enumerate(arrays):
        case: dict[str, Any] = {"id": str(i), "images": (f"i{i}.nii",)}
        if ndim == 3:
            nib.save(nib.Nifti1Image(array.astype(np.float32), np.eye(4)), root / f"i{i}.nii")
            if masks is not None:
                nib.save(nib.Nifti1Image(masks[i], np.eye(4)), root / f"m{i}.nii")
                case["mask"] = f"m{i}.nii"
        else:
            case["images"] = (f"all.npz#train_images/{i}",)
        if labels is not None:
            case["label"] = labels[i]
        cases.append(Case.model_validate(case))
    if ndim == 2:
        np.savez(root / "all.npz", train_images=np.stack(arrays).astype(np.uint8))
    fields = {"source": "x", "root": str(root), "ndim": ndim, "channels": 1, "cases": tuple(cases), **fields}
    manifest = Manifest.model_validate(fields)
    return PreparedStore.open_or_build(manifest, PreprocessConfig(normalize="none"), root / "cache")


@pytest.fixture
def volumes(tmp_path: Path) -> PreparedStore:
    """Twelve volumes whose voxels say where they are; a small lesion in a corner of each, none in the last."""
    rng = np.random.default_rng(0)
    arrays, masks = [], []
    for i in range(12):
        shape = (20 + i, 24, 18)
        array = np.add.outer(np.add.outer(np.arange(shape[0]) * 1e4, np.arange(24) * 1e2), np.arange(18.0))
        mask = np.zeros(shape, np.uint8)
        if i < 11:
            corner = rng.integers(0, 14, 3)
            mask[tuple(slice(c, c + 3) for c in corner)] = 1 + i % 2
        arrays.append(array)
        masks.append(mask)
    return store_of(tmp_path, arrays, masks, task="segmentation", classes=("background", "a", "b"))


@pytest.fixture
def pictures(tmp_path: Path) -> PreparedStore:
    """Thirty pictures, each of its own grey; every tenth is of class 1."""
    arrays = [np.full((8, 8), i * 8) for i in range(30)]
    labels = [int(i % 10 == 0) for i in range(30)]
    return store_of(tmp_path, arrays, labels=labels, task="classification", classes=("no", "yes"))


def experiment(augment: AugmentConfig = PLAIN, seed: int = 0, **train: Any) -> Experiment:
    return Experiment(device="cpu", seed=seed, augment=augment, train=TrainConfig(**train))


def segmentation(store: PreparedStore, config: Experiment, **kwargs: Any) -> TrainLoader:
    return train_loader(store, range(len(store)), config, kind="segmentation", num_classes=3, **kwargs)


def classification(store: PreparedStore, config: Experiment, **kwargs: Any) -> TrainLoader:
    return train_loader(store, range(len(store)), config, kind="classification", num_classes=2, **kwargs)


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a[key], b[key]) for a, b in zip(one, other, strict=True) for key in ("image", "target", "index")
    )


def test_a_batch(volumes: PreparedStore) -> None:
    loader = segmentation(volumes, experiment(batch_size=5, patch_size=(8, 8, 8)))
    batches = list(loader)
    assert len(batches) == len(loader) == 3
    for batch in batches:
        assert batch["image"].shape == (5, 1, 8, 8, 8) and batch["image"].dtype == torch.float32
        assert batch["target"].shape == (5, 8, 8, 8) and batch["target"].dtype == torch.int64


def test_patches_are_what_the_files_hold(volumes: PreparedStore) -> None:
    for batch in segmentation(volumes, experiment(batch_size=4, patch_size=(8, 10, 6), samples_per_case=3)):
        for image, target, i in zip(batch["image"], batch["target"], batch["index"].tolist(), strict=True):
            first = int(image[0, 0, 0, 0])
            corner = (first // 10_000, first % 10_000 // 100, first % 100)
            box = tuple(slice(c, c + n) for c, n in zip(corner, (8, 10, 6), strict=True))
            np.testing.assert_array_equal(image[0], volumes.image(i)[0][box])
            np.testing.assert_array_equal(target, np.asarray(volumes.mask(i))[box])


def test_small_volumes_are_centred_in_zeros_and_ignored_around(volumes: PreparedStore) -> None:
    batch = next(iter(segmentation(volumes, experiment(batch_size=12, patch_size=(40, 24, 18)))))
    for image, target, i in zip(batch["image"], batch["target"], batch["index"].tolist(), strict=True):
        n = volumes.shape(i)[0]
        before = (40 - n) // 2
        np.testing.assert_array_equal(image[0, before : before + n], volumes.image(i)[0])
        outside = torch.ones(40, dtype=torch.bool)
        outside[before : before + n] = False
        assert (image[0, outside] == 0).all() and (target[outside] == IGNORE).all()
        assert (target[~outside] != IGNORE).all()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_share_of_patches_on_foreground(volumes: PreparedStore, share: float) -> None:
    config = experiment(batch_size=8, patch_size=(5, 5, 5), samples_per_case=20, foreground=share)
    loader = train_loader(volumes, range(11), config, kind="segmentation", num_classes=3)
    centred = [bool((t[2, 2, 2] > 0) or (t > 0).any()) for batch in loader for t in batch["target"]]
    chance = 0.05
    assert share - 0.02 <= np.mean(centred) <= share + (1 - share) * 2 * chance + 0.02


def test_an_epoch_passes_over_all_cases(volumes: PreparedStore) -> None:
    loader = segmentation(volumes, experiment(batch_size=4, patch_size=(4, 4, 4), samples_per_case=2))
    seen = Counter(i for batch in loader for i in batch["index"].tolist())
    assert seen == Counter(dict.fromkeys(range(12), 2))


def test_the_last_batch_is_full(pictures: PreparedStore) -> None:
    batches = list(classification(pictures, experiment(batch_size=16)))
    assert [len(b["image"]) for b in batches] == [16, 16]
    assert {i for b in batches for i in b["index"].tolist()} == set(range(30))
    assert len(next(iter(classification(pictures, experiment(batch_size=64))))["image"]) == 64


def test_seed_epoch_and_batch_decide(volumes: PreparedStore) -> None:
    config = experiment(AugmentConfig(p_affine=1.0, p_noise=1.0), batch_size=4, patch_size=(8, 8, 8))
    loader = segmentation(volumes, config)
    first, second = list(loader), list(loader)
    assert not same(first, second)
    again = segmentation(volumes, config)
    again.set_epoch(1)
    assert same(list(again), second)
    again.set_epoch(0)
    assert same(list(again), first)
    other = experiment(AugmentConfig(p_affine=1.0, p_noise=1.0), seed=1, batch_size=4, patch_size=(8, 8, 8))
    assert not same(list(segmentation(volumes, other)), first)


@pytest.mark.parametrize("processes", [False, True], ids=["threads", "processes"])
def test_helpers_change_nothing(volumes: PreparedStore, processes: bool) -> None:
    config = experiment(AugmentConfig(p_affine=1.0, p_noise=1.0), batch_size=4, patch_size=(8, 8, 8))
    here, there = (
        segmentation(volumes, config, workers=0),
        segmentation(volumes, config, workers=2, processes=processes),
    )
    threads, drawn = torch.get_num_threads(), torch.get_rng_state()
    for epoch in (0, 1, 4):  # one that they were ahead into, and one that they weren't
        here.set_epoch(epoch)
        there.set_epoch(epoch)
        if epoch == 4:
            next(iter(there))  # given up after a batch
            there.set_epoch(epoch)
            here.set_strength(0.5)
            there.set_strength(0.5)
        assert same(list(here), list(there))
    assert there.workers == 2 and torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), drawn), "the network's own draws would depend on the loader"


def test_threads_go_on_into_the_next_epoch(volumes: PreparedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = segmentation(volumes, experiment(batch_size=4, patch_size=(8, 8, 8), loader_workers=1))
    made: list[int] = []
    make = type(loader._batches).__getitem__

    def noted(batches: Any, key: Any) -> Batch:
        made.append(key[0])
        return make(batches, key)

    monkeypatch.setattr(type(loader._batches), "__getitem__", noted)
    list(loader)
    for _ in range(200):
        if made.count(1) == 2:
            break
        time.sleep(0.01)
    assert made == [0, 0, 0, 1, 1]
    reference = segmentation(volumes, experiment(batch_size=4, patch_size=(8, 8, 8)), workers=0)
    reference.set_epoch(1)
    assert same(list(loader), list(reference))


def test_processes_without_room_for_their_batches_are_threads(
    volumes: PreparedStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = experiment(batch_size=4, patch_size=(8, 8, 8), loader_workers=2)
    monkeypatch.setattr("medray.data.loader.shared_memory", lambda: 50_000)  # a batch has 41 kB
    loader = segmentation(volumes, config, processes=True)
    assert same(list(loader), list(segmentation(volumes, config, workers=0)))
    assert "shm-size" in caplog.text and loader._loader is None


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells which pages of a file were touched")
def test_patches_are_read_without_their_volumes_and_placed_without_masks(tmp_path: Path) -> None:
    """Which pages of a mapped file were touched, the kernel knows; around each it maps up to 2 MiB."""
    shape = (1600, 64, 64)
    mask = np.zeros(shape, np.uint8)
    mask[700:720, 30:50, 30:40] = 1
    store = store_of(
        tmp_path, [np.zeros(shape, np.uint8)], [mask], task="segmentation", classes=("background", "lesion")
    )
    config = experiment(batch_size=2, samples_per_case=2, patch_size=(12, 12, 12), foreground=0.5)
    loader = train_loader(store, [0], config, kind="segmentation", num_classes=2, workers=0)
    for position in range(50):
        loader._batches._place(0, shape, position, np.random.default_rng(position))
    assert resident(store.path / "masks.bin") == 0 and resident(store.path / "images.bin") == 0
    (batch,) = loader
    assert (batch["target"] == 1).any()
    assert 0 < resident(store.path / "images.bin") < 0.5 * store.image(0).nbytes


def resident(path: Path) -> int:
    """Bytes of a mapped file that this process has touched."""
    ours, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


def test_shards_are_the_batch(pictures: PreparedStore) -> None:
    loader = classification(pictures, experiment(batch_size=10))
    whole = list(loader)
    shards = [list(loader.shard(rank, 3)) for rank in range(3)]
    for number, batch in enumerate(whole):
        for rank in range(3):
            assert torch.equal(shards[rank][number]["index"], batch["index"][rank::3])
            assert torch.equal(shards[rank][number]["image"], batch["image"][rank::3])
    with pytest.raises(ConfigError, match="at least the number of processes"):
        loader.shard(0, 11)


def test_balanced_draws_classes_equally(pictures: PreparedStore) -> None:
    batches = list(classification(pictures, experiment(batch_size=10, balanced=True)))
    assert torch.cat([b["target"] for b in batches]).float().mean() == 0.5
    rare = Counter(i for b in batches for i, t in zip(b["index"].tolist(), b["target"].tolist(), strict=True) if t == 1)
    assert set(rare) == {0, 10, 20} and max(rare.values()) - min(rare.values()) == 0


def test_balanced_multilabel_goes_by_the_rarest(tmp_path: Path) -> None:
    labels = [(1, int(i % 10 == 0)) if i % 2 else (0, int(i % 10 == 0)) for i in range(40)]
    store = store_of(
        tmp_path, [np.full((8, 8), i) for i in range(40)], labels=labels, task="multilabel", classes=("a", "b")
    )
    config = experiment(batch_size=30, balanced=True)
    loader = train_loader(store, range(40), config, kind="multilabel", num_classes=2)
    target = torch.cat([b["target"] for b in loader])
    assert target.dtype == torch.float32 and target.shape == (60, 2)
    assert target[:, 1].mean() == pytest.approx(1 / 3, abs=0.02)


def test_mixup_mixes_images_as_it_mixes_labels(pictures: PreparedStore) -> None:
    batch = next(iter(classification(pictures, experiment(batch_size=30, mixup=0.8))))
    assert batch["target"].shape == (30, 2) and batch["target"].dtype == torch.float32
    torch.testing.assert_close(batch["target"].sum(dim=1), torch.ones(30))
    assert ((batch["target"][:, 1] > 0.01) & (batch["target"][:, 1] < 0.99)).any()
    own = torch.tensor([8.0 * i for i in batch["index"].tolist()])
    assert (batch["image"][:, 0, 0, 0] != own).sum() > 15


def test_cutmix_sets_boxes_of_others_and_labels_follow_their_share(pictures: PreparedStore) -> None:
    """A picture here has one value all over: what another one brought can be counted."""
    batch = next(iter(classification(pictures, experiment(batch_size=30, cutmix=1.0))))
    own = torch.tensor([8.0 * i for i in batch["index"].tolist()]).view(-1, 1, 1)
    share = (batch["image"][:, 0] == own).float().mean((1, 2))
    labels = torch.tensor([int(i % 10 == 0) for i in batch["index"].tolist()])
    kept = batch["target"][torch.arange(30), labels]
    assert ((kept - share).abs() < 1e-6)[kept < 1].all() and (kept < 1).sum() > 2
    torch.testing.assert_close(batch["target"].sum(dim=1), torch.ones(30))


def test_mixup_and_cutmix_take_turns(pictures: PreparedStore) -> None:
    loader = classification(pictures, experiment(batch_size=30, cutmix=1.0, mixup=1.0))
    whole = []
    for epoch in range(12):
        loader.set_epoch(epoch)
        (batch,) = loader
        whole.append(bool((batch["image"] % 8 == 0).all()))  # a box leaves whole values, a blend does not
    assert any(whole) and not all(whole)


def test_another_strength_changes_the_augmentation_alone(pictures: PreparedStore) -> None:
    loader = classification(pictures, experiment(AugmentConfig(p_noise=1.0), batch_size=30))
    (asked,) = loader
    loader.set_epoch(0)
    loader.set_strength(0.0)
    (plain,) = loader
    assert torch.equal(asked["index"], plain["index"])
    own = torch.tensor([8.0 * i for i in plain["index"].tolist()])
    assert torch.equal(plain["image"][:, 0, 0, 0], own) and not torch.equal(asked["image"], plain["image"])


def test_turned_patches_see_what_lies_beyond_them(volumes: PreparedStore) -> None:
    config = experiment(
        AugmentConfig(p_affine=1.0, translate=0.0, p_noise=0.0), batch_size=8, patch_size=(8, 8, 8), foreground=0.0
    )
    loader = segmentation(volumes, config)
    ignored = torch.cat([(b["target"] == IGNORE).flatten(1).float().mean(dim=1) for b in loader])
    assert (ignored == 0).float().mean() > 0.4 and ignored.mean() < 0.06


def test_nothing_to_train_on(pictures: PreparedStore, volumes: PreparedStore) -> None:
    with pytest.raises(DataError, match="no cases"):
        train_loader(pictures, [], experiment(), kind="classification", num_classes=2)
    with pytest.raises(DataError, match="label 1, which is none of 1"):
        train_loader(pictures, range(30), experiment(), kind="classification", num_classes=1)
    with pytest.raises(DataError, match="12 different shapes"):
        segmentation(volumes, experiment())
    with pytest.raises(ConfigError, match="expected 3 values"):
        segmentation(volumes, experiment(patch_size=(8, 8)))
    with pytest.raises(ConfigError, match="mixup"):
        segmentation(volumes, experiment(patch_size=(8, 8, 8), mixup=0.2))
    with pytest.raises(ConfigError, match="cutmix"):
        segmentation(volumes, experiment(patch_size=(8, 8, 8), cutmix=0.2))
    with pytest.raises(DataError, match="have no mask"):
        segmentation(pictures, experiment())


class Counted:
    """A source of lots that remembers what it was asked."""

    def __init__(self) -> None:
        self.rng, self.rates = np.random.default_rng(3), set()

    def lots(self, count: int, rate: float) -> Any:
        self.rates.add((count, rate))
        return np.flatnonzero(self.rng.random(count) <= rate)

    def seed(self) -> int:
        return int(self.rng.integers(2**63 - 1))


def test_poisson_samples_hold_each_unit_with_the_rate_and_each_once(volumes: PreparedStore) -> None:
    spec = Experiment(augment=PLAIN, train=TrainConfig(batch_size=3, patch_size=(8, 8, 8), foreground=0.5))
    loader = train_loader(volumes, range(12), spec, kind="segmentation", num_classes=3)
    source = Counted()
    private = loader.poisson(0.25, source)
    assert (private.units, len(private), len(loader)) == (12, 4, 4)
    sizes, seen = [], Counter()
    for _ in range(30):
        for batch in private:
            index = batch["index"].tolist()
            assert len(set(index)) == len(index) and batch["image"].shape == (len(index), 1, 8, 8, 8)
            assert batch["target"].shape == (len(index), 8, 8, 8)
            sizes.append(len(index))
            seen.update(index)
    assert source.rates == {(12, 0.25)}
    assert 0 in sizes and abs(np.mean(sizes) - 3) < 0.5 and min(seen.values()) > 15 and len(seen) == 12
    with pytest.raises(ConfigError, match="sample rate 0"):
        loader.poisson(0.0, source)


def test_a_patient_gives_one_image_to_a_poisson_sample(volumes: PreparedStore) -> None:
    spec = Experiment(augment=PLAIN, train=TrainConfig(batch_size=2, patch_size=(8, 8, 8)))
    loader = train_loader(volumes, range(12), spec, kind="segmentation", num_classes=3)
    groups = ["a"] * 9 + ["b", "c", "d"]
    private = loader.poisson(0.5, Counted(), groups=groups)
    assert (private.units, len(private)) == (4, 2)
    seen: Counter[int] = Counter()
    for _ in range(60):
        for batch in private:
            of = [groups[i] for i in batch["index"].tolist()]
            assert len(set(of)) == len(of)
            seen.update(batch["index"].tolist())
    by_patient = Counter(groups[i] for i in seen.elements())
    assert len(seen) == 12 and max(by_patient.values()) < 1.6 * min(by_patient.values())
