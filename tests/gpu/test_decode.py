"""The engine on a card: a recorded step is the definition's, with adapters and idle slots, and answers are whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.gpu.cases import matrix
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig, PreTrainedTokenizerFast

from octavo.adapters import AdapterPlan, create_, save, serve_, trained
from octavo.infer.decoding import DecodeRunner
from octavo.infer.engine import Engine
from octavo.infer.requests import Limits, Request, Stream
from octavo.infer.sample import Sampling
from octavo.layers.frozen import FrozenLinear
from octavo.layers.lora import LoraSpec
from octavo.layers.multi_lora import ServedAdapters
from octavo.models import Decoder
from octavo.ops.quantize import SCHEMES, scheme_named
from octavo.runtime.dispatch import Backends, set_backends
from octavo.store.peft import read
from octavo.store.sources import FolderSource
from octavo.store.weights import load

pytestmark = pytest.mark.filterwarnings("default")  # what libraries say of each other is no fault of ours
CARD = torch.device("cuda")
WORDS, ROOM = 512, 400
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=WORDS, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, initializer_range=0.1, max_position_embeddings=ROOM,
    ),
    "gptj": GPTJConfig(
        vocab_size=WORDS, n_embd=256, n_inner=1024, n_layer=2, n_head=4, rotary_dim=32, initializer_range=0.1,
        n_positions=ROOM,
    ),
}  # fmt: skip
# The largest difference of logits over the largest logit: two layers of sums in another order, rounded to the type.
NEAR = {torch.float32: 1e-4, torch.bfloat16: 0.05}


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(CONFIGS[request.param]).save_pretrained(path)
    return path


@pytest.fixture
def adapters(folder: Path, tmp_path: Path) -> list[Path]:
    """Two adapters of different ranks."""
    found = []
    for rank in (4, 9):
        model, plan = loaded(folder, "none", torch.float32), AdapterPlan(LoraSpec(rank, 2.0 * rank))
        create_(model, plan, seed=rank)
        for parameter in trained(model).values():
            parameter.data.normal_(0, 0.1)
        found.append(tmp_path / str(rank))
        found[-1].mkdir()
        save(found[-1], model, plan, base="base", origin={}, readme="")
    return found


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    set_backends(Backends())


def loaded(folder: Path, scheme: str, dtype: torch.dtype) -> Decoder:
    return load(FolderSource(folder), scheme_named(scheme), dtype=dtype, device=CARD).eval()


def logits_of(model: Decoder, adapters: list[Path], *, slots: int, live: int) -> tuple[torch.Tensor, list[int], bool]:
    """(logits of the last of three steps over prompts of all lengths, the slots' lengths, whether it was recorded)."""
    routing = ServedAdapters()
    for number, path in enumerate(adapters):
        serve_(model, routing, read(path), str(number))
    cache = model.new_slots(slots=slots, max_len=ROOM)
    decoder = DecodeRunner(model, cache, routing, WORDS)
    draw = torch.Generator().manual_seed(0)
    for slot in range(live):
        own = torch.tensor([slot % 3], device=CARD)
        prompt = torch.randint(WORDS, (1, 1 + 37 * slot % 390), generator=draw)
        model.hidden(prompt.to(CARD), cache=cache.slot(slot), adapter_ids=own)
    adapter_ids = [slot % 3 for slot in range(live)]
    for _ in range(3):
        found = decoder.step(torch.randint(WORDS, (live,), generator=draw).tolist(), adapter_ids)
    assert found.greedy == found.logits.argmax(dim=1).tolist()
    for layer in model.modules():
        if isinstance(layer, FrozenLinear):
            layer.bank = None
    return found.logits.clone(), list(cache.lengths), decoder.records


@matrix(scheme=SCHEMES, dtype=NEAR, size=[(1, 1), (5, 3), (16, 16), (40, 33)])(
    # Kernels of few rows read int8 alone, in tiles by the type and the rows.
    lambda scheme, dtype, size: (
        (scheme == "int8" and (dtype == torch.bfloat16 or size == (40, 33)))
        or (size == (5, 3) and dtype == torch.bfloat16)
    )
)
def test_a_recorded_step_is_the_definitions(
    folder: Path, adapters: list[Path], scheme: str, dtype: torch.dtype, size: tuple[int, int]
) -> None:
    slots, live = size
    model = loaded(folder, scheme, dtype)
    with torch.no_grad():
        ours, lengths, recorded = logits_of(model, adapters, slots=slots, live=live)
        set_backends(Backends(kernels=False))
        theirs, others, plain = logits_of(model, adapters, slots=slots, live=live)
    assert (recorded, plain) == (True, False)
    assert lengths == others
    assert (ours - theirs).abs().max() < NEAR[dtype] * theirs.abs().max()


def adapter_ids() -> PreTrainedTokenizerFast:
    table = {f"w{number}": number for number in range(WORDS)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(table, unk_token="w0")))


