"""`octavo quantize`: writes a quantized model as a folder that loads without the original."""

from __future__ import annotations

from typing import Any

from octavo.commands.loading import chosen_hardware, chosen_scheme, open_model
from octavo.config import Config, ModelOptions, QuantizeOptions
from octavo.errors import UsageError
from octavo.reporting import Report
from octavo.store.contents import stored_scheme
from octavo.store.hf_folder import WrittenLayer, weight_names, write_folder
from octavo.store.text_part import text_model_config
from octavo.system import own_command, quoted


def quantize(config: Config, report: Report) -> dict[str, Any]:
    """Writes a quantized model folder; prints the size and the error of each layer, and returns them."""
    options, out = config[ModelOptions], config[QuantizeOptions].out
    if out is None:
        raise UsageError("The output folder is missing.", hint="Name a new folder with --out.")
    chosen_hardware(options, report)  # an unavailable device is an error, although weights are quantized on the CPU
    source = open_model(options, report)
    scheme = chosen_scheme(options, source)
    if (text := text_model_config(source.config)) is not None:
        folder = f"as a {text['architectures'][0]}" if scheme.name == "none" else "under the config of the whole model"
        report.say(f"{options.model} is a model of text and images: the folder holds its text part alone, {folder}.")
    layers: list[WrittenLayer] = []
    with report.progress(len(weight_names(source)), f"Writing {out} ({scheme.name})") as bar:

        def on_layer(layer: WrittenLayer) -> None:
            layers.append(layer)
            bar.advance()

        total = write_folder(source, out, scheme, on_layer=on_layer)
    report.table(
        f"{out}: {total / 2**20:,.1f} MiB in {scheme.name}",
        ["layer", "shape", "MiB", "relative error"],
        [[x.name, f"{x.shape[0]} x {x.shape[1]}", x.stored_bytes / 2**20, x.error] for x in layers],
        result=True,
    )
    stored = stored_scheme(source)
    if stored.name != "none" and any(layer.error for layer in layers):
        report.say(
            f"{options.model} is quantized to {stored.name} already: the errors are against its dequantized weights, "
            "not against the weights that it was made from."
        )
    before = sum(path.stat().st_size for path in source.files)
    report.result(
        f"{before / 2**20:,.1f} MiB of weight files before, {total / 2**20:,.1f} MiB now. Next: "
        f"{own_command()} finetune {quoted(['--model', out])} --data YOUR_TEXTS"
    )
    return {
        "out": str(out),
        "scheme": scheme.name,
        "bytes": total,
        "bytes_before": before,
        "layers": [{"name": x.name, "shape": list(x.shape), "bytes": x.stored_bytes, "error": x.error} for x in layers],
    }
