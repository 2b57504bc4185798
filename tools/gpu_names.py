"""Writes the names of GPUs into docs/memory-and-planning.md: `python tools/gpu_names.py`.

`tests/docs/test_gpu_names.py` compares the page with the tables of the code.
"""

from __future__ import annotations

import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "memory-and-planning.md"
BEGIN, END = "<!-- gpu names: written by tools/gpu_names.py -->\n", "\n<!-- end of gpu names -->"
HEAD = "| compute capability | `octavo plan --gpu` | `--pretend` |\n|---|---|---|\n"


def table() -> str:
    """The names that `--gpu` and `--pretend` have, by compute capability, the newest first."""
    from octavo.hardware import GPUS
    from octavo.hardware.pretend import MODELS

    lines = []
    for capability in sorted({row.compute_capability for row in GPUS.values()}, reverse=True):
        known = [name for name, row in GPUS.items() if row.compute_capability == capability]
        pretended = [name for name, model in MODELS.items() if model.compute_capability == capability]
        lines.append(f"| {capability[0]}.{capability[1]} | {', '.join(known)} | {', '.join(pretended) or '-'} |")
    return HEAD + "\n".join(lines)


def with_table(page: str) -> str:
    """The page with the current table between its markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, "no table of names"
    assert end, "no end of the table of names"
    return before + begin + table() + end + after


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
