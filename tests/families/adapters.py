"""Adapters of a family's model, written by PEFT and by octavo, with strong random values."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tests.families.models import Family

from octavo.adapters import AdapterPlan, create_, save, trained
from octavo.layers.lora import LoraSpec
from octavo.models import Decoder

TENSORS = "adapter_model.safetensors"
OTHER_PARTS = ".*(vision_tower|multi_modal_projector).*"
PLAN = AdapterPlan(LoraSpec(rank=4, alpha=6.0))


def shake_(parameters: Iterable[torch.nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def with_peft(family: Family, folder: Path, **options: Any) -> Any:
    """The model of transformers with LoRA of PEFT on all linears, saved into `folder`."""
    excluded = OTHER_PARTS if hasattr(family.theirs.config, "text_config") else None
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "exclude_modules": excluded} | options
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(family.theirs), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    shake_(parameter for parameter in model.parameters() if parameter.requires_grad)
    model.save_pretrained(folder)
    return model


def with_octavo(family: Family, folder: Path, plan: AdapterPlan = PLAN) -> Decoder:
    """octavo's model with an adapter, saved into `folder`."""
    model = family.ours()
    create_(model, plan, seed=0)
    shake_(trained(model).values())
    save(folder, model, plan, base=str(family.folder), origin={}, readme="")
    return model
