"""What all tests share: an offline, quiet, one-threaded process, tiny random models, and the command `octavo`.

The environment is set before anything heavy is imported, and nothing of it decides a verdict: neither the terminal's
width and colours nor a proxy, the user's keys or caches. Tests run on tensors so small that a second thread only
costs; OMP_NUM_THREADS from outside wins.
"""

from __future__ import annotations

import gc
import io
import json
import logging
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ref

import pytest
from tests.families_table import pytest_addoption as pytest_addoption
from tests.families_table import pytest_collection_modifyitems as pytest_collection_modifyitems
from tests.families_table import pytest_runtest_logreport as pytest_runtest_logreport
from tests.families_table import pytest_sessionfinish as pytest_sessionfinish
from tests.forks import Forks

FROM_OUTSIDE = (
    "CLICOLOR", "CLICOLOR_FORCE", "COLORTERM", "FORCE_COLOR", "LINES", "NO_COLOR", "OCTAVO_API_KEY", "OCTAVO_CACHE",
    "PYTHONUNBUFFERED", "PYTHONWARNINGS", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "TYPER_USE_RICH",
)  # fmt: skip
for name in FROM_OUTSIDE:
    os.environ.pop(name, None)
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    NO_PROXY="*",
    TERM="dumb",
    TRANSFORMERS_VERBOSITY="error",
    no_proxy="*",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell that starts the tests in the background has them ignore Ctrl-C, and nohup has them ignore SIGHUP, as every
# process below them would.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if find_spec("hypothesis") is not None:  # tests/gpu do without
    from hypothesis import settings
    from hypothesis.internal.conjecture import providers

    # The same examples each time: a run that passes passes again. OCTAVO_EXPLORE=1 looks for new ones. None has to be
    # done within a time: other processes may hold a machine up.
    settings.register_profile("same", derandomize=True, deadline=None)
    settings.register_profile("explore", deadline=None)
    settings.load_profile("explore" if os.environ.get("OCTAVO_EXPLORE") else "same")
    if not os.environ.get("OCTAVO_EXPLORE") and hasattr(providers, "_get_local_constants"):
        # Hypothesis also tries the constants of all modules that happen to be imported by then: other examples for each
        # order of tests and each worker.
        vars(providers)["_get_local_constants"] = vars(providers)["Constants"]
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a cast at every call in bfloat16

if TYPE_CHECKING:
    from torch import Tensor

    from octavo.models import Decoder


def _has_gpu() -> bool:
    import torch  # reads OMP_NUM_THREADS, so only now; Triton is imported later, by the kernels

    return torch.cuda.is_available()


