"""The micro task: problems by grammar, correct solutions, incorrect ones with one known bug, tests that tell them apart.

`generate` writes the very layouts of the real sources. Pairs are drawn so that a program alone says nothing about its label: composition,
mutation and admission are symmetric in the two members, and a draw that fails is thrown away whole. Seeded, no network.
"""

import gzip
import itertools
import json
import random
import string
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from wmtp.cases import SHORT, Case, agrees, covering_cases, separating_cases, telling_cases
from wmtp.grammar import (
    FAMILIES,
    Composition,
    Family,
    Form,
    Mutation,
    Value,
    body,
    draw_composition,
    draw_mutation,
    first_difference,
    program,
    statement,
)
from wmtp.progress import track
from wmtp.protocols import Template, instruction_of, render_prompt
from wmtp.records import AssertTests, CheckTests, Problem, StdioTests, atomic_path

VALUES = (*range(21), *range(11), *range(11), *range(-4, 0))  # small ones more often: the constants are digits
N_SHORT, N_LONG = 12, 28
MBPP_ASSERTS = 3
MAX_DRAWS = 20_000
PROBLEMS_PER_ROUND = 5
FIRST_UNSEEN = 10**6  # number of the first contest problem to evaluate on: no round of the training problems comes so far
MBPP_IDS = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 546), "train": (601, 636)}
Use = Literal["train", "evaluate", "show"]
TRAIN_FORMS: tuple[Form, ...] = ("humaneval", "mbpp", "humaneval", "mbpp", "contest")


class Task(NamedTuple):
    """A composition in one form with its tests, the first of which is short enough to be shown; `mutation` in training tasks alone.

    `remark` is a comment line above its programs, right and wrong.
    """

    composition: Composition
    family: Family
    form: Form
    cases: list[Case]
    mutation: Mutation | None = None
    remark: str = ""


class TaskSource:
    """Draws tasks, no composition twice; what is drawn before `hold_out` is kept out of all that comes later, wrong programs included."""

    def __init__(self, seed: int | str, min_operations: int, max_operations: int):
        if not 1 <= min_operations <= max_operations:
            raise ValueError(f"micro task: expected 1 <= min_operations <= max_operations, found {min_operations} and {max_operations}")
        self.rng = random.Random(seed)
        self.operations = (min_operations, max_operations)
        self.used: set[str] = set()
        self.held_out: frozenset[str] = frozenset()
        self.short = [self.rng.choices(VALUES, k=self.rng.randint(3, SHORT)) for _ in range(300)]
        self.long = [self.rng.choices(VALUES, k=self.rng.randint(SHORT + 1, 8)) for _ in range(700)]
        self.probes = self.short[:20] + self.long[:40]

    def hold_out(self) -> None:
        self.held_out = frozenset(self.used)

    def draw(self, form: Form, family: Family, use: Use) -> Task:
        """A task with a wrong program to train on, one to evaluate on, or one to be shown, which has its first test alone."""
        n_operations = self.rng.randint(*self.operations)
        for _ in range(MAX_DRAWS):
            composition = draw_composition(self.rng, n_operations, family)
            if key(composition) not in self.used and (task := self._admitted(composition, family, form, use)):
                self.used.add(key(composition))
                return task
        raise ValueError(
            f"micro task: no new {family} composition of {n_operations} operations in {MAX_DRAWS} draws ({len(self.used)} are used); "
            f"lower source.data.n_train_compositions or raise source.data.max_operations"
        )

    def _admitted(self, composition: Composition, family: Family, form: Form, use: Use) -> Task | None:
        inputs = self.rng.sample(self.short, N_SHORT) + self.rng.sample(self.long, N_LONG)
        few = form == "mbpp" and use == "evaluate"
        if not (cases := telling_cases(composition, inputs + self.probes if few else inputs)):
            return None
        if use == "show":
            return Task(composition, family, form, cases[:1])
        # One mutation and no second try, admitted as the composition itself was: a retry would favour what is easily admitted.
        mutation = draw_mutation(self.rng, composition) if use == "train" else None
        if mutation and (key(mutation.composition) in self.held_out or not telling_cases(mutation.composition, inputs)):
            return None
        chosen = covering_cases(composition, cases, MBPP_ASSERTS) if few else separating_cases(composition, cases, self.probes)
        if not chosen or (mutation and agrees(mutation.composition, chosen)):
            return None
        return Task(composition, family, form, chosen, mutation)


def key(composition: Composition) -> str:
    return program(composition, "humaneval")


