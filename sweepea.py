"""Sweepea: a concurrent scheduling kernel inside pika's event loop.

A program that talks to RabbitMQ waits most of its life: for a message, for a timer,
for a thread, for a process. This module turns each of these waits into an `await`. It
is one file, meant to be read from top to bottom; a reader who stops after any chapter
has understood something whole:

    1. Errors          what can go wrong, and what is merely a cancellation
    2. Traps           how a coroutine asks the kernel for something
    3. Tasks           what the kernel remembers about one coroutine
    4. Waiting rooms   where tasks wait for each other
    5. Timeouts        deadlines that nest
    6. The kernel      the ready queue, the timers, the trap table, the turn
    7. The bridge      pika's callbacks become awaits; connections that come back
    8. Workers         threads and processes that do the work

The kernel follows Curio (David Beazley, https://github.com/dabeaz/curio): the traps
have its names, arguments and meanings. What is ours is the pump: the kernel owns no
poll, but turns the crank of pika's `IOLoop`, which reads and writes the sockets of AMQP
on the way. Not in here: AMQP frames (pika's), tasks by name (olive_app.py).

Copy this file into your own project if you like; it needs nothing but pika.

Copyright (c) 2026 the Sweepea authors. SPDX-License-Identifier: MIT
"""

from __future__ import annotations

import atexit
import heapq
import logging
import os
import pickle
import queue
import random
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import types
import weakref
from collections import OrderedDict, deque
from concurrent.futures import Future
from contextlib import suppress
from itertools import islice
from selectors import EVENT_READ, EVENT_WRITE
from typing import Any, Awaitable, Callable, Coroutine, Iterable

import pika
from pika.adapters.select_connection import IOLoop, SelectConnection
from pika.exceptions import (
    AMQPConnectionError, AMQPError, AuthenticationError, ChannelClosedByBroker,
    ConsumerCancelled, NackError, ProbableAccessDeniedError,
    ProbableAuthenticationError, UnroutableError)

__version__ = "0.1.0"

log = logging.getLogger("sweepea")

Corofunc = Callable[..., Coroutine] | Coroutine     # async function or coroutine


# =====================================================================================
# 1. Errors
#
# There are two families. A cancellation is no error: somebody wants the task to end,
# so it derives from BaseException and passes through every `except Exception`. All
# else is an ordinary exception. Names and bases are Curio's, so that code written for
# Curio catches here what it catches there.
# =====================================================================================

class CurioError(Exception):
    """Base of the ordinary errors of the kernel."""


class CancelledError(BaseException):
    """Base of all cancellations."""


class TaskCancelled(CancelledError):
    """Somebody called `task.cancel()`."""


class TaskTimeout(CancelledError):
    """The deadline of the innermost `timeout_after` has passed."""


class TimeoutCancellationError(CancelledError):
    """The deadline of an outer `timeout_after` has passed, not this one."""


class UncaughtTimeoutError(CurioError):
    """A TaskTimeout came out of a block to which it did not belong."""


class TaskError(CurioError):
    """The task that was joined crashed; `__cause__` says of what."""


class SyncIOError(CurioError):
    """Synchronous I/O was tried on an object that only knows asynchronous I/O."""


class AsyncOnlyError(CurioError):
    """Something asynchronous was asked for outside of asynchronous code."""


class ResourceBusy(CurioError):
    """Another task waits for the same thing."""


class ReadResourceBusy(ResourceBusy):
    """Another task waits to read from the same file."""


class WriteResourceBusy(ResourceBusy):
    """Another task waits to write to the same file."""


class WorkerLost(CurioError):
    """The worker process died in the middle of the call (exit code or signal)."""


class WorkerError(CurioError):
    """An exception of a worker process that cannot be pickled: its name and text."""


# =====================================================================================
# 2. Traps
#
# How does a function stop in the middle, and go on later? `yield` does just that. A
# coroutine is a generator in other clothes, and a trap is the one place where it
# really yields: it hands a request to whoever drives it, and is resumed with the
# answer. As a system call goes from a program to its operating system, a trap goes
# from a task to the kernel (chapter 6):
#
#     async def main():                   kernel
#         await sleep(1)
#            |  yield ('trap_sleep', 1)
#            +--------------------------->  notes the time, runs other tasks ...
#            <---------------------------+  ... task.send(clock)
#         (goes on)
#
# All of `async` in this file comes down to the one `yield` below.
# =====================================================================================

@types.coroutine
def _trap(*request):
    answer = yield request
    if isinstance(answer, BaseException):
        raise answer
    return answer


async def sleep(seconds: float) -> float:
    """Sleep for so many seconds; 0 gives the turn to the other tasks that are ready.

    Returns the kernel's clock (`time.monotonic()`, seconds) on waking.
    """
    return await _trap("trap_sleep", seconds)


async def clock() -> float:
    """Return the kernel's clock in seconds. Nobody else runs in between."""
    return await _trap("trap_clock")


async def current_task() -> Task:
    """Return the Task that is running, the caller's own."""
    return await _trap("trap_get_current")


async def spawn(corofunc: Corofunc, *args: Any, daemon: bool = False) -> Task:
    """Start `corofunc(*args)` as a task of its own, concurrently; return that Task.

    A `daemon` task runs for ever in the background; nobody is expected to join it.
    """
    task = await _trap("trap_spawn", _coroutine(corofunc, args))
    task.daemon = daemon
    return task


async def _read_wait(fileobj) -> None:
    await _trap("trap_io", fileobj, EVENT_READ, "READ_WAIT")


async def _write_wait(fileobj) -> None:
    await _trap("trap_io", fileobj, EVENT_WRITE, "WRITE_WAIT")


async def _io_release(fileobj) -> None:
    await _trap("trap_io_release", fileobj)


async def _future_wait(future) -> Any:
    await _trap("trap_future_wait", future, None)
    return future.result()


async def _get_kernel() -> Kernel:
    return await _trap("trap_get_kernel")


def _coroutine(corofunc, args) -> Coroutine:
    """Take a coroutine as it is; make one of a coroutine function and its arguments."""
    coro = corofunc if hasattr(corofunc, "send") else corofunc(*args)
    if not hasattr(coro, "send"):
        raise TypeError(f"{corofunc!r} is not a coroutine function, nor a coroutine")
    return coro


# =====================================================================================
# 3. Tasks
#
# A coroutine knows where it stopped and nothing else. The kernel has to know more:
# what the task waits for, how to get it out of there, who waits for its end. This is
# that record. Most tasks never use most of it, so the defaults stand in the class and
# a new task writes down only what is its own; it makes spawning twice as fast.
# =====================================================================================

