"""A tiny random Llama model in a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADS, KV_HEADS, WIDTH, FEED_FORWARD, LAYERS = 4, 2, 64, 96, 2
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class TinyGguf:
    """A GGUF file, and the transformers model that has the same weights."""

    path: Path
    original: Any


def _byte_characters() -> list[str]:
    """GPT-2's printable character for every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in plain else next(spare)) for byte in range(256)]


def _llama_cpp_order(weight: Any, heads: int) -> Any:
    """A query or key projection with its rows in GGUF's order for rotary embeddings."""
    rows, columns = weight.shape
    split = weight.reshape(heads, 2, rows // heads // 2, columns)
    return split.swapaxes(1, 2).reshape(rows, columns)


def write_tiny_gguf(path: Path, architecture: str = "llama", seed: int = 0) -> Any:
    """Write a random Llama model with a byte-level tokenizer, and return it in transformers.

    Its chat template ends turns with a token that the file does not name as its end token.
    """
    import gguf
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = [END_OF_TEXT, TURN_START, TURN_END, *_byte_characters(), "he", "ll"]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=0,
    )
    original: Any = LlamaForCausalLM(config)
    original.eval()
    with torch.no_grad():  # with gains of 1, a missing norm would not show
        for parameter in original.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1))

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))  # 3 is a control token
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, tensor in original.state_dict().items():
        values = tensor.numpy()
        if "q_proj" in name:
            values = _llama_cpp_order(values, HEADS)
        elif "k_proj" in name:
            values = _llama_cpp_order(values, KV_HEADS)
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        assert gguf_name is not None
        writer.add_tensor(gguf_name, values.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return original
