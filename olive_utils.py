"""Sending tasks, and a private RabbitMQ for demos and tests.

    python olive_utils.py add 2 3       sends a task to the app, prints its result

`send_task` and `call_task` do the same for programs; they are shaped like Celery's.
`private_broker()` starts a real RabbitMQ that leaves nothing behind.

Copyright (c) 2026 the Sweepea authors. SPDX-License-Identifier: MIT
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from glob import glob
from pathlib import Path
from typing import Any, Iterator

import pika
from pika.exceptions import AMQPError, UnroutableError

import olive_app
import sweepea
from olive_app import OliveAppConfig, OliveOly, _again
from sweepea import Connection, describe, ignore_after


# =====================================================================================
# A broker of one's own
# =====================================================================================

# Debian's rabbitmq-server on PATH is a wrapper that changes user and folder, so the
# real scripts are looked for first.
_SBIN = ("/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin", "/usr/lib/rabbitmq/bin",
         "/opt/homebrew/opt/rabbitmq/sbin", "/usr/local/opt/rabbitmq/sbin")
# An epmd that Erlang started itself would be a daemon, and outlive us.
_ERL_FLAGS = "-start_epmd false -kernel inet_dist_use_interface {127,0,0,1}"
# Every file that RabbitMQ would look for in /etc is named, so that none is read there.
# Logging to stdout puts also what goes wrong before logging starts into our file.
_SETTINGS = """
NODENAME={0.node} NODE_IP_ADDRESS=127.0.0.1 NODE_PORT={0.port} DIST_PORT={0.dist_port}
CTL_DIST_PORT_MIN=0 CTL_DIST_PORT_MAX=0 LOGS=- LOG_BASE={0.folder}
PID_FILE={0.folder}/pid MNESIA_BASE={0.folder} CONFIG_FILE={0.folder}/rabbitmq.conf
CONFIG_FILES={0.folder}/none ADVANCED_CONFIG_FILE={0.folder}/none
CONF_ENV_FILE={0.folder}/none ENABLED_PLUGINS_FILE={0.folder}/none"""
# Runs "$@" beside a watcher that blocks on a pipe whose only write end is ours. However
# we end, even by kill -9, the watcher reads end-of-file, kills "$@" and removes folder
# $0. It is forked before the exec, so that no moment is unguarded, and as a member of
# the process group it keeps the number $$ from being given to a stranger.
_WATCHED = """exec 3<&0 </dev/null
(read -r _ <&3; kill -9 $$; rm -rf "$0") >/dev/null 2>&1 &
exec "$@" 3<&-"""


class BrokerError(Exception):
    """A private broker cannot do what was asked; the message says why."""


def _is_free(port: int) -> bool:
    with suppress(OSError):
        socket.create_server(("127.0.0.1", port)).close()
        return True
    return False


def _end(process: subprocess.Popen[str] | None) -> None:
    if process:
        with suppress(ProcessLookupError, PermissionError):  # macOS: all are zombies
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class PrivateBroker:
    """One RabbitMQ node on loopback, with its `url`, `port`, `log` and `process`."""

    def __init__(self, port: int | None, peer: PrivateBroker | None, config: str):
        if port and not _is_free(port):
            raise BrokerError(f"port {port} is in use: stop its owner or take another")
        path = os.environ.get("PATH", "") + ":/opt/homebrew/bin:/usr/local/bin"
        servers = [s for sbin in _SBIN for s in glob(f"{sbin}/rabbitmq-server")]
        servers += filter(None, [shutil.which("rabbitmq-server", path=path)])
        if not servers or not shutil.which("epmd", path=path):
            how = "apt-get install rabbitmq-server (macOS: brew install rabbitmq)"
            raise BrokerError(f"RabbitMQ is not installed: {how}")
        self._sbin = Path(servers[0]).resolve().parent
        # Below the system's ephemeral ports: among those, a client that keeps retrying
        # a killed broker can connect to itself and so keep the port from start().
        free = filter(_is_free, random.Random().sample(range(20000, 32000), 1000))
        self.port, self.dist_port = port or next(free), next(free)
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}/%2F"
        self.node = f"olive-{os.getpid()}-{self.port}@localhost"
        self.folder = Path(tempfile.mkdtemp(prefix="olive-broker-"))
        self.log = self.folder / "rabbit.log"
        self.process: subprocess.Popen[str] | None = None
        self._pipe = os.pipe()
        (self.folder / "rabbitmq.conf").write_text(config + "\n")
        (self.folder / ".erlang.cookie").write_text(secrets.token_hex(16))
        (self.folder / ".erlang.cookie").chmod(0o400)
        foreign = ("RABBITMQ_", "ERL_", "NOTIFY_SOCKET")  # meant for another broker
        self._env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        for name, value in (setting.split("=") for setting in _SETTINGS.split()):
            self._env[f"RABBITMQ_{name}"] = value.format(self)
        self._env |= {
            "PATH": path,
            "RUNNING_UNDER_SYSTEMD": "1",  # the script then becomes the VM: one process
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": peer._env["ERL_EPMD_PORT"] if peer else str(next(free)),
            "HOME": peer._env["HOME"] if peer else str(self.folder),  # for the cookie
            "ERL_AFLAGS": _ERL_FLAGS,
        }
        # With a peer this epmd finds its port taken and leaves, but its watcher stays,
        # and removes the folder even if we are killed while the node is down.
        self._epmd = self._spawn("epmd", subprocess.DEVNULL)

    def _spawn(self, program: str | Path, output, *args: str) -> subprocess.Popen[str]:
        # In a new session, because the terminal's Ctrl-C is for the program alone.
        return subprocess.Popen(
            ["sh", "-c", _WATCHED, self.folder, program, *args], stdin=self._pipe[0],
            stdout=output, stderr=output, env=self._env, cwd=self.folder, text=True,
            start_new_session=True)

    def start(self) -> None:
        """Start the node, first or again, and wait until it serves AMQP."""
        if self.process and self.process.poll() is None:
            return
        self.kill()  # one that died by itself has left its watcher
        with self.log.open("ab") as log:
            begin = log.tell()
            self.process = self._spawn(self._sbin / "rabbitmq-server", log)
        deadline = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < deadline:
            address = ("127.0.0.1", self.port)
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
        """Kill the node (SIGKILL), as a power cut would; its data stay for start()."""
        _end(self.process)
        self.process = None

    def stop(self) -> None:
        """Stop the node in good order (SIGTERM)."""
        if self.process:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        self.kill()

    def ctl(self, *args: str) -> str:
        """Run rabbitmqctl against this node and return what it prints."""
        command = self._spawn(self._sbin / "rabbitmqctl", subprocess.PIPE, "-q", *args)
        try:
            output, errors = command.communicate(timeout=120)
        finally:
            _end(command)
        if command.returncode:
            why = (errors + output).strip()[:500]
            raise BrokerError(f"rabbitmqctl {' '.join(args)} failed: {why}")
        return output


@contextmanager
def private_broker(
    port: int | None = None, *, peer: PrivateBroker | None = None, config: str = "",
    say: str = ""
) -> Iterator[PrivateBroker]:
    """Run a private RabbitMQ node on loopback; nothing of it remains, however we end.

    port: the AMQP port (default: a free one); config: more lines for rabbitmq.conf;
    peer: a running broker whose epmd and cookie to share, so that they can cluster;
    say: a line for stderr before the start, which takes some seconds.
    """
    broker = PrivateBroker(port, peer, config)
    try:
        if say:
            print(say, file=sys.stderr)
        broker.start()
        yield broker
    finally:
        broker.kill()
        _end(broker._epmd)
        for end in broker._pipe:
            os.close(end)
        shutil.rmtree(broker.folder, ignore_errors=True)


# =====================================================================================
# Sending
# =====================================================================================

class TaskFailed(Exception):
    """The task failed over there: `exc_type`, `text` and the remote `traceback`."""

    def __init__(self, reply: dict) -> None:
        error = reply["result"]
        self.exc_type, self.traceback = error["exc_type"], reply["traceback"] or ""
        self.text = " ".join(map(str, error["exc_message"]))
        super().__init__(f"{self.exc_type}: {self.text}")


class Sender:
    """A connection that sends tasks, and puts the replies into the Queue `replies`.

    They come by RabbitMQ's direct reply-to: no queue has to be declared for them.
    """

    @classmethod
    async def open(cls, config: OliveAppConfig) -> Sender:
        """Connect. Raises pika's AMQPError if no broker can be reached."""
        self = cls()
        self.config = config
        self.connection = await Connection.open(config.urls)
        self.channel = await self.connection.channel(confirm=True)
        self.replies = await self.consume(self.channel, "amq.rabbitmq.reply-to", True)
        return self

    async def consume(self, channel: sweepea.Channel, queue: str,
                      auto_ack: bool = False) -> sweepea.Queue:
        """Consume a queue; return a Queue of what comes: (method, properties, body)."""
        kernel, messages = await sweepea._get_kernel(), sweepea.Queue()
        await channel.call(
            "basic_consume", queue, lambda _channel, *message:
            kernel._spawn(messages.put(message)), auto_ack=auto_ack)
        return messages

    async def send(self, name: str, args=(), kwargs=None, *, countdown=None, eta=None,
                   expires=None, time_limit=None, priority=None, ident=None,
                   reply=True) -> str:
        """See `send_task`; with `reply`, what comes back goes into `replies`."""
        ident = ident or str(uuid.uuid4())
        now = datetime.now(timezone.utc)
        if countdown is not None:
            eta = now + timedelta(seconds=countdown)
        if isinstance(expires, (int, float)):
            expires = now + timedelta(seconds=expires)
        if time_limit is not None:      # (AMQP has doubles, but pika has not)
            time_limit = Decimal(str(time_limit))
        headers = {"lang": "py", "task": name, "id": ident, "retries": 0,
                   "root_id": ident, "parent_id": None, "group": None,
                   "eta": eta and eta.isoformat(), "timelimit": [time_limit, None],
                   "expires": expires and expires.isoformat()}
        body = json.dumps([list(args), dict(kwargs or {}), {
            "callbacks": None, "errbacks": None, "chain": None, "chord": None}],
            allow_nan=False)
        await self.channel.basic_publish(
            self.config.exchange, self.config.routing_key, body.encode(),
            pika.BasicProperties(
                content_type="application/json", content_encoding="utf-8",
                delivery_mode=2, correlation_id=ident, headers=headers,
                reply_to="amq.rabbitmq.reply-to" if reply else None, priority=priority))
        return ident

    async def call(self, timeout: float | None, *args: Any, **options: Any) -> Any:
        """See `call_task`; for one call at a time."""
        async with ignore_after(timeout) as timer:
            await self.send(*args, **options)
            reply = json.loads((await self.replies.get())[2])
        if timer.expired:
            raise TimeoutError(f"no answer within {timeout:g} s")
        if reply["status"] != "SUCCESS":
            raise TaskFailed(reply)
        return reply["result"]


