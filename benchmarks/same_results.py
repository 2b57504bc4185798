"""Compares results of this code with an earlier commit's: `python benchmarks/same_results.py COMMIT`.

Both train the same tiny models (random weights, two families) in float32 on the CPU, with every weight scheme and all
options that change arithmetic, and decode ten prompts greedily. The script compares the SHA-256 of the adapter's
tensors, sorted by name, all losses and all token ids. Results depend on the CPU, so no hash is stored: both commits run
here, one after the other. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parents[1]
PLAYS = HERE / "src" / "octavo" / "shakespeare"
COMMON = {"seq-len": 64, "steps": 6, "rank": 4, "lr": 0.01, "eval-every": 3, "sample-tokens": 4, "dtype": "float32"}
# name: (family, options that differ from COMMON)
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama int8": ("llama", {"scheme": "int8"}),
    "llama nf4": ("llama", {"scheme": "nf4"}),
    "llama dynamic8": ("llama", {"scheme": "dynamic8"}),
    "llama none, dropout": ("llama", {"scheme": "none", "dropout": 0.1}),
    "llama none, every module, norms, biases": (
        "llama",
        {
            "scheme": "none",
            "lora-targets": "all-linear,embed_tokens,lm_head",
            "train-norms": True,
            "train-biases": True,
        },
    ),
    "llama int8, 8-bit matmuls": ("llama", {"scheme": "int8", "matmul": "8bit"}),
    "llama int8, accumulated, recomputed": (
        "llama",
        {"scheme": "int8", "batch-size": 8, "micro-batch-size": 4, "recompute": "full"},
    ),
    "llama int8, chats": ("llama", {"scheme": "int8", "data": "chats.jsonl"}),
    "gptj int8": ("gptj", {"scheme": "int8", "recompute": "selective"}),
    "gptj none, norms": ("gptj", {"scheme": "none", "train-norms": True, "train-biases": True}),
    "gptj nf4, dropout": ("gptj", {"scheme": "nf4", "dropout": 0.1}),
}
# Options of commits before the redesign: name and, where they differ, values.
RENAMED = {"lora-targets": "targets", "matmul": "compute", "recompute": "activations"}
VALUES = {"activations": {"none": "all", "selective": "attention", "full": "input"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the earlier commit")
    parser.add_argument("--only", default="", help="runs whose name contains this")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = folder / "before"
        subprocess.run(
            ["git", "-C", HERE, "worktree", "add", "--quiet", "--detach", before, arguments.commit], check=True
        )
        try:
            write_inputs(folder)
            differing = [run for run in RUNS if arguments.only in run and not is_same(run, folder, before)]
        finally:
            subprocess.run(["git", "-C", HERE, "worktree", "remove", "--force", before], check=True)
    sys.exit(f"different: {', '.join(differing)}" if differing else 0)


def is_same(run: str, folder: Path, before: Path) -> bool:
    """Whether both commits give the same results; prints one line."""
    old = results(run, folder, before, old_names=not (before / "src" / "octavo" / "commands").is_dir())
    new = results(run, folder, HERE, old_names=False)
    differing = [key for key in old if old[key] != new[key]]
    verdict = f"different {', '.join(differing)}" if differing else "equal"
    sys.stdout.write(f"{run}: {verdict}, adapter {new['adapter'][:12]}\n")
    sys.stdout.flush()
    return not differing


def results(run: str, folder: Path, tree: Path, *, old_names: bool) -> dict[str, Any]:
    """Hash of the adapter, losses and token ids of a run with the code in `tree`."""
    family, run_options = RUNS[run]
    options = {"data": "plays", "test-data": str(PLAYS / "test"), "batch-size": 4, **COMMON, **run_options}
    if "micro_batch_size" not in (tree / "src" / "octavo" / "config" / "options.py").read_text():
        options["accumulate"] = options["batch-size"] // options.get("micro-batch-size", options["batch-size"])
        options["batch"] = options.pop("batch-size") // options["accumulate"]
        options.pop("micro-batch-size", None)
    options["data"] = str(PLAYS / "train" if options["data"] == "plays" else folder / options["data"])
    out = folder / hashlib.sha256(f"{run} {tree}".encode()).hexdigest()[:16]
    octavo(tree, ["finetune", "--model", folder / family, "--out", out, "--eval-rows", 8], options, old_names=old_names)
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].tobytes())
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [(event["event"], event["loss"]) for event in events if event["event"] in ("step", "heldout")]
    assert len(losses) >= 8, losses
    generation = {"scheme": options["scheme"], "dtype": "float32", "temperature": 0, "max-new-tokens": 16}
    arguments = [
        "generate",
        "--model",
        folder / family,
        "--adapter",
        out / "adapter",
        "--prompts",
        folder / "prompts.jsonl",
    ]
    lines = octavo(tree, arguments, generation, old_names=old_names).splitlines()
    ids = [json.loads(line)["token_ids"] for line in lines]
    assert len(ids) == 10
    return {"adapter": digest.hexdigest(), "losses": losses, "ids": ids}


def octavo(tree: Path, arguments: list[Any], options: dict[str, Any], *, old_names: bool) -> str:
    """Standard output of a command of the code in `tree`."""
    flags: list[str] = []
    for name, value in options.items():
        flag = RENAMED.get(name, name) if old_names else name
        flag_value = VALUES.get(flag, {}).get(value, value) if isinstance(value, str) else value
        flags += [f"--{flag}"] if value is True else [f"--{flag}", str(flag_value)]
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "octavo", *map(str, arguments), *flags]
    completed = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert completed.returncode == 0, f"{command}\n{completed.stderr[-3000:]}"
    return completed.stdout


def write_inputs(folder: Path) -> None:
    """Writes the two models, the chats and the prompts."""
    text = (PLAYS / "test" / "hamlet.txt").read_text("utf-8")
    tokenizer = trained_tokenizer(text)
    shape = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4}
    llama = LlamaConfig(**shape, **sizes, num_key_value_heads=2, max_position_embeddings=256, attention_bias=True)
    gptj = GPTJConfig(**shape, n_embd=64, n_layer=3, n_head=4, n_positions=256, rotary_dim=8)
    for name, config in (("llama", llama), ("gptj", gptj)):
        write_model(config, tokenizer, folder / name)
    lines = [line for line in text.splitlines() if len(line) > 30]
    chats = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in zip(lines[0:400:2], lines[1:400:2], strict=True)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    prompts = [{"prompt": line} for line in lines[1000:1010]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))


def write_model(config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08) if parameter.ndim > 1 else torch.nn.init.uniform_(
            parameter, 0.5, 1.5
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def trained_tokenizer(text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' }}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{{ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return fast


if __name__ == "__main__":
    main()
