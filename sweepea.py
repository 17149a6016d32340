"""Sweepea: a concurrent scheduling kernel that drives pika's event loop.

A program that talks to RabbitMQ waits most of its life: for a message, for a timer,
for a thread, for a process. This module turns each of these waits into an `await`. It
is one file, meant to be read from top to bottom; a reader who stops after any chapter
has understood something whole:

    1. Errors          what can go wrong, and what is merely a cancellation
    2. Traps           how a coroutine asks the kernel for something
    3. Tasks           what the kernel remembers about one coroutine
    4. Waiting rooms   where tasks wait for each other
    5. Timeouts        deadlines that nest
    6. The kernel      the ready queue, the timers, the trap table
    7. The bridge      pika's callbacks become awaits; connections that come back
    8. Workers         threads and processes that do the work

The kernel follows Curio (David Beazley, https://github.com/dabeaz/curio): the traps
have Curio's names, arguments and meanings. Curio's kernel waits in a poll of its own;
ours calls the poll of pika's `IOLoop`, which reads and writes the sockets of AMQP on
the way. Not in here: AMQP frames, which are pika's business, and tasks that are known
by name, which are the business of olive_app.py.

Copy this file into your own project if you like; it needs nothing but pika.

Copyright (c) 2026 the Sweepea authors. SPDX-License-Identifier: MIT
"""

from __future__ import annotations

import atexit
import contextvars
import functools
import heapq
import itertools
import logging
import os
import pickle
import queue
import random
import signal
import socket
import sys
import threading
import time
import traceback
import types
import weakref
from collections import OrderedDict, deque
from concurrent.futures import Future
from contextlib import suppress
from selectors import EVENT_READ, EVENT_WRITE
from typing import Any, Callable, Coroutine, Iterable, NamedTuple

import pika
from pika.adapters.select_connection import IOLoop, SelectConnection
from pika.adapters.utils.selector_ioloop_adapter import SelectorIOServicesAdapter
from pika.exceptions import (
    AMQPConnectionError, AMQPError, AuthenticationError, ChannelClosedByBroker,
    ConsumerCancelled, NackError, ProbableAccessDeniedError,
    ProbableAuthenticationError, UnroutableError)

__version__ = "0.2.0"

log = logging.getLogger("sweepea")


# =====================================================================================
# 1. Errors
#
# There are two families. A cancellation is no error: somebody wants the task to end, so
# it derives from BaseException and passes through every `except Exception`. All else is
# an ordinary exception. Names and bases are Curio's, so that a program written for
# Curio, and Curio's own library, catch here what they catch there.
# =====================================================================================

class CurioError(Exception):
    """Base of the ordinary errors of the kernel."""


class CancelledError(BaseException):
    """Base of all cancellations."""


class TaskCancelled(CancelledError):
    """Somebody called `task.cancel()`."""


class TaskTimeout(CancelledError):
    """The deadline of a `timeout_after` block has passed (chapter 5): the earliest one
    where the kernel raises this, a block's own where this comes out of the block.

    `args[0]` is the kernel's clock at that moment.
    """


class TimeoutCancellationError(CancelledError):
    """The deadline of an outer `timeout_after` has passed; an inner one passes that on,
    whether or not its own has passed, too (chapter 5)."""


class UncaughtTimeoutError(CurioError):
    """A TaskTimeout came out of a block to which it did not belong."""


class TaskError(CurioError):
    """The task that was joined crashed; `__cause__` says of what."""


class SyncIOError(CurioError):
    """Raised by Curio's library on our kernel, never in this module: synchronous I/O
    on an object that only knows asynchronous I/O."""


class AsyncOnlyError(CurioError):
    """Raised by Curio's library on our kernel, never in this module: something
    asynchronous was asked for outside of asynchronous code."""


class ResourceBusy(CurioError):
    """Another task waits for the same thing."""


class ReadResourceBusy(ResourceBusy):
    """Another task waits to read from the same file."""


class WriteResourceBusy(ResourceBusy):
    """Another task waits to write to the same file."""


class WorkerLost(CurioError):
    """The worker process died in the middle of the call, of an exit or of a signal."""


class WorkerError(CurioError):
    """An exception of a worker process that cannot be pickled: its name and text."""


class WorkerStartError(CurioError):
    """No worker process could be started for the call, which has not begun."""


# =====================================================================================
# 2. Traps
#
# How does a function stop in the middle, and go on later? `yield` does just that. A
# coroutine is a generator in other clothes, and a trap is the one place where a
# coroutine really yields: there it hands a request to whoever drives it, and it is
# resumed with the answer. As a system call goes from a program to its operating system,
# a trap goes from a task to the kernel:
#
#     async def main():                   kernel
#         await sleep(1)
#            |  yield ('trap_sleep', 1)
#            +--------------------------->  notes the time, runs other tasks ...
#            <---------------------------+  ... task.send(clock)
#         (main goes on)
#
# The kernel's side of it, without time, files and threads, is this:
#
#     while ready:                                # a deque of (task, answer)
#         task, answer = ready.popleft()
#         try:
#             trap, *arguments = task.send(answer)    # runs the task to its next trap
#         except StopIteration:
#             continue                                # the task has ended
#         ready.append((task, traps[trap](*arguments)))
#
# Chapter 6 is that loop, grown up. An answer that is an exception is raised by `_trap`,
# in the middle of the task's function; so the kernel needs one way to resume a task,
# not two. All of `async` in this file comes down to the one `yield` below.
# =====================================================================================

@types.coroutine            # makes a generator something that can be awaited
def _trap(*request):
    answer = yield request
    if isinstance(answer, BaseException):
        raise answer
    return answer


async def sleep(seconds: float) -> float:
    """Sleep for so many seconds; 0 lets the other tasks that are ready run first.

    Returns the kernel's clock (`time.monotonic()`, seconds) on waking.
    """
    return await _trap("trap_sleep", seconds)


async def clock() -> float:
    """Return the kernel's clock, `time.monotonic()`, in seconds."""
    return await _trap("trap_clock")


async def current_task() -> Task:
    """Return the Task that is running, the caller's own."""
    return await _trap("trap_get_current")


async def spawn(corofunc: Callable | Coroutine, *args: Any) -> Task:
    """Start `corofunc(*args)` as a task of its own, concurrently; return that Task."""
    return await _trap("trap_spawn", _coroutine(corofunc, args))


async def read_wait(fileobj) -> None:
    """Wait until a socket or pipe (or its number) can be read without blocking.

    Raises ReadResourceBusy if another task waits for the same.
    """
    await _trap("trap_io", fileobj, EVENT_READ, "READ_WAIT")


async def write_wait(fileobj) -> None:
    """Wait until a socket or pipe (or its number) can be written without blocking.

    Raises WriteResourceBusy if another task waits for the same.
    """
    await _trap("trap_io", fileobj, EVENT_WRITE, "WRITE_WAIT")


async def io_release(fileobj) -> None:
    """Have the kernel forget a file. To be called before the file is closed."""
    await _trap("trap_io_release", fileobj)


# A future is a result that is not there yet. Those of `concurrent.futures` may be
# completed by any thread, which is why the bridge and the workers use them, or objects
# that look like them (`Call` in chapter 8).
async def _future_wait(future) -> Any:
    await _trap("trap_future_wait", future, None)
    return future.result()


async def _get_kernel() -> Kernel:
    return await _trap("trap_get_kernel")


def _coroutine(corofunc, args) -> Coroutine:
    """Take a coroutine, which has a `send`, as it is; make one of a function."""
    coro = corofunc if hasattr(corofunc, "send") else corofunc(*args)
    if not hasattr(coro, "send"):
        raise TypeError(f"{corofunc!r} is not a coroutine function, nor a coroutine")
    return coro


# =====================================================================================
# 3. Tasks
#
# A coroutine knows where it stopped and nothing else. Without a record beside it nobody
# could cancel a coroutine that sleeps, or wait for its end, or say what a program hangs
# in. So the kernel keeps such a record of each coroutine: what it waits for, how to get
# it out of there, who waits for its end. The two together are a task. Most tasks never
# use most of the record, so the defaults stand in the class, and a new task writes down
# only what is its own; this makes spawning twice as fast.
# =====================================================================================

class Task:
    """One coroutine under the kernel's care. Made by `spawn`, not by hand."""

    # state             A word for people: what the task waits for just now.
    # cycles            How often the task has been resumed. For people, too.
    # cancel_func       Call it to take the task out of whatever it waits in. None
    #                   while the task does not wait.
    # future            The future that the task waits for. An answer of any other
    #                   future comes too late and is dropped.
    # sleep, timeout    The clock at which the task's sleep ends, and the earliest
    #                   deadline of the `timeout_after` blocks it is in. Or None.
    # cancelled         Somebody has cancelled the task. A second time does nothing.
    # cancel_pending    A cancellation that could not be delivered yet (chapter 6).
    # allow_cancel      A task may set this to False for a while: meanwhile its
    #                   cancellations stay in cancel_pending.
    # terminated        The coroutine has ended; what it returned or raised is in
    #                   _final_result or _final_exc.
    # joining           The waiting room (chapter 4) of those who wait for that end.
    # _trap_result      The answer that the task gets when it is resumed.
    # _deadlines        Those of the `timeout_after` blocks that the task is in, the
    #                   innermost last (chapter 5).

    state, cycles, allow_cancel = "INITIAL", 0, True
    cancelled = terminated = False
    cancel_func = future = sleep = timeout = joining = cancel_pending = None
    _trap_result = _final_result = _final_exc = None
    _deadlines = ()
    _numbers = itertools.count(1)

    def __init__(self, coro: Coroutine) -> None:
        self.id = next(Task._numbers)
        self.coro = coro
        self.name = getattr(coro, "__qualname__", None)
        # Each task has context variables of its own, a copy of the spawner's. Without
        # this, what one task sets (the precision of decimals, say) would hold in every
        # other task from its next wait on.
        self.run_in_context = contextvars.copy_context().run
        self.send = functools.partial(self.run_in_context, coro.send)

    def throw(self, exc: BaseException) -> Any:
        """Raise `exc` where the coroutine stopped, if it did not stop in a trap."""
        return self.run_in_context(self.coro.throw, exc)

    def __repr__(self) -> str:
        return f"Task(id={self.id}, name={self.name!r}, state={self.state!r})"

    async def wait(self) -> None:
        """Wait until the task has ended, however it ends."""
        if not self.terminated:
            # A room in which nobody sits is false, as its length is 0. Such a room may
            # as well be replaced by a new one.
            self.joining = self.joining or SchedBarrier()
            await _trap("trap_sched_wait", self.joining, "TASK_JOIN")

    async def join(self) -> Any:
        """Wait until the task has ended and return its result.

        Raises TaskError, with the task's own exception as `__cause__`, if it crashed.
        """
        await self.wait()
        if self._final_exc is not None:
            raise TaskError("Task crash") from self._final_exc
        return self._final_result

    async def cancel(self, *, exc=TaskCancelled, blocking: bool = True) -> None:
        """Raise `exc`, a class or an instance, in the task where it waits.

        If `blocking`, wait for the task's end. A task that does not wait at this moment
        gets the exception as soon as it does. A task may clean up, even await things,
        on its way out; a second cancel does not disturb that.
        """
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
# Tasks wait for each other: for a lock, an item, an event, an end. Without a place to
# wait in, each of them would have to look again and again whether the lock is free by
# now, and these looks would keep the processor busy. All of them need two things of the
# kernel, a room to sit down in and somebody who wakes the next one.
# A room is an object with two methods that only the kernel calls: `_kernel_suspend`
# seats a task and returns the function that takes it out again, which becomes the
# task's `cancel_func`; `_kernel_wake` takes out up to n tasks and returns them.
#
# A task that was woken sits on the ready queue, and a cancellation that arrives then
# is kept (`cancel_pending`) until the task waits again. Otherwise a permit of a
# semaphore could be handed to a task that dies before it can pass the permit on, and
# one permit would be gone for good.
# =====================================================================================

