"""Rotary positions and attention: against complex numbers and the plain formula, and who sees whom."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import devices
from torch import Tensor
from transformers import LlamaConfig

from octavo.hardware import Capabilities
from octavo.models import Decoder
from octavo.ops import attention, softcap
from octavo.ops.attention import (
    AddedMasks,
    AttentionSpec,
    Documents,
    causal_attention,
    find_documents,
    seen_mask,
)
from octavo.ops.cached_attention import prefill_attention
from octavo.ops.rotary import (
    ROTATE_HALF,
    ROTATE_INTERLEAVED,
    cached_rotary_table,
    rotary_table,
    rotate,
    rotate_half,
    rotate_interleaved,
    rotate_into,
)
from octavo.ops.tiles import Phase

CPU = torch.device("cpu")
HEADS, SIZE = 4, 8  # H, D
FREQUENCIES = 10000.0 ** -(torch.arange(0, SIZE, 2) / SIZE)

Table = tuple[Tensor, Tensor]
Rotate = Callable[[Tensor, Table], Tensor]
both_forms = pytest.mark.parametrize("rotate", [rotate_interleaved, rotate_half])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotated(pairs: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Complex pairs (B, T, H, R/2), each rotated by position times frequency."""
    angles = positions.double()[..., None] * frequencies.double()
    return pairs * torch.polar(torch.ones_like(angles), angles)[:, :, None]


def test_interleaved_rotation_is_a_complex_multiplication_of_neighbours() -> None:
    x, positions = random(2, 5, HEADS, SIZE), torch.tensor([[0, 1, 2, 0, 1], [3, 4, 5, 6, 7]])
    expected = rotated(torch.view_as_complex(x.view(2, 5, HEADS, -1, 2)), positions, FREQUENCIES)
    ours = rotate_interleaved(x, rotary_table(positions, FREQUENCIES))
    torch.testing.assert_close(ours, torch.view_as_real(expected).flatten(-2), rtol=1e-6, atol=1e-6)


def test_half_rotation_is_a_complex_multiplication_across_the_halves() -> None:
    x, positions = random(2, 5, HEADS, SIZE), torch.tensor([[0, 1, 2, 0, 1], [3, 4, 5, 6, 7]])
    expected = rotated(torch.complex(*x.chunk(2, dim=-1)), positions, FREQUENCIES)
    ours = rotate_half(x, rotary_table(positions, FREQUENCIES))
    torch.testing.assert_close(ours, torch.cat((expected.real, expected.imag), dim=-1), rtol=1e-6, atol=1e-6)


def test_partial_rotation_leaves_the_rest_of_a_head() -> None:
    x, positions = random(1, 3, HEADS, SIZE), torch.tensor([[5, 6, 7]])
    table = rotary_table(positions, FREQUENCIES[:2])
    ours = rotate_interleaved(x, table)
    assert torch.equal(ours[..., 4:], x[..., 4:])
    assert torch.equal(ours[..., :4], rotate_interleaved(x[..., :4], table))


@both_forms
@settings(max_examples=25, deadline=None)
@given(q_at=st.integers(0, 500), k_at=st.integers(0, 500), shift=st.integers(0, 500))
def test_a_score_depends_on_the_distance_alone(rotate: Rotate, q_at: int, k_at: int, shift: int) -> None:
    q, k = random(1, 1, 1, SIZE), random(1, 1, 1, SIZE, seed=1)

    def score(by: int) -> Tensor:
        at_q, at_k = (rotary_table(torch.tensor([[p + by]]), FREQUENCIES) for p in (q_at, k_at))
        return (rotate(q, at_q) * rotate(k, at_k)).sum()

    torch.testing.assert_close(score(shift), score(0), rtol=0, atol=1e-3)  # float32 angles near 1000


@both_forms
def test_a_short_type_stays_as_it_is(rotate: Rotate) -> None:
    table = rotary_table(torch.arange(3)[None], FREQUENCIES)
    assert rotate(random(1, 3, HEADS, SIZE).bfloat16(), table).dtype == torch.bfloat16


def documents_of(document: Tensor) -> Documents:
    found = find_documents(document, CPU)
    assert found is not None
    return found


