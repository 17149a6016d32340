"""Sending tasks, and a private RabbitMQ for demos and tests.

    python olive_utils.py add 2 3       sends a task to the app, prints its result

`send_task` and `call_task` do the same for programs; they are shaped like Celery's.
`private_broker()` starts a real RabbitMQ that leaves nothing behind.

Copyright (c) 2026 the Sweepea authors. SPDX-License-Identifier: MIT
"""

from __future__ import annotations

import argparse
import itertools
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
         "/opt/homebrew/opt/rabbitmq/sbin", "/usr/local/opt/rabbitmq/sbin")  # fmt: skip
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

    def __init__(self, port: int | None, peer: "PrivateBroker | None", config: str):
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
            start_new_session=True)  # fmt: skip

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
    port: int | None = None, *, peer: PrivateBroker | None = None, config: str = ""
) -> Iterator[PrivateBroker]:
    """Run a private RabbitMQ node on loopback; nothing of it remains, however we end.

    port: the AMQP port (default: a free one); config: more lines for rabbitmq.conf;
    peer: a running broker whose epmd and cookie to share, so that they can cluster.
    """
    broker = PrivateBroker(port, peer, config)
    try:
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

    def __init__(self, exc_type: str, text: str, trace: str | None) -> None:
        super().__init__(f"{exc_type}: {text}")
        self.exc_type, self.text, self.traceback = exc_type, text, trace


class Sender:
    """A connection that sends tasks and receives their results; `await Sender.open()`.

    Results come by RabbitMQ's direct reply-to: no queue has to be declared for them.
    """

    @classmethod
    async def open(cls, config: OliveAppConfig) -> Sender:
        """Connect. Raises pika's AMQPError if no broker can be reached."""
        self = cls()
        self.config = config
        self.connection = await Connection.open(config.urls)
        self.channel = await self.connection.channel(confirm=True)
        self.results: sweepea.Queue = sweepea.Queue()
        kernel = await sweepea._get_kernel()

        def on_reply(_channel, _method, properties, body) -> None:
            self.results._items.append((properties.correlation_id, body))
            kernel._spawn(self.results._filled.release()).daemon = True

        await self.channel.call("basic_consume", "amq.rabbitmq.reply-to", on_reply,
                                auto_ack=True)
        return self

    async def send(self, name: str, args=(), kwargs=None, *, countdown=None, eta=None,
                   expires=None, time_limit=None, priority=None, ident=None) -> str:
        """See `send_task`."""
        ident = ident or str(uuid.uuid4())
        now = datetime.now(timezone.utc)
        if countdown is not None:
            eta = now + timedelta(seconds=countdown)
        if isinstance(expires, (int, float)):
            expires = now + timedelta(seconds=expires)
        if time_limit is not None and time_limit != int(time_limit):
            time_limit = Decimal(str(time_limit))   # AMQP has doubles, pika has not
        headers = {
            "lang": "py", "task": name, "id": ident, "retries": 0, "root_id": ident,
            "parent_id": None, "group": None, "eta": eta and eta.isoformat(),
            "expires": expires and expires.isoformat(),
            "timelimit": [time_limit if not time_limit or isinstance(time_limit, Decimal)
                          else int(time_limit), None]}
        body = json.dumps([list(args), dict(kwargs or {}), {
            "callbacks": None, "errbacks": None, "chain": None, "chord": None}])
        await self.channel.basic_publish(
            self.config.exchange, self.config.routing_key, body.encode(),
            pika.BasicProperties(
                content_type="application/json", content_encoding="utf-8",
                delivery_mode=2, correlation_id=ident, headers=headers,
                reply_to="amq.rabbitmq.reply-to", priority=priority))
        return ident

    async def receive(self, timeout: float | None) -> tuple[str, Any]:
        """Wait for the next result: the id of its task, and what it returned or, as a
        TaskFailed, what it raised. Raises TimeoutError."""
        async with ignore_after(timeout) as timer:
            ident, body = await self.results.get()
        if timer.expired:
            raise TimeoutError(f"no answer within {timeout:g} s")
        reply = json.loads(body)
        if reply["status"] == "SUCCESS":
            return ident, reply["result"]
        error = reply["result"]
        text = " ".join(str(part) for part in error["exc_message"])
        return ident, TaskFailed(error["exc_type"], text, reply["traceback"])