if not _has_gpu():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels then run on tensors of the CPU, and on no others


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist nobody asks
def pytest_xdist_auto_num_workers() -> int:
    """Workers of `-n auto`: one a core that this process may use, where pytest-xdist counts physical cores.

    Each makes the session's fixtures for itself and takes 1 to 2 GB, so there are at most 8.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


gc.disable()  # until the modules are imported: half a million objects that stay


def pytest_collection_finish() -> None:
    """The garbage collector is not to look at what was imported again and again."""
    gc.enable()
    gc.collect()
    gc.freeze()


def pytest_make_parametrize_id(val: object) -> str | None:
    """Bytes that no one can read are named by their number: all workers must give a test one name, and a gzip file
    holds the time."""
    if isinstance(val, bytes) and not (val.isascii() and val.decode("ascii").isprintable()):
        return f"{len(val)} bytes"
    return None


ModelsOf = Callable[[Any], "tuple[Any, Decoder]"]

WORDS = [
    "the",
    "king",
    "spoke",
    "to",
    "queen",
    "of",
    "storm",
    "and",
    "sea",
    "where",
    "is",
    "my",
    "lord",
    "duke",
    "york",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialized floating-point memory holds NaN during the test."""
    import torch
    from torch.utils import deterministic

    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(before[0])
    deterministic.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def models_of(tmp_path_factory: pytest.TempPathFactory) -> ModelsOf:
    """transformers config -> (a random model of transformers, octavo's reading of the folder it saves).

    Float32, unquantized unless said. Weights are wide (0.2; norms 1 +- 0.2, so that attention is far from uniform), to
    make any difference show. Gemma's norms multiply by 1 + weight: their weights are 0 +- 0.2.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from octavo.ops.quantize import scheme_named
    from octavo.store.sources import FolderSource
    from octavo.store.weights import load

    def make(config: Any, scheme: str = "none") -> tuple[Any, Decoder]:
        torch.manual_seed(0)
        auto = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModelForCausalLM
        theirs = auto.from_config(config, dtype=torch.float32).eval()
        zero_centred = config.model_type.startswith("gemma")
        for name, parameter in theirs.named_parameters():
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            torch.nn.init.normal_(parameter, mean=float(is_norm and not zero_centred), std=0.2)
        folder = tmp_path_factory.mktemp("kernels")
        theirs.save_pretrained(folder)
        source = FolderSource(folder)
        return theirs, load(source, scheme_named(scheme), dtype=torch.float32, device=torch.device("cpu"))

    return make


SavedBy = Callable[[Callable[[], "Tensor"]], "tuple[Tensor, int]"]


@pytest.fixture(scope="session")
def saved_by() -> SavedBy:
    """What makes a tensor -> (that tensor, the bytes made on the way to it that are still held, its own apart).

    Counts storages, whoever holds them: Python, autograd's nodes, or a circle of both that only the collector frees.
    """
    import torch
    from torch import Tensor
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Storages(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

        def note(self, values: Any, *, made: bool) -> None:
            for tensor in tree_leaves(values):
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    reference = StorageWeakRef(storage)
                    self.seen.setdefault(reference.cdata, (reference, storage.nbytes() if made else 0))

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.note((args, kwargs), made=False)  # what was there before counts nothing
            result = function(*args, **(kwargs or {}))
            self.note(result, made=True)
            return result

    def measure(make: Callable[[], Tensor]) -> tuple[Tensor, int]:
        with Storages() as storages:
            made = make()
        held = sum(size for reference, size in storages.seen.values() if not reference.expired())
        return made, held - made.untyped_storage().nbytes()

    assert torch.is_grad_enabled()
    return measure


@pytest.fixture(scope="session", autouse=True)
def _no_power_cut() -> Iterator[None]:
    """Data need not reach the disk itself: that takes milliseconds each time, and a killed process loses none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths of temporary folders are long on some machines, and no line is to be wrapped within one."""
    monkeypatch.setenv("COLUMNS", "1000")


@dataclass(frozen=True)
class Outcome:
    """What a command did, as a shell sees it."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout."""
        return json.loads(self.out)


Octavo = Callable[..., Outcome]


