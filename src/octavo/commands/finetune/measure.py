"""What a run measures and shows: the table before and after, held-out losses, samples, the adapter read back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo import adapters
from octavo._version import __version__
from octavo.commands.evaluate import full_precision, score_row, score_rows
from octavo.commands.finetune.gpu import model_card
from octavo.commands.finetune.state import Run, versions
from octavo.commands.loading import end_ids, load_model
from octavo.config import ModelOptions, RunOptions
from octavo.data.prompt import encode_prompt
from octavo.errors import AdapterError
from octavo.infer.generate import complete
from octavo.infer.sample import Sampling
from octavo.metrics import Score
from octavo.models import Model
from octavo.ops.quantize import Scheme, scheme_named
from octavo.store import peft

PROBE_TOKENS = 64  # on which the saved adapter is compared with the one in memory
FIRST_WORDS = 12  # of the held-out text make the prompt of a run that names none


def measure_base(run: Run, *, compare_full: bool) -> None:
    """The held-out table and samples before training; while its pairs are new the model is the base."""
    report, hardware = run.report, run.hardware
    report.event("hardware", device=str(hardware.device), name=hardware.name, dtype=str(hardware.dtype))
    report.event("versions", **versions())
    if run.test:
        report.event("overlap", **run.test.ledger.overlap)
    quantised = run.scheme.name != "none"
    if run.test_rows and compare_full and quantised:
        plain = scheme_named("none")
        model = load_model(run.source, plain, full_precision(hardware), report)
        run.found.base_rows.append(table_row(run, "base", plain, _score(run, model, "Measuring the base")))
    if run.test_rows:
        name, label = ("quantised", "Measuring the quantised base") if quantised else ("base", "Measuring the base")
        run.found.base_rows.append(table_row(run, name, run.scheme, _score(run, run.model, label)))
    sample(run, which="base", step=0)


def measure_tuned(run: Run) -> list[dict[str, Any]]:
    """The whole perplexity table, the tuned model last."""
    if not run.test_rows:
        return []
    tuned = table_row(run, "tuned", run.scheme, _score(run, run.model, "Measuring the tuned model"))
    return [*run.found.base_rows, tuned]


def evaluate_held_out(run: Run) -> bool:
    """A held-out loss; the adapter goes to its folder if it is the best so far. Whether it was."""
    if not run.test_rows:
        return False
    found = run.found
    result = _score(run, run.model, f"Held-out loss after step {found.done}")
    run.report.event("heldout", step=found.done, loss=result.loss, perplexity=result.perplexity)
    better = math.isfinite(result.loss) and (found.best is None or result.loss < found.best["loss"])
    improved = better and run.config[RunOptions].keep == "best"
    if improved:
        found.best = {"step": found.done, "loss": result.loss}
        found.best_adapter = {name: p.detach().cpu().clone() for name, p in run.trainer.parameters.items()}
        save_adapter(run)
    return improved


def save_adapter(run: Run) -> None:
    """Writes the adapter's folder, and remembers what the model says with it."""
    _write_adapter(run, step=run.found.done)
    run.found.probe = _probe(run)


def keep_best_adapter(run: Run) -> None:
    """Writes the best adapter's folder anew, with a warning, unless it holds just that: it may be damaged or gone."""
    found = run.found
    if found.best is None or found.best_adapter is None:
        return
    with _with_parameters(run, found.best_adapter):
        if not _is_in_folder(run, step=found.best["step"]):
            run.report.warn(
                f"{run.adapter_folder} does not hold the best adapter, that of step {found.best['step']:,}: it is "
                "written anew from the checkpoint."
            )
            _write_adapter(run, step=found.best["step"])


@contextmanager
def _with_parameters(run: Run, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other trained parameters for a while."""
    own = {name: parameter.detach().clone() for name, parameter in run.trainer.parameters.items()}
    try:
        for name, parameter in run.trainer.parameters.items():
            parameter.data.copy_(values[name])
        yield
    finally:
        for name, parameter in run.trainer.parameters.items():
            parameter.data.copy_(own[name])


def _is_in_folder(run: Run, *, step: int) -> bool:
    """Whether the adapter's folder holds the model's adapter as that of `step`, bit for bit."""
    try:
        saved = peft.read(run.adapter_folder)
    except (AdapterError, OSError):
        return False
    expected = peft.tensors_of(adapters.collect(run.model, run.plan.spec, origin={}))
    found = peft.tensors_of(saved)
    same = found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    return same and saved.origin.get("step") == step


def _write_adapter(run: Run, *, step: int) -> None:
    base = run.config[ModelOptions].model
    origin = {
        "version": __version__,
        "base": {"name": base, "sha256": run.base_sha256, "scheme": run.scheme.name},
        "step": step,
    }
    card = model_card(run.config, base=base, base_sha256=run.base_sha256, step=step)
    adapters.save(run.adapter_folder, run.model, run.plan, base=base, origin=origin, card=card)


def read_back(run: Run) -> None:
    """Puts the saved adapter on the model in place of the trained one; AdapterError unless the logits agree."""
    adapters.apply_(run.model, peft.read(run.adapter_folder))
    expected = run.found.probe
    assert expected is not None
    difference = float((_probe(run) - expected).abs().max())
    if not difference <= 1e-4 * float(expected.abs().max()):
        raise AdapterError(
            f"The adapter in {run.adapter_folder} gives other logits than the trained model "
            f"(difference {difference:.3g}).",
            hint="The newest checkpoint is whole: go on from it with --resume.",
        )


def sample(run: Run, *, which: str, step: int) -> None:
    """Continues each prompt and records it."""
    options = run.config[RunOptions]
    run.micro_step.release()
    sampling = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=options.sample_tokens, seed=0)
    for prompt in options.sample_prompt or _first_words(run):
        ids = encode_prompt(prompt, run.tokenizer)
        text = complete(run.model, run.tokenizer, ids, sampling, stop_ids=end_ids(run.source)).text
        run.report.event("sample", step=step, prompt=prompt, text=text, which=which)
        run.report.say(f"\nThe {which} model continues {prompt!r}:\n{text}\n")


def table_row(run: Run, name: str, scheme: Scheme, result: Score) -> dict[str, Any]:
    """A row of the perplexity table."""
    folder: Path | None = run.adapter_folder if name == "tuned" else None
    row = score_row(name, scheme, folder, result)
    return {**row, "also_in_training": run.test.ledger.overlap["share"]} if run.test else row


def _score(run: Run, model: Model, label: str) -> Score:
    run.micro_step.release()  # what a recorded step holds is free for this
    batch = run.micro_step.plan.rows
    return score_rows(model, run.test_rows, run.tokenizer, batch=batch, label=label, report=run.report)


def _probe(run: Run) -> Tensor:
    """(T, V) logits on the first tokens of the training text."""
    ids = torch.from_numpy(run.train.rows[0].ids[:PROBE_TOKENS].astype("int64"))[None]
    was_training = run.model.training
    run.model.eval()
    with torch.no_grad():
        logits: Tensor = run.model(ids.to(run.hardware.device))[0]
    run.model.train(was_training)
    return logits.float().cpu()


def _first_words(run: Run) -> list[str]:
    first = (run.test or run.train).documents[0]
    text = first.prompt or " ".join(first.text.split()[:FIRST_WORDS])
    return [text] if text else []
