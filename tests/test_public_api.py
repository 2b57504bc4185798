"""What `import octavo` offers, and what it costs."""

from __future__ import annotations

import subprocess
import sys

import octavo


def test_the_public_names_are_sorted_and_there() -> None:
    assert octavo.__all__ == sorted(octavo.__all__)
    assert all(hasattr(octavo, name) for name in octavo.__all__)


def test_every_error_a_user_may_see_is_public() -> None:
    from octavo import errors

    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert kinds == {name for name in octavo.__all__ if name.endswith("Error")}


def test_importing_octavo_loads_nothing_heavy() -> None:
    heavy = "torch", "transformers", "numpy", "pydantic", "rich"
    code = f"import sys, octavo; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "octavo", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{octavo.__version__}\n"
