"""Programs in forked processes (Linux), which have the imports already: those take seconds."""

import contextlib
import importlib
import multiprocessing.util
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

import data
import evaluate
import train


def train_main():
    train.main(train.parse_args())


def nothing():
    pass


class Child:
    """A program in a forked process: what it prints, and how it ends.

    patch: called in the child before the program, to change what it is made of.
    program: what runs, with sys.argv set; by default train.py inside run_program.
    """

    def __init__(self, *argv, patch=nothing, program=None, script="train.py", **environment):
        self.told = [b"", b""]
        self.code = None
        self.reads = []
        writes = []
        for _ in range(2):  # pipes, no files: the size of files gets limited
            read, write = os.pipe()
            os.set_blocking(read, False)
            self.reads.append(read)
            writes.append(write)
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            sys.argv = [script, *map(str, argv)]
            os.environ.update(environment)
            run_and_exit(program or run_training, patch, writes)
        for write in writes:
            os.close(write)

    def __del__(self):
        for read in self.reads:
            os.close(read)

    def text(self, i):
        with contextlib.suppress(BlockingIOError):
            some = os.read(self.reads[i], 1 << 16)
            while some:
                self.told[i] += some
                some = os.read(self.reads[i], 1 << 16)
        return self.told[i].decode()

    @property
    def out(self):
        return self.text(0)

    @property
    def err(self):
        return self.text(1)

    def wait(self, seconds=60):
        """Its exit code; minus the signal's number, if one has ended it."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                self.kill()
                pytest.fail(f"still running: {self.out}{self.err}")
            else:
                time.sleep(0.005)
        return self.code

    def until(self, text, seconds=60):
        """Wait until it has printed this."""
        end = time.monotonic() + seconds
        while text not in self.out:
            assert os.waitpid(self.pid, os.WNOHANG) == (0, 0), self.out + self.err
            assert time.monotonic() < end, self.out + self.err
            time.sleep(0.002)

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    def fails(self, *texts, code=2):
        """It ends with this code and one line on stderr that has these texts."""
        assert self.wait() == code, self.out + self.err
        assert self.err.count("\n") == 1, self.err
        for text in texts:
            assert str(text) in self.err, self.err
        return True

    def succeeds(self):
        assert self.wait() == 0, self.out + self.err
        return True


def run_training():
    data.run_program(train_main)


def run_and_exit(program, patch, writes):
    """What the forked process does; it never returns."""
    code = 99
    try:
        os.setpgid(0, 0)
        os.dup2(writes[0], 1)
        os.dup2(writes[1], 2)
        sys.stdout = os.fdopen(1, "w", 1, closefd=False)
        sys.stderr = os.fdopen(2, "w", 1, closefd=False)
        torch.set_num_threads(1)
        patch()
        program()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:  # noqa: BLE001 - the test looks at it
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            multiprocessing.util._exit_function()  # ends the loader's workers
            sys.stdout.flush()
        os._exit(code)


def pair_environment():
    """{variable: value} of two processes of one run, but for RANK and LOCAL_RANK."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def pair(*argv, patches=(nothing, nothing)):
    """Two processes of one run, started by hand."""
    own = pair_environment()
    children = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(Child(*argv, patch=patches[rank], **own, **place))
    return children


def python(folder, *words, patch=nothing):
    """`python WORDS` typed in a folder: a program of ours, -c and code, or a file of code.

    patch: changes our modules first. Evaluation on drawn tissue takes 64 tiles, a shortlist 10.
    """

    def prepare():
        os.chdir(folder)
        evaluate.N_TILES = 64
        evaluate.SHORTLIST = 10
        patch()

    def program():
        if words[0] == "-c":
            exec(words[1], {"__name__": "__main__"})
        elif words[0] == "train.py":
            run_training()
        elif words[0] in ("teachers.py", "evaluate.py"):
            data.run_program(importlib.import_module(words[0].removesuffix(".py")).main)
        elif words[0] == "-m":
            data.run_program(importlib.import_module(words[1]).main)
        else:
            exec(Path(words[0]).read_text(), {"__name__": "__main__"})

    skipped = 2 if words[0] in ("-c", "-m") else 1
    child = Child(*words[skipped:], patch=prepare, program=program, script=words[0])
    child.wait(200)
    return child
