"""Stages behind a limit or a search: what may start when, what a refusal costs, and who learns from it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flow.recorder import Recorder

import penstock as ps
from penstock.errors import PlanError, Throttled
from penstock.testing import run_virtual


class TooMany(Exception):
    """Refused, as an SDK says it."""

    status_code = 429

    def __init__(self, retry_after: str | None = None) -> None:
        super().__init__("too many requests")
        self.headers = {} if retry_after is None else {"Retry-After": retry_after}


class Response:
    """An answer that is returned and not raised."""

    def __init__(self, status: int) -> None:
        self.status_code = status
        self.headers: dict[str, str] = {}


def now() -> float:
    return asyncio.get_running_loop().time()


class Server:
    """Takes ``seconds`` for each call, notes when it began, and refuses what ``refuses`` says."""

    def __init__(self, seconds: float = 0.0, refuses: Callable[[Any, int], Exception | None] | None = None) -> None:
        self.seconds = seconds
        self.refuses = refuses
        self.began: list[tuple[float, Any]] = []
        self.calls: Counter[Any] = Counter()
        self.at_once = self.most_at_once = 0

    async def __call__(self, x: Any) -> Any:
        self.began.append((now(), x))
        self.calls[x] += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.at_once -= 1
        error = self.refuses(x, self.calls[x]) if self.refuses is not None else None
        if error is not None:
            raise error
        return x

    @property
    def order(self) -> list[Any]:
        return [x for _, x in self.began]

    def most_within(self, seconds: float) -> int:
        times = [time for time, _ in self.began]
        return max(sum(start <= time < start + seconds for time in times) for start in times)


def twice(x: Any, attempt: int) -> Exception | None:
    return TooMany("1") if attempt <= 2 else None


# -- rates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False])
def test_calls_start_as_fast_as_the_limit_allows_and_no_faster(ordered: bool) -> None:
    server = Server(0.5)
    flow = ps.Flow(range(200)).map(server, limit=ps.Limit(per_second=10), ordered=ordered)
    assert sorted(run_virtual(flow.collect())) == list(range(200))
    assert server.order == list(range(200))
    assert server.most_within(1.0) <= 11
    assert server.began[-1][0] == pytest.approx(20, rel=0.1)


def test_no_timeout_runs_while_an_item_waits_for_its_limit() -> None:
    server = Server(0.5)
    flow = ps.Flow(range(8)).map(server, limit=ps.Limit(per_minute=6), timeout=1.0)
    assert run_virtual(flow.collect()) == list(range(8))
    assert server.began[-1][0] > 60


def test_flows_share_a_limit_in_turn() -> None:
    limit = ps.Limit(per_second=10)
    one, other = Server(), Server()

    async def both() -> None:
        await asyncio.gather(
            ps.Flow(range(50)).map(one, limit=limit).collect(), ps.Flow(range(50)).map(other, limit=limit).collect()
        )

    run_virtual(both())
    for server in (one, other):
        assert server.began[-1][0] == pytest.approx(10, rel=0.15)
        assert server.most_within(1.0) <= 7


def test_a_limit_can_be_shared_between_loops_and_threads() -> None:
    limit = ps.Limit(per_second=1000)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(lambda: asyncio.run(ps.Flow(range(30)).map(Server(), limit=limit).collect())) for _ in "ab"]
        assert [run.result() for run in runs] == [list(range(30))] * 2


def test_hosts_are_paced_each_for_itself() -> None:
    server = Server(0.1)
    urls = [f"http://{host}/{page}" for page in range(5) for host in ("a.example", "b.example:8080", "c.example")]
    flow = ps.Flow(urls).map(server, limit=ps.Limit(per_second=1, per_host=True), ordered=False)
    assert sorted(run_virtual(flow.collect())) == sorted(urls)
    assert 3.5 < server.began[-1][0] < 5.5


def test_an_item_without_a_host_is_that_items_error() -> None:
    limit = ps.Limit(per_second=100, per_host=True)
    flow = ps.Flow(["http://a.example/", 5, {"url": "http://b.example/"}]).map(
        lambda x: x, limit=limit, on_error="keep"
    )
    first, failed, last = run_virtual(flow.collect())
    assert (first, last) == ("http://a.example/", {"url": "http://b.example/"})
    assert isinstance(failed, ps.Failed)
    assert (failed.item, failed.reason) == (5, "PlanError")
    assert "without a host" in failed.error


def test_tokens_count_and_are_put_right_by_the_answer() -> None:
    class Answer:
        usage = {"total_tokens": 10}  # noqa: RUF012  # as plain as an SDK's

    async def ask(x: int) -> Answer:
        return Answer()

    limit = ps.Limit(tokens_per_minute=6000, tokens=lambda x: 100)
    start = run_virtual(_timed(ps.Flow(range(300)).map(ask, limit=limit).collect()))
    assert start < 45  # at 100 each it would take 300 s


async def _timed(awaitable: Awaitable[Any]) -> float:
    await awaitable
    return now()


def test_what_tokens_raises_is_that_items_error() -> None:
    limit = ps.Limit(tokens_per_minute=6000, tokens=lambda x: 1 / x)
    flow = ps.Flow([1, 0, 2]).map(Server(), limit=limit, on_error="keep")
    one, failed, two = run_virtual(flow.collect())
    assert (one, two) == (1, 2)
    assert (failed.item, failed.reason) == (0, "ZeroDivisionError")


@pytest.mark.parametrize("how", [{"concurrency": 32}, {"concurrency": "auto"}])
def test_requests_that_come_together_at_the_start_dont_ruin_the_rate(how: dict[str, Any]) -> None:
    """Connections are made, modules imported: the first requests arrive all at once, and most of them are refused."""
    left, last, refused = 10.0, 0.0, 0

    async def ask(x: int) -> int:
        nonlocal left, last, refused
        await asyncio.sleep(max(0.5 - now(), 0.002))
        left, last = min(10.0, left + 100 * (now() - last)), now()
        if left < 1:
            refused += 1
            raise TooMany(f"{(1 - left) / 100:.3f}")
        left -= 1
        await asyncio.sleep(0.02)
        return x

    flow = ps.Flow(range(2000)).map(ask, limit=ps.Limit(per_minute=6000), **how)
    assert run_virtual(_timed(flow.collect())) < 20 / 0.9
    assert 0 < refused <= 0.02 * 2000


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("how", [{"limit": ps.Limit(per_second=50)}, {"concurrency": "auto"}])
def test_a_throttled_attempt_costs_no_retry(ordered: bool, how: dict[str, Any]) -> None:
    recorder = Recorder()
    server = Server(0.1, twice)
    job = ps.Flow(range(20)).map(server, ordered=ordered, **how).to(recorder)
    report = run_virtual(job.run(progress=False))
    assert sorted(recorder.outputs) == list(range(20))
    assert not ordered or recorder.outputs == list(range(20))
    assert (report.retried, report.stages[0].throttled) == (0, 40)
    assert all(calls == 3 for calls in server.calls.values())
    assert "40 throttled" in str(report)


def test_what_retry_after_says_is_waited_for() -> None:
    server = Server(0, lambda x, attempt: TooMany("30") if attempt == 1 and x == 0 else None)
    flow = ps.Flow(range(5)).map(server, limit=ps.Limit(), concurrency=1)
    assert run_virtual(flow.collect()) == list(range(5))
    assert server.order[:2] == [0, 0]
    assert server.began[1][0] >= 30


def test_a_returned_refusal_is_one_too() -> None:
    async def ask(x: int) -> Response:
        return Response(200 if server_ready() else 429)

    def server_ready() -> bool:
        return now() > 5

    answers = run_virtual(ps.Flow(range(3)).map(ask, limit=ps.Limit()).collect())
    assert [answer.status_code for answer in answers] == [200] * 3


def test_a_hook_tells_of_refusals_that_penstock_cant_read() -> None:
    async def ask(x: int) -> str:
        return "ok" if now() >= 7 else "slow down"

    limit = ps.Limit(throttled=lambda outcome: 7.0 if outcome == "slow down" else None)
    assert run_virtual(ps.Flow(range(3)).map(ask, limit=limit).collect()) == ["ok"] * 3


def test_without_a_limit_a_refusal_is_an_error_like_any_other() -> None:
    with pytest.raises(TooMany):
        run_virtual(ps.Flow([1]).map(Server(0, twice)).collect())


def test_other_failures_of_a_gated_stage_go_by_retry_and_on_error() -> None:
    def fails(x: int, attempt: int) -> Exception | None:
        return ValueError("bad") if x == 1 or (x == 2 and attempt == 1) else None

    server = Server(0, fails)
    flow = ps.Flow(range(4)).map(server, limit=ps.Limit(per_second=100), retry=1, on_error="keep")
    zero, one, two, three = run_virtual(flow.collect())
    assert (zero, two, three) == (0, 2, 3)
    assert (one.reason, one.attempts) == ("ValueError", 2)


@pytest.mark.parametrize("end", ["keep", "dead_letter", "raise"])
def test_ten_minutes_of_refusals_are_enough(end: Any) -> None:
    server = Server(0, lambda x, attempt: TooMany("3600"))
    recorder = Recorder()
    job = ps.Flow(range(3)).map(server, limit=ps.Limit(), on_error=end).to(recorder)

    async def run() -> float:
        if end == "raise":
            with pytest.raises(Throttled, match="10 minutes") as raised:
                await job.run(progress=False)
            assert isinstance(raised.value.__cause__, TooMany)
        else:
            await job.run(progress=False)
        return now()

    assert 600 <= run_virtual(run()) < 700
    failed = recorder.outputs if end == "keep" else list(recorder.letters.values())
    assert [one.reason for one in failed] == ["throttled"] * (0 if end == "raise" else 3)


def test_what_comes_after_a_hopeless_time_gets_its_own_chance() -> None:
    server = Server(0, lambda x, attempt: TooMany("60") if now() < 700 else None)
    flow = ps.Flow(range(400)).map(server, limit=ps.Limit(), concurrency=1, on_error="keep")
    outputs = run_virtual(flow.collect())
    given_up = [one for one in outputs if isinstance(one, ps.Failed)]
    assert 0 < len(given_up) < 100
    assert len(outputs) == 400


# -- how many at once ------------------------------------------------------------------------------------------------


@given(
    count=st.integers(0, 40),
    concurrency=st.integers(1, 6),
    ordered=st.booleans(),
    keyed=st.booleans(),
    rate=st.sampled_from([None, 5, 1000]),
    script=st.dictionaries(
        st.integers(0, 39), st.lists(st.sampled_from(["throttled", "fails"]), max_size=4), max_size=9
    ),
)
@settings(max_examples=120)
def test_law_ceilings_and_accounting_behind_a_gate(
    count: int, concurrency: int, ordered: bool, keyed: bool, rate: float | None, script: dict[int, list[str]]
) -> None:
    """However often which items are refused or fail: the ceiling holds, and each item has the fate that it must."""

    def refuses(x: int, attempt: int) -> Exception | None:
        if keyed:
            lane = in_lane.setdefault(x % 3, [])
            if not lane or lane[-1] != x:
                lane.append(x)
        happens = script.get(x, [])
        if attempt > len(happens):
            return None
        return TooMany() if happens[attempt - 1] == "throttled" else ValueError("no")

    in_lane: dict[int, list[int]] = {}
    server = Server(0.1, refuses)
    recorder = Recorder()
    flow = ps.Flow(range(count)).map(
        server,
        concurrency=concurrency,
        ordered=ordered,
        key=(lambda x: x % 3) if keyed else None,
        limit=ps.Limit(per_second=rate),
        retry=ps.Retry(1, backoff=0.1),
        on_error="skip",
    )
    report = run_virtual(flow.to(recorder).run(progress=False))
    lost = {x for x in range(count) if script.get(x, []).count("fails") > 1}
    assert sorted(recorder.outputs) == [x for x in range(count) if x not in lost]
    assert not ordered or keyed or recorder.outputs == sorted(recorder.outputs)
    assert server.most_at_once <= concurrency
    assert (report.issued, report.delivered, report.skipped) == (count, count - len(lost), len(lost))
    assert report.in_flight == report.released == report.dead == 0
    for lane in in_lane.values():
        assert lane == sorted(lane)


def test_auto_finds_more_than_the_default_where_that_helps() -> None:
    server = Server(1.0)
    seconds = run_virtual(_timed(ps.Flow(range(3000)).map(server, concurrency="auto").collect()))
    assert server.most_at_once > 100
    assert seconds < 60  # 32 at once would take 94


def test_auto_stays_small_where_more_gives_nothing() -> None:
    async def ask(x: int) -> int:
        async with gate:
            await asyncio.sleep(0.5)
        return x

    async def run() -> ps.Report:
        nonlocal gate
        gate = asyncio.Semaphore(8)
        return await ps.Flow(range(2000)).map(ask, concurrency="auto").to(lambda x: None).run(progress=False)

    gate = asyncio.Semaphore(1)
    report = run_virtual(run())
    assert report.elapsed < 1.2 * 2000 * 0.5 / 8
    assert report.stages[0].ceiling <= 64
    assert report.stages[0].busy > 0.5


def test_auto_in_threads_and_processes() -> None:
    flow = ps.Flow(range(40)).map(lambda x: x + 1, concurrency="auto", workers=3)
    assert flow.collect_sync() == list(range(1, 41))
    flow = ps.Flow(range(20)).map(lambda x: x + 1, concurrency="auto", place="process")
    assert flow.collect_sync() == list(range(1, 21))


def test_a_limit_in_a_process_learns_from_an_error_that_couldnt_travel() -> None:
    class Refused(Exception):
        def __init__(self, message: str, *, response: Any) -> None:
            super().__init__(message)
            self.response = response

    class Answer:
        status_code = 429
        headers = {"Retry-After": "0.01"}  # noqa: RUF012  # plain

    def ask(x: int, seen: set[int] = set()) -> int:  # noqa: B006  # the worker's memory
        if x in seen:
            return x
        seen.add(x)
        raise Refused("too many", response=Answer())

    report = ps.Flow(range(3)).map(ask, place="process", workers=1, limit=ps.Limit()).to(lambda x: None).run_sync()
    assert (report.delivered, report.stages[0].throttled, report.retried) == (3, 3, 0)


@pytest.mark.parametrize("verb", ["map_batches", "filter", "flat_map", "stream"])
def test_every_kind_of_stage_can_have_a_limit(verb: str) -> None:
    seen: Counter[Any] = Counter()

    async def ask(x: Any) -> Any:
        seen[str(x)] += 1
        if seen[str(x)] == 1:
            raise TooMany("1")
        return [x, x] if verb in ("flat_map", "stream") else x

    flow: ps.Flow[Any] = ps.Flow(range(4))
    limit = ps.Limit(per_second=10)
    if verb == "map_batches":
        flow = flow.map_batches(ask, batch_size=2, limit=limit)
    elif verb == "filter":
        flow = flow.filter(ask, limit=limit)
    else:
        flow = flow.flat_map(ask, limit=limit, whole=verb == "flat_map", retry=1)
    expected = {"map_batches": [0, 1, 2, 3], "filter": [1, 2, 3]}.get(verb, [0, 0, 1, 1, 2, 2, 3, 3])
    assert run_virtual(flow.collect()) == expected


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("hosts", [0, 1, 50])
def test_results_dont_pile_up_before_a_slow_consumer(hosts: int, ordered: bool) -> None:
    """A fetched page may be large: it isn't fetched long before somebody takes it."""
    server = Server(0.01)
    items: list[Any] = [f"http://host{number % hosts}/{number}" if hosts else number for number in range(5000)]
    limit = ps.Limit(per_second=1000, per_host=hosts > 0)
    flow = ps.Flow(items).map(server, limit=limit, concurrency="auto", ordered=ordered)

    async def consume() -> list[int]:
        ahead = []
        consumed = 0
        async for _ in flow:
            consumed += 1
            ahead.append(len(server.began) - consumed)
            await asyncio.sleep(0.1)
            if consumed == 100:
                break
        return ahead

    assert max(run_virtual(consume())) <= 256 + 2 * 16 * hosts


