"""What all sections of the configuration are made of: their base, and numbers with a unit."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = ["Duration", "Fraction", "NonNegative", "Positive", "Section", "seconds"]

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Section(BaseModel):
    """Base of all configuration sections: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


def seconds(value: Any) -> Any:
    """``90``, ``"90s"``, ``"20min"``, ``"1.5h"``, ``"2d"`` to seconds; anything else is left for pydantic to refuse."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    units = {"seconds": 1, "second": 1, "sec": 1, "s": 1, "minutes": 60, "minute": 60, "min": 60, "m": 60}
    units |= {"hours": 3600, "hour": 3600, "h": 3600, "days": 86400, "day": 86400, "d": 86400}
    for unit in sorted(units, key=len, reverse=True):
        if text.endswith(unit):
            try:
                return float(text[: -len(unit)].strip()) * units[unit]
            except ValueError:
                break
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"{value!r} is no duration; write seconds or a number with s, min, h or d, such as 20min"
        ) from None


Duration = Annotated[float, BeforeValidator(seconds), Field(gt=0, allow_inf_nan=False)]
