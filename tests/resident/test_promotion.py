"""Where a vCPU lives: the policy alone, with scripted costs and times, and what it is fed."""

import asyncio
import itertools
import signal
import threading
import time
from contextlib import AsyncExitStack
from types import SimpleNamespace

import pytest

from kvmaio.bench.guests import PlainDevice, storming, user_loop
from kvmaio.kvm import promotion, resident
from kvmaio.kvm._native import ffi, lib
from kvmaio.kvm.gate import check
from kvmaio.kvm.host import Kvm
from kvmaio.kvm.hub import Hub
from kvmaio.kvm.promotion import Costs, Promotion
from tests.resident.guests import (
    COMPUTING,
    PATIENCE,
    SPINNING,
    STORMING,
    SVMLAB,
    cpu_of,
    machine_with,
    run_on,
)

US, MS = 1_000, 1_000_000
PERIOD_S = 0.02 if SVMLAB else 0.0002

CHEAP = Costs(exit_ns=10 * US, move_ns=2 * US)
DEAR = Costs(exit_ns=10 * US, move_ns=16 * MS)
BOTH = pytest.mark.parametrize("costs", [CHEAP, DEAR], ids=["cheap moves", "dear moves"])


class Script:
    """A vCPU by the policy: how often it moved, in scripted time."""

    def __init__(self, costs):
        self.now_ns = 1_000 * MS
        self.policy = Promotion(costs)
        self.inside_ns = 0
        self.is_resident = False

    def exit(self, after_ns, count=1, *, changing_ns=0, serving_ns=0):
        """`count` exits, each after so long in the guest and so long between threads."""
        for _ in range(count):
            self.now_ns += after_ns + changing_ns
            self.policy.left()
            self.now_ns += serving_ns
            if not self.is_resident and self.policy.exits_often(after_ns):
                self.is_resident = True
                self.policy.moved()

    def be_quiet(self, ns):
        """The guest goes on for so long without an exit."""
        self.now_ns += ns
        if self.is_resident and self.policy.is_quiet(ns):
            self.is_resident = False
            self.policy.moved()

    @property
    def moves(self):
        return self.policy.moves


@pytest.fixture
def script(monkeypatch):
    def make(costs):
        script = Script(costs)
        monkeypatch.setattr(promotion, "time", SimpleNamespace(monotonic_ns=lambda: script.now_ns))
        return script

    return make


@BOTH
def test_a_guest_that_exits_often_moves_in_at_once(script, costs):
    vcpu = script(costs)
    vcpu.exit(20 * US, count=2 * promotion.OFTEN_EXITS)
    assert (vcpu.is_resident, vcpu.moves) == (True, 1)


@BOTH
def test_a_guest_that_exits_now_and_then_stays_where_it_is(script, costs):
    vcpu = script(costs)
    vcpu.exit(1 * MS, count=10_000)
    assert (vcpu.is_resident, vcpu.moves) == (False, 0)


@BOTH
def test_where_the_change_of_threads_is_slow_it_moves_in_all_the_same(script, costs):
    vcpu = script(costs)
    vcpu.exit(40 * US, count=2 * promotion.OFTEN_EXITS, changing_ns=80 * MS)
    assert (vcpu.is_resident, vcpu.moves) == (True, 1)


def test_where_exits_are_slow_fewer_are_often(script):
    vcpu = script(Costs(exit_ns=40 * US, move_ns=16 * MS))
    vcpu.exit(600 * US, count=2 * promotion.OFTEN_EXITS)
    assert (vcpu.is_resident, vcpu.moves) == (True, 1)


@BOTH
def test_a_guest_that_its_devices_keep_waiting_stays_where_it_is(script, costs):
    vcpu = script(costs)
    vcpu.exit(40 * US, count=10_000, serving_ns=5 * MS)
    assert (vcpu.is_resident, vcpu.moves) == (False, 0)


@BOTH
def test_a_storm_after_a_long_rest_counts_from_its_beginning(script, costs):
    vcpu = script(costs)
    vcpu.exit(100 * MS, count=75)
    vcpu.exit(20 * US, count=100)
    assert (vcpu.is_resident, vcpu.moves) == (True, 1)


@BOTH
def test_a_resident_that_hardly_exits_any_more_moves_out(script, costs):
    vcpu = script(costs)
    vcpu.exit(20 * US, count=100)
    vcpu.be_quiet(vcpu.policy.quiet_ns)
    assert vcpu.is_resident
    vcpu.be_quiet(vcpu.policy.quiet_ns + 1)
    assert (vcpu.is_resident, vcpu.moves) == (False, 2)


@BOTH
def test_a_loop_that_was_busy_is_no_reason_to_move_out(script, costs):
    vcpu = script(costs)
    vcpu.exit(20 * US, count=100)
    vcpu.now_ns += 10_000 * MS  # the loop was elsewhere; the guest was not run
    assert not vcpu.policy.is_quiet(inside_ns=1 * MS)


def test_where_moves_are_dear_there_are_no_others(script):
    vcpu = script(DEAR)
    for _ in range(100):
        vcpu.exit(20 * US, count=1_000)
        vcpu.be_quiet(2_000 * MS)
    assert (vcpu.is_resident, vcpu.moves) == (False, 2)


def test_where_moves_are_cheap_they_are_rare(script):
    vcpu = script(CHEAP)
    began_ns = vcpu.now_ns
    for _ in range(1_000):
        vcpu.exit(20 * US, count=100)
        vcpu.be_quiet(promotion.QUIET_NS + 1)
    assert 2 < vcpu.moves <= 2 + (vcpu.now_ns - began_ns) // promotion.MOVE_EVERY_NS


@pytest.mark.parametrize(
    ("exit_ns", "budget_ns"),
    [(0, 500 * US), (1 * US, 500 * US), (3 * US, 720 * US), (10 * US, 1 * MS), (100 * US, 6 * MS)],
)
def test_the_budget_is_240_exits_from_half_a_millisecond_to_one_or_60_slow_ones(exit_ns, budget_ns):
    assert Costs(exit_ns, 0).budget_ns == budget_ns


@pytest.mark.parametrize(("move_ns", "cheap"), [(0, True), (100 * US, True), (101 * US, False)])
def test_moves_are_cheap_up_to_ten_exits(move_ns, cheap):
    assert Costs(10 * US, move_ns).moves_are_cheap is cheap


# ---- what is measured ------------------------------------------------------------------------


@pytest.fixture
def measurements(monkeypatch):
    """Counts measurements from here on, none having been made."""
    made = []

    def measure(*arguments):
        made.append(threading.current_thread().name)
        time.sleep(0.02)  # so that others come meanwhile
        return lib.kvmaio_measure(*arguments)

    calls = SimpleNamespace(kvmaio_measure=measure, kvmaio_measure_entry=lib.kvmaio_measure_entry)
    monkeypatch.setattr(promotion, "_measured", None)
    monkeypatch.setattr(promotion, "lib", calls)
    return made


@pytest.mark.kvm
def test_costs_are_measured_by_the_first_machine_and_never_in_a_run(measurements, loop_kind):
    async def main():
        seen = []
        for _ in range(2):
            async with machine_with(STORMING) as machine:
                seen.append(len(measurements))
                run = await machine.vcpus[0].run()
                assert run is not None
                seen.append(len(measurements))
        return seen

    assert run_on(loop_kind, main()) == [1, 1, 1, 1]
    assert run_on(loop_kind, main()) == [1, 1, 1, 1]


