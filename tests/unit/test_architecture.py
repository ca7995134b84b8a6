"""The house rules of the design, held by an AST walk over every import, also those inside functions.

1. Imports go down only, packages on one step do not import each other, and there are no cycles.
2. One vendor, one door.
3. The six lower packages import with the small set of libraries alone.
4. ``medray/`` imports nothing of what stands around it.
5. Vendors are imported inside the verb that needs them.
6. No file over 600 lines; nothing of one machine, and no registry, in a tracked file.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "medray"

STEPS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("tracking", "logs", "config"),
    ("learn",),
    ("tasks",),
    ("data", "models"),
    ("plan",),
    ("predict", "train"),
    ("bundle",),
    ("report", "search", "compress", "explain", "privacy"),
    ("engines",),
    ("workflows",),
    ("cli", "ui"),
    ("__main__",),
)
STEP = {name: step for step, names in enumerate(STEPS) for name in names}

TORCH_VISION_DOORS = ("medray.data", "medray.models", "medray.learn", "medray.predict")
DOORS: dict[str, tuple[str, ...]] = {
    "ray": ("medray.engines.ray",),
    "flwr": ("medray.engines.flower",),
    "optuna": ("medray.search",),
    "opacus": ("medray.privacy",),
    "torch_pruning": ("medray.compress",),
    "pytorch_grad_cam": ("medray.explain",),
    "fastapi": ("medray.engines.ray.serve",),
    "starlette": ("medray.engines.ray.serve",),
    "grpc": ("medray.engines.ray.serve",),
    "prometheus_client": ("medray.engines.ray.serve",),
    "hydra": ("medray.config",),
    "omegaconf": ("medray.config",),
    "openvino": ("medray.predict",),
    "tensorrt": ("medray.predict",),
    "onnxruntime": ("medray.predict", "medray.compress"),
    "pyarrow.fs": ("medray.workflows.storage",),
    "mlflow": ("medray.tracking",),
    "tensorboard": ("medray.tracking",),
    "torch.utils.tensorboard": ("medray.tracking",),
    "structlog": ("medray.logs",),
    "typer": ("medray.cli",),
    "rich": ("medray.cli",),
    "monai": TORCH_VISION_DOORS,
    "timm": TORCH_VISION_DOORS,
    "torchvision": TORCH_VISION_DOORS,
    "torchmetrics": TORCH_VISION_DOORS,
}
OUTSIDE = ("federated", "serve", "examples", "benchmarks", "tests")

LOWER = ("learn", "tasks", "data", "models", "plan", "train")
FORBIDDEN_BELOW = (
    "ray",
    "flwr",
    "opacus",
    "torch.distributed",
    "http",
    "urllib.request",
    "requests",
    "fastapi",
    "starlette",
)
SMALL_SET = ("torch", "torchvision", "timm", "monai", "torchmetrics", "numpy", "pydantic", "nibabel", "PIL")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(module: str, path: Path, *, top_level_only: bool = False) -> Iterator[tuple[str, int]]:
    """(imported module, line); ``if TYPE_CHECKING`` blocks do not run and don't count for the top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        child
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.walk(node)
    }
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if top_level_only and node in inside:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])]
                )
            yield base, node.lineno
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def part(module: str) -> str:
    """``medray.data.readers.dicom`` to ``data``; the root package is nobody's."""
    return module.split(".")[1] if "." in module else ""


def every_import(*, top_level_only: bool = False) -> Iterator[tuple[str, str, str]]:
    for module, path in modules().items():
        for name, line in imports(module, path, top_level_only=top_level_only):
            yield module, name, f"{path.relative_to(ROOT)}:{line} imports {name}"


def test_every_part_has_its_step() -> None:
    assert {part(module) for module in modules()} - {""} <= set(STEP)


def test_imports_go_down_only() -> None:
    wrong = []
    for module, name, where in every_import():
        if not within(name, "medray") or part(name) not in STEP or part(module) == part(name) or not part(module):
            continue
        if STEP[part(name)] >= STEP[part(module)]:
            wrong.append(where)
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_no_import_cycles() -> None:
    known = modules()
    edges: dict[str, set[str]] = {module: set() for module in known}
    for module, name, _ in every_import(top_level_only=True):
        if name in known and name != module:
            edges[module].add(name)
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in sorted(edges[module]):
                # A submodule that imports its own package is only a cycle if the package imports it back.
                visit(target, (*trail, module))
            done.add(module)

    for module in edges:
        visit(module, ())


