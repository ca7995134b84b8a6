"""From defaults lists, config groups, a file and the command line to one checked configuration.

Hydra composes the ``defaults:`` list with the groups of ``medray/config/conf/`` (and of folders beside the user's file)
and reads the values of overrides; pydantic validates. The tree stays sparse: it holds what somebody asked for and
nothing else, so that a plan can fill in the rest. Precedence, lowest first: schema defaults, plan, config group, file,
command line.
"""

from __future__ import annotations

import copy
import difflib
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from medray.config.genotype import embedded
from medray.config.overrides import KINDS, SOURCE, Override, check_space_key, expand_home, parse_override
from medray.config.paths import allowed, check_path, did_you_mean, known
from medray.config.schema import Experiment, StudyConfig, planned_batch
from medray.config.yamlfile import read_yaml
from medray.errors import ConfigError

CONF = Path(__file__).parent / "conf"
_HYDRA = threading.Lock()  # Hydra's state is one per process
TASK = "task"
"""The config group without files: ``task=NAME`` is short for ``task.kind=NAME``, which whoever has the tasks checks."""

Tree = dict[str, Any]
Model = TypeVar("Model", Experiment, StudyConfig)


@dataclass(frozen=True, kw_only=True)
class Composed:
    """What somebody asked for, checked.

    Attributes:
        explicit: sparse tree of the Experiment: what groups, file and command line set.
        study: how the search is run.
        space: entries of the search space by path into the Experiment; their grammar is checked by ``medray.search``.
        source_file: the user's file, if there is one.
        origins: who set a path ("command line" or the file), for messages.
    """

    explicit: Tree
    study: StudyConfig
    space: Tree
    source_file: Path | None
    origins: Mapping[str, str] = field(default_factory=dict)


def compose(path: Path | None, overrides: Sequence[str] = ()) -> Composed:
    """Compose a file (a search space, or an experiment.yaml) with overrides.

    Args:
        path: the YAML file; None for the overrides alone.
        overrides: as typed on the command line; later ones win.

    Raises:
        ConfigError: states source, path, value, what is allowed and, for an unknown name, the nearest ones.
    """
    content = read_yaml(path) if path is not None else {}
    file_name = str(path) if path is not None else "configuration"
    folder = path.absolute().parent if path is not None else None
    groups = _groups(folder)
    defaults = _defaults_list(content.pop("defaults", []), file_name, groups, folder)
    _check_keys(content, (), file_name)
    space = _mapping(content.pop("space", None), "space", file_name)
    for key in space:
        check_space_key(key, file_name)

    origins: dict[str, str] = dict.fromkeys(_leaf_paths(content), file_name)
    parsed = [_named_task(parse_override(text, groups), groups) for text in overrides]
    for override in parsed:
        name = override.path[0]
        if override.action == "group":
            _check_option(name, str(override.value), groups, SOURCE, folder)
            defaults = [entry for entry in defaults if entry[0] != name]
            defaults.insert(0, (name, str(override.value)))
        elif override.action == "remove" and override.path == (name,) and name in groups:
            chosen = [entry for entry in defaults if entry[0] == name]
            if not chosen and name not in content:
                raise ConfigError(f"{SOURCE}: {override.text!r}: neither a config group nor the file sets '{name}'")
            defaults = [entry for entry in defaults if entry[0] != name]
            content.pop(name, None)
    named = [entry for entry in defaults if entry[0] == TASK and entry[1] not in groups[TASK]]
    for name, option in named:
        content = merge({name: {"kind": option}}, content)
    tree = _compose_groups([entry for entry in defaults if entry not in named], content, file_name, folder)
    _check_keys(tree, (), "config groups")
    for override in parsed:
        if override.action == "group" or (
            override.action == "remove" and override.path[0] in groups and len(override.path) == 1
        ):
            continue
        if override.path[0] == "space":
            _apply_to_space(space, override)
        else:
            _apply(tree, override)
            origins.update(dict.fromkeys(_override_paths(override), SOURCE))

    study = _build(StudyConfig, _mapping(tree.pop("study", None), "study", file_name), ("study",), origins, file_name)
    if isinstance(tree.get("data"), str):
        if not tree["data"].strip():
            raise ConfigError(f"{origins['data']}: data is empty; name a folder, a file, or phantom://ct-lesions")
        tree["data"] = expand_home(tree["data"])
    _embed(tree, space)
    _build(Experiment, tree, (), origins, file_name)
    return Composed(explicit=tree, study=study, space=space, source_file=path, origins=origins)


def _named_task(override: Override, groups: Mapping[str, list[str]]) -> Override:
    if override.action == "group" and override.path == (TASK,) and override.value not in groups[TASK]:
        return Override(action="set", path=(TASK, "kind"), value=override.value, text=override.text)
    return override


def _embed(tree: Tree, space: Tree) -> None:
    """Take the genotypes that are named by a file into the configuration: it may be moved, and the file not be."""
    model, rule = tree.get("model"), space.get("model.name")
    if isinstance(model, dict) and "name" in model:
        model["name"] = embedded(model["name"])
    if isinstance(rule, dict) and isinstance(rule.get("choice"), list):
        space["model.name"] = {**rule, "choice": [embedded(name) for name in rule["choice"]]}


