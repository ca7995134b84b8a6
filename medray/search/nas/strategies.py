"""The strategies by name. A new one is a file with a :class:`~medray.search.nas.strategy.Strategy`, and a line here."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from medray.errors import ConfigError
from medray.search.nas.darts import Darts
from medray.search.nas.enas import Enas
from medray.search.nas.strategy import Problem, Strategy

STRATEGIES: dict[str, Callable[[Problem], Strategy]] = {"darts": Darts, "enas": Enas}


def strategy(name: str) -> Callable[[Problem], Strategy]:
    """The strategy of that name.

    Raises:
        ConfigError: there is none; the message has all of them.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    near = difflib.get_close_matches(name, STRATEGIES, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"study.nas.strategy={name!r} is unknown. {hint}There are: {', '.join(STRATEGIES)}")
