"""Tests of Sweepea, in the order of the sections they test.

They talk to real RabbitMQ nodes that they start themselves, cause real faults (signals,
cut sockets, dead brokers) and wait for events, never for a fixed time.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, fields
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import pika
import pytest

import olive_app
import olive_utils
import sweepea
from olive_app import OliveAppConfig
from sweepea import (
    CancelledError, Event, Kernel, Queue, Semaphore, TaskCancelled, TaskError, TaskTimeout,
    TimeoutCancellationError, UncaughtTimeoutError, clock, current_task, ignore_after, run,
    run_in_process, run_in_thread, sleep, spawn, timeout_after)

HERE = Path(__file__).parent
logging.getLogger("pika").setLevel(logging.CRITICAL)


# =====================================================================================
# What the tests share
# =====================================================================================

@pytest.fixture(scope="session")
def broker():
    """One RabbitMQ for all tests that do not harm it."""
    with olive_utils.private_broker() as broker:
        yield broker


def wait_until(condition, timeout=30.0, what=""):
    """Poll until `condition()` is true; return its value, or fail."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout} s: {what or condition}")


class Client:
    """A plain pika client with queues of its own names, to send, look and count."""

    def __init__(self, url: str, name: str) -> None:
        self.parameters = pika.URLParameters(url)
        self.config = {"OLIVE_URL": url, "OLIVE_EXCHANGE": f"{name}.x",
                       "OLIVE_QUEUE": f"{name}.q", "OLIVE_DEAD_QUEUE": f"{name}.dead"}
        self.queue, self.dead_queue = f"{name}.q", f"{name}.dead"
        self.exchange = f"{name}.x"
        self.connect()

    def connect(self):
        self.connection = pika.BlockingConnection(self.parameters)
        self.channel = self.connection.channel()
        self.channel.confirm_delivery()
        self.replies = self.channel.queue_declare("", exclusive=True).method.queue

    def send(self, task="add", args=(2, 3), kwargs=None, *, body=None, embed=None,
             properties=None, to_queue=True, **headers):
        """Publish a task as Celery would; return its id. `headers` override."""
        ident = headers.get("id") or str(uuid.uuid4())
        if body is None:
            body = json.dumps([list(args), kwargs or {}, embed or {
                "callbacks": None, "errbacks": None, "chain": None, "chord": None}])
        fields = {"content_type": "application/json", "content_encoding": "utf-8",
                  "delivery_mode": 2, "correlation_id": ident, "reply_to": self.replies,
                  "headers": {"task": task, "id": ident, **headers}, **(properties or {})}
        exchange, key = ("", self.queue) if to_queue else (self.exchange, "Olive.k")
        self.channel.basic_publish(
            exchange, key, body.encode() if isinstance(body, str) else body,
            pika.BasicProperties(**fields), mandatory=True)
        return ident

    def reply(self, timeout=20.0):
        """The next reply as a dict, or AssertionError after `timeout`."""
        return json.loads(self.get(self.replies, timeout)[1])

    def get(self, queue, timeout=20.0):
        """Take (properties, body) of the next message in a queue."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            method, properties, body = self.channel.basic_get(queue, auto_ack=True)
            if method is not None:
                return properties, body
            time.sleep(0.01)
        raise AssertionError(f"nothing in {queue} within {timeout} s")

    def count(self, queue):
        """How many messages are ready in a queue."""
        return self.channel.queue_declare(queue, passive=True).method.message_count

    def close(self):
        try:
            self.connection.close()
        except pika.exceptions.AMQPError:
            pass


class App:
    """The app as a real process; `log` is its output so far."""

    def __init__(self, environ: dict, *argv: str, script="olive_app.py") -> None:
        environ = {**{k: v for k, v in os.environ.items() if not k.startswith("OLIVE_")},
                   "PYTHONUNBUFFERED": "1", **environ}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / script), *argv], env=environ, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def log(self):
        return "".join(self.lines)

    def wait_for(self, text, timeout=30.0, count=1):
        """Wait until the log says `text`, `count` times."""
        def said():
            if self.process.poll() is not None:
                self._reader.join(5)
                assert self.log.count(text) >= count, self.log
            return self.log.count(text) >= count
        try:
            wait_until(said, timeout, text)
        except AssertionError as exc:
            raise AssertionError(f"{exc}\n{self.log}") from None

    def signal(self, signum=signal.SIGTERM):
        self.process.send_signal(signum)

    def wait(self, timeout=40.0):
        """Wait for its end; return the exit status."""
        status = self.process.wait(timeout)
        self._reader.join(5)
        return status

    def children(self):
        """The pids of its descendants."""
        out = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True)
        parents = {int(pid): int(parent) for pid, parent in map(str.split,
                   out.stdout.splitlines())}
        family = {self.process.pid}
        for _ in range(4):
            family |= {pid for pid, parent in parents.items() if parent in family}
        return family - {self.process.pid}


@contextmanager
def running(environ, *argv, ready="connected to", **options):
    """Run the app until the end of the block; it is killed if it does not leave."""
    app = App(environ, *argv, **options)
    try:
        if ready:
            app.wait_for(ready)
        yield app
    finally:
        if app.process.poll() is None:
            app.signal()
            try:
                app.wait(15)
            except subprocess.TimeoutExpired:
                app.process.kill()
                app.wait()


@pytest.fixture
def client(broker, request):
    """A client with names of its own on the common broker."""
    client = Client(broker.url, "t" + uuid.uuid4().hex[:8])
    yield client
    client.close()


def tasks_module(tmp_path, text, name="mytasks"):
    """Write a module of tasks; return the settings that load it."""
    (tmp_path / f"{name}.py").write_text("from olive_app import task\n" + text)
    return {"OLIVE_TASKS": name, "PYTHONPATH": f"{tmp_path}:{HERE}"}


def send(environ, *argv, timeout=60):
    """Run the sender; return the completed process."""
    environ = {**{k: v for k, v in os.environ.items() if not k.startswith("OLIVE_")},
               **environ}
    return subprocess.run([sys.executable, str(HERE / "olive_utils.py"), *argv],
                          env=environ, capture_output=True, text=True, timeout=timeout)


# =====================================================================================
# The settings
# =====================================================================================

def test_the_default_settings_are_the_documented_ones():
    config = OliveAppConfig()
    assert {f.name: getattr(config, f.name) for f in fields(config)} == {
        "url": "amqp://guest:guest@localhost:5672/%2F", "exchange": "Olive.x",
        "queue": "Olive.q", "routing_key": "Olive.k", "queue_arguments": {},
        "dead_queue": "Olive.dead", "tasks": (), "worker": "thread", "threads": 20,
        "processes": os.cpu_count(), "prefetch": 80, "task_timeout": None, "grace": 30,
        "log_level": "INFO", "trace": ""}
    assert OliveAppConfig.from_env({"OLIVE_QUEUE": "", "OTHER": "x"}) == config
    with pytest.raises(FrozenInstanceError):
        config.queue = "other"


def test_every_setting_is_read_from_its_variable(tmp_path, capsys):
    trace = str(tmp_path / "trace")
    assert OliveAppConfig.from_env({
        "OLIVE_URL": "amqp://a:b@c:1/d, amqps://e", "OLIVE_EXCHANGE": " x ",
        "OLIVE_QUEUE": "q", "OLIVE_ROUTING_KEY": "k", "OLIVE_DEAD_QUEUE": "d",
        "OLIVE_QUEUE_ARGUMENTS": '{"x-max-priority": 9}', "OLIVE_TASKS": "a, b.c,",
        "OLIVE_WORKER": "process", "OLIVE_THREADS": "3", "OLIVE_PROCESSES": "4",
        "OLIVE_PREFETCH": "65535", "OLIVE_TASK_TIMEOUT": "0.5", "OLIVE_GRACE": "0",
        "OLIVE_LOG_LEVEL": "debug", "OLIVE_TRACE": trace,
    }) == OliveAppConfig(
        "amqp://a:b@c:1/d, amqps://e", "x", "q", "k", {"x-max-priority": 9}, "d",
        ("a", "b.c"), "process", 3, 4, 65535, 0.5, 0.0, "DEBUG", trace)
    assert OliveAppConfig(url="amqp://a:b@c:1/d, amqps://e").urls == [
        "amqp://a:b@c:1/d", "amqps://e"]
    assert capsys.readouterr() == ("", "")


def test_unknown_settings_are_warned_about(capsys):
    OliveAppConfig.from_env({"OLIVE_THREAD": "3", "OLIVES": "x", "OLIVE_QUEUE": "q"})
    assert capsys.readouterr().err == "olive: unknown setting OLIVE_THREAD (ignored)\n"


@pytest.mark.parametrize("variable, value", [
    ("OLIVE_URL", "nonsense:secret"), ("OLIVE_URL", "http://guest:secret@localhost"),
    ("OLIVE_URL", "amqp://guest:secret@localhost:port/"),
    ("OLIVE_URL", "amqp://localhost,,amqp://u:secret@localhost"),
    ("OLIVE_THREADS", "0"), ("OLIVE_THREADS", "x"), ("OLIVE_THREADS", "-1"),
    ("OLIVE_THREADS", "2.5"), ("OLIVE_PROCESSES", "0"), ("OLIVE_PREFETCH", "0"),
    ("OLIVE_PREFETCH", "70000"), ("OLIVE_WORKER", "fiber"),
    ("OLIVE_QUEUE_ARGUMENTS", "[1]"), ("OLIVE_QUEUE_ARGUMENTS", "x-max-priority"),
    ("OLIVE_TASK_TIMEOUT", "0"), ("OLIVE_TASK_TIMEOUT", "nan"),
    ("OLIVE_TASK_TIMEOUT", "-1"), ("OLIVE_TASK_TIMEOUT", "inf"),
    ("OLIVE_TASK_TIMEOUT", "soon"), ("OLIVE_GRACE", "-1"), ("OLIVE_GRACE", "nan"),
    ("OLIVE_GRACE", "inf"), ("OLIVE_LOG_LEVEL", "LOUD"),
    ("OLIVE_DEAD_QUEUE", "Olive.q"), ("OLIVE_QUEUE", "not-utf-8-\udcff"),
    ("OLIVE_QUEUE_ARGUMENTS", "[" * 100_000),
    ("OLIVE_EXCHANGE", "amq.x"), ("OLIVE_QUEUE", "amq.q"), ("OLIVE_QUEUE", "é" * 121),
    ("OLIVE_DEAD_QUEUE", "d" * 241), ("OLIVE_ROUTING_KEY", "k" * 256),
    ("OLIVE_TRACE", "/nowhere/trace"), ("OLIVE_TRACE", "/")])
def test_a_setting_that_makes_no_sense_is_one_line(variable, value, capsys):
    with pytest.raises(SystemExit) as caught:
        OliveAppConfig.from_env({variable: value})
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.startswith(f"olive: {variable}: ") and err.count("\n") == 1
    assert "secret" not in err


@pytest.mark.parametrize("script", ["olive_app.py", "olive_utils.py"])
def test_both_scripts_refuse_a_bad_setting(script):
    app = App({"OLIVE_URL": "amqp://guest:secret@[/"}, script=script)
    assert app.wait() == 2
    assert app.log.startswith("olive: OLIVE_URL: ") and len(app.lines) == 1
    assert "secret" not in app.log


# =====================================================================================
# Registering tasks
# =====================================================================================

@pytest.fixture
def no_tasks(monkeypatch):
    monkeypatch.setattr(olive_app, "TASKS", {})


def test_task_registers_a_function_and_leaves_it_callable(no_tasks):
    @olive_app.task
    def plain(x):
        return x + 1

    @olive_app.task()
    def called(): ...

    @olive_app.task("first", worker="process", timeout=3, retries=4, retry_delay=0.5)
    def one(): ...

    @olive_app.task(name="second")
    async def two(): ...

    assert plain(1) == 2
    assert olive_app.TASKS == {
        "plain": olive_app.OliveTask(plain, None, None, 0, 1.0),
        "called": olive_app.OliveTask(called, None, None, 0, 1.0),
        "first": olive_app.OliveTask(one, "process", 3, 4, 0.5),
        "second": olive_app.OliveTask(two, None, None, 0, 1.0)}


def test_two_tasks_of_one_name_and_strange_workers_are_errors(no_tasks):
    olive_app.task(name="here")(len)
    with pytest.raises(ValueError, match="two tasks of the name 'here'"):
        olive_app.task(name="here")(len)
    with pytest.raises(ValueError, match="must be 'thread' or 'process', not 'fiber'"):
        olive_app.task(worker="fiber")


@pytest.mark.parametrize("text, said", [
    (None, "ModuleNotFoundError: No module named 'missing'"),
    ("1 / 0", "ZeroDivisionError: division by zero"), ("def", "SyntaxError: "),
    ("@task\ndef add(): ...", "ValueError: there are two tasks of the name 'add'")])
def test_a_task_module_that_cannot_be_imported(text, said, tmp_path):
    app = App(tasks_module(tmp_path, text) if text else {"OLIVE_TASKS": "missing"})
    assert app.wait() == 2
    assert app.log.startswith("olive: OLIVE_TASKS: ") and said in app.log
    assert len(app.lines) == 1


def test_a_script_of_ones_own_with_a_task_module(client, tmp_path):
    environ = tasks_module(tmp_path, """
