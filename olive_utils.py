"""The sender, for a command and for programs; and a private RabbitMQ to try it with.

    python olive_utils.py add 2 3       sends a job to the app and prints its result

`send_task` and `call_task` do the same for a program; they are shaped like Celery's.
Each of their calls opens a connection of its own, which takes some milliseconds. A
program that sends often keeps a `Sender` open on a kernel instead.

The file has three parts:

    1. The sender           one message, many messages, the dead queue, the command
    2. The demo             an app and its sender in one program
    3. The private broker   a real RabbitMQ, for the demo and the tests

Copyright (c) 2026 the Sweepea authors. SPDX-License-Identifier: MIT
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any, Iterator

import pika
from pika.exceptions import AMQPError, UnroutableError

import olive_app
import sweepea
from olive_app import OliveAppConfig, fail
from sweepea import describe, ignore_after


# =====================================================================================
# 1. The sender
#
# A sender publishes a message and waits until the broker has confirmed it. If it wants
# an answer, it waits for the reply of the app as well:
#
#     sender                           RabbitMQ                          app
#        |  publish, mandatory             |                              |
#        +-------------------------------->|  Olive.x ---> Olive.q        |
#        |<--------------------------------+  confirm: it is stored       |
#        |                                 +----------------------------->|  delivery
#        |                                 |<-----------------------------+  reply
#        |<--------------------------------+  to the sender's channel     |
#
# "Mandatory" makes the broker return a message that no queue takes. Without it the
# broker would throw the message away and confirm it all the same.
# =====================================================================================

# RabbitMQ's direct reply-to: whoever consumes from this name, which is no real queue,
# gets on the same channel what is sent in reply to it. So a sender declares no queue.
REPLY_TO = "amq.rabbitmq.reply-to"


class TaskFailed(Exception):
    """A job failed in the app: `exc_type`, `text` and the remote `traceback` say how."""

    def __init__(self, reply: dict) -> None:
        error = reply["result"]
        self.exc_type = error["exc_type"]
        self.text = " ".join(map(str, error["exc_message"]))
        self.traceback = reply["traceback"] or ""
        super().__init__(f"{self.exc_type}: {self.text}")


class Sender:
    """A connection that sends messages. Made by `await Sender.open(config)`.

    What the app answers comes into the Queue `replies`, as pairs (id, reply). They come
    in the order in which the jobs are done, whatever the order of the messages was.
    """

    @classmethod
    async def open(cls, config: OliveAppConfig) -> Sender:
        """Connect to the first of `config.urls` that answers.

        Raises pika's AMQPError if no broker can be reached.
        """
        self = cls()
        self.config = config
        self.connection = await sweepea.Connection.open(config.urls)
        self.channel = await self.connection.channel(confirm=True)
        self.replies = sweepea.Queue()
        await _consume(self.channel, REPLY_TO, self._on_reply, auto_ack=True)
        return self

    async def _on_reply(self, _method, properties, body: bytes) -> None:
        await self.replies.put((properties.correlation_id, json.loads(body)))

    async def send(self, name, args=(), kwargs=None, *, countdown=None, eta=None,
                   expires=None, time_limit=None, priority=None, ident=None,
                   reply=True) -> str:
        """Send a message and return its id; parameters and errors as in `send_task`.

        ident: the id to give to it (default: a new one). reply: whether the app shall
        answer; then the answer comes into `replies`.
        """
        ident = ident or str(uuid.uuid4())
        # AMQP has floating-point numbers, but pika cuts off what is behind the point.
        limit = None if time_limit is None else Decimal(str(time_limit))
        headers = {
            "lang": "py", "task": name, "id": ident, "root_id": ident, "retries": 0,
            "parent_id": None, "group": None, "timelimit": [limit, None],
            "eta": _moment(eta if countdown is None else countdown),
            "expires": _moment(expires)}
        canvas = dict.fromkeys(("callbacks", "errbacks", "chain", "chord"))
        body = json.dumps([list(args), dict(kwargs or {}), canvas], allow_nan=False)
        properties = pika.BasicProperties(
            content_type="application/json", content_encoding="utf-8", delivery_mode=2,
            correlation_id=ident, headers=headers, priority=priority,
            reply_to=REPLY_TO if reply else None)
        await self.channel.basic_publish(
            self.config.exchange, self.config.routing_key, body.encode(), properties)
        return ident

    async def call(self, timeout: float | None, *args: Any, **options: Any) -> Any:
        """Send a message, wait for the result of its job and return that.

        Parameters and errors as in `call_task`. One call at a time: two of them would
        take each other's replies.
        """
        async with ignore_after(timeout):
            ident = await self.send(*args, **options)
            while True:
                answered, reply = await self.replies.get()
                # A late reply to a call that was given up is not the one to wait for.
                if answered == ident:
                    return _result(reply)
        raise TimeoutError(f"no answer within {timeout:g} s")


def _result(reply: dict) -> Any:
    if reply["status"] != "SUCCESS":
        raise TaskFailed(reply)
    return reply["result"]


def _moment(when: datetime | float | None) -> str | None:
    """A point in time as Celery writes it; a number counts the seconds from now."""
    if isinstance(when, (int, float)):
        when = datetime.now(timezone.utc) + timedelta(seconds=when)
    return None if when is None else when.isoformat()


async def _consume(channel, queue: str, receive, auto_ack: bool = False) -> None:
    """Consume a queue: for each delivery, `receive(method, properties, body)` runs."""
    kernel = await sweepea._get_kernel()

    def on_delivery(_channel, *delivery) -> None:
        # pika calls this, and a callback cannot await: it spawns a task that can.
        kernel._spawn(receive(*delivery))

    await channel.call("basic_consume", queue, on_delivery, auto_ack=auto_ack)


async def _next(queue: sweepea.Queue, timeout: float, otherwise: str) -> Any:
    """Take the next item of a queue. Raises TimeoutError(otherwise) if none comes."""
    async with ignore_after(timeout):
        return await queue.get()
    raise TimeoutError(otherwise)


async def _with_sender(config: OliveAppConfig, work, *args) -> Any:
    """Run `work(sender, *args)` on a connection of its own; return its result."""
    sender = await Sender.open(config)
    try:
        return await work(sender, *args)
    finally:
        await sender.connection.close()


def send_task(name, args=(), kwargs=None, *, countdown=None, eta=None, expires=None,
              time_limit=None, priority=None) -> str:
    """Send a message and return its id, once the broker has confirmed it.

    name: the task that is to run. args, kwargs: its arguments, of which JSON can be
    made. countdown: the job waits for so many seconds; or eta: it waits until then, a
    datetime with a time zone. expires: after so many seconds, or after this datetime,
    the job is not begun any more. time_limit: after so many seconds the job is stopped.
    priority: 0 to 255, for a queue that has priorities.

    The settings are those of the app, and come from the environment. Raises pika's
    AMQPError if the broker cannot be reached or does not take the message; of these,
    UnroutableError says that no queue is bound.
    """
    return sweepea.run(_with_sender, OliveAppConfig.from_env(), lambda sender: sender.send(
        name, args, kwargs, countdown=countdown, eta=eta, expires=expires,
        time_limit=time_limit, priority=priority, reply=False))


def call_task(name, args=(), kwargs=None, *, timeout=30, **options) -> Any:
    """Send a message, wait for the result of its job and return that.

    timeout: how many seconds to wait; None is for ever. The other parameters are those
    of `send_task`. Raises what `send_task` raises, TaskFailed if the job failed, and
    TimeoutError if no answer came in time.
    """
    return sweepea.run(_with_sender, OliveAppConfig.from_env(), lambda sender: sender.call(
        timeout, name, args, kwargs, **options))


# -- many messages ---------------------------------------------------------------------

class _Batch:
    """The messages of one command, and what has come back so far.

    Each of them goes this way, and --timeout bounds how long none of them moves on:

        sent_at: {id: clock}   --- it is answered --->   latencies: [seconds]
    """

    def __init__(self, sender: Sender, options: argparse.Namespace) -> None:
        self.sender, self.options = sender, options
        self.limit = sweepea.Semaphore(500)
        self.sent_at: dict[str, float] = {}
        self.latencies: list[float] = []
        self.failed = 0

    async def send_all(self) -> None:
        # This is the pattern of a limit. A permit is acquired here, by the task that
        # makes the others, and released there, by each of these when it is done. So
        # never more than 500 of them wait for a confirm, whatever --count is, and the
        # next one starts as soon as any of them is done.
        for _ in range(self.options.count):
            await self.limit.acquire()
            await sweepea.spawn(self.send_one, daemon=True)

    async def send_one(self) -> None:
        options, ident = self.options, str(uuid.uuid4())
        self.sent_at[ident] = time.monotonic()
        # What is not to be answered by the app counts as answered by the confirm.
        reply = {"status": "SUCCESS", "result": ident} if options.no_wait else None
        try:
            await self.sender.send(
                options.task, options.args, options.kwargs, countdown=options.countdown,
                expires=options.expires, time_limit=options.time_limit,
                priority=options.priority, ident=ident, reply=not options.no_wait)
        except AMQPError as exc:
            # Nobody awaits this task, so an error goes the way that the replies go.
            reply = exc
        if reply:
            await self.sender.replies.put((ident, reply))
        await self.limit.release()

    def note(self, ident: str, reply: dict | AMQPError) -> None:
        """Count a reply and print it. Raises the error with which a send failed."""
        if isinstance(reply, AMQPError):
            raise reply
        if ident not in self.sent_at:
            return      # At-least-once: a job may run twice, and then it answers twice.
        self.latencies.append(time.monotonic() - self.sent_at.pop(ident))
        try:
            result = _result(reply)
            print(result if self.options.no_wait else json.dumps(result))
        except TaskFailed as exc:
            self.failed += 1
            print(exc.traceback.strip() or exc, file=sys.stderr)


async def _send_many(sender: Sender, options: argparse.Namespace) -> int:
    """Send the messages, print what comes back as it comes; return the exit status."""
    began, count, batch = time.monotonic(), options.count, _Batch(sender, options)
    await sweepea.spawn(batch.send_all, daemon=True)
    while len(batch.latencies) < count:
        batch.note(*await _next(sender.replies, options.timeout,
                                f"no answer within {options.timeout:g} s"))
    if count > 1:
        seconds = time.monotonic() - began
        ordered = [1000 * latency for latency in sorted(batch.latencies)]
        print(f"{count - batch.failed} ok, {batch.failed} failed in {seconds:.2f} s: "
              f"{count / seconds:.0f} tasks/s, latency p50 {ordered[count // 2]:.1f} ms, "
              f"p99 {ordered[count * 99 // 100]:.1f} ms", file=sys.stderr)
    return 1 if batch.failed else 0


# -- the dead queue --------------------------------------------------------------------

async def _dead_letters(sender: Sender, options: argparse.Namespace) -> int:
    """List the dead queue, or send back to work what lies in it now."""
    queue, channel = sender.config.dead_queue, await sender.connection.channel()
    declared = await channel.call("queue_declare", queue, passive=True)
    count = declared.method.message_count
    # What is listed is not acknowledged, and the broker takes it back when the channel
    # closes. So the window has to hold the whole queue. 65,535 is the most that one
    # consumer can ask for, hence there are several of them for a longer queue. (To ask
    # for no limit is no way out: a quorum queue then stops at 2,000.) What is replayed
    # is acknowledged one by one, so that a replay that is cut short has sent no more
    # than its small window twice.
    window = 100 if options.replay else min(count, 65_535)
    await channel.call("basic_qos", prefetch_count=window)
    letters = sweepea.Queue()
    for _ in range(0, count, 65_535):
        await _consume(channel, queue, lambda *delivery: letters.put(delivery))
    for done in range(count):
        method, properties, body = await _next(
            letters, options.timeout, f"{done} of {count}: somebody took the others")
        headers = properties.headers or {}
        if options.replay:
            # It goes back as if it had never been tried.
            properties.headers = {name: headers[name] for name in headers
                                  if not str(name).startswith("x-olive-")}
            await sender.channel.basic_publish(
                sender.config.exchange, sender.config.routing_key, body,
                olive_app.republished(properties, retries=0))
            channel.basic_ack(method.delivery_tag)
        else:
            shown = {"task": headers.get("task"), "id": headers.get("id"),
                     "reason": headers.get("x-olive-reason"),
                     "error": headers.get("x-olive-error"),
                     "body": body[:1000].decode(errors="replace")}
            print(json.dumps(shown, default=str))
    print(count, "sent back to work" if options.replay else "dead", file=sys.stderr)
    return 0


# -- the command -----------------------------------------------------------------------

def _value(text: str) -> Any:
    """Read a value: JSON if it is JSON, else the text as it stands."""
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        # Python reads NaN and 1e999 as numbers, but JSON has no such numbers.
        json.dumps(value, allow_nan=False)
        return value
    return text


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) < 1e9:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; what makes no sense ends the program with status 2."""
    parser = argparse.ArgumentParser(prog="olive_utils.py", description=main.__doc__)
    option, seconds = parser.add_argument, {"type": _seconds, "metavar": "SECONDS"}
    flag = {"action": "store_true"}
    option("task", nargs="?", metavar="TASK", help="its name (without one: add 2 3)")
    option("args", nargs="*", metavar="ARG | name=value", help="JSON, or else a string")
    option("--count", type=int, default=1, metavar="N", help="send it N times")
    option("--no-wait", **flag, help="print the id and do not wait")
    option("--timeout", **seconds, default=30.0, help="wait so long for an answer (30)")
    option("--countdown", **seconds, help="let it run after so many seconds")
    option("--expires", **seconds, help="do not run it after so many seconds")
    option("--time-limit", **seconds, help="stop it after so many seconds")
    option("--priority", type=int, metavar="0-255", help="for a queue with priorities")
    option("--dead", **flag, help="list the dead queue")
    option("--replay", **flag, help="send what is dead back to work")
    option("--version", action="version", version=f"sweepea {sweepea.__version__}")
    options = parser.parse_intermixed_args(argv)
    if options.count < 1 or options.timeout <= 0:
        parser.error("--count and --timeout must be more than 0")
    if not 0 <= (options.priority or 0) <= 255:
        parser.error("--priority must be from 0 to 255")
    if options.task == "":
        parser.error("TASK is empty")
    if [options.dead, options.replay, options.task is not None].count(True) > 1:
        parser.error("--dead and --replay stand alone")
    if options.task is None:
        options.task, options.args = "add", ["2", "3"]
    words, options.args, options.kwargs = options.args, [], {}
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name.isidentifier():
            options.kwargs[name] = _value(value)
        else:
            options.args.append(_value(word))
    return options


