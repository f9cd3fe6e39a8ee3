"""Fetching from many places at once: ``ps.fetch``. Nothing here touches event logs or files that outputs go to."""
