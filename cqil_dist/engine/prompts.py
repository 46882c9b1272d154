"""Turns what users write into the token ids that a model continues, and refuses what it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cqil_dist.errors import RequestError
from cqil_dist.inputs import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Tokenizers may drop characters (runs of blanks, compositions) before they count tokens.
_NORMALISED = 2


class PromptEncoder:
    """Turns prompts into token ids.

    Args:
        max_len: most tokens a prompt and its completion may have together.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, max_len: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_len = max_len
        # Longer texts have too many tokens, whatever they are: to find out how many takes seconds.
        longest = max(map(len, tokenizer.get_vocab()))
        self._max_characters = _NORMALISED * max_len * longest

    def encode(self, prompt: Prompt, max_tokens: int) -> list[int]:
        """Encode a text, token ids, or a conversation, which the chat template lays out.

        Args:
            max_tokens: how many tokens are to be generated; if any, one at least has to fit.

        Raises:
            RequestError: the prompt is empty, too long, holds unknown token ids, or is a
                conversation that the model's chat template does not take.
        """
        if isinstance(prompt, str):
            self._check_length(prompt)
            ids: list[int] = self._tokenizer(prompt)["input_ids"]
        elif prompt and isinstance(prompt[0], dict):
            ids = self._encode_chat(prompt)
        else:
            ids = [token_id for token_id in prompt if isinstance(token_id, int)]
        if not ids:
            raise RequestError("the prompt is empty; give at least one token to continue")
        self.check_known(ids)
        if len(ids) + min(1, max_tokens) > self._max_len:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, but prompt and completion together may have "
                f"{self._max_len}; shorten the prompt, or launch with a larger max_len"
            )
        return ids

    def decode(self, prompt: Prompt, ids: Sequence[int]) -> str:
        """Give the prompt as text: as written, or its tokens decoded, special ones included."""
        if isinstance(prompt, str):
            return prompt
        text: str = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    def check_known(self, token_ids: Sequence[int]) -> None:
        """Raise RequestError for token ids outside the vocabulary."""
        if unknown := [each for each in token_ids if not 0 <= each < self._vocab_size]:
            raise RequestError(
                f"token ids {unknown[:5]} lie outside the vocabulary (0 to {self._vocab_size - 1})"
            )

    def _check_length(self, text: str) -> None:
        if len(text) > self._max_characters:
            raise RequestError(
                f"the prompt has {len(text)} characters, which cannot be the {self._max_len} "
                "tokens that prompt and completion together may have; shorten the prompt, or "
                "launch with a larger max_len"
            )

    def _encode_chat(self, messages: Any) -> list[int]:
        if len(messages) > self._max_len:
            raise RequestError(
                f"the conversation has {len(messages)} messages, which cannot be the "
                f"{self._max_len} tokens that prompt and completion together may have"
            )
        self._check_length("".join(part for message in messages for part in message.values()))
        try:
            encoded: Any = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except Exception as error:  # templates are programs: they raise what they like
            raise RequestError(
                f"the model's chat template refused the messages: {error}"
            ) from error
        return list(encoded["input_ids"])
