"""Compares octavo's fine-tuning loss with a plain transformers + peft loop on the same rows, order and adapters.

    python benchmarks/loss_parity.py [--steps 20] [--rows 2] [--seq-len 64]

Both train SmolLM2 on src/octavo/shakespeare in float32 (scheme none) with 32-bit AdamW. Prints both losses of every
step and the largest relative difference; exits with 1 if that is over 1 %.
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from octavo import adapters
from octavo.data import documents, packing, tokens
from octavo.data.loader import Batch, batches
from octavo.layers.context import ForwardOptions, Save
from octavo.layers.lora import LoraSpec, flatten_
from octavo.ops.quantize import scheme_named
from octavo.store import peft
from octavo.store.builtin import open_smollm2
from octavo.store.weights import load
from octavo.train.loop import Trainer, train
from octavo.train.optim import Adam, LossScaler, OptimizerSettings, Schedule
from octavo.train.step import EagerStep

PLAYS = Path(__file__).parents[1] / "src" / "octavo" / "shakespeare" / "train"
RANK, ALPHA, LEARNING_RATE, TOLERANCE = 8, 16.0, 1e-3, 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=64)
    args = parser.parse_args()
    source = open_smollm2()
    tokenizer = source.tokenizer()
    read = documents.read([str(PLAYS)])
    encoded = tokens.encode_all(read.documents, tokenizer)
    rows, _ = packing.pack(encoded, seq_len=args.seq_len, pad_id=0)
    chosen = list(islice(batches(rows, batch_size=args.rows, seed=0), args.steps))

    model = load(source, scheme_named("none"), dtype=torch.float32, device=torch.device("cpu"))
    spec = LoraSpec(RANK, ALPHA)
    adapters.create_(model, adapters.AdapterPlan(spec), seed=0)
    start = peft.tensors_of(adapters.collect(model, spec))
    parameters = adapters.trained(model)
    trainer = Trainer(
        model,
        parameters,
        Adam(flatten_(parameters), OptimizerSettings("adamw")),
        Schedule(LEARNING_RATE, args.steps, kind="constant"),
        LossScaler(torch.float32),
        EagerStep(model, ForwardOptions(Save.INPUT)),
        seed=0,
    )
    ours = [step.loss or 0.0 for step in train(trainer, iter(chosen))]  # None: a step without labels
    theirs = peer_losses(str(source.folder), start, chosen)
    largest = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        sys.stdout.write(f"step {number:3d}  octavo {a:.6f}  transformers+peft {b:.6f}\n")
    sys.stdout.write(f"largest relative difference {largest:.2e}\n")
    sys.exit(largest > TOLERANCE)


def peer_losses(folder: str, start: dict[str, torch.Tensor], chosen: list[Batch]) -> list[float]:
    """The losses of the transformers + peft loop that starts from the same adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(start[name.replace(".default", "")])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    model.train()
    losses = []
    for batch in chosen:
        optimizer.zero_grad()
        same = batch.piece[:, None, :, None] == batch.piece[:, None, None, :]
        mask = torch.zeros(same.shape).masked_fill(~same.tril(), torch.finfo(torch.float32).min)
        logits = model(input_ids=batch.ids, position_ids=batch.positions, attention_mask=mask).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    main()
