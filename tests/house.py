"""What a stage imports, read from the source: the facts that dvc.yaml and the floors are checked against.

`python -m tests.house` rewrites the code dependencies in dvc.yaml after an import has changed.
"""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Rooms that never shape an output: an edit of logging must not re-run a training.
EXEMPT = {"params", "view", "progress", "tracking", "launch", "overlay"}
PIPELINES = ("dvc.yaml", "study/dvc.yaml")
# A stage reads one row of it, which its method's files and its signal repeat: a further row must not re-run what is there.
TABLE = ROOT / "wmtp/weighting/__init__.py"


def module_file(name: str) -> Path | None:
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


def code_dependencies(stage_module: str) -> list[str]:
    """What a stage lists in dvc.yaml: its module and the wmtp files behind it; a weighting's own file is listed by the method."""
    return sorted(str(path.relative_to(ROOT)) for path in closure(ROOT / "stages" / f"{stage_module}.py"))


def weighting_dependencies(weighting: str) -> list[str]:
    """The project's files behind a weighting, its own first: a stage that trains with it lists every one of them."""
    own = ROOT / "wmtp/weighting" / f"{weighting}.py"
    return [str(path.relative_to(ROOT)) for path in (own, *sorted(closure(own) - {own}))]


def filled(dependencies: list[str], item: dict) -> set[str]:
    """A foreach's dependencies with `${item.key}` and `${item.key[0]}` filled in."""

    def value(match: re.Match) -> str:
        found = item[match[1]]
        return str(found if match[2] is None else found[int(match[2])])

    return {re.sub(r"\$\{item\.(\w+)(?:\[(\d+)\])?\}", value, dependency) for dependency in dependencies}


def method_files() -> set[str]:
    """The weightings and what they alone share, which the table loads by name: a stage lists those of the methods that it runs."""
    shared = {"__init__", "method", "projection", "lag"}
    return {str(path.relative_to(ROOT)) for path in (ROOT / "wmtp/weighting").glob("*.py") if path.stem not in shared}


def main() -> None:
    for name in PIPELINES:
        rewrite(ROOT / name)


def rewrite(pipeline: Path) -> None:
    lines, out, skipping, body = pipeline.read_text().splitlines(), [], False, None
    for line in lines:
        if match := re.search(r"-m stages\.(\w+)|-- stages\.(\w+)", line):
            body = match[1] or match[2]
        if re.match(r"\s+- (stages|wmtp)/\w+(/\w+)?\.py$", line) and line.strip("- ") not in method_files():
            if not skipping:
                indent = line[: len(line) - len(line.lstrip())]
                out += [f"{indent}- {name}" for name in code_dependencies(body)]
            skipping = True
            continue
        skipping = False
        out.append(line)
    pipeline.write_text("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
