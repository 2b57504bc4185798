"""Every family against transformers and PEFT, on tiny random models: logits, gradients, packing, cache.

Where octavo would not give the same numbers it refuses the config; that is tested here too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import peft
import pytest
import torch
import torch.nn.functional as F
from tests.models.families import CASES, LENGTH, VOCABULARY, like_gptj, like_llama
from torch import Tensor, nn
from transformers import GPTJConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from octavo.data.packing import IGNORE_INDEX
from octavo.errors import ModelError
from octavo.fused.loss import cross_entropy_sum
from octavo.layers.context import ForwardOptions, Save
from octavo.layers.dropout import Dropout
from octavo.layers.frozen import FrozenEmbedding, FrozenLinear, Lora
from octavo.layers.fused_linear import FusedLinear
from octavo.layers.lora import put_
from octavo.models import Decoder, WeightEntry, build, weight_entries
from octavo.models.config_fields import ConfigFields
from octavo.models.rotary import rotary_of
from octavo.ops.attention import find_documents

# PEFT warns where an adapter is on linears of both kinds, and does the right thing.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target module:UserWarning")

TOLERANCE = 1e-5  # of logits, absolute; of a gradient, the difference's norm over its own


class Models(NamedTuple):
    theirs: Any
    ours: Decoder


# The first case of each model type is in `make test`.
FIRST = {config.model_type: case for case, config in reversed(CASES.items())}.values()
PARAMS = [case if case in FIRST else pytest.param(case, marks=pytest.mark.exhaustive) for case in CASES]


@pytest.fixture(scope="module", params=PARAMS)
def kernels(request: pytest.FixtureRequest, models_of: Callable[[Any], tuple[Any, Decoder]]) -> Models:
    return Models(*models_of(CASES[request.param]))


def some_ids(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.cell("logits")
@torch.no_grad()
def test_logits_are_transformers(kernels: Models) -> None:
    ids = some_ids()
    expected = kernels.theirs(ids).logits
    assert expected.std() > 0.5  # large enough for a difference to show
    torch.testing.assert_close(kernels.ours(ids), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.cell("logits")
@torch.no_grad()
def test_logits_far_from_the_start_are_transformers(kernels: Models) -> None:
    # Angles are near 2000 there, so that a frequency that is off by one unit in the last place shows.
    ids, positions = some_ids(rows=1), torch.arange(2000, 2000 + LENGTH)[None]
    expected = kernels.theirs(ids, position_ids=positions).logits
    torch.testing.assert_close(kernels.ours(ids, positions=positions), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.cell("packed")
@torch.no_grad()
def test_packed_documents_are_what_transformers_makes_of_each_alone(kernels: Models) -> None:
    lengths, padding = [9, 1, 14, 6], 3
    ids = some_ids(rows=1, length=sum(lengths) + padding)
    document = torch.tensor([[i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * padding])
    positions = torch.cat([torch.arange(n) for n in (*lengths, padding)])[None]
    documents = find_documents(document, ids.device)
    assert documents is not None
    packed = kernels.ours(ids, positions=positions, documents=documents)
    for number in range(len(lengths)):
        alone = kernels.theirs(ids[document == number][None]).logits
        torch.testing.assert_close(packed[document == number][None], alone, rtol=0, atol=TOLERANCE)


@pytest.mark.cell("cache")
@torch.no_grad()
def test_a_cache_filled_in_chunks_gives_the_same_logits(kernels: Models) -> None:
    ids, model = some_ids(), kernels.ours
    cache = model.new_cache(batch=2, max_len=LENGTH)
    chunks = torch.split(ids, [17, 1, 13, *[1] * (LENGTH - 31)], dim=1)
    logits = torch.cat([model(chunk, cache=cache) for chunk in chunks], dim=1)
    assert cache.length == LENGTH
    torch.testing.assert_close(logits, kernels.theirs(ids).logits, rtol=0, atol=TOLERANCE)


def tuned(kernels: Models) -> Models:
    """Copies of both with the same random LoRA on every matrix that may have one, all of it trained.

    A tied embedding has none: PEFT warns of LoRA on one.
    """
    table = weight_entries(kernels.ours)
    named = {p.key for p in table.values() if p.matrix is not None}
    if kernels.ours.config.tied:
        named -= {kernels.ours.config.embedding, kernels.ours.config.head}
    torch.manual_seed(2)
    targets = sorted({p.module.rpartition(".")[2] for p in table.values() if p.key in named})
    left_out = ".*vision_tower.*" if kernels.ours.config.text_prefix else None
    spec = peft.LoraConfig(r=3, lora_alpha=4, target_modules=targets, init_lora_weights=False, exclude_modules=left_out)
    spec.fan_in_fan_out = any(place.transposed for place in table.values())
    theirs = peft.get_peft_model(copy.deepcopy(kernels.theirs), spec).eval()
    ours = copy.deepcopy(kernels.ours)
    for place in weight_entries(ours).values():
        module = theirs.base_model.model.get_submodule(place.module)
        if place.key in named:
            assert isinstance(place.layer, FrozenLinear | FrozenEmbedding)
            a, b = (factor.detach().clone() for factor in factors(module))
            b = b if place.order is None else place.order.from_checkpoint(b)
            put_(place.layer, place.rows_key, Lora(a, b, 4 / 3), dropout=0.0)
        elif place.matrix is None:
            module.requires_grad_()
            place.layer.requires_grad_()
        if (bias := biases(place, module)) is not None:
            for one in bias:
                one.requires_grad_()
    return Models(theirs, ours)


def factors(module: Any) -> tuple[Tensor, Tensor]:
    """PEFT's A and B on one module."""
    if "default" in module.lora_embedding_A:
        return module.lora_embedding_A["default"], module.lora_embedding_B["default"]
    return module.lora_A["default"].weight, module.lora_B["default"].weight