def _connected(method: str, *args: Any, **options: Any) -> Any:
    """Run a method of a Sender on a connection of its own."""
    async def main() -> Any:
        sender = await Sender.open(OliveAppConfig.from_env())
        try:
            return await getattr(sender, method)(*args, **options)
        finally:
            await sender.connection.close()

    return sweepea.run(main)


def send_task(name: str, args=(), kwargs=None, *, countdown: float | None = None,
              eta: datetime | None = None, expires: float | datetime | None = None,
              time_limit: float | None = None, priority: int | None = None) -> str:
    """Send a task and return its id, once the broker has confirmed that it has it.

    Times are in seconds; `eta` is a datetime with a zone. Raises pika's AMQPError if
    the broker cannot be reached, its UnroutableError if no queue is bound. The settings
    are the app's, from the environment.
    """
    return _connected("send", name, args, kwargs, countdown=countdown, eta=eta,
                      expires=expires, time_limit=time_limit, priority=priority,
                      reply=False)


def call_task(name: str, args=(), kwargs=None, *, timeout: float | None = 30,
              **options: Any) -> Any:
    """Send a task, wait for its result and return it; options as in `send_task`.

    Raises TaskFailed if it failed, TimeoutError if no result came within `timeout` s.
    """
    return _connected("call", timeout, name, args, kwargs, **options)