# -- the ends --------------------------------------------------------------------------------------------------------


def test_cancelling_while_everything_waits_lets_others_on() -> None:
    limit = ps.Limit(per_minute=60)
    first, second = Server(), Server()

    async def run() -> None:
        whole = asyncio.create_task(ps.Flow(range(1000)).map(first, limit=limit).collect())
        await asyncio.sleep(5.5)
        whole.cancel()
        await asyncio.wait([whole])
        called = len(first.began)
        await ps.Flow(range(5)).map(second, limit=limit).collect()
        assert len(first.began) == called
        assert now() < 12

    run_virtual(run())


def test_a_caller_that_leaves_while_it_waits_is_forgotten() -> None:
    server = Server()

    async def run() -> None:
        async with ps.Flow().map(server, limit=ps.Limit(per_minute=60)).open() as call:
            callers = [asyncio.create_task(call(x)) for x in range(5)]
            await asyncio.sleep(0.5)
            callers[2].cancel()
            answers = await asyncio.gather(*callers, return_exceptions=True)
            assert [one for one in answers if isinstance(one, int)] == [0, 1, 3, 4]
            assert 2 not in server.order
            assert call.report().released == 1

    run_virtual(run())


def test_inline_keeps_the_limit() -> None:
    server = Server()
    job = ps.Flow(range(20)).map(server, limit=ps.Limit(per_second=10)).to(Recorder())
    report = run_virtual(job.run(inline=True, progress=False))
    assert report.delivered == 20
    assert server.most_within(1.0) <= 11


