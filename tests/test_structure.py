"""Imports run one way, so that the pipeline can be read from front to back."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from sniffer.storage.layout import RunFolder, SweepFolder

ROOT = Path(__file__).resolve().parents[1]

STORY = ["types", "sampler", "dataset", "forward", "storage", "reader", "engine", "capture", "runs", "sweep", "cli"]
"""A room may use those before it in this list, never one after it."""

MODULES, ARROWS, LINES = 12, 110, 300
"""At most: files beside the packages of sniffer/, rooms that use one another, lines of a file."""

HEAVY = ("torch", "transformers", "datasets")


def imports(file: Path) -> set[str]:
    """The dotted names a file imports, inside functions too, but not those for type checkers only."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            home = ".".join(filter(None, (package_of(file, node.level), node.module)))
            found |= {home, *(f"{home}.{alias.name}" for alias in node.names)}
    # models/ and experiments/ are parts of the package under these names.
    return {re.sub(r"^sniffer\.(?=(models|experiments)\b)", "", name) for name in found}


def package_of(file: Path, level: int) -> str:
    """What an import with so many dots counts from."""
    return ".".join(file.relative_to(ROOT).parts[:-level]) if level else ""


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def graph(package: str) -> dict[str, set[str]]:
    """Each module of a package with the modules of the package that it imports."""
    files = {module_name(file): file for file in (ROOT / package).rglob("*.py")}
    return {name: (imports(file) & files.keys()) - {name, package} for name, file in files.items()}


@pytest.mark.parametrize("package", ["sniffer", "models", "experiments", "benchmarks"])
def test_no_package_imports_in_circles(package: str):
    assert list(TopologicalSorter(graph(package)).static_order())


def rooms() -> dict[str, set[str]]:
    """The packages and files at the top of sniffer/, each with those that it uses."""
    found: dict[str, set[str]] = {}
    for name, used in graph("sniffer").items():
        found.setdefault(room_of(name), set()).update(map(room_of, used))
    return {name: used - {name} for name, used in found.items()}


def room_of(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def test_rooms_use_one_another_one_way():
    plan = rooms()
    order = list(TopologicalSorter(plan).static_order())
    for place, name in enumerate(STORY):
        assert not reachable(plan, name) & set(STORY[place + 1 :])
    arrows = sum(map(len, plan.values()))
    print(f"{len(plan)} rooms, {arrows} arrows: {', '.join(order)}")
    assert arrows <= ARROWS


def reachable(plan: dict[str, set[str]], name: str) -> set[str]:
    return plan[name].union(*(reachable(plan, other) for other in plan[name]))


def test_the_house_can_be_seen_at_a_glance():
    assert len(list((ROOT / "sniffer").glob("*.py"))) <= MODULES
    long = {
        file.relative_to(ROOT).as_posix(): lines
        for package in ("sniffer", "models", "experiments")
        for file in (ROOT / package).rglob("*.py")
        if (lines := len(file.read_text(encoding="utf-8").splitlines())) > LINES
    }
    assert not long


def test_every_room_says_what_it_is():
    for package in (ROOT / "sniffer").glob("*/__init__.py"):
        assert ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))), package


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("sniffer", {"sniffer"}),
        ("models", {"models", "sniffer.tap", "sniffer.types", "sniffer.errors"}),
        ("experiments", {"experiments", "sniffer", "models"}),
    ],
)
def test_packages_import_only_what_lies_below_them(package: str, allowed: set[str]):
    ours = ("sniffer", "models", "experiments", "benchmarks", "tests")
    for file in (ROOT / package).rglob("*.py"):
        for name in imports(file):
            if name.split(".")[0] in ours:
                fits = any(name == base or name.startswith(f"{base}.") for base in allowed)
                assert fits or name == "sniffer", f"{file.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize(
    "module", ["sniffer", "sniffer.__main__", "sniffer.config.resolve", "sniffer.reader.run", "sniffer.models.backbone"]
)
def test_light_modules_do_not_import_torch(module: str):
    check = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_entry_alone_has_what_hydra_composed():
    """Past it, a configuration is typed. And no file borrows its tools from those of tests."""
    entry = {"config", "cli", "sweep.callback"}
    for package in ("sniffer", "models", "experiments"):
        for file in (ROOT / package).rglob("*.py"):
            found = imports(file)
            inside = ".".join(file.relative_to(ROOT / package).with_suffix("").parts)
            if not any(inside == name or inside.startswith(f"{name}.") for name in entry):
                assert "omegaconf.DictConfig" not in found, file
            assert not any(name.startswith("unittest") for name in found), file


def test_names_of_files_are_spelled_in_one_place():
    """`storage/layout.py`; where a sentence names a file to a reader, it may."""
    names = {
        value
        for folder in (RunFolder, SweepFolder)
        for name, given in vars(folder).items()
        for value in (given if isinstance(given, tuple) else (given,))
        if name.isupper() and isinstance(value, str) and ("." in value or value == "captures")
    } - {RunFolder.CARD}  # so is the card of anyone's dataset
    assert len(names) > 15
    spelled = {
        (file.relative_to(ROOT).as_posix(), node.value)
        for file in (ROOT / "sniffer").rglob("*.py")
        if file != ROOT / "sniffer/storage/layout.py"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert not spelled
