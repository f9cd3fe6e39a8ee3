"""Values between processes: cloudpickle by value where a module can't be imported, and a class once per worker.

*By reference or by value.* Functions and classes of modules that a worker can import travel as names. Those of
``__main__`` (a script without a guard, a notebook cell), of functions, and of modules that were loaded by other
means than ``sys.path`` travel by value.

*Classes.* A class that travels by value has a token, made where it was first pickled. In each process a token
stands for one class: a definition that arrives for a known token gives the class that is there, untouched. So an
instance made in a worker comes back as an instance of the parent's own class. The parent remembers which classes a
worker keeps (``sent``) and writes a reference instead of the definition from the second time on; a worker writes
references to what it keeps, and definitions of everything else. A definition counts as sent only when the pickle
that carries it succeeded; if the worker couldn't read the value that carried it, the next reference is a LostClass,
and the parent forgets what it has sent and sends that value again.

*Separate values.* Values are pickled one by one, without a memory from one to the next: two items that share a
list don't share it on the other side, whichever chunk they were in.

cloudpickle alone can't do msgspec Structs (their fields exist only if the metaclass sees them), slots on the way
back and generic ``NamedTuple`` classes, annotations in strings, ``cached_property``, or exceptions whose ``__init__``
takes other arguments than it hands on; these are seen to here.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import os
import pickle
import sys
import threading
import types
import typing
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from cloudpickle import cloudpickle

__all__ = ["LostClass", "Pickler", "Received", "dumps", "received"]

_MOST_CLASSES = 1000
"""Classes kept per worker; beyond (a function that makes a class per call) each travels with every value."""

_SPECIAL: dict[type, Callable[[Any], Any]] = cloudpickle.Pickler.dispatch_table.maps[0]

_dump = pickle.Pickler.dump  # without cloudpickle's wrapping

_lock = threading.Lock()
_tokens: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()
_classes: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()


class Received(dict[type, str]):
    """The classes this process was given to keep, with their tokens: all that a worker may write references to."""


received = Received()


class LostClass(pickle.UnpicklingError):
    """A reference to a class whose definition was in a value that couldn't be read."""


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    """A pickler of protocol 5 for one other process.

    ``sent``: the classes that the other process keeps. ``grows``: whether definitions written here are kept there;
    ``dump`` then adds them to ``sent``. ``take`` is asked about each buffer and returns true to have it in band.
    """

    dispatch_table = copyreg.dispatch_table  # a plain dict: cloudpickle's ChainMap costs a microsecond an object

    def __init__(
        self,
        file: Any,
        sent: dict[type, str],
        *,
        grows: bool = False,
        take: Callable[[pickle.PickleBuffer], bool] | None = None,
    ) -> None:
        super().__init__(file, protocol=5, buffer_callback=take)
        self.globals_ref: dict[int, dict[str, Any]] = {}
        self._sent = sent
        self._grows = grows
        self._fresh: dict[type, str] = {}
        self._named: set[type] = set()  # classes that travel as names
        self._ordinary: set[type] = set()  # classes whose instances need nothing special

    def forget(self) -> None:
        """Define every class anew."""
        self._sent.clear()

    def dump(self, obj: Any) -> None:
        """Pickle one value by itself. Raises whatever the value's own pickling raises."""
        self.clear_memo()
        if self.globals_ref:
            self.globals_ref = {}
        try:
            _dump(self, obj)
        except BaseException:
            self._fresh.clear()
            raise
        if self._fresh:
            self._sent.update(self._fresh)
            self._fresh.clear()

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind in self._ordinary:
            return NotImplemented
        if kind is types.FunctionType:
            if _named(obj):
                return NotImplemented
            return self._dynamic_function_reduce(obj)
        if issubclass(kind, type):
            return self._reduce_class(obj)
        if issubclass(kind, BaseException):
            return _reduce_error(obj)
        if kind is typing.TypeVar and not _importable(obj.__module__):
            return cloudpickle._make_typevar, cloudpickle._decompose_typevar(obj)
        special = _SPECIAL.get(kind)
        if special is not None:
            return special(obj)
        if len(self._ordinary) < _MOST_CLASSES:
            self._ordinary.add(kind)
        return NotImplemented

    def _reduce_class(self, cls: type) -> Any:
        if cls in self._named:
            return NotImplemented
        token = self._sent.get(cls)
        if token is not None:
            return _recall, (token,)
        reduced = super().reducer_override(cls)
        if reduced is NotImplemented:
            if _importable(cls.__module__):
                self._named.add(cls)
                return NotImplemented
            reduced = cloudpickle._dynamic_class_reduce(cls)
        elif len(reduced) == 2:  # NoneType and its like
            return reduced
        token = _token(cls)
        keep = self._grows and len(self._sent) + len(self._fresh) < _MOST_CLASSES
        if keep:
            self._fresh[cls] = token
        make, arguments, (attributes, _), _, _, fill = reduced
        if isinstance(cls, type(msgspec.Struct)):
            make, arguments, fill = _make_struct, _describe_struct(cls), _fill_struct
            attributes = {name: value for name, value in attributes.items() if name not in _STRUCT_OWN}
            attributes["__annotations__"] = inspect.get_annotations(cls)
        elif typing.NamedTuple in cls.__dict__.get("__orig_bases__", ()):
            make, arguments = _make_named_tuple, _describe_named_tuple(cls)
            own = _NAMED_TUPLE_OWN.union(arguments[4])
            attributes = {name: value for name, value in attributes.items() if name not in own}
        elif "__slots__" in cls.__dict__ and make is cloudpickle._make_skeleton_class:
            arguments = (*arguments[:3], {**arguments[3], "__slots__": cls.__dict__["__slots__"]}, *arguments[4:])
        attributes = {
            name: value for name, value in attributes.items() if not isinstance(value, types.MemberDescriptorType)
        }
        if "__annotations__" in attributes:
            attributes["__annotations__"] = _resolved(cls, attributes["__annotations__"])
        return _define, (token, keep, make, arguments), (token, fill, attributes), None, None, _fill