def test_the_report_names_the_limit() -> None:
    job = ps.Flow(range(100)).map(Server(0.1), limit=ps.Limit(per_second=10), name="ask").to(lambda x: None)
    report = run_virtual(job.run(progress=False))
    assert (report.bottleneck.reason, report.bottleneck.stage) == ("limit", "ask")
    assert "higher quota" in str(report)
    assert report.stages[0].held > 0.5


# -- descriptions ----------------------------------------------------------------------------------------------------


def test_a_gated_stage_stands_by_itself_and_says_so() -> None:
    async def ask(x: int) -> int:
        return x

    flow = ps.Flow([1]).map(ask).map(ask, limit=ps.Limit(per_minute=600)).map(ask, concurrency="auto").map(ask)
    text = flow.explain()
    assert text.count("segment") == 4
    assert "32 at once, ordered, Limit(per_minute=600)" in text
    assert "up to 1024 at once, ordered, as many as are found best" in text


def test_how_fast_isnt_part_of_what_is_done() -> None:
    from penstock.flow.plan import make_plan

    async def ask(x: int) -> int:
        return x

    plain = make_plan(ps.Flow([1]).map(ask), None).fingerprint
    assert make_plan(ps.Flow([1]).map(ask, limit=ps.Limit(per_second=1)), None).fingerprint == plain
    assert make_plan(ps.Flow([1], limit=ps.Limit(per_second=1)).map(ask), None).fingerprint == plain
    assert make_plan(ps.Flow([1]).map(ask, concurrency="auto"), None).fingerprint == plain


