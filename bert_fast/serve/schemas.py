"""The bodies of requests. Unknown keys are ignored, as TEI and OpenAI do."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

Ids = Annotated[list[StrictInt], Field(min_length=1)]
Text = StrictStr | Ids
Texts = StrictStr | list[StrictStr] | Ids | list[Ids]
Pair = Annotated[list[StrictStr], Field(min_length=2, max_length=2)]
Direction = Literal["left", "right", "Left", "Right"]


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: StrictStr | None = None


class _Truncated(_Body):
    truncate: StrictBool | None = None
    truncation_direction: Direction | None = None


class Embed(_Truncated):
    """POST /embed."""

    inputs: Texts
    normalize: StrictBool | None = True
    prompt_name: StrictStr | None = None
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = None


class EmbedAll(_Truncated):
    """POST /embed_all and /embed_sparse."""

    inputs: Texts
    prompt_name: StrictStr | None = None


class Sentences(BaseModel):
    """The inputs of POST /similarity."""

    source_sentence: StrictStr
    sentences: Annotated[list[StrictStr], Field(min_length=1)]


class Similarity(_Body):
    """POST /similarity."""

    inputs: Sentences
    parameters: dict[str, Any] | None = None


class Rerank(_Truncated):
    """POST /rerank."""

    query: StrictStr
    texts: list[StrictStr]
    raw_scores: StrictBool = False
    return_text: StrictBool = False


class Predict(_Truncated):
    """POST /predict: a text, a batch of lists of one text or two."""

    inputs: StrictStr | list[Annotated[list[StrictStr], Field(min_length=1, max_length=2)]] | list[StrictStr]
    raw_scores: StrictBool = False


class Tokenize(_Body):
    """POST /tokenize."""

    inputs: StrictStr | list[StrictStr]
    add_special_tokens: StrictBool = True
    prompt_name: StrictStr | None = None


class Decode(_Body):
    """POST /decode."""

    ids: Ids | list[Ids]
    skip_special_tokens: StrictBool = True


class FillMask(_Body):
    """POST /fill_mask."""

    inputs: StrictStr
    top_k: Annotated[StrictInt, Field(ge=1, le=100)] = 5


class Entities(_Body):
    """POST /entities."""

    inputs: StrictStr | list[StrictStr]


class OpenAIEmbeddings(_Body):
    """POST /v1/embeddings."""

    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = None
    user: StrictStr | None = None


class Document(BaseModel):
    """A document of POST /v1/rerank."""

    text: StrictStr


class V1Rerank(_Body):
    """POST /v1/rerank, as Cohere and Jina have it."""

    query: StrictStr
    documents: list[StrictStr | Document]
    top_n: Annotated[StrictInt, Field(ge=1)] | None = None
    return_documents: StrictBool = False
