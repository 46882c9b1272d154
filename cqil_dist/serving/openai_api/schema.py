"""The bodies of requests and responses of the OpenAI API, as far as they are supported here.

The fields' names and meanings are OpenAI's; `top_k`, `min_p`, `repetition_penalty`, `ignore_eos`,
`stop_token_ids` and `return_token_ids` are vLLM's additions, and `return_timeline` is an addition
of this package. A field of an unsupported feature is accepted at the value that turns the feature
off, and refused otherwise.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cqil_dist.sampling_params import MAX_STOP, MAX_STOP_TOKEN_IDS

MAX_CHOICES = 128

_Off = Annotated[float, Field(ge=0, le=0)]

# A list fails at its first wrong item: reporting a million of them takes a minute and gigabytes.
_Item = TypeVar("_Item")
_List = Annotated[list[_Item], Field(fail_fast=True)]
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]

# Objects cannot fail fast, so their size is bounded instead.
_MAX_ENTRIES = 64


def _few(given: Any) -> Any:
    if isinstance(given, dict) and len(given) > _MAX_ENTRIES:
        raise ValueError(f"it has {len(given)} entries but may have {_MAX_ENTRIES}")
    return given


_FEW = BeforeValidator(_few)


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        """Drop fields that are null: OpenAI's clients send null for what they leave unset."""
        if not isinstance(_few(given), dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


class StreamOptions(_Request):
    include_usage: bool = Field(default=False, description="Send the usage in a last event.")
    include_obfuscation: bool | None = Field(default=None, description="Without effect.")


class GenerationRequest(_Request):
    """The fields that completions and chat completions have in common."""

    model: str = Field(description="The name of one of the models that /v1/models lists.")
    temperature: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="0 is greedy. Default: the model's generation_config.json, or 1."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: int = Field(default=1, ge=1, le=MAX_CHOICES, description="Choices for each prompt.")
    stop: str | Annotated[_List[str], Field(max_length=MAX_STOP)] | None = Field(
        default=None, description="One text or several that end the completion."
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(
        default=None, description="Makes sampling repeatable; choice i of n is drawn with seed + i."
    )
    stream: bool = Field(default=False, description="Answer in server-sent events.")
    stream_options: StreamOptions | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(
        default=None, description="Draw from the k most likely tokens; 0 or -1 is off."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    ignore_eos: bool = Field(default=False, description="Go on past the end-of-sequence token.")
    stop_token_ids: Annotated[_List[_TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    return_token_ids: bool = Field(default=False, description="Add token ids to the choices.")
    return_timeline: bool = Field(
        default=False, description="Add the timelines of their steps to streamed choices."
    )
    user: str | None = Field(default=None, description="Without effect.")
    metadata: Annotated[dict[str, str], _FEW] | None = Field(
        default=None, description="Without effect."
    )
    store: bool | None = Field(default=None, description="Without effect: nothing is stored.")
    service_tier: str | None = Field(default=None, description="Without effect.")
    presence_penalty: _Off | None = Field(default=None, description="Not supported: 0 only.")
    frequency_penalty: _Off | None = Field(default=None, description="Not supported: 0 only.")
    logit_bias: Annotated[dict[str, float], _FEW, Field(max_length=0)] | None = Field(
        default=None, description="Not supported: empty only."
    )


class CompletionRequest(GenerationRequest):
    prompt: str | _List[str] | _List[_TokenId] | _List[_List[_TokenId]] = Field(
        description="A text or token ids, or a list of either."
    )
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        default=None, description="Default 16. 0, with `echo`, scores the prompt alone."
    )
    echo: bool = Field(
        default=False,
        description="Begin the choice with the prompt, with log probabilities of its tokens if "
        "`logprobs` is set. Not supported together with `stream`.",
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        default=None, description="Return log probabilities of each token and so many alternatives."
    )
    best_of: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Not supported: equal to `n` only."
    )
    suffix: Annotated[str, Field(max_length=0)] | None = Field(
        default=None, description="Not supported: empty only."
    )


class TextPart(_Request):
    type: Literal["text"]
    text: str


class Message(_Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[_List[TextPart], Field(min_length=1)]
    name: str | None = Field(default=None, description="Without effect.")


class TextFormat(_Request):
    type: Literal["text"]


class ChatCompletionRequest(GenerationRequest):
    messages: Annotated[_List[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        default=None, description="Default: until the model's context is full."
    )
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        default=None, description="The newer name of `max_tokens`."
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        default=None, description="Alternatives of each token; needs `logprobs`."
    )
    response_format: TextFormat | None = Field(default=None, description="Text only.")
    tools: Annotated[_List[Any], Field(max_length=0)] | None = Field(
        default=None, description="Not supported: empty only."
    )
    tool_choice: Literal["none", "auto"] | None = Field(
        default=None, description="Without effect: there are no tools."
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="Without effect: there are no tools."
    )


# Responses.


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class _Choice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length", "abort"] | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    timeline: dict[str, Any] | None = None


class CompletionChoice(_Choice):
    text: str
    logprobs: CompletionLogprobs | None = None


class _Response(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage | None = None


class CompletionResponse(_Response):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(_Choice):
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None


class ChatCompletionResponse(_Response):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(_Choice):
    delta: Delta
    logprobs: ChatLogprobs | None = None


class ChatCompletionChunk(_Response):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "cqil_dist"
    max_model_len: int = Field(description="Most tokens of a prompt and its completion together.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
