"""Tests of Sweepea, in the order of the sections they test.

They talk to real RabbitMQ nodes that they start themselves, cause real faults (signals,
cut sockets, dead brokers) and wait for events, never for a fixed time. A test that is a
coroutine function runs on a kernel of its own (see the end of the file).
"""

from __future__ import annotations

import asyncio
import decimal
import functools
import inspect
import json
import logging
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import FrozenInstanceError, fields
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import pika
import pytest
from pika.adapters.select_connection import IOLoop

import olive_app
import olive_utils
import sweepea
from olive_app import OliveAppConfig
from sweepea import (
    CancelledError, CurioError, Event, Kernel, Queue, ReadResourceBusy, ResourceBusy,
    SchedBarrier, SchedFIFO, Semaphore, Task, TaskCancelled, TaskError,
    TaskTimeout, TimeoutCancellationError, UncaughtTimeoutError, WorkerError,
    WorkerLost, WriteResourceBusy, clock, current_task, gather, ignore_after, run,
    run_in_process, run_in_thread, sleep, spawn, timeout_after)

HERE = Path(__file__).parent
logging.getLogger("pika").setLevel(logging.CRITICAL)


# =====================================================================================
# What the tests share
# =====================================================================================

@pytest.fixture(scope="session")
def broker():
    """One RabbitMQ for all tests that do not harm it."""
    with olive_utils.private_broker() as broker:
        yield broker


def wait_until(condition, timeout=30.0, what=""):
    """Poll until `condition()` is true; return its value, or fail."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout} s: {what or condition}")


def gone(pids):
    """Whether no thread of these processes runs any more."""
    out = subprocess.run(["ps", "-eLo", "pid=,stat="], capture_output=True, text=True)
    return not pids & {int(pid) for pid, stat in map(str.split, out.stdout.splitlines())
                       if not stat.startswith("Z")}


class Client:
    """A plain pika client with queues of its own names, to send, look and count."""

    def __init__(self, url: str, name: str) -> None:
        self.parameters = pika.URLParameters(url)
        self.config = {"OLIVE_URL": url, "OLIVE_EXCHANGE": f"{name}.x",
                       "OLIVE_QUEUE": f"{name}.q", "OLIVE_DEAD_QUEUE": f"{name}.dead"}
        self.queue, self.dead_queue = f"{name}.q", f"{name}.dead"
        self.exchange = f"{name}.x"
        self.connect()

    def connect(self):
        self.connection = pika.BlockingConnection(self.parameters)
        self.channel = self.connection.channel()
        self.channel.confirm_delivery()
        self.replies = self.channel.queue_declare("", exclusive=True).method.queue

    def send(self, task="add", args=(2, 3), kwargs=None, *, body=None, embed=None,
             properties=None, **headers):
        """Publish a task as Celery would; return its id. `headers` override."""
        ident = headers.get("id") or str(uuid.uuid4())
        if body is None:
            body = json.dumps([list(args), kwargs or {}, embed or {
                "callbacks": None, "errbacks": None, "chain": None, "chord": None}])
        fields = {"content_type": "application/json", "content_encoding": "utf-8",
                  "delivery_mode": 2, "correlation_id": ident, "reply_to": self.replies,
                  "headers": {"task": task, "id": ident, **headers},
                  **(properties or {})}
        self.channel.basic_publish(
            "", self.queue, body.encode() if isinstance(body, str) else body,
            pika.BasicProperties(**fields), mandatory=True)
        return ident

    def reply(self):
        """The next reply as a dict, or AssertionError after 20 s."""
        return json.loads(self.get(self.replies)[1])

    def get(self, queue):
        """Take (properties, body) of the next message in a queue."""
        def taken():
            method, *message = self.channel.basic_get(queue, auto_ack=True)
            return method and message

        return wait_until(taken, 20, f"something in {queue}")

    def count(self, queue):
        """How many messages are ready in a queue."""
        return self.channel.queue_declare(queue, passive=True).method.message_count

    def close(self):
        with suppress(pika.exceptions.AMQPError):
            self.connection.close()


def _clean_environ():
    return {k: v for k, v in os.environ.items() if not k.startswith("OLIVE_")}


class App:
    """The app as a real process; `log` is its output so far."""

    def __init__(self, environ: dict, *argv: str, script="olive_app.py") -> None:
        environ = {**_clean_environ(), "PYTHONUNBUFFERED": "1", **environ}
        self.process = subprocess.Popen(
            [sys.executable, script if script == "-m" else str(HERE / script), *argv],
            env=environ, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def log(self):
        return "".join(self.lines)

    def wait_for(self, text, timeout=30.0, count=1):
        """Wait until the log says `text`, `count` times."""
        def said():
            if self.process.poll() is not None:
                self._reader.join(5)
                assert self.log.count(text) >= count, self.log
            return self.log.count(text) >= count
        try:
            wait_until(said, timeout, text)
        except AssertionError as exc:
            raise AssertionError(f"{exc}\n{self.log}") from None

    def signal(self, signum=signal.SIGTERM):
        self.process.send_signal(signum)

    def wait(self, timeout=40.0):
        """Wait for its end; return the exit status."""
        status = self.process.wait(timeout)
        self._reader.join(5)
        return status

    def stop(self):
        """End it by a signal, in good order."""
        self.signal()
        assert self.wait() == 0, self.log

    def children(self):
        """The pids of its descendants, which are of its session."""
        session = str(self.process.pid)
        out = subprocess.run(["ps", "-o", "pid=", "-s", session], capture_output=True,
                             text=True).stdout
        return {int(pid) for pid in out.split()} - {self.process.pid}


@contextmanager
def running(environ, *argv, ready="connected to", **options):
    """Run the app until the end of the block; it is killed if it does not leave."""
    app = App(environ, *argv, **options)
    try:
        if ready:
            app.wait_for(ready)
        yield app
    finally:
        if app.process.poll() is None:
            app.signal()
            try:
                app.wait(15)
            except subprocess.TimeoutExpired:
                app.process.kill()
                app.wait()


@pytest.fixture
def client(broker):
    """A client with names of its own on the common broker."""
    client = Client(broker.url, "t" + uuid.uuid4().hex[:8])
    yield client
    client.close()
    # Each quorum queue holds files of the broker's, which are not without end.
    connection = pika.BlockingConnection(client.parameters)
    for queue in client.queue, f"{client.queue}.calls", client.dead_queue:
        connection.channel().queue_delete(queue)
    connection.close()


def tasks_module(tmp_path, text, name="mytasks"):
    """Write a module of tasks; return the settings that load it."""
    (tmp_path / f"{name}.py").write_text("from olive_app import task\n" + text)
    return {"OLIVE_TASKS": name, "PYTHONPATH": f"{tmp_path}:{HERE}"}


def python(environ, *argv, timeout=60, cwd=HERE):
    """Run Python on something of ours; return the completed process."""
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True,
                          env={**_clean_environ(), **environ}, text=True, cwd=cwd,
                          timeout=timeout)


def send(environ, *argv):
    """Run the sender; return the completed process."""
    return python(environ, HERE / "olive_utils.py", *argv)


trap = sweepea._trap


async def until(condition, timeout=20.0):
    """Give the turn away until `condition()` is true; return its value, or fail."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, inspect.getsource(condition)
        await sleep(0.001)
    return value


async def waiting(corofunc, *args):
    """Spawn a task and return it once it waits for something other than its turn."""
    task = await spawn(corofunc, *args)
    await until(lambda: task.cancel_func is not None)
    return task


async def ended(task, timeout=20.0):
    """Return the exception with which a task ends, or None."""
    await timeout_after(timeout, task.wait)
    return task.exception


async def forever():
    await sleep(1_000_000)