class Task:
    """One coroutine under the kernel's care. Made by `spawn`, not by hand."""

    # For people:    state, what it waits for; cycles, how often it had the processor;
    #                daemon, it is in the background; joined, its end was noticed
    # Where it is:   cancel_func takes it out of where it waits, or None: it does not;
    #                future, the one it waits for: answers of others are stale
    # Clocks:        sleep, when it wakes; timeout, when its `timeout_after` ends
    # Cancellation:  cancelled, once is enough; cancel_pending, not delivered yet;
    #                allow_cancel, which a task may set to False for a while
    # Its end:       terminated; joining, the waiting room of those who wait for it
    # In between:    _trap_result, the answer that it gets when it runs next

    state, cycles, allow_cancel = "INITIAL", 0, True
    daemon = joined = cancelled = terminated = False
    cancel_func = future = sleep = timeout = joining = cancel_pending = None
    _trap_result = _final_result = _final_exc = None
    _last_id = 0

    def __init__(self, coro: Coroutine, parent: Task | None = None) -> None:
        Task._last_id = self.id = Task._last_id + 1
        self.parentid = parent and parent.id
        self.coro, self.send = coro, coro.send
        self.name = getattr(coro, "__qualname__", None)
        self._deadlines: list[float] = []   # of the timeouts it is in

    def __repr__(self) -> str:
        return f"Task(id={self.id}, name={self.name!r}, state={self.state!r})"

    async def wait(self) -> None:
        """Wait until the task has ended, however it ends."""
        if not self.terminated:
            # (an empty room counts as none, and gives way to a new one)
            self.joining = self.joining or SchedBarrier()
            await _trap("trap_sched_wait", self.joining, "TASK_JOIN")

    async def join(self) -> Any:
        """Wait until the task has ended and return its result.

        Raises TaskError, with the task's own exception as `__cause__`, if it crashed.
        """
        await self.wait()
        self.joined = True
        if self._final_exc is not None:
            raise TaskError("Task crash") from self._final_exc
        return self._final_result

    async def cancel(self, *, exc=TaskCancelled, blocking: bool = True) -> None:
        """Raise `exc` in the task where it waits; wait for its end if `blocking`.

        A task that does not wait just now gets it as soon as it does. A task may clean
        up, even await things, on its way out; a second cancel does not disturb that.
        """
        self.joined = True
        await _trap("trap_cancel_task", self, exc)
        if blocking:
            await self.wait()

    @property
    def result(self) -> Any:
        """What the coroutine returned; raises what it raised. RuntimeError if alive."""
        if self.exception is not None:
            raise self.exception
        return self._final_result

    @property
    def exception(self) -> BaseException | None:
        """What the coroutine raised, or None. RuntimeError if it has not ended."""
        if not self.terminated:
            raise RuntimeError("Task not terminated")
        return self._final_exc


# =====================================================================================
# 4. Waiting rooms
#
# Tasks wait for each other: for a lock, an item, an event, an end. All of these need
# two things of the kernel, a room to sit down in and somebody who calls the next one.
# A room is an object with two methods that only the kernel calls: `_kernel_suspend`
# seats a task and returns the function that takes it out again (a cancellation in the
# middle of the row must not disturb the others); `_kernel_wake` calls up to n tasks.
#
# Once called, a task is on the ready queue and cannot be cancelled there: whoever
# cancels it then is noted, and has to wait until the task waits again. So a wake-up
# is never swallowed by a task that dies with it.
# =====================================================================================

class SchedFIFO:
    """A waiting room that calls its tasks in the order of their arrival."""

    def __init__(self) -> None:
        # the one standard container that is a queue from whose middle one can leave
        self._tasks: OrderedDict[Task, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tasks)

    def _kernel_suspend(self, task: Task) -> Callable[[], Any]:
        self._tasks[task] = None
        return lambda: self._tasks.pop(task)

    def _kernel_wake(self, ntasks: int = 1) -> list[Task]:
        tasks = list(islice(self._tasks, ntasks))
        for task in tasks:
            del self._tasks[task]
        return tasks

    async def suspend(self, reason: str = "SUSPEND") -> None:
        """Sit down in the room until called."""
        await _trap("trap_sched_wait", self, reason)

    async def wake(self, n: int = 1) -> None:
        """Call the next n tasks."""
        await _trap("trap_sched_wake", self, n)


class SchedBarrier(SchedFIFO):
    """A waiting room that calls everybody at once."""

    def __init__(self) -> None:
        self._tasks = {}    # lighter, but slow if called from its front one by one

    async def wake(self, n: int | None = None) -> None:
        """Call n tasks, or all."""
        await super().wake(len(self) if n is None else n)


class Event:
    """A flag that tasks wait for."""

    def __init__(self) -> None:
        self._set, self._waiting = False, SchedBarrier()

    def is_set(self) -> bool:
        """Whether the flag is up."""
        return self._set

    def clear(self) -> None:
        """Take the flag down; who comes to wait after this waits."""
        self._set = False

    async def set(self) -> None:
        """Put the flag up and wake all that wait for it."""
        self._set = True
        await self._waiting.wake()

    async def wait(self) -> None:
        """Wait until the flag is up."""
        if not self._set:
            await _trap("trap_sched_wait", self._waiting, "EVENT_WAIT")


class Semaphore:
    """So many permits; who finds none waits. `async with` takes and returns one.

    A permit that is returned while others wait is handed to the first of them and never
    lies about in between, so that nobody who comes later can snatch it.
    """

    def __init__(self, value: int = 1) -> None:
        self.value, self._waiting = value, SchedFIFO()

    async def acquire(self) -> None:
        """Take a permit, waiting for one if need be."""
        if self.value > 0:
            self.value -= 1
        else:
            await _trap("trap_sched_wait", self._waiting, "SEMA_ACQUIRE")

    async def release(self) -> None:
        """Return a permit."""
        if self._waiting:
            await _trap("trap_sched_wake", self._waiting, 1)
        else:
            self.value += 1

    __aenter__ = acquire

    async def __aexit__(self, *exc_info) -> None:
        await self.release()


class Queue:
    """Items in order, from tasks to tasks; `maxsize` 0 means no limit.

    Two semaphores make a queue (Dijkstra's bounded buffer, EWD 123): one counts the
    items, one the free places.
    """

    def __init__(self, maxsize: int = 0) -> None:
        self._items: deque = deque()
        self._filled, self._free = Semaphore(0), Semaphore(maxsize or sys.maxsize)

    async def put(self, item: Any) -> None:
        """Add an item, waiting for a free place if need be."""
        await self._free.acquire()
        self._items.append(item)
        await self._filled.release()

    async def get(self) -> Any:
        """Take the oldest item, waiting for one if need be."""
        await self._filled.acquire()
        item = self._items.popleft()
        await self._free.release()
        return item


# =====================================================================================
# 5. Timeouts
#
# The kernel knows one deadline per task, the earliest. Deadlines nest, so each block
# puts its own on the task's stack, and remembers which one was in force before:
#
#     async with timeout_after(5):            stack: [5]       in force: 5
#         async with timeout_after(9):        stack: [5, 9]    in force: 5
#             await something()      <-- at 5 the kernel raises TaskTimeout here
#
# As the exception travels outwards every block asks the same questions. Is the time of
# a block further out up? Then I am only in its way: the exception goes on, under the
# name of TimeoutCancellationError, so that nobody in between takes it for his own. Is
# mine? Then it is my TaskTimeout. If neither is, a timeout has come out of a block
# where it should have been caught.
# =====================================================================================

