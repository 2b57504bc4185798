"""What all tests share: an offline, quiet, one-threaded process, tiny random models, and the command `octavo`.

The environment is set before anything heavy is imported. Tests run on tensors so small that a second thread
only costs; OMP_NUM_THREADS from outside wins.
"""

from __future__ import annotations

import io
import json
import logging
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="error",
    TRITON_INTERPRET="1",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a cast at every call in bfloat16

if TYPE_CHECKING:
    from octavo.models import Model

Twins = Callable[[Any], "tuple[Any, Model]"]

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


@pytest.fixture(scope="session")
def twins_of(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """transformers config -> (a random model of transformers, octavo's reading of the folder it saves).

    Float32, unquantised. Weights are wide (0.2; norms 1 +- 0.2, so that attention is far from uniform), to
    make any difference show.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from octavo.ops.quantize import scheme_named
    from octavo.store.sources import FolderSource
    from octavo.store.weights import load

    def make(config: Any) -> tuple[Any, Model]:
        torch.manual_seed(0)
        theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, parameter in theirs.named_parameters():
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            torch.nn.init.normal_(parameter, mean=float(is_norm), std=0.2)
        folder = tmp_path_factory.mktemp("twins")
        theirs.save_pretrained(folder)
        source = FolderSource(folder)
        return theirs, load(source, scheme_named("none"), dtype=torch.float32, device=torch.device("cpu"))

    return make


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