def demo(config: OliveAppConfig) -> None:
    """Run the app, send it a handful of tasks of each kind, print what comes back."""
    calls = [("add", [2, 3], {}), ("sleep_n", [0.2], {}), ("fib", [20], {}),
             ("do_nothing", [], {}), ("fail", ["on purpose"], {}),
             ("add", [1, 1], {"countdown": 1.5})]

    def run(url: str) -> None:
        app = OliveOly(replace(config, url=url, log_level="CRITICAL"))

        async def show() -> None:
            await app._link.up.wait()
            sender = await Sender.open(app.config)
            for name, args, options in calls:
                began = time.monotonic()
                try:
                    answer = await sender.call(30, name, args, **options)
                except (TaskFailed, TimeoutError) as exc:
                    answer = f"failed: {exc}"
                shown = [repr(arg) for arg in args] + [
                    f"{key}={value}" for key, value in options.items()]
                print(f"{name}({', '.join(shown)}) -> {answer}  "
                      f"({1000 * (time.monotonic() - began):.0f} ms)")
            await sender.connection.close()
            app.stop()

        app.start(show)

    async def find() -> None:
        await (await Connection.open(config.urls)).close()

    logging.getLogger("pika").setLevel(logging.CRITICAL)
    try:
        sweepea.run(find)
    except AMQPError:
        what = "no RabbitMQ takes us there: starting a private one ..."
        with private_broker(say=what) as broker:
            run(broker.url)
    else:
        run(config.url)