class SchedFIFO:
    """A waiting room that wakes its tasks in the order of their arrival."""

    def __init__(self) -> None:
        # The first must be found quickly, and anybody must be able to leave quickly: an
        # OrderedDict does both in the same time, however many sit in the room.
        self._tasks: dict[Task, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tasks)

    def _kernel_suspend(self, task: Task) -> Callable[[], Any]:
        self._tasks[task] = None
        return lambda: self._tasks.pop(task)

    def _kernel_wake(self, ntasks: int = 1) -> list[Task]:
        tasks = list(itertools.islice(self._tasks, ntasks))
        for task in tasks:
            del self._tasks[task]
        return tasks

    async def suspend(self, reason: str = "SUSPEND") -> None:
        """Sit down in the room until woken; `reason` is shown as the task's state."""
        await _trap("trap_sched_wait", self, reason)

    async def wake(self, n: int = 1) -> None:
        """Wake the next n tasks."""
        await _trap("trap_sched_wake", self, n)


class SchedBarrier(SchedFIFO):
    """A waiting room that wakes everybody at once."""

    def __init__(self) -> None:
        self._tasks = {}    # smaller, and it is emptied in one go, never from the front

    async def wake(self, n: int | None = None) -> None:
        """Wake n tasks, or all."""
        await super().wake(len(self) if n is None else n)


class Event:
    """A flag that tasks wait for."""

    def __init__(self) -> None:
        self._set, self._waiting = False, SchedBarrier()

    def is_set(self) -> bool:
        """Whether the flag is up."""
        return self._set

    def clear(self) -> None:
        """Take the flag down; whoever comes to wait after this waits."""
        self._set = False

    async def set(self) -> None:
        """Put the flag up and wake all that wait for it."""
        self._set = True
        await self._waiting.wake()

    async def wait(self) -> None:
        """Wait until the flag is up."""
        if not self._set:
            await self._waiting.suspend("EVENT_WAIT")


class Semaphore:
    """So many permits; a task that finds none waits. `async with` takes and returns.

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
            await self._waiting.suspend("SEMA_ACQUIRE")

    async def release(self) -> None:
        """Return a permit."""
        if len(self._waiting):
            await self._waiting.wake()
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
        self._filled, self._free = Semaphore(0), Semaphore(maxsize or float("inf"))

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


async def gather(*coroutines: Coroutine) -> list:
    """Run the coroutines as tasks, all at once; return their results in their order.

    The first failure cancels the others and is raised when they have ended; a
    cancellation of the caller cancels all. After asyncio's function of that name.
    """
    failures = []

    async def watched(coro):
        try:
            return await coro
        except BaseException as exc:
            failures.append(exc)
            for task in tasks:
                await task.cancel(blocking=False)

    # None of them runs before all are in the list: a spawn does not wait.
    tasks = [await spawn(watched(coro)) for coro in coroutines]
    try:
        for task in tasks:
            await task.wait()
    finally:
        # First all are told to go, then all are waited for. On those that have ended a
        # cancel has no effect.
        for blocking in False, True:
            for task in tasks:
                await task.cancel(blocking=blocking)
    if failures:
        raise failures[0]
    return [task.result for task in tasks]


# =====================================================================================
# 5. Timeouts
#
# Without timeouts, a task whose answer never comes would wait for ever, and with it all
# who wait for the task. The kernel knows one deadline per task, the earliest. Deadlines
# nest, so each block puts its own on the task's stack and remembers which one was in
# force before:
#
#     async with timeout_after(5):            stack: [5]       in force: 5
#         async with timeout_after(2):        stack: [5, 2]    in force: 2
#             await something()      <-- at 2 the kernel raises TaskTimeout here
#
# As the exception travels outwards, every block looks at the clock that the exception
# carries, and asks two questions. Has the deadline of a block further out passed? Then
# the exception is meant for that one, and goes on as TimeoutCancellationError, so that
# nobody in between takes it for his own. Has this block's deadline passed? Then the
# block raises its TaskTimeout, or ends quietly if it is an `ignore_after`. If neither
# has, a TaskTimeout escaped from a block further in where somebody should have caught
# it, and this block says so with UncaughtTimeoutError. The three cases, with what
# comes out of each block if nobody catches anything:
#
#     outer  inner  raised   out of the inner block        out of the outer block
#       5      2    at 2     TaskTimeout                   UncaughtTimeoutError
#       2      5    at 2     TimeoutCancellationError      TaskTimeout
#       2      2    at 2     TimeoutCancellationError      TaskTimeout (set first)
# =====================================================================================

FOREVER = float("inf")


class _Timeout:
    """A deadline around a block, or around one call (`_over`)."""

    def __init__(self, seconds: float | None, ignore: bool, timeout_result: Any = None):
        if seconds != seconds:
            raise ValueError("NaN is no number of seconds")     # NaN equals nothing
        self._seconds, self._ignore = seconds, ignore
        self._timeout_result = timeout_result
        self.expired, self.result = False, True

    async def __aenter__(self) -> _Timeout:
        self._task = await current_task()
        seconds = FOREVER if self._seconds is None else self._seconds
        self._deadline = seconds + await clock()
        self._outer = self._task._deadlines
        self._task._deadlines = [*self._outer, self._deadline]
        # Without a limit there is no timer to set; the trap tells which one is set.
        self._previous = await _trap(
            "trap_set_timeout", None if seconds == FOREVER else self._deadline)
        return self

    async def __aexit__(self, kind, exc, tb) -> bool:
        await _trap("trap_unset_timeout", self._previous)
        self._task._deadlines = self._outer
        if kind not in (TaskTimeout, TimeoutCancellationError):
            return False
        # An exception of the kernel's carries the clock. One that the program itself
        # has raised may not.
        clocks = [arg for arg in exc.args if isinstance(arg, float)]
        now = clocks[0] if clocks else time.monotonic()
        # A new exception with the old traceback: the context of the old one, in which
        # the block was only being left, would tell the reader nothing.
        if any(outer <= now for outer in self._outer):
            raise TimeoutCancellationError(now).with_traceback(tb) from None
        if self._deadline > now:
            raise UncaughtTimeoutError("Uncaught timeout received") from exc
        self.expired, self.result = True, self._timeout_result
        if self._ignore:
            return True
        raise TaskTimeout(now).with_traceback(tb) from None

    def _over(self, corofunc, args) -> Any:
        # With a function it is one call, and what is returned is for `await`. Without
        # one it is a block, for `async with`.
        return self._run(corofunc, args) if corofunc else self

    async def _run(self, corofunc, args) -> Any:
        async with self:
            return await _coroutine(corofunc, args)
        return self.result      # reached only if the block ignored its timeout


def timeout_after(seconds: float | None, corofunc=None, *args) -> Any:
    """Raise TaskTimeout in the calling task once `seconds` have passed.

    `await timeout_after(5, func, *args)` for one call, `async with timeout_after(5):`
    for a block. None means no limit. After Curio's function of the same name.
    """
    return _Timeout(seconds, ignore=False)._over(corofunc, args)


def ignore_after(seconds: float | None, corofunc=None, *args,
                 timeout_result: Any = None) -> Any:
    """Like `timeout_after`, but the end of the time is no exception.

    The call returns `timeout_result`. The block ends, with `expired` set on the object
    that `as` gives, and `timeout_result` as that object's `result`; a block that ends
    in time leaves True there.
    """
    return _Timeout(seconds, True, timeout_result)._over(corofunc, args)


# =====================================================================================
# 6. The kernel
#
# Whoever drives coroutines needs a loop: run what is ready, find out what has become
# ready since, and again. To find that out one calls a poll: it asks the operating
# system to put the thread to sleep until one of these sockets has data, or until so
# much time is over. pika has such a loop, its IOLoop, and pika's must go on turning,
# for it is there that AMQP is read, written and kept alive by heartbeats. A thread can
# sleep in one poll only. So the kernel has none of its own. In each *round* it calls
# pika's poll, as pika's BlockingConnection does, then pika's callbacks and timers, and
# then takes its own *turn*:
#
#          +---------------- pika's IOLoop -----------------+
#          |  poll()                 process_timeouts()     |
#     +--->|  sleeps until there is  calls callbacks, then  |---> the kernel's turn --+
#     |    |  something to do        the timers that are due|     runs ready tasks    |
#     |    +------+---------------------+--------------+----+                         |
#     |      add_handler     add_callback_threadsafe  call_later                      |
#     |      (a task waits   (another thread          (so that the poll               |
#     |      for a file)     woke a task)             ends in time)                   |
#     +-------------------------------------------------------------------------------+
#
# A turn runs what is ready, and what becomes ready thereby, for half a millisecond at
# most (`SLICE`). Tasks can make each other ready without end; without that limit pika
# would never read a socket again, and the broker would think us dead. Nor may a turn
# be long, because what it acknowledges goes out at its end, and the broker should have
# new messages under way while we still work on the old ones. The clock is looked at
# after each task, so the last task of a turn can overrun that time, and a task that
# computes without ever waiting blocks everything, as it does in every event loop. The
# kernel can only say afterwards which task it was (`BLOCKED`).
#
# Three rules keep all this free of locks. One thread alone touches the kernel, the one
# that is in `run`; another thread may only complete a future, or have the kernel's
# thread call a function (`_tell`). A task reaches the kernel by traps. What cannot
# trap, as it is no coroutine, may do four things in the kernel's thread: call `_spawn`,
# complete a future, set a timer of pika's, and leave something to the end of the turn
# (`_at_turn_end`).
# =====================================================================================

SLICE = 0.0005          # seconds after which no further task is begun in a turn
BLOCKED = 0.5           # seconds; a task that runs longer without waiting is logged
SHUTDOWN_GRACE = 2.0    # seconds that a cancelled task has, at shutdown, to go

_MASKS = {EVENT_READ: IOLoop.READ, EVENT_WRITE: IOLoop.WRITE}   # of selectors, of pika
_SUSPENDED = object()   # what a trap answers if the task has to wait
# The traps that may wait. They are answered with a cancellation if one is pending.
_WAITING = {"trap_io", "trap_future_wait", "trap_sleep", "trap_sched_wait"}
_FOREIGN = ("a task awaited something that is not of Sweepea's kernel ({!r}); "
            "asyncio does not work here: use sweepea.sleep, run_in_thread and the like")
_driving: set[int] = set()      # the threads that are in `Kernel.run` just now


class _Watch(NamedTuple):
    """What pika's loop watches one file number for, and who waits for it."""
    owner: Callable         # gives the file object, or None; see `_watch`
    mask: int               # the bits of the events that the loop watches for
    waits: dict             # bit (IOLoop.READ or WRITE) -> the task that waits for it


