"""What a config says of its fields is what commands and documents say of their options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cqil_dist.benchmarks.serve.load import Load
from cqil_dist.cli.app import app
from cqil_dist.cli.option_tables import with_tables
from cqil_dist.cli.setting_option import flags_of
from cqil_dist.errors import CqilError
from cqil_dist.launching.config import LaunchConfig
from cqil_dist.planning.measure.compute_config import ComputeConfig
from cqil_dist.planning.recover.training_config import TrainingConfig
from cqil_dist.planning.search.calibration import CalibrationConfig
from cqil_dist.planning.search.goal import Goal
from cqil_dist.serving.serve_config import ServeConfig
from cqil_dist.settings import Setting, settings_of

DOCUMENTS = Path(__file__).parents[3] / "docs"
SEARCH = ["plan", "search", "--model", "no-model"]
# Each config, and a command whose options it makes.
COMMANDS: dict[type[Any], list[str]] = {
    LaunchConfig: ["serve", "no-model"],
    ServeConfig: ["serve", "no-model"],
    Load: ["bench", "serve", "--base-url", "http://127.0.0.1:9"],
    TrainingConfig: ["distill", "--model", "no-model", "--plan", "P2 S0 E2 D0"],
    CalibrationConfig: SEARCH,
    ComputeConfig: SEARCH,
    Goal: SEARCH,
}
OPTIONS = [
    pytest.param(config, name, setting, id=f"{config.__name__}.{name}")
    for config in COMMANDS
    for name, setting in settings_of(config).items()
    if setting.is_option and (config, name) != (LaunchConfig, "model")  # an argument
]
BOUNDED = [option for option in OPTIONS if option.values[2].rule is not None]  # type: ignore[union-attr]


@pytest.mark.parametrize(("config", "name", "setting"), BOUNDED)
def test_a_limit_is_told_by_one_sentence_in_python_and_on_a_command_line(
    config: type[Any], name: str, setting: Setting
) -> None:
    assert setting.rule is not None
    wrong = {"a whole number": -1, "": "nothing-known"}.get(setting.rule.kind, -1.0)
    with pytest.raises(CqilError) as refused:
        config(**{name: wrong}, **({"model": "no-model"} if config is LaunchConfig else {}))
    sentence = f"{name} is {wrong!r} but must be {setting.rule}"
    assert str(refused.value) == sentence
    flag = flags_of(config, name)[0]
    result = CliRunner().invoke(app, [*COMMANDS[config], flag, str(wrong)])
    assert result.exit_code == 1
    assert result.output == f"error: {sentence}\n"


@pytest.fixture(scope="module")
def helps() -> dict[type[Any], str]:
    """What `--help` of each config's command says, without the lines of its table."""
    return {config: told(command) for config, command in COMMANDS.items()}


def told(command: list[str]) -> str:
    names = [word for word in command if word.isalpha()]
    shown = CliRunner().invoke(app, [*names, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    return " ".join(re.sub("[│╭╮╰╯─]", " ", shown.output).split())


@pytest.mark.parametrize(("config", "name", "setting"), OPTIONS)
def test_help_tells_flags_meaning_limits_and_default(
    helps: dict[type[Any], str], config: type[Any], name: str, setting: Setting
) -> None:
    for flag in "/".join(flags_of(config, name)).split("/"):
        assert f" {flag} " in helps[config]
    limits = "" if setting.rule is None else f" {setting.rule.limits}."
    _, meaning, rest = helps[config].partition(setting.help)
    assert meaning
    assert rest.lower().startswith(limits.lower())
    if setting.unset is not None:
        assert f"[default: ({setting.unset})]" in rest
    elif setting.default not in (None, False):
        shown = name if setting.default is True else setting.default
        assert f"[default: {shown}]" in rest.partition(" --")[0]
    if setting.envvar is not None:
        assert f"[env var: {setting.envvar}]" in rest


@pytest.mark.parametrize("text", ["5%", "0.05"])
def test_a_loss_may_be_given_as_a_percentage_or_a_share(text: str, tmp_path: Path) -> None:
    """Read before the model, which is missed next."""
    found = CliRunner().invoke(app, [*SEARCH, "--max-loss", text, "-o", str(tmp_path / "p.json")])
    assert "no-model" in found.output
    assert "max_loss" not in found.output


@pytest.mark.parametrize(
    ("text", "message"),
    [("5", "--max-loss 5 is 500%; for less, write 5% or 0.05"), ("a%", "such as 5% or 0.05")],
)
def test_a_loss_that_is_no_share_is_said(text: str, message: str) -> None:
    found = CliRunner().invoke(app, [*SEARCH, "--max-loss", text], env={"COLUMNS": "200"})
    assert found.exit_code == 2
    assert message in found.output


def test_options_of_a_command_of_its_own_keep_the_limits() -> None:
    """`compensate` has other defaults than a calibration, and no config around them."""
    words = ["plan", "compensate", "--model", "no-model", "--plan", "P2 S0 E2 D0"]
    found = CliRunner().invoke(app, [*words, "--window", "1"])
    assert found.output == "error: window is 1 but must be a whole number, at least 2\n"


def test_the_documents_have_the_options_as_they_are() -> None:
    """`make docs` writes them anew."""
    tables = 0
    for document in DOCUMENTS.glob("*.md"):
        text = document.read_text(encoding="utf-8")
        assert with_tables(text) == text, document
        tables += text.count("<!-- end of options -->")
    assert tables >= 2


def test_a_stale_table_is_written_anew_and_nothing_else_is() -> None:
    text = "Before.\n\n<!-- options: ServeConfig -->\n| old |\n<!-- end of options -->\n\nAfter.\n"
    written = with_tables(text)
    assert written.startswith("Before.\n\n<!-- options: ServeConfig -->\n| option |")
    assert (
        "| `--http-port` | `8000` | Port of the HTTP service; 0 takes a free one. | from" in written
    )
    assert written.endswith("|\n<!-- end of options -->\n\nAfter.\n")
    assert "old" not in written