@pytest.fixture
def pair():
    """Two sockets that are connected to each other."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def fill(file):
    """Write until the other end has to read first."""
    with pytest.raises(BlockingIOError):
        while True:
            os.write(sweepea._number(file), b"x" * 65536)


# =====================================================================================
# 1. Errors
# =====================================================================================

def test_cancellations_pass_through_except_exception_and_errors_do_not():
    for kind in (TaskCancelled, TaskTimeout, TimeoutCancellationError):
        assert issubclass(kind, CancelledError) and not issubclass(kind, Exception)
    for kind in (TaskError, UncaughtTimeoutError, ReadResourceBusy, WriteResourceBusy,
                 sweepea.SyncIOError, sweepea.AsyncOnlyError, WorkerLost, WorkerError):
        assert issubclass(kind, CurioError) and issubclass(kind, Exception)
    assert issubclass(ReadResourceBusy, ResourceBusy)
    assert issubclass(WriteResourceBusy, ResourceBusy)


def test_importing_sweepea_imports_no_multiprocessing():
    out = python({}, "-c", "import sys, sweepea; print('multiprocessing' in "
                 "sys.modules, sweepea.__version__)").stdout.split()
    assert out == ["False", sweepea.__version__]


# =====================================================================================
# 2. Traps
# =====================================================================================

def test_the_trap_table_has_curios_names():
    assert set(Kernel()._traps) == {f"trap_{name}" for name in (
        "io io_release io_waiting future_wait spawn cancel_task sleep sched_wait "
        "sched_wake clock set_timeout unset_timeout get_kernel get_current").split()}


async def test_clock_and_sleep_answer_the_monotonic_clock():
    before = time.monotonic()
    now = await trap("trap_clock")
    assert before <= now <= time.monotonic()
    assert now <= await clock()
    assert now + 0.01 <= await trap("trap_sleep", 0.01) <= time.monotonic()
    assert now <= await trap("trap_sleep", 0) <= time.monotonic()


async def test_spawn_answers_a_task_that_runs_after_the_spawner_waits():
    ran = []

    async def child(value):
        ran.append(value)
        return await current_task()

    me = await current_task()
    task = await trap("trap_spawn", child(1))
    assert isinstance(task, Task) and not ran and "child" in task.name
    assert (await task.join()) is task and ran == [1] and task.state == "TERMINATED"
    kernel = await trap("trap_get_kernel")
    assert me.id in kernel._tasks and task.id not in kernel._tasks
    with pytest.raises(TypeError):
        await spawn(len, "no coroutine function")


async def test_sleep_zero_gives_the_turn_to_the_others_in_order():
    turns = []

    async def child(name):
        for _ in range(3):
            turns.append(name)
            await sleep(0)

    for task in [await spawn(child, name) for name in "abc"]:
        await task.join()
    assert "".join(turns) == "abcabcabc"


async def test_set_and_unset_timeout_answer_the_earlier_timeout_and_the_clock():
    me, now = await current_task(), await clock()
    assert await trap("trap_set_timeout", now + 100) is None
    assert await trap("trap_set_timeout", now + 50) == now + 100
    assert await trap("trap_set_timeout", now + 70) == now + 50
    assert me.timeout == now + 50       # a later one changes nothing
    assert await trap("trap_set_timeout", None) == now + 50
    assert now <= await trap("trap_unset_timeout", now + 100) <= time.monotonic()
    assert me.timeout == now + 100
    await trap("trap_unset_timeout", None)
    assert me.timeout is None
    deadline = await clock() + 0.01
    await trap("trap_set_timeout", deadline)
    with pytest.raises(TaskTimeout) as info:        # at a trap that waits
        await forever()
    assert deadline <= info.value.args[0] <= time.monotonic()
    assert await trap("trap_set_timeout", None) is None


async def test_sched_wait_and_wake():
    room, woken = SchedFIFO(), []

    async def child(name):
        assert await trap("trap_sched_wait", room, "IN_THE_ROOM") is None
        woken.append(name)

    tasks = [await waiting(child, name) for name in "abc"]
    assert [task.state for task in tasks] == ["IN_THE_ROOM"] * 3 and len(room) == 3
    assert await trap("trap_sched_wake", room, 2) is None
    assert not woken                    # it does not wait
    await until(lambda: len(woken) == 2)
    await trap("trap_sched_wake", room, 5)
    await tasks[2].join()
    assert woken == ["a", "b", "c"] and len(room) == 0


async def test_future_wait_sets_an_event_and_its_cancellation_cancels_the_future():
    said = []

    class Loud(Future):
        def add_done_callback(self, callback):
            said.append("callback")
            super().add_done_callback(callback)

    class Ready:
        def set(self):
            said.append("event")
            future.set_result(5)

    future = Loud()
    assert await trap("trap_future_wait", future, Ready()) is None
    assert said == ["callback", "event"]        # the event once the callback is there
    assert future.result() == 5
    assert await sweepea._future_wait(future) == 5      # one that is done already
    future = Future()
    task = await waiting(sweepea._future_wait, future)
    await task.cancel()
    assert future.cancelled()


@pytest.mark.parametrize("args, kind, text", [
    ((), TaskCancelled, "TaskCancelled"), ((KeyError,), KeyError, "KeyError"),
    ((TaskCancelled, "because"), TaskCancelled, "because"),
    ((ValueError("as it is"),), ValueError, "as it is")])
async def test_cancel_task_raises_what_it_was_told(args, kind, text):
    task = await waiting(forever)
    assert await trap("trap_cancel_task", task, *args) is None
    assert task.cancelled and not task.terminated       # it does not wait
    exc = await ended(task)
    assert type(exc) is kind and exc.args == (text,)
    assert await trap("trap_cancel_task", task, *args) is None      # too late: quiet


def test_an_unknown_trap_leaves_run_and_the_kernel_is_of_no_more_use():
    async def main():
        await spawn(forever)
        await sleep(0)
        await trap("trap_door")

    kernel = Kernel()
    with pytest.raises(KeyError, match="trap_door"):
        kernel.run(main)
    for again in (lambda: kernel.run(main), kernel.run,
                  lambda: kernel.run(shutdown=True)):
        with pytest.raises(RuntimeError, match="crashed"):
            again()


def test_neither_a_task_nor_a_callback_can_run_the_kernel_that_runs_it():
    async def main():
        assert await trap("trap_get_kernel") is kernel
        me = await trap("trap_get_current")
        assert me.coro.cr_code is main.__code__ and me is await current_task()
        with pytest.raises(RuntimeError, match="running already"):
            kernel.run()
        kernel.loop.call_later(0, callback)
        await until(lambda: said)
        return "main"

    def callback():
        with pytest.raises(RuntimeError, match="running already"):
            kernel.run(clock)
        said.append("refused")

    said = []
    with Kernel() as kernel:
        assert kernel.run(main) == "main" and said == ["refused"]


async def test_what_a_trap_raises_is_its_answer():
    child = await waiting(forever)
    with pytest.raises(TypeError):      # it cannot be made without arguments
        await child.cancel(exc=UnicodeDecodeError)
    assert not child.terminated
    await child.cancel()
    assert child.terminated
    with pytest.raises(AttributeError):
        await trap("trap_future_wait", "no future", None)
    with pytest.raises(TypeError):
        await trap("trap_sleep", "long")
    assert await clock() > 0


async def test_a_coroutine_that_yields_no_trap_fails_its_own_task_alone():
    async def foreign():
        await asyncio.sleep(0)

    def nonsense():
        yield 5

    neighbour = await spawn(sleep, 0.05)
    for wrong in foreign(), asyncio.sleep(0), nonsense():
        error = await ended(await spawn(wrong))
        assert isinstance(error, TypeError) and "use sweepea.sleep" in str(error)
    await neighbour.join()


# =====================================================================================
# 3. Tasks
# =====================================================================================

async def test_join_raises_task_error_with_the_cause_and_the_crash_is_logged(caplog):
    async def crash():
        raise ValueError("boom")

    task = await spawn(crash)
    with pytest.raises(TaskError) as info:
        await task.join()
    assert info.value.__cause__ is task.exception and str(task.exception) == "boom"
    record, = [record for record in caplog.records if "Crash" in record.message]
    assert "crash" in record.message and record.exc_info[1] is task.exception
    with pytest.raises(ValueError, match="boom"):
        task.result


async def test_a_task_has_no_result_while_it_lives_nor_when_it_was_cancelled(caplog):
    task = await waiting(forever)
    for attribute in ("result", "exception"):
        with pytest.raises(RuntimeError, match="not terminated"):
            getattr(task, attribute)
    await task.cancel()
    assert isinstance(task.exception, TaskCancelled)
    with pytest.raises(TaskCancelled):
        task.result
    with pytest.raises(TaskError) as info:
        await task.join()
    assert isinstance(info.value.__cause__, TaskCancelled) and not caplog.records


async def test_everybody_who_waits_for_the_end_of_a_task_is_told():
    async def child():
        await event.wait()
        return 7

    event = Event()
    task = await waiting(child)
    joiners = [await waiting(task.join) for _ in range(10)]
    await event.set()
    assert [await joiner.join() for joiner in joiners] == [7] * 10
    assert await task.join() == 7       # and those that come later


@pytest.mark.parametrize("wait", [
    lambda pair: sweepea.read_wait(pair[0]), lambda _: sweepea._future_wait(Future()),
    lambda _: SchedFIFO().suspend(), lambda _: forever()],
    ids=["file", "future", "room", "timer"])
async def test_a_cancellation_and_a_timeout_end_every_kind_of_waiting(wait, pair):
    task = await waiting(wait, pair)
    await task.cancel()
    assert isinstance(task.exception, TaskCancelled)
    for _ in range(2):      # nothing is left behind: whoever comes next can wait there
        with pytest.raises(TaskTimeout):
            await timeout_after(0.001, wait(pair))


async def test_cancellation_waits_while_it_is_not_allowed():
    seen = []

    async def child():
        me = await current_task()
        me.allow_cancel = False
        await event.wait()
        await sleep(0)
        seen.append("inside")
        me.allow_cancel = True
        await clock()
        seen.append("outside")
        await sleep(0)
        seen.append("never")

    event = Event()
    task = await waiting(child)
    await task.cancel(blocking=False)
    await sleep(0)
    assert task.cancel_pending is not None and not task.terminated
    await event.set()
    assert isinstance(await ended(task), TaskCancelled)
    assert seen == ["inside", "outside"]


async def test_a_second_cancel_does_not_disturb_the_cleaning_up():
    async def child():
        try:
            await forever()
        finally:
            await event.wait()
            cleaned.append(True)

    event, cleaned = Event(), []
    task = await waiting(child)
    await task.cancel(blocking=False)
    await until(lambda: task.state == "EVENT_WAIT")
    again = await waiting(task.cancel)
    await sleep(0)
    assert not task.terminated
    await event.set()
    await again.join()
    assert cleaned and isinstance(task.exception, TaskCancelled)


async def test_a_task_cancelled_before_its_first_turn_gets_to_its_first_wait():
    async def child():
        seen.append("began")
        await clock()
        seen.append("clock")
        await sleep(0)
        seen.append("never")

    seen = []
    task = await spawn(child)
    await task.cancel()
    assert seen == ["began", "clock"] and isinstance(task.exception, TaskCancelled)


async def test_a_task_may_swallow_its_cancellation_and_may_cancel_itself():
    async def stays():
        try:
            await forever()
        except TaskCancelled:
            await sleep(0.001)
            return "I stay"

    async def goes():
        await (await current_task()).cancel()

    task = await waiting(stays)
    await task.cancel()
    assert await task.join() == "I stay"
    assert isinstance(await ended(await spawn(goes)), TaskCancelled)


@pytest.mark.parametrize("kind", [TaskCancelled, KeyError])
async def test_a_timeout_does_not_displace_a_cancellation_that_is_due(kind):
    async def child():
        me = await current_task()
        me.allow_cancel = False
        await event.wait()
        async with ignore_after(0.001):
            await until(lambda: me.timeout is None)     # its time has come
        me.allow_cancel = True
        await forever()

    event = Event()
    task = await waiting(child)
    await task.cancel(exc=kind, blocking=False)
    await event.set()
    assert type(await ended(task)) is kind


async def test_a_future_that_completes_too_late_answers_nobody():
    class Stubborn(Future):
        def cancel(self):
            return False

    async def child():
        try:
            await sweepea._future_wait(old)
        except TaskCancelled:
            return await sweepea._future_wait(new)

    old, new, other = Stubborn(), Future(), Future()
    task = await waiting(child)
    await task.cancel(blocking=False)
    await until(lambda: task.future is new)
    old.set_result("stale")
    other.set_result(None)
    await sweepea._future_wait(other)   # comes after the stale one
    assert not task.terminated and task.state == "FUTURE_WAIT"
    new.set_result("fresh")
    assert await task.join() == "fresh"


async def test_each_task_has_context_variables_of_its_own():
    async def third(digits):
        with decimal.localcontext() as context:
            context.prec = digits
            await sleep(0.01)
            inside = str(Decimal(1) / 3)
            threaded = await run_in_thread(lambda: str(Decimal(1) / 3))
            return len(inside) - 2, len(threaded) - 2

    assert await gather(*map(third, (5, 10, 20))) == [(5, 5), (10, 10), (20, 20)]
    assert len(await run_in_thread(lambda: str(Decimal(1) / 3))) == 30


# =====================================================================================
# 4. Waiting rooms
# =====================================================================================

async def test_the_order_of_a_room_is_kept_when_one_in_the_middle_is_cancelled():
    async def child(n):
        await room.suspend()
        order.append(n)

    room, order = SchedFIFO(), []
    tasks = [await waiting(child, n) for n in range(7)]
    for n in (3, 0, 6):
        await tasks[n].cancel()
    while room:
        await room.wake()
    for n in (1, 2, 4, 5):
        await tasks[n].join()
    assert order == [1, 2, 4, 5]


async def test_a_barrier_calls_everybody_or_so_many():
    room = SchedBarrier()
    tasks = [await waiting(room.suspend) for _ in range(5)]
    await room.wake(2)
    await until(lambda: sum(task.terminated for task in tasks) == 2)
    assert len(room) == 3
    await room.wake()
    for task in tasks:
        await task.join()


async def test_event():
    event = Event()
    tasks = [await waiting(event.wait) for _ in range(3)]
    assert not event.is_set()
    await event.set()
    for task in tasks:
        await task.join()
    await timeout_after(10, event.wait)     # is up: nobody waits
    event.clear()
    with pytest.raises(TaskTimeout):
        await timeout_after(0.001, event.wait)


async def test_a_semaphore_hands_its_permit_over_and_nobody_barges_in():
    async def child(name):
        async with semaphore:
            order.append(name)
            await sleep(0)

    async def barger():
        # Returns and wants it back within the same turn: has to wait all the same.
        for _ in range(3):
            async with semaphore:
                order.append("me")

    semaphore, order = Semaphore(1), []
    await semaphore.acquire()
    tasks = [await waiting(child, name) for name in "ab"] + [await waiting(barger)]
    await semaphore.release()
    assert semaphore.value == 0         # handed over, not laid down
    await semaphore.acquire()
    assert order == ["a", "b", "me"]
    await semaphore.release()
    for task in tasks:
        await task.join()
    assert semaphore.value == 1 and order == ["a", "b", "me", "me", "me"]


async def test_a_woken_task_that_is_cancelled_swallows_neither_permit_nor_item():
    async def holder():
        async with semaphore:
            await sleep(0)

    async def taker():
        got.append(await queue.get())
        await sleep(0)

    semaphore, queue, got = Semaphore(1), Queue(), []
    await semaphore.acquire()
    first, second = await waiting(holder), await waiting(holder)
    await semaphore.release()           # first is called but has not run yet
    await first.cancel(blocking=False)
    assert await ended(second) is None
    assert isinstance(await ended(first), TaskCancelled) and semaphore.value == 1
    first, second = await waiting(taker), await waiting(taker)
    await queue.put(1)
    await first.cancel(blocking=False)
    await queue.put(2)
    assert await ended(second) is None
    assert isinstance(await ended(first), TaskCancelled) and got == [1, 2]


async def test_an_item_that_comes_at_the_moment_of_the_timeout_is_not_lost():
    async def child():
        async with ignore_after(0.1):
            got.append(await queue.get())
        while len(got) < 2:
            got.append(await queue.get())

    queue, got = Queue(), []
    task = await waiting(child)
    deadline = task.timeout
    await queue.put(1)
    while time.monotonic() < deadline:  # (the kernel stands still: both have come)
        pass
    await queue.put(2)
    assert await ended(task) is None and got == [1, 2]


async def test_a_bounded_queue_makes_put_wait_and_keeps_the_order():
    async def producer():
        for n in range(100):
            await queue.put(n)
            put.append(n)

    queue, put = Queue(3), []
    task = await waiting(producer)
    assert put == [0, 1, 2]
    for n in range(100):
        assert await queue.get() == n and len(put) <= n + 4
        await sleep(0)
    await task.join()
    await waiting(queue.get)


async def test_gather_keeps_the_order():
    async def late(seconds):
        await sleep(seconds)
        return seconds

    assert await gather(late(0.03), late(0.01), late(0.02)) == [0.03, 0.01, 0.02]
    assert await gather() == []


async def test_the_first_failure_or_a_cancellation_cancels_all_that_was_gathered():
    async def waits():
        try:
            await forever()
        finally:
            await sleep(0)
            ended.append("waits")

    async def fails():
        await sleep(0.01)
        raise KeyError("first")

    ended, kernel = [], await trap("trap_get_kernel")
    with pytest.raises(KeyError, match="first"):
        await timeout_after(20, gather(waits(), fails(), waits()))
    assert ended == ["waits"] * 2 and len(kernel._tasks) == 1
    task = await spawn(gather(waits(), waits()))
    await until(lambda: [t.state for t in kernel._tasks.values()].count(
        "TIME_SLEEP") == 2)
    await task.cancel()
    assert ended == ["waits"] * 4


# =====================================================================================
# 5. Timeouts
# =====================================================================================

NEVER, NOW, SOON = 1000, 0, 0.01


@pytest.mark.parametrize("outer, inner, expected", [
    # what is raised in the innermost block, out of the inner one, out of the outer one
    (NEVER, SOON, [TaskTimeout, TaskTimeout, UncaughtTimeoutError]),
    (None, SOON, [TaskTimeout, TaskTimeout, UncaughtTimeoutError]),
    (SOON, NEVER, [TaskTimeout, TimeoutCancellationError, TaskTimeout]),
    (SOON, None, [TaskTimeout, TimeoutCancellationError, TaskTimeout]),
    (NOW, NOW, [TaskTimeout, TimeoutCancellationError, TaskTimeout])])
@pytest.mark.parametrize("as_call", [True, False])
async def test_nested_timeouts(outer, inner, expected, as_call):
    async def noting(corofunc):
        try:
            await corofunc()
        except BaseException as exc:
            raised.append(type(exc))
            raise

    async def limited(seconds, corofunc):
        if as_call:
            await timeout_after(seconds, noting, corofunc)
        else:
            async with timeout_after(seconds):
                await noting(corofunc)

    raised = []
    with pytest.raises(expected[-1]):
        await noting(lambda: limited(outer, lambda: limited(inner, forever)))
    assert raised == expected
    me = await current_task()
    assert me.timeout is None and me.cancel_pending is None


async def test_three_levels_of_which_the_middle_one_ends_first():
    async with timeout_after(NEVER):
        with pytest.raises(TaskTimeout):
            async with timeout_after(SOON):
                with pytest.raises(TimeoutCancellationError):
                    async with timeout_after(NEVER):
                        async with timeout_after(None):
                            await forever()
                await forever()     # (its own has been raised already: raise it again)
        await sleep(0)              # the outermost has not been touched


async def test_an_inner_timeout_that_was_caught_leaves_the_outer_one_in_force():
    with pytest.raises(TaskTimeout):
        async with timeout_after(0.03):
            for _ in range(3):
                with pytest.raises(TaskTimeout):
                    await timeout_after(0.001, forever)
            await forever()
    await sleep(0)


async def test_an_outer_timeout_that_passes_inside_is_raised_at_the_next_wait():
    with pytest.raises(TaskTimeout):
        async with timeout_after(SOON):
            deadline = (await current_task()).timeout
            async with timeout_after(NEVER):
                while await clock() < deadline:     # never waits
                    pass
            seen = "left the inner block in peace"
            await clock()
            await forever()
    assert seen.startswith("left")


async def test_a_timeout_that_could_not_be_delivered_goes_with_its_block():
    async with timeout_after(0.001) as timer:
        deadline = (await current_task()).timeout
        while await clock() <= deadline:
            pass
    await sleep(0.002)
    assert not timer.expired


async def test_timeouts_in_time():
    async def answer(value):
        await sleep(0)
        return value

    assert await timeout_after(NEVER, answer, 5) == 5
    assert await timeout_after(None, answer(6)) == 6
    assert await ignore_after(NEVER, answer, 7, timeout_result=8) == 7
    for limit in timeout_after(NEVER), ignore_after(None):
        async with limit as block:
            await sleep(0)
        assert not block.expired and block.result is True
    with pytest.raises(ValueError):
        async with ignore_after(NEVER):
            raise ValueError
    assert (await current_task()).timeout is None


async def test_ignore_after_the_time():
    assert await ignore_after(SOON, forever) is None
    assert await ignore_after(NOW, forever, timeout_result=8) == 8
    for options in {}, {"timeout_result": 9}:
        async with ignore_after(SOON, **options) as block:
            await forever()
        assert block.expired and block.result == options.get("timeout_result")
    with pytest.raises(TaskTimeout):
        async with timeout_after(SOON) as block:
            await forever()
    assert block.expired


async def test_an_inner_ignore_after_does_not_ignore_the_outer_timeout():
    async with ignore_after(SOON) as outer:
        async with ignore_after(NEVER) as inner:
            await forever()
        pytest.fail("the outer timeout was swallowed")
    assert outer.expired and not inner.expired


async def test_cancellation_inside_a_timeout_is_a_cancellation():
    task = await waiting(timeout_after, NEVER, timeout_after, NEVER, forever)
    await task.cancel()
    assert isinstance(task.exception, TaskCancelled)


@pytest.mark.parametrize("outer", [None, NEVER])
async def test_the_heap_does_not_grow_with_timeouts_that_never_fire(outer):
    kernel, most = await trap("trap_get_kernel"), 0
    async with timeout_after(outer):
        for n in range(200_000):
            earlier = await trap("trap_set_timeout", 1e9 - n % 7)
            await trap("trap_unset_timeout", earlier)
            most = max(most, len(kernel._timers))
        for _ in range(1_000):
            async with timeout_after(1.0):
                pass
    assert 0 < most < 10_000 and len(kernel._timers) < 10_000


# =====================================================================================
# 6. The kernel
# =====================================================================================

def test_run_without_a_coroutine_runs_one_pass(pair):
    async def child():
        for _ in range(3):
            steps.append("step")
            await sleep(0)
        await sleep(0.001)
        steps.append("timer")
        await sweepea.read_wait(pair[0])
        steps.append("file")
        await sweepea._future_wait(future)
        steps.append("future")

    steps, future = [], Future()
    with Kernel() as kernel:
        kernel.run()                    # nothing at all to do
        task = kernel._spawn(child())
        assert not steps
        for n in range(3):
            kernel.run()
            assert len(steps) == n + 1
        kernel.run()
        due = task.sleep
        wait_until(lambda: time.monotonic() > due)
        kernel.run()
        assert steps[3:] == ["timer"]
        kernel.run()                    # nothing to read: returns all the same
        pair[1].send(b"x")
        kernel.run()
        assert steps[4:] == ["file"]
        future.set_result(None)
        wait_until(lambda: kernel.run() or task.terminated)
        assert steps[5:] == ["future"]


def test_tasks_stay_between_runs_and_results_and_exceptions_leave_run():
    async def crash():
        raise ValueError("boom")

    queue = Queue()
    with Kernel() as kernel:
        task = kernel.run(spawn, queue.get)
        with pytest.raises(ValueError, match="boom"):
            kernel.run(crash)
        kernel.run(queue.put(5))        # a coroutine will do
        assert kernel.run(task.join) == 5
    assert not kernel._tasks


def test_a_shutdown_is_not_stopped_by_a_task_that_cancels_all():
    async def revenge():
        try:
            await forever()
        finally:
            for task in list(kernel._tasks.values()):
                if task is not await current_task():
                    await task.cancel(blocking=False)

    called = []
    with Kernel() as kernel:
        kernel.run(waiting, revenge)
        kernel._call_at_shutdown(lambda: called.append(True))
    assert called


def test_a_run_that_cannot_begin_leaves_nothing_open():
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(TypeError):
        run(clock, "an argument too many")
    assert len(os.listdir("/dev/fd")) == before


async def test_a_call_with_a_deadline_begins_when_it_is_awaited():
    made = []
    for limit in timeout_after, ignore_after:
        call = limit(1, lambda: made.append(True) or sleep(0))
        assert not made
        await call
        assert made.pop()


def test_a_kernel_lives_in_a_loop_that_is_given_and_makes_tasks_of_a_class_that_is():
    class MyTask(Task):
        pass

    loop, called = IOLoop(), []
    with Kernel(loop=loop, taskcls=MyTask) as kernel:
        loop.call_later(0, lambda: called.append(True))
        assert kernel.loop is loop
        assert isinstance(kernel.run(current_task), MyTask)
        kernel.run(until, lambda: called)


@pytest.mark.parametrize("enough", [8, 100_000])
def test_no_wake_up_from_another_thread_is_lost_and_the_bell_is_rung_seldom(enough):
    futures = [Future() for _ in range(enough)]
    rung = []

    def finish(mine):
        for n in mine:
            futures[n].set_result(n)

    async def main():
        tasks = [await spawn(sweepea._future_wait, future) for future in futures]
        await until(lambda: tasks[-1].state == "FUTURE_WAIT")
        assert len(kernel._tasks) == enough + 1
        for n in range(8):
            threading.Thread(target=finish, args=(range(n, enough, 8),)).start()
        return sum([await task.join() for task in tasks])

    with Kernel() as kernel:
        ring = kernel.loop.add_callback_threadsafe
        kernel.loop.add_callback_threadsafe = lambda func: (
            rung.append(func), ring(func))
        assert kernel.run(main) == sum(range(enough))
    assert 1 <= len(rung) <= max(8, enough // 10)


async def test_one_file_is_read_by_one_task_and_written_by_another(pair):
    ours, theirs = pair
    fill(ours)
    reader = await waiting(sweepea.read_wait, ours)
    writer = await waiting(sweepea.write_wait, ours)
    assert await trap("trap_io_waiting", ours) == (reader, writer)
    assert (reader.state, writer.state) == ("READ_WAIT", "WRITE_WAIT")
    with pytest.raises(ReadResourceBusy):
        await sweepea.read_wait(ours)
    with pytest.raises(WriteResourceBusy):
        await sweepea.write_wait(ours)
    theirs.send(b"hello")
    await reader.join()
    assert await trap("trap_io_waiting", ours) == (None, writer)
    assert ours.recv(10) == b"hello"
    reader = await waiting(sweepea.read_wait, ours)
    with pytest.raises(BlockingIOError):
        while True:
            theirs.recv(1 << 20)
    await writer.join()
    assert await trap("trap_io_waiting", ours) == (reader, None)
    await reader.cancel()
    assert await trap("trap_io_waiting", ours) == (None, None)
    # Both again, as if nothing had been.
    theirs.send(b"again")
    await sweepea.read_wait(ours)
    await sweepea.write_wait(ours)


async def test_a_task_that_reads_in_a_loop_gets_it_all(pair):
    async def reader():
        received = b""
        while len(received) < 1000:
            await sweepea.read_wait(pair[0])
            received += pair[0].recv(1)
        return received

    task = await waiting(reader)
    for n in range(1000):
        await sweepea.write_wait(pair[1])
        pair[1].send(bytes([n % 256]))
    assert await task.join() == bytes(n % 256 for n in range(1000))
    kernel = await trap("trap_get_kernel")
    assert kernel._files                        # it is watched still ...
    pair[1].send(b"x")
    await until(lambda: not kernel._files)      # ... until nobody waits for an event


async def test_a_file_released_while_waited_for_can_be_waited_for_anew(pair):
    task = await waiting(sweepea.read_wait, pair[0])
    assert await trap("trap_io_release", pair[0]) is None
    assert await trap("trap_io_waiting", pair[0]) == (None, None)
    await trap("trap_io_release", pair[0])      # nothing to release: quiet
    await trap("trap_io_release", print)        # no file at all: as quiet (as in Curio)
    other = await waiting(sweepea.read_wait, pair[0])
    pair[1].send(b"x")
    await other.join()
    assert not task.terminated                  # forgotten, but can be cancelled
    await task.cancel()
    assert isinstance(task.exception, TaskCancelled)


@pytest.mark.parametrize("waited", ["in wait", "just read", "not released"])
async def test_the_number_of_a_closed_file_is_used_again(waited, pair):
    for _ in range(2):
        old, peer = socket.socketpair()
        fd, task = old.fileno(), None
        if waited == "in wait":
            task = await waiting(sweepea.read_wait, old)
        else:
            peer.send(b"x")
            await sweepea.read_wait(old)
        if waited != "not released":    # all in one turn: the loop has not looked yet
            await sweepea.io_release(old)
        old.close()
        new = os.dup(pair[0].fileno())
        assert new == fd
        with socket.socket(fileno=new) as new, peer:
            new.setblocking(False)
            if task is not None:
                reader = await waiting(sweepea.read_wait, new)
                assert await trap("trap_io_waiting", new) == (reader, None)
                pair[1].send(b"new")
                await reader.join()
                assert not task.terminated
                await task.cancel()
            else:
                pair[1].send(b"new")
                await timeout_after(20, sweepea.read_wait, new)
            assert new.recv(10) == b"new"
            with pytest.raises(TaskTimeout):
                await timeout_after(0.01, sweepea.read_wait, new)
            await sweepea.io_release(new)


async def test_a_file_may_be_a_number():
    read, write = os.pipe()
    for _ in range(3):
        task = await waiting(sweepea.read_wait, read)
        assert await trap("trap_io_waiting", read) == (task, None)
        os.write(write, b"x")
        await task.join()
        assert os.read(read, 10) == b"x"
        await sweepea.write_wait(write)
    os.close(write)
    os.close(read)
    again = os.pipe()                           # the same numbers
    assert set(again) == {read, write}
    with pytest.raises(TaskTimeout):
        await timeout_after(0.01, sweepea.read_wait, again[0])
    await sweepea.write_wait(again[1])
    for fd in again:
        os.close(fd)


async def test_an_object_may_open_another_file_of_the_same_number():
    class Reopened:
        def open(self):
            self.ours, self.theirs = socket.socketpair()
            self.theirs.send(b"x")

        def fileno(self):
            return self.ours.fileno()

    thing, numbers = Reopened(), set()
    for _ in range(2):
        thing.open()
        numbers.add(thing.fileno())
        await timeout_after(20, sweepea.read_wait, thing)
        thing.ours.close()      # (and not released)
        thing.theirs.close()
    assert len(numbers) == 1


async def test_a_number_that_now_belongs_to_a_plain_file_does_no_harm(tmp_path):
    read, write = os.pipe()
    task = await waiting(sweepea.read_wait, read)
    os.close(read)
    with open(tmp_path / "plain", "w") as plain:    # which no poll takes
        assert plain.fileno() == read
        await sleep(0.001)
        assert not task.terminated
        await task.cancel()
    assert isinstance(task.exception, TaskCancelled)
    os.close(write)


@pytest.mark.parametrize("end", ["reader", "writer"])
async def test_a_hang_up_wakes_the_other_end(end):
    read, write = os.pipe()
    os.set_blocking(write, False)
    if end == "reader":
        task = await waiting(sweepea.read_wait, read)
        os.close(write)
    else:
        fill(write)
        task = await waiting(sweepea.write_wait, write)
        os.close(read)
    assert await ended(task) is None
    os.close(read if end == "reader" else write)


async def test_a_closed_file_is_an_error_at_the_trap_and_the_kernel_goes_on(tmp_path):
    sock = socket.socket()
    sock.close()
    with open(tmp_path / "regular", "w") as file:   # which cannot be polled
        if sys.platform == "linux":
            with pytest.raises(OSError):
                await sweepea.read_wait(file)
    for closed in sock, file:
        for wait in (sweepea.read_wait, sweepea.write_wait) * 2:
            with pytest.raises((OSError, ValueError)):
                await wait(closed)
        for quiet in "release", "waiting":
            with suppress(ValueError):              # has no number any more
                await trap(f"trap_io_{quiet}", closed)
    await sweepea.io_release(sock)
    await sleep(0)


@pytest.mark.parametrize("how", ["read and close", "close and cancel"])
async def test_a_socket_closed_by_its_reader_while_another_task_writes(how, pair):
    async def reader():
        await sweepea.read_wait(ours)
        ours.close()            # without a word to the kernel

    ours, theirs = pair
    fill(ours)
    task = await waiting(reader)
    writer = await waiting(sweepea.write_wait, ours)
    if how == "read and close":
        theirs.send(b"x")
        assert await ended(task) is None
    else:
        ours.close()
        await task.cancel()
    await writer.cancel()
    await sleep(0)


def test_a_callback_that_raises_leaves_run_and_the_kernel_can_be_used_again():
    def boom():
        raise ValueError("boom")

    async def main():
        for _ in range(20):
            await sleep(0.001)
        return "done"

    with Kernel() as kernel:
        task = kernel._spawn(main())
        for _ in range(3):
            for _ in range(5):
                kernel.loop.call_later(0, boom)
            with pytest.raises(ValueError, match="boom"):
                kernel.run(forever)
        assert kernel.run(task.join) == "done"


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_what_is_meant_for_the_program_leaves_run_and_the_kernel_shuts_down(kind):
    async def leave():
        await sleep(0)
        raise kind(3)

    async def other():
        try:
            await forever()
        finally:
            cleaned.append(True)

    async def main():
        await spawn(other)
        await spawn(leave)
        await forever()

    cleaned = []
    with Kernel() as kernel:
        with pytest.raises(kind):
            kernel.run(main)
        assert len(kernel._tasks) == 2 and kernel.run(clock)
    assert cleaned and not kernel._tasks
    with pytest.raises(kind):
        run(main)
    assert len(cleaned) == 2


def test_shutdown_cancels_the_newest_first_then_calls_back_and_is_final():
    async def child(n):
        try:
            await forever()
        finally:
            await sleep(0)
            said.append(n)

    async def main():
        for n in range(5):
            await waiting(child, n)
        return "result"

    said, kernel = [], Kernel()
    kernel._call_at_shutdown(lambda: said.append("shutdown"))
    assert kernel.run(main, shutdown=True) == "result"
    assert said == [4, 3, 2, 1, 0, "shutdown"] and not kernel._tasks
    for again in (kernel.run, lambda: kernel.run(clock),
                  lambda: kernel.run(shutdown=True)):
        with pytest.raises(RuntimeError, match="shut down"):
            again()


def test_shutdown_reaches_tasks_that_are_spawned_while_it_goes_on():
    async def hydra(n):
        try:
            await forever()
        finally:
            if n:
                await spawn(hydra, n - 1)
                await spawn(hydra, n - 1)
            ends.append(n)

    ends = []
    with Kernel() as kernel:
        kernel.run(waiting, hydra, 3)
    assert sorted(ends) == [0] * 8 + [1] * 4 + [2] * 2 + [3]


@pytest.mark.parametrize("swallows", [CancelledError, BaseException])
def test_shutdown_drops_tasks_that_refuse_to_go(swallows, monkeypatch, caplog):
    async def child():
        for _ in range(2):
            with suppress(swallows):
                await forever()

    monkeypatch.setattr(sweepea, "SHUTDOWN_GRACE", 0.01)
    with Kernel() as kernel:
        kernel.run(waiting, child)
        kernel._call_at_shutdown(lambda: caplog.records or pytest.fail("too early"))
    assert "child" in caplog.text and "dropped" in caplog.text and not kernel._tasks


def test_shutdown_of_a_task_that_waits_for_a_thread(caplog):
    gate, began = threading.Event(), threading.Event()
    with Kernel() as kernel:
        kernel.run(waiting, run_in_thread, lambda: (began.set(), gate.wait(30)))
        assert began.wait(10)
    assert not kernel._tasks and "abandoned" in caplog.text
    gate.set()


def test_shutdown_of_very_many_tasks_takes_no_longer_than_their_number():
    def seconds(count):
        async def main():
            for _ in range(count):
                await spawn(forever)
            await sleep(0)
        kernel = Kernel()
        kernel.run(main)
        began = time.perf_counter()
        kernel.run(shutdown=True)
        return time.perf_counter() - began

    few = seconds(1_000)
    assert seconds(10_000) < 10 * few * 4       # ten times as many; four to spare


async def test_the_loop_has_its_turn_within_a_round_of_ready_tasks(monkeypatch):
    def tick():
        turns.append(True)
        kernel.loop.call_later(0, tick)

    async def busy():
        for _ in range(10):
            await sleep(0)

    monkeypatch.setattr(sweepea, "SLICE", 0)
    await sleep(0.001)          # (the turn that runs is of the old length)
    turns, kernel = [], await trap("trap_get_kernel")
    tick()
    for task in [await spawn(busy) for _ in range(20)]:
        await task.join()
    assert len(turns) > 100     # not once a round, which would be some 10


def test_signals_are_a_queue():
    async def main(queue):
        for number in signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1:
            os.kill(os.getpid(), number)
            assert await timeout_after(20, queue.get) == number
        os.kill(os.getpid(), signal.SIGWINCH)       # ignored before, and still
        os.kill(os.getpid(), signal.SIGUSR2)
        assert await timeout_after(20, queue.get) == signal.SIGUSR2

    signal.signal(signal.SIGWINCH, signal.SIG_IGN)
    before = signal.getsignal(signal.SIGUSR1)
    with sweepea.signals(signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH) as queue:
        run(main, queue)
    assert signal.getsignal(signal.SIGUSR1) == before
    assert signal.getsignal(signal.SIGWINCH) == signal.SIG_IGN
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("where", ["thread", "task"])
def test_a_forked_child_has_the_default_handlers(where):
    def fork():
        child = os.fork()
        if not child:
            try:
                time.sleep(60)
            finally:
                os._exit(1)
        return child

    async def main():
        return await run_in_thread(fork) if where == "thread" else fork()

    with sweepea.signals(signal.SIGTERM):
        child = run(main)
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM


# =====================================================================================
# 7. The bridge
# =====================================================================================

QUIET = pika.BasicProperties(correlation_id="1")


async def connect(broker, **options):
    connection = await sweepea.Connection.open([broker.url])
    return connection, await connection.channel(**options)


async def own_queue(channel, **arguments):
    """Declare a queue for this connection alone; return its name."""
    declared = await channel.call("queue_declare", "", exclusive=True,
                                  arguments=arguments)
    return declared.method.queue


async def length(channel, queue):
    declared = await channel.call("queue_declare", queue, passive=True)
    return declared.method.message_count


DEAD = "amqp://guest:secret@127.0.0.1:1/%2F"        # where nobody listens


async def test_the_urls_are_tried_in_turn(broker):
    connection = await sweepea.Connection.open([DEAD, broker.url])
    assert connection.pika.params.port == broker.port
    await connection.close()
    with pytest.raises(pika.exceptions.AMQPConnectionError) as caught:
        await sweepea.Connection.open([DEAD])
    assert "refused" in sweepea.describe(caught.value)


@pytest.mark.parametrize("change", [
    ("guest:guest", "guest:secret"), ("%2F", "nowhere")])
async def test_a_refusal_is_known_as_one_and_keeps_the_password(broker, change):
    with pytest.raises(sweepea.REFUSED) as caught:
        await sweepea.Connection.open([broker.url.replace(*change), DEAD])
    assert "secret" not in sweepea.describe(caught.value)


async def test_every_waiter_learns_that_the_channel_was_closed(broker):
    connection, channel = await connect(broker)
    tasks = [await spawn(length, channel, name) for name in ("no-such-queue", "no")]
    for task in tasks:
        assert isinstance(await ended(task), pika.exceptions.ChannelClosedByBroker)
    with pytest.raises(pika.exceptions.ChannelClosedByBroker):
        await channel.call("queue_declare", "q")
    channel.basic_ack(1)        # quiet, as there is nothing left to say
    channel.basic_nack(1)
    assert connection.closed is None
    await connection.close()
    with pytest.raises(pika.exceptions.AMQPError):
        await connection.channel()


async def test_a_return_reaches_the_one_who_published_it(broker):
    async def publish(n):
        key = queue if n % 3 else "nowhere"
        properties = pika.BasicProperties(correlation_id=str(n % 7))
        try:
            await channel.basic_publish("", key, b"x", properties)
            return "confirmed"
        except pika.exceptions.UnroutableError:
            return "returned"

    connection, channel = await connect(broker, confirm=True)
    queue = await own_queue(channel)
    outcomes = await gather(*map(publish, range(300)))
    assert outcomes == ["confirmed" if n % 3 else "returned" for n in range(300)]
    await connection.close()


async def test_a_nack_is_an_exception(broker):
    connection, channel = await connect(broker, confirm=True)
    queue = await own_queue(
        channel, **{"x-max-length": 1, "x-overflow": "reject-publish"})
    await channel.basic_publish("", queue, b"1", QUIET)
    with pytest.raises(pika.exceptions.NackError):
        await channel.basic_publish("", queue, b"2", QUIET)
    await connection.close()


async def test_a_connection_closed_under_its_users(broker):
    connection, channel = await connect(broker, confirm=True)
    waiter = await waiting(channel.wait_closed)
    await run_in_thread(broker.ctl, "close_all_connections", "test")
    assert isinstance(await waiter.join(), pika.exceptions.ConnectionClosedByBroker)
    with pytest.raises(pika.exceptions.ConnectionClosedByBroker):
        await channel.basic_publish("", "q", b"x", QUIET)
    await connection.close()


async def test_a_consumer_whose_queue_is_deleted_is_told(broker):
    connection, channel = await connect(broker)
    other = await connection.channel()
    queue = await own_queue(other)
    await channel.call("basic_consume", queue, lambda *message: None)
    await other.call("queue_delete", queue)
    assert isinstance(await channel.wait_closed(), pika.exceptions.ConsumerCancelled)
    await connection.close()


async def test_an_attempt_to_connect_can_be_cancelled():
    with socket.create_server(("127.0.0.1", 0)) as server:      # it never answers
        port = server.getsockname()[1]
        async with ignore_after(0.2) as timer:
            await sweepea.Connection.open([f"amqp://127.0.0.1:{port}"])
        assert timer.expired
        with server.accept()[0] as peer:
            assert peer.recv(8) == b"AMQP\x00\x00\x09\x01"


async def consuming(broker, count, **options):
    """A channel with `count` deliveries of a queue of its own, and their tags."""
    connection, channel = await connect(broker)
    publisher = await connection.channel(confirm=True)
    queue = await own_queue(channel)
    tags = []
    await channel.call("basic_consume", queue, lambda _channel, method, *message:
                       tags.append(method.delivery_tag), **options)
    for n in range(count):
        await publisher.basic_publish("", queue, str(n).encode(), QUIET)
    await until(lambda: len(tags) == count)
    return connection, channel, queue, tags


async def left_unacknowledged(connection, channel, queue):
    """What comes back when the channel is closed without any more acknowledgements."""
    channel.pika.close()
    await channel.wait_closed()
    other = await connection.channel()
    again = []
    await other.call("basic_consume", queue, lambda _channel, method, _, body:
                     again.append((int(body), method.redelivered)))
    count = await length(other, queue)
    await until(lambda: len(again) >= count)
    await length(other, queue)                                  # all has come by now
    return sorted(body for body, redelivered in again if redelivered)


async def test_acknowledgements_are_gathered(broker):
    connection, channel, queue, tags = await consuming(broker, 8)
    sent = []
    raw, channel.pika.basic_ack = channel.pika.basic_ack, lambda tag, multiple=False: (
        sent.append((tag, multiple)), raw(tag, multiple))
    for tag in 3, 1, 2, 5:
        channel.basic_ack(tag)
    channel.basic_nack(7)           # is delivered again, as 9
    assert not sent                 # nothing goes out before the turn is over
    await sleep(0.01)
    assert sent == [(3, True), (5, False)]
    channel.basic_ack(6)
    await sleep(0.01)
    channel.basic_ack(4)
    channel.basic_ack(8)
    await sleep(0.01)
    assert sent[2:] == [(6, False), (8, True)]
    await until(lambda: len(tags) == 9)
    assert await left_unacknowledged(connection, channel, queue) == [6]
    await connection.close()


async def test_what_somebody_ignores_is_not_acknowledged_by_others(broker):
    def on_message(_channel, method, *message):
        channel.basic_ack(method.delivery_tag)      # in a callback, outside of a turn
        seen.append(method.delivery_tag)

    connection, channel, ignored, _ = await consuming(broker, 3)
    publisher = await connection.channel(confirm=True)
    queue, automatic, seen = await own_queue(channel), await own_queue(channel), []
    await channel.call("basic_consume", queue, on_message)
    await channel.call("basic_consume", automatic, lambda *message: None, auto_ack=True)
    for n in range(5):
        await publisher.basic_publish("", automatic, b"x", QUIET)
        await publisher.basic_publish("", queue, b"x", QUIET)
    await until(lambda: len(seen) == 5)
    await until(lambda: len(channel._unsettled) == 3)
    assert await left_unacknowledged(connection, channel, ignored) == [0, 1, 2]
    assert await length(publisher, queue) == 0
    await connection.close()


async def test_what_is_acknowledged_goes_out_before_a_close(broker):
    connection, channel = await connect(broker, confirm=True)
    queue, tags = "flush" + uuid.uuid4().hex, []
    await channel.call("queue_declare", queue, durable=True)
    await channel.call("basic_consume", queue, lambda _channel, method, *message:
                       tags.append(method.delivery_tag))
    await channel.basic_publish("", queue, b"x", QUIET)
    await until(lambda: tags)
    channel.basic_ack(tags[0])
    await connection.close()
    connection, channel = await connect(broker)
    assert await length(channel, queue) == 0
    await channel.call("queue_delete", queue)
    await connection.close()


async def test_a_thousand_busy_coroutines_starve_neither_loop_nor_heartbeat(broker):
    async def busy():
        while True:
            await sleep(0)

    def tick():
        ticks.append(tasks[-1].cycles)
        if len(ticks) < 50:
            kernel.loop.call_later(0, tick)

    connection = await sweepea.Connection.open([broker.url + "?heartbeat=1"])
    ticks, kernel = [], await trap("trap_get_kernel")
    tasks = [await spawn(busy) for _ in range(1000)]
    tick()
    await until(lambda: len(ticks) == 50)
    # pika had its turn again and again: between two of them nobody ran very often.
    assert 0 < ticks[-1] < 50 * 50
    reason = await ignore_after(4, connection.wait_closed())
    assert reason is None and connection.pika.is_open
    await connection.close()


# =====================================================================================
# 8. Workers
# =====================================================================================

class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__("text")
        self.lock = threading.Lock()


def double(x):
    return x + x


def complain(kind, *args):
    raise kind(*args)


async def pool_of(kind, size, *args):
    return kind(await sweepea._get_kernel(), size, *args)


@pytest.mark.parametrize("run_in", [run_in_thread, run_in_process])
async def test_results_and_exceptions_come_back(run_in):
    assert await run_in(double, 4) == 8
    assert len(await run_in(double, b"x" * 3_000_000)) == 6_000_000
    with pytest.raises(ZeroDivisionError, match="text") as caught:
        await run_in(complain, ZeroDivisionError, "text")
    if run_in is run_in_process:
        assert "in complain" in str(caught.value.__cause__)
    with pytest.raises(SystemExit):
        await run_in(complain, SystemExit, 3)
    tasks = [await spawn(run_in, double, n) for n in range(100)]
    assert [await task.join() for task in tasks] == [2 * n for n in range(100)]


async def test_an_abandoned_thread_is_replaced_and_its_result_thrown_away(caplog):
    gate, pool = threading.Event(), await pool_of(sweepea.ThreadPool, 1)
    with pytest.raises(TaskTimeout):
        await timeout_after(0.05, run_in_thread, gate.wait, 60)
    assert len(pool.abandoned) == 1 and "wait" in caplog.text
    assert await run_in_thread(double, 1) == 2
    gate.set()
    await until(lambda: not pool.abandoned)
    assert await run_in_thread(double, 2) == 4


async def test_a_limit_counts_from_the_moment_in_which_the_call_begins():
    pool = await pool_of(sweepea.ThreadPool, 1)
    calls = [sweepea.Call(pool, time.sleep, (0.2,), 0.4) for _ in range(4)]
    assert await gather(*[call.run() for call in calls]) == [None] * 4
    begun = [call.began for call in calls]
    assert begun == sorted(begun)
    with pytest.raises(TimeoutError, match="0.1 s"):
        await sweepea.Call(pool, time.sleep, (0.5,), 0.1).run()
    assert len(pool.abandoned) == 1 and await run_in_thread(double, 2) == 4
    await until(lambda: not pool.abandoned)


async def test_a_call_is_taken_back_or_cancelled_before_it_begins_or_has_begun():
    gate, ran = threading.Event(), []
    pool = await pool_of(sweepea.ThreadPool, 1)
    first = sweepea.Call(pool, gate.wait, (60,))
    others = [sweepea.Call(pool, ran.append, (n,)) for n in range(100)]
    tasks = [await spawn(call.run()) for call in [first, *others]]
    cancelled = await waiting(run_in_thread, ran.append, "cancelled")
    await until(lambda: first.began)
    await cancelled.cancel()
    assert not first.take_back() and all(call.take_back() for call in others[50:])
    gate.set()
    for task in tasks[:51]:
        await task.join()
    for task in tasks[51:]:
        assert task.cancel_func is not None
        await task.cancel()
    await run_in_thread(double, 1)          # all before it has been dealt with
    assert not pool.abandoned and ran == list(range(50))


def slow_import(path):
    with open(path, "a") as file:
        file.write("x")
    time.sleep(1)


async def test_the_limit_of_a_process_leaves_out_its_start(tmp_path):
    path = tmp_path / "started"
    pool = await pool_of(sweepea.ProcessPool, 1, slow_import, (path,))
    async with pool.slots:
        assert await pool.call(double, (2,), 0.5) == 4
        with pytest.raises(TimeoutError, match="0.2 s"):
            await pool.call(time.sleep, (60,), 0.2)
        assert await pool.call(double, (3,), 0.5) == 6
    assert path.read_text() == "xx"


async def test_a_process_that_cannot_start_is_an_error():
    await pool_of(sweepea.ProcessPool, 1, os._exit, (5,))
    with pytest.raises(sweepea.WorkerStartError, match="exit code 5"):
        await run_in_process(double, 2)


async def test_what_cannot_be_pickled():
    with pytest.raises(sweepea.WorkerError, match="Unpicklable: text") as caught:
        await run_in_process(complain, Unpicklable, 1, 2)
    assert "in complain" in str(caught.value.__cause__)
    with pytest.raises((TypeError, AttributeError)):
        await run_in_process(double, threading.Lock())
    with pytest.raises((TypeError, AttributeError, sweepea.WorkerError)):
        await run_in_process(threading.Lock)


@pytest.mark.parametrize("end, status", [
    (lambda: None, 0), (lambda: sys.exit(3), 3), (lambda: sys.exit("text"), 1),
    (lambda: 1 / 0, 1)])
def test_a_child_that_a_thread_forks_comes_to_its_end(end, status):
    def fork():
        child = os.fork()
        return child or end()

    child = run(run_in_thread, fork)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status


def test_a_cancelled_caller_kills_its_process():
    async def main():
        await pool_of(sweepea.ProcessPool, 1)
        pid = await run_in_process(os.getpid)
        with pytest.raises(TaskTimeout):
            await timeout_after(0.1, run_in_process, time.sleep, 60)
        other = await run_in_process(os.getpid)
        await until(lambda: gone({pid}))
        assert other != pid and not gone({other})
        return other

    assert gone({run(main)})      # shut down with its kernel


async def test_a_process_dies_whose_socket_a_forked_child_holds():
    await pool_of(sweepea.ProcessPool, 1)
    await run_in_process(double, 1)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    try:
        for _ in range(2):
            with pytest.raises(sweepea.WorkerLost):
                await run_in_process(os._exit, 3)
            assert await run_in_process(double, 3) == 6
    finally:
        child.kill()
        child.join()


def fork_in_worker(path, dies):
    """Fork a child that lives on; return our own number, or die."""
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    path.write_text(str(child))
    if dies:
        os._exit(3)
    return os.getpid()


async def test_a_process_dies_whose_forked_child_lives(tmp_path):
    """Once while it is idle, which is nobody's loss, and once in a call."""
    await pool_of(sweepea.ProcessPool, 1)
    try:
        worker = await run_in_process(fork_in_worker, tmp_path / "idle", False)
        os.kill(worker, signal.SIGKILL)
        await until(lambda: gone({worker}))
        assert await timeout_after(20, run_in_process, os.getpid) != worker
        with pytest.raises(sweepea.WorkerLost, match="exit code 3"):
            await timeout_after(20, run_in_process, fork_in_worker, tmp_path / "busy",
                                True)
        assert await timeout_after(20, run_in_process, double, 4) == 8
    finally:
        for path in tmp_path.iterdir():
            os.kill(int(path.read_text()), signal.SIGKILL)