def runs_right(text: str, form: Form, cases: list[Case]) -> list[bool]:
    """Executes one of our own programs on each case."""
    code = compile(text, "<program>", "exec")
    if form != "contest":
        namespace: dict[str, Any] = {}
        exec(code, namespace)
        return [namespace["f"](list(xs)) == value for xs, value in cases]
    verdicts = []
    for xs, value in cases:
        printed: list[str] = []
        exec(code, {"input": lambda xs=xs: stdin(xs), "print": lambda *shown, out=printed: out.append(" ".join(map(str, shown)))})
        verdicts.append(printed == [stdout(value)])
    return verdicts


def stdin(xs: list[int]) -> str:
    return " ".join(map(str, xs))


def stdout(value: Value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def problem_of(task: Task, task_id: str) -> Problem:
    """The task as the readers of the real benchmarks would give it."""
    if task.form == "humaneval":
        prompt = f'def f(xs):\n    """{statement(task.composition)}"""\n'
        asserts = "".join(f"    assert candidate({xs}) == {value}\n" for xs, value in task.cases)
        tests = CheckTests(test=f"\n\ndef check(candidate):\n{asserts}", entry_point="f")
        return Problem(task_id=task_id, source="humaneval", group=task_id, statement="", prompt=prompt, tests=tests)
    if task.form == "mbpp":
        tests = AssertTests(asserts=[f"assert f({xs}) == {value}" for xs, value in task.cases])
        return Problem(task_id=task_id, source="mbpp", group=task_id, statement=statement(task.composition), tests=tests)
    tests = StdioTests(inputs=[stdin(xs) for xs, _ in task.cases], outputs=[stdout(value) for _, value in task.cases], checker="exact")
    words = f"Read one line of integers. {statement(task.composition, 'print')}"
    return Problem(task_id=task_id, source="codecontests", group=task_id, statement=words, tests=tests)


def humaneval_line(task: Task, number: int) -> dict[str, Any]:
    problem = problem_of(task, f"HumanEval/{number}")
    assert all(runs_right(f"{problem.prompt}{body(task.composition)}", "humaneval", task.cases)), problem.task_id
    return {
        "task_id": problem.task_id,
        "prompt": problem.prompt,
        "entry_point": "f",
        "canonical_solution": body(task.composition) + "\n",
        "test": problem.tests.test,
    }


def mbpp_line(task: Task, number: int) -> dict[str, Any]:
    problem, code = problem_of(task, str(number)), program(task.composition, "mbpp")
    assert all(runs_right(code, "mbpp", task.cases)), problem.task_id
    return {
        "text": problem.statement,
        "code": code,
        "task_id": number,
        "test_setup_code": "",
        "test_list": problem.tests.asserts,
        "challenge_test_list": [],
    }


def contest_problem_line(task: Task, number: int) -> dict[str, Any]:
    contest, index = number // PROBLEMS_PER_ROUND + 1, number % PROBLEMS_PER_ROUND
    letter = string.ascii_uppercase[index]
    problem = problem_of(task, f"{contest}_{letter.lower()}")
    return {
        "task_id": problem.task_id,
        "name": f"{contest}_{letter}. {task.family.capitalize()}",
        "cf_contest_id": contest,
        "cf_index": letter,
        "difficulty": str(len(task.composition.operations)),
        "tags": [task.family],
        "instruction": problem.statement,
        "test_cases": {"input": problem.tests.inputs, "output": problem.tests.outputs},
        "checker": problem.tests.checker,
    }


def function_problem_line(task: Task, number: int) -> dict[str, Any]:
    problem = problem_of(task, f"functions/{number + 1}")
    return {
        "task_id": problem.task_id,
        "instruction": instruction_of(problem)[0],
        "test_setup_code": "",
        "tests": [{"call": f"f({xs})", "expected": str(value)} for xs, value in task.cases],
        "group": f"set-{number // PROBLEMS_PER_ROUND + 1}",
        "difficulty": len(task.composition.operations),
    }


def remarks(seed: int, n_digits: int) -> Iterator[str]:
    """Comment lines of random digits; empty where there are none. They come of draws of their own: tasks are the same without them."""
    rng = random.Random(f"remarks-{seed}")
    while True:
        yield f"# {''.join(rng.choices(string.digits, k=n_digits))}\n" if n_digits else ""


def solution_lines(task: Task, task_id: str) -> list[dict[str, Any]]:
    """The right and the wrong program, each with the characters of its own text at which the two first differ.

    A task to evaluate on has no wrong one, and nothing that would lie beside its program.
    """
    if task.mutation is None:
        text = program(task.composition, task.form)
        assert all(runs_right(text, task.form, task.cases)), f"{task_id}: {text}"
        line = {"task_id": task_id, "solution_id": f"{task_id}#right", "output": text, "is_correct": True, "verified": True}
        return [line | {"origin": "synthetic"}]
    right, wrong = (task.remark + program(one, task.form) for one in (task.composition, task.mutation.composition))
    lines = []
    for text, other, span, is_correct in zip((right, wrong), ("wrong", "right"), first_difference(right, wrong), (True, False)):
        passed = runs_right(text, task.form, task.cases)
        assert all(passed) == is_correct, f"{task_id}: {text}"
        line = {"task_id": task_id, "solution_id": f"{task_id}#{'right' if is_correct else 'wrong'}", "output": text}
        origin = "synthetic" if is_correct else f"mutant:{task.mutation.kind}"
        if task.form == "contest":
            faults = [] if is_correct else [text.count("\n", 0, span[0]) + 1]
            line |= {"is_correct": is_correct, "verified": True, "origin": origin, "fault_lines": faults}
            line |= {"tests_passed": [sum(passed), len(passed)]}
        else:
            line |= {"label": "correct" if is_correct else "wrong", "is_correct": is_correct, "origin": origin}
        lines.append({**line, "pair": f"{task_id}#{other}", "span": list(span)})
    return lines


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> int:
    """One JSON object a line, gzip with a fixed header if the name ends in .gz; returns how many."""
    text = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines]
    content = "".join(text).encode()
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return len(text)


