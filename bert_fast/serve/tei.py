"""The routes of text-embeddings-inference, and of its kind for masked tokens and entities."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import APIRouter, Request

import bert_fast
from bert_fast.serve import schemas
from bert_fast.serve.answers import finite, json_response, normalized, softmax
from bert_fast.serve.context import Server, server_of
from bert_fast.serve.errors import BackendError, EmptyInputError, InvalidInputError
from bert_fast.serve.model import ServedModel, Tokens

router = APIRouter()


def as_list(inputs: Any) -> tuple[list[Any], bool]:
    """The texts (or lists of token ids) of a body, and whether it was a single one."""
    if isinstance(inputs, str) or (inputs and isinstance(inputs[0], int)):
        return [inputs], True
    return list(inputs), False


async def embed(
    server: Server,
    request: Request,
    model: ServedModel,
    texts: list[Any],
    *,
    normalize: bool | None,
    prompt_name: str | None = None,
    dimensions: int | None = None,
    truncate: bool | None = None,
    side: str | None = None,
) -> list[np.ndarray[Any, Any]]:
    """The vectors of texts, checked to be finite: (D,) float32 each."""
    width = model.width
    if dimensions is not None and dimensions > width:
        raise InvalidInputError(f"dimensions is {dimensions}; expected 1 to {width}")
    tokens = await _tokens(server, request, model, texts, prompt_name, truncate, side)
    vectors = finite(await server.compute(request, model.vectors, tokens), "vector")
    vectors = [vector[:dimensions] for vector in vectors]
    return [normalized(vector) for vector in vectors] if normalize else vectors


@router.post("/embed")
async def embed_route(request: Request, body: schemas.Embed) -> Any:
    """Vectors of texts."""
    server = server_of(request)
    texts, _ = as_list(body.inputs)
    vectors = await embed(
        server,
        request,
        server.model(body.model, "embedding"),
        texts,
        normalize=body.normalize,
        prompt_name=body.prompt_name,
        dimensions=body.dimensions,
        truncate=body.truncate,
        side=body.truncation_direction,
    )
    return json_response([vector.tolist() for vector in vectors])


@router.post("/embed_all")
async def embed_all(request: Request, body: schemas.EmbedAll) -> Any:
    """The vector of each token of texts, without pooling."""
    server = server_of(request)
    model = server.model(body.model, "embedding")
    texts, _ = as_list(body.inputs)
    tokens = await _tokens(server, request, model, texts, body.prompt_name, body.truncate, body.truncation_direction)
    found = finite(await server.compute(request, model.token_vectors, tokens), "vector")
    return json_response([vectors.tolist() for vectors in found])


@router.post("/embed_sparse")
async def embed_sparse(request: Request, body: schemas.EmbedAll) -> Any:
    """SPLADE's sparse vectors of texts, by a masked-LM model."""
    server = server_of(request)
    model = server.model(body.model, "masked-lm")
    texts, _ = as_list(body.inputs)
    tokens = await _tokens(server, request, model, texts, body.prompt_name, body.truncate, body.truncation_direction)
    found = await server.compute(request, model.sparse, tokens)
    finite([weights for _, weights in found], "weight")
    return json_response(
        [
            [{"index": index, "value": value} for index, value in zip(ids.tolist(), weights.tolist(), strict=True)]
            for ids, weights in found
        ]
    )


async def _tokens(
    server: Server,
    request: Request,
    model: ServedModel,
    texts: list[Any],
    prompt_name: str | None,
    truncate: bool | None,
    side: str | None,
) -> list[Tokens]:
    server.check_count(len(texts))
    prompt = model.prompt(prompt_name)
    return await server.tokenize(
        request, lambda: model.tokenize(texts, prompt=prompt, truncate=truncate, side=side), texts
    )


@router.post("/similarity")
async def similarity(request: Request, body: schemas.Similarity) -> Any:
    """The cosine of the source sentence with each of the others."""
    server = server_of(request)
    model = server.model(body.model, "embedding")
    texts = [body.inputs.source_sentence, *body.inputs.sentences]
    prompt_name = None if body.parameters is None else body.parameters.prompt_name
    vectors = await embed(server, request, model, texts, normalize=True, prompt_name=prompt_name)
    return json_response([float(vectors[0] @ vector) for vector in vectors[1:]])


async def rank(
    server: Server,
    request: Request,
    model: ServedModel,
    query: str,
    texts: list[str],
    *,
    raw_scores: bool,
    truncate: bool | None = None,
    side: str | None = None,
) -> list[tuple[int, float]]:
    """(index, score) of texts for a query, the highest score first."""
    server.check_count(len(texts))
    query = model.prompt(None) + query
    pairs = [(query, text) for text in texts]

    def tokenize() -> list[Tokens]:
        return model.tokenize_pairs(pairs, truncate=truncate, side=side)

    tokens = await server.tokenize(request, tokenize, [query, *texts])
    logits = finite(await server.compute(request, model.logits, tokens), "score")
    scores = [float(row[0]) if raw_scores else 1 / (1 + float(np.exp(-np.float64(row[0])))) for row in logits]
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    return [(index, scores[index]) for index in order]


