"""Defines what a request brings: a prompt, how to continue it, and how to answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cqil_dist.sampling_params import SamplingParams

Prompt = str | Sequence[int] | Sequence[dict[str, str]]
"""A prompt is a text, token ids, or chat messages with "role" and "content"."""


@dataclass(frozen=True)
class GenerationInput:
    """A request, as an engine takes it.

    Attributes:
        plan_index: index of the plan to run it under.
        final_only: whether a single chunk with everything in it comes at the end, and no stream.
        resume_token_ids: output tokens that a broken stream of the same request has given already;
            this one goes on after them.
        echo: whether the completion brings the prompt's text.
        wants_timeline: whether chunks bring the timelines of their steps.
    """

    prompt: Prompt
    params: SamplingParams
    plan_index: int = 0
    final_only: bool = False
    resume_token_ids: tuple[int, ...] = ()
    echo: bool = False
    wants_timeline: bool = False
