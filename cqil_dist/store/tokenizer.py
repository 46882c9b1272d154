"""A model's tokenizer, as transformers' `AutoTokenizer` gives it, in a fraction of the time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

# What AutoTokenizer reads of a model's config where tokenizer_config.json names a class.
_READ = ("model_type", "model_name", "tokenizer_class")


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a Hugging Face directory.

    AutoTokenizer asks the model's config for the family's name, and to have it imports the
    family's config class and most of torch's compiler with it: 1.5 s, a third of the time that a
    coordinator takes to start again. Where tokenizer_config.json names the tokenizer's class, a
    config of no class in particular will do.
    """
    options: dict[str, Any] = {}
    if get_tokenizer_config(path).get("tokenizer_class"):
        fields, _ = PreTrainedConfig.get_config_dict(path)
        read: dict[str, Any] = {name: fields[name] for name in _READ if name in fields}
        read["name_or_path"] = str(path)
        options["config"] = PreTrainedConfig(**read)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **options)
    return tokenizer
