"""What a stage imports, read from the source: the facts that dvc.yaml and the floors are checked against.

`python -m tests.house` rewrites the code dependencies in dvc.yaml after an import has changed.
"""

import re
from pathlib import Path

from wmtp.dependencies import ROOT, closure, source_files

PIPELINES = ("dvc.yaml", "study/dvc.yaml")


def code_dependencies(stage_module: str) -> list[str]:
    """What a stage lists in dvc.yaml: its module and the wmtp files behind it; a weighting's own file is listed by the method."""
    return list(source_files(ROOT / "stages" / f"{stage_module}.py"))


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
        # A method's own file may stand among the others; the list is the same one until something else comes.
        skipping = skipping and bool(re.match(r"\s+- \S+\.py$", line))
        out.append(line)
    pipeline.write_text("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
