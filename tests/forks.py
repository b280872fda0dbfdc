"""Scripts in forked processes (Linux), which have the imports already: what takes seconds in a fresh one."""

import contextlib
import multiprocessing.util
import os
import signal
import socket
import sys
import time
import traceback

import pytest
import torch

import teachers
import train


def train_main():
    return train.train(train.parse_args())


class Child:
    """A script's main in a forked process, which has the imports already: what it prints, and how it ends."""

    def __init__(
        self, *argv, patch=lambda: None, main=train_main, script="train.py", **environment
    ):
        (self.reads, writes), self.told, self.code = (
            zip(os.pipe(), os.pipe()),
            {},
            None,
        )  # no file: files get limited
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            for read, write in zip(self.reads, writes):
                os.set_blocking(read, False)
                os.close(write)
            return
        code = 99
        try:
            os.setpgid(0, 0)
            for number, write in zip((1, 2), writes):
                os.dup2(write, number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
            sys.argv = [script, *map(str, argv)]
            os.environ.update(environment)
            torch.set_num_threads(1)
            patch()
            code = teachers.run_main(main) or 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:  # noqa: BLE001 - the test looks at it
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                multiprocessing.util._exit_function()
                sys.stdout.flush()
            os._exit(code)

    def __del__(self):
        for read in self.reads:
            os.close(read)

    def text(self, i):
        with contextlib.suppress(BlockingIOError):
            while some := os.read(self.reads[i], 1 << 16):
                self.told[i] = self.told.get(i, b"") + some
        return self.told.get(i, b"").decode()

    out, err = (property(lambda self, i=i: self.text(i)) for i in (0, 1))

    def wait(self, seconds=60):
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
        assert self.err.count("\n") == 1 and all(str(text) in self.err for text in texts), self.err
        assert "Traceback" not in self.err
        return True

    def succeeds(self):
        assert self.wait() == 0, self.out + self.err
        return True


def pair(*argv, patches=(lambda: None, lambda: None)):
    """Two processes of one run, started by hand."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        own = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
    return [Child(*argv, patch=patches[i], **own, RANK=str(i), LOCAL_RANK=str(i)) for i in (0, 1)]
