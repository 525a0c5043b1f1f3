# SPDX-License-Identifier: Apache-2.0
"""Commands that tests start with processes of their own, such as those of `accelerate launch`."""

import contextlib
import signal
import subprocess
import time

import psutil


def communicate(process: subprocess.Popen, timeout: float = 300) -> tuple[str, str]:
    """What a command writes until it ends.

    One that does not end in time is an error that says where each of its processes stands, if they were started with
    `PYTHONFAULTHANDLER`; none of them is left behind.
    """
    try:
        return process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        launcher = psutil.Process(process.pid)
        every = [launcher, *launcher.children(recursive=True)]
        found = [(one.pid, one.status(), " ".join(one.cmdline())) for one in every]
        for one in reversed(every):  # the launcher last, which ends the others when one of them fails
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGABRT)
                time.sleep(1)
                one.kill()
        out, err = process.communicate()
        lines = "\n".join(f"{pid} ({status}): {command}" for pid, status, command in found)
        raise AssertionError(f"It did not end within {timeout} s:\n{lines}\n\n{out}\n\n{err}") from None
