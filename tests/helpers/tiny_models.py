"""Tiny random models in Hugging Face's layout, and ways to run them.

Every tensor is random, gains and biases included, and large enough that a part which is missing,
doubled or misplaced changes the logits by far more than rounding does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from cqil_dist.assignment import assign, follow
from cqil_dist.exchange import TcpExchange
from cqil_dist.model.checkpoint import Checkpoint
from cqil_dist.model.config import ModelConfig
from cqil_dist.model.head import Embedding
from cqil_dist.model.precision import Precision
from cqil_dist.model.reference import ReferenceModel
from cqil_dist.model.step import Segment, Step, StepResult
from cqil_dist.plan import Bypass, Group, Plan
from cqil_dist.rank.program import CacheShape, RankProgram
from cqil_dist.rank.protocol import best_of_shard, most_likely
from cqil_dist.store.tokenizer import load_tokenizer

CPU = torch.device("cpu")
VOCAB = 307  # prime: never a multiple of the number of ranks
END_OF_TEXT = "<|endoftext|>"  # token 0
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
_CORPUS = (
    "The capital of France is Paris. The harbour lies by the sea, and every morning the keeper of "
    "the lighthouse walks to the market to buy bread, fish and the news of the town."
)

BYPASSES = ("0", "1", "full", "parallel")

# Relative, for float32 logits. Sums in another order change them by 1e-6, a part that is wrong by
# 1e-2 or more.
TOLERANCE = 1e-4


def tiny_config(family: str = "llama", **changes: Any) -> Any:
    """A transformers config of a few narrow layers, with odd sizes where possible.

    Six query and three key/value heads, so that two shards of a layer have different widths.
    """
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    classes = {
        "llama": LlamaConfig,
        "mistral": MistralConfig,
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
    }
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 41,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,  # about 1 / sqrt(hidden_size): every part keeps its input's size
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
        "sliding_window": None,
    }
    if family in ("mistral", "qwen3"):
        settings["head_dim"] = 8
    return classes[family](**{**settings, **changes})


@dataclass(frozen=True)
class TinyModel:
    """A model's directory, and the implementations that tests compare on it."""

    path: Path

    @cached_property
    def config(self) -> ModelConfig:
        return ModelConfig.from_directory(self.path)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.path)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.path)

    @cached_property
    def original(self) -> Any:
        """transformers' float32 model, read from the same files."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            self.path, dtype=torch.float32, attn_implementation="eager"
        )
        return model.eval()

    @torch.inference_mode()
    def original_logits(self, token_ids: Sequence[int]) -> Tensor:
        logits: Tensor = self.original(torch.tensor([token_ids])).logits[0]
        return logits

    def plan(self, source: str) -> Plan:
        return Plan.parse(source, self.config.num_layers)

    def reference_logits(self, plan: Plan, token_ids: Sequence[int]) -> Tensor:
        return ReferenceModel(self.config, self.checkpoint, plan).logits(token_ids)


class TinyModelFactory:
    """Makes each tiny model once, and keeps it for the session."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[tuple[str, str | None], TinyModel] = {}

    def __call__(self, config: Any = None, *, max_shard_size: str | None = None) -> TinyModel:
        """The model of a transformers config; by default, of a Llama.

        Args:
            max_shard_size: save in several files of at most this size, with an index.
        """
        config = tiny_config() if config is None else config
        key = (config.to_json_string(use_diff=False), max_shard_size)
        if key not in self._made:
            path = self._root / str(len(self._made))
            write_tiny_model(path, config, max_shard_size)
            self._made[key] = TinyModel(path)
        return self._made[key]


def write_tiny_model(path: Path, config: Any, max_shard_size: str | None = None) -> None:
    """Write random float32 weights and a byte-level tokenizer, the same ones every time."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
    sizes = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(path, **sizes)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(), eos_token=END_OF_TEXT, chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(path)


def byte_level_tokenizer() -> Any:
    """A tokenizer trained on a few sentences, which decodes any text's tokens to the same text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    return tokenizer


