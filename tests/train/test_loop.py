"""The training loop: parity with a transformers + peft loop, bit-identical resumption, and errors."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import GPTJConfig, LlamaConfig

from octavo import adapters
from octavo.adapters import AdapterPlan
from octavo.data.loader import Batch, Position, batches
from octavo.data.packing import IGNORE_INDEX, Row, pack
from octavo.data.tokens import Tokens
from octavo.errors import TrainingError
from octavo.layers.context import ForwardOptions, Save
from octavo.layers.frozen import FrozenLinear, Lora
from octavo.layers.lora import FlatGroup, LoraSpec, flatten_
from octavo.models import Decoder, weight_entries
from octavo.ops.quantize import scheme_named
from octavo.store.sources import FolderSource
from octavo.store.weights import load
from octavo.train.loop import Step, Trainer, check_gradients, train
from octavo.train.optim import Adam, LossScaler, OptimizerSettings, Schedule
from octavo.train.step import EagerStep, micro_batches

VOCAB_SIZE, SEQ_LEN, RANK, ALPHA, SEED = 61, 24, 8, 16.0, 3
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "gptj": GPTJConfig(
        vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, bos_token_id=None, eos_token_id=None
    ),
}
Models = tuple[Any, Decoder]  # (transformers' model, octavo's)


@pytest.fixture(scope="module", params=CONFIGS)
def models(request: pytest.FixtureRequest, models_of: Callable[[Any], Models]) -> Models:
    return models_of(CONFIGS[request.param])


@pytest.fixture(scope="module")
def base(models_of: Callable[[Any], Models]) -> Decoder:
    return models_of(CONFIGS["llama"])[1]


def texts(count: int) -> list[Tokens]:
    """Documents of unequal lengths, none longer than a row; every second one has two labels."""
    generator = np.random.default_rng(7)
    documents = []
    for number in range(count):
        length = int(generator.integers(3, SEQ_LEN + 2))
        ids = (generator.integers(0, VOCAB_SIZE) + np.arange(length) * 5) % VOCAB_SIZE
        trained = np.arange(length) >= (length - 2 if number % 2 else 1)
        documents.append(Tokens(f"f{number}", 1, ids.astype(np.int32), trained, length))
    return documents


def rows(count: int) -> list[Row]:
    """`count` rows, some of several documents."""
    packed = pack(texts(3 * count), seq_len=SEQ_LEN, pad_id=0)[0][:count]
    assert len(packed) == count
    return packed


def trainer_of(
    base: Decoder,
    *,
    total: int,
    kind: str = "adamw",
    micro: int = 1,
    dropout: float = 0.0,
    lr: float = 5e-3,
    clip: float = 1.0,
) -> Trainer:
    """A trainer before its first step, on a copy of `base`."""
    model = copy.deepcopy(base)
    adapters.create_(model, AdapterPlan(LoraSpec(RANK, ALPHA, dropout)), seed=SEED)
    parameters = adapters.trained(model)
    settings = OptimizerSettings(kind, weight_decay=0.01, max_grad_norm=clip)
    optimizer = Adam(flatten_(parameters), settings)
    schedule = Schedule(lr, total, warmup=2, kind="constant")
    scaler = LossScaler(base.embed.matrix.dtype)
    micro_step = EagerStep(model, ForwardOptions(Save.INPUT), rows=micro)
    return Trainer(model, parameters, optimizer, schedule, scaler, micro_step, SEED)


def run(trainer: Trainer, data: Sequence[Row], **options: Any) -> list[Step]:
    done = options.pop("done", 0)
    options = {"batch_size": 1, "seed": SEED} | options
    return list(train(trainer, batches(data, **options), done=done))


def values(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}


def gradients(trainer: Trainer) -> Tensor:
    per_group = [group.values.grad for group in trainer.optimizer.groups]
    return torch.cat([gradient.clone() for gradient in per_group if gradient is not None])


def without_seconds(steps: Sequence[Step]) -> list[Step]:
    return [replace(step, seconds=0.0) for step in steps]


def peft_model(theirs: Any, trainer: Trainer) -> Any:
    """A copy of transformers' model with octavo's LoRA weights, through PEFT."""
    entries = [p for p in weight_entries(trainer.model).values() if isinstance(p.layer, FrozenLinear) and p.layer.lora]
    spec = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=sorted({entry.key for entry in entries})
    )
    model = peft.get_peft_model(copy.deepcopy(theirs), spec)
    for entry in entries:
        assert isinstance(entry.layer, FrozenLinear)
        lora, module = entry.layer.lora[entry.rows_key], model.base_model.model.get_submodule(entry.name)
        assert isinstance(lora, Lora)
        module.lora_A["default"].weight.data.copy_(lora.a)
        module.lora_B["default"].weight.data.copy_(lora.b)
    return model.train()


def documents_of(sources: Sequence[str], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, attention mask, unshifted labels) of padded documents, one per row: the batch of a usual training loop."""
    chosen = [text for text in texts(count) if f"{text.source}:1" in sources]
    shape = (len(chosen), SEQ_LEN + 1)
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, -100)
    for row, text in enumerate(chosen):
        n, labelled = len(text.ids), torch.from_numpy(text.trained)
        ids[row, :n], mask[row, :n] = torch.from_numpy(text.ids).long(), 1
        labels[row, :n][labelled] = ids[row, :n][labelled]
    return ids, mask, labels


