"""When a run is doomed, and that what is remembered of hosts is bounded."""

from __future__ import annotations

from penstock.net import refusals
from penstock.net.refusals import ENOUGH, Refusals


def test_a_host_that_has_served_is_never_given_up() -> None:
    hosts = Refusals()
    hosts.served("a")
    assert not any(hosts.refused("a") for _ in range(100))


def test_refusals_are_counted_until_there_are_enough() -> None:
    hosts = Refusals()
    assert [hosts.refused("a") for _ in range(ENOUGH)] == [0] * (ENOUGH - 1) + [ENOUGH]


def test_success_elsewhere_begins_the_count_anew() -> None:
    hosts = Refusals()
    for _ in range(ENOUGH - 1):
        assert not hosts.refused("a")
    hosts.served("b")
    assert [hosts.refused("a") for _ in range(ENOUGH)][-1] == ENOUGH


def test_what_is_remembered_is_bounded() -> None:
    hosts = Refusals()
    for number in range(3 * refusals._MOST_HOSTS):
        hosts.refused(f"h{number}")
        hosts.served(f"s{number}")
    assert len(hosts._hosts) <= refusals._MOST_HOSTS
    assert len(hosts._served_before) <= refusals._MOST_HOSTS
