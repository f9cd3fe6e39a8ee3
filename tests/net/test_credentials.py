"""Credentials never stand in a dead letter, a journal, a report, a log or an exception, wherever they came from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

import penstock as ps
from penstock.flow.redact import redact

SECRETS = ("hunter2", "sk-12345", "abc987")
URL = "http://me:hunter2@127.0.0.1:9/page?api_key=sk-12345&page=2"


def ask(row: dict[str, Any]) -> ps.Request:
    return ps.Request(row["url"], headers={"Authorization": "Bearer abc987"})


SOURCES: dict[str, tuple[list[Any], Any]] = {
    "urls": ([URL], None),
    "rows": ([{"url": URL, "more": [URL]}], ask),
    "requests": ([ps.Request(URL, headers={"X-Api-Key": "abc987"})], None),
}


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_that_is_kept_or_shown_holds_a_credential(
    source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    items, request = SOURCES[source]
    pages = ps.fetch(ps.Flow(items, name="urls"), request=request, retry=1, allow_private=True, on_error="dead_letter")
    output = tmp_path / "pages.jsonl"
    report = pages.to(output).run_sync()
    assert report.dead == 1
    (letter,) = ps.read.dead(output).collect_sync()
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for text in (str(report), str(report.to_dict()), repr(letter), caplog.text, kept.decode(errors="replace")):
        assert not [secret for secret in SECRETS if secret in text]
    assert "page=2" in repr(letter)


@pytest.mark.parametrize("source", SOURCES)
def test_neither_does_what_is_raised(source: str) -> None:
    items, request = SOURCES[source]
    pages = ps.fetch(ps.Flow(items), request=request, retry=0, allow_private=True)
    with pytest.raises(ps.errors.FetchError) as raised:
        pages.collect_sync()
    text = f"{raised.value} {raised.value.args} {raised.value.__notes__}"
    assert "'fetch'" in text
    assert not [secret for secret in SECRETS if secret in text]


def test_what_is_no_url_stays_as_it_is() -> None:
    for value in ("a@b: c", "mail me@example.com ?x=1", {"key": "value", "token": 5}, ("x", None, 2.5), b"://a:b@c"):
        assert redact(value) == value
    assert redact(("see http://a:b@c/ and http://d/?token=x&y=1",)) == (
        "see http://***@c/ and http://d/?token=***&y=1",
    )
