"""Merges an adapter into its base: W' = W + scaling B A, as a source of weights (store/merged.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from octavo.adapters.matching import check_shapes, matched
from octavo.models import build
from octavo.store.merged import MergedSource
from octavo.store.peft import Adapter
from octavo.store.sources import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def merged(
    source: Source,
    adapter: Adapter,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> MergedSource:
    """`source` with `adapter` merged, in `dtype`. Weights are read and merged when its tensors are.

    `tokenizer` replaces that of the source. AdapterError, as of `apply_`, if the adapter does not fit the source.
    """
    entries, adapter = matched(build(source.config), adapter)
    merged = MergedSource(source, adapter, dtype, tokenizer)
    check_shapes(entries, adapter, vocabulary=merged.vocabulary)
    merged.check()
    return merged
