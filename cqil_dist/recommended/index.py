"""Plans that were found by measurement, by the model's name: fast, balanced and careful.

Beside each plan its file says what it cost on text that it was not chosen on.
"""

from __future__ import annotations

from importlib import resources

from cqil_dist.errors import PlanError
from cqil_dist.plan import Plan, PlanSource

# The bound to search with for another model: about what the built-in model's plans cost there.
_LOSSES = {"fast": "60%", "balanced": "35%", "careful": "15%"}
NAMES = tuple(_LOSSES)


def plan_for(source: PlanSource, model: str, num_layers: int) -> Plan:
    """A plan in any form that `Plan.parse` reads, or by the name of a recommended one.

    Args:
        model: what `--model` was given.

    Raises:
        PlanError: as `Plan.parse`; or there is no plan of that name for this model, with the
            command that finds one.
    """
    if not isinstance(source, str) or (name := source.strip().lower()) not in NAMES:
        return Plan.parse(source, num_layers)
    if (text := recommended(name, model)) is None:
        raise PlanError(
            f"no plan {name!r} comes with {model}; find one with 'cqil plan search --model {model} "
            f"--max-loss {_LOSSES[name]} -o {name}.json' and run it with '--plan {name}.json'"
        )
    return Plan.parse(text, num_layers)


def recommended(name: str, model: str) -> str | None:
    """What is written of the plan of that name; None where none comes with the model."""
    file = resources.files(__package__) / model / f"{name.strip().lower()}.json"
    if "/" in model or "/" in name or not file.is_file():
        return None
    return file.read_text(encoding="utf-8")
