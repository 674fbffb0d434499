"""The program of one sample as a trusted test sees it: names resolve to values, to trusted modules, or to objects that stay there."""

import builtins
import importlib
import secrets
import types

from wmtp import codec
from wmtp.sandbox import Ended, Sample

# What tests name of the program's imports; importing these has no effect but the names.
_MODULES = frozenset(
    [
        "bisect",
        "calendar",
        "cmath",
        "collections",
        "copy",
        "datetime",
        "decimal",
        "fractions",
        "functools",
        "heapq",
        "itertools",
        "json",
        "math",
        "numbers",
        "operator",
        "random",
        "re",
        "statistics",
        "string",
        "sys",
        "time",
        "typing",
    ]
)
_RAISABLE = {
    kind.__name__: kind
    for kind in (
        ArithmeticError, AssertionError, AttributeError, EOFError, IndexError, KeyError, LookupError, NameError, NotImplementedError,
        OSError, OverflowError, RecursionError, RuntimeError, StopIteration, TypeError, ValueError, ZeroDivisionError,
    )
}  # fmt: skip


class Raised(Exception):
    """What the program raised, as its name and text."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}" if text else name)
        self.name, self.text = name, text

    def as_standard(self) -> Exception:
        """Under its own name where that is a standard one, so that a test which expects it meets it."""
        error = _RAISABLE.get(self.name, RuntimeError)(self.text)
        error.of_sample = str(self)
        return error


class CannotCross(Exception):
    """A test passes the program something that exists on this side alone."""


class Remote:
    """An object that stays in the sample. Equal to itself alone: the program's own `__eq__` is never asked."""

    def __init__(self, session: "Session", number: int) -> None:
        self.__dict__.update(_session=session, _number=number)

    def __call__(self, *arguments: object, **keywords: object) -> object:
        return self._session.apply("call", self, *arguments, **keywords)

    def __iter__(self):
        return iter(self._session.apply("list", self))

    def __len__(self) -> int:
        return self._session.apply("len", self)

    def __bool__(self) -> bool:
        return self._session.apply("bool", self) is True

    def __str__(self) -> str:
        return self._session.apply("str", self)

    def __getitem__(self, key: object) -> object:
        return self._session.apply("item", self, key)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._session.apply("attribute", self, name)

    def __setattr__(self, name: str, value: object) -> None:
        self._session.apply("assign", self, name, value)


class Session:
    """The program of one sample as the tests see it. `load` and `run` raise Raised, `resolve` and `apply` a standard exception."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.cannot_cross: CannotCross | None = None  # remembered, since a test may swallow it
        self.asked = 0  # requests so far
        self.named: list[types.ModuleType] = []  # modules that the program has where a test expects a name of its own

    def resolve_number(self, number: int) -> Remote:
        return Remote(self, number)

    def ask(self, message: dict) -> object:
        """The value in the answer."""
        self.asked += 1
        answer = self.sample.request(message)
        if type(answer.get("raised")) is str:
            raise self.raised(answer["raised"][:60], str(answer.get("text"))[:200])
        if answer.get("missing") is True:
            raise Raised("NameError", f"name {message['name']!r} is not defined")
        if "value" not in answer:
            self.sample.end(Ended("crash", "not an answer"))
        return answer["value"]

    def raised(self, name: str, text: str) -> Raised:
        if name == "MemoryError":
            self.sample.end(Ended("memory", f"more than {self.sample.limits.memory_mb} MB"))
        if name == "CodecError":
            self.sample.end(Ended("output-limit", text))
        return Raised(name, text)

    def value(self, form: object) -> object:
        try:
            return codec.decode(form, self.resolve_number)
        except codec.CodecError as error:
            self.sample.end(Ended("output-limit", str(error)))

    def load(self, program: str, standalone: bool = False) -> None:
        self.ask({"op": "load", "program": program, "standalone": standalone})

    def run(self, source: str) -> None:
        nonce = secrets.token_hex(16)
        if self.ask({"op": "run", "source": source, "nonce": nonce}) != nonce:
            self.sample.end(Ended("crash", "not an answer"))

    def resolve(self, name: str) -> object:
        try:
            form = self.ask({"op": "resolve", "name": name})
        except Raised as raised:
            raise raised.as_standard() from None
        if type(form) is list and form and form[0] == "m":
            self.named.append(trusted_module(form[-1]))
            return self.named[-1]
        return self.value(form)

    def apply(self, operation: str, *arguments: object, **keywords: object) -> object:
        message = {
            "op": "apply",
            "operation": operation,
            "arguments": [self.form(argument) for argument in arguments],
            "keywords": {name: self.form(value) for name, value in keywords.items()},
        }
        try:
            return self.value(self.ask(message))
        except Raised as raised:
            raise raised.as_standard() from None

    def form(self, value: object) -> object:
        return codec.encode(value, self.number_of)

    def number_of(self, value: object) -> int:
        if type(value) is Remote and value._session is self:
            return value._number
        if any(value is module for module in self.named):
            raise TypeError(f"the program has a module, {value.__name__}, where the test passes a value")
        self.cannot_cross = CannotCross(f"a value of type {type(value).__name__}")
        raise self.cannot_cross


def trusted_module(name: object) -> types.ModuleType:
    """This side's own module where the program imported one of the standard library."""
    if type(name) is str and name in _MODULES:
        return importlib.import_module(name)
    raise KeyError(name)


class Names(dict):
    """Globals of a trusted test: its own names first, builtins next, and what is left, or named in `subjects`, comes from the program."""

    def __init__(self, session: Session, subjects: frozenset[str] = frozenset()) -> None:
        super().__init__(__name__="test", __builtins__=builtins)
        self.session = session
        self.subjects = subjects

    def __missing__(self, name: str) -> object:
        if hasattr(builtins, name) and name not in self.subjects:
            raise KeyError(name)
        self[name] = value = self.session.resolve(name)
        return value
