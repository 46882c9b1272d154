"""Recommended plans, by the name of their model: fast, balanced and careful.

They were found by measurement. Each plan's file also tells the perplexity that it has on text that
it was not chosen on.
"""

from __future__ import annotations

from importlib import resources

from cqil_dist.errors import PlanError
from cqil_dist.plan import Plan, PlanSource

# The --max-loss to search with for another model: about what the built-in model's plans cost.
_LOSSES = {"fast": "60%", "balanced": "35%", "careful": "15%"}
NAMES = tuple(_LOSSES)


def plan_for(source: PlanSource, model: str, num_layers: int) -> Plan:
    """Return the plan that a user gave, by a recommended plan's name or as `Plan.parse` reads it.

    Args:
        model: the model's name or path, as the user gave it.

    Raises:
        PlanError: `Plan.parse` cannot read it; or no plan of that name comes with the model, in
            which case the message has the command that finds one.
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
    """Return the text of a recommended plan's file; None if the model has no plan of that name."""
    file = resources.files(__package__) / model / f"{name.strip().lower()}.json"
    if "/" in model or "/" in name or not file.is_file():
        return None
    return file.read_text(encoding="utf-8")