@pytest.mark.parametrize("vendor", DOORS)
def test_one_vendor_one_door(vendor: str) -> None:
    wrong = [
        where
        for module, name, where in every_import()
        if within(name, vendor) and not any(within(module, door) for door in DOORS[vendor])
    ]
    assert not wrong, "\n".join(wrong)


def test_the_lower_packages_know_no_engine() -> None:
    wrong = [
        where
        for module, name, where in every_import()
        if part(module) in LOWER
        and any(within(name, vendor) for vendor in FORBIDDEN_BELOW)
        and not (
            module == "medray.data.download" and within(name, "requests")
        )  # fetching public sets is what it is for
    ]
    assert not wrong, "\n".join(wrong)


def test_config_does_not_know_the_catalogue_and_the_package_stands_alone() -> None:
    wrong = [where for _, name, where in every_import() if name.split(".")[0] in OUTSIDE]
    wrong += [where for module, name, where in every_import() if part(module) == "config" and part(name) == "models"]
    assert not wrong, "\n".join(wrong)


def test_the_command_line_imports_nothing_heavy() -> None:
    allowed = {"medray", "typer", "rich", *sys.stdlib_module_names}
    light = ("errors", "cli", "")
    wrong = [
        where
        for module, name, where in every_import(top_level_only=True)
        if part(module) == "cli"
        and (name.split(".")[0] not in allowed or (within(name, "medray") and part(name) not in light))
    ]
    wrong = [where for where in wrong if "medray.__version__" not in where]
    assert not wrong, "\n".join(wrong)


ABSENT = """
import sys

class Without:
    \"\"\"A finder that doesn't find some top-level modules, as if they weren't installed.\"\"\"

    def __init__(self, finder):
        self._finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {blocked!r} else self._finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self._finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""

IMPORT_ALL = """
import importlib, pkgutil
for package in {packages!r}:
    found = importlib.import_module(f"medray.{{package}}")
    for info in pkgutil.walk_packages(found.__path__, f"{{found.__name__}}."):
        importlib.import_module(info.name)
print("fine")
"""


def closure(roots: tuple[str, ...]) -> set[str]:
    """Top-level modules of the given libraries and of all that they require: what such an environment would hold."""
    from importlib import metadata

    from packaging.requirements import Requirement

    providers: dict[str, set[str]] = {}
    for module, distributions in metadata.packages_distributions().items():
        for distribution in distributions:
            providers.setdefault(_plain(distribution), set()).add(module)
    waiting = [_plain("pillow" if root == "PIL" else root) for root in roots] + ["pyyaml"]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for text in needed:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(_plain(requirement.name))
    return {module for name in seen for module in providers.get(name, ())}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lower_packages_import_with_the_small_set_alone() -> None:
    from importlib import metadata

    present = closure(SMALL_SET)
    blocked = {module for module in metadata.packages_distributions() if module not in present and module != "medray"}
    assert {"ray", "optuna", "scipy", "sklearn", "pydicom", "SimpleITK", "mlflow"} <= blocked
    script = ABSENT.format(blocked=blocked) + IMPORT_ALL.format(packages=LOWER)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == "fine", done.stderr


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("no git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_is_too_long() -> None:
    long = {
        path.relative_to(ROOT).as_posix(): n
        for path in tracked()
        if path.suffix == ".py"
        for n in [_lines(path)]
        if n > 600
    }
    assert not long, long


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_tracked_files_name_no_machine_and_no_registry() -> None:
    # Put together here, so that this file doesn't find itself.
    hosts = ["pypi" + ".org", "python" + "hosted.org", "download.py" + "torch.org", "registry.npm" + "js.org"]
    patterns = [re.compile(re.escape(host)) for host in hosts]
    patterns += [re.compile(r"(?<![\w.])/" + folder + r"/[\w.-]+/") for folder in ("work", "root", "Users")]
    patterns.append(re.compile(r"(?:extra-)?index" + r"-url|find" + r"-links"))
    wrong = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        wrong += [f"{path.relative_to(ROOT)}: {match[0]}" for pattern in patterns for match in pattern.finditer(text)]
    assert not wrong, "\n".join(wrong)
