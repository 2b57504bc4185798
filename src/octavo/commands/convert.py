"""`octavo convert`: splits a model that was tuned from hivemind/gpt-j-6B-8bit into a base and a PEFT adapter."""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo._version import __version__
from octavo.config import Config, ConvertOptions
from octavo.errors import UsageError
from octavo.ops.scheme import Scheme
from octavo.reporting import Report
from octavo.store.contents import stored_scheme
from octavo.store.embedded_adapter import base_of, split
from octavo.store.hf_folder import WrittenLayer, weight_names
from octavo.store.peft import Adapter
from octavo.store.resolve import open_source


def convert(config: Config, report: Report) -> dict[str, Any]:
    """Writes base/ and adapter/ into the folder `--out` and prints their contents; returns the JSON result."""
    model, out = config[ConvertOptions].model, config[ConvertOptions].out
    if model is None:
        raise UsageError("The model to convert is missing.", hint="Name the folder that the training script saved.")
    if out is None:
        raise UsageError("The output folder is missing.", hint="Name a new folder with --out.")
    source = open_source(model, allow_pickle=config[ConvertOptions].allow_pickle, report=report)
    scheme = stored_scheme(source)
    layers: list[WrittenLayer] = []
    with report.progress(len(weight_names(base_of(source))), f"Writing {out}") as bar:

        def on_layer(layer: WrittenLayer) -> None:
            layers.append(layer)
            bar.advance()

        adapter = split(source, out, readme=_readme(model, out), on_layer=on_layer)
    rows = _rows(layers, scheme, adapter)
    report.table(str(out), list(rows[0]), [list(row.values()) for row in rows], result=True)
    report.result(f"Use it with --model {out / 'base'} --adapter {out / 'adapter'}.")
    return {"out": str(out), "base": str(out / "base"), "adapter": str(out / "adapter"), "contents": rows}


def _rows(layers: list[WrittenLayer], scheme: Scheme, adapter: Adapter) -> list[dict[str, Any]]:
    """The written files: a row for frozen weights, one for LoRA matrices, one for weights that were trained in full."""
    frozen = {
        "folder": "base",
        "what": f"{scheme.name} weights" if scheme.name != "none" else "frozen weights",
        "modules": len(layers),
        "tensors": len(layers) * len(scheme.layout((1, 1), torch.float32)),
        "parameters": sum(prod(layer.shape) for layer in layers),
        "MiB": sum(layer.stored_bytes for layer in layers) / 2**20,
    }
    lora = [matrix for a, b, _ in adapter.lora.values() for matrix in (a, b)]
    return [
        frozen,
        _row("adapter", "LoRA matrices", adapter.lora, lora),
        _row("both", "norms and biases", {key.rpartition(".")[0] for key in adapter.full}, adapter.full.values()),
    ]


def _row(folder: str, what: str, modules: Collection[str], tensors: Collection[Tensor]) -> dict[str, Any]:
    return {
        "folder": folder,
        "what": what,
        "modules": len(modules),
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "MiB": sum(tensor.nbytes for tensor in tensors) / 2**20,
    }


def _readme(model: str, out: Path) -> str:
    """README.md of the adapter folder (its model card), with the metadata block that the hub reads."""
    return f"""---
library_name: peft
tags: [lora, octavo]
---

# LoRA adapter from {Path(model).name}

Made by octavo {__version__} with `octavo convert` from a checkpoint with frozen 8-bit weights and trained adapters.
The adapter has the LoRA matrices and the trained norms and biases, that is all trained parameters.

Use it with `octavo generate --model {out / "base"} --adapter THIS_FOLDER`. For `peft.PeftModel.from_pretrained`, which
needs a base that transformers loads, write one with `octavo quantize --model {out / "base"} --scheme none --out PLAIN`.
"""