def send_task(name: str, args=(), kwargs=None, *, countdown: float | None = None,
              eta: datetime | None = None, expires: float | datetime | None = None,
              time_limit: float | None = None, priority: int | None = None) -> str:
    """Send a task and return its id, once the broker has confirmed that it has it.

    Times are in seconds; `eta` is a datetime with a zone. Raises pika's AMQPError if
    the broker cannot be reached, its UnroutableError if no queue is bound. The settings
    are the app's, from the environment.
    """
    async def main() -> str:
        sender = await Sender.open(OliveAppConfig.from_env())
        try:
            return await sender.send(name, args, kwargs, countdown=countdown, eta=eta,
                                     expires=expires, time_limit=time_limit,
                                     priority=priority)
        finally:
            await sender.connection.close()

    return sweepea.run(main)


def call_task(name: str, args=(), kwargs=None, *, timeout: float | None = 30,
              **options: Any) -> Any:
    """Send a task, wait for its result and return it; options as in `send_task`.

    Raises TaskFailed if it failed, TimeoutError if no result came within `timeout` s.
    """
    async def main() -> Any:
        sender = await Sender.open(OliveAppConfig.from_env())
        try:
            async with ignore_after(timeout) as timer:
                await sender.send(name, args, kwargs, **options)
                _, result = await sender.receive(None)
        finally:
            await sender.connection.close()
        if timer.expired:
            raise TimeoutError(f"no answer within {timeout:g} s")
        if isinstance(result, TaskFailed):
            raise result
        return result

    return sweepea.run(main)


# =====================================================================================
# The command
# =====================================================================================

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
                await sender.send(name, args, **options)
                _, result = await sender.receive(30)
                shown = ", ".join(map(repr, args)) + "".join(
                    f", {key}={value}" for key, value in options.items())
                answer = f"failed: {result}" if isinstance(result, TaskFailed) else result
                print(f"{name}({shown}) -> {answer!s}  "
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
        try:
            print("no RabbitMQ answers: starting a private one ...", file=sys.stderr)
            with private_broker() as broker:
                run(broker.url)
        except BrokerError as exc:
            olive_app.fail(str(exc), 1)
    else:
        run(config.url)


async def _send_many(sender: Sender, options: argparse.Namespace, args, kwargs) -> int:
    """Send the task so many times, print the results as they come; the exit status."""
    sent: dict[str, float] = {}
    latencies, failed, began, said = [], 0, time.monotonic(), time.monotonic()

    async def send_all() -> None:
        for _ in range(options.count):
            ident = str(uuid.uuid4())
            sent[ident] = time.monotonic()
            await window.acquire()
            await sweepea.spawn(send_one, ident, daemon=True)

    async def send_one(ident: str) -> None:
        try:
            await sender.send(
                options.task, args, kwargs, countdown=options.countdown, ident=ident,
                expires=options.expires, time_limit=options.time_limit,
                priority=options.priority)
        except AMQPError as exc:
            sender.results._items.append((ident, exc))
            await sender.results._filled.release()
            return
        if options.no_wait:
            sender.results._items.append((ident, None))
            await sender.results._filled.release()
        await window.release()

    window = sweepea.Semaphore(500)     # so many unconfirmed publishes at once
    await sweepea.spawn(send_all, daemon=True)
    for done in range(1, options.count + 1):
        try:
            async with ignore_after(options.timeout) as timer:
                ident, body = await sender.results.get()
        finally:
            pass
        if timer.expired:
            print(f"no answer within {options.timeout:g} s", file=sys.stderr)
            return 3
        if isinstance(body, AMQPError):
            raise body
        latencies.append(time.monotonic() - sent.pop(ident))
        if options.no_wait:
            print(ident)
        else:
            failed += _show(json.loads(body))
        if options.count > 1 and time.monotonic() - said > 0.2:
            said = time.monotonic()
            print(f"{done} of {options.count}", file=sys.stderr,
                  end="\r" if sys.stderr.isatty() else "\n")
    if options.count > 1:
        seconds, latencies = time.monotonic() - began, sorted(latencies)
        p50, p99 = (1000 * latencies[int(len(latencies) * p)] for p in (0.5, 0.99))
        print(f"{options.count - failed} ok, {failed} failed in {seconds:.2f} s: "
              f"{options.count / seconds:.0f} tasks/s, latency p50 {p50:.1f} ms, p99 "
              f"{p99:.1f} ms", file=sys.stderr)
    return 1 if failed else 0


async def _dead_letters(sender: Sender, replay: bool) -> None:
    """Print the dead queue, or send to work again what lies in it now."""
    channel, config = await sender.connection.channel(), sender.config
    declared = await channel.call("queue_declare", config.dead_queue, passive=True)
    count = declared.method.message_count
    letters: sweepea.Queue = sweepea.Queue()
    kernel = await sweepea._get_kernel()

    def on_letter(_channel, method, properties, body) -> None:
        letters._items.append((method.delivery_tag, properties, body))
        kernel._spawn(letters._filled.release()).daemon = True

    # What is replayed is acknowledged one by one, after its confirm; what is only shown
    # goes back when the channel closes.
    await channel.call("basic_qos", prefetch_count=100 if replay else min(count, 65535))
    if count:
        await channel.call("basic_consume", config.dead_queue, on_letter)
    for _ in range(count):
        tag, properties, body = await letters.get()
        headers = properties.headers or {}
        if not replay:
            print(json.dumps({
                "task": headers.get("task"), "id": headers.get("id"),
                "reason": headers.get("x-olive-reason"),
                "error": headers.get("x-olive-error"),
                "body": body[:1000].decode(errors="replace")}, default=str))
            continue
        properties.headers = {name: value for name, value in headers.items()
                              if not str(name).startswith("x-olive-")}
        if "retries" in headers:
            properties.headers["retries"] = 0
        await sender.channel.basic_publish(config.exchange, config.routing_key, body,
                                           _again(properties))
        channel.basic_ack(tag)
    print(f"{count} {'sent back to work' if replay else 'dead'}", file=sys.stderr)


def _show(reply: dict) -> bool:
    """Print a result to stdout, or what went wrong to stderr; whether it went wrong."""
    if reply["status"] == "SUCCESS":
        print(json.dumps(reply["result"]))
        return False
    error = reply["result"]
    print((reply["traceback"] or "") + f"{error['exc_type']}: "
          + " ".join(map(str, error["exc_message"])), file=sys.stderr)
    return True


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def main(argv: list[str] | None = None) -> None:
    """`python olive_utils.py`: send a task and print its result."""
    parser = argparse.ArgumentParser(
        prog="olive_utils.py", description="Send a task to the app and print its result, "
        "as JSON.", epilog="exit status: 0 done, 1 the task failed, 2 usage, 3 no answer "
        "in time, 4 no broker, or no queue bound. The settings are the app's: see "
        "python olive_app.py --help.")
    parser.add_argument("task", nargs="?", metavar="TASK", help="the name of the task "
                        "(without one: add 2 3)")
    parser.add_argument("args", nargs="*", metavar="ARG | name=value", help="its "
                        "arguments; each is JSON if it reads as JSON, else a string")
    number = {"type": float, "metavar": "SECONDS"}
    parser.add_argument("--count", type=int, default=1, metavar="N", help="send it N "
                        "times; then a summary on stderr")
    parser.add_argument("--no-wait", action="store_true", help="print the id of the task "
                        "and do not wait")
    parser.add_argument("--timeout", **number, default=30.0, help="wait so long for an "
                        "answer (30)")
    parser.add_argument("--countdown", **number, help="let it run after so many seconds")
    parser.add_argument("--expires", **number, help="not after so many seconds")
    parser.add_argument("--time-limit", **number, help="stop it after so many seconds")
    parser.add_argument("--priority", type=int, metavar="0-255")
    parser.add_argument("--dead", action="store_true", help="list the dead queue")
    parser.add_argument("--replay", action="store_true", help="send the messages of the "
                        "dead queue back to work")
    options = parser.parse_intermixed_args(argv)
    if options.count < 1 or options.timeout <= 0:
        parser.error("--count and --timeout must be more than 0")
    if options.priority is not None and not 0 <= options.priority <= 255:
        parser.error("--priority must be from 0 to 255")
    if (options.dead or options.replay) and (options.task or options.dead
                                             and options.replay):
        parser.error("--dead and --replay stand alone")
    if options.task is None:
        options.task, options.args = "add", ["2", "3"]
    pairs = [arg.partition("=") for arg in options.args]
    args = [_value(arg) for arg, (name, equals, _) in zip(options.args, pairs)
            if not (equals and name.isidentifier())]
    kwargs = {name: _value(value) for name, equals, value in pairs
              if equals and name.isidentifier()}
    config = OliveAppConfig.from_env()
    logging.basicConfig(format="%(message)s", level="WARNING")
    logging.getLogger("pika").setLevel(logging.CRITICAL)

    async def run() -> int:
        sender = await Sender.open(config)
        try:
            if options.dead or options.replay:
                await _dead_letters(sender, options.replay)
                return 0
            return await _send_many(sender, options, args, kwargs)
        finally:
            await sender.connection.close()

    try:
        status = sweepea.run(run)
    except UnroutableError:
        olive_app.fail(f"no queue is bound to {config.exchange} with the key "
                       f"{config.routing_key}: does the app run?", 4)
    except AMQPError as exc:
        olive_app.fail(f"no broker, or not as expected: {describe(exc)}. Start the app "
                       f"(python olive_app.py --with-broker), or set OLIVE_URL", 4)
    except KeyboardInterrupt:
        status = 130
    raise SystemExit(status)


if __name__ == "__main__":
    main()
