"""A model's own defaults for sampling, read from its generation_config.json."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from cqil_dist.errors import RequestError
from cqil_dist.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

# The fields that vLLM takes from the file as well. `do_sample` is not among them: it is a default
# of transformers' `generate`, and a service samples unless a request says otherwise.
_TAKEN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def default_sampling(path: Path) -> dict[str, Any]:
    """Read sampling values, by `SamplingParams` field, from a model's generation_config.json.

    There are none without such a file. A value that `SamplingParams` refuses is left out, with a
    warning. Raises ValueError if the file is not JSON.
    """
    file = path / "generation_config.json"
    stated = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    defaults: dict[str, Any] = {}
    for name in _TAKEN:
        if (value := stated.get(name)) is None:
            continue
        try:
            defaults[name] = getattr(SamplingParams.from_dict({name: value}), name)
        except RequestError as error:
            logger.warning("%s is not followed: %s", file, error)
    return defaults
