"""The engine on a GPU: decode steps with CUDA graphs against the reference, with adapters and idle slots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from tests.gpu.cases import matrix
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig, MistralConfig, PreTrainedTokenizerFast

from octavo.adapters import AdapterPlan, create_, save, trained
from octavo.adapters.served import serve_
from octavo.hardware import pick, pretend_, restore_
from octavo.infer.decoding import DecodeRunner
from octavo.infer.engine import Engine
from octavo.infer.requests import Limits, Request, Stream
from octavo.infer.sample import Sampling
from octavo.layers import kv_store
from octavo.layers.frozen import FrozenLinear
from octavo.layers.lora import LoraSpec
from octavo.layers.multi_lora import ServedAdapters
from octavo.models import Decoder
from octavo.ops.quantize import SCHEMES, scheme_named
from octavo.runtime.dispatch import Backends, set_backends
from octavo.store.peft import read
from octavo.store.sources import FolderSource
from octavo.store.weights import load

pytestmark = pytest.mark.filterwarnings("default")  # warnings of libraries are no failures
GPU = torch.device("cuda")
VOCAB_SIZE, MAX_LEN = 512, 400
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, initializer_range=0.1, max_position_embeddings=MAX_LEN,
    ),
    "gptj": GPTJConfig(
        vocab_size=VOCAB_SIZE, n_embd=256, n_inner=1024, n_layer=2, n_head=4, rotary_dim=32, initializer_range=0.1,
        n_positions=MAX_LEN,
    ),
    "mistral": MistralConfig(  # a window: each layer holds 48 + CHUNK positions
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, max_position_embeddings=MAX_LEN, sliding_window=48,
    ),
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)
# Relative errors of a slot's logits that need no explanation: sums in another order; a few roundings of each layer.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-6}


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param])
    _round_(model.parameters())
    model.save_pretrained(path)
    return path


def _round_(parameters: Iterable[torch.Tensor]) -> None:
    """To values of bfloat16, so that a model has the same weights in both dtypes."""
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16().float()


@pytest.fixture
def adapters(folder: Path, tmp_path: Path) -> list[Path]:
    """Two adapters of different ranks."""
    folders = []
    for rank in (4, 9):
        model, plan = load_model(folder, "none", torch.float32), AdapterPlan(LoraSpec(rank, 2.0 * rank))
        create_(model, plan, seed=rank)
        for parameter in trained(model).values():
            parameter.data.normal_(0, 0.1)
        _round_(trained(model).values())
        folders.append(tmp_path / str(rank))
        folders[-1].mkdir()
        save(folders[-1], model, plan, base="base", origin={}, readme="")
    return folders


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_store, "CHUNK", 64)


@pytest.fixture(autouse=True)
def default_backends() -> Iterator[None]:
    yield
    set_backends(Backends())


def load_model(folder: Path, scheme: str, dtype: torch.dtype) -> Decoder:
    return load(FolderSource(folder), scheme_named(scheme), dtype=dtype, device=GPU).eval()


def logits_of(model: Decoder, adapters: list[Path], *, slots: int, live: int) -> tuple[torch.Tensor, list[int], bool]:
    """(logits of the last of three steps on prompts of many lengths, lengths of the slots, whether it used graphs)."""
    served = ServedAdapters()
    for number, path in enumerate(adapters):
        serve_(model, served, read(path), str(number))
    cache = model.new_slots(slots=slots, max_len=MAX_LEN)
    decoder = DecodeRunner(model, cache, served, VOCAB_SIZE)
    generator = torch.Generator().manual_seed(0)
    for slot in range(live):
        adapter_id = torch.tensor([slot % 3], device=GPU)
        prompt = torch.randint(VOCAB_SIZE, (1, 1 + 37 * slot % 390), generator=generator)
        model.hidden(prompt.to(GPU), cache=cache.slot(slot), adapter_ids=adapter_id)
    adapter_ids = [slot % 3 for slot in range(live)]
    for _ in range(3):
        decoded = decoder.step(torch.randint(VOCAB_SIZE, (live,), generator=generator).tolist(), adapter_ids)
    assert decoded.argmax == decoded.logits.argmax(dim=1).tolist()
    for layer in model.modules():
        if isinstance(layer, FrozenLinear):
            layer.bank = None
    return decoded.logits.clone(), list(cache.lengths), decoder.uses_graphs


@matrix(scheme=SCHEMES, dtype=DTYPES, size=[(1, 1), (5, 3), (16, 16), (40, 33)])(
    # Decode kernels of few rows support int8 only; their tiles depend on the dtype and the number of rows.
    lambda scheme, dtype, size: (
        (scheme == "int8" and (dtype == torch.bfloat16 or size == (40, 33)))
        or (size == (5, 3) and dtype == torch.bfloat16)
    )
)
def test_a_decode_step_with_graphs_equals_the_reference(
    folder: Path, adapters: list[Path], scheme: str, dtype: torch.dtype, size: tuple[int, int]
) -> None:
    """Both are compared with the reference in float32: the kernels' error is at most twice that of the reference."""
    slots, live = size
    model = load_model(folder, scheme, dtype)
    with torch.no_grad():
        actual, lengths, uses_graph = logits_of(model, adapters, slots=slots, live=live)
        set_backends(Backends(kernels=False))
        reference, expected_lengths, reference_uses_graph = logits_of(model, adapters, slots=slots, live=live)
        exact, *_ = logits_of(load_model(folder, scheme, torch.float32), adapters, slots=slots, live=live)
    assert (uses_graph, reference_uses_graph) == (True, False)
    assert lengths == expected_lengths
    assert _error(actual, exact) <= 2 * max(_error(reference, exact), ROUNDING[dtype])


