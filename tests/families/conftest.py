"""The families' models, each made once."""

from __future__ import annotations

import pytest
from tests.families.models import Family, write_family


@pytest.fixture(scope="session")
def made_families() -> dict[str, Family]:
    return {}


@pytest.fixture
def family(
    request: pytest.FixtureRequest, made_families: dict[str, Family], tmp_path_factory: pytest.TempPathFactory
) -> Family:
    """The model of a family, which no test changes."""
    name = request.param
    if name not in made_families:
        made_families[name] = write_family(name, tmp_path_factory.mktemp("families") / name)
    return made_families[name]