FOREVER = float("inf")


class _Timeout:
    """A deadline around a block, or around one call (`_over`)."""

    def __init__(self, seconds: float | None, ignore: bool, timeout_result: Any = None):
        self._seconds, self._ignore, self._instead = seconds, ignore, timeout_result
        self.expired, self.result = False, True

    async def __aenter__(self) -> _Timeout:
        self._deadlines = (await current_task())._deadlines
        deadline = FOREVER if self._seconds is None else self._seconds + await clock()
        self._deadlines.append(deadline)
        self._earlier = await _trap("trap_set_timeout", deadline)
        return self

    async def __aexit__(self, kind, exc, tb) -> bool:
        await _trap("trap_unset_timeout", self._earlier)
        mine, outer = self._deadlines.pop(), self._deadlines
        if kind not in (TaskTimeout, TimeoutCancellationError):
            return False
        now = exc.args[0]
        if any(deadline <= now for deadline in outer):
            raise TimeoutCancellationError(now).with_traceback(tb) from None
        if mine > now:
            raise UncaughtTimeoutError("Uncaught timeout received") from exc
        self.expired, self.result = True, self._instead
        if self._ignore:
            return True
        raise TaskTimeout(now).with_traceback(tb) from None

    def _over(self, corofunc, args) -> Any:
        # a coroutine, for `await`; or the block itself, for `async with`
        return self._run(corofunc, args) if corofunc else self

    async def _run(self, corofunc, args) -> Any:
        async with self:
            return await _coroutine(corofunc, args)
        return self.result


def timeout_after(seconds: float | None, corofunc=None, *args) -> Any:
    """Raise TaskTimeout in the calling task once `seconds` have passed.

    `await timeout_after(5, func, *args)` for one call, `async with timeout_after(5):`
    for a block. None means no limit. After Curio's function of the same name.
    """
    return _Timeout(seconds, ignore=False)._over(corofunc, args)


def ignore_after(seconds: float | None, corofunc=None, *args,
                 timeout_result: Any = None) -> Any:
    """Like `timeout_after`, but the end of the time is no exception.

    The call returns `timeout_result`; the block ends, with `expired` set on the object
    that `as` gives, and `timeout_result` as its `result` (True otherwise).
    """
    return _Timeout(seconds, True, timeout_result)._over(corofunc, args)


# =====================================================================================
# 6. The kernel
#
# Whoever drives coroutines needs a loop: run what is ready, find out what has become
# ready since, and again. pika has such a loop, its IOLoop, and it must go on turning,
# for it is there that AMQP is read, written and kept alive by heartbeats. So the
# kernel brings no second one. It turns the crank of pika's, as pika's own
# BlockingConnection does, and takes a turn of its own each time round:
#
#          +---------------- pika's IOLoop -----------------+
#          |  poll()                 process_timeouts()     |
#     +--->|  waits for the sockets  callbacks, then timers |---> the turn: runs all --+
#     |    +------+---------------------+--------------+----+     that is ready        |
#     |      add_handler     add_callback_threadsafe  call_later                       |
#     |      (a task waits   (another thread          (so that the poll                |
#     |      for a file)     woke a task)             ends in time)                    |
#     +--------------------------------------------------------------------------------+
#
# A turn (`_turn`) runs what is ready, and what becomes ready of that, until a
# millisecond is over; then it is pika's turn again, however many tasks are still
# ready. The clock is looked at after each task, so a turn is longer by what its last
# task takes until it waits or gives way. One that computes, or goes from trap to trap
# without ever waiting, blocks everything, as it does in every event loop; the kernel
# can only say afterwards which one it was (`BLOCKED`).
# =====================================================================================

SLICE = 0.001           # seconds after which no further task is begun in a turn
BLOCKED = 0.5           # seconds without waiting; then a task is named in the log
SHUTDOWN_GRACE = 2.0    # seconds that a cancelled task has, at shutdown, to go

_MASKS = {EVENT_READ: IOLoop.READ, EVENT_WRITE: IOLoop.WRITE}   # of selectors, of pika
_SUSPENDED = object()   # what a trap answers if the task has to wait
# the traps that are answered with a cancellation, if one is due
_WAITING = {"trap_io", "trap_future_wait", "trap_sleep", "trap_sched_wait"}


def _number(fileobj) -> int:
    return getattr(fileobj, "fileno", lambda: fileobj)()    # (or it is the number)


