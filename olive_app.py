"""Olive: a tiny task-queue application on Sweepea.

    from olive_app import OliveAppConfig, OliveOly, task

    @task
    def resize(path, width): ...

    if __name__ == "__main__":
        OliveOly(OliveAppConfig.from_env()).start()

Functions marked with `@task` are run for messages that come from RabbitMQ: in threads,
in processes or, if they are coroutines, on the kernel itself. The messages are those of
Celery (protocol 2). `python olive_app.py --help` says how to run the demo tasks.

The promise is at-least-once: a message leaves its queue only when its work is done and
its reply sent, when a copy is confirmed (in the dead queue, or where it waits to be
tried again), or when it has expired. Without the promise a task queue takes a page.
That page comes first, and what can go wrong after it:

    The app             the plain life of a message; what can go wrong, one by one;
                        starting, stopping, being seen
    The log and the     what a person sees of a run
        timeline
    Tasks               functions that may be called by name
    Running a job       bytes in, bytes out, wherever the job runs
    Calling             who sends the messages, and waits for the replies
    Messages            what their properties say, and how they are published again
    The ladder          messages that wait, inside the broker
    Settings            one table
    The command         python olive_app.py

What a message asks for is called a job here, since a task is also what the kernel runs.

Copyright (c) 2026 the Sweepea authors. SPDX-License-Identifier: MIT
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Ctrl-C during the imports, and at the end, ends the program without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import base64
import copy
import functools
import gc
import importlib
import inspect
import json
import logging
import math
import os
import random
import sys
import time
import traceback
import uuid
from collections import Counter, deque
from concurrent.futures import Future
from contextlib import closing, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from datetime import date, datetime, time as time_of_day, timedelta, timezone
from decimal import Decimal
from typing import Any, Callable, Mapping, NamedTuple
from urllib.parse import urlsplit

import pika
from pika.exceptions import (
    AMQPConnectionError, AMQPError, ChannelClosedByBroker, ChannelWrongStateError,
    ConsumerCancelled, NackError)

if __package__:         # the files were copied into a package
    from . import sweepea
else:
    import sweepea

describe, Event, ignore_after = sweepea.describe, sweepea.Event, sweepea.ignore_after
sleep, spawn = sweepea.sleep, sweepea.spawn

log = logging.getLogger("olive")

ISOLATED, BURIED = 5, 15    # times that a message came back: "a message that kills us"
PATIENCE = 180.0            # seconds that a job waits for its message to come back


# =====================================================================================
# The app
#
# One coroutine per message (`_live`), from its delivery to its acknowledgement:
#
#     delivered --> the job is run --> the reply is sent --> acknowledged
#
# That is the plain life of a message, and the first section of the class below. All the
# other sections are there because that life can be cut short at every arrow. What they
# use is explained behind the class: `Outcome`, `_failure` and `_perform` in "Running a
# job", `Client` in "Calling", `Job` in "Messages". Until a message is acknowledged the
# broker holds it for us, and so nothing is lost:
#
#     if we die ...                    the message           the job       the caller
#     before the job is run            to somebody else      runs once     gets a reply
#     while it runs                    to somebody else      runs again    gets a reply
#     after it, before the reply       to somebody else      runs again    gets a reply
#     after the reply                  to somebody else      runs again    gets two
#     after the acknowledgement        is gone               ran once      gets a reply
#     after a copy is published        both may be there     may run twice
#
# Some words have one meaning each below. A `Job` is a message in hand and what it asks
# for; the section "Messages" has a picture of its states. A *worker* is a thread or a
# process of the pools. A message is *settled* when it is acknowledged after the reply,
# or after a copy was confirmed. To *bury* a message is to settle it by a copy in the
# dead queue. To *let a job go* is to drop it: nobody here will settle its message. A
# message is *given back* to its queue by a nack; the end of a connection gives back all
# that is in hand. To *give up* a message is to await it no longer.
# =====================================================================================

class OliveOly:
    """The app. `OliveOly(config).start()` runs until it is told to stop.

    config: the settings; by default the default ones. The modules in `config.tasks` are
    imported at once. If one of them cannot be, the program ends with a line that says
    why, and exit status 2.
    """

    # What the app knows of its messages; a job may be in several of these at once:
    #
    #     _in_hand          all, from delivery until they are settled or let go
    #     _awaited, _room   by key: those that lost their message with a connection and
    #                       shall get it again; and the room where they wait for that
    #     _callers          by queue: those that wait for calls of theirs, and for how
    #                       many calls each. `_callers_changed` is set at each change.
    #     _settled          is set whenever a message is settled
    #     _consumers        our consumers, in the order of their start: the queue of
    #                       each, by its tag

    def __init__(self, config: OliveAppConfig | None = None) -> None:
        self.config = config or OliveAppConfig()
        self._stop, self._exit_status = Event(), 0
        self._in_hand: set[Job] = set()
        self._awaited: dict[tuple, Job] = {}
        self._room = sweepea.SchedBarrier()
        self._settled = Event()
        # The main queue comes last, for a message of it may end the connection at once.
        self._calls_queue = calls_name(self.config.queue)
        self._queues = self._calls_queue, self.config.queue
        self._consumers: dict[str, str] = {}
        self._callers = {queue: Counter() for queue in self._queues}
        self._callers_changed = Event()
        self._trace = Trace("" if sweepea.in_worker() else self.config.trace)
        self._totals = dict(done=0, failed=0, retried=0, dead=0)
        self._samples: deque = deque(maxlen=10)     # of how much is done; see `_tick`
        for module in self.config.tasks:
            try:
                load_tasks(module)
            except (Exception, SystemExit) as exc:
                where = traceback.extract_tb(exc.__traceback__)[-1]
                fail(f"OLIVE_TASKS: {module}: {type(exc).__name__}: {exc} "
                     f"({where.filename}:{where.lineno})", 2)

    # -- the plain life of a message ---------------------------------------------------

    def _on_message(self, queue, channel, _pika, method, properties, body) -> None:
        """A message is delivered: a kernel task of its own lives its life."""
        if self._stop.is_set():
            return          # the end of the connection gives the message back
        job = Job(queue, Delivery(channel, method.delivery_tag), properties, body)
        if method.redelivered:          # Is it in hand? How often has it come back?
            if self._came_back(job):
                return
            self._count_returns(job)
        self._in_hand.add(job)
        job.kernel_task = self._kernel._spawn(self._live(job))

    async def _live(self, job: Job) -> None:
        """Find out what the message asks for, do it, and settle the message."""
        _here.set((self, job))          # for the functions `call` and `send`
        try:
            if await self._admit(job):
                outcome = await self._run(job)
                job.begun = True        # A worker has begun it without telling us.
                self._note_end(job, outcome.status)
                if outcome.status != "done":
                    return await self._retry_or_bury(job, outcome)
                if outcome.exc_type:    # the job is done, but its result cannot be sent
                    log.warning("%s: %s", job, _shown(outcome.text))
                await self._reply_and_ack(job, outcome.reply)
        except Exception as exc:        # a fault of ours must not hold the message
            log.exception("%s: a fault of the app", job)
            await self._bury(job, _failure("failed", None, exc))
        except sweepea.TaskCancelled:   # let go, or cut short by the end of the app
            self._note_end(job, "cut short")
            raise
        finally:
            self._in_hand.discard(job)
            job.kernel_task = None      # or task, context and job hold each other

    async def _run(self, job: Job) -> Outcome:
        """Run the job where it belongs: on the kernel, in a thread, in a process."""
        registered = TASKS[job.task]
        kind = self._kind(registered)
        limits = [limit for limit in (registered.timeout, job.limit) if limit]
        limit = min(limits, default=self.config.task_timeout)
        info = JobInfo(job.id, job.task, job.retries, job.headers.get("x-olive-sent"))
        what = info, job.body, job.properties.reply_to      # what `_perform` takes
        try:
            if kind == "coroutine":
                return await self._run_coroutine(job, what, limit)
            if kind == "process":
                return await self._run_in_process(job, what, limit)
            if job.isolated:    # a job for a thread, but see "a message that kills us"
                outcome = await self._run_in_process(job, what, limit)
                if outcome.status != "unknown-task":
                    return outcome
            call = sweepea.Call(self._threads, _execute, what, limit)
            job.worker_call, call.name = call, job
            return await call.run()
        except TimeoutError:
            return _failure("timeout", job.id, TimeLimitExceeded(f"{limit:g} s"))
        except sweepea.WorkerLost as exc:
            return _failure("worker-lost", job.id, WorkerLostError(str(exc)))
        except sweepea.WorkerStartError as exc:
            # The message is not at fault. The end of the connection gives it back.
            log.error("%s: stopping, to be started afresh", exc)
            self.stop(1)
            raise sweepea.TaskCancelled("no worker") from None
        except Exception as exc:
            return _failure("failed", job.id, exc)

    def _kind(self, registered: OliveTask) -> str:
        """Where the jobs of a task run: "coroutine", "thread" or "process"."""
        if _is_coroutine(registered.function):
            return "coroutine"
        return registered.worker or self.config.worker

    async def _run_coroutine(self, job: Job, what: tuple, limit) -> Outcome:
        """Run a job on the kernel; raises TimeoutError after `limit` seconds."""
        self._begin(job)
        job.at("coroutine")
        job.kernel_task.name = str(job)     # a task that blocks the loop is named
        if limit is None:
            outcome = await _perform(*what)
            # `_perform` makes a failure even of a cancellation. If the app cancelled
            # the job, that is raised again: a stop must not count as a failed try.
            if job.kernel_task.cancelled:
                raise sweepea.TaskCancelled
            return outcome
        # A coroutine may swallow its cancellation. So it runs in a task of its own, and
        # its message need not wait for it.
        child = await spawn(_perform(*what))
        child.name = str(job)
        try:
            await ignore_after(limit, child.wait())
            if child.terminated:
                return child.result
            raise TimeoutError
        finally:
            await child.cancel(blocking=False)

    async def _run_in_process(self, job: Job, what: tuple, limit) -> Outcome:
        """Run a job in a worker process, as soon as one is free."""
        call = sweepea.ProcessCall(self._processes, _execute_in_child,
                                   (_module(TASKS[job.task]), *what), limit)
        job.worker_call = call
        return await call.run()

    async def _reply_and_ack(self, job: Job, reply: bytes | None) -> None:
        """Send the reply, if one is wanted, then acknowledge, on one channel. If the
        message was given up, there is nothing to acknowledge.

        The broker handles what is said on a channel in order. So the broker, as long as
        it lives, never forgets a message whose reply it does not have yet. Nobody
        confirms the reply: for that the reply would have to travel on another channel
        and the acknowledgement to wait for it, which costs each message a round trip.
        """
        has_message = await self._has_message(job)
        if not has_message and not self._stop.is_set():
            await self._link.up.wait()
        channel = job.delivery.channel if has_message else self._link.channel
        address = job.properties.reply_to
        # A direct reply-to is no queue, and a malformed one has the broker close the
        # connection. That may be why an isolated message came back so often.
        if job.isolated and address and address.startswith("amq.rabbitmq.reply-to"):
            address = None
        if reply and address and channel and channel.pika.is_open:
            channel.pika.basic_publish("", address, reply, pika.BasicProperties(
                content_type="application/json", content_encoding="utf-8",
                delivery_mode=2, correlation_id=job.properties.correlation_id))
        if has_message:
            channel.basic_ack(job.delivery.tag)
            if not self._settled.is_set():
                await self._settled.set()

    # -- what can go wrong: the message ------------------------------------------------
    #
    # Anybody may send us anything. What makes no sense must neither stop the app nor
    # come back for ever. Without this section, one message without a header `task`
    # would be an exception in `_live`, would never be acknowledged, and would come
    # again after each restart. So it is put into the dead queue with the reason, where
    # a person can look at it, and its sender is told. The header x-olive-reason says:
    #
    #     malformed      it makes no sense, or its arguments do not fit  not tried again
    #     unknown-task   no task of that name is known                   not tried again
    #     unsupported    it asks for a canvas of Celery's                not tried again
    #     failed         the task raised                                 `retries` times
    #     timeout        the task ran longer than it may                 `retries` times
    #     worker-lost    the worker process died                         once at least
    #     returned       it came back 15 times                           not tried again
    #
    # `failed` is also what expired after a failed try, and what met a fault of the app;
    # neither is tried again. A message that is isolated (see "a message that kills us")
    # gets no extra try when its process dies. Of a `returned` one nobody is told.

    async def _admit(self, job: Job) -> bool | None:
        """True if a job is to run now. Else its message is settled here: buried, put on
        the ladder, or answered."""
        try:
            job.read()
        except ValueError as exc:
            if job.times_back < BURIED:
                bad = _failure("malformed", None, exc.with_traceback(None))
                return await self._bury(job, bad)
        if job.times_back >= BURIED:
            error = RuntimeError(f"came back {job.times_back} times: does it kill us?")
            # There is no reply, for even that may be what kills us.
            returned = _failure("returned", None, error)._replace(reply=b"")
            return await self._bury(job, returned)
        now = datetime.now(timezone.utc) if job.expires or job.eta else None
        if job.expires and now > job.expires:
            text = "expired"
            if job.retries:     # what went wrong before must not be lost
                text = f"expired after a failed try: {job.headers.get('x-olive-error')}"
            late = _failure("failed", job.id, TaskRevokedError(text), "REVOKED")
            if job.retries:
                return await self._bury(job, late)
            log.info("%s has expired", job)
            return await self._reply_and_ack(job, late.reply)
        wait = (job.eta - now).total_seconds() if job.eta else 0
        if wait >= 1:
            return await self._delay(job, wait)
        if wait > 0:
            await sleep(wait)           # The ladder has no rung so short.
        if job.task.startswith("celery."):
            exc = Unsupported(f"{job.task} is not supported: {INSTEAD}")
            return await self._bury(job, _failure("unsupported", job.id, exc))
        if job.task not in TASKS:
            exc = NotRegistered(job.task)
            return await self._bury(job, _failure("unknown-task", job.id, exc))
        return True

    async def _bury(self, job: Job, outcome: Outcome) -> None:
        """Put a message into the dead queue with the reason, and tell its sender."""
        reason, reply, exc_type, text, trace = outcome
        is_dead = await self._move(job, "", self.config.dead_queue, reply, **{
            "x-olive-reason": reason, "x-olive-traceback": trace,
            "x-olive-error": f"{exc_type}: {text}"[:MAX_ERROR],
            "x-olive-when": datetime.now(timezone.utc).isoformat(timespec="seconds")})
        if is_dead:                     # or else the message is somebody else's now
            self._totals["dead"] += 1
            log.warning("%s is dead (%s): %s: %s%s", job, reason, exc_type,
                        _shown(text), _shown_lines(trace))

    async def _move(self, job: Job, exchange, key, reply=None, **changes) -> bool:
        """Publish a copy of a message, some headers changed; then settle the message.
        False if nothing was published, since the message is not in hand.

        The message is acknowledged when the broker has confirmed the copy, and not
        before. So at every moment the broker has one of the two, and sometimes both.
        """
        self._begin(job)
        if job.isolated:
            changes["x-olive-isolated"] = True      # the copy's own count begins at 0
        properties, pause = republished(job.properties, **changes), 0.1
        while await self._has_message(job):
            job.at("waits for the broker")
            try:
                await self._link.publish(exchange, key, job.body, properties)
            except AMQPError as exc:
                await sleep(pause)
                pause = min(2 * pause, sweepea.MAX_BACKOFF)
                await self._declare_anew(exchange or key, describe(exc))
                continue
            if await self._has_message(job):
                await self._reply_and_ack(job, reply)
            return True
        return False

    async def _declare_anew(self, target: str, reason: str) -> None:
        """Declare everything again: somebody may have deleted what we publish to."""
        # A declaration that fails closes its channel, which must not be that of the
        # deliveries.
        if self._link.connection is None:
            return                      # the link says so, and declares everything anew
        log.warning("could not publish to %s: %s; trying again", target, reason)
        try:
            channel = await self._link.connection.channel()
            await declare_topology(channel, self.config)
            channel.pika.close()
        except AMQPError as exc:
            log.warning("could not declare the topology: %s", describe(exc))

    # -- what can go wrong: the task ---------------------------------------------------
    #
    # Without this, each hiccup of a network or of a database would end a job for good,
    # though the job would succeed a little later. So a job that failed is tried again,
    # as often as its task says, after a pause that doubles each time. Chance makes the
    # pause longer by up to a quarter, and so a thousand jobs that failed together do
    # not come back together. The pause is spent in the broker (see "The ladder"), for
    # here the message would hold a place in the window.

    async def _retry_or_bury(self, job: Job, outcome: Outcome) -> None:
        """Have a job that failed tried again, or bury it."""
        # A thread that hangs cannot be killed, only replaced, and it keeps what it has.
        # A supervisor can do more than we can: it starts the program afresh.
        if len(self._threads.abandoned) >= self._threads.size:
            log.error("every thread hangs in a task that does not end: stopping, to be "
                      "started afresh")
            self.stop(1)
        registered = TASKS[job.task]
        retries = registered.retries
        if outcome.status == "worker-lost" and not job.isolated:
            # The kernel's OOM killer, say, may have picked this process because others
            # used the memory. A job that was isolated has no such excuse.
            retries = max(retries, 1)
        may_retry = outcome.status in ("failed", "timeout", "worker-lost")
        pause = registered.retry_delay * 2 ** min(job.retries, 20)
        pause *= random.uniform(1, 1.25)
        eta = datetime.now(timezone.utc) + timedelta(seconds=pause)
        is_late = job.expires is not None and eta > job.expires
        if not may_retry or job.retries >= retries or is_late:
            return await self._bury(job, outcome)
        log.info("%s: %s: %s; try %d of %d in %.1f s", job, outcome.exc_type,
                 _shown(outcome.text), job.retries + 2, retries + 1, pause)
        self._totals["retried"] += 1
        self._trace.add("i", "retry", s="p", args={"task": job.task, "id": job.id})
        await self._delay(job, pause, retries=job.retries + 1, eta=eta.isoformat(), **{
            "x-olive-error": f"{outcome.exc_type}: {outcome.text}"[:MAX_ERROR]})

    async def _delay(self, job: Job, seconds: float, **changes: Any) -> None:
        """Have a copy of the message come back later. If that is in less than a second,
        the copy falls straight through the ladder, and `_admit` sleeps the rest."""
        key = wait_key(seconds, job.queue)
        await self._move(job, wait_name(LADDER - 1), key, **changes)

    # -- what can go wrong: a message that kills us ------------------------------------
    #
    # Without this, a job that crashes the whole process (a segfault in a C library)
    # crashes each app that gets its message, and the broker hands it out for ever. We
    # need not count: a quorum queue counts how often a message came back, whatever the
    # reason was (a crash, a lost connection, a stop).
    #
    #     0 ... 4     as usual
    #     5 ... 14    in a worker process, even if it is a job for a thread. If it
    #                 kills, it kills that process alone, and ends as `worker-lost`. The
    #                 innocent that came back along with it are simply done. A copy of
    #                 the message says that it is isolated, as its count begins at 0.
    #     15          to the dead queue, before RabbitMQ 4 drops it at 20. What comes so
    #                 far does not run in a worker: a coroutine, which needs the kernel,
    #                 or a message or a reply that we or the broker choke on.
    #
    # The price: a classic queue does not count, and has no such protection.

    def _count_returns(self, job: Job) -> None:
        returns = job.headers.get("x-delivery-count")
        # In any other queue the header may be the sender's.
        if self.config.counts_returns and isinstance(returns, int):
            job.times_back = returns
            job.isolated = job.isolated or returns >= ISOLATED

    # -- what can go wrong: the connection. Work in hand outlives it -------------------
    #
    # Without this, whatever runs when the connection is lost would run again, for the
    # broker takes its messages back and delivers them again, mostly to us. So what runs
    # goes on, and its message, when it comes, is handed to the job in hand. What has
    # not begun is let go at once, as the broker may give it to somebody who is free.
    #
    # A job that is done before its message is back waits for it. If the message does
    # not come, somebody else has got it and does it again. Then a success still sends
    # its reply, but a failure is not told and no copy is published, or each loss would
    # make two messages of one. How long does a job wait? While the network is silent,
    # the broker keeps the old delivery until it misses our heartbeats: three minutes.
    #
    # An acknowledgement that was under way when the connection was lost is lost, too:
    # then the job is done again, as at-least-once allows.
    #
    # A connection has three moments that matter to what is in hand:
    #
    #     it is there       what the one before has left in hand awaits its message
    #     PATIENCE later    what is not back by now is given up
    #     it is lost        what has not begun is let go

    def _await_messages(self) -> None:
        """On a new connection, before the first delivery: note what awaits its own."""
        for job in self._in_hand:
            if job.delivery and job.delivery.channel.closed:
                # Two jobs of one key cannot be told apart, so only one awaits its own.
                if self._awaited.setdefault(job.key, job) is not job:
                    job.delivery = None

    async def _guard(self, channel: sweepea.Channel) -> None:
        """Watch over what is in hand, from the start of a connection to its end."""
        await self._room.wake()
        await ignore_after(PATIENCE, channel.wait_closed())
        if channel.closed is None:
            for job in self._awaited.values():
                job.delivery = None
            self._awaited.clear()
            await self._room.wake()
            await channel.wait_closed()
        deleted = None      # a queue of ours, if it is gone and its consumer with it
        if isinstance(channel.closed, ConsumerCancelled):
            deleted = self._consumers.get(channel.closed.args[0].consumer_tag)
        for job in list(self._in_hand):
            await self._let_go_unless_begun(job)
            if job.queue == deleted:
                job.delivery = None     # the message went with the queue
        await self._callers_changed.set()   # `_keep_places` sees that its time is over

    def _came_back(self, again: Job) -> bool:
        """Hand a delivery to the job in hand that awaits it, if there is one."""
        if job := self._awaited.pop(again.key, None):
            job.delivery = again.delivery
            self._kernel._spawn(self._room.wake())
        return job is not None

    async def _has_message(self, job: Job) -> bool:
        """Whether a job can settle its message; waits while the message is awaited."""
        while job.delivery and job.delivery.channel.closed:
            if self._stop.is_set():
                return False            # a stop does not wait for messages
            job.at("waits for its message")
            await self._room.suspend("MESSAGE_WAIT")
        return job.delivery is not None

    async def _let_go_unless_begun(self, job: Job) -> None:
        """Let a job go if it has not begun."""
        # Whether a job for a worker has begun, its call alone knows.
        if not job.begun and (job.worker_call is None or job.worker_call.take_back()):
            await self._let_go(job)

    async def _let_go(self, job: Job) -> None:
        """Drop a job: give its message back, and cancel it wherever it waits."""
        if job.delivery:        # Without one, somebody else has the message, or may.
            # On a channel that is closed this does nothing.
            job.delivery.channel.basic_nack(job.delivery.tag)
        job.delivery = job.worker_call = None
        await job.kernel_task.cancel(blocking=False)

    def _begin(self, job: Job) -> None:
        """Note that a job begins: if it were let go after this, it would run twice."""
        if job.delivery is None:
            # The job was let go in the moment in which it was woken. Its cancellation
            # is pending, and would come only when something has begun and waits.
            raise sweepea.TaskCancelled("let go")
        job.begun = True

    # A message can end a connection: pika cannot decode every header that a broker lets
    # through, and then fails from inside. Without what follows, such a message would
    # come back each time with a window full of others, whose counts would rise with it.
    # So after a connection that did not last, a consumer may hold one message only, and
    # twice as many each time that something was settled. The innocent are done before
    # the window is wide again, and in the end the killer comes back alone. If nothing
    # is settled for a while, all that is in hand may be long jobs, and the window
    # becomes what it was. A consumer's window cannot be changed, so each time another
    # consumer is started beside it, which may hold as many as those before together.

    async def _consume(self, channel: sweepea.Channel, queue: str, window: int) -> None:
        """Start a consumer of a queue, which may hold so many messages."""
        # The window is for the consumers that are started after it is set. pika sends
        # both in one go, so nobody else's consumer comes between them.
        channel.pika.basic_qos(prefetch_count=window)
        frame = await channel.call("basic_consume", queue, functools.partial(
            self._on_message, queue, channel))
        self._consumers[frame.method.consumer_tag] = queue

    async def _tend(self, channel: sweepea.Channel, window: int) -> None:
        """See to the consumers of a connection until its end."""
        with suppress(AMQPError):       # if the connection is lost, the link says so
            await self._link.up.wait()
            await self._widen(channel, window)
            await self._keep_places(channel)

    async def _widen(self, channel: sweepea.Channel, window: int) -> None:
        """Bring the window of each queue, which is narrow, to its full size."""
        while window < self.config.prefetch:
            self._settled.clear()
            async with ignore_after(sweepea.MAX_BACKOFF) as timer:
                await self._settled.wait()
            left = self.config.prefetch - window
            more = left if timer.expired else min(window, left)
            for queue in self._queues:
                if not self._stop.is_set():
                    await self._consume(channel, queue, more)
            window += more

    # -- what can go wrong: callers wait for jobs that nobody takes --------------------
    #
    # A task may call tasks (`call`), and a coroutine that waits for their results costs
    # nothing. But its message stays in hand. Without this, its calls would stand behind
    # other callers in one queue, until the whole window were callers, each waiting for
    # a job that nobody can take any more. So calls go to a queue of their own,
    # Olive.q.calls:
    #
    #     Olive.q          -- a window -->   callers, and jobs that call nobody
    #     Olive.q.calls    -- a window -->   what those have called: it may call again,
    #                      -- a window -->   and then a window more is opened for it
    #
    # On the queue of calls there is a consumer more for each window full of callers
    # that wait. At every moment some places are free of callers, enough to keep all
    # workers busy, and so there is no depth of calls at which all stand still.

    async def _call_for(self, job: Job | None, *args: Any, **options: Any) -> Any:
        """Call a task for a job, and count the job as a caller meanwhile."""
        # A background coroutine, which has no job, takes nobody's place.
        callers = self._callers[job.queue] if job else Counter()
        callers[job] += 1
        await self._callers_changed.set()
        try:
            return await self.client.call(*args, parent=job, **options)
        finally:
            callers[job] -= 1
            if not callers[job]:
                del callers[job]
            await self._callers_changed.set()

    def _places_wanted(self) -> int:
        """How many consumers the queue of calls should have beyond the usual one."""
        window = self.config.prefetch
        workers = min(self.config.threads + self.config.processes, window)
        places = len(self._callers[self._calls_queue]) + workers
        return math.ceil(places / window) - 1

    async def _keep_places(self, channel: sweepea.Channel) -> None:
        """Have as many consumers on the queue of calls as the callers need. Those that
        are started here are the last in `_consumers`, and the first to go."""
        consumers, usual = self._consumers, len(self._consumers)
        while channel.closed is None and not self._stop.is_set():
            if len(consumers) < usual + self._places_wanted():
                await self._consume(channel, self._calls_queue, self.config.prefetch)
                continue
            # Callers come and go. So consumers go when all was quiet for a second.
            self._callers_changed.clear()
            async with ignore_after(1.0 if len(consumers) > usual else None) as timer:
                await self._callers_changed.wait()
            while timer.expired and len(consumers) > usual + self._places_wanted():
                tag, _queue = consumers.popitem()       # the last one
                await channel.call("basic_cancel", tag)

    # -- starting ----------------------------------------------------------------------
    #
    # Without this, whoever starts the app while the broker is down would have to come
    # back and start it again. So the app waits for a broker as long as it takes, and it
    # ends only if the broker refuses it, which waiting does not mend.
    #
    #     start        has the kernel run `_main`
    #     _main        makes pools, link and client; then waits for a stop
    #     _on_connect  for each connection: declares, consumes, spawns two watchers,
    #                  `_guard` for what is in hand and `_tend` for the consumers

    def start(self, *background: Callable) -> None:
        """Work until SIGTERM, SIGINT or SIGHUP; return then, or exit with a status.
        SIGUSR1 has a table of what is in hand printed. In a worker process, which
        imports the program as well, return at once.

        `background` are coroutine functions that run on the kernel beside it. A second
        signal leaves at once, with status 128 + its number. Exit status 1: the broker
        refuses us, too many threads hang, or no worker process can be started.
        """
        if sweepea.in_worker():
            return
        set_up_log(self.config.log_level)
        # A window of messages is thousands of objects, none of them in a cycle of
        # references. Python would look for such cycles each time that there are 700
        # objects more than before, or 2,000, which would take a fifth of our time.
        if 0 < gc.get_threshold()[0] < 10_000:      # else somebody has decided that
            gc.set_threshold(10_000)
        with sweepea.signals(signal.SIGTERM, signal.SIGINT, signal.SIGHUP,
                             signal.SIGUSR1) as incoming:
            stops = [number for number in incoming.numbers if number != signal.SIGUSR1]

            # The first signal is obeyed in the kernel (`_obey`). A second one must be
            # obeyed even if a coroutine blocks the kernel.
            def on_first(_number, _frame) -> None:
                for number in stops:
                    signal.signal(number, _leave_at_once)

            for number in stops:
                signal.signal(number, on_first)
            # The kernel ends before the trace, which shows the jobs that it cancels.
            with closing(self._trace), sweepea.Kernel() as kernel:
                kernel.run(self._main, incoming, background)
        if self._exit_status:
            raise SystemExit(self._exit_status)

    async def _main(self, incoming, background: tuple) -> None:
        config = self.config
        self._kernel = kernel = await sweepea._get_kernel()
        self._threads = sweepea.ThreadPool(kernel, config.threads)
        # A worker process imports what it may have to run before any time limit counts.
        modules = {_module(registered) for registered in TASKS.values()
                   if self._kind(registered) == "process"}
        self._processes = sweepea.ProcessPool(
            kernel, config.processes, _set_up_worker,
            (sorted(modules), config.log_level))
        self._link = sweepea.Link(config.urls, self._on_connect)
        self.client = Client(config, self._link, calls_name(config.routing_key),
                             self._declare_anew)
        self._began = time.monotonic()
        self._tick()
        await spawn(self._obey, incoming)
        connecting = await spawn(self._stay_connected)
        for corofunc in background:
            await spawn(self._beside, corofunc)
        await self._stop.wait()

        log.info("stopping: %d in hand", len(self._in_hand))
        await ignore_after(config.grace, self._finish)
        for job in self._in_hand:       # The end of the connection gives these back.
            if job.delivery is not None:
                log.warning("given back, as it did not end in time: %s", job)
        self.client.forget_replies()
        await connecting.cancel()
        if self._link.ever_up:
            log.info("stopped: %s", self._show_totals())

    async def _beside(self, corofunc: Callable) -> None:
        # The function may want to send something, which takes queues.
        _here.set((self, None))
        await self._link.up.wait()
        await corofunc()

    async def _stay_connected(self) -> None:
        try:
            await self._link.run()
        except AMQPError as exc:
            log.error("the broker refuses us: %s%s", describe(exc),
                      advice(exc, self.config))
            self.stop(1)

    async def _on_connect(self, connection, channel: sweepea.Channel) -> None:
        """Called by the link for each new connection, before it counts as up."""
        await declare_topology(channel, self.config)
        await self.client.listen_again(connection, channel)
        self._await_messages()
        await spawn(self._guard, channel)
        window = 1 if self._link.was_brief else self.config.prefetch
        await spawn(self._tend, channel, window)
        self._consumers = {}            # The old ones ended with their connection.
        for queue in self._queues:
            if not self._stop.is_set():
                await self._consume(channel, queue, window)
        if self._link.ever_up:
            self._trace.add("i", "reconnect", s="p")
            return
        config = self.config
        log.info("sweepea %s at %s, waiting for tasks in %s with %d threads and %d "
                 "processes: %s", sweepea.__version__, _address(connection),
                 config.queue, config.threads, config.processes, self._show_tasks())
        if not config.counts_returns:
            log.warning("%s is not a quorum queue: nothing counts how often a message "
                        "comes back, so a task that kills the app does so again and "
                        "again", config.queue)

    # -- stopping ----------------------------------------------------------------------
    #
    # Without this, each restart of the app would cut off what runs, and all of that
    # would run a second time. So the app takes no more, gives back what has not begun,
    # and waits for what has, as long as OLIVE_GRACE allows. A program that does not go
    # would be worse still, so nothing on that way may take longer than the grace.

    def stop(self, status: int = 0) -> None:
        """Stop as by SIGTERM. For coroutines that run in the app.

        status: the exit status of the program; the first that is not 0 counts.
        """
        self._exit_status = self._exit_status or status
        self._kernel._spawn(self._stop.set())

    async def _obey(self, incoming) -> None:
        while True:
            if await incoming.get() == signal.SIGUSR1:
                await spawn(self._show)     # in a task of its own: it may fail alone
            else:
                self.stop()

    async def _finish(self) -> None:
        """Take no more; give back what has not begun; wait for what has.

        The order matters: what is given back while we still take messages would come
        straight in again.
        """
        await self._room.wake()             # `_has_message` awaits none in a stop
        async with ignore_after(2.0):       # the broker may be frozen
            for consumer in list(self._consumers):
                await self._ask_broker("basic_cancel", consumer)
        for job in list(self._in_hand):
            await self._let_go_unless_begun(job)
        while self._in_hand:
            running = self._in_hand.difference(*self._callers.values())
            end_of_one = next(iter(running or self._in_hand)).kernel_task.wait
            # Now only callers are left. If nobody takes what they call, they wait in
            # vain, and are let go.
            if not running and not await self._is_answered():
                for caller in list(self._in_hand):
                    await self._let_go(caller)
            await ignore_after(0.5, end_of_one)

    async def _is_answered(self) -> bool:
        """Whether another app takes what is called."""
        queue = await self._ask_broker("queue_declare", self._calls_queue, passive=True)
        return queue is not None and queue.method.consumer_count > 0

    async def _ask_broker(self, *what: Any, **options: Any) -> Any:
        """Call a method of the channel; None if there is no connection, or if it is
        lost in that moment."""
        if channel := self._link.channel:
            with suppress(AMQPError):
                return await channel.call(*what, **options)
        return None

    # -- being seen --------------------------------------------------------------------
    #
    # Without this, an app that does nothing, because all its jobs wait for the same
    # lock, say, would look like one that has nothing to do. There are three views of
    # one run. The log says what was out of the ordinary. The table that `kill -USR1`
    # prints says what is going on just now: which job hangs, and where. The timeline
    # shows afterwards what ran when (see `Trace`). While nobody looks, a job only notes
    # when it goes from one place to another.

    def _note_end(self, job: Job, status: str) -> None:
        """A job has run, perhaps not to its end: count it and show it."""
        if status != "cut short":
            self._totals["done" if status == "done" else "failed"] += 1
        if self._trace.file or log.isEnabledFor(logging.DEBUG):
            place, began = job.whereabouts()
            # A call in a worker has noted its end, of which the kernel learns later.
            ended = getattr(job.worker_call, "ended", None) or time.monotonic()
            if not place.startswith("waits"):       # else there is no run to show
                log.debug("%s: %s in %.3f s", job, status, ended - began)
                self._trace.slice(job, place, began, ended, status)
                self._trace.count(len(self._in_hand))
        job.worker_call = None

    def _tick(self) -> None:
        """Once a second: note how much is done, and have the timeline written.

        The timer is pika's. One of the kernel's would make each poll dearer.
        """
        self._samples.append((time.monotonic(), self._totals["done"]))
        self._trace.count(len(self._in_hand))
        self._trace.write()
        self._kernel.loop.call_later(1, self._tick)

    async def _show(self) -> None:
        """Print to stderr what is in hand: first what runs, the longest first."""
        now, link, rows = time.monotonic(), self._link, []
        for job in self._in_hand:
            asked = str(job.headers.get("task")), str(job.headers.get("id"))
            rows.append((*job.whereabouts(), *(_shown(text)[1:-1] for text in asked)))
        lines = [f"{'task':28}  {'id':36}  {'runs in, or waits':21}  {'for':>9}"]
        rows.sort(key=lambda row: (row[0].startswith("waits"), row[1]))
        for place, since, task, ident in rows:
            lines.append(f"{task:28.28}  {ident:36.36}  {place:21}  "
                         f"{now - since:7.1f} s")
        states = Counter(task.state for task in self._kernel._tasks.values())
        then, done = self._samples[0]
        rate = (self._totals["done"] - done) / (now - then)
        lines += [
            f"{len(rows)} in hand; {len(self._threads.abandoned)} threads abandoned",
            "kernel: " + ", ".join(f"{n} {state}" for state, n in states.most_common()),
            f"since the start, {now - self._began:.0f} s ago: {self._show_totals()}",
            f"in the last {now - then:.0f} s: {rate:.1f} done a second",
            f"connected to {_address(link.connection)}" if link.connection else
            "no connection to the broker"]
        print("\n".join(line[:100] for line in lines), file=sys.stderr, flush=True)

    def _show_totals(self) -> str:
        return ", ".join(f"{number} {word}" for word, number in self._totals.items())

    def _show_tasks(self) -> str:
        """The tasks with their kinds and limits."""
        shown = []
        for name, registered in sorted(TASKS.items()):
            limit = registered.timeout or self.config.task_timeout
            facts = [self._kind(registered), limit and f"{limit:g} s",
                     registered.retries and f"retries {registered.retries}"]
            shown.append(f"{name} ({', '.join(filter(None, facts))})")
        return ", ".join(shown)


def _address(connection: sweepea.Connection) -> str:
    """The broker, without its password."""
    return f"{connection.pika.params.host}:{connection.pika.params.port}"


def _leave_at_once(number: int, _frame=None) -> None:
    os.write(2, b"olive: leaving at once\n")    # no lock, unlike print
    os._exit(128 + number)


def advice(exc: AMQPError, config: OliveAppConfig) -> str:
    """What to do about a broker that refuses us."""
    if not isinstance(exc, ChannelClosedByBroker):
        return " (check OLIVE_URL)"
    if exc.reply_code == 403:
        return " (let rabbitmqctl set_permissions give the user of OLIVE_URL more)"
    if exc.reply_code == 404:
        return " (start the app, which declares it)"
    if f"queue '{config.queue}'" in str(exc):
        return " (delete it, or set OLIVE_QUEUE_ARGUMENTS as it was declared)"
    return " (delete it, or choose another name)"


# =====================================================================================
# The log and the timeline
#
# Without a log that says what was out of the ordinary, each of the mechanisms above
# would do its work in silence, and nobody would learn that a job fails at each try or
# that the connection is lost once an hour. Who wants to know what ran when asks for a
# timeline, and opens it in Perfetto (ui.perfetto.dev) or in a browser of Chrome's.
# =====================================================================================

class _LogFormatter(logging.Formatter):
    """Lines with times in UTC; the level is coloured, but only on a terminal."""

    converter, default_msec_format = time.gmtime, "%s.%03dZ"
    colours = dict(DEBUG=2, INFO=32, WARNING=33, ERROR=31, CRITICAL=31)

    def format(self, record: logging.LogRecord) -> str:
        line, level = super().format(record), record.levelname
        if os.isatty(2) and not os.environ.get("NO_COLOR"):
            coloured = f"\x1b[{self.colours.get(level, 0)}m{level}\x1b[0m"
            line = line.replace(level, coloured, 1)
        return line


def set_up_log(level: str) -> None:
    """Have log lines from `level` on written to stderr, in worker processes, too; or by
    handlers that the program has set up."""
    handler = logging.StreamHandler()
    handler.setFormatter(_LogFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    # A module of tasks that calls `logging.config.dictConfig` disables all the loggers
    # that there are, unless it says otherwise.
    for logger in log, sweepea.log:
        logger.disabled = False
        logger.setLevel(level)
    # What pika reports, the link says in one line.
    logging.getLogger("pika").setLevel(logging.CRITICAL)


def _set_up_worker(modules: tuple[str, ...], level: str) -> None:
    for module in modules:
        load_tasks(module)
    set_up_log(level)


class Trace:
    """A timeline of the run, in the Trace Event Format; nothing without a file.

    Each thread, each process and the kernel has a track: a number, `tid`, and a record
    that names it (M). A job is a slice of its track (X). C is a counter, i a moment:

        [{"ph": "M", "name": "process_name", "args": {"name": "olive"}, ...},
         {"ph": "M", "name": "thread_name", "args": {"name": "kernel"}, "tid": 1, ...},
         {"ph": "X", "name": "add", "args": {...}, "tid": 1, "ts": 812, "dur": 57, ...},
         {"ph": "C", "name": "in hand", "args": {"messages": 40}, "ts": 869, ...}]

    Only whole records are written, and programs that read the format do not insist on
    the bracket at the end. So the file can be read even after a kill -9. Times are
    whole microseconds of `time.monotonic()`; rounded fractions could overlap.
    """

    def __init__(self, path: str) -> None:
        # Unbuffered, so that the system gets in one piece what is written.
        self.file = open(path, "wb", buffering=0) if path else None
        self._separator, self._records = "[", []
        self._encode = json.JSONEncoder().encode
        self._tids: dict[int | str, int] = {}   # of the tracks
        self._lanes: list[int] = []     # by track of the kernel: when it is free again
        self._counted = self._in_hand = 0       # when the last count was; what it was
        self._epoch = time.time() - time.monotonic()
        self.add("M", "process_name", args={"name": "olive"})

    def add(self, ph: str, name: str, tid: int = 0, ts: int = 0, **more: Any) -> None:
        """Add a record, of this moment if no other is given."""
        if self.file:
            ts = ts or int(time.monotonic() * 1e6)
            self._records.append(self._encode(
                dict(ph=ph, name=name, pid=os.getpid(), tid=tid, ts=ts, **more)))

    def slice(self, job: Job, place: str, began: float, ended: float, status) -> None:
        """Add a job that ran in a place, between two times of `time.monotonic()`."""
        start, end = int(began * 1e6), int(ended * 1e6)
        track = job.worker_call.thread if place == "thread" else place
        if place == "coroutine":
            # Coroutines run side by side, and slices of one track must not overlap. So
            # there are as many tracks as it takes; this is the first that was free.
            lanes = enumerate(self._lanes)
            lane = next((n for n, free in lanes if free <= start), len(self._lanes))
            self._lanes[lane:lane + 1] = [end]      # replaces a lane, or adds one
            track = f"kernel {lane + 1}" if lane else "kernel"
        if track not in self._tids:
            self._tids[track] = tid = len(self._tids) + 1
            name = f"thread {tid}" if place == "thread" else track
            self.add("M", "thread_name", tid, args={"name": name})
        queued = None                   # seconds, if the sender has said when it sent
        with suppress(Exception):       # anything may be in that header
            sent = datetime.fromisoformat(job.headers["x-olive-sent"])
            queued = round(self._epoch + began - sent.timestamp(), 6)
        # This is as `add` would write it, but takes a quarter of the time.
        encode = self._encode
        self._records.append(
            f'{{"ph": "X", "name": {encode(job.task)}, "pid": {os.getpid()}, '
            f'"tid": {self._tids[track]}, "ts": {start}, "dur": {end - start}, '
            f'"args": {{"id": {encode(job.id)}, "outcome": "{status}", '
            f'"queued": {encode(queued)}}}}}')
        if len(self._records) >= 1000:
            self.write()

    def count(self, in_hand: int) -> None:
        """Add how many messages are in hand, if that has changed; not more often than
        once in a millisecond."""
        now = time.monotonic()
        if in_hand != self._in_hand and now > self._counted + 0.001:
            self._counted, self._in_hand = now, in_hand
            self.add("C", "in hand", args={"messages": in_hand})

    def write(self, end: str = "") -> None:
        """Write what has come together."""
        if self.file and self._records:
            data = self._separator + ",\n".join(self._records) + end
            self._separator, self._records = ",\n", []
            with suppress(OSError):     # a full disk must not stop the work
                self.file.write(data.encode())

    def close(self) -> None:
        """End the file, which is JSON then."""
        if self.file:
            self.add("C", "in hand", args={"messages": 0})
            self.write("]\n")
            self.file.close()


# =====================================================================================
# Tasks: functions that may be called by name from the wire, and no others
#
# Without a registry, whoever may publish a message could run any function of any module
# here, `os.system`, say. So a message carries no code and only names a task, and
# nothing is imported or unpickled because a message says so. What is not in the
# registry below cannot be called.
# =====================================================================================

class OliveTask(NamedTuple):
    """A registered function and how it is to be run."""

    function: Callable
    worker: str | None      # "thread", "process", or None: the configuration's choice
    timeout: float | None   # seconds
    retries: int
    retry_delay: float      # seconds before the first retry; twice that before the next


TASKS: dict[str, OliveTask] = {}
_is_coroutine = functools.cache(inspect.iscoroutinefunction)    # asked at each message


def task(name=None, worker=None, timeout=None, retries=0, retry_delay=1.0) -> Callable:
    """Register a function as a task: `@task` or `@task(worker="process", retries=3)`.

    name: by default that of the function. worker: "thread" or "process", by default
    what the configuration says; a coroutine function runs on the kernel. timeout: after
    so many seconds the job has failed: a process is killed, a coroutine is cancelled; a
    thread cannot be stopped and runs on, perhaps beside its own next try. retries: what
    has failed is tried again so many times, after `retry_delay` seconds, then twice
    that, and so on. Raises ValueError for a name that is taken, and for values that
    make no sense. The idea of a decorator that is the whole API is Huey's.
    """
    if callable(name):      # `@task` without brackets: the function itself came here
        return task()(name)

    def register(function: Callable) -> Callable:
        key = name or function.__name__
        if key in TASKS:
            raise ValueError(f"there are two tasks of the name {key!r}")
        TASKS[key] = OliveTask(function, worker, timeout, retries, retry_delay)
        return function

    if worker not in (None, "thread", "process"):
        raise ValueError(f"worker must be 'thread' or 'process', not {worker!r}")
    if not (timeout is None or timeout > 0) or not retry_delay >= 0 or not (
            type(retries) is int and retries >= 0):
        raise ValueError("timeout must be above 0, retries and retry_delay at least 0")
    return register


@functools.cache            # a second registration would be an error
def demo_tasks() -> None:
    """Register the five demo tasks; "olive_app" in OLIVE_TASKS stands for these.

    They are registered when they are asked for, and not by the import of this module:
    a program of one's own must not have a task `add` that it did not write.
    """

    @task
    def add(x, y):
        return x + y

    @task
    def do_nothing():
        pass

    @task
    def sleep_n(seconds):
        time.sleep(seconds)
        return seconds

    @task(worker="process")
    def fib(n):
        return n if n < 2 else fib(n - 1) + fib(n - 2)

    @task
    def fail(message):
        raise RuntimeError(message)


def load_tasks(module: str) -> None:
    """Import a module that registers tasks.

    Worker processes do so, too, before their first job: each has a registry of its own.
    By then multiprocessing has imported `__main__`, the program itself, in the worker
    process. Raises whatever the import raises.
    """
    if module in ("olive_app", __name__):
        demo_tasks()
    elif module != "__main__":
        importlib.import_module(module)


def _module(registered: OliveTask) -> str:
    """The module by which a worker process knows a task.

    multiprocessing imports `__main__` in the worker process, unless that is the file
    `__main__.py` of a package, which can be imported like any other module.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if registered.function.__module__ == "__main__" and spec and (
            spec.name.endswith(".__main__")):
        return spec.name
    return registered.function.__module__


class JobInfo(NamedTuple):
    """What a task may want to know about the job that it does."""

    id: str
    name: str                   # of the task
    tries: int                  # how often the job was tried before
    sent: datetime | None       # when, in UTC, if the sender said so


_job_info: ContextVar[JobInfo] = ContextVar("job_info")     # `sent` as in the header


def job() -> JobInfo:
    """Tell a task which job it does. Its id stays the same however often it is tried,
    so what must not be done twice can be remembered under the id.

    Raises RuntimeError where no job is done.
    """
    info = _job_info.get(None)
    if info is None:
        raise RuntimeError("job() is for tasks, while they do a job")
    try:
        return info._replace(sent=_read_time(info.sent, "x-olive-sent"))
    except ValueError:                  # the header is the sender's
        return info._replace(sent=None)


# =====================================================================================
# Running a job: bytes in, bytes out
#
# The body of a message goes to the worker as the bytes that came. It is decoded there,
# and what comes back is the body of the reply, in bytes again. So the kernel's thread
# neither decodes nor encodes what threads and processes work on, and what travels to a
# process and back is plain and quick to pickle:
#
#     kernel    (what the job is, body)  --->  worker: decode, call, encode
#     kernel    Outcome                  <---
#
# Bodies and replies are Celery's, as JSON:
#
#     body      [args, kwargs, {"callbacks": null, "errbacks": null, "chain": null,
#               "chord": null}]
#     reply     {"task_id": id, "status": "SUCCESS", "result": value,
#               "traceback": null, "children": []}
#     failure   {"task_id": id, "status": "FAILURE", "result":
#               {"exc_type": "ValueError", "exc_message": ["text"], "exc_module":
#               "builtins"}, "traceback": text, "children": []}
#
# Some values that JSON does not have travel as kombu, Celery's messenger, writes them:
# {"__type__": "date", "__value__": "2026-02-28"}.
# =====================================================================================

MAX_RESULT = 16 << 20                       # bytes of JSON: RabbitMQ 4's own limit
MAX_ERROR, MAX_TRACEBACK = 1_000, 16_000    # characters that the dead queue keeps
INSTEAD = "instead, write a task that is a coroutine and calls the others"


class Outcome(NamedTuple):
    """What came of a job; of what went wrong, also what the dead queue shows."""
    status: str                     # "done", or a reason of the dead queue's
    reply: bytes                    # the body of the reply
    exc_type: str = ""              # the name of the exception's class
    text: str = ""
    traceback: str = ""


class Unsupported(Exception):
    """The message asks for something that Sweepea does not have."""


# Celery's clients know these by name and module: a reply says that they live there.

class NotRegistered(Exception):
    """There is no task of that name here."""
    __module__ = "celery.exceptions"


class TaskRevokedError(Exception):
    """The message expired before its job began."""
    __module__ = "celery.exceptions"


class TimeLimitExceeded(Exception):
    """The task ran longer than it may."""
    __module__ = "billiard.exceptions"


class WorkerLostError(Exception):
    """The process died that ran the job, or the job raised SystemExit or the like."""
    __module__ = "billiard.exceptions"


def _parse_time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))  # Python 3.10 has no Z


# For each name: the class, how a value of it is written, and how it is read. A datetime
# is a date, too, so it comes first. Of bytes there are two forms, and the second is
# kombu's for those that are text; it is only read here.
_TYPES = {
    "datetime": (datetime, datetime.isoformat, _parse_time),
    "date": (date, date.isoformat, lambda text: _parse_time(text).date()),
    "time": (time_of_day, time_of_day.isoformat, time_of_day.fromisoformat),
    "decimal": (Decimal, str, Decimal),
    "uuid": (uuid.UUID, lambda value: {"hex": value.hex, "version": value.version},
             lambda value: uuid.UUID(value["hex"])),
    "base64": (bytes, lambda value: base64.b64encode(value).decode(), base64.b64decode),
    "bytes": (bytes, bytes.decode, str.encode)}


def _write(value: Any) -> dict:
    for name, (kind, write, _) in _TYPES.items():
        if isinstance(value, kind):
            return {"__type__": name, "__value__": write(value)}
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _read(found: dict) -> Any:
    if found.keys() != {"__type__", "__value__"}:
        return found
    try:
        _, _, read = _TYPES[found["__type__"]]
        return read(found["__value__"])
    except Exception:
        raise ValueError(f"{_shown(found)} is none of the types that we know") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


to_json = json.JSONEncoder(allow_nan=False, default=_write).encode
from_json = json.JSONDecoder(object_hook=_read, parse_constant=_refuse).decode


def _decode(body: bytes) -> tuple[list, dict]:
    """Take the arguments out of a body.

    Raises ValueError if the body is not what it should be, and Unsupported if it asks
    for one of Celery's canvases. These are refused aloud, for half of them supported
    would be worse than none: a coroutine does the same in a line that one can read.
    """
    try:
        asked = from_json(body.decode())
    except RecursionError:
        raise ValueError("the body is nested too deeply") from None
    kinds = [type(part) for part in asked] if isinstance(asked, list) else None
    if kinds != [list, dict, dict] and kinds != [list, dict, type(None)]:
        raise ValueError("the body is not [args, kwargs, embed]")
    args, kwargs, embed = asked
    for key in "chain", "chord", "callbacks", "errbacks":
        if embed and embed.get(key):
            raise Unsupported(f"{key} is not supported: {INSTEAD}")
    return args, kwargs


