"""``python -m penstock.cli``: the command where its script isn't on the path."""

from __future__ import annotations

from penstock.cli import main

main()
