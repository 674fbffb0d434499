"""A preset, which holds differences from params.yaml alone, as flags for DVC or written into params.yaml.

    dvc exp run $(python -m wmtp.overlay presets/7b.yaml)          the file on disk goes back with git
    python -m wmtp.overlay presets/tiny.yaml --write params.yaml   comments stay

Every key of a preset must stand in params.yaml, with two exceptions. A block whose form is told by `kind` or `weighting` and that gives
another one is replaced whole, so the preset states all its keys. DVC cannot replace a mapping in one flag (it merges), so such a block
becomes `~key` for what goes, `+key=value` for what comes, `key=value` for what both forms have. And `methods` takes further blocks, each
whole, with its `weighting`. A mapping that is empty in params.yaml takes any key.

Both files are read as DVC reads them (YAML 1.2: 1e-5 is a number, yes is a text).
"""

import argparse
import copy
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from wmtp.records import atomic_path

DISCRIMINATORS = ("kind", "weighting")
KEY = re.compile(r"[A-Za-z_][\w-]*")
RESERVED = {"null", "true", "false", "inf", "nan"}


class OverlayError(ValueError):
    """A preset that does not fit params.yaml, or that flags cannot express; the message names file and key."""


class Change(NamedTuple):
    """One flag: `sign` '' sets an existing key, '+' adds one, '~' deletes one."""

    sign: str
    path: tuple[str, ...]
    value: Any = None


def read(path: str | Path) -> dict[str, Any]:
    from ruamel.yaml import YAML, YAMLError

    try:
        values = YAML(typ="safe", pure=True).load(Path(path))
    except FileNotFoundError:
        raise OverlayError(f"{path}: no such file; run from the root of the repository") from None
    except YAMLError as error:
        raise OverlayError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise OverlayError(f"{path}: expected a mapping of sections, found {type(values).__name__}")
    return values


