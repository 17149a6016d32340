"""The sender, for a command and for programs; and a private RabbitMQ to try it with.

    python olive_utils.py add 2 3       sends the job `add`, waits, prints its result

`send_task` and `call_task` do the same for a program; they are shaped like Celery's.
Each of their calls opens a connection of its own, which takes some milliseconds. A
program that sends often keeps a `Sender` open on a kernel instead.

The file has three parts:

    1. The sender           one message, many messages, the dead queue, the command
    2. The demo             an app and its sender in one program
    3. The private broker   a real RabbitMQ, for the demo and the tests

Copyright (c) 2026 the Sweepea authors. SPDX-License-Identifier: MIT
"""

import argparse
import json
import logging
import os
import random
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
    order in which the jobs are ran.
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

        ident: the id to give to it (default: a new one). reply_to: the queue to which
        the app shall reply (default: the reply comes into `replies`; None: no reply).
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

        Parameters and errors as in `call_task`. One call at a time: two would take each
        other's replies. A Sender whose call has timed out is to be closed for the same
        reason, for the reply may still come.
        """
        async with sweepea.ignore_after(timeout):
            await self.send(*args, **options)
            _ident, reply = await self.replies.get()
            if reply["status"] != "SUCCESS":
                raise TaskFailed(reply)
            return reply["result"]
        raise TimeoutError(f"no answer within {timeout:g} s")

    async def aclose(self) -> None:
        """Close the connection."""
        await self.connection.close()


def _moment(when: datetime | float | None) -> str | None:
    """A deadline as Celery writes it; a number counts the seconds from now."""
    if isinstance(when, (int, float)):
        when = datetime.now(timezone.utc) + timedelta(seconds=when)
    return None if when is None else when.isoformat()


async def _next(queue: sweepea.Queue, timeout: float, what: str):
    """Take the next item of a queue; if none comes in time, say so and leave with 3."""
    async with sweepea.ignore_after(timeout):
        return await queue.get()
    print(f"no {what} within {timeout:g} s", file=sys.stderr)
    raise SystemExit(3)


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
# Three kinds of tasks work together, and what is said between them is this:
#
#     _send_all --spawns--> _send_one, _send_one, ...       the messages go out
#                              |  sent_at: {id: clock}
#                              v
#     _send_many <-- replies: (id, reply or error) --       what became of them

async def _send_all(sender: Sender, options, sent_at: dict[str, float]) -> None:
    # This is the pattern of a limit. A permit is acquired here, by the task that makes
    # the others, and released there, by each of these when it is ran. So never more
    # than 500 messages wait for their confirms, whatever --count is, and the next one
    # goes out as soon as any of them is ran.
    limit = sweepea.Semaphore(500)
    for _ in range(options.count):
        await limit.acquire()
        await sweepea.spawn(_send_one, sender, options, sent_at, limit, daemon=True)


async def _send_one(sender: Sender, options, sent_at: dict, limit) -> None:
    ident = str(uuid.uuid4())
    sent_at[ident] = time.monotonic()
    # Where no reply is wanted, the confirm stands in for one.
    reply = {"status": "SUCCESS"} if options.no_wait else None
    try:
        await sender.send(
            options.task, options.args, options.kwargs, countdown=options.countdown,
            expires=options.expires, time_limit=options.time_limit, ident=ident,
            priority=options.priority, reply_to=None if options.no_wait else REPLY_TO)
    except pika.exceptions.AMQPError as exc:
        # Nobody awaits this task, so an error goes the way that the replies go.
        reply = exc
    await sender.replies.put((ident, reply))
    await limit.release()


async def _send_many(sender: Sender, options: argparse.Namespace) -> int:
    """Send the messages, print what comes back as it comes; return the exit status."""
    began, sent_at, latencies, failed = time.monotonic(), {}, [], 0
    await sweepea.spawn(_send_all, sender, options, sent_at, daemon=True)
    while len(latencies) < options.count:
        ident, reply = await _next(sender.replies, options.timeout, "answer")
        if isinstance(reply, pika.exceptions.AMQPError):
            raise reply
        # At-least-once means that a job may run twice, and then it answers twice.
        if reply is None or ident not in sent_at:
            continue
        latencies.append(1000 * (time.monotonic() - sent_at.pop(ident)))
        if reply["status"] == "SUCCESS":
            # Whoever reads the results through a pipe gets each of them at once.
            print(ident if options.no_wait else json.dumps(reply["result"]), flush=True)
        else:
            failed += 1
            error = TaskFailed(reply)
            print(error.traceback.strip() or error, file=sys.stderr)
    if options.count > 1:
        count, seconds = options.count, time.monotonic() - began
        latencies.sort()
        print(f"{count - failed} ok, {failed} failed in {seconds:.2f} s: "
              f"{count / seconds:.0f} tasks/s, latency p50 {latencies[count // 2]:.1f} "
              f"ms, p99 {latencies[count * 99 // 100]:.1f} ms", file=sys.stderr)
    return 1 if failed else 0


# -- the dead queue --------------------------------------------------------------------

async def _dead_letters(sender: Sender, options: argparse.Namespace) -> int:
    """List the dead queue, or send back to work what lies in it now."""
    queue, channel = sender.config.dead_queue, await sender.connection.channel()
    declared = await channel.call("queue_declare", queue, passive=True)
    count, letters = declared.method.message_count, sweepea.Queue()
    # What is listed is not acknowledged: the broker takes it back when the channel
    # closes. So the window has to hold the whole queue. 65,535 is the most that one
    # consumer can ask for, hence a longer queue has several of them. (To ask for no
    # limit is no way out: a quorum queue then stops at 2,000.)
    await channel.call("basic_qos", prefetch_count=min(count, 65_535))
    for _ in range(0, count, 65_535):
        await channel.call("basic_consume", queue, lambda *delivery:
                           sender.kernel._spawn(letters.put(delivery)))
    for _ in range(count):
        _, method, properties, body = await _next(letters, options.timeout, "message")
        headers = properties.headers or {}
        if options.replay:
            # It goes back as if it had never been tried.
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
    """Read `value` or `name=value` as (name or None, value).

    The value is JSON if it reads as JSON, else it is the text as it stands.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        name, value = None, text
    with suppress(ValueError, RecursionError):
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
    option("task", nargs="?", metavar="TASK", help="its name (without one: add 2 3)")
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
        # `| head` has read enough. At its end Python would try once more to write what
        # is left, and complain; so what is left goes nowhere.
        os._exit(1)


