"""What the command line is to the system: how it ends, how it waits, where temporary files lie.

    begin()                          # before anything that takes time
    with own_temporary_files():
        ...

A library may do none of this: a host program's signals and environment are its own.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from llm_coreml.drafts import ENDING, draft_folder
from llm_coreml.errors import LlmCoreMLError

# Of no other temporary folder: what has it and is not locked is removed.
_TEMPORARY = "llm-coreml-process-"

# What is told of the work so far, unless a command keeps some of it.
_NOTHING = "nothing was written"
# Who presses Ctrl-C again within these seconds does not stop the cleaning up.
_PATIENCE = 3.0
# A reader who is only slow gets these seconds to take what is printed.
_LEFT_TO_READ = 1.0
# Threads of OpenMP that wait sleep, or beside other work they take the time of those they wait for.
# Read by GNU's and by LLVM's library when torch loads it; what a user has set wins.
_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}


@dataclass
class Interruption:
    """Whether this process was told to end.

    Attributes:
        number: The first signal that said so.
        when: Time of the last that was heeded, of `time.monotonic`.
        over: What was asked for is done, or has failed; nothing is left but to tell of it.
        late: The first signal that does not interrupt any more.
        kept: What becomes of the work so far, for whoever interrupts it.
        unread: Nobody reads what was to be told; what is still buffered must not be waited for.
    """

    number: int | None = None
    when: float = 0.0
    over: bool = False
    late: int | None = None
    kept: str = _NOTHING
    unread: bool = False
    _telling: bool = field(default=False, repr=False)

    @property
    def code(self) -> int:
        """The exit code, as shells count: 128 and the signal's number."""
        return 128 + (self.number or self.late or signal.SIGINT)

    def heed(self, number: int, _: FrameType | None) -> None:
        """End the work, as Ctrl-C does; if it is done, end what prints of it and cannot."""
        now = time.monotonic()
        if self.over:
            self.late = self.late or number
            self._bound()
            return
        if self.number is not None and now - self.when < _PATIENCE:
            return
        self.number, self.when = self.number or number, now
        raise KeyboardInterrupt

    def check(self) -> None:
        """End the work again if a library has caught what was raised."""
        if self.number is not None and not self.over:
            raise KeyboardInterrupt

    def pardon(self) -> bool:
        """Let the process go on if it was Ctrl-C that interrupted it, and return whether it was."""
        if self.number not in (None, signal.SIGINT):
            return False
        self.number = None
        return True

    def finish(self) -> None:
        """From now on, let nothing interrupt but what prints, in `telling`."""
        self.late = self.late or self.number
        self.number, self.over, self.kept = None, True, _NOTHING

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Print inside the block, which ends soon after a signal even if nobody reads.

        Raises:
            KeyboardInterrupt: a signal came, now or before, and nobody reads.
        """
        self._telling = True
        self._bound()
        try:
            yield
        finally:
            self._telling = False
            if self._told:
                signal.setitimer(signal.ITIMER_REAL, 0)

    @property
    def _told(self) -> bool:
        return self.number is not None or self.late is not None

    def _bound(self) -> None:
        if self._telling and self._told:
            signal.setitimer(signal.ITIMER_REAL, _LEFT_TO_READ)

    def give_up(self, _: int, __: FrameType | None) -> None:
        """End what prints."""
        if self._telling:
            self.unread = True
            raise KeyboardInterrupt


INTERRUPTION = Interruption()


def begin() -> None:
    """Take over what the system asks of a process of its own."""
    _open_missing_streams()
    if not _WAITING.keys() & os.environ.keys():
        os.environ.update(_WAITING)
    for number in ENDING:
        # `nohup`, and shells for what runs in the background, have some ignored.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, INTERRUPTION.heed)
    signal.signal(signal.SIGALRM, INTERRUPTION.give_up)


def end() -> None:
    """Let nothing disturb the interpreter while it takes itself down."""
    INTERRUPTION.over = True
    with contextlib.suppress(KeyboardInterrupt, OSError), INTERRUPTION.telling():
        sys.stdout.flush()
        sys.stderr.flush()
    if INTERRUPTION.unread:
        os._exit(INTERRUPTION.code)
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    # A last search for garbage would take more than a second, and free what the system takes back.
    gc.disable()
    gc.freeze()
    # What interrupts `exec(text)`, which makes every dataclass, Python remembers as if nobody had
    # handled it, and kills itself at the end; until the next text.
    exec("")


def _open_missing_streams() -> None:
    """Open what was closed before the start, or a file of ours would get its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            stream = open(number, "w" if number else "r", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def check_folder() -> None:
    """Refuse to run in a folder that has been removed, in which torch would abort without a word.

    Raises:
        LlmCoreMLError: as said.
    """
    try:
        os.getcwd()
    except OSError:
        raise LlmCoreMLError(
            "The folder that this runs in is gone; change to one that is there."
        ) from None


@contextlib.contextmanager
def own_temporary_files() -> Iterator[None]:
    """Give this process a folder for temporary files, gone with all that libraries leave in it."""
    with contextlib.ExitStack() as stack:
        try:
            parent = Path(tempfile.gettempdir())
            folder = str(stack.enter_context(draft_folder(parent, _TEMPORARY)))
        except OSError:
            yield  # who needs one will say so
            return
        previous, environment = tempfile.tempdir, dict(os.environ)
        tempfile.tempdir = os.environ["TMPDIR"] = folder
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(folder, "inductor"))
        try:
            yield
        finally:
            tempfile.tempdir = previous
            for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR"):
                os.environ.pop(name, None)
                if name in environment:
                    os.environ[name] = environment[name]
