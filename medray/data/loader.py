"""TrainLoader: whole optimiser batches of prepared, augmented samples.

An epoch is a pass over the cases (``train.samples_per_case`` patches of each), its last batch filled up with cases
drawn anew, so that every step sees ``train.batch_size`` samples. Everything random depends on (seed, epoch, batch)
alone: a resumed run, and any number of threads or processes that make batches ahead, see the same batches.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from medray.config.schema import Experiment
from medray.data.ahead import DEPTH, Helpers, in_threads, shared_memory, usable_cpus
from medray.data.augment import Augment
from medray.data.cache import PreparedStore
from medray.data.lots import Lot, Lots, Poisson
from medray.data.manifest import IGNORE
from medray.data.preprocess import OUTSIDE
from medray.errors import ConfigError, DataError
from medray.tasks.catalogue import find_task

__all__ = ["Batch", "TrainLoader", "train_loader"]

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
"""image: (B, C, *s) float32. target: (B, *s) int64 (a mask), (B,) int64 (a class) or (B, K) float32 (several labels; a
class with mixup or CutMix). index: (B,) int64, the case in the manifest."""

Key = tuple[int, int, float | None]
"""Epoch, number of the batch in it, strength of augmentation (None: the experiment's)."""


def train_loader(
    store: PreparedStore,
    indices: Sequence[int],
    experiment: Experiment,
    *,
    kind: str,
    num_classes: int,
    workers: int | None = None,
    processes: bool | None = None,
) -> TrainLoader:
    """A loader of training batches.

    Args:
        store: the prepared cases.
        indices: which of them train.
        experiment: ``train``, ``augment``, ``preprocess.spacing``, ``seed`` and ``device`` are looked at.
        kind: the task.
        num_classes: K.
        workers: helpers that make batches ahead; 0 makes them in place. None takes ``train.loader_workers``, and where
            that is None, too, as many as pay.
        processes: whether helpers are processes rather than threads. None: where a GPU trains, since Python's part of
            the work would hold up the thread that feeds it; on a CPU, threads cost neither memory nor a start.

    Raises:
        DataError: no cases, a case without target, or images of several shapes without a patch size.
        ConfigError: a patch size of the wrong length; mixup of masks.
    """
    on_gpu = torch.cuda.is_available() and experiment.device != "cpu"
    batches = _Batches(store, np.asarray(indices, dtype=np.int64), experiment, kind, num_classes)
    workers = experiment.train.loader_workers if workers is None else workers
    if workers is None:
        # A CPU that trains begins without, for helpers would take the cores that train; a GPU has them idle.
        spare = usable_cpus() - 1
        helpers = Helpers(max(1, min(4, spare)), max(1, spare)) if on_gpu else Helpers(0, spare)
    else:
        helpers = Helpers(workers, workers)
    return TrainLoader(batches, helpers, processes=on_gpu if processes is None else processes)


class TrainLoader:
    """Iterates over one epoch's batches; :meth:`set_epoch` says which."""

    def __init__(self, batches: _Batches, helpers: Helpers, *, processes: bool, poisson: Poisson | None = None) -> None:
        self._batches, self._helpers, self._processes, self._poisson = batches, helpers, processes, poisson
        self._epoch = 0
        self._strength: float | None = None
        self._stream: Iterator[Batch] | None = None  # of helpers, from one epoch into the next
        self._coming: tuple[Key, int] | None = None  # the key that it gives next, and its number of helpers
        self._loader: DataLoader[Batch] | None = None
        self._keys = _Keys(len(batches))

    @property
    def workers(self) -> int:
        """Helpers that make batches ahead, now."""
        return self._helpers.number

    def observe(self, samples: float, seconds: float, waited: float) -> None:
        """Tell of an epoch that is over; the number of helpers follows (see :class:`Helpers`)."""
        self._helpers.observe(samples, seconds, waited)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through; without it, each follows the former."""
        self._epoch = epoch

    def set_strength(self, strength: float) -> None:
        """Augment so strongly from the next iteration on, whatever the experiment says."""
        self._strength = strength

    def shard(self, rank: int, ranks: int) -> TrainLoader:
        """The share of one of several processes that train together: every ``ranks``-th sample of every batch.

        Raises:
            ConfigError: the batch has fewer samples than there are processes.
        """
        return TrainLoader(self._batches.shard(rank, ranks), self._helpers.again(), processes=self._processes)

    def poisson(self, rate: float, source: Lots, *, groups: Sequence[Hashable] | None = None) -> TrainLoader:
        """The same cases in Poisson samples: a batch may hold none or many of them.

        They are drawn from ``source`` anew each time, also where a run goes on: what the seed gave could be foretold.
        They are made in place, since helpers would make them before they are drawn.

        Args:
            rate: above 0, at most 1.
            source: of lots.
            groups: the unit of each training case, in their order; None for cases by themselves.
        """
        drawn = Poisson(rate, source, len(self._batches.cases), groups)
        return TrainLoader(self._batches, Helpers(0, 0), processes=False, poisson=drawn)

    @property
    def units(self) -> int:
        """What samples are drawn of: groups, or cases."""
        return len(self._batches.cases) if self._poisson is None else self._poisson.units

    def __len__(self) -> int:
        train = self._batches.train
        return math.ceil(self.units * train.samples_per_case / train.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        epoch, self._epoch = self._epoch, self._epoch + 1
        strength, poisson = self._strength, self._poisson
        if poisson is not None:
            return (self._batches.of(poisson.draw(), strength) for _ in range(len(self)))
        return (self._batch((epoch, number, strength)) for number in range(len(self)))

    def _batch(self, key: Key) -> Batch:
        if self.workers == 0:
            self._stream = self._loader = self._coming = None
            return self._batches[key]
        if self._stream is None or self._coming != (key, self.workers):
            self._stream = None  # which ends its threads
            self._keys.first = key
            if self._processes and self._has_room(key):
                self._stream = iter(self._processes_loader())
            else:
                self._stream = in_threads(self._batches.__getitem__, self._keys, self.workers)
        self._coming = (self._keys.after(key), self.workers)
        return next(self._stream)

    def _processes_loader(self) -> DataLoader[Batch]:
        if self._loader is None or self._loader.num_workers != self.workers:
            # fork would copy the threads of CUDA and Ray half; a fork server is safe, and pays for its imports once
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["medray.data.loader", *self._batches.augment.imports])
            self._loader = DataLoader(
                self._batches,
                batch_size=None,
                sampler=self._keys,
                num_workers=self.workers,
                prefetch_factor=DEPTH,
                pin_memory=torch.cuda.is_available(),
                persistent_workers=True,
                multiprocessing_context=context,
                generator=torch.Generator(),  # of seeds that nothing here uses; the global one is the network's
            )
        return self._loader

    def _has_room(self, key: Key) -> bool:
        """Whether what processes hand over fits into shared memory; from the first "no" on, threads do it."""
        if self._loader is None:
            batch = sum(tensor.nbytes for tensor in self._batches[key].values())
            need = batch * (DEPTH * max(self._helpers.most, self.workers) + 2)
            if shared_memory() < need:
                log.warning(
                    "loader: /dev/shm has no room for %.0f MiB of batches: threads make them, which may be slower. "
                    "Enlarge it (docker run --shm-size)",
                    need / 2**20,
                )
                self._processes = False
        return self._processes


class _Keys:
    """A sampler without end: from its first key on through this epoch and those after it."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.first: Key = (0, 0, None)

    def __iter__(self) -> Iterator[Key]:
        key = self.first
        while True:
            yield key
            key = self.after(key)

    def after(self, key: Key) -> Key:
        """The next batch's, at the same strength."""
        epoch, number, strength = key
        return (epoch, number + 1, strength) if number + 1 < self.length else (epoch + 1, 0, strength)


class _Batches(Dataset[Batch]):
    """Batch number n of epoch e, augmented by strength s, as a function of (e, n, s)."""

    def __init__(
        self,
        store: PreparedStore,
        cases: npt.NDArray[np.int64],
        experiment: Experiment,
        kind: str,
        num_classes: int,
    ) -> None:
        train = experiment.train
        if not len(cases):
            raise DataError("no cases to train on: the training side of the split is empty")
        self.form = find_task(kind).target
        self.dense = self.form == "mask"
        if self.dense and (train.mixup > 0 or train.cutmix > 0):
            raise ConfigError("train.mixup and train.cutmix are for classification: set them to 0")
        self.store, self.cases, self.num_classes = store, cases, num_classes
        self.seed, self.train = experiment.seed, train
        self.rows = np.arange(train.batch_size)
        self.lane = 0
        self._last_order: tuple[int, npt.NDArray[np.int64]] = (-1, self.rows)
        self.patch = self._patch_size()
        self.augment = Augment(experiment.augment, ndim=store.ndim, spacing=experiment.preprocess.spacing)
        self.field = self._field()
        self.whole = all(self.store.shape(int(i)) == self.field == self.patch for i in cases)
        self.targets = None if self.dense else self._targets()
        self.strata = self._strata() if train.balanced and self.targets is not None else None
        if self.dense:
            bare = [int(i) for i in cases if store.mask(int(i)) is None]
            if bare:
                raise DataError(f"{len(bare)} training case(s) have no mask, such as number {bare[0]}. Remove them")

    def shard(self, rank: int, ranks: int) -> _Batches:
        if not 0 <= rank < ranks <= self.train.batch_size:
            raise ConfigError(
                f"train.batch_size={self.train.batch_size} must be at least the number of processes ({ranks}), "
                f"and rank {rank} below it"
            )
        part = object.__new__(_Batches)
        part.__dict__.update(self.__dict__, rows=self.rows[rank::ranks], lane=rank)
        return part

    def _patch_size(self) -> tuple[int, ...]:
        patch = self.train.patch_size
        if patch is not None:
            if len(patch) != self.store.ndim or min(patch) < 1:
                raise ConfigError(
                    f"train.patch_size={list(patch)}: expected {self.store.ndim} values of at least 1, one per axis"
                )
            return patch
        shapes = {self.store.shape(int(i)) for i in self.cases}
        if len(shapes) > 1:
            raise DataError(
                f"the prepared images have {len(shapes)} different shapes, such as {sorted(shapes)[0]} and "
                f"{sorted(shapes)[-1]}, and can't be stacked. Set train.patch_size, or preprocess.size (classification)"
            )
        return shapes.pop()

    def _field(self) -> tuple[int, ...]:
        """What is read of each image: the patch and, where images are larger, what a turned patch may see of it."""
        largest = np.max([self.store.shape(int(i)) for i in self.cases], axis=0)
        wide = self.augment.field(self.patch)
        return tuple(w if n > p else p for w, p, n in zip(wide, self.patch, largest.tolist(), strict=True))

    def _targets(self) -> Tensor:
        labels = [self.store.label(int(i)) for i in self.cases]
        for i, label in zip(self.cases, labels, strict=True):
            fits = (
                isinstance(label, int) and 0 <= label < self.num_classes
                if self.form == "class"
                else isinstance(label, tuple) and len(label) == self.num_classes
            )
            if not fits:
                raise DataError(
                    f"training case number {i} has the label {label!r}, which is none of {self.num_classes} classes. "
                    "Label or remove it"
                )
        return torch.tensor(labels, dtype=torch.int64 if self.form == "class" else torch.float32)

    def _strata(self) -> list[npt.NDArray[np.int64]]:
        """Positions in ``cases`` by class; a case of several labels counts for its rarest."""
        assert self.targets is not None
        if self.form == "class":
            key = self.targets.numpy()
        else:
            present = self.targets.numpy() > 0
            frequency = np.where(present, present.sum(axis=0), len(present) + 1)
            key = np.where(present.any(axis=1), frequency.argmin(axis=1), self.num_classes)
        return [np.flatnonzero(key == k) for k in np.unique(key)]

    def __len__(self) -> int:
        return math.ceil(len(self.cases) * self.train.samples_per_case / self.train.batch_size)

    def __getitem__(self, key: Key) -> Batch:
        epoch, number, strength = key
        size = self.train.batch_size
        drawn = self._order(epoch)[number * size : (number + 1) * size][self.rows]
        rng = np.random.default_rng((self.seed, epoch, number, self.lane, 1))
        return self._made(drawn, [number * size + int(row) for row in self.rows], strength, rng)

    def of(self, lot: Lot, strength: float | None) -> Batch:
        """The batch of a lot; it may be empty."""
        drawn, rng = np.array(lot[0], dtype=np.int64), np.random.default_rng((lot[1], 1))
        return self._made(drawn, [None] * len(drawn), strength, rng)

    def _made(
        self,
        drawn: npt.NDArray[np.int64],
        places: Sequence[int | None],
        strength: float | None,
        rng: np.random.Generator,
    ) -> Batch:
        """A batch of the cases at ``drawn``; ``places``: the number of each sample in its epoch, see :meth:`_place`."""
        generator = torch.Generator().manual_seed(int(rng.integers(2**63 - 1)))
        images, masks = self._read_all(drawn, places, rng)
        augment = self.augment if strength is None else self.augment.at(strength)
        if len(drawn):
            images, masks = augment(images, masks, generator, size=self.patch)
        else:  # a Poisson sample may be empty
            images = images.new_zeros((0, self.store.channels, *self.patch))
            masks = None if masks is None else masks.new_zeros((0, *self.patch))
        if masks is not None:
            target = masks.to(torch.int64)
        else:
            assert self.targets is not None
            target = self.targets[torch.from_numpy(drawn)]
            if self.train.mixup > 0 or self.train.cutmix > 0:
                images, target = self._mix(images, target, rng)
        return {"image": images, "target": target, "index": torch.from_numpy(self.cases[drawn])}

    def _read_all(
        self, drawn: npt.NDArray[np.int64], places: Sequence[int | None], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """The field of each sample, (B, C, *field) and, in segmentation, (B, *field) float32."""
        if self.whole and not self.dense and len(drawn):
            return torch.from_numpy(self.store.images(self.cases[drawn])), None
        images = np.full((len(drawn), self.store.channels, *self.field), OUTSIDE, np.float32)
        masks = np.full((len(drawn), *self.field), IGNORE, np.float32) if self.dense else None
        for row, position in enumerate(drawn):
            mask = None if masks is None else masks[row]
            self._read(int(self.cases[position]), places[row], rng, images[row], mask)
        return torch.from_numpy(images), None if masks is None else torch.from_numpy(masks)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Positions in ``cases`` of all samples of an epoch, (steps * batch_size,)."""
        last, order = self._last_order  # in one piece, since several threads ask
        if last != epoch:
            order = self._shuffled(epoch)
            self._last_order = (epoch, order)
        return order

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        rng = np.random.default_rng((self.seed, epoch))
        need = len(self) * self.train.batch_size
        if self.strata is None:
            laps = [rng.permutation(len(self.cases)) for _ in range(math.ceil(need / len(self.cases)))]
            return np.concatenate(laps)[:need]
        per_class = math.ceil(need / len(self.strata))
        columns = [
            np.concatenate([rng.permutation(members) for _ in range(math.ceil(per_class / len(members)))])[:per_class]
            for members in self.strata
        ]
        rounds = np.stack(columns, axis=1)  # one of each class a row
        return rng.permuted(rounds, axis=1).reshape(-1)[:need]

    def _read(
        self,
        i: int,
        position: int | None,
        rng: np.random.Generator,
        image: npt.NDArray[np.float32],
        mask: npt.NDArray[np.float32] | None,
    ) -> None:
        """Copy one patch, and the field around it, into ``image`` (C, *field) and ``mask`` (*field).

        What juts out of the image stays as it is: 0, the mean of a normalised image, and IGNORE.
        """
        shape = self.store.shape(i)
        inside, slots = [], []
        for n, patch, field, first in zip(
            shape, self.patch, self.field, self._place(i, shape, position, rng), strict=True
        ):
            start = first - (field - patch) // 2
            low, high = max(start, 0), min(start + field, n)
            inside.append(slice(low, high))
            slots.append(slice(low - start, high - start))
        image[(slice(None), *slots)] = self.store.image(i)[(slice(None), *inside)]
        if mask is not None:
            labels = self.store.mask(i)
            assert labels is not None
            mask[tuple(slots)] = labels[tuple(inside)]

    def _place(self, i: int, shape: tuple[int, ...], position: int | None, rng: np.random.Generator) -> list[int]:
        """Where a patch starts, per axis; it is centred on the image along axes that are shorter than it.

        ``position`` is the sample's number in the epoch; None for a lot, where others must not decide anything for it.
        """
        share = self.train.foreground if self.dense else 0.0
        centre = None
        if position is None:
            foreground = rng.random() < share
        else:
            foreground = int((position + 1) * share) > int(position * share)  # every 1/share-th, rather than by chance
        if foreground:
            classes = self.store.foreground_classes(i)
            if len(classes):
                drawn = int(rng.choice(np.unique(classes)))
                first, last = np.searchsorted(classes, [drawn, drawn + 1])
                centre = self.store.foreground(i)[rng.integers(first, last)]
        start = []
        for axis, (n, size) in enumerate(zip(shape, self.patch, strict=True)):
            if n <= size:
                start.append(-((size - n) // 2))
            elif centre is None:
                start.append(int(rng.integers(n - size + 1)))
            else:
                start.append(int(np.clip(centre[axis] - size // 2, 0, n - size)))
        return start

    def _mix(self, images: Tensor, target: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Each sample with another of the batch; soft targets (B, K) float32.

        mixup (Zhang et al., ICLR 2018) fades one into the other; CutMix (Yun et al., ICCV 2019) sets a box of the other
        into the one. Targets mix by the share that each has of the image.
        """
        soft = target if target.ndim == 2 else F.one_hot(target, self.num_classes).float()
        other = torch.from_numpy(rng.permutation(len(images)))
        mixup, cutmix = self.train.mixup, self.train.cutmix
        if cutmix > 0 and (mixup == 0 or rng.random() < 0.5):
            images, weight = self._paste(images, images[other], 1.0 - rng.beta(cutmix, cutmix, len(images)), rng)
        else:
            weight = torch.from_numpy(rng.beta(mixup, mixup, len(images))).float()
            images = torch.lerp(images[other], images, weight.view(-1, *[1] * (images.ndim - 1)))
        return images, torch.lerp(soft[other], soft, weight.view(-1, 1))

    def _paste(
        self, images: Tensor, others: Tensor, shares: npt.NDArray[np.float64], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """A box of about such a share of each other image in its place; what is left of each own one, (B,)."""
        shape, ndim = images.shape[2:], images.ndim - 2
        images, left = images.clone(), torch.ones(len(images))
        for row, share in enumerate(shares):
            box: list[slice] = []
            for n in shape:
                size = min(n, round(n * float(share) ** (1 / ndim)))
                start = int(rng.integers(n - size + 1))
                box.append(slice(start, start + size))
            images[row][(slice(None), *box)] = others[row][(slice(None), *box)]
            left[row] = 1.0 - math.prod(part.stop - part.start for part in box) / math.prod(shape)
        return images, left
