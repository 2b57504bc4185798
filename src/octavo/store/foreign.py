"""Model files that octavo cannot read for a known reason, with errors that name it: other formats, LFS pointers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from octavo.bounded_json import shown
from octavo.errors import ModelError
from octavo.models import parse

LFS_HEADER = b"version https://git-lfs.github.com/spec/"
MOST_POINTER_BYTES = 1024

# quant_method of quantization_config -> the usual name of the format.
FORMATS = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FBGEMM FP8",
    "compressed-tensors": "compressed-tensors",
    "mxfp4": "MXFP4",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "quanto": "Quanto",
    "eetq": "EETQ",
    "torchao": "torchao",
    "exl2": "EXL2",
    "exl3": "EXL3",
}
# Suffixes of tensor names of such formats, for a folder whose config.json does not name the format.
TENSOR_ENDS = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_scale_inv": "FP8",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "compressed-tensors or FP8",
    ".quant_map": "bitsandbytes",
    ".nested_absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".scales": "MLX or GPTQ",
}
_HINT = (
    "Give the model that it was made from, with weights in 16 or 32 bits: octavo quantizes as it loads "
    "(--scheme int8 or nf4)."
)


def check_config(config: Mapping[str, Any], where: str) -> None:
    """ModelError unless the config.json is valid, of a supported family, and its weights are in a format octavo reads.

    Needs no weights, so it runs before they are downloaded.
    """
    for key in ("quantization_config", "quantization", "compression_config"):
        value = config.get(key)
        if value and not (key == "quantization_config" and is_nf4(value)):
            raise ModelError(
                f"{where} holds weights quantized with {_format(value, key)} ({key} in its config.json), a format that "
                "octavo does not read.",
                hint=_HINT,
            )
    parse(config)


def is_nf4(value: object) -> bool:
    """Whether a quantization_config is that of bitsandbytes' NF4, which store/bitsandbytes.py reads."""
    if not isinstance(value, Mapping) or value.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return False
    return value.get("load_in_4bit") is True and value.get("bnb_4bit_quant_type") == "nf4"


def _format(value: object, key: str) -> str:
    if not isinstance(value, Mapping):
        return shown(value)
    method = value.get("quant_method")
    if method is None:
        if "load_in_8bit" in value or "load_in_4bit" in value:
            method = "bitsandbytes"
        elif key == "quantization" and "group_size" in value:
            return "MLX"
        else:
            return "a method that it does not name"
    name = FORMATS.get(method) if isinstance(method, str) else None
    return name or shown(method)


def refuse_tensors(names: Iterable[str], where: str) -> None:
    """ModelError if tensor names show quantized weights of another program."""
    for name in names:
        for end, made_by in TENSOR_ENDS.items():
            if name.endswith(end) or ".quant_state.bitsandbytes" in name:
                made_by = "bitsandbytes" if ".quant_state." in name else made_by
                raise ModelError(
                    f"{where} holds weights quantized with {made_by} (the tensor {name}), a format that octavo does "
                    "not read.",
                    hint=_HINT,
                )


def refuse_pointer(path: Path) -> None:
    """ModelError if the file is a Git LFS pointer, a few lines in place of the file in a clone without Git LFS."""
    try:
        if path.stat().st_size > MOST_POINTER_BYTES:
            return
        with path.open("rb") as file:
            pointer = file.read(len(LFS_HEADER)) == LFS_HEADER
    except OSError:
        return  # reading the file reports the error
    if pointer:
        raise ModelError(
            f"{path} is a Git LFS pointer, not the file itself.",
            hint="Run `git lfs pull` in the clone, or download the model with `hf download OWNER/NAME`.",
        )
