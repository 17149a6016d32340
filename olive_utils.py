"""The sender, for a command and for programs; and a private RabbitMQ to try it with.

    python olive_utils.py add 2 3       sends the job `add`, waits, prints its result

`send_task` and `call_task` do the same for a program that is not made of coroutines, a
web application, say; they are shaped like Celery's.

    1. The sender           for programs, the command, many messages, the dead queue
    2. The demo             an app and its sender in one program
    3. The private broker   a real RabbitMQ, for the demo and the tests

Copyright (c) 2026 the Sweepea authors. SPDX-License-Identifier: MIT
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Ctrl-C during the imports, and at the end, ends the program without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import atexit
import gc
import json
import logging
import math
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
from collections import defaultdict, deque
from concurrent.futures import Future
from contextlib import aclosing, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pika

if __package__:         # the files were copied into a package
    from . import olive_app, sweepea
else:
    import olive_app, sweepea

Client, OliveAppConfig = olive_app.Client, olive_app.OliveAppConfig
TaskFailed, fail = olive_app.TaskFailed, olive_app.fail


# =====================================================================================
# 1. The sender
#
# What is sent, and how a reply finds the one who waits for it, is told at the class
# `Client` of olive_app.py. A Client is made of coroutines and needs a kernel. Without
# the kernel of this section, a program that is not made of coroutines would connect
# anew for each message, which takes longer than the message itself. The kernel runs in
# a thread of its own, from the first message on, and keeps one connection, which comes
# back when it is lost:
#
#     thread of the program                    the kernel's thread
#        |  a coroutine that calls                |
#        +--------------------------------------->|  spawned as a task: send, await
#        |  waits for a Future                    |  ... the reply comes
#        |<---------------------------------------+  the Future has the result
# =====================================================================================

# Several threads meet here: those of the program that send for the first time, and the
# kernel's. What two threads may change at once has a lock. What only tasks of the
# kernel change needs no lock. But where a task waits in the midst of a change, there is
# a semaphore, or two tasks would open two connections for the same settings.
_lock = threading.Lock()                # for whoever makes the kernel
_kernel: sweepea.Kernel | None = None
_clients: dict[str, Client] = {}        # by settings; only the kernel's thread uses it
# By settings, too: one task at a time opens a Client. A broker that does not answer
# must hold up nobody who talks to another one.
_connecting: dict[str, sweepea.Semaphore] = defaultdict(lambda: sweepea.Semaphore(1))


def send_task(name, args=(), kwargs=None, *, config=None, **options) -> str:
    """Send a message and return its id, once the broker has confirmed it.

    name: the task that is to run. args, kwargs: its arguments, of which JSON can be
    made, or a datetime, date, time, Decimal, UUID or bytes. config: an OliveAppConfig;
    by default it is read from the environment. Options: countdown: the job waits
    for so many seconds; or eta: it waits until then, a datetime with a time zone.
    expires: after so many seconds, or after this datetime, the job is not begun any
    more. time_limit: after so many seconds the job is stopped. priority: 0 to 255, for
    a queue that has priorities.

    May be called from any thread. Raises ValueError for settings, times or arguments
    that make no sense; pika's AMQPError if no broker can be reached or the broker does
    not take the message (UnroutableError: no queue is bound, NackError: the queue is
    full); TimeoutError if the broker says nothing for 30 s.
    """
    return _wait_for(config, lambda client: client.send(name, args, kwargs, **options))


def call_task(name, args=(), kwargs=None, *, timeout: float | None = 30, config=None,
              **options):
    """Send a message, wait for the result of its job and return that.

    timeout: how many seconds to wait, for the broker and for the answer; None is for
    ever, for the answer. The other parameters are those of `send_task`. Raises what
    `send_task` raises, TaskFailed if the job failed, and TimeoutError if no answer came
    in time.
    """
    return _wait_for(config, lambda client: client.call(
        name, args, kwargs, **options), timeout)


def _wait_for(config: OliveAppConfig | None, work, timeout: float | None = None):
    """Have `await work(client)` run in the kernel's thread; return its result."""
    if threading.get_ident() in sweepea._driving:
        raise RuntimeError("this would block the kernel: in a coroutine of the app use "
                           "`await call(...)` or `await send(...)` of olive_app")
    done, kernel = Future(), _start_kernel()

    async def run() -> None:
        try:
            async with sweepea.ignore_after(timeout):
                done.set_result(await work(await _client(config)))
                return
            raise TimeoutError(f"no answer within {timeout:g} s")
        except BaseException as exc:
            done.set_exception(exc)

    kernel._tell(kernel._spawn, run())
    return done.result()


def _start_kernel() -> sweepea.Kernel:
    global _kernel
    with _lock:
        if _kernel is None:
            kernel = sweepea.Kernel()
            threading.Thread(target=kernel.run, args=(sweepea.sleep, 1e9), daemon=True,
                             name="olive sender").start()
            _kernel = kernel    # Only now: the system may have no thread to give.
        return _kernel


async def _client(config: OliveAppConfig | None) -> Client:
    # Without a config the environment is looked at each time: it may have changed.
    key = repr(vars(config) if config else [
        item for item in os.environ.items() if "OLIVE_" in item[0]])
    async with _connecting[key]:
        if key not in _clients:
            settings = config or OliveAppConfig.read(os.environ)
            _clients[key] = await Client.open(settings)
        return _clients[key]


def _close() -> None:
    """At the end of the program: leave nothing with the broker."""
    async def close_all() -> None:
        for client in _clients.values():
            await client.aclose()
        closed.set()

    closed, kernel = threading.Event(), _kernel
    if kernel is not None:
        kernel._tell(kernel._spawn, close_all())
        closed.wait(2)


def _forget() -> None:
    """In a forked child there is no kernel's thread; the child starts its own."""
    global _kernel, _lock
    _kernel, _lock = None, threading.Lock()
    _clients.clear()
    _connecting.clear()


atexit.register(_close)
os.register_at_fork(after_in_child=_forget)


# -- many messages ---------------------------------------------------------------------
#
# Without a limit, a million messages would be a million tasks that wait, of some
# kilobytes each. So there are never more than LIMIT under way, each in a task of its
# own. When BURST of them are done, new ones take their places. Were a new one sent as
# soon as one is done, it would cost a round of the loop and a packet of its own.
#
#     _send_many ---spawns---> _send_one, for each message
#         ^                        |
#         +-(outcome, milliseconds)+

LIMIT, BURST = 2000, 500
CLEAR = "\r\x1b[K"      # tells a terminal to empty the line that the cursor is in


async def _send_one(client: Client, options, outcomes: deque, room) -> None:
    do = client.send if options.no_wait else client.call
    began = time.monotonic()
    try:
        outcome = await do(
            options.task, options.args, options.kwargs, countdown=options.countdown,
            expires=options.expires, time_limit=options.time_limit,
            priority=options.priority)
    except Exception as exc:
        outcome = exc   # Nobody awaits this task, so an error goes the way of a result.
    outcomes.append((outcome, 1000 * (time.monotonic() - began)))
    await room.wake()


async def _soon(coroutine, timeout: float, what: str):
    """Await what is to come; if it does not come in time, end with exit status 3."""
    async with sweepea.ignore_after(timeout):
        return await coroutine
    clear = CLEAR if _columns(sys.stderr) else ""
    print(f"{clear}no {what} within {timeout:g} s", file=sys.stderr)
    raise SystemExit(3)


async def _send_many(client: Client, options: argparse.Namespace) -> int:
    """Send the messages, print what comes back as it comes; return the exit status."""
    if client.consumers == 0 and not options.no_wait:
        print(f"no app listens on {client.config.queue} yet; waiting", file=sys.stderr)
    screen, outcomes, room = _Screen(options), deque(), sweepea.SchedBarrier()
    drawing = await sweepea.spawn(screen.keep_drawing)
    sent = 0
    gc.set_threshold(10_000)        # for the same reason as in OliveOly.start
    try:
        while (done := len(screen.latencies)) < options.count:
            if sent - done <= LIMIT - BURST:
                more = min(LIMIT + done, options.count) - sent
                for _ in range(more):
                    await sweepea.spawn(_send_one, client, options, outcomes, room)
                sent += more
            while not outcomes:
                await _soon(room.suspend(), options.timeout, "answer")
            outcome, latency = outcomes.popleft()
            if isinstance(outcome, Exception) and not isinstance(outcome, TaskFailed):
                # If nothing came back, there is nothing to tell but what is wrong.
                screen.quiet = screen.quiet or not screen.latencies
                raise outcome
            screen.latencies.append(latency)
            if isinstance(outcome, TaskFailed):
                screen.failed += 1
                screen.show(_plain(outcome.traceback or outcome).strip(), sys.stderr)
            else:
                result = outcome if options.no_wait else olive_app.to_json(outcome)
                screen.show(result, sys.stdout)
    finally:        # after Ctrl-C, and when no answer came in time, too
        await drawing.cancel()
        screen.end()
    return 1 if screen.failed else 0


