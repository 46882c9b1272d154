"""The command-line option of a setting: its flags, its type, its help and its check."""

from __future__ import annotations

from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer

from cqil_dist.errors import ConfigError
from cqil_dist.settings import Setting, settings_of

_SHELL_TYPES = (bool, int, float, str, Path)


def option_of(config: type[Any], name: str, **more: Any) -> Any:
    """Make a setting's option for typer; its rule is checked when options are read.

    Args:
        more: further arguments of `typer.Option`.
    """
    setting = settings_of(config)[name]

    def check(value: Any) -> Any:
        if value is not None:
            setting.require(name, value, ConfigError)
        return value

    return typer.Option(
        *flags_of(config, name),
        help=help_of(setting),
        envvar=setting.envvar,
        show_default=setting.unset or True,
        callback=check,
        **more,
    )


def help_of(setting: Setting) -> str:
    """Return the sentence that says what a setting means, and its limits after it."""
    limits = "" if setting.rule is None else setting.rule.limits
    return f"{setting.help} {limits[0].upper()}{limits[1:]}." if limits else setting.help


def flags_of(config: type[Any], name: str) -> tuple[str, ...]:
    """Return how a setting is spelt on a command line, its long flag first."""
    setting, flag = settings_of(config)[name], name.replace("_", "-")
    can_be_off = bool in _kinds(config, name) and setting.default is not False
    long = f"--{flag}/--no-{flag}" if can_be_off else f"--{flag}"
    return (long, setting.short) if setting.short else (long,)


def shell_type(config: type[Any], name: str) -> Any:
    """Return the type of a setting as far as a shell can give its values."""
    kinds = _kinds(config, name)
    kind = next((kind for kind in kinds if kind in _SHELL_TYPES), kinds[0])
    return kind | None if NoneType in kinds else kind


def _kinds(config: type[Any], name: str) -> tuple[Any, ...]:
    """Return the members of a setting's type, or that type alone where it is no union."""
    hint = get_type_hints(config)[name]
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