class BrokenAnswer:
    """Counts the calls that made one, and breaks the pipe when it is unpickled."""

    def __init__(self, path):
        with open(path, "a") as file:
            file.write("x")

    def __reduce__(self):
        return complain, (BrokenPipeError,)


async def test_a_call_that_has_begun_is_not_begun_again(tmp_path):
    await run_in_process(double, 1)
    with pytest.raises((sweepea.WorkerLost, OSError)):
        await run_in_process(BrokenAnswer, tmp_path / "made")
    assert (tmp_path / "made").read_text() == "x"


def test_a_default_timeout_for_sockets_does_not_reach_the_workers(tmp_path):
    (tmp_path / "hasty.py").write_text("""
import socket
socket.setdefaulttimeout(30)
import os, sweepea
def work(data): return os.getpid(), len(data)
async def main():
    calls = [await sweepea.run_in_process(work, b'x' * size)
             for size in (1, 8 << 20, 1)]
    print(len({pid for pid, _ in calls}), [size for _, size in calls])
if __name__ == '__main__':
    sweepea.run(main)
""")
    done = python({"PYTHONPATH": str(HERE)}, tmp_path / "hasty.py")
    assert done.stdout == f"1 [1, {8 << 20}, 1]\n", done.stderr


def test_a_worker_process_leaves_when_its_parent_is_killed(tmp_path):
    (tmp_path / "orphan.py").write_text("""
import os, sweepea
def spin():
    print(os.getpid(), flush=True)
    while True: pass
if __name__ == '__main__':
    sweepea.run(sweepea.run_in_process, spin)
""")
    with running({"PYTHONPATH": str(HERE)}, ready="\n",
                 script=tmp_path / "orphan.py") as parent:
        parent.process.kill()
        wait_until(lambda: gone({int(parent.lines[0])}), what="the child is gone")


