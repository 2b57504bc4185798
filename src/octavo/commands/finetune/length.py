"""How long a run trains and how often it is evaluated, where the user has not said so.

**Passes and batch size.** Adam moves a parameter by about the learning rate a step, whatever the size of the gradient.
B of LoRA starts at zero, so after S steps of a cosine schedule, whose mean is 0.55 of the peak, its values are at most
about 0.55 S lr. With the default --lr 2e-4 that is 0.0003 after 3 steps, which no held-out text shows, and 0.007 after
MIN_STEPS = 64. So small data get at least 64 steps, in this order:

1. more passes, up to GOOD_PASSES = 4: up to there a repeated text is worth nearly as much as a new one (Muennighoff et
   al., arXiv 2305.16264, section 5);
2. smaller batches, 2 rows or 1: as many rows are computed, in more steps;
3. more passes again, up to MAX_PASSES = 8; beyond that a model learns few pages by heart. Then a run has fewer steps.

Large data get one pass of the default batch size. All numbers follow from the count of rows, so that a resumed run has
the same ones; the settings of a run contain them.

**Evaluations.** A forward pass over a row takes about half as long as training on it: the frozen weights have no
gradient, so a backward pass takes about as long as a forward pass. The evaluations during training take at most
EVALUATION_SHARE of the time of training, and there are at least MIN_STEPS_BETWEEN steps from one to the next; the last
step always has one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from octavo.config import Config, RunOptions, TrainOptions
from octavo.data.loader import batches_per_epoch
from octavo.reporting import Report

MIN_STEPS = 64
GOOD_PASSES, MAX_PASSES = 4, 8
EVALUATIONS = 5  # on held-out text in a run without --eval-every
EVALUATIONS_TO_STOP = 10  # the same with --early-stop
EVALUATION_SHARE = 0.25  # of the time of training, for the evaluations during training together
MIN_STEPS_BETWEEN = 4
FORWARD_SHARE = 0.5  # the time of a forward pass over a row, as a fraction of training on it


@dataclass(frozen=True)
class Length:
    """Passes over the training text, and rows in an optimizer step."""

    epochs: int
    batch_size: int

    def steps(self, rows: int) -> int:
        """Optimizer steps over `rows` rows."""
        return self.epochs * batches_per_epoch(rows, self.batch_size)


def sensible_length(rows: int, batch_size: int, *, fixed_batch: bool) -> Length:
    """The passes and the batch size for `rows` rows of training text; with `fixed_batch` only the passes change."""
    sizes = [batch_size] if fixed_batch else [batch_size, *(size for size in (2, 1) if size < batch_size)]
    for size in sizes:
        passes = math.ceil(MIN_STEPS / batches_per_epoch(rows, size))
        if passes <= GOOD_PASSES:
            return Length(max(1, passes), size)
    return Length(min(passes, MAX_PASSES), sizes[-1])


def with_length(config: Config, rows: int, report: Report) -> Config:
    """The settings with --epochs, and for small data --batch-size, if neither --steps nor --epochs is given; says why.

    A batch size that the user gave stays.
    """
    training = config[TrainOptions]
    if training.steps is not None or training.epochs is not None:
        return config
    given = "batch_size" in training.model_fields_set
    length = sensible_length(rows, training.batch_size, fixed_batch=given)
    steps = length.steps(rows)
    chosen = f"--epochs {length.epochs}" + (f" --batch-size {length.batch_size}" if not given else "")
    passes = "one pass" if length.epochs == 1 else f"{length.epochs} passes"
    counted = f"{rows:,} row{'s' * (rows != 1)}, {passes}, {steps:,} step{'s' * (steps != 1)}"
    if steps < MIN_STEPS:
        reason = (
            f"more passes would mostly repeat the text; {MIN_STEPS} steps are better: more text, or a shorter --seq-len"
        )
    elif length.epochs > 1 or length.batch_size != training.batch_size:
        reason = f"fewer than {MIN_STEPS} steps teach little"
    else:
        reason = f"one pass has at least {MIN_STEPS} steps"
    report.say(f"Chosen: {chosen} ({counted}), since {reason}. --epochs or --steps set it.")
    return config.replace(epochs=length.epochs, batch_size=length.batch_size)


def evaluation_interval(config: Config, total: int, *, train_rows: int, held_out_rows: int) -> int:
    """Steps from one evaluation on held-out text to the next: --eval-every, else by the time that they take."""
    if every := config[RunOptions].eval_every:
        return every
    trained = total * min(config[TrainOptions].batch_size, train_rows)
    affordable = EVALUATION_SHARE * trained / (FORWARD_SHARE * max(1, held_out_rows))
    most = EVALUATIONS_TO_STOP if config[RunOptions].early_stop else EVALUATIONS
    count = max(1, min(most, math.floor(affordable), total // MIN_STEPS_BETWEEN))
    return math.ceil(total / count)