def main(argv: list[str] | None = None) -> None:
    """Send a message to the app and print the result of its job, as JSON.

    The exit status is 0 if all is well, 1 if the task failed, 2 for a wrong use, 3 if
    no answer came in time, 4 if there is no broker or no queue is bound. The settings
    are those of the app: see python olive_app.py --help.
    """
    options, config = _parse(argv), OliveAppConfig.from_env()
    logging.basicConfig(format="%(message)s", level="WARNING")
    # What pika reports comes as an exception, too, and is said once, below.
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    work = _dead_letters if options.dead or options.replay else _send_many
    try:
        status = sweepea.run(_with_sender, config, work, options)
        sys.stdout.flush()
        raise SystemExit(status)
    except TimeoutError as exc:
        print(exc, file=sys.stderr)
        raise SystemExit(3) from None
    except UnroutableError:
        fail(f"no queue is bound to {config.exchange} with the key {config.routing_key}"
             ": does the app run?", 4)
    except sweepea.REFUSED as exc:
        fail(f"the broker refuses us: {describe(exc)} (check OLIVE_URL)", 4)
    except AMQPError as exc:
        fail(f"no broker, or not as expected: {describe(exc)}. Start the app (python "
             "olive_app.py --with-broker), or set OLIVE_URL", 4)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        # `| head` has read enough. At its end Python would try once more to write what
        # is left, and complain; so what is left goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