def build_experiment(*layers: Mapping[str, Any], origins: Mapping[str, str] | None = None) -> Experiment:
    """Merge sparse trees, later ones winning, and validate the whole.

    Args:
        layers: sparse Experiment trees, lowest precedence first: the plan, what was asked for, a trial's choices.
        origins: who set a path, for messages (``Composed.origins``).

    Raises:
        ConfigError: states path, value and what is allowed.
    """
    merged: Tree = {}
    for layer in layers:
        # A later "auto" leaves an earlier layer's number alone.
        merge(merged, {key: planned_batch(value) if key == "train" else value for key, value in layer.items()})
    _check_keys(merged, (), "experiment")
    return _build(Experiment, merged, (), origins or {}, "experiment")


def merge(base: Tree, layer: Mapping[str, Any]) -> Tree:
    """Merge ``layer`` into ``base`` in place: mappings key by key, everything else replaced."""
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = copy.deepcopy(dict(value) if isinstance(value, Mapping) else value)
    return base


def _mapping(value: Any, name: str, source: str) -> Tree:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: '{name}' is {value!r}, and it has to be a mapping")
    return value


def _check_keys(tree: Mapping[str, Any], prefix: tuple[str, ...], source: str) -> None:
    for key, value in tree.items():
        path = (*prefix, key)
        if path == ("space",):
            continue
        if check_path(path, source) == "section":
            if value is not None and not isinstance(value, Mapping):
                raise ConfigError(
                    f"{source}: '{'.'.join(path)}' is {value!r}, and it is a section: a mapping of its fields"
                )
            _check_keys(value or {}, path, source)


