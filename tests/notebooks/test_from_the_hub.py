"""The fine-tuning notebook as on a GPU: GPT-J from the hub, at the revision float16, whose weights are a pickle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.notebooks.hub import served
from tests.notebooks.test_notebooks import with_settings
from transformers import AutoModelForCausalLM, GPTJConfig

MODEL, REVISION = "EleutherAI/gpt-j-6B", "float16"
PROGRAM = """
import json, sys
names = {"__name__": "notebook"}
for source in json.load(sys.stdin):
    exec(compile(source, "cell", "exec"), names)
print("\\n" + json.dumps(names["run"].steps))
"""


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


@pytest.fixture(scope="module")
def repository(tiny_gptj: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-J of 14 million parameters in float16 as `pytorch_model.bin`, with a file that nobody needs."""
    config = GPTJConfig(
        vocab_size=300, n_embd=768, n_layer=2, n_head=8, rotary_dim=16, n_positions=128, bos_token_id=2,
        eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("repository")
    model = AutoModelForCausalLM.from_config(config).half()
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_gptj / name).read_bytes())
    config_file = folder / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"architectures": ["GPTJForCausalLM"]}))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "flax_model.msgpack").write_bytes(b"not needed")
    return folder


@pytest.mark.exhaustive
def test_the_notebook_downloads_the_weights_once_and_writes_no_other_copy(
    repository: Path, plays: Path, tmp_path: Path
) -> None:
    """Weights are quantized as they are read (tests/store/test_weights.py measures the memory of that)."""
    settings: dict[str, Any] = {
        "GPU": False, "MODEL": MODEL, "REVISION": REVISION, "ALLOW_PICKLE": True, "TEXTS": str(plays / "train"),
        "HELD_OUT": str(plays / "test"), "SEQ_LEN": 32, "BATCH_SIZE": 1, "STEPS": 1,
    }  # fmt: skip
    with served(repository, MODEL, REVISION) as (address, sent):
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], input=json.dumps(with_settings("finetune", **settings)), text=True,
            capture_output=True, cwd=tmp_path, env=environment,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == 1
    weights = (repository / "pytorch_model.bin").stat().st_size
    assert sent["pytorch_model.bin"] == weights  # once
    assert "flax_model.msgpack" not in sent
    # The adapter, in the run and in its checkpoints, with the optimizer's state: less than a third of the weights.
    assert bytes_below(tmp_path) < weights * 4 / 3