# =====================================================================================
# 2. The demo
# =====================================================================================

def demo(config: OliveAppConfig) -> None:
    """Run the app, send it a handful of messages, print what comes back.

    config: the settings of the app. If no broker answers at its URL, a private one is
    started; then it raises BrokerError if that is not possible.
    """
    async def show_all() -> None:
        # Before the app has declared its queue there is nothing that takes a message.
        await app._link.up.wait()
        for job in [("add", [2, 3]), ("sleep_n", [0.2]), ("fib", [20]),
                    ("do_nothing", []), ("fail", ["on purpose"]), ("add", [1, 1], 1.5)]:
            await _with_sender(app.config, _show, *job)
        app.stop()

    logging.getLogger("pika").setLevel(logging.CRITICAL)
    try:
        sweepea.run(_with_sender, config, lambda sender: sweepea.sleep(0))
    except pika.exceptions.AMQPError:
        what = "no RabbitMQ takes us there: starting a private one ..."
        with private_broker(say=what) as broker:
            return demo(replace(config, url=broker.url))
    # The task that fails on purpose would be a warning between the results.
    app = OliveOly(replace(config, log_level="CRITICAL"))
    app.start(show_all)


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

# A shell runs this text as  sh -c TEXT FOLDER PROGRAM, so that $0 is the folder and $1
# the program. The pipe is the standard input.
_WATCHED = "\n".join([
    # RabbitMQ stalls when it runs out of descriptors, and often no more than 1,024
    # files may be open unless one asks for more. Where asking fails it stays as it is.
    'ulimit -n "$(ulimit -H -n)" 2>/dev/null',
    # The pipe moves to number 3, as a shell takes the standard input away from what it
    # puts into the background; and the program itself gets an empty input.
    "exec 3<&0 </dev/null",
    # The watcher is a copy of this shell in the background. It is there before the
    # program is, so that there is no moment in which nobody watches. Nobody ever writes
    # into the pipe, so it waits here until the pipe ends.
    "(read -r _ <&3",
    # $$ is the number of the first shell, not of this copy; the program below has it
    # then. It cannot have gone to a stranger: it is also the number of the process
    # group, and as long as the watcher is a member, the system does not use it again.
    "kill -9 $$",
    # The watcher is the last one who needs the folder. It lets go of the output, so
    # that nobody who reads that waits for the watcher.
    'rm -rf "$0") >/dev/null 2>&1 &',
    # The program takes the place of the first shell, and with it the number $$. So it
    # is a child of ours, to be signalled and waited for. It has no use for the pipe.
    'exec "$1" 3<&- >"$1.log" 2>&1'])


