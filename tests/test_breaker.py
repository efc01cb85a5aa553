"""The circuit breaker: its states, its permits, and that no order of events leads it astray."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from elizasql import CircuitOpenError
from elizasql._breaker import CircuitBreaker


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(clock=clock)


def state(breaker: CircuitBreaker) -> str:
    """Give the state as a plain text: the type checker would take it for what it was a line before."""
    return breaker.state


def fail(breaker: CircuitBreaker, times: int = 1) -> None:
    for _ in range(times):
        breaker.fail(breaker.enter())


def test_five_failures_in_a_row_open_it(breaker: CircuitBreaker) -> None:
    fail(breaker, 4)
    assert (breaker.state, breaker.failures) == ("closed", 4)
    fail(breaker)
    assert (breaker.state, breaker.failures, breaker.opened) == ("open", 5, 1)


def test_a_success_begins_the_count_anew(breaker: CircuitBreaker) -> None:
    for _ in range(10):
        fail(breaker, 4)
        breaker.succeed(breaker.enter())
    assert (breaker.state, breaker.failures) == ("closed", 0)


def test_a_call_that_says_nothing_changes_nothing(breaker: CircuitBreaker) -> None:
    fail(breaker, 4)
    for _ in range(100):
        breaker.leave(breaker.enter())
    assert (breaker.state, breaker.failures) == ("closed", 4)


def test_failures_of_calls_that_ran_together_count_once(breaker: CircuitBreaker) -> None:
    """One backend that crashes takes every connection with it."""
    permits = [breaker.enter() for _ in range(20)]
    for permit in permits:
        breaker.fail(permit)
    assert (breaker.state, breaker.failures) == ("closed", 1)


def test_open_refuses_and_says_for_how_long(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, 5)
    clock.now += 12.5
    with pytest.raises(CircuitOpenError, match=r"47\.5 s") as caught:
        breaker.enter()
    assert caught.value.retry_after == pytest.approx(47.5)
    assert breaker.retry_after == pytest.approx(47.5)
    clock.now += 47.4
    with pytest.raises(CircuitOpenError):
        breaker.enter()
    clock.now += 0.2
    breaker.enter()
    assert (breaker.state, breaker.retry_after) == ("half_open", 0.0)


def test_half_open_lets_three_in_and_closes_after_three_successes(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, 5)
    clock.now += 60
    permits, refused = [], 0
    for _ in range(100):
        try:
            permits.append(breaker.enter())
        except CircuitOpenError:
            refused += 1
    assert (len(permits), refused) == (3, 97)
    breaker.succeed(permits[0])
    breaker.succeed(permits[1])
    assert breaker.state == "half_open"
    breaker.succeed(permits[2])
    assert (breaker.state, breaker.failures) == ("closed", 0)


def test_one_failure_opens_it_again(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, 5)
    clock.now += 60
    permits = [breaker.enter() for _ in range(3)]
    breaker.succeed(permits[0])
    breaker.fail(permits[1])
    assert (breaker.state, breaker.opened) == ("open", 2)
    assert breaker.retry_after == pytest.approx(60)
    breaker.succeed(permits[2])  # too late to count
    assert breaker.state == "open"
    clock.now += 60
    for _ in range(2):
        breaker.succeed(breaker.enter())
    assert state(breaker) == "half_open"  # the success of the last time does not count


def test_a_probe_that_is_cancelled_makes_room_and_neither_closes_nor_opens(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    fail(breaker, 5)
    clock.now += 60
    for _ in range(10):
        for permit in [breaker.enter() for _ in range(3)]:
            breaker.leave(permit)
    assert breaker.state == "half_open"
    for _ in range(3):
        breaker.succeed(breaker.enter())
    assert state(breaker) == "closed"


def test_what_began_before_says_nothing_about_the_probes(breaker: CircuitBreaker, clock: Clock) -> None:
    old = [breaker.enter() for _ in range(5)]
    fail(breaker, 5)
    clock.now += 60
    probe = breaker.enter()
    for permit in old:
        breaker.succeed(permit)
    assert breaker.state == "half_open"
    breaker.fail(old[0])
    breaker.leave(old[1])
    assert breaker.state == "half_open"
    probes = [probe, breaker.enter(), breaker.enter()]
    with pytest.raises(CircuitOpenError):
        breaker.enter()  # no place became free
    for permit in probes:
        breaker.succeed(permit)
    assert state(breaker) == "closed"


def test_a_probe_that_outlasts_the_others_says_nothing_about_the_time_after(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    fail(breaker, 5)
    clock.now += 60
    breaker.succeed(breaker.enter())
    slow, *quick = [breaker.enter() for _ in range(3)]
    for permit in quick:
        breaker.succeed(permit)
    assert breaker.state == "closed"
    breaker.fail(slow)
    assert (breaker.state, breaker.failures) == ("closed", 0)


def test_what_is_closed_refuses_nobody_when_the_machine_has_just_started(breaker: CircuitBreaker, clock: Clock) -> None:
    clock.now = 0.5
    assert breaker.retry_after == 0.0


class Machine(RuleBasedStateMachine):
    """Calls that come, end and are cancelled in any order, with a clock that stands still or jumps."""

    permits = Bundle("permits")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breaker = CircuitBreaker(failure_threshold=3, reset_timeout=10, half_open_max_attempts=2, clock=self.clock)
        self.probes: set[int] = set()  # handles of probes of this half-open time
        self.successes = 0
        self.count = 0
        self.until = 0.0

    @rule(target=permits)
    def enter(self) -> tuple[int, int]:
        before = self.breaker.state
        self.count += 1
        if (before == "open" and self.clock.now < self.until) or (before == "half_open" and len(self.probes) == 2):
            with pytest.raises(CircuitOpenError) as caught:
                self.breaker.enter()
            wanted = self.until - self.clock.now if before == "open" else 0
            assert caught.value.retry_after == pytest.approx(wanted)
            return (-1, 0)
        permit = self.breaker.enter()
        if before == "open":
            assert self.clock.now >= self.until
            self.probes, self.successes = set(), 0
        if before != "closed":
            assert len(self.probes) < 2
            self.probes.add(self.count)
        return (self.count, permit)

    @rule(permit=consumes(permits), how=st.sampled_from(["succeed", "fail", "leave"]))
    def end(self, permit: tuple[int, int], how: str) -> None:
        handle, number = permit
        if handle < 0:
            return
        before, failures = self.breaker.state, self.breaker.failures
        getattr(self.breaker, how)(number)
        probe = before == "half_open" and handle in self.probes
        self.probes.discard(handle)
        if before == "open" or (before == "half_open" and not probe):
            assert self.breaker.state == before
        elif how == "leave":
            assert (self.breaker.state, self.breaker.failures) == (before, failures)
        elif before == "half_open":
            self.successes += how == "succeed"
            wanted = "open" if how == "fail" else "closed" if self.successes == 2 else "half_open"
            assert self.breaker.state == wanted
        elif how == "succeed":
            assert (self.breaker.state, self.breaker.failures) == ("closed", 0)
        else:
            assert self.breaker.failures in (failures, failures + 1)
        if before != "open" and self.breaker.state == "open":
            self.until = self.clock.now + 10
        if self.breaker.state != "half_open":
            self.probes = set()

    @rule(seconds=st.sampled_from([0.0, 0.1, 5.0, 9.9, 10.0, 1e6]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @precondition(lambda self: self.breaker.state == "closed")
    @rule()
    def three_failures_one_after_the_other(self) -> None:
        while self.breaker.state == "closed":
            before = self.breaker.failures
            self.breaker.fail(self.breaker.enter())
            assert self.breaker.failures == before + 1
        self.until = self.clock.now + 10

    @invariant()
    def never_more_than_it_should(self) -> None:
        assert self.breaker.state in ("closed", "open", "half_open")
        assert self.breaker.failures >= 0
        assert self.breaker.state != "closed" or self.breaker.failures < 3
        assert 0 <= self.breaker.retry_after <= 10.001  # a float


@pytest.mark.parametrize("examples", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_the_breaker_is_the_model(examples: int) -> None:
    run_state_machine_as_test(Machine, settings=settings(max_examples=examples, stateful_step_count=60, deadline=None))
