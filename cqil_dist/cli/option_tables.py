"""Tables of options in Markdown, made from the settings that the options themselves are made of.

`python -m cqil_dist.cli.option_tables FILE ...` writes the tables of documents anew. A table stands
between the lines `<!-- options: LaunchConfig -->` and `<!-- end of options -->`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from cqil_dist.cli.setting_option import flags_of
from cqil_dist.launching.config import LaunchConfig
from cqil_dist.serving.serve_config import ServeConfig
from cqil_dist.settings import Setting, settings_of

_CONFIGS: dict[str, type[Any]] = {config.__name__: config for config in (LaunchConfig, ServeConfig)}
_TABLE = re.compile(
    r"(?<=<!-- options: )(?P<config>\w+)( -->\n).*?(?=<!-- end of options -->)", re.DOTALL
)


def with_tables(text: str) -> str:
    """Return a document with its tables as the settings have them now."""
    return _TABLE.sub(lambda found: f"{found['config']}{found[2]}{_table(found['config'])}", text)


def _table(config: str) -> str:
    rows = [
        _row(flags_of(_CONFIGS[config], name), setting)
        for name, setting in settings_of(_CONFIGS[config]).items()
        if setting.is_option
    ]
    return "\n".join(["| option | default | meaning | limits |", "|---|---|---|---|", *rows, ""])


def _row(flags: tuple[str, ...], setting: Setting) -> str:
    spelt = ", ".join(f"`{flag}`" for flag in flags)
    if setting.envvar is not None:
        spelt += f", `{setting.envvar}`"
    limits = "" if setting.rule is None else setting.rule.limits
    return f"| {spelt} | {_default(setting)} | {setting.help} | {limits} |"


def _default(setting: Setting) -> str:
    if setting.default is ...:
        return "must be given"
    if setting.default is None:
        return setting.unset or "none"
    if isinstance(setting.default, bool):
        return "on" if setting.default else "off"
    return f"`{setting.default}`"


if __name__ == "__main__":
    for document in map(Path, sys.argv[1:]):
        document.write_text(with_tables(document.read_text(encoding="utf-8")), encoding="utf-8")