def random_tokens(count: int, seed: int = 0) -> list[int]:
    """Random token ids without the end of text."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(1, VOCAB, (count,), generator=generator).tolist()
    return ids


def relative_difference(given: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest logit; infinite if a number is NaN."""
    assert given.shape == expected.shape, f"{tuple(given.shape)} against {tuple(expected.shape)}"
    difference = float((given - expected).abs().max() / expected.abs().max())
    return difference if difference == difference else float("inf")


def assert_near(given: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Check that two tensors differ only by rounding."""
    difference = relative_difference(given, expected)
    assert difference <= tolerance, f"logits differ by {difference:.1e} of the largest"


class LocalModel:
    """A whole model on one rank, in this process: token ids in, logits out.

    Args:
        compare: a second plan that steps may walk, as plan 1.
        checkpoints: what each plan is read from; None for the model's own.
    """

    def __init__(
        self,
        model: TinyModel,
        plan: Plan,
        slots: int = 4,
        max_len: int = 64,
        dtype: torch.dtype = torch.float32,
        *,
        compare: Plan | None = None,
        checkpoints: Sequence[Checkpoint] | None = None,
    ) -> None:
        config, checkpoint = model.config, model.checkpoint
        assignments = [assign(plan, 1, config.shape)]
        if compare is not None:
            assignments.append(follow(compare, assignments[0]))
        shape = CacheShape(slots, max_len)
        checkpoints = checkpoints or [checkpoint] * len(assignments)
        precision = Precision.of(str(dtype).removeprefix("torch."))
        self.program = RankProgram(0, assignments, config, checkpoints, shape, precision, CPU)
        self._embedding = Embedding(config, checkpoint, dtype)
        self._exchange = TcpExchange(0, {}, {}, config.hidden_size, dtype, CPU, 1 << 20)

    def begin(self, step: Step) -> None:
        self._begun = step

    def finish(self) -> StepResult:
        logits = self.compute(self._begun)
        if not self._begun.argmax_only:
            return StepResult(logits)
        return StepResult(most_likely([best_of_shard(logits, range(logits.shape[-1]))]))

    def check(self) -> None:
        """Do nothing: this model cannot be lost."""

    def compute(self, step: Step) -> Tensor:
        """The logits [R, V] that the step asks for."""
        hidden = self._embedding(step.token_ids)
        return self.program.step(step.segments, hidden, self._exchange, step.plan_index)

    def forward(
        self, segments: Sequence[Segment], token_ids: Sequence[int], plan: int = 0
    ) -> Tensor:
        return self.compute(Step(tuple(segments), tuple(token_ids), plan))

    def logits(
        self, token_ids: Sequence[int], cuts: Sequence[int], slot: int = 0, plan: int = 0
    ) -> Tensor:
        """Logits [R, V] after the last token of each chunk, which have `cuts` tokens."""
        assert sum(cuts) == len(token_ids)
        rows: list[Tensor] = []
        start = 0
        for count in cuts:
            chunk = token_ids[start : start + count]
            rows.append(self.forward([Segment(slot, start, count, 1)], chunk, plan))
            start += count
        return torch.cat(rows)


def ends_of(cuts: Sequence[int]) -> list[int]:
    """The position of each chunk's last token."""
    return [sum(cuts[: index + 1]) - 1 for index in range(len(cuts))]


_BYPASSES = st.one_of(
    st.integers(0, 5).map(lambda distance: Bypass("distance", distance)),
    st.sampled_from([Bypass("full"), Bypass("parallel")]),
)


@st.composite
def plans(draw: st.DrawFn, max_layers: int = 24, max_group: int = 7) -> Plan:
    """Any plan: groups of any sizes, each with a bypass of its own."""
    sizes = draw(st.lists(st.integers(1, max_group), min_size=1, max_size=max_layers))
    groups: list[Group] = []
    first = 0
    for size in sizes:
        last = min(first + size, max_layers)
        if last > first:
            groups.append(Group(tuple(range(first, last)), draw(_BYPASSES)))
        first = last
    return Plan(tuple(groups), first)
