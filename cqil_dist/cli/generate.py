"""`cqil generate`: launch, stream one completion, and leave nothing behind."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated, Any

import typer

from cqil_dist.cli import options
from cqil_dist.errors import CqilError, RequestError
from cqil_dist.outputs import Completion
from cqil_dist.progress import ConsoleProgress
from cqil_dist.sampling_params import SamplingParams


@options.launch_options()
def generate(
    launching: dict[str, Any],
    model: options.Model,
    prompt: Annotated[str, typer.Option(help="Text to continue, or the message with --chat.")],
    plan: options.PlanText = "sequential",
    ranks: options.Ranks = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the fewest tokens that reach this probability.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0 is off.")] = 0,
    min_p: Annotated[
        float, typer.Option(help="Drop tokens below this part of the likeliest one's chance.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages repeats.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed that makes sampling repeatable.")] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text that ends the output; repeatable; \\n is a new line."),
    ] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(help="Token that ends the output; repeatable.")
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="Report log probabilities and this many alternatives.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Go on after the end token.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Stream a completion of a prompt to standard output."""
    sampling = SamplingParams(  # checked before anything is started
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in stop or ()),
        stop_token_ids=tuple(stop_token_id or ()),
        logprobs=logprobs,
        ignore_eos=ignore_eos,
    )
    if not prompt:
        raise RequestError("the prompt is empty; give at least one token to continue")
    from cqil_dist.launching.running_engine import launch

    with launch(model, plan, ranks, progress=ConsoleProgress(), **launching) as engine:
        request = [{"role": "user", "content": prompt}] if chat else prompt
        completion: Completion | None = None
        for chunk in engine.generate(request, **sampling.to_dict()):
            if not as_json:
                typer.echo(chunk.text, nl=False)
            completion = chunk.result
        assert completion is not None, "a stream that raises nothing ends with its result"
        if as_json:
            typer.echo(json.dumps(_report(engine, completion), ensure_ascii=False))
        else:
            typer.echo()


def _report(engine: Any, completion: Completion) -> dict[str, Any]:
    exchanges = None
    with suppress(CqilError):  # a rank lost since must not cost the completion
        exchanges = engine.exchanges_per_token()
    return completion.to_dict() | {
        "plan": engine.plan.to_json(),
        "exchanges_per_token": exchanges,
        "ranks": [asdict(rank) for rank in engine.status().ranks],
    }
