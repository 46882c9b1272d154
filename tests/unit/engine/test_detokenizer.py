"""Streaming text is the tokenizer's own text, whole characters at a time, cut at stop strings."""

import string
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cqil_dist.engine.detokenizer import Detokenizer
from cqil_dist.errors import UnsupportedModel

CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "你好世界。你好你好 Grüße aus Köln, niño; 🦙🦙 👩‍👩‍👧‍👦 e\u0301e\u0301",
    "abababab aabb abba stop STOP\n\nUser: hello\n",
]
SPECIAL = "<|end|>"


@cache
def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3, Qwen and SmolLM2: tokens are bytes, which may cut any character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=[SPECIAL],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def unigram(byte_fallback: bool) -> Tokenizer:
    words = [f"\u2581{word}" for word in ("The", "the", "lazy", "fox", "dog", "hello", "")]
    vocab = [("<unk>", 0.0), *((word, -5.0) for word in words)]
    vocab += [(character, -9.0) for character in string.printable if character != " "]
    if byte_fallback:
        vocab += [(f"<0x{byte:02X}>", -99.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True)])
    return tokenizer


@cache
def metaspace() -> Tokenizer:
    """As T5: words begin with U+2581, which the text's first token loses."""
    tokenizer = unigram(byte_fallback=False)
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@cache
def byte_fallback() -> Tokenizer:
    """As Llama 2 and Mistral: characters outside the vocabulary are one token per byte."""
    tokenizer = unigram(byte_fallback=True)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


TOKENIZERS = [byte_level, metaspace, byte_fallback]
every_tokenizer = pytest.mark.parametrize("make", TOKENIZERS, ids=lambda make: make.__name__)

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
texts = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from(
            ["🦙", "👩‍👩‍👧‍👦", "e\u0301", "你好", " the", "  ", "\n\n", "🇨🇭", SPECIAL, "ab"]
        ),
    ),
    max_size=8,
).map(lambda parts: "".join(parts).replace(REPLACEMENT, ""))


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def id_of(tokenizer: Tokenizer, token: str) -> int:
    return tokenizer.get_vocab()[token]


def stream(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@every_tokenizer
@settings(max_examples=150, deadline=None)
@given(prompt=texts, output=texts)
def test_chunks_join_to_the_decoded_text(
    make: Callable[[], Tokenizer], prompt: str, output: str
) -> None:
    tokenizer = make()
    prompt_ids, output_ids = ids_of(tokenizer, prompt), ids_of(tokenizer, output)
    chunks = stream(Detokenizer(tokenizer, prompt_ids), output_ids)
    assert tokenizer.decode(prompt_ids) + "".join(chunks) == tokenizer.decode(
        prompt_ids + output_ids
    )
    assert not any(REPLACEMENT in chunk for chunk in chunks)


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 399), max_size=16))
def test_bytes_that_are_not_utf8_show_as_the_decoder_shows_them(ids: list[int]) -> None:
    text = "".join(stream(Detokenizer(byte_level(), []), ids))
    assert text == byte_level().decode(ids).rstrip(REPLACEMENT)


def test_the_first_word_keeps_its_space_after_a_prompt_and_only_then() -> None:
    for make in (metaspace, byte_fallback):
        tokenizer = make()
        word = ids_of(tokenizer, "fox")
        assert "".join(stream(Detokenizer(tokenizer, ids_of(tokenizer, "The")), word)) == " fox"
        assert "".join(stream(Detokenizer(tokenizer, []), word)) == "fox"
        # A prompt of special tokens makes no text to put a space after.
        special = ids_of(tokenizer, SPECIAL)
        assert "".join(stream(Detokenizer(tokenizer, special), word)) == "fox"


def test_tokens_without_text_do_not_cost_the_next_word_its_space() -> None:
    for make in (metaspace, byte_fallback):
        tokenizer = make()
        word, specials = ids_of(tokenizer, "fox"), [id_of(tokenizer, SPECIAL)] * 40
        # Ids past the vocabulary are what a padded vocabulary head may yield.
        no_text = [*specials, 100_000, *specials]
        prompt_ids = ids_of(tokenizer, "The")
        chunks = stream(Detokenizer(tokenizer, prompt_ids + specials), no_text + word)
        assert "".join(chunks) == " fox"
        assert "".join(stream(Detokenizer(tokenizer, []), prompt_ids + no_text + word)) == "The fox"


def test_a_prompt_that_ends_in_a_run_of_byte_tokens_is_not_garbled() -> None:
    for text in ("🦒é" * 5, "é🦒好🦒", "好" * 9):
        prompt_ids = ids_of(byte_fallback(), text)
        output_ids = ids_of(byte_fallback(), "好é")[1:]  # without the space of a new word
        detokenizer = Detokenizer(byte_fallback(), prompt_ids)
        assert "".join(stream(detokenizer, output_ids)) == "好é"


def test_a_character_comes_whole_with_its_last_byte() -> None:
    for make in (byte_level, byte_fallback):
        tokenizer = make()
        ids = ids_of(tokenizer, "🦒")
        # sentencepiece puts a space before; three of the character's four bytes make nothing.
        *first, last = stream(Detokenizer(tokenizer, ids_of(tokenizer, "a")), ids)[:-1]
        assert "".join(first).strip() == ""
        assert last.endswith("🦒")


def test_text_before_half_a_character_does_not_wait_for_it() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"aâ": 0, "ĸ": 1, "ģ": 2}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    assert stream(Detokenizer(tokenizer, []), [0, 1, 2]) == ["a", "", "\u2581", ""]


