"""Holds what the steps need to know of a request: its tokens, and how many are in the KV cache.

Knows token ids, positions and slots; nothing of text, sampling, streams or ranks.
"""

from __future__ import annotations

from collections.abc import Iterable

from cqil_dist.model.step import Segment


class Sequence:
    """A prompt being continued, token by token.

    The tokens are all of its state: with `computed` set to 0 its KV cache can be filled again on
    any ranks, and it goes on where it was.

    Args:
        prompt_ids: the prompt's tokens, one at least.
        plan_index: index of the plan it runs under.
        scores_prompt: logits are wanted after every token of the prompt, not only the last.
        argmax_suffices: the most likely token is all that is wanted of the logits after the last.
        wants_timeline: its steps report where their time went.

    Attributes:
        token_ids: prompt and output so far.
        prompt_length: how many of them are the prompt.
        computed: how many of them have their keys and values in the KV cache.
        slot: the KV slot it holds; None while it waits for one, and once it has ended.
        unscored: tokens at the prompt's end that still want the logits before them.
        setbacks: losses of the model during its steps, since it last gained a token.
    """

    def __init__(
        self,
        prompt_ids: Iterable[int],
        plan_index: int = 0,
        *,
        scores_prompt: bool = False,
        argmax_suffices: bool = False,
        wants_timeline: bool = False,
    ) -> None:
        self.token_ids = [*prompt_ids]
        self.prompt_length = len(self.token_ids)
        self.plan_index = plan_index
        self.argmax_suffices = argmax_suffices
        self.wants_timeline = wants_timeline
        self.computed = 0
        self.slot: int | None = None
        self.unscored = self.prompt_length - 1 if scores_prompt else 0  # the first follows nothing
        self.setbacks = 0

    @property
    def pending(self) -> int:
        """The number of its tokens that the KV cache lacks."""
        return len(self.token_ids) - self.computed

    def segment(self, count: int) -> Segment:
        """Make a segment of the first `count` pending tokens, with the logits wanted after them."""
        assert self.slot is not None, "only sequences in a slot are computed"
        # Logits are wanted after the last token; where the prompt is scored, as soon as after the
        # token before the first unscored one.
        follows = self.prompt_length - self.unscored if self.unscored else len(self.token_ids)
        logits = max(0, self.computed + count - (follows - 1))
        return Segment(self.slot, self.computed, count, logits)

    def append(self, token_id: int) -> None:
        """Go on by one token of output."""
        self.token_ids.append(token_id)
        self.setbacks = 0
