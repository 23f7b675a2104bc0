"""Runs programs in copies of one Python that has imported what takes them most of their time.

    python tests/forks.py MODULE...

Each line of the standard input is a request in JSON: `arguments` (those of `python`, a file first), `folder`,
`environment`, `timeout_s`, and `result`, a folder that exists. The files `out`, `err` and, last, `code` are left there.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    """Import, and serve until the input ends."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that watch
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            watch(json.loads(line))
            os._exit(0)


def watch(request: dict[str, Any]) -> None:
    """Run a program in a process of its own, and say how it ended."""
    child = os.fork()
    if child == 0:
        run(request)
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(child, signal.SIGKILL))
    signal.alarm(request["timeout_s"])
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    folder = Path(request["result"])
    (folder / "unread").write_text(str(code))
    (folder / "unread").rename(folder / "code")


def run(request: dict[str, Any]) -> None:
    """Do what `python ARGUMENTS` does in a new session; never returns."""
    os.setsid()
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(request["result"], name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["arguments"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    code: int | str | None = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    main()
