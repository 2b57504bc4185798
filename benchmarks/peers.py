"""The peers of octavo, set up as their documentation recommends, on the weights of shapes.py.

`build(method, model, ...)` returns a `Trainable`. The PEFT methods use transformers' model, PEFT's LoRA on every linear
of the blocks and bitsandbytes' AdamW8bit, under bfloat16 autocast as Trainer(bf16=True). `article` is the recipe around
hivemind/gpt-j-6B-8bit on today's libraries. benchmarks/README.md describes the methods.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from shapes import ALPHA, LINEARS, RANK, lora, shapes, weight

MAX_GRAD_NORM = 1.0
FLOAT16_LOSS_SCALE = 1024.0  # constant: gradients of random weights need no other
LEARNING_RATE = 2e-4
ARTICLE_LEARNING_RATE = 1e-5
BLOCK_SIZE = 4096  # weights with one absolute maximum in the article's checkpoint
OUTLIER_THRESHOLD = 6.0  # LLM.int8() multiplies larger input channels in float16; transformers' default
# In order of speed on an H100 with head dimension 256; PyTorch uses the first that the GPU supports.
ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class Trainable(Protocol):
    """A model to measure. ids: (B, T); the loss is a scalar on the device, without synchronization."""

    @property
    def trainable_parameters(self) -> int:
        """Number of trained parameters."""

    def step(self, ids: Tensor) -> Tensor:
        """Forward, backward, gradient clipping at norm 1, update. Returns the loss before the update."""

    def gradients(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, unclipped gradient of every adapter by its name in PEFT's file), without an update."""


@dataclass(frozen=True)
class Recipe:
    """A PEFT method. `strong`: SDPA attention; embedding, head and norms stay in bfloat16."""

    weights: str  # bf16, int8, nf4 or float32
    checkpointing: bool = True
    strong: bool = False
    autocast: bool = True
    rounded: str | None = None  # the scheme of octavo through which float32 weights are quantized and dequantized


PEFT_METHODS = {
    "peft-bf16": Recipe("bf16"),
    "peft-bf16-nockpt": Recipe("bf16", checkpointing=False),
    "peft-int8": Recipe("int8"),
    "peft-nf4": Recipe("nf4"),
    "peft-bf16-sdpa": Recipe("bf16", strong=True),
    "peft-bf16-sdpa-nockpt": Recipe("bf16", strong=True, checkpointing=False),
    "peft-int8-sdpa": Recipe("int8", strong=True),
    "peft-nf4-sdpa": Recipe("nf4", strong=True),
    "reference": Recipe("float32", autocast=False),
    "reference-int8": Recipe("float32", autocast=False, rounded="int8"),
    "reference-nf4": Recipe("float32", autocast=False, rounded="nf4"),
    "reference-nf4-double": Recipe("float32", autocast=False, rounded="nf4-double"),
}
ARTICLE = "article"
METHODS = (*PEFT_METHODS, ARTICLE)


def scheme_of(method: str) -> str:
    """The scheme of a peer's frozen weights."""
    return "dynamic8" if method == ARTICLE else PEFT_METHODS[method].weights