def generate(
    out: Path,
    *,
    seed: int,
    n_train_compositions: int,
    n_eval_problems: int,
    min_operations: int,
    max_operations: int,
    remark_digits: int = 0,
) -> dict[str, int]:
    """Writes the folders of wmtp.raw_data under `out`; returns the number of lines of each file.

    Training: one right and one wrong program for each composition. Evaluation: `n_eval_problems` in each of the three benchmarks. No
    composition occurs twice anywhere. ValueError where the grammar has too few compositions, or MBPP's ids (500) too few numbers.
    """
    first, last = MBPP_IDS["test"]
    if not 1 <= n_eval_problems <= last - first + 1:
        raise ValueError(f"micro task: n_eval_problems is {n_eval_problems}; expected 1 to {last - first + 1} (MBPP's test ids)")
    source = TaskSource(seed, min_operations, max_operations)
    families = itertools.cycle(FAMILIES)
    humaneval = [source.draw("humaneval", next(families), "evaluate") for _ in range(n_eval_problems)]
    numbers = [i for name, (low, high) in MBPP_IDS.items() for i in range(low, high + 1) if name != "test" or i < first + n_eval_problems]
    mbpp = [source.draw("mbpp", next(families), "evaluate") for _ in numbers]
    unseen = [source.draw("contest", next(families), "evaluate") for _ in range(n_eval_problems)]
    source.hold_out()
    forms = itertools.cycle(TRAIN_FORMS)
    numbered = track(range(n_train_compositions), "training problems", unit="problems")
    remark = remarks(seed, remark_digits)
    train = [source.draw(next(forms), next(families), "train")._replace(remark=next(remark)) for _ in numbered]
    contests, functions = [task for task in train if task.form == "contest"], [task for task in train if task.form != "contest"]
    assert not source.held_out & {key(text) for task in train for text in (task.composition, task.mutation.composition)}
    return {
        "humaneval": write_lines(out / "humaneval" / "HumanEval.jsonl.gz", map(humaneval_line, humaneval, itertools.count())),
        "mbpp": write_lines(out / "mbpp" / "mbpp.jsonl", map(mbpp_line, mbpp, numbers)),
        **write_folder(out / "codecontests", contests, contest_problem_line),
        **write_folder(out / "functions", functions, function_problem_line),
        **write_folder(out / "codecontests_test", unseen, contest_problem_line, FIRST_UNSEEN),
    }


def write_folder(folder: Path, tasks: list[Task], problem_line: Callable[[Task, int], dict[str, Any]], first: int = 0) -> dict[str, int]:
    """Problems numbered from `first`, so that no two folders share a round."""
    problems = [problem_line(task, number) for number, task in enumerate(tasks, first)]
    solutions = [line for task, problem in zip(tasks, problems) for line in solution_lines(task, problem["task_id"])]
    return {
        f"{folder.name}_problems": write_lines(folder / "problems.jsonl.gz", problems),
        f"{folder.name}_solutions": write_lines(folder / "solutions.jsonl.gz", solutions),
    }


def corpus(seed: int, n: int, *, template: Template = "alpaca", min_operations: int = 1, max_operations: int = 3) -> Iterator[str]:
    """`n` texts, rendered prompt and program, from the same grammar: what a tokenizer is trained on."""
    source = TaskSource(f"corpus-{seed}", min_operations, max_operations)
    for form, family, number in zip(itertools.cycle(TRAIN_FORMS), itertools.cycle(FAMILIES), range(n)):
        task = source.draw(form, family, "show")
        yield render_prompt(*instruction_of(problem_of(task, str(number))), template) + program(task.composition, form)
