"""The named comparisons of a program's output with the expected one. All ignore white space at the ends of lines and of the text."""

import math
from collections.abc import Callable

_TOLERANCE = 1e-6


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def exact(found: str, expected: str) -> bool:
    return _lines(found) == _lines(expected)


def token(found: str, expected: str) -> bool:
    return found.split() == expected.split()


def token_caseless(found: str, expected: str) -> bool:
    return found.casefold().split() == expected.casefold().split()


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in text else None


def _near(found: str, expected: str) -> bool:
    if found == expected:
        return True
    left, right = _number(found), _number(expected)
    return left is not None and right is not None and abs(left - right) <= _TOLERANCE * max(1.0, abs(right))


def token_float(found: str, expected: str) -> bool:
    """Tokens equal, or both numbers within 1e-6, absolute or relative."""
    mine, theirs = found.split(), expected.split()
    return len(mine) == len(theirs) and all(map(_near, mine, theirs))


# "unverified" marks problems whose own reference fails its stored outputs; they are compared like any other and kept out of scores by
# the self-check.
CHECKERS: dict[str, Callable[[str, str], bool]] = {
    "exact": exact,
    "token": token,
    "token-caseless": token_caseless,
    "token-float1e-6": token_float,
    "unverified": token,
}