def explicit(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, written out; seen is (T, S)."""
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def three(length: int, *, groups: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    return (
        random(2, length, HEADS, SIZE),
        random(2, length, groups, SIZE, seed=1),
        random(2, length, groups, SIZE, seed=2),
    )


def test_attention_is_the_formula() -> None:
    q, k, v = three(7)
    seen = torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(causal_attention(q, k, v), explicit(q, k, v, seen))


SPECS = [
    AttentionSpec(0.7), AttentionSpec(window=3), AttentionSpec(softcap=1.5), AttentionSpec(0.9, softcap=0.8, window=2),
    AttentionSpec(window=100),
]  # fmt: skip


def of_spec(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, number: list[int]) -> Tensor:
    """Attention written out, one query and head at a time; `number` is the document of each position."""
    out = torch.zeros_like(q)
    for row, at, head in torch.ones(q.shape[:3]).nonzero().tolist():
        first = 0 if spec.window is None else max(0, at + 1 - spec.window)
        seen = [other for other in range(first, at + 1) if number[other] == number[at]]
        group = head * k.shape[2] // q.shape[2]
        scores = k[row, seen, group] @ q[row, at, head] * (spec.scale or q.shape[3] ** -0.5)
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        out[row, at, head] = scores.softmax(dim=0) @ v[row, seen, group]
    return out


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_windows_scales_and_soft_caps_are_the_formula(
    spec: AttentionSpec, packed: bool, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softcap, "CHUNK", 4)  # scores of several chunks
    q, k, v = three(11, groups=groups)
    number = [0] * 5 + [1] * 6 if packed else [0] * 11
    documents = documents_of(torch.tensor([number, number])) if packed else None
    found = causal_attention(q, k, v, spec, documents=documents)
    torch.testing.assert_close(found, of_spec(q, k, v, spec, number), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_the_gradient_of_soft_capped_attention_is_that_of_the_formula(
    packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softcap, "CHUNK", 4)
    number = [0] * 5 + [1] * 6 if packed else [0] * 11
    documents = documents_of(torch.tensor([number, number])) if packed else None
    spec = AttentionSpec(0.6, softcap=1.1, window=4)
    inputs = [x.requires_grad_() for x in three(11)]
    again = [x.detach().clone().requires_grad_() for x in inputs]
    found = causal_attention(inputs[0], inputs[1], inputs[2], spec, documents=documents)
    weight = random(*found.shape, seed=9)
    torch.autograd.backward((found * weight).sum())
    seen = torch.ones(11, 11, dtype=torch.bool).tril().triu(-3)
    seen = seen & (torch.tensor(number)[:, None] == torch.tensor(number))
    a = torch.einsum("bthd,bshd->bhts", again[0], again[1]) * 0.6
    weights = (1.1 * torch.tanh(a / 1.1)).masked_fill(~seen, -torch.inf).softmax(dim=-1)
    torch.autograd.backward((torch.einsum("bhts,bshd->bthd", weights, again[2]) * weight).sum())
    for one, other in zip(inputs, again, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)  # computed in float32


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_heads_are_repeated_heads(groups: int) -> None:
    q, k, v = three(6, groups=groups)
    share = HEADS // groups
    many = [torch.cat([x[:, :, h // share, None] for h in range(HEADS)], dim=2) for x in (k, v)]
    assert torch.equal(causal_attention(q, k, v), causal_attention(q, many[0], many[1]))


@settings(max_examples=25, deadline=None)
@given(length=st.integers(2, 12), data=st.data())
def test_no_position_sees_a_later_one(length: int, data: st.DataObject) -> None:
    q, k, v = three(length)
    at = data.draw(st.integers(1, length - 1))
    before = causal_attention(q, k, v)
    k[:, at:] += 3
    v[:, at:] -= 5
    after = causal_attention(q, k, v)
    assert torch.equal(after[:, :at], before[:, :at])
    assert not torch.equal(after[:, at:], before[:, at:])


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=2, max_size=5), padding=st.integers(0, 3), data=st.data())
def test_documents_of_a_row_do_not_see_each_other(lengths: list[int], padding: int, data: st.DataObject) -> None:
    numbers = [i for i, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
    document = torch.tensor([numbers, numbers])
    documents = documents_of(document)
    q, k, v = three(len(numbers))
    before = causal_attention(q, k, v, documents=documents)
    assert before.isfinite().all()  # padding looks at padding: no row of the softmax is empty
    chosen = document[0] == data.draw(st.integers(0, len(lengths) - 1))
    for x in (q, k, v):
        x[:, chosen] += 3
    after = causal_attention(q, k, v, documents=documents)
    assert torch.equal(after[:, ~chosen], before[:, ~chosen])
    assert not torch.equal(after[:, chosen], before[:, chosen])


def test_a_packed_document_is_what_it_is_alone() -> None:
    q, k, v = three(9)
    documents = documents_of(torch.tensor([[0] * 4 + [1] * 5, [0] * 4 + [1] * 5]))
    packed = causal_attention(q, k, v, documents=documents)
    for part in (slice(0, 4), slice(4, 9)):
        alone = causal_attention(q[:, part], k[:, part], v[:, part])
        torch.testing.assert_close(packed[:, part], alone)


def test_rows_of_one_document_need_no_mask() -> None:
    assert find_documents(None, CPU) is None
    assert find_documents(torch.tensor([[0, 0, 0], [7, 7, 7]]), CPU) is None
    assert find_documents(torch.tensor([[0, 0, 0], [7, 8, 8]]), CPU) is not None


def test_padding_after_one_document_needs_no_mask_and_changes_no_earlier_position() -> None:
    assert find_documents(torch.tensor([[0, 0, 0], [7, 7, -1]]), CPU) is None
    assert find_documents(torch.tensor([[0, 1, -1]]), CPU) is not None
    q, k, v = three(6)
    before = causal_attention(q, k, v)[:, :4]
    for x in (q, k, v):
        x[:, 4:] = 9
    assert torch.equal(causal_attention(q, k, v)[:, :4], before)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=3),
    padding=st.integers(0, 3),
)
def test_where_documents_start_says_the_same_as_the_mask(rows: list[list[int]], padding: int) -> None:
    length = max(sum(row) for row in rows) + padding
    numbers, first = [], 0
    for row in rows:
        found = [first + i for i, count in enumerate(row) for _ in range(count)]
        numbers.append(found + [-1] * (length - len(found)))
        first += len(row) if padding else 0  # numbers may or may not go on from row to row
    document = torch.tensor(numbers)
    documents = find_documents(document, CPU)
    packed = any(len(row) > 1 for row in rows)
    assert (documents is not None) == packed
    if documents is None:
        return
    assert documents.offsets.dtype == torch.int32  # as the kernel for packed documents takes them
    spans = documents.offsets.diff()
    assert documents.longest == spans.max()
    assert int(documents.offsets[0]) == 0
    assert int(documents.offsets[-1]) == document.numel()
    number = torch.arange(len(spans)).repeat_interleave(spans).view(document.shape)
    assert torch.equal((number[:, None, :, None] == number[:, None, None, :]).tril(), documents.mask)


@pytest.mark.parametrize(
    ("form", "turned_numbers"), [(ROTATE_INTERLEAVED, 4), (ROTATE_INTERLEAVED, SIZE), (ROTATE_HALF, SIZE)]
)
@pytest.mark.parametrize("table_rows", [1, 2], ids=["one row for all", "a row each"])
def test_rotation_in_place_is_the_rotation_and_its_transpose_the_inverse(
    form: str, turned_numbers: int, table_rows: int
) -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 5, 6, 7]])[:table_rows]
    cos, sin = rotary_table(positions, FREQUENCIES[: turned_numbers // 2])
    x = random(2, 5, HEADS, SIZE)
    buffer = random(10, HEADS * SIZE + 3)
    heads = buffer[:, 1 : HEADS * SIZE + 1]
    heads.copy_(x.view(10, -1))
    surroundings = buffer[:, [0, -2, -1]].clone()
    copied = torch.full_like(heads, 9)
    rotate_into(heads, cos, sin, SIZE, form, copied)
    rotate_into(heads, cos, sin, SIZE, form, heads)
    assert torch.equal(copied, heads)
    torch.testing.assert_close(heads.reshape(x.shape), rotate(x, (cos, sin), form), rtol=0, atol=0)
    assert not torch.equal(heads.reshape(x.shape), x)
    rotate_into(heads, cos, sin, SIZE, form, heads, back=True)
    torch.testing.assert_close(heads.reshape(x.shape), x, rtol=1e-6, atol=1e-6)
    assert torch.equal(buffer[:, [0, -2, -1]], surroundings)


@settings(max_examples=40, deadline=None)
@given(chunks=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_attention_over_a_cache_in_chunks_is_attention_at_once(chunks: list[int]) -> None:
    q, k, v = three(sum(chunks), groups=2)
    start, outputs = 0, []
    for length in chunks:
        outputs.append(prefill_attention(q[:, start : start + length], k, v, torch.full((len(q),), start)))
        start += length
    torch.testing.assert_close(torch.cat(outputs, dim=1), causal_attention(q, k, v))


@pytest.mark.parametrize("phase", Phase)
def test_the_table_over_a_cache_is_that_of_all_positions_at_once(phase: Phase) -> None:
    """Up to the last digit, in which a vectorised cosine and its scalar remainder may differ."""
    decode = phase is Phase.DECODE
    positions = torch.tensor([[3], [200], [0]]) if decode else torch.arange(5, 140)[None]
    frequencies = torch.logspace(0, -3, 5)
    for found, wanted in zip(
        cached_rotary_table(positions, frequencies, phase=phase), rotary_table(positions, frequencies), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2**-23)


def varlen_of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):  # type: ignore[no-untyped-def]
    """The parameters of FlashAttention for packed documents in PyTorch 2.10."""


def varlen_of_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
    """The same in PyTorch 2.13."""


@pytest.mark.parametrize(
    ("function", "plain", "windows", "scaled"),
    [(None, False, False, False), (varlen_of_2_10, True, False, False), (varlen_of_2_13, True, True, True)],
)
def test_flash_attention_for_packed_documents_is_used_where_this_pytorch_has_its_options(
    function: object, plain: bool, windows: bool, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_varlen_function", lambda: function)
    attention._varlen_parameters.cache_clear()
    call = True, torch.bfloat16, "auto"
    try:
        assert attention.supports_varlen(*call) is plain
        assert attention.supports_varlen(*call, windows=True) is windows
        assert attention.supports_varlen(*call, scaled=True) is scaled
        assert attention.supports_varlen(*call, windows=True, scaled=True) is (windows and scaled)
    finally:
        attention._varlen_parameters.cache_clear()


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (devices.CPU, False), (devices.MI300X, False), (devices.MPS, False), (devices.GTX_1080_TI, False),
        (devices.T4, False), (devices.A100, True), (devices.H200, True), (devices.UNKNOWN_GPU, True),
    ],
)  # fmt: skip
def test_flash_attention_for_packed_documents_and_shared_keys_needs_compute_capability_8(
    device: Capabilities, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_varlen_function", lambda: object())
    for dtype in (torch.bfloat16, torch.float16):
        flash = device.flash_attention
        assert attention.supports_varlen(flash, dtype, "auto") is expected
        assert attention.supports_shared_keys(flash, dtype, "auto") is expected
        assert attention.supports_varlen(flash, dtype, "flash") is expected
        assert not attention.supports_varlen(flash, dtype, "cudnn")
        assert not attention.supports_shared_keys(flash, dtype, "efficient")
    assert not attention.supports_varlen(flash, torch.float32, "auto")
    assert not attention.supports_shared_keys(flash, torch.float32, "auto")


@pytest.mark.parametrize("length", [8, 33])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_an_added_mask_is_minus_infinity_where_a_query_sees_no_key_and_is_made_once(
    window: int | None, packed: bool, length: int
) -> None:
    """Used in place of the mask of booleans it gives the same results; its rows start at multiples of 16 values."""
    number = torch.tensor([[0] * 5 + [1] * (length - 5), [2] * length])
    documents = find_documents(number, CPU) if packed else None
    masks, (q, k, v) = AddedMasks(), torch.randn(3, 2, length, 4, 16)
    seen, added = seen_mask(length, window, documents, CPU), masks.get(q, window, documents)
    assert torch.equal(added, torch.where(seen, 0.0, -torch.inf))
    assert all(stride % 16 == 0 for stride in added.stride()[:3])
    assert masks.get(q, window, documents) is added
    assert masks.get(q, 2, documents) is not added
    assert masks.get(q.half(), window, documents).dtype == torch.float16
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    results = [F.scaled_dot_product_attention(q, k, v, attn_mask=mask) for mask in (seen, added)]
    torch.testing.assert_close(*results)


def test_a_gpu_without_flash_attention_adds_one_mask_in_all_layers(
    models_of: Callable[[Any], tuple[Any, Decoder]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits are those of the masks of booleans on a CPU."""
    _, model = models_of(LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1,
    ))  # fmt: skip
    ids, number = torch.arange(16).view(2, 8), torch.tensor([[0] * 5 + [1] * 3, [2] * 8])
    expected = model(ids, documents=find_documents(number, CPU))
    given: list[Tensor] = []
    attend = F.scaled_dot_product_attention

    def recorded(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, **named: Any) -> Tensor:
        given.append(attn_mask)
        return attend(q, k, v, attn_mask=attn_mask, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    monkeypatch.setattr(attention, "capabilities_of", lambda _: devices.T4)
    monkeypatch.setattr(attention, "_sdpa_backends", lambda _: nullcontext())
    torch.testing.assert_close(model(ids, documents=find_documents(number, CPU)), expected)
    assert len(given) == 3
    assert all(mask is given[0] and mask.is_floating_point() for mask in given)
