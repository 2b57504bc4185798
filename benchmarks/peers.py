"""The peers: what people run instead of octavo, written as their documentation says, on the weights of shapes.py.

`build(way, model, ...)` gives a `Trainable`. The PEFT ways are transformers' model, PEFT's LoRA on every linear of the
blocks, and bitsandbytes' AdamW8bit, under bfloat16 autocast as Trainer(bf16=True) runs them. `article` is the recipe
around hivemind/gpt-j-6B-8bit on today's stack. What each way fixes is said in README.md beside this file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from shapes import ALPHA, LINEARS, RANK, lora, shapes, weight

CLIP = 1.0
LEARNING_RATE = 2e-4
ARTICLE_LEARNING_RATE = 1e-5
CODE_BLOCK = 4096  # weights that share one absolute maximum in the article's checkpoint
OUTLIER = 6.0  # LLM.int8() takes input columns over this in float16: transformers' default
# The fastest first on an H100 with heads of 256; what a card cannot do falls through to the next.
ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class Trainable(Protocol):
    """What is measured. `ids` are (batch, tokens); the loss is a scalar on the device, nothing waits for it."""

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained."""

    def step(self, ids: Tensor) -> Tensor:
        """Forward, backward, gradients clipped at norm 1, update; the loss before the update."""

    def gradients(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and every adapter's gradient of it, unclipped, by its name in PEFT's file. No update."""


@dataclass(frozen=True)
class Recipe:
    """A PEFT way. `strong`: attention by SDPA and embedding, head and norms left in bfloat16."""

    weights: str  # bf16, int8, nf4 or float32
    checkpointing: bool = True
    strong: bool = False
    autocast: bool = True


PEFT_WAYS = {
    "peft-bf16": Recipe("bf16"),
    "peft-bf16-nockpt": Recipe("bf16", checkpointing=False),
    "peft-int8": Recipe("int8"),
    "peft-nf4": Recipe("nf4"),
    "peft-bf16-sdpa": Recipe("bf16", strong=True),
    "peft-bf16-sdpa-nockpt": Recipe("bf16", strong=True, checkpointing=False),
    "peft-int8-sdpa": Recipe("int8", strong=True),
    "peft-nf4-sdpa": Recipe("nf4", strong=True),
    "reference": Recipe("float32", autocast=False),
}
ARTICLE = "article"
WAYS = (*PEFT_WAYS, ARTICLE)


def scheme_of(way: str) -> str:
    """How a peer holds its frozen weights."""
    return "dynamic8" if way == ARTICLE else PEFT_WAYS[way].weights


@dataclass
class Peer:
    """A model of transformers with its optimizer. `adapters`: PEFT's name -> (parameter, factor of its gradient)."""

    model: nn.Module
    optimizer: Any
    adapters: dict[str, tuple[nn.Parameter, float]]
    half: torch.dtype | None  # autocast's type
    device: torch.device

    def __post_init__(self) -> None:
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def trainable_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.trained)

    def step(self, ids: Tensor) -> Tensor:
        loss = self._backward(ids)
        nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def gradients(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self._backward(ids)
        found = {}
        for name, (parameter, factor) in self.adapters.items():
            assert parameter.grad is not None, f"{name} has no gradient"
            found[name] = (parameter.grad.float() * factor).cpu()
        self.optimizer.zero_grad()
        return loss, found

    def _backward(self, ids: Tensor) -> Tensor:
        with self._autocast():
            loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.half) if self.half else nullcontext()


def build(way: str, model_name: str, *, seed: int, device: torch.device | str, tiny: bool = False) -> Trainable:
    """A way of WAYS on random weights, ready for its first step."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a cast at every product
    device = torch.device(device)
    if way == ARTICLE:
        return _build_article(model_name, seed=seed, device=device, tiny=tiny)
    return _build_peft(PEFT_WAYS[way], model_name, seed=seed, device=device, tiny=tiny)


def _build_peft(recipe: Recipe, model_name: str, *, seed: int, device: torch.device, tiny: bool) -> Peer:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = frozen_model(recipe.weights, model_name, seed=seed, device=device, tiny=tiny)
    if recipe.strong and model_name == "gptj":
        _use_sdpa_(model)
    if recipe.weights in ("int8", "nf4"):
        model.is_loaded_in_8bit, model.is_loaded_in_4bit = recipe.weights == "int8", recipe.weights == "nf4"
    model.requires_grad_(False)
    if recipe.weights in ("int8", "nf4") and not recipe.strong:
        how = {"use_reentrant": False}  # as PEFT advises
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=how)
    elif recipe.checkpointing:
        model.gradient_checkpointing_enable()
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LINEARS[model_name]), task_type="CAUSAL_LM")
    tuned: Any = get_peft_model(model, config)
    tuned.train()
    adapters = {}
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            known = name.replace(".default", "")
            parameter.data.copy_(lora(known, tuple(parameter.shape), device, parameter.dtype, seed=seed))
            adapters[known] = (parameter, 1.0)
    half = torch.bfloat16 if recipe.autocast else None
    return Peer(tuned, _optimizer("AdamW8bit", adapters, LEARNING_RATE), adapters, half, device)


def frozen_model(weights: str, model_name: str, *, seed: int, device: torch.device, tiny: bool) -> Any:
    """transformers' model with the weights of `shapes`, held as bf16, int8, nf4 or float32."""
    dtype = torch.float32 if weights == "float32" else torch.bfloat16
    # GPT-J has no other attention in transformers; a Llama has SDPA unless it is the reference.
    exact = model_name == "gptj" or weights == "float32"
    model = _empty_model(model_name, tiny=tiny, dtype=dtype, attention="eager" if exact else "sdpa")
    make = {"int8": _int8_linear, "nf4": _nf4_linear}.get(weights, _plain_linear)
    for name, linear in _linears(model):
        # As transformers does it: the output head is not quantised.
        layer = (_plain_linear if name == "lm_head" else make)(linear, _values(name, linear, device, dtype, seed))
        model.set_submodule(name, layer)
    _fill_rest_(model, device, dtype, seed)
    return model