class _Screen:
    """What came back so far, and what a user sees of that while messages are sent.

    On a terminal a line of progress stands below the results:

        "fine"
        "fine"
        2/300 [##--------------------------------] 10.0/s 0:29 left
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.latencies, self.failed, self.total = [], 0, options.count  # milliseconds
        self.began, self.quiet = time.monotonic(), options.quiet or options.count == 1
        self.redraws = not self.quiet and _columns(sys.stderr) > 0

    def show(self, text: str, file) -> None:
        """Print a result or an error, on a terminal above the line of progress."""
        on_terminal = self.redraws and file.isatty()
        if on_terminal:
            self.draw("")
        # Whoever reads the results through a pipe gets each of them at once.
        print(text, file=file, flush=True)
        if on_terminal:
            self.draw(self.progress())

    def draw(self, line: str) -> None:
        """On a terminal: put a line in the place of the one that the cursor is in."""
        if self.redraws:
            print(CLEAR + line, end="", file=sys.stderr, flush=True)

    async def keep_drawing(self) -> None:
        """Tell the progress again and again, also if nothing comes back."""
        while not self.quiet:
            await sweepea.sleep(0.2 if self.redraws else 5)
            if self.redraws:
                self.draw(self.progress())
            else:
                print(self.progress(), file=sys.stderr, flush=True)

    def progress(self) -> str:
        """How much came back: a line that fits the terminal."""
        done, seconds = len(self.latencies), time.monotonic() - self.began
        before, after = f"{done}/{self.total} [", "]"
        if done:
            left = round((self.total - done) * seconds / done)
            after = f"] {done / seconds:.1f}/s {left // 60}:{left % 60:02} left"
        # There is room at the end for the ^C that a terminal prints. A line that goes
        # on in the next one could not be taken back.
        most = (_columns(sys.stderr) or 60) - 3
        room = max(0, most - len(before + after))
        bar = "#" * (room * done // self.total)
        return (before + bar.ljust(room, "-") + after)[:most]

    def end(self) -> None:
        """Say what came back, and how fast, in the place of the progress."""
        self.draw("")
        if self.quiet:
            return
        done, seconds = len(self.latencies), time.monotonic() - self.began
        text = f"{done - self.failed} ok, {self.failed} failed"
        if done < self.total:
            text += f", {self.total - done} outstanding"
        text += f" in {seconds:.2f} s"
        if done:
            # p99: of a hundred latencies 99 are as long as this one, or shorter.
            ranked = sorted(self.latencies)
            p50, p99 = (ranked[math.ceil(done * part / 100) - 1] for part in (50, 99))
            text += (f": {done / seconds:.0f} tasks/s, latency p50 {p50:.1f} ms, "
                     f"p99 {p99:.1f} ms")
        print(text, file=sys.stderr)


def _columns(stream) -> int:
    """The width of a terminal; 0 if the stream leads to something else."""
    is_terminal = stream is not None and stream.isatty()
    return (os.get_terminal_size(stream.fileno()).columns or 80) if is_terminal else 0


def _plain(text) -> str:
    """Text from the wire for a terminal, which control characters could command."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1]
                   for c in str(text))


# -- the dead queue --------------------------------------------------------------------
#
# What the reasons mean is told in olive_app.py, at "what can go wrong: the message".

async def _dead_letters(client: Client, options: argparse.Namespace) -> int:
    """List the dead queue, or send back to work what lies in it now; or the one message
    whose id was given. Return the exit status."""
    wanted, found = options.dead or options.replay, 0   # `wanted`: an id, or True: all
    queue, columns = client.config.dead_queue, _columns(sys.stdout)
    channel, kernel = await client.connection.channel(), await sweepea._get_kernel()
    declared = await channel.call("queue_declare", queue, passive=True)
    count, letters = declared.method.message_count, sweepea.Queue()
    # What is listed is not acknowledged: the broker takes it back when the channel
    # closes. So the window has to hold the whole queue. One consumer can ask for 65,535
    # messages at most, hence a longer queue has several consumers. To ask for no limit
    # is no way out, because a quorum queue then stops at 2,000.
    await channel.call("basic_qos", prefetch_count=min(count, 65_535))
    for _ in range(0, count, 65_535):
        await channel.call("basic_consume", queue, lambda *delivery:
                           kernel._spawn(letters.put(delivery)))
    for _ in range(count):
        _, method, properties, body = await _soon(
            letters.get(), options.timeout, "message")
        headers = properties.headers or {}
        letter = {name.removeprefix("x-olive-"): headers.get(name) for name in (
            "x-olive-when", "x-olive-reason", "task", "id", "x-olive-error")}
        letter["id"] = letter["id"] or properties.correlation_id
        if wanted not in (True, str(letter["id"])):
            continue
        found += 1
        if options.replay:
            # The message is sent as if it had never been tried.
            properties.headers = {name: headers[name] for name in headers
                                  if not str(name).startswith("x-olive-")}
            # Somebody asks for it now, so it does not expire.
            await client.publish(body, olive_app.republished(
                properties, retries=0, expires=None))
            channel.basic_ack(method.delivery_tag)
            continue
        if columns and wanted is True and found == 1:
            print(_shown({name: name.upper() for name in letter}, columns))
        text = body.decode(errors="replace")
        letter |= ({"body": text[:1000]} if wanted is True else
                   {"body": text, "headers": headers})
        print(_shown(letter, columns), flush=True)
    if wanted is not True and not found:
        print(f"no message in {queue} has the id {wanted!r}", file=sys.stderr)
        return 1
    if options.replay:
        print(found, "sent back to work", file=sys.stderr)
    elif wanted is True:
        print(found, "dead", file=sys.stderr)
    return 0


