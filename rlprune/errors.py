"""The one exception that rlprune raises for what the caller can mend."""

import math
from collections.abc import Iterable


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
