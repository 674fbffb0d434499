"""The named, frozen, hashed evaluation protocols: prompt, stops, cutting, program, limits and sampling.

A completion is cut on the right at most, never on the left: its first character may be the indentation on which the program hangs.
Sources: Chen et al. 2021 (2107.03374) for HumanEval, Austin et al. 2021 (2108.07732) for MBPP, the harnesses of BigCode and EvalPlus.
"""

import ast
import hashlib
import json
import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from wmtp.records import AssertTests, CheckTests, Problem

Template = Literal["evaluation_notes", "alpaca"]
PromptForm = Literal["instruction", "code", "code-stripped", "code-one-newline", "mbpp-shots", "mbpp-docstring", "statement-docstring"]
Post = Literal["completion", "continuation", "reachable"]

EVALUATION_NOTES = (
    "- Return Python source code that prints the required answer.",
    "- Hidden tests are present; rely on the stated constraints rather than memorising samples.",
)


def render_prompt(instruction: str, input: str, template: Template) -> str:
    """The prompt of the instruction form, blocks one blank line apart, no preamble; ends in "### Response:" and a newline."""
    blocks = [f"### Instruction:\n{instruction}"]
    if input:
        blocks.append(f"### Input:\n{input}")
    if template == "evaluation_notes":
        blocks.append("\n".join(["### Evaluation Notes:", *EVALUATION_NOTES]))
    elif template != "alpaca":
        raise ValueError(f"prompt template {template!r} is unknown; expected evaluation_notes or alpaca")
    return "\n\n".join([*blocks, "### Response:\n"])


def instruction_of(problem: Problem) -> tuple[str, str]:
    """(instruction, input) of a problem in the instruction form, whatever benchmark it comes from."""
    if isinstance(problem.tests, CheckTests):
        return "Complete the function.\n" + problem.prompt.rstrip("\n"), ""
    if isinstance(problem.tests, AssertTests):
        return f"{problem.statement}\nPass this test: {one_line(problem.tests.asserts[0])}", ""
    return problem.statement, problem.input


def one_line(statement: str) -> str:
    """Python source on one line with the same meaning; text without a newline is returned as it is, comments included."""
    return statement.strip() if "\n" not in statement.strip() else ast.unparse(ast.parse(statement))


class Protocol(BaseModel):
    """How completions are asked for, cut, made into programs and limited; equal hashes mean equal protocols."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    benchmark: Literal["humaneval", "mbpp", "mbpp+", "contest", "any"]
    prompt_form: PromptForm
    stops: tuple[str, ...] = ()
    post: Post = Field(description="the program is the completion, prompt + completion, or of the latter what the entry point reaches")
    shots: tuple[str, ...] = Field(default=(), description="worked examples before the prompt, for mbpp-shots: exactly three")
    cpu_seconds: float = Field(default=3.0, gt=0)
    wall_seconds: float = Field(default=10.0, gt=0)
    n_samples: int = Field(ge=1)
    temperature: float = Field(ge=0, description="0 is greedy")
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(ge=1)

    @property
    def sha256(self) -> str:
        """Of all fields, as canonical JSON."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def prompt(self, problem: Problem, template: Template) -> str:
        """What the model is given. `template` is read by the instruction form alone; ValueError for a problem of another benchmark."""
        self._check(problem)
        if self.prompt_form == "instruction":
            return render_prompt(*instruction_of(problem), template)
        if self.prompt_form == "mbpp-shots":
            return "".join(f"{shot}\n\n" for shot in self._three_shots()) + task_block(problem)
        return self._beginning(problem)

    def cut(self, text: str) -> tuple[str, bool]:
        """(text up to the first stop that occurs in it, whether one does); nothing else is removed."""
        found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        return (text[: min(found)], True) if found else (text, False)

    def program(self, problem: Problem, completion: str) -> str:
        """The complete program, without the tests."""
        self._check(problem)
        if self.post == "completion":
            return completion
        source = self._beginning(problem) + completion
        if self.post == "continuation":
            return source
        return reachable(source, problem.tests.entry_point, used_names([ast.parse(problem.tests.test)]))

    def _beginning(self, problem: Problem) -> str:
        """The text that a completion continues, in the forms whose prompt is itself Python."""
        if self.prompt_form == "mbpp-docstring":
            return docstring(problem.statement, problem.tests.asserts[0], gap="\n")
        if self.prompt_form == "statement-docstring":
            return docstring(problem.statement, problem.input, gap="\n\n")
        if self.prompt_form == "code":
            return problem.prompt
        return problem.prompt.strip() + ("\n" if self.prompt_form == "code-one-newline" else "")

    def _check(self, problem: Problem) -> None:
        kind = {"check": "humaneval", "asserts": "mbpp", "stdio": "contest"}.get(problem.tests.kind)
        kind = "mbpp+" if (kind, problem.source) == ("humaneval", "mbpp") else kind
        if self.benchmark not in ("any", kind):
            found = f"has {problem.tests.kind} tests" + (" and comes of MBPP+" if kind == "mbpp+" else "")
            raise ValueError(f"protocol {self.name}: problem {problem.task_id} {found}; expected {self.benchmark}")

    def _three_shots(self) -> tuple[str, ...]:
        if len(self.shots) != 3:
            raise ValueError(f"protocol {self.name} needs 3 worked examples, found {len(self.shots)}; give them by with_shots")
        return self.shots