import os
@task(worker="process")
def theirs(x): return [x, os.getpid()]
""")
    (tmp_path / "own.py").write_text("""
import os, sweepea
from olive_app import OliveAppConfig, OliveOly, task

@task
def threaded(x): return [x, os.getpid()]

@task(worker="process")
def processed(x): return [x, os.getpid()]

@task
async def awaited(x):
    await sweepea.sleep(0)
    return [x, os.getpid()]

async def beside():
    print("beside it runs this")

if __name__ == "__main__":
    OliveOly(OliveAppConfig.from_env()).start(beside)
""")
    with running({**client.config, **environ}, script=tmp_path / "own.py") as app:
        app.wait_for("beside it runs this")
        for number, name in enumerate(("threaded", "awaited", "processed", "theirs")):
            client.send(name, [number])
            value, pid = client.reply()["result"]
            assert value == number and (pid == app.process.pid) == (number < 2)
        client.send("add")      # the demo tasks are only in olive_app.py itself
        assert client.reply()["result"]["exc_type"] == "NotRegistered"
        app.signal()
        assert app.wait() == 0


# =====================================================================================
# One app for many tests
# =====================================================================================

LIVE_TASKS = '''
import os, sys, time
import sweepea
from olive_app import task

class Mute(Exception):
    def __str__(self): raise RuntimeError("mute")

class Odd(Exception): pass

def odd():
    exc = Odd("odd")
    exc.cannot_be_pickled = lambda: None
    return exc

def act(what, *args):
    if what == "raise":
        raise {"error": ValueError("wrong", 1), "exit": SystemExit(3), "mute": Mute(),
               "interrupt": KeyboardInterrupt("^C"), "odd": odd(), "long":
               ValueError("x" * 50_000 + "end"), "surrogate": ValueError("\\ud800"),
               "cancelled": sweepea.TaskCancelled("me")}[args[0]]
    if what == "return":
        return args[0]
    if what == "object":
        return object()
    if what == "nan":
        return float("nan")
    if what == "huge":
        return "x" * (16 << 20)
    if what == "die":
        note(args[0])
        os._exit(7)
    if what == "hang":
        time.sleep(3600)

def note(path):
    with open(path, "a") as file:
        file.write("tried\\n")
    return open(path).read().count("tried")

@task(retry_delay=0.05)
def in_thread(*args): return act(*args)

@task(worker="process", retry_delay=0.05)
def in_process(*args): return act(*args)

@task
async def in_coroutine(*args):
    if args[0] == "hang":
        await sweepea.sleep(3600)
    return act(*args)

@task
def echo(*args, **kwargs): return [list(args), kwargs]

@task(retries=2, retry_delay=0.1)
def flaky(path, good):
    tries = note(path)
    if tries < good:
        raise RuntimeError(f"try {tries}")
    return tries

@task(timeout=0.2)
async def strict(): await sweepea.sleep(3600)

@task(timeout=3600)
async def lax(): await sweepea.sleep(3600)

@task
async def stubborn(go):
    while not os.path.exists(go):
        try:
            await sweepea.sleep(0.05)
        except sweepea.CancelledError:
            pass

@task
async def blocks():
    time.sleep(1.1)
    return "blocked"
'''


@pytest.fixture(scope="module")
def live_app(broker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    (folder / "livetasks.py").write_text(LIVE_TASKS)
    client = Client(broker.url, "live")
    client.close()
    # (a time zone far from UTC shows whether times without a zone are taken for UTC)
    with running({**client.config, "OLIVE_TASKS": "livetasks", "OLIVE_PROCESSES": "2",
                  "OLIVE_LOG_LEVEL": "DEBUG", "PYTHONPATH": str(folder),
                  "TZ": "Asia/Tokyo"}) as app:
        yield app
        app.signal()
        assert app.wait() == 0
        for word in "Crash", "connection lost", "would not go":
            assert word not in app.log, app.log


@pytest.fixture
def live(broker, live_app):
    """A client of the common app; its tests leave nothing in the queues."""
    client = Client(broker.url, "live")
    client.app = live_app
    before = len(live_app.log)
    yield client
    wait_until(lambda: client.count(client.queue) == 0)
    left = [client.channel.queue_purge(name).method.message_count
            for name in (client.queue, client.dead_queue, client.replies)]
    client.close()
    assert left == [0, 0, 0]
    assert "connection lost" not in live_app.log[before:]


def failure(client, ident, kind, text, module="builtins"):
    """Take a FAILURE reply; check it; return its traceback."""
    reply = client.reply()
    trace = reply.pop("traceback")
    assert reply == {"task_id": ident, "status": "FAILURE", "children": [], "result": {
        "exc_type": kind, "exc_message": [text], "exc_module": module}}
    return trace


def buried(client, reason, body=None):
    """Take a dead letter; check its reason; return its properties and its headers."""
    properties, letter = client.get(client.dead_queue)
    assert properties.headers["x-olive-reason"] == reason, properties.headers
    assert properties.delivery_mode == 2
    assert body is None or letter == body
    return properties, properties.headers


KINDS = pytest.mark.parametrize("name", ["in_thread", "in_process", "in_coroutine"])


@KINDS
@pytest.mark.parametrize("value", [
    None, 0, 1.5, "text é \ud800", [1, [2]], {"a": {"b": None}}, "x" * 1_000_000],
    ids=lambda value: repr(value)[:20])
def test_success_is_replied(live, name, value):
    ident = live.send(name, ["return", value])
    properties, body = live.get(live.replies)
    assert json.loads(body) == {"task_id": ident, "status": "SUCCESS", "result": value,
                                "traceback": None, "children": []}
    assert properties.correlation_id == ident
    assert properties.content_type == "application/json"
    assert properties.content_encoding == "utf-8"


@KINDS
@pytest.mark.parametrize("args, kind, text, module", [
    (["raise", "error"], "ValueError", "('wrong', 1)", "builtins"),
    (["raise", "exit"], "SystemExit", "3", "builtins"),
    (["raise", "interrupt"], "KeyboardInterrupt", "^C", "builtins"),
    (["raise", "mute"], "Mute", "(no text)", "livetasks"),
    (["raise", "odd"], "Odd", "odd", "livetasks"),
    (["raise", "surrogate"], "ValueError", "\\ud800", "builtins"),
    (["raise", "cancelled"], "TaskCancelled", "me", "sweepea"),
    (["object"], "TypeError", "Object of type object is not JSON serializable",
     "builtins"),
    (["nan"], "ValueError", "Out of range float values are not JSON compliant",
     "builtins"),
    (["huge"], "ValueError", "the result is larger than 16777216 bytes of JSON",
     "builtins"),
    ([1, 2, 3], None, None, None)], ids=lambda value: repr(value)[:20])
def test_failure_is_replied_and_kept(live, name, args, kind, text, module):
    ident = live.send(name, args)
    if kind is None:
        assert live.reply()["status"] == "SUCCESS"
        return
    reply = live.reply()
    trace = reply.pop("traceback")
    if kind == "ValueError" and text.startswith("Out of"):  # (3.13 shows the value)
        text = reply["result"]["exc_message"][0]
    assert reply == {"task_id": ident, "status": "FAILURE", "children": [], "result": {
        "exc_type": kind, "exc_message": [text], "exc_module": module}}
    assert ("act(" in trace) == (args[0] == "raise")
    _, headers = buried(live, "failed")
    assert headers["x-olive-error"] == f"{kind}: {text}"
    assert headers["x-olive-traceback"] == trace
    assert headers["task"] == name and headers["id"] == ident


@KINDS
def test_long_texts_are_cut(live, name):
    ident = live.send(name, ["raise", "long"])
    trace = failure(live, ident, "ValueError", "x" * 16_000)
    _, headers = buried(live, "failed")
    assert headers["x-olive-error"] == "ValueError: " + "x" * 988
    assert headers["x-olive-traceback"] == trace
    assert len(trace) == 16_000 and trace.endswith("xend\n")


@pytest.mark.parametrize("name, timelimit, limit", [
    ("in_thread", [Decimal("0.3"), None], "0.3"), ("in_thread", [1, 0], "1"),
    ("in_process", [None, Decimal("0.3")], "0.3"), ("in_coroutine", [1, 2], "1"),
    ("strict", None, "0.2"), ("strict", [3600, None], "0.2"),
    ("lax", [Decimal("0.1"), None], "0.1"), ("stubborn", [Decimal("0.1"), 5], "0.1")])
def test_a_task_that_outlives_its_limit(live, tmp_path, name, timelimit, limit):
    args = {"strict": [], "lax": [], "stubborn": [str(tmp_path / "go")]}.get(
        name, ["hang"])
    ident = live.send(name, args, timelimit=timelimit)
    assert failure(live, ident, "TimeLimitExceeded", f"{limit} s",
                   "billiard.exceptions") == ""
    _, headers = buried(live, "timeout")
    assert headers["x-olive-error"] == f"TimeLimitExceeded: {limit} s"
    (tmp_path / "go").touch()


def test_a_process_that_dies_is_tried_twice(live, tmp_path):
    path = tmp_path / "tries"
    ident = live.send("in_process", ["die", str(path)])
    failure(live, ident, "WorkerLostError", "worker process left with exit code 7",
            "billiard.exceptions")
    _, headers = buried(live, "worker-lost")
    assert path.read_text() == "tried\n" * 2 and headers["retries"] == 1


@pytest.mark.parametrize("good, retries", [(1, 0), (2, 0), (3, 0), (4, 0), (2, 2)])
def test_retries(live, tmp_path, good, retries):
    path = tmp_path / "tries"
    ident = live.send("flaky", [str(path), good], retries=retries)
    tries = 3 - retries
    if good <= tries:
        assert live.reply()["result"] == good
    else:
        failure(live, ident, "RuntimeError", f"try {tries}")
        properties, headers = buried(live, "failed")
        assert headers["retries"] == 2 and properties.correlation_id == ident
        assert retries or datetime.fromisoformat(headers["eta"]).tzinfo
    assert path.read_text() == "tried\n" * min(good, tries)


# -- what the headers say --------------------------------------------------------------

def test_a_message_without_reply_to_or_with_a_reply_queue_that_is_gone(live):
    live.send("echo", ["quiet"], properties={"reply_to": None})
    live.send("echo", ["gone"], properties={"reply_to": "no-such-queue"})
    live.send("echo", [], {"a": 1}, id=None)    # then the correlation_id is its id
    assert live.reply()["result"] == [[], {"a": 1}]


@pytest.mark.parametrize("shown", [
    lambda t: t.isoformat(), lambda t: t.replace(tzinfo=None).isoformat(),
    lambda t: t.replace(tzinfo=None).isoformat() + "Z",
    lambda t: t.astimezone(timezone(timedelta(hours=-5))).isoformat()])
@pytest.mark.parametrize("seconds", [-3600, 0.3])
def test_eta(live, shown, seconds):
    eta = datetime.now(timezone.utc) + timedelta(seconds=seconds)
    live.send("echo", eta=shown(eta))
    assert live.reply()["status"] == "SUCCESS"
    assert datetime.now(timezone.utc) >= eta


def test_an_eta_waits_in_the_ladder(live):
    eta = datetime.now(timezone.utc) + timedelta(seconds=3.7)
    live.send("echo", ["late"], eta=eta.isoformat(), priority=3)
    for rung in 1, 0:       # 3 s are 2 s, then 1 s
        wait_until(lambda: live.count(f"{live.queue}.wait.{rung}") == 1)
    assert live.reply()["result"] == [["late"], {}]
    assert datetime.now(timezone.utc) >= eta


@pytest.mark.parametrize("eta", [{}, {"eta": "2000-01-01T00:00:00Z"}])
def test_an_expired_task_is_revoked(live, eta):
    expires = (datetime.now(timezone.utc) - timedelta(seconds=0.1)).isoformat()
    ident = live.send("no-such-task", expires=expires, **eta)
    assert live.reply() == {
        "task_id": ident, "status": "REVOKED", "traceback": "", "children": [],
        "result": {"exc_type": "TaskRevokedError", "exc_message": ["expired"],
                   "exc_module": "celery.exceptions"}}


def test_a_task_that_has_not_expired_is_run(live):
    expires = datetime.now(timezone.utc) + timedelta(hours=1)
    live.send("echo", expires=expires.replace(tzinfo=None).isoformat())
    assert live.reply()["status"] == "SUCCESS"


# -- what the body asks for ------------------------------------------------------------

def signature(name, *args, **more):
    return {"task": name, "args": args, "kwargs": {}, "options": {}, "immutable": False,
            **more}


@KINDS
def test_a_chain(live, name):
    options = [{"task_id": f"step {n}", "reply_to": live.replies} for n in (2, 3)]
    ident = live.send(name, ["return", 7], embed={"chain": [
        signature("echo", "only", immutable=True, options=options[1]),
        signature("echo", 8, kwargs={"k": 9}, options=options[0])]}, root_id="root")
    got = [live.reply() for _ in range(3)]
    assert {reply["task_id"]: reply["result"] for reply in got} == {
        ident: 7, "step 2": [[7, 8], {"k": 9}], "step 3": [["only"], {}]}


def test_a_chain_ends_where_a_step_fails(live):
    options = {"task_id": "two", "reply_to": live.replies}
    live.send("in_thread", ["return", "raise"], embed={"chain": [
        signature("echo", options={"reply_to": live.replies}),
        signature("in_process", "error", options=options)]}, root_id="root")
    assert {live.reply()["status"], live.reply()["status"]} == {"SUCCESS", "FAILURE"}
    _, headers = buried(live, "failed")
    assert headers["root_id"] == "root" and headers["id"] == "two"
    assert headers["parent_id"] not in (None, "two")


@KINDS
@pytest.mark.parametrize("good", [True, False])
def test_callbacks_and_errbacks(live, name, good):
    options = {"task_id": "back", "reply_to": live.replies}
    ident = live.send(name, ["return", 1] if good else ["raise", "error"], embed={
        "callbacks": [signature("echo", "ok", options=options)] * 2,
        "errbacks": [signature("echo", "error", options=options)]})
    got = {}
    for _ in range(3 if good else 2):
        reply = live.reply()
        got.setdefault(reply["task_id"], []).append(reply["result"])
    if good:
        assert got == {ident: [1], "back": [[[1, "ok"], {}]] * 2}
    else:
        assert got["back"] == [[[ident, "error"], {}]]
        assert got[ident][0]["exc_type"] == "ValueError"
        buried(live, "failed")


@pytest.mark.parametrize("embed", [
    {"chord": {"task": "echo"}}, {"chain": [signature("celery.chord")]},
    {"callbacks": [signature("celery.backend_cleanup")]},
    {"errbacks": [signature("celery.group")]}])
@KINDS
def test_what_needs_a_result_store_is_unsupported(live, tmp_path, embed, name):
    path = tmp_path / "not-run"
    ident = live.send(name, ["die", str(path)], embed=embed)
    reply = live.reply()
    assert reply["task_id"] == ident and reply["result"]["exc_type"] == "Unsupported"
    _, headers = buried(live, "unsupported")
    assert "needs a result store" in headers["x-olive-error"]
    assert not path.exists()


def test_next_steps_that_cannot_be_sent_do_no_harm(client):
    hostile = [{"options": {"task_id": 5}}, {"options": {"task_id": "x" * 300}},
               {"options": {"task_id": "\ud800"}}, {"options": {"reply_to": 5}},
               {"options": {"reply_to": "x" * 300}}, {"options": [1]}, {"args": 5},
               {"task": "\ud800"}, {"task": "x" * 140_000}]
    with running(client.config) as app:
        sent = {client.send("add", embed={key: [signature("echo", **step)]})
                for step in hostile for key in ("chain", "callbacks")}
        sent.add(client.send("fail", ["x"], embed={"errbacks": [
            signature("echo", options={"task_id": 5})]}))
        # each is answered, one way or the other, and its message is gone
        while sent:
            sent.discard(client.reply(5)["task_id"])
        app.signal()
        assert app.wait() == 0
        for word in "Crash", "connection lost", "could not publish", "given back":
            assert word not in app.log
    assert client.count(client.queue) == 0


# -- what makes no sense ---------------------------------------------------------------

BODIES = [b"", b"{", b"\xff", b"null", b"5", b'"abc"', b"[1, 2]", b"[[], {}]",
          b"[[], [], {}]", b"[{}, {}, {}]", b"[[], {}, 5]", b"[[NaN], {}, {}]",
          b"[[-Infinity], {}, {}]", b"[" * 100_000, b"[[" + b"1" * 5000 + b"], {}, {}]",
          b'[[], {}, {"callbacks": [1]}]', b'[[], {}, {"chain": [{"task": 5}]}]',
          b'[[], {}, {"errbacks": {"task": "echo"}}]', b'[[], {}, {"callbacks": 5}]',
          b'[[], {}, {"chain": true}]', b"[[], {}, {}] x"]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body)[:40])
@KINDS
def test_a_malformed_body(live, body, name):
    ident = live.send(name, body=body)
    reply = live.reply()
    assert reply["task_id"] == ident and reply["status"] == "FAILURE"
    buried(live, "malformed", body)


@pytest.mark.parametrize("properties, headers", [
    ({}, {"task": None}), ({}, {"task": 5}), ({}, {"task": ""}),
    ({"correlation_id": "x"}, {"id": 5}), ({"correlation_id": None}, {"id": None}),
    ({"headers": None}, {}), ({"content_type": None}, {}),
    ({"content_type": "application/x-python-serialize"}, {}),
    ({"content_encoding": "latin-1"}, {}), ({}, {"compression": "application/x-gzip"}),
    ({}, {"eta": "yesterday"}), ({}, {"eta": 5}), ({}, {"expires": "9" * 40}),
    ({}, {"eta": "0001-01-01T00:00:00+14:00"}), ({}, {"timelimit": [1]}),
    ({}, {"timelimit": 5}), ({}, {"timelimit": [-1, None]}),
    ({}, {"timelimit": ["1", None]}), ({}, {"retries": -1}), ({}, {"retries": "1"}),
    ({}, {"x-olive-returns": "1"})], ids=repr)
def test_malformed_properties(live, properties, headers):
    live.send(**{"task": "echo", **headers}, properties=properties)
    reply = live.reply()
    assert reply["status"] == "FAILURE" and reply["result"]["exc_type"] == "ValueError"
    embed = dict.fromkeys(("callbacks", "errbacks", "chain", "chord"))
    _, headers = buried(live, "malformed", json.dumps([[2, 3], {}, embed]).encode())
    assert headers["x-olive-error"].startswith("ValueError: the")


def test_an_unknown_task_is_kept_as_it_came(live):
    copies = live.channel.queue_declare("", exclusive=True).method.queue
    body = b'[[1],  {"odd": "spacing"}, null]'
    ident = live.send("no-such-task", body=body, properties={
        "expiration": "3600000", "user_id": "guest", "type": "kept", "priority": 3},
        CC=[copies], other={"kept": [1, "x"]}, **{"x-delivery-count": 5, "x-death": []})
    failure(live, ident, "NotRegistered", "no-such-task", "celery.exceptions")
    properties, headers = buried(live, "unknown-task", body)
    assert headers == {
        "task": "no-such-task", "id": ident, "other": {"kept": [1, "x"]},
        "x-olive-reason": "unknown-task", "x-olive-traceback": "",
        "x-olive-error": "NotRegistered: no-such-task"}
    assert (properties.expiration, properties.user_id) == (None, None)
    assert (properties.type, properties.priority) == ("kept", 3)
    assert properties.correlation_id == ident and properties.reply_to == live.replies
    assert live.count(copies) == 1      # the broker's own copy, and no second one


@pytest.mark.parametrize("name, args", [
    ("no-such-task", []), ("in_thread", ["raise", "long"])])
def test_nearly_full_headers_do_not_cost_the_connection(live, name, args):
    live.send(name, args, ballast="x" * 130_600)
    assert live.reply()["status"] == "FAILURE"
    headers = live.get(live.dead_queue)[0].headers
    assert headers["x-olive-error"] and headers["task"] == name
    assert "ballast" not in headers     # and the connection holds: see the fixture


# -- coroutines, and what the log says -------------------------------------------------

def test_a_coroutine_that_blocks_is_named_in_the_log(live):
    ident = live.send("blocks", [])
    assert live.reply()["result"] == "blocked"
    line = next(line for line in live.app.lines if "without a trap" in line)
    assert ident in line and "blocks" in line


def test_the_debug_log_has_a_line_for_each_task(live):
    ident = live.send("echo")
    live.reply()
    live.app.wait_for(f"DEBUG 'echo'[{ident}]: done")


def test_a_name_cannot_forge_a_line_of_the_log(live):
    live.send("x\n2026-01-01 ERROR forged\x1b[2J", id="y\r\nforged")
    live.reply()
    buried(live, "unknown-task")
    live.app.wait_for("is dead (unknown-task)")
    lines = [line for line in live.app.lines if "forged" in line]
    assert len(lines) == 1 and " WARNING " in lines[0] and "\x1b" not in lines[0]
    assert not any(line.startswith(("forged", "2026-01-01 ERROR"))
                   for line in live.app.lines)


# =====================================================================================
# The sender
# =====================================================================================

@pytest.mark.parametrize("argv, out", [
    ([], "5\n"), (["add", "2", "3"], "5\n"), (["add", "x=2", "y=-3"], "-1\n"),
    (["add", "two", "three"], '"twothree"\n'), (["add", "[1]", "y=[2, null]"],
                                                "[1, 2, null]\n"),
    (["--time-limit", "9", "add", "2.5", "--priority", "3", "1"], "3.5\n"),
    (["echo", "a b=c", '{"k": "é"}', "x=y=z", "true", "--expires", "3600"],
     '[["a b=c", {"k": "\\u00e9"}, true], {"x": "y=z"}]\n'),
    (["do_nothing"], "null\n"), (["fib", "10", "--time-limit", "98.7654321"], "55\n"),
    (["sleep_n", "0", "--countdown", "0.1"], "0\n")], ids=repr)
def test_the_sender_prints_the_result_alone(live, argv, out):
    sent = send(live.config, *argv)
    assert (sent.returncode, sent.stdout, sent.stderr) == (0, out, "")


@pytest.mark.parametrize("argv, said", [
    (["--count", "0"], "--count and --timeout must be more than 0"),
    (["--timeout", "-1"], "--timeout"),
    (["--priority", "256"], "--priority must be from 0 to 255"),
    (["--dead", "--replay"], "--dead and --replay stand alone"),
    (["add", "--dead"], "--dead and --replay stand alone"),
    (["--count", "x"], "invalid int value"), (["--nonsense"], "--nonsense"),
    (["--countdown", "nan"], "--countdown"), (["--countdown", "1e30"], "--countdown"),
    (["--expires", "inf"], "--expires"), (["--timeout", "nan"], "--timeout"),
    (["--time-limit", "nan"], "--time-limit"),
    (["--time-limit", "-1"], "--time-limit")])
def test_usage(argv, said):
    sent = send({"OLIVE_URL": "amqp://127.0.0.1:1"}, *argv)
    assert sent.returncode == 2 and sent.stdout == "" and said in sent.stderr


@pytest.mark.parametrize("script", ["olive_app.py", "olive_utils.py"])
def test_help_and_version(script):
    for option, said in {"--version": f"sweepea {sweepea.__version__}",
                         "--help": f"usage: {script}"}.items():
        app = App({"OLIVE_URL": "nonsense"}, option, script=script)
        assert app.wait() == 0 and said in app.log, app.log
    if script == "olive_app.py":
        assert all(f"OLIVE_{f.name.upper()}" in app.log for f in fields(OliveAppConfig))


def test_the_sender_shows_a_failure(live):
    sent = send(live.config, "fail", "on purpose")
    assert sent.returncode == 1 and sent.stdout == ""
    assert sent.stderr.startswith("Traceback (most recent call last):\n")
    assert sent.stderr.endswith("\nRuntimeError: on purpose\n")
    buried(live, "failed")


@pytest.mark.parametrize("name, limit", [("in_thread", "0.3"), ("in_process", "0.3")])
def test_the_sender_sets_a_time_limit(live, name, limit):
    sent = send(live.config, name, "hang", "--time-limit", limit)
    assert (sent.returncode, sent.stdout) == (1, "")
    assert sent.stderr == f"TimeLimitExceeded: {limit} s\n"
    buried(live, "timeout")


def test_the_sender_sets_an_expiry(live):
    sent = send(live.config, "add", "1", "2", "--expires", "0")
    assert (sent.returncode, sent.stdout) == (1, "")
    assert sent.stderr == "TaskRevokedError: expired\n"


def test_the_sender_gives_up_waiting(live, tmp_path):
    sent = send(live.config, "sleep_n", "1", "--timeout", "0.1")
    assert (sent.returncode, sent.stdout) == (3, "")
    assert sent.stderr == "no answer within 0.1 s\n"
    live.app.wait_for("DEBUG 'sleep_n'")    # an answer that nobody awaits does no harm


def test_the_sender_sends_many(live):
    sent = send(live.config, "echo", "--count", "700")
    assert sent.returncode == 0 and sent.stdout == "[[], {}]\n" * 700
    last = sent.stderr.splitlines()[-1]
    assert re.fullmatch(r"700 ok, 0 failed in [\d.]+ s: \d+ tasks/s, latency p50 "
                        r"[\d.]+ ms, p99 [\d.]+ ms", last), last


def test_the_sender_counts_failures(live):
    sent = send(live.config, "fail", "again", "--count", "3")
    assert sent.returncode == 1 and sent.stdout == ""
    assert sent.stderr.count("RuntimeError: again\n") == 6     # tracebacks, summaries
    assert "0 ok, 3 failed" in sent.stderr
    for _ in range(3):
        buried(live, "failed")


@pytest.mark.parametrize("count", [1, 700])
def test_the_sender_need_not_wait(live, count):
    # (the app runs, so answers come while it still sends)
    sent = send(live.config, "add", "1", "2", "--no-wait", "--count", str(count))
    assert sent.returncode == 0, sent.stderr
    idents = sent.stdout.split()
    assert len(idents) == len({uuid.UUID(ident) for ident in idents}) == count
    assert (sent.stderr == "") == (count == 1)


def test_the_dead_queue_is_listed_and_replayed(live, tmp_path):
    path, good = tmp_path / "tries", 4
    ident = live.send("flaky", [str(path), good])
    assert live.reply()["status"] == "FAILURE"
    for _ in range(2):      # listing takes nothing away
        sent = send(live.config, "--dead")
        assert (sent.returncode, sent.stderr) == (0, "1 dead\n")
        line = json.loads(sent.stdout)
        assert json.loads(line.pop("body"))[0] == [str(path), good]
        assert line == {"task": "flaky", "id": ident, "reason": "failed",
                        "error": "RuntimeError: try 3"}
        wait_until(lambda: live.count(live.dead_queue) == 1)
    sent = send(live.config, "--replay")
    assert (sent.returncode, sent.stdout) == (0, "")
    assert sent.stderr == "1 sent back to work\n"
    assert live.reply() == {"task_id": ident, "status": "SUCCESS", "result": good,
                            "traceback": None, "children": []}
    sent = send(live.config, "--replay")
    assert (sent.returncode, sent.stderr) == (0, "0 sent back to work\n")


def test_no_broker_or_no_queue(client):
    url = "amqp://guest:secret@127.0.0.1:1/%2F"
    sent = send({"OLIVE_URL": url})
    assert sent.returncode == 4 and sent.stdout == "" and "secret" not in sent.stderr
    assert sent.stderr.startswith("olive: no broker") and sent.stderr.count("\n") == 1
    sent = send({"OLIVE_URL": client.config["OLIVE_URL"].replace(":guest", ":secret")})
    assert sent.returncode == 4 and sent.stdout == "" and "secret" not in sent.stderr
    sent = send(client.config)      # there is no exchange
    assert sent.returncode == 4 and sent.stdout == "" and sent.stderr.count("\n") == 1
    client.channel.exchange_declare(client.exchange, "direct", auto_delete=True)
    sent = send(client.config, "--count", "5")
    assert sent.returncode == 4 and sent.stdout == ""
    assert sent.stderr.startswith("olive: no queue is bound to ")
    assert sent.stderr.count("\n") == 1


def test_sending_from_a_program(live, monkeypatch):
    for name, value in live.config.items():
        monkeypatch.setenv(name, value)
    assert olive_utils.call_task("add", (2, 3)) == 5
    assert olive_utils.call_task("echo", ["a"], {"k": 1}, countdown=0.1, expires=60,
                                 time_limit=9, priority=3) == [["a"], {"k": 1}]
    eta = datetime.now(timezone(timedelta(hours=3))) + timedelta(seconds=0.2)
    assert olive_utils.call_task("echo", eta=eta, timeout=None) == [[], {}]
    assert datetime.now(timezone.utc) >= eta
    with pytest.raises(olive_utils.TaskFailed) as caught:
        olive_utils.call_task("fail", ["so it is"])
    assert str(caught.value) == "RuntimeError: so it is"
    assert (caught.value.exc_type, caught.value.text) == ("RuntimeError", "so it is")
    assert "raise RuntimeError(message)" in caught.value.traceback
    buried(live, "failed")
    with pytest.raises(olive_utils.TaskFailed, match="TaskRevokedError: expired"):
        olive_utils.call_task("add", (2, 3), expires=eta - timedelta(days=1))
    with pytest.raises(TimeoutError, match="no answer within 0.1 s"):
        olive_utils.call_task("sleep_n", [0.5], timeout=0.1)
    live.app.wait_for("'sleep_n'")
    ident = olive_utils.send_task("echo", ["sent"], time_limit=0.5)
    live.app.wait_for(f"DEBUG 'echo'[{ident}]: done")
    monkeypatch.setenv("OLIVE_ROUTING_KEY", "nowhere")
    with pytest.raises(pika.exceptions.UnroutableError):
        olive_utils.send_task("add", (2, 3))
    monkeypatch.setenv("OLIVE_URL", "amqp://127.0.0.1:1")
    for function in olive_utils.send_task, olive_utils.call_task:
        with pytest.raises(pika.exceptions.AMQPError):
            function("add", (2, 3))


# =====================================================================================
# Stopping
# =====================================================================================

STOP_TASKS = """
import os, time, sweepea