def plain_loop(model: Any, data: Sequence[Row], *, steps: int, batch_size: int, micro: int) -> list[float]:
    """Fine-tuning with transformers, peft and torch only. Returns the loss of every step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.01)
    stream = batches(data, batch_size=batch_size, seed=SEED)
    losses = []
    for number in range(1, steps + 1):
        parts = micro_batches(next(stream), micro)
        chosen = [documents_of(part.sources, 3 * len(data)) for part in parts]
        counts = [int((labels[:, 1:] != -100).sum()) for _, _, labels in chosen]
        assert len(set(counts)) > 1 or number > 1  # unequal micro-batches: a mean of means would be wrong
        optimizer.zero_grad()
        total = 0.0
        for (ids, mask, labels), count in zip(chosen, counts, strict=True):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss * count / sum(counts)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1.0, number / 2)
        optimizer.step()
        losses.append(total)
    return losses


@pytest.mark.parametrize(("kind", "tolerance"), [("adamw", 1e-5), ("adamw8bit", 5e-3)])
def test_losses_equal_those_of_a_transformers_and_peft_loop(models: Models, kind: str, tolerance: float) -> None:
    theirs, ours = models
    trainer, data = trainer_of(ours, total=20, kind=kind, micro=2), rows(10)
    plain = plain_loop(peft_model(theirs, trainer), data, steps=20, batch_size=4, micro=2)
    losses = [step.loss for step in run(trainer, data, batch_size=4) if step.loss is not None]
    assert losses == pytest.approx(plain, rel=tolerance)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])  # the loss decreases


def resumed(first: Trainer, base: Decoder, after: Step, **settings: Any) -> Trainer:
    """A new trainer with the saved state of `first`, as `octavo finetune --resume` creates it."""
    stored, state = values(first), first.optimizer.state()
    scaler = first.scaler.state()
    second = trainer_of(base, **settings)
    for name, parameter in second.parameters.items():
        parameter.data.copy_(stored[name])
    second.optimizer.load_state(state)
    second.scaler.load_state(scaler)
    torch.manual_seed(after.number)  # a run does not depend on the state of the generator
    return second


# Five rows, two in a step of two micro-batches: step 3 has the last row of the first epoch, step 6 of the second.
@pytest.mark.parametrize("stop", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["adamw8bit", "adamw"])
def test_a_resumed_run_is_bit_identical(base: Decoder, kind: str, stop: int) -> None:
    data = rows(5)
    settings: dict[str, Any] = {"total": 7, "kind": kind, "dropout": 0.3}
    uninterrupted = trainer_of(base, **settings)
    expected = run(uninterrupted, data, batch_size=2)
    first = trainer_of(base, **settings)
    before = []
    for step in train(first, batches(data, batch_size=2, seed=SEED)):
        before.append(step)
        if step.number == stop:
            break
    second = resumed(first, base, before[-1], **settings)
    position = Position(before[-1].following.epoch, before[-1].following.index)
    after = run(second, data, batch_size=2, start=position, done=stop)
    assert without_seconds([*before, *after]) == without_seconds(expected)
    assert all(torch.equal(value, values(second)[name]) for name, value in values(uninterrupted).items())
    state = second.optimizer.state()
    assert all(torch.equal(tensor, state[key]) for key, tensor in uninterrupted.optimizer.state().items())
    assert (state["0.state1"].dtype == torch.uint8) if kind == "adamw8bit" else "0.exp_avg" in state


def test_every_step_and_micro_batch_has_other_dropout_masks(base: Decoder) -> None:
    data = rows(1) * 2  # the same row twice
    losses = [step.loss for step in run(trainer_of(base, total=3, dropout=0.5, lr=0.0), data)]
    assert len(set(losses)) == 1  # B is zero: dropout has no effect
    trainers = [trainer_of(base, total=3, dropout=0.5, lr=0.0) for _ in range(2)]
    for trainer in trainers:
        for parameter in trainer.parameters.values():
            nn.init.normal_(parameter.data, generator=torch.Generator().manual_seed(parameter.numel()))
    single, double = (run(trainer, data, batch_size=n) for trainer, n in zip(trainers, (1, 2), strict=True))
    assert len({step.loss for step in single}) == 3
    assert single[0].loss != double[0].loss


def test_the_micro_batch_size_changes_neither_loss_nor_gradients(base: Decoder) -> None:
    one_pass, four_passes = (trainer_of(base, total=1, micro=n, lr=0.0, clip=0.0) for n in (4, 1))
    (one,), (other,) = (run(trainer, rows(4), batch_size=4, shuffle=False) for trainer in (one_pass, four_passes))
    assert one.trained_tokens == other.trained_tokens
    assert one.tokens == other.tokens
    assert one.loss == pytest.approx(other.loss, rel=1e-6)
    torch.testing.assert_close(gradients(four_passes), gradients(one_pass), rtol=1e-4, atol=1e-7)


def without_labels(row: Row) -> Row:
    return replace(row, labels=np.full_like(row.labels, IGNORE_INDEX))


def test_micro_batches_without_labels_do_not_change_a_step(base: Decoder) -> None:
    data = rows(2)
    alone, among = (trainer_of(base, total=1, clip=0.0) for _ in range(2))
    (expected,) = run(alone, data[:1])
    (step,) = run(among, [without_labels(data[1]), data[0], without_labels(data[1])], batch_size=3, shuffle=False)
    assert (step.loss, step.trained_tokens) == (expected.loss, expected.trained_tokens)
    assert torch.equal(gradients(among), gradients(alone))


def test_the_loss_is_the_mean_over_label_weights(base: Decoder) -> None:
    """Weights that are twice as large change neither loss nor gradients; different ones change both."""
    (batch,) = batches(rows(2), batch_size=2, seed=SEED, epochs=1)
    ones, twice = torch.ones(batch.ids.shape), torch.full(batch.ids.shape, 2.0)
    uneven = torch.where(torch.arange(SEQ_LEN) < SEQ_LEN // 2, 0.0, 1.0).expand(2, -1)
    results = []
    for weights in (None, ones, twice, uneven):
        trainer = trainer_of(base, total=1, clip=0.0)
        (step,) = train(trainer, iter([replace(batch, weights=weights)]))
        results.append((step.loss, gradients(trainer)))
    for loss, gradient in results[1:3]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-4, atol=1e-7)
    assert results[3][0] != pytest.approx(results[0][0], rel=1e-3)


@pytest.mark.parametrize("micro", [1, 2])
def test_a_step_whose_label_weights_are_all_0_changes_nothing(base: Decoder, micro: int) -> None:
    """A micro-batch of such labels within a step has no influence either."""
    trainer, data = trainer_of(base, total=2, micro=micro), rows(2)
    (batch,) = batches(data, batch_size=2, seed=SEED, epochs=1, shuffle=False)
    zeros = torch.zeros(batch.ids.shape)
    before = values(trainer)
    one_row = torch.cat([torch.ones(1, SEQ_LEN), zeros[1:]])
    stream = iter([replace(batch, weights=zeros), replace(batch, weights=one_row)])
    first = next(steps := train(trainer, stream))
    assert (first.loss, first.trained_tokens) == (None, 0)
    assert all(torch.equal(value, values(trainer)[name]) for name, value in before.items())
    alone = run(trainer_of(base, total=2, micro=micro), [without_labels(data[0]), data[0]], shuffle=False)[-1]
    assert next(steps).loss == pytest.approx(alone.loss, rel=1e-6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(2, SEQ_LEN - 1), "have the shape (2, 23); its labels have (2, 24)"),
        (torch.ones(2), "have the shape (2,)"),
        (torch.full((2, SEQ_LEN), -1.0), "at least 0"),
        (torch.full((2, SEQ_LEN), torch.nan), "finite"),
    ],
)
def test_invalid_label_weights_are_an_error_that_names_the_texts(base: Decoder, weights: Tensor, message: str) -> None:
    (batch,) = batches(rows(2), batch_size=2, seed=SEED, epochs=1)
    with pytest.raises(TrainingError, match=re.escape(message)) as caught:
        list(train(trainer_of(base, total=1), iter([replace(batch, weights=weights)])))
    assert batch.sources[0] in caught.value.message


def test_dropout_does_not_use_the_default_generator(base: Decoder) -> None:
    """Other threads of the process draw from it too, as a second run."""
    settings: dict[str, Any] = {"total": 3, "dropout": 0.3}
    expected = without_seconds(run(trainer_of(base, **settings), rows(4), batch_size=2))
    trainer = trainer_of(base, **settings)
    trainer.micro_step = Disturbed(trainer.model, ForwardOptions(Save.INPUT), rows=1)
    assert without_seconds(run(trainer, rows(4), batch_size=2)) == expected
    state = torch.get_rng_state()
    run(trainer_of(base, **settings), rows(4), batch_size=2)
    assert torch.equal(torch.get_rng_state(), state)


class Disturbed(EagerStep):
    """A micro-step before which another thread seeds the default generator."""

    def __call__(self, batch: Batch, loss_scale: float, generator: torch.Generator | None = None) -> Tensor:
        torch.manual_seed(99)
        return super().__call__(batch, loss_scale, generator)


def test_ranks_sum_their_gradients_before_they_are_clipped(base: Decoder) -> None:
    alone, doubled = (trainer_of(base, total=1, clip=0.0) for _ in range(2))

    def double(groups: Sequence[FlatGroup]) -> None:
        for group in groups:
            assert group.values.grad is not None
            group.values.grad.mul_(2)

    doubled.sum_over_ranks = double
    (one,), (other,) = run(alone, rows(1)), run(doubled, rows(1))
    assert other.gradient_norm == pytest.approx(2 * one.gradient_norm)


def test_a_step_without_labels_changes_nothing(base: Decoder) -> None:
    data = rows(2)
    trainer = trainer_of(base, total=4)
    stream = batches([without_labels(data[0]), data[1]], batch_size=1, seed=SEED, shuffle=False)
    seen = [(step, values(trainer)) for step in train(trainer, stream)]
    assert [step.trained_tokens > 0 for step, _ in seen] == [False, True, False, True]
    changed = [
        any(not torch.equal(value, after[name]) for name, value in before.items())
        for (_, before), (_, after) in pairwise(seen)
    ]
    assert changed == [True, False, True]


def test_gradients_are_checked_in_the_first_step_with_labels(base: Decoder) -> None:
    trainer, data = trainer_of(base, total=2), rows(2)
    remove_lora_(trainer.model)
    stream = batches([without_labels(data[0]), data[1]], batch_size=1, seed=SEED, shuffle=False)
    steps = train(trainer, stream)
    assert next(steps).number == 1
    with pytest.raises(TrainingError, match="No gradient reaches"):
        next(steps)


@pytest.mark.parametrize("factor", [0.0, 1e30])
def test_the_error_for_zero_or_infinite_activations_names_the_weights(base: Decoder, factor: float) -> None:
    """The hint does not name --lora-targets if no parameter has a gradient."""
    trainer, data = trainer_of(base, total=1), rows(2)
    with torch.no_grad():
        for name, tensor in (*trainer.model.named_parameters(), *trainer.model.named_buffers()):
            if "lora" not in name and tensor.is_floating_point():
                tensor.mul_(factor)
    with pytest.raises(TrainingError, match=r"None of the trained parameters|loss is nan|not finite") as caught:
        next(train(trainer, batches(data, batch_size=2, seed=SEED)))
    if factor == 0:
        assert "weights may be damaged" in caught.value.hint
    assert "--lora-targets" not in caught.value.hint


def remove_lora_(model: Decoder) -> None:
    """Removes the LoRA of one layer from the forward pass; the optimizer still has its parameters."""
    layer = weight_entries(model)["model.layers.1.mlp.down_proj"].layer
    assert isinstance(layer, FrozenLinear)
    layer.lora = nn.ModuleDict()


def test_a_lora_without_a_gradient_stops_the_run_in_its_first_step(base: Decoder) -> None:
    trainer = trainer_of(base, total=3)
    remove_lora_(trainer.model)
    with pytest.raises(TrainingError) as caught:
        run(trainer, rows(2))
    assert caught.value.message == "No gradient reaches model.layers.1.mlp.down_proj."


@pytest.mark.parametrize(
    ("gradient", "message"),
    [(None, r"No gradient reaches x\.lora_B"), (torch.inf, r"gradient of x\.lora_B is not finite")],
)
def test_the_error_for_missing_or_infinite_gradients_names_the_parameter(gradient: float | None, message: str) -> None:
    parameters = {f"x.lora_{factor}": nn.Parameter(torch.zeros(2)) for factor in "AB"}
    for parameter in parameters.values():
        parameter.grad = torch.ones(2)
    check_gradients(parameters)
    parameters["x.lora_B"].grad = None if gradient is None else torch.tensor([1.0, gradient])
    with pytest.raises(TrainingError, match=message):
        check_gradients(parameters)
    if gradient is not None:
        check_gradients(parameters, finite_needed=False)


def test_the_error_for_a_nan_loss_names_the_step_and_the_files(base: Decoder) -> None:
    trainer, data = trainer_of(base, total=5), rows(3)
    steps = train(trainer, batches(data, batch_size=1, seed=SEED, shuffle=False))
    next(steps)
    trainer.model.norm.weight.data[0] = torch.nan
    before = values(trainer)
    with pytest.raises(TrainingError, match=rf"loss is nan at step 2(.|\n)*{data[1].sources[0]}(.|\n)*--lr"):
        next(steps)
    assert all(torch.equal(value, before[name]) for name, value in values(trainer).items())


def test_a_nan_gradient_stops_the_run(base: Decoder) -> None:
    trainer, data = trainer_of(base, total=5), rows(3)
    steps = train(trainer, batches(data, batch_size=1, seed=SEED, shuffle=False))
    next(steps)
    parameter = next(iter(trainer.parameters.values()))
    parameter.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(TrainingError, match=rf"gradient is not finite at step 2(.|\n)*{data[1].sources[0]}"):
        next(steps)


@pytest.mark.parametrize(("epochs", "sizes"), [(0.5, [2, 2]), (1.0, [2, 2, 1]), (1.2, [2, 2, 1, 2])])
def test_the_last_step_of_an_epoch_has_the_remaining_rows(base: Decoder, epochs: float, sizes: list[int]) -> None:
    data = rows(5)
    steps = run(trainer_of(base, total=9), data, batch_size=2, epochs=epochs, shuffle=False)
    counts = iter([int((row.piece >= 0).sum()) for row in [*data, *data]])
    assert [step.tokens for step in steps] == [sum(next(counts) for _ in range(n)) for n in sizes]
    assert steps[-1].following == Position((len(sizes) - 1) // 3, (len(sizes) - 1) % 3 + 1)


def test_the_model_is_in_train_mode_during_and_in_eval_mode_after_training(base: Decoder) -> None:
    trainer = trainer_of(base, total=3)
    for step in train(trainer, batches(rows(2), batch_size=1, seed=SEED)):
        assert trainer.model.training
        if step.number == 2:
            break
        trainer.model.eval()  # as an evaluation does
    assert not trainer.model.training


class Failing:
    """A micro-step whose second call raises `error`; `cheaper` is the number of smaller plans."""

    def __init__(self, model: Decoder, error: RuntimeError, cheaper: int) -> None:
        self.eager, self.error, self.cheaper, self.calls, self.rows = EagerStep(model), error, cheaper, 0, 1

    def __call__(self, batch: Batch, loss_scale: float, generator: torch.Generator | None = None) -> Tensor:
        self.calls += 1
        loss = self.eager(batch, loss_scale, generator)
        if self.calls == 2:
            raise self.error
        return loss

    def release(self) -> None:
        return

    def reduce_memory(self) -> bool:
        self.cheaper -= 1
        return self.cheaper >= 0


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")], ids=["torch", "cublas"]
)
def test_a_step_is_repeated_from_its_start_after_an_out_of_memory_error(base: Decoder, error: RuntimeError) -> None:
    data, settings = rows(4), {"total": 2, "dropout": 0.3}
    expected, trainer = trainer_of(base, **settings), trainer_of(base, **settings)  # type: ignore[arg-type]
    trainer.micro_step = Failing(trainer.model, error, cheaper=1)
    assert without_seconds(run(trainer, data, batch_size=2)) == without_seconds(run(expected, data, batch_size=2))
    assert all(torch.equal(value, values(trainer)[name]) for name, value in values(expected).items())


def test_a_step_that_fits_no_plan_stops_the_run(base: Decoder) -> None:
    trainer = trainer_of(base, total=2)
    trainer.micro_step = Failing(trainer.model, torch.OutOfMemoryError("full"), cheaper=0)
    with pytest.raises(TrainingError, match="Step 1 does not fit"):
        run(trainer, rows(4), batch_size=2)


def test_other_errors_are_raised_unchanged(base: Decoder) -> None:
    trainer = trainer_of(base, total=2)
    trainer.micro_step = Failing(trainer.model, RuntimeError("shapes"), cheaper=1)
    with pytest.raises(RuntimeError, match="shapes"):
        run(trainer, rows(4), batch_size=2)


@pytest.fixture(scope="module")
def float16_base(models_of: Callable[[Any], Models], tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """The base in float16."""
    theirs, _ = models_of(CONFIGS["llama"])
    folder: Path = tmp_path_factory.mktemp("half")
    theirs.save_pretrained(folder)
    return load(FolderSource(folder), scheme_named("none"), dtype=torch.float16, device=torch.device("cpu"))


def test_losses_in_float16_are_close_to_those_in_float32(base: Decoder, float16_base: Decoder) -> None:
    data = rows(4)
    trainer = trainer_of(float16_base, total=12)
    assert trainer.scaler.active
    expected, steps = run(trainer_of(base, total=12), data), run(trainer, data)
    assert not any(step.skipped for step in steps)
    assert [step.loss for step in steps] == pytest.approx([step.loss for step in expected], rel=0.02)
    assert steps[0].gradient_norm == pytest.approx(expected[0].gradient_norm, rel=0.02)  # after unscaling


def test_float16_skips_the_update_when_gradients_overflow(float16_base: Decoder) -> None:
    trainer, data = trainer_of(float16_base, total=40), rows(1)
    trainer.scaler.scale = 2.0**24
    before, norms = values(trainer), []
    for step in train(trainer, batches(data, batch_size=1, seed=SEED)):
        norms.append(step.gradient_norm)
        if not step.skipped:
            break
        assert trainer.scaler.scale == 2.0 ** (24 - step.number)
        assert all(torch.equal(value, before[name]) for name, value in values(trainer).items())
        assert not trainer.optimizer.state()
    assert len(norms) > 1
    assert not step.skipped
    assert any(not torch.equal(value, before[name]) for name, value in values(trainer).items())


def test_24_overflows_in_a_row_are_skipped_and_the_25th_stops_the_run(float16_base: Decoder) -> None:
    trainer = trainer_of(float16_base, total=40)
    next(iter(trainer.parameters.values())).register_hook(lambda gradient: gradient * torch.inf)
    before, steps = values(trainer), train(trainer, batches(rows(1), batch_size=1, seed=SEED))
    assert all(next(steps).skipped for _ in range(24))
    with pytest.raises(TrainingError, match="gradient is not finite at step 25"):
        next(steps)
    assert all(torch.equal(value, before[name]) for name, value in values(trainer).items())
