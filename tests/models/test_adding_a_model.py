"""docs/adding-a-model.md, executed: the family of its code blocks against an independent implementation.

Legend: B sequences of a batch, T positions, H query heads, G key/value heads, D the size of a head.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import peft
import pytest
import torch
from tests.conftest import Octavo, _write_tiny
from tests.models import test_parity as parity
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from octavo.adapters import apply_, save
from octavo.errors import ModelError
from octavo.layers.context import Save
from octavo.models import FAMILIES, Decoder, build
from octavo.ops.quantize import scheme_named
from octavo.store.peft import read
from octavo.store.sources import FolderSource
from octavo.store.weights import load

DOCUMENT = Path(__file__).parents[2] / "docs" / "adding-a-model.md"
SHAPE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


class MarlinConfig(PreTrainedConfig):  # type: ignore[misc]
    model_type = "marlin"
    hidden_act: str = "relu2"
    norm_eps: float = 1e-5
    eos_token_id: int = 2


class ReferenceNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + self.eps).sqrt() * (1.0 + self.weight)


class ReferenceAttention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.size = config.hidden_size // self.heads
        self.wq = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.groups * self.size, bias=False)
        self.wv = nn.Linear(config.hidden_size, self.groups * self.size, bias=False)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, positions: Tensor, *, rotary: bool) -> Tensor:
        batch, length, width = x.shape
        heads = self.heads, self.groups, self.groups
        q, k, v = (
            linear(x).view(batch, length, n, self.size)
            for linear, n in zip((self.wq, self.wk, self.wv), heads, strict=True)
        )
        if rotary:
            q, k = self.turned(q, positions), self.turned(k, positions)
        answers = []
        for head in range(self.heads):  # each query head with its key head
            group = head // (self.heads // self.groups)
            scores = q[:, :, head] @ k[:, :, group].transpose(1, 2) / self.size**0.5
            hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
            answers.append(scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ v[:, :, group])
        mixed: Tensor = self.wo(torch.stack(answers, dim=2).view(batch, length, width))
        return mixed

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """Pair i of the first half of each head, as a complex number, times exp(1j * position * 2^-i)."""
        half = self.size // 2
        angles = positions[:, :, None, None].float() * 2.0 ** -torch.arange(half // 2).float()
        pairs = torch.view_as_complex(x[..., :half].unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
        return torch.cat((turned, x[..., half:]), dim=-1)


class ReferenceMlp(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)
        y: Tensor = self.down(both[..., 0::2].clamp_min(0.0).pow(2) * both[..., 1::2])
        return y


class ReferenceLayer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        norms = (ReferenceNorm(config.hidden_size, config.norm_eps) for _ in range(4))
        self.norm_1, self.norm_2, self.norm_3, self.norm_4 = norms
        self.attention, self.mlp = ReferenceAttention(config), ReferenceMlp(config)

    def forward(self, x: Tensor, positions: Tensor, *, rotary: bool) -> Tensor:
        x = x + self.norm_2(self.attention(self.norm_1(x), positions, rotary=rotary))
        y: Tensor = x + self.norm_4(self.mlp(self.norm_3(x)))
        return y


class MarlinForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Marlin in plain PyTorch, without any of octavo's code."""

    config_class = MarlinConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {"output.weight": "tok_embeddings.weight"}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ReferenceLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = ReferenceNorm(config.hidden_size, config.norm_eps)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            nn.init.normal_(parameter, std=0.1 if name == "weight" else 0.0)

    def get_input_embeddings(self) -> nn.Module:
        return self.tok_embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **_: Any) -> CausalLMOutput:
        positions = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        x = self.tok_embeddings(input_ids)
        for number, layer in enumerate(self.layers):
            x = layer(x, positions, rotary=number % 2 == 0)
        return CausalLMOutput(logits=self.output(self.norm(x)))


def plain_model(folder: Path) -> Decoder:
    """octavo's model of a folder, unquantized in float32."""
    return load(FolderSource(folder), scheme_named("none"), dtype=torch.float32, device=torch.device("cpu"))


def blocks(document: str) -> dict[str, str]:
    """The code of the document by the file that its first line names; parts of one file in order."""
    files: dict[str, str] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", document, re.MULTILINE | re.DOTALL):
        first, _, code = block.partition("\n")
        name = first.removeprefix("# ")
        files[name] = files.get(name, "") + code
    return files


FILES = blocks(DOCUMENT.read_text("utf-8"))
NAMES = {**vars(parity), "MarlinConfig": MarlinConfig}
CASES: dict[str, Any] = eval("{" + FILES["tests/models/families.py, in CASES"] + "}", NAMES)
AutoConfig.register("marlin", MarlinConfig, exist_ok=True)
AutoModelForCausalLM.register(MarlinConfig, MarlinForCausalLM, exist_ok=True)