# =====================================================================================
# The command
# =====================================================================================

async def _send_many(sender: Sender, options: argparse.Namespace, args, kwargs) -> int:
    """Send the task so many times, print the results as they come; the exit status."""
    count, sent, latencies, failed = options.count, {}, [], 0
    began = said = time.monotonic()
    window = sweepea.Semaphore(500)     # so many unconfirmed publishes at once
    results = sender.replies

    async def send_all() -> None:
        for _ in range(count):
            await window.acquire()
            await sweepea.spawn(send_one, daemon=True)

    async def send_one() -> None:
        ident = str(uuid.uuid4())
        sent[ident] = time.monotonic()
        try:
            await sender.send(
                options.task, args, kwargs, countdown=options.countdown, ident=ident,
                expires=options.expires, time_limit=options.time_limit,
                priority=options.priority, reply=not options.no_wait)
        except AMQPError as exc:
            await results.put((None, None, exc))
        else:
            if options.no_wait:
                properties = pika.BasicProperties(correlation_id=ident)
                await results.put((None, properties, None))
        await window.release()

    await sweepea.spawn(send_all, daemon=True)
    while sent or len(latencies) < count:
        async with ignore_after(options.timeout) as timer:
            _, properties, body = await results.get()
        if timer.expired:
            print(f"no answer within {options.timeout:g} s", file=sys.stderr)
            return 3
        if isinstance(body, AMQPError):
            raise body
        ident = properties.correlation_id
        if ident not in sent:
            continue    # a task may run twice, and answer twice
        latencies.append(time.monotonic() - sent.pop(ident))
        reply = json.loads(body) if body else {"status": "SUCCESS", "result": ident}
        if reply["status"] == "SUCCESS":
            print(ident if options.no_wait else json.dumps(reply["result"]))
        else:
            failed += 1
            error = TaskFailed(reply)
            print(error.traceback.strip() or error, file=sys.stderr)
        if count > 1 and time.monotonic() - said > 0.2:
            said = time.monotonic()
            print(f"{len(latencies)} of {count}", file=sys.stderr,
                  end="\r" if sys.stderr.isatty() else "\n")
    if count > 1:
        seconds, latencies = time.monotonic() - began, sorted(latencies)
        p50, p99 = (1000 * latencies[int(count * part)] for part in (0.5, 0.99))
        print(f"{count - failed} ok, {failed} failed in {seconds:.2f} s: "
              f"{count / seconds:.0f} tasks/s, latency p50 {p50:.1f} ms, p99 "
              f"{p99:.1f} ms", file=sys.stderr)
    return 1 if failed else 0


