"""The project's own files behind a module, read from its source: all that can shape what a stage writes."""

import ast
import hashlib
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Rooms that never shape an output: an edit of logging must not re-run a training.
EXEMPT = {"params", "schema", "method_schema", "view", "progress", "tracking", "launch", "overlay", "dependencies", "scratch"}
# A stage reads one row of it, which its method's files and its signal repeat: a further row must not re-run what is there.
TABLE = ROOT / "wmtp/weighting/__init__.py"


def module_file(name: str) -> Path | None:
    """Where the module `name` lies in this project; None where it does not."""
    for candidate in (ROOT / (name.replace(".", "/") + ".py"), ROOT / name.replace(".", "/") / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@cache
def imports(file: Path) -> frozenset[Path]:
    """The project's own files that `file` imports anywhere in it, lazily or not; code passed as "wmtp.x:main" counts."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"wmtp\.\w+:\w+", node.value):
            names = [node.value.split(":")[0]]
        for name in names:
            target = module_file(name) if name.split(".")[0] in ("wmtp", "stages") and name not in ("wmtp", "stages") else None
            if target:
                found.add(target)
    return frozenset(found - {file})


def closure(file: Path) -> set[Path]:
    """`file` and all that it imports, rooms that never shape an output and the table of methods left out."""
    seen, waiting = set(), [file]
    while waiting:
        current = waiting.pop()
        if current in seen or (current.parent.name == "wmtp" and current.stem in EXEMPT):
            continue
        seen.add(current)
        waiting += imports(current)
    return seen - {TABLE}


def code_sha256(file: Path) -> str:
    """Of a module and all that it imports of this project."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in source_files(file).values())).hexdigest()


def source_files(file: Path) -> dict[str, Path]:
    """`closure` by path in the project, sorted."""
    return dict(sorted((path.relative_to(ROOT).as_posix(), path) for path in closure(file)))