@pytest.mark.parametrize("given_", [{"limit": 5}, {"concurrency": "automatic"}, {"concurrency": 0}])
def test_what_is_no_limit_is_refused(given_: dict[str, Any]) -> None:
    async def ask(x: int) -> int:
        return x

    with pytest.raises(PlanError, match="Give a "):
        ps.Flow([1]).map(ask, **given_)
    with pytest.raises(PlanError, match='concurrency="auto"'):
        ps.Flow([1]).map(str, concurrency=4)


@pytest.mark.parametrize("size", [1, 2, 33, 100])
@pytest.mark.parametrize("how", [{"limit": ps.Limit(per_second=100)}, {"concurrency": "auto"}, {"concurrency": 1}])
def test_batches_behind_a_gate_dont_wait_for_themselves(size: int, how: dict[str, Any]) -> None:
    async def same(xs: list[int]) -> list[int]:
        return xs

    how = {"limit": ps.Limit(), **how} if how.get("concurrency") == 1 else how
    flow = ps.Flow(range(1000)).map_batches(same, batch_size=size, **how)
    assert run_virtual(flow.collect()) == list(range(1000))


@pytest.mark.parametrize("how", [{"concurrency": "auto"}, {"limit": ps.Limit()}])
def test_what_is_done_behind_the_head_doesnt_keep_it_from_its_retry(how: dict[str, Any]) -> None:
    server = Server(0.01, lambda x, calls: ValueError("once") if x == 0 and calls == 1 else None)
    flow = ps.Flow(range(500)).map(server, retry=ps.Retry(3, backoff=5, jitter=False), **how)
    assert run_virtual(flow.collect()) == list(range(500))


