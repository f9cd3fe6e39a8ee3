"""pyarrow, imported when it is first needed."""

from __future__ import annotations

from typing import Any

from penstock.errors import MissingDependency

__all__ = ["arrow", "parquet_module"]


def arrow() -> Any:
    """The pyarrow package, or MissingDependency."""
    try:
        import pyarrow as pa
    except ImportError:
        raise MissingDependency("pyarrow", "Parquet", "parquet") from None
    return pa


def parquet_module() -> Any:
    """pyarrow's Parquet module, or MissingDependency."""
    arrow()
    import pyarrow.parquet as module

    return module
