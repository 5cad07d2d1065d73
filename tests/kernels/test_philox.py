"""The dropout mask: Philox4x32 against published vectors and an independent one, its rate, scale and limits."""

from __future__ import annotations

import math

import pytest
import torch

from bert_fast.kernels._common import philox

# Random123's published known answers for Philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = {
    "zeros": (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    "ones": (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    "digits of pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


def philox_in_integers(counter: tuple[int, ...], key: tuple[int, ...], rounds: int) -> tuple[int, ...]:
    """Philox4x32 as defined in the paper, on Python's unbounded integers."""
    for _ in range(rounds):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = (
            second // 2**32 ^ counter[1] ^ key[0],
            second % 2**32,
            first // 2**32 ^ counter[3] ^ key[1],
            first % 2**32,
        )
        key = ((key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32)
    return counter


def random_byte(seed: int, offset: int, plane: int, row: int, col: int, rounds: int) -> int:
    """The byte of one element, from the definition at the top of philox.py."""
    counter = (col // 16, row, plane, offset % 2**32)
    words = philox_in_integers(counter, (seed % 2**32, (seed % 2**64) // 2**32), rounds)
    return words[col % 16 // 4] // 256 ** (col % 4) % 256


@pytest.mark.parametrize("answer", KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS)
def test_published_vectors(answer: tuple[tuple[int, ...], ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """With 10 rounds: the integers here, then the mask, whose 255 thresholds recover each byte."""
    counter, key, expected = answer
    assert philox_in_integers(counter, key, 10) == expected
    monkeypatch.setattr(philox, "ROUNDS", 10)
    seed, offset = key[0] | key[1] << 32, counter[3]
    state = torch.tensor([seed - 2**64 if seed >= 2**63 else seed, offset])
    index = [torch.tensor(part).view(1, 1, 1) for part in (counter[2], counter[1], counter[0])]
    kept = [philox.multiplier_at(state, threshold, *index).flatten() > 0 for threshold in range(1, 256)]
    expected_bytes = [word >> shift & 255 for word in expected for shift in (0, 8, 16, 24)]
    assert torch.stack(kept).sum(0).tolist() == expected_bytes


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, -1, -(2**63), 0x0123456789ABCDEF])
@pytest.mark.parametrize("offset", [0, 2**32 - 1, 2**32 + 5, 2**63 - 1])
def test_mask_is_the_definition_element_by_element(seed: int, offset: int) -> None:
    planes, rows, cols, dropout_p = 3, 4, 37, 0.3
    threshold = round(256 * dropout_p)
    multiplier = philox.dropout_multiplier(torch.tensor([seed, offset]), dropout_p, planes, rows, cols)
    assert multiplier.shape == (planes, rows, cols)
    for plane in range(planes):
        for row in range(rows):
            keep = [random_byte(seed, offset, plane, row, col, 7) >= threshold for col in range(cols)]
            assert (multiplier[plane, row] > 0).tolist() == keep


@pytest.mark.parametrize("dropout_p", [1 / 256, 0.1, 0.25, 0.5, 0.9, 255 / 256])
def test_rate_and_scale(dropout_p: float) -> None:
    """The number of dropped elements is within 5 standard deviations; kept ones are scaled to a mean of exactly 1."""
    threshold = philox.dropout_threshold(dropout_p)
    used_p = threshold / 256
    multiplier = philox.dropout_multiplier(torch.tensor([7, 11]), dropout_p, 2, 500, 1000)
    dropped = int((multiplier == 0).sum())
    deviation = math.sqrt(multiplier.numel() * used_p * (1 - used_p))
    assert abs(dropped - multiplier.numel() * used_p) < 5 * deviation
    assert multiplier.unique().tolist() == [0.0, 256 / (256 - threshold)]
    assert (1 - used_p) * float(multiplier.max()) == 1.0


def test_neighbours_are_not_correlated() -> None:
    """Elements one row, plane, column, seed or offset apart are kept together as often as independent ones."""
    kept = philox.dropout_multiplier(torch.tensor([7, 11]), 0.5, 2, 512, 512) > 0
    others = {
        "column": (kept[..., 1:], kept[..., :-1]),
        "column group": (kept[..., 16:], kept[..., :-16]),
        "row": (kept[:, 1:], kept[:, :-1]),
        "plane": (kept[1:], kept[:-1]),
        "seed": (kept, philox.dropout_multiplier(torch.tensor([8, 11]), 0.5, 2, 512, 512) > 0),
        "offset": (kept, philox.dropout_multiplier(torch.tensor([7, 12]), 0.5, 2, 512, 512) > 0),
    }
    for name, (one, other) in others.items():
        equal = int((one == other).sum())
        assert abs(equal - one.numel() / 2) < 5 * math.sqrt(one.numel()) / 2, name


def test_threshold_limits() -> None:
    assert philox.dropout_threshold(0.0) == 0
    assert philox.dropout_threshold(1 / 512) == 1
    assert philox.dropout_threshold(0.1) == 26
    assert philox.dropout_threshold(0.998) == 255
    for dropout_p in (-0.1, 0.001, 0.999, 1.0, 1.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"expected 0 or a probability from 1/512 to 511/512"):
            philox.dropout_threshold(dropout_p)


def test_new_states_follow_torchs_generator() -> None:
    torch.manual_seed(3)
    first, several = philox.new_rng_state("cpu"), philox.new_rng_state("cpu", 4)
    torch.manual_seed(3)
    assert torch.equal(first, philox.new_rng_state("cpu"))
    assert torch.equal(several, philox.new_rng_state("cpu", 4))
    assert several.shape == (4, 2)
    assert first.dtype == torch.int64
    assert len(set(several.flatten().tolist())) == 8


def test_dropout_state_is_none_exactly_where_nothing_is_dropped() -> None:
    x, state = torch.zeros(1), torch.tensor([1, 2])
    assert philox.dropout_state(0.0, state, x) is None
    assert philox.dropout_state(0.1, state, x) is state
    new_state = philox.dropout_state(0.1, None, x)
    assert new_state is not None
    assert new_state.shape == (2,)
    with pytest.raises(ValueError, match=r"rng_state has shape \(1,\); expected \(2,\)"):
        philox.dropout_state(0.0, state[:1], x)
