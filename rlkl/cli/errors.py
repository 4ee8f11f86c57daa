"""What a user can do something about is one line on standard error, and an exit code."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import yaml


@contextmanager
def refusing_bad_input() -> Iterator[None]:
    """Ends the program with one line and exit code 2 where the set-up in the block raises.

    To be put around the reading and checking of a user's input, not around the work itself, whose
    errors deserve their traceback.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        fail(f"a file that was given is not text in UTF-8 ({error}): name another, or convert it")
    except OSError as error:
        if error.filename is None or error.strerror is None:
            fail(str(error))
        fail(f"cannot use {str(error.filename)!r}: {error.strerror}; name another file")
    except (ValueError, ImportError, yaml.YAMLError, argparse.ArgumentError) as error:
        fail(str(error))


@contextmanager
def ending_where_it_diverges() -> Iterator[None]:
    """Ends the program with one line and exit code 1 where the training in the block diverges."""
    try:
        yield
    except FloatingPointError as error:
        fail(str(error), code=1)


def check_writable(json: str | None, html: str | None) -> None:
    """Refuses before the work, not after it, a file of `--json` or `--html` that cannot be written.

    Only `--json` may be ``-``, standard output.
    """
    if json is not None and json == html:
        fail(f"--json and --html are both {json!r}: one would overwrite the other; name two files")
    if html == "-":
        fail("--html -: a page is not for the terminal; give the file to write it to")
    for target in (json, html):
        if target is not None and target != "-":
            folder = Path(target).absolute().parent
            if not folder.is_dir():
                fail(f"cannot write {target!r}: there is no folder {folder}")
            if Path(target).is_dir():
                fail(f"cannot write {target!r}: it is a folder; name a file")
            if not os.access(target if Path(target).exists() else folder, os.W_OK):
                fail(f"cannot write {target!r}: no permission to; name a file elsewhere")


def fail(message: str, code: int = 2) -> NoReturn:
    """Prints ``error: message`` on one line of standard error and exits; 2 is for bad input."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(code)
