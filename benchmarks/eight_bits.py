"""Compares the held-out loss of training with 8-bit matmuls and with exact matmuls.

    python benchmarks/eight_bits.py make DIR           # a small GPT-J, trained from scratch on half of the plays
    python benchmarks/eight_bits.py compare DIR --out RUNS [--steps 300] [--batch 4]
    python benchmarks/eight_bits.py compare smollm2 --out RUNS

`compare` fine-tunes on the other half of the plays and prints both held-out losses, in nats per token, and their
relative difference. Evaluation always uses exact matmuls, as inference with the adapter does.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerFast

PLAYS = Path(__file__).parents[1] / "src" / "octavo" / "shakespeare"
VOCAB_SIZE, SEQ_LEN, BATCH = 2048, 128, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("folder", type=Path)
    making.add_argument("--steps", type=int, default=600)
    comparing = commands.add_parser("compare")
    comparing.add_argument("model")
    comparing.add_argument("--out", type=Path, required=True)
    comparing.add_argument("--steps", type=int, default=300)
    comparing.add_argument("--batch", type=int, default=4)
    comparing.add_argument("--lr", type=float, default=2e-3)
    comparing.add_argument(
        "--extra",
        nargs=argparse.REMAINDER,
        default=[],
        help="options of `octavo finetune`; must be last",
    )
    args = parser.parse_args()
    if args.command == "make":
        make_model(args.folder, args.steps)
    else:
        compare(args)


def halves() -> tuple[list[Path], list[Path]]:
    """The plays of pretraining and those of fine-tuning."""
    files = sorted((PLAYS / "train").iterdir())
    return files[::2], files[1::2]


def make_model(folder: Path, steps: int) -> None:
    """Pretrains a GPT-J of 6 layers of width 256 and saves it in float16."""
    texts = [path.read_text(encoding="utf-8") for path in halves()[0]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    ids = torch.tensor([token for text in texts for token in tokenizer.encode(text).ids])
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = GPTJConfig(
        vocab_size=VOCAB_SIZE, n_positions=512, n_embd=256, n_layer=6, n_head=4, rotary_dim=32, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = GPTJForCausalLM(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    began = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1, (step + 1) / 50) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        starts = torch.randint(len(ids) - SEQ_LEN, (BATCH,))
        rows = torch.stack([ids[start : start + SEQ_LEN] for start in starts.tolist()]).to(device)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            sys.stdout.write(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s\n")
            sys.stdout.flush()
    model.half().save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


def compare(args: argparse.Namespace) -> None:
    """Runs `octavo finetune` twice; only --matmul differs."""
    losses: dict[str, list[float]] = {}
    for matmul in ("exact", "8bit"):
        out = args.out / matmul
        command = [sys.executable, "-m", "octavo", "finetune", "--model", args.model, "--out", str(out)]
        for path in halves()[1]:
            command += ["--data", str(path)]
        command += [
            "--test-data", str(PLAYS / "test"), "--seq-len", str(SEQ_LEN), "--batch-size", str(args.batch),
            "--steps", str(args.steps), "--eval-every", str(max(1, args.steps // 3)), "--lr", str(args.lr),
            "--rank", "8", "--alpha", "16", "--eval-rows", "96", "--checkpoint-every", "0", "--sample-tokens", "1",
            "--keep", "last", "--no-probes", "--matmul", matmul, *args.extra,
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[matmul] = [event["loss"] for event in events if event["event"] == "heldout"]
        errors: dict[str, list[float | None]] = next(
            (event["costs"] for event in events if event["event"] == "matmul"), {}
        )
        if errors:
            forward, backward = ([error[i] or 0.0 for error in errors.values()] for i in (0, 1))
            sys.stdout.write(f"largest matmul errors: forward {max(forward):.2%}, backward {max(backward):.2%}\n")
    for exact, int8 in zip(losses["exact"], losses["8bit"], strict=True):
        sys.stdout.write(f"held-out loss: exact {exact:.5f}, 8-bit {int8:.5f}, {int8 / exact - 1:+.3%}\n")


if __name__ == "__main__":
    main()