def _shown(letter: dict, columns: int) -> str:
    """A message of the dead queue, as JSON; on a terminal of so many columns as a row
    of a table or, if it has its headers with it, in full."""
    if not columns:
        del letter["when"]      # of a message in full, its headers tell that
        return json.dumps(letter, default=str)
    if "headers" in letter:
        body, trace = letter.pop("body"), letter["headers"].pop("x-olive-traceback", "")
        rest = json.dumps(letter, default=str, indent=2, ensure_ascii=False)
        return _plain(f"{rest}\n{body}\n{trace}").strip()
    # A row that is too long for the terminal goes on in the next line. Lines are broken
    # at spaces, and so a cell is filled up with blanks of another kind.
    widths = {"when": 25, "reason": 12, "task": 20, "id": 36, "error": 0}
    cells = [" ".join(_plain(letter[name] or "?").split())[:100].ljust(width, "\xa0")
             for name, width in widths.items()]
    return textwrap.fill("  ".join(cells), columns, subsequent_indent="    ",
                         break_on_hyphens=False).replace("\xa0", " ")


# -- the command -----------------------------------------------------------------------

def _argument(text: str) -> tuple:
    """Read `value` or `name=value` as (name or None, value)."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        name, value = None, text
    with suppress(ValueError, RecursionError):      # What is not JSON stays a text.
        # Python reads 1e999 as a number, but JSON has no such number.
        olive_app.to_json(olive_app.from_json(value))
        value = olive_app.from_json(value)
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
    option("--quiet", action="store_true", help="no progress and no summary")
    option("--no-wait", action="store_true", help="print the id and do not wait")
    option("--timeout", **seconds, default=30.0, help="wait so long for an answer (30)")
    option("--countdown", **seconds, help="let it run after so many seconds")
    option("--expires", **seconds, help="do not run it after so many seconds")
    option("--time-limit", **seconds, help="stop it after so many seconds")
    option("--priority", type=int, metavar="0-255", help="for a queue with priorities")
    dead = {"nargs": "?", "const": True, "metavar": "ID"}   # without an ID it is True
    option("--dead", **dead, help="list the dead queue, or show one message in full")
    option("--replay", **dead, help="send what is dead, or one message, back to work")
    option("--version", action="version", version=f"sweepea {sweepea.__version__}")
    options = parser.parse_intermixed_args(argv)
    if options.count < 1 or options.timeout <= 0:
        parser.error("--count and --timeout must be more than 0")
    if not 0 <= (options.priority or 0) <= 255:
        parser.error("--priority must be from 0 to 255")
    # An empty ID, which a script may give by mistake, must not stand for all.
    if "" in (options.task, options.dead, options.replay):
        parser.error("an ID or TASK is empty")
    if [options.dead, options.replay, options.task].count(None) < 2:
        parser.error("--dead and --replay stand alone: they take an ID, and no TASK")
    if options.task is None:
        options.task, options.args = "add", [(None, 2), (None, 3)]
    options.kwargs = {name: value for name, value in options.args if name}
    options.args = [value for name, value in options.args if not name]
    return options


async def _command(config: OliveAppConfig, options: argparse.Namespace) -> None:
    """Do what the command line asks for; end the program with the exit status."""
    work, limit = _send_many, max(options.timeout, 2.0)
    if options.dead or options.replay:
        work = _dead_letters
    client = await sweepea.ignore_after(limit, Client.open, config)
    if client is None:
        raise pika.exceptions.AMQPConnectionError(f"no answer within {limit:g} s")
    async with aclosing(client):
        raise SystemExit(await work(client, options))


async def _interrupted(came: sweepea.signals) -> None:
    """Wait for Ctrl-C; then end the program, as soon as `_command` has tidied up."""
    await came.get()
    raise SystemExit(130)


def main(argv: list[str] | None = None) -> None:
    """Send a message to the app and print the result of its job, as JSON.

    The exit status is 0 if all is well, 1 if the task failed or nothing dead has that
    ID, 2 for a wrong use, 3 if no answer came in time, 4 if there is no broker or it
    does not take the message, 130 after Ctrl-C. The settings are those of the app: see
    python olive_app.py --help.
    """
    options, config = _parse(argv), OliveAppConfig.from_env()
    # What pika reports comes as an exception, too, and is said once, below.
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    try:
        # Python would raise KeyboardInterrupt in the midst of the kernel, or of a frame
        # that pika writes. A second Ctrl-C ends the program, whatever it hangs in.
        with sweepea.signals(signal.SIGINT) as came:
            for number in came.numbers:
                signal.signal(number, lambda *_: signal.signal(number, signal.SIG_DFL))
            sweepea.run(sweepea.gather(_command(config, options), _interrupted(came)))
    except pika.exceptions.UnroutableError:
        fail(f"no queue is bound to {config.exchange} with the key {config.routing_key}"
             ": does the app run?", 4)
    except pika.exceptions.NackError:
        fail(f"the broker does not take the message: {config.queue} is full", 4)
    except TimeoutError as exc:
        fail(str(exc), 4)
    except ValueError as exc:
        fail(str(exc), 2)
    except (*sweepea.REFUSED, pika.exceptions.ChannelClosedByBroker) as exc:
        what_to_do = olive_app.advice(exc, config)
        fail(f"the broker refuses us: {sweepea.describe(exc)}{what_to_do}", 4)
    except pika.exceptions.AMQPError as exc:
        fail(f"no broker, or not as expected: {sweepea.describe(exc)}. Start the app "
             "(python olive_app.py --with-broker), or set OLIVE_URL", 4)
    except BrokenPipeError:
        # `| head` has read enough. An orderly end would try again to write the rest.
        os._exit(1)


# =====================================================================================
# 2. The demo
#
# A newcomer wants to see it work before anything is set up. So the app and its sender
# run in one program here: a background coroutine of the app calls the demo tasks.
# =====================================================================================

def _connect(config: OliveAppConfig) -> pika.BlockingConnection:
    return pika.BlockingConnection([pika.URLParameters(url) for url in config.urls])


def is_reachable(config: OliveAppConfig) -> bool:
    """Whether a broker takes us at one of the URLs."""
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    with suppress(pika.exceptions.AMQPError), closing(_connect(config)):
        return True
    return False


def demo(config: OliveAppConfig) -> None:
    """Run the app, send it a handful of messages, print what comes back.

    config: the settings of the app. The demo has queues of its own, which it deletes at
    the end, and so it neither takes nor buries anybody else's messages. If no broker
    answers at the URL, a private one is started. Raises BrokerError if that fails.
    """
    async def show_all() -> None:
        for row in [("add", [2, 3]), ("sleep_n", [0.2]), ("fib", [20]),
                    ("do_nothing", []), ("fail", ["on purpose"]), ("add", [1, 1], 1.5)]:
            await _show(*row)
        app.stop()

    if not is_reachable(config):
        what = "no RabbitMQ takes us there: starting a private one ..."
        with private_broker(say=what) as broker:
            return demo(replace(config, url=broker.url))
    name = f"Olive.demo.{uuid.uuid4().hex[:8]}"
    # The task that fails on purpose would be a warning between the results.
    app = olive_app.OliveOly(replace(
        config, exchange=f"{name}.x", queue=f"{name}.q", dead_queue=f"{name}.dead",
        log_level="CRITICAL"))
    app.start(show_all)
    with closing(_connect(config)) as connection:
        channel = connection.channel()
        for queue in f"{name}.q", olive_app.calls_name(f"{name}.q"), f"{name}.dead":
            channel.queue_delete(queue)
        channel.exchange_delete(f"{name}.x")


async def _show(name: str, args: list, countdown=None) -> None:
    """Call a task, print the call, what came back, and how long it took."""
    began = time.monotonic()
    try:
        answer = await olive_app.call(name, args, timeout=30, countdown=countdown)
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
    # files may be open unless one asks for more. To ask for all that one can get would
    # be too much: in some containers that is a billion, and Erlang would make a table
    # of that size.
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