def _reply(ident: str | None, status: str, result: Any, trace: str | None) -> bytes:
    """The body of a reply, as Celery's clients read it."""
    return to_json({"task_id": ident, "status": status, "result": result,
                    "traceback": trace, "children": []}).encode()


def _failure(reason: str, ident: str | None, exc: BaseException, status="FAILURE",
             remark="") -> Outcome:
    """Make an outcome of an exception; `status` is that of the reply. The texts are cut
    to a length, as they travel in headers."""
    try:
        text = remark + str(exc)
        trace = "".join(traceback.format_exception(exc)) if exc.__traceback__ else ""
    except BaseException:       # an exception whose str() raises
        text, trace = "(no text)", "".join(traceback.format_tb(exc.__traceback__))
    text, trace = _clean(text)[:MAX_TRACEBACK], _clean(trace)[-MAX_TRACEBACK:]
    # A client raises what it is told, and would leave by an exception of these kinds.
    leaves = isinstance(exc, (SystemExit, KeyboardInterrupt, GeneratorExit))
    told = WorkerLostError if leaves else type(exc)
    reply = _reply(ident, status, {"exc_type": told.__name__, "exc_message": [text],
                                    "exc_module": told.__module__}, trace)
    return Outcome(reason, reply, type(exc).__name__, text, trace)


def _clean(text: str) -> str:
    """Text that can be sent: half of a surrogate pair cannot be."""
    return text.encode("utf-8", "backslashreplace").decode()


async def _perform(info: JobInfo, body: bytes, reply_to: str | None) -> Outcome:
    """Run the job of a message, and say what came of it, whatever that is.

    Nothing that a task raises leaves this function: neither may an exception take a
    thread or the kernel with it, nor a SystemExit the app.
    """
    ident = info.id
    _job_info.set(info)
    try:
        args, kwargs = _decode(body)
    except Unsupported as exc:
        return _failure("unsupported", ident, exc.with_traceback(None))
    except ValueError as exc:
        return _failure("malformed", ident, exc.with_traceback(None))
    try:
        result = TASKS[info.name].function(*args, **kwargs)
        if inspect.iscoroutine(result):
            result = await result
    except BaseException as exc:    # SystemExit and KeyboardInterrupt as well
        # The first frame of the traceback is the one above; the next is the task's. If
        # there is none, the arguments do not fit, and will not do so next time.
        exc.__traceback__ = exc.__traceback__.tb_next
        is_misfit = isinstance(exc, TypeError) and exc.__traceback__ is None
        return _failure("malformed" if is_misfit else "failed", ident, exc)
    if result is None and not reply_to:     # the common case: there is nothing to say
        return Outcome("done", b"")
    try:
        reply = _reply(ident, "SUCCESS", result, None)
        if len(reply) > MAX_RESULT:
            raise ValueError(f"it is larger than {MAX_RESULT} bytes of JSON")
        return Outcome("done", reply)
    except Exception as exc:
        # The work is done all the same: a second try would do it twice.
        remark = "the task is done, but its result cannot be sent: "
        return _failure("done", ident, exc.with_traceback(None), remark=remark)


def _execute(*what) -> Outcome:
    """Perform a job in a worker, where there is no kernel. A coroutine that never traps
    runs to its end at the first `send` (chapter 2 of sweepea.py)."""
    try:
        _perform(*what).send(None)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("a task that is no coroutine function returned a coroutine")


def _execute_in_child(module: str, info: JobInfo, body: bytes, reply_to) -> Outcome:
    """Perform a job in a worker process, which knows a task by the module that defines
    it. A module that is imported there may lack the task, which was defined under the
    guard `if __name__ == "__main__":`, say, or in no file at all."""
    if info.name not in TASKS:
        load_tasks(module)
    if info.name not in TASKS:
        return _failure("unknown-task", info.id, NotRegistered(
            f"a worker process imports {module} and finds no task {info.name} there: "
            "define it at the top level of a module, and not under `if __name__ ...`"))
    return _execute(info, body, reply_to)


# =====================================================================================
# Calling
#
# A task is called by a message: somebody publishes it, and its reply is sent to the
# queue that the message names. A `Client` does that, for the tasks of the app (`call`),
# and for other programs (olive_utils.py):
#
#     client                           RabbitMQ                          app
#        |  publish, mandatory             |                              |
#        +-------------------------------->|  Olive.x ---> Olive.q        |
#        |<--------------------------------+  confirm: it is stored       |
#        |                                 +----------------------------->|  delivery
#        |                                 |<-----------------------------+  reply
#        |<--------------------------------+  the client's queue          |
#
# "Mandatory" makes the broker return a message that no queue takes. Without it the
# broker would throw the message away and confirm it all the same.
#
# The queue of the replies is a quorum queue, and so it outlives a lost connection, and
# even the broker's death. If the client is gone for ten minutes, the broker deletes it.
# =====================================================================================

REPLIES_KEPT = 600_000      # ms that a queue of replies outlives its client
CONFIRM_LIMIT = 30.0        # seconds that a sender waits for the broker

_here: ContextVar[tuple] = ContextVar("here")       # the app and the job that runs


class TaskFailed(Exception):
    """A job failed; `exc_type`, `text` and the remote `traceback` say how."""

    def __init__(self, reply: dict) -> None:
        error = reply["result"]
        self.exc_type, self.traceback = error["exc_type"], reply["traceback"] or ""
        self.text = " ".join(map(str, error["exc_message"]))
        super().__init__(f"{self.exc_type}: {self.text}")


async def call(name: str, args=(), kwargs=None, *, timeout: float | None = None,
               **options) -> Any:
    """Call a task from a task that is a coroutine, or from a background coroutine of
    the app; return what it returns.

    timeout: how many seconds to wait. The other parameters are those of `Client.send`.
    Raises TaskFailed if the job failed, and TimeoutError if no answer came in time.
    """
    app, job = await _caller()
    return await app._call_for(job, name, args, kwargs, timeout=timeout, **options)


async def send(name: str, args=(), kwargs=None, **options: Any) -> str:
    """As `call`, but do not wait for the job; return its id once the broker has it."""
    app, job = await _caller()
    return await app.client.send(name, args, kwargs, parent=job, **options)


async def _caller() -> tuple[OliveOly, Job | None]:
    app, job = _here.get((None, None))
    if app is None or app._kernel is not await sweepea._get_kernel():
        raise RuntimeError("call() and send() are for coroutines that run in the app; "
                           "elsewhere use olive_utils.call_task and send_task")
    return app, job


class Client:
    """Sends messages and takes the replies. The app has one, on its own link; another
    program gets one by `await Client.open(config)`.
    """

    # A message goes out on the link; the reply comes back to the one who asked:
    #
    #     call -> _answers[id] -> send -> publish -> link     (declares what is missing)
    #     _answers.pop(id) <- _on_reply <- _listens_on, a channel of the link
    #
    # The queue of the replies, `_replies`, is declared when the first reply is wanted,
    # since many a program only sends. After that, each new connection listens again.

    def __init__(self, config: OliveAppConfig, link: sweepea.Link, routing_key: str,
                 declare: Callable, limit: float | None = None) -> None:
        # declare(target, why): a coroutine function that declares what is missing.
        # limit: for so many seconds a sender waits for the broker; None is for ever.
        self.config, self.link, self.limit = config, link, limit
        self._routing_key, self._declare = routing_key, declare
        self._replies = f"Olive.replies.{uuid.uuid4().hex}"
        self._listens_on: sweepea.Channel | None = None
        self._listening = sweepea.Semaphore(1)      # one task at a time may begin it
        self._answers: dict[str, Future] = {}       # by id: what gets the reply
        self._gave_up = False       # a reply that nobody waits for may still come

    async def call(self, name, args=(), kwargs=None, *, timeout=None, **options) -> Any:
        """Send a message, wait for the result of its job and return that.

        timeout: how many seconds to wait; None is for ever. The other parameters, and
        what is raised, are those of `send`. Raises TaskFailed if the job failed, and
        TimeoutError if no answer came in time.
        """
        ident = str(uuid.uuid4())
        answer = self._answers[ident] = Future()
        try:
            async with ignore_after(timeout):
                await self.send(name, args, kwargs, ident=ident, **options,
                                reply_to=self._replies)
                reply = await sweepea._future_wait(answer)
                if reply["status"] == "SUCCESS":
                    return reply["result"]
                raise TaskFailed(reply)
            raise TimeoutError(f"no answer to {name} within {timeout:g} s")
        finally:
            if self._answers.pop(ident, None):
                self._gave_up = True

    async def send(self, name: str, args=(), kwargs=None, *, countdown=None, eta=None,
                   expires=None, time_limit=None, priority=None, ident=None,
                   reply_to=None, parent: Job | None = None) -> str:
        """Send a message and return its id, once the broker has confirmed it.

        name: the task that is to run. args, kwargs: its arguments, of which JSON can be
        made. countdown: the job waits for so many seconds; or eta: it waits until then,
        a datetime with a time zone. expires: after so many seconds, or after this
        datetime, the job is not begun any more. time_limit: after so many seconds the
        job is stopped. priority: 0 to 255, for a queue that has priorities. ident: the
        id, by default a new one. reply_to: the queue for the reply, if one is wanted.
        parent: the job that sends the message.

        Raises pika's UnroutableError if no queue takes the message, NackError if the
        queue is full, and TimeoutError if the broker does not take it in time;
        TypeError and ValueError for arguments and times that make no sense.
        """
        if not isinstance(name, str) or not 0 < len(name) <= 1000:
            raise ValueError(f"the name of a task is a text, not {name!r:.100}")
        if isinstance(args, (str, bytes, Mapping)):
            raise ValueError(f"args must be a list or a tuple, not {args!r:.100}")
        if not (priority is None or type(priority) is int and 0 <= priority <= 255):
            raise ValueError(f"priority must be from 0 to 255, not {priority!r:.100}")
        if not (time_limit is None or (
                isinstance(time_limit, (int, float)) and 0 < time_limit < 1e9)):
            raise ValueError(f"time_limit must be seconds, not {time_limit!r:.100}")
        now, ident = datetime.now(timezone.utc), ident or str(uuid.uuid4())
        # AMQP has floating-point numbers, but pika cuts off what is behind the point.
        limit = time_limit and Decimal(str(time_limit))
        canvas = dict.fromkeys(("callbacks", "errbacks", "chain", "chord"))
        body = to_json([list(args), dict(kwargs or {}), canvas]).encode()
        headers = {
            "task": name, "id": ident, "root_id": parent.root_id if parent else ident,
            "parent_id": parent and parent.id, "timelimit": limit and [limit, None],
            "eta": _write_time(countdown or eta, now),
            "expires": _write_time(expires, now), "x-olive-sent": now.isoformat()}
        # pika takes its time for each header, here and in the app.
        headers = {key: value for key, value in headers.items() if value is not None}
        properties = pika.BasicProperties(
            content_type="application/json", content_encoding="utf-8", delivery_mode=2,
            correlation_id=ident, reply_to=reply_to, priority=priority, headers=headers)
        async with ignore_after(self.limit):
            await self.publish(body, properties)
            return ident
        raise TimeoutError(f"the broker takes nothing for {self.limit:g} s: is it down,"
                           " or short of memory or disk?")

    async def publish(self, body: bytes, properties: pika.BasicProperties) -> None:
        """Publish a message that is ready; return once the broker has confirmed it.
        Raises what `send` does, but no TimeoutError."""
        exchange, key, is_first = self.config.exchange, self._routing_key, True
        while True:
            try:
                if properties.reply_to == self._replies:
                    await self._listen()
                return await self.link.publish(exchange, key, body, properties)
            except (AMQPConnectionError, ChannelWrongStateError):
                await sleep(0.1)        # the link comes back
            except AMQPError as exc:
                if isinstance(exc, NackError) or not is_first:
                    raise
                is_first = False        # somebody may have deleted what was there
                with suppress(AMQPConnectionError):
                    await self._declare(exchange, describe(exc))

    # -- replies -----------------------------------------------------------------------

    async def _listen(self) -> None:
        """Take the replies on the connection that there is, unless we do already."""
        async with self._listening:
            while self.link.connection is None:
                await self.link.up.wait()
            if self._listens_on is not self.link.channel:
                await self._listen_on(self.link.connection, self.link.channel)

    async def _listen_on(self, connection, channel: sweepea.Channel) -> None:
        own = await connection.channel()    # closed by the broker if we may not declare
        await own.call("queue_declare", self._replies, durable=True, arguments={
            "x-queue-type": "quorum", "x-expires": REPLIES_KEPT})
        own.pika.close()
        channel.pika.basic_qos(prefetch_count=1_000)
        await channel.call("basic_consume", self._replies,
                           functools.partial(self._on_reply, channel))
        self._listens_on = channel

    async def listen_again(self, connection, channel: sweepea.Channel) -> None:
        """On a new connection: take what came while there was none."""
        if self._answers:
            await self._listen_on(connection, channel)

    def _on_reply(self, channel, _pika_channel, method, properties, body) -> None:
        answer = self._answers.pop(properties.correlation_id, None)
        if answer is not None and not answer.done():    # somebody still waits for it
            try:
                reply = from_json(body.decode())
                # A worker of Celery's tells of its start and of each retry, too.
                if reply["status"] in ("STARTED", "RETRY"):
                    self._answers[properties.correlation_id] = answer
                else:
                    answer.set_result(reply)
            except (ValueError, RecursionError, TypeError, KeyError) as exc:
                answer.set_exception(exc)
        channel.basic_ack(method.delivery_tag)

    def forget_replies(self) -> None:
        """Delete the queue of the replies, if there is one."""
        channel = self._listens_on
        # RabbitMQ 3.10 closes the connection of an app that sends a reply in the moment
        # in which the queue is deleted. So where a reply may come, the queue stays.
        if channel and channel.pika.is_open and not self._answers and not self._gave_up:
            channel.pika.queue_delete(self._replies)

    # -- a client with a connection of its own -----------------------------------------

    @classmethod
    async def open(cls, config: OliveAppConfig) -> Client:
        """Connect to the first of `config.urls` that answers, and again after a loss.

        What a message needs and is not there is declared, so that what is sent before
        the app has ever run waits for the app. Raises pika's AMQPError if no broker
        can be reached.
        """
        self = cls(config, None, config.routing_key, None, CONFIRM_LIMIT)
        self.link = sweepea.Link(config.urls, self._on_connect, patient=False)
        self._declare, self._connected = self._declare_missing, Future()
        self._connecting = await spawn(self._stay_connected)
        try:
            async with ignore_after(CONFIRM_LIMIT):
                await sweepea._future_wait(self._connected)
                return self
            raise AMQPConnectionError(f"no connection within {CONFIRM_LIMIT:g} s")
        except BaseException:
            await self._connecting.cancel(blocking=False)
            raise

    async def aclose(self) -> None:
        """Close the connection."""
        self.forget_replies()
        await self._connecting.cancel()

    async def _stay_connected(self) -> None:
        try:
            await self.link.run()
        except AMQPError as exc:        # of the first connection; later ones come back
            if not self._connected.done():
                self._connected.set_exception(exc)

    async def _on_connect(self, connection, channel: sweepea.Channel) -> None:
        self.connection = connection
        await self._declare_missing()
        await self.listen_again(connection, channel)
        sweepea._answer(self._connected, None)

    async def _declare_missing(self, *_why: str) -> None:
        # First it is asked what is there: a user who may only write may ask, and the
        # queue may have other arguments than we know. Where we may not declare, we go
        # on, since that may not be needed.
        exchange, queue = self.config.exchange, self.config.queue
        attempt = self._attempt
        found = await attempt("queue_declare", queue, passive=True)
        if not found or not await attempt("exchange_declare", exchange, passive=True):
            await attempt("exchange_declare", exchange, "direct", durable=True)
            declared = await attempt("queue_declare", queue, durable=True,
                                     arguments=self.config.queue_arguments)
            await attempt("queue_bind", queue, exchange, self.config.routing_key)
            found = declared or found
        # How many apps listen; None if we may not know.
        self.consumers = found.method.consumer_count if found else None

    async def _attempt(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method on a channel of its own; None if the broker refuses, for which
        it closes the channel."""
        channel = await self.connection.channel()
        with suppress(ChannelClosedByBroker):
            answer = await channel.call(method, *args, **kwargs)
            channel.pika.close()
            return answer
        return None


def _write_time(when: datetime | float | None, now: datetime) -> str | None:
    """A point in time as Celery writes it; a number counts the seconds from now."""
    if isinstance(when, (int, float)) and abs(when) < 1e9:
        when = now + timedelta(seconds=when)
    if not (when is None or isinstance(when, datetime)):
        raise ValueError(f"{when!r:.100} is neither seconds nor a datetime")
    # Without a zone the app would take it for UTC, which in New York is five hours off.
    if when is not None and when.tzinfo is None:
        raise ValueError(f"{when} has no time zone: add .astimezone() or tzinfo=")
    return None if when is None else when.isoformat()


# =====================================================================================
# Messages
#
# A message is a body and properties, and among the properties are headers, a table of
# names and values. Those that count here, after Celery's protocol (version 2):
#
#     content_type      application/json; nothing else is decoded, pickle least of all
#     correlation_id    the id of the job, which the reply carries, too
#     reply_to          the queue for the reply, if the sender wants one
#     headers           task (its name), id, eta and expires (ISO 8601), timelimit
#                       ([hard, soft], in seconds), retries (how often it was tried
#                       again); on what we publish, also x-olive-...
#
# Anything may be in there, of any type. Without the checks below, a header of the wrong
# type would be an exception from far inside, and a time limit that we do not understand
# would be overlooked, until a job runs for hours. So what makes no sense is an error
# with a text for the sender.
# =====================================================================================

MAX_HEADERS = 130_000       # bytes: a header frame has to fit into 128 KiB
DROPPED = {"CC", "BCC", "x-death", "x-delivery-count"}


def _read_time(value: Any, name: str) -> datetime | None:
    """Read an ISO 8601 header; one without a zone is in UTC, as Celery has it."""
    if value is None:
        return None
    try:
        instant = _parse_time(value)
        instant = instant if instant.tzinfo else instant.replace(tzinfo=timezone.utc)
        return instant.astimezone(timezone.utc)
    except (ValueError, AttributeError, TypeError, OverflowError):
        raise ValueError(f"the header {name!r} is not a time") from None


class Delivery(NamedTuple):
    """One handing over of a message to us."""

    channel: sweepea.Channel
    tag: int


class Job:
    """A message in hand and what it asks for, from delivery until it is settled.

    These five fields change while the message is in hand:

        delivery        None once the job is let go, or its message given up
        begun           a coroutine or the publication of a copy is under way, and would
                        be done twice if the job were let go
        worker_call     the call, of a job for a worker: the call alone knows whether
                        such a job has begun
        kernel_task     the task that lives the message's life; None after that
        place           where the job is, and since when: for people

    What becomes of a job, while the channel of its delivery is open and after that:

        open      waits -----> runs -----> done ------> settled
                    |            |           |             ^
        closed    let go       runs -----> done            |
                                             |             |
                                        awaits its --------+ delivered again
                                         message
                                             |
                                  given up, after PATIENCE or at a stop;
                                  a success still sends its reply
    """

    def __init__(self, queue: str, delivery: Delivery, properties, body: bytes) -> None:
        self.queue, self.properties, self.body = queue, properties, body
        self.delivery, self.begun = delivery, False
        self.worker_call = self.kernel_task = None
        self.place = "waits for a worker", time.monotonic()
        self.headers = properties.headers or {}
        self.times_back = 0             # how often the message has come back
        self.isolated = bool(self.headers.get("x-olive-isolated"))  # it may kill us

    def __repr__(self) -> str:
        """The job as the log names it."""
        ident = _shown(self.headers.get("id") or self.properties.correlation_id)
        return _shown(self.headers.get("task")) + "[" + ident.strip("'") + "]"

    @property
    def key(self) -> tuple:
        """Equal for two deliveries of one message; different for a copy of it, which
        has a message_id of its own. An id may be a list, which is no key: so `repr`."""
        return repr(self.headers.get("id")), self.properties.message_id, self.body

    def at(self, place: str) -> None:
        """Note where the job is from now on."""
        if place != self.place[0]:
            self.place = place, time.monotonic()

    def whereabouts(self) -> tuple[str, float]:
        """Where the job is, and since when. In a worker only the call knows that."""
        if self.worker_call is not None and self.worker_call.began is not None:
            return self.worker_call.place, self.worker_call.began
        return self.place

    def read(self) -> None:
        """Find out what the properties say.

        `task`, `id`, `root_id`; `eta` and `expires`, datetimes in UTC or None; `limit`,
        seconds or None; `retries`. Raises ValueError, with the reason, if they make no
        sense.
        """
        properties, headers = self.properties, self.headers
        if properties.content_type != "application/json":
            raise ValueError("the content type is not application/json")
        if (properties.content_encoding or "utf-8").lower() != "utf-8":
            raise ValueError("the content encoding is not utf-8")
        if headers.get("compression"):
            raise ValueError("the body is compressed")
        self.task = headers.get("task")
        if not isinstance(self.task, str) or not self.task:
            raise ValueError("there is no header 'task' with a name")
        self.id = headers.get("id") or properties.correlation_id
        if not isinstance(self.id, str):
            raise ValueError("there is no header 'id' with a text")
        # Both ids go into the headers of what the job calls, where there is not room
        # for any text (`MAX_HEADERS`).
        root = headers.get("root_id")
        self.root_id = root if isinstance(root, str) and len(root) < 1000 else self.id
        if len(self.id) > 10_000:
            raise ValueError("the header 'id' is longer than 10,000 characters")
        self.eta = _read_time(headers.get("eta"), "eta")
        self.expires = _read_time(headers.get("expires"), "expires")
        limit, limits = None, headers.get("timelimit")
        if limits:
            if not (isinstance(limits, list) and len(limits) == 2 and all(
                    limit is None or type(limit) in (int, Decimal) and limit >= 0
                    for limit in limits)):
                raise ValueError("the header 'timelimit' is not [hard, soft]")
            hard, soft = limits
            limit = soft if hard is None else hard
        # pika cuts doubles down to whole numbers, so a 0 was a limit below one second.
        self.limit = None if limit is None else float(limit) or 1.0
        self.retries = headers.get("retries") or 0
        if type(self.retries) is not int or self.retries < 0:
            raise ValueError("the header 'retries' is not a count")


def republished(properties, **changes: Any) -> pika.BasicProperties:
    """The properties with which to publish a message again, some headers changed.

    Some that came have to go. CC and BCC would make copies of the message; the broker
    refuses a user_id that is not our own; the expiration would drop the message; the
    headers of the broker's own (x-death, x-delivery-count) would be taken for news.
    """
    again = copy.copy(properties)
    again.headers = {
        name: value for name, value in (properties.headers or {}).items()
        if isinstance(name, str) and name not in DROPPED
        and not name.startswith("x-first-death-")}
    again.headers.update(changes)
    again.delivery_mode, again.expiration, again.user_id = 2, None, None
    again.message_id = uuid.uuid4().hex     # see Job.key
    # A header frame that is too large would cost the connection. The largest of the
    # headers that came are left out, until the rest fits.
    names = sorted(again.headers, key=lambda name: (
        name not in changes, len(repr(again.headers[name]))))
    while names and not _fits(again):
        del again.headers[names.pop()]
    return again


def _fits(properties: pika.BasicProperties) -> bool:
    try:
        return sum(map(len, properties.encode())) <= MAX_HEADERS
    except Exception:           # pika decodes some things that it cannot encode
        return False


def _shown(text: Any) -> str:
    """Text from the wire for the log: no control characters, not too long."""
    try:
        return repr(text)[:200]
    except RecursionError:
        return "(nested too deeply)"


def _shown_lines(trace: str) -> str:
    """The frames of a traceback for the log, on lines of their own."""
    return "".join("\n  " + _shown(line)[1:-1] for line in trace.splitlines()[1:-1])


# =====================================================================================
# The ladder: messages that wait, inside the broker
#
# A message with an `eta`, or one that is to be tried again, must wait. In the app it
# would hold a place in the window, and a restart would start it over. In one queue with
# a time to live for each message, one that waits for an hour would hold up those behind
# it that wait for a second. So there is a queue for each binary digit of the delay, in
# which all messages wait equally long (the idea is NServiceBus's, and Celery's of
# version 5.5). 5 s are ...0101 in binary:
#
#     publish with the key 0.0. ... .1.0.1.Olive.q
#        |
#     exchange Olive.wait.16    digit 0: on to exchange Olive.wait.15, and so on ...
#     exchange Olive.wait.2     digit 1: into queue Olive.wait.2, for 4 s
#     exchange Olive.wait.1     digit 0: on to exchange Olive.wait.0
#     exchange Olive.wait.0     digit 1: into queue Olive.wait.0, for 1 s
#     exchange Olive.waited     by the rest of the key, a queue's name: to queue Olive.q
#
# When its time is over, a message is a dead letter of its queue, and goes on to the
# exchange below (`x-dead-letter-exchange`), with the key that it has.
#
# One ladder serves every app of the virtual host. The fraction of a second is slept in
# the app. The queues are quorum queues with the strategy at-least-once: each hop inside
# the broker is confirmed, as a publish of ours is. But such a queue keeps what it can
# not pass on, and thirty such messages bring it to a standstill for everybody. So what
# has waited for a queue that is gone ends in the queue Olive.lost, by way of the
# exchange's `alternate-exchange`.
#
# The binding of an app's queue is 17 times `*.` and the queue's name. In a topic `*`
# stands for one word. A `#`, which stands for any number of words, would be shorter,
# but a queue of the name `q` would also get what waits for `a.q`.
# =====================================================================================

LADDER = 17             # rungs: 1 s ... 65,536 s, 131,071 s in all; then all again
WAITED, LOST = "Olive.waited", "Olive.lost"
# A dead queue is looked at again and again, and each look counts as a return. RabbitMQ
# 4 drops a message at the 20th. A limit of -1 means "never" to RabbitMQ 4, but to
# RabbitMQ 3 "at the first"; a very large one suits both.
NO_LIMIT = {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000_000}


def wait_name(rung: int) -> str:
    """The name of a rung of the ladder: its exchange, and its queue, too."""
    return f"Olive.wait.{rung}"


def calls_name(name: str) -> str:
    """The queue, or the routing key, of what tasks call, beside that of the rest."""
    return f"{name}.calls"


def wait_key(seconds: float, queue: str) -> str:
    """The routing key for a delay: its binary digits, and the queue to go to then."""
    digits = f"{min(int(seconds), 2 ** LADDER - 1):0{LADDER}b}"
    return f"{'.'.join(digits)}.{queue}"


async def declare_topology(channel: sweepea.Channel, config: OliveAppConfig) -> None:
    """Declare exchange, queues and ladder; harmless if they are there.

    Raises pika's ChannelClosedByBroker if one is there with other arguments, or if the
    user may not declare it.
    """
    # Without a callback pika asks for no answer, so that all goes out at once, and not
    # one round trip after the other. The last declaration waits for its answer, and so
    # learns of what went wrong.
    declare, queue, key = channel.pika, config.queue, config.routing_key
    declare.exchange_declare(config.exchange, "direct", durable=True)
    declare.exchange_declare(LOST, "fanout", durable=True)
    declare.queue_declare(LOST, durable=True, arguments=NO_LIMIT)
    declare.queue_bind(LOST, LOST)
    declare.exchange_declare(WAITED, "topic", durable=True,
                             arguments={"alternate-exchange": LOST})
    for name, its_key in (queue, key), (calls_name(queue), calls_name(key)):
        declare.queue_declare(name, durable=True, arguments=config.queue_arguments)
        declare.queue_bind(name, config.exchange, its_key)
        declare.queue_bind(name, WAITED, f"{'*.' * LADDER}{name}")
    for rung in range(LADDER):
        name, below = wait_name(rung), wait_name(rung - 1) if rung else WAITED
        declare.exchange_declare(name, "topic", durable=True)
        declare.queue_declare(name, durable=True, arguments={
            "x-queue-type": "quorum", "x-overflow": "reject-publish",
            "x-message-ttl": 1000 * 2 ** rung, "x-dead-letter-exchange": below,
            "x-dead-letter-strategy": "at-least-once"})
        digits_before = "*." * (LADDER - 1 - rung)
        declare.queue_bind(name, name, f"{digits_before}1.#")
        declare.exchange_bind(below, name, f"{digits_before}0.#")
    # The dead queue is of the queue's type, so that it survives what the queue does.
    await channel.call("queue_declare", config.dead_queue, durable=True,
                       arguments=NO_LIMIT if config.counts_returns else None)


# =====================================================================================
# Settings
#
# One table: the default, what the setting means, what its value must be, a function
# that makes such a value of what was given, and one that says whether the value is
# good. `--help` and the errors are made of it. Without this, a typing error would show
# hours later, as a setting that has no effect, or as an exception from far inside.
# A first reading may skip this chapter.
# =====================================================================================

def _setting(default: Any, meaning: str, must: str, read: Callable = str.strip,
             is_good: Callable[[Any], bool] = lambda value: True, shown=True) -> Any:
    return field(default=default, repr=shown, metadata=dict(
        meaning=meaning, must=must, read=read, is_good=is_good))


def _name(default: str, meaning: str, most: int = 255) -> Any:
    def is_good(value: str) -> bool:
        fits = 0 < len(value.encode()) <= most
        has_wildcard = {"*", "#"} & set(value.split("."))   # see "The ladder"
        return fits and value.isprintable() and not (
            has_wildcard or value.startswith("amq."))

    return _setting(default, meaning, f"printable text of up to {most} bytes, without "
                    "'amq.' in front or a word * or #", is_good=is_good)


def _count(default: int | None, meaning: str, most: int) -> Any:
    return _setting(default, meaning, f"a whole number from 1 to {most}",
                    lambda value: int(str(value)),      # int(2.5) would be 2
                    lambda number: 1 <= number <= most)


def _urls(value: str) -> str:
    return ",".join(_url(url.strip()) for url in value.split(","))


def _url(url: str) -> str:
    """Check a URL; return it as pika needs it. No reason that is given holds a
    password, so what the parsers say is not passed on where a password may be in it."""
    escaped = "in a password write %23 for #, %2F for /, %2C for , and %40 for @"
    if not url.startswith(("amqp://", "amqps://")):
        raise ValueError(f"it begins otherwise, or {escaped}")
    try:
        parts = urlsplit(url)
        parts.port
        if "@" in parts.path + parts.query or parts.fragment:
            raise ValueError
    except ValueError:
        raise ValueError(f"the port is no number, or {escaped}") from None
    # As Celery has them: no password means guest's, and // is the virtual host /.
    user, at, host = parts.netloc.rpartition("@")
    user = f"{user}:guest" if at and ":" not in user else user
    path = "/%2F" if parts.path == "//" else parts.path
    url = parts._replace(netloc=user + at + host, path=path).geturl()
    try:
        pika.URLParameters(url)
    except OSError as exc:
        raise ValueError(f"a file that ssl_options names: {exc.strerror}") from None
    except ValueError as exc:
        raise ValueError(str(exc).partition(" value")[0]) from None
    except Exception:
        raise ValueError("ssl_options is no dict as Python writes it") from None
    return url


def _modules(value: tuple | str) -> tuple:
    names = value.split(",") if isinstance(value, str) else value
    return tuple(name.strip() for name in names if name.strip())


def _can_be_written(path: str) -> bool:
    where = path if os.path.exists(path) else os.path.dirname(path) or "."
    return not os.path.isdir(path) and os.access(where, os.W_OK)


LEVELS = "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"


@dataclass(frozen=True)
class OliveAppConfig:
    """The settings of an app; `OLIVE_` + the name in capitals is the variable of each.

    Raises ValueError, naming the variable, for a value that makes no sense.
    """

    url: str = _setting(
        "amqp://guest:guest@localhost:5672/%2F",
        "the broker, or several, comma-separated; amqps:// for TLS",
        "amqp://user:password@host:port/vhost or amqps://..., or several, separated by "
        "commas", _urls, shown=False)       # a password may be in it
    # The names of the queue of calls and of the routing keys are longer by a little.
    exchange: str = _name("Olive.x", "where tasks are sent to")
    queue: str = _name("Olive.q", "where tasks come from", 214)
    routing_key: str = _name("Olive.k", "what leads from there to here", 249)
    queue_arguments: dict = _setting(
        '{"x-queue-type": "quorum"}', "arguments of the queue", "a JSON object",
        lambda value: dict(value if isinstance(value, dict) else json.loads(value)))
    dead_queue: str = _name("Olive.dead", "keeps what cannot be done, with the reason")
    tasks: tuple[str, ...] = _setting(
        (), "modules to import, comma-separated", "names of modules", _modules)
    worker: str = _setting(
        "thread", "thread or process, for tasks that do not say", "thread or process",
        is_good=lambda worker: worker in ("thread", "process"))
    threads: int = _count(20, "size of the thread pool", 10_000)
    processes: int = _count(os.cpu_count() or 1, "size of the process pool; by default "
                            "the number of cores", 1_000)
    prefetch: int = _count(None, "messages held at once; by default 2 x (threads + "
                           "processes)", 65_535)
    task_timeout: float | None = _setting(
        None, "seconds, for tasks that set no limit", "a number of seconds above 0",
        float, lambda seconds: 0 < seconds < 1e9)
    grace: float = _setting(
        30.0, "seconds that a stop waits for what runs", "a number of seconds from 0",
        float, lambda seconds: 0 <= seconds < 1e9)
    log_level: str = _setting(
        "INFO", "DEBUG has a line for each job", "one of " + ", ".join(LEVELS),
        str.upper, lambda level: level in LEVELS)
    trace: str = _setting(
        "", "file for a timeline of the run, to be opened in Perfetto",
        "a file that can be written", is_good=_can_be_written)

    @property
    def urls(self) -> list[str]:
        """The URLs of the brokers to try, in this order."""
        return self.url.split(",")

    @property
    def counts_returns(self) -> bool:
        """Whether the queue is a quorum queue, which counts what comes back."""
        return self.queue_arguments.get("x-queue-type") == "quorum"

    def __post_init__(self) -> None:
        """Have each value read. Text is read, too, as from a variable."""
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value is None and setting.default is None:
                continue
            try:
                value = setting.metadata["read"](value)
                if not setting.metadata["is_good"](value):
                    raise ValueError
            except Exception as exc:    # the value of a URL may hold a password
                shown = f": {exc}" if setting.name == "url" else f", not {value!r:.100}"
                raise ValueError(f"OLIVE_{setting.name.upper()}: must be "
                                 f"{setting.metadata['must']}{shown}") from None
            object.__setattr__(self, setting.name, value)   # the class is frozen
        if self.dead_queue == self.queue:
            raise ValueError("OLIVE_DEAD_QUEUE: must not be OLIVE_QUEUE")
        if self.prefetch is None:
            object.__setattr__(self, "prefetch", 2 * (self.threads + self.processes))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> OliveAppConfig:
        """Read the settings from the environment; an empty value means the default.

        A value that makes no sense: one line on stderr, exit status 2.
        """
        try:
            return cls.read(environ)
        except ValueError as exc:
            fail(str(exc), 2)

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> OliveAppConfig:
        """Read the settings as `from_env` does, for a program that shall go on if they
        make no sense: raises ValueError."""
        known = {"OLIVE_" + setting.name.upper(): setting.name
                 for setting in fields(cls)}
        values = {}
        for variable, text in environ.items():
            if variable in known and text.strip():
                values[known[variable]] = text.strip()
            elif variable.startswith("OLIVE_") and text.strip():
                print(f"olive: unknown setting {variable} (ignored)", file=sys.stderr)
        return cls(**values)


def fail(text: str, status: int) -> None:
    """Say what is wrong in one line, and leave the program with this exit status."""
    print(f"olive: {text}", file=sys.stderr)
    raise SystemExit(status)


# =====================================================================================
# The command
#
# What `python olive_app.py` does with its arguments. The app itself has none: all its
# settings are variables of the environment, as suits a program that a supervisor
# starts, and so a program of one's own has the same ones.
# =====================================================================================

def _settings_help() -> str:
    lines = ["settings (environment variables):"]
    for setting in fields(OliveAppConfig):
        default = f" ({setting.default})" if setting.default else ""
        lines += [f"  OLIVE_{setting.name.upper()}",
                  f"      {setting.metadata['meaning']}{default}"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run tasks from RabbitMQ: the demo tasks (add, do_nothing, sleep_n, fib, fail) and
    those that the modules in OLIVE_TASKS register.
    """
    parser = argparse.ArgumentParser(
        prog="olive_app.py", description=inspect.getdoc(main), epilog=_settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version",
                        version=f"sweepea {sweepea.__version__}")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--with-broker", action="store_true", help="if no RabbitMQ "
                       "answers at OLIVE_URL, start one of one's own on port 5672, for "
                       "development; it goes with the app")
    group.add_argument("--demo", action="store_true", help="send a handful of tasks, "
                       "print what comes back, and exit; with a private RabbitMQ if "
                       "none answers")
    options = parser.parse_args(argv)
    sys.path.append(os.getcwd())        # for the modules in OLIVE_TASKS
    config = OliveAppConfig.from_env()
    config = replace(config, tasks=("olive_app", *config.tasks))
    if not options.with_broker and not options.demo:
        return OliveOly(config).start()
    olive_utils = importlib.import_module(_sibling("olive_utils"))
    try:
        if options.demo:
            return olive_utils.demo(config)
        if olive_utils.is_reachable(config):
            return OliveOly(config).start()
        with olive_utils.private_broker(
                5672, say="starting a RabbitMQ of our own ...") as broker:
            print(f"it listens on port {broker.port}, and goes when we go",
                  file=sys.stderr)
            OliveOly(replace(config, url=broker.url)).start()
    except olive_utils.BrokerError as exc:
        fail(str(exc), 1)
    except KeyboardInterrupt:       # before the app has its handlers, or after
        raise SystemExit(130) from None


def _sibling(module: str) -> str:
    """The name of a module of ours, which may have been copied into a package."""
    return f"{__package__}.{module}" if __package__ else module


if __name__ == "__main__":
    # As a script this file is the module `__main__`. Task modules and child processes
    # import `olive_app`, and so must we, or there would be two registries.
    importlib.import_module(_sibling("olive_app")).main()
