"""The command line: one file per command group. Its libraries are loaded when it runs, not with penstock."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the ``penstock`` command and exit with its code: 0 done, 1 failed, 2 bad arguments, 130 interrupted."""
    from penstock.cli.commands import application

    application()()
