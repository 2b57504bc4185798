"""The model card of an adapter: origin, settings, use."""

from __future__ import annotations

from octavo._version import __version__
from octavo.config import Config, LoraOptions, TextOptions, TrainingData, TrainOptions


def model_card(config: Config, *, base: str, base_sha256: str, step: int) -> str:
    """README.md of an adapter folder, with the metadata block that the hub reads."""
    lora, training, text = config[LoraOptions], config[TrainOptions], config[TextOptions]
    data = config[TrainingData]
    return f"""---
base_model: {base}
library_name: peft
tags: [lora, octavo]
---

# LoRA adapter for {base}

Made by octavo {__version__}; the adapter of optimizer step {step}.

| setting | value |
|---|---|
| base weights, sha256 | `{base_sha256}` |
| rank, alpha, dropout | {lora.rank}, {lora.alpha:g}, {lora.dropout:g}{" (rsLoRA)" if lora.rslora else ""} |
| targets | {", ".join(lora.lora_targets)} |
| data | {", ".join(data.data)} |
| row length, batch size | {text.seq_len}, {training.batch_size} |
| learning rate, schedule | {training.lr:g}, {training.schedule} |
| seed | {training.seed} |

Use it with `octavo generate --model {base} --adapter THIS_FOLDER`, or with `peft.PeftModel.from_pretrained`.
"""