@router.post("/rerank")
async def rerank(request: Request, body: schemas.Rerank) -> Any:
    """Texts in the order of their scores for a query."""
    server = server_of(request)
    model = server.model(body.model, "reranker")
    ranked = await rank(
        server,
        request,
        model,
        body.query,
        body.texts,
        raw_scores=body.raw_scores,
        truncate=body.truncate,
        side=body.truncation_direction,
    )
    texts = body.texts if body.return_text else None
    return json_response(
        [{"index": index, "score": score, **({"text": texts[index]} if texts else {})} for index, score in ranked]
    )


@router.post("/predict")
async def predict(request: Request, body: schemas.Predict) -> Any:
    """The labels of texts or pairs with their probabilities, the most likely first."""
    server = server_of(request)
    model = server.model(body.model, "classifier", "reranker")
    rows, single = _prediction_inputs(body.inputs)
    server.check_count(len(rows))
    prompt = model.prompt(None)
    pairs = [(prompt + row[0], row[1]) for row in rows if len(row) == 2]
    if pairs and len(pairs) < len(rows):
        raise InvalidInputError("inputs has texts and pairs; expected one kind")
    side = body.truncation_direction

    def tokenize() -> list[Tokens]:
        if pairs:
            return model.tokenize_pairs(pairs, truncate=body.truncate, side=side)
        return model.tokenize([row[0] for row in rows], prompt=prompt, truncate=body.truncate, side=side)

    tokens = await server.tokenize(request, tokenize, [text for row in rows for text in row])
    logits = finite(await server.compute(request, model.logits, tokens), "logit")
    independent = model.kind == "reranker" or model.model.config.problem_type == "multi_label_classification"
    answers = []
    for row in logits:
        scores = row if body.raw_scores else 1 / (1 + np.exp(-row.astype(np.float64))) if independent else softmax(row)
        order = np.argsort(-scores, kind="stable").tolist()
        answers.append([{"score": float(scores[index]), "label": model.labels[index]} for index in order])
    return json_response(answers[0] if single else answers)


def _prediction_inputs(inputs: Any) -> tuple[list[list[str]], bool]:
    """TEI's inputs of /predict: a text; a pair of texts as a list of two; a list of lists of one or two texts."""
    if isinstance(inputs, str):
        return [[inputs]], True
    if inputs and all(isinstance(item, str) for item in inputs):
        if len(inputs) > 2:
            raise InvalidInputError("inputs is a list of more than two texts; expected a list of lists for a batch")
        return [list(inputs)], True
    if not all(isinstance(item, list) for item in inputs):
        raise InvalidInputError("inputs has texts and lists; expected a text, or a list of lists")
    return [list(item) for item in inputs], False


@router.post("/tokenize")
async def tokenize_route(request: Request, body: schemas.Tokenize) -> Any:
    """The tokens of texts with their positions."""
    server = server_of(request)
    model = server.models[0] if body.model is None else server.model(body.model, *_ALL)
    texts, _ = as_list(body.inputs)
    server.check_count(len(texts))
    prompt = model.prompt(body.prompt_name)

    def tokenize() -> list[Any]:
        tokenizer = model.thread_tokenizer()
        strings = [prompt + text for text in texts]
        return list(tokenizer.encode_batch(strings, add_special_tokens=body.add_special_tokens))

    encodings = await server.in_thread(request, tokenize, texts)
    return json_response(
        [
            [
                {
                    "id": token_id,
                    "text": token,
                    "special": bool(special),
                    "start": None if special else start,
                    "stop": None if special else stop,
                }
                for token_id, token, special, (start, stop) in zip(
                    encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True
                )
            ]
            for encoding in encodings
        ]
    )


@router.post("/decode")
async def decode(request: Request, body: schemas.Decode) -> Any:
    """The texts of token ids."""
    server = server_of(request)
    model = server.models[0] if body.model is None else server.model(body.model, *_ALL)
    rows, _ = as_list(body.ids)
    server.check_count(len(rows), "lists of ids")
    if max(max(row) for row in rows) >= model.model.config.vocab_size or min(min(row) for row in rows) < 0:
        raise InvalidInputError(f"ids has an id that is none of the model's {model.model.config.vocab_size}")
    texts = await server.in_thread(
        request, lambda: model.thread_tokenizer().decode_batch(rows, skip_special_tokens=body.skip_special_tokens)
    )
    return json_response(texts)


