"""What a history of noisy steps costs, and how much noise a target needs: Opacus' accountants with explicit rates.

A mechanism is (sigma, q, steps): Gaussian noise of sigma times the sensitivity on a Poisson sample in which each unit
(a patient or a record) lies with probability q, ``steps`` times. Neighbours differ by one unit added or removed.
All composes: the epsilon of a history is that of everything in it, at one delta.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from medray.config.privacy import PrivacyConfig
from medray.errors import PrivacyError

__all__ = ["History", "Mechanism", "PrivacyPlan", "Spent", "epsilon", "merged", "noise_multiplier", "plan_privacy"]

Accountant = Literal["prv", "rdp"]
Mechanism = tuple[float, float, int]
"""sigma (noise multiplier), q (sample rate, 0 to 1), steps."""
History = Sequence[Mechanism]

TOLERANCE = 3e-3
"""Share of a target epsilon that may be left unused."""
LARGEST_SIGMA, SMALLEST_SIGMA = 1e5, 1e-2
RDP_ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(12, 64), 72, 96, 128, 192, 256, 512)


@dataclass(frozen=True)
class Spent:
    """An (epsilon, delta) that holds for a history, and the accountant that says so.

    Attributes:
        epsilon: an upper bound; 0 for an empty history.
        accountant: ``prv``, or ``rdp`` where it was asked for or prv failed.
    """

    epsilon: float
    delta: float
    accountant: Accountant


def epsilon(history: History, delta: float, *, accountant: Accountant = "prv") -> Spent:
    """Compose a history.

    PRV (Gopi et al. 2021, arXiv:2106.02848) gives an upper bound within .01 or 1 % of it, whichever is less; where it
    fails numerically, or RDP (Mironov et al. 2019, arXiv:1908.10530) says less, RDP is taken.

    Args:
        history: mechanisms; equal ones are merged.
        delta: of the answer.
        accountant: which to try first.

    Raises:
        PrivacyError: a sigma, rate, number of steps or delta that is out of range.
    """
    if not 0 < delta < 1:
        raise PrivacyError(f"delta={delta} must lie between 0 and 1; take less than one over the number of patients")
    rows = merged(history)
    if not rows:
        return Spent(0.0, delta, accountant)
    by_rdp = _rdp(rows, delta)
    if accountant == "prv":
        by_prv = _prv(rows, delta, by_rdp)
        if by_prv is not None and by_prv <= by_rdp:
            return Spent(by_prv, delta, "prv")
    return Spent(by_rdp, delta, "rdp")


def merged(history: Iterable[Mechanism]) -> list[Mechanism]:
    """The same history, checked, with equal mechanisms as one, sorted: the order of steps costs nothing.

    Raises:
        PrivacyError: a value that is out of range.
    """
    steps: dict[tuple[float, float], int] = {}
    for sigma, rate, count in history:
        if not (math.isfinite(sigma) and sigma > 0 and 0 < rate <= 1 and count >= 0 and int(count) == count):
            raise PrivacyError(
                f"the mechanism (sigma={sigma}, rate={rate}, steps={count}) is none: sigma must be finite and above 0, "
                "the rate in 0..1 and above 0, the steps a whole number of at least 0"
            )
        steps[float(sigma), float(rate)] = steps.get((float(sigma), float(rate)), 0) + int(count)
    return sorted((sigma, rate, count) for (sigma, rate), count in steps.items() if count)


def noise_multiplier(
    target: float,
    delta: float,
    *,
    rate: float,
    steps: int,
    spent: History = (),
    accountant: Accountant = "prv",
) -> float:
    """The least sigma with which ``steps`` more steps at ``rate`` keep the whole within ``target``.

    Args:
        target: epsilon of ``spent`` and the new steps together.
        spent: what has to fit in beside them.

    Raises:
        PrivacyError: what was spent alone exceeds the target, or no noise is large enough.
    """
    before = epsilon(spent, delta, accountant=accountant).epsilon
    if before >= target:
        raise PrivacyError(
            f"epsilon={target:g} at delta={delta:g} leaves nothing for training: {before:.4g} is spent beside it. "
            "Raise privacy.epsilon, or release less"
        )

    def cost(sigma: float, by: Accountant) -> float:
        return epsilon([*spent, (sigma, rate, steps)], delta, accountant=by).epsilon

    high = _bisect(lambda sigma: cost(sigma, "rdp") <= target)
    if high is None:
        raise PrivacyError(
            f"no noise is large enough for {steps} steps at rate {rate:.3g} within epsilon={target:g} at "
            f"delta={delta:g} beside {before:.4g} spent already. Raise privacy.epsilon, or train fewer epochs"
        )
    return high if accountant == "rdp" else _tighten(lambda sigma: cost(sigma, accountant), target, high)


def _bisect(holds: Callable[[float], bool]) -> float | None:
    """The least sigma that holds, to a thousandth from above; None where none up to LARGEST_SIGMA does."""
    low, high = 0.0, 1.0
    while not holds(high):
        low, high = high, 2 * high
        if high > LARGEST_SIGMA:
            return None
    while high - low > 1e-3 * high and high > SMALLEST_SIGMA:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _tighten(cost: Callable[[float], float], target: float, high: float) -> float:
    """From a sigma that holds down to the least, in a few evaluations: PRV's take a second each.

    Epsilon over sigma is near a power law, so that the next guess is drawn on a log-log line; ``high`` always holds.
    """
    at_high = cost(high)
    low, at_low = high, at_high
    while at_low <= target and low > SMALLEST_SIGMA:
        high, at_high = low, at_low
        if target - at_high <= TOLERANCE * target:
            return high
        low = 0.9 * high
        at_low = cost(low)
    for _ in range(8):
        if target - at_high <= TOLERANCE * target or high - low <= 1e-4 * high:
            break
        slope = math.log(at_low / at_high) / math.log(low / high)
        guess = high * (0.9985 * target / at_high) ** (1 / slope) if slope < 0 else (low + high) / 2
        guess = min(max(guess, low + 0.02 * (high - low)), high - 0.02 * (high - low))
        found = cost(guess)
        low, at_low, high, at_high = (low, at_low, guess, found) if found <= target else (guess, found, high, at_high)
    return high


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """How a run will be private, laid out before its first step.

    Attributes:
        noise_multiplier: sigma of each step, over clip_norm.
        sample_rate: probability with which each unit lies in a step's batch.
        steps: of the whole run, all rounds of a federation counted.
        released: mechanisms beside the steps (figures that are released with noise).
        units: patients or records on the training side.
        epsilon, delta, accountant: what all of it costs.
        unit: what is protected.
        clip_norm: largest norm of a unit's share of a step's gradient.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    released: tuple[Mechanism, ...] = ()
    units: int
    epsilon: float
    delta: float
    accountant: Accountant
    unit: Literal["record", "patient"]
    clip_norm: float

    @property
    def expected_batch(self) -> float:
        """Mean size of a batch; a step's gradient is divided by it, whatever the lot brought."""
        return self.sample_rate * self.units

    @property
    def history(self) -> list[Mechanism]:
        """All that the run will do."""
        return self.after(self.steps)

    def after(self, steps: int) -> list[Mechanism]:
        """All that the run has done after ``steps`` steps; what is released counts whether it was or not."""
        return [*self.released, (self.noise_multiplier, self.sample_rate, steps)]

    def spent(self, steps: int) -> Spent:
        """Epsilon after ``steps`` steps."""
        return epsilon(self.after(steps), self.delta, accountant=self.accountant)


