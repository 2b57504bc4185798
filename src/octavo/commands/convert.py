"""`octavo convert`: a model that was tuned from hivemind/gpt-j-6B-8bit, split into a base and a PEFT adapter."""

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
from octavo.ops.quantize import Scheme
from octavo.reporting import Report
from octavo.store.contents import stored_scheme
from octavo.store.embedded_adapter import base_of, split
from octavo.store.hf_folder import WrittenLayer, weight_names
from octavo.store.peft import Adapter
from octavo.store.resolve import open_source


def convert(config: Config, report: Report) -> dict[str, Any]:
    """Writes base/ and adapter/ into the folder `--out`; tells what is in them, and returns what `--json` prints."""
    model, out = config[ConvertOptions].model, config[ConvertOptions].out
    if model is None:
        raise UsageError("What to convert is missing.", hint="Give the folder that the training script saved.")
    if out is None:
        raise UsageError("Where to write is missing.", hint="Give a new folder with --out.")
    source = open_source(model, allow_pickle=config[ConvertOptions].allow_pickle, report=report)
    scheme = stored_scheme(source)
    layers: list[WrittenLayer] = []
    with report.progress(len(weight_names(base_of(source))), f"Writing {out}") as bar:

        def on_layer(layer: WrittenLayer) -> None:
            layers.append(layer)
            bar.advance()

        adapter = split(source, out, card=_card(model, out), on_layer=on_layer)
    rows = _rows(layers, scheme, adapter)
    report.table(str(out), list(rows[0]), [list(row.values()) for row in rows], result=True)
    report.result(f"Use it with --model {out / 'base'} --adapter {out / 'adapter'}.")
    return {"out": str(out), "base": str(out / "base"), "adapter": str(out / "adapter"), "contents": rows}


def _rows(layers: list[WrittenLayer], scheme: Scheme, adapter: Adapter) -> list[dict[str, Any]]:
    """What was written: a row for the frozen weights, one for the pairs, one for what is trained whole."""
    frozen = {
        "folder": "base",
        "what": f"{scheme.name} codes" if scheme.name != "none" else "frozen weights",
        "modules": len(layers),
        "tensors": len(layers) * len(scheme.layout((1, 1), torch.float32)),
        "parameters": sum(prod(layer.shape) for layer in layers),
        "MiB": sum(layer.stored_bytes for layer in layers) / 2**20,
    }
    pairs = [half for a, b, _ in adapter.lora.values() for half in (a, b)]
    return [
        frozen,
        _row("adapter", "low-rank pairs", adapter.lora, pairs),
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


def _card(model: str, out: Path) -> str:
    """README.md of the adapter's folder, with the metadata block that the hub reads."""
    return f"""---
library_name: peft
tags: [lora, octavo]
---

# LoRA adapter from {Path(model).name}

Made by octavo {__version__} with `octavo convert` from a model that holds frozen 8-bit weights and trained adapters in
one. With its low-rank pairs stand the trained norms and biases, so that it is the whole of what was trained.

Use it with `octavo generate --model {out / "base"} --adapter THIS_FOLDER`. For `peft.PeftModel.from_pretrained`, which
needs a base that transformers loads, write one with `octavo quantize --model {out / "base"} --scheme none --out PLAIN`.
"""
