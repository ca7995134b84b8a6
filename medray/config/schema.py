"""The Experiment: everything that decides a training run, typed and validated; and the Study's own settings.

Every section is frozen, keyword-only and refuses unknown keys. Lengths are millimetres, times seconds, angles degrees,
fractions in 0..1. ``ndim`` below is the number of spatial axes, 2 (rows, columns) or 3 (x, y, z in RAS).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from medray.config.federation import FederationConfig
from medray.config.privacy import PrivacyConfig
from medray.config.section import Duration, Fraction, NonNegative, Positive, Section
from medray.config.selection import SelectConfig

HETEROSCEDASTIC = ("heteroscedastic", "dice_heteroscedastic")
"""Losses that need a log-variance beside each logit (``model.log_variance``)."""


class TaskConfig(Section):
    """What is to be learnt: a task of ``medray.tasks``. ``auto`` takes it from the data."""

    kind: str = Field("auto", min_length=1, max_length=64)


class SplitConfig(Section):
    """Grouped (by patient), stratified splits. A ``split`` column in the data wins over all of this."""

    folds: int = Field(5, ge=2, le=50)
    fold: int = Field(0, ge=0, description="the fold that validates")
    seed: int = Field(
        0, ge=0, lt=2**31, description="of the lot; apart from the experiment's, so that twins share cases"
    )
    test: Fraction = Field(0.15, description="share of patients held back for the last measurement; 0 for none")

    @model_validator(mode="after")
    def _fold_exists(self) -> SplitConfig:
        if self.fold >= self.folds:
            raise ValueError(f"split.fold={self.fold} must be below split.folds={self.folds}")
        return self


class PreprocessConfig(Section):
    """From an image as read to the array that the network sees; travels with the bundle."""

    spacing: tuple[Positive, ...] | None = Field(
        None, description="mm per axis to resample to; null keeps the image's own"
    )
    size: tuple[int, ...] | None = Field(None, description="exact shape to resize to (classification); null keeps")
    pad_multiple: int = Field(1, ge=1, description="pad each axis to a multiple of this")
    normalize: Literal["zscore", "ct", "range", "columns", "none"] = Field(
        "zscore",
        description="zscore: per image and channel; ct: clip to, and scale by, the data set's own percentiles, mean "
        "and std; range: a fixed low..high to -1..1; columns: a table's own mean and std, gaps become the mean",
    )
    columns: tuple[str, ...] | None = Field(
        None, description="of a table's rows: the columns that the channels are made from, such as age? or sex=F|M"
    )
    clip: tuple[tuple[float, float], ...] | None = Field(None, description="(low, high) per channel, before scaling")
    mean: tuple[float, ...] | None = Field(None, description="per channel (ct, columns)")
    std: tuple[Positive, ...] | None = Field(None, description="per channel (ct, columns)")
    crop_foreground: bool = Field(False, description="crop to the non-zero box before anything else")


class AugmentConfig(Section):
    """Random transforms of training samples. Each ``p_*`` is a probability; ``strength`` scales every range."""

    strength: Fraction = 1.0
    policy: Literal["each", "rand", "trivial"] = Field(
        "each",
        description="each: every transform by its own probability; rand: policy_count of those whose probability is "
        "above 0, drawn anew for each sample (RandAugment); trivial: one of them (TrivialAugment)",
    )
    policy_count: int = Field(2, ge=1, le=16, description="rand: transforms that a sample gets")
    p_policy: Fraction = Field(1.0, description="rand, trivial: share of the samples that get any")
    adaptive: bool = Field(
        False, description="strength follows the validation: down a tenth where it falls, up where it rises clearly"
    )
    rotate_deg: NonNegative = 15.0
    translate: Fraction = 0.10
    scale: tuple[Positive, Positive] = (0.9, 1.1)
    shear_deg: NonNegative = 5.0
    p_affine: Fraction = 0.5
    p_elastic: Fraction = 0.1
    flip_axes: tuple[int, ...] = Field((), description="spatial axes that may be mirrored")
    p_flip: Fraction = 0.5
    p_brightness: Fraction = 0.15
    p_contrast: Fraction = 0.15
    p_gamma: Fraction = 0.15
    p_noise: Fraction = 0.15
    p_blur: Fraction = 0.1
    p_bias_field: Fraction = 0.0
    p_low_resolution: Fraction = 0.1
    p_ghosting: Fraction = 0.0
    p_spike: Fraction = 0.0
    p_histogram_shift: Fraction = 0.0


class ElasticLevel(Section):
    """One level of an elastic network; null: the family's own."""

    width: float | None = Field(None, ge=0.25, le=2, description="times the level's own channels")
    blocks: int | None = Field(None, ge=1, le=4, description="inverted residuals")
    kernel: Literal[3, 5, 7] | None = Field(None, description="of the depth-wise convolutions")
    expansion: int | None = Field(None, ge=1, le=6, description="channels within a block over those around it")


