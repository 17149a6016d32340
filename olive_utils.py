"""The sender, for a command and for programs; and a private RabbitMQ to try it with.

    python olive_utils.py add 2 3       sends the job `add`, waits, prints its result

`send_task` and `call_task` do the same for a program; they are shaped like Celery's.
Each of their calls opens a connection of its own, which takes some milliseconds. A
program that sends often keeps a `Sender` open on a kernel instead.

    1. The sender           one message, many messages, the dead queue, the command
    2. The demo             an app and its sender in one program
    3. The private broker   a real RabbitMQ, for the demo and the tests

Copyright (c) 2026 the Sweepea authors. SPDX-License-Identifier: MIT
"""

import argparse
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import aclosing, closing, contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import pika

import sweepea
from olive_app import OliveAppConfig, OliveOly, fail, republished


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
    """A job failed; `exc_type`, `text` and the remote `traceback` say how."""

    def __init__(self, reply: dict) -> None:
        error = reply["result"]
        self.exc_type, self.traceback = error["exc_type"], reply["traceback"] or ""
        self.text = " ".join(map(str, error["exc_message"]))
        super().__init__(f"{self.exc_type}: {self.text}")


class Sender:
    """A connection that sends messages. Made by `await Sender.open(config)`.

    What the app answers comes into the Queue `replies`, as pairs (id, reply), in the
    order in which the jobs are done.
    """

    @classmethod
    async def open(cls, config: OliveAppConfig) -> "Sender":
        """Connect to the first of `config.urls` that answers.

        Raises pika's AMQPError if no broker can be reached.
        """
        self = cls()
        self.config, self.replies = config, sweepea.Queue()
        self.kernel = await sweepea._get_kernel()
        self.connection = await sweepea.Connection.open(config.urls)
        self.channel = await self.connection.channel(confirm=True)
        await self.channel.call("basic_consume", REPLY_TO, self._reply, auto_ack=True)
        return self

    def _reply(self, _channel, _method, properties, body: bytes) -> None:
        # pika calls this, and a callback cannot await: it spawns a task that can.
        reply = properties.correlation_id, json.loads(body)
        self.kernel._spawn(self.replies.put(reply))

    async def send(self, name, args=(), kwargs=None, *, countdown=None, eta=None,
                   expires=None, time_limit=None, priority=None, ident=None,
                   reply_to=REPLY_TO) -> str:
        """Send a message and return its id; parameters and errors as in `send_task`.

        ident: the id of the message (default: a new one). reply_to: where the app shall
        reply to (default: into `replies`); None is for no reply.
        """
        ident = ident or str(uuid.uuid4())
        # AMQP has floating-point numbers, but pika cuts off what is behind the point.
        limit = time_limit and Decimal(str(time_limit))
        canvas = dict.fromkeys(("callbacks", "errbacks", "chain", "chord"))
        body = json.dumps([list(args), dict(kwargs or {}), canvas], allow_nan=False)
        await self.publish(body.encode(), pika.BasicProperties(
            content_type="application/json", content_encoding="utf-8", delivery_mode=2,
            correlation_id=ident, reply_to=reply_to, priority=priority, headers={
                "lang": "py", "task": name, "id": ident, "root_id": ident, "retries": 0,
                "parent_id": None, "group": None, "timelimit": [limit, None],
                "eta": _moment(countdown or eta), "expires": _moment(expires)}))
        return ident

    async def publish(self, body: bytes, properties: pika.BasicProperties) -> None:
        """Publish a message that is ready; return once the broker has confirmed it."""
        await self.channel.basic_publish(
            self.config.exchange, self.config.routing_key, body, properties)

    async def call(self, timeout: float | None, *args, **options):
        """Send a message, wait for the result of its job and return that.

        Parameters and errors as in `call_task`. A Sender can do one call at a time,
        since two would take each other's replies. The late reply to a call that timed
        out is dropped by the next one.
        """
        async with sweepea.ignore_after(timeout):
            ident, answered = await self.send(*args, **options), None
            while answered != ident:
                answered, reply = await self.replies.get()
            if reply["status"] != "SUCCESS":
                raise TaskFailed(reply)
            return reply["result"]
        raise TimeoutError(f"no answer within {timeout:g} s")

    async def aclose(self) -> None:
        """Close the connection."""
        await self.connection.close()