def plan_privacy(
    config: PrivacyConfig, *, units: int, batch_size: int, steps: int, released: History = ()
) -> PrivacyPlan:
    """Fix noise and sample rate for a whole run.

    Args:
        config: with an ``epsilon``.
        units: patients or records on the training side, as ``config.unit`` says.
        batch_size: mean number of them in a step.
        steps: of the whole run.
        released: what else will be released within the same epsilon.

    Raises:
        PrivacyError: a batch larger than the data, a delta too large for them, or a target that can't be held.
    """
    if config.epsilon is None:
        raise PrivacyError("privacy.epsilon is null, so there is nothing to plan; set a target")
    if steps < 1 or units < 1:
        raise PrivacyError(f"{steps} steps over {units} {config.unit}s: there must be at least one of each")
    if config.delta >= 1 / units:
        raise PrivacyError(
            f"privacy.delta={config.delta:g} must be below one over the {units} {config.unit}s that train: above it, "
            f"giving one of them away whole would count as private. Take {0.1 / units:.0e}"
        )
    rate = batch_size / units
    if rate > 1:
        raise PrivacyError(
            f"train.batch_size={batch_size} exceeds the {units} {config.unit}s that train; take at most {units}"
        )
    sigma = config.noise_multiplier
    if sigma is None:
        sigma = noise_multiplier(
            config.epsilon, config.delta, rate=rate, steps=steps, spent=released, accountant=config.accountant
        )
    found = epsilon([*released, (sigma, rate, steps)], config.delta, accountant=config.accountant)
    if found.epsilon > config.epsilon:
        raise PrivacyError(
            f"privacy.noise_multiplier={sigma:g} spends epsilon={found.epsilon:.4g} over {steps} steps, above "
            f"privacy.epsilon={config.epsilon:g}. Leave it out, and the least noise that holds is found"
        )
    return PrivacyPlan(
        noise_multiplier=sigma,
        sample_rate=rate,
        steps=steps,
        released=tuple(released),
        units=units,
        epsilon=found.epsilon,
        delta=config.delta,
        accountant=found.accountant,
        unit=config.unit,
        clip_norm=config.clip_norm,
    )


def _rdp(rows: History, delta: float) -> float:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = list(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best order lies at the end of the range: still a bound
        value = float(accountant.get_epsilon(delta, alphas=list(RDP_ORDERS)))
    return max(0.0, value) if not math.isnan(value) else math.inf


def _prv(rows: History, delta: float, by_rdp: float) -> float | None:
    """The upper bound by PRV; None where it fails (its domain or its search for epsilon breaks down)."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = list(rows)
    error = min(0.01, max(1e-4, 0.004 * by_rdp))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = float(accountant.get_epsilon(delta, eps_error=error))
    except (ValueError, RuntimeError, FloatingPointError, OverflowError, MemoryError, IndexError):
        return None
    return value if math.isfinite(value) and value >= 0 else None