class ElasticConfig(Section):
    """An elastic network's levels, the full resolution first; level5 stands for all further ones too."""

    level0: ElasticLevel = ElasticLevel()
    level1: ElasticLevel = ElasticLevel()
    level2: ElasticLevel = ElasticLevel()
    level3: ElasticLevel = ElasticLevel()
    level4: ElasticLevel = ElasticLevel()
    level5: ElasticLevel = ElasticLevel()


class ModelConfig(Section):
    """A network of the catalogue, which refuses the fields that a network does not have."""

    name: str = "unet"
    feature_size: int | None = Field(None, ge=4, le=512, description="width of the first level; null: the family's own")
    depth: int | None = Field(None, ge=2, le=8, description="resolution levels; null: the plan's or the family's own")
    dropout: Fraction = 0.0
    dropout_kind: Literal["standard", "spatial", "channel"] | None = Field(
        None,
        description="what dropout leaves out of a convolution's maps: single values, places (all channels of one), or "
        "whole channels; null: whole channels, the family's own",
    )
    drop_path: Fraction = Field(0.0, description="stochastic depth: share of residual branches left out, at the last")
    deep_supervision: bool = False
    log_variance: bool | None = Field(
        None, description="a second output for each logit while training, its log-variance; null: where the loss asks"
    )
    norm: Literal["own", "group"] = Field(
        "own", description="group: group normalisation wherever the network has batch normalisation (for privacy)"
    )
    pretrained: str | None = Field(None, description="a local .safetensors file, or 'hub' for the family's own weights")
    elastic: ElasticConfig = ElasticConfig()


class LossConfig(Section):
    """Losses over logits; which there are, the task says."""

    name: str = Field("dice_ce", min_length=1, max_length=64)
    class_weights: tuple[NonNegative, ...] | None = None
    label_smoothing: Fraction = Field(
        0.0, description="share of the target spread over all classes; not by Dice and Tversky"
    )
    samples: int = Field(8, ge=1, le=256, description="heteroscedastic: draws of the noisy logits")
    gamma: NonNegative = Field(2.0, description="focal")
    alpha: Fraction = Field(0.3, description="Tversky: weight of false positives")
    beta: Fraction = Field(0.7, description="Tversky: weight of false negatives")
    batch_dice: bool = Field(True, description="Dice over the batch rather than per sample")


class OptimConfig(Section):
    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0, le=10)
    weight_decay: NonNegative = 1e-2
    momentum: Fraction = Field(0.9, description="SGD (Nesterov)")
    clip_norm: NonNegative = Field(12.0, description="largest gradient norm; 0 for no limit")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="an encoder's block learns at this share of the next one's rate; 1: all alike"
    )
    sam_rho: float = Field(
        0.0, ge=0, le=10, description="sharpness-aware: gradient taken this far uphill, twice the work; 0 for none"
    )


class ScheduleConfig(Section):
    name: Literal["cosine", "poly", "plateau", "cyclic", "warm_restarts", "constant"] = "cosine"
    warmup: Fraction = Field(0.03, description="share of all steps that ramp up linearly")
    min_factor: Fraction = Field(0.01, description="the last learning rate over the first")
    cycles: int = Field(3, ge=1, description="cyclic, warm_restarts")
    patience: int = Field(5, ge=1, description="plateau: validations without gain before a cut by half")


def planned_batch(train: Any) -> Any:
    """A tree of the train section without ``batch_size: auto``: whose number is then the plan's, or the schema's."""
    if not isinstance(train, Mapping) or train.get("batch_size") != "auto":
        return train
    rest = {key: value for key, value in train.items() if key != "batch_size"}
    return {"micro_batch": "auto"} | rest


