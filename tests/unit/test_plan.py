"""Plans are read in every form a user may write them, and refused with the operands named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import plans
from hypothesis import given
from hypothesis import strategies as st

from cqil_dist.errors import CqilError, PlanError
from cqil_dist.plan import Bypass, Group, Plan


def shape(plan: Plan) -> list[tuple[list[int], int | str]]:
    """Groups of more than one layer, as (layers, bypass)."""
    return [(list(g.layers), g.bypass.to_json()) for g in plan.groups if g.size > 1]


@pytest.mark.parametrize(
    ("notation", "bypass"),
    [
        ("P2 S12 E16 D0", 0),
        ("P2 S12 E16 D1", 1),
        ("p2 s12 e16 d3", 3),
        ("  P2  S12\tE16   Dfull ", "full"),
        ("P2 S12 E16 DPARALLEL", "parallel"),
    ],
)
def test_notation_of_the_paper(notation: str, bypass: int | str) -> None:
    plan = Plan.parse(notation, 30)
    assert shape(plan) == [([12, 13], bypass), ([14, 15], bypass)]
    assert plan.depth == 28
    assert plan.ideal_reduction == pytest.approx(2 / 30)
    assert not plan.is_sequential


def test_end_is_the_first_layer_after_the_span() -> None:
    assert shape(Plan.parse("P4 S2 E30 D0", 30))[-1] == ([26, 27, 28, 29], 0)


def test_last_group_of_a_span_is_shorter_where_the_size_does_not_divide_it() -> None:
    plan = Plan.parse("P3 S1 E9 D1", 10)
    assert [list(g.layers) for g in plan.groups] == [[0], [1, 2, 3], [4, 5, 6], [7, 8], [9]]
    assert [str(g.bypass) for g in plan.groups] == ["0", "1", "1", "1", "0"]


def test_published_plans_have_the_published_ideal_reduction() -> None:
    """CQIL's figures for 32-layer LLaMA-7B: 28.1 % and 37.5 %."""
    assert Plan.parse("P2 S12 E30 D0", 32).ideal_reduction == pytest.approx(0.281, abs=5e-4)
    assert Plan.parse("P4 S14 E30 D0", 32).ideal_reduction == pytest.approx(0.375, abs=5e-4)


def test_sequential_is_the_original_model() -> None:
    plan = Plan.parse("Sequential", 5)
    assert plan == Plan.sequential(5)
    assert plan.is_sequential
    assert (plan.depth, plan.ideal_reduction, str(plan)) == (5, 0, "sequential")


def test_a_layer_alone_is_exact_whatever_distance_it_is_given() -> None:
    """Nobody else is there to be seen, so no distance changes what it computes."""
    for bypass in (0, 1, 4, "full"):
        assert Plan.parse({"groups": [{"layers": [2], "bypass": bypass}]}, 5).is_sequential
    assert not Plan.parse({"groups": [{"layers": [2], "bypass": "parallel"}]}, 5).is_sequential


IRREGULAR: dict[str, Any] = {
    "groups": [
        {"layers": [3, 4], "bypass": 1},
        [5, 6, 7],
        {"layers": [9, 10], "bypass": "parallel"},
    ]
}


@pytest.mark.parametrize("form", ["dict", "inline", "file", "path"])
def test_irregular_plans_are_read_from_json_in_every_place(form: str, tmp_path: Path) -> None:
    file = tmp_path / "my plan.json"
    file.write_text(json.dumps(IRREGULAR), encoding="utf-8")
    forms: dict[str, Any] = {
        "dict": IRREGULAR,
        "inline": json.dumps(IRREGULAR, indent=1),
        "file": str(file),
        "path": file,
    }
    plan = Plan.parse(forms[form], 12)
    assert shape(plan) == [([3, 4], 1), ([5, 6, 7], 0), ([9, 10], "parallel")]
    assert [layer for g in plan.groups for layer in g.layers] == list(range(12))
    assert str(plan) == "8 groups (3-4:1, 5-7:0, 9-10:parallel)"


def test_a_plan_is_taken_as_it_is() -> None:
    plan = Plan.parse("P2 S1 E5 D0", 6)
    assert Plan.parse(plan, 6) is plan


