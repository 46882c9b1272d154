"""The quick way to a tokenizer gives the same one as AutoTokenizer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_models import TinyModelFactory, tiny_config
from transformers import AutoTokenizer

from cqil_dist.model.config import FAMILIES
from cqil_dist.store.tokenizer import load_tokenizer

TEXT = "  The harbour\n\nlies by the sea: 3 boats <|endoftext|> été."


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "declared", [None, "PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer"]
)
def test_it_is_auto_tokenizer_s(
    tiny_model: TinyModelFactory, tmp_path: Path, family: str, declared: str | None
) -> None:
    """The tokenizer is the same whichever class tokenizer_config.json names, if any."""
    path = tmp_path / "model"
    shutil.copytree(tiny_model(tiny_config(family)).path, path)
    config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("tokenizer_class", None)
    if declared is not None:
        config["tokenizer_class"] = declared
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    # As Llama 3.1 is published: fields that the config's own class knows how to read.
    fields = json.loads((path / "config.json").read_text(encoding="utf-8"))
    fields["rope_theta"] = fields.pop("rope_parameters")["rope_theta"]
    fields["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0}
    (path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    expected = AutoTokenizer.from_pretrained(path)
    given = load_tokenizer(path)
    assert type(given) is type(expected)
    assert given(TEXT)["input_ids"] == expected(TEXT)["input_ids"]
    assert given.all_special_ids == expected.all_special_ids
    assert given.chat_template == expected.chat_template


def test_it_does_without_what_takes_long_to_import(tiny_model: TinyModelFactory) -> None:
    code = (
        "import pathlib, sys; from cqil_dist.store.tokenizer import load_tokenizer;"
        "load_tokenizer(pathlib.Path(sys.argv[1])); print('torch._dynamo' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tiny_model().path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "False"
