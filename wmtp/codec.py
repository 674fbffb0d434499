"""Values between the judge and a program it does not trust, as tagged JSON text.

Decoding builds only values of exact types (None, bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict,
range, slice, Fraction, Decimal), builtin types and a few functions by name, and whatever `resolve` returns for the number of an object
that stays where it was made. No class, code or import ever comes out of a message, and size and depth are bounded before anything is
built. Subclasses cross as the plain value that they extend, so that an overridden `__eq__` stays behind.
"""

import builtins
import json
import struct
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from fractions import Fraction

# Each message on a stream follows its length.
LENGTH = struct.Struct("<I")
MAX_DEPTH = 100
MAX_NODES = 2_000_000
# Adversarial keys make a hash table quadratic; at this number that still ends within seconds.
MAX_KEYS = 50_000
MAX_RANGE = 2_000_000
MAX_INTEGER_BITS = 4_000_000
MAX_DECIMAL_EXPONENT = 10_000
# Larger integers travel as hexadecimal text: decimal conversion is quadratic and limited by the interpreter.
_PLAIN_INTEGER_BITS = 64
_BUILTIN_NAMES = {
    id(value): name
    for name, value in vars(builtins).items()
    if (isinstance(value, type) and not name.startswith("_"))
    or name in ("abs", "len", "max", "min", "ord", "chr", "sum", "sorted", "round")
}


class CodecError(ValueError):
    """A value that cannot cross, or a message outside the format or its bounds."""


_SEQUENCES = {list: "l", tuple: "t", set: "s", frozenset: "f"}
_BASES = (int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict)
_KEYS, _ITEMS = type({}.keys()), type({}.items())


class Encoder:
    """`refer(value)` gives the number under which an object of any other type can be named, or raises CodecError."""

    def __init__(self, refer: Callable[[object], int]) -> None:
        self.refer = refer
        self.nodes = 0

    def encode(self, value: object, depth: int = 0) -> object:
        self.nodes += 1
        if depth > MAX_DEPTH or self.nodes > MAX_NODES:
            raise CodecError(f"value nests deeper than {MAX_DEPTH} levels or holds more than {MAX_NODES} parts")
        kind = type(value)
        if value is None or kind in (bool, str, float):
            return value
        if kind is int:
            return value if value.bit_length() <= _PLAIN_INTEGER_BITS else self._large(value)
        if kind in _SEQUENCES:
            return [_SEQUENCES[kind], [self.encode(item, depth + 1) for item in value]]
        if kind is dict:
            return ["d", [[self.encode(key, depth + 1), self.encode(item, depth + 1)] for key, item in value.items()]]
        return self._rarer(value, kind, depth)

    def _large(self, value: int) -> object:
        if value.bit_length() > MAX_INTEGER_BITS:
            raise CodecError(f"integer of more than {MAX_INTEGER_BITS} bits")
        return ["i", format(value, "x")]

    def _rarer(self, value: object, kind: type, depth: int) -> object:
        if kind is complex:
            return ["c", value.real, value.imag]
        if kind in (bytes, bytearray):
            return ["b" if kind is bytes else "B", value.hex()]
        if kind in (range, slice):
            return ["r" if kind is range else "S", [self.encode(part, depth + 1) for part in (value.start, value.stop, value.step)]]
        if kind in (_KEYS, _ITEMS):
            return self.encode(set(value), depth)
        if kind is Fraction:
            return ["q", self.encode(value.numerator, depth + 1), self.encode(value.denominator, depth + 1)]
        if kind is Decimal:
            return ["D", str(value)]
        if isinstance(value, type) or kind is type(len):
            name = _BUILTIN_NAMES.get(id(value))
            return ["n", name] if name else ["h", self.refer(value)]
        for base in _BASES:
            if issubclass(kind, base):
                return self.encode(_plain(value, base), depth)
        return ["h", self.refer(value)]


def _plain(value: object, base: type) -> object:
    """The exact `base` value inside a subclass instance, past every method that the subclass overrides."""
    if base in (int, float, complex):
        return base.__pos__(value)
    if base is str:
        return str.__str__(value)
    if base in (bytes, bytearray):
        return base.__add__(value, b"")
    if base is dict:
        return dict(dict.items(value))
    return base(base.__iter__(value))