def groups(*entries: object) -> dict[str, Any]:
    return {"groups": list(entries)}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("P2 S12 E31 D0", "P2 S12 E31 D0: E is 31 but the model has 30 layers"),
        ("P0 S12 E28 D0", "P0 S12 E28 D0: P is 0, but a group holds at least 1 layer"),
        ("P2 S28 E12 D0", "S is 28 and E is 12, but S (first grouped layer) must be below E"),
        ("P2 S12 E12 D0", "S is 12 and E is 12"),
        ("P2 S12 E28", "'P2 S12 E28' is not a plan: write 'sequential', 'P2 S12 E28 D0'"),
        ("P2 S12 E28 D-1", "is not a plan"),
        ("no such file.json", "'no such file.json' is not a plan"),
        # Taken for a file's name, it is longer than any file's name may be.
        ("P2 " * 99, "cannot read a plan from 'P2 P2"),
        (str([[layer] for layer in range(99)]), "group 30 ends at layer 30"),
        ({"groups": [], "bypass": 1}, "unknown keys ['bypass']"),
        ("{not json", "the plan is not valid JSON"),
        ({}, "a plan in JSON is a list of groups, or has one as 'groups': {}"),
        ({"groups": {"layers": [1]}}, "is a list of groups, or has one as 'groups'"),
        ({"num_layers": 24, "groups": []}, "the plan is for 24 layers but the model has 30"),
        (Plan.sequential(24), "the plan is for 24 layers but the model has 30"),
        (
            groups(*([layer] for layer in range(7)), [30, 31]),
            "group 7 ends at layer 31 but the model has 30 layers (0 to 29)",
        ),
        (groups([-1, 0]), "group 0 starts at layer -1; layers count from 0"),
        (groups([3, 4], []), "group 1 is empty; a group holds at least 1 layer"),
        (groups([3, 5]), "group 0 holds layers [3, 5]; a group holds consecutive layers"),
        (groups([4, 3]), "group 0 holds layers [4, 3]; a group holds consecutive layers"),
        (groups([3, 3]), "group 0 holds layers [3, 3]"),
        (
            groups([3, 4], [4, 5]),
            "group 1 starts at layer 4 but group 0 ends at layer 4; groups come in order",
        ),
        (groups([5, 6], [3, 4]), "group 1 starts at layer 3 but group 0 ends at layer 6"),
        (groups("3-4"), "group 0 is '3-4'; write it as {'layers': [3, 4], 'bypass': 0}"),
        (groups({"bypass": 1}), "group 0 is {'bypass': 1}"),
        (groups([3, 4.5]), "group 0 holds layers [3, 4.5]; layers are whole numbers"),
        (groups([False, True]), "layers are whole numbers"),
        (groups({"layers": [3, 4], "bypas": 1}), "group 0 has unknown keys ['bypas']; known:"),
        (
            groups([1, 2], {"layers": [3, 4], "bypass": "half"}),
            "group 1: bypass 'half' is not a distance (0, 1, 2 ...), 'full' or 'parallel'",
        ),
        (groups({"layers": [3, 4], "bypass": -1}), "group 0: bypass -1 is not a distance"),
        (groups({"layers": [3, 4], "bypass": True}), "group 0: bypass True is not a distance"),
        (groups({"layers": [3, 4], "bypass": 1.0}), "group 0: bypass 1.0 is not a distance"),
    ],
)
def test_refusals_name_the_operands_and_the_rule(source: Any, message: str) -> None:
    with pytest.raises(PlanError) as refusal:
        Plan.parse(source, 30)
    assert message in str(refusal.value)
    assert isinstance(refusal.value, CqilError)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "not valid JSON"), (b"[1]", "group 0 is 1"), (b"\xff\xfe{\x00", "")],
    ids=["broken", "list", "not_utf8"],
)
def test_a_bad_file_is_refused_by_its_name(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    with pytest.raises(PlanError) as refusal:
        Plan.parse(file, 30)
    assert str(file) in str(refusal.value)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([(0, 1), (3,)], "group 1 starts at layer 3 where layer 2 comes next"),
        ([(0, 1), (1, 2)], "group 1 starts at layer 1 where layer 2 comes next"),
        ([(1, 2, 3)], "group 0 starts at layer 1 where layer 0 comes next"),
        ([(0, 1, 2)], "the last group ends at layer 2 but the model has 4 layers"),
    ],
)
def test_a_plan_holds_every_layer_once(layers: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(PlanError) as refusal:
        Plan(tuple(Group(members) for members in layers), 4)
    assert message in str(refusal.value)


@given(plans())
def test_json_reads_back_to_an_equal_plan(plan: Plan) -> None:
    assert Plan.parse(json.dumps(plan.to_json()), plan.num_layers) == plan


@given(plans(), st.data())
def test_layers_that_no_group_names_stand_alone(plan: Plan, data: st.DataObject) -> None:
    named = [group for group in plan.groups if data.draw(st.booleans())]
    covering = Plan.covering(named, plan.num_layers)
    assert [layer for g in covering.groups for layer in g.layers] == list(range(plan.num_layers))
    assert [g for g in covering.groups if g in named] == named
    others = [g for g in covering.groups if g not in named]
    assert all(g.size == 1 and list(g.visible(0)) == [0] for g in others)


@given(
    size=st.integers(1, 9),
    start=st.integers(0, 29),
    length=st.integers(1, 30),
    bypass=st.sampled_from(["0", "2", "full", "parallel"]),
)
def test_a_span_is_cut_into_groups_of_its_size(
    size: int, start: int, length: int, bypass: str
) -> None:
    end = min(start + length, 30)
    plan = Plan.parse(f"P{size} S{start} E{end} D{bypass}", 30)
    inside = [g for g in plan.groups if start <= g.layers[0] < end]
    assert [layer for g in inside for layer in g.layers] == list(range(start, end))
    assert all(g.size == size for g in inside[:-1])
    assert 1 <= inside[-1].size <= size
    assert all(g.bypass == Bypass.parse(bypass) for g in inside)
    assert all(g.size == 1 for g in plan.groups if g not in inside)
    assert plan.depth == 30 - (end - start) + -(-(end - start) // size)


@given(size=st.integers(1, 9), bypass=st.sampled_from([0, 1, 2, 5, 12, "full", "parallel"]))
def test_bypass_shows_each_member_what_the_method_defines(size: int, bypass: int | str) -> None:
    """bypass(j) of the method, with its members counted from 1."""
    group = Group(tuple(range(size)), Bypass.parse(bypass))
    for j in range(1, size + 1):
        if bypass == "parallel":
            defined: set[int] = set()
        elif bypass == "full":
            defined = set(range(1, size + 1))
        else:
            assert isinstance(bypass, int)
            defined = {k for k in range(1, size + 1) if j - bypass <= k <= j}
        assert {seen + 1 for seen in group.visible(j - 1)} == defined