class TrainConfig(Section):
    epochs: int = Field(100, ge=1, le=100_000, description="passes over the training cases, at most")
    budget: Duration | None = Field(
        None,
        description="seconds of training, validation included; the step count that fits is measured in the first steps "
        "ends the schedule when the time does, or after train.epochs where those take less",
    )
    batch_size: int = Field(
        8,
        ge=1,
        le=8192,
        description="samples an optimiser step sees; auto: the plan's number, and train.micro_batch=auto",
    )
    micro_batch: int | Literal["auto"] | None = Field(
        None,
        description="samples at once in memory, the rest is accumulated; auto: as many as fit, measured before the "
        "first step; null: all of the batch, halved where memory runs out",
    )
    checkpointing: int | Literal["off", "auto"] = Field(
        "off",
        description="run parts of the network again in the backward pass instead of keeping what they computed: off, "
        "auto (about half of what is kept, for some 30 % longer steps at most), or into how many segments to cut it",
    )
    patch_size: tuple[int, ...] | None = Field(None, description="null: the whole (prepared) image")
    samples_per_case: int = Field(1, ge=1, description="patches of one case in one epoch")
    foreground: Fraction = Field(0.33, description="share of patches centred on foreground")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    ema: float = Field(0.0, ge=0.0, lt=1.0, description="decay of the weights' moving average; 0 for none")
    freeze_epochs: int = Field(
        0, ge=0, le=100_000, description="epochs in which the pretrained encoder stays as it is, running statistics too"
    )
    patience: int | None = Field(None, ge=1, description="validations without gain before an early stop")
    validate_every: int | None = Field(None, ge=1, description="epochs between validations; null: about 12 in a run")
    balanced: bool = Field(False, description="draw classes equally often (classification)")
    mixup: NonNegative = Field(0.0, description="alpha of the Beta distribution; 0 for none (classification)")
    cutmix: NonNegative = Field(0.0, description="likewise; with mixup too, each batch gets one of them by lot")
    deterministic: bool = False
    loader_workers: int | None = Field(
        None,
        ge=0,
        le=256,
        description="threads (CPU) or processes (GPU) that make batches ahead of the training; null: as many as pay, "
        "by the measured wait",
    )
    workers: int = Field(1, ge=1, le=1024, description="processes that train together; each takes a part of a batch")
    min_workers: int | None = Field(
        None, ge=1, description="with how many to go on where a machine is gone for good; null: with all of them only"
    )
    sync_batchnorm: bool | None = Field(
        None,
        description="batch-norm over the whole batch of several processes; null: where each has fewer than 16 of it",
    )

    @model_validator(mode="before")
    @classmethod
    def _batch_size_auto(cls, value: Any) -> Any:
        return planned_batch(value)

    @field_validator("micro_batch", mode="before")
    @classmethod
    def _micro_batch(cls, value: object) -> object:
        if value in (None, "auto") or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise ValueError(f"train.micro_batch={value!r} must be auto, null, or a number of samples of at least 1")

    @field_validator("checkpointing", mode="before")
    @classmethod
    def _checkpointing(cls, value: object) -> object:
        if value is False:  # YAML's reading of a bare off
            return "off"
        if value in ("off", "auto") or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise ValueError(f"train.checkpointing={value!r} must be off, auto, or a number of segments of at least 1")

    @model_validator(mode="after")
    def _enough_samples(self) -> TrainConfig:
        if self.workers > self.batch_size:
            raise ValueError(
                f"train.workers={self.workers} must be at most train.batch_size={self.batch_size}: each needs a sample"
            )
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"train.min_workers={self.min_workers} must be at most train.workers={self.workers}")
        return self


class InferenceConfig(Section):
    overlap: float = Field(0.5, ge=0.0, lt=1.0, description="of sliding windows")
    tta: bool = Field(False, description="average over mirror images along augment.flip_axes")
    keep_largest: bool = Field(False, description="keep each class's largest connected component")