async def _dead_letters(sender: Sender, replay: bool, timeout: float) -> int:
    """Print the dead queue, or send to work again what lies in it now."""
    channel, config = await sender.connection.channel(), sender.config
    declared = await channel.call("queue_declare", config.dead_queue, passive=True)
    count = declared.method.message_count
    # What is replayed is acknowledged one by one, each after its confirm; what is only
    # shown goes back when the channel closes.
    await channel.call("basic_qos", prefetch_count=100 if replay else
                       count if count < 65536 else 0)
    letters = await sender.consume(channel, config.dead_queue) if count else None
    for done in range(count):
        async with ignore_after(timeout) as timer:
            method, properties, body = await letters.get()
        if timer.expired:
            print(f"{done} of {count}: somebody took the others", file=sys.stderr)
            return 3
        headers = properties.headers or {}
        if replay:
            properties.headers = {name: value for name, value in headers.items()
                                  if not str(name).startswith("x-olive-")}
            if "retries" in headers:
                properties.headers["retries"] = 0
            again = _again(properties)
            again.message_id = uuid.uuid4().hex     # not the one that was buried
            await sender.channel.basic_publish(
                config.exchange, config.routing_key, body, again)
            channel.basic_ack(method.delivery_tag)
        else:
            print(json.dumps({
                "task": headers.get("task"), "id": headers.get("id"),
                "reason": headers.get("x-olive-reason"),
                "error": headers.get("x-olive-error"),
                "body": body[:1000].decode(errors="replace")}, default=str))
    print(f"{count} {'sent back to work' if replay else 'dead'}", file=sys.stderr)
    return 0


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
        return value
    except (ValueError, RecursionError):
        return text


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 <= (value := float(text)) < 1e9:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")


def main(argv: list[str] | None = None) -> None:
    """`python olive_utils.py`: send a task and print its result."""
    parser = argparse.ArgumentParser(
        prog="olive_utils.py", description="Send a task to the app and print its "
        "result, as JSON.", epilog="exit status: 0 done, 1 the task failed, 2 usage, 3 "
        "no answer in time, 4 no broker, or no queue bound. The settings are the "
        "app's: see python olive_app.py --help.")
    option, number = parser.add_argument, {"type": _seconds, "metavar": "SECONDS"}
    option("task", nargs="?", metavar="TASK", help="its name (without one: add 2 3)")
    option("args", nargs="*", metavar="ARG | name=value", help="the arguments; each is "
           "JSON if it reads as JSON, else a string")
    option("--count", type=int, default=1, metavar="N", help="send it N times; then a "
           "summary on stderr")
    option("--no-wait", action="store_true", help="print the id and do not wait")
    option("--timeout", **number, default=30.0, help="wait so long for an answer (30)")
    option("--countdown", **number, help="let it run after so many seconds")
    option("--expires", **number, help="do not run it after so many seconds")
    option("--time-limit", **number, help="stop it after so many seconds")
    option("--priority", type=int, metavar="0-255")
    option("--dead", action="store_true", help="list the dead queue")
    option("--replay", action="store_true", help="send what is dead back to work")
    option("--version", action="version", version=f"sweepea {sweepea.__version__}")
    options = parser.parse_intermixed_args(argv)
    if options.count < 1 or options.timeout <= 0:
        parser.error("--count and --timeout must be more than 0")
    if not 0 <= (options.priority or 0) <= 255:
        parser.error("--priority must be from 0 to 255")
    if (options.dead or options.replay) and options.task or (
            options.dead and options.replay):
        parser.error("--dead and --replay stand alone")
    if options.task == "":
        parser.error("TASK is empty")
    if options.task is None:
        options.task, options.args = "add", ["2", "3"]
    args, kwargs = [], {}
    for arg in options.args:
        name, equals, value = arg.partition("=")
        if equals and name.isidentifier():
            kwargs[name] = _value(value)
        else:
            args.append(_value(arg))
    config = OliveAppConfig.from_env()
    logging.basicConfig(format="%(message)s", level="WARNING")
    logging.getLogger("pika").setLevel(logging.CRITICAL)

    async def run() -> int:
        sender = await Sender.open(config)
        try:
            if options.dead or options.replay:
                return await _dead_letters(sender, options.replay, options.timeout)
            return await _send_many(sender, options, args, kwargs)
        finally:
            await sender.connection.close()

    try:
        status = sweepea.run(run)
        sys.stdout.flush()
        raise SystemExit(status)
    except UnroutableError:
        olive_app.fail(f"no queue is bound to {config.exchange} with the key "
                       f"{config.routing_key}: does the app run?", 4)
    except sweepea.REFUSED as exc:
        olive_app.fail(f"the broker refuses us: {describe(exc)} (check OLIVE_URL)", 4)
    except AMQPError as exc:
        olive_app.fail(f"no broker, or not as expected: {describe(exc)}. Start the app "
                       f"(python olive_app.py --with-broker), or set OLIVE_URL", 4)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:     # `| head` has read enough; the rest must not be flushed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
