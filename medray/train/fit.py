"""fit(): plain PyTorch training, from an Experiment, a model and batches to the best weights.

It knows the surroundings through :class:`~medray.train.runtime.Runtime` alone, the data as dicts from a loader, and
the measure of success as what ``validate`` returns.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from medray.config.schema import Experiment
from medray.errors import ConfigError, OutOfMemoryError, TrainingError
from medray.learn.ema import Ema
from medray.learn.optimizers import build_optimizer
from medray.learn.schedules import Schedule
from medray.models import checkpointing
from medray.models.catalogue import lookup
from medray.train import checkpoint, memory
from medray.train.adapt import AdaptiveStrength
from medray.train.leg import Leg
from medray.train.meter import Meter
from medray.train.pace import Pace
from medray.train.precision import lay_out, resolve_device, resolve_precision
from medray.train.progress import FitResult, Progress, Stopped
from medray.train.runtime import LocalRuntime, Runtime
from medray.train.seeding import deterministic, get_rng, preserved_rng, seed_everything, set_rng
from medray.train.step import Stepper

if TYPE_CHECKING:
    from medray.tracking import Tracker

__all__ = ["CHECKPOINT", "Batches", "fit"]

CHECKPOINT = "checkpoint.pt"
CHECKPOINT_SECONDS = 120.0
"""Longest work that a kill can cost, where writing is quick; a checkpoint follows each validation anyway."""


class Batches(Protocol):
    """A training loader: as many batches in every epoch; which they are follows from its seed, the epoch and the
    position."""

    def __len__(self) -> int:
        """Batches of one epoch."""

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        """The batches of the epoch last set: "image" (B, C, *spatial) float32, "target", "index" (B,)."""

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is of ``epoch``, from 0."""


def fit(
    experiment: Experiment,
    model: nn.Module,
    train_loader: Batches,
    loss: nn.Module,
    *,
    validate: Callable[[nn.Module], dict[str, float]],
    objective: tuple[str, Literal["max", "min"]],
    runtime: Runtime | None = None,
    run_dir: Path | None = None,
    tracker: Tracker | None = None,
    on_validation: Callable[[Progress], bool] | None = None,
    deadline: float | None = None,
    resume: bool = True,
    leg: Leg | None = None,
) -> FitResult:
    """Train ``model`` as ``experiment`` says.

    The length is ``train.epochs``, or what fits into ``train.budget`` (see :mod:`medray.train.pace`). After each
    validation, and every two minutes between, a checkpoint is written to ``run_dir``; a later call with the same
    experiment goes on from it, on a CPU with the same result bit for bit. A run that had ended gives its result at
    once.

    Args:
        experiment: the sections seed, device, optim, schedule and train are read.
        model: logits of a batch (or a list of them in training: deep supervision); it is trained in place and left
            with the last step's weights. Seed before building it.
        train_loader: see :class:`Batches`.
        loss: of (logits, target), e.g. from :func:`medray.learn.losses.build_loss`.
        validate: metrics of the model, which is handed over in eval mode, without gradients, with averaged weights if
            EMA is on. The generators' states are kept, whatever it draws.
        objective: the metric that chooses the best weights, and which way is better.
        runtime: what runs it; default: this process on ``experiment.device``.
        run_dir: where the checkpoint lies; None for none.
        tracker: told loss, learning rate and metrics.
        on_validation: told each validation; True stops the run ("pruned").
        deadline: on time.monotonic()'s clock; a guard on top of the budget, which a run ends before, with a last
            validation.
        resume: go on from a checkpoint in ``run_dir``; else begin anew.
        leg: where this is but a part of a longer training: the schedule spans all parts, and random draws differ from
            part to part.

    Raises:
        NonFiniteLossError: the loss or gradient became NaN or infinite.
        OutOfMemoryError: one sample doesn't fit.
        TrainingError: a checkpoint that is damaged or of another experiment, a loader without batches.
        ConfigError: a precision or device that this machine lacks, an objective that ``validate`` doesn't return.
    """
    if runtime is None:
        runtime = LocalRuntime(resolve_device(experiment.device))
    with deterministic(experiment.train.deterministic):
        run = _Run(
            experiment,
            model,
            train_loader,
            loss,
            validate,
            objective,
            runtime,
            run_dir,
            tracker,
            on_validation,
            deadline,
            leg or Leg(0, 1),
        )
        return run.train(resume)