@pytest.fixture
def octavo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Octavo:
    """Runs the command `octavo` with some arguments in this process: torch is imported once for all tests."""
    from octavo.cli import main

    def run(*arguments: object, stdin: bytes = b"") -> Outcome:
        monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # main sets it if it is not set
        monkeypatch.setattr(sys, "argv", ["octavo", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        shown = capsys.readouterr()
        return Outcome(int(str(code or 0)), shown.out, shown.err)

    return run


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Starts processes that have imported torch, transformers and the server already."""
    made = Forks()
    yield made
    made.close()


@pytest.fixture(scope="session")
def smollm2_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What OCTAVO_CACHE is where the real SmolLM2 is needed: whoever comes first converts it, for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "octavo-cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 35,000 random numbers with a tokenizer and a chat template, so small that a run takes a second."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=2, eos_token_id=2,
        attention_bias=True, tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    return _write_tiny(tmp_path_factory.mktemp("tiny") / "llama", config)


@pytest.fixture(scope="session")
def adapter_folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter of the tiny Llama, strong enough to change what it says and how well it predicts."""
    import torch
    from tests import devices

    from octavo import adapters
    from octavo.commands import loading
    from octavo.layers.lora import LoraSpec
    from octavo.ops.quantize import scheme_named
    from octavo.reporting import Report
    from octavo.store.sources import FolderSource, fingerprint

    source, folder = FolderSource(tiny_llama), tmp_path_factory.mktemp("adapter") / "adapter"
    hardware = devices.hardware(devices.CPU)
    with Report(console=False) as report:
        model = loading.load_model(source, scheme_named("none"), hardware, report)
    plan = adapters.AdapterPlan(LoraSpec(2, 4.0))
    adapters.create_(model, plan, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapters.trained(model).items():
        if name.endswith("lora_B"):
            parameter.data.normal_(generator=generator)
    origin = {"base": {"sha256": fingerprint(source)}}
    adapters.save(folder, model, plan, base=str(tiny_llama), origin=origin, readme="")
    return folder


@pytest.fixture
def loaded_models(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Weak references to what `octavo evaluate` loads. All that came before is gone then: two may not fit in memory."""
    from octavo.commands import evaluate, loading

    loaded: list[Any] = []

    def load_model(*arguments: Any) -> Any:
        assert [reference() for reference in loaded] == [None] * len(loaded)
        model = loading.load_model(*arguments)
        loaded.append(ref(model))
        return model

    monkeypatch.setattr(evaluate, "load_model", load_model)
    return loaded


@pytest.fixture(scope="session")
def tiny_gptj(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-J of 45,000 random numbers with the same tokenizer."""
    from transformers import GPTJConfig

    config = GPTJConfig(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=128, bos_token_id=2,
        eos_token_id=2, initializer_range=0.1,
    )  # fmt: skip
    return _write_tiny(tmp_path_factory.mktemp("tiny") / "gptj", config)


@pytest.fixture(scope="session")
def plays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ (six files of some 140 tokens of the tiny tokenizer) and test/ (one more)."""
    folder = tmp_path_factory.mktemp("plays")
    for number in range(7):
        side = folder / ("train" if number < 6 else "test")
        side.mkdir(exist_ok=True)
        draw = random.Random(number)
        lines = (" ".join(draw.choice(WORDS) for _ in range(9)) for _ in range(10))
        (side / f"play{number}.txt").write_text("".join(f"{line}\n" for line in lines))
    return folder


@dataclass(frozen=True)
class Seed:
    """What a script around hivemind/gpt-j-6B-8bit leaves behind: its folder, and its model as it stands in memory."""

    folder: Path
    model: Any


@pytest.fixture(scope="session")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Seed:
    """A GPT-J of 150,000 numbers in 8 bits with trained adapters on all its layers. Not to be changed."""
    import torch
    from transformers import AutoModelForCausalLM, GPTJConfig

    # A matrix of attention is exactly one block of 4096, as those of GPT-J-6B are whole blocks.
    config = GPTJConfig(
        vocab_size=300, n_embd=64, n_layer=2, n_head=4, rotary_dim=4, n_positions=128, bos_token_id=2,
        eos_token_id=2, initializer_range=0.1,
    )  # fmt: skip
    folder = _write_tiny(tmp_path_factory.mktemp("seed") / "tuned", config)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    (folder / "model.safetensors").unlink()
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms and biases are trained along
            torch.nn.init.normal_(parameter, mean=float(".ln_" in name and name.endswith("weight")), std=0.2)
    _freeze_in_8_bits_with_adapters_(model)
    old_buffers = {
        f"transformer.h.{i}.attn.{name}": value
        for i in range(2)
        for name, value in (
            ("bias", torch.ones(128, 128, dtype=torch.uint8).tril()[None, None]),
            ("masked_bias", torch.tensor(-1e9)),
        )
    }
    table = model.state_dict()
    table.update(old_buffers)
    torch.save(table, folder / "pytorch_model.bin")
    return Seed(folder, model)


def _freeze_in_8_bits_with_adapters_(model: Any, rank: int = 5) -> None:
    """For every linear and embedding: int8 values with a scale per 4096 of them, and the two low-rank layers."""
    import torch
    import torch.nn.functional as F
    from bitsandbytes import functional as bnb
    from torch import nn

    class LinearSpec(nn.Module):
        def __init__(self, weight: Tensor, bias: nn.Parameter | None, adapter: nn.Sequential) -> None:
            super().__init__()
            codes, state = bnb.quantize_blockwise(weight, code=bnb.create_dynamic_map(), blocksize=4096)
            for name, tensor in (("weight", codes), ("absmax", state.absmax), ("code", state.code)):
                self.register_buffer(name, tensor)
            self.bias, self.adapter = bias, adapter

        def read(self) -> Tensor:
            state = bnb.QuantState(absmax=self.absmax, code=self.code, blocksize=4096, dtype=torch.float32)
            table: Tensor = bnb.dequantize_blockwise(self.weight, state)
            return table

    class FrozenLinear(LinearSpec):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = F.linear(x, self.read(), self.bias) + self.adapter(x)
            return y

    class FrozenEmbedding(LinearSpec):
        def forward(self, ids: Tensor) -> Tensor:
            y: Tensor = F.embedding(ids, self.read()) + self.adapter(ids)
            return y

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear | nn.Embedding):
                continue
            rows, columns = child.weight.shape
            linear = isinstance(child, nn.Linear)
            down = nn.Linear(columns, rank, bias=False) if linear else nn.Embedding(rows, rank)
            adapter = nn.Sequential(down, nn.Linear(rank, rows if linear else columns, bias=False))
            for parameter in adapter.parameters():
                nn.init.normal_(parameter, std=0.2)
            kind = FrozenLinear if linear else FrozenEmbedding
            setattr(parent, name, kind(child.weight.detach(), getattr(child, "bias", None), adapter))


def _write_tiny(folder: Path, config: Any) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder
