"""Imports point one way: the order of packages is the table in docs/architecture.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import cqil_dist

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "cqil_dist"
ROW = re.compile(r"^\| `(?P<package>[\w.]+)` \| (?P<imports>.*?) \|", re.MULTILINE)


def documented() -> dict[str, frozenset[str]]:
    """The packages that each package may import, in the order of the table: lowest first."""
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    _, _, after = text.partition("## Directions of import")
    return {
        row["package"]: frozenset(re.findall(r"`([\w.]+)`", row["imports"]))
        for row in ROW.finditer(after.partition("\n## ")[0])
    }


ORDER = documented()


def package_of(module: str) -> str:
    """The table's row that a module belongs to: its folder, or itself at the top level."""
    first = module.split(".")[1] if "." in module else module
    return first if first in ORDER else f"not in the table: {module}"


def modules() -> Iterator[tuple[str, Path]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        if file != PACKAGE / "__init__.py":  # names every public one, and imports them when asked
            parts = file.relative_to(REPOSITORY).with_suffix("").parts
            yield ".".join(part for part in parts if part != "__init__"), file


def imported(file: Path) -> Iterator[str]:
    """Modules of the package that a file imports: at the top, in functions, and for types."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("cqil_dist."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cqil_dist"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = (REPOSITORY / whole.replace(".", "/")).with_suffix(".py").is_file()
                yield whole if is_module else node.module or ""


def test_the_table_names_every_package_and_points_one_way() -> None:
    there = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert set(ORDER) == there - {"__init__"}
    below: set[str] = set()
    for package, imports in ORDER.items():
        assert imports <= below, f"{package} may import only what stands above it in the table"
        below.add(package)


@pytest.mark.parametrize("package", ORDER)
def test_a_package_imports_what_the_table_says_and_all_of_it(package: str) -> None:
    found: dict[str, str] = {}
    for module, file in modules():
        if package_of(module) == package:
            found |= {package_of(name): module for name in imported(file)}
    found.pop(package, None)
    wrong = {name: module for name, module in found.items() if name not in ORDER[package]}
    assert not wrong, f"{package} imports what the table does not have, from the modules named"
    assert set(found) == ORDER[package], f"the table has imports that {package} does without"


def test_no_modules_import_each_other_in_a_circle() -> None:
    files = dict(modules())
    graph = {
        module: {name for name in imported(file) if name in files} - {module}
        for module, file in files.items()
    }
    while leaves := [module for module, names in graph.items() if not names]:
        for leaf in leaves:
            del graph[leaf]
        for names in graph.values():
            names.difference_update(leaves)
    assert not graph, f"these modules import each other, or what does: {sorted(graph)}"


def test_the_top_level_holds_vocabulary_only() -> None:
    assert len(list(PACKAGE.glob("[!_]*.py"))) <= 12


def test_no_package_bears_a_public_name() -> None:
    """`import cqil_dist.launch` would otherwise hide the function `cqil_dist.launch`."""
    names = {part for module, _ in modules() for part in module.split(".")[1:2]}
    assert not names & set(cqil_dist.__all__)
