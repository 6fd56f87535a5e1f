"""
How a command ends that could not do what it was asked to: in one line and an exit status, never in a traceback for a user's mistake.
Every script ends in

    if __name__ == "__main__":
        with exit_on_user_error():
            main()
"""

import contextlib
import errno
import os
import signal
import sys
import threading
import warnings
from pathlib import Path


@contextlib.contextmanager
def naming(path: Path):
    """Inside, a full disk is reported with this path; Python itself names no file then, or the one that was copied."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(f"{path}: {error.strerror}") from None  # without a number, so that nobody around names another path


@contextlib.contextmanager
def exit_on_user_error():
    """
    What a user can cause ends in one line on stderr and an exit status, 2 for a bad key or value, 1 for a file; Ctrl-C ends in a line
    and death by its signal, which a shell has to see to end a loop of runs. Warnings are a line as well, without the place in the code.
    """

    told = set()

    def warn(message: Warning, *place) -> None:
        if str(message) not in told:  # a config that is made anew from itself warns again
            told.add(str(message))
            print(f"warning: {message}", file=sys.stderr)

    def end(number: int, frame) -> None:
        raise SystemExit(128 + number)

    # SIGTERM, by which a cluster warns, then removes what is half written, as Ctrl-C does. Not under torchrun: the process it ends
    # may be waiting for another one, where no handler of Python would run
    ours = "WORLD_SIZE" not in os.environ and threading.current_thread() is threading.main_thread()
    if ours and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)
    if sys.stderr is None:  # closed by the shell, 2>&-: print would take stdout instead
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that cannot show a character is no reason to lose a text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = warn
            yield
        if sys.stdout is not None:  # closed by the shell: >&-
            sys.stdout.flush()  # here, so that a closed pipe is noticed here
    except BrokenPipeError:  # `compare.py ... | head`: not an error, and stdout must not be flushed again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None  # 128 + SIGPIPE, as a shell reports it
    except KeyboardInterrupt:  # raised again: Python dies of the signal itself, after its clean-up at exit
        sys.excepthook = lambda *error: print("interrupted", file=sys.stderr)
        raise
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (MemoryError, RuntimeError) as error:
        of_torch = ("can't allocate memory", "out of memory")  # what it says of a CPU and of a GPU
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in of_torch):
            raise
        reason = " ".join(str(error).split())
        print(f"error: out of memory ({reason}); take a smaller model, or fewer or shorter sequences at a time", file=sys.stderr)
        raise SystemExit(1) from None
    except (OSError, FloatingPointError) as error:  # the latter: a training run that diverged
        named = isinstance(error, OSError) and error.filename and error.strerror
        text = f"{error.filename}: {error.strerror}" if named else error
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(1) from None
