"""Requests: what is refused when they are made, and that no form of them shows a credential."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import cloudpickle
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import CannotEncode, FetchError, PlanError
from penstock.flow.codec import encode_json, pack, unpack
from penstock.flow.redact import hide_values, is_secret_header, redact_url, secrets_in_url
from penstock.net.fetcher import Fetcher
from penstock.net.request import Request
from penstock.testing import run_virtual

URL = "https://example.com/a"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Request("ftp://example.com"), "is no http or https URL"),
        (lambda: Request("example.com"), "is no http or https URL"),
        (lambda: Request("file:///etc/passwd"), "is no http or https URL"),
        (lambda: Request("https://"), "names no host"),
        (lambda: Request("https://h:99999/"), "can't be read"),
        (lambda: Request("https://[::1/"), "can't be read"),
        (lambda: Request("https://h/a b"), "blank or a control character"),
        (lambda: Request("https://h/\r\nX: y"), "blank or a control character"),
        (lambda: Request(7), "given as int"),  # type: ignore[arg-type]
        (lambda: Request("ftp://me:hunter2@h/?key=hunter2"), r"'ftp://\*\*\*@h/\?key=\*\*\*'"),
        (lambda: Request(URL, "G E T"), "method='G E T'"),
        (lambda: Request(URL, ""), "method=''"),
        (lambda: Request(URL, headers={"A": "b\r\nC: d"}), "line break"),
        (lambda: Request(URL, headers={"A": "b\n"}), "line break"),
        (lambda: Request(URL, headers={"A": "b\0"}), "line break"),
        (lambda: Request(URL, headers={"A": "\ud800"}), "line break"),
        (lambda: Request(URL, headers={"A\n": "b"}), "header name"),
        (lambda: Request(URL, headers={"A: b": "c"}), "header name"),
        (lambda: Request(URL, headers={"": "c"}), "header name"),
        (lambda: Request(URL, headers={"A": 7}), "is a int"),  # type: ignore[dict-item]
        (lambda: Request(URL, headers=[("a", "b")]), "was given a list"),  # type: ignore[arg-type]
        (lambda: Request(URL, headers={"Content-Length": "7"}), "can't be given"),
        (lambda: Request(URL, headers={"host": "other"}), "can't be given"),
        (lambda: Request(URL, json=1, data=b"2"), "both json= and data="),
        (lambda: Request(URL, data=7), "was given a int"),  # type: ignore[arg-type]
        (lambda: Request(URL, idempotent="yes"), "idempotent='yes'"),  # type: ignore[arg-type]
    ],
)
def test_what_can_t_be_sent_is_refused_when_it_is_made(make: Any, says: str) -> None:
    with pytest.raises(PlanError, match=says) as raised:
        make()
    assert "hunter2" not in str(raised.value)


def test_what_follows_from_what_is_given() -> None:
    assert (Request(URL).method, Request(URL, json=0).method, Request(URL, "put", data="").method) == (
        "GET",
        "POST",
        "PUT",
    )
    assert Request(URL, json={"a": [1, None]}).body() == b'{"a":[1,null]}'
    assert Request(URL, data={"a": "b c", "d": ["1", "2"]}).body() == b"a=b+c&d=1&d=2"
    assert Request(URL, data="é").body() == "é".encode()
    assert Request(URL, data=b"\0").body() == b"\0"
    assert Request(URL).body() is None
    assert Request(URL, json=1).sent_headers() == {"Content-Type": "application/json"}
    assert Request(URL, json=1, headers={"content-type": "x/y"}).sent_headers() == {"content-type": "x/y"}
    assert Request(URL, data={"a": "b"}).sent_headers() == {"Content-Type": "application/x-www-form-urlencoded"}
    assert Request(URL, data="a").sent_headers() == {"Content-Type": "text/plain; charset=utf-8"}
    assert Request("https://a:b%3Ac@h").sent_headers() == {"Authorization": "Basic YTpiOmM="}
    with pytest.raises(CannotEncode, match="the body of a Request"):
        Request(URL, json=object()).body()


def test_requests_don_t_change() -> None:
    request = Request(URL, headers={"a": "b"})
    with pytest.raises(AttributeError, match="can't be changed: url"):
        request.url = "https://other"
    with pytest.raises(AttributeError, match="can't be changed"):
        del request.url
    with pytest.raises(TypeError):
        request.headers["a"] = "c"  # type: ignore[index]
    assert request == Request(URL, headers={"a": "b"})
    assert request != Request(URL)
    assert hash(request) == hash(Request(URL))
    assert copy.copy(request) is copy.deepcopy(request) is request


SECRET = Request(
    "https://user:hunter2@example.com/a?page=2&api_key=hunter2&X-Amz-Signature=hunter2#access_token=hunter2",
    headers={
        "Authorization": "Bearer hunter2",
        "Cookie": "a=hunter2",
        "X-API-Key": "hunter2",
        "Proxy-Authorization": "Basic hunter2",
        "x-auth-token": "hunter2",
        "Accept": "text/html",
        "Idempotency-Key": "seven",
    },
)


@pytest.mark.parametrize(
    "form",
    [
        repr,
        str,
        lambda request: repr(request.redacted()),
        lambda request: repr(dict(request)),
        lambda request: encode_json(request).decode(),
        lambda request: encode_json({"source": request}).decode(),
        lambda request: pickle.dumps(request).decode("latin-1"),
        lambda request: cloudpickle.dumps(request).decode("latin-1"),
        lambda request: pack(request).decode("latin-1"),
        lambda request: f"{[request]}",
    ],
)
def test_no_form_of_a_request_shows_a_credential(form: Any) -> None:
    shown = form(SECRET)
    assert "hunter2" not in shown
    assert "example.com/a?page=2" in shown
    assert "text/html" in shown


def test_a_request_that_was_read_back_is_not_sent_without_its_credentials() -> None:
    back = unpack(pack(SECRET))
    assert isinstance(back, Request)
    assert back == SECRET.redacted()
    with pytest.raises(PlanError, match="removed its credentials") as raised:
        run_virtual(_send(back))
    assert "hunter2" not in str(raised.value)
    assert pickle.loads(pickle.dumps(Request(URL, json={"a": 1}))) == Request(URL, json={"a": 1})


async def _send(request: Request) -> None:
    await Fetcher()(request)


def test_json_of_a_row_reads_back() -> None:
    row = msgspec.json.decode(encode_json(Request(URL, json={"a": 1})))
    assert row == {"url": URL, "method": "POST", "headers": {}, "json": {"a": 1}, "data": None}


@given(st.text())
def test_any_text_can_be_redacted(text: str) -> None:
    assert isinstance(redact_url(text), str)
    assert redact_url(redact_url(text)) == redact_url(text)
    secrets_in_url(text)


@given(
    user=st.text("abc:@%20é", max_size=8),
    name=st.sampled_from(["key", "apiKey", "access_token", "X-Amz-Credential", "sig", "PASSWORD", "client_secret"]),
    after=st.text("ab?&;=#/", max_size=8),
)
def test_a_secret_in_a_url_is_found_wherever_it_stands(user: str, name: str, after: str) -> None:
    url = f"https://{user}hunter2@host/path?a=1&{name}=hunter2{'&' if after else ''}{after}"
    assert "hunter2" not in redact_url(url)
    assert "a=1" in redact_url(url)
    assert any("hunter2" in secret for secret in secrets_in_url(url))


def test_names_are_judged_by_their_words() -> None:
    assert not any(map(is_secret_header, ["Accept", "Content-Type", "Idempotency-Key", "If-None-Match", "Range"]))
    assert all(map(is_secret_header, ["authorization", "X-Goog-Api-Key", "X-Vault-Token", "x-amz-security-token"]))
    assert all(map(is_secret_header, ["X-APIKey", "APIToken", "IDToken", "SASToken", "CSRFToken", "URLSignature"]))
    assert all(map(is_secret_header, ["DBPassword", "APIKEY", "apikey", "passWord", "AccessKEY2"]))


def test_what_a_server_echoes_is_hidden() -> None:
    assert hide_values("key abcd1234 (Bearer abcd1234)", ["Bearer abcd1234"]) == "key *** (***)"
    assert hide_values("a b", ["a", ""]) == "a b"


def test_an_error_shows_no_credential(capsys: pytest.CaptureFixture[str]) -> None:
    from tests.net.hostile import Hostile, answer

    async def echo(server: Any, request: Any, reader: Any, writer: Any) -> bool:
        text = f"I know {request.headers['authorization']} and {request.target} and {request.headers['x-api-key']}"
        writer.write(answer(text.encode(), "400 Bad", {"Content-Type": "text/plain"}))
        return True

    async def main() -> FetchError:
        async with Hostile(routes={"echo": echo}) as server:
            fetcher = Fetcher(allow_private=True)
            url = server.url("/echo?token=hunter2").replace("://", "://me:hunter2@")
            with pytest.raises(FetchError) as raised:
                await fetcher(Request(url, headers={"X-API-Key": "hunter2", "Authorization": "Bearer hunter2"}))
            await fetcher.close()
            return raised.value

    error = run_virtual(main())
    for form in (str(error), repr(error), str(error.args)):
        assert "hunter2" not in form
        assert "I know ***" in form
    assert error.__cause__ is None
