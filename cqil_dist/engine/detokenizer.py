"""Turns generated tokens into text as they come, up to a stop string.

Every request has a `Detokenizer`. It knows the tokenizer's decoder and the stop strings; nothing of
models, sampling or why a request ends otherwise. It has two stages, each of which holds back what
is not final:

1. Tokens to characters. A token is decoded together with a few before it, because decoders join
   neighbours (bytes to characters, a leading space that only the first token loses); U+FFFD at the
   end means that a character is not complete yet.
2. Characters to final text. The longest end that could be the beginning of a stop string waits.

The libraries' own would not do:

- `tokenizers.decoders.DecodeStream` is stage 1, but it has no way to flush, it gives out the whole
  prompt again where that ends within a character, raises on byte tokens that are not UTF-8
  (sentencepiece vocabularies), and grows with every token of a run it gives no text for (150
  microseconds a token after 4,000 end-of-sequence tokens under ignore_eos; here 0.1).
- `transformers.StopStringCriteria` is stage 2 in part: it neither cuts the match off nor holds a
  beginning back, and takes 0.29 s to build, for every request, with SmolLM2's vocabulary of 49,152
  tokens, then 0.1 ms a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from cqil_dist.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# A character has at most 4 bytes, hence at most 4 tokens.
_CHARACTER = 4

# More U+FFFD in a row than an unfinished character and its byte-token neighbours can account for:
# the bytes are not UTF-8, and waiting for more of them will not help.
_NOT_UTF8 = 16


class Detokenizer:
    """Turns one request's tokens into text.

    All that `push` and `finish` give, concatenated, is what the tokenizer's decoder (special tokens
    skipped) gives for prompt and output, after the prompt's text; up to the first stop string, and
    less U+FFFD at the very end, where a character was left incomplete. One exception: in a run of
    byte tokens that goes wrong after complete characters (sentencepiece vocabularies), a decoder
    that sees the whole run turns those characters into U+FFFD as well; here they are already out.

    Args:
        tokenizer: a transformers fast tokenizer, or the tokenizers.Tokenizer within one. Its
            `clean_up_tokenization_spaces`, which alters text already given out, is not applied.
        prompt_ids: the prompt's tokens; the last few are context for the first of the output.
        stop: texts that end the output. They are looked for in the output only.

    Attributes:
        stopped_by: the stop string that ended the output, or None. Of several, the one that a
            reader who gets single characters would see complete first (then the longest), so it
            does not depend on how the text is cut into tokens.

    Raises:
        UnsupportedModel: a transformers tokenizer that is not backed by `tokenizers`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | Tokenizer,
        prompt_ids: Sequence[int],
        stop: tuple[str, ...] = (),
    ) -> None:
        self._tokenizer = _backend(tokenizer)
        self._text: Callable[[Sequence[int]], str] = partial(
            self._tokenizer.decode, skip_special_tokens=True
        )
        self._special = {
            token_id
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        # The tokens being decoded: `_context` of them whose text is out, for the others to join on
        # to, then those that have not made complete characters so far. `_given` characters of the
        # text they make together are out.
        self._window, self._context, self._given = self._prompt_window(prompt_ids)
        self._stop = stop
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, token_id: int) -> str:
        """Take the next token; returns the text that has become final, which may be empty.

        Once a stop string has appeared, tokens are ignored.
        """
        if self.stopped_by is not None or token_id in self._special:
            return ""
        self._window.append(token_id)
        text = self._text(self._window)
        complete = text.rstrip(_REPLACEMENT)
        if len(text) - len(complete) > _NOT_UTF8:
            complete = text
        new = complete[self._given :]
        self._given = max(self._given, len(complete))
        if new and complete == text:
            # What came since the last time is the context of what comes next.
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._given = len(self._text(self._window))
        return self._release(new) if new else ""

    def finish(self) -> str:
        """Give out the text still held back, once the last token has come."""
        text, self._held = self._held, ""
        return text

    def token_text(self, token_id: int) -> str:
        """Decode one token alone, for logprobs: a leading space is kept, a special token shown.

        A part of a character shows as U+FFFD.
        """
        # Decoded after itself, since decoders take a leading space from the first token alone.
        alone = self._tokenizer.decode([token_id], skip_special_tokens=False)
        twice = self._tokenizer.decode([token_id, token_id], skip_special_tokens=False)
        return twice[len(alone) :]

    def _prompt_window(self, prompt_ids: Sequence[int]) -> tuple[list[int], int, int]:
        ids = [token_id for token_id in prompt_ids if token_id not in self._special]
        # The context has to end between characters, and not start within one where byte tokens run
        # on to its end: U+FFFD at its end shows both. So it is tried at a few lengths; and where
        # the prompt ends within a character, its last tokens wait for the rest of it.
        for end in range(len(ids), max(-1, len(ids) - _CHARACTER), -1):
            for start in range(max(0, end - _CHARACTER), max(-1, end - 3 * _CHARACTER), -1):
                text = self._text(ids[start:end])
                if not text.endswith(_REPLACEMENT):
                    return ids[start:], end - start, len(text)
        ids = ids[-_CHARACTER:]
        return ids, len(ids), len(self._text(ids))

    def _release(self, new: str) -> str:
        """Add new text to what is held back, and give out what is final of it (stage 2)."""
        text = self._held + new
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            begin, self.stopped_by = min(found, key=lambda f: (f[0] + len(f[1]), f[0]))
            self._held = ""
            return text[:begin]
        final = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[final:]
        return text[:final]


def _backend(tokenizer: PreTrainedTokenizerBase | Tokenizer) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(backend, Tokenizer):
        raise UnsupportedModel(
            f"the tokenizer is a {type(tokenizer).__name__}, but text is streamed with the "
            "decoder of a `tokenizers` backend; save it with a tokenizer.json first"
        )
    return backend


def _overlap(text: str, stop: str) -> int:
    """Measure the longest end of `text` that is a beginning of `stop`, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
