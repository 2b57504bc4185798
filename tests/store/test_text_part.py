"""A composite model as `octavo quantize --scheme none` writes it: its text part alone, complete in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families.models import CONFIGS, LAYERS, SHAPE, logits
from tests.infer.conftest import _write_model
from tests.models.families import GROWTH, YARN, composite
from transformers import AutoModelForCausalLM, Gemma3Config, Mistral3Config

from octavo.ops.quantize import scheme_named
from octavo.store.hf_folder import write_folder
from octavo.store.sources import FolderSource
from octavo.store.weights import load

WINDOWS: dict[str, Any] = {**SHAPE, **LAYERS}
COMPOSITES: dict[str, tuple[Any, str, str]] = {
    "gemma3": (CONFIGS["gemma3"], "gemma3_text", "Gemma3ForCausalLM"),
    "gemma3, tied, soft-cap of the text part": (
        composite(
            Gemma3Config, "siglip_vision_model", model_type="gemma3_text", query_pre_attn_scalar=16, head_dim=16,
            final_logit_softcapping=1.0, **WINDOWS,
        ),
        "gemma3_text",
        "Gemma3ForCausalLM",
    ),
    "mistral3, own head": (CONFIGS["mistral3"], "mistral", "MistralForCausalLM"),
    "mistral3 of ministral3": (
        composite(
            Mistral3Config, "pixtral", model_type="ministral3", head_dim=16, rope_parameters=YARN | GROWTH, **SHAPE
        ),
        "ministral3",
        "Ministral3ForCausalLM",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPOSITES)
@pytest.mark.parametrize("first", ["none", "int8"])
def test_a_plain_folder_of_a_composite_model_is_a_complete_text_model(case: str, first: str, tmp_path: Path) -> None:
    config, model_type, architecture = COMPOSITES[case]
    config.eos_token_id = 7  # in the config of the whole model alone
    theirs, tokenizer = _write_model(tmp_path / "whole", config)
    tokenizer.save_pretrained(tmp_path / "whole")
    source = FolderSource(tmp_path / "whole")
    if first != "none":
        write_folder(source, tmp_path / first, scheme_named(first))
        assert json.loads((tmp_path / first / "config.json").read_text())["model_type"] == config.model_type
        source = FolderSource(tmp_path / first)
    write_folder(source, tmp_path / "plain", scheme_named("none"))

    written = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert (written["model_type"], written["architectures"], written["eos_token_id"]) == (model_type, [architecture], 7)
    plain, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info  # no missing, unexpected or mismatched keys
    ours = load(FolderSource(tmp_path / "plain"), scheme_named("none"), dtype=torch.float32, device=torch.device("cpu"))
    torch.testing.assert_close(logits(plain), logits(ours), rtol=0, atol=1e-5)
    if first == "none":
        torch.testing.assert_close(logits(plain), logits(theirs), rtol=0, atol=1e-5)