@dataclass
class Peer:
    """A transformers model and its optimizer. `adapters`: PEFT's name -> (parameter, scale of its gradient)."""

    model: nn.Module
    optimizer: Any
    adapters: dict[str, tuple[nn.Parameter, float]]
    autocast_dtype: torch.dtype | None
    device: torch.device

    def __post_init__(self) -> None:
        self.loss_scale = FLOAT16_LOSS_SCALE if self.autocast_dtype == torch.float16 else 1.0
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def trainable_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.trained)

    def step(self, ids: Tensor) -> Tensor:
        loss = self._backward(ids)
        if self.loss_scale != 1:
            torch._foreach_div_([p.grad for p in self.trained if p.grad is not None], self.loss_scale)
        nn.utils.clip_grad_norm_(self.trained, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def gradients(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self._backward(ids)
        gradients = {}
        for name, (parameter, factor) in self.adapters.items():
            assert parameter.grad is not None, f"{name} has no gradient"
            gradients[name] = (parameter.grad.float() * (factor / self.loss_scale)).cpu()
        self.optimizer.zero_grad()
        return loss, gradients

    def _backward(self, ids: Tensor) -> Tensor:
        with self._autocast():
            loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        (loss * self.loss_scale).backward()
        return loss.detach()

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.autocast_dtype) if self.autocast_dtype else nullcontext()


def build(
    method: str,
    model_name: str,
    *,
    seed: int,
    device: torch.device | str,
    tiny: bool = False,
    half: torch.dtype = torch.bfloat16,
) -> Trainable:
    """A method of METHODS on random weights, ready for its first step. `half`: the type of 16 bits of PEFT methods."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a cast in every matmul
    device = torch.device(device)
    if method == ARTICLE:
        return _build_article(model_name, seed=seed, device=device, tiny=tiny)
    return _build_peft(PEFT_METHODS[method], model_name, seed=seed, device=device, tiny=tiny, half=half)


def _build_peft(
    recipe: Recipe, model_name: str, *, seed: int, device: torch.device, tiny: bool, half: torch.dtype
) -> Peer:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    dtype = torch.float32 if recipe.weights == "float32" else half
    model = frozen_model(recipe.weights, model_name, seed=seed, device=device, tiny=tiny, dtype=dtype)
    if recipe.rounded:
        _round_(model, recipe.rounded)
    if recipe.strong and model_name == "gptj":
        _use_sdpa_(model)
    if recipe.weights in ("int8", "nf4"):
        model.is_loaded_in_8bit, model.is_loaded_in_4bit = recipe.weights == "int8", recipe.weights == "nf4"
    model.requires_grad_(False)
    if recipe.weights in ("int8", "nf4") and not recipe.strong:
        checkpointing = {"use_reentrant": False}  # as PEFT recommends
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=checkpointing)
    elif recipe.checkpointing:
        model.gradient_checkpointing_enable()
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LINEARS[model_name]), task_type="CAUSAL_LM")
    tuned: Any = get_peft_model(model, config)
    tuned.train()
    adapters = {}
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            peft_name = name.replace(".default", "")
            parameter.data.copy_(lora(peft_name, tuple(parameter.shape), device, parameter.dtype, seed=seed))
            adapters[peft_name] = (parameter, 1.0)
    autocast_dtype = half if recipe.autocast else None
    return Peer(tuned, _optimizer("AdamW8bit", adapters, LEARNING_RATE), adapters, autocast_dtype, device)


def frozen_model(
    weights: str, model_name: str, *, seed: int, device: torch.device, tiny: bool, dtype: torch.dtype
) -> Any:
    """transformers' model with the weights of `shapes`, stored as bf16, int8, nf4 or float32; `dtype`: of the rest."""
    # GPT-J has only eager attention in transformers; Llama uses SDPA, except in the reference.
    eager = model_name == "gptj" or weights == "float32"
    model = _empty_model(model_name, tiny=tiny, dtype=dtype, attention="eager" if eager else "sdpa")
    make: Callable[[nn.Linear, tuple[Tensor, Tensor | None]], nn.Module]
    make = {"int8": _int8_linear, "nf4": _nf4_linear}.get(weights, _plain_linear)
    for name, linear in _linears(model):
        # transformers does not quantize the output head.
        layer = (_plain_linear if name == "lm_head" else make)(linear, _values(name, linear, device, dtype, seed))
        model.set_submodule(name, layer)
    _fill_rest_(model, device, dtype, seed)
    return model


def _round_(model: Any, name: str) -> None:
    """Replaces every matrix by its values after quantization under a scheme of octavo."""
    from octavo.ops.quantize import dequantize, scheme_named

    inside, ends = scheme_named(name), scheme_named(scheme_named(name).embedding_scheme)
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            scheme = ends if isinstance(module, nn.Embedding) or key == "lm_head" else inside
            matrix = module.weight.data
            matrix.copy_(dequantize(scheme, scheme.quantize(matrix), (matrix.shape[0], matrix.shape[1])))


def _optimizer(kind: str, adapters: dict[str, tuple[nn.Parameter, float]], learning_rate: float) -> Any:
    import bitsandbytes

    make = getattr(bitsandbytes.optim, kind)
    return make([parameter for parameter, _ in adapters.values()], lr=learning_rate, weight_decay=0.0)


def _empty_model(model_name: str, *, tiny: bool, dtype: torch.dtype, attention: str) -> Any:
    """The model with parameters and buffers on the meta device."""
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
    bias = linear._parameters["bias"]
    if bias is None:
        return matrix, None
    return matrix, weight(f"{name}.bias", tuple(bias.shape), device, dtype, seed=seed)


def _plain_linear(linear: nn.Linear, values: tuple[Tensor, Tensor | None]) -> nn.Module:
    return _with_values(linear, *values)


def _int8_linear(linear: nn.Linear, values: tuple[Tensor, Tensor | None]) -> nn.Module:
    from bitsandbytes.functional import int8_vectorwise_quant
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    matrix, bias = values
    layer: nn.Module = Linear8bitLt(
        linear.in_features, linear.out_features, bias is not None, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD,
        device="meta",
    )  # fmt: skip
    quantized, row_maxima, _ = int8_vectorwise_quant(matrix.half())  # (N, K), (N,)
    _with_values(layer, None, bias)
    layer.weight = Int8Params(quantized, requires_grad=False, has_fp16_weights=False, CB=quantized, SCB=row_maxima)
    return layer


def _nf4_linear(linear: nn.Linear, values: tuple[Tensor, Tensor | None]) -> nn.Module:
    """QLoRA: blocks of 64, double quantization, matmuls in bfloat16."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    matrix, bias = values
    layer: Any = Linear4bit(
        linear.in_features, linear.out_features, bias is not None, compute_dtype=matrix.dtype,
        compress_statistics=True, quant_type="nf4", device="meta",
    )  # fmt: skip
    layer.support_avx512bf16_for_cpu = False  # prevents repacking of the weights for inference on a CPU
    frozen = Params4bit(matrix, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer)
    layer.weight = frozen.to(matrix.device)
    return _with_values(layer, None, bias)


def _with_values(layer: nn.Module, matrix: Tensor | None, bias: Tensor | None) -> nn.Module:
    if matrix is not None:
        layer.weight = nn.Parameter(matrix, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _fill_rest_(model: Any, device: torch.device, dtype: torch.dtype, seed: int) -> None:
    """Sets embedding and norms, and computes the rotary tables, which checkpoints do not have."""
    from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions

    for name, module in list(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = weight(f"{name}.{key}", tuple(parameter.shape), device, dtype, seed=seed)
                setattr(module, key, nn.Parameter(values, requires_grad=False))
        if hasattr(module, "embed_positions"):
            rotary = create_sinusoidal_positions(module.max_positions, module.pos_embd_dim)
            module.embed_positions = rotary.to(device)
        if hasattr(module, "inv_freq"):
            model.set_submodule(name, type(module)(module.config).to(device))
    missing = [name for name, tensor in _tensors(model) if tensor.is_meta]
    assert not missing, f"no values for {missing}"


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _use_sdpa_(model: nn.Module) -> None:
    """Replaces eager attention with float32 scores by PyTorch's fused attention in every GPT-J block."""
    from transformers.models.gptj.modeling_gptj import GPTJAttention

    for module in model.modules():
        if isinstance(module, GPTJAttention):
            module._attn = MethodType(_fused_attention, module)


def _fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, None]:
    """Causal attention of (B, H, T, D) with scale 1/sqrt(D), as GPT-J; rows have no padding."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    with sdpa_kernel(ATTENTION, set_priority=True):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True), None


class Dynamic8Matrix(nn.Module):
    """A matrix in bitsandbytes' dynamic 8-bit type with blocks of 4096; every use dequantizes it to float32."""

    def __init__(self, matrix: Tensor) -> None:
        from bitsandbytes.functional import quantize_blockwise

        super().__init__()
        quantized, state = quantize_blockwise(matrix, blocksize=BLOCK_SIZE)
        self.quantized, self.absmax, self.code = (nn.Buffer(t) for t in (quantized, state.absmax, state.code))

    def forward(self) -> Tensor:
        from bitsandbytes.functional import dequantize_blockwise

        matrix: Tensor = dequantize_blockwise(self.quantized, absmax=self.absmax, code=self.code, blocksize=BLOCK_SIZE)
        return matrix


