"""Settings: the fields of a config, each declared once with its meaning and its limits.

A config is a frozen dataclass whose fields say, beside their defaults, what they mean and what they
may be. Its constructor holds them to that, the command line makes an option of each, and the tables
of options in docs/ are written from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

_KEY = "setting"
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Rule:
    """A rule that the values of a setting keep to; as text, it completes "must be".

    Attributes:
        kind: what they are, such as "a whole number"; "" for names.
        limits: which of these they are, such as "at least 1".
        admits: whether a value keeps to the rule.
    """

    kind: str
    limits: str
    admits: Callable[[Any], bool]

    def __str__(self) -> str:
        return f"{self.kind}, {self.limits}" if self.kind else self.limits


def whole(low: int, high: int | None = None) -> Rule:
    """Make the rule of whole numbers from `low` to `high`, both included, or from `low` on."""
    limits = f"at least {low}" if high is None else f"from {low} to {high}"
    last = math.inf if high is None else high
    return Rule("a whole number", limits, lambda n: _is_number(n, int) and low <= n <= last)


def number(*, zero: bool = False, infinity: bool = False) -> Rule:
    """Make the rule of numbers above 0, with 0 itself or infinity where these mean something."""

    def admits(value: Any) -> bool:
        allowed = (zero and value == 0) or (infinity and value == math.inf)
        return _is_number(value, int | float) and (allowed or 0 < value < math.inf)

    kind = "a number" if infinity else "a finite number"
    return Rule(kind, "at least 0" if zero else "above 0", admits)


def one_of(*names: str) -> Rule:
    """Make the rule of some names and no others."""
    return Rule("", f"one of {', '.join(names)}", lambda name: name in names)


def _is_number(value: object, kind: Any) -> bool:
    """Return whether a value is of this kind; a bool is no number, though Python says it is."""
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The description that a field of a config carries.

    Attributes:
        help: a sentence that says what its value means.
        rule: what its value may be; None where the type says all. A default of None is admitted.
        unset: what holds in place of a default of None.
        short: its one-letter flag on a command line.
        envvar: the environment variable that gives it to a command.
        secret: kept out of the config's `repr`.
        is_option: whether commands have it.
        default: its value where none is given; ... where one has to be.
    """

    help: str
    rule: Rule | None = None
    unset: str | None = None
    short: str | None = None
    envvar: str | None = None
    secret: bool = False
    is_option: bool = True
    default: Any = ...

    def require(self, name: str, value: object, error: type[Exception]) -> None:
        """Raise `error` for a value that the rule does not admit.

        Args:
            name: of the field.
        """
        left_open = value is None and self.default is None
        if not (self.rule is None or left_open or self.rule.admits(value)):
            raise error(f"{name} is {value!r} but must be {self.rule}")


def setting(default: _Value, help: str, rule: Rule | None = None, **said: Any) -> _Value:
    """Make a field of a config, with a default. The other arguments are `Setting`'s attributes."""
    declared = Setting(help=help, rule=rule, default=default, **said)
    found: _Value = field(default=default, repr=not declared.secret, metadata={_KEY: declared})
    return found


def required(help: str, **said: Any) -> dict[str, Setting]:
    """Make the metadata of a field of a config that has no default."""
    return {_KEY: Setting(help=help, **said)}


def settings_of(config: type[Any]) -> dict[str, Setting]:
    """Return a config's settings by the names of their fields, in its constructor's order."""
    ordered: list[Field[Any]] = sorted(fields(config), key=lambda field: field.kw_only is True)
    return {field.name: field.metadata[_KEY] for field in ordered if _KEY in field.metadata}


def check_settings(config: Any, error: type[Exception]) -> None:
    """Hold a config to the rules of its settings.

    Raises:
        error: naming the first setting that breaks its rule, its value and the rule.
    """
    for name, declared in settings_of(type(config)).items():
        declared.require(name, getattr(config, name), error)
