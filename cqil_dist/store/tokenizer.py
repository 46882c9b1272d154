"""A quick way to a model's tokenizer, which gives the same one as transformers' `AutoTokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

# What AutoTokenizer reads of a model's config if tokenizer_config.json names the tokenizer's class.
_READ = ("model_type", "model_name", "tokenizer_class")


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load a Hugging Face directory's tokenizer, the same as `AutoTokenizer.from_pretrained` gives.

    AutoTokenizer reads the family's name from the model's config, for which it imports the family's
    config class, and with it most of torch's compiler: 1.5 s, a third of the time that a
    coordinator takes to restart. If tokenizer_config.json names the tokenizer's class, a plain
    `PreTrainedConfig` serves as well.
    """
    options: dict[str, Any] = {}
    if get_tokenizer_config(path).get("tokenizer_class"):
        fields, _ = PreTrainedConfig.get_config_dict(path)
        read: dict[str, Any] = {name: fields[name] for name in _READ if name in fields}
        read["name_or_path"] = str(path)
        options["config"] = PreTrainedConfig(**read)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **options)
    return tokenizer
