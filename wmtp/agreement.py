"""Whether an answer agrees with a reference's, as EvalPlus 0.3.1 decides it (Liu et al. 2023, arXiv 2305.01210).

Runs in the referee on values that the codec has built, so it imports the standard library alone. Equal answers agree. Where the problem
has a tolerance, or its reference answers with floats (then 1e-6), answers of the same type agree within atol + 1e-7 |expected|. A few
problems have several right answers: they have an oracle by name.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable

from wmtp import codec

_RELATIVE, _FLOATS = 1e-7, 1e-6
# Longer answers are kept as a digest where only equality counts: some references print a megabyte a call.
_LONGEST_FORM = 4096


def same_items(given: list, found: object, expected: object) -> bool:
    return set(found) == set(expected)


def present(given: list, found: object, expected: object) -> bool:
    """`expected` says whether the reference answers anything but None."""
    return found == expected if type(found) is bool else (found is not None) == expected


def or_zero(given: list, found: object, expected: object) -> bool:
    return found in (expected, 0)


def padded_digits(given: list, found: object, expected: object) -> bool:
    """Mbpp/558: sum of the digits' differences, the shorter number filled with zeros."""
    width = max(len(str(number)) for number in given)
    pairs = zip(*(str(number).zfill(width) for number in given))
    return found == expected or found == sum(abs(int(left) - int(right)) for left, right in pairs)


def pyramid(given: list, found: object, expected: object) -> bool:
    """Mbpp/581: surface of a square pyramid, its height read as that of the apex above the base."""
    edge, height = given
    return found == expected or found == round(edge**2 + 2 * edge * math.hypot(edge / 2, height))


ORACLES: dict[str, Callable[[list, object, object], bool]] = {
    "equal": lambda given, found, expected: found == expected,
    "anything": lambda given, found, expected: True,
    "same-items": same_items,
    "present": present,
    "or-zero": or_zero,
    "padded-digits": padded_digits,
    "pyramid": pyramid,
}


def root(given: list, found: float, atol: float) -> bool:
    """HumanEval/32: any zero of the polynomial whose coefficients are given, lowest first."""
    return abs(sum(coefficient * math.pow(found, power) for power, coefficient in enumerate(given[0]))) <= atol


def floats(value: object) -> bool:
    return type(value) is float or (type(value) in (list, tuple) and bool(value) and all(type(item) is float for item in value))


def close(found: object, expected: object, atol: float) -> bool:
    """Numbers within the tolerance, in sequences of equal shape; infinities agree with themselves, nan with nothing."""
    if isinstance(expected, int | float | complex) and isinstance(found, int | float | complex):
        return found == expected or abs(found - expected) <= atol + _RELATIVE * abs(expected) < math.inf
    if isinstance(expected, list | tuple) and isinstance(found, list | tuple):
        return len(found) == len(expected) and all(close(left, right, atol) for left, right in zip(found, expected))
    return False


def agree(given: list, found: object, expected: object, atol: float, oracle: str) -> bool:
    if oracle == "root":
        return root(given, found, atol)
    if ORACLES[oracle](given, found, expected):
        return True
    tolerance = atol or (_FLOATS if floats(expected) else 0.0)
    return tolerance > 0 and type(found) is type(expected) and close(found, expected, tolerance)


def _spelled(value: object) -> str:
    """Equal for equal values and for no others; TypeError where that cannot be said of the type."""
    kind = type(value)
    if kind is str:
        return f"s{len(value)}:{value}"
    if value is None or kind in (bool, int):
        return "none" if value is None else hex(value)
    if kind is float and not math.isnan(value):
        return hex(int(value)) if value.is_integer() else value.hex()
    if kind in (list, tuple):
        return f"{kind.__name__}[{','.join(map(_spelled, value))}]"
    raise TypeError(f"no digest of {kind.__name__}")


def digest(value: object) -> str:
    return hashlib.sha256(_spelled(value).encode("utf-8", "surrogatepass")).hexdigest()


def stored(form: object, value: object, atol: float, oracle: str) -> list:
    """What is kept of an expected `value` whose codec form is `form`: ["value", form], or ["digest", hex] where long and only equal."""
    if oracle == "equal" and not atol and not floats(value) and len(json.dumps(form)) > _LONGEST_FORM:
        try:
            return ["digest", digest(value)]
        except TypeError:
            pass
    return ["value", form]


def nothing(number: int) -> object:
    raise codec.CodecError("an object in a test")


@functools.lru_cache(maxsize=16)
def checker(payload: str) -> Callable[[Callable], None]:
    """check(candidate) over JSON {atol, oracle, cases: [[arguments as a codec form, stored], ...]}; fails at the first disagreement."""
    fields = json.loads(payload)
    cases = [
        (codec.decode(given, nothing), kind, codec.decode(kept, nothing) if kind == "value" else kept)
        for given, (kind, kept) in fields["cases"]
    ]

    def check(candidate: Callable) -> None:
        for number, (given, kind, kept) in enumerate(cases, 1):
            found = candidate(*given)
            same = digest(found) == kept if kind == "digest" else agree(given, found, kept, fields["atol"], fields["oracle"])
            assert same, f"input {number} of {len(cases)}"

    return check