class BrokerError(Exception):
    """A private broker cannot do what was asked; the message says why."""


def _is_free(port: int) -> bool:
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
    it keeps everything. log: the file of its log. process: its Popen; None when it is
    down.
    """

    def __init__(self, folder, port, peer, config) -> None:
        if port and not _is_free(port):
            raise BrokerError(f"port {port} is in use: stop its owner or take another")
        # These ports are below those that the system gives to clients. Otherwise a
        # client that keeps trying to reach a killed broker could be given the broker's
        # own port, connect to itself, and so keep the port from the next start().
        free = filter(_is_free, random.Random().sample(range(20_000, 32_000), 1000))
        self.port = port or next(free)
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}/%2F"
        self.node = f"olive-{os.getpid()}-{self.port}@localhost"
        self.folder, self.log = folder, folder / "rabbitmq-server.log"
        self.process: subprocess.Popen | None = None
        (folder / "own.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{self.port}\n{config}\n")
        # Nothing is inherited, since it could be meant for another broker. RabbitMQ
        # would look for several files in /etc, so each is named; most do not exist. A
        # log that goes to stdout (-) has in it also what goes wrong before RabbitMQ can
        # open a file. Port 0 is any that is free. An epmd that a node started by itself
        # would be a daemon, and outlive it. Under systemd the script becomes the node,
        # and there is no process between. The nodes of a cluster share one epmd, and
        # one home, for there lies the cookie, the password by which Erlang's nodes
        # trust each other; Erlang makes one where there is none. The folders of
        # RabbitMQ's packages come before PATH, as what Debian has there is a wrapper
        # that changes the user and the folder.
        self._env = dict(
            PATH=f"/usr/lib/rabbitmq/bin:{os.environ['PATH']}", LC_ALL="C.UTF-8",
            ERL_AFLAGS="-start_epmd false -kernel inet_dist_use_interface {127,0,0,1}",
            ERL_EPMD_PORT=peer._env["ERL_EPMD_PORT"] if peer else str(next(free)),
            ERL_EPMD_ADDRESS="127.0.0.1", HOME=peer._env["HOME"] if peer else folder,
            RABBITMQ_NODENAME=self.node, RABBITMQ_DIST_PORT=str(next(free)),
            RABBITMQ_LOGS="-", RABBITMQ_LOG_BASE=".", RABBITMQ_MNESIA_BASE=".",
            RABBITMQ_CONFIG_FILE="own.conf", RABBITMQ_CONFIG_FILES="none",
            RABBITMQ_ADVANCED_CONFIG_FILE="none", RABBITMQ_CONF_ENV_FILE="none",
            RABBITMQ_ENABLED_PLUGINS_FILE="none", RUNNING_UNDER_SYSTEMD="1")
        # Where a peer has an epmd already, this one finds its port taken and leaves.
        # Its watcher stays, and looks after the folder also while the node is down.
        self._epmd = self._spawn("epmd")

    def _spawn(self, program: str) -> subprocess.Popen:
        # In a session of its own, since Ctrl-C at the terminal is meant for us alone.
        return subprocess.Popen(
            ["sh", "-c", _WATCHED, self.folder, program], stdin=subprocess.PIPE,
            env=self._env, cwd=self.folder, start_new_session=True)

    def start(self) -> None:
        """Start the node, for the first time or again, and wait until it serves AMQP.

        Raises BrokerError, with the end of its log, if it does not within 60 s.
        """
        self.kill()     # A node that died by itself has left its watcher.
        self.process, deadline = self._spawn("rabbitmq-server"), time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < deadline:
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
        """Stop the node in good order. Raises BrokerError if it is not up."""
        self.ctl("stop_app")
        self.kill()

    def ctl(self, *args: str) -> str:
        """Run rabbitmqctl against this node and return what it prints.

        Raises BrokerError, with what it says, if it fails.
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
