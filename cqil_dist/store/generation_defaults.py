"""How a model's makers mean it to be sampled from: its generation_config.json."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from cqil_dist.errors import RequestError
from cqil_dist.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

# Those that vLLM takes from it as well. `do_sample` is not among them: it is about `generate`'s
# own default, and a service samples unless a request says otherwise.
_TAKEN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def default_sampling(path: Path) -> dict[str, Any]:
    """Sampling values in a model directory's generation_config.json; empty where it has none.

    A value that `SamplingParams` refuses is left out, with a warning.
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
