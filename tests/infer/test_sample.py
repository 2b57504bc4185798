"""Each sampling rule compared with a slow reference; greedy choice, seeds and the distribution of samples."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.errors import UsageError
from octavo.infer.sample import CANDIDATES, Sampling, choose, choose_rows, keep_top_k, keep_top_p, penalise

UNHURRIED = settings(deadline=None)  # other processes may slow the machine down
LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12)
PLAIN = Sampling(temperature=1.0, top_k=0, top_p=1.0)


def kept(logits: Tensor) -> set[int]:
    """The tokens that are not masked."""
    return {token for token, value in enumerate(logits.tolist()) if value > -math.inf}


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(value - max(logits)) for value in logits]
    return [weight / sum(weights) for weight in weights]


def sample(logits: list[float], sampling: Sampling, seen: tuple[int, ...] = (), count: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    past = torch.tensor(seen, dtype=torch.int64)
    return [choose(torch.tensor(logits), past, sampling, generator=generator) for _ in range(count)]


@UNHURRIED
@given(logits=LOGITS, data=st.data(), penalty=st.floats(0.25, 4))
def test_seen_tokens_are_penalised_once(logits: list[float], data: st.DataObject, penalty: float) -> None:
    seen = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=20))
    expected = [
        value if token not in seen else value / penalty if value > 0 else value * penalty
        for token, value in enumerate(logits)
    ]
    given_logits = torch.tensor(logits)
    actual = penalise(given_logits, torch.tensor(seen, dtype=torch.int64), penalty)
    torch.testing.assert_close(actual, torch.tensor(expected))
    assert given_logits.tolist() == logits


@UNHURRIED
@given(logits=LOGITS, k=st.integers(0, 14))
def test_top_k_keeps_tokens_with_fewer_than_k_larger_ones(logits: list[float], k: int) -> None:
    expected = {token for token, value in enumerate(logits) if k == 0 or sum(other > value for other in logits) < k}
    actual = keep_top_k(torch.tensor(logits), k)
    assert kept(actual) == expected
    assert all(actual[token] == logits[token] for token in expected)


@UNHURRIED
@given(logits=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12, unique=True), p=st.floats(1e-3, 1))
def test_top_p_keeps_the_likeliest_tokens_until_their_sum_reaches_p(logits: list[float], p: float) -> None:
    probabilities, total, expected = softmax(logits), 0.0, set()
    for token in sorted(range(len(logits)), key=lambda token: -logits[token]):
        assume(abs(total - p) > 1e-5)  # where float32 may round to either side
        if total < p or p == 1.0:
            expected.add(token)
        total += probabilities[token]
    assert kept(keep_top_p(torch.tensor(logits), p)) == expected


def test_top_p_keeps_the_likeliest_token_for_any_p() -> None:
    assert kept(keep_top_p(torch.tensor([0.0, 3.0, 1.0]), 1e-9)) == {1}


@UNHURRIED
@given(logits=LOGITS, data=st.data())
def test_temperature_0_selects_the_largest_logit(logits: list[float], data: st.DataObject) -> None:
    sampling = Sampling(temperature=0.0, top_k=data.draw(st.integers(0, 3)), top_p=data.draw(st.floats(0.1, 1)))
    (token,) = sample(logits, sampling)
    assert logits[token] == max(logits)


def test_the_penalty_is_applied_before_the_greedy_choice() -> None:
    sampling = Sampling(temperature=0.0, repetition_penalty=2.0)
    assert sample([3.0, 2.0, 1.0], sampling) == [0]
    assert sample([3.0, 2.0, 1.0], sampling, seen=(0, 0)) == [1]
    assert sample([-1.0, -1.5], sampling, seen=(0,)) == [1]


@UNHURRIED
@given(
    logits=st.lists(st.integers(-9, 9).map(float), min_size=2, max_size=8, unique=True),
    k=st.integers(1, 8),
    seed=st.integers(0, 2**32),
)
def test_only_kept_tokens_are_sampled(logits: list[float], k: int, seed: int) -> None:
    sampling = Sampling(temperature=3.0, top_k=k, top_p=1.0, seed=seed)
    best = sorted(range(len(logits)), key=lambda token: -logits[token])[:k]
    assert set(sample(logits, sampling, count=10)) <= set(best)


def test_the_temperature_is_applied_before_top_p() -> None:
    # With temperature 2 the two likeliest have probabilities 0.52 and 0.31: both are needed to reach 0.6.
    logits = [2.0, 1.0, 0.0]
    assert set(sample(logits, Sampling(temperature=1.0, top_p=0.6), count=200)) == {0}
    assert set(sample(logits, Sampling(temperature=2.0, top_p=0.6), count=200)) == {0, 1}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_sampled_with_their_probabilities(temperature: float) -> None:
    logits, count = [1.0, 0.0, -0.5, 2.0, -1.0], 4000
    sampling = Sampling(temperature=temperature, top_k=0, top_p=1.0, seed=1)
    counts = Counter(sample(logits, sampling, count=count))
    expected = [share * count for share in softmax([value / temperature for value in logits])]
    chi_square = sum((counts[token] - share) ** 2 / share for token, share in enumerate(expected))
    assert chi_square < 18.5  # 4 degrees of freedom: 1 in 1000


def test_a_seed_repeats_the_samples_and_another_changes_them() -> None:
    logits = [0.0] * 50
    once = sample(logits, PLAIN, count=20)
    assert sample(logits, PLAIN, count=20) == once
    assert sample(logits, Sampling(temperature=1.0, top_p=1.0, seed=1), count=20) != once


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 1e-310, 5e-324, 1e30])
def test_extreme_temperatures_sample_finite_distributions(temperature: float) -> None:
    actual = set(sample([5.0, 20.0, -3.0], Sampling(temperature=temperature, top_p=1.0), count=50))
    assert actual == ({1} if temperature < 1 else {0, 1, 2})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1 (at least 0)"),
        ({"temperature": math.nan}, "temperature nan (at least 0)"),
        ({"top_k": -1}, "top-k -1 (at least 0)"),
        ({"top_p": 0.0}, "top-p 0.0 (over 0, at most 1)"),
        ({"top_p": 1.1}, "top-p 1.1 (over 0, at most 1)"),
        ({"repetition_penalty": 0.0}, "repetition penalty 0.0 (over 0)"),
        ({"max_new_tokens": 0}, "max-new-tokens 0 (at least 1)"),
        ({"stop": ("a", "")}, "an empty stop string"),
        ({"top_k": -2, "top_p": 2.0}, "top-k -2 (at least 0), top-p 2.0 (over 0, at most 1)"),
    ],
)
def test_invalid_sampling_settings_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Sampling(**wrong)  # type: ignore[arg-type]
    assert message in caught.value.message


def peaked(seed: int, vocab_size: int, spread: float) -> Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.parametrize("vocab_size", [3, CANDIDATES, 5000])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.0),
        Sampling(temperature=0.0, repetition_penalty=1.7),
        Sampling(temperature=0.8, top_p=0.95),
        Sampling(temperature=1.3, top_p=0.9, repetition_penalty=1.2),
        Sampling(temperature=1.0, top_p=1.0),
        Sampling(temperature=1.0, top_p=1.0, top_k=7),
        Sampling(temperature=2.0, top_p=0.9, top_k=40),
        Sampling(temperature=2.0, top_p=0.9, top_k=CANDIDATES + 1),
        Sampling(temperature=9.0, top_p=0.999),
    ],
    ids=str,
)
def test_choose_rows_samples_the_tokens_of_choose(vocab_size: int, sampling: Sampling) -> None:
    logits = torch.stack([peaked(seed, vocab_size, spread) for seed, spread in enumerate((0.1, 1.0, 3.0, 8.0))])
    seen = [[0, 1, 1], [], [2], [1, 2]]
    generators, reference_generators = ([torch.Generator().manual_seed(row) for row in range(4)] for _ in range(2))
    for _ in range(25):
        actual = choose_rows(logits, seen, [sampling] * 4, generators)
        assert actual == [
            choose(row, torch.tensor(ids, dtype=torch.long), sampling, generator=generator)
            for row, ids, generator in zip(logits, seen, reference_generators, strict=True)
        ]


@pytest.mark.parametrize("tiny", [1e-30, 1e-310, 5e-324])
def test_rows_with_different_settings_do_not_mix(tiny: float) -> None:
    logits = torch.tensor([[5.0, 4.0, -9.0], [0.0, 0.0, 9.0], [1.0, 1.0, 1.0]])
    samplings = [Sampling(temperature=0.0), Sampling(temperature=tiny), Sampling(temperature=1.0, top_k=1, top_p=1.0)]
    generators = [torch.Generator() for _ in samplings]
    actual = [choose_rows(logits, [[]] * 3, samplings, generators) for _ in range(40)]
    assert {tokens[:2] for tokens in map(tuple, actual)} == {(0, 2)}
    assert {tokens[2] for tokens in actual} == {0, 1, 2}  # all equal the k-th


def test_a_row_that_is_not_finite_is_none_and_changes_no_other() -> None:
    logits = torch.tensor([[0.0, 1.0], [math.nan, 1.0], [math.inf, 1.0], [1.0, 0.0]])
    for temperature in (0.0, 1e-3):
        samplings = [Sampling(temperature=temperature, repetition_penalty=1.1)] * 4
        actual = choose_rows(logits, [[]] * 4, samplings, [torch.Generator() for _ in range(4)])
        assert actual == [1, None, None, 0]
    extreme = Sampling(temperature=1.0, repetition_penalty=1e-45)
    assert choose_rows(logits[:1] + 1, [[0]], [extreme], [torch.Generator()]) == [None]