# =====================================================================================
# 2. The demo
# =====================================================================================

def demo(config: OliveAppConfig) -> None:
    """Run the app, send it a handful of messages, print what comes back.

    config: the settings of the app. If no broker answers at its URL, a private one is
    started; then it raises BrokerError if that is not possible.
    """
    calls = [("add", [2, 3], {}), ("sleep_n", [0.2], {}), ("fib", [20], {}),
             ("do_nothing", [], {}), ("fail", ["on purpose"], {}),
             ("add", [1, 1], {"countdown": 1.5})]

    async def show_all() -> None:
        # Before the app has declared its queue there is nothing that takes a message.
        await app._link.up.wait()
        for name, args, options in calls:
            await _with_sender(app.config, _show, name, args, options)
        app.stop()

    logging.getLogger("pika").setLevel(logging.CRITICAL)
    with ExitStack() as stack:
        try:
            sweepea.run(_with_sender, config, lambda sender: sweepea.sleep(0))
        except AMQPError:
            what = "no RabbitMQ takes us there: starting a private one ..."
            broker = stack.enter_context(private_broker(say=what))
            config = replace(config, url=broker.url)
        # The task that fails on purpose would be a warning between the results.
        app = olive_app.OliveOly(replace(config, log_level="CRITICAL"))
        app.start(show_all)


