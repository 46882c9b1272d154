"""Options that several subcommands share, and how they are made from the settings of a config."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from cqil_dist.cli.setting_option import option_of, shell_type
from cqil_dist.errors import ConfigError, TextError
from cqil_dist.launching.config import LaunchConfig
from cqil_dist.planning.measure.compute_config import ComputeConfig
from cqil_dist.planning.search.calibration import CalibrationConfig
from cqil_dist.settings import settings_of

Model = Annotated[str, option_of(LaunchConfig, "model")]
PlanText = Annotated[str, option_of(LaunchConfig, "plan")]
Ranks = Annotated[int | None, option_of(LaunchConfig, "ranks")]
Ungrouped = Annotated[str, option_of(LaunchConfig, "ungrouped")]
Compare = Annotated[str | None, option_of(LaunchConfig, "compare")]
Adapter = Annotated[Path | None, option_of(LaunchConfig, "adapter")]
Address = Annotated[str | None, option_of(LaunchConfig, "address")]
Strategy = Annotated[str, option_of(LaunchConfig, "strategy")]
Dtype = Annotated[str, option_of(LaunchConfig, "dtype")]
Verbose = Annotated[bool, option_of(LaunchConfig, "verbose")]

# What is measured in one process, and on which text.
Text = Annotated[list[Path] | None, option_of(CalibrationConfig, "text")]
Tokens = Annotated[int, option_of(CalibrationConfig, "tokens")]
Window = Annotated[int, option_of(CalibrationConfig, "window")]
Seed = Annotated[int, option_of(CalibrationConfig, "seed")]
SampledTokens = Annotated[
    int,
    typer.Option(
        "--sampled-tokens",
        min=0,
        help="Tokens of the model's own text, mixed with --text; half of them go on from that.",
    ),
]
HeldOut = Annotated[
    int,
    typer.Option(
        "--held-out", min=1, help="Number of windows, the text's last, that are only measured on."
    ),
]

# Fields of LaunchConfig that each command declares itself, and those that only a service has.
_DECLARED = ("model", "plan", "ranks")
_SERVING = ("compare", "served_model_name", "max_waiting")

Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def launch_options(*left_out: str, serving: bool = False) -> Decorator:
    """Give a command the options of a launch, in its parameter `launching`.

    Args:
        left_out: fields of `LaunchConfig` that the command decides.
        serving: whether the command runs a service, which has some options more.
    """
    return options_of(
        LaunchConfig, "launching", left_out=(*left_out, *_DECLARED, *(() if serving else _SERVING))
    )


def compute_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a `ComputeConfig`, in its parameter `computing`, and `explaining_memory`."""
    return options_of(ComputeConfig, "computing", ComputeConfig)(explaining_memory(command))


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
    """Raise TextError where text is to be sampled beside files, and there are none."""
    if sampled_tokens and not text:
        raise TextError(
            f"{sampled_tokens} sampled tokens are to go beside files, but there are none; say with "
            "--tokens how much text the model samples, or give --text"
        )


def options_of(
    config: type[Any],
    parameter: str,
    made: Callable[..., Any] = dict,
    left_out: tuple[str, ...] = (),
) -> Decorator:
    """Give a command an option for each setting of a config, with the setting's default.

    Args:
        config: a dataclass with settings.
        parameter: of the command, which gets what was given in one.
        made: of what was given, by field: the config, or a dict where the command adds to it.
        left_out: settings that are to be no options of this command.
    """
    kinds = {
        name: Annotated[shell_type(config, name), option_of(config, name)]
        for name, setting in settings_of(config).items()
        if setting.is_option and name not in left_out
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            command(**{parameter: made(**{name: given.pop(name) for name in kinds})}, **given)

        signature = inspect.signature(command, eval_str=True)
        parameters = [
            *(p for name, p in signature.parameters.items() if name != parameter),
            *(
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=settings_of(config)[name].default,
                    annotation=kind,
                )
                for name, kind in kinds.items()
            ),
        ]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate
