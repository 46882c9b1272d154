"""Which layers run concurrently: the plan.

A plan is the model's layers cut into consecutive groups. The members of a group all take the
group's input and run at the same time; a bypass says which attention outputs of its own group a
member's feed-forward part sees (CQIL, arXiv 2404.06709). This module knows nothing of ranks,
tensors or models beyond their number of layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cqil_dist.errors import PlanError

_NOTATION = re.compile(
    r"P(?P<P>\d+)\s+S(?P<S>\d+)\s+E(?P<E>\d+)\s+D(?P<D>\d+|full|parallel)", re.IGNORECASE
)

# "measured" says how the plan was found, and with which text: see recommended/record.py and
# planning/provenance.py, which decide by it. `Plan` itself has no use for it.
_KEYS = {"groups", "num_layers", "measured"}


@dataclass(frozen=True)
class Bypass:
    """A rule that says which attention outputs of its group a member's feed-forward part takes.

    One mask serves all four kinds: member j (counted from 0 in a group of p) sees the members
    in `visible(j, p)`. A distance d sees {max(0, j-d) .. j}; "full" is {0 .. p-1} ("layer
    parallelism", arXiv 2502.02790); "parallel" is {} (GPT-J style).
    """

    kind: str
    distance: int = 0

    @classmethod
    def parse(cls, value: object) -> Bypass:
        """Read 0, 1, 2 ..., "0", "full" or "parallel". Raises PlanError for anything else."""
        if isinstance(value, Bypass):
            return value
        if isinstance(value, str):
            text = value.strip().lower()
            if text in ("full", "parallel"):
                return cls(text)
            if text.isdecimal():
                return cls("distance", int(text))
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return cls("distance", value)
        raise PlanError(f"bypass {value!r} is not a distance (0, 1, 2 ...), 'full' or 'parallel'")

    def visible(self, member: int, size: int) -> range:
        """Return the members of a group of `size` whose attention `member`'s feed-forward sees."""
        if self.kind == "parallel":
            return range(0)
        if self.kind == "full":
            return range(size)
        return range(max(0, member - self.distance), member + 1)

    def to_json(self) -> int | str:
        return self.distance if self.kind == "distance" else self.kind

    def __str__(self) -> str:
        return str(self.to_json())


NO_BYPASS = Bypass("distance", 0)


@dataclass(frozen=True)
class Group:
    """A run of consecutive layers that take the same input and run concurrently."""

    layers: tuple[int, ...]
    bypass: Bypass = NO_BYPASS

    @property
    def size(self) -> int:
        return len(self.layers)

    @property
    def is_exact(self) -> bool:
        """Return whether this is one layer, computed as it was trained."""
        return self.size == 1 and list(self.visible(0)) == [0]

    def visible(self, member: int) -> range:
        """Return the members whose attention output the feed-forward part of `member` takes."""
        return self.bypass.visible(member, self.size)

    def to_json(self) -> dict[str, Any]:
        return {"layers": list(self.layers), "bypass": self.bypass.to_json()}


@dataclass(frozen=True)
class Plan:
    """A division of a model's `num_layers` layers into groups, in order.

    Raises PlanError where groups overlap, leave a layer out, or name one the model lacks.
    """

    groups: tuple[Group, ...]
    num_layers: int

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise PlanError(f"the model has {self.num_layers} layers, but a plan needs at least 1")
        expected = 0
        for index, group in enumerate(self.groups):
            _check_group(index, group, self.num_layers)
            if group.layers[0] != expected:
                raise PlanError(
                    f"group {index} starts at layer {group.layers[0]} where layer {expected} comes "
                    "next; groups hold every layer once, in order"
                )
            expected = group.layers[-1] + 1
        if expected != self.num_layers:
            raise PlanError(
                f"the last group ends at layer {expected - 1} but the model has {self.num_layers} "
                "layers; groups hold every layer once, in order"
            )

    @classmethod
    def sequential(cls, num_layers: int) -> Plan:
        """Return the plan of the original model: every layer is a group of its own."""
        return cls(tuple(Group((layer,)) for layer in range(num_layers)), num_layers)

    @classmethod
    def span(cls, size: int, start: int, end: int, bypass: Bypass, num_layers: int) -> Plan:
        """Make the paper's regular plan: layers start .. end-1 in groups of `size`.

        The span's last group is shorter where `size` does not divide it; layers outside the span
        stay sequential. Raises PlanError for an empty group size or a span outside the model.
        """
        notation = f"P{size} S{start} E{end} D{bypass}"
        if size < 1:
            raise PlanError(f"{notation}: P is {size}, but a group holds at least 1 layer")
        if not 0 <= start < end:
            raise PlanError(
                f"{notation}: S is {start} and E is {end}, but S (first grouped layer) must be "
                "below E (first layer after the span)"
            )
        if end > num_layers:
            raise PlanError(
                f"{notation}: E is {end} but the model has {num_layers} layers "
                f"(E may be {num_layers} at most)"
            )
        grouped = [
            Group(tuple(range(first, min(first + size, end))), bypass)
            for first in range(start, end, size)
        ]
        return cls.covering(grouped, num_layers)

    @classmethod
    def covering(cls, groups: Sequence[Group], num_layers: int) -> Plan:
        """Make a plan of these groups, in order; every layer they do not name stands alone."""
        complete: list[Group] = []
        following = 0
        for index, group in enumerate(groups):
            _check_group(index, group, num_layers)
            complete += [Group((layer,)) for layer in range(following, group.layers[0])]
            if group.layers[0] < following:
                raise PlanError(
                    f"group {index} starts at layer {group.layers[0]} but group {index - 1} "
                    f"ends at layer {following - 1}; groups come in order and do not overlap"
                )
            complete.append(group)
            following = group.layers[-1] + 1
        complete += [Group((layer,)) for layer in range(following, num_layers)]
        return cls(tuple(complete), num_layers)

    @classmethod
    def parse(cls, source: PlanSource, num_layers: int) -> Plan:
        """Read a plan in any form a user may write it.

        Args:
            source: "sequential"; the paper's notation "P2 S12 E28 D1" (also D0, Dfull,
                Dparallel); JSON, or the path of a file holding it:
                {"groups": [{"layers": [3, 4], "bypass": 1}, ...]} or the list alone, where layers
                that no group names stand alone; or a Plan.
            num_layers: layers of the model the plan is for.

        Raises:
            PlanError: naming the operands and the rule.
        """
        if isinstance(source, Plan):
            if source.num_layers != num_layers:
                raise PlanError(
                    f"the plan is for {source.num_layers} layers but the model has {num_layers}"
                )
            return source
        if isinstance(source, Mapping | list):
            return cls._from_json(source, num_layers)
        text = str(source).strip()
        if text.lower() == "sequential":
            return cls.sequential(num_layers)
        if match := _NOTATION.fullmatch(text):
            size, start, end = (int(match[name]) for name in "PSE")
            return cls.span(size, start, end, Bypass.parse(match["D"]), num_layers)
        if text.startswith(("{", "[")):
            return cls._from_text(text, num_layers)
        path = Path(text)
        try:
            if path.is_file():
                return cls._from_text(path.read_text(encoding="utf-8"), num_layers)
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read a plan from {text[:200]!r}: {error}") from error
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error
        raise PlanError(
            f"{text!r} is not a plan: write 'sequential', 'P2 S12 E28 D0' (P layers a group, S "
            "first grouped layer, E first layer after the span, D bypass: 0, 1, ..., full or "
            "parallel), JSON, or the path of a JSON file"
        )

    @classmethod
    def _from_text(cls, text: str, num_layers: int) -> Plan:
        try:
            decoded = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"the plan is not valid JSON: {error}") from error
        return cls._from_json(decoded, num_layers)

    @classmethod
    def _from_json(cls, decoded: object, num_layers: int) -> Plan:
        if isinstance(decoded, list):
            decoded = {"groups": decoded}
        if not isinstance(decoded, Mapping) or not isinstance(decoded.get("groups"), list):
            raise PlanError(
                f"a plan in JSON is a list of groups, or has one as 'groups': {decoded!r}"
            )
        if unknown := sorted(set(decoded) - _KEYS):
            raise PlanError(
                f"the plan has unknown keys {unknown}; known: {', '.join(sorted(_KEYS))}"
            )
        entries = decoded["groups"]
        stated = decoded.get("num_layers", num_layers)
        if stated != num_layers:
            raise PlanError(f"the plan is for {stated} layers but the model has {num_layers}")
        groups = [_read_group(index, entry) for index, entry in enumerate(entries)]
        return cls.covering(groups, num_layers)

    def to_json(self) -> dict[str, Any]:
        """Return the form that `parse` reads back to an equal plan, every group written out."""
        return {
            "num_layers": self.num_layers,
            "groups": [group.to_json() for group in self.groups],
        }

    @property
    def depth(self) -> int:
        """Return the serial depth: the number of groups a token walks one after another."""
        return len(self.groups)

    @cached_property
    def changed(self) -> tuple[Group, ...]:
        """Return the groups from the first one on that is more than a layer as it was trained."""
        first = next((n for n, each in enumerate(self.groups) if not each.is_exact), self.depth)
        return self.groups[first:]

    @property
    def is_sequential(self) -> bool:
        """Return whether this is the original model, computed exactly."""
        return not self.changed

    @property
    def ideal_reduction(self) -> float:
        """Return the part of the layers' latency that perfect concurrency saves, 0 to 1."""
        return (self.num_layers - self.depth) / self.num_layers

    def __str__(self) -> str:
        if self.is_sequential:
            return "sequential"
        named = [g for g in self.groups if g.size > 1 or g.bypass != NO_BYPASS]
        runs = [f"{g.layers[0]}-{g.layers[-1]}:{g.bypass}" for g in named]
        return f"{self.depth} groups ({', '.join(runs)})"