def changes(params: Mapping[str, Any], overlay: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[Change]:
    """What turns `params` into the merged parameters, in an order that DVC can apply."""
    for key, value in overlay.items():
        here = (*path, str(key))
        if key not in params:
            if (params or not path) and not (path == ("methods",) and isinstance(value, Mapping) and "weighting" in value):
                raise OverlayError(f"{'.'.join(here)}: no such key in params.yaml; correct it, or add it there first")
            yield Change("+", here, value)
        elif isinstance(value, Mapping) and isinstance(params[key], Mapping):
            yield from (_replaced if _another_form(params[key], value) else changes)(params[key], value, here)
        else:
            yield Change("", here, value)


def _another_form(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return any(name in old and name in new and old[name] != new[name] for name in DISCRIMINATORS)


def _replaced(old: Mapping[str, Any], new: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Change]:
    for key in old:
        if key not in new:
            if old[key] is None:  # DVC takes a null for a missing key and refuses to delete it
                yield Change("", (*path, key), 0)
            yield Change("~", (*path, key))
    for key, value in new.items():
        here = (*path, str(key))
        if key not in old:
            yield Change("+", here, value)
        elif isinstance(value, Mapping) and isinstance(old[key], Mapping):
            yield from _replaced(old[key], value, here)
        else:
            yield Change("", here, value)


def apply(params: Any, listed: list[Change]) -> None:
    """Carries the changes out on nested mappings, in place."""
    for sign, path, value in listed:
        block = params
        for key in path[:-1]:
            block = block[key]
        if sign == "~":
            del block[path[-1]]
        else:
            block[path[-1]] = value


def merged(params: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """`params` with the differences of `overlay`; neither is changed. OverlayError names a key that params lacks."""
    result = copy.deepcopy(dict(params))
    apply(result, copy.deepcopy(list(changes(params, overlay))))
    return result


def flags(listed: list[Change]) -> str:
    """One line of `-S` flags that survives the word splitting of $(...); there the shell takes no quotes away."""
    words = []
    for sign, path, value in listed:
        where = ".".join(path)
        for key in path:
            _check_key(key, where)
        words.append(f"-S {sign}{where}" if sign == "~" else f"-S {sign}{where}={text(value, where)}")
    return " ".join(words)


def text(value: Any, where: str) -> str:
    """`value` in the grammar of DVC's --set-param (hydra's), so that it is read back equal and of the same type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _quoted(value, where)
    if isinstance(value, list):
        return f"[{','.join(text(item, where) for item in value)}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_check_key(key, where)}:{text(item, where)}" for key, item in value.items()) + "}"
    raise OverlayError(f"{where}: a {type(value).__name__} cannot be a flag; expected text, number, true, false, null, list or mapping")


def _quoted(value: str, where: str) -> str:
    if re.search(r"\s", value):
        raise OverlayError(f"{where}: {value!r} contains white space, which $(...) splits; use --write params.yaml")
    if "${" in value:
        raise OverlayError(f"{where}: {value!r} contains '${{', which DVC takes for a reference; use --write params.yaml")
    # Backslashes are literal except before a quote, where each counts double.
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value) + "'"


def _check_key(key: Any, where: str) -> str:
    if not isinstance(key, str) or not KEY.fullmatch(key) or key.lower() in RESERVED:
        raise OverlayError(f"{where}: {key!r} cannot be a key of a flag; expected letters, digits, _ and -")
    return key


def write(overlay: Mapping[str, Any], target: Path) -> None:
    """Rewrites the parameter file `target` with the differences; its comments, order and quotes stay."""
    from ruamel.yaml import YAML
    from ruamel.yaml.representer import RoundTripRepresenter

    class Representer(RoundTripRepresenter):
        """Writes what every YAML reader takes alike: null, and a number such as 1.0e-05, which 1.1 calls a text without its point."""

    def number(representer: Any, value: float) -> Any:
        shown = repr(value)
        return representer.represent_scalar("tag:yaml.org,2002:float", shown if "." in shown else shown.replace("e", ".0e"))

    Representer.add_representer(float, number)
    Representer.add_representer(type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null"))
    yaml = YAML()
    yaml.Representer = Representer
    yaml.preserve_quotes = True
    yaml.width = 4096
    params = yaml.load(target)
    apply(params, [Change(sign, path, _styled(value)) for sign, path, value in changes(params, overlay)])
    with atomic_path(target) as temporary:
        yaml.dump(params, temporary)


def _styled(value: Any) -> Any:
    """Lists as [1, 2], the way params.yaml writes them; texts that YAML 1.1 takes for something else (yes, 1_000) in quotes."""
    from ruamel.yaml.comments import CommentedSeq
    from ruamel.yaml.scalarstring import SingleQuotedScalarString
    from yaml import ScalarNode
    from yaml.resolver import Resolver

    if isinstance(value, Mapping):
        return {key: _styled(item) for key, item in value.items()}
    if isinstance(value, str):
        read = Resolver().resolve(ScalarNode, value, (True, False))
        return value if read == "tag:yaml.org,2002:str" else SingleQuotedScalarString(value)
    if not isinstance(value, list):
        return value
    listed = CommentedSeq(_styled(item) for item in value)
    listed.fa.set_flow_style()
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m wmtp.overlay",
        description="Print a preset as -S flags for dvc exp run, or write it into a parameter file.",
        epilog="example: dvc exp run $(python -m wmtp.overlay presets/7b.yaml)",
    )
    parser.add_argument("preset", type=Path, help="YAML file of differences from params.yaml")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="what the preset differs from; default params.yaml")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the differences into FILE instead of printing flags")
    given = parser.parse_args()
    try:
        overlay = read(given.preset)
        if given.write:
            read(given.write)
            write(overlay, given.write)
        else:
            print(flags(list(changes(read(given.params), overlay))))
    except OverlayError as error:
        sys.exit(f"{given.preset}: {error}" if not str(error).startswith(str(given.preset)) else str(error))


if __name__ == "__main__":
    main()
