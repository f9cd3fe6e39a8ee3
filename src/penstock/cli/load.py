"""From ``FILE[:NAME]`` to the job it names.

The file is loaded as a module of its own name, never as ``__main__``, so that a main guard stays shut. Its directory
joins the import path behind the standard library (a neighbour called queue.py must not replace it) and before what
is installed, so that its neighbours can be imported. What it defines travels to worker processes by value, as from
a script: no worker runs the file again.
"""

from __future__ import annotations

import sys
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from penstock.errors import MissingInput, PenstockError, PlanError
from penstock.flow.flow import Flow
from penstock.flow.job import Job
from penstock.flow.sink import as_sink

__all__ = ["load_file", "load_job", "split_target"]


def load_job(target: str, to: str | None = None) -> Job:
    """The job that ``FILE[:NAME]`` names, writing to ``to`` if that is given.

    Raises MissingInput for a file that isn't there, PlanError for one that defines no job, several without a name
    to choose by, or none of that name, and whatever the file itself raises.
    """
    path, name = split_target(target)
    return _find_job(load_file(path), str(path), name, to)


def split_target(target: str) -> tuple[Path, str | None]:
    """Part the file from the name.

    >>> split_target("jobs.py:nightly")
    (PosixPath('jobs.py'), 'nightly')
    >>> split_target("jobs.py")
    (PosixPath('jobs.py'), None)
    """
    file, colon, name = target.rpartition(":")
    if colon and name.isidentifier():
        return Path(file), name
    return Path(target), None


def load_file(path: Path) -> ModuleType:
    """Run a Python file as a module and return it.

    Raises MissingInput, PlanError for what isn't a Python file, and whatever the file raises: errors of penstock
    with a note that says where in the file they came up, others as they are.
    """
    import cloudpickle

    if not path.exists():
        raise MissingInput(str(path))
    if path.suffix != ".py" or not path.is_file():
        raise PlanError(f"{path} isn't a Python file", "Give the .py file that defines the job")
    path = path.resolve()
    _join_path(str(path.parent))
    name = _module_name(path)
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    cloudpickle.register_pickle_by_value(module)
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except PenstockError as error:
        line = _line_of(error, str(path))
        if line is not None:
            error.add_note(f"in {path.name}, line {line}")
        raise
    return module


def _find_job(module: ModuleType, file: str, name: str | None, to: str | None = None) -> Job:
    """The job called ``name`` in a module, or the only one there; with ``to``, a Flow will do."""
    if name is not None:
        if not hasattr(module, name):
            raise PlanError(f"{file} defines no {name!r}", _choice(file, module))
        found = getattr(module, name)
    else:
        found = _only(module, file, to)
    if isinstance(found, Job):
        return found if to is None else found.with_sink(as_sink(to))
    if isinstance(found, Flow):
        if to is None:
            raise PlanError(f"{name} in {file} is a Flow, which has no output", "Give it one: --to out.jsonl")
        return found.to(to)
    raise PlanError(f"{name} in {file} is a {type(found).__name__}, not a job", _choice(file, module))


def _only(module: ModuleType, file: str, to: str | None) -> Any:
    jobs = _named(module, Job)
    if not jobs and to is not None:
        jobs = _named(module, Flow)
    if len(jobs) == 1:
        return next(iter(jobs.values()))
    if jobs:
        kind = "jobs" if isinstance(next(iter(jobs.values())), Job) else "flows"
        raise PlanError(f"{file} defines {len(jobs)} {kind}: {', '.join(jobs)}", _choice(file, module))
    raise PlanError(f"{file} defines no job", _choice(file, module))


def _named(module: ModuleType, kind: type) -> dict[str, Any]:
    """What of a kind stands at the top level, by name; an object with two names counts once."""
    found: dict[int, tuple[str, Any]] = {}
    for name, value in vars(module).items():
        if isinstance(value, kind) and not name.startswith("_"):
            found.setdefault(id(value), (name, value))
    return dict(found.values())


def _choice(file: str, module: ModuleType) -> str:
    jobs, flows = _named(module, Job), _named(module, Flow)
    if jobs:
        return f"Name one of its jobs: {file}:{next(iter(jobs))}"
    if flows:
        return f"Give its flow an output: {file}:{next(iter(flows))} --to out.jsonl"
    return "Assign one at the top level of the file: job = flow.to('out.jsonl')"


def _join_path(directory: str) -> None:
    if directory in sys.path:
        return
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    at = next((index for index, entry in enumerate(sys.path) if entry in installed), len(sys.path))
    sys.path.insert(at, directory)


def _module_name(path: Path) -> str:
    """The file's own name, unless a module of that name exists."""
    name = path.stem
    taken = name in sys.modules or name in sys.stdlib_module_names or name == "penstock"
    return f"job_{name}" if taken else name


def _line_of(error: BaseException, file: str) -> int | None:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return lines[-1] if lines else None