PlanSource = Plan | str | Path | Mapping[str, Any] | list[Any]
"""Every form in which `Plan.parse` takes a plan."""


def layers_text(layers: Iterable[int]) -> str:
    """Write layers in the shortest form: [0, 1, 2, 5] is "0-2, 5"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _check_group(index: int, group: Group, num_layers: int) -> None:
    layers = group.layers
    if not layers:
        raise PlanError(f"group {index} is empty; a group holds at least 1 layer")
    if layers != tuple(range(layers[0], layers[0] + len(layers))):
        raise PlanError(
            f"group {index} holds layers {list(layers)}; a group holds consecutive layers in order"
        )
    if layers[0] < 0:
        raise PlanError(f"group {index} starts at layer {layers[0]}; layers count from 0")
    if layers[-1] >= num_layers:
        raise PlanError(
            f"group {index} ends at layer {layers[-1]} but the model has {num_layers} layers "
            f"(0 to {num_layers - 1})"
        )


def _read_group(index: int, entry: object) -> Group:
    if isinstance(entry, list):
        entry = {"layers": entry}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("layers"), list):
        raise PlanError(
            f"group {index} is {entry!r}; write it as {{'layers': [3, 4], 'bypass': 0}}"
        )
    if unknown := sorted(set(entry) - {"layers", "bypass"}):
        raise PlanError(f"group {index} has unknown keys {unknown}; known: 'layers', 'bypass'")
    layers = entry["layers"]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise PlanError(f"group {index} holds layers {layers!r}; layers are whole numbers")
    try:
        bypass = Bypass.parse(entry.get("bypass", 0))
    except PlanError as error:
        raise PlanError(f"group {index}: {error}") from error
    return Group(tuple(layers), bypass)
