"""The YAML reader: no surprises of YAML 1.1, and nothing that harms."""

from __future__ import annotations

from pathlib import Path

import pytest

from medray.config.yamlfile import MAX_BYTES, parse_yaml, read_yaml
from medray.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("-2E3", -2000.0),
        (".5", 0.5),
        ("10", 10),
        ("010", 10),
        ("no", "no"),
        ("off", "off"),
        ("true", True),
        ("1:30", "1:30"),
        ("2026-01-02", "2026-01-02"),
        ("1_000", "1_000"),
        ("~", None),
        ("3min", "3min"),
        ("e5", "e5"),
        ("'1e-4'", "1e-4"),
    ],
)
def test_scalars_are_yaml_1_2(text: str, value: object) -> None:
    read = parse_yaml(text, "test")
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' stands here twice"),
        ("a: {x: 1, x: 2}", "the key 'x' stands here twice"),
        ("a: &a [1, 1]\nb: [*a, *a]", "aliases"),
        ("1: x", "the key 1 is no text"),
        ("a: [1, 2", "line"),
        ("a: !!python/object/apply:os.system [echo]", "could not determine a constructor"),
        ("a: !!int x", "no YAML"),
        ("[" * 5000, "nested too deeply"),
        ("- 1\n- 2", "a configuration is a mapping"),
        ("just text", "a configuration is a mapping"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is no file"):
        read_yaml(tmp_path)
    (tmp_path / "big.yaml").write_bytes(b"a: " + b"x" * MAX_BYTES)
    with pytest.raises(ConfigError, match="at most 1,000,000"):
        read_yaml(tmp_path / "big.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match="no UTF-8 text"):
        read_yaml(tmp_path / "binary.yaml")
    (tmp_path / "empty.yaml").write_bytes(b"\xef\xbb\xbf")
    assert read_yaml(tmp_path / "empty.yaml") == {}