async def _show(sender: Sender, name: str, args: list, options: dict) -> None:
    """Call a task, print the call, what came back, and how long it took."""
    began = time.monotonic()
    try:
        answer = await sender.call(30, name, args, **options)
    except (TaskFailed, TimeoutError) as exc:
        answer = f"failed: {exc}"
    milliseconds = 1000 * (time.monotonic() - began)
    shown = [repr(arg) for arg in args] + [f"{k}={v}" for k, v in options.items()]
    print(f"{name}({', '.join(shown)}) -> {answer}  ({milliseconds:.0f} ms)")


# =====================================================================================
# 3. The private broker
#
# THE TASK QUEUE CAN BE UNDERSTOOD WITHOUT THIS PART. It starts a real RabbitMQ for the
# demo and the tests, with ports, a folder and a name server of its own, and is about
# the one promise that is hard to keep: nothing of all that is left behind, however the
# program ends. A program that is killed by SIGKILL cannot tidy up after itself, so each
# program that is started here has a watcher, which waits for the end of a pipe:
#
#     this program                     one process group for each program started
#     +------------+                   +----------------------------------------+
#     | write end  |====== pipe ======>| the watcher: reads, and waits          |
#     +------------+                   | RabbitMQ, or epmd                      |
#                                      +----------------------------------------+
#     ends, in whatever way:           the watcher's `read` ends as well; it kills
#     the system closes the pipe       the program beside it and removes the folder
#
# epmd is the name server of Erlang, in which RabbitMQ is written: a node registers its
# name and port there, and rabbitmqctl and the other nodes of a cluster find it so.
# =====================================================================================

