"""The layout of the code, checked: who imports whom, how long things get, what `import octavo` costs.

All imports count: at the top, inside a function, under TYPE_CHECKING. The plan is in ARCHITECTURE.md; when
the code shows that the plan is wrong, both change together with the tables here.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "octavo"

LEVELS = {
    8: ("octavo", "__main__"),
    7: ("api", "cli", "exits", "flags", "server"),
    6: ("config", "commands", "harness"),
    5: ("train", "infer", "intervals", "metrics", "objective", "html_report", "tracking"),
    4: ("store", "runs", "adapters"),
    3: ("models",),
    2: ("layers", "fused"),
    1: ("ops", "kernels", "runtime", "data", "general_text"),
    0: (
        "errors",
        "atomic",
        "bounded_json",
        "failures",
        "hardware",
        "metrics_file",
        "reporting",
        "stopping",
        "streams",
        "system",
        "_version",
    ),
}
LEVEL_OF = {package: level for level, packages in LEVELS.items() for package in packages}

# Imports within a level. Every other one is an error, train <-> infer above all.
SIDEWAYS = {
    ("hardware", "errors"),
    ("hardware", "failures"),
    ("hardware", "system"),
    ("reporting", "streams"),
    ("reporting", "metrics_file"),
    ("reporting", "bounded_json"),
    ("metrics_file", "atomic"),
    ("metrics_file", "errors"),
    ("metrics_file", "failures"),
    ("atomic", "system"),
    ("failures", "errors"),
    ("bounded_json", "errors"),
    ("ops", "runtime"),
    ("runtime", "kernels"),
    ("kernels", "ops"),  # the constants of their references
    ("kernels", "runtime"),
    ("fused", "layers"),
    ("adapters", "store"),
    ("runs", "store"),
    ("train", "objective"),
    ("metrics", "objective"),
    ("metrics", "intervals"),
    ("commands", "config"),
    ("commands", "harness"),
    ("harness", "config"),
    ("api", "server"),
    ("cli", "exits"),
    ("flags", "exits"),
    ("cli", "flags"),
    ("cli", "server"),
}

# Who alone may import a package, and what alone a package may import. Narrower than the levels say.
ONLY_IMPORTED_BY = {
    "config": {"api", "cli", "flags", "server", "commands", "harness"},
    "kernels": {"runtime"},
    "tracking": {"commands"},
}
ONLY_IMPORTS = {
    "cli": {
        "commands",
        "config",
        "exits",
        "flags",
        "errors",
        "reporting",
        "server",
        "stopping",
        "streams",
        "system",
        "_version",
    }
}

# A family's file reads like its paper: it does not import how matrices are stored or adapted. Inference reads no files:
# commands and the server pass it models and adapters.
FORBIDDEN = {
    "models": ("octavo.data", "octavo.layers.lora", "octavo.ops.quantize", "octavo.ops.scheme"),
    "infer": ("octavo.store",),
}

LONGEST_FUNCTION = 65
LONGEST_FILE = 400


@dataclass(frozen=True)
class Arrow:
    """Module `source` imports module `target` in one line of its file; lazy: inside a function."""

    source: str
    target: str
    line: int
    lazy: bool

    def __str__(self) -> str:
        return f"{self.source}:{self.line} -> {self.target}"


def modules(package: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join((package.name, *(part for part in parts if part != "__init__")))] = path
    return found


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def arrows(package: Path) -> list[Arrow]:
    """Every import of one of the package's own modules by another."""
    known = modules(package)
    found = []
    for source, path in known.items():
        for node, lazy in _walk(ast.parse(path.read_text("utf-8")), lazy=False):
            for name in _imported_names(node, source, is_package=path.name == "__init__.py"):
                target = _deepest(name, known)
                if target and target != source:
                    found.append(Arrow(source, target, getattr(node, "lineno", 0), lazy))
    return found


