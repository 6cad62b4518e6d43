"""The one exception that rlprune raises for what the caller can mend."""

import math
from collections.abc import Iterable
from numbers import Integral
from typing import Any


class InputError(ValueError):
    """Bad input, said in one sentence: what is wrong, where, and what to do.

    The command line prints the sentence alone and exits with status 2.
    """

    def _render_traceback_(self) -> list[str]:
        """IPython's hook: a notebook, too, shows the sentence alone."""
        return [f"InputError: {self}"]


def one_of(kind: str, name: object, known: Iterable[object]) -> None:
    """Raise `InputError` unless ``name`` is among ``known``; the sentence lists what is."""
    known = list(known)
    if name not in known:
        raise InputError(f"Unknown {kind} {name!r}. Use one of: {', '.join(map(str, known))}.")


def named(given: object, what: str) -> dict[str, Any]:
    """Options by name, none for None; raise `InputError` for anything but a dict."""
    if not isinstance(given, dict | None):
        raise InputError(f"{what} must be a dict of options by name, not {type(given).__name__}.")
    return given or {}


def whole(value: object, what: str, least: int = 0) -> None:
    """Raise `InputError` unless the value is a whole number of at least ``least``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise InputError(f"{what} must be a whole number of at least {least}, not {value!r}.")


def whole_each(**values: tuple[object, int]) -> None:
    """Raise `InputError` unless each value is a whole number; by name, the value and the least that it may be."""
    for name, (value, least) in values.items():
        whole(value, name, least)


def finite(value: object, what: str, least: float = float("-inf")) -> float:
    """The value as a float; raise `InputError` unless it is a finite number of at least ``least``."""
    try:
        number = math.nan if isinstance(value, str) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # the last from tensors of several elements
        number = math.nan
    if not math.isfinite(number) or number < least:
        bound = "" if math.isinf(least) else f" of at least {least:g}"
        raise InputError(f"{what} must return a finite number{bound}, not {value!r}.")
    return number


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
