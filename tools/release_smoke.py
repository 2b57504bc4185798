"""What tools/release.py runs in a clean environment with octavo installed: does it work as a user would use it?

It makes a random model of 30,000 parameters, so nothing is downloaded. It runs in a temporary folder, with the
installed octavo and not that of a clone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = [
    "the",
    "king",
    "spoke",
    "to",
    "the",
    "queen",
    "of",
    "storm",
    "and",
    "sea",
    "where",
    "is",
    "my",
    "lord",
    "duke",
    "york",
]


def octavo(*arguments: str) -> str:
    """stdout of the command, which must succeed."""
    run = subprocess.run([sys.executable, "-m", "octavo", *arguments], capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"octavo {' '.join(arguments)}: exit code {run.returncode}\n{run.stdout}{run.stderr}")
    return run.stdout


def code(text: str) -> str:
    """stdout of Python code, which must succeed."""
    run = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"{text}\n{run.stdout}{run.stderr}")
    return run.stdout


def write_model(folder: Path) -> None:
    """A Llama of random numbers, with a tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)


def main() -> None:
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        where = code("import octavo; print(octavo.__file__)").strip()
        assert Path(where).is_relative_to(sys.prefix), f"{where} is not the installed octavo"
        # Help and the version without torch: a module that is None cannot be imported.
        code(
            "import sys; sys.modules['torch'] = None; sys.argv = ['octavo', '--help']\n"
            "from octavo.__main__ import main\nmain()"
        )
        assert octavo("--version").strip() == code("import octavo; print(octavo.__version__)").strip()
        code("import octavo.config.commands, octavo.flags, octavo.reporting, octavo.server.addresses")
        if "--without-torch" in sys.argv:
            print("passed without PyTorch")
            return
        write_model(Path("model"))
        texts = Path("texts")
        texts.mkdir()
        for number in range(12):
            (texts / f"{number}.txt").write_text(" ".join(WORDS[number % 5 :] * 9) + ".\n")
        common = ("--model", "model", "--seq-len", "64")
        assert "tokens" in octavo("data", *common, "texts")
        octavo("finetune", *common, "--data", "texts", "--steps", "4", "--out", "runs/mine")
        assert Path("runs/mine/report.html").is_file()
        assert Path("runs/mine/adapter/adapter_model.safetensors").is_file()
        octavo("evaluate", *common, "--adapter", "runs/mine", "texts")
        octavo(
            "generate", "--model", "model", "--adapter", "runs/mine", "--max-new-tokens", "8", "--prompt", "the king"
        )
        code("import octavo.server.app, octavo.server.serve")
        plays = code("import octavo.config as c; print(c.DEMO['data'][0])").strip()
        assert len(list(Path(plays).glob("*.txt"))) == 6, plays
        assert (Path(plays).parent / "README.md").is_file()
        print(code("import torch; print('passed with PyTorch', torch.__version__)").strip())


if __name__ == "__main__":
    main()
