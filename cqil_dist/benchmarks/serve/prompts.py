"""The benchmark's fixed prompts: prose, questions, code and lists, of a line or some hundred words.

Two results can be compared if their `content_hash` is the same. Knows no tokenizer: the number of
tokens in a prompt depends on the model, and the server reports it.
"""

from __future__ import annotations

import hashlib
import random
import secrets

_STOCK = (
    "The storeroom holds coils of rope, tins of paint, three spare lanterns, a box of brass "
    "screws, two folded sails and a ladder that is too short for the loft. "
)
_MINUTES = (
    "The chair asked whether the bridge could open before the winter. The engineer answered that "
    "the eastern pier was sound, that the railing was late, and that nobody should promise a date. "
)
_READINGS = "{hour:02d}:00 wind {wind} knots, pressure {pressure} hPa, sea temperature {sea} C.\n"
_FUNCTION = '''
def total_{name}(orders: list[Order]) -> int:
    """Cents of all {name} orders that have not been cancelled."""
    return sum(order.cents for order in orders if order.kind == "{name}" and not order.cancelled)
'''

PROMPTS: tuple[str, ...] = (
    # Prose to continue.
    "The old ferryman counted his coins by the light of the stove and",
    "When the rain finally stopped, the children ran down to the river, because",
    "Nobody in the valley remembered who had planted the pear tree. It stood",
    "Dear Margarethe, the parcel arrived on Tuesday, a little crushed at one corner, and",
    "The night train leaves at ten. Inside, the conductor hangs up his coat, looks at the list of "
    "sleepers, and knocks at the first door.",
    # Questions.
    "Why does bread rise, and why does it fall again if the oven is opened too early?",
    "What is the difference between weather and climate? Explain it to a child of ten.",
    "How does a lock lift a boat from the lower to the upper part of a canal?",
    "Which is heavier, a litre of oil or a litre of water, and how does one find out in a kitchen?",
    "Why are there leap years, and why is not every fourth year one?",
    # Instructions.
    "Write a polite note to a neighbour whose dog barks at night.",
    "Give a recipe for lentil soup for four people, first what is needed and then the steps.",
    "Summarise in one sentence: A glacier is a river of ice. Snow that does not melt is pressed by "
    "the snow above it until it is ice, and the ice creeps downhill under its own weight, carrying "
    "stones that scratch the rock beneath.",
    "Translate into French, German and Spanish: The key is under the blue flowerpot.",
    # Lists.
    "Ten things to pack for a week of walking in the mountains:\n1.",
    "Months of the year with the number of their days:\nJanuary 31\nFebruary 28\nMarch",
    "Metals, with their symbols and what they are used for:\n- iron (Fe): bridges, ships, nails\n"
    "- copper (Cu):",
    # Code.
    "def is_palindrome(text: str) -> bool:\n"
    '    """Whether a text reads the same backwards, letters and digits alone."""\n',
    "SELECT customer.name, COUNT(*) AS orders\nFROM customer\nJOIN",
    "#!/bin/sh\n# Renames every .jpeg in the current folder to .jpg and says what it did.\n",
    # Some hundred words.
    "An inventory, taken in spring:\n" + 8 * _STOCK + "\nWhat is there to buy before the autumn?",
    "Minutes of the council:\n" + 7 * _MINUTES + "\nThe decisions, in one line each:\n-",
    "Readings of a weather station:\n"
    + "".join(
        _READINGS.format(hour=hour, wind=8 + hour % 7, pressure=1004 + hour, sea=11 + hour % 3)
        for hour in range(20)
    )
    + "How did the day go?",
    "# Reports on orders.\n"
    + "".join(_FUNCTION.format(name=name) for name in ("paper", "timber", "cloth", "glass", "wool"))
    + "\ndef test_total_paper() -> None:\n",
)


def content_hash() -> str:
    """Return the prompts' checksum, which changes with each of them and with their order."""
    return hashlib.sha256("\0".join(PROMPTS).encode()).hexdigest()[:16]


def chosen(count: int, seed: int) -> list[str]:
    """Choose `count` prompts: all in a random order, then again in another, and so on."""
    order = random.Random(seed)
    texts: list[str] = []
    while len(texts) < count:
        texts += order.sample(PROMPTS, len(PROMPTS))
    return texts[:count]


def made_unique(text: str) -> str:
    """Put a random number of 8 digits before a prompt, so that no server's prefix cache has it."""
    return f"Note {secrets.randbelow(10**8):08d}. {text}"
