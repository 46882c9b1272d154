"""Plans that were found by measurement, by the model's name: fast, balanced and careful.

Beside each plan its file says what it cost on text that it was not chosen on.
"""

from __future__ import annotations

from importlib import resources

from cqil_dist.errors import PlanError
from cqil_dist.plan import Plan, PlanSource

# How much perplexity a plan of that name may cost, where one is to be found for another model.
_LOSSES = {"fast": "50%", "balanced": "20%", "careful": "7%"}
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
    file = resources.files(__package__) / model / f"{name}.json"
    if "/" in model or not file.is_file():
        raise PlanError(
            f"no plan {name!r} comes with {model}; find one with 'cqil plan search --model {model} "
            f"--max-loss {_LOSSES[name]} -o {name}.json' and run it with '--plan {name}.json'"
        )
    return Plan.parse(file.read_text(encoding="utf-8"), num_layers)
