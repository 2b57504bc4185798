"""The options of `octavo tune` that no other command has."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from octavo.config.section import Numbers, Section


class TuneOptions(Section):
    """The settings to try, the time for it, and the output folder."""

    panel = "Search"

    minutes: float = Field(
        30.0, gt=0, le=1e6, description="Time for the whole search, loading of the model included; of all calls."
    )
    lr: Numbers = Field([1e-4, 3e-4, 1e-3, 3e-3], description="Peak learning rates to try, as 1e-4,3e-4.")
    rank: Numbers = Field([4.0, 16.0, 64.0], description="LoRA ranks to try, as 4,16,64; alpha is 2 times the rank.")
    report: Path | None = Field(None, description="Also write the cells and curves to this HTML file.")
    resume: bool = Field(False, description="Go on with the search in --out.")
    out: Path = Field(Path("runs/tune"), description="The folder of the search.")