def test_an_incomplete_end_is_dropped() -> None:
    for make in (byte_level, byte_fallback):
        ids = ids_of(make(), "fox 🦒")
        text = "".join(stream(Detokenizer(make(), []), ids[:-1]))
        assert text.rstrip() == "fox"


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_prompt_that_ends_within_a_character_is_completed_not_repeated(missing: int) -> None:
    for make in (byte_level, byte_fallback):
        ids = ids_of(make(), "the lazy dog 🦒🦒")
        detokenizer = Detokenizer(make(), ids[:-missing])
        assert "".join(stream(detokenizer, ids[-missing:])) == "🦒"


def test_a_prompt_with_a_replacement_character_is_not_repeated() -> None:
    for text in (f"lazy {REPLACEMENT} dog", f"lazy {REPLACEMENT}d", REPLACEMENT * 30 + "d"):
        prompt_ids = ids_of(byte_level(), text)
        chunks = stream(Detokenizer(byte_level(), prompt_ids), ids_of(byte_level(), "og"))
        assert "".join(chunks) == "og"


def test_bytes_gone_wrong_after_a_character_do_not_stop_the_stream() -> None:
    tokenizer = byte_fallback()
    broken = id_of(tokenizer, "<0xF0>")
    ids = [*ids_of(tokenizer, "🦒"), broken, *ids_of(tokenizer, "the lazy dog")]
    text = "".join(stream(Detokenizer(tokenizer, []), ids))
    assert text.lstrip().startswith("🦒" + REPLACEMENT)
    assert text.endswith(" the lazy dog")


@pytest.mark.parametrize("token", [SPECIAL, "Ģ"], ids=["special", "lone continuation byte"])
def test_a_token_repeated_for_ever_costs_the_same_for_ever(token: str) -> None:
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer, ids_of(tokenizer, "dog"))
    repeated = id_of(tokenizer, token)
    text = "".join(detokenizer.push(repeated) for _ in range(1000))
    assert len(detokenizer._window) < 40
    assert text == "" if token == SPECIAL else len(text) > 980
    assert "".join(stream(detokenizer, ids_of(tokenizer, " fox"))).endswith(" fox")


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What a reader of single characters is left with: stop at the first complete stop string."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


def still_open(text: str, stops: list[str]) -> int:
    """Length of the longest end of `text` that is a proper beginning of a stop string."""
    return max(
        size
        for size in range(len(text) + 1)
        if size == 0 or any(s.startswith(text[-size:]) and len(s) > size for s in stops)
    )


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="ab", max_size=30),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=3),
)
@example(text="abab", stops=["aba", "b"])  # one token completes both
def test_stop_strings_cut_as_if_read_by_character(text: str, stops: list[str]) -> None:
    kept, stop = cut_at_stop(text, stops)
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer, [], tuple(stops))
    ids = ids_of(tokenizer, text)
    out = ""
    for count, token_id in enumerate(ids, start=1):
        out += detokenizer.push(token_id)
        if detokenizer.stopped_by is None:
            # Nothing that may yet be cut is out, and nothing else is held back.
            so_far = tokenizer.decode(ids[:count])
            assert out == so_far[: len(so_far) - still_open(so_far, stops)]
    assert (out + detokenizer.finish(), detokenizer.stopped_by) == (kept, stop)


def test_tokens_after_a_stop_are_ignored() -> None:
    ids = ids_of(byte_level(), "hello\n\nUser: hello")
    detokenizer = Detokenizer(byte_level(), [], ("\nUser:",))
    assert "".join(stream(detokenizer, ids)) == "hello\n"
    assert detokenizer.stopped_by == "\nUser:"
    assert stream(detokenizer, ids) == [""] * (len(ids) + 1)


def test_a_stop_string_in_the_prompt_or_across_its_end_does_not_count() -> None:
    detokenizer = Detokenizer(byte_level(), ids_of(byte_level(), "STOP ST"), ("STOP",))
    assert "".join(stream(detokenizer, ids_of(byte_level(), "OP on"))) == "OP on"


@every_tokenizer
def test_a_transformers_tokenizer_serves_as_well(make: Callable[[], Tokenizer]) -> None:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=make())
    ids = ids_of(make(), "The quick fox")
    assert (
        "".join(stream(Detokenizer(wrapped, ids[:2]), ids[2:]))
        == wrapped.decode(ids)[len(wrapped.decode(ids[:2])) :]
    )


def test_a_tokenizer_without_a_backend_is_refused() -> None:
    tokenizer = PreTrainedTokenizerBase()
    with pytest.raises(UnsupportedModel, match="PreTrainedTokenizerBase"):
        Detokenizer(tokenizer, [])


def test_a_tokens_own_text_keeps_its_space_and_shows_specials() -> None:
    for make, space in ((byte_level, "Ġ"), (metaspace, "\u2581"), (byte_fallback, "\u2581")):
        detokenizer = Detokenizer(make(), [])
        assert detokenizer.token_text(id_of(make(), space + "fox")) == " fox"
        assert detokenizer.token_text(id_of(make(), SPECIAL)) == SPECIAL
    assert detokenizer.token_text(id_of(byte_fallback(), "<0xF0>")) == REPLACEMENT


@pytest.mark.real_model
@settings(max_examples=50, deadline=None)
@given(output=texts)
def test_the_real_tokenizer(smollm2_path: Path, output: str) -> None:
    tokenizer = real_tokenizer(smollm2_path)
    prompt = [{"role": "user", "content": "你好 🦙"}]
    template = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer.encode(str(template), add_special_tokens=False)
    output_ids = tokenizer.encode(output, add_special_tokens=False)
    chunks = stream(Detokenizer(tokenizer, prompt_ids), output_ids)
    # Not without loss: this vocabulary lacks some bytes that only rare characters have.
    decoded = str(tokenizer.decode(output_ids, skip_special_tokens=True))
    assert "".join(chunks) == decoded.rstrip(REPLACEMENT)


@cache
def real_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(path)
