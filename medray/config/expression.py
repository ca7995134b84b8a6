"""Arithmetic over named figures, as a user writes it: ``0.7 * accuracy + 0.3 / latency_ms``. Nothing is ever executed.

The text is parsed into Python's syntax tree, and the tree is walked: numbers, names, ``+ - * / **``, brackets, and a
few functions of numbers. Anything else is refused by name.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Formula"]

_LONGEST, _MOST_PARTS = 500, 200
_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: math.pow,
}
_FUNCTIONS: dict[str, Callable[..., float]] = {
    "log": math.log,
    "sqrt": math.sqrt,
    "exp": math.exp,
    "abs": abs,
    "min": min,
    "max": max,
}
_SEVERAL = ("min", "max")


@dataclass(frozen=True)
class Formula:
    """A checked expression.

    Attributes:
        text: as written.
        names: of the figures that it needs, in their order.
    """

    text: str
    names: tuple[str, ...]
    _tree: ast.expr

    @classmethod
    def parse(cls, text: str) -> Formula:
        """Check an expression.

        Raises:
            ValueError: it can't be read, is too long, or holds anything but arithmetic.
        """
        if len(text) > _LONGEST:
            raise ValueError(f"the expression has {len(text)} characters; at most {_LONGEST} are read")
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ValueError(
                f"{text!r} is no expression; write one such as 0.7 * accuracy + 0.3 / latency_ms"
            ) from None
        if sum(1 for _ in ast.walk(tree)) > _MOST_PARTS:
            raise ValueError(f"the expression has more than {_MOST_PARTS} parts; write a shorter one")
        names: dict[str, None] = {}
        _check(tree, names)
        if not names:
            raise ValueError(f"{text!r} names no figure, so it would not tell models apart")
        return cls(text, tuple(names), tree)

    def value(self, figures: Mapping[str, float]) -> float:
        """What it comes to; NaN where a figure is missing or the arithmetic has no finite answer."""
        if any(name not in figures for name in self.names):
            return math.nan
        try:
            found = _value(self._tree, figures)
        except (ArithmeticError, ValueError):  # a division by zero, an overflow, the logarithm of nothing
            return math.nan
        return found if math.isfinite(found) else math.nan


def _check(node: ast.expr, names: dict[str, None]) -> None:
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool) or not isinstance(node.value, int | float):
            raise ValueError(f"{ast.unparse(node)} is no number; an expression holds numbers, figures and + - * / **")
    elif isinstance(node, ast.Name):
        if node.id in _FUNCTIONS:
            raise ValueError(f"{node.id} is a function; write {node.id}(…)")
        names[node.id] = None
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        _check(node.operand, names)
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        _check(node.left, names)
        _check(node.right, names)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        several = node.func.id in _SEVERAL
        if node.keywords or (len(node.args) < 2 if several else len(node.args) != 1):
            raise ValueError(f"{node.func.id} takes {'two figures or more' if several else 'one figure'}")
        for argument in node.args:
            _check(argument, names)
    else:
        raise ValueError(
            f"{ast.unparse(node)!r} is not allowed; an expression holds numbers, figures, + - * / **, brackets and "
            f"{', '.join(_FUNCTIONS)}"
        )


def _value(node: ast.expr, figures: Mapping[str, float]) -> float:
    if isinstance(node, ast.Constant):
        return float(node.value)  # type: ignore[arg-type]  # checked: a number
    if isinstance(node, ast.Name):
        return float(figures[node.id])
    if isinstance(node, ast.UnaryOp):
        inner = _value(node.operand, figures)
        return -inner if isinstance(node.op, ast.USub) else inner
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left, figures), _value(node.right, figures))
    assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    return float(_FUNCTIONS[node.func.id](*(_value(argument, figures) for argument in node.args)))
