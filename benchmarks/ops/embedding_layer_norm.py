"""embedding_layer_norm beside eager PyTorch and torch.compile.

On a GPU the tables are float32 and the result bfloat16, as in a model under autocast; either side rounds once, at the
end.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.runner.runner import Case, Plan, Setting, Variant, main, passes
from bert_fast.kernels import embedding_layer_norm

EPS, DROPOUT, POSITIONS = 1e-12, 0.1, 512


def eager(
    dtype: torch.dtype,
    dropout_p: float,
    word: Tensor,
    types: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
    kinds: Tensor,
    places: Tensor,
) -> Tensor:
    summed = F.embedding(ids, word) + F.embedding(kinds, types) + F.embedding(places, position)
    out = F.layer_norm(summed, weight.shape, weight, bias, EPS).to(dtype)
    return F.dropout(out, dropout_p) if dropout_p else out


def case(
    setting: Setting, tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, which: str, dropout_p: float
) -> Case:
    stored = torch.float32 if setting.on_gpu else dtype
    tables = [setting.randn(rows, hidden, dtype=stored) for rows in (vocabulary, 2, POSITIONS)]
    ids = (
        torch.randint(0, vocabulary, (tokens,), device=setting.device),
        torch.randint(0, 2, (tokens,), device=setting.device),
        torch.arange(tokens, device=setting.device) % POSITIONS,
    )
    inputs = (*tables, setting.randn(hidden, dtype=stored), setting.randn(hidden, dtype=stored), *ids)
    exact = tuple(part.double() if part.is_floating_point() else part for part in inputs)
    dout = setting.randn(tokens, hidden, dtype=dtype)
    state = setting.rng_state() if dropout_p else None

    def ours(impl: str, *inputs: Tensor) -> Tensor:
        *parameters, ids, kinds, places = inputs
        with torch.autocast(setting.device.type, dtype, enabled=stored != dtype):
            return embedding_layer_norm(
                ids, kinds, places, *parameters, dropout_p=dropout_p, eps=EPS, rng_state=state, impl=impl
            )

    def reference(*inputs: Tensor) -> Tensor:
        *parameters, ids, kinds, places = inputs
        return embedding_layer_norm(
            ids, kinds, places, *parameters, dropout_p=dropout_p, eps=EPS, rng_state=state, impl="reference"
        )

    peer, compiled = partial(eager, dtype, dropout_p), torch.compile(partial(eager, dtype, dropout_p), dynamic=False)
    # A word's row for each token, the small tables once, and out; again the rows and dout, and the tables' gradients.
    rows = (tokens * hidden + tables[1].numel() + tables[2].numel()) * tables[0].element_size()
    forward, backward = rows + dout.nbytes, rows + dout.nbytes + sum(table.nbytes for table in tables)
    return Case(
        {
            "eager": Variant(passes(peer, inputs, dout, which), comparable=not dropout_p),
            "torch.compile": Variant(passes(compiled, inputs, dout, which), comparable=not dropout_p),
            **{
                f"bert_fast {impl}": passes(partial(ours, impl), inputs, dout, which)
                for impl in setting.ours("embedding_layer_norm", dtype)
            },
        },
        passes(reference, exact, dout.double(), which)(),
        16 * torch.finfo(dtype).eps,
        traffic={"forward": forward, "backward": backward}.get(which, forward + backward),
        dtype=dtype,
    )


def plans(setting: Setting) -> list[Plan]:
    if setting.on_gpu:
        widths = ((16384, 1024), (8192, 768)) if setting.quick else tuple(product((16384, 8192), (1024, 768)))
        sizes = tuple((tokens, hidden, 30522) for tokens, hidden in widths)
        dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
        kinds: tuple[tuple[str, float], ...] = (("forward", 0.0), ("backward", 0.0), ("forward", DROPOUT))
    else:
        sizes = ((1024, 256, 8192), (1024, 768, 30522))
        dtypes = (torch.float32, torch.bfloat16)
        kinds = (("forward", 0.0), ("forward + backward", 0.0))
    return [
        Plan(
            f"({tokens}, {hidden}) V {vocabulary} {str(dtype).removeprefix('torch.')} {which}"
            + ", dropout" * bool(dropout_p),
            partial(case, setting, tokens, hidden, vocabulary, dtype, which, dropout_p),
        )
        for (tokens, hidden, vocabulary), dtype, (which, dropout_p) in product(sizes, dtypes, kinds)
    ]


if __name__ == "__main__":
    main("embedding_layer_norm", plans)
