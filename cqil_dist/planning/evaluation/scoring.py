"""Log likelihoods of continuations in batches, as lm-eval defines them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from cqil_dist.errors import TextError
from cqil_dist.planning.measure.grouped_model import final_hidden, next_token_logits
from cqil_dist.planning.measure.windows import Windows
from cqil_dist.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The most tokens that are computed at once, padding included.
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Request:
    """A continuation to score after a context (lm-eval's `loglikelihood`)."""

    context: str
    continuation: str


class Likelihood(NamedTuple):
    """A continuation's log likelihood, and whether greedy decoding would give it."""

    logprob: float
    greedy: bool


@dataclass(frozen=True)
class Encoded:
    """The token ids of a context and of its continuation."""

    context: list[int]
    continuation: list[int]

    @property
    def tokens(self) -> int:
        """Return the number of tokens of both together."""
        return len(self.context) + len(self.continuation)


def encode(tokenizer: PreTrainedTokenizerBase, request: Request, max_len: int) -> Encoded:
    """Encode a context and its continuation as lm-eval does.

    The two are tokenised together, so that the tokens are those of running text. Blanks at the
    context's end count as the continuation's. In place of an empty context stands the token that
    begins a text, or else the one that ends it.

    Args:
        max_len: tokens the model takes; of a longer context the end is kept.

    Raises:
        TextError: the continuation is empty, or too long for the model.
    """
    context = request.context.rstrip()
    blanks = request.context[len(context) :]
    ids: Any = tokenizer(context)["input_ids"]
    whole: Any = tokenizer(context + blanks + request.continuation)["input_ids"]
    if not (following := whole[len(ids) :]):
        raise TextError(f"nothing follows the context {context[-60:]!r}; a continuation is needed")
    if len(following) > max_len:
        raise TextError(
            f"the continuation {request.continuation[:60]!r} has {len(following)} tokens but the "
            f"model takes {max_len}; leave the item out"
        )
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    # The last token is predicted, and not an input: one more token fits than the model takes.
    return Encoded((ids or [first])[-(max_len + 1 - len(following)) :], following)


@torch.inference_mode()
def loss_by_window(model: PreTrainedModel, windows: Windows, progress: Progress) -> list[float]:
    """Return the cross entropy of each window's tokens after the first, in nats a token."""
    losses: list[float] = []
    with progress.task("Computing perplexity", len(windows.token_ids_WT), "windows") as task:
        for tokens_T in windows.token_ids_WT:
            ids_T = tokens_T.to(model.device)
            hidden_TD = final_hidden(model, input_ids=ids_T[None])[0]
            logits_TV = next_token_logits(model, hidden_TD[:-1])
            losses.append(float(F.cross_entropy(logits_TV, ids_T[1:])))
            task.advance()
    return losses


@torch.inference_mode()
def likelihoods(
    model: PreTrainedModel, requests: Sequence[Encoded], progress: Progress, description: str
) -> list[Likelihood]:
    """Return each continuation's likelihood after its context, in the order of the requests."""
    found: dict[int, Likelihood] = {}
    with progress.task(description, len(requests), "continuations") as task:
        for batch in _batches([each.tokens for each in requests]):
            scored = _likelihoods(model, [requests[index] for index in batch])
            found |= dict(zip(batch, scored, strict=True))
            task.advance(len(batch))
    return [found[index] for index in range(len(requests))]


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield indices in batches of similar length, longest first: too little memory shows early."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        count = max(1, _BATCH_TOKENS // lengths[order[0]])
        yield order[:count]
        order = order[count:]


def _likelihoods(model: PreTrainedModel, rows: Sequence[Encoded]) -> list[Likelihood]:
    longest = max(row.tokens for row in rows)
    # Padding comes last and attention is causal, so that no mask is needed.
    tokens_BT = torch.zeros(len(rows), longest - 1, dtype=torch.long)
    for index, row in enumerate(rows):
        tokens_BT[index, : row.tokens - 1] = torch.tensor((row.context + row.continuation)[:-1])
    hidden_BTD = final_hidden(model, input_ids=tokens_BT.to(model.device))
    spans = [slice(len(row.context) - 1, row.tokens - 1) for row in rows]
    hidden_ND = torch.cat([hidden_BTD[index, span] for index, span in enumerate(spans)])
    logprobs_NV = next_token_logits(model, hidden_ND).log_softmax(-1)
    counts = [len(row.continuation) for row in rows]
    found: list[Likelihood] = []
    for row, part_CV in zip(rows, torch.split(logprobs_NV, counts), strict=True):
        targets_C = torch.tensor(row.continuation, device=part_CV.device)
        logprob = float(part_CV.gather(1, targets_C[:, None]).sum())
        found.append(Likelihood(logprob, bool((part_CV.argmax(-1) == targets_C).all())))
    return found
