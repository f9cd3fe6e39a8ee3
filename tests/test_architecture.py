"""The shape of the house, held by tests: who may know whom, how large a room may be, what a door names."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "penstock"

# errors ← place ← flow ← {files, net, events, train} ← cli; testing stands beside: it may look at everything but cli.
RANKS = {"errors": 0, "place": 1, "flow": 2, "files": 3, "net": 3, "events": 3, "train": 3, "cli": 4, "testing": 4}

# The command `penstock torture` is the one module of the house that may open the testing room.
MAY_IMPORT_TESTING = {"penstock.cli.torture"}

# The suffix table is the one reference upward, as strings 'module:function' that are imported on use.
NAMES_UPWARD_IN_STRINGS = {"penstock.flow.contract", "penstock"}

LIGHT = ("aiohttp", "apsw", "cloudpickle", "numba", "numpy", "pyarrow", "rich", "typer", "uvloop")


@dataclass(frozen=True)
class Import:
    """One import of one module of penstock: ``typing_only`` if it stands under ``if TYPE_CHECKING:``."""

    target: str
    line: int
    typing_only: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}
MODULES = sorted(FILES)


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"), filename=str(FILES[module]))


def is_typing_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_under(node: ast.AST, typing_only: bool = False) -> Iterator[Import]:
    """Every import of penstock, those inside functions too."""
    for child in ast.iter_child_nodes(node):
        guarded = typing_only
        if isinstance(node, ast.If) and is_typing_guard(node):
            guarded = typing_only or child in node.body
        if isinstance(child, ast.Import):
            for alias in child.names:
                if alias.name.split(".")[0] == "penstock":
                    yield Import(alias.name, child.lineno, guarded)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: imports name their module in full"
            if child.module and child.module.split(".")[0] == "penstock":
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    yield Import(whole if whole in FILES else child.module, child.lineno, guarded)
        else:
            yield from imports_under(child, guarded)


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    return tuple(imports_under(tree_of(module)))


def room_of(module: str) -> str:
    """The part of the house a module belongs to: 'flow' for penstock.flow.run; '' for the front door."""
    return module.split(".")[1] if "." in module else ""


def front_door_names(module: str) -> list[str]:
    """What a module takes through the front door, beside where the house stands and what version it is."""
    tree = tree_of(module)
    names = [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "penstock"
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "penstock":
            names += [alias.name for alias in node.names if f"penstock.{alias.name}" not in FILES]
    return [name for name in names if not name.startswith("__")]


@pytest.mark.parametrize("module", MODULES)
def test_arrows_run_one_way(module: str) -> None:
    room = room_of(module)
    if not room:
        return  # the front door names every room, and opens none before it is asked (test_importing_is_light)
    for one in imports_of(module):
        other = room_of(one.target)
        where = f"{FILES[module].relative_to(ROOT)}, line {one.line}: {module} imports {one.target}"
        if not other:
            names = front_door_names(module)
            assert not names, f"{where} and uses {names}: import from the module that defines a name"
            continue
        if other == room:
            continue
        if other == "testing":
            assert module in MAY_IMPORT_TESTING, f"{where}: only tests, users and torture import testing"
            continue
        assert RANKS[other] < RANKS[room], f"{where}: {other} doesn't stand below {room}"


@pytest.mark.parametrize("module", [name for name in MODULES if name not in NAMES_UPWARD_IN_STRINGS])
def test_no_module_is_imported_by_a_hidden_string(module: str) -> None:
    """A string like 'penstock.files.write:jsonl' is an arrow too; one table may hold such."""
    room = room_of(module)
    for node in ast.walk(tree_of(module)):
        if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            continue
        named = re.fullmatch(r"penstock\.(\w+)[\w.]*(:\w+)?", node.value)
        if named and named[1] in RANKS and named[1] != room:
            below = RANKS[named[1]] < RANKS[room]
            assert below, f"{module}, line {node.lineno}: {node.value!r} reaches up"


def test_no_import_cycles() -> None:
    graph = {
        module: {one.target for one in imports_of(module) if not one.typing_only and one.target in FILES}
        for module in MODULES
        if module != "penstock"
    }
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            pytest.fail("import cycle: " + " → ".join([*path[path.index(module) :], module]))
        if module in done:
            return
        for target in sorted(graph.get(module, ())):
            visit(target, [*path, module])
        done.add(module)

    for module in graph:
        visit(module, [])


@pytest.mark.parametrize("module", MODULES)
def test_no_file_over_500_lines(module: str) -> None:
    lines = len(FILES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= 500, f"{module} has {lines} lines: one idea a file"


@pytest.mark.parametrize("module", MODULES)
def test_modules_carry_no_underscore(module: str) -> None:
    dunder = {"__init__", "__main__"}
    for part in FILES[module].relative_to(SOURCE).with_suffix("").parts:
        assert part in dunder or "_" not in part, f"{module}: what is private inside a module has an underscore"


NOTATION = ("TypeVar", "TypeVarTuple", "ParamSpec", "getLogger")


def defined_names(tree: ast.Module) -> set[str]:
    """The public names a module defines itself; type variables and loggers are notation, not names to use."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            if isinstance(node.value, ast.Call) and ast.unparse(node.value.func).endswith(NOTATION):
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                parts = target.elts if isinstance(target, ast.Tuple) else [target]
                names.update(part.id for part in parts if isinstance(part, ast.Name))
    return {name for name in names if not name.startswith("_")}