# =====================================================================================
# The settings
# =====================================================================================

def test_the_default_settings_are_the_documented_ones():
    config = OliveAppConfig()
    assert {f.name: getattr(config, f.name) for f in fields(config)} == {
        "url": "amqp://guest:guest@localhost:5672/%2F", "exchange": "Olive.x",
        "queue": "Olive.q", "routing_key": "Olive.k",
        "queue_arguments": {"x-queue-type": "quorum"},
        "dead_queue": "Olive.dead", "tasks": (), "worker": "thread", "threads": 20,
        "processes": os.cpu_count(), "prefetch": 2 * (20 + os.cpu_count()),
        "task_timeout": None, "grace": 30, "log_level": "INFO", "trace": ""}
    assert OliveAppConfig.from_env({"OLIVE_QUEUE": "", "OTHER": "x"}) == config
    with pytest.raises(FrozenInstanceError):
        config.queue = "other"


def test_every_setting_is_read_from_its_variable(tmp_path, capsys):
    trace = str(tmp_path / "trace")
    assert OliveAppConfig.from_env({
        "OLIVE_URL": "amqp://a:b@c:1/d, amqps://e", "OLIVE_EXCHANGE": " x ",
        "OLIVE_QUEUE": "q", "OLIVE_ROUTING_KEY": "k", "OLIVE_DEAD_QUEUE": "d",
        "OLIVE_QUEUE_ARGUMENTS": '{"x-max-priority": 9}', "OLIVE_TASKS": "a, b.c,",
        "OLIVE_WORKER": "process", "OLIVE_THREADS": "3", "OLIVE_PROCESSES": "4",
        "OLIVE_PREFETCH": "65535", "OLIVE_TASK_TIMEOUT": "0.5", "OLIVE_GRACE": "0",
        "OLIVE_LOG_LEVEL": "debug", "OLIVE_TRACE": trace,
    }) == OliveAppConfig(
        "amqp://a:b@c:1/d, amqps://e", "x", "q", "k", {"x-max-priority": 9}, "d",
        ("a", "b.c"), "process", 3, 4, 65535, 0.5, 0.0, "DEBUG", trace)
    assert OliveAppConfig(url="amqp://a:b@c:1/d, amqps://e").urls == [
        "amqp://a:b@c:1/d", "amqps://e"]
    assert capsys.readouterr() == ("", "")
    OliveAppConfig.from_env({"OLIVE_THREAD": "3", "OLIVES": "x", "OLIVE_QUEUE": "q"})
    assert capsys.readouterr().err == "olive: unknown setting OLIVE_THREAD (ignored)\n"


@pytest.mark.parametrize("variable, values", {
    "URL": ["nonsense:secret", "http://guest:secret@localhost",
            "amqp://guest:secret@localhost:port/",
            "amqp://localhost,,amqp://u:secret@localhost"],
    "THREADS": ["0", "x", "-1", "2.5"], "PROCESSES": ["0"], "PREFETCH": ["0", "70000"],
    "WORKER": ["fiber"], "QUEUE_ARGUMENTS": ["[1]", "x-max-priority", "[" * 100_000],
    "TASK_TIMEOUT": ["0", "nan", "-1", "inf", "soon"], "GRACE": ["-1", "nan", "inf"],
    "LOG_LEVEL": ["LOUD"], "DEAD_QUEUE": ["Olive.q", "d" * 256], "EXCHANGE": ["amq.x"],
    "QUEUE": ["not-utf-8-\udcff", "amq.q", "é" * 111, "a.*.b", "#"],
    "ROUTING_KEY": ["k" * 256], "TRACE": ["/nowhere/trace", "/"]}.items())
def test_a_setting_that_makes_no_sense_is_one_line(variable, values, capsys):
    for value in values:
        with pytest.raises(SystemExit) as caught:
            OliveAppConfig.from_env({f"OLIVE_{variable}": value})
        out, err = capsys.readouterr()
        assert caught.value.code == 2 and out == ""
        assert err.startswith(f"olive: OLIVE_{variable}: ") and err.count("\n") == 1
        assert "secret" not in err


def test_readme_and_help_have_the_settings_as_they_are():
    rows = {}
    for line in (HERE / "README.md").read_text().splitlines():
        if line.startswith("| `OLIVE_"):
            names, default, _ = line.strip("|").split("|")
            names = re.findall(r"`OLIVE_(\w+)`", names)
            values = re.findall(r"`([^`]*)`", default) or default.split(",")
            rows |= {name: value.strip() for name, value in zip(names, values)}
    defaults = OliveAppConfig()
    assert rows.keys() == {f.name.upper() for f in fields(defaults)}
    for name, shown in rows.items():
        default = getattr(defaults, name.lower())
        if name == "PREFETCH":
            assert shown == "2 × (threads + processes)"
        elif name == "PROCESSES":
            assert shown == "the number of cores"
        elif default in (None, "", ()):
            assert shown in ("", "none")
        else:
            shown = json.loads(shown) if name == "QUEUE_ARGUMENTS" else shown
            assert shown == default or float(shown) == default
    shown = python({}, "olive_app.py", "--help").stdout
    for f in fields(defaults):
        assert f"  OLIVE_{f.name.upper()}\n      {f.metadata['meaning']}" in shown


@pytest.mark.parametrize("script", ["olive_app.py", "olive_utils.py"])
def test_help_and_version_and_a_bad_setting(script):
    for option, said in {"--version": f"sweepea {sweepea.__version__}",
                         "--help": f"usage: {script}"}.items():
        done = python({"OLIVE_URL": "nonsense"}, script, option)
        assert done.returncode == 0 and said in done.stdout and done.stderr == ""
    done = python({"OLIVE_URL": "amqp://guest:secret@[/"}, script)
    assert done.returncode == 2 and done.stdout == "" and "secret" not in done.stderr
    assert done.stderr.startswith("olive: OLIVE_URL: ")
    assert done.stderr.count("\n") == 1


# =====================================================================================
# Registering tasks
# =====================================================================================

def test_task_registers_a_function_and_leaves_it_callable(monkeypatch):
    monkeypatch.setattr(olive_app, "TASKS", {})

    @olive_app.task
    def plain(x):
        return x + 1

    @olive_app.task()
    def called(): ...

    @olive_app.task("first", worker="process", timeout=3, retries=4, retry_delay=0.5)
    def one(): ...

    @olive_app.task(name="second")
    async def two(): ...

    assert plain(1) == 2
    assert olive_app.TASKS == {
        "plain": olive_app.OliveTask(plain, None, None, 0, 1.0),
        "called": olive_app.OliveTask(called, None, None, 0, 1.0),
        "first": olive_app.OliveTask(one, "process", 3, 4, 0.5),
        "second": olive_app.OliveTask(two, None, None, 0, 1.0)}
    with pytest.raises(ValueError, match="two tasks of the name 'plain'"):
        olive_app.task(name="plain")(len)
    with pytest.raises(ValueError, match="must be 'thread' or 'process', not 'fiber'"):
        olive_app.task(worker="fiber")


@pytest.mark.parametrize("text, said", [
    (None, "ModuleNotFoundError: No module named 'missing'"),
    ("1 / 0", "ZeroDivisionError: division by zero"), ("def", "SyntaxError: "),
    ("@task\ndef add(): ...", "ValueError: there are two tasks of the name 'add'")])
def test_a_task_module_that_cannot_be_imported(text, said, tmp_path):
    app = App(tasks_module(tmp_path, text) if text else {"OLIVE_TASKS": "missing"})
    assert app.wait() == 2
    module = "mytasks" if text else "missing"
    assert app.log.startswith(f"olive: OLIVE_TASKS: {module}: ") and said in app.log
    assert len(app.lines) == 1


def test_a_script_of_ones_own_with_a_task_module(client, tmp_path):
    environ = tasks_module(tmp_path, """
import os
@task(worker="process")
def theirs(x): return [x, os.getpid()]
""")
    (tmp_path / "own.py").write_text("""
import os, sweepea
from olive_app import OliveAppConfig, OliveOly, task

def answer(x): return [x, os.getpid()]

threaded = task("threaded")(answer)
processed = task("processed", worker="process")(answer)

@task
async def awaited(x):
    await sweepea.sleep(0)
    return answer(x)

async def beside():
    print("beside it runs this")

if __name__ == "__main__":
    OliveOly(OliveAppConfig.from_env()).start(beside)
""")
    with running({**client.config, **environ}, script=tmp_path / "own.py") as app:
        app.wait_for("beside it runs this")
        for number, name in enumerate(("threaded", "awaited", "processed", "theirs")):
            client.send(name, [number])
            value, pid = client.reply()["result"]
            assert value == number and (pid == app.process.pid) == (number < 2)
        client.send("add")      # the demo tasks are only in olive_app.py itself
        assert client.reply()["result"]["exc_type"] == "NotRegistered"
        app.stop()


# =====================================================================================
# One app for many tests
# =====================================================================================

LIVE_TASKS = '''
import asyncio, os, signal, sys, threading, time
import sweepea
from olive_app import job, task

class Mute(Exception):
    def __str__(self): raise RuntimeError("mute")
    def __reduce__(self): raise TypeError("no pickle")

class Odd(Exception): pass

def odd():
    exc = Odd("odd")
    exc.cannot_be_pickled = lambda: None
    return exc

def deep(): return deep() + 1

def act(what, *args):
    if what == "raise":
        raise {"error": ValueError("wrong", 1), "exit": SystemExit(3), "mute": Mute(),
               "interrupt": KeyboardInterrupt("^C"), "odd": odd(), "long":
               ValueError("x" * 1_000_000 + "end"), "surrogate": ValueError("\\ud800"),
               "cancelled": sweepea.TaskCancelled("me"), "generator": GeneratorExit(),
               "stop": StopIteration(5)}[args[0]]
    if what == "deep": return deep()
    if what == "return": return args[0]
    if what == "object": return object()
    if what == "nan": return float("nan")
    if what == "huge": return "x" * (16 << 20)
    if what == "nested":
        result = []
        for _ in range(100_000): result = [result]
        return result
    if what == "note": note(args[0])
    if what == "job": return [*job()[:3], job().sent and job().sent.isoformat()]
    if what == "files": os.closerange(3, 200)
    if what == "hang":
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(3600)

def note(path):
    with open(path, "a") as file:
        file.write("tried\\n")
    return open(path).read().count("tried")

@task(retry_delay=0.05)
def in_thread(*args): return act(*args)

@task(worker="process", retry_delay=0.05)
def in_process(*args): return act(*args)

@task
async def in_coroutine(*args):
    if args[0] == "hang": await sweepea.sleep(3600)
    return act(*args)

@task
def echo(*args, **kwargs): return [list(args), kwargs]

@task(retries=2, retry_delay=0.1)
def flaky(path, good):
    tries = note(path)
    if tries < good: raise RuntimeError(f"try {tries}")
    return tries

@task(timeout=0.2)
async def strict(): await sweepea.sleep(3600)

@task(timeout=3600)
async def lax(): await sweepea.sleep(3600)

@task
async def stubborn():
    while True:
        try: await sweepea.sleep(3600)
        except GeneratorExit: raise
        except BaseException: pass

@task
async def foreign(): await asyncio.sleep(0)

@task
async def blocks(): time.sleep(0.7)
'''