# The folders where packages put RabbitMQ's scripts. They are looked at before PATH,
# since what Debian has there is a wrapper that changes the user and the folder.
_SBIN = "/usr/lib/rabbitmq/bin:/opt/homebrew/opt/rabbitmq/sbin:/usr/local/opt/rabbitmq/sbin"

# A shell runs this text as  sh -c TEXT FOLDER PROGRAM ARGUMENTS, so that $0 is the
# folder and "$@" the program with its arguments. The pipe is the standard input.
_WATCHED = "\n".join([
    # RabbitMQ stalls when it runs out of descriptors, and often no more than 1,024
    # files may be open unless one asks for more. Where asking fails it stays as it is.
    'ulimit -n "$(ulimit -H -n)" 2>/dev/null',
    # The pipe moves to number 3, as a shell takes the standard input away from what it
    # puts into the background; and the program itself gets an empty input.
    "exec 3<&0 </dev/null",
    # The watcher is a copy of this shell in the background. It is there before the
    # program is, so that there is no moment in which nobody watches.
    "(",
    # Nobody ever writes into the pipe, so the shell waits here for the pipe's end.
    "read -r _ <&3",
    # $$ is the number of the first shell, not of this copy; the program below has it
    # then. It cannot have gone to a stranger: it is also the number of the process
    # group, and as long as the watcher is a member, the system does not use it again.
    "kill -9 $$",
    'rm -rf "$0"',
    # The watcher lets go of the output, so that nobody who reads it waits for its end.
    ") >/dev/null 2>&1 &",
    # The program takes the place of the first shell, and with it the number $$. So it
    # is a child of ours, to be signalled and waited for. It has no use for the pipe.
    'exec "$@" 3<&-'])