def _nobody() -> None:
    """The owner of a number of which nothing is known."""


def _number(fileobj) -> int:
    return fileobj.fileno() if hasattr(fileobj, "fileno") else fileobj


class Kernel:
    """Runs coroutines on pika's IOLoop. After Curio's class of the same name.

    `loop` is the IOLoop to drive (made if not given; from then on it belongs to the
    kernel, which closes it at shutdown), `taskcls` the class of the kernel's tasks.
    """

    def __init__(self, *, loop: IOLoop | None = None, taskcls: type = Task) -> None:
        self.loop = loop or IOLoop()
        self.loop.activate_poller()
        self._taskcls = taskcls
        self._tasks: dict[int, Task] = {}       # by the task's number
        self._ready: deque[Task] = deque()
        self._timers: list[tuple[float, int, str]] = []     # (clock, task number, kind)
        self._files: dict[int, _Watch] = {}
        self._told: deque = deque()     # (function, arguments) from other threads
        self._rung = False              # the loop was told of these already
        # While in `run`: its thread, the task that it waits for, the one that runs.
        self._thread = self._main = self._current = None
        # What is called, once, when the turn ends: chapter 7 sends acknowledgements so.
        self._at_turn_end: list[Callable] = []
        self._shutdown_funcs: list[Callable[[], Any]] | None = []   # None: it is closed
        self._call_at_shutdown = self._shutdown_funcs.append
        self._traps: dict[str, Callable] = {
            "trap_io": self._trap_io,
            "trap_io_release": self._trap_io_release,
            "trap_io_waiting": self._trap_io_waiting,       # for Curio's library
            "trap_future_wait": self._trap_future_wait,
            "trap_spawn": self._trap_spawn,
            "trap_cancel_task": self._trap_cancel_task,
            "trap_sched_wait": self._trap_sched_wait,
            "trap_sched_wake": self._trap_sched_wake,
            "trap_sleep": self._trap_sleep,
            "trap_clock": time.monotonic,
            "trap_set_timeout": self._trap_set_timeout,
            "trap_unset_timeout": self._trap_unset_timeout,
            "trap_get_kernel": lambda: self,
            "trap_get_current": lambda: self._current,
        }

    # -- driving the loop --------------------------------------------------------------

    def run(self, corofunc=None, *args: Any, shutdown: bool = False) -> Any:
        """Run `corofunc(*args)` until it ends; return its result or raise what it did.

        Other tasks stay where they are and go on with the next `run`. Without a
        coroutine: one pass over whatever is ready and due. With `shutdown=True`: cancel
        every task, newest first, and close the kernel for good.

        Raises RuntimeError if this thread runs a kernel already, or if this kernel runs
        in another thread, was shut down or has crashed.
        """
        if threading.get_ident() in _driving or self._thread is not None:
            raise RuntimeError("a kernel is running already: use `await`, not run()")
        if self._shutdown_funcs is None:
            raise RuntimeError("the kernel was shut down, or has crashed")
        # The main task is put in front of the queue. One that only says `sleep(0)` is
        # resumed, and so ends, when everything that is ready or due now has run once.
        main = self._spawn(_coroutine(corofunc, args) if corofunc else sleep(0))
        self._ready.rotate()
        try:
            self._drive(main)
        finally:
            if shutdown and self._shutdown_funcs is not None:
                self._drive(self._spawn(self._cancel_all()))
                self._close()
        if corofunc:
            return main.result

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *exc_info) -> None:
        if self._shutdown_funcs is not None:
            self.run(shutdown=True)

    def _drive(self, main: Task) -> None:
        self._main, self._thread = main, threading.get_ident()
        _driving.add(self._thread)
        try:
            while not main.terminated:
                self._poll()
                self.loop.process_timeouts()
                self._turn()
        finally:
            _driving.discard(self._thread)      # in a forked child it is not there
            self._current = self._thread = None

    def _poll(self) -> None:
        # How long may the poll sleep? For ever if no task is ready and no timer is set,
        # not at all if a task is ready, else until our earliest timer is due. A timer
        # of pika's ends the poll in time. Setting one costs as much as the poll itself,
        # so none is set where the poll may sleep for ever.
        if not self._ready and not self._timers:
            self.loop.poll()
            return
        seconds = 0 if self._ready else max(0, self._timers[0][0] - time.monotonic())
        alarm = self.loop.call_later(seconds, lambda: None)
        self.loop.poll()
        self.loop.remove_timeout(alarm)

    async def _cancel_all(self) -> None:
        limit = SHUTDOWN_GRACE
        # Tasks may spawn others on their way out, so this goes on until none is left.
        while others := [t for t in self._tasks.values() if t is not self._current]:
            for task in reversed(others):
                await ignore_after(limit, task.cancel)
                if not task.terminated:
                    log.error("%r would not go, and is dropped", task)
                    limit /= 2      # so all together take twice the grace at most
                self._tasks.pop(task.id, None)

    def _close(self) -> None:
        funcs, self._shutdown_funcs = self._shutdown_funcs, None
        for func in funcs:
            func()
        self.loop.close()

    # -- the turn ----------------------------------------------------------------------
    #
    # A task is resumed with the answer to its last trap, and runs to its next one. If
    # that trap can be answered at once, the task is resumed again. If the trap has to
    # wait, its answer is `_SUSPENDED`, and the next task runs. `_schedule` puts the
    # first one back on the ready queue when what it waits for is there.

    def _turn(self) -> None:
        ready, traps, main = self._ready, self._traps, self._main
        now = time.monotonic()
        self._expire(now)
        end = now + SLICE
        while ready and now <= end and not main.terminated:
            task = self._current = ready.popleft()
            task.state = "RUNNING"
            task.cycles += 1
            answer, task._trap_result = task._trap_result, None

            # The task runs from trap to trap until one of them makes it wait.
            resume = task.send
            while answer is not _SUSPENDED:
                try:
                    request = resume(answer)
                except BaseException as exc:    # StopIteration, too: it has returned
                    self._end(task, exc)
                    break
                resume = task.send
                try:
                    trap = traps[request[0]]
                except TypeError:               # asyncio yields None, or its own future
                    resume, answer = task.throw, TypeError(_FOREIGN.format(request))
                    continue
                except KeyError:
                    # A trap that no kernel like this one has. Here Curio's ends, too.
                    self._close()
                    raise
                if task.cancel_pending and task.allow_cancel and request[0] in _WAITING:
                    answer, task.cancel_pending = task.cancel_pending, None
                    continue
                try:
                    answer = trap(*request[1:])
                except Exception as exc:        # what a trap raises is its answer
                    answer = exc.with_traceback(None)   # our own frames say nothing

            before, now = now, time.monotonic()
            if now - before > BLOCKED:
                log.warning("%r ran for %.1f s without waiting", task, now - before)
        self._current = None
        self._end_turn()

    def _end_turn(self) -> None:
        while self._at_turn_end:
            self._at_turn_end.pop()()

    def _trap_spawn(self, coro: Coroutine) -> Task:
        # The copy of the spawner's context is made where that context is the current
        # one. A task of Curio's class has none.
        if run_in_context := getattr(self._current, "run_in_context", None):
            return run_in_context(self._spawn, coro)
        return self._spawn(coro)

    def _spawn(self, coro: Coroutine) -> Task:
        """Make a task of a coroutine. For callbacks of pika's, too."""
        task = self._taskcls(coro)
        self._tasks[task.id] = task
        self._schedule(task)
        return task

    def _schedule(self, task: Task, answer: Any = None) -> None:
        """Put a task on the ready queue, with the answer to the trap it waits in.

        The task does not wait any more: a future or a timer of its own that comes later
        finds nothing.
        """
        task.state, task._trap_result = "READY", answer
        task.cancel_func = task.future = task.sleep = None
        self._ready.append(task)

    def _suspend(self, state: str, cancel_func: Callable[[], Any]) -> object:
        self._current.state, self._current.cancel_func = state, cancel_func
        return _SUSPENDED

    def _end(self, task: Task, exc: BaseException) -> None:
        task.state, task.terminated = "TERMINATED", True
        self._tasks.pop(task.id, None)      # a task that was dropped is not there
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
    # An exception can be raised in a task only where the task waits, that is: inside a
    # trap. At any other moment, and while the task has set `allow_cancel` to False, the
    # exception is kept in `cancel_pending`. The next trap that waits (`_WAITING`) with
    # `allow_cancel` True again is answered with it, in `_turn`.

    def _interrupt(self, task: Task, exc: BaseException) -> None:
        if task.allow_cancel and task.cancel_func is not None:
            task.future = None      # or the future, once cancelled, would wake the task
            task.cancel_func()
            self._schedule(task, exc)
        elif task.cancel_pending is None or not isinstance(exc, TaskTimeout):
            task.cancel_pending = exc   # a timeout never displaces what is pending

    def _trap_cancel_task(self, task, exc=TaskCancelled, val=None):
        if not task.cancelled and not task.terminated:
            if not isinstance(exc, BaseException):
                exc = exc(exc.__name__ if val is None else val)
            # The task is on its way out, and no deadline shall cut its clean-up short.
            # But if the task leaves a `timeout_after` block on its way, the deadline
            # outside of that block counts again.
            task.cancelled, task.timeout = True, None
            self._interrupt(task, exc)

    # -- waiting rooms -----------------------------------------------------------------

    def _trap_sched_wait(self, room, state):
        return self._suspend(state, room._kernel_suspend(self._current))

    def _trap_sched_wake(self, room, n):
        for task in room._kernel_wake(n):
            self._schedule(task)

    # -- time --------------------------------------------------------------------------
    #
    # One heap holds all the clocks to watch, sleeps and timeouts. pika's loop has a
    # heap of timers, too, but ours cost less: nothing is ever taken out of the middle
    # of our heap. An entry counts only if the task still says the same time when the
    # entry comes up, and most timeouts are unset long before, so dead entries pile up.
    # A task has two timers at most. When there are more than four entries per task, at
    # least half of them are dead, and all of these are swept out, duplicates included:
    # a few steps per entry on average, however many there are.

    def _set_timer(self, task: Task, kind: str, clock: float) -> None:
        setattr(task, kind, clock)
        if len(self._timers) > 4 * len(self._tasks) + 1000:     # below: not worth it
            alive = {timer for timer in self._timers if self._task_of(timer)}
            self._timers = sorted(alive)        # a sorted list is a heap
        heapq.heappush(self._timers, (clock, task.id, kind))

    def _task_of(self, timer: tuple[float, int, str]) -> Task | None:
        """The task that an entry of the heap is for; None if the entry is dead."""
        clock, number, kind = timer
        task = self._tasks.get(number)      # None if it has ended
        return task if task and getattr(task, kind) == clock else None

    def _expire(self, now: float) -> None:
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)
            task = self._task_of(timer)
            if task and timer[2] == "sleep":
                self._schedule(task, now)
            elif task:
                task.timeout = None
                self._interrupt(task, TaskTimeout(now))

    def _trap_sleep(self, seconds):
        now = time.monotonic()
        if not seconds > 0:         # true for NaN, too, which would spoil the heap
            self._schedule(self._current, now)
            return _SUSPENDED
        self._set_timer(self._current, "sleep", now + seconds)
        return self._suspend("TIME_SLEEP", lambda: None)

    def _trap_set_timeout(self, clock):
        previous = self._current.timeout
        if clock is not None and (previous is None or clock < previous):
            self._set_timer(self._current, "timeout", clock)
        return previous

    def _trap_unset_timeout(self, previous):
        # A timeout that is still pending was meant for the block that is being left, so
        # it is dropped. The evil corner: the outer deadline may have passed as well. If
        # it were raised here, in the `__aexit__` of the inner block, that would be left
        # half-way. So the outer deadline's timer is set again; as it is overdue, it
        # fires in the next turn.
        task = self._current
        if isinstance(task.cancel_pending, TaskTimeout):
            task.cancel_pending = None
        task.timeout = None
        if previous is not None:
            self._set_timer(task, "timeout", previous)
        return time.monotonic()

    # -- files -------------------------------------------------------------------------
    #
    # pika's loop knows a file by its number and calls one handler for it; here one task
    # may wait to read from it and another one to write to it. A wait lasts for one
    # event. But a task that was woken by a file mostly waits for it again soon, and to
    # have a file forgotten and watched again costs two system calls. So the loop goes
    # on watching until an event comes that nobody waits for:
    #
    #     read_wait     the loop is told to watch for READ, the task waits
    #     event         the task is woken; the loop still watches
    #     read_wait     nothing to tell the loop
    #     event         the task is woken
    #     event         nobody waits: the loop is told to forget the file
    #
    # Numbers are used again as soon as a file is closed. So the loop is told anew when
    # a number has a new owner, and a file has to be released before it is closed, even
    # if nobody waits for it any more. Why? epoll watches the open file itself, not its
    # number. If a forked child still has the file open, closing our number does not end
    # the watch, and without the number nobody can end it any more.

    def _watch(self, fd: int, fileobj, mask: int, waits: dict[int, Task]) -> None:
        """Have pika's loop watch a file for the events of the mask, and no others."""
        self._trap_io_release(fd)
        if mask:
            self.loop.add_handler(fd, self._on_io, mask | IOLoop.ERROR)
            # A socket keeps its file for life, so the socket object shows whether the
            # number still belongs to it. A bare number shows nothing, nor does an
            # object that may open another file: these are watched anew each time. The
            # reference is weak, so that a socket which nobody has any more is closed.
            is_socket = isinstance(fileobj, socket.socket)
            owner = weakref.ref(fileobj) if is_socket else _nobody
            self._files[fd] = _Watch(owner, mask, waits)

    def _trap_io_release(self, fileobj):
        fd = _number(fileobj)
        if self._files.pop(fd, None):
            # If the file was closed first, the system, or pika if it got the number in
            # between, has forgotten it already.
            with suppress(KeyError, OSError, ValueError):
                self.loop.remove_handler(fd)

    def _on_io(self, fd: int, events: int) -> None:
        # An error or a hang-up (their bits are higher than READ and WRITE) wakes both
        # sides: their next read or write will show it.
        watch = self._files[fd]
        woken = [bit for bit in watch.waits if events & bit or events >= IOLoop.ERROR]
        for bit in woken:
            self._schedule(watch.waits.pop(bit))
        if not woken:
            self._watch(fd, watch.owner(), sum(watch.waits), watch.waits)

    def _trap_io(self, fileobj, event, state):
        fd, bit = _number(fileobj), _MASKS[event]
        watch = self._files.get(fd) or _Watch(_nobody, 0, {})
        waits = watch.waits
        if bit in waits:
            busy = ReadResourceBusy if event == EVENT_READ else WriteResourceBusy
            raise busy(f"another task waits for the same of file {fd}")
        mask = sum(waits) | bit     # the keys of `waits` are bits: their sum is a mask
        if mask != watch.mask or watch.owner() is not fileobj:
            self._watch(fd, fileobj, mask, waits)
        waits[bit] = self._current
        return self._suspend(state, lambda: waits.pop(bit))

    def _trap_io_waiting(self, fileobj):
        watch = self._files.get(_number(fileobj)) or _Watch(_nobody, 0, {})
        return watch.waits.get(IOLoop.READ), watch.waits.get(IOLoop.WRITE)

    # -- futures, and other threads ----------------------------------------------------
    #
    # A task is never resumed by the thread that completes its future: the whole kernel
    # is without locks because one thread alone touches it. All that another thread does
    # is to append to a deque, which is atomic, and to ring, that is: to have pika's
    # loop call `_on_ring`. Only a thread that finds the flag `_rung` down rings; all
    # that append something before the loop answers ride along. If two threads find the
    # flag down, both ring, which is once too often and does no harm.
    #
    #     other thread       append to the deque        look at the flag: down? ring
    #     the loop           take the flag down         empty the deque
    #
    # The order matters. An entry is either in the deque before the loop empties it, or
    # its thread looks at the flag after the loop has taken it down, and rings again.

    def _complete(self, task: Task, future) -> None:
        """Wake the task that waits for this future. Called by whoever completes it."""
        # In the kernel's own thread nobody has to ring. But a future that is done
        # already calls back at once, before its task waits: for that one we ring, too.
        if threading.get_ident() == self._thread and task.future is future:
            self._schedule(task)
            return
        self._tell(self._answered, task, future)

    def _answered(self, task: Task, future) -> None:
        # A task that was cancelled may wait for another future by now.
        if task.future is future:
            self._schedule(task)

    def _tell(self, func: Callable, *args: Any) -> None:
        """Have the kernel's thread call `func(*args)`. For any thread."""
        self._told.append((func, args))
        if not self._rung:
            self._rung = True
            self.loop.add_callback_threadsafe(self._on_ring)

    def _on_ring(self) -> None:
        self._rung = False
        while self._told:
            func, args = self._told.popleft()
            func(*args)

    def _trap_future_wait(self, future, event):
        task = self._current
        future.add_done_callback(lambda future: self._complete(task, future))
        if event is not None:
            event.set()     # Curio's library: whoever completes the future may begin
        task.future = future
        return self._suspend("FUTURE_WAIT", future.cancel)


def run(corofunc: Callable | Coroutine, *args: Any) -> Any:
    """Run `corofunc(*args)` on a kernel of its own: made, used and shut down.

    Raises RuntimeError if this thread runs a kernel already.
    """
    with Kernel() as kernel:
        return kernel.run(corofunc, *args)


# -- signals, and forked children ------------------------------------------------------
#
# Python runs signal handlers between two steps of the program and then goes back to the
# poll (PEP 475), so a handler cannot end the poll; and a handler that takes a lock may
# wait for ever for the very code that it interrupted. But the interpreter can write the
# number of each signal to a socket, at once, and a task can wait for that socket.
#
# A process that a task forks (`multiprocessing.Pool` does) inherits the handlers and
# the sockets, none of which are meant for it. The child would not die of a SIGTERM; and
# while it lives, the broker would not notice the death of its parent, since the
# connection is still open. So in every forked child the handlers become the default
# ones again, and the file numbers of our connections (chapter 7) lead to /dev/null. To
# close the numbers would be wrong: objects of pika's in the child would close them a
# second time, when they may belong to another file.

_handled: set[int] = set()              # signals with a handler of ours
_connected: set[int] = set()            # file numbers that chapters 7 and 8 put in


class signals:
    """A queue of the signals that come: `with signals(SIGTERM) as queue:`, and then
    `number = await queue.get()` in a task.

    For the main thread. A signal that is ignored when the block begins stays ignored;
    at the end of the block the handlers are what they were before. Curio's idea, where
    it is called SignalQueue.
    """

    def __init__(self, *numbers: int) -> None:
        self.numbers = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]
        self._came: deque[int] = deque()

    def __enter__(self) -> signals:
        self._ours, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)
        # The handler does nothing, but without one Python would not write the number.
        self._before = {n: signal.signal(n, lambda *_: None) for n in self.numbers}
        self._wakeup_fd = signal.set_wakeup_fd(self._theirs.fileno())
        _handled.update(self.numbers)
        return self

    async def get(self) -> int:
        """Take the number of the next signal, waiting for one if need be."""
        while not self._came:
            await read_wait(self._ours)
            self._came.extend(n for n in self._ours.recv(100) if n in self.numbers)
        return self._came.popleft()

    def __exit__(self, *exc_info) -> None:
        signal.set_wakeup_fd(self._wakeup_fd)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        _handled.difference_update(self.numbers)
        # The socket need not be released: whoever gets its number next is a new owner,
        # which the kernel watches anew.
        self._ours.close()
        self._theirs.close()


_forking = threading.local()            # the signals that were blocked before a fork


def _before_fork() -> None:
    # A signal that comes before the child has its handlers back waits until it has.
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _handled)


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _in_forked_child() -> None:
    _driving.clear()
    if _handled:
        signal.set_wakeup_fd(-1)
        for number in _handled:
            signal.signal(number, signal.SIG_DFL)
    if _connected:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in _connected:
            os.dup2(nowhere, number)
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork,
                    after_in_child=_in_forked_child)


# =====================================================================================
# 7. The bridge
#
# pika's asynchronous API is made of callbacks: you call `queue_declare(...,
# callback=f)`, and some rounds of the loop later pika calls f, or never, if the channel
# is closed before. Here that becomes `await channel.call("queue_declare", ...)`, which
# always comes back: with the answer, or with the exception that closed the channel.
#
#     Connection   one connection of pika's, used up when it closes
#     Channel      one channel on it; consumes, acknowledges, publishes with confirms
#     Link         the connection that always comes back
#
# In each of them `.pika` is pika's own object of that kind. AMQP itself (frames,
# heartbeats, negotiation) stays pika's affair. The words of AMQP that are needed here:
#
#     channel        a conversation; a connection carries many, each with an order of
#                    its own. An error closes the channel.
#     delivery tag   the number of a delivery on its channel: 1, 2, 3 ...
#     acknowledge    tell the broker by its tag that a message may be forgotten; until
#                    then the broker holds the message for us. To nack is to give back.
#     in hand        delivered, and neither acknowledged nor given back
#     prefetch       how many messages a consumer may have in hand at once: its window
#     confirm        the broker's acknowledgement of what we publish
#     mandatory      what no queue takes is returned to us, and not dropped in silence
#
# Who holds a message, and what becomes of the message if we die just then?
#
#     where the message is        who holds it          if we die now
#     on its way to us            the broker            nothing happened yet
#     in hand                     the broker, for us    somebody else gets it
#     acknowledged                nobody                its work was done before that
#     being published             whoever awaits        it may be there, or not
#     published and confirmed     the broker            it is safe with the broker
# =====================================================================================

MAX_BACKOFF = 30.0      # seconds between two attempts to connect, at most
SMALL = 8192            # bytes; a larger frame does not wait for the end of the turn

REFUSED = (AuthenticationError, ProbableAuthenticationError, ProbableAccessDeniedError)


def _answer(future: Future, value: Any) -> None:
    if not future.done():
        future.set_result(value)
    elif hasattr(value, "close"):   # a connection or a channel whose waiter is gone:
        value.close()               # nobody else would close it


class _Closable:
    """What connections and channels have in common: whoever waits for an answer learns
    that it cannot come any more."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._promises: set[Future] = set()
        self.closed: BaseException | None = None    # the reason, once it is closed

    def _promise(self) -> Future:
        """Make a future for an answer. It fails if this is closed before that."""
        if self.closed is not None:
            raise self.closed
        answer: Future = Future()
        self._promises.add(answer)
        answer.add_done_callback(self._promises.discard)
        return answer

    def _on_close(self, _pika_object, reason: BaseException) -> None:
        if self.closed is None:
            self.closed = reason
            for answer in list(self._promises):
                answer.set_exception(reason)

    async def _ask(self, method, *args, callback="callback", **kwargs) -> Any:
        """Call a method of pika's whose parameter of the name `callback` takes the
        function that gets the answer; wait for that answer."""
        answer = self._promise()
        kwargs[callback] = functools.partial(_answer, answer)
        method(*args, **kwargs)
        return await _future_wait(answer)

    async def wait_closed(self) -> BaseException:
        """Wait until this is closed; return the reason."""
        try:
            await _future_wait(self._promise())     # no answer ever comes, but the end
        except Exception as reason:
            return reason


class _Services(SelectorIOServicesAdapter):
    """pika's own adapter to its loop, which gathers what is written, looks names up in
    daemon threads, and notes the numbers of the sockets, so that forked children can be
    kept from holding them (see the end of chapter 6)."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel.loop)
        self._kernel = kernel

    # pika hands each frame to the system by itself, and a message is three frames, or
    # more if it is large. Each is a system call for us and a wake-up for the broker. So
    # the frames of a turn are kept, in their order, and written together at its end: a
    # call of a task costs us a quarter less, and the broker a third.

    def create_streaming_connection(self, *args, on_done, **kwargs):
        """Connect as pika does, but gather what pika writes from then on."""
        def on_made(made) -> None:
            if isinstance(made, tuple):         # else it is the error
                transport, _protocol = made
                transport.write = self._gathering(transport.write)
            on_done(made)

        return super().create_streaming_connection(*args, on_done=on_made, **kwargs)

    def _gathering(self, write: Callable[[bytes], None]) -> Callable[[bytes], None]:
        frames: list[bytes] = []

        def flush() -> None:
            if frames:
                write(b"".join(frames))
                frames.clear()

        def gather(frame: bytes) -> None:
            # What is first in the list comes last at the end of the turn: after the
            # acknowledgements, which are gathered there, too.
            if not frames:
                self._kernel._at_turn_end.insert(0, flush)
            frames.append(frame)
            # When the system takes only a part, pika copies the rest. So a message of
            # many megabytes must not become one piece.
            if len(frame) > SMALL:
                flush()

        return gather

    def getaddrinfo(self, host, port, on_done, socktype=0, **kwargs) -> Future:
        """Look a name up, as pika does, but in a daemon thread: the end of the program
        must not wait for a name server that does not answer."""
        loop, answer = self.get_native_ioloop(), Future()   # pika may cancel the answer

        def look_up() -> None:
            try:
                found = socket.getaddrinfo(host, port, type=socktype, **kwargs)
            except Exception as exc:
                found = exc
            with suppress(RuntimeError):        # the loop is closed by now
                loop.add_callback_threadsafe(
                    lambda: answer.cancelled() or on_done(found))

        threading.Thread(target=look_up, daemon=True).start()
        return answer

    def set_reader(self, fd: int, on_readable: Callable[[], None]) -> None:
        _connected.add(fd)
        super().set_reader(fd, on_readable)

    def remove_reader(self, fd: int) -> bool:
        _connected.discard(fd)
        return super().remove_reader(fd)


class Connection(_Closable):
    """A connection to RabbitMQ; made by `await Connection.open(urls)`."""

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
        self._unblocked = Event()       # up as long as the broker lets us publish
        await self._unblocked.set()
        try:
            params = pika.URLParameters(url)
        except (OSError, ValueError) as exc:    # a file for TLS is not there just now
            raise AMQPConnectionError(repr(exc)) from None

        def connect(on_open_callback: Callable) -> None:
            self.pika = SelectConnection(
                params, custom_ioloop=_Services(self._kernel),
                on_open_callback=on_open_callback, on_close_callback=self._on_error,
                on_open_error_callback=self._on_error)
            self.pika.add_on_connection_blocked_callback(self._on_blocked)
            self.pika.add_on_connection_unblocked_callback(self._on_unblocked)

        # If the caller is cancelled, the connection is closed once it is open (see
        # `_answer`) and not earlier, since pika trips over a close() in the midst of
        # its handshake. pika itself gives the handshake up after 15 s.
        try:
            await self._ask(connect, callback="on_open_callback")
        except AMQPError as exc:
            kind = type(exc) if isinstance(exc, REFUSED) else AMQPConnectionError
            where = f"{params.host}:{params.port}"
            raise kind(f"{where}: {describe(exc)}") from exc

    def _on_error(self, connection, error) -> None:
        # pika takes every connection that is lost during the handshake for a refusal. A
        # broker that refuses says so before it closes; one that restarts says nothing.
        guessed = isinstance(error, REFUSED) and "ClosedByBroker" not in str(error)
        if guessed or not isinstance(error, AMQPError):
            error = AMQPConnectionError(str(error) or repr(error))
        self._on_close(connection, error)
        # Publishers that wait for the end of a block shall see that this is closed.
        self._kernel._spawn(self._unblocked.set())

    def _on_blocked(self, _connection, frame) -> None:
        log.warning("the broker has blocked the connection (%s): nothing is published "
                    "nor acknowledged until it lifts that", frame.method.reason)
        self._unblocked.clear()

    def _on_unblocked(self, _connection, _frame) -> None:
        log.info("the broker has lifted the block")
        self._kernel._spawn(self._unblocked.set())

    async def channel(self, confirm: bool = False) -> Channel:
        """Open a channel; with `confirm`, one whose publishes are confirmed."""
        channel = Channel(self._kernel, self)
        channel.pika = await self._ask(self.pika.channel, callback="on_open_callback")
        channel.pika.add_on_close_callback(channel._on_close)
        # A consumer that the broker cancels, as its queue is gone, ends the channel.
        channel.pika.add_on_cancel_callback(
            lambda frame: channel._on_close(None, ConsumerCancelled(frame.method)))
        if confirm:
            channel.pika.add_on_return_callback(channel._on_return)
            await channel.call("confirm_delivery", channel._on_confirm)
        return channel

    async def close(self, timeout: float = 1.0) -> None:
        """Close the connection; wait `timeout` s at most for the broker's word."""
        self._kernel._end_turn()        # what is acknowledged goes out first
        if not (self.pika.is_closed or self.pika.is_closing):
            self.pika.close()
        await ignore_after(timeout, self.wait_closed())


class Channel(_Closable):
    """A channel; made by `await connection.channel()`."""

    def __init__(self, kernel: Kernel, connection: Connection) -> None:
        super().__init__(kernel)
        self.connection = connection
        self._published = 0
        # By number, in order: the future of the confirm, and the content (exchange,
        # routing key, correlation id, body) by which a returned message is known.
        self._unconfirmed: dict[int, tuple[Future, tuple]] = {}
        self._in_hand: dict[int, None] = {}     # tags, in the order of their delivery
        self._acknowledged: set[int] = set()    # tags that were not sent yet

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of pika's channel that takes `callback=`; return its answer.

        `await channel.call("queue_declare", queue="q", durable=True)`. Raises what
        closed the channel, or pika's ChannelWrongStateError, if it is closed.
        """
        if method == "basic_consume":
            args, kwargs = self._noting(*args, **kwargs)
        return await self._ask(getattr(self.pika, method), *args, **kwargs)

    # -- publishing, on a channel with confirms ----------------------------------------

    async def basic_publish(self, exchange, routing_key, body: bytes, properties):
        """Publish, mandatory, on a channel with `confirm`; wait for the confirm.

        Raises UnroutableError if no queue takes the message, NackError if the broker
        could not, and what closed the channel if that came first.
        """
        await self.connection._unblocked.wait()
        confirmed = self._promise()
        self.pika.basic_publish(exchange, routing_key, body, properties, mandatory=True)
        self._published += 1
        content = exchange, routing_key, properties.correlation_id, body
        self._unconfirmed[self._published] = confirmed, content
        await _future_wait(confirmed)

    # A returned message carries no number, but the broker returns a message before it
    # confirms it, and in order. So it is the oldest unconfirmed message with the same
    # content. If there are two of the same content, either may be the one.
    def _on_return(self, _channel, method, properties, body) -> None:
        content = method.exchange, method.routing_key, properties.correlation_id, body
        for confirmed, sent in self._unconfirmed.values():
            if sent == content and not confirmed.done():
                confirmed.set_exception(UnroutableError([method]))
                break

    def _on_confirm(self, frame) -> None:
        first = last = frame.method.delivery_tag
        if frame.method.multiple:       # this one and all before it
            first = next(iter(self._unconfirmed), last)
        for number in range(first, last + 1):
            confirmed, _content = self._unconfirmed.pop(number, (None, None))
            if confirmed is None or confirmed.done():
                continue        # it was returned, or its publisher was cancelled
            if isinstance(frame.method, pika.spec.Basic.Nack):
                confirmed.set_exception(NackError([]))
            else:
                confirmed.set_result(None)

    # -- consuming: acknowledgements are gathered --------------------------------------
    #
    # Each acknowledgement is a frame that pika makes and work for the broker: a large
    # part of what a message costs that is quickly done. But the broker takes one
    # acknowledgement for "this tag and all before it" (`multiple`). So `basic_ack`
    # only notes the tag, and at the end of the turn few acknowledgements go out for
    # many messages:
    #
    #     delivered      1  2  3  4  5  6  7
    #     acknowledged   x  x  x     x     x       one for 3 and before, one each for
    #                             ^                5 and 7, since 4 is still worked on
    #
    # For that the channel must know every delivery that is in hand, or `multiple`
    # would take messages along that nobody has acknowledged; hence `_noting`. A reply
    # that is written in the same turn still goes out before the acknowledgement.
    #
    # A message can be acknowledged only on the channel that delivered it. Once that is
    # gone, the broker has taken the message back, so there is nothing left to say.

    def _noting(self, queue, on_message_callback, auto_ack=False, **kwargs):
        def on_message(channel, method, properties, body) -> None:
            if not auto_ack:
                self._in_hand[method.delivery_tag] = None
            on_message_callback(channel, method, properties, body)

        return (queue, on_message, auto_ack), kwargs

    def basic_ack(self, delivery_tag: int) -> None:
        """Acknowledge a delivery; this goes out at the end of the turn, with others."""
        if not self._acknowledged:
            self._kernel._at_turn_end.append(self._send_acknowledged)
        self._acknowledged.add(delivery_tag)

    def basic_nack(self, delivery_tag: int) -> None:
        """Give a message back to its queue."""
        self._in_hand.pop(delivery_tag, None)
        if self.closed is None and self.pika.is_open:
            self.pika.basic_nack(delivery_tag)

    def _send_acknowledged(self) -> None:
        tags, self._acknowledged = self._acknowledged, set()
        if self.closed is not None or not self.pika.is_open:
            return
        for tag in tags:
            self._in_hand.pop(tag, None)
        oldest = next(iter(self._in_hand), FOREVER)       # of those still worked on
        if below := [tag for tag in tags if tag < oldest]:
            self.pika.basic_ack(max(below), multiple=True)
        for tag in sorted(tags.difference(below)):
            self.pika.basic_ack(tag)


class Link:
    """A connection that comes back for ever, with the topology declared anew each time.

    Without it, each restart of the broker would end the program, or leave it with a
    dead connection and in silence, as if there were nothing to do.

    `on_connect(connection, channel)` is a coroutine function that declares what the
    user needs and starts its consumers. Deliveries, replies and acknowledgements share
    that one channel, which is without confirms: the broker handles what is said on it
    in that order. Confirmed publishes have a second channel, so that an error there
    costs no delivery.
    """

    def __init__(self, urls: Iterable[str], on_connect: Callable, patient=True) -> None:
        self._urls = list(urls)
        self._on_connect, self._patient = on_connect, patient
        self._opening = Semaphore(1)        # one task at a time opens the publisher
        # The connection and the channels, while the link is up.
        self.connection = self.channel = self._publisher = None
        self.up = Event()
        # Whether there ever was a connection; whether the last one was soon lost again.
        self.ever_up = self.was_brief = False

    async def run(self) -> None:
        """Connect, and connect again whenever that ends, until cancelled.

        The first connection must not fail for reasons that waiting does not mend: a
        refusal (REFUSED), or a queue that exists with other arguments (pika's
        ChannelClosedByBroker); these are raised. Of a link that is not `patient`, the
        first connection must not fail at all. Everything later is tried again.
        """
        attempts, said = 0, ""      # `said` is the reason that was told last
        while True:
            try:
                await self._stay()
                said = ""
                attempts = attempts if self.was_brief else 0
            except AMQPError as exc:
                hopeless = isinstance(exc, (*REFUSED, ChannelClosedByBroker))
                if not self.ever_up and (hopeless or not self._patient):
                    raise
                if describe(exc) != said:
                    said = describe(exc)
                    log.warning("no connection to the broker: %s; trying again, at "
                                "most every %.0f s", said, MAX_BACKOFF)
            wait = min(MAX_BACKOFF, 0.5 * 2 ** min(attempts, 10))
            attempts += 1
            # Without chance in it, all apps would come back in the same moment.
            await sleep(wait * random.uniform(0.5, 1))

    async def _stay(self) -> None:
        """Connect, and stay connected as long as that lasts.

        Raises what keeps the connection from coming up, but not what ends it later.
        """
        connection = await Connection.open(self._urls)
        try:
            channel = await connection.channel()
            # A queue that has no leader just now answers nothing, for ever, on a
            # connection that is well. Another attempt finds out when it has one.
            async with ignore_after(MAX_BACKOFF) as timer:
                await self._on_connect(connection, channel)
            if timer.expired:
                raise AMQPConnectionError(f"no answer within {MAX_BACKOFF:g} s")
            log.log(logging.WARNING if self.ever_up else logging.INFO, "%s to %s:%d",
                    "reconnected" if self.ever_up else "connected",
                    connection.pika.params.host, connection.pika.params.port)
            self.connection, self.channel, self.ever_up = connection, channel, True
            began = await clock()
            await self.up.set()
            # A channel that dies alone (a timeout of the broker's, a consumer that was
            # cancelled) takes the connection with it: there is one way back.
            reason = await channel.wait_closed()
            self.was_brief = await clock() - began < MAX_BACKOFF
            log.warning("connection lost: %s; trying again", describe(reason))
        finally:
            self.up.clear()
            self.connection = self.channel = self._publisher = None
            await connection.close()

    async def publish(self, exchange, routing_key, body: bytes, properties) -> None:
        """Publish with confirm, as soon as there is a connection. Raises as
        `Channel.basic_publish` does; it is the caller who tries again."""
        await self.up.wait()
        async with self._opening:
            if self.connection is None:
                raise AMQPConnectionError("connection lost")
            if self._publisher is None or self._publisher.closed:
                self._publisher = await self.connection.channel(confirm=True)
            publisher = self._publisher
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
# still. It runs in a worker, which is a thread or a process of a pool, and its caller
# awaits it like anything else. Threads are cheap, but only one of them computes at any
# moment (Python's global interpreter lock, the GIL), and a thread cannot be killed.
# Processes compute side by side and can be killed, but function, arguments and result
# have to travel.
#
#     caller -> queue -> thread -> deque of the kernel, and a ring -> caller
#     caller -> deque -> socket of packets -> process -> socket -> caller
#
# Why not `concurrent.futures`? Its ProcessPoolExecutor breaks as a whole when one of
# its processes dies, and cannot kill the one that runs a call.
# =====================================================================================

# The sizes of the pools, unless somebody has made pools of other sizes for the kernel.
THREADS, PROCESSES = 20, os.cpu_count() or 1
WORKER_NAME = "sweepea-worker"      # of each worker process, as multiprocessing has it


def in_worker() -> bool:
    """Whether this process is a worker process.

    That can be asked from the start, even while the main module is being imported: by
    then multiprocessing has given the process its name, but not yet a parent.
    """
    # A worker process has imported multiprocessing before it imports anything of ours.
    multiprocessing = sys.modules.get("multiprocessing")
    return bool(multiprocessing) and (
        multiprocessing.current_process().name == WORKER_NAME)


async def run_in_thread(func: Callable, *args: Any) -> Any:
    """Run `func(*args)` in a pool thread; return its result or raise its exception.

    If the caller is cancelled before the function has begun, the call is taken back.
    Once it runs, its thread cannot be killed: the thread is abandoned, another one
    takes its place, and what the function brings in the end is thrown away.
    """
    kernel = await _get_kernel()
    pool = getattr(kernel, "thread_pool", None) or ThreadPool(kernel, THREADS)
    return await Call(pool, func, args).run()


async def run_in_process(func: Callable, *args: Any) -> Any:
    """Run `func(*args)` in a worker process; return its result or raise its exception.

    Function, arguments and result travel by pickle. If the caller is cancelled before
    the function has begun, the call is taken back. Once it runs, its process is killed,
    and with it whatever the function has started. Raises WorkerLost if the process dies
    that runs it, WorkerStartError if none can be started, and WorkerError in place of
    an exception that cannot be pickled; `__cause__` holds the remote traceback.
    """
    kernel = await _get_kernel()
    pool = getattr(kernel, "process_pool", None) or ProcessPool(kernel, PROCESSES)
    return await ProcessCall(pool, func, args).run()


class RemoteTraceback(Exception):
    """The traceback of a worker process, as text: the cause of what is raised here."""


class Call:
    """A call on its way through a thread. To the kernel it is a future.

    Two may want to decide its fate at the same moment, the thread that runs it and the
    kernel that takes it back. So there are two tickets, locks that are never released:
    whoever acquires a ticket first has it.

        begin_ticket    the thread has it: the function runs
                        the kernel has it: the call is taken back, and never runs
        end_ticket      the thread has it: the outcome counts
                        the kernel has it: the thread is abandoned in its midst

    `name` is what the log calls it. `thread` is the number of the thread that took it,
    at `began` by the kernel's clock, and was done with it at `ended`; else None.
    `place` is where it runs, in words.
    """

    place = "thread"
    thread = began = ended = outcome = error = alarm = None

    def __init__(self, pool: ThreadPool, func, args, limit: float | None = None):
        self.pool, self.func, self.args, self.limit = pool, func, args, limit
        self.name = getattr(func, "__qualname__", func)
        # The function sees the context variables of the task that calls it.
        self.context = contextvars.copy_context()
        self.begin_ticket, self.end_ticket = threading.Lock(), threading.Lock()

    async def run(self) -> Any:
        """Run the call; return its result or raise its error.

        Raises TimeoutError once it has run for more than `limit` seconds.
        """
        self.pool.pending += 1
        try:
            await _trap("trap_future_wait", self, None)
            if self.error is not None:
                raise self.error
            return self.outcome
        finally:
            self.pool.pending -= 1
            if self.alarm is not None:
                self.pool.loop.remove_timeout(self.alarm)
            del self    # or the error would hold the frame, and the frame the error

    def add_done_callback(self, callback: Callable) -> None:
        """The kernel waits now. Only now is there somebody to tell of the end, so only
        now the call goes out to the workers."""
        self.callback = callback
        if self.limit is not None:
            self.alarm = self.pool.loop.call_later(self.limit, self.on_alarm)
        self.pool.submit(self)

    def end(self, outcome: Any, error: BaseException | None) -> None:
        """Tell the kernel what came of the call."""
        self.outcome, self.error, self.ended = outcome, error, time.monotonic()
        self.callback(self)

    def take_back(self) -> bool:
        """Keep the call from ever beginning; False if it has begun."""
        return self.pool.take_back(self)

    def cancel(self) -> None:
        if not self.take_back():
            self.pool.abandon(self)

    # The limit counts from the moment in which the function begins, and nobody tells
    # the kernel of that moment. So the alarm is set to the earliest possible end. When
    # it comes, either the call has had its time or the alarm is set anew.
    def on_alarm(self) -> None:
        now = time.monotonic()
        left = self.limit if self.began is None else self.began + self.limit - now
        if left > 0:
            self.alarm = self.pool.loop.call_later(left, self.on_alarm)
        elif self.pool.abandon(self):
            self.end(None, TimeoutError(f"{self.limit:g} s"))


class ThreadPool:
    """The threads of a kernel. All take their calls from one queue, into which every
    call goes at once: a thread that is done goes on without asking the kernel."""

    def __init__(self, kernel: Kernel, size: int) -> None:
        self.loop, self.size = kernel.loop, size
        self.pending = 0                    # calls that somebody waits for
        self.abandoned: set[Call] = set()   # calls that run on, though nobody waits
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._threads = 0
        kernel.thread_pool = self
        kernel._call_at_shutdown(self.shutdown)

    def submit(self, call: Call) -> None:
        self._grow()    # This comes first, as it fails if the system gives no thread.
        self._calls.put(call)

    def _grow(self) -> None:
        if self._threads < min(self.size, self.pending):
            threading.Thread(target=self._work, daemon=True).start()
            self._threads += 1

    def _work(self) -> None:
        pid, thread = os.getpid(), threading.get_ident()
        while (call := self._calls.get()) is not None:
            if not call.begin_ticket.acquire(blocking=False):
                continue
            call.thread, call.began = thread, time.monotonic()
            outcome = error = None
            try:
                outcome = call.context.run(call.func, *call.args)
            except BaseException as exc:
                error = exc
            if os.getpid() != pid:
                # The function has forked, and this is the child, at its end. The child
                # leaves with the code of a SystemExit, or with 1 after another error.
                status = error.code if isinstance(error, SystemExit) else error and 1
                os._exit(status if isinstance(status, int) else bool(status))
            if not call.end_ticket.acquire(blocking=False):
                # The kernel has given up this thread, and lets another take its place.
                self.abandoned.discard(call)
                return
            call.end(outcome, error)
            del call, outcome, error        # hold on to nothing while waiting

    def take_back(self, call: Call) -> bool:
        """Keep the call from ever beginning; False if it has begun.

        The kernel takes both tickets, so a later `cancel` finds no thread to abandon.
        """
        return (call.begin_ticket.acquire(blocking=False)
                and call.end_ticket.acquire(blocking=False))

    def abandon(self, call: Call) -> bool:
        """Give up the thread that runs the call; False if the call is done after all.

        The call is first added, and taken out again if need be. The other way round the
        thread might take the call out before it is in.
        """
        self.abandoned.add(call)
        if not call.end_ticket.acquire(blocking=False):
            self.abandoned.discard(call)
            return False
        self._threads -= 1
        with suppress(RuntimeError):    # no thread to be had: `submit` tries again
            self._grow()
        log.warning("a thread was abandoned in %s, which still runs (%d of %d)",
                    call.name, len(self.abandoned), self.size)
        return True

    def shutdown(self) -> None:
        for _ in range(self._threads):
            self._calls.put(None)


# A worker process and its parent talk through two pairs of sockets. One is a queue of
# packets, one for each call, so that a process which is done with a call finds the next
# one there: it need not sleep, and nobody need wake it.
#
# A call that stands behind another must not be bound to it, which may be slow, or hang,
# or kill the process. So the parent holds both ends of the queue. What it reads there
# itself, it has taken back, for certain: a packet is read once. A process reads the
# next packet when it has sent the answer to the one before. So one call at most is
# neither in the queue nor answered. It is the first in the parent's list; or else the
# answers to all before it are on their way, and it is the last one that was taken.
#
#     the parent           its list     queue     the process
#     gives 1, 2, 3        1 2 3        2 3       runs 1
#                          1 2 3        3         has answered 1, runs 2
#     takes back           1 2                    runs 2; another one may run 3
#     reads the answer     2                      runs 2
#
# The answers come on the other pair, a stream: four bytes of length and a pickle. The
# end of the stream tells of the death of the process. Pickles are safe here and only
# here: the sockets have no name, and at the other end is our own program.

_HEAD = 4           # the bytes of the length
_PACKET = 1 << 15   # bytes, at most; what is larger goes into a file
_DEPTH = 8          # calls that a process has at once. If they were only 2, the process
                    # would be done with them before the parent comes round.

_numbers = itertools.count()


class ProcessCall(Call):
    """A call on its way through a process, or through several, if it is taken back.

    Raises at once if function and arguments cannot be pickled.
    """

    def __init__(self, pool: ProcessPool, func, args, limit: float | None = None):
        self.pool, self.limit = pool, limit
        # The number comes first, so that no two packets begin alike.
        self.pickled = pickle.dumps((next(_numbers), func, args))
        self.packet = self.pickled[:_PACKET]


def _process_main(sock: socket.socket, packets: socket.socket, call: bytes) -> None:
    """The life of a worker process: run a call, send what came of it, receive another.
    The first call comes along with the process."""
    # Ctrl-C goes to all processes of a terminal, and other signals to all of a service,
    # but the parent decides what happens.
    # These handlers do nothing. SIG_IGN would do the same, but programs that a job
    # starts would inherit it. What a job forks gets the default handlers, and loses our
    # sockets, or nobody would see this process die (chapter 6).
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
        _handled.add(number)
    for end in sock, packets:
        _connected.add(end.fileno())
        end.set_inheritable(False)      # by what `os.system` starts, say
        end.setblocking(True)           # whatever `socket.setdefaulttimeout` said
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    # What a job starts is in a process group that this process leads, and dies with it.
    # A daemon, which our parent has made of us, may not use multiprocessing; a job may.
    os.setpgrp()
    from multiprocessing import connection, current_process, parent_process
    current_process().daemon = False
    # A process that computes reads no socket, so a thread waits for the parent to die.
    sentinel = parent_process().sentinel
    threading.Thread(target=lambda: (connection.wait([sentinel]), _leave()),
                     daemon=True).start()
    while True:
        try:
            _number, func, args = pickle.loads(call)
            # What the call sets in its context shall not be there in the next one.
            run_in_context = contextvars.copy_context().run
            reply = pickle.dumps((True, run_in_context(func, *args)))
        except BaseException as exc:
            reply = _pickled_exception(exc)
        sock.sendall(len(reply).to_bytes(_HEAD, "big") + reply)
        call = func = args = reply = None       # hold on to nothing while waiting
        call, files, *_ = socket.recv_fds(packets, _PACKET, 1)
        for number in files:
            with open(number, "rb") as file:
                file.seek(0)
                call = file.read()


def _leave() -> None:
    """End this worker process, and with it all that its jobs have started."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _kill(process) -> None:
    """Kill a worker process, and with it all that its jobs have started.

    Not for one that was seen to be dead some time ago: its number may be another's.
    """
    with suppress(OSError):         # it is too young to lead a group
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _pickled_exception(exc: BaseException) -> bytes:
    summary = traceback.TracebackException.from_exception(exc)
    text = "".join(summary.format())
    try:
        reply = pickle.dumps((False, (exc, text)))
        pickle.loads(reply)     # some can be pickled and not unpickled
        return reply
    except Exception:           # the summary gets by even if str(exc) raises
        error = WorkerError(f"{type(exc).__name__}: {summary}")
        return pickle.dumps((False, (error, text)))


