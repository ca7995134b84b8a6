"""The search space: which fields of the Experiment vary, and over what.

    space:
      model.name:         {choice: [unet, segresnet, swin_unetr]}
      model.feature_size: {int: [12, 24], step: 4, when: {model.name: swin_unetr}}
      optim.lr:           {float: [1.0e-4, 1.0e-2], log: true}

``when`` names other parameters of the space with the value, or the list of values, under which this one exists.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from medray.errors import ConfigError

if TYPE_CHECKING:
    import optuna

_KINDS = ("choice", "float", "int")
_OPTIONS = {"choice": {"when"}, "float": {"log", "step", "when"}, "int": {"log", "step", "when"}}
_MANY_BRANCHES = 64  # of conditions, per parameter, that validate() walks


def _same(left: Any, right: Any) -> bool:
    """Equality that keeps True apart from 1 and takes a tuple for a list."""
    if isinstance(left, bool) != isinstance(right, bool):
        return False
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(left == right)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One varying field."""

    path: str
    kind: Literal["choice", "float", "int"]
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    when: Mapping[str, tuple[Any, ...]]

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that bound it: all choices, or both ends of the range."""
        if self.kind == "choice":
            return self.choices
        return (int(self.low), int(self.high)) if self.kind == "int" else (self.low, self.high)

    @property
    def size(self) -> float:
        """How many values it has; infinite for a range of floats."""
        if self.kind == "choice":
            return float(len(self.choices))
        if self.low == self.high:
            return 1.0
        if self.kind == "float" and self.step is None:
            return math.inf
        return math.floor((self.high - self.low) / (self.step or 1) + 1e-9) + 1.0

    def contains(self, value: Any) -> bool:
        """Whether the parameter may take ``value``."""
        if self.kind == "choice":
            return any(_same(value, choice) for choice in self.choices)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        if self.kind == "int" and value != int(value):
            return False
        if not self.low <= value <= self.high:
            return False
        if self.step is None:
            return True
        steps = (value - self.low) / self.step
        return abs(steps - round(steps)) < 1e-8 * max(1.0, abs(steps))

    def encode(self, value: Any) -> Any:
        """The value as Optuna stores it: a choice that is no plain scalar goes by its JSON text."""
        if self.kind == "choice":
            return self._labels()[next(i for i, choice in enumerate(self.choices) if _same(value, choice))]
        return int(value) if self.kind == "int" else float(value)

    def suggest(self, trial: optuna.Trial) -> Any:
        """Ask the sampler."""
        if self.kind == "choice":
            labels = self._labels()
            return self.choices[labels.index(trial.suggest_categorical(self.path, labels))]
        if self.kind == "int":
            return trial.suggest_int(self.path, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(self.path, self.low, self.high, step=self.step, log=self.log)

    def _labels(self) -> list[Any]:
        # Optuna looks a choice up by ==, for which True is 1 and 1 is 1.0: text keeps them apart.
        plain = all(isinstance(choice, str) for choice in self.choices) or all(
            isinstance(choice, int | float) and not isinstance(choice, bool) for choice in self.choices
        )
        return list(self.choices) if plain else [json.dumps(choice) for choice in self.choices]

    def describe(self) -> dict[str, Any]:
        """The parameter in the grammar of the YAML file."""
        rule: dict[str, Any] = {self.kind: list(self.ends)}
        rule |= {"log": True} if self.log else {}
        rule |= {"step": self.step} if self.step is not None else {}
        return rule | ({"when": {path: list(values) for path, values in self.when.items()}} if self.when else {})


class Space:
    """An ordered set of parameters; one on which others depend comes before them."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.parameters = {parameter.path: parameter for parameter in parameters}

    def __len__(self) -> int:
        return len(self.parameters)

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self.parameters.values())

    @classmethod
    def parse(cls, mapping: Mapping[str, Any]) -> Space:
        """Read the grammar.

        Raises:
            ConfigError: a rule that can't be read; names the path, what was found and what is allowed.
        """
        parameters = {path: _parse_parameter(str(path), rule) for path, rule in mapping.items()}
        for parameter in parameters.values():
            for parent, values in parameter.when.items():
                _check_condition(parameter, parent, values, parameters)
        graph = {path: list(parameter.when) for path, parameter in parameters.items()}
        try:
            order = list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            ring = " → ".join(error.args[1])
            raise ConfigError(
                f"space: 'when' goes round in a circle ({ring}); remove one of these conditions"
            ) from None
        return cls([parameters[path] for path in order])

    def describe(self) -> dict[str, dict[str, Any]]:
        """The space in its own grammar, JSON-able; two spaces are alike exactly if this is."""
        return {parameter.path: parameter.describe() for parameter in self}

    @property
    def numeric(self) -> tuple[Parameter, ...]:
        """Unconditional ranges: what CMA-ES can search."""
        return tuple(p for p in self if p.kind != "choice" and not p.when and p.low < p.high)

    @property
    def is_plain(self) -> bool:
        """Whether the space is nothing but unconditional ranges."""
        return len(self.numeric) == len(self)

    def variants(self, paths: Collection[str]) -> float:
        """How many combinations of some parameters' values there are at most, conditions left aside."""
        return math.prod(parameter.size for parameter in self if parameter.path in paths)

    def active(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of ``params`` that are parameters of the space whose conditions hold."""
        kept: dict[str, Any] = {}
        for parameter in self:
            if parameter.path in params and self._holds(parameter, kept):
                kept[parameter.path] = params[parameter.path]
        return kept

    def contains(self, params: Mapping[str, Any]) -> bool:
        """Whether the sampler could have drawn exactly ``params``."""
        if self.active(params).keys() != params.keys():
            return False
        return all(
            parameter.path in params and parameter.contains(params[parameter.path])
            for parameter in self
            if self._holds(parameter, params)
        )

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """Draw one value for each parameter whose conditions hold: path → value."""
        params: dict[str, Any] = {}
        for parameter in self:
            if self._holds(parameter, params):
                params[parameter.path] = parameter.suggest(trial)
        return params

    def encode(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """``params``, which the space contains, as Optuna stores them."""
        return {path: self.parameters[path].encode(value) for path, value in params.items()}

    def read(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """The values that an experiment, as a tree, has at the space's paths; None where it has no such field."""
        found: dict[str, Any] = {}
        for parameter in self:
            value: Any = tree
            for part in parameter.path.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            found[parameter.path] = value
        return found

    def validate(self, check: Callable[[dict[str, Any]], object]) -> None:
        """Try each choice and both ends of each range, under each condition that lets the parameter exist.

        Args:
            check: builds an Experiment from path → value on top of the default; raises where the schema refuses.

        Raises:
            ConfigError: names the parameter, the value and what the check said.
        """
        for parameter in self:
            for context in self._contexts(parameter):
                for value in parameter.ends:
                    try:
                        check({**context, parameter.path: value})
                    except Exception as error:
                        under = ", ".join(f"{path}={given!r}" for path, given in context.items())
                        raise ConfigError(
                            f"space.{parameter.path}: the value {value!r}{f' (with {under})' if under else ''} of "
                            f"{parameter.describe()} is refused: {error}"
                        ) from error

    def _holds(self, parameter: Parameter, params: Mapping[str, Any]) -> bool:
        return all(
            parent in params and any(_same(params[parent], value) for value in values)
            for parent, values in parameter.when.items()
        )

    def _contexts(self, parameter: Parameter) -> list[dict[str, Any]]:
        """Assignments of the parents (and theirs) under which the parameter exists; the first few of many."""
        contexts: list[dict[str, Any]] = []
        for values in product(*parameter.when.values()):
            chosen = dict(zip(parameter.when, values, strict=True))
            for outer in product(*(self._contexts(self.parameters[parent]) for parent in chosen)):
                merged = {path: value for context in outer for path, value in context.items()} | chosen
                if self.active(merged).keys() == merged.keys():
                    contexts.append(merged)
                if len(contexts) >= _MANY_BRANCHES:
                    return contexts
        return contexts


def _parse_parameter(path: str, rule: Any) -> Parameter:
    where = f"space.{path}"
    if not isinstance(rule, Mapping):
        raise ConfigError(
            f"{where}: {rule!r} is no rule; write {{choice: [a, b]}}, {{float: [low, high]}} or {{int: [low, high]}}"
        )
    kinds = [kind for kind in _KINDS if kind in rule]
    if len(kinds) != 1:
        found = ", ".join(map(str, rule)) or "nothing"
        raise ConfigError(f"{where}: needs exactly one of choice, float, int; found {found}{_nearest(rule, _KINDS)}")
    kind = kinds[0]
    unknown = [str(key) for key in rule if key != kind and key not in _OPTIONS[kind]]
    if unknown:
        allowed = ", ".join(sorted(_OPTIONS[kind]))
        raise ConfigError(
            f"{where}: unknown key {unknown[0]!r}{_nearest(unknown, _OPTIONS[kind])}; beside {kind} stand {allowed}"
        )
    when = _parse_when(where, rule.get("when"))
    values = rule[kind]
    if not isinstance(values, list | tuple):
        raise ConfigError(
            f"{where}.{kind}: {values!r} is no list; write {kind}: [{'a, b' if kind == 'choice' else 'low, high'}]"
        )
    if kind == "choice":
        return Parameter(path=path, kind="choice", choices=_parse_choices(where, values), when=when)
    return _parse_range(path, where, kind, values, rule, when)


def _parse_choices(where: str, values: Sequence[Any]) -> tuple[Any, ...]:
    if len(values) < 1:
        raise ConfigError(f"{where}.choice: the list is empty; name at least one value")
    for index, value in enumerate(values):
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ConfigError(
                f"{where}.choice: {value!r} can't be stored; use numbers, texts, true, false, null or lists"
            ) from None
        if any(_same(value, earlier) for earlier in values[:index]):
            raise ConfigError(f"{where}.choice: {value!r} stands twice; remove one")
    return tuple(values)


def _parse_range(
    path: str,
    where: str,
    kind: str,
    values: Sequence[Any],
    rule: Mapping[str, Any],
    when: Mapping[str, tuple[Any, ...]],
) -> Parameter:
    if len(values) != 2:
        raise ConfigError(f"{where}.{kind}: needs [low, high]; found {len(values)} values")
    low, high = (_number(f"{where}.{kind}", value, integer=kind == "int") for value in values)
    if not low < high:
        raise ConfigError(
            f"{where}.{kind}: low {low:g} must be below high {high:g}; a single value belongs in the experiment"
        )
    log = rule.get("log", False)
    if not isinstance(log, bool):
        raise ConfigError(f"{where}.log: {log!r} must be true or false")
    if log and low <= 0:
        raise ConfigError(f"{where}: a logarithmic range must begin above 0; low is {low:g}")
    step: float | None = None
    if rule.get("step") is not None:
        step = _number(f"{where}.step", rule["step"], integer=kind == "int")
        if log:
            raise ConfigError(f"{where}: log and step exclude each other; remove one")
        if not 0 < step <= high - low:
            raise ConfigError(f"{where}.step: {step:g} must be above 0 and at most high - low = {high - low:g}")
        # Optuna draws low, low + step, …: an end that is never drawn must not be validated or compared either.
        high = low + math.floor((high - low) / step + 1e-9) * step
    return Parameter(
        path=path, kind="int" if kind == "int" else "float", low=low, high=high, log=log, step=step, when=when
    )


def _number(where: str, value: Any, *, integer: bool) -> float:
    # YAML 1.1 reads 1e-4 (without a point) as text.
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        number = float(value)
    except ValueError:
        raise ConfigError(f"{where}: {value!r} is no number") from None
    if not math.isfinite(number):
        raise ConfigError(f"{where}: {value!r} must be finite")
    if integer and number != int(number):
        raise ConfigError(f"{where}: {value!r} must be a whole number; use float for others")
    return int(number) if integer else number


def _parse_when(where: str, when: Any) -> dict[str, tuple[Any, ...]]:
    if when is None:
        return {}
    if not isinstance(when, Mapping) or not when:
        raise ConfigError(f"{where}.when: {when!r} is no condition; write when: {{path: value}} or {{path: [values]}}")
    return {str(path): tuple(value) if isinstance(value, list | tuple) else (value,) for path, value in when.items()}


def _check_condition(
    parameter: Parameter, parent: str, values: tuple[Any, ...], parameters: Mapping[str, Parameter]
) -> None:
    where = f"space.{parameter.path}.when"
    if parent not in parameters:
        raise ConfigError(
            f"{where}: {parent!r} is not in the space{_nearest([parent], parameters)}; a condition must name another "
            f"parameter of the space"
        )
    for value in values or (None,):
        if not parameters[parent].contains(value):
            raise ConfigError(f"{where}: {parent} never is {value!r}; it varies over {parameters[parent].describe()}")


def _nearest(found: Any, allowed: Any) -> str:
    for key in found:
        close = difflib.get_close_matches(str(key), [str(name) for name in allowed], n=1, cutoff=0.6)
        if close:
            return f" (did you mean {close[0]!r}?)"
    return ""
