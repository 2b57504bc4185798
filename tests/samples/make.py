"""Makes the samples: one small file or folder of each format that octavo writes.

    python tests/samples/make.py        in an environment with octavo[dev,dynamic8]

Samples are inputs of tests/samples/test_samples.py: every later commit must open, resume and evaluate them to the
numbers in expected.json. They are made again only when a format version increases, for the files of that format.

    model/                    a llama with random weights, float32, as transformers writes it
    int8/  nf4/  dynamic8/  nf4-double/    the same model as `octavo quantize` writes it
    run/                      a run of STEPS steps, stopped after STOP; with adapter/ and checkpoints/step-00000005/
    text/                     what it is trained and evaluated on
    expected.json             losses, perplexities, and the SHA-256 of the quantized values

All paths in them are relative to this folder. Everything but times and versions is a function of this file.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SCHEMES = ("int8", "nf4", "dynamic8", "nf4-double")
STEPS, STOP = 7, 5
EVALUATION: dict[str, Any] = {"data": ["text/test.txt"], "seq_len": 32, "dtype": "float32", "device": "cpu"}
# What is evaluated: the arguments of octavo.evaluate by the key in expected.json.
EVALUATED: dict[str, dict[str, Any]] = {
    "model": {"model": "model", "scheme": "none"},
    **{scheme: {"model": scheme} for scheme in SCHEMES},
    "run": {"model": "model", "scheme": "int8", "adapter": "run"},
    "run@5": {"model": "model", "scheme": "int8", "adapter": "run@5"},
    "int8 run@5": {"model": "int8", "adapter": "run@5"},
    "best": {"model": "model", "scheme": "int8", "adapter": "run/checkpoints/step-00000005/best"},
}
LINES = """the king spoke to the queen of the storm and of the sea
where is my lord the duke of york said she who left at dawn"""
WORDS = LINES.split()
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def main() -> None:
    """Writes all samples anew."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import octavo

    with chdir(HERE):
        for name in ("model", *SCHEMES, "run", "text"):
            shutil.rmtree(name, ignore_errors=True)
        write_text(Path("text"))
        write_model(Path("model"))
        for scheme in SCHEMES:
            octavo.quantize(model="model", scheme=scheme, out=scheme, quiet=True)
        run()
        Path("run", ".lock").unlink()
        expected: dict[str, Any] = {"perplexity": perplexities(), "quantized": quantized()}
        with tempfile.TemporaryDirectory() as folder, chdir(shutil.copytree(HERE, Path(folder, "samples"))):
            octavo.finetune(resume=True, out="run", quiet=True)
            expected |= {"losses": losses(Path("run")), "tuned": tuned(Path("run"))}
        Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def write_text(folder: Path) -> None:
    """Lines of random words."""
    folder.mkdir()
    draw = random.Random(0)
    for name, lines in (("train.txt", 60), ("test.txt", 16)):
        text = (" ".join(draw.choice(WORDS) for _ in range(9)) for _ in range(lines))
        (folder / name).write_text("".join(f"{line}\n" for line in text))


def write_model(folder: Path) -> None:
    """A model with grouped heads, biases in attention and a tokenizer with a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=2, eos_token_id=2, attention_bias=True,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    model.save_pretrained(folder)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)


def run() -> None:
    """A run that trains all kinds of parameters, with 8-bit optimizer state and a best adapter of an earlier step."""
    import octavo

    octavo.finetune(
        model="model", data=["text/train.txt"], test_data=["text/test.txt"], out="run", scheme="int8", dtype="float32",
        device="cpu", seq_len=32, batch_size=4, steps=STEPS, stop_after=STOP, lr=0.01, rank=4, alpha=8.0, rslora=True,
        lora_targets=["all-linear", "embed_tokens", "lm_head"], train_norms=True, train_biases=True, eval_every=2,
        checkpoint_every=0, keep_checkpoints=1, sample_prompt=["the king"], sample_tokens=4, probes=False, quiet=True,
    )  # fmt: skip


def losses(folder: Path) -> dict[str, list[float]]:
    """The losses of all steps, and those on the held-out text, in order."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {kind: [event["loss"] for event in events if event["event"] == kind] for kind in ("step", "heldout")}


def tuned(folder: Path) -> float:
    """The perplexity of the tuned model at the end of a run."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    (last,) = (event for event in events if event["event"] == "evaluation")
    return float(last["rows"][-1]["perplexity"])


def perplexities() -> dict[str, float]:
    """The perplexity of each of EVALUATED on the held-out text."""
    import octavo

    found = {}
    for key, options in EVALUATED.items():
        rows = octavo.evaluate(**EVALUATION, **options, base=False, quiet=True)["rows"]
        found[key] = rows[-1]["perplexity"]
    return found


def quantized() -> dict[str, str]:
    """The SHA-256 of the quantized values of each scheme as they are in a loaded model, by module."""
    return {scheme: digest(quantized_values(Path(scheme))) for scheme in SCHEMES}


def quantized_values(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """(module, part, bytes) of the integer parts of all frozen weights of a folder, loaded."""
    import torch

    from octavo.models import weight_entries
    from octavo.store.contents import stored_scheme
    from octavo.store.resolve import open_source
    from octavo.store.weights import load

    source = open_source(str(folder))
    model = load(source, stored_scheme(source), dtype=torch.float32, device=torch.device("cpu"))
    for name, entry in sorted(weight_entries(model).items()):
        if entry.matrix is not None:
            for part, tensor in sorted(entry.matrix.of(entry.rows_key).items()):
                if not tensor.is_floating_point():
                    yield name, part, tensor.contiguous().numpy().tobytes()


def digest(parts: Iterator[tuple[str, str, bytes]]) -> str:
    """The SHA-256 of named bytes."""
    found = hashlib.sha256()
    for name, part, content in parts:
        found.update(f"{name} {part} {len(content)}\n".encode() + content)
    return found.hexdigest()


if __name__ == "__main__":
    main()
