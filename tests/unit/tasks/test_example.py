"""docs/new-task.md shows the file that is there: its code, its fields and its methods."""

from __future__ import annotations

import re
from pathlib import Path

from medray.tasks import catalogue, ordinal

PAGE = (Path(__file__).parents[3] / "docs/new-task.md").read_text(encoding="utf-8")
ANNOTATIONS = r": ClassVar\[[^=]*\](?= =)|: Tensor|: dict\[str, Task\]|-> Tensor"


def bare(code: str) -> str:
    """Without comments behind the code, annotations, spaces and trailing commas: the page leaves these out."""
    code = re.sub(ANNOTATIONS, "", re.sub(r"  #.*", "", code))
    return re.sub(r"\s+", "", code).replace(",)}", ")}")


def test_every_line_of_code_shown_is_a_line_of_the_file() -> None:
    source = "".join(bare(Path(module.__file__).read_text(encoding="utf-8")) for module in (ordinal, catalogue))
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) > 12
    for line in lines:
        parts = re.split(r",?\.\.\.[})]*", bare(line))  # what is left out within a line
        assert all(part in source for part in parts), line


def test_the_table_has_what_is_overridden_and_nothing_else() -> None:
    rows = re.findall(r"^\| `(.+?)`(?:, `(.+?)`)?.*? \|", PAGE, re.MULTILINE)
    named = {part.partition("(")[0] for row in rows for part in row if part}
    methods = {name for name, value in vars(ordinal.Ordinal).items() if callable(value) and not name.startswith("_")}
    assert named == methods and len(named) > 8