@pytest.fixture(scope="module")
def live_app(broker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    (folder / "livetasks.py").write_text(LIVE_TASKS)
    client = Client(broker.url, "live")
    client.close()
    # (a time zone far from UTC shows whether times without a zone are taken for UTC)
    with running({**client.config, "OLIVE_TASKS": "livetasks", "OLIVE_PROCESSES": "2",
                  "OLIVE_LOG_LEVEL": "DEBUG", "PYTHONPATH": str(folder),
                  "TZ": "Asia/Tokyo"}) as app:
        yield app
        app.signal()    # it stops even if a task swallows all that is raised in it
        assert app.wait(20) == 0
        for word in "Crash", "connection lost", "fault of the app":
            assert word not in app.log, app.log
        assert all("'stubborn'" in line for line in app.lines if "would not go" in line)


@pytest.fixture
def live(broker, live_app):
    """A client of the common app; its tests leave nothing in the queues."""
    client = Client(broker.url, "live")
    client.app = live_app
    before = len(live_app.log)
    yield client
    wait_until(lambda: client.count(client.queue) == 0)
    left = [client.channel.queue_purge(name).method.message_count
            for name in (client.queue, client.dead_queue, client.replies)]
    client.close()
    assert left == [0, 0, 0]
    assert "connection lost" not in live_app.log[before:]


def failure(client, ident, kind, text, module="builtins"):
    """Take a FAILURE reply; check it; return its traceback."""
    reply = client.reply()
    trace = reply.pop("traceback")
    assert reply == {"task_id": ident, "status": "FAILURE", "children": [], "result": {
        "exc_type": kind, "exc_message": [text], "exc_module": module}}
    return trace


def buried(client, reason, body=None):
    """Take a dead letter; check its reason; return its properties and its headers."""
    properties, letter = client.get(client.dead_queue)
    assert properties.headers["x-olive-reason"] == reason, properties.headers
    assert properties.delivery_mode == 2
    assert body is None or letter == body
    return properties, properties.headers


KINDS = pytest.mark.parametrize("name", ["in_thread", "in_process", "in_coroutine"])


@KINDS
@pytest.mark.parametrize("value", [
    None, 0, 1.5, "text é \ud800", [1, [2]], {"a": {"b": None}}, "x" * 1_000_000],
    ids=lambda value: repr(value)[:20])
def test_success_is_replied(live, name, value):
    ident = live.send(name, ["return", value])
    properties, body = live.get(live.replies)
    assert json.loads(body) == {"task_id": ident, "status": "SUCCESS", "result": value,
                                "traceback": None, "children": []}
    assert properties.correlation_id == ident
    assert properties.content_type == "application/json"
    assert properties.content_encoding == "utf-8"


@KINDS
@pytest.mark.parametrize("what, kind, text, module", [
    ("error", "ValueError", "('wrong', 1)", "builtins"),
    ("exit", "WorkerLostError", "3", "billiard.exceptions"),
    ("interrupt", "WorkerLostError", "^C", "billiard.exceptions"),
    ("generator", "WorkerLostError", "", "billiard.exceptions"),
    ("mute", "Mute", "(no text)", "livetasks"), ("odd", "Odd", "odd", "livetasks"),
    ("surrogate", "ValueError", "\\ud800", "builtins"),
    ("long", "ValueError", "x" * 16_000, "builtins"),
    ("cancelled", "TaskCancelled", "me", "sweepea")])
def test_failure_is_replied_and_kept(live, name, what, kind, text, module):
    ident = live.send(name, ["raise", what])
    trace = failure(live, ident, kind, text, module)
    if what == "long":      # what is long is cut, and the end of the traceback is kept
        assert len(trace) == 16_000 and trace.endswith("xend\n")
    else:
        assert "act(" in trace
    _, headers = buried(live, "failed")
    if kind != "WorkerLostError":       # only the client must not see these names
        assert headers["x-olive-error"] == f"{kind}: {text}"[:1000]
    assert headers["x-olive-traceback"] == trace
    assert headers["task"] == name and headers["id"] == ident


@KINDS
@pytest.mark.parametrize("args", [["deep"], ["raise", "stop"]], ids=str)
def test_a_failure_of_pythons_own_making(live, name, args):
    live.send(name, args)
    assert live.reply()["status"] == "FAILURE"
    buried(live, "failed")


def test_a_process_that_closes_its_files_is_replied_to(live):
    ident = live.send("in_process", ["files"])
    reply = live.reply()
    assert reply["task_id"] == ident
    if reply["status"] == "FAILURE":
        buried(live, "worker-lost")


@KINDS
@pytest.mark.parametrize("what, text", [
    ("object", "Object of type object is not JSON serializable"),
    ("nan", "Out of range float values are not JSON compliant"), ("nested", ""),
    ("huge", "it is larger than 16777216 bytes of JSON")])
def test_a_result_that_cannot_be_sent_is_no_failed_try(live, name, what, text):
    live.send(name, [what], properties={"reply_to": None})
    live.app.wait_for(f"WARNING '{name}'")
    live.send(name, [what])
    result = live.reply()["result"]
    assert result["exc_type"] in ("TypeError", "ValueError", "RecursionError")
    assert result["exc_message"][0].startswith(
        f"the task is done, but its result cannot be sent: {text}")
    assert live.count(live.dead_queue) == 0


@pytest.mark.parametrize("args", [[], ["path"], ["path", 1, "too many"]])
def test_arguments_that_do_not_fit_are_not_tried_again(live, args):
    ident = live.send("flaky", args, {"wrong": 1} if len(args) == 1 else None)
    reply = live.reply()
    assert reply["task_id"] == ident and reply["result"]["exc_type"] == "TypeError"
    assert "flaky()" in reply["result"]["exc_message"][0]
    assert "retries" not in buried(live, "malformed")[1]


@pytest.mark.parametrize("name, timelimit, limit", [
    ("in_thread", [Decimal("0.3"), None], "0.3"), ("in_thread", [1, 0], "1"),
    ("in_process", [None, Decimal("0.3")], "0.3"), ("in_coroutine", [1, 2], "1"),
    ("strict", None, "0.2"), ("strict", [3600, None], "0.2"),
    ("lax", [Decimal("0.1"), None], "0.1"), ("stubborn", [Decimal("0.1"), 5], "0.1")])
def test_a_task_that_outlives_its_limit(live, name, timelimit, limit):
    args = ["hang"] if name.startswith("in_") else []
    ident = live.send(name, args, timelimit=timelimit)
    assert failure(live, ident, "TimeLimitExceeded", f"{limit} s",
                   "billiard.exceptions") == ""
    _, headers = buried(live, "timeout")
    assert headers["x-olive-error"] == f"TimeLimitExceeded: {limit} s"


@pytest.mark.parametrize("good, retries", [(1, 0), (2, 0), (3, 0), (4, 0), (2, 2)])
def test_retries(live, tmp_path, good, retries):
    path = tmp_path / "tries"
    ident = live.send("flaky", [str(path), good], retries=retries)
    tries = 3 - retries
    if good <= tries:
        assert live.reply()["result"] == good
    else:
        failure(live, ident, "RuntimeError", f"try {tries}")
        properties, headers = buried(live, "failed")
        assert headers["retries"] == 2 and properties.correlation_id == ident
        assert retries or datetime.fromisoformat(headers["eta"]).tzinfo
    assert path.read_text() == "tried\n" * min(good, tries)


# -- what the headers say --------------------------------------------------------------

def later(seconds):
    return datetime.now(timezone.utc) + timedelta(seconds=seconds)


def test_a_message_without_reply_to_or_with_a_reply_queue_that_is_gone(live):
    for address in None, "no-such-queue", "x" * 255, "a\nb", "amq.rabbitmq.trace":
        for name, reason in {"no-such": "unknown-task", None: "malformed"}.items():
            ident = live.send(name, ["quiet"], properties={"reply_to": address})
            assert buried(live, reason)[1]["id"] == ident
        ident = live.send("echo", ["quiet"], properties={"reply_to": address})
        live.app.wait_for(f"DEBUG 'echo'[{ident}]: done")
    live.send("echo", [], {"a": 1}, id=None)    # then the correlation_id is its id
    assert live.reply()["result"] == [[], {"a": 1}]


@pytest.mark.parametrize("shown", [
    lambda t: t.isoformat(), lambda t: t.replace(tzinfo=None).isoformat(),
    lambda t: t.replace(tzinfo=None).isoformat() + "Z",
    lambda t: t.astimezone(timezone(timedelta(hours=-5))).isoformat()])
@pytest.mark.parametrize("seconds", [-3600, 0.3])
def test_eta(live, shown, seconds):
    eta = later(seconds)
    live.send("echo", eta=shown(eta))
    assert live.reply()["status"] == "SUCCESS"
    assert later(0) >= eta


def test_an_eta_waits_in_the_ladder(live):
    eta = later(3.7)
    live.send("echo", ["late"], eta=eta.isoformat(), priority=3)
    for rung in 1, 0:       # 3 s are 2 s, then 1 s
        wait_until(lambda: live.count(f"Olive.wait.{rung}") == 1)
    assert live.reply()["result"] == [["late"], {}]
    assert later(0) >= eta


def test_an_expired_task_is_revoked_and_no_other(live):
    for eta in {}, {"eta": "2000-01-01T00:00:00Z"}:
        ident = live.send("no-such-task", expires=later(-0.1).isoformat(), **eta)
        assert live.reply() == {
            "task_id": ident, "status": "REVOKED", "traceback": "", "children": [],
            "result": {"exc_type": "TaskRevokedError", "exc_message": ["expired"],
                       "exc_module": "celery.exceptions"}}
    live.send("echo", expires=later(3600).replace(tzinfo=None).isoformat())
    assert live.reply()["status"] == "SUCCESS"


# -- what the body asks for ------------------------------------------------------------

@KINDS
@pytest.mark.parametrize("key", ["chain", "chord", "callbacks", "errbacks"])
def test_a_canvas_is_refused_with_what_to_do_instead(live, tmp_path, key, name):
    path = tmp_path / "not-run"
    ident = live.send(name, ["note", str(path)], embed={key: [{"task": "echo"}]})
    failure(live, ident, "Unsupported", f"{key} is not supported: instead, write a task"
            " that is a coroutine and calls the others", "olive_app")
    buried(live, "unsupported")
    assert not path.exists()


def test_a_task_of_celerys_own_is_refused_too(live):
    live.send("celery.chord_unlock")
    assert live.reply()["result"]["exc_type"] == "Unsupported"
    assert "instead, write" in buried(live, "unsupported")[1]["x-olive-error"]


# -- what makes no sense ---------------------------------------------------------------

BODIES = [b"", b"{", b"\xff", b"null", b"5", b'"abc"', b"[1, 2]", b"[[], {}]",
          b"[[], [], {}]", b"[{}, {}, {}]", b"[[], {}, 5]", b"[[NaN], {}, {}]",
          b"[[-Infinity], {}, {}]", b"[" * 200_000, b"[[" + b"1" * 5000 + b"], {}, {}]",
          b"[[], {}, {}] x", b"[]", b"{}", b"[1, 2, 3]", b"[[], {}, []]", b"\x80\x04N."]


@KINDS
def test_a_malformed_body(live, name):
    for body in BODIES:
        ident = live.send(name, body=body)
        reply = live.reply()
        assert reply["task_id"] == ident and reply["status"] == "FAILURE"
        buried(live, "malformed", body)


@pytest.mark.parametrize("properties, headers", [
    ({}, {"task": None}), ({}, {"task": 5}), ({}, {"task": ""}),
    ({"correlation_id": "x"}, {"id": 5}), ({"correlation_id": None}, {"id": None}),
    ({"headers": None}, {}), ({"content_type": None}, {}), ({"content_type": ""}, {}),
    ({"content_type": "application/x-python-serialize"}, {}),
    ({"content_type": "application/x-yaml"}, {}), ({"content_encoding": "gzip"}, {}),
    ({"content_encoding": "latin-1"}, {}), ({}, {"compression": "application/x-gzip"}),
    ({}, {"eta": "yesterday"}), ({}, {"eta": 5}), ({}, {"expires": "9" * 40}),
    ({}, {"eta": "0001-01-01T00:00:00+14:00"}), ({}, {"timelimit": [1]}),
    ({}, {"timelimit": 5}), ({}, {"timelimit": [-1, None]}),
    ({}, {"timelimit": ["1", None]}), ({}, {"retries": -1}), ({}, {"retries": "1"})],
    ids=repr)
def test_malformed_properties(live, properties, headers):
    live.send(**{"task": "echo", **headers}, properties=properties)
    reply = live.reply()
    assert reply["status"] == "FAILURE" and reply["result"]["exc_type"] == "ValueError"
    embed = dict.fromkeys(("callbacks", "errbacks", "chain", "chord"))
    _, headers = buried(live, "malformed", json.dumps([[2, 3], {}, embed]).encode())
    assert headers["x-olive-error"].startswith("ValueError: the")


def test_an_unknown_task_is_kept_as_it_came(live):
    copies = live.channel.queue_declare("", exclusive=True).method.queue
    body = b'[[1],  {"odd": "spacing"}, null]'
    ident = live.send("no-such-task", body=body, properties={
        "expiration": "3600000", "user_id": "guest", "type": "kept", "priority": 3},
        CC=[copies], other={"kept": [1, "x"]}, **{"x-delivery-count": 5, "x-death": []})
    failure(live, ident, "NotRegistered", "no-such-task", "celery.exceptions")
    properties, headers = buried(live, "unknown-task", body)
    assert headers.pop("x-delivery-count", 0) == 0      # RabbitMQ 3 counts from 0 on
    assert datetime.fromisoformat(headers.pop("x-olive-when")) <= later(0)
    assert headers == {
        "task": "no-such-task", "id": ident, "other": {"kept": [1, "x"]},
        "x-olive-reason": "unknown-task", "x-olive-traceback": "",
        "x-olive-error": "NotRegistered: no-such-task"}
    assert (properties.expiration, properties.user_id) == (None, None)
    assert (properties.type, properties.priority) == ("kept", 3)
    assert properties.correlation_id == ident and properties.reply_to == live.replies
    assert live.count(copies) == 1      # the broker's own copy, and no second one


@pytest.mark.parametrize("name, args", [
    ("no-such-task", []), ("in_thread", ["raise", "long"])])
def test_nearly_full_headers_do_not_cost_the_connection(live, name, args):
    live.send(name, args, ballast="x" * 130_600)
    assert live.reply()["status"] == "FAILURE"
    headers = live.get(live.dead_queue)[0].headers
    assert headers["x-olive-error"] and headers["task"] == name
    assert "ballast" not in headers     # and the connection holds: see the fixture


# -- coroutines, and what the log says -------------------------------------------------

def test_a_coroutine_that_blocks_is_named_in_the_log(live):
    ident = live.send("blocks", [])
    assert live.reply()["status"] == "SUCCESS"
    line = next(line for line in live.app.lines if "without waiting" in line)
    assert f"'blocks'[{ident}]" in line


def test_a_coroutine_of_asyncios_fails_its_own_job_alone(live):
    live.send("foreign", [])
    result = live.reply()["result"]
    assert "use sweepea.sleep" in result["exc_message"][0]
    buried(live, "failed")


def test_a_name_cannot_forge_a_line_of_the_log(live):
    live.send("x\n2026-01-01 ERROR forged\x1b[2J", id="y\r\nforged")
    live.reply()
    buried(live, "unknown-task")
    live.app.wait_for("is dead (unknown-task)")
    lines = [line for line in live.app.lines if "forged" in line]
    assert len(lines) == 1 and " WARNING " in lines[0] and "\x1b" not in lines[0]
    assert not any(line.startswith(("forged", "2026-01-01 ERROR"))
                   for line in live.app.lines)


# =====================================================================================
# The sender
# =====================================================================================

@pytest.mark.parametrize("argv, out", [
    ([], "5\n"), (["add", "2", "3"], "5\n"), (["add", "x=2", "y=-3"], "-1\n"),
    (["add", "two", "three"], '"twothree"\n'), (["add", "[1]", "y=[2, null]"],
                                                "[1, 2, null]\n"),
    (["--time-limit", "9", "add", "2.5", "--priority", "3", "1"], "3.5\n"),
    (["echo", "a b=c", '{"k": "é"}', "x=y=z", "true", "--expires", "3600"],
     '[["a b=c", {"k": "\\u00e9"}, true], {"x": "y=z"}]\n'),
    (["echo", "NaN", "1e999"], '[["NaN", "1e999"], {}]\n'),   # they are not JSON
    (["do_nothing"], "null\n"), (["fib", "10", "--time-limit", "98.7654321"], "55\n"),
    (["sleep_n", "0", "--countdown", "0.1"], "0\n")], ids=repr)
def test_the_sender_prints_the_result_alone(live, argv, out):
    sent = send(live.config, *argv)
    assert (sent.returncode, sent.stdout, sent.stderr) == (0, out, "")


@pytest.mark.parametrize("argv, said", [
    (["--count", "0"], "--count and --timeout must be more than 0"),
    (["--timeout", "-1"], "--timeout"),
    (["--priority", "256"], "--priority must be from 0 to 255"),
    (["--dead", "--replay"], "--dead and --replay stand alone"),
    (["add", "--dead"], "--dead and --replay stand alone"),
    (["--count", "x"], "invalid int value"), (["--nonsense"], "--nonsense"),
    (["--countdown", "nan"], "--countdown"), (["--countdown", "1e30"], "--countdown"),
    (["--expires", "inf"], "--expires"), (["--timeout", "nan"], "--timeout"),
    (["--time-limit", "nan"], "--time-limit"), ([""], "TASK is empty"),
    (["--time-limit", "-1"], "'-1' is not a number of seconds")])
def test_usage(argv, said, capsys, monkeypatch):
    monkeypatch.setenv("OLIVE_URL", "amqp://127.0.0.1:1")
    with pytest.raises(SystemExit) as caught:
        olive_utils.main(argv)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and said in err


@pytest.mark.parametrize("argv, said, reason", [
    (["in_thread", "hang", "--time-limit", "0.3"], "TimeLimitExceeded: 0.3 s\n",
     "timeout"),
    (["in_process", "hang", "--time-limit", "0.3"], "TimeLimitExceeded: 0.3 s\n",
     "timeout"),
    (["add", "1", "2", "--expires", "0"], "TaskRevokedError: expired\n", None)])
def test_the_sender_sets_a_time_limit_and_an_expiry(live, argv, said, reason):
    sent = send(live.config, *argv)
    assert (sent.returncode, sent.stdout, sent.stderr) == (1, "", said)
    if reason:
        buried(live, reason)


def test_the_sender_shows_a_failure(live):
    sent = send(live.config, "fail", "on purpose")
    assert sent.returncode == 1 and sent.stdout == ""
    assert sent.stderr.startswith("Traceback (most recent call last):\n")
    assert sent.stderr.count("File") == 1 and ", in fail\n" in sent.stderr
    assert sent.stderr.endswith("\nRuntimeError: on purpose\n")
    assert sent.stderr.count("RuntimeError: on purpose") == 1
    buried(live, "failed")


def test_the_sender_gives_up_waiting(live):
    sent = send(live.config, "sleep_n", "1", "--timeout", "0.1")
    assert (sent.returncode, sent.stdout) == (3, "")
    assert sent.stderr == "no answer within 0.1 s\n"
    live.app.wait_for("DEBUG 'sleep_n'")    # an answer that nobody awaits does no harm


def test_the_sender_sends_many_and_counts_failures(live):
    sent = send(live.config, "echo", "--count", "700")
    assert sent.returncode == 0 and sent.stdout == "[[], {}]\n" * 700
    last = sent.stderr.splitlines()[-1]
    assert re.fullmatch(r"700 ok, 0 failed in [\d.]+ s: \d+ tasks/s, latency p50 "
                        r"[\d.]+ ms, p99 [\d.]+ ms", last), last
    sent = send(live.config, "fail", "again", "--count", "3")
    assert sent.returncode == 1 and sent.stdout == ""
    assert sent.stderr.count("RuntimeError: again\n") == 3
    assert "0 ok, 3 failed" in sent.stderr
    for _ in range(3):
        buried(live, "failed")


def test_the_reader_of_the_results_has_had_enough(live):
    argv = [sys.executable, str(HERE / "olive_utils.py"), "echo", "--count", "2000"]
    with subprocess.Popen(argv, env={**_clean_environ(), **live.config}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as sender:
        assert sender.stdout.readline() == "[[], {}]\n"
        sender.stdout.close()
        said = sender.stderr.read()
    assert sender.returncode == 1 and "Traceback" not in said and "Error" not in said
    live.send("echo", ["after"])
    assert live.reply()["result"] == [["after"], {}]


@pytest.mark.parametrize("count", [1, 700])
def test_the_sender_need_not_wait(live, count):
    # (the app runs, so answers come while it still sends)
    sent = send(live.config, "add", "1", "2", "--no-wait", "--count", str(count))
    assert sent.returncode == 0, sent.stderr
    idents = sent.stdout.split()
    assert len(idents) == len({uuid.UUID(ident) for ident in idents}) == count
    assert (sent.stderr == "") == (count == 1)


def test_the_dead_queue_is_listed_and_replayed(live, tmp_path):
    path, good = tmp_path / "tries", 4
    ident = live.send("flaky", [str(path), good])
    assert live.reply()["status"] == "FAILURE"
    for _ in range(2):      # listing takes nothing away
        sent = send(live.config, "--dead")
        assert (sent.returncode, sent.stderr) == (0, "1 dead\n")
        line = json.loads(sent.stdout)
        assert json.loads(line.pop("body"))[0] == [str(path), good]
        assert datetime.fromisoformat(line.pop("when")) <= later(0)
        assert line == {"task": "flaky", "id": ident, "reason": "failed",
                        "error": "RuntimeError: try 3"}
        wait_until(lambda: live.count(live.dead_queue) == 1)
    for count in 1, 0:
        sent = send(live.config, "--replay")
        assert (sent.returncode, sent.stdout) == (0, "")
        assert sent.stderr == f"{count} sent back to work\n"
    assert live.reply() == {"task_id": ident, "status": "SUCCESS", "result": good,
                            "traceback": None, "children": []}


def test_no_broker_or_no_queue(client):
    def refused(environ, *argv):
        sent = send(environ, *argv)
        assert sent.returncode == 4 and sent.stdout == ""
        assert sent.stderr.count("\n") == 1 and "secret" not in sent.stderr
        return sent.stderr

    url = client.config["OLIVE_URL"]
    assert refused({"OLIVE_URL": DEAD}).startswith("olive: no broker")
    said = refused({"OLIVE_URL": url.replace(":guest", ":secret")})
    assert "check OLIVE_URL" in said and "Start the app" not in said


def test_a_late_reply_reaches_nobody(live):
    async def main():
        client = await olive_app.Client.open(OliveAppConfig.from_env(live.config))
        with pytest.raises(TimeoutError):
            await client.call("sleep_n", [0.3], timeout=0.1)
        for n in range(3):
            assert await client.call("echo", [n], timeout=20) == [[n], {}]
        assert not client._answers
        await client.aclose()

    run(main)


def test_sending_from_a_program(live, monkeypatch):
    for name, value in live.config.items():
        monkeypatch.setenv(name, value)
    assert olive_utils.call_task("add", (2, 3)) == 5
    assert olive_utils.call_task("echo", ["a"], {"k": 1}, countdown=0.1, expires=60,
                                 time_limit=9, priority=3) == [["a"], {"k": 1}]
    eta = later(0.2).astimezone(timezone(timedelta(hours=3)))
    assert olive_utils.call_task("echo", eta=eta, timeout=None) == [[], {}]
    assert later(0) >= eta
    with pytest.raises(olive_utils.TaskFailed) as caught:
        olive_utils.call_task("fail", ["so it is"])
    assert str(caught.value) == "RuntimeError: so it is"
    assert (caught.value.exc_type, caught.value.text) == ("RuntimeError", "so it is")
    assert "raise RuntimeError(message)" in caught.value.traceback
    buried(live, "failed")
    with pytest.raises(olive_utils.TaskFailed, match="TaskRevokedError: expired"):
        olive_utils.call_task("add", (2, 3), expires=eta - timedelta(days=1))
    for when in {"eta": datetime.now()}, {"expires": datetime.now()}:
        with pytest.raises(ValueError, match="has no time zone"):
            olive_utils.send_task("add", (2, 3), **when)
    with pytest.raises(TimeoutError, match="no answer within 0.1 s"):
        olive_utils.call_task("sleep_n", [0.5], timeout=0.1)
    live.app.wait_for("'sleep_n'")
    ident = olive_utils.send_task("echo", ["sent"], time_limit=0.5)
    live.app.wait_for(f"DEBUG 'echo'[{ident}]: done")
    monkeypatch.setenv("OLIVE_ROUTING_KEY", "nowhere")
    with pytest.raises(pika.exceptions.UnroutableError):
        olive_utils.send_task("add", (2, 3))
    monkeypatch.setenv("OLIVE_URL", DEAD)
    for function in olive_utils.send_task, olive_utils.call_task:
        with pytest.raises(pika.exceptions.AMQPError):
            function("add", (2, 3))


# =====================================================================================
# Stopping
# =====================================================================================

STOP_TASKS = """
import os, time, sweepea

@task
def in_thread(folder, name, fails=False):
    open(f"{folder}/{name}", "a").write("x")
    while not os.path.exists(f"{folder}/go"):
        time.sleep(0.01)
    if fails:
        raise ValueError(name)
    return name

task("in_process", worker="process")(in_thread)

@task
async def in_coroutine(folder, name):
    open(f"{folder}/{name}", "w").close()
    await sweepea.sleep(3600)
"""


@contextmanager
def busy(client, tmp_path, name="in_thread", unstarted=2, **environ):
    """An app with one task that runs and some that wait for it."""
    environ = {**client.config, **tasks_module(tmp_path, STOP_TASKS),
               "OLIVE_THREADS": "1", "OLIVE_PROCESSES": "1", **environ}
    with running(environ) as app:
        app.ident = client.send(name, [str(tmp_path), "started"])
        wait_until((tmp_path / "started").exists)
        for number in range(unstarted):
            client.send(name, [str(tmp_path), f"unstarted {number}"])
        # the last of them is there when a malformed one behind it is dead
        client.send("nonsense", properties={"reply_to": None})
        client.get(client.dead_queue)
        children = app.children()
        try:
            yield app
        finally:
            (tmp_path / "go").touch()       # (lets go whatever still runs)
    assert bool(children) == (name == "in_process")
    wait_until(lambda: gone(children))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_when_idle(client, signum):
    with running(client.config) as app:
        app.signal(signum)
        assert app.wait() == 0
        assert app.log.endswith("stopping: 0 in hand\n") and "add" in app.log


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(client):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)        # as nohup does
    try:
        app = App(client.config)
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    app.wait_for("connected to")
    app.signal(signal.SIGHUP)
    client.send("add")
    assert client.reply()["result"] == 5
    app.stop()


@pytest.mark.parametrize("name", ["in_thread", "in_process"])
def test_a_stop_finishes_what_runs_and_gives_back_the_rest(client, tmp_path, name):
    with busy(client, tmp_path, name) as app:
        os.killpg(app.process.pid, signal.SIGINT)   # as Ctrl-C: to the children, too
        for pid in app.children():
            os.kill(pid, signal.SIGTERM)
        app.wait_for("stopping: 3 in hand")
        assert app.process.poll() is None
        (tmp_path / "go").touch()
        assert app.wait() == 0
    assert client.reply()["result"] == "started"
    wait_until(lambda: client.count(client.queue) == 2)
    assert client.count(client.replies) == client.count(client.dead_queue) == 0
    assert not list(tmp_path.glob("unstarted*"))


@KINDS
def test_a_stop_waits_no_longer_than_the_grace(client, tmp_path, name):
    unstarted = 0 if name == "in_coroutine" else 1
    with busy(client, tmp_path, name, unstarted, OLIVE_GRACE="0.2") as app:
        began = time.monotonic()
        os.killpg(app.process.pid, signal.SIGINT)
        assert app.wait(10) == 0 and time.monotonic() - began < 5
        line = next(line for line in app.lines if "given back" in line)
        assert app.ident in line and app.log.count("given back") == 1
    wait_until(lambda: client.count(client.queue) == 1 + unstarted)
    assert client.count(client.replies) == 0


@pytest.mark.parametrize("first, second, name", [
    (signal.SIGTERM, signal.SIGINT, "in_thread"),
    (signal.SIGINT, signal.SIGTERM, "in_process")])
def test_a_second_signal_leaves_at_once(client, tmp_path, first, second, name):
    with busy(client, tmp_path, name, 0) as app:
        app.signal(first)
        app.wait_for("stopping: 1 in hand")
        app.signal(second)
        assert app.wait(5) == 128 + second
        assert app.log.endswith("olive: leaving at once\n")
    wait_until(lambda: client.count(client.queue) == 1)


def test_an_app_whose_threads_all_hang_stops(client, tmp_path):
    with busy(client, tmp_path, unstarted=1, OLIVE_THREADS="2",
              OLIVE_TASK_TIMEOUT="0.3") as app:
        assert app.wait() == 1
        assert "every thread hangs in a task that does not end: stopping" in app.log
    for _ in range(2):
        assert client.reply()["result"]["exc_type"] == "TimeLimitExceeded"
        buried(client, "timeout")


# =====================================================================================
# Starting
# =====================================================================================

def test_a_broker_that_cannot_be_reached():
    with running({"OLIVE_URL": DEAD}, ready="no connection to the broker") as app:
        began = time.monotonic()
        app.signal()
        assert app.wait(10) == 0 and time.monotonic() - began < 5
        assert len(app.lines) == 2 and "secret" not in app.log, app.log


@pytest.mark.parametrize("change", [
    (":guest@", ":secret@"), ("guest:guest@", "nobody:secret@"), ("%2F", "nowhere")])
def test_a_broker_that_refuses(client, change):
    url = client.config["OLIVE_URL"].replace(*change)
    app = App({**client.config, "OLIVE_URL": url})
    assert app.wait() == 1
    lines = [line for line in app.lines if "the broker refuses us: " in line]
    assert len(lines) == 1 and "check OLIVE_URL" in lines[0]
    assert len(app.lines) <= 2 and "secret" not in app.log, app.log


@pytest.fixture
def vhost(broker):
    """The URL of a virtual host of its own: all apps of one share the ladder."""
    name = "v" + uuid.uuid4().hex[:8]
    broker.ctl("add_vhost", name)
    broker.ctl("set_permissions", "-p", name, "guest", ".*", ".*", ".*")
    yield broker.url.replace("%2F", name)
    broker.ctl("delete_vhost", name)


def test_what_exists_with_other_arguments(vhost):
    client = Client(vhost, "other")
    declare = client.channel
    make_exchange = functools.partial(declare.exchange_declare, exchange_type="fanout")
    for name, make, delete in [
            (client.exchange, make_exchange, declare.exchange_delete),
            (client.queue, declare.queue_declare, declare.queue_delete),
            ("Olive.wait.2", declare.queue_declare, declare.queue_delete)]:
        make(name, durable=True)
        app = App(client.config)
        assert app.wait() == 1
        line, = [line for line in app.lines if "the broker refuses us: " in line]
        assert "inequivalent arg" in line and name in line
        assert ("OLIVE_QUEUE_ARGUMENTS" in line) == (name == client.queue)
        assert len(app.lines) <= 2 and "Traceback" not in app.log, app.log
        delete(name)
    client.close()


def test_the_port_of_a_broker_of_ones_own_is_in_use():
    with socket.socket() as sock:
        with suppress(OSError):     # somebody else has it
            sock.bind(("127.0.0.1", 5672))
            sock.listen()
        # (Nobody answers at the URL; what may answer on 5672 is none of ours.)
        app = App({"OLIVE_URL": "amqp://127.0.0.1:1"}, "--with-broker")
        assert app.wait() == 1
    assert app.log.startswith("olive: port 5672 is in use") and len(app.lines) == 1


def test_a_broker_that_is_there_is_used(client):
    with running(client.config, "--with-broker") as app:
        client.send("add")
        assert client.reply()["result"] == 5
        assert "of our own" not in app.log


def test_the_demo(client, broker):
    app = App(client.config, "--demo")
    assert app.wait() == 0
    shown = re.sub(r"  \(\d+ ms\)$", "", app.log, flags=re.M)
    assert shown == """add(2, 3) -> 5
sleep_n(0.2) -> 0.2
fib(20) -> 6765
do_nothing() -> None
fail('on purpose') -> failed: RuntimeError: on purpose
add(1, 1, countdown=1.5) -> 2
"""
    assert "Olive.demo" not in broker.ctl("list_queues", "name")
    assert "Olive.demo" not in broker.ctl("list_exchanges", "name")
    assert client.config["OLIVE_QUEUE"] not in broker.ctl("list_queues", "name")


def test_a_process_that_cannot_be_started_is_no_fault_of_the_message(client, tmp_path):
    environ = tasks_module(tmp_path, """
import multiprocessing
if multiprocessing.parent_process():
    raise ImportError("not in a child")
@task(worker="process")
def processed(): ...
""")
    with running({**client.config, **environ}) as app:
        ident = client.send("processed", [])
        assert app.wait(60) == 1
        assert "worker process can be started: ImportError('not in a child" in app.log
    properties, _ = client.get(client.queue)
    assert properties.headers["id"] == ident
    assert client.count(client.replies) == client.count(client.dead_queue) == 0


def test_kill_9_frees_the_messages_though_a_forked_child_lives(client, tmp_path):
    environ = tasks_module(tmp_path, f"""
import os, time
@task
def fork():
    child = os.fork()
    if not child:
        time.sleep(60)
    open("{tmp_path}/new", "w").write(str(child))
    os.rename("{tmp_path}/new", "{tmp_path}/child")
    time.sleep(60)
""")
    with running({**client.config, **environ}) as app:
        client.send("fork", [])
        wait_until((tmp_path / "child").exists)
        child = int((tmp_path / "child").read_text())
        app.process.kill()
        try:
            wait_until(lambda: client.count(client.queue) == 1, 10)
            assert not gone({child})
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_queue_with_priorities_and_a_timeline_of_the_run(client, tmp_path):
    arguments, trace = {"x-max-priority": 9}, tmp_path / "trace.json"
    client.channel.queue_declare(client.queue, durable=True, arguments=arguments)
    idents = {client.send("add", properties={"priority": priority}): priority
              for priority in (0, 9, 5)}
    with running({**client.config, "OLIVE_QUEUE_ARGUMENTS": json.dumps(arguments),
                  "OLIVE_THREADS": "1", "OLIVE_PREFETCH": "1",
                  "OLIVE_TRACE": str(trace)}) as app:
        assert [idents[client.reply()["task_id"]] for _ in range(3)] == [9, 5, 0]
        app.stop()
        assert not any(ident in app.log for ident in idents)    # INFO has no such lines
    events = json.loads(trace.read_text())
    assert {e["name"] for e in events} == {f"'add'[{ident}]" for ident in idents}
    assert all(event["ph"] == "X" and event["dur"] >= 0 for event in events)


class FarFuture(datetime):
    def utctimetuple(self):
        return 9999, 1, 1, 1_000_000_000, 0, 0, 0, 1, 0


def test_what_pika_cannot_decode_is_one_line_and_a_longer_wait_each_time(client):
    """A limit: such a message never reaches us. It has to be purged by hand."""
    with running(client.config) as app:
        client.send(far=FarFuture(2026, 1, 1))
        app.wait_for("out of range", count=2)
        purge = client.channel.queue_purge
        wait_until(lambda: purge(client.queue).method.message_count)
        client.send()
        wait_until(lambda: client.count(client.replies), 60)
        assert client.reply()["result"] == 5
    assert "Traceback" not in app.log


# =====================================================================================
# The queue counts
# =====================================================================================

COUNT_TASKS = """
import os

@task
def threaded(): return os.getpid()

@task(retries=1, retry_delay=0.1)
def tried_again(path):
    open(path, "a").write(f"{os.getpid()}\\n")
    raise ValueError("again")

@task
def aborts(path):
    open(path, "a").write("x")
    os._exit(6)

@task
async def awaited(): return os.getpid()
"""


def come_back(client, times):
    """Take and give back whatever lies in the queue so many times."""
    for _ in range(times):
        count = client.count(client.queue)
        for _ in range(count):
            assert client.channel.basic_get(client.queue)[0]
        client.channel.basic_nack(0, multiple=True)     # 0: all of them
        wait_until(lambda: client.count(client.queue) == count)


@pytest.fixture
def counting(client, tmp_path):
    """A client whose queue is there before the app, and the settings of the app."""
    client.environ = {**client.config, **tasks_module(tmp_path, COUNT_TASKS)}
    client.channel.queue_declare(client.queue, durable=True,
                                 arguments=OliveAppConfig().queue_arguments)
    return client


# Nobody has such an address; a broker that is asked for it closes the connection.
DEADLY = {"reply_to": "amq.rabbitmq.reply-to.g1hkAA.x"}


def test_what_came_back_five_times_runs_in_a_process(counting, tmp_path):
    client, path = counting, tmp_path / "pids"
    isolated = client.send("threaded", [])
    awaited = client.send("awaited", [])
    client.send("tried_again", [str(path)])
    client.send("aborts", [str(tmp_path / "aborted")], properties={"reply_to": None})
    client.send("threaded", [], properties=DEADLY)
    come_back(client, 1)
    usual = {client.send("threaded", [])}               # has come back four times
    come_back(client, 4)
    usual.add(client.send("threaded", [], **{"x-delivery-count": 20}))  # the sender's
    with running(client.environ) as app:
        pids = {reply["task_id"]: reply["result"]
                for reply in (client.reply() for _ in range(5))}
        assert pids[isolated] != app.process.pid == pids[awaited]
        assert all(pids[ident] == app.process.pid for ident in usual)
        letters = [client.get(client.dead_queue)[0].headers for _ in range(2)]
        lost, again = sorted(letters, key=lambda headers: headers["task"])
        assert again["x-olive-reason"] == "failed" and again["retries"] == 1
        assert lost["x-olive-reason"] == "worker-lost" and "retries" not in lost
        assert lost["x-olive-isolated"] is again["x-olive-isolated"] is True
        tries = path.read_text().split()
        assert len(tries) == 2 and str(app.process.pid) not in tries
        assert (tmp_path / "aborted").read_text() == "x"    # a killer has one try
        wait_until(lambda: client.count(client.queue) == 0)
        assert "connection lost" not in app.log


def test_a_reply_that_breaks_the_connection(counting):
    client = counting
    client.send("threaded", [], properties=DEADLY)
    come_back(client, 3)
    with running(client.environ) as app:
        app.wait_for("reconnected", count=2)        # then no reply any more
        client.send("threaded", [])
        assert client.reply()["result"] == app.process.pid
        wait_until(lambda: client.count(client.queue) == 0)
        app.stop()
        assert app.log.count("reconnected") == 2, app.log
    assert client.count(client.queue) == client.count(client.dead_queue) == 0


def test_what_came_back_fifteen_times_is_dead(counting):
    client = counting
    idents = {client.send("awaited", []), client.send("threaded", []),
              client.send(body="nonsense"), client.send("threaded", eta="never")}
    come_back(client, 15)
    with running(client.environ):
        for _ in range(4):
            properties, headers = buried(client, "returned")
            assert headers["x-olive-error"] == (
                "RuntimeError: came back 15 times: does it kill us?")
            idents.remove(properties.correlation_id)
        client.send("threaded", [])
        assert client.reply()["status"] == "SUCCESS"
        # The dead queue counts, too, but has no limit: it may be looked at for ever.
        client.send("tried_again", ["/nowhere/path"], retries=1)
        assert client.reply()["status"] == "FAILURE"
        wait_until(lambda: client.count(client.dead_queue) == 1)
        for _ in range(25):
            method, *_ = client.channel.basic_get(client.dead_queue)
            client.channel.basic_nack(method.delivery_tag)
            wait_until(lambda: client.count(client.dead_queue) == 1)
    assert client.count(client.replies) == 0        # nobody was told of the others


def test_a_classic_queue_does_not_count(client, tmp_path):
    arguments = {"x-queue-type": "classic"}
    environ = {**client.config, **tasks_module(tmp_path, COUNT_TASKS),
               "OLIVE_QUEUE_ARGUMENTS": json.dumps(arguments)}
    client.channel.queue_declare(client.queue, durable=True, arguments=arguments)
    client.send("threaded", [], **{"x-delivery-count": 20})     # anybody may send that
    come_back(client, 1)
    with running(environ, ready="is not a quorum queue") as app:
        assert client.reply()["result"] == app.process.pid


# =====================================================================================
# Work in hand outlives its connection
# =====================================================================================

@contextmanager
def losing(client, relay, tmp_path, calls):
    """An app that is about to lose its connection, with two of the calls begun."""
    environ = {**client.config, **tasks_module(tmp_path, STOP_TASKS),
               "OLIVE_URL": relay.url + "?heartbeat=2", "OLIVE_THREADS": "2"}
    script = tmp_path / "impatient.py"
    script.write_text("import olive_app\nif __name__ == '__main__':\n"
                      "    olive_app.PATIENCE = 1.0\n    olive_app.main()\n")
    with running(environ, script=script) as app:
        for name, fails in calls:
            client.send("in_thread", [str(tmp_path), name, fails])
        wait_until(lambda: len(list(tmp_path.glob("call*"))) == 2)
        client.send("nonsense", properties={"reply_to": None})
        client.get(client.dead_queue)       # all are in hand when this one is dead
        yield app
        (tmp_path / "go").touch()


def test_a_failure_is_told_once_though_the_connection_was_lost(client, relay, tmp_path):
    calls = [("call0", False), ("call1", True), ("call2", False), ("call3", True)]
    with losing(client, relay, tmp_path, calls) as app:
        relay.cut_after = 1
        app.wait_for("connection lost")
        (tmp_path / "go").touch()
        statuses = [client.reply()["status"] for _ in calls]
        assert sorted(statuses) == ["FAILURE"] * 2 + ["SUCCESS"] * 2
        letters = {buried(client, "failed")[1]["x-olive-error"] for _ in range(2)}
        assert letters == {"ValueError: call1", "ValueError: call3"}
        app.stop()
    assert client.count(client.dead_queue) == client.count(client.queue) == 0
    assert client.count(client.replies) == 0
    assert {p.name: p.read_text() for p in tmp_path.glob("call*")} == {
        name: "x" for name, _ in calls}     # nothing was begun twice


def test_what_somebody_else_got_is_let_go(client, relay, tmp_path):
    calls = [("call0", False), ("call1", True), ("call2", False), ("call3", False)]
    with losing(client, relay, tmp_path, calls) as app:
        # A more important consumer gets all that comes back to the queue.
        taken = client.channel.consume(client.queue, arguments={"x-priority": 9},
                                       inactivity_timeout=0.2)
        next(taken)
        relay.cut_after = 1
        names = set()
        while len(names) < 4:
            if (message := next(taken))[0]:
                names.add(json.loads(message[2])[0][1])
        app.wait_for("reconnected")
        (tmp_path / "go").touch()
        wait_until(lambda: next(taken) and client.count(client.replies) == 1)
        assert client.reply()["result"] == "call0"      # a success is told ...
        app.stop()
        assert "given back" not in app.log
        client.channel.cancel()
    client.channel.basic_nack(0, multiple=True)         # ... but all is still there
    wait_until(lambda: client.count(client.queue) == 4)
    assert client.count(client.dead_queue) == client.count(client.replies) == 0
    # What had not begun when the connection was lost was never begun.
    assert len(list(tmp_path.glob("call*"))) == 2


# =====================================================================================
# The ladder
# =====================================================================================

def test_what_waits_for_a_queue_that_is_gone_holds_nobody_up(vhost, tmp_path):
    gone_app, neighbour = (Drill(vhost, tmp_path, name) for name in ("a.b", "b"))
    with running(gone_app.environ):
        gone_app.send([("work", i) for i in range(40)], eta=later(2.5).isoformat())
        wait_until(lambda: gone_app.counts()[gone_app.queue] == 0)
    with gone_app.channel() as channel:
        channel.queue_delete(gone_app.queue)
    with running(neighbour.environ) as app, neighbour.channel() as channel:
        for n in range(3):
            neighbour.send([("work", f"n{n}")], eta=later(1.2).isoformat())
            wait_until(lambda: f"n{n}" in neighbour.marks("done"), 10)
        wait_until(lambda: channel.queue_declare(
            olive_app.LOST, passive=True).method.message_count == 40)
        neighbour.finish(app)


# =====================================================================================
# The drills: nothing is lost, whatever happens
#
# Each causes a fault for real and then counts: sent, done, done twice, dead, lost. The
# tasks leave a line in a file for each start and each end, so what is counted is the
# work itself and not what somebody says about it.
# =====================================================================================

DRILL_TASKS = '''
import ctypes, os, resource, signal, time
import sweepea

def mark(*what):
    line = (" ".join(map(str, what)) + "\\n").encode()
    fd = os.open(os.environ["DRILL_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, line)
    os.close(fd)

def wait(seconds):
    """A text is the name of a file to wait for."""
    if isinstance(seconds, str):
        while not os.path.exists(seconds): time.sleep(0.01)
    else:
        time.sleep(seconds)

@task
def work(i, seconds=0):
    mark("start", i)
    wait(seconds)
    mark("done", i)
    return i

@task(worker="process")
def pwork(i, seconds=0):
    mark("pid", os.getpid())
    return work(i, seconds)

@task
async def cowork(i, seconds=0):
    mark("start", i)
    await sweepea.sleep(seconds)
    mark("done", i)
    return i

@task(retries=3, retry_delay=1.0)
def flaky(i):
    mark("start", i)
    if open(os.environ["DRILL_LOG"]).read().split("\\n").count(f"start {i}") < 3:
        raise OSError("not yet")
    mark("done", i)
    return i

@task
def fails(i, seconds):
    mark("start", i)
    wait(seconds)
    mark("failed", i)
    raise ValueError("on purpose")

@task(retries=3, retry_delay=0.1)
def abort(i):
    mark("start", i)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.abort()

@task(worker="process")
def die(i, how):
    mark("start", i)
    if how == "segfault": ctypes.string_at(0)
    if how == "exit": os._exit(3)
    if how == "killed": os.kill(os.getpid(), signal.SIGKILL)
    if how == "nameless": os.kill(os.getpid(), 35)
    if how == "memory":
        used = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))
        bytearray(1 << 30)

@task
def spin(i, seconds):
    mark("start", i)
    end = time.monotonic() + seconds
    while time.monotonic() < end: pass
    mark("done", i)
    return i
'''


class Drill:
    """A queue of its own, tasks that keep a record, and the count at the end.

    Every call makes a connection of its own, so that it survives what is done to the
    broker; results go to a durable queue for the same reason.
    """

    def __init__(self, url, tmp_path, name=None, **settings):
        self.url, self.sent = url, []
        name = name or "d" + uuid.uuid4().hex[:8]
        self.go, self.record = str(tmp_path / "go"), tmp_path / "record"
        self.record.touch()
        self.queue, self.dead = f"{name}.q", f"{name}.dead"
        self.replies = f"{name}.replies"
        self.environ = {
            "OLIVE_URL": url, "OLIVE_EXCHANGE": f"{name}.x", "OLIVE_QUEUE": self.queue,
            "OLIVE_DEAD_QUEUE": self.dead, "DRILL_LOG": str(self.record),
            "OLIVE_PROCESSES": "2", **settings,
            **tasks_module(tmp_path, DRILL_TASKS, "drilltasks")}
        quorum = OliveAppConfig().queue_arguments
        with self.channel() as channel:
            for queue, arguments in {self.queue: quorum, self.replies: quorum,
                                     self.dead: olive_app.NO_LIMIT}.items():
                channel.queue_declare(queue, durable=True, arguments=arguments)
                channel.queue_purge(queue)

    @contextmanager
    def channel(self):
        connection = pika.BlockingConnection(pika.URLParameters(self.url))
        try:
            channel = connection.channel()
            channel.confirm_delivery()      # (else a kill -9 may eat some)
            yield channel
        finally:
            if connection.is_open:
                connection.close()

    def message(self, task, i, *args, reply=True, **headers):
        ident = f"{task}-{i}"
        self.sent.append(str(i))
        body = json.dumps([[i, *args], {}, {}]).encode()
        return body, pika.BasicProperties(
            content_type="application/json", content_encoding="utf-8", delivery_mode=2,
            correlation_id=ident, reply_to=self.replies if reply else None,
            headers={"task": task, "id": ident, **headers})

    def send(self, calls, *, queue=None, **options):
        """Send (task, i, *args) each; i is what the record knows it by."""
        with self.channel() as channel:
            for call in calls:
                channel.basic_publish("", queue or self.queue,
                                      *self.message(*call, **options))

    def marks(self, kind):
        """What was recorded under this word, in order."""
        return [line.split(" ", 1)[1] for line in self.record.read_text().splitlines()
                if line.startswith(kind + " ")]

    def wait_done(self, count, timeout=30):
        wait_until(lambda: len(self.marks("done")) >= count, timeout, f"{count} done")

    def counts(self):
        with self.channel() as channel:
            return {
                queue: channel.queue_declare(queue, passive=True).method.message_count
                for queue in (self.queue, self.dead, self.replies)}

    def drain(self, queue):
        """Take everything out of a queue: [(properties, body)]."""
        taken = []
        with self.channel() as channel:
            while (got := channel.basic_get(queue, auto_ack=True))[0] is not None:
                taken.append(got[1:])
        return taken

    def finish(self, app, dead=0, replies=0):
        """Wait until all is done and settled; stop the app, check, return the tally."""
        def complete():
            assert app.process.poll() is None, app.log
            return len(set(self.sent) - set(self.marks("done"))) <= dead

        def settled():
            counts = self.counts()
            return (counts[self.replies] >= replies and counts[self.dead] >= dead
                    and counts[self.queue] == 0)

        try:
            wait_until(complete, 30, "all done")
            wait_until(settled, 40, "all settled")
        except AssertionError as exc:
            raise AssertionError(f"{exc}: {self.tally()} {self.counts()}\n"
                                 f"{app.log[-5000:]}") from None
        app.signal()
        assert app.wait(20) == 0, app.log[-3000:]
        assert "Traceback" not in app.log and "Task Crash" not in app.log, app.log
        tally = self.tally()
        # What has come back is a second copy of what is done, if the stop came first.
        left = {properties.correlation_id.partition("-")[2]
                for properties, _ in self.drain(self.queue)} & set(self.sent)
        assert left <= set(self.marks("done")), (tally, left)
        assert tally["lost"] == 0 and tally["dead"] == dead, (tally, left)
        return tally

    def tally(self):
        done, self.letters = self.marks("done"), self.drain(self.dead)
        dead = {p.correlation_id.partition("-")[2] for p, _ in self.letters}
        return {"sent": len(self.sent), "done": len(set(done)),
                "twice": len(done) - len(set(done)), "dead": len(self.letters),
                "lost": len(set(self.sent) - set(done) - dead)}


@pytest.fixture(scope="module")
def _victim():
    with olive_utils.private_broker() as broker:
        yield broker


@pytest.fixture
def victim(_victim):
    """A broker to be harmed. Who stops it starts it again; this sees to the rest."""
    yield _victim
    _victim.start()     # does nothing if it runs


# -- the broker -----------------------------------------------------------------------

@pytest.mark.parametrize("how", ["kill", "stop_app"])
def test_broker_dies_while_everything_waits(victim, tmp_path, how):
    drill = Drill(victim.url, tmp_path, "v")
    drill.send([("work", 0, drill.go)])             # deep in its task
    with running(drill.environ) as app:
        wait_until(lambda: drill.marks("start"))
        drill.send([("flaky", f"f{i}") for i in range(5)])      # soon in the ladder
        drill.send([("work", f"e{i}") for i in range(20)], eta=later(6).isoformat())
        drill.send([("work", f"w{i}", 0.02) for i in range(1500)])
        drill.wait_done(201)
        if how == "kill":
            victim.kill()
            victim.start()
        else:
            victim.ctl("stop_app")
            victim.ctl("start_app")
        app.wait_for("reconnected")
        open(drill.go, "w").close()
        # (replies are not confirmed: the last before the kill may be gone)
        tally = drill.finish(app, replies=27)
        # whoever waits for a confirm waits for the link, which says it once
        assert app.log.count("could not publish") < 20, app.log
        assert drill.marks("start").count("0") == 1, "begun again, though in hand"
        assert drill.marks("done").count("0") == 1 and tally["twice"] <= 80, tally
        ids = {properties.correlation_id
               for properties, _ in drill.drain(drill.replies)}
        assert "work-0" in ids and {f"work-e{i}" for i in range(20)} <= ids


def test_connections_closed_by_the_broker(victim, tmp_path):
    drill = Drill(victim.url, tmp_path, "v")
    drill.send([("work", i, 0.05) for i in range(700)])
    with running(drill.environ) as app:
        for n in 1, 2:
            drill.wait_done(100 * n)
            victim.ctl("close_all_connections", "a drill")
            app.wait_for("reconnected", count=n)
        tally = drill.finish(app, replies=700)
        # What was in hand goes on, and is not begun again. Only what was acknowledged
        # in the very moment of the loss is.
        assert tally["twice"] <= 2 * OliveAppConfig().prefetch / 4, tally


def test_a_copy_that_comes_back_is_not_taken_for_its_original(victim):
    client = Client(victim.url, "copy" + uuid.uuid4().hex[:8])
    with running(client.config) as app:
        client.channel.queue_declare("copy.replies", durable=True)
        client.send(eta=later(4).isoformat(), properties={"reply_to": "copy.replies"})
        wait_until(lambda: client.count(olive_app.wait_name(1)))
        victim.ctl("close_all_connections", "test")     # the original's channel is gone
        app.wait_for("reconnected")
        client.connect()
        # The copy goes to us first, as we are the more important consumer; we give it
        # back, and so it reaches the app as redelivered.
        consumed = client.channel.consume(client.queue, arguments={"x-priority": 9},
                                          inactivity_timeout=20)
        method, _, _ = next(consumed)
        assert method is not None and not method.redelivered
        client.channel.basic_nack(method.delivery_tag)
        client.channel.cancel()
        assert json.loads(client.get("copy.replies")[1])["result"] == 5
    client.close()


def test_a_task_outlasts_the_consumer_timeout(victim, tmp_path):
    def set_timeout(timeout, tick):
        victim.ctl("eval", f"application:set_env(rabbit, consumer_timeout, {timeout}), "
                           f"application:set_env(rabbit, channel_tick_interval, {tick}"
                           ").")

    drill = Drill(victim.url, tmp_path, "v")
    set_timeout(2000, 500)
    try:
        drill.send([("work", 0, drill.go)] + [("work", i) for i in range(1, 100)])
        with running(drill.environ) as app:
            app.wait_for("reconnected")
            open(drill.go, "w").close()
            tally = drill.finish(app, replies=100)
            assert drill.marks("start").count("0") == 1 and tally["twice"] == 0
    finally:
        set_timeout(1_800_000, 60_000)


# -- a message that takes the app with it ---------------------------------------------

def test_a_message_that_kills_the_app(broker, tmp_path):
    drill = Drill(broker.url, tmp_path)
    drill.send([("work", i, 0.05) for i in range(10)] + [("abort", "x")]
               + [("work", i, 0.05) for i in range(10, 80)])
    for _ in range(5):
        assert App(drill.environ).wait() == -signal.SIGABRT
    with running(drill.environ) as app:
        drill.finish(app, dead=1)
    headers = drill.letters[0][0].headers
    assert headers["x-olive-reason"] == "worker-lost" and "SIGABRT" in headers[
        "x-olive-error"] and headers["x-olive-isolated"]
    assert drill.marks("start").count("x") == 5 + 1 + 3     # with all its retries


def test_restarts_and_a_stop_of_one_app_of_two(broker, tmp_path):
    drill = Drill(broker.url, tmp_path, OLIVE_GRACE="5")
    drill.send([("cowork", i) if i % 4 == 3 else ("work", i, 0.1) for i in range(800)])
    for n in range(1, 6):
        with running(drill.environ) as app:
            drill.wait_done(50 * n)
            app.stop()
        started = drill.marks("start")      # and has ended; the rest is given back
        assert sorted(started) == sorted(drill.marks("done"))
        wait_until(lambda: drill.counts()[drill.queue] == 800 - len(started), 5)
        assert drill.counts()[drill.replies] == len(started) < 800
    with running(drill.environ) as first, running(drill.environ) as second:
        drill.wait_done(600)
        second.stop()
        assert drill.finish(first, replies=800)["twice"] == 0


# -- the app and its workers ----------------------------------------------------------

def test_kill_9_of_the_app(broker, tmp_path):
    drill = Drill(broker.url, tmp_path)
    drill.send([(("pwork" if i % 7 == 0 else "work"), i, 0.01) for i in range(1000)])
    for n in range(1, 4):
        with running(drill.environ) as app:
            wait_until(lambda: len(drill.marks("done")) >= 150 * n and len(
                app.children()) >= 3)       # two workers and the resource tracker
            workers = app.children()
            app.process.kill()
            app.wait()
            wait_until(lambda: gone(workers), 5, "the workers left")
    with running(drill.environ) as app:
        tally = drill.finish(app)
    assert tally["twice"] <= 3 * 80, tally


def test_worker_processes_die_of_everything(broker, tmp_path):
    drill = Drill(broker.url, tmp_path)
    said = {"segfault": "worker process died of SIGSEGV",
            "exit": "worker process left with exit code 3",
            "killed": "worker process died of SIGKILL",
            "nameless": "worker process died of signal 35"}
    calls = [("pwork", i) for i in range(200)]
    for n, how in enumerate([*said, "memory"]):         # memory: only a MemoryError
        calls.insert(35 * (n + 1), ("die", how, how))
    drill.send(calls + [("pwork", "outside", 1.5)])
    with running(drill.environ) as app:
        wait_until(lambda: "outside" in drill.marks("start"))
        # whoever works on it now left its number just before the start
        lines = drill.record.read_text().splitlines()
        at = lines.index("start outside")
        pids = [int(line.split()[1]) for line in lines[:at] if line.startswith("pid")]
        os.kill(pids[-1], signal.SIGKILL)
        tally = drill.finish(app, dead=5, replies=206)
    assert tally["done"] == 201 and tally["twice"] == 0, tally
    letters = {p.headers["id"]: p.headers for p, _ in drill.letters}
    replies = {p.correlation_id: json.loads(body)
               for p, body in drill.drain(drill.replies)}
    assert letters.pop("die-memory")["x-olive-reason"] == "failed"
    for how, text in said.items():
        headers = letters.pop(f"die-{how}")
        assert headers["x-olive-reason"] == "worker-lost" and headers["retries"] == 1
        assert drill.marks("start").count(how) == 2, "two tries"
        assert replies[f"die-{how}"] == {
            "task_id": f"die-{how}", "status": "FAILURE", "traceback": "",
            "children": [], "result": {"exc_type": "WorkerLostError", "exc_message": [
                text], "exc_module": "billiard.exceptions"}}
        assert headers["x-olive-error"] == f"WorkerLostError: {text}"


# -- the network ----------------------------------------------------------------------

class Relay:
    """A TCP relay before the broker that can do what networks do.

    delay: seconds that everything is late; chunk: so many bytes at a time; hole: it
    swallows everything; cut_after: cuts the connection after so many bytes from the
    broker, wherever that is.
    """

    def __init__(self, port):
        self.port, self.delay, self.chunk = port, 0, 65536
        self.hole, self.cut_after, self.connections = False, None, 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = f"amqp://guest:guest@127.0.0.1:{self.server.getsockname()[1]}/%2F"
        self.start(self._accept)

    def start(self, target, *args):
        threading.Thread(target=target, args=args, daemon=True).start()

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self.server.accept()
                self.connections += 1
                there = socket.create_connection(("127.0.0.1", self.port))
                for sock in client, there:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.start(self._pump, client, there, False)
                self.start(self._pump, there, client, True)

    def _deliver(self, target, late):
        with suppress(OSError):
            while (item := late.get()) is not None:
                due, data = item
                time.sleep(max(0, due - time.monotonic()))
                chunk = self.chunk      # (it may be changed meanwhile)
                for at in range(0, len(data), chunk):
                    target.sendall(data[at:at + chunk])

    def _pump(self, source, target, from_broker):
        late = sweepea.queue.SimpleQueue()
        self.start(self._deliver, target, late)
        with suppress(OSError):
            while data := source.recv(65536):
                if self.hole:
                    continue
                cut = self.cut_after if from_broker else None
                late.put((time.monotonic() + self.delay, data[:cut]))
                if cut is not None:
                    self.cut_after = cut - len(data)
                    if self.cut_after < 0:
                        self.cut_after = None
                        break
        late.put((0, b""))
        late.put(None)
        for sock in source, target:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def relay(broker):
    relay = Relay(broker.port)
    yield relay
    relay.server.close()


def test_cut_in_the_middle_of_a_frame(broker, relay, tmp_path):
    drill = Drill(broker.url, tmp_path, OLIVE_URL=relay.url)
    drill.send([("work", i, 0.01) for i in range(800)])
    with running(drill.environ) as app:
        for n, odd in enumerate((1, 4_003, 2_027), 1):
            drill.wait_done(100 * n)
            relay.cut_after = odd
            app.wait_for("reconnected", count=n)
        tally = drill.finish(app, replies=800)
    # What was acknowledged just then is done again, a window at most each time.
    assert tally["twice"] <= 3 * OliveAppConfig().prefetch, tally


@pytest.mark.parametrize("how", ["a black hole", "a frozen broker"])
def test_silence(victim, tmp_path, how):
    relay = Relay(victim.port)
    drill = Drill(victim.url, tmp_path, "v", OLIVE_URL=relay.url + "?heartbeat=1")
    drill.send([("work", i, 0.02) for i in range(600)])
    with running(drill.environ) as app:
        drill.wait_done(101)
        if how == "a black hole":
            relay.hole = True
        else:
            victim.process.send_signal(signal.SIGSTOP)
        try:
            app.wait_for("connection lost")
        finally:
            relay.hole = False
            victim.process.send_signal(signal.SIGCONT)
        app.wait_for("reconnected")
        tally = drill.finish(app, replies=500)
    relay.server.close()
    # What was acknowledged into the silence is done again, a window at most.
    assert tally["twice"] <= OliveAppConfig().prefetch, tally


def test_slow_and_in_single_bytes(broker, relay, tmp_path):
    drill = Drill(broker.url, tmp_path, OLIVE_URL=relay.url)
    drill.send([("work", i) for i in range(100)])
    relay.chunk = 1
    with running(drill.environ) as app:
        wait_until(lambda: len(set(drill.marks("done"))) == 100)
        relay.chunk, relay.delay = 65536, 0.5
        drill.send([("work", f"late{i}") for i in range(200)])
        tally = drill.finish(app, replies=300)
    assert tally["twice"] == 0 and relay.connections == 1


# -- topology -------------------------------------------------------------------------

def test_topology_deleted_under_a_running_app(broker, tmp_path):
    drill = Drill(broker.url, tmp_path)
    with running(drill.environ) as app, drill.channel() as channel:
        channel.queue_delete(drill.queue)
        app.wait_for("the broker cancelled the consumer")
        app.wait_for("reconnected")
        drill.send([("work", "queue")])
        wait_until(lambda: "queue" in drill.marks("done"))
        for rung in 0, 3, 16:           # what the retries and the dead need
            channel.exchange_delete(f"Olive.wait.{rung}")
        channel.queue_delete("Olive.wait.1")
        channel.exchange_delete(drill.environ["OLIVE_EXCHANGE"])
        channel.queue_delete(drill.dead)
        drill.send([("flaky", "wait"), ("no_such_task", "unknown")])
        drill.send([("work", "gone")], reply=False)
        drill.finish(app, dead=1)


# -- poison ---------------------------------------------------------------------------

def test_poison_of_every_kind(live):
    dice, good = random.Random(7), b'[["a"], {}, {"callbacks": null, "chain": null}]'
    odd = [None, True, -1, 10 ** 12, "", "x" * 5000, "9999-12-31T23:59:59-14:00",
           "0001-01-01T00:00:00+14:00", [], {}, ["a"], [None, None], [-1, 2], ["1", 2],
           [1, 2, 3], b"\xff\xfe", Decimal("1.5"), datetime(2020, 1, 1),
           {"a": {"b": [1]}}, "\ud7ff\n\x1b[31m", "1970-01-01"]
    cases = [(body, {}) for body in [
        b'[[], {}, {"chain": 5}]', b'[[], {}, {"chain": [5]}]',
        b'[[], {}, {"callbacks": {"task": 1}}]', b'[[], {}, {"chord": {"task": "x"}}]',
        b'[["a"], {}, {"callbacks": "work"}]', b'[["a"], {}, {"chain": true}]',
        b'[["a"], {"*": 1}, {}]', b'[["\\ud800"], {}, {}]']]
    for name in "task", "id", "eta", "expires", "timelimit", "retries", "compression", \
            "root_id", "parent_id", "x-olive-isolated", "x-death":
        cases += [(good, {name: value}) for value in odd
                  if not (name == "eta" and str(value).startswith("9999"))]
    cases += [(good, {"task": name}) for name in (
        "os.system", "__import__", "a" * 5000, "celery.chord", "a\nFORGED line")]
    cases += [(good, {"task": "nobody", "filler": "x" * size})
              for size in (100_000, 129_000, 130_600)]
    cases += [(good, {f"h{n}": "x" * 60 for n in range(1800)} | {"task": "nobody"})]
    for _ in range(400):
        body = bytearray(good)
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(len(body))
            body[at:at + dice.randint(0, 2)] = dice.randbytes(dice.randint(0, 2))
        headers = {dice.choice(["id", "expires", "timelimit", "retries", "lang"]):
                   dice.choice(odd)} if dice.random() < 0.3 else {}
        cases.append((bytes(body), headers))
    for body, headers in cases:
        live.send(**{"task": "echo", **headers}, body=body,
                  properties={"correlation_id": "poison"})
    statuses = [live.reply()["status"] for _ in cases]
    failed = statuses.count("FAILURE")
    assert failed > 300
    for _ in range(failed):
        live.get(live.dead_queue)
    assert "\nFORGED" not in live.app.log


# -- the heart beats ------------------------------------------------------------------

def test_a_long_task_starves_no_heartbeat(victim, tmp_path):
    drill = Drill(victim.url, tmp_path, "v", OLIVE_URL=victim.url + "?heartbeat=1")
    before = victim.log.stat().st_size
    drill.send([("spin", i, 4) for i in range(2)])
    with running(drill.environ) as app:
        drill.finish(app, replies=2)
        assert "connection lost" not in app.log
    said = victim.log.read_bytes()[before:]
    assert b"missed heartbeat" not in said and b"closing AMQP connection" in said


# -- back-pressure --------------------------------------------------------------------

@contextmanager
def memory_alarm(victim, app, count=1):
    """Make the broker block its publishers until the end of the block."""
    victim.ctl("set_vm_memory_high_watermark", "absolute", "1MB")
    try:
        app.wait_for("the broker has blocked the connection", count=count)
        yield
    finally:
        if victim.process:
            victim.ctl("set_vm_memory_high_watermark", "0.4")


def test_a_memory_alarm(victim, tmp_path):
    drill = Drill(victim.url, tmp_path, "v", OLIVE_GRACE="2", OLIVE_PREFETCH="20")
    drill.send([("work", i, 0.2) for i in range(500)])
    with running(drill.environ) as app:
        drill.wait_done(1)
        with memory_alarm(victim, app):
            sender = send(drill.environ, "work", "s", "--timeout", "1")
            assert sender.returncode == 3, sender.stderr
            done = len(drill.marks("done"))
        app.wait_for("lifted the block")
        drill.wait_done(done + 21)      # by itself
        with memory_alarm(victim, app, 2):
            began = time.monotonic()
            app.signal()
            assert app.wait() == 0 and time.monotonic() - began < 6
    with running(drill.environ) as app:
        drill.finish(app)


def test_the_broker_dies_while_it_blocks(victim, tmp_path):
    drill = Drill(victim.url, tmp_path, "v")
    drill.send([("fails", "f", drill.go)] + [("work", i, 0.2) for i in range(200)])
    with running(drill.environ) as app:
        drill.wait_done(1)
        with memory_alarm(victim, app):
            open(drill.go, "w").close()
            # its dead letter waits now for the block to be lifted, which never happens
            wait_until(lambda: drill.marks("failed"))
            victim.kill()
        victim.start()
        drill.finish(app, dead=1)


# -- stopping -------------------------------------------------------------------------

def test_stop_in_awkward_moments(broker, relay, tmp_path):
    drill = Drill(broker.url, tmp_path, OLIVE_GRACE="1")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"amqp://127.0.0.1:{mute.getsockname()[1]}"
        with running({**drill.environ, "OLIVE_URL": url}, ready=None) as app:
            mute.accept()                               # while connecting
            began = time.monotonic()
            app.signal()
            assert app.wait(10) == 0 and time.monotonic() - began < 5
    with running({**drill.environ, "OLIVE_URL": relay.url}) as app:
        relay.hole = True                               # while a publish waits
        drill.send([("no_such_task", "u")])
        app.signal()
        assert app.wait(10) == 0


# -- the dead queue -------------------------------------------------------------------

def test_dead_and_replay(broker, tmp_path):
    drill, n = Drill(broker.url, tmp_path), int(os.environ.get("DRILL_DEAD", 1000))
    with running(drill.environ):
        pass                                            # declares everything
    drill.send([("work", i) for i in range(n)], queue=drill.dead, retries=3, **{
        "x-olive-isolated": True, "x-olive-reason": "returned",
        "x-olive-error": "E: e", "x-olive-traceback": "t" * 5000})
    listed = send(drill.environ, "--dead")
    lines = [json.loads(line) for line in listed.stdout.splitlines()]
    assert len({line["id"] for line in lines}) == n and listed.returncode == 0
    wait_until(lambda: drill.counts()[drill.dead] == n, 5, "only shown")
    replay = App(drill.environ, "--replay", script="olive_utils.py")
    wait_until(lambda: drill.counts()[drill.queue] > n // 10)
    replay.process.kill()
    replay.wait()
    at_queue, at_dead = drill.counts()[drill.queue], wait_until(
        lambda: drill.counts()[drill.dead], 5)
    assert at_queue + at_dead >= n
    assert send(drill.environ, "--replay").returncode == 0
    assert drill.counts()[drill.dead] == 0
    with drill.channel() as channel:
        _, properties, _ = channel.basic_get(drill.queue)
        assert properties.headers["retries"] == 0
        assert not [name for name in properties.headers if name.startswith("x-olive")]
    with running(drill.environ) as app:
        tally = drill.finish(app)
    assert tally["done"] == n and tally["twice"] <= 100


# -- TLS ------------------------------------------------------------------------------

def test_tls(tmp_path):
    def openssl(*args):
        subprocess.run(["openssl", *args], cwd=tmp_path, check=True,
                       capture_output=True)

    # Two authorities, and a certificate of the first for localhost alone.
    for name in "ca", "other":
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}",
                # Python 3.13 takes no authority that does not say what it is for.
                "-addext", "keyUsage=critical,keyCertSign,cRLSign")
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", "server.key", "-out",
            "server.csr", "-subj", "/CN=localhost")
    (tmp_path / "san").write_text("subjectAltName=DNS:localhost\n"
                                  "authorityKeyIdentifier=keyid\n")
    openssl("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
            "-CAcreateserial", "-days", "2", "-extfile", "san", "-out", "server.pem")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = (f"listeners.ssl.1 = 127.0.0.1:{port}\n"
              f"ssl_options.cacertfile = {tmp_path}/ca.pem\n"
              f"ssl_options.certfile = {tmp_path}/server.pem\n"
              f"ssl_options.keyfile = {tmp_path}/server.key\n"
              "ssl_options.verify = verify_none\n")
    with olive_utils.private_broker(config=config) as broker:
        drill = Drill(broker.url, tmp_path)
        good = f"amqps://guest:guest@localhost:{port}/%2F"
        trusted = {"SSL_CERT_FILE": f"{tmp_path}/ca.pem"}
        for url, extra in [
                (good.replace("localhost", "127.0.0.1"), trusted),
                (good, {"SSL_CERT_FILE": f"{tmp_path}/other.pem"})]:
            environ = {**drill.environ, **extra, "OLIVE_URL": url}
            with running(environ, ready="certificate verify failed") as app:
                app.stop()
            assert app.log.count("verify failed") == 1, app.log
            assert "Traceback" not in app.log and "guest" not in app.log, app.log
            sender = send(environ, "add", "2", "3")
            assert sender.returncode == 4 and sender.stderr.count("\n") == 1, sender
        drill.send([("work", i) for i in range(100)])
        environ = {**drill.environ, **trusted, "OLIVE_URL": good}
        with running(environ) as app:
            assert send(environ, "add", "2", "3").stdout == "5\n"
            drill.finish(app, replies=100)


