"""Options that several subcommands share: how to launch a model, and how to measure one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from cqil_dist.errors import ConfigError, TextError
from cqil_dist.launching.config import LaunchConfig
from cqil_dist.planning.measure.compute_config import MAX_SEED, ComputeConfig

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="Built-in name, local directory, GGUF file, or hub id (org/name)."
    ),
]
PlanText = Annotated[
    str,
    typer.Option(
        "--plan",
        "-p",
        help="'sequential', 'P2 S12 E28 D1' (D: 0, 1, ..., full, parallel), JSON, a JSON file; or "
        "fast, balanced, careful for the built-in model.",
    ),
]
Ranks = Annotated[
    int | None,
    typer.Option("--ranks", "-r", help="Layer actors; default: layers of the largest group."),
]
Adapter = Annotated[
    Path | None,
    typer.Option(
        "--adapter", help="Directory of a LoRA adapter made for the plan (peft's format)."
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address", help="Ray cluster; default: RAY_ADDRESS, else a local cluster is started."
    ),
]
Strategy = Annotated[
    str, typer.Option("--strategy", help="PACK, SPREAD, STRICT_PACK or STRICT_SPREAD.")
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, float16 or bfloat16.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Ray's logs.")]

# Of what is measured in one process, and on which text.
Text = Annotated[
    list[Path] | None,
    typer.Option("--text", help="Text file to measure on; again for more. Default: the model's."),
]
Tokens = Annotated[int, typer.Option("--tokens", min=1, help="How much text to measure on.")]
SampledTokens = Annotated[
    int,
    typer.Option(
        "--sampled-tokens",
        min=0,
        help="Text of the model's own, mixed with that of --text; half goes on from that.",
    ),
]
HeldOut = Annotated[
    int,
    typer.Option(
        "--held-out", min=1, help="Windows of the text, the last, that are only measured on."
    ),
]
Window = Annotated[int, typer.Option("--window", min=2, help="Tokens of a window of text.")]
Seed = Annotated[
    int,
    typer.Option("--seed", min=0, max=MAX_SEED, help="Of the text that is sampled or chosen."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]

# By field of LaunchConfig.
_LAUNCHING: dict[str, Any] = {
    "adapter": Adapter,
    "address": Address,
    "strategy": Strategy,
    "threads_per_rank": Annotated[
        int, typer.Option("--threads-per-rank", help="Compute threads of a rank on a CPU.")
    ],
    "device": Device,
    "gpus_per_rank": Annotated[
        float, typer.Option("--gpus-per-rank", help="Below 1 lets ranks share a GPU.")
    ],
    "dtype": Dtype,
    "slots": Annotated[int, typer.Option("--slots", help="Requests that run at the same time.")],
    "max_len": Annotated[
        int | None,
        typer.Option("--max-len", help="Most tokens of a prompt and its completion together."),
    ],
    "prefill_tokens": Annotated[
        int | None,
        typer.Option("--prefill-tokens", help="Most prompt tokens a step computes."),
    ],
    "pin": Annotated[
        bool | None,
        typer.Option("--pin/--no-pin", help="Bind ranks to cores; default: on a local cluster."),
    ],
    "spares": Annotated[
        int, typer.Option("--spares", help="Standby actors that take over a lost rank.")
    ],
    "step_deadline_s": Annotated[
        float,
        typer.Option("--step-deadline-s", help="Seconds until a rank in a step counts as lost."),
    ],
    "recovery_timeout_s": Annotated[
        float,
        typer.Option("--recovery-timeout-s", help="Seconds to wait for a lost rank's successor."),
    ],
    "verbose": Verbose,
}
# Those that only a service has.
_SERVING: dict[str, Any] = {
    "compare": Annotated[
        str | None,
        typer.Option("--compare", help="A second plan over the same ranks, as a model of its own."),
    ],
    "served_model_name": Annotated[
        str | None,
        typer.Option("--served-model-name", help="What requests call it; default: MODEL."),
    ],
    "max_waiting": Annotated[
        int, typer.Option("--max-waiting", help="Requests that may wait; more are refused.")
    ],
}

# By field of ComputeConfig.
_COMPUTING: dict[str, Any] = {
    "device": Device,
    "dtype": Annotated[
        str,
        typer.Option(
            "--dtype",
            help="Of the model: auto (float32 on a CPU, bfloat16 on a GPU), float32 or bfloat16.",
        ),
    ],
    "matmul_precision": Annotated[
        str,
        typer.Option(
            "--matmul-precision",
            help="Of float32 products, as torch names it: highest; high and medium are faster "
            "where the processor has TF32 (GPUs) or bfloat16 (CPUs with AMX).",
        ),
    ],
}

Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def launch_options(*left_out: str, serving: bool = False) -> Decorator:
    """Give a command the options of a launch, in its parameter `launching`.

    Args:
        left_out: fields of `LaunchConfig` that the command decides.
        serving: with those that only a service has.
    """
    known = _LAUNCHING | (_SERVING if serving else {})
    kinds = {name: kind for name, kind in known.items() if name not in left_out}
    return options_of(LaunchConfig, kinds, "launching")


def compute_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a `ComputeConfig`, in its parameter `computing`, and `explaining_memory`."""
    explained = explaining_memory(command)
    return options_of(ComputeConfig, _COMPUTING, "computing", ComputeConfig)(explained)


def explaining_memory(command: Callable[..., None]) -> Callable[..., None]:
    """Have a command raise ConfigError where the device's memory does not suffice."""

    @wraps(command)
    def run(**given: Any) -> None:
        try:
            command(**given)
        except RuntimeError as error:
            import torch

            if not isinstance(error, torch.OutOfMemoryError):
                raise
            what, _, _ = str(error).partition("\n")
            raise ConfigError(
                f"the device's memory does not suffice: {what}; give less text (--tokens) or a "
                "smaller --window, compute in --dtype bfloat16, or, where it trains, with "
                "--gradient-checkpointing"
            ) from error

    return run


def require_text(text: list[Path] | None, sampled_tokens: int) -> None:
    """Raises TextError where text is to be sampled beside files, and there are none."""
    if sampled_tokens and not text:
        raise TextError(
            f"{sampled_tokens} sampled tokens are to go beside files, but there are none; say with "
            "--tokens how much text the model samples, or give --text"
        )


def options_of(
    config: type[Any],
    kinds: Mapping[str, Any],
    parameter: str,
    made: Callable[..., Any] = dict,
) -> Decorator:
    """Give a command an option for each of these fields of a config, with the field's default.

    Args:
        config: a dataclass.
        kinds: annotations for typer, by field.
        parameter: of the command, which gets what was given in one.
        made: of what was given, by field: the config, or a dict where the command adds to it.
    """
    defaults = {field.name: field.default for field in fields(config)}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            command(**{parameter: made(**{name: given.pop(name) for name in kinds})}, **given)

        signature = inspect.signature(command, eval_str=True)
        parameters = [
            *(p for name, p in signature.parameters.items() if name != parameter),
            *(
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=kind
                )
                for name, kind in kinds.items()
            ),
        ]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate
