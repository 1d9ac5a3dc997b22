"""The service as a process: slow clients, its end by force and by signal, and its beginning."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import contextmanager

import pytest

pytestmark = pytest.mark.slow


@contextmanager
def started(folder, *options):
    """The process of a service, and its port."""
    command = [sys.executable, "-m", "bayestune", "serve", str(folder), "--port=0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:"), process.stderr.read()
        yield process, int(line.rsplit(":", 1)[1])
    finally:
        process.kill()
        process.wait()


def ask(port, row):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/decisions",
        json.dumps(row).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def trickled(port, text):
    """What the service says to a client that sends so much and no more."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        try:
            connection.sendall(text)
            return connection.makefile("rb").read()
        except (ConnectionResetError, BrokenPipeError):
            return b"cut off"


def test_it_begins_again_after_kill_9_and_a_retry_has_the_same_answer(place, new):
    with started(place / "blob", "--read_seconds=0.5") as (process, port):
        first = ask(port, new[0])
        for text in (b"", b"POST /v1/decisions HT", b"POST /v1/decisions HTTP/1.1\r\nhost: localh"):
            assert trickled(port, text).startswith(b"HTTP/1.1 408")
        head = b"POST /v1/decisions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{"
        assert trickled(port, head).startswith(b"HTTP/1.1 408")
        assert trickled(port, b"\x00\x01garbage\r\n\r\n").startswith(b"HTTP/1.1 400")
        huge = b"GET / HTTP/1.1\r\nx: " + b"a" * 200_000
        assert trickled(port, huge).startswith((b"HTTP/1.1 4", b"cut off"))
        assert ask(port, new[0]) == first
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with pytest.raises(OSError, match="refused"):
            ask(port, new[0])
    with started(place / "blob") as (process, port):
        again = ask(port, new[0])
        assert again == first
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        lines = [json.loads(line) for line in process.stderr.read().splitlines() if line[:1] == "{"]
        assert lines[-1]["message"] == "ended"
        assert new[0]["question"] not in str(lines)


def test_what_cannot_be_served_is_said_in_a_line(place):
    base = [sys.executable, "-m", "bayestune", "serve"]
    for options, said in (
        ([str(place / "model")], "is not a posterior"),
        ([str(place / "blob"), "--host=0.0.0.0"], "without a token"),
        ([str(place / "blob"), "--cascade"], "got --cascade for blob"),
        ([str(place / "blob"), "--max_rows=0"], "expected a whole number of 1 or more"),
    ):
        done = subprocess.run(
            [*base, *options], check=False, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 2
        lines = [line for line in done.stderr.splitlines() if line.startswith("bayestune: error:")]
        assert len(lines) == 1
        assert said in lines[0]
