"""Every error is explained to whoever operates medray."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from medray import errors


def test_the_operations_guide_explains_every_error(repository: Path) -> None:
    text = (repository / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", text, re.MULTILINE))
    classes = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, Exception)}
    assert set(errors.__all__) == classes
    for name in classes:
        meaning, _, cure = rows.get(name, "").partition(" | ")
        assert meaning and cure, f"{name} has no meaning and cure in docs/operations.md"
