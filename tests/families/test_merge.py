"""Merged folders of every family: the logits of PEFT's merge_and_unload, and of octavo with the adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.families.adapters import with_octavo, with_peft
from tests.families.models import Family, each_family, logits
from transformers import AutoModelForCausalLM

from octavo.adapters import AdapterPlan
from octavo.adapters.merging import merged
from octavo.layers.lora import LoraSpec
from octavo.models import Decoder
from octavo.ops.quantize import scheme_named
from octavo.store.hf_folder import write_folder
from octavo.store.peft import read
from octavo.store.sources import FolderSource
from octavo.store.weights import load

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),  # peft 0.21
]
TOLERANCE = 1e-4  # of float32 logits of about 10
NORMS = AdapterPlan(LoraSpec(rank=4, alpha=6.0), norms=True)


def write(family: Family, adapter: Path, out: Path) -> Path:
    write_folder(merged(FolderSource(family.folder), read(adapter)), out, scheme_named("none"))
    return out


def loaded(folder: Path) -> Decoder:
    return load(FolderSource(folder), scheme_named("none"), dtype=torch.float32, device=torch.device("cpu"))


@each_family
def test_the_logits_are_those_of_pefts_merge(family: Family, tmp_path: Path) -> None:
    model = with_peft(family, tmp_path / "adapter")
    write(family, tmp_path / "adapter", tmp_path / "out")
    expected = logits(model.merge_and_unload())
    # Soft-capped scores (Gemma 2) need eager attention, which config.json does not name.
    attention = family.theirs.config._attn_implementation
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation=attention)
    assert (expected - logits(family.theirs)).abs().max() > 0.1
    assert (logits(theirs) - expected).abs().max() <= TOLERANCE
    assert (logits(loaded(tmp_path / "out")) - expected).abs().max() <= TOLERANCE


@each_family
def test_the_logits_are_those_of_octavo_with_the_adapter_and_its_norms(family: Family, tmp_path: Path) -> None:
    expected = logits(with_octavo(family, tmp_path / "adapter", NORMS))
    actual = logits(loaded(write(family, tmp_path / "adapter", tmp_path / "out")))
    assert (actual - expected).abs().max() <= TOLERANCE