class Kernel:
    """Runs coroutines on pika's IOLoop. After Curio's class of the same name.

    `loop` is the IOLoop to live in (made if not given; it belongs to the kernel from
    then on, which closes it at shutdown), `taskcls` the class of its tasks.
    """

    def __init__(self, *, loop: IOLoop | None = None, taskcls: type = Task) -> None:
        self.loop = loop or _Loop()     # (pika's, with a bell of ours: see chapter 7)
        self.loop.activate_poller()
        self._taskcls, self._tasks = taskcls, {}    # (number -> Task)
        self._ready: deque[Task] = deque()
        self._current, self._running = None, False
        self._timers: list[tuple[float, int, str]] = []     # (clock, task id, kind)
        # number -> (ref() is its owner, what it is watched for, READ or WRITE -> task)
        self._files: dict[int, tuple[Callable, int, dict[int, Task]]] = {}
        self._woken, self._waking = deque(), False  # (task, future); see _wake
        self._shutdown_funcs: list[Callable[[], Any]] | None = []   # None: it is closed
        self._call_at_shutdown = self._shutdown_funcs.append
        self._traps: dict[str, Callable] = {
            "trap_io": self._trap_io, "trap_io_release": self._trap_io_release,
            "trap_io_waiting": self._trap_io_waiting,
            "trap_future_wait": self._trap_future_wait,
            "trap_spawn": self._spawn, "trap_cancel_task": self._trap_cancel_task,
            "trap_sched_wait": self._trap_sched_wait,
            "trap_sched_wake": self._trap_sched_wake,
            "trap_sleep": self._trap_sleep, "trap_clock": time.monotonic,
            "trap_set_timeout": self._trap_set_timeout,
            "trap_unset_timeout": self._trap_unset_timeout,
            "trap_get_kernel": lambda: self, "trap_get_current": lambda: self._current,
        }

    # -- driving it --------------------------------------------------------------------

    def run(self, corofunc: Corofunc | None = None, *args, shutdown=False) -> Any:
        """Run `corofunc(*args)` until it ends; return its result or raise what it did.

        Other tasks stay where they are and go on with the next `run`. Without a
        coroutine: one pass over whatever is ready and due. With `shutdown=True`: cancel
        every task, newest first, and close the kernel for good.

        Raises RuntimeError if the kernel is running already, or was shut down.
        """
        if self._running or self._shutdown_funcs is None:
            raise RuntimeError("kernel is running already, was shut down or crashed")
        main = self._spawn(_coroutine(corofunc, args)) if corofunc else None
        try:
            if main or not shutdown:
                self._drive(main)
        finally:
            if shutdown and self._shutdown_funcs is not None:
                self._drive(self._spawn(self._cancel_all()))
                self._close()
        if main:
            main.joined = True
            return main.result

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *exc_info) -> None:
        if self._shutdown_funcs is not None:
            self.run(shutdown=True)

    def _drive(self, main: Task | None) -> None:
        self._main, self._running = main, True
        try:
            while True:
                # The poll must not wait when something is ready, nor beyond a timer of
                # ours, nor at all in a single pass. An alarm in pika's heap ends it. It
                # costs as much as the poll, so there is none if no end is needed.
                due = self._timers[0][0] if self._timers else FOREVER
                wait = max(0, due - time.monotonic()) if main and not self._ready else 0
                alarm = wait < FOREVER and self.loop.call_later(wait, lambda: None)
                self.loop.poll()
                if alarm:
                    self.loop.remove_timeout(alarm)
                self.loop.process_timeouts()
                self._turn()
                if main is None or main.terminated:
                    break
        finally:
            self._current, self._running = None, False

    async def _cancel_all(self) -> None:
        self._current.joined = True
        # (once more, as long as those who go spawn others on their way)
        while others := [t for t in self._tasks.values() if t is not self._current]:
            for task in reversed(others):
                await ignore_after(SHUTDOWN_GRACE, task.cancel)
                if not task.terminated:
                    log.error("%r would not go, and is dropped", task)
                self._tasks.pop(task.id, None)

    def _close(self) -> None:
        funcs, self._shutdown_funcs = self._shutdown_funcs, None
        for func in funcs:
            func()
        self.loop.close()

    # -- the turn ----------------------------------------------------------------------

    def _turn(self) -> None:
        ready, traps, main = self._ready, self._traps, self._main
        began = now = time.monotonic()
        self._expire(now)
        # (a single pass has no main task, and is whole, however long it takes)
        for _ in range(sys.maxsize if main else len(ready)):
            if not ready or main and (main.terminated or now - began > SLICE):
                break
            task = self._current = ready.popleft()
            task.state = "RUNNING"
            task.cycles += 1
            answer, task._trap_result = task._trap_result, None

            # The task runs from trap to trap until one of them makes it wait. What a
            # trap raises is its answer, too.
            while answer is not _SUSPENDED:
                try:
                    request = task.send(answer)
                except BaseException as exc:
                    self._end(task, exc)
                    break
                try:
                    trap = traps[request[0]]
                except (KeyError, TypeError, IndexError):
                    # No trap: a fault of the program. Nobody can know any more what
                    # the other tasks wait for.
                    self._close()
                    raise
                if task.cancel_pending and task.allow_cancel and request[0] in _WAITING:
                    answer, task.cancel_pending = task.cancel_pending, None
                    continue
                try:
                    answer = trap(*request[1:])
                except Exception as exc:
                    answer = exc.with_traceback(None)   # (ours would tell nothing)

            before, now = now, time.monotonic()
            if now - before > BLOCKED:
                log.warning("%r ran for %.1f s without waiting", task, now - before)
        self._current = None

    def _spawn(self, coro: Coroutine) -> Task:
        """Make a task of a coroutine. For callbacks of pika, too, which cannot trap."""
        task = self._taskcls(coro, self._current)
        self._tasks[task.id] = task
        self._schedule(task)
        return task

    def _schedule(self, task: Task, answer: Any = None) -> None:
        """Put a task on the ready queue, with the answer to the trap it waits in.

        It does not wait any more: a future or a timer that comes later is stale.
        """
        task.state, task._trap_result = "READY", answer
        task.cancel_func = task.future = task.sleep = None
        self._ready.append(task)

    def _suspend(self, state: str, cancel_func: Callable[[], Any]) -> object:
        self._current.state, self._current.cancel_func = state, cancel_func
        return _SUSPENDED

    def _end(self, task: Task, exc: BaseException) -> None:
        task.state, task.terminated = "TERMINATED", True
        self._tasks.pop(task.id, None)      # (it is not there if it was dropped)
        if task.joining is not None:
            self._trap_sched_wake(task.joining, len(task.joining))
        if isinstance(exc, StopIteration):
            task._final_result = exc.value
            return
        # The first frame of the traceback is the kernel's own: it would keep the turn's
        # variables alive, and tell the reader nothing.
        task._final_exc = exc.with_traceback(exc.__traceback__.tb_next)
        if task is not self._main and not isinstance(exc, (CancelledError, SystemExit)):
            log.error("Task Crash: %r", task, exc_info=exc)
        if not isinstance(exc, (Exception, CancelledError)):
            raise exc       # SystemExit, KeyboardInterrupt: meant for the program

    # -- cancellation ------------------------------------------------------------------
    #
    # An exception can be raised in a task only where it waits, that is: inside a trap.
    # Elsewhere, and while the task has taken `allow_cancel` down, it becomes
    # `cancel_pending`. The first trap that waits (`_WAITING`) after that, with
    # `allow_cancel` up again, is answered with it (in `_turn`).

    def _interrupt(self, task: Task, exc: BaseException) -> None:
        if task.allow_cancel and task.cancel_func is not None:
            task.cancel_func()
            self._schedule(task, exc)
        elif task.cancel_pending is None or not isinstance(exc, TaskTimeout):
            # (a timeout must not take the place of a cancellation that is due)
            task.cancel_pending = exc

    def _trap_cancel_task(self, task, exc=TaskCancelled, val=None):
        if not task.cancelled and not task.terminated:
            if not isinstance(exc, BaseException):
                exc = exc(exc.__name__ if val is None else val)
            task.cancelled, task.timeout = True, None       # it is going anyway
            self._interrupt(task, exc)

    # -- waiting rooms -----------------------------------------------------------------

    def _trap_sched_wait(self, room, state):
        return self._suspend(state, room._kernel_suspend(self._current))

    def _trap_sched_wake(self, room, n):
        for task in room._kernel_wake(n):
            self._schedule(task)

    # -- time --------------------------------------------------------------------------
    #
    # One heap holds all the clocks to watch, sleeps and timeouts. Nothing is ever taken
    # out of its middle: an entry counts only if the task still says the same time when
    # the entry comes up. Most timeouts are unset long before, so dead entries pile up.
    # A task has two clocks at most. So when there are four entries a task, half of them
    # or more are dead, and are swept out (and with them the duplicates that nested
    # timeouts make by setting the outer one again): a look or two for each, on average.

    def _set_timer(self, task: Task, kind: str, clock: float) -> None:
        setattr(task, kind, clock)
        if len(self._timers) > 4 * len(self._tasks) + 1000:
            # (what is sorted is a heap)
            self._timers = sorted({t for t in self._timers if self._counts(t)})
        heapq.heappush(self._timers, (clock, task.id, kind))

    def _counts(self, timer: tuple[float, int, str]) -> bool:
        return getattr(self._tasks.get(timer[1]), timer[2], None) == timer[0]

    def _expire(self, now: float) -> None:
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)
            if self._counts(timer):
                task = self._tasks[timer[1]]
                if timer[2] == "sleep":
                    self._schedule(task, now)
                else:
                    task.timeout = None
                    self._interrupt(task, TaskTimeout(now))

    def _trap_sleep(self, seconds):
        now = time.monotonic()
        if seconds <= 0:
            return self._schedule(self._current, now) or _SUSPENDED
        self._set_timer(self._current, "sleep", now + seconds)
        return self._suspend("TIME_SLEEP", lambda: None)

    def _trap_set_timeout(self, clock):
        earlier = self._current.timeout
        if clock is not None and (earlier is None or clock < earlier):
            self._set_timer(self._current, "timeout", clock)
        return earlier

    def _trap_unset_timeout(self, earlier):
        # A TaskTimeout that could not be delivered was meant for the block that is
        # being left: it is dropped. The evil corner: the earlier deadline may have
        # passed as well. It must not be raised here, where the inner block is still
        # being left, but at the next trap that waits; set anew it does just that.
        task = self._current
        if isinstance(task.cancel_pending, TaskTimeout):
            task.cancel_pending = None
        task.timeout = None
        if earlier is not None:
            self._set_timer(task, "timeout", earlier)
        return time.monotonic()

    # -- files -------------------------------------------------------------------------
    #
    # pika's loop knows a file by its number and calls one handler for it; here one task
    # may wait to read from it and another one to write to it, so there is a little
    # table per number. A wait lasts for one event. But whoever was woken by a file
    # mostly waits for it again soon, and it takes two system calls to have a file
    # forgotten and watched again. So the loop goes on watching it, until an event comes
    # that nobody waits for.
    #
    # Numbers are used again as soon as a file is closed. So the loop is told anew when
    # a number changes its owner; and a file has to be released before it is closed,
    # even if nobody waits for it any more: the poll watches the open file, not its
    # number, and while a forked child holds a copy, it can no longer be told to stop.

    def _watch(self, fd: int, fileobj, mask: int, waits: dict[int, Task]) -> None:
        """Have pika's loop watch a file for the events of the mask, and no others."""
        self._forget(fd)
        if mask:
            self.loop.add_handler(fd, self._on_io, mask | IOLoop.ERROR)
            # Only a socket is known to keep its file for life; a number, or an object
            # that may open another file, counts as a new owner each time. (A weak
            # reference, so that a socket which nobody has any more still closes.)
            ref = weakref.ref(fileobj) if isinstance(fileobj, socket.socket) else object
            self._files[fd] = ref, mask, waits

    def _forget(self, fd: int) -> None:
        if self._files.pop(fd, None):
            # (closed before it was released, mostly forgotten by the poll, and by pika
            # if it had the number itself in between)
            with suppress(KeyError, OSError, ValueError):
                self.loop.remove_handler(fd)

    def _on_io(self, fd: int, events: int) -> None:
        # An error or a hang-up (their bits lie above READ and WRITE) wakes both sides:
        # their next read or write will show it.
        ref, _, waits = self._files[fd]
        woken = [bit for bit in waits if events & bit or events >= IOLoop.ERROR]
        for bit in woken:
            self._schedule(waits.pop(bit))
        if not woken:
            self._watch(fd, ref(), sum(waits), waits)

    def _trap_io(self, fileobj, event, state):
        fd, bit = _number(fileobj), _MASKS[event]
        ref, watched, waits = self._files.get(fd, (object, 0, {}))
        if bit in waits:
            busy = ReadResourceBusy if event == EVENT_READ else WriteResourceBusy
            raise busy(f"another task waits for the same of file {fd}")
        mask = sum(waits) | bit
        if mask != watched or ref() is not fileobj:
            self._watch(fd, fileobj, mask, waits)
        waits[bit] = self._current
        return self._suspend(state, lambda: waits.pop(bit))

    def _trap_io_release(self, fileobj):
        self._forget(_number(fileobj))

    def _trap_io_waiting(self, fileobj):
        waits = self._files.get(_number(fileobj), (None, 0, {}))[2]
        return waits.get(IOLoop.READ), waits.get(IOLoop.WRITE)

    # -- other threads -----------------------------------------------------------------
    #
    # The only thing that another thread may do to the kernel is to append to a deque
    # (which is atomic) and to ring. The bell is rung only by the first who finds it
    # silent; all who come before the kernel answers ride along. The order matters: the
    # thread appends and then looks at the flag, the kernel takes the flag down and then
    # empties the deque. So an entry is either seen by this round, or its thread finds
    # the flag down and rings again.

    def _wake(self, task: Task, future) -> None:
        self._woken.append((task, future))
        if not self._waking:
            self._waking = True
            self.loop.add_callback_threadsafe(self._on_wake)

    def _on_wake(self) -> None:
        self._waking = False
        while self._woken:
            task, future = self._woken.popleft()
            # A task that was cancelled may wait for another future by now.
            if task.future is future:
                self._schedule(task)

    def _trap_future_wait(self, future, event):
        task = self._current
        future.add_done_callback(lambda future: self._wake(task, future))
        if event is not None:
            event.set()
        task.future = future
        return self._suspend("FUTURE_WAIT", future.cancel)