def wait(folder, name):
    open(f"{folder}/{name}", "w").close()
    while not os.path.exists(f"{folder}/go"):
        time.sleep(0.01)
    return name

@task
def in_thread(folder, name): return wait(folder, name)

@task(worker="process")
def in_process(folder, name): return wait(folder, name)

@task
async def in_coroutine(folder, name):
    open(f"{folder}/{name}", "w").close()
    while not os.path.exists(f"{folder}/go"):
        await sweepea.sleep(0.01)
    return name
"""


@contextmanager
def busy(client, tmp_path, name="in_thread", unstarted=2, **environ):
    """An app with one task that runs and some that wait for it."""
    environ = {**client.config, **tasks_module(tmp_path, STOP_TASKS),
               "OLIVE_THREADS": "1", "OLIVE_PROCESSES": "1", **environ}
    with running(environ) as app:
        app.ident = client.send(name, [str(tmp_path), "started"])
        wait_until((tmp_path / "started").exists)
        for number in range(unstarted):
            client.send(name, [str(tmp_path), f"unstarted {number}"])
        # the last of them is there when a malformed one behind it is dead
        client.send("nonsense", properties={"reply_to": None})
        client.get(client.dead_queue)
        try:
            yield app
        finally:
            (tmp_path / "go").touch()       # (lets go whatever still runs)


def gone(pids):
    """Whether none of these processes runs any more."""
    out = subprocess.run(["ps", "-eo", "pid=,stat="], capture_output=True, text=True)
    return not pids & {int(pid) for pid, stat in map(str.split, out.stdout.splitlines())
                       if not stat.startswith("Z")}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_when_idle(client, signum):
    with running(client.config) as app:
        app.signal(signum)
        assert app.wait() == 0
        assert app.log.endswith("stopping: 0 in hand\n") and "add" in app.log


@pytest.mark.parametrize("name", ["in_thread", "in_process"])
def test_a_stop_finishes_what_runs_and_gives_back_the_rest(client, tmp_path, name):
    with busy(client, tmp_path, name) as app:
        children = app.children()
        # as Ctrl-C does: to the children, too
        os.killpg(app.process.pid, signal.SIGINT)
        app.wait_for("stopping: 3 in hand")
        assert app.process.poll() is None
        (tmp_path / "go").touch()
        assert app.wait() == 0
    assert client.reply()["result"] == "started"
    wait_until(lambda: client.count(client.queue) == 2)
    assert client.count(client.replies) == client.count(client.dead_queue) == 0
    assert not list(tmp_path.glob("unstarted*"))
    assert bool(children) == (name == "in_process")
    wait_until(lambda: gone(children))


@KINDS
def test_a_stop_waits_no_longer_than_the_grace(client, tmp_path, name):
    unstarted = 0 if name == "in_coroutine" else 1
    with busy(client, tmp_path, name, unstarted, OLIVE_GRACE="0.2") as app:
        children = app.children()
        app.signal()
        assert app.wait() == 0
        line = next(line for line in app.lines if "given back" in line)
        assert app.ident in line and app.log.count("given back") == 1
    wait_until(lambda: client.count(client.queue) == 1 + unstarted)
    assert client.count(client.replies) == 0
    wait_until(lambda: gone(children))


@pytest.mark.parametrize("first, second, name", [
    (signal.SIGTERM, signal.SIGINT, "in_thread"),
    (signal.SIGINT, signal.SIGTERM, "in_process")])
def test_a_second_signal_leaves_at_once(client, tmp_path, first, second, name):
    with busy(client, tmp_path, name, 0) as app:
        children = app.children()
        app.signal(first)
        app.wait_for("stopping: 1 in hand")
        app.signal(second)
        assert app.wait() == 128 + second
        assert app.log.endswith("olive: leaving at once\n")
    wait_until(lambda: client.count(client.queue) == 1)
    wait_until(lambda: gone(children))


def test_an_app_whose_threads_all_hang_stops(client, tmp_path):
    with busy(client, tmp_path, unstarted=1, OLIVE_THREADS="2",
              OLIVE_TASK_TIMEOUT="0.3") as app:
        assert app.wait() == 1
        assert "every thread hangs in a task that does not end: stopping" in app.log
    for _ in range(2):
        assert client.reply()["result"]["exc_type"] == "TimeLimitExceeded"
        buried(client, "timeout")


# =====================================================================================
# Starting
# =====================================================================================

def test_a_broker_that_cannot_be_reached(tmp_path):
    with running({"OLIVE_URL": "amqp://guest:secret@127.0.0.1:1/%2F"},
                 ready="no connection to the broker") as app:
        app.signal()
        assert app.wait() == 0
        assert len(app.lines) == 2 and "secret" not in app.log, app.log


def test_the_next_broker_is_tried(client):
    urls = f"amqp://guest:secret@127.0.0.1:1/%2F,{client.config['OLIVE_URL']}"
    with running({**client.config, "OLIVE_URL": urls}):
        client.send("add")
        assert client.reply()["result"] == 5


@pytest.mark.parametrize("change", [
    (":guest@", ":secret@"), ("guest:guest@", "nobody:secret@"), ("%2F", "nowhere")])
def test_a_broker_that_refuses(client, change):
    url = client.config["OLIVE_URL"].replace(*change)
    app = App({**client.config, "OLIVE_URL": url})
    assert app.wait() == 1
    assert len([line for line in app.lines if "the broker refuses us: " in line]) == 1
    assert len(app.lines) <= 2 and "secret" not in app.log, app.log


@pytest.mark.parametrize("what", ["queue", "exchange"])
def test_what_exists_with_other_arguments(client, what):
    if what == "queue":
        client.channel.queue_declare(client.queue, exclusive=False, auto_delete=True)
    else:
        client.channel.exchange_declare(client.exchange, "fanout", auto_delete=True)
    app = App(client.config)
    assert app.wait() == 1
    line = next(line for line in app.lines if "the broker refuses us: " in line)
    assert "inequivalent arg" in line and getattr(client, what) in line
    assert len(app.lines) <= 2, app.log


def test_the_port_of_a_broker_of_ones_own_is_in_use():
    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.1", 5672))
            sock.listen()
        except OSError:
            pass        # somebody else has it
        app = App({}, "--with-broker")
        assert app.wait() == 1
    assert app.log.startswith("olive: port 5672 is in use") and len(app.lines) == 1


def test_the_demo(client):
    app = App(client.config, "--demo")
    assert app.wait() == 0
    shown = re.sub(r"  \(\d+ ms\)$", "", app.log, flags=re.M)
    assert shown == """add(2, 3) -> 5