def run_out(engine: Engine, requests: list[Request]) -> list[tuple[int, ...]]:
    streams: list[Stream] = [engine.submit(request) for request in requests]
    while engine.stats().running or engine.stats().waiting:
        engine.step()
    answers = [stream.ready() for stream in streams]
    assert all(tokens[-1].finish_reason == "length" for tokens in answers)
    return [tuple(token.token_id for token in tokens) for tokens in answers]


def test_answers_are_those_of_each_request_alone(folder: Path, adapters: list[Path]) -> None:
    """In float32, where the order of a sum seldom makes another token the likeliest."""
    model = loaded(folder, "int8", torch.float32)
    draw = torch.Generator().manual_seed(1)
    requests = [
        Request(
            tuple(torch.randint(WORDS, (1 + 41 * n % 170,), generator=draw).tolist()),
            Sampling(temperature=0.0 if n % 2 else 0.9, max_new_tokens=20 + n, seed=n),
            (None, "a", "b")[n % 3],
        )
        for n in range(9)
    ]
    answers = []
    for slots in (6, 1):
        engine = Engine(model, adapter_ids(), base="base", limits=Limits(slots=slots, max_len=ROOM, chunk=64))
        for name, path in zip("ab", adapters, strict=True):
            engine.load_adapter(name, path)
        for piece in engine.warmup_tasks():  # short prompts as graphs too
            piece()
        answers.append(run_out(engine, requests) if slots > 1 else [run_out(engine, [one])[0] for one in requests])
        for name in "ab":
            engine.remove_adapter(name)
    same = sum(one == other for one, other in zip(*answers, strict=True))
    assert same >= len(requests) - 1
    assert len(set(answers[0])) == len(requests)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_answer_has_the_same_bits_in_any_batch(folder: Path, adapters: list[Path], scheme: str) -> None:
    """In bfloat16, with prompts read whole and in chunks, and with log-probabilities to show the last digit."""
    model = loaded(folder, scheme, torch.bfloat16)
    draw = torch.Generator().manual_seed(1)
    whole = torch.randint(WORDS, (ROOM,), generator=draw).tolist()
    requests = [
        Request(
            tuple(whole[n % 3 : n % 3 + 1 + 43 * n % 380]), Sampling(temperature=0.0, max_new_tokens=16),
            (None, "a", "b")[n % 3], logprobs=1,
        )
        for n in range(20)
    ]  # fmt: skip
    answers = []
    for slots, chunk, graphs in ((1, 64, False), (20, 128, True), (7, 256, False)):
        engine = Engine(model, adapter_ids(), base="base", limits=Limits(slots=slots, max_len=ROOM, chunk=chunk))
        for name, path in zip("ab", adapters, strict=True):
            engine.load_adapter(name, path)
        for piece in engine.warmup_tasks() if graphs else []:  # short prompts as graphs too
            piece()
        for asked in (
            [[request] for request in requests for _ in range(2)] if slots == 1 else [requests, requests[::-1]]
        ):
            streams = [engine.submit(request) for request in asked]
            while engine.stats().running or engine.stats().waiting:
                engine.step()
            answers += [
                (request, tuple((token.token_id, token.logprob) for token in stream.ready()))
                for request, stream in zip(asked, streams, strict=True)
            ]
        for name in "ab":
            engine.remove_adapter(name)
    assert len(answers) == 6 * len(requests)
    assert len(set(answers)) == len(requests)


def test_adapters_that_come_and_go_are_in_the_next_step(folder: Path, adapters: list[Path]) -> None:
    engine = Engine(
        loaded(folder, "int8", torch.float32), adapter_ids(), base="base", limits=Limits(slots=2, max_len=ROOM)
    )
    asked = [Request((5, 6, 7), Sampling(temperature=0.0, max_new_tokens=12), name) for name in (None, "a")]
    (base,) = run_out(engine, asked[:1])
    engine.load_adapter("a", adapters[0])
    first = run_out(engine, asked)
    engine.remove_adapter("a")
    engine.load_adapter("a", adapters[1])
    second = run_out(engine, asked)
    assert first[0] == second[0] == base
    assert len({base, first[1], second[1]}) == 3


def test_steps_take_no_memory(folder: Path) -> None:
    engine = Engine(
        loaded(folder, "int8", torch.bfloat16), adapter_ids(), base="base", limits=Limits(slots=4, max_len=ROOM)
    )
    asked = [Request((5, 6, n), Sampling(temperature=0.0, max_new_tokens=60)) for n in range(4)]
    run_out(engine, asked)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run_out(engine, asked)
    assert torch.cuda.memory_allocated() == held
    assert torch.cuda.max_memory_allocated() - held < 2**21