def dumps(value: Any, sent: dict[type, str], *, grows: bool = False) -> bytes:
    """One value as bytes, by a Pickler. Raises whatever the value's own pickling raises."""
    pieces: list[bytes] = []
    Pickler(types.SimpleNamespace(write=pieces.append), sent, grows=grows).dump(value)
    return b"".join(pieces)


# -- by name ----------------------------------------------------------------------------------------------------------


def _named(function: types.FunctionType) -> bool:
    return bool(cloudpickle._should_pickle_by_reference(function)) and _importable(function.__module__)


@functools.lru_cache(maxsize=4096)
def _importable(name: str) -> bool:
    """Whether another process with our ``sys.path`` would find this loaded module under its name.

    False only for a package, or a module that was read from a Python file, that isn't found: extension modules may
    have been made in ways that no search shows, and can't travel by value anyway.
    """
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if not hasattr(module, "__path__") and (file is None or not file.endswith(".py")):
        return True
    path: Any = None
    parent = name.rpartition(".")[0]
    if parent:
        if not _importable(parent) or parent not in sys.modules:
            return False
        path = getattr(sys.modules[parent], "__path__", None)
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, path)
        except Exception:
            continue
        if spec is not None:
            return spec.origin == file or spec.origin is None
    return False


# -- classes ----------------------------------------------------------------------------------------------------------


def _token(cls: type) -> str:
    with _lock:
        token = _tokens.get(cls)
        if token is None:
            token = _tokens[cls] = os.urandom(16).hex()
            _classes[token] = cls
        return token


def _define(token: str, keep: bool, make: Callable[..., type], arguments: tuple[Any, ...]) -> type:
    """The class of this token: the one that is known, or a new one, still without its attributes."""
    cls = _classes.get(token)
    if cls is None:
        cls = _classes[token] = make(*arguments)
    if keep:
        received[cls] = token
    return cls


def _fill(cls: type, state: tuple[str, Callable[[type, Any], Any], dict[str, Any]]) -> None:
    token, fill, attributes = state
    if cls not in _tokens:  # known classes are left as they are
        fill(cls, attributes if fill is _fill_struct else (attributes, {}))
        _tokens[cls] = token


def _recall(token: str) -> type:
    cls = _classes.get(token)
    if cls is None:
        raise LostClass(token)
    return cls


def _resolved(cls: type, annotations: dict[str, Any]) -> dict[str, Any]:
    """Annotations without strings where they can be resolved: the names in them mean nothing in another process."""
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except Exception:  # a name that exists for type checkers only
        return annotations
    return {name: hints.get(name, hint) for name, hint in annotations.items()}


# -- what cloudpickle can't do -----------------------------------------------------------------------------------------

_STRUCT_OWN = {
    "__module__",
    "__qualname__",
    "__slots__",
    "__dict__",
    "__weakref__",
    "__annotations__",
    "__orig_bases__",
}


