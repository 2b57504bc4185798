"""Every family against transformers and PEFT: greedy decoding, serving in batches, quantized weights, adapters.

Logits, gradients, packed documents and the cache are compared in tests/models/test_parity.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.families.adapters import with_octavo, with_peft
from tests.families.models import Family, each_family, logits, some_ids

from octavo.adapters import apply_
from octavo.infer.engine import Engine
from octavo.infer.generate import complete
from octavo.infer.requests import Limits, Request
from octavo.infer.sample import Sampling
from octavo.models import Decoder, weight_entries
from octavo.ops import tiles
from octavo.ops.quantize import SCHEMES, dequantize
from octavo.store.peft import read

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),  # peft 0.21
]
TOLERANCE = 1e-4
PROMPTS = [some_ids(1, length)[0].tolist() for length in (1, 5, 9, 17)]


@pytest.mark.cell("greedy")
@each_family
def test_greedy_tokens_are_those_of_transformers(family: Family) -> None:
    model, greedy = family.ours(), Sampling(temperature=0.0, max_new_tokens=12)
    beyond = list(range(len(family.tokenizer), 264))  # octavo never selects what the tokenizer has not
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = family.theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, suppress_tokens=beyond,
            eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        expected = out[0, len(prompt) :].tolist()
        assert list(complete(model, family.tokenizer, prompt, greedy).token_ids) == expected


@pytest.mark.cell("batched")
@each_family
def test_requests_in_one_batch_have_the_bits_of_each_alone(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "PREFILL_TILE", 4)
    batch = [
        Request(tuple(prompt), Sampling(temperature=0.7 * (n % 2), max_new_tokens=8, seed=n), logprobs=2)
        for n, prompt in enumerate(PROMPTS)
    ]
    alone = [answers(family, [request], slots=1)[0] for request in batch]
    assert len({tuple(answer) for answer in alone}) == len(batch)
    assert answers(family, batch, slots=4) == alone
    assert answers(family, batch[::-1], slots=3) == alone[::-1]


def answers(family: Family, batch: list[Request], *, slots: int) -> list[list[tuple[int, float | None]]]:
    """(token, log-probability) of each request, of an engine that gets all at once."""
    limits = Limits(slots=slots, max_len=48, queue=8, chunk=8)
    engine = Engine(family.ours(), family.tokenizer, base="base", limits=limits)
    streams = [engine.submit(request) for request in batch]
    while (stats := engine.stats()).running or stats.waiting:
        engine.step()
    return [[(token.token_id, token.logprob) for token in stream.ready()] for stream in streams]


@pytest.mark.cell("schemes")
@each_family
def test_a_quantized_model_is_transformers_over_its_dequantized_weights(family: Family) -> None:
    plain = logits(family.theirs)
    for scheme in SCHEMES:
        ours = family.ours(scheme)
        expected, actual = logits(with_weights_of(family.theirs, ours)), logits(ours)
        assert (actual - expected).abs().max() <= TOLERANCE, scheme
        assert bool((actual - plain).abs().max() > 10 * TOLERANCE) is (scheme != "none"), scheme


@torch.no_grad()
def with_weights_of(theirs: Any, ours: Decoder) -> Any:
    """The model of transformers with octavo's matrices, dequantized and in the layout of the checkpoint."""
    model = copy.deepcopy(theirs)
    for entry in weight_entries(ours).values():
        if (matrix := entry.matrix) is not None:
            shape = (matrix.outputs[entry.rows_key], matrix.in_features)
            weight = dequantize(matrix.scheme, matrix.of(entry.rows_key), shape)  # (N, K)
            weight = weight if entry.order is None else entry.order.to_checkpoint(weight)
            model.get_submodule(entry.module).weight.copy_(weight.T if entry.transposed else weight)
    return model


@pytest.mark.cell("from PEFT")
@each_family
def test_an_adapter_of_peft_has_the_logits_of_peft(family: Family, tmp_path: Path) -> None:
    expected = logits(with_peft(family, tmp_path / "adapter"))
    model = family.ours()
    apply_(model, read(tmp_path / "adapter"))
    assert (expected - logits(family.theirs)).abs().max() > 0.1
    assert (logits(model) - expected).abs().max() <= TOLERANCE


@pytest.mark.cell("to PEFT")
@each_family
def test_an_adapter_of_octavo_has_the_same_logits_in_peft(family: Family, tmp_path: Path) -> None:
    expected = logits(with_octavo(family, tmp_path / "adapter"))
    theirs = PeftModel.from_pretrained(copy.deepcopy(family.theirs), tmp_path / "adapter").eval()
    assert (expected - logits(family.theirs)).abs().max() > 0.1
    assert (logits(theirs) - expected).abs().max() <= TOLERANCE