# -- a long run -----------------------------------------------------------------------

def test_a_long_run_stays_flat(broker, tmp_path):
    # (few threads: a pool grows as it is needed, and this one is full after one batch)
    drill = Drill(broker.url, tmp_path, OLIVE_THREADS="2")
    n = int(os.environ.get("DRILL_LONG", 3000))
    shapes = ["work", "cowork", "pwork", "cowork"]

    def batch(name):
        drill.send([("flaky" if i < n // 50 else "no_such_task" if i % 100 == 99 else
                     shapes[i % 4], f"{name}{i}") for i in range(n)])
        wait_until(lambda: drill.counts()[drill.replies] == n, 120)
        failed = len(drill.drain(drill.dead))
        replies = [json.loads(body) for _, body in drill.drain(drill.replies)]
        assert failed == n // 100
        assert sum(reply["status"] == "SUCCESS" for reply in replies) == n - failed
        process = Path(f"/proc/{app.process.pid}")
        memory = re.search(r"VmRSS:\s+(\d+)", (process / "status").read_text())[1]
        return int(memory) >> 10, len(list((process / "task").iterdir())), len(
            list((process / "fd").iterdir()))

    with running(drill.environ) as app:
        first, second = batch("a"), batch("b")
        assert second[0] - first[0] <= 5 and second[1:] == first[1:], (first, second)


