"""Hosts compare what they are about to do; several are played by one here, in which another's facts are made up."""

import jax
import pytest

from sdpoint_jax.programs import hosts


@pytest.fixture
def beside(monkeypatch):
    """A function that lets the other host say something; this one is host 0 of 2."""

    def say(other):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(hosts, "_gather", lambda ours: [ours, other])

    return say


def test_hosts_that_differ_all_name_the_key_and_who_has_which_value(beside):
    beside({"seed": 1, "config.learning_rate": 0.2, "class 1": "dog"})
    message = (
        r"differ in config.learning_rate: 0.1 \(host 0\), 0.2 \(host 1\); class 1: cat \(host 0\), dog \(host 1\)$"
    )
    with pytest.raises(hosts.HostError, match=message):
        hosts.check_same(lambda: {"seed": 1, "config.learning_rate": 0.1, "class 1": "cat"})


def test_hosts_that_agree_go_on(beside):
    beside({"seed": 1, "size": [8, 8]})
    hosts.check_same(lambda: {"seed": 1, "size": [8, 8]})


def test_a_fact_that_a_host_lacks_is_a_difference():
    found = hosts.list_differences([{"a": 1}, {"a": 1, "b": None}, {"a": 1, "b": None}])
    assert found == ["b: none (host 0), null (hosts 1, 2)"]


def test_many_differences_are_counted(beside):
    beside({f"class {index}": "b" for index in range(1000)})
    with pytest.raises(hosts.HostError, match="class 2: .*; and 997 more"):
        hosts.check_same(lambda: {f"class {index}": "a" for index in range(1000)})


def test_what_fails_on_one_host_is_an_error_of_all(beside):
    beside("no such folder /data")
    with pytest.raises(hosts.HostError, match="^host 1: no such folder /data$"):
        hosts.together(lambda: 3)
    beside("")
    assert hosts.together(lambda: 3) == 3


def test_what_fails_alike_is_told_once(beside):
    def fail():
        raise ValueError("config.seed -1: at least 0")

    beside("config.seed -1: at least 0")
    with pytest.raises(hosts.HostError, match="^hosts 0, 1: config.seed -1: at least 0$|^config.seed -1: at least 0$"):
        hosts.together(fail)


def test_one_host_alone_compares_nothing():
    hosts.check_same(lambda: pytest.fail("nothing to compare with"))
    with pytest.raises(ValueError, match="^x$"):
        hosts.together(lambda: 1 and (_ for _ in ()).throw(ValueError("x")))