def run(corofunc: Corofunc, *args: Any) -> Any:
    """Run `corofunc(*args)` on a kernel of its own: made, used and shut down."""
    with Kernel() as kernel:
        return kernel.run(corofunc, *args)


# =====================================================================================
# 7. The bridge
#
# pika's asynchronous API is made of callbacks: you call `queue_declare(...,
# callback=f)`, and some turns of the loop later pika calls f, or never, if the channel
# is closed before. Here that becomes `await channel.call("queue_declare", ...)`, which
# always comes back: with the answer, or with the exception that closed the channel.
#
#     _Loop        pika's loop, with a bell of ours
#     Connection   one connection of pika's, used up when it closes
#     Channel      one channel on it; consumes, acknowledges, publishes with confirms
#     Link         the connection that always comes back
#
# AMQP itself (frames, heartbeats, negotiation) stays pika's affair.
#
# Who holds a message, and what becomes of it if the next line never runs?
#
#     on its way to us            the broker            nothing happened yet
#     delivered, not settled      the broker, for us    it gives it to somebody else
#     acknowledged                nobody                its work was done before that
#     being published             whoever awaits        not confirmed: publishes again
#     published and confirmed     the broker            on disk; now we may acknowledge
# =====================================================================================

MAX_BACKOFF = 30.0      # seconds between two attempts to connect, at most

REFUSED = (AuthenticationError, ProbableAuthenticationError, ProbableAccessDeniedError)