class DequantizedMatmul(torch.autograd.Function):
    """x W^T + b; forward and backward both dequantize W, which is not saved between them."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")  # type: ignore[untyped-decorator]
    def forward(ctx: Any, x: Tensor, matrix: Dynamic8Matrix, bias: Tensor | None) -> Tensor:
        ctx.matrix, ctx.dtype, ctx.has_bias = matrix, x.dtype, bias is not None
        return F.linear(x, matrix(), bias)  # (B, T, N)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor | None]:
        grad_bias = gradient.flatten(0, -2).sum(0, dtype=torch.float32) if ctx.has_bias else None  # (N,)
        matrix = ctx.matrix().to(gradient.dtype)  # (N, K)
        return (gradient @ matrix).to(ctx.dtype), None, grad_bias


class DynamicLinear(nn.Module):
    """The article's linear: a frozen 8-bit matrix, a trained bias and an adapter."""

    def __init__(self, matrix: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        rows, columns = matrix.shape
        self.matrix = Dynamic8Matrix(matrix)
        self.bias = nn.Parameter(bias) if bias is not None else None
        self.adapter = _lora(columns, rows, matrix.device)

    def forward(self, x: Tensor) -> Tensor:
        # The original `output += ...` fails today: PyTorch forbids in-place changes of a custom function's output.
        output: Tensor = DequantizedMatmul.apply(x, self.matrix, self.bias)  # type: ignore[no-untyped-call]
        adapter: Tensor = self.adapter(x)
        return output + adapter


class DynamicEmbedding(nn.Module):
    """The article's embedding: every look-up dequantizes the entire matrix; it has an adapter."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        rows, columns = matrix.shape
        self.matrix = Dynamic8Matrix(matrix)
        first = nn.Embedding(rows, RANK, device=matrix.device)
        self.adapter = nn.Sequential(first, nn.Linear(RANK, columns, bias=False, device=matrix.device))

    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            output = F.embedding(ids, self.matrix())  # (B, T, K)
        adapter: Tensor = self.adapter(ids)
        return output + adapter


def _lora(columns: int, rows: int, device: torch.device) -> nn.Sequential:
    first = nn.Linear(columns, RANK, bias=False, device=device)
    return nn.Sequential(first, nn.Linear(RANK, rows, bias=False, device=device))


def _build_article(model_name: str, *, seed: int, device: torch.device, tiny: bool) -> Peer:
    """Adapters on every linear, the head and the embedding; norms and biases trained too; float16 without a scaler.

    The recipe computes B A x without the scale alpha / r, so B of the blocks' linears starts at alpha / r times the B
    of the other methods. B of head and embedding starts at zero, so that the first loss is of the same function.
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
        for key, linear, factor in (("lora_A", layer.adapter[0], 1.0), ("lora_B", layer.adapter[1], ALPHA / RANK)):
            peft_name = f"base_model.model.{name}.{key}.weight"
            values = lora(peft_name, tuple(linear.weight.shape), device, torch.float32, seed=seed)
            linear.weight.data.copy_(values * factor if in_block or key == "lora_A" else torch.zeros_like(values))
            if in_block:
                adapters[peft_name] = (linear.weight, factor)
    _fill_rest_(model, device, torch.float32, seed)
    for parameter in model.parameters():  # norms, biases and adapters; quantized matrices are buffers
        parameter.requires_grad_(True)
    model.gradient_checkpointing_enable()
    model.train()
    trained = {str(number): (parameter, 1.0) for number, parameter in enumerate(model.parameters())}
    return Peer(model, _optimizer("Adam8bit", trained, ARTICLE_LEARNING_RATE), adapters, torch.float16, device)
