"""Olive: a tiny task-queue application on Sweepea.

    from olive_app import OliveAppConfig, OliveOly, task

    @task
    def resize(path, width): ...

    if __name__ == "__main__":
        OliveOly(OliveAppConfig.from_env()).start()

Functions marked with `@task` are run for messages that come from RabbitMQ, in threads,
in processes or, if they are coroutines, on the kernel itself. The messages are those of
Celery (protocol 2). `python olive_app.py --help` says how to run the demo tasks.

The promise is at-least-once: a message leaves its queue only when its work is done and
its reply sent, or when it lies, confirmed, in the dead queue.

Copyright (c) 2026 the Sweepea authors. SPDX-License-Identifier: MIT
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import inspect
import itertools
import json
import logging
import os
import random
import signal
import socket
import sys
import time
import traceback
import uuid
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, Callable, Mapping

import pika
from pika.exceptions import AMQPError, ChannelClosedByBroker

import sweepea
from sweepea import (
    CancelledError, Event, Kernel, Link, ProcessPool, Semaphore, ThreadPool, WorkerLost,
    _read_wait, current_task, describe, ignore_after, sleep, spawn)

log = logging.getLogger("olive")

MAX_RESULT = 16 << 20           # bytes of JSON; RabbitMQ 4 takes no larger message
MAX_HEADERS = 130_000           # bytes; a header frame has to fit into 128 KiB
MAX_ERROR, MAX_TRACEBACK = 1_000, 16_000    # characters, of what the dead queue keeps
# Celery's clients know these by name, and where they live:
MODULES = {"NotRegistered": "celery.exceptions",
           "WorkerLostError": "billiard.exceptions",
           "TimeLimitExceeded": "billiard.exceptions"}
MAX_RETURNS = 5                 # how often a message may come back, and be tried again
SUSPECT = 3                     # having come back so often, it is a suspect
LADDER = 17                     # rungs of the ladder of wait queues: 1 s ... 65,536 s


# =====================================================================================
# Settings
# =====================================================================================

@dataclass(frozen=True)
class OliveAppConfig:
    """The settings of an app; `OLIVE_` + the name in capitals is the variable of each.

    Times are in seconds. Raises ValueError, naming the variable, for a value that makes
    no sense.
    """

    url: str = "amqp://guest:guest@localhost:5672/%2F"
    exchange: str = "Olive.x"
    queue: str = "Olive.q"
    routing_key: str = "Olive.k"
    queue_arguments: dict = field(default_factory=dict)
    dead_queue: str = "Olive.dead"
    tasks: tuple[str, ...] = ()
    worker: str = "thread"
    threads: int = 20
    processes: int = os.cpu_count() or 1
    prefetch: int = 80
    task_timeout: float | None = None
    grace: float = 30.0
    log_level: str = "INFO"
    trace: str = ""

    @property
    def urls(self) -> list[str]:
        """The URLs of the brokers to try, in this order."""
        return [url.strip() for url in self.url.split(",")]

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, text: str) -> None:
            if not ok:
                raise ValueError(f"OLIVE_{name.upper()}: {text}")

        for url in self.urls:
            try:
                check(url.startswith(("amqp://", "amqps://")), "url", "")
                pika.URLParameters(url)
            except Exception:   # (its text may hold the password)
                check(False, "url", "must be amqp://user:password@host:port/vhost or "
                      "amqps://..., or several of them, separated by commas")
        for name in ("exchange", "queue", "routing_key", "dead_queue"):
            value = getattr(self, name)
            # 255 bytes is the limit of AMQP, and the wait queues add to the name
            check(isinstance(value, str) and value.isprintable()
                  and 0 < len(value.encode()) <= 240, name,
                  "must have 1 to 240 bytes of printable text")
            check(not value.startswith("amq."), name, "'amq.' belongs to the broker")
        check(self.dead_queue not in (self.queue, suspects(self.queue)), "dead_queue",
              "must not be OLIVE_QUEUE, nor its queue of suspects")
        check(isinstance(self.queue_arguments, dict), "queue_arguments",
              'must be a JSON object, such as {"x-queue-type": "quorum"}')
        check(self.worker in ("thread", "process"), "worker",
              f"must be thread or process, not {self.worker!r}")
        for name, most in {"threads": 10_000, "processes": 1_000,
                           "prefetch": 65_535}.items():
            value = getattr(self, name)
            check(type(value) is int and 1 <= value <= most, name,
                  f"must be a whole number from 1 to {most}, not {value!r}")
        for name in "task_timeout", "grace":
            value = getattr(self, name)
            least = "at least" if name == "grace" else "above"
            check(isinstance(value, (int, float)) and 0 <= value < 1e9
                  and (value > 0 or name == "grace")
                  or value is None and name == "task_timeout",
                  name, f"must be a number of seconds {least} 0, not {value!r}")
        check(self.log_level in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
              "log_level", "must be DEBUG, INFO, WARNING, ERROR or CRITICAL")
        folder = os.path.dirname(self.trace) or "."
        check(os.access(folder, os.W_OK) and not os.path.isdir(self.trace), "trace",
              f"cannot write the file {self.trace!r}")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> OliveAppConfig:
        """Read the settings from the environment; an empty value means the default.

        A value that makes no sense: one line on stderr, exit status 2.
        """
        readers: dict[str, Callable] = {
            "threads": int, "processes": int, "prefetch": int, "task_timeout": float,
            "grace": float, "queue_arguments": json.loads, "log_level": str.upper,
            "tasks": lambda text: tuple(name.strip() for name in text.split(",")
                                        if name.strip())}
        given = {name: value for name, value in environ.items()
                 if name.startswith("OLIVE_") and value.strip()}
        values = {}
        try:
            for name in (f.name for f in fields(cls)):
                variable = "OLIVE_" + name.upper()
                if variable in given:
                    value = given.pop(variable).strip()
                    try:
                        values[name] = readers.get(name, str)(value)
                    except (ValueError, RecursionError):
                        values[name] = value    # the check will say what it must be
            config = cls(**values)
        except ValueError as exc:
            fail(str(exc), 2)
        for name in given:
            print(f"olive: unknown setting {name} (ignored)", file=sys.stderr)
        return config


def fail(text: str, status: int) -> None:
    """Say what is wrong in one line and leave."""
    print(f"olive: {text}", file=sys.stderr)
    raise SystemExit(status)


# =====================================================================================
# Tasks: functions that may be called by name from the wire, and no others
# =====================================================================================

@dataclass(frozen=True)
class OliveTask:
    """A registered function and how it is to be run."""

    function: Callable
    worker: str | None      # "thread", "process", or None: the configuration's choice
    timeout: float | None
    retries: int
    retry_delay: float


TASKS: dict[str, OliveTask] = {}


def task(name: str | Callable | None = None, worker: str | None = None,
         timeout: float | None = None, retries: int = 0,
         retry_delay: float = 1.0) -> Callable:
    """Register a function as a task: `@task` or `@task(worker="process", retries=3)`.

    `name` defaults to the function's; a coroutine function runs on the kernel. After
    `timeout` seconds it is stopped; when it has failed it is tried again up to
    `retries` times, after `retry_delay` seconds, then twice that, and so on. Raises
    ValueError for a name that is taken. The idea of a decorator that is the whole API
    is Huey's.
    """
    if callable(name):
        return task()(name)
    if worker not in (None, "thread", "process"):
        raise ValueError(f"worker must be 'thread' or 'process', not {worker!r}")
    if not (timeout is None or timeout > 0) or retry_delay < 0 or not (
            type(retries) is int and retries >= 0):
        raise ValueError("timeout must be above 0, retries and retry_delay at least 0")

    def register(function: Callable) -> Callable:
        key = name or function.__name__
        if key in TASKS:
            raise ValueError(f"there are two tasks of the name {key!r}")
        TASKS[key] = OliveTask(function, worker, timeout, retries, retry_delay)
        return function

    return register


@functools.cache
def demo_tasks() -> None:
    """Register the five demo tasks; "olive_app" in OLIVE_TASKS stands for these."""

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


def load_tasks(modules: tuple[str, ...]) -> None:
    """Import the modules that register tasks. In children, too: each has a registry."""
    for module in modules:
        demo_tasks() if module == "olive_app" else importlib.import_module(module)


# =====================================================================================
# Running a task: bytes in, bytes out
#
# The main process moves messages and nothing else. The body goes to the worker as the
# bytes that came and is decoded there; what comes back is plain and quick to pickle:
#
#     ("done", reply, next)                          reply: the JSON to answer with
#     (reason, error, next)                          error: (type, module, text, trace)
#
# `next` are the messages that the outcome calls for (the next step of a chain,
# callbacks, errbacks), each a tuple (headers, reply_to, body).
# =====================================================================================

class Unsupported(Exception):
    """The message asks for something that Sweepea does not have."""


def _decode(body: bytes) -> tuple[list, dict, dict]:
    """Take the body of a message apart. Raises ValueError if it is not a good one."""
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    try:
        args, kwargs, embed = json.loads(body.decode(), parse_constant=refuse)
    except RecursionError:
        raise ValueError("the body is nested too deeply") from None
    except TypeError:
        raise ValueError("the body is not [args, kwargs, embed]") from None
    embed = embed or {}
    if not (isinstance(args, list) and isinstance(kwargs, dict)
            and isinstance(embed, dict)):
        raise ValueError("the body is not [args, kwargs, embed]")
    steps = []
    for key in "callbacks", "errbacks", "chain":
        steps += embed.setdefault(key, None) or []
    for step in steps:
        options = step.get("options") or {} if isinstance(step, dict) else None
        if not (isinstance(options, dict) and isinstance(step.get("task"), str)):
            raise ValueError("a callback or a step of the chain is not a signature")
        for name in step["task"], options.get("task_id"), options.get("reply_to"):
            if name is not None and not (
                    isinstance(name, str) and len(name.encode()) <= 255):
                raise ValueError("a callback or a step of the chain cannot be sent")
        if step["task"].startswith("celery."):
            raise Unsupported(f"{step['task']} needs a result store")
    if embed.get("chord"):
        raise Unsupported("a chord needs a result store")
    return args, kwargs, embed


def _message(step: dict, args: list, chain: list | None, ids: dict) -> tuple:
    """Make a message of a signature, its arguments and the rest of the chain."""
    options = step.get("options") or {}
    ident = options.get("task_id") or str(uuid.uuid4())
    if not step.get("immutable"):
        args = args + list(step.get("args") or ())
    else:
        args = list(step.get("args") or ())
    embed = {"callbacks": options.get("link"), "errbacks": options.get("link_error"),
             "chain": chain or None, "chord": None}
    headers = {"lang": "py", "task": step["task"], "id": ident, "retries": 0, **ids}
    return headers, options.get("reply_to"), json.dumps(
        [args, step.get("kwargs") or {}, embed]).encode()


def _succeed(ident: str, ids: dict, result: Any, embed: dict) -> tuple:
    reply = json.dumps({"task_id": ident, "status": "SUCCESS", "result": result,
                        "traceback": None, "children": []}, allow_nan=False).encode()
    if len(reply) > MAX_RESULT:
        raise ValueError(f"the result is larger than {MAX_RESULT} bytes of JSON")
    following = [_message(step, [result], None, ids)
                 for step in embed["callbacks"] or ()]
    if chain := embed["chain"]:     # a stack: the next step is its last element
        following.append(_message(chain[-1], [result], chain[:-1], ids))
    return "done", reply, following


def _failure(reason: str, exc: BaseException, embed: dict | None = None,
             ident: str = "", ids: dict | None = None) -> tuple:
    try:
        text = str(exc)
        trace = "".join(traceback.format_exception(exc)) if exc.__traceback__ else ""
    except BaseException:       # an exception whose str() raises
        text, trace = "(no text)", "".join(traceback.format_tb(exc.__traceback__))
    kind = type(exc).__name__
    error = (kind, MODULES.get(kind, type(exc).__module__),
             _clean(text)[:MAX_TRACEBACK], _clean(trace)[-MAX_TRACEBACK:])
    following = [_message(step, [ident], None, ids or {})
                 for step in (embed or {}).get("errbacks") or ()]
    return reason, error, following


def _clean(text: str) -> str:
    """Text that can be sent: half of a surrogate pair cannot be."""
    return text.encode("utf-8", "backslashreplace").decode()


async def _perform(name: str, ident: str, ids: dict, body: bytes,
                   on_kernel: bool = True) -> tuple:
    """Run a task of which the body has come; return its outcome, whatever it does."""
    embed = None
    try:
        args, kwargs, embed = _decode(body)
        result = TASKS[name].function(*args, **kwargs)
        if inspect.iscoroutine(result):
            result = await result
        return _succeed(ident, ids, result, embed)
    except BaseException as exc:    # SystemExit and KeyboardInterrupt as well
        if embed is None:
            return _failure("unsupported" if isinstance(exc, Unsupported)
                            else "malformed", exc.with_traceback(None))
        if on_kernel and isinstance(exc, CancelledError) and (
                await current_task()).cancelled:
            raise                   # it was the app that wanted the end
        # (the first frame is the one above; the task begins with the next)
        return _failure("failed", exc.with_traceback(exc.__traceback__.tb_next), embed,
                        ident, ids)


def _execute(*call) -> tuple:
    """The same in a worker: a coroutine that never waits ends at its first send."""
    try:
        _perform(*call, on_kernel=False).send(None)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("a task that is no coroutine function returned a coroutine")


def _execute_in_child(modules: tuple[str, ...], *call) -> tuple:
    load_tasks(modules)
    return _execute(*call)


class TimeLimitExceeded(Exception):
    """The task ran longer than it may."""


class WorkerLostError(Exception):
    """The process died that ran the task."""


class NotRegistered(Exception):
    """There is no task of that name here."""


# =====================================================================================
# Messages
# =====================================================================================

def _instant(value: Any, name: str) -> datetime | None:
    """Read an ISO 8601 header; one without a zone is in UTC, as Celery has it."""
    if value is None:
        return None
    try:    # (Python 3.10 does not read the Z)
        instant = datetime.fromisoformat(value.replace("Z", "+00:00"))
        instant = instant if instant.tzinfo else instant.replace(tzinfo=timezone.utc)
        return instant.astimezone(timezone.utc)
    except (ValueError, AttributeError, TypeError, OverflowError):
        raise ValueError(f"the header {name!r} is not a time") from None


def _count(value: Any, name: str) -> int:
    if value is None:
        return 0
    if type(value) is not int or value < 0:
        raise ValueError(f"the header {name!r} is not a count")
    return min(value, 1000)


class Request:
    """What the properties of a message say. Raises ValueError if they make no sense."""

    def __init__(self, properties: pika.BasicProperties) -> None:
        headers = properties.headers or {}
        if properties.content_type != "application/json":
            raise ValueError("the content type is not application/json")
        if (properties.content_encoding or "utf-8").lower() != "utf-8":
            raise ValueError("the content encoding is not utf-8")
        if headers.get("compression"):
            raise ValueError("the body is compressed")
        self.name = headers.get("task")
        if not isinstance(self.name, str) or not self.name:
            raise ValueError("there is no header 'task' with a name")
        self.id = headers.get("id") or properties.correlation_id
        if not isinstance(self.id, str):
            raise ValueError("there is no header 'id' with a text")
        self.eta = _instant(headers.get("eta"), "eta")
        self.expires = _instant(headers.get("expires"), "expires")
        limits = headers.get("timelimit") or [None, None]
        if not (isinstance(limits, list) and len(limits) == 2 and all(
                limit is None or type(limit) in (int, Decimal) and limit >= 0
                for limit in limits)):
            raise ValueError("the header 'timelimit' is not [hard, soft]")
        limit = limits[0] if limits[0] is not None else limits[1]
        # pika cuts off what a double has behind the point: 0 was something below 1
        self.limit = None if limit is None else float(limit) or 1.0
        self.retries = _count(headers.get("retries"), "retries")
        self.returns = _count(headers.get("x-olive-returns"), "x-olive-returns")
        self.ids = {"root_id": headers.get("root_id") or self.id, "parent_id": self.id}


DROPPED = {"CC", "BCC", "x-death", "x-delivery-count"}


def _again(properties: pika.BasicProperties, **changes: Any) -> pika.BasicProperties:
    """The properties to publish a message again with, less what would make the broker
    drop, refuse or multiply it, and with some headers changed."""
    again = copy.copy(properties)
    again.headers = {
        name: value for name, value in (properties.headers or {}).items()
        if isinstance(name, str) and name not in DROPPED
        and not name.startswith("x-first-death-")}
    again.headers.update(changes)
    again.delivery_mode, again.expiration, again.user_id = 2, None, None
    while not _fits(again):     # then the largest of the headers that came has to go
        names = sorted(again.headers, key=lambda name: len(repr(again.headers[name])))
        names = [name for name in names if name not in changes] or names
        del again.headers[names[-1]]
    return again


def _fits(properties: pika.BasicProperties) -> bool:
    try:
        return not properties.headers or (
            sum(map(len, properties.encode())) <= MAX_HEADERS)
    except Exception:           # pika decodes some things that it cannot encode
        return False


def _shown(text: Any) -> str:
    """Text from the wire for the log: no control characters, not too long."""
    return repr(text)[:200]


def suspects(queue: str) -> str:
    """The name of the queue of those that may have killed the app."""
    return f"{queue}.suspects"


def wait_exchange(queue: str, rung: int) -> str:
    """The name of a rung of the ladder: its exchange, and its queue too."""
    return f"{queue}.wait.{rung}"


def wait_key(seconds: float) -> str:
    """The delay in binary, as a routing key; longer ones come back and wait again."""
    return ".".join(f"{min(int(seconds), (1 << LADDER) - 1):0{LADDER}b}")


# The ladder in which messages wait, inside the broker. 5 s is ...0101 in binary:
#
#   publish      +---------+   1: yes   +----------------+  4 s   +---------+
#   ...0.1.0.1 ->| wait.2  |----------->| queue of rung 2|------->| wait.1  |
#                | exchange|            +----------------+  dead  | exchange|
#                +---------+                              letter  +----+----+
#                                                                      | 0: no
#      Olive.q  <-- 1 s --- queue of rung 0 <--- 1: yes ---  wait.0 <--+
#
# Quorum queues with the strategy at-least-once confirm each hop inside the broker.
async def declare_topology(channel: sweepea.Channel, config: OliveAppConfig) -> None:
    """Declare exchange, queues and ladder; harmless if they are there.

    Raises pika's ChannelClosedByBroker if one is there with other arguments.
    """
    # Without a callback pika asks for no answer, so that all goes out at once, and not
    # one round trip after the other. The last waits, and learns of what went wrong.
    declare, queue = channel.pika, config.queue
    declare.exchange_declare(config.exchange, "direct", durable=True)
    declare.queue_declare(queue, durable=True, arguments=config.queue_arguments)
    declare.queue_bind(queue, config.exchange, config.routing_key)
    for rung in range(LADDER):
        name, below = wait_exchange(queue, rung), wait_exchange(queue, rung - 1)
        declare.exchange_declare(name, "topic", durable=True)
        arguments = {"x-queue-type": "quorum", "x-overflow": "reject-publish",
                     "x-message-ttl": 1000 << rung,
                     "x-dead-letter-strategy": "at-least-once",
                     "x-dead-letter-exchange": below if rung else ""}
        if rung == 0:
            arguments["x-dead-letter-routing-key"] = queue
        declare.queue_declare(name, durable=True, arguments=arguments)
        before = "*." * (LADDER - 1 - rung)
        declare.queue_bind(name, name, f"{before}1.#")
        if rung == 0:
            declare.queue_bind(queue, name, f"{before}0.#")
        else:
            declare.exchange_bind(below, name, f"{before}0.#")
    # What is dead has to survive what the queue survives: it is of the same type.
    alike = {key: value for key, value in config.queue_arguments.items()
             if key == "x-queue-type"}
    declare.queue_declare(suspects(queue), durable=True, arguments=alike)
    await channel.call("queue_declare", config.dead_queue, durable=True,
                       arguments=alike)


# =====================================================================================
# The app: the life of a message
#
#   delivered --> a kernel task is spawned (_live)
#       |
#       +-- came back to us, and we have it in hand ------------> settle (below)
#       +-- came back, not in hand: may have killed us ---------> sent again, counted
#       +-- came back three times ------------------------------> queue of suspects
#       +-- makes no sense, unknown, failed for good -----------> dead queue
#       +-- eta in the future, or failed and to be retried -----> ladder of wait queues
#       +-- done -----------------------------------------------> next steps, if any
#       |
#       v
#   settle: the reply, then the acknowledgement, on the channel that delivered it
#
# Whatever is published here is confirmed before anything is acknowledged. So at every
# moment the message is in the broker at least once: still unacknowledged, or anew. If
# the next line never runs, the broker hands it out again.
# =====================================================================================

class _Run:
    """A message in hand, from its delivery until it is settled, and a while longer."""

    def __init__(self, channel: sweepea.Channel, method, properties, body,
                 is_suspect: bool) -> None:
        self.deliver(channel, method.delivery_tag)
        self.redelivered = method.redelivered
        self.is_suspect = is_suspect    # it came by their queue
        self.properties, self.body = properties, body
        self.task: sweepea.Task | None = None
        self.name = "?"
        self.started = False            # a stop waits for it
        self.given_back = False         # a stop did not
        self.leaving = False            # it may kill us, and is being sent elsewhere
        self.done = False
        self.acked = False              # said on an open channel; it may still be lost
        self.reply: bytes | None = None
        self.tries = 0                  # how often it was tried to settle it

    def deliver(self, channel: sweepea.Channel, tag: int) -> None:
        self.channel, self.tag = channel, tag

    def expects(self, redelivered: bool) -> bool:
        """Whether its message has to come back, since the old delivery is void."""
        if self.done and self.acked:
            return redelivered and self.channel.closed is not None
        return self.done or self.channel.closed is not None


class OliveOly:
    """The app. `OliveOly(config).start()` runs until it is told to stop."""

    def __init__(self, config: OliveAppConfig | None = None) -> None:
        self.config = config or OliveAppConfig()
        self._stop = Event()
        self._status = 0
        self._signals = 0
        self._consumers: list[tuple] = []               # (channel, consumer tag)
        self._in_hand: set[_Run] = set()
        self._runs: dict[tuple, _Run] = {}              # in hand, or done a while ago
        # those done, in the order in which they were last settled; apart from them the
        # ones not acknowledged: these come back for sure, and must not be pushed out
        self._done: dict[bool, dict[tuple, _Run]] = {True: {}, False: {}}
        self._settling = Semaphore(1)                   # see _settle_again
        self._trace = None
        if self.config.trace:
            self._trace = open(self.config.trace, "w")
            print("[", file=self._trace)
        for module in self.config.tasks:
            try:
                load_tasks((module,))
            except (Exception, SystemExit) as exc:
                where = traceback.extract_tb(exc.__traceback__)[-1]
                fail(f"OLIVE_TASKS: {module}: {type(exc).__name__}: {exc} "
                     f"({where.filename}:{where.lineno})", 2)

    # -- starting and stopping ---------------------------------------------------------

    def start(self, *background: Callable) -> None:
        """Work until SIGTERM or SIGINT; returns then, or exits with a status.

        `background` are coroutine functions that run on the kernel beside it. A second
        signal leaves at once, with status 128 + its number. Exit status 1: the broker
        refuses us, or too many threads hang in tasks that do not end.
        """
        logging.basicConfig(
            level=self.config.log_level, format="%(asctime)s %(levelname)s %(message)s")
        # what pika reports, the link says in one line
        logging.getLogger("pika").setLevel(logging.CRITICAL)
        # A signal handler of Python's does not end pika's poll, and one that took a
        # lock could wait for the very code that it interrupted. But the interpreter
        # itself can write each signal to a socket, and a kernel task reads that.
        self._bell, theirs = socket.socketpair()
        self._bell.setblocking(False)
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        before = {signum: signal.signal(signum, self._on_signal)
                  for signum in (signal.SIGTERM, signal.SIGINT)}
        try:
            with Kernel() as kernel:
                kernel.run(self._main, background)
        finally:
            signal.set_wakeup_fd(-1)
            for signum, handler in before.items():
                signal.signal(signum, handler)
            theirs.close()
            self._bell.close()
        if self._status:
            raise SystemExit(self._status)

    def stop(self, status: int = 0) -> None:
        """Stop as by SIGTERM, from a coroutine; exit with this status."""
        self._status = self._status or status
        self._stop._set = True
        self._kernel._trap_sched_wake(self._stop._waiting, len(self._stop._waiting))

    def _on_signal(self, signum: int, _frame) -> None:
        self._signals += 1
        if self._signals > 1:
            os.write(2, b"olive: leaving at once\n")
            os._exit(128 + signum)

    async def _listen(self) -> None:
        while not self._signals:
            await _read_wait(self._bell)
            self._bell.recv(100)
        self.stop()

    async def _main(self, background: tuple) -> None:
        config = self.config
        self._kernel = kernel = await sweepea._get_kernel()
        self._threads = ThreadPool(kernel, config.threads)
        self._processes = ProcessPool(kernel, config.processes)
        self._link = Link(config.urls, self._on_connect)
        await spawn(self._listen, daemon=True)
        link = await spawn(self._stay_connected, daemon=True)
        for corofunc in background:
            await spawn(corofunc, daemon=True)
        await self._stop.wait()

        log.info("stopping: %d in hand", len(self._in_hand))
        async with ignore_after(config.grace):
            await self._finish()
        for run in self._in_hand:
            if run.started:
                log.warning("given back, as it did not end in time: %s", run.name)
        await link.cancel()

    async def _stay_connected(self) -> None:
        try:
            await self._link.run()
        except AMQPError as exc:
            what = describe(exc)
            if not isinstance(exc, ChannelClosedByBroker):
                what += " (check OLIVE_URL)"
            elif f"queue '{self.config.queue}'" in what:
                what += " (delete it, or set OLIVE_QUEUE_ARGUMENTS as it was declared)"
            else:
                what += " (delete it, or choose another name)"
            log.error("the broker refuses us: %s", what)
            self.stop(1)

    async def _finish(self) -> None:
        """Take no more; give back what has not started; wait for what runs."""
        for channel, tag in self._consumers:
            try:
                await channel.call("basic_cancel", tag)
            except AMQPError:
                pass        # gone, and the consumer with it
        runs = list(self._in_hand)
        for run in runs:
            if not run.started:
                run.given_back = True
                await run.task.cancel(blocking=False)
                if not run.is_suspect:
                    run.channel.basic_nack(run.tag)
        for run in runs:
            # What is given back counts as come back. Of the suspects it is always the
            # same one: a few stops would bury it, so it is sent there anew.
            if run.given_back and run.is_suspect and self._link.up.is_set():
                await self._move(run, "", suspects(self.config.queue))
            await run.task.wait()

    async def _on_connect(self, connection, channel: sweepea.Channel) -> None:
        config = self.config
        await declare_topology(channel, config)
        self._consumers = []

        def on_message(_channel, method, properties, body) -> None:
            if not self._stop.is_set():     # else it goes back when we go
                run = _Run(channel, method, properties, body,
                           method.routing_key == suspects(config.queue))
                self._in_hand.add(run)
                run.task = self._kernel._spawn(self._live(run))
                run.task.daemon = True

        # One suspect at a time: the others stay in their queue, so that they are not
        # counted with the one that kills the app. (They come first, since a round trip
        # sets the figure for whatever consumer comes next.)
        for queue, most in (suspects(config.queue), 1), (config.queue, config.prefetch):
            if not self._stop.is_set():
                await channel.call("basic_qos", prefetch_count=most)
                frame = await channel.call("basic_consume", queue, on_message)
                self._consumers.append((channel, frame.method.consumer_tag))
        if not self._link.ever_up:
            log.info("waiting for tasks in %s: %s", config.queue,
                     ", ".join(sorted(TASKS)))

    # -- the life of a message ---------------------------------------------------------

    async def _live(self, run: _Run) -> None:
        began = time.time()
        try:
            if not run.given_back:
                await self._decide(run)
        except AMQPError as exc:
            log.warning("%s goes back to the broker: %s", run.name, describe(exc))
        except Exception as exc:    # a fault of ours must not hold the message for ever
            log.exception("%s: a fault of the app", run.name)
            await self._bury(run, _failure("failed", exc))
        finally:
            self._in_hand.discard(run)
            if self._trace:
                print(json.dumps({
                    "name": run.name, "ph": "X", "pid": os.getpid(), "tid": run.tag,
                    "ts": began * 1e6, "dur": (time.time() - began) * 1e6}),
                    end=",\n", file=self._trace)

    async def _decide(self, run: _Run) -> None:
        headers = run.properties.headers or {}
        # Same id, same body, and the same copy of it: the one that waited, or was sent
        # to be tried again, must not be taken for the one that was settled for it.
        key = repr(headers.get("id")), run.properties.message_id, hash(run.body)
        known = self._runs.get(key)
        if known is not None and known.expects(run.redelivered):
            # Our connection was lost while we had it. The work goes on, or is done
            # already; only the delivery is a new one.
            known.deliver(run.channel, run.tag)
            if known.done:
                run.started = True
                await self._settle_again(known)
                self._keep(key, known)
            return
        self._runs[key] = run
        try:
            await self._work(run)
        finally:
            if not run.done:
                if self._runs.get(key) is run:
                    del self._runs[key]
            else:
                run.body = b""      # only the reply may be needed again
                self._keep(key, run)

    def _keep(self, key: tuple, run: _Run) -> None:
        """Keep an outcome, since its message may come back; forget the oldest one."""
        for kept in self._done.values():
            kept.pop(key, None)
        kept = self._done[run.acked]
        kept[key] = run
        self._runs.setdefault(key, run)     # (forgotten while it was settled again)
        if len(kept) > self.config.prefetch + 1:    # (and a suspect)
            key = next(iter(kept))
            if self._runs.get(key) is kept.pop(key):
                del self._runs[key]

    async def _work(self, run: _Run) -> None:
        try:
            request = Request(run.properties)
        except ValueError as exc:
            await self._bury(run, _failure("malformed", exc))
            return
        run.name = f"{_shown(request.name)}[{_shown(request.id)[1:-1]}]"
        if run.redelivered:
            await self._returned(run, request)
            return
        if request.returns >= SUSPECT and not run.is_suspect:
            run.leaving = True
            await self._move(run, "", suspects(self.config.queue))
            return
        if request.returns:
            await self._others_gone(run)
            if run.given_back:  # woken and cancelled in the same turn
                return
        now = datetime.now(timezone.utc)
        if request.expires and now > request.expires:
            run.reply = self._error_reply(request, "REVOKED", (
                "TaskRevokedError", "celery.exceptions", "expired", ""))
            self._settle(run)
            return
        if request.eta:
            wait = (request.eta - now).total_seconds()
            if wait >= 1:
                await self._wait(run, wait)
                return
            if wait > 0:
                await sleep(wait)
                if run.given_back:  # likewise
                    return
        if request.name not in TASKS:
            await self._bury(run, _failure("unknown-task", NotRegistered(request.name)),
                             request)
            return
        registered = TASKS[request.name]
        reason, answer, following = await self._run(run, request, registered)
        run.started = True
        log.debug("%s: %s", run.name, reason)
        if reason == "done":
            for headers, reply_to, body in following:
                await self._publish_following(headers, reply_to, body)
            run.reply = answer
            self._settle(run)
            return
        most = registered.retries
        if reason == "worker-lost":     # it may have been the neighbours' fault
            most = max(most, 1)
        if reason in ("failed", "timeout", "worker-lost") and request.retries < most:
            delay = registered.retry_delay * 2 ** min(request.retries, 20)
            delay *= random.uniform(1, 1.25)
            eta = datetime.now(timezone.utc) + timedelta(seconds=delay)
            log.info("%s: %s: %s; try %d of %d in %.1f s", run.name, answer[0],
                     _shown(answer[2]), request.retries + 2, most + 1, delay)
            await self._wait(run, delay, retries=request.retries + 1,
                             eta=eta.isoformat())
            return
        for headers, reply_to, body in following:
            await self._publish_following(headers, reply_to, body)
        await self._bury(run, (reason, answer, []), request)

    async def _others_gone(self, run: _Run) -> None:
        """Wait until those that leave are acknowledged, as this one may kill us.

        They must not come back then, to be counted with it. One of them may be what
        this one is a copy of, and there would be two that kill us.
        """
        while any(other.leaving for other in self._in_hand):
            await sleep(0.01)
        # What was acknowledged may still lie in pika's buffer; after a round trip not.
        # (If the connection is lost meanwhile, the work goes on as any other.)
        with suppress(AMQPError):
            await self._round_trip(run)

    async def _run(self, run: _Run, request: Request, registered: OliveTask) -> tuple:
        """Run the task where it belongs; return its outcome."""
        limits = [limit for limit in (registered.timeout, request.limit)
                  if limit is not None]
        limit = min(limits) if limits else self.config.task_timeout
        call = request.name, request.id, request.ids, run.body
        expired = False
        try:
            if inspect.iscoroutinefunction(registered.function):
                run.started = True
                run.task.name = run.name    # should it block the loop, it is named
                if limit is None:
                    return await _perform(*call)
                outcome = await self._run_limited(run, call, limit)
                expired = outcome is None
            else:
                process = (registered.worker or self.config.worker) == "process"
                pool = self._processes if process else self._threads
                async with pool.slots:
                    run.started = True      # from here on the time counts
                    async with ignore_after(limit) as timer:
                        if process:
                            outcome = await pool.call(
                                _execute_in_child, (self.config.tasks, *call))
                        else:
                            outcome = await pool.call(_execute, call)
                    expired = timer.expired
        except WorkerLost as exc:
            return _failure("worker-lost", WorkerLostError(str(exc)))
        except Exception as exc:        # a child that cannot import the modules, say
            return _failure("failed", exc)
        if expired:
            if len(self._threads.abandoned) >= self.config.threads:
                log.error("every thread hangs in a task that does not end: stopping, "
                          "to be started afresh")
                self.stop(1)
            return _failure("timeout", TimeLimitExceeded(f"{limit:g} s"))
        return outcome

    async def _run_limited(self, run: _Run, call: tuple, limit: float) -> tuple | None:
        # A coroutine may swallow its cancellation. It runs in a task of its own, so
        # that its message need not wait for it.
        child = await spawn(_perform(*call), daemon=True)
        child.name = run.name
        try:
            await ignore_after(limit, child.wait())
            return child.result if child.terminated else None
        finally:
            if not child.terminated:
                await child.cancel(blocking=False)

    # -- what becomes of it ------------------------------------------------------------

    def _settle(self, run: _Run) -> None:
        """Reply and acknowledge, in this order, on the channel that delivered it."""
        run.done = True
        run.tries += 1
        reply_to = run.properties.reply_to
        if run.channel.closed is None and run.channel.pika.is_open:
            if reply_to and run.reply is not None:
                properties = pika.BasicProperties(
                    content_type="application/json", content_encoding="utf-8",
                    delivery_mode=2, correlation_id=run.properties.correlation_id)
                run.channel.pika.basic_publish("", reply_to, run.reply, properties)
            run.acked = run.channel.basic_ack(run.tag)

    async def _settle_again(self, run: _Run) -> None:
        # A reply that the broker does not take (too large for it, an address that makes
        # it choke) closes the channel, and its message comes again, and again. So those
        # that come a third time are settled one by one, each with a round trip to see
        # whether the channel lives. The one that kills it gets no reply any more.
        if run.tries < 2:
            self._settle(run)
            return
        async with self._settling:
            if run.channel.closed is None:
                self._settle(run)
                try:
                    await self._round_trip(run)
                except AMQPError:
                    run.reply = None

    async def _round_trip(self, run: _Run) -> None:
        """Return when the broker has read all that was said on the channel so far."""
        await run.channel.call("basic_qos", prefetch_count=self.config.prefetch)

    def _error_reply(self, request: Request | None, status: str, error: tuple) -> bytes:
        kind, module, text, trace = error
        return json.dumps({
            "task_id": request and request.id, "status": status, "result": {
                "exc_type": kind, "exc_message": [text], "exc_module": module},
            "traceback": trace, "children": []}).encode()

    async def _bury(self, run: _Run, outcome: tuple,
                    request: Request | None = None) -> None:
        """Put it into the dead queue with the reason, reply FAILURE, acknowledge."""
        run.started = True
        reason, error, _ = outcome
        kind, _, text, trace = error
        log.warning("%s is dead (%s): %s: %s", run.name, reason, kind, _shown(text))
        await self._publish("", self.config.dead_queue, run.body, _again(
            run.properties, **{"x-olive-reason": reason,
                               "x-olive-error": f"{kind}: {text}"[:MAX_ERROR],
                               "x-olive-traceback": trace}))
        run.reply = self._error_reply(request, "FAILURE", error)
        self._settle(run)

    async def _wait(self, run: _Run, seconds: float, **changes: Any) -> None:
        """Let it wait in the ladder, with some headers changed."""
        if seconds >= 1:
            ladder = wait_exchange(self.config.queue, LADDER - 1)
            await self._move(run, ladder, wait_key(seconds), **changes)
        else:
            await self._move(run, "", self.config.queue, **changes)

    async def _move(self, run: _Run, exchange: str, key: str, **changes: Any) -> None:
        """Put it into another queue, with some headers changed, and acknowledge."""
        run.started = True
        again = _again(run.properties, **changes)
        again.message_id = uuid.uuid4().hex     # not its original: see _decide
        await self._publish(exchange, key, run.body, again)
        self._settle(run)

    async def _returned(self, run: _Run, request: Request) -> None:
        """Count a message that came back: it may be what killed the one who had it."""
        run.leaving = True
        if request.returns >= MAX_RETURNS:
            error = RuntimeError(
                f"came back {request.returns + 1} times: does it kill us?")
            await self._bury(run, _failure("returned", error), request)
            return
        await self._wait(run, 2 ** request.returns if request.returns else 0,
                         **{"x-olive-returns": request.returns + 1})

    async def _publish_following(self, headers: dict, reply_to, body: bytes) -> None:
        properties = pika.BasicProperties(
            content_type="application/json", content_encoding="utf-8", delivery_mode=2,
            correlation_id=headers["id"], reply_to=reply_to, headers=headers)
        await self._publish(self.config.exchange, self.config.routing_key, body,
                            properties)

    async def _publish(self, exchange: str, key: str, body: bytes,
                       properties: pika.BasicProperties) -> None:
        """Publish until it is confirmed; if something is missing, declare it again."""
        for attempt in itertools.count():
            try:
                return await self._link.publish(exchange, key, body, properties)
            except AMQPError as exc:
                error = exc
            connection = self._link._connection
            lost = connection is None or connection.closed is not None
            if not lost:
                log.warning("could not publish to %s: %s; trying again",
                            exchange or key, describe(error))
            await sleep(min(sweepea.MAX_BACKOFF, 0.1 * 2 ** min(attempt, 10)))
            if lost:
                continue    # the link says so, comes back and declares everything
            try:
                channel = await connection.channel()
                await declare_topology(channel, self.config)
                channel.pika.close()
            except AMQPError as exc:
                log.warning("could not declare the topology: %s", describe(exc))


# =====================================================================================
# The command
# =====================================================================================

def main(argv: list[str] | None = None) -> None:
    """`python olive_app.py`: run the demo tasks and those of OLIVE_TASKS."""
    parser = argparse.ArgumentParser(
        prog="olive_app.py", description="Run tasks from RabbitMQ: the demo tasks (add,"
        " do_nothing, sleep_n, fib, fail) and those that the modules in OLIVE_TASKS "
        "register.", formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="settings (environment variables) and their defaults:\n" + "\n".join(
            f"  OLIVE_{f.name.upper():16} {getattr(OliveAppConfig(), f.name)!r}"
            for f in fields(OliveAppConfig)))
    parser.add_argument("--version", action="version",
                        version=f"sweepea {sweepea.__version__}")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--with-broker", action="store_true", help="start a RabbitMQ of "
                       "one's own on port 5672, for development; it goes with the app")
    group.add_argument("--demo", action="store_true", help="send a handful of tasks, "
                       "print what comes back, and exit; with a private RabbitMQ if "
                       "none answers")
    options = parser.parse_args(argv)
    sys.path.append(os.getcwd())        # for the modules in OLIVE_TASKS
    config = OliveAppConfig.from_env()
    config = replace(config, tasks=("olive_app", *config.tasks))
    if not options.with_broker and not options.demo:
        OliveOly(config).start()
        return
    import olive_utils
    try:
        if options.demo:
            olive_utils.demo(config)
            return
        with olive_utils.private_broker(
                5672, say="starting a RabbitMQ of our own ...") as broker:
            print(f"it listens on port {broker.port}, and goes when we go",
                  file=sys.stderr)
            OliveOly(replace(config, url=broker.url)).start()
    except olive_utils.BrokerError as exc:
        fail(str(exc), 1)


if __name__ == "__main__":
    # As a script this file is the module `__main__`. Task modules and child processes
    # import `olive_app`, and so must we, or there would be two registries.
    import olive_app
    olive_app.main()