class _Loop(IOLoop):
    """pika's loop with a cheaper bell.

    To be woken by other threads, pika's loop holds a TCP connection with itself, for
    that is what every system has. A pipe beside it does the same with less work. And
    the bell is not read, thus silenced, in each round: a read lets other threads run,
    and the loop would have to wait for its turn in Python again. While something new
    comes it is left ringing; the first round that finds nothing silences it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._due, self._ringing, self._lock = deque(), False, threading.Lock()
        bell, rope = os.pipe()
        self._bell, self._rope = open(bell, "rb", 0), open(rope, "wb", 0)
        self.add_handler(bell, self._on_bell, self.READ)

    def add_callback_threadsafe(self, callback: Callable[[], Any]) -> None:
        self._due.append(callback)      # first, for the same reason as in Kernel._wake
        if not self._ringing:
            self._ringing = True
            with self._lock, suppress(ValueError):      # closed: nobody hears it
                self._rope.write(b"!")

    add_callback = add_callback_threadsafe

    def _on_bell(self, _fd: int, _events: int) -> None:
        if not self._due:
            self._bell.read(1)
            self._ringing = False

    def process_timeouts(self) -> None:
        # (in every round: if one raises, nobody rings for those behind it)
        for _ in range(len(self._due)):
            self._due.popleft()()
        super().process_timeouts()

    def close(self) -> None:
        super().close()
        with self._lock:        # (or a ringer might write into who has the number next)
            self._rope.close()
        self._bell.close()


class _Closable:
    """What connections and channels have in common: waiters, who learn of its end."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._waiters: set[Future] = set()
        self.closed: BaseException | None = None    # the reason, once it is closed

    def _reply(self) -> Future:
        """Make a future that gets the exception if this is closed before the answer."""
        reply: Future = Future()
        if self.closed is not None:
            reply.set_exception(self.closed)
        else:
            self._waiters.add(reply)
            reply.add_done_callback(self._waiters.discard)
        return reply

    def _on_close(self, _pika_object, reason: BaseException) -> None:
        if self.closed is None:
            self.closed = reason
            for reply in list(self._waiters):
                reply.set_exception(reason)

    async def _call(self, method: Callable, *args: Any, callback: str, **kwargs) -> Any:
        reply = self._reply()
        if self.closed is None:
            # (the answer may come when the waiter was cancelled and is gone)
            method(*args, **{callback: lambda answer: reply.done()
                             or reply.set_result(answer)}, **kwargs)
        return await _future_wait(reply)

    async def wait_closed(self) -> BaseException:
        """Wait until this is closed; return the reason."""
        try:
            await _future_wait(self._reply())
        except Exception as reason:
            return reason


class Connection(_Closable):
    """A connection to RabbitMQ; made by `await Connection.open(urls)`."""

    pika: SelectConnection

    @classmethod
    async def open(cls, urls: Iterable[str]) -> Connection:
        """Try each URL once, in turn; return the first connection that opens.

        Raises AMQPConnectionError: that of a broker that refused us (REFUSED), if there
        was one, else that of the last that could not be reached.
        """
        errors = []
        for url in urls:
            connection = cls(await _get_kernel())
            try:
                await connection._open(url)
                return connection
            except AMQPError as exc:
                errors.append(exc)
        raise next((exc for exc in errors if isinstance(exc, REFUSED)), errors[-1])

    async def _open(self, url: str) -> None:
        opened = self._reply()
        self._unblocked = Event()
        self._unblocked._set = True

        def on_error(connection, error) -> None:
            if not isinstance(error, AMQPError):    # some of pika's own are not
                error = AMQPConnectionError(repr(error))
            self._on_close(connection, error)
            self._on_unblocked()    # who waits for that shall see that it is closed

        self.pika = SelectConnection(
            pika.URLParameters(url), custom_ioloop=self._kernel.loop,
            on_open_callback=lambda _: opened.done() or opened.set_result(None),
            on_open_error_callback=on_error, on_close_callback=on_error)
        self.pika.add_on_connection_blocked_callback(self._on_blocked)
        self.pika.add_on_connection_unblocked_callback(self._on_unblocked)
        try:
            await _future_wait(opened)
        except BaseException:
            # Cancelled (after a failure this is not called). pika trips over a close()
            # in the midst of its handshake, so that has to end first, within 15 s.
            self.pika.add_on_open_callback(lambda connection: connection.close())
            raise

    def _on_blocked(self, _connection, frame) -> None:
        log.warning("the broker has blocked the connection (%s): nothing is published "
                    "nor acknowledged until it lifts that", frame.method.reason)
        self._unblocked.clear()

    def _on_unblocked(self, _connection=None, _frame=None) -> None:
        if not self._unblocked.is_set() and self.closed is None:
            log.info("the broker has lifted the block")
        self._unblocked._set = True
        room = self._unblocked._waiting
        self._kernel._trap_sched_wake(room, len(room))

    async def channel(self, confirm: bool = False) -> Channel:
        """Open a channel; with `confirm`, one whose publishes are confirmed."""
        channel = Channel(self._kernel)
        channel.connection = self
        channel.pika = await self._call(self.pika.channel, callback="on_open_callback")
        channel.pika.add_on_close_callback(channel._on_close)
        channel.pika.add_on_cancel_callback(
            lambda frame: channel._on_close(None, ConsumerCancelled(frame.method)))
        if confirm:
            channel.pika.add_on_return_callback(channel._on_return)
            await channel.call("confirm_delivery", channel._on_confirm)
        return channel

    async def close(self, timeout: float = 2.0) -> None:
        """Close the connection; wait `timeout` s at most for the broker's word."""
        if not (self.pika.is_closed or self.pika.is_closing):
            self.pika.close()
        if self.closed is None:
            await ignore_after(timeout, self.wait_closed())