def _describe_struct(cls: Any) -> tuple[Any, ...]:
    """What makes a Struct's layout: fields, defaults and options. Types and methods follow, as they may refer back."""
    fields: tuple[str, ...] = cls.__struct_fields__
    own = [name for name in inspect.get_annotations(cls) if name in fields]
    first_default = len(fields) - len(cls.__struct_defaults__)
    defaults: dict[str, tuple[bool, Any]] = {}
    for name in own:
        index = fields.index(name) - first_default
        default = cls.__struct_defaults__[index] if index >= 0 else msgspec.NODEFAULT
        if default is not msgspec.NODEFAULT:
            made = isinstance(default, _FACTORY)
            defaults[name] = (made, default.factory if made else default)
    config = cls.__struct_config__
    options = {name: getattr(config, name) for name in dir(config) if not name.startswith("_")}
    if options["tag"] is None:
        del options["tag"], options["tag_field"]
    for name, offset in (("weakref", "__weakrefoffset__"), ("dict", "__dictoffset__")):
        if any(getattr(base, offset) for base in cls.__bases__):  # inherited: asking twice is refused
            del options[name]
    renamed = dict(zip(fields, cls.__struct_encode_fields__, strict=True))
    options["rename"] = {name: renamed[name] for name in own}
    options["kw_only"] = any(name not in cls.__match_args__ for name in own)
    bases = cls.__dict__.get("__orig_bases__", cls.__bases__)
    hooked = "__post_init__" in cls.__dict__
    return cls.__name__, cls.__qualname__, cls.__module__, bases, own, defaults, options, hooked


def _make_struct(
    name: str,
    qualname: str,
    module: str,
    bases: tuple[Any, ...],
    own: list[str],
    defaults: Mapping[str, tuple[bool, Any]],
    options: dict[str, Any],
    hooked: bool,
) -> type:
    namespace: dict[str, Any] = {
        "__module__": module,
        "__qualname__": qualname,
        "__annotations__": dict.fromkeys(own, Any),
    }
    for field, (made, value) in defaults.items():
        namespace[field] = msgspec.field(default_factory=value) if made else msgspec.field(default=value)
    if hooked:
        namespace["__post_init__"] = _late_hook()
    return types.new_class(name, bases, options, lambda made: made.update(namespace))


def _late_hook() -> Callable[[Any], None]:
    """A ``__post_init__`` whose body comes later: a Struct looks for it only when the class is made."""
    body: list[Callable[[Any], None]] = []

    def __post_init__(self: Any) -> None:  # noqa: N807  # it becomes that method
        body[0](self)

    __post_init__.body = body  # type: ignore[attr-defined]  # where _fill_struct finds it
    return __post_init__


def _fill_struct(cls: type, attributes: dict[str, Any]) -> None:
    hook = attributes.pop("__post_init__", None)
    if hook is not None:
        cls.__dict__["__post_init__"].body.append(hook)
    for name, value in attributes.items():
        setattr(cls, name, value)


_NAMED_TUPLE_OWN = {
    "__class_getitem__",
    "__getnewargs__",
    "__match_args__",
    "__new__",
    "__orig_bases__",
    "__parameters__",
    "__slots__",
    "_field_defaults",
    "_fields",
    "_make",
}


def _describe_named_tuple(cls: Any) -> tuple[Any, ...]:
    """What a ``typing.NamedTuple`` is made of; its methods and types follow, as they may refer back."""
    return cls.__name__, cls.__qualname__, cls.__module__, cls.__orig_bases__, cls._fields, cls._field_defaults


def _make_named_tuple(
    name: str,
    qualname: str,
    module: str,
    bases: tuple[Any, ...],
    fields: tuple[str, ...],
    defaults: Mapping[str, Any],
) -> type:
    namespace = {
        "__module__": module,
        "__qualname__": qualname,
        "__annotations__": dict.fromkeys(fields, Any),
        **defaults,
    }
    return types.new_class(name, bases, {}, lambda made: made.update(namespace))


class _Default(msgspec.Struct):
    field: list[Any] = []  # a Struct turns it into a factory


_FACTORY: type = type(_Default.__struct_defaults__[0])


def _reduce_error(error: BaseException) -> Any:
    kind = type(error)
    usual = kind.__reduce__ in (BaseException.__reduce__, OSError.__reduce__)
    if not usual or type(kind.__init__) is not types.FunctionType:
        return NotImplemented
    arguments: Any = error.__reduce__()[1]  # of an OSError with its file's name, too
    return _remake_error, (kind, arguments), error.__dict__, None, None, _refill_error


def _remake_error(kind: type[BaseException], arguments: tuple[Any, ...]) -> BaseException:
    """An exception as its own ``__init__`` left it, without calling that: its arguments aren't known any more."""
    error = kind.__new__(kind, *arguments)
    for base in kind.__mro__:
        if "__init__" in base.__dict__ and type(base.__dict__["__init__"]) is not types.FunctionType:
            base.__init__(error, *arguments)  # type: ignore[misc]  # the first one that is written in C
            break
    return error


def _refill_error(error: BaseException, attributes: dict[str, Any]) -> None:
    error.__dict__.update(attributes)


def _reduce_cached_property(prop: functools.cached_property[Any]) -> Any:
    return _make_cached_property, (prop.func, prop.attrname)


def _make_cached_property(function: Callable[[Any], Any], name: str | None) -> functools.cached_property[Any]:
    prop = functools.cached_property(function)
    if name is not None:
        prop.__set_name__(object, name)
    return prop


_SPECIAL = {**_SPECIAL, functools.cached_property: _reduce_cached_property}
