"""docs/families.md: a table of all families and what the tests show of each, written from the tests' results.

`pytest tests/models tests/families --families docs/families.md` writes it. A test with the mark `cell(column)` fills a
column, in the row of the family that its parameter `family` or `kernels` names. A cell is "yes" if all of its tests
passed. tests/conftest.py imports the hooks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

COLUMNS = {
    "logits": "Logits are those of transformers to 1e-5, also near position 2000.",
    "gradients": "Gradients of LoRA on all linears, of norms and of biases are those of transformers and PEFT to 1e-5.",
    "packed": "Documents packed into one row have the logits of each alone in transformers.",
    "cache": "A key/value cache that is filled in chunks gives the same logits.",
    "greedy": "Greedy decoding gives the tokens of `generate` of transformers.",
    "batched": "Requests served in one batch have the tokens and log-probabilities of each alone, bit for bit.",
    "schemes": "In none, int8, nf4, nf4-double and dynamic8, logits are those of transformers over the dequantized "
    "weights, to 1e-4.",
    "from PEFT": "An adapter that PEFT wrote has the logits of PEFT to 1e-4.",
    "to PEFT": "An adapter that octavo wrote has the same logits in PEFT to 1e-4.",
    "quantize": "A folder that `octavo quantize` wrote loads bit for bit like the original under int8 and nf4.",
    "evaluate": "The perplexity of `octavo evaluate` is that of transformers.",
    "plan": "`octavo plan` plans the training of a folder in every scheme without reading weights.",
    "ledger": "An adapter that lacks a tensor, has another one or has rows in another order is refused, and each "
    "listed module changes the logits.",
}
Cell = tuple[str, str]  # (family, column)
_results: dict[Cell, list[bool]] = defaultdict(list)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families", metavar="FILE", help="Write the table of all families from the results.")


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("cell"):
            assert mark.args[0] in COLUMNS, mark
            params = vars(item)["callspec"].params
            item.user_properties.append(("cell", (_family_of(params), mark.args[0])))


def _family_of(params: Mapping[str, str]) -> str:
    """The model type that a test is of: its parameter `family`, or that of its case in tests/models/families.py."""
    if "family" in params:
        return params["family"]
    from tests.models.families import CASES

    return str(CASES[params["kernels"]].model_type)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.failed:
        cells: list[Any] = [cell for name, cell in report.user_properties if name == "cell"]
        for family, column in cells:
            _results[family, column].append(report.passed)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--families")
    if path and not hasattr(session.config, "workerinput"):
        Path(path).write_text(document(_results), encoding="utf-8")


def rows() -> dict[str, str]:
    """The model types that octavo reads, each with its architecture in config.json."""
    from octavo.models import COMPOSITES, FAMILIES

    families = [(name, model_type) for name, (model_type, _) in (*FAMILIES.items(), *COMPOSITES.items())]
    return {model_type: name for name, model_type in families}


def document(results: Mapping[Cell, list[bool]]) -> str:
    """The text of docs/families.md."""
    count = sum(map(len, results.values()))
    names = "\n".join(f"| {name} | {text} |" for name, text in COLUMNS.items())
    head = f"| model_type | architecture | {' | '.join(COLUMNS)} |\n|---|---|{'---|' * len(COLUMNS)}"
    table = "\n".join(
        f"| {family} | {architecture} | {' | '.join(_shown(results.get((family, c))) for c in COLUMNS)} |"
        for family, architecture in rows().items()
    )
    return f"""# Families and what is tested of each

`pytest tests/models tests/families --families docs/families.md` wrote this page from the results of {count:,} tests, on
tiny random models in float32 on a CPU. "yes": all tests of the cell passed. `tests/families/test_table.py` fails if a
family or a column is missing, or a cell is not "yes". gemma3 and mistral3 are models of text and images, of which
octavo reads the text part.

{head}
{table}

| column | what the tests compare |
|---|---|
{names}

Rows in another order are recognized in adapters that octavo wrote, which carry a hash. In an adapter of another program
the order of the rows of a tensor cannot be checked: octavo takes that of transformers.
"""


def _shown(outcomes: list[bool] | None) -> str:
    return "yes" if outcomes and all(outcomes) else "no" if outcomes else "not tested"