def test_what_is_done_for_other_hosts_doesnt_keep_the_head_from_its_turn() -> None:
    urls = ["http://a/1", "http://a/2", *(f"http://h{number}/" for number in range(200))]
    flow = ps.Flow(urls).map(Server(0.01), limit=ps.Limit(per_second=1, per_host=True))
    assert run_virtual(flow.collect()) == urls


@pytest.mark.parametrize("place", ["loop", "thread"])
def test_a_hook_that_raises_is_the_failure_of_its_item(place: Any) -> None:
    limit = ps.Limit(throttled=lambda answer: answer["status"] == 429)  # a KeyError for what was answered well
    kept = run_virtual(ps.Flow(range(2)).map(lambda x: {"x": x}, place=place, limit=limit, on_error="keep").collect())
    assert [(failed.item, failed.reason, failed.attempts) for failed in kept] == [
        (0, "KeyError", 1),
        (1, "KeyError", 1),
    ]
    with pytest.raises(KeyError) as raised:
        run_virtual(ps.Flow(range(2)).map(lambda x: {"x": x}, place=place, limit=limit).collect())
    assert any("Limit(throttled=) of stage '<lambda>'" in note for note in raised.value.__notes__)


def test_batches_have_no_one_host() -> None:
    with pytest.raises(PlanError, match="a batch has no one host"):
        ps.Flow(["http://a/"]).map_batches(list, batch_size=2, limit=ps.Limit(per_host=True))