def biases(place: WeightEntry, module: Any) -> tuple[nn.Parameter, nn.Parameter] | None:
    """(octavo's bias of all the layer's rows, transformers' of this name's), of a linear that has one."""
    if not isinstance(place.layer, FrozenLinear) or place.rows_key not in place.layer.bias_names:
        return None
    assert place.layer.bias is not None
    return place.layer.bias, getattr(module, "base_layer", module).bias


def gradients(place: WeightEntry, module: Any) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """(what, octavo's gradient, transformers' and PEFT's) of all that is trained under one name."""
    layer = place.layer
    if place.matrix is None:
        for kind, parameter in layer.named_parameters():
            yield kind, parameter.grad, getattr(module, kind).grad
        return
    assert isinstance(layer, FrozenLinear | FrozenEmbedding)
    if place.rows_key in layer.lora:
        lora = layer.lora[place.rows_key]
        assert isinstance(lora, Lora)
        a, b = factors(module)
        yield "a", lora.a.grad, a.grad
        yield "b", in_checkpoint_order(place, lora.b.grad), b.grad
    if (both := biases(place, module)) is not None:
        assert isinstance(layer, FrozenLinear)
        assert both[0].grad is not None
        start = layer.matrix.starts[place.rows_key] - layer.bias_start
        yield "bias", in_checkpoint_order(place, both[0].grad[start : start + len(both[1])]), both[1].grad


def in_checkpoint_order(place: WeightEntry, rows: Tensor | None) -> Tensor | None:
    return rows if rows is None or place.order is None else place.order.to_checkpoint(rows)


@pytest.mark.cell("gradients")
def test_gradients_are_those_of_transformers_and_peft(kernels: Models) -> None:
    theirs, ours = tuned(kernels)
    ids, labels = some_ids(), some_ids().roll(-1, dims=1)
    labels[:, ::5] = IGNORE_INDEX
    expected = F.cross_entropy(theirs(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.autograd.backward(expected)
    hidden = ours.hidden(ids).flatten(0, 1)
    head, softcap = FusedLinear((ours.head.spec(),)), ours.config.logit_softcap
    loss = cross_entropy_sum(hidden, labels.flatten(), head, Dropout(), softcap=softcap)
    torch.autograd.backward(loss)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    compared = 0
    for place in weight_entries(ours).values():
        for kind, mine, other in gradients(place, theirs.base_model.model.get_submodule(place.module)):
            assert mine is not None, (place.name, kind)
            assert other is not None, (place.name, kind)
            assert other.norm() > 0, (place.name, kind)
            assert (mine - other).norm() <= TOLERANCE * other.norm(), (place.name, kind)
            compared += 1
    assert compared == sum(parameter.requires_grad for parameter in theirs.parameters())


@pytest.mark.parametrize("save", list(Save))
def test_plain_blocks_have_the_output_and_the_gradients_of_the_model(kernels: Models, save: Save) -> None:
    """`fused=False` is the reference: every block as plain PyTorch, saved for backward or computed again."""
    ours, ids = tuned(kernels).ours, some_ids()
    parameters = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    outputs = [ours.hidden(ids, options=ForwardOptions(save, fused=fused)) for fused in (True, False)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    wanted: list[Tensor] = []
    found: list[Tensor] = []
    for output, gradients_of in zip(outputs, (wanted, found), strict=True):
        ours.zero_grad()
        torch.autograd.backward(output.square().sum())
        gradients_of += [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= TOLERANCE * other.norm()


def test_where_two_forms_of_rotary_settings_are_given_the_one_of_transformers_counts() -> None:
    both = like_llama(4, 2, head_dim=16) | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    both |= {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 1000.0}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**both)).inv_freq
    torch.testing.assert_close(torch.tensor(rotary_of(ConfigFields(both), 16).frequencies), theirs, rtol=1e-6, atol=0)


REFUSED = {
    "llama's activation": LlamaConfig(**like_llama(4, 2, hidden_act="gelu")),
    "gptj's activation": GPTJConfig(**like_gptj(4, 4, activation_function="relu")),
}


@pytest.mark.parametrize("what", REFUSED)
def test_unsupported_options_of_a_config_are_errors(what: str) -> None:
    config = REFUSED[what].to_dict()
    architecture = "GPTJForCausalLM" if config["model_type"] == "gptj" else "LlamaForCausalLM"
    with pytest.raises(ModelError, match="The model's config asks for"):
        build(config | {"architectures": [architecture]})


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("OPTForCausalLM", "`octavo models` lists"),
        ("MixtralForCausalLM", "does not support mixtures of experts"),
        ("Qwen3MoeForCausalLM", "does not support mixtures of experts"),
        ("GptOssForCausalLM", "does not support mixtures of experts"),
        ("Qwen3_5ForConditionalGeneration", "does not support layers with a recurrent state"),
        ("GraniteMoeHybridForCausalLM", "does not support"),
        ("Gemma4ForConditionalGeneration", "does not support keys and values shared between layers"),
    ],
)
def test_an_unsupported_architecture_is_named_with_the_reason(architecture: str, reason: str) -> None:
    with pytest.raises(ModelError, match=rf"{architecture}(.|\n)*{reason}"):
        build({"architectures": [architecture]})


def test_a_config_that_lacks_a_size_says_which() -> None:
    config = GPTJConfig(**like_gptj(4, 4)).to_dict() | {"architectures": ["GPTJForCausalLM"]}
    del config["n_head"]
    with pytest.raises(ModelError, match=r"config\.json: n_head is missing"):
        build(config)