def _leaf_paths(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    paths: list[str] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        paths += _leaf_paths(value, f"{name}.") if isinstance(value, Mapping) else [name]
    return paths


def _override_paths(override: Override) -> list[str]:
    name = ".".join(override.path)
    return _leaf_paths(override.value, f"{name}.") if isinstance(override.value, Mapping) else [name]


def _groups(folder: Path | None) -> dict[str, list[str]]:
    """Config groups at hand and their options; a group is named like the section that it fills."""
    found: dict[str, list[str]] = {TASK: []}
    sections = [parts[0] for parts, (kind, _) in known().items() if len(parts) == 1 and kind == "section"]
    for root in filter(None, (CONF, folder)):
        for section in sections:
            options = [file.stem for file in sorted((root / section).glob("*.yaml"))]
            if options:
                found.setdefault(section, []).extend(
                    option for option in options if option not in found.get(section, ())
                )
    return found


def _check_option(group: str, option: str, groups: Mapping[str, list[str]], source: str, folder: Path | None) -> None:
    if group == TASK and option not in groups[group]:
        return
    if option not in groups[group]:
        near = difflib.get_close_matches(option, groups[group], n=2)
        raise ConfigError(
            f"{source}: the config group '{group}' has no '{option}'. "
            + (did_you_mean(near) + " " if near else "")
            + f"It has: {', '.join(groups[group])}"
        )
    for root in filter(None, (folder, CONF)):
        file = root / group / f"{option}.yaml"
        if file.is_file():
            read_yaml(file)  # our loader refuses what Hydra's would let through (aliases, size, equal keys)
            return


def _defaults_list(
    value: Any, source: str, groups: Mapping[str, list[str]], folder: Path | None
) -> list[tuple[str, str]]:
    """``[{augment: medical}, _self_]`` as pairs, checked."""
    rule = "write it as [task: segmentation, augment: medical, _self_]"
    if not isinstance(value, list):
        raise ConfigError(f"{source}: 'defaults' is {value!r}, and it has to be a list; {rule}")
    pairs: list[tuple[str, str]] = []
    for position, entry in enumerate(value):
        if entry == "_self_":
            if position != len(value) - 1:
                raise ConfigError(
                    f"{source}: _self_ has to come last in 'defaults': what a file says wins over its groups"
                )
            continue
        if not (
            isinstance(entry, dict) and len(entry) == 1 and all(isinstance(option, str) for option in entry.values())
        ):
            raise ConfigError(f"{source}: 'defaults' holds {entry!r}; {rule}")
        ((group, option),) = entry.items()
        if group not in groups:
            near = difflib.get_close_matches(group, groups, n=2)
            raise ConfigError(
                f"{source}: there is no config group '{group}'. "
                + (did_you_mean(near) + " " if near else "")
                + f"There are: {', '.join(groups)}"
            )
        _check_option(group, option, groups, source, folder)
        pairs.append((group, option))
    return pairs


def _compose_groups(defaults: list[tuple[str, str]], content: Tree, source: str, folder: Path | None) -> Tree:
    """The groups' trees by Hydra, with the file's own content over them."""
    if not defaults:
        return merge({}, content)
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.version import VersionBase
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # The primary config is a file of its own: the user's may hold text that Hydra would take for an interpolation.
    search = [f"file://{root}" for root in (folder, CONF) if root is not None]
    entries: list[Any] = [{group: option} for group, option in defaults]
    primary = {"defaults": [*entries, "_self_"], "hydra": {"searchpath": search}}
    with _HYDRA, tempfile.TemporaryDirectory(prefix="medray-compose-") as scratch:
        Path(scratch, "primary.yaml").write_text(yaml.safe_dump(primary, allow_unicode=True), encoding="utf-8")
        # A caller that is a Hydra application itself gets its own state back.
        callers, base = GlobalHydra.instance().hydra, VersionBase.instance().version_base
        try:
            GlobalHydra.instance().clear()
            with initialize_config_dir(scratch, version_base="1.3"):
                tree = OmegaConf.to_container(hydra_compose("primary"), resolve=False)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(f"{source}: {str(error).strip()}") from None
        finally:
            GlobalHydra.instance().hydra = callers
            VersionBase.instance().version_base = base
    assert isinstance(tree, dict)
    return merge({str(key): value for key, value in tree.items()}, content)


def _apply(tree: Tree, override: Override) -> None:
    *sections, leaf = override.path
    node = tree
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(f"{SOURCE}: {override.text!r}: '{section}' holds a value, not further keys")
    if override.path == ("study", "objectives") and override.action == "set":
        node[leaf] = copy.deepcopy(override.value)  # what is searched for, not something more
    elif override.action == "set":
        merge(node, {leaf: override.value})
    elif leaf not in node:
        raise ConfigError(
            f"{SOURCE}: {override.text!r}: neither a config group nor the file sets '{'.'.join(override.path)}'"
        )
    elif override.value is not None and node[leaf] != override.value:
        raise ConfigError(
            f"{SOURCE}: {override.text!r}: '{'.'.join(override.path)}' is {node[leaf]!r}, so nothing is removed"
        )
    else:
        del node[leaf]


def _apply_to_space(space: Tree, override: Override) -> None:
    keys = override.path[1:]
    if not keys:
        space.clear()
        if override.action == "set":
            for key, entry in _mapping(override.value, "space", SOURCE).items():
                check_space_key(key, SOURCE)
                space[key] = entry
        return
    name = keys[0]
    if override.action == "remove" and name not in space:
        near = difflib.get_close_matches(name, space, n=2)
        hint = did_you_mean(near) if near else f"It has: {', '.join(space) or 'nothing'}"
        raise ConfigError(f"{SOURCE}: {override.text!r}: the space has no '{name}'. {hint}")
    if len(keys) == 1:
        if override.action == "remove":
            del space[name]
            return
        space[name] = override.value
        return
    current = space.get(name)
    span: Tree = copy.deepcopy(current) if isinstance(current, dict) else {}
    if override.action == "set" and keys[1] in KINDS:
        # Another kind of range replaces the old one, and what belonged to that one alone.
        for other in KINDS:
            if other != keys[1]:
                span.pop(other, None)
        if keys[1] == "choice":
            span.pop("log", None)
            span.pop("step", None)
    _apply(span, Override(action=override.action, path=keys[1:], value=override.value, text=override.text))
    space[name] = span


def _build(model: type[Model], tree: Tree, prefix: tuple[str, ...], origins: Mapping[str, str], fallback: str) -> Model:
    """Validate a tree, and say what is wrong as a person needs it."""
    _refuse_booleans(tree, prefix, origins, fallback)
    for key in [key for key, value in tree.items() if value is None]:
        del tree[key]  # an empty section in the file
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            path = prefix + tuple(str(part) for part in problem["loc"])
            lines.append(_complain(path, problem["input"], problem["msg"], origins, fallback))
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _refuse_booleans(
    tree: Mapping[str, Any], prefix: tuple[str, ...], origins: Mapping[str, str], fallback: str
) -> None:
    """pydantic takes ``true`` for the number 1."""
    for key, value in tree.items():
        path = (*prefix, key)
        if isinstance(value, Mapping):
            _refuse_booleans(value, path, origins, fallback)
        elif isinstance(value, bool) and "true" not in allowed(path):
            raise ConfigError(_complain(path, value, "is no number", origins, fallback))


def _complain(path: tuple[str, ...], value: Any, message: str, origins: Mapping[str, str], fallback: str) -> str:
    """``FILE: optim.lr=20: should be at most 10. Allowed: a number > 0, <= 10``."""
    while len(path) > 1 and path not in known():
        path = path[:-1]  # an item of a list: name the field
    name = ".".join(path)
    source = next(
        (origins[key] for key in (name, *(k for k in origins if k.startswith(f"{name}."))) if key in origins), fallback
    )
    reason = message.removeprefix("Value error, ").removeprefix("Input ")
    rule = allowed(path)
    at = f"{name}={value!r}: " if path in known() and known()[path][0] != "section" else ""
    hint = ""
    if " | " in rule and isinstance(value, str):
        near = difflib.get_close_matches(value.lower(), rule.partition(" (")[0].split(" | "), n=1)
        hint = f" {did_you_mean(near)}" if near else ""
        reason = "is unknown"
    return f"{source}: {at}{reason}." + hint + (f" Allowed: {rule}" if rule else "")
