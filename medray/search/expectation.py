"""What a search may still bring."""

from __future__ import annotations

import math
from collections.abc import Sequence

from medray.search.trial import Direction


def expected_gain(values: Sequence[float], direction: Direction) -> float | None:
    """What one more trial is expected to add to the best value: expected improvement under a normal fit to the values.

    The closed form of Jones et al. (Efficient global optimization, 1998). None from fewer than four values.
    """
    if len(values) < 4:
        return None
    sign = 1.0 if direction == "max" else -1.0
    signed = [sign * value for value in values]
    mean = sum(signed) / len(signed)
    std = math.sqrt(sum((v - mean) ** 2 for v in signed) / (len(signed) - 1))
    if std == 0.0:
        return 0.0
    z = (mean - max(signed)) / std
    density = math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return std * (z * 0.5 * (1 + math.erf(z / math.sqrt(2))) + density)