def encode(value: object, refer: Callable[[object], int]) -> object:
    try:
        return Encoder(refer).encode(value)
    except RecursionError:
        raise CodecError("value nests too deeply") from None


class Decoder:
    """`resolve(number)` gives what stands for the object of that number on this side."""

    def __init__(self, resolve: Callable[[int], object]) -> None:
        self.resolve = resolve
        self.nodes = 0
        self.keys = 0

    def decode(self, form: object, depth: int = 0) -> object:
        self.nodes += 1
        if depth > MAX_DEPTH or self.nodes > MAX_NODES:
            raise CodecError("message exceeds the bounds on depth or parts")
        if form is None or type(form) in (bool, int, float, str):
            return form
        if type(form) is not list or not form or type(form[0]) is not str:
            raise CodecError("message is not in the format")
        return self._tagged(form[0], form[1:], depth)

    def _tagged(self, tag: str, parts: list, depth: int) -> object:
        match tag, parts:
            case (("l" | "t" | "s" | "f"), [list() as items]):
                values = [self.decode(item, depth + 1) for item in items]
                return values if tag == "l" else tuple(values) if tag == "t" else self._hashed(values, set if tag == "s" else frozenset)
            case "d", [list() as pairs] if all(type(pair) is list and len(pair) == 2 for pair in pairs):
                return self._hashed([(self.decode(key, depth + 1), self.decode(item, depth + 1)) for key, item in pairs], dict)
            case "i", [str() as digits] if len(digits) <= MAX_INTEGER_BITS // 4 + 2:
                return self._parsed(lambda: int(digits, 16))
            case "c", [float() as real, float() as imaginary]:
                return complex(real, imaginary)
            case (("b" | "B"), [str() as digits]):
                return self._parsed(lambda: (bytes if tag == "b" else bytearray).fromhex(digits))
            case (("r" | "S"), [[_, _, _] as bounds]):
                return self._span(tag, [self.decode(bound, depth + 1) for bound in bounds])
            case "q", [numerator, denominator]:
                return self._parsed(lambda: Fraction(self.decode(numerator, depth + 1), self.decode(denominator, depth + 1)))
            case "D", [str() as text]:
                return self._decimal(text)
            case "n", [str() as name] if any(name == known for known in _BUILTIN_NAMES.values()):
                return getattr(builtins, name)
            case "h", [int() as number]:
                return self.resolve(number)
        raise CodecError("message is not in the format")

    def _hashed(self, items: list, kind: type) -> object:
        self.keys += len(items)
        if self.keys > MAX_KEYS:
            raise CodecError(f"sets and dictionaries of more than {MAX_KEYS} keys")
        return self._parsed(lambda: kind(items))

    def _span(self, tag: str, bounds: list) -> object:
        if tag == "S":
            return slice(*bounds)
        made = self._parsed(lambda: range(*bounds))
        if abs(made.stop - made.start) // abs(made.step) > MAX_RANGE:
            raise CodecError(f"range of more than {MAX_RANGE} items")
        return made

    def _decimal(self, text: str) -> Decimal:
        made = self._parsed(lambda: Decimal(text))
        if made.is_finite() and abs(made.adjusted()) > MAX_DECIMAL_EXPONENT:
            raise CodecError(f"decimal exponent beyond {MAX_DECIMAL_EXPONENT}")
        return made

    def _parsed(self, build: Callable[[], object]) -> object:
        try:
            return build()
        except (ValueError, TypeError, ZeroDivisionError, InvalidOperation) as error:
            raise CodecError(f"message is not in the format: {error}") from None


def decode(form: object, resolve: Callable[[int], object]) -> object:
    try:
        return Decoder(resolve).decode(form)
    except RecursionError:
        raise CodecError("message nests too deeply") from None


_COMPACT, _PLAIN = json.JSONEncoder(separators=(",", ":")), json.JSONDecoder()


def dumps(message: object) -> bytes:
    return _COMPACT.encode(message).encode("ascii")


def loads(body: bytes) -> object:
    try:
        return _PLAIN.decode(str(body, "ascii"))
    except (ValueError, RecursionError) as error:
        raise CodecError(f"message is not JSON: {str(error)[:80]}") from None