def _moment(when: datetime | float | None) -> str | None:
    """A point in time as Celery writes it; a number counts the seconds from now."""
    if isinstance(when, (int, float)):
        when = datetime.now(timezone.utc) + timedelta(seconds=when)
    # Without a zone the app would take it for UTC, which in New York is five hours off.
    if when is not None and when.tzinfo is None:
        raise ValueError(f"{when} has no time zone: add .astimezone() or tzinfo=")
    return None if when is None else when.isoformat()


async def _with_sender(config: OliveAppConfig, work, *args):
    """Run `work(sender, *args)` on a connection of its own; return its result."""
    async with aclosing(await Sender.open(config)) as sender:
        return await work(sender, *args)


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
    return sweepea.run(_with_sender, OliveAppConfig.from_env(), lambda sender:
        sender.send(name, args, kwargs, countdown=countdown, eta=eta, expires=expires,
                    time_limit=time_limit, priority=priority, reply_to=None))


def call_task(name, args=(), kwargs=None, *, timeout: float | None = 30, **options):
    """Send a message, wait for the result of its job and return that.

    timeout: how many seconds to wait; None is for ever. The other parameters are those
    of `send_task`. Raises what `send_task` raises, TaskFailed if the job failed, and
    TimeoutError if no answer came in time.
    """
    return sweepea.run(_with_sender, OliveAppConfig.from_env(), lambda sender:
        sender.call(timeout, name, args, kwargs, **options))


# -- many messages ---------------------------------------------------------------------
#
# _send_all spawns a task for each message, _send_one. Meanwhile _send_many takes what
# comes into the Queue `replies`. The ids of unanswered messages are in `sent_at`.
#
#     (id, reply)     the app has answered            put there by the Sender
#     (id, reply)     confirmed; none is wanted       put there by _send_one (--no-wait)
#     (id, error)     the message cannot be sent      put there by _send_one

async def _send_all(sender: Sender, options, sent_at: dict[str, float]) -> None:
    # This is the pattern of a limit. A permit is acquired here, by the task that makes
    # the others, and released there, by each of these when it is done. So never more
    # than 500 messages wait for their confirms, whatever --count is, and the next one
    # goes out as soon as any of them is done.
    limit = sweepea.Semaphore(500)
    for _ in range(options.count):
        await limit.acquire()
        await sweepea.spawn(_send_one, sender, options, sent_at, limit)


async def _send_one(sender: Sender, options, sent_at: dict, limit) -> None:
    ident = str(uuid.uuid4())
    sent_at[ident] = time.monotonic()
    # Where no reply is wanted, the confirm stands in for it.
    reply = {"status": "SUCCESS"}
    try:
        await sender.send(
            options.task, options.args, options.kwargs, countdown=options.countdown,
            expires=options.expires, time_limit=options.time_limit, ident=ident,
            priority=options.priority, reply_to=None if options.no_wait else REPLY_TO)
    except Exception as exc:
        # Nobody awaits this task, so an error goes the way that the replies go.
        reply = exc
    if options.no_wait or isinstance(reply, Exception):
        await sender.replies.put((ident, reply))
    await limit.release()


async def _next(queue: sweepea.Queue, timeout: float, what: str):
    """Take the next item of a Queue; if none comes in time, end with exit status 3."""
    async with sweepea.ignore_after(timeout):
        return await queue.get()
    print(f"no {what} within {timeout:g} s", file=sys.stderr)
    raise SystemExit(3)