sleep_n(0.2) -> 0.2
fib(20) -> 6765
do_nothing() -> None
fail('on purpose') -> failed: RuntimeError: on purpose
add(1, 1, countdown=1.5) -> 2
"""


def test_a_queue_with_priorities_and_a_timeline_of_the_run(client, tmp_path):
    arguments, trace = {"x-max-priority": 9}, tmp_path / "trace.json"
    client.channel.queue_declare(client.queue, durable=True, arguments=arguments)
    idents = {client.send("add", properties={"priority": priority}): priority
              for priority in (0, 9, 5)}
    with running({**client.config, "OLIVE_QUEUE_ARGUMENTS": json.dumps(arguments),
                  "OLIVE_THREADS": "1", "OLIVE_PREFETCH": "1",
                  "OLIVE_TRACE": str(trace)}) as app:
        assert [idents[client.reply()["task_id"]] for _ in range(3)] == [9, 5, 0]
        app.signal()
        assert app.wait() == 0
        assert not any(ident in app.log for ident in idents)    # INFO has no such lines
    events = json.loads(trace.read_text().rstrip(",\n") + "]")
    assert {e["name"] for e in events} == {f"'add'[{ident}]" for ident in idents}
    assert all(event["ph"] == "X" and event["dur"] >= 0 for event in events)


def test_messages_that_come_back_are_counted(client, tmp_path):
    client.channel.queue_declare(client.queue, durable=True)
    idents = [client.send("add"), client.send("add", **{"x-olive-returns": 5}),
              client.send("no-such-task", **{"x-olive-returns": 1})]
    for _ in idents:
        client.channel.basic_get(client.queue)
    client.channel.basic_nack(0, multiple=True)     # 0: all of them
    client.send("add", **{"x-olive-returns": 5})    # did not come back: it counts not
    with running(client.config):
        assert sorted(client.reply()["status"] for _ in range(3)) == [
            "FAILURE", "SUCCESS", "SUCCESS"]
        _, headers = buried(client, "returned")
        assert headers["id"] == idents[1] and headers["x-olive-returns"] == 5
        wait_until(lambda: client.count(f"{client.queue}.wait.1") == 1)     # 2 s
        failure(client, idents[2], "NotRegistered", "no-such-task", "celery.exceptions")
        assert buried(client, "unknown-task")[1]["x-olive-returns"] == 2


def test_a_reply_that_the_broker_chokes_on_does_not_come_back_for_ever(client):
    with running(client.config) as app:
        # no such queue of direct reply-to can be: the broker closes the connection
        client.send("add", properties={"reply_to": "amq.rabbitmq.reply-to.g1h2.x=="})
        client.send("nonsense", to_queue=False)
        assert client.reply()["status"] == "FAILURE"
        app.wait_for("reconnected")
