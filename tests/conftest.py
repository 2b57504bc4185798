"""What all tests share: an offline, quiet, one-threaded process, and tiny random models of any family.

The environment is set before anything heavy is imported. Tests run on tensors so small that a second thread
only costs; OMP_NUM_THREADS from outside wins.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="error",
    TRITON_INTERPRET="1",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a cast at every call in bfloat16

if TYPE_CHECKING:
    from octavo.models import Model

Twins = Callable[[Any], "tuple[Any, Model]"]


@pytest.fixture(scope="session")
def twins_of(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """transformers config -> (a random model of transformers, octavo's reading of the folder it saves).

    Float32, unquantised. Weights are wide (0.2; norms 1 +- 0.2, so that attention is far from uniform), to
    make any difference show.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from octavo.ops.quantize import scheme_named
    from octavo.store.sources import FolderSource
    from octavo.store.weights import load

    def make(config: Any) -> tuple[Any, Model]:
        torch.manual_seed(0)
        theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, parameter in theirs.named_parameters():
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            torch.nn.init.normal_(parameter, mean=float(is_norm), std=0.2)
        folder = tmp_path_factory.mktemp("twins")
        theirs.save_pretrained(folder)
        source = FolderSource(folder)
        return theirs, load(source, scheme_named("none"), dtype=torch.float32, device=torch.device("cpu"))

    return make