class _Worker:
    """A worker process, as its parent sees it."""

    is_dead = False

    def __init__(self, first: bytes) -> None:
        # Here, because the import takes long.
        from multiprocessing import get_context, resource_tracker
        self.calls: deque[ProcessCall] = deque()    # without an answer
        self._data = bytearray()                    # what came and was not used yet
        self.sock, theirs = socket.socketpair()
        self.sock.setblocking(False)
        self._give, self._packets = socket.socketpair(type=socket.SOCK_DGRAM)
        self._give.setblocking(False)
        # The child has this end, too, and whether it blocks is set for both.
        self._packets.setblocking(True)
        # Without this, macOS takes no packets of that size.
        self._give.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _DEPTH * _PACKET)
        self._packets.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _DEPTH * _PACKET)
        # multiprocessing hands the numbers of the sockets on to the new process.
        self.process = get_context("spawn").Process(
            target=_process_main, args=(theirs, self._packets, first),
            name=WORKER_NAME, daemon=True)
        # SIGINT and SIGTERM are blocked until the child has its handlers, or a Ctrl-C
        # in between would end it. Along with the first child multiprocessing starts a
        # helper of its own, which must not be born with blocked signals.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(
            signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
        self.place = f"process {self.process.pid}"

    def give(self, call: ProcessCall) -> bool:
        """Give the process a call, for now or for later; False if there is no room."""
        if len(self.calls) == _DEPTH:
            return False
        try:
            if len(call.pickled) <= _PACKET:
                self._give.send(call.packet)
            else:
                # The packet carries the open file along, which has no name.
                import tempfile                     # here, as few need it
                with tempfile.TemporaryFile(buffering=0) as file:
                    file.write(call.pickled)
                    socket.send_fds(self._give, [call.packet], [file.fileno()])
        except OSError as exc:
            if not self.calls:      # else the queue may be full
                call.end(None, exc)
            return not self.calls
        self.calls.append(call)
        if len(self.calls) == 1:
            self.begin()
        return True

    def begin(self) -> None:
        """The process begins its first call, if any, as far as we know here."""
        if self.calls:
            call = self.calls[0]
            call.began, call.place = time.monotonic(), self.place

    def take_back(self, waiting: deque[ProcessCall]) -> None:
        """Take back what the process has not begun, to the front of what waits."""
        packets = []
        with suppress(BlockingIOError):
            while True:
                packets.append(self._packets.recv(_PACKET, socket.MSG_DONTWAIT))
        for call in list(reversed(self.calls)):
            if call.packet in packets:
                call.began = None
                self.calls.remove(call)
                waiting.appendleft(call)

    async def receive(self) -> tuple[Any, BaseException | None]:
        """Wait for the next answer: a result, or None and an error. If the process is
        dead, return None and WorkerLost."""
        data = self._data
        # The head says how many bytes come after it. A head cut short reads as some
        # number from 0 on, and the data are shorter than a head, so the loop goes on.
        while len(data) < (end := _HEAD + int.from_bytes(data[:_HEAD], "big")):
            await read_wait(self.sock)
            chunk = self.sock.recv(1 << 16)
            if not chunk:
                self.is_dead = True
                return None, await self._obituary()
            data += chunk
        self._data = data[end:]
        try:
            is_fine, answer = pickle.loads(data[_HEAD:end])
        except BaseException as exc:
            return None, exc
        if is_fine:
            return answer, None
        error, text = answer
        error.__cause__ = RemoteTraceback("\n" + text)
        return None, error

    async def _obituary(self) -> WorkerLost:
        # The socket closes a little before the process is gone, and the exit code is
        # there only after that. A process that closed its socket may even live on.
        await ignore_after(1.0, read_wait(self.process.sentinel))
        await io_release(self.process.sentinel)
        _kill(self.process)
        self.process.join()
        code = self.process.exitcode
        if code >= 0:
            return WorkerLost(f"worker process left with exit code {code}")
        names = {known.value: known.name for known in signal.Signals}
        name = names.get(-code, f"signal {-code}")      # a few have no name
        return WorkerLost(f"worker process died of {name}")

    async def close(self) -> None:
        """Kill the process, whatever it does."""
        if self.process.is_alive():
            _kill(self.process)
        await io_release(self.sock)
        for sock in self.sock, self._give, self._packets:
            sock.close()


