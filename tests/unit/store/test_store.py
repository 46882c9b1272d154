"""The store: where names of models lead, and which damage the cache survives."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from helpers.tiny_gguf import TURN_END, TinyGguf, write_tiny_gguf

from cqil_dist.errors import CheckpointError, ModelError, ModelNotFound, UnsupportedModel
from cqil_dist.progress import ConsoleProgress, SilentProgress
from cqil_dist.store import store
from cqil_dist.store.cache_entry import cache_dir

SILENT = SilentProgress()

# A process whose conversion leaves half a file and then waits for the file that lets it end, for a
# minute at most, and which logs every conversion it starts.
SLOW_CONVERSION = """
import shutil, sys, time
from pathlib import Path
from cqil_dist.store import store
from cqil_dist.progress import ConsoleProgress

model, finished, log, may_end = sys.argv[1:]

def convert(gguf, directory, name, progress):
    with open(log, "a") as out:
        out.write("converting\\n")
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(b"half")
    deadline = time.monotonic() + 60
    while not Path(may_end).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    shutil.copytree(finished, directory, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("manifest.json"))

store.gguf.convert = convert
print(store.resolve(model, ConsoleProgress()))
"""


def start_slow_conversion(
    model: Path, converted_cache: Path, log: Path, may_end: Path, errors: Path
) -> subprocess.Popen[str]:
    (finished,) = (converted_cache / "models").iterdir()
    paths = (model, finished, log, may_end)
    with errors.open("w") as stderr:
        return subprocess.Popen(
            [sys.executable, "-c", SLOW_CONVERSION, *map(str, paths)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_converted_gguf_is_the_original_model(
    tiny_gguf: TinyGguf, filled_cache: Path, quick_conversion: list[Path]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = store.resolve(str(tiny_gguf.path), SILENT)
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)

    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    ids_BT = torch.randint(3, 200, (2, 17))
    with torch.no_grad():
        found, expected = model(ids_BT).logits, tiny_gguf.original(ids_BT).logits
    assert torch.allclose(found, expected, atol=1e-5), (found - expected).abs().max()
    text = "hello, wörld 123\n\tΩ 🙂"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    chat = [{"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    # The file names only <|endoftext|> as its end, but an answer in a chat ends with <|im_end|>.
    assert model.generation_config.eos_token_id == [0, tokenizer.convert_tokens_to_ids(TURN_END)]
    assert quick_conversion == []


def test_what_is_converted_does_not_depend_on_the_environment(
    tiny_gguf: TinyGguf,
    cache: Path,
    converted_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = store.resolve(str(tiny_gguf.path), ConsoleProgress())
    assert "Converting tiny.gguf to float32" in capsys.readouterr().err
    (expected,) = (converted_cache / "models").iterdir()
    for file in expected.iterdir():
        if file.name != "manifest.json":
            assert (path / file.name).read_bytes() == file.read_bytes(), file.name


def test_second_resolve_loads_none_of_the_large_libraries(
    tiny_gguf: TinyGguf, filled_cache: Path
) -> None:
    script = (
        "import sys\n"
        "from cqil_dist.store.store import resolve\n"
        "from cqil_dist.progress import SilentProgress\n"
        f"resolve({str(tiny_gguf.path)!r}, SilentProgress())\n"
        "print({'torch', 'transformers', 'huggingface_hub', 'gguf'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "set()\n"


def test_gguf_is_known_by_its_content(
    tiny_gguf: TinyGguf, filled_cache: Path, quick_conversion: list[Path], tmp_path: Path
) -> None:
    before = store.resolve(str(tiny_gguf.path), SILENT)
    elsewhere = tmp_path / "renamed.gguf"
    shutil.copy(tiny_gguf.path, elsewhere)
    assert store.resolve(str(elsewhere), SILENT) == before
    assert quick_conversion == []

    write_tiny_gguf(elsewhere, seed=1)  # the same name and size, other weights
    assert store.resolve(str(elsewhere), SILENT) != before
    assert quick_conversion == [elsewhere]


def _cut_weights(entry: Path) -> None:
    os.truncate(entry / "model.safetensors", 1000)


def _remove_tokenizer(entry: Path) -> None:
    (entry / "tokenizer.json").unlink()


def _cut_manifest(entry: Path) -> None:
    os.truncate(entry / "manifest.json", 40)


@pytest.mark.parametrize("damage", [_cut_weights, _remove_tokenizer, _cut_manifest])
def test_resolve_repairs_an_entry_that_is_not_whole(
    tiny_gguf: TinyGguf,
    filled_cache: Path,
    quick_conversion: list[Path],
    damage: Callable[[Path], None],
) -> None:
    entry = store.resolve(str(tiny_gguf.path), SILENT)
    intact = {file.name: file.read_bytes() for file in entry.iterdir()}
    damage(entry)

    assert store.resolve(str(tiny_gguf.path), SILENT) == entry
    assert len(quick_conversion) == 1
    assert {file.name: file.read_bytes() for file in entry.iterdir()} == intact


def test_fetch_repairs_a_file_whose_content_changed(
    tiny_gguf: TinyGguf, filled_cache: Path, quick_conversion: list[Path]
) -> None:
    fetched = store.fetch(str(tiny_gguf.path), SILENT)
    assert quick_conversion == []
    weights = fetched.path / "model.safetensors"
    intact = weights.read_bytes()
    weights.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))

    assert store.fetch(str(tiny_gguf.path), SILENT) == fetched
    assert weights.read_bytes() == intact
    assert len(quick_conversion) == 1


def test_entry_made_from_another_source_is_made_again(
    tiny_gguf: TinyGguf, filled_cache: Path, quick_conversion: list[Path]
) -> None:
    manifest = store.resolve(str(tiny_gguf.path), SILENT) / "manifest.json"
    stated = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**stated, "source": "something older"}))
    store.resolve(str(tiny_gguf.path), SILENT)
    assert len(quick_conversion) == 1


def test_next_run_recovers_from_a_kill_half_way(
    tiny_gguf: TinyGguf,
    cache: Path,
    converted_cache: Path,
    quick_conversion: list[Path],
    tmp_path: Path,
) -> None:
    paths = (tmp_path / name for name in ("log", "never there", "errors"))
    killed = start_slow_conversion(tiny_gguf.path, converted_cache, *paths)
    with killed:
        wait_until(lambda: list(cache.glob("building/*/*/model/model.safetensors")))
        killed.send_signal(signal.SIGKILL)
    assert store.list_models()[1:] == []
    # What an earlier kill left of a model that nobody asks for again goes too.
    (cache / "building" / "another" / "tmp").mkdir(parents=True)

    path = store.resolve(str(tiny_gguf.path), SILENT)
    assert (path / "model.safetensors").stat().st_size > 1000
    assert len(quick_conversion) == 1
    assert list((cache / "building").iterdir()) == []


def test_converter_ends_when_its_parent_is_killed(
    tiny_gguf: TinyGguf, cache: Path, quick_conversion: list[Path]
) -> None:
    script = (
        "import sys\n"
        "from cqil_dist.store.store import resolve\n"
        "from cqil_dist.progress import SilentProgress\n"
        "resolve(sys.argv[1], SilentProgress())\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tiny_gguf.path)]) as parent:
        wait_until(psutil.Process(parent.pid).children)
        children = psutil.Process(parent.pid).children()
        parent.kill()
    _, alive = psutil.wait_procs(children, timeout=3)  # torch alone takes longer to load
    assert alive == []
    store.resolve(str(tiny_gguf.path), SILENT)


def test_two_processes_at_once_convert_once(
    tiny_gguf: TinyGguf, cache: Path, converted_cache: Path, tmp_path: Path
) -> None:
    log, may_end = tmp_path / "log", tmp_path / "may end"
    told = [tmp_path / f"errors{number}" for number in range(2)]
    both = [
        start_slow_conversion(tiny_gguf.path, converted_cache, log, may_end, errors)
        for errors in told
    ]

    def waiting() -> list[str]:
        texts = [errors.read_text() for errors in told]
        return [text for text in texts if "Waiting for another process" in text]

    wait_until(waiting)
    may_end.touch()
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], [e.read_text() for e in told]
    assert log.read_text() == "converting\n"
    assert outputs[0] == outputs[1]
    assert (Path(outputs[0].strip()) / "manifest.json").is_file()
    (waited,) = waiting()
    assert "tiny.gguf" in waited


def test_list_models_names_builtins_and_what_is_cached(
    tiny_gguf: TinyGguf, filled_cache: Path
) -> None:
    smollm, tiny = store.list_models()
    assert (smollm.name, smollm.size_bytes) == ("smollm2-135m", 0)
    assert tiny.name == "tiny.gguf"
    assert tiny.path == store.resolve(str(tiny_gguf.path), SILENT)
    on_disk = sum(file.stat().st_size for file in tiny.path.iterdir())
    assert tiny.size_bytes == on_disk - (tiny.path / "manifest.json").stat().st_size


def test_full_disk_is_noticed_before_the_work(
    tiny_gguf: TinyGguf,
    cache: Path,
    quick_conversion: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 12_000_000))
    with pytest.raises(ModelError, match=r"tiny\.gguf needs 5\d\.\d MB .* but 12\.0 MB is free"):
        store.resolve(str(tiny_gguf.path), SILENT)
    assert quick_conversion == []


def test_cache_that_cannot_be_written(
    tiny_gguf: TinyGguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CQIL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="CQIL_CACHE chooses another place"):
        store.resolve(str(tiny_gguf.path), SILENT)


def test_file_that_is_not_gguf(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"<html>not found</html>")
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        store.resolve(str(tmp_path / "model.gguf"), SILENT)


def test_gguf_that_is_cut_short(tiny_gguf: TinyGguf, cache: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf.path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"cut\.gguf is damaged or cut short"):
        store.resolve(str(cut), SILENT)


def test_gguf_of_an_unknown_architecture(cache: Path, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "odd.gguf", architecture="gptj")
    with pytest.raises(UnsupportedModel, match=r"odd\.gguf could not be converted.*gptj"):
        store.resolve(str(tmp_path / "odd.gguf"), SILENT)
    assert store.list_models()[1:] == []


@pytest.mark.parametrize(
    "name", ["smolm2-135m", "/no/such/directory", "./nowhere", "a/missing.gguf"]
)
def test_name_of_nothing(cache: Path, name: str) -> None:
    with pytest.raises(ModelNotFound, match="is not a model") as raised:
        store.resolve(name, SILENT)
    assert repr(name) in str(raised.value)
    assert "smollm2-135m" in str(raised.value)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"CQIL_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/cqil_dist"),
        ({"HOME": "/c"}, "/c/.cache/cqil_dist"),
    ],
)
def test_cache_dir(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CQIL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(cache_dir()) == expected