class Channel(_Closable):
    """A channel; made by `await connection.channel()`."""

    pika: pika.channel.Channel
    connection: Connection

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self._published = 0
        # delivery tag -> (future, what it was, the exception if it came back)
        self._unconfirmed: dict[int, list] = {}

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of pika's channel that takes `callback=`; return its answer.

        `await channel.call("queue_declare", queue="q", durable=True)`. Raises what
        closed the channel, or pika's ChannelWrongStateError, if it is closed.
        """
        return await self._call(getattr(self.pika, method), *args, callback="callback",
                                **kwargs)

    async def basic_publish(self, exchange: str, routing_key: str, body: bytes,
                            properties: pika.BasicProperties) -> None:
        """Publish, mandatory, on a channel with `confirm`; wait for the confirm.

        Raises UnroutableError if no queue takes the message, NackError if the broker
        could not, and what closed the channel if that came first.
        """
        await self.connection._unblocked.wait()
        reply = self._reply()
        if self.closed is None:
            self.pika.basic_publish(exchange, routing_key, body, properties, True)
            self._published += 1
            what = (exchange, routing_key, properties.correlation_id, body)
            self._unconfirmed[self._published] = [reply, what, None]
        await _future_wait(reply)

    # A returned message carries no number, but the broker returns it before it confirms
    # it, and in order. So the first one in flight that is the same message is it (if
    # there are two the same, to the byte, it does not matter which).
    def _on_return(self, _channel, method, properties, body) -> None:
        returned = (method.exchange, method.routing_key, properties.correlation_id,
                    body)
        for entry in self._unconfirmed.values():
            if entry[1] == returned and entry[2] is None:
                entry[2] = UnroutableError([method])
                break

    def _on_confirm(self, frame) -> None:
        tag, failed = frame.method.delivery_tag, isinstance(
            frame.method, pika.spec.Basic.Nack)
        first = next(iter(self._unconfirmed), tag)
        for tag in range(first, tag + 1) if frame.method.multiple else (tag,):
            reply, _, error = self._unconfirmed.pop(tag, (None, None, None))
            if reply is not None and not reply.done():
                error = error or (NackError([]) if failed else None)
                reply.set_exception(error) if error else reply.set_result(None)

    # A message can be settled only on the channel that delivered it. If that is gone,
    # the broker has taken the message back already, so there is nothing left to say.
    def basic_ack(self, delivery_tag: int) -> bool:
        """Acknowledge; True if it was said on a channel that was open."""
        if self.closed is None and self.pika.is_open:
            self.pika.basic_ack(delivery_tag)
            return True
        return False

    def basic_nack(self, delivery_tag: int) -> None:
        """Give a message back to its queue."""
        if self.closed is None and self.pika.is_open:
            self.pika.basic_nack(delivery_tag)


class Link:
    """A connection that comes back for ever, with the topology declared anew each time.

    `on_connect(connection, channel)` is a coroutine function that declares what the
    user needs and starts its consumers, on the channel for deliveries, replies and
    acknowledgements; that channel is not in confirm mode, so that what is said on it is
    done in that order. Confirmed publishes have a channel of their own, so that what
    goes wrong there costs no delivery.
    """

    def __init__(self, urls: Iterable[str],
                 on_connect: Callable[..., Awaitable]) -> None:
        self._urls = list(urls)
        self._on_connect = on_connect
        self._connection: Connection | None = None
        self._publisher: Channel | None = None
        self._opening = Semaphore(1)
        self.up = Event()
        self.ever_up = False

    async def run(self) -> None:
        """Connect, and connect again whenever that ends, until cancelled.

        The first connection must not fail for reasons that waiting does not mend: a
        refusal (REFUSED), or a queue that exists with other arguments (pika's
        ChannelClosedByBroker); these are raised. Everything later is tried again.
        """
        attempt, said = 0, None
        while True:
            began = await clock()
            try:
                self._connection = await Connection.open(self._urls)
                channel = await self._connection.channel()
                await self._on_connect(self._connection, channel)
                log.log(logging.WARNING if self.ever_up else logging.INFO, "%s to %s",
                        "reconnected" if self.ever_up else "connected",
                        self._connection.pika.params.host)
                said, self.ever_up = None, True
                await self.up.set()
                # A channel that dies alone (a timeout of the broker's, a consumer that
                # was cancelled) takes the connection with it: there is one way back.
                reason = await channel.wait_closed()
            except AMQPError as exc:
                refusals = (*REFUSED, ChannelClosedByBroker)
                if not self.ever_up and isinstance(exc, refusals):
                    raise
                reason = exc
            finally:
                self.up.clear()
                if self._connection is not None:
                    await self._connection.close()
                    self._connection = None
            # A connection that held for a while starts again from the shortest wait.
            attempt = 0 if await clock() - began > MAX_BACKOFF else attempt + 1
            wait = min(MAX_BACKOFF, 0.5 * 2 ** min(attempt, 10))
            if (text := describe(reason)) != said:
                log.warning("%s: %s; trying again, at most every %.0f s",
                            "connection lost" if self.ever_up and not said
                            else "no connection to the broker", text, MAX_BACKOFF)
                said = text
            await sleep(wait * random.uniform(0.5, 1))

    async def publish(self, exchange: str, routing_key: str, body: bytes,
                      properties: pika.BasicProperties) -> None:
        """Publish with confirm, as soon as there is a connection. Raises as
        `Channel.basic_publish` does; it is the caller who tries again."""
        await self.up.wait()
        async with self._opening:
            if self._connection is None:
                raise AMQPConnectionError("connection lost")
            publisher = self._publisher
            if publisher is None or publisher.closed or (
                    publisher.connection is not self._connection):
                publisher = await self._connection.channel(confirm=True)
                self._publisher = publisher
        await publisher.basic_publish(exchange, routing_key, body, properties)


def describe(error: BaseException) -> str:
    """Say in one line what happened to a connection, without its URL or password."""
    text = str(error) or repr(error)
    if "last exception - " in text:     # pika's summary of a failed attempt
        text = text.split("last exception - ")[1].split("; first exception")[0]
    elif isinstance(error, ConsumerCancelled):
        text = "the broker cancelled the consumer (was the queue deleted?)"
    return " ".join(text.split())[:300]


# =====================================================================================
# 8. Workers
#
# A function that blocks or computes cannot run on the kernel: everything would stand
# still. It runs in a thread, or in a process, and its caller awaits it like anything
# else. Both pools hold at most so many workers, start them as they are needed, and let
# callers wait for a free one in a Semaphore; so whoever has got through runs at once.
# =====================================================================================

THREADS = 20                        # the size of the pools, unless somebody
PROCESSES = os.cpu_count() or 1     # puts others in their place


async def run_in_thread(func: Callable, *args: Any) -> Any:
    """Run `func(*args)` in a pool thread; return its result or raise its exception.

    A thread cannot be killed. If the caller is cancelled, the thread is abandoned: it
    is replaced, and what it brings in the end is thrown away.
    """
    kernel = await _get_kernel()
    pool = kernel.__dict__.get("thread_pool") or ThreadPool(kernel, THREADS)
    async with pool.slots:
        return await pool.call(func, args)


async def run_in_process(func: Callable, *args: Any) -> Any:
    """Run `func(*args)` in a worker process; return its result or raise its exception.

    Function, arguments and result travel by pickle. If the caller is cancelled, the
    process is killed. Raises WorkerLost if the process dies, WorkerError in place of an
    exception that cannot be pickled; `__cause__` holds the remote traceback.
    """
    kernel = await _get_kernel()
    pool = kernel.__dict__.get("process_pool") or ProcessPool(kernel, PROCESSES)
    async with pool.slots:
        return await pool.call(func, args)


class RemoteTraceback(Exception):
    """The traceback of a worker process, as text: the cause of what is raised here."""

    def __str__(self) -> str:
        return "\n" + self.args[0]


class _Job:
    """A call on its way through a thread. To the kernel it is a future.

    Two threads may want to decide its fate at the same moment, the one that runs it and
    the kernel that cancels it. Each takes the next ticket from the list (`pop` is
    atomic), and the ticket says who came first:

        the thread draws "start"          it runs the function
        the thread draws "end"            (after that) the result counts
        the kernel draws "start"          the function is never run
        the kernel draws "end"            the thread is in the midst: abandoned
    """

    __slots__ = ("pool", "func", "args", "tickets", "callback", "result", "error")

    def __init__(self, pool: ThreadPool, func: Callable, args: tuple) -> None:
        self.pool, self.func, self.args = pool, func, args
        self.tickets = ["end", "start"]
        self.error = None

    def draw(self) -> str | None:
        try:
            return self.tickets.pop()
        except IndexError:
            return None

    def add_done_callback(self, callback: Callable) -> None:
        self.callback = callback
        self.pool.jobs.put(self)

    def cancel(self) -> None:
        self.pool.abandon(self)


class ThreadPool:
    """The threads of a kernel; calls in `abandoned` run on though nobody waits."""

    def __init__(self, kernel: Kernel, size: int) -> None:
        self.size = size
        self.abandoned: set[_Job] = set()
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        self.slots = Semaphore(size)
        self._threads = 0
        kernel.thread_pool = self
        kernel._call_at_shutdown(self.shutdown)

    async def call(self, func: Callable, args: tuple) -> Any:
        """See `run_in_thread`; for those who hold one of the `slots`."""
        if self._threads < self.size - self.slots.value:
            self._threads += 1
            threading.Thread(target=self._work, daemon=True).start()
        job = _Job(self, func, args)
        await _trap("trap_future_wait", job, None)
        if job.error is None:
            return job.result
        try:
            raise job.error
        finally:
            del job     # an exception must not hold the frame that holds it

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            if job.draw() != "start":
                continue
            try:
                job.result = job.func(*job.args)
            except BaseException as exc:
                job.error = exc
            if job.draw() != "end":
                self.abandoned.discard(job)     # back after all; its place was taken
                return
            job.callback(job)
            del job                     # hold on to nothing while waiting

    def abandon(self, job: _Job) -> None:
        """Give up a call: it is not begun any more, or its thread is replaced."""
        self.abandoned.add(job)     # first, or its thread might take it out too early
        if job.draw() != "end":
            self.abandoned.discard(job)
            return
        self._threads -= 1
        log.warning("a thread was abandoned in %s, which still runs (%d of %d)",
                    getattr(job.func, "__qualname__", job.func), len(self.abandoned),
                    self.size)

    def shutdown(self) -> None:
        for _ in range(self._threads):
            self.jobs.put(None)


# A worker process and its parent talk through a pair of sockets. A message is four
# bytes of length and a pickle. That is safe here and only here: the sockets have no
# name, and at the other end is our own program.

_HEAD = struct.Struct("!I")


def _process_main(sock: socket.socket) -> None:
    """The life of a worker process: receive a call, run it, send what came of it."""
    # Ctrl-C goes to all processes of a terminal, but the parent decides what happens. A
    # handler that does nothing, rather than SIG_IGN, since that would be inherited by
    # programs that a task starts.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    # A child that computes reads no socket, so a thread waits for the parent's end.
    from multiprocessing import connection, parent_process
    parent = parent_process().sentinel
    threading.Thread(target=lambda: (connection.wait([parent]), os._exit(1)),
                     daemon=True).start()
    # A child that a task forks must not hold our end: nobody would see us die.
    def on_fork():
        with suppress(OSError):     # (this was a fork of a fork)
            os.close(sock.detach())

    os.register_at_fork(after_in_child=on_fork)
    # (read as a file: sock.makefile would take a detour through Python each time; and a
    # file does not heed `socket.setdefaulttimeout`, which the program may have called)
    sock.setblocking(True)
    stream = open(sock.fileno(), "rb", closefd=False)
    while head := stream.read(_HEAD.size):
        try:
            func, args = pickle.loads(stream.read(*_HEAD.unpack(head)))
            reply = pickle.dumps((True, func(*args)))
        except BaseException as exc:
            reply = _pickled_exception(exc)
        sock.sendall(_HEAD.pack(len(reply)) + reply)
        func = args = reply = None


def _pickled_exception(exc: BaseException) -> bytes:
    text = "".join(traceback.format_exception(exc))
    try:
        reply = pickle.dumps((False, (exc, text)))
        pickle.loads(reply)     # some go in and do not come out again
        return reply
    except Exception:
        try:
            name = f"{type(exc).__name__}: {exc}"
        except Exception:
            name = type(exc).__name__
        return pickle.dumps((False, (WorkerError(name), text)))


class ProcessPool:
    """The worker processes of a kernel, started by `spawn`."""

    def __init__(self, kernel: Kernel, size: int) -> None:
        self.slots = Semaphore(size)
        self._idle: list[tuple] = []
        self._all: set = set()
        kernel.process_pool = self
        kernel._call_at_shutdown(self.shutdown)
        # Python joins its children before it exits; ours do not go unless told to.
        atexit.register(self.shutdown)

    def _start(self) -> tuple:
        import multiprocessing      # (here, since it takes long to import)
        from multiprocessing import resource_tracker
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        process = multiprocessing.get_context("spawn").Process(
            target=_process_main, args=(theirs,), daemon=True)
        # The child is born with the signals blocked that mean nothing to it later on.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(
            signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
        # (asking for the exit code takes a dead child off the system's list)
        self._all = {process, *(old for old in self._all if old.exitcode is None)}
        return process, ours

    async def call(self, func: Callable, args: tuple) -> Any:
        """See `run_in_process`; for those who hold one of the `slots`."""
        call = pickle.dumps((func, args))
        call = _HEAD.pack(len(call)) + call
        while True:
            was_idle = bool(self._idle)
            process, sock = self._idle.pop() if was_idle else self._start()
            try:
                await _send(sock, call)
                was_idle = False        # it has begun now
                ok, answer = pickle.loads(await _receive(sock))
                break
            except BaseException as exc:
                # Cancelled, dead or speaking nonsense: whatever it is, it is over. (A
                # child that a task forked may hold a copy of our socket, so it has to
                # be released.)
                await _io_release(sock)
                sock.close()
                try:
                    if isinstance(exc, BrokenPipeError) and was_idle:
                        continue        # it died before; the next one, then
                    if isinstance(exc, OSError):
                        exc = await self._obituary(process)
                finally:
                    process.kill()
                raise exc from None
        self._idle.append((process, sock))
        if ok:
            return answer
        exc, text = answer
        raise exc from RemoteTraceback(text)

    async def _obituary(self, process) -> WorkerLost:
        # The socket closes a little before the process is gone, and the exit code is
        # there only after that; unless it closed the socket and lives on.
        await ignore_after(1.0, _read_wait(process.sentinel))
        await _io_release(process.sentinel)
        process.kill()
        process.join()
        code = process.exitcode
        names = {-known: known.name for known in signal.Signals}
        return WorkerLost(f"worker process died of {names.get(code, f'signal {-code}')}"
                          if code < 0 else f"worker process left with exit code {code}")

    def shutdown(self) -> None:
        """Kill all and wait for their end."""
        atexit.unregister(self.shutdown)
        for process in self._all:
            process.kill()
        for process in self._all:
            process.join()
        for _, sock in self._idle:
            sock.close()
        self._all, self._idle = set(), []


async def _send(sock: socket.socket, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view):]
        except BlockingIOError:
            await _write_wait(sock)


async def _receive(sock: socket.socket) -> memoryview:
    data, size = bytearray(), _HEAD.size
    while len(data) < size:
        await _read_wait(sock)
        chunk = sock.recv(1 << 16)
        if not chunk:
            raise ConnectionResetError("end of file")
        data += chunk
        if size == _HEAD.size <= len(data):
            size += _HEAD.unpack_from(data)[0]
    return memoryview(data)[_HEAD.size:]
