"""errors.py: how a command ends, by a user's mistake, a signal, a closed pipe, a missing piece of memory."""

import errno
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from errors import exit_on_user_error, naming

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "error, status, message",
    [
        (ValueError("bad key"), 2, "error: bad key\n"),
        (FileNotFoundError(2, "No such file", "a.bin"), 1, "error: a.bin: No such file\n"),
        (FileExistsError("out/a exists"), 1, "error: out/a exists\n"),
        (FloatingPointError("the loss is nan"), 1, "error: the loss is nan\n"),
    ],
)
def test_user_errors_end_in_one_line_and_a_status(capsys, error, status, message):
    """Guards tracebacks in front of users."""
    with pytest.raises(SystemExit) as exit_, exit_on_user_error():
        raise error
    assert exit_.value.code == status and capsys.readouterr().err == message


def test_a_full_disk_has_one_name(capsys):
    """Guards a full disk of the autoencoder's run that is laid to the run which reads it."""
    with pytest.raises(SystemExit) as exit_, exit_on_user_error(), naming(Path("out/run")), naming(Path("out/codes/codes.bin")):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (exit_.value.code, capsys.readouterr().err) == (1, "error: out/codes/codes.bin: No space left on device\n")


def raise_of_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_memory_that_is_not_there(capsys):
    """Guards a traceback for a model or a batch that is too large, in torch's words and in numpy's, and our own bugs beside them."""
    for more_than_there_is in (lambda: torch.empty(10**15), lambda: np.empty(10**15), raise_of_a_gpu):
        with pytest.raises(SystemExit) as exit_, exit_on_user_error():
            more_than_there_is()
        line = capsys.readouterr().err
        assert exit_.value.code == 1 and line.startswith("error: out of memory (") and line.count("\n") == 1 and "smaller model" in line
    with pytest.raises(RuntimeError, match="must match"), exit_on_user_error():
        torch.zeros(2) + torch.zeros(3)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_ends_a_loop_of_commands():
    """Guards `for seed in 1 2 3; do python train.py ...`: bash ends the loop only where a command died of the signal."""
    code = "import time, atexit\nfrom errors import *\natexit.register(print, 'tidy', flush=True)\n"
    code += "with exit_on_user_error():\n    print('ready', flush=True)\n    time.sleep(60)"
    loop = f"trap - INT; for i in 1 2; do {sys.executable} -c \"$CODE\"; done; echo went on"
    process = subprocess.Popen(
        ["bash", "-c", loop], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env={**os.environ, "CODE": code},
        start_new_session=True, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    assert process.communicate(timeout=30) == ("tidy\n", "interrupted\n") and process.returncode == -signal.SIGINT


def test_warnings_are_lines_and_each_is_said_once(capsys):
    """Guards against a warning for each time that a config is made anew from itself."""
    with exit_on_user_error():
        for message in ("one", "another", "one"):
            warnings.simplefilter("default")  # as imports do, after which Python has forgotten what it has said
            warnings.warn(message, stacklevel=1)
    assert capsys.readouterr().err == "warning: one\nwarning: another\n"


def test_an_output_that_is_closed_or_cannot_show_a_character():
    """Guards a text of many minutes that is lost in its last line, a traceback for `>&-`, and notes among the results for `2>&-`."""
    code = "from errors import *\nwith exit_on_user_error():\n    print('10 \u20ac')\n    print('a note', file=sys.stderr)"
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, env=ascii_only)
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, b"10 \\u20ac\n", b"a note\n")
    closed = subprocess.run(["sh", "-c", f'exec {sys.executable} -c "$CODE" >&-'], stderr=subprocess.PIPE, cwd=ROOT,
                            env={**os.environ, "CODE": code})  # fmt: skip
    assert (closed.returncode, closed.stderr) == (0, b"a note\n")
    closed = subprocess.run(["sh", "-c", f'exec {sys.executable} -c "$CODE" 2>&-'], stdout=subprocess.PIPE, cwd=ROOT,
                            env={**ascii_only, "CODE": code})  # fmt: skip
    assert (closed.returncode, closed.stdout) == (0, b"10 \\u20ac\n")


@pytest.mark.parametrize("more, said, status", [({}, b"tidy\n", 143), ({"WORLD_SIZE": "2"}, b"", -15)], ids=["alone", "torchrun"])
def test_a_termination_tidies_up(more, said, status):
    """
    Guards half-written files of many megabytes: a cluster's SIGTERM runs what is in `finally`, as Ctrl-C does. Guards a process of
    several that waits for another in `finally`, and outlives the SIGTERM of torchrun.
    """
    code = (
        "import time\nfrom errors import *\nwith exit_on_user_error():\n"
        "    try:\n        print('ready', flush=True); time.sleep(60)\n    finally:\n        print('tidy', flush=True)"
    )
    alone = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, env=alone | more)
    assert process.stdout.readline() == b"ready\n"
    process.terminate()
    assert (process.communicate(timeout=20)[0], process.returncode) == (said, status)


def test_our_own_bugs_keep_their_traceback():
    """Guards hiding a bug behind a one-line message."""
    with pytest.raises(ZeroDivisionError), exit_on_user_error():
        raise ZeroDivisionError


def test_a_closed_pipe_is_quiet():
    """Guards the traceback of `compare.py ... | head -1`."""
    code = "from errors import *\nwith exit_on_user_error():\n    for i in range(200000): print('a line', i)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(20) == 141
    process.stderr.close()