@router.post("/fill_mask")
async def fill_mask(request: Request, body: schemas.FillMask) -> Any:
    """The most likely tokens at each [MASK] of a text."""
    from bert_fast.data.tokenizer import mask_token

    server = server_of(request)
    model = server.model(body.model, "masked-lm")
    mask = model.tokenizer.token_to_id(mask_token(model.tokenizer))
    tokens = await server.tokenize(request, lambda: model.tokenize([body.inputs], truncate=False), [body.inputs])
    positions = [index for index, token in enumerate(tokens[0].ids) if token == mask]
    if not positions:
        raise InvalidInputError(f"inputs has no {mask_token(model.tokenizer)}; expected one or more")
    (logits,) = finite(await server.compute(request, model.token_logits, tokens), "logit")
    ids = np.array(sorted(set(model.tokenizer.get_vocab().values())))
    answers = []
    for position in positions:
        scores = softmax(logits[position])[ids]
        best = np.argsort(-scores, kind="stable")[: body.top_k].tolist()
        answers.append(
            [{"score": float(scores[i]), "token_str": model.tokenizer.id_to_token(int(ids[i]))} for i in best]
        )
    return json_response(answers)


@router.post("/entities")
async def entities(request: Request, body: schemas.Entities) -> Any:
    """The label of each word of texts, by a token classifier: that of the word's first token."""
    server = server_of(request)
    model = server.model(body.model, "token-classifier")
    texts, single = as_list(body.inputs)
    server.check_count(len(texts))
    tokens = await server.tokenize(request, lambda: model.tokenize(texts, truncate=False), texts)
    logits = finite(await server.compute(request, model.token_logits, tokens), "logit")
    encodings = await server.in_thread(request, lambda: model.thread_tokenizer().encode_batch(texts))
    answers = [_words(model, encoding, row) for encoding, row in zip(encodings, logits, strict=True)]
    return json_response(answers[0] if single else answers)


def _words(model: ServedModel, encoding: Any, logits: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    words: list[dict[str, Any]] = []
    last = None
    for word, (start, stop), row in zip(encoding.word_ids, encoding.offsets, logits, strict=True):
        if word is None:
            continue
        if word == last:
            words[-1]["end"] = stop
            continue
        last = word
        scores = softmax(row)
        best = int(scores.argmax())
        words.append({"start": start, "end": stop, "label": model.labels[best], "score": float(scores[best])})
    return words


@router.get("/info")
async def info(request: Request) -> Any:
    """What this server serves, and its limits; the fields are those of the first model, `models` has all."""
    server = server_of(request)
    limits, first = server.limits, server.models[0]
    return json_response(
        {
            "model_id": first.name,
            "model_sha": None,
            "model_dtype": first.dtype,
            "model_type": _model_type(first),
            "max_concurrent_requests": limits.max_concurrent_requests,
            "max_input_length": first.max_length,
            "max_batch_tokens": limits.max_batch_tokens,
            "max_batch_requests": limits.max_batch_requests,
            "max_client_batch_size": limits.max_client_batch_size,
            "auto_truncate": first.auto_truncate,
            "tokenization_workers": limits.tokenization_workers,
            "version": bert_fast.__version__,
            "sha": None,
            "docker_label": None,
            "models": [
                {"model_id": model.name, "kind": model.kind, "dtype": model.dtype, "max_input_length": model.max_length}
                for model in server.models
            ],
        }
    )


def _model_type(model: ServedModel) -> dict[str, Any]:
    if model.kind == "embedding":
        return {"embedding": {"pooling": "+".join(model.modules.pooling)}}
    if model.kind == "masked-lm":
        return {"embedding": {"pooling": "splade"}}
    labels = {str(index): label for index, label in enumerate(model.labels)}
    kind = "reranker" if model.kind == "reranker" else "classifier"
    return {kind: {"id2label": labels, "label2id": {label: int(index) for index, label in labels.items()}}}


@router.get("/health")
@router.get("/ping")
async def health(request: Request) -> Any:
    """200 while the thread that computes runs."""
    if not server_of(request).batcher.alive:
        raise BackendError("the thread that computes has ended")
    return json_response(None)


_ALL = ("embedding", "reranker", "classifier", "token-classifier", "masked-lm")
_BY_KIND: dict[str, tuple[Any, Any]] = {
    "embedding": (schemas.Embed, embed_route),
    "reranker": (schemas.Predict, predict),
    "classifier": (schemas.Predict, predict),
    "masked-lm": (schemas.FillMask, fill_mask),
    "token-classifier": (schemas.Entities, entities),
}


@router.post("/")
async def root(request: Request, body: dict[str, Any]) -> Any:
    """The body of the route that suits the first model, as huggingface_hub's InferenceClient sends it."""
    inputs = body.get("inputs")
    if isinstance(inputs, dict) and "source_sentence" in inputs:
        return await similarity(request, schemas.Similarity.model_validate(body))
    if "query" in body and "texts" in body:
        return await rerank(request, schemas.Rerank.model_validate(body))
    if inputs is None:
        raise EmptyInputError("the body has no inputs")
    schema, route = _BY_KIND[server_of(request).models[0].kind]
    if schema is schemas.Predict and isinstance(inputs, str):
        body["inputs"] = [[inputs]]  # the inference API answers a single text by a list in a list as well
    given = body.pop("parameters", None)
    if not isinstance(given, dict | None):
        raise InvalidInputError(f"parameters is a {type(given).__name__}; expected an object")
    parameters = {name: value for name, value in (given or {}).items() if value is not None}
    found: Any = await route(request, schema.model_validate({**parameters, **body}))
    return found