def _walk(node: ast.AST, *, lazy: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, lazy
        yield from _walk(child, lazy=lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def _imported_names(node: ast.AST, source: str, *, is_package: bool) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        around = source.split(".")
        kept = len(around) - node.level + is_package
        prefix = [*(around[:kept] if node.level else []), *([node.module] if node.module else [])]
        return [".".join([*prefix, alias.name]) for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
        return [name for arg in node.args if (name := _constant_start(arg))]
    return []


def _constant_start(node: ast.AST) -> str:
    """The string of a node, or of an f-string the text before its first value: "octavo.kernels." in dispatch.py."""
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _deepest(name: str, known: dict[str, Path]) -> str:
    """The module that `name` is or is taken from; "" when it is not the package's own."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def fault(arrow: Arrow) -> str:
    """What is wrong with an arrow, or ""."""
    source, target = package_of(arrow.source), package_of(arrow.target)
    for name in (source, target):
        if name not in LEVEL_OF:
            return f"{arrow}: {name} is on no level: give it one in LEVELS"
    if any(arrow.target == name or arrow.target.startswith(f"{name}.") for name in FORBIDDEN.get(source, ())):
        return f"{arrow}: {source} must not import {arrow.target}"
    if source == target:
        return ""
    if LEVEL_OF[source] < LEVEL_OF[target]:
        return f"{arrow}: imports upward, from level {LEVEL_OF[source]} to level {LEVEL_OF[target]}"
    if LEVEL_OF[source] == LEVEL_OF[target] and (source, target) not in SIDEWAYS:
        return f"{arrow}: imports sideways on level {LEVEL_OF[source]}"
    if source not in ONLY_IMPORTED_BY.get(target, {source}):
        return f"{arrow}: {target} is only for {sorted(ONLY_IMPORTED_BY[target])}"
    if target not in ONLY_IMPORTS.get(source, {target}):
        return f"{arrow}: {source} imports only {sorted(ONLY_IMPORTS[source])}"
    if target == "kernels" and not arrow.lazy:
        return f"{arrow}: kernels can be deleted, so they are imported inside a function"
    return ""


def faults(package: Path) -> list[str]:
    return [found for arrow in arrows(package) if (found := fault(arrow))]


def circle(package: Path) -> str:
    """One circle of imports as "a -> b -> a", or ""."""
    graph: dict[str, set[str]] = {}
    for arrow in arrows(package):
        graph.setdefault(arrow.source, set()).add(arrow.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " -> ".join(reversed(error.args[1]))
    return ""


def too_long(package: Path) -> list[str]:
    found = []
    for module, path in modules(package).items():
        text = path.read_text("utf-8")
        if (lines := len(text.splitlines())) > LONGEST_FILE:
            found.append(f"{module}: {lines} lines, at most {LONGEST_FILE}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    found.append(f"{module}.{node.name}: {lines} lines, at most {LONGEST_FUNCTION}")
    return found


def test_every_import_goes_down() -> None:
    assert arrows(PACKAGE)
    assert faults(PACKAGE) == []


def test_every_exception_to_the_levels_is_used() -> None:
    imports = {(package_of(arrow.source), package_of(arrow.target)) for arrow in arrows(PACKAGE)}
    importers = {(source, target) for target, sources in ONLY_IMPORTED_BY.items() for source in sources}
    imported = {(source, target) for source, targets in ONLY_IMPORTS.items() for target in targets}
    assert sorted((SIDEWAYS | importers | imported) - imports) == []


def test_every_file_has_a_level() -> None:
    assert {package_of(module) for module in modules(PACKAGE)} <= LEVEL_OF.keys()


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circle(PACKAGE) == ""


def test_functions_and_files_stay_readable() -> None:
    assert too_long(PACKAGE) == []


# What PyTorch says of a GPU, and where it is asked. Elsewhere choices read octavo.hardware.Capabilities.
ASKS_PYTORCH = (
    "get_device_capability", "get_device_name", "get_device_properties", "multi_processor_count", "version.hip",
)  # fmt: skip
MAY_ASK = {"octavo.hardware.capabilities"}
# `is_cuda` may decide about streams and pinned memory, which are CUDA's and not a GPU's.
MAY_READ_IS_CUDA = {"octavo.runtime.offload"}


def asks(package: Path) -> list[str]:
    """Modules that ask PyTorch what a device is."""
    found = []
    for module, path in modules(package).items():
        nodes = ast.walk(ast.parse(path.read_text("utf-8")))
        names = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
        if module not in MAY_ASK:
            found += [f"{module}: {name}" for name in sorted(names) if name.endswith(ASKS_PYTORCH)]
        if module not in MAY_READ_IS_CUDA:
            found += [f"{module}: {name}" for name in sorted(names) if name.endswith(".is_cuda")]
    return found


def test_devices_are_data() -> None:
    assert asks(PACKAGE) == []


def test_a_file_that_asks_pytorch_what_a_gpu_is_is_named(tmp_path: Path) -> None:
    package = package_with(tmp_path, {"ops/loss.py": "x.is_cuda\ntorch.cuda.get_device_capability(0)[0]"})
    assert asks(package) == ["octavo.ops.loss: torch.cuda.get_device_capability", "octavo.ops.loss: x.is_cuda"]


LIGHT = ("octavo", "octavo.cli", "octavo.hardware", "octavo.html_report", "octavo.runs.events", "octavo.runs.folder")


@pytest.mark.parametrize("module", LIGHT)
def test_importing_loads_neither_torch_nor_transformers(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'torch', 'transformers', 'numpy'}} & sys.modules.keys()))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []


def package_with(folder: Path, files: dict[str, str]) -> Path:
    """A package named octavo that holds `files`, path -> text, and an empty file for every other package."""
    package = folder / "octavo"
    package.mkdir()
    for name, text in files.items():
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).parent.joinpath("__init__.py").touch()
        (package / name).write_text(text)
    for name in LEVEL_OF.keys() - {"octavo"}:
        if not (package / name).is_dir():
            (package / f"{name}.py").touch()
    return package


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("ops/loss.py", "import octavo.layers", "octavo.ops.loss:1 -> octavo.layers: imports upward"),
        ("ops.py", "\nfrom octavo.layers import x", "octavo.ops:2 -> octavo.layers: imports upward"),
        ("errors.py", "from octavo import reporting", "octavo.errors:1 -> octavo.reporting: imports sideways"),
        ("errors.py", "from octavo import __version__", "octavo.errors:1 -> octavo: imports upward"),
        ("train/loop.py", "from ..infer import x", "octavo.train.loop:1 -> octavo.infer: imports sideways"),
        ("train/__init__.py", "from .. import infer", "octavo.train:1 -> octavo.infer: imports sideways"),
        ("infer.py", "def f():\n    import octavo.train", "octavo.infer:2 -> octavo.train: imports sideways"),
        (
            "store.py",
            "if TYPE_CHECKING:\n    from octavo import commands",
            "octavo.store:2 -> octavo.commands: imports upward",
        ),
        ("data.py", "import_module('octavo.models')", "octavo.data:1 -> octavo.models: imports upward"),
        (
            "exits.py",
            "import octavo.config",
            "config is only for ['api', 'cli', 'commands', 'flags', 'harness', 'server']",
        ),
        ("cli.py", "import octavo.train", "cli imports only"),
        ("layers.py", "def f():\n    import octavo.kernels", "kernels is only for ['runtime']"),
        ("runtime.py", "from octavo.kernels import linear", "imported inside a function"),
        ("runtime.py", "import_module(f'octavo.kernels.{name}')", "imported inside a function"),
        ("models.py", "import octavo.data", "models must not import octavo.data"),
        ("infer/engine.py", "from octavo.store import peft", "infer must not import octavo.store"),
        ("helpers.py", "import octavo.errors", "helpers is on no level"),
    ],
)
def test_a_forbidden_arrow_is_named(tmp_path: Path, file: str, text: str, told: str) -> None:
    found = faults(package_with(tmp_path, {file: text}))
    assert len(found) == 1
    assert told in found[0]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("commands.py", "import octavo.train, octavo.infer, octavo.config, octavo.errors, torch"),
        ("runtime.py", "def f():\n    from octavo.kernels import linear"),
        ("train/loop.py", "from octavo.train.optim import x\nfrom .optim import y\nfrom octavo.ops import z"),
        ("__init__.py", "def f():\n    from octavo.commands.loading import finetune"),
        ("models.py", "from octavo.layers.kv_cache import Cache"),
    ],
)
def test_an_arrow_of_the_plan_is_not_a_fault(tmp_path: Path, file: str, text: str) -> None:
    package = package_with(tmp_path, {file: text, "train/optim.py": "", "layers/kv_cache.py": ""})
    assert arrows(package)
    assert faults(package) == []


def test_a_circle_is_named_even_when_half_of_it_is_lazy(tmp_path: Path) -> None:
    package = package_with(
        tmp_path,
        {
            "train/a.py": "from octavo.train import b",
            "train/b.py": "def f():\n    from octavo.train.a import x",
        },
    )
    assert circle(package) in {
        "octavo.train.a -> octavo.train.b -> octavo.train.a",
        "octavo.train.b -> octavo.train.a -> octavo.train.b",
    }


def test_a_function_and_a_file_one_line_too_long_are_named(tmp_path: Path) -> None:
    def function(lines: int) -> str:
        return "def f():\n" + "    pass\n" * (lines - 1)

    fits = {"ops.py": function(LONGEST_FUNCTION), "data.py": "\n" * LONGEST_FILE}
    assert too_long(package_with(tmp_path, fits)) == []
    (tmp_path / "octavo" / "ops.py").write_text(function(LONGEST_FUNCTION + 1))
    (tmp_path / "octavo" / "data.py").write_text("\n" * (LONGEST_FILE + 1))
    assert too_long(tmp_path / "octavo") == [
        f"octavo.data: {LONGEST_FILE + 1} lines, at most {LONGEST_FILE}",
        f"octavo.ops.f: {LONGEST_FUNCTION + 1} lines, at most {LONGEST_FUNCTION}",
    ]