class _Run:
    """One call of fit()."""

    def __init__(
        self,
        experiment: Experiment,
        model: nn.Module,
        train_loader: Batches,
        loss: nn.Module,
        validate: Callable[[nn.Module], dict[str, float]],
        objective: tuple[str, Literal["max", "min"]],
        runtime: Runtime,
        run_dir: Path | None,
        tracker: Tracker | None,
        on_validation: Callable[[Progress], bool] | None,
        deadline: float | None,
        leg: Leg,
    ) -> None:
        train = experiment.train
        self.leg = leg
        self.experiment, self.model, self.runtime = experiment, model, runtime
        self.validate, self.objective, self.on_validation = validate, objective, on_validation
        self.tracker, self.deadline = tracker, deadline
        self.path = None if run_dir is None else run_dir / CHECKPOINT
        self.started = time.monotonic()
        self.earlier = 0.0  # seconds of earlier sittings
        memory.reset_peak(runtime.device)
        self.meter = Meter(runtime.device)
        precision = resolve_precision(train.precision, runtime.device)
        channels_last = lay_out(model, runtime.device, precision)
        # Random draws within the network (dropout) differ from process to process, and are the same from run to run.
        seed_everything(experiment.seed + runtime.lane + 7919 * leg.number)
        wrapped, self.optimizer, batches = runtime.prepare(
            model, lambda module: build_optimizer(module, experiment.optim), train_loader
        )
        self.wrapped, self.batches = wrapped, batches
        self.stepper = Stepper(
            wrapped,
            self.optimizer,
            runtime.criterion(loss),
            runtime=runtime,
            precision=precision,
            micro_batch=train.micro_batch,
            largest=None if runtime.is_alone else runtime.from_main(len(runtime.share(range(train.batch_size)))),
            clip_norm=experiment.optim.clip_norm,
            channels_last=channels_last,
            first=None if train.checkpointing == "off" else self._save_memory,
        )
        self.ema = Ema(model, train.ema) if train.ema else None
        self.schedule = Schedule(experiment.schedule, objective[1])
        augment = experiment.augment
        self.adaptive = AdaptiveStrength(augment.strength, objective[1]) if augment.adaptive else None
        self.steps_per_epoch = _length(batches)
        budget = train.budget
        if budget is not None and deadline is not None:
            budget = max(1e-3, min(budget, deadline - time.monotonic()))
        self.pace = Pace(
            epochs=train.epochs,
            steps_per_epoch=self.steps_per_epoch,
            budget=budget,
            validate_every=train.validate_every,
            timed=not train.deterministic,
        )
        self.step, self.samples = 0, 0
        self.best: dict[str, Any] = {"metrics": {}, "epoch": 0, "weights": None}
        self.waited = 0
        self.history: list[dict[str, Any]] = []
        self.losses: tuple[float, int] = (0.0, 0)  # sum and number since the last validation
        self.stopped: Stopped | None = None
        self.saved_at, self.save_seconds = self.started, 0.0
        self.ticked_at = self.started

    # -- the loop
    # -------------------------------------------------------------------------------------------------------------

    def train(self, resume: bool) -> FitResult:
        if resume:
            self._resume()
        self.wrapped.train()
        self.ticked_at = time.monotonic()
        while self.stopped is None:
            epoch, position = divmod(self.step, self.steps_per_epoch)
            for batch in self._epoch(epoch, position):
                if self._too_late():
                    self._end("deadline")
                    break
                self._learn(batch)
                self._tick()
                if self.pace.due(self.step):
                    self._validation()
                elif self.step % max(1, self.pace.total // 40) == 0:
                    self._revise()
                    if self.step >= self.pace.total:
                        self._validation()
                elif self.path and time.monotonic() - self.saved_at > max(CHECKPOINT_SECONDS, 20 * self.save_seconds):
                    self._save()  # its time counts as the next step's, as it does in the budget
                if self.stopped is not None:
                    break
        checkpointing.remove(self.model)
        return self._result()

    def _tick(self) -> None:
        now = time.monotonic()
        seconds, elapsed = now - self.ticked_at, self.elapsed
        self.meter.stepped(self.samples, seconds)
        if not self.pace.fixed:  # what is timed now decides the plan of steps, which has to be the same everywhere
            seconds, elapsed = self._mean(seconds, elapsed)
        self.pace.ticked(seconds, self.step, elapsed)
        self.ticked_at = now

    def _mean(self, *values: float) -> tuple[float, ...]:
        """Of all processes that train together."""
        ones, *sums = self.runtime.reduce({"values": [1.0, *values]})["values"]
        return tuple(float(value / ones) for value in sums)

    @property
    def elapsed(self) -> float:
        return self.earlier + time.monotonic() - self.started

    @property
    def epoch(self) -> int:
        """The pass that the last step was part of, from 1."""
        return max(1, math.ceil(self.step / self.steps_per_epoch))

    def _epoch(self, epoch: int, position: int) -> Iterator[Mapping[str, Tensor]]:
        set_epoch = getattr(self.batches, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
        if self.adaptive:
            set_strength = getattr(self.batches, "set_strength", None)
            if not callable(set_strength):
                raise ConfigError("augment.adaptive: this loader's augmentation can't change. Set it to false")
            set_strength(self.adaptive.at(epoch))
        # A DataLoader draws from the global generator when it starts: a resumed epoch must not draw once more.
        with preserved_rng():
            iterator = iter(self.batches)
            for _ in range(position):
                next(iterator)
        if position:
            self.ticked_at = time.monotonic()
        for _ in range(self.steps_per_epoch - position):
            with self.meter.waiting():
                batch = next(iterator, None)
            if batch is None:
                raise TrainingError(
                    f"the training loader ended before the {self.steps_per_epoch} batches it promised for epoch {epoch}"
                )
            yield batch

    def _learn(self, batch: Mapping[str, Tensor]) -> None:
        before = self.leg.number * self.pace.total
        factor = self.schedule.factor(before + self.step, self.leg.of * self.pace.total)
        for group in self.optimizer.param_groups:
            group["lr"] = self.experiment.optim.lr * factor
        value = self.stepper(batch, place=self._place)
        self.step += 1
        self.samples = len(batch["image"])
        self.losses = (self.losses[0] + value, self.losses[1] + 1)
        if self.ema:
            self.ema.update(self.model)
        if self.tracker and self.runtime.is_main and self.step % max(1, self.pace.total // 200) == 0:
            self.tracker.scalars({"train/loss": value, "train/lr": self._lr()}, self.step)
            self.meter.ask_device()

    def _save_memory(self, images: Tensor) -> None:
        """Choose what runs again in the backward pass, the same in all processes."""
        how, family = self.experiment.train.checkpointing, lookup(self.experiment.model.name).family
        kept = checkpointing.share_kept(family)
        checkpointing.apply(self.model, how, images, kept=kept, agree=self.runtime.from_main)

    def _place(self) -> str:
        epoch = self.step // self.steps_per_epoch + 1
        return f"step {self.step} (epoch {epoch}, learning rate {self._lr():.3g})"

    def _lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _too_late(self) -> bool:
        if self.deadline is None:
            return False
        reserve = self.pace.step_seconds + self.pace.validation_seconds
        return self.runtime.agree(time.monotonic() + reserve > self.deadline)

    def _revise(self) -> None:
        rate, validation, elapsed = self._mean(*self.pace.times(), self.elapsed)
        self.pace.revise(rate, validation, self.step, elapsed)

    # -- validation
    # -----------------------------------------------------------------------------------------------------------

    def _validation(self) -> None:
        began = time.monotonic()
        metrics = self._measure()
        name, mode = self.objective
        value = metrics[name]
        best = self.best["metrics"].get(name)
        gained = not math.isnan(value) and (best is None or (value > best if mode == "max" else value < best))
        self.waited = 0 if gained else self.waited + 1
        if gained:
            self.best = {"metrics": metrics, "epoch": self.epoch, "weights": self._weights()}
        self.schedule.observe(value)
        if self.adaptive:
            self.adaptive.observe(self.epoch - 1, value)
        (total,) = self._mean(self.losses[0])
        processes, rate, wait = self.runtime.reduce({"pace": [1.0, *self.meter.rates()]})["pace"]
        pace = {"system/samples_per_second": float(rate), "system/loader_wait": float(wait / processes)}
        mean_loss = total / self.losses[1] if self.losses[1] else math.nan
        self.losses = (0.0, 0)
        progress = Progress(
            epoch=self.epoch,
            step=self.step,
            fraction=min(1.0, self.step / self.pace.total),
            seconds=self.elapsed,
            metrics=metrics,
        )
        row = {
            "epoch": progress.epoch,
            "step": progress.step,
            "fraction": progress.fraction,
            "seconds": progress.seconds,
        }
        self.history.append({**row, "lr": self._lr(), "loss": mean_loss, **metrics})
        if self.tracker and self.runtime.is_main:
            self.tracker.scalars({"train/mean_loss": mean_loss, **metrics, **pace, **self.meter.device()}, self.step)
        prune = self.on_validation is not None and self.runtime.is_main and self.on_validation(progress)
        if self.runtime.agree(prune):
            self._end("pruned")
        elif self.step >= self.pace.total and self.pace.fixed:
            self._end("finished")
        elif self.experiment.train.patience is not None and self.runtime.agree(
            self.waited >= self.experiment.train.patience
        ):
            self._end("early")
        self.pace.validated(time.monotonic() - began + self.save_seconds)
        if self.stopped is None:
            self._revise()
            if self.step >= self.pace.total:
                self._end("finished")
        self._save()
        self.ticked_at = time.monotonic()

    def _measure(self) -> dict[str, float]:
        self.runtime.align(self.model)
        with preserved_rng(), torch.no_grad(), self.ema.applied(self.model) if self.ema else nullcontext():
            self.model.eval()
            try:
                metrics = {key: float(value) for key, value in self.validate(self.model).items()}
            except (RuntimeError, MemoryError) as error:
                if not memory.is_out_of_memory(error):
                    raise
                raise OutOfMemoryError(
                    f"validation after step {self.step} ran out of memory ({str(error)[:300]}); "
                    "lower train.patch_size or inference.overlap, or turn inference.tta off"
                ) from error
            finally:
                self.wrapped.train()
                self.model.train()
        if self.objective[0] not in metrics:
            raise ConfigError(
                f"the objective {self.objective[0]!r} is not measured here; there are: {', '.join(sorted(metrics))}"
            )
        return metrics

    def _weights(self) -> dict[str, Tensor]:
        with self.ema.applied(self.model) if self.ema else nullcontext():
            state = self.model.state_dict()
            return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in state.items()}

    def _end(self, why: Stopped) -> None:
        self.stopped = why
        if why != "deadline":
            return
        # The guard leaves room for one more validation, which may well be the best.
        measured = bool(self.history) and self.history[-1]["step"] == self.step
        if self.step and not measured and self._time_for_validation():
            self._validation()
            self.stopped = why
        self._save()

    def _time_for_validation(self) -> bool:
        late = self.deadline is not None and time.monotonic() + self.pace.validation_seconds > self.deadline
        return not self.runtime.agree(late and bool(self.history))

    # -- checkpoints
    # ----------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.path is None or not self.runtime.is_main:
            return
        began = time.monotonic()
        state = {
            "experiment": _digest(self.experiment),
            "objective": list(self.objective),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "adaptive": self.adaptive.state_dict() if self.adaptive else None,
            "stepper": self.stepper.state_dict(),
            "pace": self.pace.state_dict(),
            "rng": get_rng(),
            "step": self.step,
            "best": self.best,
            "waited": self.waited,
            "history": self.history,
            "losses": list(self.losses),
            "stopped": self.stopped,
            "seconds": self.elapsed,
        }
        checkpoint.save(self.path, state)
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - began

    def _resume(self) -> None:
        if self.path is None:
            return
        # The others may lie on machines that don't see the main one's disk.
        state = self.runtime.from_main(checkpoint.load(self.path) if self.runtime.is_main else None)
        if state is None:
            return
        if state["experiment"] != _digest(self.experiment) or state["objective"] != list(self.objective):
            raise TrainingError(
                f"{self.path}: this checkpoint is of another experiment; choose another folder, delete it, "
                "or start anew with resume off"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        if self.adaptive:
            self.adaptive.load_state_dict(state["adaptive"])
        self.stepper.load_state_dict(state["stepper"])
        self.pace.load_state_dict(state["pace"])
        self.step, self.best, self.waited = state["step"], state["best"], state["waited"]
        self.history, self.losses, self.stopped = list(state["history"]), tuple(state["losses"]), state["stopped"]
        self.earlier = state["seconds"]
        if self.pace.budget is not None and self.deadline is not None:
            left = self.deadline - self.started
            self.pace.budget = min(self.experiment.train.budget or math.inf, self.earlier + max(left, 1e-3))
        if self.runtime.is_main:
            set_rng(state["rng"])
        else:
            seed_everything(hash((self.experiment.seed, self.runtime.lane, self.step)) % 2**31)

    def _result(self) -> FitResult:
        return FitResult(
            best=dict(self.best["metrics"]),
            best_epoch=self.best["epoch"],
            history=tuple(self.history),
            epochs=self.epoch if self.step else 0,
            steps=self.step,
            seconds=self.elapsed,
            stopped=self.stopped or "finished",
            weights=self._weights() if self.best["weights"] is None else self.best["weights"],
            peak_memory_mb=memory.peak_mb(self.runtime.device),
            step_seconds=self.pace.step_seconds,
            micro_batch=min(
                self.stepper.micro_batch or self.experiment.train.batch_size, self.experiment.train.batch_size
            ),
        )


def _length(batches: Iterable[Any]) -> int:
    length = len(batches)  # type: ignore[arg-type]
    if length < 1:
        raise TrainingError(
            "the training loader has no batch: there are no training cases, or fewer than a batch holds"
        )
    return length


def _digest(experiment: Experiment) -> str:
    """Of what decides a run; where it runs, and in how many parts, does not."""
    parts = {"micro_batch", "checkpointing", "workers", "min_workers"}
    content = json.dumps(experiment.model_dump(mode="json", exclude={"device": True, "train": parts}), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