def test_a_cluster_loses_a_node_and_then_the_leader(tmp_path):
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        nodes = [stack.enter_context(olive_utils.private_broker())]
        nodes += pool.map(lambda _: stack.enter_context(
            olive_utils.private_broker(peer=nodes[0])), range(2))
        for node in nodes[1:]:
            for command in ["stop_app"], ["join_cluster", nodes[0].node], ["start_app"]:
                node.ctl(*command)
        drill = Drill(nodes[0].url, tmp_path)
        drill.environ["OLIVE_URL"] = ",".join(node.url for node in nodes)
        with running(drill.environ) as app:
            drill.send([("work", "late1")], eta=later(6).isoformat())
            drill.send([("work", i, 0.05) for i in range(400)])
            drill.wait_done(100)
            nodes[0].kill()             # the one that the app is connected to
            drill.url = nodes[1].url
            drill.wait_done(300, 40)
            nodes[0].start()
            drill.send([("work", i, 0.05) for i in range(400, 600)])
            drill.send([("work", "late2")], eta=later(6).isoformat())
            queues = json.loads(nodes[1].ctl("list_queues", "name", "leader",
                                             "--formatter", "json"))
            leader = {queue["name"]: queue["leader"] for queue in queues}[drill.queue]
            next(node for node in nodes if node.node == leader).kill()
            alive = next(node for node in nodes if node.node != leader)
            drill.url = alive.url

            def missing():
                return set(drill.sent) - set(drill.marks("done"))

            # RabbitMQ 3.10 may forget, when the leader of a queue changes, to look at
            # the age of what lies in it (its issue 10718): then it is late, not lost.
            try:
                wait_until(lambda: not missing(), 45)
            except AssertionError:
                queues = json.loads(alive.ctl("list_queues", "name", "messages",
                                              "--formatter", "json"))
                assert len(missing()) <= 2 and len(missing()) == sum(
                    q["messages"] for q in queues if ".wait." in q["name"]), app.log
            else:
                drill.finish(app)


# A coroutine function that is a test runs on a kernel of its own.
def _on_kernel(func):
    @functools.wraps(func)
    def test(*args, **kwargs):
        run(func(*args, **kwargs))
    return test


globals().update({name: _on_kernel(func) for name, func in list(globals().items())
                  if name.startswith("test_") and inspect.iscoroutinefunction(func)})
