"""`patternsearch` and `python -m patternsearch`: the command line as a process."""

import atexit
import os
import sys
import threading
import warnings

from .cli import main


def run() -> None:
    """Run the command line and leave with its exit status.

    What must be done at the end is done; the interpreter is spared taking thousands of modules of
    torch, Ray and MLflow apart, which takes two seconds.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of other packages, meant for their developers
    status = 0
    try:
        main()
    except SystemExit as e:
        if not isinstance(e.code, int | None):
            raise
        status = e.code or 0
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as at any end
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run()
