"""What a stage writes for the next one: a typed JSON file, whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ValidationError

from medray.errors import DataError


class Document(BaseModel):
    """Base of what lies in a JSON file of its own.

    Attributes:
        made_by: the command that writes it, for errors.
    """

    made_by: ClassVar[str] = "medray check DATA"

    def save(self, path: Path) -> None:
        """Write it (UTF-8, atomically)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        partial.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read it.

        Raises:
            DataError: it is missing, no JSON, or doesn't follow the schema.
        """
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}. Write one with: {cls.made_by}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DataError(f"{path}: {where}: {first['msg']}. Write it anew with: {cls.made_by}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: no JSON ({error}). Write it anew with: {cls.made_by}") from None