@pytest.fixture(scope="module", autouse=True)
def marlin() -> Iterator[ModuleType]:
    """The module of the document, registered as its line says."""
    module = ModuleType("octavo.models.marlin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        exec(compile(FILES["src/octavo/models/marlin.py"], str(DOCUMENT), "exec"), vars(module))  # noqa: S102
        line = FILES["src/octavo/models/__init__.py, in FAMILIES"]
        for architecture, entry in eval("{" + line + "}", {"marlin": module}).items():
            patch.setitem(FAMILIES, architecture, entry)
        yield module


@pytest.fixture(scope="module", params=CASES)
def both(request: pytest.FixtureRequest, marlin: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> parity.Models:
    """A random reference whose weights are wide enough for a difference to show, and octavo's model of its folder."""
    torch.manual_seed(0)
    theirs = MarlinForCausalLM(CASES[request.param]).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.12)
    folder = tmp_path_factory.mktemp("marlin")
    theirs.save_pretrained(folder)
    return parity.Models(theirs, plain_model(folder))


@pytest.fixture(scope="module")
def folder(marlin: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Marlin with a tokenizer."""
    return _write_tiny(tmp_path_factory.mktemp("models") / "marlin", MarlinConfig(**SHAPE))


def test_logits_are_those_of_the_reference(both: parity.Models) -> None:
    parity.test_logits_are_transformers(both)
    parity.test_logits_far_from_the_start_are_transformers(both)


def test_packed_documents_and_a_cache_give_the_logits_of_the_reference(both: parity.Models) -> None:
    parity.test_packed_documents_are_what_transformers_makes_of_each_alone(both)
    parity.test_a_cache_filled_in_chunks_gives_the_same_logits(both)


def test_gradients_of_every_adapter_and_norm_are_those_of_the_reference(both: parity.Models) -> None:
    parity.test_gradients_are_those_of_transformers_and_peft(both)
    for level in Save:
        parity.test_plain_blocks_have_the_output_and_the_gradients_of_the_model(both, level)


def test_what_the_family_does_not_compute_is_refused() -> None:
    config = MarlinConfig(**SHAPE).to_dict() | {"architectures": ["MarlinForCausalLM"]}
    with pytest.raises(ModelError, match="asks for the activation 'gelu'"):
        build(config | {"hidden_act": "gelu"})
    with pytest.raises(ModelError, match="4 heads with 3 key heads"):
        build(config | {"num_key_value_heads": 3})


@torch.no_grad()
def test_it_generates_what_the_reference_generates(folder: Path, octavo: Octavo) -> None:
    greedy = "--temperature", 0, "--max-new-tokens", 12, "--scheme", "none", "--dtype", "float32"
    done = octavo("generate", "--model", folder, "--prompt", "the king spoke to", *greedy, "--json")
    assert done.code == 0, done.err
    reference = AutoModelForCausalLM.from_pretrained(folder)
    ids = FolderSource(folder).tokenizer()("the king spoke to")["input_ids"]
    new: list[int] = []
    while len(new) < 12 and reference.config.eos_token_id not in new:
        new.append(int(reference(torch.tensor([ids + new])).logits[0, -1].argmax()))
    assert done.json["token_ids"] == new
    assert len(set(new)) > 2


@pytest.fixture(scope="module")
def adapter(folder: Path, plays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a run on packed documents over int8 weights, whose loss fell."""
    from octavo.commands.finetune import finetune
    from octavo.config import Config, commands

    out = tmp_path_factory.mktemp("runs") / "marlin"
    settings = {
        "model": str(folder), "data": [str(plays / "train")], "test_data": [str(plays / "test")], "out": str(out),
        "split_on": "lines", "scheme": "int8", "matmul": "8bit", "dtype": "float32", "seq_len": 32, "steps": 16,
        "lr": 0.03, "rank": 2, "train_norms": True,
    }  # fmt: skip
    finetune(Config.read(commands.FINETUNE, settings), console=False)
    events = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert losses[0] - losses[-1] > 0.1
    return out / "adapter"


@torch.no_grad()
def test_an_adapter_of_a_run_gives_the_same_logits_in_peft(adapter: Path, folder: Path, tmp_path: Path) -> None:
    ids = parity.some_ids()
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    untuned = reference(ids).logits
    theirs = peft.PeftModel.from_pretrained(reference, adapter)(ids).logits
    assert (theirs - untuned).abs().max() > 0.1
    model = plain_model(folder)
    plan = apply_(model, read(adapter))
    torch.testing.assert_close(model(ids), theirs, rtol=0, atol=1e-4)
    save(tmp_path / "again", model, plan, base=str(folder), origin={}, readme="")
    before, after = read(adapter), read(tmp_path / "again")
    assert before.lora.keys() == after.lora.keys()
    assert before.full.keys() == after.full.keys()
    assert len(before.full) == 13  # four norms in each of three layers, and the last one
    for name, (a, b, scaling) in before.lora.items():
        assert torch.equal(a, after.lora[name][0]), name
        assert torch.equal(b, after.lora[name][1]), name
        assert scaling == after.lora[name][2], name