def _optimizer(kind: str, adapters: dict[str, tuple[nn.Parameter, float]], learning_rate: float) -> Any:
    import bitsandbytes

    make = getattr(bitsandbytes.optim, kind)
    return make([parameter for parameter, _ in adapters.values()], lr=learning_rate, weight_decay=0.0)


def _empty_model(model_name: str, *, tiny: bool, dtype: torch.dtype, attention: str) -> Any:
    """The model without memory: its parameters and buffers are on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = shapes(model_name, tiny=tiny)
    config = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.config.use_cache = False
    return model


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]


def _values(
    name: str, linear: nn.Linear, device: torch.device, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor | None]:
    matrix = weight(f"{name}.weight", tuple(linear.weight.shape), device, dtype, seed=seed)
    if linear.bias is None:
        return matrix, None
    return matrix, weight(f"{name}.bias", tuple(linear.bias.shape), device, dtype, seed=seed)


def _plain_linear(linear: nn.Linear, values: tuple[Tensor, Tensor | None]) -> nn.Module:
    return _with_values(linear, *values)


def _int8_linear(linear: nn.Linear, values: tuple[Tensor, Tensor | None]) -> nn.Module:
    from bitsandbytes.functional import int8_vectorwise_quant
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    matrix, bias = values
    layer = Linear8bitLt(
        linear.in_features, linear.out_features, bias is not None, has_fp16_weights=False, threshold=OUTLIER,
        device="meta",
    )  # fmt: skip
    codes, row_maxima, _ = int8_vectorwise_quant(matrix.half())
    _with_values(layer, None, bias)
    layer.weight = Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=row_maxima)
    return layer


def _nf4_linear(linear: nn.Linear, values: tuple[Tensor, Tensor | None]) -> nn.Module:
    """QLoRA's: blocks of 64, their scales quantised too, products in bfloat16."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    matrix, bias = values
    layer = Linear4bit(
        linear.in_features, linear.out_features, bias is not None, compute_dtype=torch.bfloat16,
        compress_statistics=True, quant_type="nf4", device="meta",
    )  # fmt: skip
    layer.support_avx512bf16_for_cpu = False  # on a CPU it would repack the codes for inference
    _with_values(layer, None, bias)
    frozen = Params4bit(matrix, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer)
    layer.weight = frozen.to(matrix.device)
    return layer