async def _send_many(sender: Sender, options: argparse.Namespace) -> int:
    """Send the messages, print what comes back as it comes; return the exit status."""
    began, sent_at, latencies, failed = time.monotonic(), {}, [], 0
    said = began
    await sweepea.spawn(_send_all, sender, options, sent_at)
    while len(latencies) < options.count:
        ident, reply = await _next(sender.replies, options.timeout, "answer")
        if isinstance(reply, Exception):
            raise reply
        # At-least-once means that a job may run twice, and then it answers twice.
        if ident not in sent_at:
            continue
        latencies.append(1000 * (time.monotonic() - sent_at.pop(ident)))
        if reply["status"] == "SUCCESS":
            # Whoever reads the results through a pipe gets each of them at once.
            print(ident if options.no_wait else json.dumps(reply["result"]), flush=True)
        else:
            failed += 1
            print(str(reply["traceback"] or TaskFailed(reply)).strip(), file=sys.stderr)
        if options.count > 1 and time.monotonic() - said > 0.2:
            said = time.monotonic()
            print(f"{len(latencies)} of {options.count}", file=sys.stderr,
                  end="\r" if sys.stderr.isatty() else "\n")
    if options.count > 1:
        count, seconds = options.count, time.monotonic() - began
        latencies.sort()
        print(f"{count - failed} ok, {failed} failed in {seconds:.2f} s: "
              f"{count / seconds:.0f} tasks/s, latency p50 {latencies[count // 2]:.1f} "
              f"ms, p99 {latencies[count * 99 // 100]:.1f} ms", file=sys.stderr)
    return 1 if failed else 0


# -- the dead queue --------------------------------------------------------------------

async def _dead_letters(sender: Sender, options: argparse.Namespace) -> None:
    """List the dead queue, or send back to work what lies in it now."""
    queue, channel = sender.config.dead_queue, await sender.connection.channel()
    declared = await channel.call("queue_declare", queue, passive=True)
    count, letters = declared.method.message_count, sweepea.Queue()
    # What is listed is not acknowledged: the broker takes it back when the channel
    # closes. So the window has to hold the whole queue. One consumer can ask for 65,535
    # messages at most, hence a longer queue has several consumers. To ask for no limit
    # is no way out, because a quorum queue then stops at 2,000.
    await channel.call("basic_qos", prefetch_count=min(count, 65_535))
    for _ in range(0, count, 65_535):
        await channel.call("basic_consume", queue, lambda *delivery:
                           sender.kernel._spawn(letters.put(delivery)))
    for _ in range(count):
        _, method, properties, body = await _next(letters, options.timeout, "message")
        headers = properties.headers or {}
        if options.replay:
            # The message goes back as if it had never been tried.
            properties.headers = {name: headers[name] for name in headers
                                  if not str(name).startswith("x-olive-")}
            await sender.publish(body, republished(properties, retries=0))
            channel.basic_ack(method.delivery_tag)
        else:
            shown = {name.removeprefix("x-olive-"): headers.get(name) for name in (
                "task", "id", "x-olive-reason", "x-olive-error")}
            shown["body"] = body[:1000].decode(errors="replace")
            print(json.dumps(shown, default=str), flush=True)
    print(count, "sent back to work" if options.replay else "dead", file=sys.stderr)


# -- the command -----------------------------------------------------------------------

def _argument(text: str) -> tuple:
    """Read `value` or `name=value` as (name or None, value)."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        name, value = None, text
    with suppress(ValueError, RecursionError):      # What is not JSON stays a text.
        # Python reads NaN and 1e999 as numbers, but JSON has no such numbers.
        json.dumps(json.loads(value), allow_nan=False)
        value = json.loads(value)
    return name, value


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) < 1e9:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; what makes no sense ends the program with status 2."""
    parser = argparse.ArgumentParser(prog="olive_utils.py", description=main.__doc__)
    option, seconds = parser.add_argument, {"type": _seconds, "metavar": "SECONDS"}
    option("task", nargs="?", metavar="TASK", help="its name (without TASK: add 2 3)")
    option("args", nargs="*", type=_argument, metavar="[name=]ARG", help="JSON or text")
    option("--count", type=int, default=1, metavar="N", help="send it N times")
    option("--no-wait", action="store_true", help="print the id and do not wait")
    option("--timeout", **seconds, default=30.0, help="wait so long for an answer (30)")
    option("--countdown", **seconds, help="let it run after so many seconds")
    option("--expires", **seconds, help="do not run it after so many seconds")
    option("--time-limit", **seconds, help="stop it after so many seconds")
    option("--priority", type=int, metavar="0-255", help="for a queue with priorities")
    option("--dead", action="store_true", help="list the dead queue")
    option("--replay", action="store_true", help="send what is dead back to work")
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
        options.task, options.args = "add", [(None, 2), (None, 3)]
    options.kwargs = {name: value for name, value in options.args if name}
    options.args = [value for name, value in options.args if not name]
    return options


def main(argv: list[str] | None = None) -> None:
    """Send a message to the app and print the result of its job, as JSON.

    The exit status is 0 if all is well, 1 if the task failed, 2 for a wrong use, 3 if
    no answer came in time, 4 if there is no broker or no queue is bound. The settings
    are those of the app: see python olive_app.py --help.
    """
    options, config = _parse(argv), OliveAppConfig.from_env()
    # What pika reports comes as an exception, too, and is said once, below.
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    work = _dead_letters if options.dead or options.replay else _send_many
    try:
        raise SystemExit(sweepea.run(_with_sender, config, work, options))
    except pika.exceptions.UnroutableError:
        fail(f"no queue is bound to {config.exchange} with the key {config.routing_key}"
             ": does the app run?", 4)
    except sweepea.REFUSED as exc:
        fail(f"the broker refuses us: {sweepea.describe(exc)} (check OLIVE_URL)", 4)
    except pika.exceptions.AMQPError as exc:
        fail(f"no broker, or not as expected: {sweepea.describe(exc)}. Start the app "
             "(python olive_app.py --with-broker), or set OLIVE_URL", 4)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        # `| head` has read enough. An orderly end would try again to write the rest.
        os._exit(1)


# =====================================================================================
# 2. The demo
# =====================================================================================

def is_reachable(config: OliveAppConfig) -> bool:
    """Whether a broker takes us at one of the URLs."""
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    try:
        sweepea.run(_with_sender, config, lambda sender: sweepea.sleep(0))
        return True
    except pika.exceptions.AMQPError:
        return False


def demo(config: OliveAppConfig) -> None:
    """Run the app, send it a handful of messages, print what comes back.

    config: the settings of the app. The demo has queues of its own, which it deletes at
    the end, and so it neither takes nor buries anybody else's messages. If no broker
    answers at the URL, a private one is started. Raises BrokerError if that fails.
    """
    async def show_all() -> None:
        for job in [("add", [2, 3]), ("sleep_n", [0.2]), ("fib", [20]),
                    ("do_nothing", []), ("fail", ["on purpose"]), ("add", [1, 1], 1.5)]:
            await _with_sender(app.config, _show, *job)
        app.stop()

    async def delete(sender: Sender) -> None:
        channel = await sender.connection.channel()
        await channel.call("queue_delete", app.config.queue)
        await channel.call("queue_delete", app.config.dead_queue)
        await channel.call("exchange_delete", app.config.exchange)

    if not is_reachable(config):
        what = "no RabbitMQ takes us there: starting a private one ..."
        with private_broker(say=what) as broker:
            return demo(replace(config, url=broker.url))
    name = f"Olive.demo.{uuid.uuid4().hex[:8]}"
    # The task that fails on purpose would be a warning between the results.
    app = OliveOly(replace(config, exchange=f"{name}.x", queue=f"{name}.q",
                           dead_queue=f"{name}.dead", log_level="CRITICAL"))
    app.start(show_all)
    sweepea.run(_with_sender, config, delete)


async def _show(sender: Sender, name: str, args: list, countdown=None) -> None:
    """Call a task, print the call, what came back, and how long it took."""
    began = time.monotonic()
    try:
        answer = await sender.call(30, name, args, countdown=countdown)
    except (TaskFailed, TimeoutError) as exc:
        answer = f"failed: {exc}"
    shown = ", ".join(map(repr, args)) + (f", {countdown=}" if countdown else "")
    print(f"{name}({shown}) -> {answer}  ({1000 * (time.monotonic() - began):.0f} ms)")


# =====================================================================================
# 3. The private broker
#
# THE TASK QUEUE CAN BE UNDERSTOOD WITHOUT THIS PART. It starts a real RabbitMQ for the
# demo and the tests, and epmd, the name server of Erlang, in which RabbitMQ is written:
# a node registers its name there, and rabbitmqctl and other nodes find it.
#
# One promise is hard to keep: nothing of all that is left behind, however the program
# ends. After a SIGKILL it cannot tidy up any more. So each program that is started here
# has a watcher beside it, which waits for the end of a pipe:
#
#     this program                     one process group for each program started
#     +------------+                   +----------------------------------------+
#     | write end  |====== pipe ======>| the watcher: reads, and waits          |
#     +------------+                   | RabbitMQ, or epmd                      |
#                                      +----------------------------------------+
#     ends, in whatever way:           the watcher's `read` ends as well; it kills
#     the system closes the pipe       the program beside it and removes the folder
# =====================================================================================

# A shell runs this text as  sh -c TEXT FOLDER PROGRAM, so that $0 is the folder and $1
# the program. The pipe is the shell's standard input.
_WATCHED = "\n".join([
    # A shell takes the standard input away from what it puts into the background. So
    # the pipe moves to number 3. The input is empty then, and the output goes to a log.
    'exec 3<&0 </dev/null >"$1.log" 2>&1',
    # The watcher is a copy of this shell in the background. It is there before the
    # program is, so that there is no moment in which nobody watches. Nobody ever writes
    # into the pipe: the `read` ends when the pipe does.
    "(read -r _ <&3",
    # $$ is the number of the first shell, not of this copy, and by now the program's.
    # The number cannot have gone to a stranger: it is also that of the process group,
    # and the system does not use it again while the watcher is a member.
    "kill -9 $$",
    # Now nobody writes into the folder any more.
    'rm -rf "$0") &',
    # RabbitMQ stalls when it runs out of descriptors, and often no more than 1,024
    # files may be open unless one asks for more. (Not for all that one can get: in some
    # containers that is a billion, and Erlang would make a table of that size.)
    'ulimit -n 65536 || ulimit -n "$(ulimit -H -n)"',
    # For Debian, where the package has the same name as the program.
    'command -v "$1" || echo "[error] not installed: apt-get install $1"',
    # The program takes the place of the first shell, and with it the number $$. So the
    # program is a child of ours, to be signalled and waited for. It needs no pipe.
    'exec "$1" 3<&-'])


class BrokerError(Exception):
    """A private broker cannot do what was asked; the message says why."""


