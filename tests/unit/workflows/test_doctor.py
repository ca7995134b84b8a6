"""doctor: what is missing, what doesn't fit, what is broken, and the command that puts it right."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from medray.workflows import doctor


@pytest.fixture
def requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [
        "torch>=2",
        "numpy>=99",
        "pillow",
        "nosuchlibrary>=1,<2",
        "nosuchengine==11; extra == 'tensorrt'",
        "nosuchtool; extra == 'dev'",
        "nosuchold; python_version < '3'",
    ]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)


@pytest.mark.usefixtures("requirements")
def test_libraries_are_judged_by_what_medray_asks_for() -> None:
    found = {item.name: item for item in doctor._libraries({"torch": "does not import: undefined symbol"})}
    assert set(found) == {"torch", "numpy", "nosuchlibrary", "nosuchengine"}  # fine and unremarkable: no line
    assert found["torch"].problem == "does not import: undefined symbol" and found["torch"].needed
    assert found["numpy"].problem == "medray wants >=99" and "'numpy>=99'" in found["numpy"].install
    missing = found["nosuchlibrary"]
    assert missing.version is None and missing.problem == "not installed" and missing.install.endswith("<2,>=1'")
    assert not found["nosuchengine"].needed and found["nosuchengine"].install.endswith("'medray[tensorrt]'")


def test_a_module_that_breaks_is_told_from_one_that_works() -> None:
    assert doctor._broken("json") == ""
    assert "No module named 'nosuchmodule'" in doctor._broken("nosuchmodule")


def test_a_module_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*arguments: Any, **keywords: Any) -> Any:
        raise subprocess.TimeoutExpired("python", 120)

    monkeypatch.setattr(doctor.subprocess, "run", hang)
    assert "timed out" in doctor._broken("json")


def test_facts_of_this_machine() -> None:
    facts = {fact.name: fact.value for fact in doctor._facts({"torch": "broken"})}
    assert {"medray", "CPU", "CPU bf16", "CPU int8", "memory", "disk here"} <= set(facts)
    assert "cores for us" in facts["CPU"] and "GPU" not in facts  # a torch that is broken is not asked