def _error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest relative error of a slot's logits (slots, V)."""
    return float(((logits.float() - exact).norm(dim=1) / exact.norm(dim=1)).max())


def numbered_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {f"w{number}": number for number in range(VOCAB_SIZE)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")))


def run_to_end(engine: Engine, requests: list[Request]) -> list[tuple[int, ...]]:
    streams: list[Stream] = [engine.submit(request) for request in requests]
    while engine.stats().running or engine.stats().waiting:
        engine.step()
    answers = [stream.ready() for stream in streams]
    assert all(tokens[-1].finish_reason == "length" for tokens in answers)
    return [tuple(token.token_id for token in tokens) for tokens in answers]


def test_concurrent_requests_have_the_answers_of_single_requests(folder: Path, adapters: list[Path]) -> None:
    """In float32, where the order of sums rarely changes the sampled token."""
    model = load_model(folder, "int8", torch.float32)
    generator = torch.Generator().manual_seed(1)
    requests = [
        Request(
            tuple(torch.randint(VOCAB_SIZE, (1 + 41 * n % 170,), generator=generator).tolist()),
            Sampling(temperature=0.0 if n % 2 else 0.9, max_new_tokens=20 + n, seed=n),
            (None, "a", "b")[n % 3],
        )
        for n in range(9)
    ]
    answers = []
    for slots in (6, 1):
        engine = Engine(model, numbered_tokenizer(), base="base", limits=Limits(slots=slots, max_len=MAX_LEN, chunk=64))
        for name, path in zip("ab", adapters, strict=True):
            engine.load_adapter(name, read(path))
        for task in engine.warmup_tasks():  # also captures prefill of short prompts
            task()
        answers.append(
            run_to_end(engine, requests) if slots > 1 else [run_to_end(engine, [request])[0] for request in requests]
        )
        for name in "ab":
            engine.remove_adapter(name)
    same = sum(concurrent == alone for concurrent, alone in zip(*answers, strict=True))
    assert same >= len(requests) - 1
    assert len(set(answers[0])) == len(requests)


@pytest.mark.parametrize("gpu", ["T4", "1080Ti"])
def test_an_engine_answers_as_on_a_gpu_whose_tensor_cores_triton_does_not_use(
    folder: Path, adapters: list[Path], gpu: str
) -> None:
    """Its decode steps are CUDA graphs, also of more rows than the kernels without dots multiply; its prompts are not.

    In float32, where the order of sums rarely changes a token.
    """
    requests = [
        Request(
            tuple(range(1 + n % 5, 3 + 11 * n % 170)),
            Sampling(temperature=0.0, max_new_tokens=8),
            (None, "a", "b")[n % 3],
        )
        for n in range(33)
    ]
    answers = []
    for restricted in (False, True):
        if restricted:
            pretend_(gpu, pick())
        try:
            engine = Engine(
                load_model(folder, "int8", torch.float32), numbered_tokenizer(), base="base",
                limits=Limits(slots=40, max_len=MAX_LEN, chunk=64),
            )  # fmt: skip
            for name, path in zip("ab", adapters, strict=True):
                engine.load_adapter(name, read(path))
            for task in engine.warmup_tasks():
                task()
            answers.append(run_to_end(engine, requests))
        finally:
            restore_()
    same = sum(restricted == unrestricted for restricted, unrestricted in zip(*answers, strict=True))
    assert same >= len(requests) - 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_answer_is_bit_identical_in_every_batch(folder: Path, adapters: list[Path], scheme: str) -> None:
    """In bfloat16, with prefill in one or several chunks; log-probabilities show differences in the last bit."""
    model = load_model(folder, scheme, torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(VOCAB_SIZE, (MAX_LEN,), generator=generator).tolist()
    requests = [
        Request(
            tuple(text[n % 3 : n % 3 + 1 + 43 * n % 380]), Sampling(temperature=0.0, max_new_tokens=16),
            (None, "a", "b")[n % 3], logprobs=1,
        )
        for n in range(20)
    ]  # fmt: skip
    answers = []
    for slots, chunk, graphs in ((1, 64, False), (20, 128, True), (7, 256, False)):
        engine = Engine(
            model, numbered_tokenizer(), base="base", limits=Limits(slots=slots, max_len=MAX_LEN, chunk=chunk)
        )
        for name, path in zip("ab", adapters, strict=True):
            engine.load_adapter(name, read(path))
        for task in engine.warmup_tasks() if graphs else []:  # also captures prefill of short prompts
            task()
        for submitted in (
            [[request] for request in requests for _ in range(2)] if slots == 1 else [requests, requests[::-1]]
        ):
            streams = [engine.submit(request) for request in submitted]
            while engine.stats().running or engine.stats().waiting:
                engine.step()
            answers += [
                (request, tuple((token.token_id, token.logprob) for token in stream.ready()))
                for request, stream in zip(submitted, streams, strict=True)
            ]
        for name in "ab":
            engine.remove_adapter(name)
    assert len(answers) == 6 * len(requests)
    assert len(set(answers)) == len(requests)


def test_loaded_and_removed_adapters_take_effect_in_the_next_step(folder: Path, adapters: list[Path]) -> None:
    engine = Engine(
        load_model(folder, "int8", torch.float32),
        numbered_tokenizer(),
        base="base",
        limits=Limits(slots=2, max_len=MAX_LEN),
    )
    requests = [Request((5, 6, 7), Sampling(temperature=0.0, max_new_tokens=12), name) for name in (None, "a")]
    (base,) = run_to_end(engine, requests[:1])
    engine.load_adapter("a", read(adapters[0]))
    first = run_to_end(engine, requests)
    engine.remove_adapter("a")
    engine.load_adapter("a", read(adapters[1]))
    second = run_to_end(engine, requests)
    assert first[0] == second[0] == base
    assert len({base, first[1], second[1]}) == 3


def test_steps_allocate_no_memory(folder: Path) -> None:
    engine = Engine(
        load_model(folder, "int8", torch.bfloat16),
        numbered_tokenizer(),
        base="base",
        limits=Limits(slots=4, max_len=MAX_LEN),
    )
    requests = [Request((5, 6, n), Sampling(temperature=0.0, max_new_tokens=60)) for n in range(4)]
    run_to_end(engine, requests)
    allocated = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run_to_end(engine, requests)
    assert torch.cuda.memory_allocated() == allocated
    assert torch.cuda.max_memory_allocated() - allocated < 2**21