def load(module: str) -> ModuleType:
    if module.endswith("__main__"):
        pytest.fail("a __main__ module has no names to check")
    return importlib.import_module(module)


@pytest.mark.parametrize("module", [name for name in MODULES if name != "penstock"])
def test_all_is_exact(module: str) -> None:
    tree = tree_of(module)
    defined = defined_names(tree)
    lists = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == "__all__" for target in node.targets)
    ]
    if not lists:
        assert not defined, f"{module} defines {sorted(defined)} and has no __all__"
        return
    listed = lists[0]
    missing, strange = defined - set(listed), set(listed) - defined
    if FILES[module].name == "__init__.py":
        strange = set()  # a package's door may pass on what its rooms define
    assert not missing, f"{module}: public, but not in __all__: {sorted(missing)}"
    assert not strange, f"{module}: in __all__, but not defined there: {sorted(strange)}"


def test_the_front_door_is_exact() -> None:
    import penstock

    listed = set(penstock.__all__)
    assert listed == {*penstock._HOMES, "__version__"}
    guarded = {
        alias.asname or alias.name
        for node in tree_of("penstock").body
        if is_typing_guard(node)
        for inner in ast.walk(node)
        if isinstance(inner, ast.ImportFrom)
        for alias in inner.names
    }
    assert guarded == set(penstock._HOMES), "what type checkers see is what there is"
    for name in listed:
        assert getattr(penstock, name) is not None
    assert dir(penstock) == sorted(listed)
    with pytest.raises(AttributeError, match="no attribute 'flows'"):
        penstock.flows  # noqa: B018  # the access is what is tested


def public_objects() -> Iterator[tuple[str, object]]:
    """Every public name a user can reach, with the public methods of its classes."""
    import penstock

    for name in penstock.__all__:
        found = getattr(penstock, name)
        if name.startswith("_"):
            continue
        yield name, found
        if isinstance(found, ModuleType):
            for inner in found.__all__:
                yield f"{name}.{inner}", getattr(found, inner)


PUBLIC = dict(public_objects())


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_is_documented(name: str) -> None:
    found = PUBLIC[name]
    if not (inspect.isclass(found) or inspect.isroutine(found) or isinstance(found, ModuleType)):
        return  # a constant's text stands below it, where no program sees it
    assert (inspect.getdoc(found) or "").strip(), f"{name} has no docstring"
    if not inspect.isclass(found):
        return
    for attribute, value in vars(found).items():
        if attribute.startswith("_") or not (inspect.isroutine(value) or isinstance(value, property)):
            continue
        assert (inspect.getdoc(getattr(found, attribute)) or "").strip(), f"{name}.{attribute} has no docstring"


@pytest.mark.parametrize("name", sorted(name for name in PUBLIC if not name.startswith("errors.")))
def test_every_public_name_is_in_the_docs(name: str) -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    assert re.search(rf"\b{re.escape(name)}\b", text), f"{name} stands neither in README.md nor in docs/"


def test_a_package_is_never_named_like_a_public_function() -> None:
    packages = {path.parent.name for path in SOURCE.rglob("__init__.py") if path.parent != SOURCE}
    functions = {name for name, found in PUBLIC.items() if inspect.isroutine(found)}
    assert not packages & functions


def test_importing_is_light() -> None:
    """``import penstock`` opens no room and loads nothing optional; a Flow may be described without them too."""
    code = (
        "import sys, penstock as ps\n"
        "assert not [m for m in sys.modules if m.startswith('penstock.')], 'a room is open'\n"
        "ps.Flow, ps.Failed, ps.errors, ps.per_worker\n"
        f"heavy = [m for m in {LIGHT!r} if m in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
