"""Conversion of GGUF files into model directories.

transformers reads the GGUF file, and writes what the runtime reads: float32 safetensors, config,
tokenizer with chat template, and generation config. It runs in a process of its own, which keeps
torch out of the caller, gives all of its memory back, and keeps the library's messages off the
user's terminal. This module knows nothing of the cache.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cqil_dist.errors import CheckpointError, UnsupportedModel
from cqil_dist.progress import Progress, Task

if TYPE_CHECKING:
    from transformers import GenerationConfig

# transformers counts the tensors with a tqdm bar: "... GGUF tensors...:  15%|#4  | 40/272 [00:01".
_TENSORS_DONE = re.compile(rb"GGUF tensors[^\r\n]*?\| *(\d+)/(\d+) ")


def convert(gguf: Path, directory: Path, name: str, progress: Progress) -> None:
    """Write the model in `gguf` to `directory` (which must not exist) as float32 safetensors.

    Args:
        gguf: the file to read.
        directory: where config.json, model.safetensors, generation_config.json and the tokenizer
            with its chat template are written.
        name: the model's name in the line that shows progress.
        progress: where the number of converted tensors is reported.

    Raises:
        UnsupportedModel: transformers has no loader for the file's architecture.
        CheckpointError: the file cannot be converted for another reason.
    """
    environment = dict(os.environ)
    # The child finds this package even if it is not installed, and needs no GPU.
    package_parent = str(Path(__file__).parents[2])
    inherited = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package_parent, inherited)))
    environment["CUDA_VISIBLE_DEVICES"] = ""
    # Each of these would change what is written, or hide the progress.
    for variable in ("TQDM_DISABLE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environment.pop(variable, None)
    command = [sys.executable, "-m", "cqil_dist.store.gguf", str(gguf), str(directory)]
    with (
        progress.task(f"Converting {name} to float32", unit="tensors") as task,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        ) as child,
    ):
        try:
            said = _follow(child, task)
        except BaseException:
            child.kill()
            raise
    if child.returncode != 0:
        reason = said.strip().splitlines()[-1] if said.strip() else f"exit {child.returncode}"
        if child.returncode < 0:
            number = -child.returncode
            reason = f"the converter was ended by {signal.Signals(number).name}" + (
                " (out of memory?)" if number == signal.SIGKILL else f": {reason}"
            )
        kind = UnsupportedModel if "is not supported" in reason else CheckpointError
        raise kind(
            f"{gguf} could not be converted: {reason}; a directory with config.json and "
            "safetensors of the same model works without conversion"
        )


def _follow(child: subprocess.Popen[bytes], task: Task) -> str:
    """Report the child's progress until it ends, and return the end of its standard error."""
    assert child.stderr is not None
    said = b""
    while chunk := os.read(child.stderr.fileno(), 65536):
        said = (said + chunk)[-65536:]
        if found := _TENSORS_DONE.findall(said):
            completed, total = found[-1]
            task.update(int(completed), int(total))
    return said.decode(errors="replace")


def _main(gguf: Path, directory: Path) -> None:
    """Convert one file, in the process that `convert` starts for it."""
    _end_with_parent()
    import torch
    import transformers

    options: dict[str, Any] = {}
    # Releases that have no GgufConfig dequantize always; later ones may keep quantized blocks.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # transformers would read other files beside the GGUF file, so it gets a folder with no others.
    with tempfile.TemporaryDirectory(dir=directory.parent) as alone:
        (Path(alone) / "model.gguf").symlink_to(gguf.resolve())
        model = transformers.AutoModelForCausalLM.from_pretrained(
            alone, gguf_file="model.gguf", dtype=torch.float32, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf")
    _add_end_tokens(model.generation_config, tokenizer)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for path in directory.iterdir():  # safetensors writes files that only their owner may read
        path.chmod(0o644)


def _add_end_tokens(generation_config: GenerationConfig, tokenizer: Any) -> None:
    """Add to a generation config the tokenizer's end token and the token that ends a chat answer.

    GGUF names one end token, which in chat models is not always the one that the chat template puts
    after an answer.
    """
    stated = generation_config.eos_token_id
    ends = [stated] if isinstance(stated, int) else list(stated or [])
    ends += [tokenizer.eos_token_id, _end_of_answer(tokenizer)]
    kept = list(dict.fromkeys(end for end in ends if end is not None))
    generation_config.eos_token_id = kept[0] if len(kept) == 1 else kept or None


def _end_of_answer(tokenizer: Any) -> int | None:
    """Find the special token right after an assistant's message in the chat template, if any."""
    if not tokenizer.chat_template:
        return None
    import jinja2

    answer = "An answer that no template contains."
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except jinja2.TemplateError:  # the template may demand what this plain chat does not have
        return None
    _, found, after = text.rpartition(answer)
    tokens = tokenizer(after, add_special_tokens=False).input_ids if found else []
    if not tokens:
        return None
    added = tokenizer.added_tokens_decoder.get(tokens[0])
    return tokens[0] if added is not None and added.special else None


def _end_with_parent() -> None:
    """Start a thread that ends this process when its parent has ended, however that came about.

    The parent's end of this process's standard input closes then.
    """

    def wait() -> None:
        os.read(0, 1)  # not sys.stdin, whose lock must be free when the interpreter ends
        os._exit(1)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
