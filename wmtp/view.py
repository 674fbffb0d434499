"""Each stage's view of the parameters: the keys that it declares in dvc.yaml and no others.

A value that DVC does not track must not be able to change a result.
"""

import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from wmtp.params import OPERATIONAL, ParameterError, Params, parse_yaml, read_yaml, validate


def declared_keys(stage: str, pipeline: dict[str, Any], values: Mapping[str, Any] | None = None) -> list[str]:
    """The parameter keys that dvc.yaml lists for `stage` (`train@rho1`: `item` and `key` of its foreach or matrix filled in).

    An axis of a matrix may be a list in the parameters, "${study.arms}"; `values` are the parameters.
    """
    name, _, instance = stage.partition("@")
    entry = pipeline["stages"].get(name)
    if entry is None:
        raise ParameterError(f"dvc.yaml: no stage {name}")
    body = entry.get("do", entry)
    items = entry.get("foreach", {})
    item = items.get(instance) if isinstance(items, dict) else None
    if axes := entry.get("matrix"):
        lists = [_resolve(values, axis.strip("${}")) if isinstance(axis, str) else axis for axis in axes.values()]
        cells = (dict(zip(axes, cell)) for cell in itertools.product(*lists))
        item = next((cell for cell in cells if "-".join(map(str, cell.values())) == instance), None)
        if item is None:
            raise ParameterError(f"stage {stage}: dvc.yaml's matrix has no cell {instance!r}")

    def fill(text: str) -> str:
        text = text.replace("${key}", instance).replace("${item}", instance)
        return re.sub(r"\$\{item\.(\w+)\}", lambda match: str(item[match[1]]), text)

    return [fill(key) for key in body.get("params", [])]


SETTING = re.compile(r"([a-z]\w*(?:\.\w+)+)=(.*)", re.DOTALL)


class View:
    """The declared part of the parameters; reading anything else is an error that names the stage and the key."""

    def __init__(self, values: BaseModel | dict[str, Any], declared: list[str], stage: str, path: str = ""):
        self._values, self._declared, self._stage, self._path = values, declared, stage, path

    def __getattr__(self, name: str) -> Any:
        path = f"{self._path}{name}"
        known = self._values if isinstance(self._values, dict) else type(self._values).model_fields
        if name not in known:
            raise ParameterError(f"stage {self._stage} reads {path}, which does not exist; known there: {', '.join(known)}")
        value = self._values[name] if isinstance(self._values, dict) else getattr(self._values, name)
        if any(path == key or path.startswith(f"{key}.") for key in self._declared):
            return value
        if any(key.startswith(f"{path}.") for key in self._declared):
            return View(value, self._declared, self._stage, f"{path}.")
        raise ParameterError(f"stage {self._stage} reads {path}, which dvc.yaml does not declare for it; add it to that stage's params")

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def shaping(self) -> dict[str, Any]:
        """`declared` without what changes no result, inside a section that is declared whole too."""
        return {key: _without(key, value) for key, value in self.declared().items() if key not in OPERATIONAL}

    def declared(self) -> dict[str, Any]:
        """Every declared value by its dotted key, JSON-ready: what a fingerprint or a tracker needs."""
        return {key: _plain(_resolve(self._values, key)) for key in sorted(set(self._declared))}


def _without(path: str, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inside = {key: f"{path}.{key}" for key in value}
    return {key: _without(inside[key], part) for key, part in value.items() if inside[key] not in OPERATIONAL}


def _resolve(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part] if isinstance(values, dict) else getattr(values, part)
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def split_arguments(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """A stage's arguments without those of the form section.key=value, and these by key: parameters of this stage alone.

    They stand in the command, hence DVC tracks them as it tracks what a stage declares.
    """
    settings = [match for text in arguments if (match := SETTING.fullmatch(text))]
    return [text for text in arguments if not SETTING.fullmatch(text)], {match[1]: parse_yaml(match[2]) for match in settings}


def load(root: Path = Path(), settings: Mapping[str, Any] | None = None) -> View:
    """The parameters as the running stage may see them; by hand, without DVC, everything. `settings` replace what the file says."""
    values, settings = read_yaml(root / "params.yaml"), settings or {}
    for key, value in settings.items():
        _replace(values, key, value)
    whole = validate(values)
    stage = os.environ.get("DVC_STAGE")
    if stage is None:
        return View(whole, list(Params.model_fields), "(by hand)")
    file, _, name = stage.rpartition(":")
    declared = declared_keys(name, read_yaml(root / (file or "dvc.yaml")), values)
    return View(whole, [*declared, *settings, *OPERATIONAL], stage)


def _replace(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        values = values.get(section, {}) if isinstance(values, dict) else {}
    if not isinstance(values, dict) or last not in values:
        raise ParameterError(f"{key}={value}: no such key in params.yaml; correct its spelling in the stage's command")
    values[last] = value