class BrokerError(Exception):
    """A private broker cannot do what was asked; the message says why."""


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _end(process: subprocess.Popen | None) -> None:
    """Kill a program and its watcher, which are the members of one process group."""
    # On macOS it is a PermissionError if all members are dead already.
    if process:
        with process, suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


class PrivateBroker:
    """One RabbitMQ node on loopback; made by `private_broker()`.

    url, port: where it serves AMQP. node: its Erlang name, for a cluster. folder: where
    it keeps everything. log: the file of its log. process: its Popen; None when it is
    down.
    """

    def __init__(self, folder, port, peer, config) -> None:
        if port and not _is_free(port):
            raise BrokerError(f"port {port} is in use: stop its owner or take another")
        # These ports are below those that the system gives to clients. Otherwise a
        # client that keeps trying to reach a killed broker could be given the broker's
        # own port, connect to itself, and so keep the port from the next start().
        ports = secrets.SystemRandom().sample(range(20_000, 32_000), 1000)
        free = filter(_is_free, ports)
        self.port = port or next(free)
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}/%2F"
        self.node = f"olive-{os.getpid()}-{self.port}@localhost"
        self.folder, self.log = folder, folder / "rabbit.log"
        self.process: subprocess.Popen | None = None
        (folder / "rabbitmq.conf").write_text(config + "\n")
        # RabbitMQ would look for each of these files in /etc, so each is named here, and
        # most do not exist. A log that goes to stdout has in it also what goes wrong
        # before RabbitMQ can open a file. Port 0 is any that is free.
        none = folder / "none"
        settings = dict(
            NODENAME=self.node, NODE_IP_ADDRESS="127.0.0.1", NODE_PORT=self.port,
            DIST_PORT=next(free), CTL_DIST_PORT_MIN=0, CTL_DIST_PORT_MAX=0, LOGS="-",
            LOG_BASE=folder, MNESIA_BASE=folder, CONFIG_FILE=folder / "rabbitmq.conf",
            CONFIG_FILES=none, ADVANCED_CONFIG_FILE=none, CONF_ENV_FILE=none,
            ENABLED_PLUGINS_FILE=none)
        # Nothing is inherited, for it could be meant for another broker.
        self._env = {f"RABBITMQ_{name}": str(settings[name]) for name in settings}
        self._env |= {
            "PATH": f"{_SBIN}:{os.environ['PATH']}:/opt/homebrew/bin:/usr/local/bin",
            "LC_ALL": "C.UTF-8",
            # The nodes of one cluster share a name server, and a home folder, since
            # the cookie lies there: the password by which Erlang's nodes trust each
            # other. Erlang makes one where there is none.
            "HOME": peer._env["HOME"] if peer else str(folder),
            "ERL_EPMD_PORT": peer._env["ERL_EPMD_PORT"] if peer else str(next(free)),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            # An epmd that a node started by itself would be a daemon, and outlive it.
            "ERL_AFLAGS": "-start_epmd false "
                          "-kernel inet_dist_use_interface {127,0,0,1}",
            # Under systemd the script becomes the node, and there is no process between.
            "RUNNING_UNDER_SYSTEMD": "1"}
        # Where a peer has an epmd already, this one finds the port taken and leaves. Its
        # watcher stays, and looks after the folder also while the node is down.
        self._epmd = self._spawn("epmd", subprocess.DEVNULL)

    def _spawn(self, program: str, output: Any) -> subprocess.Popen:
        # In a session of its own, since Ctrl-C at the terminal is meant for us alone.
        return subprocess.Popen(
            ["sh", "-c", _WATCHED, self.folder, program], stdin=subprocess.PIPE,
            stdout=output, stderr=output, env=self._env, cwd=self.folder,
            start_new_session=True)

    def start(self) -> None:
        """Start the node, for the first time or again, and wait until it serves AMQP.

        Raises BrokerError, with what its log says, if it does not within 60 s.
        """
        if self.process and self.process.poll() is None:
            return
        self.kill()     # A node that died by itself has left its watcher.
        with self.log.open("ab") as log:
            begin = log.tell()
            self.process = self._spawn("rabbitmq-server", log)
        deadline = time.monotonic() + 60
        address = ("127.0.0.1", self.port)
        while self.process.poll() is None and time.monotonic() < deadline:
            # The port is open before AMQP is spoken there, so a greeting is tried.
            with suppress(OSError), socket.create_connection(address, 5) as probe:
                probe.sendall(b"AMQP\x00\x00\x09\x01")
                if probe.recv(1):
                    return
            time.sleep(0.05)
        self.kill()
        lines = self.log.read_bytes()[begin:].decode(errors="replace").splitlines()
        # The first errors name the cause; the end is Erlang's report of the collapse.
        told = [line for line in lines if "[error]" in line][:10] or lines[-10:]
        raise BrokerError("\n".join(["RabbitMQ did not start; its log says:", *told]))

    def kill(self) -> None:
        """Kill the node by SIGKILL, like a power cut; its data stay for start()."""
        _end(self.process)
        self.process = None

    def stop(self) -> None:
        """Stop the node in good order (SIGTERM); kill it if that takes over 30 s."""
        if self.process:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        self.kill()

    def ctl(self, *args: str) -> str:
        """Run rabbitmqctl against this node and return what it prints.

        Raises BrokerError, with what it says, if it fails.
        """
        done = subprocess.run(
            ["rabbitmqctl", "-q", *args], env=self._env, cwd=self.folder, timeout=120,
            capture_output=True, text=True, start_new_session=True)
        if done.returncode:
            why = (done.stderr + done.stdout).strip()[:500]
            raise BrokerError(f"rabbitmqctl {' '.join(args)} failed: {why}")
        return done.stdout


@contextmanager
def private_broker(port: int | None = None, *, peer: PrivateBroker | None = None,
                   config: str = "", say: str = "") -> Iterator[PrivateBroker]:
    """Run a private RabbitMQ node on loopback; nothing of it is left behind.

    port: where it serves AMQP (default: a free port). peer: a running private broker,
    whose epmd and cookie to share, so that both can be in one cluster. config: more
    lines for rabbitmq.conf. say: a line for stderr before the start, which takes some
    seconds. Raises BrokerError if RabbitMQ is not installed, the port is in use, or the
    node does not start.
    """
    with tempfile.TemporaryDirectory(
            prefix="olive-broker-", ignore_cleanup_errors=True) as folder:
        broker = PrivateBroker(Path(folder), port, peer, config)
        try:
            if say:
                print(say, file=sys.stderr)
            broker.start()
            yield broker
        finally:
            broker.kill()
            _end(broker._epmd)


if __name__ == "__main__":
    main()