class Experiment(Section):
    """Everything that decides a training run."""

    data: str = "phantom://ct-lesions"
    seed: int = Field(0, ge=0, lt=2**31)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    task: TaskConfig = TaskConfig()
    split: SplitConfig = SplitConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    inference: InferenceConfig = InferenceConfig()
    federation: FederationConfig = FederationConfig()
    privacy: PrivacyConfig = PrivacyConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Experiment:
        uncertain = self.loss.name in HETEROSCEDASTIC
        if uncertain and self.model.log_variance is None:
            # Written into the model's own section, since a bundle builds the network from that alone.
            object.__setattr__(self, "model", self.model.model_copy(update={"log_variance": True}))
        elif bool(self.model.log_variance) != uncertain:
            raise ValueError(
                f"model.log_variance={str(self.model.log_variance).lower()} does not go with loss.name="
                f"{self.loss.name}: {' and '.join(HETEROSCEDASTIC)} need it, the others have no use for it. "
                "Leave model.log_variance out"
            )
        if self.privacy.on and self.federation.privacy.on:
            raise ValueError(
                "privacy.epsilon (noise at the sites, for each patient) and federation.privacy.epsilon (noise at the "
                "server, for a whole site) are two ways, and no epsilon is known here for both. Choose one"
            )
        if self.train.freeze_epochs and self.model.pretrained is None:
            raise ValueError(
                f"train.freeze_epochs={self.train.freeze_epochs} needs model.pretrained: an encoder that is held at "
                "random weights learns nothing"
            )
        return self


class NasConfig(Section):
    """A phase before the trials that searches for a network; trials choose it as ``model.name``: ``searched``."""

    strategy: str | None = Field(None, description="darts or enas; null: no architecture search")
    share: float = Field(0.3, gt=0, lt=1, description="of the study's budget, for this phase")
    steps: int | None = Field(None, ge=1, description="of the search, at most; null: as many as fit into the share")
    nodes: int = Field(3, ge=1, le=6, description="of a cell")
    feature_size: int = Field(8, ge=2, le=128, description="channels of a node of the super-network's first level")
    batch_size: int = Field(16, ge=2, le=1024, description="of the search, at most the trials' own")
    architecture_lr: float = Field(1e-2, gt=0, le=1, description="of the architecture's parameters (Adam)")
    order: Literal["first", "second"] = Field("first", description="darts: the second looks one step of weights ahead")
    auxiliary_skip: bool = Field(True, description="darts: a fading skip on every edge, against collapse (DARTS-)")
    most_skips: int = Field(2, ge=0, description="darts: skip connections that a cell keeps, at most")
    entropy: NonNegative = Field(1e-3, description="enas: weight of the controller's entropy, against early certainty")
    baseline: Fraction = Field(0.9, description="enas: decay of the moving average that rewards are compared with")
    keep: int = Field(1, ge=1, le=16, description="enas: genotypes that trials may choose among")


class StudyConfig(Section):
    """How a search is run. Wall-clock times in seconds (or 20min, 1h)."""

    name: str = Field("study", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    budget: Duration = Field(1200.0, description="wall clock for all of it: search, final fit, report")
    trials: int = Field(20, ge=1, le=100_000)
    objectives: dict[str, Literal["max", "min"]] = Field(
        default_factory=dict, description="empty: the task's own metric"
    )
    sampler: Literal["auto", "tpe", "random", "cmaes", "nsga2"] = "auto"
    pruner: Literal["curve", "asha", "median", "none"] = Field(
        "curve",
        description="who is stopped early: curve, who at its pace would end behind what another has reached; asha, all "
        "but the best third at a ninth and a third of the schedule; median, the worse half",
    )
    search_share: Fraction = Field(0.3, description="share of the budget for the search; the rest fits the champion")
    concurrency: int | None = Field(None, ge=1, description="trials at once; null: what the machine has")
    workers_per_trial: int = Field(1, ge=1, le=1024, description="processes that train each trial together")
    seed: int = Field(0, ge=0, lt=2**31)
    ensemble: bool = Field(True, description="let an ensemble win where it is better on validation")
    select: SelectConfig = SelectConfig()
    nas: NasConfig = NasConfig()
    warm_start: bool = Field(
        True, description="try what won on the nearest data sets, of earlier runs and a shipped list, after trial 0"
    )