def docstring(*parts: str, gap: str) -> str:
    text = gap.join(part for part in parts if part)
    return f'"""\n{text}\n"""\n'


def task_block(problem: Problem) -> str:
    """Austin et al. 2021, section 3: the task, its three asserts and the opening mark of the answer."""
    tests = "\n".join(problem.tests.asserts)
    return (
        f"You are an expert Python programmer, and here is your task: {problem.statement} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def with_shots(protocol: Protocol, problems: Sequence[Problem]) -> Protocol:
    """The protocol with these three problems (MBPP tasks 2, 3 and 4 in the paper) and their references as worked examples."""
    missing = [problem.task_id for problem in problems if problem.reference is None]
    if len(problems) != 3 or missing:
        raise ValueError(f"protocol {protocol.name} needs 3 problems with a reference, found {len(problems)}; without one: {missing}")
    return with_sampling(protocol, shots=tuple(f"{task_block(problem)}{problem.reference}\n[DONE]" for problem in problems))


def with_sampling(protocol: Protocol, **changes: Any) -> Protocol:
    """A checked copy with other values, n_samples or temperature for instance; its hash follows."""
    return Protocol.model_validate({**protocol.model_dump(), **changes})


def reachable(source: str, entry_point: str, test_names: Collection[str] = ()) -> str:
    """The longest head of whole lines that parses, reduced to imports and the definitions that the entry point and the tests need.

    Returned as it is where that head does not define the entry point: the judge then reports the true error. EvalPlus keeps what the
    entry point alone needs and has its own tests; three of HumanEval's tests call helpers that stand in the prompt.
    """
    lines = source.splitlines(keepends=True)
    for end in range(len(lines), 0, -1):
        tree = parsed("".join(lines[:end]))
        if tree is None:
            continue
        kept = needed_statements(tree.body, entry_point, test_names)
        texts = ["".join(lines[first_line(node) - 1 : node.end_lineno]).rstrip("\n") for node in kept]
        return "\n".join([*texts, ""]) if kept else source
    return source


def parsed(source: str) -> ast.Module | None:
    """None where it is no Python 3. Says nothing of odd escapes: it is not our text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])


def defined_names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return used_names(targets)
    return set()


def used_names(nodes: Iterable[ast.AST]) -> set[str]:
    return {name.id for node in nodes for name in ast.walk(node) if isinstance(name, ast.Name)}


def needed_statements(body: list[ast.stmt], entry_point: str, test_names: Collection[str]) -> list[ast.stmt]:
    """Imports, and the top-level definitions reached by name, in their order; none where the entry point is not defined."""
    if not any(entry_point in defined_names(node) for node in body):
        return []
    wanted, size = {entry_point, *test_names}, 0
    while size != len(wanted):
        size = len(wanted)
        wanted |= used_names(node for node in body if defined_names(node) & wanted)
    return [node for node in body if isinstance(node, ast.Import | ast.ImportFrom) or defined_names(node) & wanted]


CODEX_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
BIGCODE_STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```")
BIGCODE_MBPP_STOPS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")
EVALPLUS_STOPS = ("\nif __name__", "\ndef main(", "\nprint(", "\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert ")
EVALPLUS_MBPP_STOPS = ("\nif __name__", "\ndef main(", "\nprint(", '\n"""', "\nassert")
CONTEST_STOPS = ('\n"""', "\n```")
GREEDY = {"n_samples": 1, "temperature": 0.0}
MANY = {"n_samples": 1000, "temperature": 0.8}  # Gloeckle et al. 2024 take the best of five temperatures from 0.5 to 0.9
NUCLEUS = {"temperature": 0.2, "top_p": 0.95, "max_tokens": 512}

PROTOCOLS: dict[str, Protocol] = {
    name: Protocol(name=name, benchmark=benchmark, prompt_form=prompt_form, post=post, stops=stops, **sampling)
    for name, benchmark, prompt_form, post, stops, sampling in (
        ("alpaca", "any", "instruction", "completion", (), {"n_samples": 10, "temperature": 0.8, "max_tokens": 512}),
        ("humaneval/codex", "humaneval", "code", "continuation", CODEX_STOPS, {"n_samples": 200, **NUCLEUS}),
        ("humaneval/bigcode", "humaneval", "code-stripped", "continuation", BIGCODE_STOPS, {"n_samples": 200, **NUCLEUS}),
        ("humaneval/evalplus", "humaneval", "code-one-newline", "reachable", EVALPLUS_STOPS, {**GREEDY, "max_tokens": 768}),
        ("mbpp+/evalplus", "mbpp+", "code-one-newline", "reachable", EVALPLUS_MBPP_STOPS, {**GREEDY, "max_tokens": 768}),
        ("mbpp/3shot", "mbpp", "mbpp-shots", "completion", ("\n[DONE]", "[DONE]"), {**GREEDY, "max_tokens": 512}),
        ("mbpp/bigcode", "mbpp", "mbpp-docstring", "continuation", BIGCODE_MBPP_STOPS, {"n_samples": 200, **NUCLEUS}),
        ("contest/stdio", "contest", "statement-docstring", "completion", CONTEST_STOPS, {**MANY, "max_tokens": 1024}),
    )
}