@pytest.mark.kvm
def test_costs_are_measured_once_by_loops_that_begin_together(measurements):
    async def main():
        async with machine_with(COMPUTING):
            pass

    threads = [threading.Thread(target=run_on, args=("asyncio", main())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(measurements) == 1


def measure(kvm):
    out = ffi.new("int64_t[2]")
    began_s = time.monotonic()
    check(lib.kvmaio_measure(kvm.fd, kvm.vcpu_page_size, out, out + 1), "KVM_RUN")
    return out[0], out[1], time.monotonic() - began_s


@pytest.mark.kvm
def test_what_is_measured_is_plausible():
    with Kvm.open() as kvm:
        figures = [measure(kvm) for _ in range(3)]
    for exit_ns, move_ns, _ in figures:
        assert 200 < exit_ns < 1 * MS * PATIENCE
        assert 0 <= move_ns < 200 * MS * PATIENCE
    assert min(took_s for _, _, took_s in figures) < 0.06 * PATIENCE  # as promised


@pytest.mark.kvm
def test_signals_do_not_make_an_exit_look_cheap():
    """KVM_RUN that a signal ended before the guest ran is no exit."""
    arrived = itertools.count()
    before = signal.signal(signal.SIGALRM, lambda number, frame: next(arrived))
    with Kvm.open() as kvm:
        quiet_ns = min(measure(kvm)[0] for _ in range(3))
        signal.setitimer(signal.ITIMER_REAL, PERIOD_S, PERIOD_S)
        try:
            disturbed_ns = min(measure(kvm)[0] for _ in range(10))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert disturbed_ns > quiet_ns / 2


# ---- storms ------------------------------------------------------------------------------------


def test_work_between_exits_tells_a_storm_from_a_guest_that_has_to_wait():
    policy = Promotion(CHEAP)
    for _ in range(promotion.OFTEN_EXITS - 1):
        assert not policy.exits_often(5 * MS, 10 * US)
    assert policy.exits_often(5 * MS, 10 * US)  # kept waiting, by other threads
    assert policy.storms
    for _ in range(promotion.OFTEN_EXITS - 1):
        policy.exits_often(100 * US, 100 * US)
    assert policy.exits_often(100 * US, 100 * US)
    assert not policy.storms  # it computes as well


def test_a_guest_whose_devices_take_their_time_is_no_storm(monkeypatch):
    now_ns = 1_000 * MS
    monkeypatch.setattr(promotion, "time", SimpleNamespace(monotonic_ns=lambda: now_ns))
    for pause_ns, storms in ((100 * US, False), (10 * US, True)):
        policy = Promotion(CHEAP)
        for _ in range(promotion.OFTEN_EXITS):
            now_ns += pause_ns
            policy.exits_often(10 * US, 10 * US)
        assert policy.storms is storms


def test_in_company_less_patience_is_due():
    policy = Promotion(CHEAP)
    assert not policy.is_quiet(policy.quiet_ns)
    assert policy.is_quiet(policy.quiet_ns // 10 + 1, crowd=10)


@pytest.mark.kvm
@pytest.mark.timeout(60 * PATIENCE)
def test_all_that_storm_share_the_loops_thread_where_moves_are_cheap():
    async def main():
        async with AsyncExitStack() as stack:
            machines = [await stack.enter_async_context(machine_with(STORMING)) for _ in range(5)]
            hub = Hub.acquire()
            stack.callback(hub.release)
            runs = [asyncio.ensure_future(machine.run()) for machine in machines]
            most = 5 if hub.costs.moves_are_cheap else resident.MOST
            async with asyncio.timeout(20 * PATIENCE):
                while sum(cpu_of(machine).is_resident for machine in machines) < most:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            exits = [machine.vcpus[0].stats.numIO for machine in machines]
            async with asyncio.timeout(20 * PATIENCE):
                while not all(  # noqa: ASYNC110
                    machine.vcpus[0].stats.numIO > before + 100
                    for machine, before in zip(machines, exits, strict=True)
                ):
                    await asyncio.sleep(0.001)
            for machine in machines:
                machine.stop()
            await asyncio.wait(runs)

    run_on("asyncio", main())


# ---- steps ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("costs", "limit_ns", "timed_out", "steps"),
    [
        (CHEAP, 1 * MS, True, True),
        (DEAR, 1 * MS, True, False),
        (CHEAP, 6 * MS, True, False),
        (CHEAP, 1 * MS, False, False),
    ],
    ids=["short", "moves are dear", "long", "ended by exits"],
)
def test_short_runs_one_after_the_other_are_steps(costs, limit_ns, timed_out, steps):
    policy = Promotion(costs)
    told = [policy.steps(limit_ns, timed_out) for _ in range(promotion.OFTEN_STEPS)]
    assert told == [False] * (promotion.OFTEN_STEPS - 1) + [steps]
    policy.moved()
    assert policy.stepped_enough(limit_ns, alone=False) is steps


def test_steps_that_come_late_move_out_and_stay_out(monkeypatch):
    now_ns = 1_000 * MS
    monkeypatch.setattr(promotion, "time", SimpleNamespace(monotonic_ns=lambda: now_ns))
    policy = Promotion(CHEAP)
    while not policy.steps(1 * MS, timed_out=True):
        pass
    policy.moved()
    took_ns = [*[1 * MS] * 20, *[4 * MS] * 2, 1 * MS, *[4 * MS] * promotion.MOST_LATE]
    told = []
    for each in took_ns:
        told.append(policy.stepped_enough(1 * MS, alone=True))
        now_ns += each
        policy.left()
    assert not any(told)
    assert policy.stepped_enough(1 * MS, alone=True)
    policy.moved()
    now_ns += promotion.MOVE_EVERY_NS + 1
    for _ in range(promotion.BUSY_STEPS):
        assert not policy.steps(1 * MS, timed_out=True)


# ---- alone, and changes of threads take their share -----------------------------------------


class Computing:
    """A vCPU by the policy: an exit each millisecond of its guest's time."""

    def __init__(self, monkeypatch, costs=CHEAP):
        self.now_ns = 1_000 * MS
        self.alone = True
        monkeypatch.setattr(promotion, "time", SimpleNamespace(monotonic_ns=lambda: self.now_ns))
        self.policy = Promotion(costs)

    def moves_in(self, lost_ns, exits=promotion.OFTEN_EXITS):
        for _ in range(exits):
            self.now_ns += 1 * MS + lost_ns
            self.policy.left()
            if self.policy.exits_often(1 * MS, is_alone=lambda: self.alone):
                self.policy.moved()
                return True
        return False

    def moves_out(self, share, windows=4, idle_ns=0):
        """`share` of the time that it waits is the guest's; before, it does not run at all."""
        for _ in range(windows):
            self.now_ns += idle_ns
            self.policy.waits(inside_ns=0)
            self.now_ns += promotion.BUSY_WINDOW_NS + 1
            self.policy.has_waited(int(promotion.BUSY_WINDOW_NS * share))
            if self.policy.loses_here(lambda: self.alone):
                self.policy.moved()
                return True
        return False


@pytest.mark.parametrize(
    ("costs", "lost_ns", "alone", "moves"),
    [
        (CHEAP, 200 * US, True, True),
        (CHEAP, 30 * US, True, False),
        (CHEAP, 200 * US, False, False),
        (DEAR, 200 * US, True, False),
    ],
    ids=["loses much", "loses little", "in company", "moves are dear"],
)
def test_one_that_is_alone_moves_in_for_what_changes_take(
    monkeypatch, costs, lost_ns, alone, moves
):
    vcpu = Computing(monkeypatch, costs)
    vcpu.alone = alone
    assert vcpu.moves_in(lost_ns, 10 * promotion.OFTEN_EXITS) is moves


def test_it_moves_out_again_in_company(monkeypatch):
    vcpu = Computing(monkeypatch)
    assert vcpu.moves_in(200 * US)
    assert not vcpu.moves_out(0.9)
    vcpu.alone = False
    assert vcpu.moves_out(0.9)


def test_it_moves_out_of_a_busy_loop_and_stays_out_for_a_while(monkeypatch):
    vcpu = Computing(monkeypatch)
    assert vcpu.moves_in(200 * US)
    assert not vcpu.moves_out(0.6)
    assert not vcpu.moves_out(0.9, idle_ns=10 * promotion.BUSY_WINDOW_NS)  # nobody wanted to run
    assert vcpu.moves_out(0.4)
    before_ns = vcpu.now_ns
    while not vcpu.moves_in(200 * US):
        pass
    assert vcpu.now_ns - before_ns > promotion.BUSY_FOR_NS


def test_one_that_exits_often_is_no_matter_of_company(monkeypatch):
    vcpu = Computing(monkeypatch)
    while not vcpu.policy.exits_often(20 * US, is_alone=lambda: True):
        vcpu.now_ns += 20 * US
    vcpu.policy.moved()
    vcpu.alone = False
    assert not vcpu.moves_out(0.1)


@pytest.mark.kvm
@pytest.mark.timeout(60 * PATIENCE)
@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_two_that_compute_have_a_thread_each(kind):
    async def main():
        guest = user_loop(1_000_000)  # at a native speed under any KVM: a millisecond, about
        async with (
            asyncio.timeout(40 * PATIENCE),
            storming(guest, PlainDevice) as one,
            storming(guest, PlainDevice) as other,
        ):
            one.device.left = other.device.left = 1 << 62
            machines = one.machine, other.machine
            runs = [asyncio.ensure_future(machine.run()) for machine in machines]
            together = 0
            for _ in range(50):
                await asyncio.sleep(0.02)
                together += all(cpu_of(machine).is_resident for machine in machines)
            assert together < 25  # by chance neither sees the other for a moment
            for machine in machines:
                assert cpu_of(machine).moves <= 2 + 1_000 * PATIENCE // 200
                machine.stop()
            await asyncio.gather(*runs)

    run_on(kind, main())


@pytest.mark.kvm
@pytest.mark.timeout(60 * PATIENCE)
@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_who_runs_in_steps_moves_in_and_out_again_in_company(kind):
    async def steps(vcpu, count):
        for _ in range(count):
            begun_ns = time.monotonic_ns()
            exit_ = await vcpu.run(ticks=1 * MS)
            assert exit_.timer_expired and time.monotonic_ns() - begun_ns >= 1 * MS

    async def main():
        async with asyncio.timeout(20 * PATIENCE), machine_with(SPINNING) as machine:
            cpu, vcpu = cpu_of(machine), machine.vcpus[0]
            hub = Hub.acquire()
            try:
                cheap = hub.costs.moves_are_cheap and kind == "asyncio"
            finally:
                hub.release()
            await steps(vcpu, 2 * promotion.OFTEN_STEPS)
            assert (cpu.is_resident, cpu.moves) == (cheap, int(cheap))
            async with machine_with(SPINNING) as other:
                await steps(vcpu, 2)
                await steps(other.vcpus[0], 2 * promotion.OFTEN_STEPS)
                assert not cpu.is_resident and not cpu_of(other).is_resident
                assert cpu.moves == 2 * cheap

    run_on(kind, main())


@pytest.mark.kvm
@pytest.mark.timeout(60 * PATIENCE)
@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_beside_a_busy_loop_steps_are_taken_on_a_thread_of_their_own(kind):
    async def main():
        over = False

        async def hammer():
            while not over:  # noqa: ASYNC110
                await asyncio.sleep(0)

        async with asyncio.timeout(20 * PATIENCE), machine_with(SPINNING) as machine:
            cpu, vcpu = cpu_of(machine), machine.vcpus[0]
            for _ in range(2 * promotion.OFTEN_STEPS):
                await vcpu.run(ticks=1 * MS)
            before = cpu.is_resident
            task = asyncio.ensure_future(hammer())
            for _ in range(promotion.BUSY_STEPS // 4):
                await vcpu.run(ticks=1 * MS)
                if not cpu.is_resident:
                    break
            over = True
            await task
            assert not cpu.is_resident and cpu.moves == 2 * before

    run_on(kind, main())