class ProcessPool:
    """The worker processes of a kernel, started with the `spawn` method.

    Each new process runs `initializer(*initargs)` before its first call; `int()` does
    nothing, but shows that the process is there.
    """

    def __init__(self, kernel: Kernel, size: int, initializer=int, initargs=()) -> None:
        self.loop, self.size = kernel.loop, size
        self.pending = 0                    # calls that somebody waits for
        self._kernel = kernel
        self._first = pickle.dumps((None, initializer, initargs))
        self._waiting: deque[ProcessCall] = deque()     # given to no process
        self._serving = 0                   # tasks that have a process, or start one
        self._workers: set[_Worker] = set()     # those that have started
        # multiprocessing itself holds on to those that live, and to no others.
        self._processes = weakref.WeakSet()
        kernel.process_pool = self
        kernel._call_at_shutdown(self.shutdown)
        # Python joins its children before it exits. Ours end only when they are killed.
        atexit.register(self.shutdown)

    def submit(self, call: ProcessCall) -> None:
        self._waiting.append(call)
        self._feed()

    def _feed(self) -> None:
        """Give calls to the processes, first to those that are idle."""
        if self._waiting and self._serving < min(self.size, self.pending):
            self._serving += 1
            self._kernel._spawn(self._serve())
        while self._waiting and self._workers:
            idlest = min(self._workers, key=lambda worker: len(worker.calls))
            if not idlest.give(self._waiting[0]):
                break
            self._waiting.popleft()

    def take_back(self, call: ProcessCall) -> bool:
        """Keep the call from ever beginning; False if it has begun."""
        for worker in self._workers:
            if call in worker.calls:
                worker.take_back(self._waiting)
        is_back = call in self._waiting
        if is_back:
            self._waiting.remove(call)
        self._feed()
        return is_back

    def abandon(self, call: ProcessCall) -> bool:
        """Kill the process that runs the call; False if the call is done after all."""
        for worker in self._workers:
            if call in worker.calls:
                worker.take_back(self._waiting)
                if call in self._waiting:   # the process hangs: it has not read it
                    self._waiting.remove(call)
                    worker.calls.append(call)
                # If another one is the last, the answer to this one is on its way.
                runs = worker.calls[-1] is call
                if runs:
                    worker.calls.pop()
                    self._workers.discard(worker)
                    _kill(worker.process)
                self._feed()
                return runs
        return False

    async def _serve(self) -> None:
        """Have a process, from its start to its end. It has three tries to start."""
        for pause in 0, 0.5, 2.0:
            await sleep(pause)
            error = await self._run_worker()
            if error is None:
                break
        # Calls that were given to other processes meanwhile may stand behind slow ones.
        # They are waiting calls again, and `_feed` starts a process for these.
        for worker in self._workers:
            worker.take_back(self._waiting)
        if error is not None and self._waiting:
            text = f"no worker process can be started: {error!r}"
            failure = WorkerStartError(text)
            failure.__cause__ = error
            self._waiting.popleft().end(None, failure)
        self._serving -= 1
        self._feed()

    async def _run_worker(self) -> BaseException | None:
        """Start a process, and pass on what it answers, as long as it lives. Return
        None then; or else the error that kept it from starting."""
        try:
            worker = _Worker(self._first)
        except OSError as exc:
            return exc
        self._processes.add(worker.process)
        try:
            _, error = await worker.receive()
            if error is not None:
                return error
            self._workers.add(worker)
            while not worker.is_dead:
                if not worker.calls and not self._waiting:
                    # No call may stand behind another one while a process is idle.
                    busiest = max(self._workers, key=lambda worker: len(worker.calls),
                                  default=worker)
                    if len(busiest.calls) > 1:
                        busiest.take_back(self._waiting)
                self._feed()
                outcome = await worker.receive()
                if worker.is_dead:
                    worker.take_back(self._waiting)
                if worker.calls:        # else it was idle when it died
                    worker.calls.popleft().end(*outcome)
                    worker.begin()
                del outcome             # hold on to nothing while waiting
            return None
        finally:
            self._workers.discard(worker)
            await worker.close()

    def shutdown(self) -> None:
        """Kill all and wait for their end."""
        atexit.unregister(self.shutdown)
        for process in self._processes:
            if process.is_alive():
                _kill(process)
        for process in self._processes:
            process.join()
