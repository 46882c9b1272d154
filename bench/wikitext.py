"""Makes two texts of WikiText-2's raw validation file: to fit plans to, and to evaluate them on.

    python bench/wikitext.py wiki.valid.raw -o text/    # writes text/fit.txt, text/held_out.txt

The file's tokens are set apart by blanks ("WikiText @-@ 2 ( raw ) , 'valid '"), unlike ordinary
text; the blanks are removed. The two texts are halves of the file, of different articles.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

_ARTICLE = re.compile(r"^ = [^=].* = $", flags=re.MULTILINE)
# Patterns and their replacements, in order.
_JOINED = (
    (r" @([-,.])@ ", r"\1"),
    (r" ([,.;:!?%)\]])", r"\1"),
    (r"([(\[$£]) ", r"\1"),
    (r" '(s|t|re|ve|ll|d|m)\b", r"'\1"),
    (r' " ([^"\n]*?) " ', r' "\1" '),
    (r" n't", r"n't"),
    (r"(?m)^ (= )+(.*?)( =)+ ?$", r"\2"),
    (r"(?m)^ ", ""),
    (r"\n\s*\n+", "\n\n"),
)


def main(
    source: Annotated[Path, typer.Argument(help="wiki.valid.raw, or another raw WikiText file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder.")] = Path("text"),
) -> None:
    """Write the halves of a raw WikiText file as plain text."""
    text = source.read_text(encoding="utf-8")
    articles = [found.start() for found in _ARTICLE.finditer(text)]
    if not (later := [start for start in articles if start >= len(text) // 2]):
        raise typer.BadParameter(f"{source} has no article heading (' = Title = ') in its 2nd half")
    output.mkdir(parents=True, exist_ok=True)
    for name, half in (("fit", text[: later[0]]), ("held_out", text[later[0] :])):
        for pattern, joined in _JOINED:
            half = re.sub(pattern, joined, half)
        (output / f"{name}.txt").write_text(half, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