def _is_free(port: int) -> bool:
    """Whether nobody listens on this port of the loopback interface."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _end(process: subprocess.Popen) -> None:
    """Kill a program and its watcher, which are the members of one process group."""
    # On macOS it is a PermissionError if all members are dead already.
    with process, suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


class PrivateBroker:
    """One RabbitMQ node on loopback; made by `private_broker()`.

    url, port: where it serves AMQP. node: its Erlang name, for a cluster. folder: where
    it keeps everything. log: the log since its last start. process: its Popen; None
    while it is down.
    """

    def __init__(self, folder, port, peer, config) -> None:
        if port and not _is_free(port):
            raise BrokerError(f"port {port} is in use: stop its owner or take another")
        # The search begins at random, below the ports that the system gives to clients.
        # A client that keeps trying to reach a killed broker could else be given the
        # broker's own port, connect to itself, and so keep the port from start().
        free = filter(_is_free, range(20_000 + uuid.uuid4().int % 10_000, 32_000))
        self.port = port or next(free)
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}/%2F"
        self.node = f"olive-{os.getpid()}-{self.port}@localhost"
        self.folder, self.log = folder, folder / "rabbitmq-server.log"
        self.process: subprocess.Popen | None = None
        config = f"listeners.tcp.1 = 127.0.0.1:{self.port}\n{config}\n"
        (folder / "own.conf").write_text(config)
        # The environment is made from nothing: ours may be meant for another broker.
        self._env = dict(
            # RabbitMQ's own scripts come first: what Debian has in PATH are wrappers
            # that change the user and the folder.
            PATH=f"/usr/lib/rabbitmq/bin:{os.environ['PATH']}", LC_ALL="C.UTF-8",
            # An epmd that a node started by itself would be a daemon, and outlive it.
            ERL_AFLAGS="-start_epmd false -kernel inet_dist_use_interface {127,0,0,1}",
            # The nodes of a cluster share an epmd. They share a home, too, for Erlang
            # keeps the cookie there, the password by which its nodes trust each other.
            ERL_EPMD_PORT=peer._env["ERL_EPMD_PORT"] if peer else str(next(free)),
            ERL_EPMD_ADDRESS="127.0.0.1", HOME=peer._env["HOME"] if peer else folder,
            RABBITMQ_NODENAME=self.node, RABBITMQ_DIST_PORT=str(next(free)),
            # All is in the folder, where the node runs. A log that goes to the output
            # (-) has in it also what goes wrong before RabbitMQ can open a file.
            RABBITMQ_LOGS="-", RABBITMQ_LOG_BASE=".", RABBITMQ_MNESIA_BASE=folder,
            # RabbitMQ would look for these in /etc, so each is named; only one exists.
            RABBITMQ_CONFIG_FILE="own.conf", RABBITMQ_CONFIG_FILES="none",
            RABBITMQ_ADVANCED_CONFIG_FILE="none", RABBITMQ_CONF_ENV_FILE="none",
            # Under systemd the script becomes the node: there is no process between.
            RABBITMQ_ENABLED_PLUGINS_FILE="none", RUNNING_UNDER_SYSTEMD="1")
        # Where a peer has an epmd already, this one finds its port taken and leaves.
        # Its watcher stays, and looks after the folder also while the node is down.
        self._epmd = self._spawn("epmd")

    def _spawn(self, program: str) -> subprocess.Popen:
        # The program has a session of its own: Ctrl-C at the terminal is for us alone.
        return subprocess.Popen(
            ["sh", "-c", _WATCHED, self.folder, program], stdin=subprocess.PIPE,
            env=self._env, cwd=self.folder, start_new_session=True)

    def start(self) -> None:
        """Start the node, for the first time or anew, and wait until it serves AMQP.

        Raises BrokerError, with what its log says, if it does not within 60 s.
        """
        if self.process and self.process.poll() is None:
            return
        self.kill()     # A node that died by itself has left its watcher.
        self.process, deadline = self._spawn("rabbitmq-server"), time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < deadline:
            # RabbitMQ opens its port when it is ready, as the last thing.
            if not _is_free(self.port):
                return
            time.sleep(0.05)
        # The first errors name the cause; the end is Erlang's report of the collapse.
        lines = self.log.read_text(errors="replace").splitlines()
        why = [line for line in lines if "[error]" in line][:10] or lines[-10:]
        raise BrokerError("\n".join(["RabbitMQ did not start; its log says:", *why]))

    def kill(self) -> None:
        """Kill the node by SIGKILL, like a power cut; its data stay for start()."""
        if self.process:
            _end(self.process)
        self.process = None

    def stop(self) -> None:
        """Stop the node in good order; its data stay for start()."""
        if self.process and self.process.poll() is None:
            self.ctl("stop_app")
        self.kill()

    def ctl(self, *args: str) -> str:
        """Run rabbitmqctl against this node and return what it prints.

        Raises BrokerError, with what rabbitmqctl says, if it fails.
        """
        ran = subprocess.run(["rabbitmqctl", "-q", *args], cwd=self.folder, timeout=120,
                             env=self._env, capture_output=True, text=True)
        if ran.returncode:
            raise BrokerError(f"rabbitmqctl {' '.join(args)}: {ran.stderr}{ran.stdout}")
        return ran.stdout

    def close(self) -> None:
        """Kill the node, epmd and their watchers."""
        self.kill()
        _end(self._epmd)


@contextmanager
def private_broker(port=None, *, peer=None, config="", say=""):
    """Run a private RabbitMQ node on loopback; nothing of it is left behind.

    port: where it serves AMQP (default: a free port). peer: a running private broker,
    whose epmd and cookie to share, so that both can be in one cluster. config: more
    lines for rabbitmq.conf. say: a line for stderr before the start, which takes some
    seconds. Raises BrokerError if RabbitMQ is not installed, the port is in use, or the
    node does not start.
    """
    with tempfile.TemporaryDirectory(prefix="olive-broker-") as folder:
        with closing(PrivateBroker(Path(folder), port, peer, config)) as broker:
            if say:
                print(say, file=sys.stderr)
            broker.start()
            yield broker


if __name__ == "__main__":
    main()
