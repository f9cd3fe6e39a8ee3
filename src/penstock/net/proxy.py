"""Which proxy a URL goes through: what the environment says when the first request is made.

``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY`` and ``NO_PROXY``, in capitals or small letters. Loopback and private
targets never go through a proxy: they are this machine's and this network's own.
"""

from __future__ import annotations

import urllib.request
from typing import Any
from urllib.request import getproxies_environment

from penstock.net.address import is_public, literal

__all__ = ["Proxies"]


class Proxies:
    """The proxies of the environment, as it is now."""

    def __init__(self) -> None:
        self._found = getproxies_environment()
        self.any = any(scheme in self._found for scheme in ("http", "https", "all"))

    def of(self, scheme: str, host: str, port: int | None) -> str | None:
        """The URL of the proxy for a target; None if the connection is made directly."""
        if not self.any:
            return None
        proxy = self._found.get(scheme) or self._found.get("all")
        if not proxy:
            return None
        address = literal(host)
        if address is not None and not is_public(address):
            return None
        name = host.rstrip(".").lower()
        if name == "localhost" or name.endswith(".localhost"):
            return None
        where = f"{host}:{port}" if port is not None else host
        bypass: Any = vars(urllib.request)["proxy_bypass_environment"]  # which has no types
        if bypass(where, self._found):
            return None
        return proxy if "://" in proxy else f"http://{proxy}"