def _with_values(layer: Any, matrix: Tensor | None, bias: Tensor | None) -> nn.Module:
    if matrix is not None:
        layer.weight = nn.Parameter(matrix, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _fill_rest_(model: Any, device: torch.device, dtype: torch.dtype, seed: int) -> None:
    """Embedding, norms, and the tables of positions, which are in no checkpoint."""
    from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions

    for name, module in list(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = weight(f"{name}.{key}", tuple(parameter.shape), device, dtype, seed=seed)
                setattr(module, key, nn.Parameter(values, requires_grad=False))
        if hasattr(module, "embed_positions"):
            table = create_sinusoidal_positions(module.max_positions, module.pos_embd_dim)
            module.embed_positions = table.to(device)
        if hasattr(module, "inv_freq"):
            model.set_submodule(name, type(module)(module.config).to(device))
    left = [name for name, tensor in _tensors(model) if tensor.is_meta]
    assert not left, f"no values for {left}"


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _use_sdpa_(model: nn.Module) -> None:
    """PyTorch's fused attention in every GPT-J block, in place of float32 scores in full."""
    from transformers.models.gptj.modeling_gptj import GPTJAttention

    for module in model.modules():
        if isinstance(module, GPTJAttention):
            module._attn = MethodType(_fused_attention, module)


def _fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, None]:
    """Causal attention of (batch, heads, tokens, size); scale 1/sqrt(size) as GPT-J has it, rows without padding."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    with sdpa_kernel(ATTENTION, set_priority=True):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True), None


class DynamicCodes(nn.Module):
    """A matrix in bitsandbytes' dynamic 8-bit codes, in blocks of 4096, that is float32 again whenever it is used."""

    def __init__(self, matrix: Tensor) -> None:
        from bitsandbytes.functional import quantize_blockwise

        super().__init__()
        codes, state = quantize_blockwise(matrix, blocksize=CODE_BLOCK)
        self.codes, self.maxima, self.table = (nn.Buffer(t) for t in (codes, state.absmax, state.code))

    def forward(self) -> Tensor:
        from bitsandbytes.functional import dequantize_blockwise

        matrix: Tensor = dequantize_blockwise(self.codes, absmax=self.maxima, code=self.table, blocksize=CODE_BLOCK)
        return matrix


class UnpackedProduct(torch.autograd.Function):
    """x W^T + b; the matrix is unpacked in forward and once more in backward, so that it is never kept."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")
    def forward(ctx: Any, x: Tensor, codes: DynamicCodes, bias: Tensor | None) -> Tensor:
        ctx.codes, ctx.type, ctx.has_bias = codes, x.dtype, bias is not None
        return F.linear(x, codes(), bias)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor | None]:
        to_bias = gradient.flatten(0, -2).sum(0, dtype=torch.float32) if ctx.has_bias else None
        matrix = ctx.codes().to(gradient.dtype)
        return (gradient @ matrix).to(ctx.type), None, to_bias


class DynamicLinear(nn.Module):
    """The article's linear: frozen codes, a trained bias, and an adapter whose output is added to a new tensor."""

    def __init__(self, matrix: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        rows, columns = matrix.shape
        self.codes = DynamicCodes(matrix)
        self.bias = nn.Parameter(bias) if bias is not None else None
        self.adapter = _pair(columns, rows, matrix.device)

    def forward(self, x: Tensor) -> Tensor:
        # The original's `output += ...` fails today: the output of a custom function may not be changed.
        output: Tensor = UnpackedProduct.apply(x, self.codes, self.bias)
        return output + self.adapter(x)


class DynamicEmbedding(nn.Module):
    """The article's embedding: the whole table is unpacked for each look-up, and has an adapter."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        rows, columns = matrix.shape
        self.codes = DynamicCodes(matrix)
        first = nn.Embedding(rows, RANK, device=matrix.device)
        self.adapter = nn.Sequential(first, nn.Linear(RANK, columns, bias=False, device=matrix.device))

    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            output = F.embedding(ids, self.codes())
        return output + self.adapter(ids)


def _pair(columns: int, rows: int, device: torch.device) -> nn.Sequential:
    first = nn.Linear(columns, RANK, bias=False, device=device)
    return nn.Sequential(first, nn.Linear(RANK, rows, bias=False, device=device))


def _build_article(model_name: str, *, seed: int, device: torch.device, tiny: bool) -> Peer:
    """Adapters on every linear, the head and the embedding; norms and biases trained too; float16 without a scaler.

    Pairs add A1(A0(x)) without alpha / r, so A1 of a block's linear starts at that multiple of the others' B. The
    head's and the embedding's start at zero, so that the first loss is of the same function as everybody's.
    """
    model = _empty_model(model_name, tiny=tiny, dtype=torch.float32, attention="eager")
    adapters: dict[str, tuple[nn.Parameter, float]] = {}
    for name, module in list(model.named_modules()):
        layer: Any
        if type(module) is nn.Linear:
            layer = DynamicLinear(*_values(name, module, device, torch.float32, seed))
        elif type(module) is nn.Embedding:
            shape = tuple(module.weight.shape)
            layer = DynamicEmbedding(weight(f"{name}.weight", shape, device, torch.float32, seed=seed))
        else:
            continue
        model.set_submodule(name, layer)
        in_block = name.rpartition(".")[2] in LINEARS[model_name]
        for key, half, factor in (("lora_A", layer.adapter[0], 1.0), ("lora_B", layer.adapter[1], ALPHA / RANK)):
            known = f"base_model.model.{name}.{key}.weight"
            drawn = lora(known, tuple(half.weight.shape), device, torch.float32, seed=seed)
            half.weight.data.copy_(drawn * factor if in_block or key == "lora_A" else torch.zeros_like(drawn))
            if in_block:
                adapters[known] = (half.weight, factor)
    _fill_rest_(model, device, torch.float32, seed)
    for parameter in model.parameters():  # norms, biases and adapters: all else is a buffer of codes
        parameter.requires_grad_(True)
    model.gradient_checkpointing_enable()
    model.train()
    trained = {str(number): (parameter, 1.0) for number, parameter in enumerate(model.parameters())}
    return Peer(model, _optimizer("Adam8bit", trained, ARTICLE_LEARNING_RATE), adapters, torch.float16, device)
