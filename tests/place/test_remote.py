"""Exceptions between processes: what of them arrives when they can't be pickled, or can't be read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import penstock as ps
from penstock.place.remote import freeze_error, thaw_error


class Refused(Exception):
    """As SDKs make theirs: an exception whose arguments aren't what it is built of."""

    def __init__(self, message: str, *, response: Any) -> None:
        super().__init__(message)
        self.response = response
        self.status_code = response.status_code
        self.body = {"error": message}
        self.request_id = "r-1"


class Response:
    status_code = 429
    headers = {"Retry-After": "7"}  # noqa: RUF012  # as plain as it gets

    def __reduce__(self) -> Any:
        raise TypeError("holds a socket")


@pytest.mark.parametrize("response", [Response(), SimpleNamespace(status_code=429, headers={"Retry-After": "7"})])
def test_what_an_sdk_says_of_a_refusal_arrives(response: Any) -> None:
    error: Any = thaw_error(freeze_error(Refused("too many", response=response)))
    assert type(error).__name__ == "Refused"
    assert str(error) == "too many"
    assert (error.status_code, error.request_id) == (429, "r-1")
    assert error.response.status_code == 429
    assert error.response.headers["Retry-After"] == "7"


@pytest.mark.parametrize(
    "response", [None, 5, SimpleNamespace(status_code="many", headers={}), SimpleNamespace(status=1)]
)
def test_what_is_no_response_is_left_out(response: Any) -> None:
    error = ValueError("odd")
    error.response = response  # type: ignore[attr-defined]
    error.text = "x" * 5000  # type: ignore[attr-defined]
    *_, attributes = freeze_error(error)
    assert attributes == {}


def test_what_an_exception_has_itself_stays() -> None:
    error = OSError(5, "broken", "file.txt")
    error.retried = True  # type: ignore[attr-defined]
    back: Any = thaw_error(freeze_error(error))
    assert (back.errno, back.filename, back.retried) == (5, "file.txt", True)


def test_a_stage_in_a_process_tells_the_same() -> None:
    def refuse(x: int) -> int:
        raise Refused("too many", response=Response())

    with pytest.raises(RuntimeError, match="too many") as raised:
        ps.Flow([1]).map(refuse, place="process").collect_sync()
    assert raised.value.response.headers == {"Retry-After": "7"}  # type: ignore[attr-defined]
