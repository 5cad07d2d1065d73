"""The bodies of requests. Unknown keys are ignored, as TEI and OpenAI do."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

# fail_fast: one error a list. Those of every item of a body of 8 MB are gigabytes.
Strings = Annotated[list[StrictStr], Field(fail_fast=True)]
Ids = Annotated[list[StrictInt], Field(min_length=1, fail_fast=True)]
ManyIds = Annotated[list[Ids], Field(fail_fast=True)]
Text = StrictStr | Ids
Texts = StrictStr | Strings | Ids | ManyIds
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
    sentences: Annotated[Strings, Field(min_length=1)]


class SimilarityParameters(BaseModel):
    """The parameters of POST /similarity."""

    prompt_name: StrictStr | None = None


class Similarity(_Body):
    """POST /similarity."""

    inputs: Sentences
    parameters: SimilarityParameters | None = None


class Rerank(_Truncated):
    """POST /rerank."""

    query: StrictStr
    texts: Strings
    raw_scores: StrictBool = False
    return_text: StrictBool = False


TextOrPair = Annotated[Strings, Field(min_length=1, max_length=2)]


class Predict(_Truncated):
    """POST /predict: a text, a batch of lists of one text or two."""

    inputs: StrictStr | Annotated[list[TextOrPair], Field(fail_fast=True)] | Strings
    raw_scores: StrictBool = False


class Tokenize(_Body):
    """POST /tokenize."""

    inputs: StrictStr | Strings
    add_special_tokens: StrictBool = True
    prompt_name: StrictStr | None = None


class Decode(_Body):
    """POST /decode."""

    ids: Ids | ManyIds
    skip_special_tokens: StrictBool = True


class FillMask(_Body):
    """POST /fill_mask."""

    inputs: StrictStr
    top_k: Annotated[StrictInt, Field(ge=1, le=100)] = 5


class Entities(_Body):
    """POST /entities."""

    inputs: StrictStr | Strings


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
    documents: Annotated[list[StrictStr | Document], Field(fail_fast=True)]
    top_n: Annotated[StrictInt, Field(ge=1)] | None = None
    return_documents: StrictBool = False
