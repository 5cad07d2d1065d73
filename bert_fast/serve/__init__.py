"""An HTTP server for embeddings, reranking and classification: `bert-fast serve`.

It speaks the API of Hugging Face's text-embeddings-inference (TEI) and OpenAI's /v1/embeddings. One process: texts are
tokenized in threads, one thread computes batches of the sequences of all requests.

    errors.py     what is answered where a request can't be served
    batching.py   the queue, and the thread that computes
    model.py      a model folder as the routes use it
    schemas.py    the bodies of requests, checked by pydantic
    context.py    what a route needs: models, queue, limits; waiting for a result while the client is there
    tei.py        TEI's routes      openai.py   OpenAI's routes and /v1/rerank
    middleware.py limits of bodies, the API key, headers, logs
    metrics.py    Prometheus metrics under TEI's names
    app.py        the application   page.html   the page at /
"""
