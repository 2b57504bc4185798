"""Commands on a folder of every family: quantize, evaluate and plan."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import Octavo
from tests.families.models import Family, each_family, logits

from octavo.models import weight_entries
from octavo.ops.quantize import SCHEMES, scheme_named
from octavo.store.sources import FolderSource
from octavo.store.weights import load

LINE = "the king spoke to the queen of the storm"


@pytest.mark.cell("quantize")
@each_family
def test_a_quantized_folder_loads_like_the_original_under_the_scheme(
    family: Family, tmp_path: Path, octavo: Octavo
) -> None:
    for scheme in ("int8", "nf4"):
        done = octavo("quantize", "--model", family.folder, "--scheme", scheme, "--out", tmp_path / scheme)
        assert done.code == 0, done.err
        source = FolderSource(tmp_path / scheme)
        model = load(source, scheme_named(scheme), dtype=torch.float32, device=torch.device("cpu"))
        assert torch.equal(logits(model), logits(family.ours(scheme)))
        matrices = [entry.matrix for entry in weight_entries(model).values() if entry.matrix is not None]
        assert scheme in {matrix.scheme.name for matrix in matrices}


@pytest.mark.cell("evaluate")
@each_family
def test_the_perplexity_is_that_of_transformers(family: Family, tmp_path: Path, octavo: Octavo) -> None:
    (tmp_path / "text.txt").write_text(LINE)
    options = ("--model", family.folder, "--scheme", "none", "--dtype", "float32", "--device", "cpu", "--json")
    done = octavo("evaluate", *options, tmp_path / "text.txt")
    assert done.code == 0, done.err
    [row] = done.json["rows"]
    ids = torch.tensor([[*family.tokenizer.encode(LINE), family.tokenizer.eos_token_id]])
    if row["tokens"] == ids.shape[1]:  # the first token is predicted too, from the BOS token
        ids = torch.cat([torch.tensor([[family.tokenizer.bos_token_id]]), ids], dim=1)
    loss = F.cross_entropy(logits(family.theirs, ids)[0, :-1], ids[0, 1:])
    assert row["tokens"] == ids.shape[1] - 1
    assert math.log(row["perplexity"]) == pytest.approx(float(loss), abs=1e-4)


@pytest.mark.cell("plan")
@each_family
def test_a_run_is_planned_in_every_scheme(family: Family, octavo: Octavo) -> None:
    """`octavo plan` reads config.json and the header of the weight file alone."""
    options = ("--model", family.folder, "--seq-len", 32, "--gpu-memory", "4GiB", "--json")
    peaks = {}
    for scheme in SCHEMES:
        done = octavo("plan", *options, "--scheme", scheme)
        assert done.code == 0, done.err
        [row] = done.json["plans"]
        assert (row["scheme"], row["fits"]) == (scheme, True)
        peaks[scheme] = row["peak_bytes"]
    assert 0 < peaks["nf4"] < peaks["int8"] < peaks["none"]  # the matrices are too small for the others to differ
