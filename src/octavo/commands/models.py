"""`octavo models`: the supported architectures; `octavo models check`: what octavo makes of one model's config.json."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from octavo.config import CheckOptions, Config
from octavo.errors import UsageError
from octavo.models import COMPOSITES, FAMILIES, Decoder, build, family, parse, weight_entries
from octavo.models.fused_blocks import FUSED
from octavo.models.unread_keys import unread_keys
from octavo.ops.quantize import SCHEMES
from octavo.ops.scheme import Scheme
from octavo.reporting import Report
from octavo.store.contents import stored_scheme
from octavo.store.resolve import open_source
from octavo.store.sources import Source
from octavo.store.weights import allocated

GIB, MIB = 2**30, 2**20


def list_models(report: Report) -> dict[str, Any]:
    """Prints the table of architectures; returns the JSON result."""
    rows = [
        {"architecture": architecture, "model_type": model_type, "fused": module.Block in FUSED, "text_part": False}
        for architecture, (model_type, module) in FAMILIES.items()
    ]
    rows += [
        {"architecture": architecture, "model_type": model_type, "fused": False, "text_part": True}
        for architecture, (model_type, _) in COMPOSITES.items()
    ]
    rows.sort(key=lambda row: str(row["architecture"]))
    cells = [[str(row["architecture"]), str(row["model_type"]), _how(row)] for row in rows]
    report.table("Supported architectures", ["architecture", "model_type", "fused block"], cells, result=True)
    report.say("A fused block trains faster and gives the same results; all other commands have no such difference.")
    return {"architectures": rows}


def _how(row: dict[str, Any]) -> str:
    if row["text_part"]:
        return "as its text part, which is read alone"
    return "yes" if row["fused"] else "no"


def check_model(config: Config, report: Report) -> dict[str, Any]:
    """Prints the sizes of a model and its weights under each scheme; ModelError names what octavo does not support."""
    options = config[CheckOptions]
    if options.model is None:
        raise UsageError("The model to check is missing.", hint="octavo models check FOLDER, or a hub id.")
    source = open_source(options.model, revision=options.revision, weights=False, report=report)
    facts = _facts(source)
    shown = {**facts, "parameters": f"{facts['parameters']:,}", "lora_targets": ", ".join(facts["lora_targets"])}
    shown |= {name: "yes" if value else "no" for name, value in facts.items() if isinstance(value, bool)}
    report.table(options.model, ["config.json", ""], [[name, str(value)] for name, value in shown.items()], result=True)
    weights = {name: _weight_bytes(source, scheme) for name, scheme in SCHEMES.items()}
    unit, size = ("GiB", GIB) if max(weights.values()) >= GIB / 10 else ("MiB", MIB)
    stored = stored_scheme(source).name
    report.table(
        "Weights",
        ["scheme", f"memory in {unit}", "from the checkpoint"],
        [[name, weights[name] / size, _origin_of(name, stored)] for name in SCHEMES],
        result=True,
    )
    report.say("none: weights in bfloat16, 2 bytes each. Norms and biases are in float32 under all schemes.")
    if stored != "none":
        report.say(
            f"The weights are stored in {stored}. --scheme auto loads them as they are; any other scheme loads too, "
            "from the dequantized weights, with the errors of both."
        )
    unread = unread_keys(source.config, parse)
    for key in unread:
        report.warn(f"octavo does not read {key} of config.json: if the model needs it, octavo is wrong.")
    report.say("A run also needs memory for activations, adapters and the optimizer: see `octavo plan`.")
    return {**facts, "stored_scheme": stored, "weights_bytes": weights, "unread_keys": unread}


def _origin_of(scheme: str, stored: str) -> str:
    """How a run under `scheme` gets the weights of a folder that has them under `stored`."""
    if scheme == stored:
        return "as stored"
    if scheme == "none":
        return "dequantized"
    return "quantized at load" if stored == "none" else "dequantized, then quantized"


def _facts(source: Source) -> dict[str, Any]:
    model_type, module = family(source.config)
    decoder = build(source.config)
    config = decoder.config
    return {
        "model_type": model_type,
        "fused": module.Block in FUSED,
        "parameters": _parameter_count(decoder),
        "layers": config.layers,
        "width": config.width,
        "key_value_heads": config.key_value_heads,
        "head_size": config.head_size,
        "vocabulary": config.vocabulary,
        "context": config.context,
        "sliding_layers": sum(layer.spec.window is not None for layer in config.attention),
        "tied": config.tied,
        "lora_targets": list(dict.fromkeys(e.key for e in weight_entries(decoder).values() if e.matrix is not None)),
    }


def _parameter_count(decoder: Decoder) -> int:
    """All parameters, as transformers counts them: a tied head once, with norms, biases and learned positions."""
    return sum(prod(matrix.shape) for matrix in decoder.matrices) + sum(p.numel() for p in decoder.parameters())


def _weight_bytes(source: Source, scheme: Scheme) -> int:
    """The bytes of all weights under a scheme; unquantized ones have 2 bytes, norms and biases 4."""
    return allocated(source.config, scheme, dtype=torch.bfloat16, device=torch.device("meta")).frozen_bytes
