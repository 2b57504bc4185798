"""Processes of Python that begin with everything imported.

Importing torch, transformers and the server takes seconds. One template process does it once a session and then forks a
child for each test that needs a process of its own. A child runs its program at the top level of the template's script
and ends where that ends, so signals, threads, exit handlers, standard streams and exit codes are those of any process
that runs `python -c`. What depends on the imports themselves needs a new process instead.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

PATIENCE = 120  # seconds until a process counts as stuck
OCTAVO = "import runpy; runpy.run_module('octavo', run_name='__main__', alter_sys=True)"

# Each request comes with the descriptors of stdout, stderr and a socket. A process in between forks the child, writes
# its pid, waits for it, writes its exit status, and holds the pid until the other end is closed: no signal can then
# reach another process that was given the same pid.
TEMPLATE = """
import gc, json, os, signal, socket, sys

# transformers imports it where it is, as lm-eval's requirement, and with it pandas, pyarrow and a thread of theirs.
sys.modules["sklearn"] = None
import pytest, starlette.testclient, torch, transformers.models.auto.tokenization_auto
import octavo.cli, octavo.commands.finetune, octavo.commands.loading, octavo.commands.generate
import octavo.server.app, octavo.server.process, octavo.server.serve

del sys.modules["sklearn"]
if os.path.isdir("/proc/self/task"):
    assert len(os.listdir("/proc/self/task")) == 1, "a fork copies no thread but its own"
gc.collect()
gc.freeze()
requests = socket.socket(fileno=int(sys.argv[1]))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the processes in between are waited for by nobody
while True:
    asked, descriptors, *_ = socket.recv_fds(requests, 2**20, 3)
    if not asked:
        os._exit(0)
    if os.fork() == 0:
        break
    for each in descriptors:
        os.close(each)

requests.close()
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
life = socket.socket(fileno=descriptors.pop())
if child := os.fork():
    for each in descriptors:
        os.close(each)
    life.sendall(b"%d\\n" % child)
    ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    life.sendall(b"%d\\n" % (ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status))
    life.recv(1)
    os._exit(0)

life.close()
for number, each in enumerate(descriptors, start=1):
    os.dup2(each, number)
    os.close(each)
asked = json.loads(asked)
os.chdir(asked["folder"])
os.environ.clear()
os.environ.update(asked["environment"])
sys.argv = ["-c", *asked["arguments"]]
exec(compile(asked["program"], "<string>", "exec"), {"__name__": "__main__"})
"""


@dataclass
class Process:
    """A child of the template, used like subprocess.Popen. `returncode` is None until `wait`."""

    pid: int
    stdout: TextIO
    stderr: TextIO
    _life: TextIO
    returncode: int | None = None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit code; the number of the signal that ended it, negative. After `timeout` seconds it is killed."""
        if self.returncode is None:
            with self._killed_after(timeout):
                self.returncode = int(self._life.readline())
        return self.returncode

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        """What is left in stdout and stderr, once it has ended. After `timeout` seconds it is killed."""
        found: list[str] = []
        reader = threading.Thread(target=lambda: found.append(self.stderr.read()))
        reader.start()
        with self._killed_after(timeout):
            out = self.stdout.read()
            reader.join()
        self.wait(timeout)
        return out, found[0]

    @contextmanager
    def _killed_after(self, timeout: float) -> Iterator[None]:
        timer = threading.Timer(timeout, self.send_signal, [signal.SIGKILL])
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def close(self) -> None:
        """Ends it if it has not ended. Its pid may be another process's afterwards."""
        if self._life.closed:
            return
        self.send_signal(signal.SIGKILL)
        self.wait()
        for file in (self.stdout, self.stderr, self._life):
            file.close()


def _environment() -> dict[str, str]:
    """This process's, where Triton compiles: Triton's interpreter is for the kernels that this process itself runs."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


class Forks:
    """The template process: one for each session, started by the first process that is asked for."""

    def __init__(self) -> None:
        self._started: list[Process] = []
        self._requests, theirs = socket.socketpair()
        with theirs:
            # A new session gets no Ctrl-C of pytest's terminal. Threads of a BLAS library would be lost in forks.
            self._template = subprocess.Popen(
                [sys.executable, "-c", TEMPLATE, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
                env={**_environment(), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def run(self, program: str, *arguments: object, environment: dict[str, str] | None = None) -> Process:
        """Starts `python -c program arguments` in this folder; `environment` is added to this process's own."""
        request = {
            "program": program,
            "arguments": [str(argument) for argument in arguments],
            "folder": os.getcwd(),
            "environment": {**_environment(), **(environment or {})},
        }
        (out, their_out), (err, their_err) = os.pipe(), os.pipe()
        life, their_life = socket.socketpair()
        with their_life:
            socket.send_fds(self._requests, [json.dumps(request).encode()], [their_out, their_err, their_life.fileno()])
        os.close(their_out)
        os.close(their_err)
        with life:
            lines = life.makefile("r")
        pid = lines.readline()
        assert pid, "the template process has ended: see stderr"
        self._started.append(Process(int(pid), os.fdopen(out), os.fdopen(err), lines))
        return self._started[-1]

    def octavo(self, *arguments: object, environment: dict[str, str] | None = None) -> Process:
        """Starts `python -m octavo arguments`."""
        return self.run(OCTAVO, *arguments, environment=environment)

    def close(self) -> None:
        """Ends the template process and what is left of the others."""
        for process in self._started:
            process.close()
        self._requests.close()
        self._template.wait()
