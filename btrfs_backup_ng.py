#!/usr/bin/env python3
"""Incremental btrfs backups: snapshot, send what is missing, keep what the policy says.

    btrfs-backup-ng [options] SOURCE [DESTINATION ...] [: [options] SOURCE [DESTINATION ...]] ...

The way of the data:

    arguments ─▶ tasks, each in a process of its own:

                         observe          plan (pure)            execute             report
                         host.list()  ─▶  snapshots to send  ─▶  transfer, delete ─▶ lines, progress,
                         locks, pins      parents, deletions     under locks         JSON, exit status

    one transfer:        send process ─▶ relay ─┬▶ incoming stream ─▶ receive process ─▶ .NAME.partial
                                                ├▶ ... one lane for each destination     ─▶ sync ─▶ NAME
                                                ├▶ channel ─ ssh ─▶ agent ─▶ the same there
                                                ├▶ shell://: sh -c COMMAND
                                                └▶ raw://: compress, encrypt ─▶ .NAME.partial ─▶ NAME.btrfs

Contents; a section uses only what stands above it:

    I WORDS: what everything else speaks with
        TEXT                sizes, times, names and commands as a person reads them
        ERRORS              what can go wrong, with exit status and remedy
        NAMES               which names are snapshots of ours, and of when
        RETENTION           what is kept, and why
        EVENTS              one stream of events; displays and JSON read it
    II THE COMMAND: what was asked for
        VALUES              what the values of options may be
        PLACES              what a typed place names, and what can be done there
        OPTIONS             the table of options and verbs, and what a task is
        ARGUMENTS           words and files to tasks
    III THE PLAN: what is to be done, from what was seen; pure
        IDENTITY            subvolumes, which backup belongs to which snapshot, what is complete
        OWNERS              what notes say of a source and its destinations, and whose a folder of backups is
        PLANNING            observed state to a plan of transfers and deletions
    IV THE STREAM: what passes from btrfs send to btrfs receive
        STREAM              the stream as btrfs writes it, and its first command
        GATE                what a stream that others could have made may do
        INCOMING            a stream on its way to receive, in pieces that can be gone on from
    V THE MACHINE: what the system underneath does
        PROCESSES           programs: found, run, watched, ended
        BTRFS               what the kernel and the btrfs program say and do
        SEND CALL           the kernel's own send call, with reading ahead
        MOUNTS              which filesystem stands where
        TRUST               who could have made what is there
        FILES               small files, read and written so that nobody else can have a hand in it
        STATE               locks and pins in the snapshot folder
        LOCKS               who works on a folder now
        SWAP                a restored state put in a subvolume's place
        DIGEST              a tree of files as one digest, and what differs in two of them
    VI THE TRANSFER: one snapshot on its way
        CONFINEMENT         where a stream that others could have made is received
        PARTIALS            backups that are not complete, in pieces
        ENDS                the processes at the two ends of a stream
        FILTERS             programs that compress and encrypt a stream, and back
        RELAY               one stream from a sender to its receivers
    VII PLACES: hosts, and what lies on them
        COMMANDS            shell://: a command of the user's takes the stream
        STREAM FILES        raw folders: files with streams, and what is known of each
        HOST                the semantic calls that everything above planning goes through
        RAW FOLDERS         raw:// and raw+ssh://: streams through filters into files, and back
        WIRE                calls, results and streams as frames on a channel
        GUARD               what a restricted key may ask for
        AGENT               the program on another host, serving calls over a channel
        SSH                 connections to other machines
        REMOTE              hosts over ssh
        PLAIN COMMANDS      hosts without Python
        HOSTS               the hosts of a run
    VIII THE VERBS: what the program is asked to do
        DELIVERY            one snapshot to its destinations, through as many relays as it takes
        DESTINATIONS        where backups go in this run, and whether they may
        BACKUP              observe, plan, show or execute
        LIST                which snapshots are where
        RESTORE             one backup back, beside a subvolume or in its place
        PRUNE               retention of a folder of backups by itself
        DOCTOR              what is wrong, and what to do about it
        VERIFY              whether backups are what their snapshots are
        HELP                help and man page, from the tables
        COMPLETION          what the Tab key offers in bash, zsh and fish
        UNITS               a systemd service and its timer
    IX THE SURFACE: what a person and a shell see
        DISPLAY             what a person sees while it works
        CREW                the tasks of one command, each in a process of its own
        COPIES              the program's own copies in the user's cache folder
        COMMAND LINE        help, version, sudo, signals, main

Terms: a *snapshot* is a read-only snapshot of the source in the snapshot folder, a *backup* is its
counterpart at a destination, a *lock* says that a transfer of a snapshot to a destination has begun
and is not complete, a *parent note* that a snapshot is the parent of such a transfer, a *pin* which
snapshot a destination was last seen to have in common with the source. A *partial* is a backup that is not
complete, in one or more *pieces*, and its *record* says how far it has come. A *stream file* is a backup at a raw
folder, a *sidecar* the file beside it that describes it, a *chain* the streams that one after another make it.

MIT License

Copyright © 2024 Michael Berry <trismegustis@gmail.com>
Copyright © 2017 Robert Schindler <r.schindler@efficiosoft.com>
Copyright © 2014 Chris Lawrence <lawrencc@debian.org>

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT
LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT.
IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION
WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
import sys

if __name__ == "__main__" and not sys.flags.isolated and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # the folder of this file, where anybody may have put a module
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until it is caught: ended without a word, and no traceback
import collections
import contextlib
import errno
import fcntl
import functools
import itertools
import os
import re
import select
import stat
import struct
import subprocess
import threading
import time
from typing import (
    Any,
    Callable,
    ContextManager,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
    get_type_hints,
)

__version__ = "0.7.0"


########################################################################################################
# PART I WORDS: what everything else speaks with
########################################################################################################


########################################################################################################
# TEXT: sizes, times, names and commands as a person reads them
#
# What can be typed is quoted so that any POSIX shell takes it as it stands; what others have named is made printable.
########################################################################################################


def signal_name(number: int) -> str:
    """`SIGKILL`; of those for one's own use, which Python does not name, `signal 40`."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return "signal {}".format(number)


def format_size(size: float) -> str:
    """Bytes as a person reads them: `17 B`, `1.5 KiB`, `23.0 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return "{:.0f} B".format(size) if unit == "B" else "{:.1f} {}".format(size, unit)
        size /= 1024
    return "{:.1f} TiB".format(size)


def format_duration(seconds: float) -> str:
    """Seconds as `4.2 s`, `3:07`, `1:02:45`."""
    if seconds < 60:
        return "{:.1f} s".format(seconds)
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return "{}:{:02}:{:02}".format(hours, minutes, rest) if hours else "{}:{:02}".format(minutes, rest)


def format_age(seconds: float) -> str:
    """How long ago something was: `40 min`, `26 h`, `12 days`."""
    if seconds < 90 * 60:
        return "{} min".format(round(max(0, seconds) / 60))
    return "{} h".format(round(seconds / 3600)) if seconds < 72 * 3600 else "{} days".format(round(seconds / 86400))


def plural(count: int, noun: str) -> str:
    return "{} {}{}".format(count, noun, "" if count == 1 else "s")


def printable(text: str) -> str:
    """`text` on one line: control characters and undecodable bytes as escapes."""
    shown = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)


def some_of(names: Sequence[str]) -> str:
    """The first names of many."""
    shown = ", ".join(printable(name) for name in names[:3])
    return shown if len(names) <= 3 else "{} and {} more".format(shown, len(names) - 3)


def quoted(word: str) -> str:
    """A word as a shell takes it, on one line: what cannot be printed goes through printf."""
    import shlex
    if printable(word) == word:
        return shlex.quote(word)
    octal = "".join(chr(byte) if 32 < byte < 127 and byte not in b"'\\" else "\\0{:03o}".format(byte)
                    for byte in os.fsencode(word))
    return "\"$(printf %b '{}')\"".format(octal)


def typed(words: Iterable[str]) -> str:
    """A command as it can be typed."""
    return " ".join(map(quoted, words))


########################################################################################################
# ERRORS: what can go wrong, with exit status and remedy
#
# One root class. A message says what failed, on which object, in the cause's own words, lower case,
# without a full stop; the hint says what to type, quoted so that it can be typed as it stands; the detail is
# the stderr of the program that failed. They are raised with facts and printed by the surface. Interrupted is
# no error of that kind: it must pass every handler that goes on with the next destination.
########################################################################################################


class BackupError(Exception):
    """Something was not done as asked. `status` is the exit status it leads to (SPEC: 1).

    transient: it may go well when tried again, as what breaks a connection or kills a process does not last.
    """

    status = 1
    transient = False

    def __init__(self, message: str, hint: str = "", detail: str = "", transient: bool = False) -> None:
        super().__init__(message)
        self.message, self.hint, self.detail = message, hint, detail
        self.transient = transient or self.transient


class UsageError(BackupError):
    """The command line is wrong; nothing was started."""

    status = 2


class Busy(BackupError):
    """Another run is at work on the same snapshot folder and prefix."""

    status = 75


class Stalled(BackupError):
    """Not a byte moved for the stall timeout."""


class ReceiverFailed(BackupError):
    """The receiving side failed: sending it the next snapshot would fail as well."""


class StreamDiffers(BackupError):
    """The stream is not the one that a partial was received from: it cannot be taken up."""


class StreamDamaged(BackupError):
    """What was sent is no stream from some byte on.

    A send that is stopped and let go on begins anew in the midst of its stream (Linux restarts the call), as by a
    laptop's sleep: another one goes well.
    """

    transient = True


class NoPieces(ReceiverFailed):
    """The destination cannot go on from a partial, only receive in one piece."""


class AmbiguousParent(ReceiverFailed):
    """The parent at the receiving side might be mistaken or is not fit; sending in full does without."""


class Interrupted(BaseException):
    """A signal asked to stop; `status` is 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


def os_error(doing: str, error: OSError, hint: str = "") -> BackupError:
    """What the system says of what we were doing, and of which file, unless that is named already.

    >>> os_error("cannot swap at /home", OSError(20, "Not a directory", "/home/.state")).message
    'cannot swap at /home: /home/.state: not a directory'
    """
    path = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
    where = "{}: ".format(path) if path and path not in doing else ""
    return BackupError("{}: {}{}".format(doing, where, (error.strerror or str(error)).lower()), hint)


def explain(error: Exception, doing: str) -> BackupError:
    """What to say of any exception that came while we were `doing` something; a BackupError says it itself."""
    if isinstance(error, BackupError):
        return error
    if isinstance(error, OSError):
        return os_error(doing, error)
    if isinstance(error, ImportError):
        return BackupError("{}: this Python lacks the module {}".format(doing, error.name or error),
                           "install all of python3; Debian's python3-minimal is not enough")
    if isinstance(error, MemoryError):
        return BackupError("{}: out of memory".format(doing))
    if isinstance(error, RuntimeError) and "thread" in str(error):
        return BackupError("{}: {}".format(doing, error),
                           "too little memory, or too few processes allowed; see ulimit -a")
    return BackupError("{}: unexpected {}: {}".format(doing, type(error).__name__, error),
                       "this is a defect of btrfs-backup-ng; please report what -v debug says")


def format_error(error: BackupError) -> str:
    """One line of what failed and what to do; the failed program's own words indented under it."""
    line = printable(error.message) + ("; " + printable(error.hint) if error.hint else "")
    return "\n".join([line] + ["    " + printable(words) for words in error.detail.splitlines()])


########################################################################################################
# NAMES: which names are snapshots of ours, and of when
#
# A name counts only if it is the exact prefix and a strict time; what is parsed must render as the
# same text again, for strptime accepts much more. Local time repeats and jumps at DST, so a name's
# time serves retention alone, never the order of snapshots. Never: a guess about a prefix.
########################################################################################################

TIME_FORMATS = ("%Y%m%d-%H%M%S", "%y%m%d-%H%M%S")  # written; also recognised
TIME_TEXT = re.compile(r"([0-9]{2})?([0-9]{2})([0-9]{2})([0-9]{2})-([0-9]{2})([0-9]{2})([0-9]{2})")
PARTIAL_NAME = re.compile(r"\.(?P<name>.+?)(?:\.(?P<piece>[0-9]+))?\.partial", re.DOTALL)
LocalTime = Tuple[int, int, int, int, int, int]  # year, month, day, hour, minute, second


def parse_time(text: str) -> Optional[LocalTime]:
    """The local time that `text` states in one of TIME_FORMATS, or None."""
    match = TIME_TEXT.fullmatch(text)
    if match is None:
        return None
    century, *rest = match.groups()
    year, month, day, hour, minute, second = map(int, rest)
    # a year without century as strptime reads it
    year += 100 * int(century) if century else 2000 if year < 69 else 1900
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    days = (31, 28 + leap, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
    is_time = year > 0 and 0 < month <= 12 and 0 < day <= days[month - 1] and hour < 24 and minute < 60 and second < 60
    return (year, month, day, hour, minute, second) if is_time else None


@functools.lru_cache(maxsize=None)
def prefix_of(name: str) -> Optional[str]:
    """The prefix of a snapshot's name, all that stands before its time; None where it is no snapshot's name."""
    for length in (15, 13):
        if len(name) >= length and parse_time(name[-length:]) is not None:
            return name[:-length]
    return None


@functools.lru_cache(maxsize=None)
def name_time(prefix: str, name: str) -> Optional[LocalTime]:
    """The local time that a snapshot's name states, or None where it is no name of `prefix`.

    A prefix `home20` must not take `home20260131-093000` of the prefix `home` for its own.
    """
    if not name.startswith(prefix):
        return None
    text = name[len(prefix):]
    if len(text) == 13 and prefix and parse_time(prefix[-2:] + text) is not None:
        return None
    return parse_time(text)


def snapshot_time(prefix: str, name: str) -> Optional[float]:
    """Seconds since the epoch of the time that a snapshot's name states, or None.

    The earlier one where the clock was put back over it, so that no new snapshot is from the future.
    """
    local = name_time(prefix, name)
    if local is None:
        return None
    try:
        moment = time.mktime(local + (0, 0, -1))
        repeated = [moment - shift for shift in (3600, 1800) if time.localtime(moment - shift)[:6] == local]
    except (OverflowError, ValueError, OSError):
        return None
    return repeated[0] if repeated else moment


def snapshot_name(prefix: str, now: float) -> str:
    return prefix + time.strftime(TIME_FORMATS[0], time.localtime(now))


def partial_name(name: str, piece: int = 1) -> str:
    """The name that a backup bears until it is complete; a later piece is a snapshot of the one before."""
    return ".{}.partial".format(name) if piece == 1 else ".{}.{}.partial".format(name, piece)


def record_name(name: str) -> str:
    """The file that says how far the partial of a snapshot has come."""
    return partial_name(name) + ".json"


def partial_of(name: str) -> Optional[str]:
    """The snapshot's name that a partial's name is made from, or None where it is no partial's name."""
    match = PARTIAL_NAME.fullmatch(name)
    return match.group("name") if match else None


def snapshot_of_record(name: str) -> Optional[str]:
    """The snapshot's name that a record's file name is made from, or None where it is none."""
    return partial_of(name[:-5]) if name.endswith(".partial.json") else None


def partial_lock_name(name: str) -> str:
    """The file that whoever writes a snapshot's partials holds a lock on."""
    return partial_name(name) + ".lock"


def piece_of(name: str) -> int:
    """Which piece a partial's name says it is, from 1 on."""
    match = PARTIAL_NAME.fullmatch(name)
    return int(match.group("piece") or 1) if match else 1


########################################################################################################
# RETENTION: what is kept, and why
#
# Pure: names, times and protections in, a verdict with its reason for each out. A policy keeps the newest by
# number, and by time the newest of each of the last hours, days, weeks, months, years that have one; each
# unit counts by itself, what any rule keeps is kept. Kept whatever the policy: what is protected (locks,
# parent notes, newest common snapshots), a name from the future (which is not counted either), the only
# one left. No rule keeps all. Never: a verdict about a name that is not a snapshot's.
########################################################################################################

UNITS = {"h": "hour", "d": "day", "w": "week", "m": "month", "y": "year"}


class Span(NamedTuple):
    """The newest snapshot of each of the last `number` units of time that have one."""

    number: int
    unit: str  # a key of UNITS


class Policy(NamedTuple):
    """What to keep: the newest by number (0: no such rule), by time, or everything."""

    newest: int = 0
    spans: Tuple[Span, ...] = ()
    everything: bool = False

    @property
    def keeps_all(self) -> bool:
        return self.everything or not (self.newest or self.spans)

    def also_newest(self, count: int) -> "Policy":
        """This policy and the newest `count`; 0 adds nothing."""
        return self._replace(newest=count)


def parse_policy(text: str) -> Policy:
    """`24h 14d 8w 12m 5y`, or `all`, as a policy; ValueError for anything else.

    >>> parse_policy("24h 7d").spans
    (Span(number=24, unit='h'), Span(number=7, unit='d'))
    """
    words = text.split()
    if words == ["all"]:
        return Policy(everything=True)
    matches = [re.fullmatch(r"([0-9]{1,6})([hdwmy])", word) for word in words]
    spans = tuple(Span(int(match.group(1)), match.group(2)) for match in matches if match)
    if not spans or len(spans) < len(words):
        raise ValueError("is not like '24h 14d 8w 12m 5y' (hours, days, weeks, months, years), nor 'all'")
    if any(span.number == 0 for span in spans):
        raise ValueError("keeps nothing of a unit: leave that unit out")
    if len({span.unit for span in spans}) < len(spans):
        raise ValueError("names a unit twice")
    return Policy(spans=spans)


def format_policy(policy: Policy) -> str:
    """`the newest 3, 24 hours, 1 day`; `all`."""
    if policy.keeps_all:
        return "all"
    parts = ["the newest {}".format(policy.newest)] if policy.newest else []
    return ", ".join(parts + [plural(span.number, UNITS[span.unit]) for span in policy.spans])


class Verdict(NamedTuple):
    name: str
    keep: bool
    reason: str


def is_future(moment: float, now: float) -> bool:
    return moment > now + 1


def period_of(moment: float, unit: str) -> Tuple[str, int]:
    """The period of `unit` that a moment falls into, in local time; weeks as ISO 8601 counts them.

    The offset from UTC tells the hour that comes twice in autumn from its repetition.
    """
    local = time.localtime(moment)
    formats = {"h": "%Y-%m-%d %Hh", "d": "%Y-%m-%d", "w": "%G-W%V", "m": "%Y-%m", "y": "%Y"}
    return time.strftime(formats[unit], local), local.tm_gmtoff if unit == "h" else 0


def keep_by_time(ordered: Sequence[str], times: Dict[str, float], spans: Sequence[Span]) -> Dict[str, str]:
    """Those of `ordered` (oldest first) that `spans` keep, each with its reason."""
    periods: Dict[str, List[str]] = {}
    for span in spans:
        seen: Set[Tuple[str, int]] = set()
        for name in reversed(ordered):
            period = period_of(times[name], span.unit)
            if period in seen:
                continue
            if len(seen) == span.number:
                break
            seen.add(period)
            periods.setdefault(name, []).append("{} {}".format(UNITS[span.unit], period[0]))
    return {name: "newest of " + ", ".join(kept) for name, kept in periods.items()}


def deletion_reason(policy: Policy) -> str:
    spans = ", ".join(plural(span.number, UNITS[span.unit]) for span in policy.spans)
    if not spans:
        return "older than the newest {}".format(policy.newest)
    newest = "older than the newest {}, and ".format(policy.newest) if policy.newest else ""
    return newest + "not the newest of one of the last {}".format(spans)


def plan_retention(times: Dict[str, float], policy: Policy, protected: Dict[str, str], now: float) -> List[Verdict]:
    """A verdict for each name of `times` (seconds since the epoch), oldest first.

    protected: name to the reason why it stays.

    >>> [v.keep for v in plan_retention({"a": 1, "b": 2, "c": 3}, Policy(1), {"a": "locked"}, 9)]
    [True, False, True]
    """
    ordered = sorted(times, key=lambda name: (times[name], name))
    counted = [name for name in ordered if not is_future(times[name], now)]
    reasons = {name: [] for name in ordered}  # type: Dict[str, List[str]]
    for name in counted[-policy.newest:] if policy.newest else ():
        reasons[name].append("among the newest {}".format(policy.newest))
    for name, reason in keep_by_time(counted, times, policy.spans).items():
        reasons[name].append(reason)
    verdicts = []
    for name in ordered:
        if is_future(times[name], now):
            verdicts.append(Verdict(name, True, "its name is from the future"))
        elif name in protected:
            verdicts.append(Verdict(name, True, protected[name]))
        elif policy.keeps_all:
            verdicts.append(Verdict(name, True, "all are kept"))
        else:
            verdicts.append(Verdict(name, bool(reasons[name]), "; ".join(reasons[name]) or deletion_reason(policy)))
    return verdicts


########################################################################################################
# EVENTS: one stream of events; displays and JSON read it
#
# Whatever is worth saying is an event: a kind for machines, a level, a line for people, and facts. `task` in
# the facts names the task where several run. Displays are readers of the events and of nothing else. Results
# (a plan, a listing) are printed on stdout by whoever was asked for them. Progress is an event too, a few a
# second for each transfer: `snapshot`, `destination`, `done`, `expected` (None while unknown), `rate` (bytes,
# bytes a second); one of a destination without `done` ends it. Never: a reader that stops what it is told of.
########################################################################################################

LEVELS = ("debug", "info", "warning", "error")


class Event(NamedTuple):
    """`level` is one of LEVELS, or what no log shows: `progress`, or the `state` of a task."""

    kind: str
    level: str
    text: str
    facts: Dict[str, Any]


class Reader:
    """What is told of every event: a display, a log."""

    progress = False  # whether it shows how far transfers have come, which costs something to learn

    def __call__(self, event: Event) -> None:
        raise NotImplementedError


class Events:
    """The stream: everything emitted goes to every reader. Threads may emit.

    A reader that fails is told no more; the others hear of it, and `is_whole` says so.
    """

    def __init__(self, *readers: Callable[[Event], None]) -> None:
        self.readers, self.mutex = list(readers), threading.Lock()
        self.is_whole = True

    @property
    def want_progress(self) -> bool:
        return any(isinstance(reader, Reader) and reader.progress for reader in self.readers)

    def emit(self, kind: str, level: str, text: str = "", **facts: Any) -> None:
        event, errors = Event(kind, level, text, facts), []
        with self.mutex:
            for read in list(self.readers):
                try:
                    read(event)
                except Exception as error:  # a full disk, say
                    self.readers.remove(read)
                    errors.append(explain(error, "cannot show what happens"))
        for failed in errors:
            self.is_whole = False
            self.error(failed)

    def debug(self, kind: str, text: str, **facts: Any) -> None:
        self.emit(kind, "debug", text, **facts)

    def info(self, kind: str, text: str, **facts: Any) -> None:
        self.emit(kind, "info", text, **facts)

    def warning(self, kind: str, text: str, **facts: Any) -> None:
        self.emit(kind, "warning", text, **facts)

    def error(self, error: BackupError, **facts: Any) -> None:
        self.emit("error", "error", format_error(error), status=error.status, message=error.message,
                  hint=error.hint, **facts)


@contextlib.contextmanager
def apart(events: Events, tell: Callable[[BackupError], Any], doing: str) -> Iterator[None]:
    """The one seam around what is done at one destination, folder or snapshot: its trouble is its own.

    Whatever goes wrong inside, of whatever type, is told as one error, and what comes after goes on. Interrupted and
    a reader of results who has left pass.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except Exception as error:
        if not isinstance(error, (BackupError, OSError)):
            import traceback
            events.debug("traceback", traceback.format_exc())
        tell(explain(error, doing))


class JsonLog(Reader):
    """Appends each event that a log may show to a file, a JSON object a line, `time` in seconds since the epoch."""

    def __init__(self, path: str, opened: Callable[[str], int]) -> None:
        """opened: how the file is opened for appending."""
        import json
        self.path, self.opened, self.format = path, opened, functools.partial(json.dumps, sort_keys=True)
        self.fd = -1  # until there is something to write

    def __call__(self, event: Event) -> None:
        if event.level in LEVELS:
            entry = dict(event.facts, time=time.time(), event=event.kind, level=event.level, text=event.text)
            try:
                self.write(self.format(entry).encode("ascii") + b"\n")
            except OSError as error:
                raise os_error("cannot write {}".format(self.path), error, "the run goes on without this log") from None

    def write(self, line: bytes) -> None:
        if self.fd < 0:
            self.fd = self.opened(self.path)
        while line:
            line = line[os.write(self.fd, line):]


########################################################################################################
# PART II THE COMMAND: what was asked for
########################################################################################################


########################################################################################################
# VALUES: what the values of options may be
#
# A parser for each kind of value: a word in, a value out, or a ValueError that says what the word should be.
########################################################################################################


def parse_count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError("is not a number of 0 or more")
    return int(text)


def parse_jobs(text: str) -> int:
    if parse_count(text) == 0:
        raise ValueError("is not a number of 1 or more")
    return int(text)


def parse_seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", text):
        raise ValueError("is not a number of seconds")
    return float(text)


AGE_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 604800}  # seconds


def parse_age(text: str) -> float:
    """Seconds that `90s`, `30min`, `26h`, `3d` or `2w` says."""
    match = re.fullmatch(r"([0-9]{1,9})(s|min|h|d|w)", text)
    if match is None:
        raise ValueError("is no age like 30min, 26h, 3d, 2w")
    return float(match.group(1)) * AGE_UNITS[match.group(2)]


def parse_rate(text: str) -> float:
    """Bytes a second; K, M and G are powers of 1024. A bare number would be mistaken for megabytes."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]+)?)([KMG])", text)
    if match is None or float(match.group(1)) == 0:
        raise ValueError("is not a rate above 0 with its unit, such as 500K, 20M or 1G")
    return float(match.group(1)) * 1024 ** " KMG".index(match.group(2))


def parse_stall_timeout(text: str) -> float:
    if parse_seconds(text) == 0:
        raise ValueError("is not a number of seconds above 0")
    return float(text)


class OneOf:
    """Takes one of some words, which help and completions name."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def __call__(self, text: str) -> str:
        if text not in self.words:
            raise ValueError("is not one of {}".format(", ".join(self.words)))
        return text


def parse_line(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("is no line of text")
    return text


AGENT_GROUPS = {  # what a restricted key may be allowed to do
    "list": "look at folders and their subvolumes",
    "receive": "add backups, make folders for them, clear broken transfers",
    "send": "read snapshots and backups, note transfers in the lock file",
    "snapshot": "take snapshots",
    "delete": "delete snapshots and backups",
    "verify": "compute digests of what is in them",
}


def parse_groups(text: str) -> Tuple[str, ...]:
    groups = tuple(group for group in text.split(",") if group)
    unknown = [group for group in groups if group not in AGENT_GROUPS]
    if unknown or not groups:
        raise ValueError("names none of {}".format(", ".join(AGENT_GROUPS)))
    return groups


def parse_absolute(text: str) -> str:
    if not text.startswith("/") or "\0" in text or "\n" in text:
        raise ValueError("is not an absolute path")
    return text


def parse_prefix(text: str) -> str:
    if "/" in text or "\0" in text or "\n" in text:
        raise ValueError("holds a character that no file name may hold here")
    return text


def parse_path(text: str) -> str:
    if not text or "\0" in text or "\n" in text:
        raise ValueError("is not a path")
    return text


MOMENT = re.compile(r"([0-9]{4})-?([0-9]{2})-?([0-9]{2})(?:[-T ]([0-9]{2}):?([0-9]{2})(?::?([0-9]{2}))?)?")


def parse_moment(text: str) -> float:
    """Seconds since the epoch of a local time: `2026-01-31`, `2026-01-31 09:30`, or as names have it."""
    match = MOMENT.fullmatch(text)
    parts = [int(part or 0) for part in match.groups()] if match else []
    digits = "{:04}{:02}{:02}-{:02}{:02}{:02}".format(*parts) if parts else ""
    moment = snapshot_time("", digits)
    if moment is None:
        raise ValueError("is no time such as 2026-01-31 or '2026-01-31 09:30'")
    return moment


def parse_unit_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9:_.@-]{1,200}", text):
        raise ValueError("is no name of a unit")
    return text


def parse_encryption(text: str) -> str:
    method, _, recipient = text.partition(":")
    if method not in ("gpg", "age") or not recipient.strip() or recipient[0] == "-" or not recipient.isprintable():
        raise ValueError("is neither gpg:KEY nor age:RECIPIENT")
    if method == "age" and not recipient.startswith(("age1", "ssh-", "/")):
        raise ValueError("names neither a recipient of age (age1... or ssh-...) nor the whole path of a file of them")
    return text


########################################################################################################
# PLACES: what a typed place names, and what can be done there
#
# An endpoint is taken as it stands: nothing in it is decoded, lower-cased or guessed. What a kind of place can do
# stands in its row; nothing else in the file compares kinds or schemes.
########################################################################################################


class Kind(NamedTuple):
    """A kind of place: the schemes that name it, here and on a host, and what can be done there."""

    name: str
    here: str
    on_host: str
    has_folder: bool = True  # which can be looked at, listed, deleted in and restored from
    has_subvolumes: bool = False  # so that it can be a source, restored to, and what was broken off goes on there
    has_streams: bool = False  # in files, through filters, with sidecars that prove them


SUBVOLUMES = Kind("folder", "", "ssh", has_subvolumes=True)
STREAM_FILES = Kind("raw folder", "raw", "raw+ssh", has_streams=True)
COMMAND = Kind("command", "shell", "", has_folder=False)
KINDS = {scheme: kind for kind in (SUBVOLUMES, STREAM_FILES, COMMAND) for scheme in (kind.here, kind.on_host) if scheme}


class Endpoint(NamedTuple):
    """A place as the user typed it."""

    text: str
    kind: Kind
    path: str  # or the command
    login: str = ""  # [user@]host as given, IPv6 without its brackets; '' is this machine
    port: str = ""

    @property
    def machine(self) -> str:
        """`[user@]host[:port]`, '' for this machine."""
        user, at, host = self.login.rpartition("@")
        shown = "[" + host + "]" if ":" in host else host
        return user + at + shown + (":" + self.port if self.port else "")


SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
AUTHORITY = re.compile(r"((?:[^/@]*@)?)(?:\[([0-9A-Fa-f:.]+(?:%[^/\]]+)?)\]|([^/@:\[\]]+))(?::([0-9]{1,5}))?")
HOST_AND_PATH = re.compile(r"((?:[^/@:]+@)?(?:\[[^/\]]+\]|[^/@:\[\]]+)):(/.*)", re.DOTALL)


def checked_path(text: str, path: str) -> str:
    try:
        return parse_path(path)
    except ValueError as error:
        raise UsageError("{} {}".format(printable(repr(text)), error)) from None


def parse_remote(text: str, kind: Kind, rest: str) -> Endpoint:
    """`[user@]host[:port]/path`, where nothing is ever decoded or lower-cased."""
    authority, slash, path = rest.partition("/")
    match = AUTHORITY.fullmatch(authority)
    if match is None and AUTHORITY.fullmatch(authority[:-1]) and authority.endswith(":"):
        raise UsageError("{} names no port after its colon".format(printable(text)),
                         "ssh://[USER@]HOST[:PORT]/PATH; without a port no colon")
    if match is None:
        raise UsageError("{} names no host".format(printable(text)), "ssh://[USER@]HOST[:PORT]/PATH")
    user, six, host, port = match.groups()
    if port and not 0 < int(port) < 1 << 16:
        raise UsageError("{} names no port that there is".format(printable(text)), "ports are 1 to 65535")
    if not slash:
        raise UsageError("{} names no path on the host".format(printable(text)), "ssh://[USER@]HOST[:PORT]/PATH")
    if (user or host or six).startswith("-") or (host or six).startswith("-") or user == "@":
        raise UsageError("no user or host is called as in {}".format(printable(text)),
                         "ssh would take it for an option")
    if not printable(authority) == authority or " " in authority:
        raise UsageError("{} names no host".format(printable(text)), "ssh://[USER@]HOST[:PORT]/PATH")
    return Endpoint(text, kind, checked_path(text, "/" + path), user + (six or host), port or "")


def parse_url(text: str, scheme: str, rest: str) -> Endpoint:
    kind = KINDS.get(scheme)
    if kind is None:
        raise UsageError("unknown scheme {}:// in {}".format(scheme, printable(text)),
                         "give a path, ssh://, raw:// or shell://; a relative path with a colon begins with ./")
    if scheme == kind.on_host:
        return parse_remote(text, kind, rest)
    if not kind.has_folder and (not rest.strip() or "\0" in rest):
        raise UsageError("{}:// names no command".format(scheme), scheme + "://COMMAND")
    if kind.has_folder and not rest.startswith("/"):
        raise UsageError("{} names no absolute path".format(printable(text)), scheme + ":///PATH, with three slashes")
    return Endpoint(text, kind, checked_path(text, rest) if kind.has_folder else rest)


def parse_endpoint(text: str) -> Endpoint:
    """What `text` names; UsageError where that is nothing, never a guess."""
    scheme = SCHEME.match(text)
    if scheme:
        return parse_url(text, scheme.group(1), scheme.group(2))
    on_host = HOST_AND_PATH.fullmatch(text)
    if on_host and on_host.group(1) in KINDS:
        raise UsageError("{} is neither a URL nor a host's name and path".format(printable(text)),
                         "write {0}://...; a host called {0} is ssh://{0}/PATH".format(on_host.group(1)))
    if on_host and not text.startswith("."):
        return parse_remote(text, SUBVOLUMES, on_host.group(1) + on_host.group(2))
    if re.match(r"[^/.:][^/:]*:", text):
        raise UsageError("{} names a host but no absolute path on it".format(printable(text)),
                         "write HOST:/PATH; a relative path with a colon begins with ./")
    return Endpoint(text, SUBVOLUMES, checked_path(text, text))


########################################################################################################
# OPTIONS: the table of options and verbs, and what a task is
#
# One table feeds the parser, the help, the manual and the completions. Long options may be shortened as far as they
# stay unique among those of all verbs, but never those that delete, forget or are deprecated. Every mistake here is
# found before anything is started.
########################################################################################################


class Option(NamedTuple):
    """One row of the table. `parse` None: a flag, whose value is `implied`.

    whole: it deletes, forgets, overrides a protection or is deprecated, so it has no short forms.
    """

    flags: Tuple[str, ...]
    field: str
    metavar: str
    parse: Optional[Callable[[str], Any]]
    help: str
    implied: Any = True
    many: bool = False
    whole: bool = False


class Group(NamedTuple):
    title: str
    options: Tuple[Option, ...]


OPTION_TABLE = (
    Group("Display", (
        Option(("-h", "--help"), "help", "", None, "show this help"),
        Option(("-V", "--version"), "version", "", None, "show version, digest of the source, Python and btrfs-progs"),
        Option(("-v", "--verbosity"), "verbosity", "LEVEL", OneOf(*LEVELS),
               "how much to say: debug, info, warning or error; default info"),
        Option(("-q", "--quiet"), "verbosity", "", None, "the same as -v warning", "warning"),
        Option(("-l", "--live-layout"), "live_layout", "", None, "a view of all tasks at work, in the whole terminal"),
        Option(("-d", "--btrfs-debug"), "btrfs_debug", "", None, "pass -vv to btrfs send and btrfs receive"),
        Option(("-P", "--no-progress"), "no_progress", "", None, "no progress display on a terminal"),
        Option(("--log-json",), "log_json", "FILE", parse_path, "append each event to FILE, a line of JSON each"),
        Option(("--dry-run",), "dry_run", "", None,
               "say exactly what would be snapshotted, sent and deleted, and why; change nothing"),
    )),
    Group("Retention", (
        Option(("-N", "--num-snapshots"), "num_snapshots", "N", parse_count,
               "keep the newest N snapshots at the source; 0, the default, keeps all", whole=True),
        Option(("-n", "--num-backups"), "num_backups", "N", parse_count,
               "keep the newest N backups at each destination; older snapshots than these are not sent either",
               whole=True),
        Option(("--keep-snapshots",), "keep_snapshots", "POLICY", parse_policy,
               "keep by time at the source: '24h 14d 8w 12m 5y' keeps the newest of each of the last 24 hours, 14 "
               "days and so on that have one; all keeps everything; what -N keeps is kept as well", whole=True),
        Option(("--keep-backups",), "keep_backups", "POLICY", parse_policy,
               "the same at each destination, together with -n", whole=True),
        Option(("--latest-only",), "num_snapshots", "", None, "deprecated, the same as -N 1", 1, whole=True),
        Option(("--forget-destination",), "forget", "DEST", parse_path,
               "drop what is remembered of a destination that will not come back: its pins, locks and notes",
               many=True, whole=True),
        Option(("-s", "--sync"), "sync", "", None, "wait until deleted subvolumes are cleaned up"),
        Option(("-w", "--convert-rw"), "convert_rw", "", None,
               "make a snapshot writable before deleting it, as users with user_subvol_rm_allowed need", whole=True),
    )),
    Group("Snapshots", (
        Option(("-S", "--no-snapshot"), "no_snapshot", "", None, "take no snapshot, transfer those that exist"),
        Option(("-f", "--snapshot-folder"), "snapshot_folder", "DIR", parse_path,
               "relative to the source or absolute; default .btrfs-backup-ng/snapshots"),
        Option(("-p", "--snapshot-prefix"), "prefix", "P", parse_prefix,
               "taken literally, before the time; default: the host name and -"),
    )),
    Group("Transfer", (
        Option(("--same-source",), "same_source", "", None,
               "the backups of this prefix at the destinations are of this source, though nothing shows it, as where "
               "the machine was rebuilt", whole=True),
        Option(("-T", "--no-transfer"), "no_transfer", "", None, "transfer nothing"),
        Option(("-I", "--no-incremental"), "no_incremental", "", None, "always send in full"),
        Option(("--retries",), "retries", "N", parse_count,
               "how often a transfer that breaks is taken up again in this run, after growing pauses; default 5"),
        Option(("--no-resume",), "no_resume", "", None, "never take up what has arrived, always start over"),
        Option(("--limit",), "limit", "RATE", parse_rate,
               "at most so many bytes a second to each destination: 500K, 20M, 1G"),
        Option(("--stall-timeout",), "stall_timeout", "SECONDS", parse_stall_timeout,
               "give a transfer up when not a byte has moved for so long; default 900"),
        Option(("--compress",), "compress", "PROGRAM", OneOf("no", "auto", "zstd", "lz4", "gzip"),
               "on the way over ssh: no, auto, zstd, lz4 or gzip; default no"),
        Option(("--skip-fs-checks",), "skip_fs_checks", "", None, "do not check that paths are on btrfs"),
    )),
    Group("Remote hosts", (
        Option(("--ssh-opt",), "ssh_options", "OPT", parse_path, "passed on as ssh -o OPT; may be repeated", many=True),
        Option(("--ssh-sudo",), "ssh_sudo", "", None, "run by sudo -n on the remote host"),
    )),
    Group("Stream files (raw://)", (
        Option(("--raw-compress",), "raw_compress", "PROGRAM", OneOf("zstd", "lz4", "gzip", "xz"),
               "compress stream files with zstd, lz4, gzip or xz"),
        Option(("--raw-encrypt",), "raw_encrypt", "METHOD", parse_encryption,
               "encrypt stream files: gpg:KEY, age:RECIPIENT or age:/FILE with recipients"),
        Option(("--raw-full-every",), "raw_full_every", "N", parse_count,
               "send every Nth in full, so that no chain has more than N stream files; 0, the default: only the first"),
    )),
    Group("Locks and runs", (
        Option(("--remove-locks",), "remove_locks", "", None, "remove all locks of the given destinations", whole=True),
        Option(("--locked-destinations", "--locked-dests"), "locked_destinations", "", None,
               "add every destination that a lock names"),
        Option(("--wait",), "wait", "[SECONDS]", parse_seconds,
               "wait for another run on the same snapshots instead of failing", float("inf")),
        Option(("--jobs",), "jobs", "N", parse_jobs, "at most N tasks transfer at once; default all"),
        Option(("--no-elevate",), "no_elevate", "", None, "do not run again through sudo when not root"),
    )),
)
SHELLS = ("bash", "zsh", "fish")  # that a completion can be written for


class Verb(NamedTuple):
    """A command of its own: `btrfs-backup-ng NAME ...`; '' is the classic one.

    about: paragraphs for the help, apart by empty lines; what is indented stays as it is.
    examples: each a command and what it does.
    operands: for completions, the words that may stand after a word, instead of a path.
    """

    usage: str
    summary: str
    groups: Tuple[Group, ...]
    about: str = ""
    examples: Tuple[Tuple[str, str], ...] = ()
    operands: Tuple[Tuple[str, Tuple[str, ...]], ...] = ()
    needs_root: bool = True  # run again through sudo where it is not root


def flags_of(groups: Iterable[Group]) -> Dict[str, Option]:
    return {flag: option for group in groups for option in group.options for flag in option.flags}


FLAGS = flags_of(OPTION_TABLE)


def rows(*flags: str) -> Tuple[Option, ...]:
    """Rows of the table that another verb takes as well."""
    return tuple(FLAGS[flag] for flag in flags)


AGENT_OPTIONS = (
    Option(("--under",), "under", "DIR", parse_absolute, "nothing outside of this folder"),
    Option(("--allow",), "allow", "LIST", parse_groups, "only calls of these groups, with commas between them"),
    Option(("--most-partials",), "most_partials", "N", parse_count,
           "receive nothing into a folder that holds so many broken transfers; default 16"),
    Option(("--as",), "known_as", "NAME", parse_line,
           "note destinations of the machine NAME alone, as uname -n says there"),
)
ANY_PREFIX = Option(("-p", "--snapshot-prefix"), "prefix", "P", parse_prefix,
                    "only what has this prefix, taken literally; default: all prefixes there are")
RAW_IDENTITY = Option(("--raw-identity",), "raw_identity", "FILE", parse_path,
                      "the key that stream files (raw://) were encrypted for with age")
VERBS = {
    "": Verb(
        "[options] SOURCE [DESTINATION ...] [: [options] SOURCE [DESTINATION ...]] ...",
        "snapshot, send what is missing, apply retention", OPTION_TABLE,
        about="""\
Takes a read-only snapshot of the subvolume SOURCE, sends it and every older one that is missing to each
DESTINATION, incrementally where it can, then applies retention. Without DESTINATION it keeps snapshots
only. Options and paths mix in any order.

A destination that is away or fails stops neither the snapshot nor the other destinations. What a failed
transfer left is taken up or cleared by the next run.

Several tasks stand in one command with : between them, each with options of its own; display options,
--jobs and --no-elevate hold for all. A colon in the name of a file is written \\: or the path begins with
./, and in host:/path and in URLs it is no separator.

@FILE reads arguments from a file: one flag, option with its value, or path on each line. A line that begins
with # is a comment, nothing is quoted or escaped, a line : separates tasks, a line @FILE reads another
file, relative to the one it stands in. A line that looks like two paths is refused, unless a line -- above
it says that all below are paths as they stand.""",
        examples=(
            ("/home /mnt/backup/home", "a full backup first, then increments"),
            ("--dry-run /home /mnt/backup/home", "what would be done, and why"),
            ("-N 3 -n 30 /home /mnt/backup/home", "keep 3 snapshots and 30 backups"),
            ("/home /mnt/backup/home /mnt/second/home", "two destinations, the source read once"),
            ("-p root- / /mnt/backup : -p home- /home /mnt/backup", "two tasks at the same time"),
            ("-S --locked-destinations /home", "retry what failed, take no snapshot"),
            ("/home", "a snapshot only"),
        )),
    "agent": Verb(
        "[--under DIR --allow LIST]", "serve another instance of this program on stdin and stdout", (
            Group("Restricting a key", AGENT_OPTIONS),
            Group("Display", rows("-h")),
        ),
        about="""\
Answers the calls of another instance of this program, which it gets on stdin, on stdout. Nobody types
this: it is what runs on a remote host while that is a source or a destination.

As the command= of a key in authorized_keys it restricts that key to the folder DIR and to some groups of
calls, whatever the client asks for. What it refuses it tells the client, and the system log. The groups:

""" + "\n".join("  {:<10}{}".format(group, text) for group, text in AGENT_GROUPS.items()),
        examples=(
            ("agent --under /mnt/backups/laptop --allow receive,list", "a key that can only add backups"),
            ("agent --under /home --allow send,list", "a key that can only read snapshots"),
        ),
        needs_root=False),
    "doctor": Verb(
        "[options] [SOURCE [DESTINATION ...] | FOLDER]", "check that backups can work and do, say what to do", (
            Group("What to check", (ANY_PREFIX,) + rows("-f") + (
                Option(("--max-age",), "max_age", "AGE", parse_age,
                       "a newest complete backup older than this is a problem: 90min, 26h, 3d, 2w; the first line is "
                       "then one for monitoring"),
                Option(("--json",), "json", "", None, "the same as JSON, for programs"))),
            Group("Display", rows("-h", "-v", "-q", "--log-json")),
            Group("Hosts", rows("--ssh-opt", "--ssh-sudo", "--no-elevate")),
        ),
        about="""\
Checks this machine (programs, kernel, privileges, clock), the source (is it a subvolume, identity of its
snapshots, locks, notes, space, quotas, errors of its devices) and each destination (connection, folder,
backups, what the next transfer builds on, partials, space, quotas, devices). A FOLDER is one of backups
alone. Nothing is changed.

Each check says ok, problem or "not checked", and in case of a problem what to type.

Exit status: 0 no problem was found, 1 there is one, 2 the command line is wrong. With --max-age the first
line says all in short, `BTRFS-BACKUP OK - ...` or `BTRFS-BACKUP PROBLEM - ...`, and only problems follow, as
monitors of the Nagios kind and mails of a timer want it. They show status 1 as a warning. With --max-age
and a source alone, the ages are those of the destinations that the source remembers, which may be away.""",
        examples=(
            ("doctor", "can this machine do it at all?"),
            ("doctor /home ssh://nas/backups/home", "everything about these"),
            ("doctor --max-age 26h /home /mnt/backup/home", "for monitoring"),
            ("doctor --max-age 26h /srv/backups/laptop", "the same on a server, for each prefix"),
        )),
    "list": Verb(
        "[options] {SOURCE [DESTINATION ...] | FOLDER ...}", "show which snapshots are where", (
            Group("What to show", (ANY_PREFIX,) + rows("-f") + (
                Option(("--json",), "json", "", None, "the same as JSON, for programs"),)),
            Group("Display", rows("-h", "-v", "-q", "--log-json")),
            Group("Hosts", rows("--ssh-opt", "--ssh-sudo", "--no-elevate")),
        ),
        about="""\
Shows a table: a line for each snapshot, a column for SOURCE and for each DESTINATION. Without a source it
shows backups alone: a FOLDER is one where the path is no subvolume with a snapshot folder in it.

  present  complete
  parent   complete, and what an unfinished or the next transfer builds on
  locked   at the source: a transfer of it has begun and is not complete
  partial  a transfer was broken off, or is under way
  missing  at the source, but not there
  foreign  another subvolume bears the name
  ?        the location could not be listed; the exit status is then 1

Which backup belongs to which snapshot is told by UUID. Without -p, snapshots of every prefix are shown. A
size stands where quotas are enabled: what a subvolume shares with no other.""",
        examples=(
            ("list /home /mnt/backup/home", "what is where"),
            ("list /mnt/backup/home", "what there is to restore"),
            ("list --json /home ssh://nas/backups/home", "for programs"),
        )),
    "prune": Verb(
        "[options] FOLDER ...", "apply retention to folders of backups", (
            Group("Retention", rows("-n") + (
                Option(("--keep-backups",), "keep_backups", "POLICY", parse_policy,
                       "keep by time: '24h 14d 8w 12m 5y' keeps the newest of each of the last 24 hours, 14 days and "
                       "so on that have one; all keeps everything; what -n keeps is kept as well"),
                Option(("-p", "--snapshot-prefix"), "prefix", "P", parse_prefix,
                       "only backups of this prefix; default: those of each prefix there is, each by itself"),
                Option(("--partials-older-than",), "partials_older_than", "AGE", parse_age,
                       "delete what broken transfers left and nothing has changed for so long: 30min, 26h, 3d, 2w; "
                       "default: leave it", whole=True),
            ) + rows("-s", "-w")),
            Group("Display", rows("-h", "-v", "-q", "--log-json", "--dry-run")),
            Group("Runs and hosts", rows("--wait", "--ssh-opt", "--ssh-sudo", "--no-elevate")),
        ),
        about="""\
Deletes old backups in each FOLDER, oldest first, where no source is at hand, as on a server that keeps the
backups of others. Backups are told apart by their prefix, which is what stands before the time in their
names: the policy holds for each prefix by itself.

Never deleted: what is not read-only, was not received or has another name than PREFIX and a time; what an
unfinished transfer builds on; what locks and notes in the folder itself name; a name from the future; the
newest backup. A policy has to be given.

The source sends again what it still has and its own policy wants: give it the same policy.""",
        examples=(
            ("prune --dry-run --keep-backups '14d 8w 12m' /srv/backups/laptop", "what would go, and why"),
            ("prune --keep-backups '14d 8w 12m' /srv/backups/*", "each folder by itself"),
            ("prune -n 30 --partials-older-than 7d ssh://nas/backups/home", "on another host"),
        )),
    "print": Verb(
        "{man | completion bash|zsh|fish | systemd [options] -- ARGUMENT ... | authorized-keys [options] KEYFILE}",
        "write a man page, a shell's completion, systemd units, or a key's restriction", (
            Group("Display", rows("-h")),
            Group("Systemd", (
                Option(("--on-calendar",), "on_calendar", "WHEN", parse_line,
                       "when the timer starts it, as in man systemd.time; default *-*-* 02:00"),
                Option(("--unit",), "unit", "NAME", parse_unit_name,
                       "what the units are called; default btrfs-backup- and the source"),
                Option(("--user",), "user", "", None,
                       "units for a user's own systemd; that user must be allowed sudo without a password"),
            )),
            Group("Authorized keys", AGENT_OPTIONS + (
                Option(("--ssh-sudo",), "ssh_sudo", "", None, "the key logs in as a user who may use sudo"),)),
        ),
        about="""\
Writes to stdout, and nowhere else.

systemd writes a shell script that holds a service, which runs btrfs-backup-ng with the ARGUMENTs, and its
timer. Read it, then give it to sh. The arguments are checked first. With a folder as its argument the
script puts the units there.

authorized-keys writes the line of ~/.ssh/authorized_keys that restricts the public key in KEYFILE; call it
on the machine that the key shall open. See agent --help.""",
        examples=(
            ("print man | man -l -", "read the manual"),
            ("print completion bash >> ~/.bash_completion", "complete options and paths with the Tab key"),
            ("print systemd -- -N 3 -n 30 /home /mnt/backup/home", "look at a service and its timer"),
            ("print systemd -- -N 3 -n 30 /home /mnt/backup/home | sh", "install them (as root)"),
            ("print authorized-keys --under /mnt/backups/laptop --allow receive,list laptop.pub",
             "restrict a key to adding backups"),
        ),
        operands=(("print", ("man", "completion", "systemd", "authorized-keys")), ("completion", SHELLS)),
        needs_root=False),
    "verify": Verb(
        "[options] SOURCE DESTINATION ...", "prove that backups are equal to their snapshots", (
            Group("Which backups", (
                Option(("--latest",), "latest", "", None, "only the newest at each destination"),
                Option(("--name",), "backup_name", "NAME", parse_path, "only those of the snapshot of that name"),
                Option(("-p", "--snapshot-prefix"), "prefix", "P", parse_prefix, "only those of this prefix"),
            ) + rows("-f")),
            Group("How", (
                Option(("--quick",), "quick", "", None, "compare identity and flags only, read no contents"),
                Option(("--raw-files",), "raw_files", "", None,
                       "of stream files (raw://) compare the files alone, where they lie, not the streams inside"),
                RAW_IDENTITY,
            )),
            Group("Hosts", rows("--ssh-opt", "--ssh-sudo", "--no-elevate")),
            Group("Display", rows("-h", "-v", "-q", "-P", "--log-json")),
        ),
        about="""\
Compares every snapshot of SOURCE with its backup at each DESTINATION: first their identity, then all that
is in them, by a digest computed on the machine where the data lies, on all sides at once. Only digests
travel. What differs is named, path by path.

Covered are names, types, modes, owners, times of change, extended attributes (and so ACLs and
capabilities), hard links, and contents; not the top folder's own times, which btrfs receive does not
restore.

Of stream files (raw://, where no SOURCE is needed) the digests of the file and of the stream inside are
compared with the sidecar's; the filters run here, so the files travel unless they hold plain streams.

Each backup is "equal", "different" or "not checked". The exit status is 0 if at least one backup was
compared at each destination and none is different or could not be read. A backup whose snapshot is gone
from SOURCE cannot be checked and counts neither way.""",
        examples=(
            ("verify /home /mnt/backup/home", "compare all backups with the snapshots there are"),
            ("verify --latest /home /mnt/backup/home ssh://nas/backups/home", "the newest at each destination"),
            ("verify --quick /home /mnt/backup/home", "identity alone, in no time"),
            ("verify --raw-identity key.txt raw:///mnt/nas/home", "all stream files of a folder, by their sidecars"),
        )),
    "restore": Verb(
        "[options] BACKUP [FOLDER]", "bring a backup back, into a folder or in a subvolume's place", (
            Group("Which backup", (
                Option(("--latest",), "latest", "", None, "the newest in the folder BACKUP"),
                Option(("--before",), "before", "TIME", parse_moment,
                       "the newest from before a local time, such as 2026-01-31 or '2026-01-31 09:30'"),
                Option(("--name",), "backup_name", "NAME", parse_path, "the one of that name"),
                Option(("-p", "--snapshot-prefix"), "prefix", "P", parse_prefix,
                       "only those of this prefix; needed where the folder holds several"),
            )),
            Group("In place", (
                Option(("--in-place",), "in_place", "SUBVOLUME", parse_path,
                       "put a writable snapshot of it in the place of SUBVOLUME, which stays beside it"),
            ) + rows("-f")),
            Group("Transfer", rows("-I", "--retries", "--no-resume", "--limit", "--stall-timeout", "--ssh-opt",
                                   "--ssh-sudo", "--compress") + (RAW_IDENTITY,)),
            Group("Display", rows("-h", "-v", "-q", "-d", "-P", "--log-json", "--dry-run")),
            Group("Runs", rows("--wait", "--no-elevate")),
        ),
        about="""\
Brings one backup back by btrfs send and receive, incrementally where FOLDER's filesystem holds an older or
newer one of the same source. BACKUP is the path of a backup, or a folder of backups and one of --latest,
--before and --name. In FOLDER the restored subvolume bears the backup's name and is read-only. Nothing is
ever overwritten.

With --in-place a writable snapshot of it takes the place of SUBVOLUME in one step. What stood there stays
beside it as SUBVOLUME.old-DATE, with its snapshots in it. The new one has the restored state as its only
snapshot, and so the next backup is incremental. FOLDER may then be left out.""",
        examples=(
            ("restore /mnt/backup/home --latest --in-place /mnt/top/home", "the subvolume as it was last"),
            ("restore /mnt/backup/home --before 2026-01-31 /mnt/top/restored", "an older state beside it"),
            ("restore ssh://nas/backups/laptop-20260131-093000 /mnt/top/restored", "from another machine"),
        )),
}

# what holds for all tasks of a command
SHARED = frozenset(option.field for option in OPTION_TABLE[0].options) | {"jobs", "no_elevate"}
STATE_FOLDER = ".btrfs-backup-ng"  # in the source


class Task(NamedTuple):
    """What one task shall do. Sizes in bytes, times in seconds, None is 'not given'."""

    verb: str = ""
    source: str = ""
    destinations: Tuple[str, ...] = ()
    help: bool = False
    version: bool = False
    verbosity: str = "info"
    live_layout: bool = False
    btrfs_debug: bool = False
    no_progress: bool = False
    log_json: Optional[str] = None
    dry_run: bool = False
    num_snapshots: int = 0
    num_backups: int = 0
    keep_snapshots: Policy = Policy()
    keep_backups: Policy = Policy()
    forget: Tuple[str, ...] = ()
    sync: bool = False
    convert_rw: bool = False
    no_snapshot: bool = False
    snapshot_folder: str = STATE_FOLDER + "/snapshots"
    prefix: Optional[str] = None
    same_source: bool = False
    no_transfer: bool = False
    no_incremental: bool = False
    retries: int = 5
    no_resume: bool = False
    limit: float = 0.0
    stall_timeout: float = 900.0
    compress: str = "no"
    ssh_options: Tuple[str, ...] = ()
    ssh_sudo: bool = False
    skip_fs_checks: bool = False
    raw_compress: Optional[str] = None
    raw_encrypt: Optional[str] = None
    raw_full_every: int = 0
    raw_identity: Optional[str] = None
    raw_files: bool = False
    remove_locks: bool = False
    locked_destinations: bool = False
    wait: float = 0.0
    jobs: int = 0
    no_elevate: bool = False
    json: bool = False
    partials_older_than: Optional[float] = None
    max_age: Optional[float] = None
    on_calendar: str = "*-*-* 02:00"
    unit: str = ""
    user: bool = False
    latest: bool = False
    before: Optional[float] = None
    backup_name: Optional[str] = None
    in_place: Optional[str] = None
    under: str = ""
    allow: Tuple[str, ...] = ()
    most_partials: int = 16
    known_as: str = ""
    quick: bool = False

    @property
    def snapshot_policy(self) -> Policy:
        return self.keep_snapshots.also_newest(self.num_snapshots)

    @property
    def backup_policy(self) -> Policy:
        return self.keep_backups.also_newest(self.num_backups)


def find_option(flag: str, flags: Dict[str, Option]) -> Option:
    """The option of a flag as typed; long ones may be shortened while unique among those of all verbs."""
    if flag in flags:
        return flags[flag]
    meant = {option.flags[-1]: option for verb in VERBS.values() for known, option in flags_of(verb.groups).items()
             if flag.startswith("--") and known.startswith(flag)}
    if len(meant) > 1 and flag not in meant:
        raise UsageError("option {} could be {}".format(flag, " or ".join(sorted(meant))), "see --help")
    name = flag if flag in meant else "".join(meant) or flag
    if name not in flags:
        elsewhere = [verb or "a backup" for verb in VERBS if name in flags_of(VERBS[verb].groups)]
        raise UsageError("unknown option {}".format(printable(flag)), "{} is an option of {}; see --help".format(
            name, " and ".join(elsewhere)) if elsewhere else "see --help")
    if flags[name].whole:
        raise UsageError("option {} is written in full: {}".format(flag, name), "see --help")
    return flags[name]


def split_flags(argument: str, flags: Dict[str, Option]) -> Iterator[Tuple[str, Optional[str]]]:
    """The flags of one argument with the value glued to the last: `-SN3` is -S and -N with 3."""
    if argument.startswith("--"):
        flag, equals, value = argument.partition("=")
        yield flag, value if equals else None
        return
    rest = argument[1:]
    while rest:
        flag, rest = "-" + rest[0], rest[1:]
        option = find_option(flag, flags)
        if option.parse and rest.startswith("="):
            raise UsageError("{}{} is not clear: is the = part of the value?".format(flag, printable(rest)),
                             "write {}{}, or {} and the value apart".format(option.flags[-1], printable(rest), flag))
        if option.parse and rest:
            yield flag, rest
            return
        yield flag, None


def parse_value(option: Option, text: str) -> Any:
    try:
        return option.parse(text) if option.parse else option.implied
    except ValueError as error:
        raise UsageError("{}: {} {}".format("/".join(option.flags), printable(repr(text)), error),
                         "see --help") from None


def check_source(text: str) -> None:
    if not parse_endpoint(text).kind.has_subvolumes:
        raise UsageError("{} cannot be a source".format(printable(text)), "name a subvolume, here or on ssh://")


def check_folders(task: Task, done: str, hint: str) -> None:
    """UsageError where a place has no folder, so that what the verb does cannot be `done` with it."""
    for text in ((task.source,) if task.source else ()) + task.destinations:
        if not parse_endpoint(text).kind.has_folder:
            raise UsageError("{} cannot be {}".format(printable(text), done), hint)


def check_task(task: Task) -> None:
    """UsageError for what no task of the classic command can mean."""
    if not task.source:
        raise UsageError("no source given", "btrfs-backup-ng SOURCE [DESTINATION ...]; see --help")
    check_source(task.source)
    kinds = [parse_endpoint(text).kind for text in task.destinations]
    if not all(kind.has_folder for kind in kinds) and not task.backup_policy.keeps_all:
        raise UsageError("-n and --keep-backups cannot go with shell://, where nothing can be deleted",
                         "leave them away, or give the other destinations a command of their own")
    if not any(kind.has_streams for kind in kinds) and not task.locked_destinations and (
            task.raw_compress or task.raw_encrypt or task.raw_full_every):
        raise UsageError("--raw-compress, --raw-encrypt and --raw-full-every are for raw://, and no such destination "
                         "is given", "name one, as raw:///PATH")
    if (task.remove_locks and not task.destinations and not task.locked_destinations):
        raise UsageError("--remove-locks needs the destinations whose locks to remove",
                         "name them, or add --locked-destinations for all")


def check_restore(task: Task) -> None:
    """UsageError for what no restore can mean."""
    if not task.source or len(task.destinations) > 1 or not (task.destinations or task.in_place):
        raise UsageError("restore takes a backup and a folder to restore it to",
                         "btrfs-backup-ng restore BACKUP FOLDER; see restore --help")
    if sum((task.latest, task.before is not None, task.backup_name is not None)) > 1:
        raise UsageError("--latest, --before and --name choose a backup each by itself", "give one of them")
    if "/" in (task.backup_name or ""):
        raise UsageError("--name takes the name of a backup, not a path", "give the folder as BACKUP")
    if not parse_endpoint(task.source).kind.has_folder:
        raise UsageError("{} holds no backups to restore".format(printable(task.source)))
    places = [parse_endpoint(text) for text in task.destinations + ((task.in_place,) if task.in_place else ())]
    if not all(place.kind.has_subvolumes for place in places):
        raise UsageError("a backup is restored to a folder on btrfs", "give a path, here or on ssh://")
    if len({place.machine for place in places}) > 1:
        raise UsageError("FOLDER and the subvolume of --in-place must be on one filesystem, so on one machine",
                         "leave FOLDER out")


def check_verify(task: Task) -> None:
    """UsageError for what no verification can mean."""
    # sidecars tell what streams should be
    is_proven = bool(task.source) and parse_endpoint(task.source).kind.has_streams
    if is_proven and not all(parse_endpoint(text).kind.has_streams for text in task.destinations):
        check_source(task.source)
    if not task.source or not (task.destinations or is_proven):
        raise UsageError("verify takes a source and the destinations whose backups to compare",
                         "btrfs-backup-ng verify SOURCE DESTINATION ...; see verify --help")
    if task.latest and task.backup_name is not None:
        raise UsageError("--latest and --name choose backups each by itself", "give one of them")
    check_folders(task, "read back", "verify what it holds by itself")


########################################################################################################
# ARGUMENTS: words and files to tasks
#
# Options and paths mix in any order. An option's value is the next word as it stands, whatever it begins
# with or holds. A `:` separates tasks, alone or glued to a path, where it is no part of a URL or of
# `host:/path`; `\:` is a colon in a path, and what begins with `./` is one path. `@FILE` reads arguments,
# a line each, where nothing is escaped and no `:` is glued; what looks like two things on a line is refused, for
# the second would silently get no backup; a `--` in it holds to its end; a verb passes over what does not concern
# it in the file of a backup. Display options hold for all tasks. Verbs take one task. Mistakes in a file are
# named with its line.
########################################################################################################

LARGEST_ARGUMENT_FILE = 1 << 20  # bytes
JOB_VERBS = frozenset(("doctor", "list", "verify"))  # which take the places of a backup, and so its file
SEPARATORS = (":", "::")
BLANKS = " \t"
SEPARATOR = re.compile(r"(?<!\\):+")
ONE_THING = frozenset(("DEST", "DIR", "FILE", "NAME", "P", "SUBVOLUME"))  # values that are one name or place
QUOTED = re.compile(r"""(["']).*|.*\\[ \t]""", re.DOTALL)
NEXT_THING = re.compile(  # a path, an option, a file, a comment, a separator behind a blank; a separator at the end
    r"[ \t]+((?:\.{0,2}/|~/|-[^ \t]|@|#(?![0-9])|:|[^ \t/:]+:/).*)|(?<!:)(:{1,2})$", re.DOTALL)
HOST_START = re.compile(r"(?:[^/@:\\]+@)?(?:\[[^/\]]+\]|[^/.@:\[\]\\][^/@:\[\]\\]*):")


class Request(NamedTuple):
    """One task of a command line. The words are its options, and those of the whole command, to be parsed again."""

    task: Task
    words: Tuple[str, ...] = ()
    shared_words: Tuple[str, ...] = ()
    files: Tuple[str, ...] = ()  # of arguments, as the command line names them

    @property
    def paths(self) -> Tuple[str, ...]:
        return ((self.task.source,) if self.task.source else ()) + self.task.destinations


class Draft(NamedTuple):
    """One task while it is gathered. `words` are its options: field and word."""

    fields: Dict[str, Any]
    words: List[Tuple[str, str]]
    paths: List[str]

    @property
    def is_empty(self) -> bool:
        return not self.words and not self.paths


class ConfigError(UsageError):
    """A mistake in a file of arguments; its message names file and line."""


class Forbidden(UsageError):
    """A file of arguments may not be read by this user."""


def split_word(word: str) -> Tuple[str, Optional[str]]:
    """The path that a word of the command line begins with, and what follows a separator after it, or None.

    >>> split_word("host:/a:/b"), split_word("ssh://h:22/p"), split_word("/a\\\\:b:")
    (('host:/a', '/b'), ('ssh://h:22/p', None), ('/a:b', ''))
    """
    scheme, host = SCHEME.match(word), HOST_START.match(word)
    start = 0
    if word.startswith("./") or (scheme and scheme.group(1) not in KINDS):
        start = len(word)
    elif scheme and not KINDS[scheme.group(1)].has_folder:
        return word, None
    elif scheme:
        start = (word + "/").index("/", scheme.start(2))
    elif host:
        start = host.end() if word[host.end():host.end() + 1] == "/" else len(word)
    found = SEPARATOR.search(word, start)
    path = word[:found.start()] if found else word
    return path.replace("\\:", ":"), word[found.end():] if found else None


def check_one_thing(text: str, otherwise: str) -> None:
    """UsageError where a line of a file, or the value in it, looks like more than the one path or name it is."""
    if text.startswith("shell://"):
        return
    if QUOTED.match(text):
        raise UsageError("nothing is quoted or escaped here: {}".format(printable(text)),
                         "write it as it is, blanks included; {}".format(otherwise))
    found = NEXT_THING.search(text)
    if found:
        second = printable(found.group(1) or found.group(2))
        raise UsageError("more than one thing on a line: {}".format(printable(text)),
                         "give {} a line of its own; {}".format(second, otherwise))


def check_value(flag: str, value: str, flags: Dict[str, Option]) -> None:
    option = find_option(flag, flags)
    if option.metavar in ONE_THING:
        check_one_thing(value, "what stands behind {}= is taken as it stands".format(option.flags[-1]))


def split_line(line: str, flags: Dict[str, Option]) -> Iterator[Tuple[str, Optional[str]]]:
    """The flags of one line of a file; the last one's value is all the rest of the line."""
    match = re.match(r"(--[^= \t]*|[^ \t]*)(=|[ \t]*)(.*)", line, re.DOTALL)
    word, mark, rest = match.groups() if match else (line, "", "")
    if word == "--":
        raise UsageError("-- stands alone on its line", "the paths stand on lines of their own")
    if word.startswith("--"):
        if mark != "=":
            check_value(word, rest, flags)
        yield word, rest if mark else None
        return
    pairs = list(split_flags(word, flags))
    yield from pairs[:-1]
    flag, glued = pairs[-1]
    value = glued + mark + rest if glued is not None else rest if mark else None
    check_value(flag, value or "", flags)
    yield flag, value


def read_argument_lines(path: str) -> List[str]:
    """The lines of a file of arguments, without indentation and blanks at their ends."""
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_ARGUMENT_FILE + 1)
    except PermissionError:
        raise Forbidden("cannot read {}: permission denied".format(path)) from None
    except OSError as error:
        raise UsageError("cannot read {}: {}".format(path, (error.strerror or str(error)).lower()),
                         "a path that begins with @ is written ./@") from None
    if len(data) > LARGEST_ARGUMENT_FILE:
        raise UsageError("{} is no file of arguments: it is larger than {}".format(
            path, format_size(LARGEST_ARGUMENT_FILE)))
    text = os.fsdecode(data[3:] if data.startswith(b"\xef\xbb\xbf") else data)
    return [line.strip(BLANKS + "\r") for line in text.split("\n")]


def refuse_late_verb(task: Task) -> None:
    """UsageError where a verb stands behind the paths, unless a folder is called so."""
    late = next((path for path in task.destinations if path in VERBS and path and not os.path.isdir(path)), None)
    if late is not None:
        others = [path for path in task.destinations if path != late]
        raise UsageError("{} must come first in its command, before the paths".format(late),
                         "{}; a destination of that name is written ./{}".format(
                             typed(["btrfs-backup-ng", late, task.source] + others), late))


class Arguments:
    """Gathers the options and paths of one task after another."""

    def __init__(self, verb: str) -> None:
        self.verb, self.flags = verb, flags_of(VERBS[verb].groups)
        # in a file: what does not concern a verb that looks at the source and destinations of a job is passed over
        self.flags_in_files = dict(FLAGS, **self.flags) if verb in JOB_VERBS else self.flags
        self.drafts: List[Draft] = []
        self.files: List[str] = []  # as the command line names them
        self.open_files: List[str] = []  # real paths of those that are being read
        self.begin_task()

    def begin_task(self) -> None:
        """What follows belongs to another task; one that got nothing is none."""
        self.only_paths = False
        self.drafts.append(Draft({}, [], []))

    def add_words(self, words: Iterable[str]) -> None:
        """Words of the command line."""
        left = collections.deque(words)
        while left:
            word = left.popleft()
            if self.only_paths and self.verb:
                self.add_path(word)
            elif word in SEPARATORS:
                self.begin_task()
            elif self.only_paths:
                self.add_path(word)
            elif word == "--":
                self.only_paths = True
            elif len(word) > 1 and word.startswith("-"):
                for flag, value in split_flags(word, self.flags):
                    self.add_option(flag, value, left)
            else:
                path, rest = split_word(word)
                left.extendleft((rest, ":") if rest else (":",) if rest is not None else ())
                if word.startswith("@"):
                    self.files.append(path[1:])
                    self.add_file(path[1:])
                elif path or rest is None:
                    self.add_path(path)

    def add_line(self, line: str, folder: str) -> None:
        """One line of a file in `folder`."""
        if line in SEPARATORS:
            self.begin_task()
        elif line == "--" and not self.only_paths:
            self.only_paths = True
        elif self.only_paths:
            self.add_path(line)
        elif not line.startswith(("-", "@")) or line == "-":
            check_one_thing(line, "below a line -- each line is a path as it stands")
            self.add_path(line)
        elif line.startswith("@"):
            check_one_thing(line[1:].strip(BLANKS), "one @FILE on a line")
            self.add_file(os.path.join(folder, line[1:].strip(BLANKS)))
        else:
            for flag, value in split_line(line, self.flags_in_files):
                self.add_option(flag, value, collections.deque())

    def add_file(self, path: str) -> None:
        if not os.path.basename(path) or "\0" in path:
            raise UsageError("@ names no file", "@FILE; a path that begins with @ is written ./@")
        real = os.path.realpath(path)
        if real in self.open_files:
            raise UsageError("{} is being read already: it includes itself".format(path))
        self.open_files.append(real)
        outside, self.only_paths = self.only_paths, False
        for number, line in enumerate(read_argument_lines(path), 1):
            if line and not line.startswith("#"):
                try:
                    self.add_line(line, os.path.dirname(path))
                except (ConfigError, Forbidden):
                    raise
                except UsageError as error:
                    raise ConfigError("{}:{}: {}".format(path, number, error.message), error.hint) from None
        self.open_files.pop()
        self.only_paths = outside

    def add_path(self, path: str) -> None:
        if not self.verb and self.open_files:
            parse_endpoint(path)  # here its line is known
        self.drafts[-1].paths.append(path)

    def add_option(self, flag: str, value: Optional[str], left: "collections.deque[str]") -> None:
        """An option with its value, which may be the first of the words that are `left`."""
        option = find_option(flag, self.flags_in_files if self.open_files else self.flags)
        if option.parse is None:
            if value is not None:
                raise UsageError("{} takes no value".format(flag), "see --help")
        elif option.metavar.startswith("["):
            if value is None and left and re.fullmatch(r"[0-9]+(\.[0-9]+)?", left[0]):
                value = left.popleft()
        elif value is None:
            if not left:
                raise UsageError("{} needs a value ({})".format(flag, option.metavar), "see --help")
            value = left.popleft()
        fields = self.drafts[-1].fields
        parsed = option.implied if value is None else parse_value(option, value)
        if option not in self.flags.values():
            return
        fields[option.field] = fields.get(option.field, ()) + (parsed,) if option.many else parsed
        name = option.flags[-1]
        self.drafts[-1].words.append((option.field, name if value is None else name + "=" + value))

    def requests(self) -> List[Request]:
        """The tasks, each with the options that hold for all."""
        drafts = [draft for draft in self.drafts if not draft.is_empty] or self.drafts[:1]
        shared = tuple(text for draft in drafts for field, text in draft.words if field in SHARED)
        fields = {field: value for draft in drafts for field, value in draft.fields.items() if field in SHARED}
        requests = []
        for draft in drafts:
            task = Task(**dict(draft.fields, verb=self.verb, **fields))
            if draft.paths:
                task = task._replace(source=draft.paths[0], destinations=tuple(draft.paths[1:]))
            if not self.verb and task.source in VERBS and task.source:
                raise UsageError("{} must come first in its command, before options and @FILE".format(task.source),
                                 "a source of that name is written ./{}".format(task.source))
            if not self.verb:
                refuse_late_verb(task)
            own = tuple(text for field, text in draft.words if field not in SHARED)
            requests.append(Request(task, own, shared, tuple(self.files)))
        return requests


def parse_command(arguments: Sequence[str]) -> List[Request]:
    """The tasks that a command line asks for, at least one, or UsageError."""
    verb = arguments[0] if arguments and arguments[0] in VERBS else ""
    gathered = Arguments(verb)
    try:
        gathered.add_words(arguments[1:] if verb else arguments)
    except UsageError as error:
        if verb == "print" and "systemd" in arguments and "--" not in arguments:
            raise UsageError(error.message, "the backup stands behind --: "
                             "btrfs-backup-ng print systemd -- [options] SOURCE [DESTINATION ...]") from None
        raise
    requests = gathered.requests()
    if verb and requests[1:]:
        raise UsageError("{} is done for one task at a time".format(verb), "write \\: for a colon in a path")
    return requests


def parse_arguments(arguments: Sequence[str]) -> Task:
    """The one task that `arguments` ask for, or UsageError."""
    request, *others = parse_command(arguments)
    if others:
        raise UsageError("these are {} tasks instead of one".format(1 + len(others)))
    return request.task


def source_command(task: Task, prefix: str, options: Sequence[str]) -> str:
    """A command on the source of a task that takes no snapshot, with all that says which source and prefix is meant."""
    words = ["btrfs-backup-ng", "-S"] + list(options) + ["-p", prefix]
    words += ["-f", task.snapshot_folder] if task.snapshot_folder != Task().snapshot_folder else []
    words += ["--ssh-opt=" + option for option in task.ssh_options] + ["--ssh-sudo"] * task.ssh_sudo
    plain = split_word(task.source) == (task.source, None) and task.source[:1] not in ("-", "@")
    return typed(words + ["--"] * (not plain) + [task.source])


def forget_command(task: Task, prefix: str, destination: str) -> str:
    """What to type to give a destination up: nothing else is done, sent or deleted at the source."""
    return source_command(task, prefix, ["-T", "--forget-destination", destination])


########################################################################################################
# PART III THE PLAN: what is to be done, from what was seen; pure
########################################################################################################


########################################################################################################
# IDENTITY: subvolumes, which backup belongs to which snapshot, what is complete
#
# Identity goes by UUID, never by name or time. The id that travels in a stream is the received UUID
# of the sent subvolume where it has one, else its UUID; the receiver keeps it as received UUID. So it
# also holds for backups of backups, and for the way back after a restore. Only read-only subvolumes
# count: a writable one may have changed. A parent UUID says nothing, as its subvolume may be gone.
########################################################################################################


class Subvolume(NamedTuple):
    """A subvolume as `BTRFS_IOC_GET_SUBVOL_INFO` tells it; UUIDs as text, None where null; otime in ns."""

    name: str
    uuid: Optional[str]
    parent_uuid: Optional[str] = None
    received_uuid: Optional[str] = None
    readonly: bool = True
    otime: int = 0
    otransid: int = 0
    subvolid: int = 0
    generation: int = 0

    @property
    def stream_id(self) -> Optional[str]:
        return self.received_uuid or self.uuid

    @property
    def is_received(self) -> bool:
        return self.readonly and self.received_uuid is not None


class Broken(NamedTuple):
    """A backup that cannot be restored, and why; one that is lost can be sent again under its name."""

    name: str
    why: str
    is_lost: bool = False


class Mark(NamedTuple):
    """A place in a stream: bytes before it, and a hash of the commands since the mark before.

    It is the SHA-256 of their headers, which hold length, kind and the CRC of all else. Hashing every byte
    took a quarter more processor time of a whole local transfer, even where the processor helps with it.
    """

    offset: int
    sha256: str


class ResumePoint(NamedTuple):
    """How far a partial backup has come: the stream goes on at `offset` if its beginning fits the marks.

    file_data: bytes of file contents so far, for progress. complete: nothing but the final name is missing. acl: the
    default ACL that the top folder has there in the stream, as hex; the partial has none before its end.
    """

    marks: Tuple[Mark, ...] = ()
    file_data: int = 0
    complete: bool = False
    acl: Optional[str] = None

    @property
    def offset(self) -> int:
        return self.marks[-1].offset if self.marks else 0

    @property
    def is_sound(self) -> bool:
        """Whether each mark lies behind the one before."""
        offsets = [0] + [mark.offset for mark in self.marks]
        return all(one < other for one, other in zip(offsets, offsets[1:]))


BEGINNING = ResumePoint()


class Record(NamedTuple):
    """What vouches for the partial backup of snapshot `name`, in a file beside it.

    stream_id, parent_id, compressed: what was being sent; base: the UUID of the parent's backup.
    version, ctransid: what the stream's header and first command say, for going on.
    piece: the name of the partial, which bears the received UUID `private`; '' where there is none.
    finished: the name of a piece that lacks nothing but its name, as of the boot with the id `boot`.
    """

    name: str
    stream_id: str
    parent_id: Optional[str] = None
    base: Optional[str] = None
    compressed: bool = False
    version: int = 1
    ctransid: int = 0
    piece: str = ""
    private: Optional[str] = None
    point: ResumePoint = BEGINNING
    finished: str = ""
    boot: str = ""


class Listing(NamedTuple):
    """What a folder holds: its subvolumes, the names of everything else, records of partials.

    chained: each needs the one that its parent UUID names, as stream files do.
    """

    subvolumes: Tuple[Subvolume, ...] = ()
    others: FrozenSet[str] = frozenset()
    chained: bool = False
    broken: Tuple[Broken, ...] = ()
    records: Tuple[Record, ...] = ()

    def named(self, name: str) -> Optional[Subvolume]:
        return next((s for s in self.subvolumes if s.name == name), None)

    def record_of(self, name: str) -> Optional[Record]:
        return next((record for record in self.records if record.name == name), None)


def vouched_pieces(record: Record, subvolumes: Sequence[Subvolume]) -> List[Subvolume]:
    """The partials among `subvolumes` that a record vouches for."""
    known = {(record.piece, record.private), (record.finished, record.stream_id)}
    return [s for s in subvolumes if s.is_received and partial_of(s.name) == record.name
            and (s.name, s.received_uuid) in known]


def by_creation(subvolume: Subvolume) -> Tuple[int, int, str]:
    """What subvolumes are sorted by: when the original was created, of which for a received one its name tells."""
    prefix = prefix_of(subvolume.name) if subvolume.received_uuid is not None else None
    named = snapshot_time(prefix, subvolume.name) if prefix is not None else None
    return subvolume.otime if named is None else int(named * 10 ** 9), subvolume.otransid, subvolume.name


def snapshots_of(listing: Listing, prefix: str) -> List[Subvolume]:
    """The snapshots of `prefix` in a snapshot folder, oldest first."""
    found = [s for s in listing.subvolumes if s.readonly and name_time(prefix, s.name)]
    return sorted(found, key=by_creation)


def snapshot_prefixes(listing: Listing) -> Dict[str, int]:
    """How many snapshots of each prefix a folder holds."""
    prefixes = [prefix_of(s.name) for s in listing.subvolumes if s.readonly]
    return dict(collections.Counter(prefix for prefix in prefixes if prefix is not None))


def corresponds(snapshot: Subvolume, backup: Subvolume) -> bool:
    """Whether `backup` is a complete copy of `snapshot`."""
    return (snapshot.readonly and backup.readonly and snapshot.stream_id is not None
            and snapshot.stream_id in (backup.received_uuid, backup.uuid))


def copies_by_id(listing: Listing) -> Dict[str, List[Subvolume]]:
    """The complete backups of a folder by each id that a snapshot can be known by, the oldest first.

    `btrfs receive` looks for a parent among received UUIDs first, so what was received comes before its original.
    """
    complete = [b for b in listing.subvolumes if b.readonly and partial_of(b.name) is None]
    complete.sort(key=lambda backup: (backup.otime, backup.otransid))
    index: Dict[str, List[Subvolume]] = {}
    for backup in complete:
        if backup.received_uuid:
            index.setdefault(backup.received_uuid, []).append(backup)
    for backup in complete:
        if backup.uuid:
            index.setdefault(backup.uuid, []).append(backup)
    return index


def base_among(snapshot: Subvolume, copies: Sequence[Subvolume]) -> Optional[Subvolume]:
    """The backup of a snapshot that others can build on: of several the one with its name.

    A copy that somebody made may have been changed since, which nothing shows.
    """
    return copies[0] if len(copies) == 1 else next((copy for copy in copies if copy.name == snapshot.name), None)


def common_snapshots(snapshots: Sequence[Subvolume], listing: Listing) -> List[Subvolume]:
    """Those of `snapshots` that have a complete backup in `listing`."""
    there = copies_by_id(listing)
    return [s for s in snapshots if s.stream_id in there]


def ambiguous_ids(snapshots: Sequence[Subvolume]) -> Set[str]:
    """Ids that several snapshots share: none of them can be told from the others."""
    counts = collections.Counter(s.stream_id for s in snapshots if s.stream_id)
    return {key for key, count in counts.items() if count > 1}


def base_index(snapshots: Sequence[Subvolume], listing: Listing) -> Dict[str, Subvolume]:
    """The backups that can serve as base, by the id of the snapshot: it is complete on both sides, and unmistakable.

    The UUID of the base is said to `btrfs receive`; where clones in the stream need more, the receiver says so.
    """
    copies, ambiguous = copies_by_id(listing), ambiguous_ids(snapshots)
    bases = {s.stream_id: base_among(s, copies.get(s.stream_id or "", ())) for s in snapshots}
    return {key: base for key, base in bases.items() if key and base is not None and key not in ambiguous}


def parent_ids(snapshots: Sequence[Subvolume], listing: Listing) -> Set[str]:
    """The ids of snapshots that can serve as parent for a folder."""
    return set(base_index(snapshots, listing))


def snapshot_moment(prefix: str, snapshot: Subvolume) -> float:
    """Seconds since the epoch that retention counts a snapshot at.

    The name's time, but its creation where both agree but for a change of clock: in autumn an hour of names
    comes twice. A restored snapshot was created long after its name's time.
    """
    named, created = snapshot_time(prefix, snapshot.name) or 0.0, snapshot.otime / 1e9
    return created if abs(created - named) <= 7200 else named


def backup_moments(prefix: str, backups: Sequence[Subvolume], snapshots: Sequence[Subvolume]) -> Dict[str, float]:
    """The moments of backups by name: those of their snapshots where these still exist."""
    known = {s.stream_id: snapshot_moment(prefix, s) for s in snapshots}
    return {b.name: known.get(b.received_uuid, snapshot_time(prefix, b.name) or 0.0) for b in backups}


def backups_of(listing: Listing, prefix: str) -> List[Subvolume]:
    """The received, complete backups of `prefix` in a folder: all that retention may ever delete there."""
    return [s for s in listing.subvolumes if s.is_received and name_time(prefix, s.name)]


########################################################################################################
# OWNERS: what notes say of a source and its destinations, and whose a folder of backups is
#
# Locks say which transfers have begun and not ended, pins what a destination was last seen to have in common with the
# source, by filesystem, so that disks may take turns. A folder of backups is a source's by its note, by what it holds,
# or by the pins; else it is free, or of others.
########################################################################################################

Locks = Dict[str, Dict[str, List[str]]]  # {snapshot: {"locks": [destination], "parent_locks": [...]}}


class Pin(NamedTuple):
    """The newest snapshot that a destination on one filesystem is known to have in common with the source.

    `filesystem` is the UUID of the filesystem the destination was seen on; `sent` the ids of all that a
    destination has got which cannot be listed.
    """

    name: str
    uuid: str
    time: str
    filesystem: Optional[str] = None
    sent: Tuple[str, ...] = ()


PinsOfPrefix = Dict[str, Tuple[Pin, ...]]  # {destination: pins}, one for each filesystem that was mounted there


def with_pin(pins: Tuple[Pin, ...], pin: Pin) -> Tuple[Pin, ...]:
    """The pins of a destination with that of one filesystem set; those of disks that take turns with it stay."""
    return tuple(other for other in pins if other.filesystem != pin.filesystem) + (pin,)


class FolderNotes(NamedTuple):
    """What a folder itself tells of the snapshots of one prefix in it.

    sources: what tells the source whose they are, the latest last: UUIDs that its subvolume has had.
    """

    sources: Tuple[str, ...] = ()
    locks: Locks = {}
    pins: PinsOfPrefix = {}


NO_NOTES = FolderNotes()


class Owner(NamedTuple):
    """A source that asks whether the backups in a folder are its own. `ids`: what notes there would call it.

    pins: its own of that place, on whatever filesystem.
    """

    snapshots: Sequence[Subvolume]
    ids: Tuple[str, ...] = ()
    pins: Tuple[Pin, ...] = ()


OURS, FREE, OF_OTHERS = "ours", "free", "of others"
MOST_SOURCE_IDS = 256  # in a note; each time that a source is restored in place or rolled back it has another


def whose(owner: Owner, listing: Listing, prefix: str, noted: Sequence[str], filesystem: Optional[str]) -> str:
    """Whose the backups of `prefix` in a folder are: OURS, FREE (there are none) or OF_OTHERS.

    Identity comes first, of snapshots and of what is remembered, so that a source that was restored or replaced goes
    on; then the note of the folder; without one, as of release 0.7.0, whether the source remembers the place. But where
    a note names others alone, backups of snapshots of this very subvolume are from before there were notes: since then
    it would be in it. Two sources have shared the folder.
    """
    ids, is_noted = copies_by_id(listing), bool(set(noted) & set(owner.ids))
    is_mixed = any(s.stream_id in ids and s.received_uuid is None and s.parent_uuid in owner.ids
                   for s in owner.snapshots)
    if is_mixed and noted and not is_noted and len(noted) < MOST_SOURCE_IDS:
        return OF_OTHERS
    known = [s.stream_id for s in owner.snapshots] + [pin.uuid for pin in owner.pins]
    if is_noted or any(key in ids for key in known):
        return OURS
    if any(record.stream_id in known for record in listing.records):  # of a first transfer that was broken off
        return OURS
    if noted:
        names = [partial_of(s.name) or s.name for s in listing.subvolumes]
        return OF_OTHERS if any(name_time(prefix, name) for name in names) else FREE
    if any(pin.filesystem in (None, filesystem) for pin in owner.pins):
        return OURS
    return OF_OTHERS if backups_of(listing, prefix) else FREE


def claimed(owner: Owner, noted: Tuple[str, ...], found: str) -> Tuple[str, ...]:
    """What the note of a folder says once `owner` has sent there; `found`: whose it was.

    One that is full stays as it is, for nobody's id may go from it; what is sent tells the source from then on.
    """
    before = () if found == FREE else tuple(key for key in noted if key not in owner.ids)
    after = before + owner.ids
    return noted if len(after) > MOST_SOURCE_IDS else after


def is_command(text: str) -> bool:
    """Whether a destination's id in locks and pins is a command's."""
    return text.startswith(COMMAND.here + "://")


def normal_destination(text: str) -> str:
    """A destination's id as it is compared: locks of other programs may end with a slash."""
    return text if is_command(text) else text.rstrip("/") or "/"


def locked_names(locks: Locks, destination: str, kind: str = "locks") -> List[str]:
    return [name for name, entry in locks.items() if destination in map(normal_destination, entry.get(kind, ()))]


def split_lock_name(name: str) -> Tuple[str, Optional[str]]:
    """The snapshot that an entry of locks is of, and the filesystem of its destinations where it is bound to one.

    Bound entries are further ones beside the plain one of a snapshot: "SNAPSHOT on FILESYSTEM". That is no snapshot's
    name, so that release 0.6.6, which takes no further keys, reads past them.
    """
    snapshot, on, filesystem = name.rpartition(" on ")
    return (snapshot, filesystem) if on and prefix_of(snapshot) is not None else (name, None)


def own_locks(locks: Locks, prefix: str) -> Locks:
    """The locks of snapshots of `prefix`: those of others are never touched."""
    return {name: entry for name, entry in locks.items() if name_time(prefix, split_lock_name(name)[0])}


########################################################################################################
# PLANNING: observed state to a plan of transfers and deletions
#
# Pure: listings, locks and pins in, values out; `--dry-run` prints them, a run executes them. The
# parent of a transfer is the nearest older snapshot complete on both sides, else the nearest newer;
# what one transfer brings is a parent for the next. Never planned: a deletion at a destination whose
# listing or transfer failed, a transfer over a name that something else bears, a deletion of a partial
# that no lock names.
########################################################################################################

LOCK_KINDS = ("locks", "parent_locks")


class Transfer(NamedTuple):
    """One snapshot to one destination; parent None sends in full."""

    snapshot: Subvolume
    parent: Optional[Subvolume]


class Recovery(NamedTuple):
    """What is done about a lock: `delete` these half-received subvolumes, then clear the lock.

    Where there is something to `take_up`, that and the lock stay until the transfer goes on from it. Where `problem`
    says something, the lock stays, and with it the snapshot is not sent.
    """

    snapshot: str
    delete: Tuple[Subvolume, ...] = ()
    problem: str = ""
    take_up: Optional[Record] = None


def left_remedy(hint: str, path: str, is_raw: bool, machine: str = "") -> str:
    """How to delete what a broken transfer has left and no lock names."""
    words = ["rm"] if is_raw else ["btrfs", "subvolume", "delete"]
    return "{}, delete it{}: {}".format(hint, " on {}".format(machine) if machine else "", typed(words + [path]))


class Problem(NamedTuple):
    """A snapshot that cannot be sent, and why. `left`: what is in its way, perhaps left by a broken transfer."""

    snapshot: str
    text: str
    hint: str = ""
    left: str = ""
    is_raw: bool = False

    def remedy(self, folder: str, machine: str = "") -> str:
        """What to do about it in the folder where it is, on `machine`."""
        if not self.left:
            return self.hint
        return left_remedy(self.hint, os.path.join(folder, self.left), self.is_raw, machine)


class DestinationPlan(NamedTuple):
    recoveries: Tuple[Recovery, ...] = ()
    transfers: Tuple[Transfer, ...] = ()
    skipped: Tuple[Verdict, ...] = ()
    problems: Tuple[Problem, ...] = ()


def locks_on(locks: Locks, filesystem: Optional[str] = None) -> Locks:
    """The locks by snapshot, as they are where `filesystem` is mounted; None: on any of the disks that take turns.

    A lock of which nothing says where it was set holds wherever.
    """
    bound: Dict[Tuple[str, str, str], Set[Optional[str]]] = {}
    for name, entry in locks.items():
        snapshot, where = split_lock_name(name)
        for kind in LOCK_KINDS:
            for destination in entry.get(kind, ()):
                bound.setdefault((snapshot, kind, normal_destination(destination)), set()).add(where)
    found: Locks = {}
    for (snapshot, kind, destination), places in bound.items():
        if filesystem is None or filesystem in places or places == {None}:
            found.setdefault(snapshot, {one: [] for one in LOCK_KINDS})[kind].append(destination)
    return found


def plan_recovery(name: str, snapshot: Optional[Subvolume], listing: Listing,
                  usable: Sequence[Record] = ()) -> Recovery:
    """What to do about the lock of snapshot `name` (None: it is gone) at a destination that holds `listing`.

    A partial under its own name goes, unless one of the `usable` records vouches for it. Under the final name only what
    is provably half-received goes: writable and without a received UUID, as release 0.6.6 left it.
    """
    pieces = [s for s in listing.subvolumes if partial_of(s.name) == name]
    final = listing.named(name)
    if final is not None and not final.readonly:
        if final.received_uuid is not None:
            return Recovery(name, tuple(pieces), "{} is writable but has a received UUID, so it is not provably "
                                                 "a broken transfer".format(name))
        return Recovery(name, tuple(pieces) + (final,))
    if final is not None and snapshot is not None and not corresponds(snapshot, final):
        return Recovery(name, tuple(pieces), "{} is another subvolume (received UUID {}, expected {})".format(
            name, final.received_uuid, snapshot.stream_id))
    record = listing.record_of(name)
    kept = vouched_pieces(record, pieces) if record in usable and final is None and record is not None else []
    return Recovery(name, tuple(s for s in pieces if s not in kept), "", record if kept else None)


def usable_records(snapshots: Sequence[Subvolume], listing: Listing, incremental: bool) -> List[Record]:
    """The records in a folder whose transfers can go on: snapshot and parent are what they were, on both sides."""
    known = {s.name: s for s in snapshots}
    bases = base_index(snapshots, listing)
    usable = []
    for record in listing.records:
        snapshot = known.get(record.name)
        parent_is_there = record.parent_id is None or (
            incremental and record.parent_id in bases and bases[record.parent_id].uuid == record.base)
        if snapshot is not None and snapshot.stream_id == record.stream_id and parent_is_there:
            usable.append(record)
    return usable


def plan_recoveries(locks: Locks, destination: str, snapshots: Sequence[Subvolume], listing: Listing,
                    usable: Sequence[Record] = ()) -> List[Recovery]:
    known = {s.name: s for s in snapshots}
    return [plan_recovery(name, known.get(name), listing, usable)
            for name in sorted(locked_names(locks, destination))]


def left_traces(snapshots: Sequence[Subvolume], listing: Listing) -> List[str]:
    """Snapshots whose backup is complete beside the record or lock of its partial, as a power failure leaves them."""
    pairs = [(s, listing.named(s.name)) for s in snapshots
             if {record_name(s.name), partial_lock_name(s.name)} & listing.others]
    return [snapshot.name for snapshot, backup in pairs if backup is not None and corresponds(snapshot, backup)]


def without_taking_up(recovery: Recovery, listing: Listing) -> Recovery:
    """The same for a snapshot that will not be sent: all of its partial goes."""
    return recovery._replace(take_up=None, delete=recovery.delete + tuple(
        s for s in listing.subvolumes if partial_of(s.name) == recovery.snapshot and s not in recovery.delete))


def parent_of_record(record: Record, snapshots: Sequence[Subvolume]) -> Optional[Subvolume]:
    return next((s for s in snapshots if record.parent_id is not None and s.stream_id == record.parent_id), None)


def choose_parent(snapshot: Subvolume, ordered: Sequence[Subvolume], common: Set[str]) -> Optional[Subvolume]:
    """The nearest older of `ordered` (by creation) whose id is in `common`, else the nearest newer."""
    usable = [s for s in ordered if s.stream_id in common and s.stream_id != snapshot.stream_id]
    older = [s for s in usable if by_creation(s) < by_creation(snapshot)]
    return older[-1] if older else usable[0] if usable else None


def chain_lengths(listing: Listing) -> Dict[Optional[str], int]:
    """How many streams restoring each backup of a chained listing takes, by stream id."""
    parents = {s.stream_id: s.parent_uuid for s in listing.subvolumes if s.stream_id} if listing.chained else {}
    lengths: Dict[Optional[str], int] = {}
    for start in parents:
        chain: List[Optional[str]] = []
        at: Optional[str] = start
        while at in parents and at not in lengths and at not in chain:
            chain.append(at)
            at = parents[at]
        for length, link in enumerate(reversed(chain), lengths.get(at, 0) + 1):
            lengths[link] = length
    return lengths


def within_chain(parent: Optional[Subvolume], lengths: Dict[Optional[str], int], longest: int) -> Optional[Subvolume]:
    """The parent, or None where a child of it would make the chain longer than `longest` (0: any length)."""
    return parent if parent is None or not longest or lengths.get(parent.stream_id, 0) < longest else None


NEEDS_IT = "needs it to be restored"


def keep_chains(verdicts: Sequence[Verdict], listing: Listing) -> List[Verdict]:
    """The verdicts, where what a kept backup needs to be restored is kept as well."""
    if not listing.chained:
        return list(verdicts)
    by_id: Dict[Optional[str], Subvolume] = {s.stream_id: s for s in listing.subvolumes if s.stream_id}
    by_name = {s.name: s for s in by_id.values()}
    judged = {v.name: v for v in verdicts}
    needed_by: Dict[str, str] = {}
    for child in (by_name[v.name] for v in verdicts if v.keep and v.name in by_name):
        parent = by_id.get(child.parent_uuid)
        while parent is not None and parent.name not in needed_by:
            needed_by[parent.name] = child.name
            child, parent = parent, by_id.get(parent.parent_uuid)
    return [v if v.keep or v.name not in needed_by else
            Verdict(v.name, True, "{} {}".format(needed_by[v.name], NEEDS_IT)) for v in judged.values()]


def describe_needed(verdicts: Sequence[Verdict], text: str, policy: Policy) -> str:
    """That backups at `text` stay which the policy does not keep, and what would let them go; "" where none does."""
    needed = sum(v.keep and v.reason.endswith(NEEDS_IT) for v in verdicts)
    kept = sum(v.keep for v in verdicts) - needed
    if not needed:
        return ""
    beyond = ("{} older than the newest {}" if policy == Policy(policy.newest) else "{} not to be kept").format(
        "is" if needed == 1 else "are", policy.newest)
    return "{} at {} {} but needed to restore what is kept; --raw-full-every {} would let {} go".format(
        plural(needed, "backup"), text, beyond, max(kept, 1), "it" if needed == 1 else "them")


def name_problem(snapshot: Subvolume, listing: Listing, cleared: Set[str]) -> Optional[Problem]:
    """Why a snapshot that has no backup in `listing` cannot get one under its name there."""
    broken = next((b for b in listing.broken if b.name == snapshot.name and not b.is_lost), None)
    if broken is not None:
        return Problem(snapshot.name, "its {} cannot be restored: {}".format(snapshot.name, broken.why),
                       "move it away, with its sidecar, to have it sent again")
    other = listing.named(snapshot.name)
    if other is not None and snapshot.name not in cleared:
        if other.readonly:
            return Problem(snapshot.name, "its {} is another subvolume (received UUID {}, expected {})".format(
                snapshot.name, other.received_uuid or "none", snapshot.stream_id), "move it away or delete it yourself")
        return Problem(snapshot.name, "its {} is a writable subvolume that no lock names".format(snapshot.name),
                       "if it is what a broken transfer left", other.name, listing.chained)
    if snapshot.name in listing.others:
        return Problem(snapshot.name, "its {} is no subvolume".format(snapshot.name), "move it away")
    orphan = next((s.name for s in listing.subvolumes if partial_of(s.name) == snapshot.name), None)
    if orphan is not None and orphan not in cleared:
        return Problem(snapshot.name, "its {} is a partial backup that no lock names".format(orphan),
                       "if no other run is writing it", orphan, listing.chained)
    return None


def plan_transfers(snapshots: Sequence[Subvolume], listing: Listing, prefix: str, policy: Policy, now: float,
                   recoveries: Sequence[Recovery] = (), incremental: bool = True, longest: int = 0) -> DestinationPlan:
    """What is sent to a destination that holds `listing`, in order, each with its parent.

    longest: of how many streams a chain may be, 0 is any number.
    """
    common = {s.stream_id for s in common_snapshots(snapshots, listing) if s.stream_id}
    ambiguous = ambiguous_ids(snapshots)
    missing = [s for s in snapshots if s.stream_id not in common or s.stream_id in ambiguous]
    times = backup_moments(prefix, backups_of(listing, prefix), snapshots)
    times.update({s.name: snapshot_moment(prefix, s) for s in missing})
    verdicts = {v.name: v for v in plan_retention(times, policy, {}, now)}
    cleared = {s.name for r in recoveries for s in r.delete}
    going_on = {r.snapshot: r.take_up for r in recoveries if r.take_up is not None}
    cleared |= {s.name for s in listing.subvolumes if partial_of(s.name) in going_on}
    blocked = {r.snapshot for r in recoveries if r.problem}
    parents, lengths = parent_ids(snapshots, listing), chain_lengths(listing)
    transfers, skipped, problems = [], [], []
    for snapshot in missing:
        problem = name_problem(snapshot, listing, cleared)
        if snapshot.stream_id in ambiguous:
            problems.append(Problem(snapshot.name, "{} has the same identity as another snapshot".format(snapshot.name),
                                    "they were taken of a subvolume with a received UUID; delete all but one"))
        elif not verdicts[snapshot.name].keep:
            skipped.append(verdicts[snapshot.name])
        elif snapshot.name not in blocked and problem:
            problems.append(problem)
        elif snapshot.name not in blocked:
            if snapshot.name in going_on:
                parent = parent_of_record(going_on[snapshot.name], snapshots)
            else:
                parent = choose_parent(snapshot, snapshots, parents) if incremental else None
                parent = within_chain(parent, lengths, longest)
            transfers.append(Transfer(snapshot, parent))
            parents.add(snapshot.stream_id or "")
            lengths[snapshot.stream_id] = 1 + (lengths.get(parent.stream_id, 0) if parent else 0)
    sent = {transfer.snapshot.name for transfer in transfers}
    recoveries = [r if r.take_up is None or r.snapshot in sent else without_taking_up(r, listing) for r in recoveries]
    return DestinationPlan(tuple(recoveries), tuple(transfers), tuple(skipped), tuple(problems))


def lock_reasons(locks: Locks) -> Dict[str, str]:
    """Why the snapshots that locks and parent notes name are kept."""
    reasons = {}
    for name, entry in locks_on(locks).items():
        if entry.get("parent_locks"):
            reasons[name] = "parent of an unfinished transfer to {}".format(printable(entry["parent_locks"][0]))
        if entry.get("locks"):
            reasons[name] = "locked for {}".format(printable(entry["locks"][0]))
    return reasons


def newest_common(snapshots: Sequence[Subvolume], listing: Listing) -> Optional[Subvolume]:
    """The newest snapshot, by creation, that can serve as parent for `listing`'s folder."""
    usable = parent_ids(snapshots, listing)
    return next((s for s in reversed(snapshots) if s.stream_id in usable), None)


def pin_reasons(pins: PinsOfPrefix, subvolumes: Sequence[Subvolume]) -> Dict[str, str]:
    """Why the snapshots that pins name are kept."""
    return {s.name: "newest in common with {}".format(printable(destination)) for destination, entry in pins.items()
            for pin in entry for s in subvolumes if s.stream_id == pin.uuid}


def plan_source_retention(snapshots: Sequence[Subvolume], prefix: str, policy: Policy, locks: Locks,
                          pins: PinsOfPrefix, now: float) -> List[Verdict]:
    """Verdicts on the snapshots. pins: with those of what was seen just now."""
    protected = pin_reasons(pins, snapshots)
    protected.update(lock_reasons(locks))
    return plan_retention({s.name: snapshot_moment(prefix, s) for s in snapshots}, policy, protected, now)


def is_unfinished(subvolume: Subvolume) -> bool:
    """Whether a subvolume is, by its name and state, of a transfer that is under way or was broken off."""
    name = partial_of(subvolume.name)
    return prefix_of(name or subvolume.name) is not None and (name is not None or not subvolume.readonly)


def known_protections(listing: Listing, prefix: str, notes: FolderNotes) -> Dict[str, str]:
    """Why backups stay that the policy does not keep, as far as their folder itself tells."""
    backups = backups_of(listing, prefix)
    reasons = pin_reasons(notes.pins, backups)
    reasons.update(lock_reasons(own_locks(notes.locks, prefix)))
    building = [(s.name, s.parent_uuid) for s in listing.subvolumes if is_unfinished(s)]
    building += [(partial_name(record.name), record.base) for record in listing.records]
    for name, base in building:
        reasons.update({b.name: "the unfinished {} builds on it".format(name) for b in backups if b.uuid == base})
    return reasons


def plan_destination_retention(snapshots: Sequence[Subvolume], listing: Listing, prefix: str, policy: Policy,
                               now: float, notes: FolderNotes = NO_NOTES) -> List[Verdict]:
    """Verdicts on the backups of one destination. notes: what its folder tells."""
    newest = newest_common(snapshots, listing)
    protected = known_protections(listing, prefix, notes)
    if newest is not None:
        protected.update({b.name: "newest in common with the source" for b in listing.subvolumes
                          if corresponds(newest, b)})
    times = backup_moments(prefix, backups_of(listing, prefix), snapshots)
    return keep_chains(plan_retention(times, policy, protected, now), listing)


def deletions(verdicts: Iterable[Verdict]) -> List[Verdict]:
    return [v for v in verdicts if not v.keep]


def after_transfers(listing: Listing, plan: DestinationPlan) -> Listing:
    """What the folder holds when everything planned for it has succeeded: for showing what follows."""
    gone = {s.name for r in plan.recoveries for s in r.delete}
    stay = tuple(s for s in listing.subvolumes if s.name not in gone)
    come = tuple(t.snapshot._replace(uuid=None, received_uuid=t.snapshot.stream_id,
                                     parent_uuid=t.parent.stream_id if t.parent else None) for t in plan.transfers)
    return listing._replace(subvolumes=stay + come)


########################################################################################################
# PART IV THE STREAM: what passes from btrfs send to btrfs receive
########################################################################################################


########################################################################################################
# STREAM: the stream as btrfs writes it, and its first command
#
# A header of 17 bytes, then commands: `le32 length | le16 command | le32 crc32c | payload` of attributes `le16 type |
# le16 length | data` (btrfs-progs, send.h). The first says which subvolume `btrfs receive` makes, on which parent: it
# must be what was planned.
########################################################################################################

STREAM_MAGIC = b"btrfs-stream\0"
STREAM_HEADER = struct.Struct("<13sI")
COMMAND_HEADER = struct.Struct("<IHI")
COMMAND_START = struct.Struct("<IH")
HEADER_BYTES = struct.Struct("10s")
ATTRIBUTE = struct.Struct("<HH")
(SUBVOL, SNAPSHOT, MKFILE, MKDIR, MKNOD, MKFIFO, MKSOCK, SYMLINK, RENAME, LINK, UNLINK, RMDIR, SET_XATTR, REMOVE_XATTR,
 WRITE, CLONE, TRUNCATE, CHMOD, CHOWN, UTIMES, END, UPDATE_EXTENT, FALLOCATE, FILEATTR, ENCODED_WRITE) = range(1, 26)
(A_UUID, A_CTRANSID, A_INO, A_SIZE, A_MODE, A_UID, A_GID, A_RDEV, A_CTIME, A_MTIME, A_ATIME, A_OTIME, A_XATTR_NAME,
 A_XATTR_DATA, A_PATH, A_PATH_TO, A_PATH_LINK, A_FILE_OFFSET, A_DATA, A_CLONE_UUID, A_CLONE_CTRANSID,
 A_CLONE_PATH) = range(1, 23)
A_CLONE_LEN, A_UNENCODED_FILE_LEN, A_ENCRYPTION = 24, 27, 31
LARGEST_FIRST_COMMAND = 64 * 1024
LARGEST_PATH, LARGEST_NAME = 4095, 255  # bytes (Linux, PATH_MAX and NAME_MAX)

# relative, and every part of it the name of something: not empty, not `.` or `..`, without a NUL
PLAIN_PATH = re.compile(rb"(?:(?!\.{1,2}(?:/|\Z))[^/\0]{1,255}(?:/(?!\Z)|\Z))+")
LARGEST_COMMAND = 1 << 20  # bytes; the kernel's are below 200 KiB
Chunk = Union[bytes, memoryview]
CommandSpan = Tuple[int, int, int]  # start, end and number of a command
Block = Tuple[Chunk, List[CommandSpan]]  # whole commands, and the wanted ones of them
Judge = Callable[[Chunk, int, int, int], None]  # takes data, and start, end and number of a command in it
SEND_WRITE_SIZE = 48 * 1024  # data bytes in one WRITE of protocol 1 (Linux, BTRFS_SEND_READ_SIZE)

# `btrfs receive` before 6.2 keeps these in mind until the file's next chown, which drops them
CAPABILITY = b"security.capability"
WRITE_OVERHEAD = 30  # bytes of a WRITE of protocol 1 that are neither path nor data


@functools.lru_cache(maxsize=None)
def crc32c_table() -> List[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


def crc32c(data: bytes) -> int:
    """CRC-32C as send streams use it: seed 0, no final inversion."""
    table, value = crc32c_table(), 0
    for byte in data:
        value = (value >> 8) ^ table[(value ^ byte) & 0xFF]
    return value


def make_command(number: int, attributes: Iterable[Tuple[int, bytes]]) -> bytes:
    payload = b"".join(ATTRIBUTE.pack(kind, len(data)) + data for kind, data in attributes)
    checksum = crc32c(COMMAND_HEADER.pack(len(payload), number, 0) + payload)
    return COMMAND_HEADER.pack(len(payload), number, checksum) + payload


def parse_attributes(payload: bytes) -> List[Tuple[int, bytes]]:
    """The attributes of a command that holds no DATA of protocol 2."""
    found, at = [], 0
    while at + ATTRIBUTE.size <= len(payload):
        kind, size = ATTRIBUTE.unpack_from(payload, at)
        found.append((kind, bytes(payload[at + 4:at + 4 + size])))
        at += 4 + size
    return found


def format_uuid(raw: bytes) -> Optional[str]:
    """16 bytes as text, None where all are 0."""
    text = raw.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])) if any(raw) else None


def parse_uuid(text: str) -> bytes:
    """The 16 bytes of a UUID given as text."""
    return bytes.fromhex(text.replace("-", ""))


class FirstCommand(NamedTuple):
    number: int
    attributes: List[Tuple[int, bytes]]
    end: int  # where the next command begins in the stream

    def uuid(self, kind: int) -> Optional[str]:
        return next((format_uuid(data) for found, data in self.attributes if found == kind), None)

    def number_of(self, kind: int) -> int:
        return next((int.from_bytes(data, "little") for found, data in self.attributes if found == kind), 0)

    @property
    def name(self) -> str:
        return os.fsdecode(next((data for kind, data in self.attributes if kind == A_PATH), b""))


def parse_first_command(start: bytes) -> Optional[FirstCommand]:
    """The first command of a stream that begins with `start`, None while more bytes are needed."""
    if len(start) < STREAM_HEADER.size + COMMAND_HEADER.size:
        return None
    if not start.startswith(STREAM_MAGIC):
        raise BackupError("what arrived is no btrfs send stream")
    length, number, checksum = COMMAND_HEADER.unpack_from(start, STREAM_HEADER.size)
    if number not in (SUBVOL, SNAPSHOT) or length > LARGEST_FIRST_COMMAND:
        raise BackupError("the stream does not begin with a subvolume")
    end = STREAM_HEADER.size + COMMAND_HEADER.size + length
    if len(start) < end:
        return None
    payload = start[end - length:end]
    if crc32c(COMMAND_HEADER.pack(length, number, 0) + payload) != checksum:
        raise BackupError("the first command of the stream is damaged")
    attributes = parse_attributes(payload)
    if len(dict(attributes)) < len(attributes):  # btrfs receive takes the last of two
        raise BackupError("the first command of the stream says something twice")
    return FirstCommand(number, attributes, end)


class ExpectedStream(NamedTuple):
    """What was planned: the names and ids of a stream, and owner and mode of its top folder.

    `base` is the UUID of the backup that the parent is at the destination, `compressed` how it is sent.
    """

    name: str
    uuid: str
    parent_uuid: Optional[str]
    uid: int
    gid: int
    mode: int
    base: Optional[str] = None
    parent_name: Optional[str] = None
    otime: int = 0  # ns, when the snapshot was taken
    compressed: bool = False


def is_uuid(text: Optional[str]) -> bool:
    return text is not None and re.fullmatch("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text) is not None


def check_expected(expected: ExpectedStream) -> None:
    """BackupError unless what another machine says of a stream is fit to become the name and ids of a partial here."""
    name = os.fsencode(expected.name)
    if not PLAIN_PATH.fullmatch(name) or b"/" in name or name.startswith(b".") or len(name) > LARGEST_NAME:
        raise BackupError("{} is no name of a snapshot".format(printable(repr(expected.name))))
    if not is_uuid(expected.uuid) or not all(is_uuid(uuid) for uuid in (expected.parent_uuid, expected.base) if uuid):
        raise BackupError("the ids of {} are no UUIDs".format(printable(expected.name)))
    if not (0 <= expected.uid < 1 << 32 and 0 <= expected.gid < 1 << 32 and 0 <= expected.mode <= 0o7777):
        raise BackupError("owner and mode of {} are none".format(printable(expected.name)))


def check_first_command(first: FirstCommand, expected: ExpectedStream) -> None:
    found = (first.name, first.uuid(A_UUID), first.uuid(A_CLONE_UUID) if first.number == SNAPSHOT else None)
    planned = (expected.name, expected.uuid, expected.parent_uuid)
    if found != planned:
        raise BackupError("the stream is not the planned one: it names {}, uuid {}, parent {} instead of {}, {}, {}"
                          .format(*(printable(str(part)) for part in found + planned)))


def contents_length(data: Chunk, at: int, length: int, command: int) -> int:
    """About the bytes of file that the write at `at` stands for."""
    if length < 4:
        return length
    path_length = ATTRIBUTE.unpack_from(data, at + 10)[1]
    if command == WRITE:
        return length - path_length - WRITE_OVERHEAD + COMMAND_HEADER.size
    third = at + 14 + path_length + 12
    if third + 12 <= len(data) and ATTRIBUTE.unpack_from(data, third)[0] == A_UNENCODED_FILE_LEN:
        return struct.unpack_from("<Q", data, third + 4)[0]
    return length


class CommandReader:
    """Cuts a stream that comes in chunks of any size into blocks of whole commands.

    of_top: commands that are wanted where their path comes first and is empty, the top folder's. judge: sees each
    whole command once, before it is passed. `file_data` counts bytes of file contents, before compression.
    """

    def __init__(self, wanted: Iterable[int], skip: int = 0, of_top: Iterable[int] = (),
                 judge: Optional[Judge] = None) -> None:
        self.wanted, self.of_top, self.judge = frozenset(wanted), frozenset(of_top), judge
        self.skip, self.carry, self.file_data = skip, bytearray(), 0
        self.headers: Optional[List[bytes]] = None  # of the commands that have passed, where somebody takes them

    def feed(self, chunk: Chunk) -> Iterator[Block]:
        """The commands that are whole now, and where the wanted ones of them are."""
        view = memoryview(chunk)
        if self.skip and len(view):
            passed, view = view[:self.skip], view[self.skip:]
            self.skip -= len(passed)
            yield passed, []
        while self.carry and len(view):
            missing = self.missing()
            self.carry += view[:missing]
            view = view[missing:]
            if not self.missing():
                block, self.carry = bytes(self.carry), bytearray()
                yield block, self.scan(block)[1]
        while len(view):
            whole, spans = self.scan(view)
            if not whole:
                break
            yield view[:whole], spans
            view = view[whole:]
        if len(view):
            self.carry += view
            self.missing()

    def missing(self) -> int:
        """How many bytes the carried command lacks, as far as is known."""
        if len(self.carry) < COMMAND_HEADER.size:
            return COMMAND_HEADER.size - len(self.carry)
        length = COMMAND_START.unpack_from(self.carry)[0]
        if length > LARGEST_COMMAND:
            raise StreamDamaged("the stream is damaged: it holds a command of {} bytes".format(length))
        return COMMAND_HEADER.size + length - len(self.carry)

    def take_headers(self) -> bytes:
        """The headers of the commands that have passed since the last time."""
        headers, self.headers = b"".join(self.headers or ()), []
        return headers

    def scan(self, data: Chunk) -> Tuple[int, List[CommandSpan]]:
        """The length of the whole commands at the start of `data`, and the wanted ones among them.

        One that sets capabilities begins a block, for there one may have to go back to.
        """
        at, size, wanted, of_top = 0, len(data), self.wanted, self.of_top
        start_of, header_of = COMMAND_START.unpack_from, HEADER_BYTES.unpack_from
        note, judge = self.headers.append if self.headers is not None else None, self.judge
        spans: List[CommandSpan] = []
        while at + 10 <= size:
            length, command = start_of(data, at)
            after = at + 10 + length
            if after > size:
                break
            if command == SET_XATTR and at and command in wanted and CAPABILITY in bytes(data[at:after]):
                break
            if judge is not None:
                judge(data, at, after, command)
            if note is not None:
                note(header_of(data, at)[0])
            if command in wanted:
                spans.append((at, after, command))
            elif command in of_top:
                if length >= 4 and not data[at + 12] and not data[at + 13]:
                    spans.append((at, after, command))
            elif command in (WRITE, ENCODED_WRITE):
                self.file_data += contents_length(data, at, length, command)
            at = after
        return at, spans


class SizeMeter:
    """Computes from a `btrfs send --no-data` stream what the full stream will weigh.

    `stream_size` is exact for protocol 1: every byte but the UPDATE_EXTENT commands, and for each of
    those its data in pieces of 48 KiB with their headers. `file_data` is the data alone.
    """

    def __init__(self) -> None:
        self.reader = CommandReader((UPDATE_EXTENT, END), STREAM_HEADER.size)
        self.stream_size = self.file_data = 0
        self.ended = False

    def feed(self, chunk: bytes) -> None:
        for data, spans in self.reader.feed(chunk):
            self.stream_size += len(data)
            self.count(data, spans)

    def count(self, data: Chunk, spans: Sequence[CommandSpan]) -> None:
        for start, end, command in spans:
            if command == END:
                self.ended = True
                continue
            size = struct.unpack_from("<Q", data, end - 8)[0]
            path_length = ATTRIBUTE.unpack_from(data, start + 10)[1]
            self.file_data += size
            self.stream_size += start - end + size + -(-size // SEND_WRITE_SIZE) * (WRITE_OVERHEAD + path_length)


########################################################################################################
# GATE: what a stream that others could have made may do
#
# What this machine's own kernel did not write in this run passes here. Each command is judged by what `btrfs receive`
# would do with it, every path attribute wherever it stands. Never: a command passed on that reaches beyond its own
# subvolume and its parent.
########################################################################################################

PATHS = frozenset((A_PATH, A_PATH_TO, A_PATH_LINK, A_CLONE_PATH))
OF_ANY_FOLDER = frozenset((SET_XATTR, REMOVE_XATTR, CHMOD, CHOWN, UTIMES, FILEATTR))  # the top one is called ''

# The last command and the last attribute of each protocol that is asked for here.
PROTOCOLS = {1: (END, A_CLONE_LEN), 2: (ENCODED_WRITE, A_ENCRYPTION)}

# What Linux writes after the path in the commonest commands: pairs of kind and length.
USUAL = {
    MKFILE: (struct.Struct("<HH8x"), (A_INO, 8)), MKDIR: (struct.Struct("<HH8x"), (A_INO, 8)),
    TRUNCATE: (struct.Struct("<HH8x"), (A_SIZE, 8)), CHMOD: (struct.Struct("<HH8x"), (A_MODE, 8)),
    CHOWN: (struct.Struct("<HH8xHH8x"), (A_UID, 8, A_GID, 8)),
    UTIMES: (struct.Struct("<HH12xHH12xHH12x"), (A_ATIME, 12, A_MTIME, 12, A_CTIME, 12)),
    UNLINK: (struct.Struct(""), ()), RMDIR: (struct.Struct(""), ())}  # type: Dict[int, Tuple[struct.Struct, Any]]
USUAL_WRITE = struct.Struct("<HH8xHH")  # between path and data in protocol 1


def hostile(what: str, path: bytes = b"") -> BackupError:
    return BackupError("the stream holds {}{}".format(what, ": " + printable(os.fsdecode(path)) if path else ""),
                       "nothing was changed but the partial backup; look at the machine that it comes from")


def read_attributes(data: Chunk, start: int, end: int, version: int) -> Dict[int, bytes]:
    """The attributes of the command from `start` to `end`, cut as `btrfs receive` cuts them; of DATA nothing.

    BackupError where it would take another one than the first, or none.
    """
    found: Dict[int, bytes] = {}
    at = start + COMMAND_HEADER.size
    while at < end:
        if version >= 2 and end - at >= 2 and struct.unpack_from("<H", data, at)[0] == A_DATA:
            kind, size, at = A_DATA, end - at - 2, at + 2
        elif end - at < ATTRIBUTE.size:
            raise hostile("a command that is cut off")
        else:
            kind, size = ATTRIBUTE.unpack_from(data, at)
            at += ATTRIBUTE.size
        if at + size > end or kind in found or not 1 <= kind <= PROTOCOLS[version][1]:
            raise hostile("a command with an attribute that is repeated, cut off or unknown")
        found[kind] = b"" if kind == A_DATA else bytes(data[at:at + size])
        at += size
    return found


Hazard = Tuple[bytes, int]  # the path of a link or special file, and which of the two
A_LINK, SPECIAL = 1, 2


class Hazards:
    """Where links and special files stand in the subvolume that a stream makes, and in its parent.

    Kept as trees of the folders that lead to them, in which a link or special file is a number. A command is taken
    as done, for `btrfs receive` ends at the first that fails.
    """

    SPARED = {RENAME: (A_LINK, SPECIAL), UNLINK: (A_LINK, SPECIAL), CHOWN: (A_LINK, SPECIAL),
              UTIMES: (A_LINK, SPECIAL), SET_XATTR: (A_LINK, SPECIAL), REMOVE_XATTR: (A_LINK, SPECIAL),
              FILEATTR: (A_LINK, SPECIAL), CHMOD: (SPECIAL,)}  # what a command may name without opening or following it
    MADE = {SYMLINK: A_LINK, MKNOD: SPECIAL, MKFIFO: SPECIAL, MKSOCK: SPECIAL}

    def __init__(self, own: Iterable[Hazard], parent: Iterable[Hazard]) -> None:
        self.top: Dict[bytes, Any] = {}
        self.parent: Dict[bytes, Any] = {}
        for tree, hazards in ((self.top, own), (self.parent, parent)):
            for path, kind in hazards:
                self.put(tree, path, kind)

    @staticmethod
    def find(tree: Any, path: bytes) -> Any:
        """What is known to stand at a path: a hazard, a folder with some in it, or None."""
        for part in path.split(b"/"):
            if isinstance(tree, int):
                raise hostile("a path through a link or special file", path)
            tree = tree.get(part) if tree is not None else None
        return tree

    @staticmethod
    def put(tree: Dict[bytes, Any], path: bytes, node: Any) -> None:
        *above, name = path.split(b"/")
        for part in above:
            tree = tree.setdefault(part, {})
        if node is None:
            tree.pop(name, None)
        else:
            tree[name] = node

    def check(self, tree: Dict[bytes, Any], path: bytes, spared: Sequence[int] = ()) -> Any:
        found = self.find(tree, path)
        if isinstance(found, int) and found not in spared:
            raise hostile("a command that would open or follow a link or special file", path)
        return found

    def follow(self, command: int, attributes: Dict[int, bytes], clones_itself: bool) -> None:
        """Takes a command as done, whose paths are plain; BackupError where it goes through a hazard."""
        path = attributes.get(A_PATH, b"")
        there = self.check(self.top, path, self.SPARED.get(command, ()))
        if command == CLONE:
            self.check(self.top if clones_itself else self.parent, attributes.get(A_CLONE_PATH, b""))
        elif command in self.MADE:
            self.put(self.top, path, self.MADE[command])
        elif command == LINK:
            linked = self.find(self.top, attributes.get(A_PATH_LINK, b""))
            self.put(self.top, path, linked if isinstance(linked, int) else None)
        elif command == RENAME:
            # onto another name of the same file nothing is done at all, and the old one stays
            self.check(self.top, attributes.get(A_PATH_TO, b""))
            self.put(self.top, path, None)
            self.put(self.top, attributes.get(A_PATH_TO, b""), there)
        elif command in (UNLINK, RMDIR):
            self.put(self.top, path, None)


class StreamGate:
    """Judges each command of a stream by what `btrfs receive` does with it; BackupError against one that is not honest.

    Receive takes attributes in any order and the last of two, ends a path at a NUL, follows links, opens for writing
    what WRITE, CLONE, TRUNCATE and MKFILE name, and clones from any subvolume of the filesystem. Linux writes each
    attribute once and the path first (but in CLONE), and paths that lead down from the top folder, through no link.
    So nothing else passes. Which links and devices there are only the kernel knows: it must not follow or open them
    (Confinement); where it cannot be told to, `hazards` keeps account of them.
    """

    def __init__(self, expected: ExpectedStream, hazards: Optional[Hazards] = None) -> None:
        self.sources = frozenset(parse_uuid(uuid) for uuid in (expected.uuid, expected.parent_uuid) if uuid)
        self.own, self.hazards = parse_uuid(expected.uuid), hazards
        self.version = 0
        self.passed: Set[bytes] = set()  # some plain paths, as the same come again and again

    def open(self, version: int) -> None:
        if version not in PROTOCOLS:
            raise BackupError("the stream is of protocol {}, which was not asked for".format(version))
        self.version = version

    def judge(self, data: Chunk, start: int, end: int, command: int) -> None:
        if self.hazards is None and end - start >= COMMAND_HEADER.size + ATTRIBUTE.size:
            kind, size = ATTRIBUTE.unpack_from(data, start + COMMAND_HEADER.size)
            at = start + COMMAND_HEADER.size + ATTRIBUTE.size
            if kind == A_PATH and self.is_usual(data, at + size, end, command):
                paths = [bytes(data[at:at + size])]
                if command == RENAME:
                    paths.append(bytes(data[at + size + ATTRIBUTE.size:end]))
                for path in paths:
                    if path not in self.passed:
                        self.check_path(command, path)
                return
        self.judge_slowly(data, start, end, command)

    def is_usual(self, data: Chunk, at: int, end: int, command: int) -> bool:
        """Whether what stands between the path and the end of a command is just what Linux writes there."""
        usual = USUAL.get(command)
        if usual is not None:
            return at + usual[0].size == end and usual[0].unpack_from(data, at) == usual[1]
        if command == RENAME:
            left = end - at - ATTRIBUTE.size
            return left >= 0 and ATTRIBUTE.unpack_from(data, at) == (A_PATH_TO, left)
        left = end - at - USUAL_WRITE.size
        return (command == WRITE and self.version == 1 and left >= 0
                and USUAL_WRITE.unpack_from(data, at) == (A_FILE_OFFSET, 8, A_DATA, left))

    def judge_slowly(self, data: Chunk, start: int, end: int, command: int) -> None:
        if command in (SUBVOL, SNAPSHOT):
            raise hostile("a second subvolume")
        if not MKFILE <= command <= PROTOCOLS[self.version][0] or command == UPDATE_EXTENT:
            raise hostile("a command that belongs in no backup (number {})".format(command))
        if end - start > LARGEST_COMMAND:
            raise hostile("a command of {} bytes".format(end - start))
        attributes = read_attributes(data, start, end, self.version)
        for kind in PATHS & set(attributes) - ({A_PATH_LINK} if command == SYMLINK else set()):
            self.check_path(command, attributes[kind])
        if any(b"\0" in attributes.get(kind, b"") for kind in (A_XATTR_NAME, A_PATH_LINK)):
            raise hostile("a name with a NUL in it")
        if command not in (CLONE, END) and next(iter(attributes), None) != A_PATH:
            raise hostile("a command that does not begin with its path")
        if command == CLONE and attributes.get(A_CLONE_UUID) not in self.sources:
            raise hostile("a clone from another subvolume than itself and its parent")
        if self.hazards is not None and command != END:
            self.hazards.follow(command, attributes, attributes.get(A_CLONE_UUID) == self.own)

    def check_path(self, command: int, path: bytes) -> None:
        if not (PLAIN_PATH.fullmatch(path) and len(path) <= LARGEST_PATH or not path and command in OF_ANY_FOLDER):
            raise hostile("a path that leads up or is none", path)
        if path:
            if len(self.passed) > 1000:
                self.passed.clear()
            self.passed.add(path)


########################################################################################################
# INCOMING: a stream on its way to receive, in pieces that can be gone on from
#
# The name becomes the partial's, the parent's UUID that of the planned backup (a received UUID may have copies; clone
# sources are found by it alone, so where it has, a stream that clones from its parent is given up). The rest passes as
# it came, but for owner, mode and default ACL of the top folder, set last: until END only root may enter, and nothing
# that receive makes there may inherit that ACL.
########################################################################################################

DEFAULT_ACL = b"system.posix_acl_default"


def new_hash() -> Any:
    import hashlib
    return hashlib.sha256()


class PrefixCheck:
    """Compares the beginning of a stream with marks; StreamDiffers where it does not fit."""

    def __init__(self, marks: Sequence[Mark]) -> None:
        self.marks, self.at, self.hash = list(marks), 0, new_hash()
        self.reader = CommandReader((), STREAM_HEADER.size)
        self.reader.headers = []

    @property
    def left(self) -> int:
        """Bytes up to the next mark; 0 when all of them fitted."""
        return self.marks[0].offset - self.at if self.marks else 0

    def feed(self, chunk: Chunk) -> None:
        """Takes no more than `left` bytes."""
        for _ in self.reader.feed(chunk):
            self.hash.update(self.reader.take_headers())
        self.at += len(chunk)
        if self.marks and self.at == self.marks[0].offset:
            if self.reader.carry or self.hash.hexdigest() != self.marks.pop(0).sha256:
                raise StreamDiffers("the stream is no longer the same as what has arrived of it")
            self.hash = new_hash()


class RestartCheck:
    """Notices a stream that begins anew in its own midst; StreamDamaged then.

    Lengths alone do not tell, for in zeros they fall into step again. What begins anew says the names and ids of its
    first command again. No file of the snapshot holds those, as its UUID is made after its contents: a file may
    well be a stream, but one of another snapshot, or of a state of this one before it was made writable and changed,
    whose `ctransid` is another.
    """

    def __init__(self, name: str, uuid: str, ctransid: int) -> None:
        path = os.fsencode(name)
        # without zeros at the end, which make finding slow in zeros
        self.opening = b"".join(ATTRIBUTE.pack(kind, len(data)) + data for kind, data in (
            (A_PATH, path), (A_UUID, parse_uuid(uuid)), (A_CTRANSID, struct.pack("<Q", ctransid)))).rstrip(b"\0")
        self.sign = path + b"\1"  # of it what is found ten times as fast, with the kind of what follows
        self.tail = b""

    def look(self, chunk: Chunk) -> None:
        """Takes the next bytes, from behind the first command on."""
        data = b"".join((self.tail, chunk))
        if self.sign in data and self.opening in data:
            raise StreamDamaged("btrfs send was stopped, and began anew in the midst of its stream")
        self.tail = data[1 - len(self.opening):]


def set_default_acl(acl: Optional[str]) -> bytes:
    """The command that gives the top folder a default ACL; nothing where it has none."""
    if acl is None:
        return b""
    return make_command(SET_XATTR, ((A_PATH, b""), (A_XATTR_NAME, DEFAULT_ACL), (A_XATTR_DATA, bytes.fromhex(acl))))


def remove_xattr(name: bytes) -> bytes:
    """The command that takes an extended attribute from the top folder, which must have it."""
    return make_command(REMOVE_XATTR, ((A_PATH, b""), (A_XATTR_NAME, name)))


def keeps_capabilities(progs: Tuple[int, ...]) -> bool:
    return (4, 1) <= progs < (5, 11)


class Ground(NamedTuple):
    """What there is where a stream is received.

    sole_parent: nothing else could be taken for its parent. acl: the default ACL of the top folder of what it builds
    on, as hex. keeps_capabilities: of btrfs-progs 4.1 to 5.10, whose receive gives a file's capabilities to the next
    file that changes its owner as well, unless that was the same one (as Linux before 5.8 sends them).
    """

    sole_parent: bool = True
    acl: Optional[str] = None
    keeps_capabilities: bool = False


PLAIN_GROUND = Ground()


class IncomingStream:
    """A stream on its way into `btrfs receive`: checked, renamed, private until its end.

    Only whole commands pass, the end is kept back until it is asked for, and `offset` and hash are those of
    what has passed as the sender wrote it: so that a cut after any chunk is a place to go on from.
    """

    def __init__(self, expected: ExpectedStream, ground: Ground = PLAIN_GROUND, gate: Optional[StreamGate] = None,
                 resume: ResumePoint = BEGINNING) -> None:
        self.expected, self.ground, self.gate, self.resume = expected, ground, gate, resume
        self.opening: Optional[bytes] = None if resume.offset else b""
        self.reader = CommandReader((SUBVOL, SNAPSHOT, SET_XATTR, REMOVE_XATTR, UTIMES, END)
                                    + (() if ground.sole_parent else (CLONE,))
                                    + ((CHOWN,) if ground.keeps_capabilities else ()), of_top=(CHMOD, CHOWN),
                                    judge=gate.judge if gate else None)
        self.reader.file_data, self.reader.headers = resume.file_data, []
        self.restart: Optional[RestartCheck] = None  # from the first command on
        self.offset, self.hash = resume.offset, new_hash()
        self.held: Optional[ResumePoint] = None
        self.acl = resume.acl if resume.offset else ground.acl  # default ACL of the top folder, as the stream has it
        self.kept: Optional[bytes] = None  # the file whose capabilities receive keeps in mind
        self.version = self.ctransid = 0
        self.ended = False
        self.private = (make_command(CHOWN, ((A_PATH, b""), (A_UID, bytes(8)), (A_GID, bytes(8))))
                        + make_command(CHMOD, ((A_PATH, b""), (A_MODE, struct.pack("<Q", 0o700)))))
        self.public = (make_command(CHOWN, ((A_PATH, b""), (A_UID, struct.pack("<Q", expected.uid)),
                                            (A_GID, struct.pack("<Q", expected.gid))))
                       + make_command(CHMOD, ((A_PATH, b""), (A_MODE, struct.pack("<Q", expected.mode)))))

    @property
    def closing(self) -> bytes:
        """What makes the backup complete."""
        return self.public + set_default_acl(self.acl) + make_command(END, ())

    @property
    def point(self) -> ResumePoint:
        """Where the stream can go on when it is cut now."""
        if self.held is not None or self.offset == self.resume.offset:
            return self.held or self.resume
        return ResumePoint(self.resume.marks + (Mark(self.offset, self.hash.hexdigest()),), self.reader.file_data,
                           acl=self.acl)

    def edit(self, chunk: Chunk) -> List[Chunk]:
        """What `btrfs receive` gets for `chunk`."""
        if self.ended and chunk:
            raise BackupError("the stream goes on after its end")
        if self.opening is None:
            return self.edit_rest(chunk)
        self.opening += bytes(chunk)
        first = parse_first_command(self.opening)
        if first is None:
            return []
        check_first_command(first, self.expected)
        self.go_on_with(STREAM_HEADER.unpack_from(self.opening)[1], first.number_of(A_CTRANSID))
        self.hash.update(self.opening[STREAM_HEADER.size:STREAM_HEADER.size + COMMAND_HEADER.size])
        self.offset = first.end
        head = self.opening[:STREAM_HEADER.size] + self.renamed(first) + self.private
        if self.acl is not None:
            head += remove_xattr(DEFAULT_ACL)
        chunk, self.opening = self.opening[first.end:], None
        return [head] + self.edit_rest(chunk)

    def go_on_with(self, version: int, ctransid: int) -> None:
        """Takes note of what the stream's header and first command say."""
        self.version, self.ctransid = version, ctransid
        if self.gate is not None:
            self.gate.open(version)

    def edit_rest(self, chunk: Chunk) -> List[Chunk]:
        """The same, beyond the first command."""
        self.restart = self.restart or RestartCheck(self.expected.name, self.expected.uuid, self.ctransid)
        self.restart.look(chunk)
        return self.edit_blocks(self.reader.feed(chunk))

    def renamed(self, first: FirstCommand) -> bytes:
        changed = {A_PATH: os.fsencode(partial_name(self.expected.name))}
        if self.expected.base:
            changed[A_CLONE_UUID] = parse_uuid(self.expected.base)
        return make_command(first.number, ((kind, changed.get(kind, data)) for kind, data in first.attributes))

    def reopening(self, piece: str, onto: str) -> bytes:
        """What begins a further piece: a snapshot of the piece with the received UUID `onto`.

        It bears the stream's own UUID, by which clones within the stream find their source.
        """
        ctransid = struct.pack("<Q", self.ctransid)
        return STREAM_HEADER.pack(STREAM_MAGIC, self.version) + make_command(SNAPSHOT, (
            (A_PATH, os.fsencode(piece)), (A_UUID, parse_uuid(self.expected.uuid)), (A_CTRANSID, ctransid),
            (A_CLONE_UUID, parse_uuid(onto)), (A_CLONE_CTRANSID, ctransid))) + self.private

    def check_clone(self, payload: bytes) -> None:
        sources = [format_uuid(data) for kind, data in parse_attributes(payload) if kind == A_CLONE_UUID]
        if self.expected.parent_uuid in sources:
            raise AmbiguousParent("the parent {} is not the only subvolume there that it could be taken for".format(
                self.expected.parent_uuid), "delete what is no backup, or send in full with -I")

    def edit_blocks(self, blocks: Iterable[Block]) -> List[Chunk]:
        pieces: List[Chunk] = []
        for data, spans in blocks:
            if self.ended:
                raise BackupError("the stream goes on after its end")
            if self.held is None and self.begins_capability(data, spans):
                self.held = self.point
            pieces += self.edit_commands(memoryview(data), spans)
            headers = self.reader.take_headers()
            self.hash.update(headers[:-COMMAND_HEADER.size] if self.ended else headers)
        if self.ended and self.reader.carry:
            raise BackupError("the stream goes on after its end")
        return [piece for piece in pieces if len(piece)]

    @staticmethod
    def begins_capability(data: Chunk, spans: Sequence[CommandSpan]) -> bool:
        return bool(spans) and spans[0][::2] == (0, SET_XATTR) and CAPABILITY in bytes(data[:spans[0][1]])

    def takes_default_acl(self, command: int, whole: bytes) -> bool:
        """Whether a command of the top folder is about its default ACL, which is kept for the end."""
        attributes = dict(parse_attributes(whole[COMMAND_HEADER.size:]))
        if attributes.get(A_XATTR_NAME) != DEFAULT_ACL:
            return False
        self.acl = attributes.get(A_XATTR_DATA, b"").hex() if command == SET_XATTR else None
        return True

    def free_of_capabilities(self, command: int = END, whole: bytes = b"") -> bytes:
        """What makes receive forget the capabilities of another file before a command; see Ground.

        The top folder takes them, which has none of its own.
        """
        attributes = dict(parse_attributes(whole[COMMAND_HEADER.size:]))
        kept, self.kept = self.kept, None
        if command == SET_XATTR and attributes.get(A_XATTR_NAME) == CAPABILITY:
            self.kept = attributes.get(A_PATH)
        elif command in (SET_XATTR, REMOVE_XATTR):
            self.kept = kept
        if kept is None or kept == attributes.get(A_PATH) and command != UTIMES:
            return b""
        return self.private + remove_xattr(CAPABILITY)

    def edit_command(self, command: int, whole: memoryview) -> Optional[Sequence[Chunk]]:
        """What takes the place of a command; None where it passes as it is."""
        if command in (SUBVOL, SNAPSHOT):
            raise BackupError("the stream holds a second subvolume")
        if command == CLONE:
            self.check_clone(bytes(whole[COMMAND_HEADER.size:]))
            return None
        if command == UTIMES:  # the last of a file, after the chown that drops them
            self.held = None
        before = self.free_of_capabilities(command, bytes(whole)) if self.ground.keeps_capabilities else b""
        if command != UTIMES and len(whole) >= 14 and ATTRIBUTE.unpack_from(whole, 10) == (A_PATH, 0):
            # the top folder
            if command in (CHMOD, CHOWN) or self.takes_default_acl(command, bytes(whole)):
                return [before]
            return [before, whole, self.private]  # an ACL opens the folder as chmod does
        return [before, whole] if before else None

    def edit_commands(self, view: memoryview, spans: Sequence[CommandSpan]) -> List[Chunk]:
        pieces: List[Chunk] = []
        passed, size = 0, len(view)
        for start, end, command in spans:
            if command == END:
                if end < size:
                    raise BackupError("the stream goes on after its end")
                self.ended, size = True, start
                break
            instead = self.edit_command(command, view[start:end])
            if instead is not None:
                pieces += [view[passed:start], *instead]
                passed = end
        pieces += [view[passed:size], self.free_of_capabilities() if self.ended else b""]
        self.offset += size
        return pieces


class WatchedStream:
    """A stream that passes as it is: checked at its start, followed to its end."""

    def __init__(self, expected: ExpectedStream, gate: Optional[StreamGate] = None) -> None:
        self.expected, self.gate = expected, gate
        self.opening: Optional[bytes] = b""
        self.reader = CommandReader((END,), judge=gate.judge if gate else None)
        self.restart: Optional[RestartCheck] = None  # from the first command on
        self.version = 0  # of the protocol
        self.ended = False

    def watch(self, chunk: Chunk) -> Chunk:
        """The bytes that may go on now: none before the first command was seen to be the planned one."""
        if self.opening is None:
            self.follow(chunk)
            return chunk
        self.opening += bytes(chunk)
        first = parse_first_command(self.opening)
        if first is None:
            return b""
        check_first_command(first, self.expected)
        self.restart = RestartCheck(self.expected.name, self.expected.uuid, first.number_of(A_CTRANSID))
        self.version = STREAM_HEADER.unpack_from(self.opening)[1]
        if self.gate is not None:
            self.gate.open(self.version)
        held, self.opening = self.opening, None
        self.follow(memoryview(held)[first.end:])
        return held

    def follow(self, chunk: Chunk) -> None:
        if self.restart is not None:
            self.restart.look(chunk)
        over = self.ended and len(chunk) > 0
        for data, spans in self.reader.feed(chunk):
            over = over or self.ended or any(end < len(data) for _, end, _ in spans)
            self.ended = self.ended or bool(spans)
        if over or (self.ended and self.reader.carry):
            raise BackupError("the stream goes on after its end")


########################################################################################################
# PART V THE MACHINE: what the system underneath does
########################################################################################################


########################################################################################################
# PROCESSES: programs: found, run, watched, ended
#
# Argument lists, never a shell. Each child is a process group of its own, so that a key press on the
# terminal does not kill the ends of a transfer behind our back; it ends by itself when its pipe does.
# Every stderr is drained, its tail kept. One function signals other processes. Never: a child left running when
# we are done with it; a signal to a process that is not known, or was waited for; a wait for the end of a pipe
# whose program has ended, for what that has left behind may hold it for ever.
########################################################################################################

ENDING_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)  # sent by somebody, not by a fault
PACKAGES = {"btrfs": "btrfs-progs (btrfsprogs on openSUSE)", "ssh": "openssh-client (openssh-clients on Fedora)",
            "xz": "xz-utils (xz on Fedora and openSUSE)", "gpg": "gnupg (gnupg2 on Fedora, gpg2 on openSUSE)"}
ENDING_GRACE = 5.0  # seconds between asking a process to end and killing it
PIPE_GRACE = 1.0  # seconds in which what an ended program has said is read
LOOK_INTERVAL = 0.2  # seconds
PIPE_SIZE = 1 << 20
SENDER_BUFFER = 2 << 20
F_SETPIPE_SZ, F_GETPIPE_SZ = 1031, 1032
SOCKET_SIZE = 128 << 10  # about what one holds, unless told otherwise
SPLICE_F_NONBLOCK = 2


def child_environment() -> Dict[str, str]:
    """Ours, with messages that can be read, and the folders of system programs on the PATH."""
    path = os.environ.get("PATH", "/usr/local/bin:/usr/bin:/bin") + ":/usr/local/sbin:/usr/sbin:/sbin"
    # an empty entry means the current folder, where anybody may have put a program
    folders = [folder for folder in path.split(":") if folder.startswith("/")]
    return dict(os.environ, LC_ALL="C", PATH=":".join(folders))


def find_program(name: str) -> str:
    """The full path of a program, or an error that names its package."""
    # not shutil.which: importing shutil brings every compressor with it, and a stripped Python lacks it
    for folder in child_environment()["PATH"].split(":"):
        path = os.path.join(folder, name)
        if os.access(path, os.X_OK) and os.path.isfile(path):
            return path
    raise BackupError("the program {} is not installed".format(name),
                      "install the package {}".format(PACKAGES.get(name, name)))


class Outcome(NamedTuple):
    status: int
    out: str
    error: str


# Not a session of its own: the scheduler would weigh each (autogroup), which slows a transfer by some percent.
OWN_GROUP: Dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}


def start_program(argv: Sequence[str], stdin: Any = subprocess.DEVNULL, stdout: Any = subprocess.PIPE,
          stderr: Any = subprocess.PIPE, environment: Optional[Dict[str, str]] = None,
          own_group: bool = True, prepare: Optional[Callable[[], None]] = None) -> "subprocess.Popen":
    """Starts a program; in our own process group only if it may have to ask at the terminal.

    prepare: what the new process does before it becomes the program.
    """
    options = OWN_GROUP if own_group else {}
    if prepare is not None:
        options = {"preexec_fn": prepare}
    try:
        return subprocess.Popen([find_program(argv[0])] + list(argv[1:]), stdin=stdin, stdout=stdout, stderr=stderr,
                                env=environment or child_environment(), **options)
    except OSError as error:
        raise os_error("cannot run {}".format(argv[0]), error) from None
    except subprocess.SubprocessError as error:
        raise BackupError("cannot prepare {}: {}".format(argv[0], error)) from None


AGES_LAST_WORDS = "report unexpected or unhelpful errors"


def hint_for(words: str) -> str:
    """What to do about the known complaints of btrfs."""
    hints = (("No space left", "free some space there, or keep less: fewer snapshots (-N), fewer backups (-n)"),
             ("not permitted", "run as root"),
             ("Permission denied", "run as root"),
             ("cannot find parent", "the parent is not usable there; -I sends in full"),
             ("not on mount point", "mount the filesystem's top level there, or send in full with -I"),
             ("remount this btrfs filesystem", "the destination is a folder mounted over itself or elsewhere (bind); "
                                               "name it on the filesystem's own mount, or send in full with -I"),
             ("reachable from inside", "mount the filesystem's top level there, or send in full with -I"),
             ("Bad file descriptor", "rclone's mounts can be written with --vfs-cache-mode writes"))
    return next((hint for sign, hint in hints if sign in words), "")


def program_error(doing: str, words: str, status: int) -> BackupError:
    """An error with the program's last line in the message and, where there is more, all of it below."""
    lines = [line for line in words.splitlines() if line.strip() and AGES_LAST_WORDS not in line]
    if status < 0:
        cause = "killed by {}".format(signal_name(-status))
    else:
        own_name = r"^({}:\s*)?(error:\s*)?".format(re.escape(doing))
        cause = re.sub(own_name, "", lines[-1], flags=re.IGNORECASE) if lines else "exit status {}".format(status)
    # a send may find its tree busy while the filesystem is balanced
    transient = -status in ENDING_SIGNALS or "temporarily unavailable" in cause
    return BackupError("{}: {}".format(doing, cause), hint_for(words), "\n".join(lines) if len(lines) > 1 else "",
                       transient)


def is_full(error: BackupError) -> bool:
    """Whether a filesystem has no space left for what was to be done, or a quota allows no more."""
    return bool(re.search("no space left|quota exceeded", error.message + error.detail, re.IGNORECASE))


def signal_process(pid: Optional[int], number: int, with_group: bool = False) -> None:
    """Signals another process, if it is still there, or with all of the group that it leads.

    pid: None while there is no such process, and again once it was waited for, when the number may be another's.
    Never 0, 1 or less: to kill(2) these are our group, init, and everything that we may signal.
    """
    if pid is not None and pid > 1:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if with_group else os.kill)(pid, number)


def end_process(process: "subprocess.Popen") -> None:
    """Asks a process to end, kills it after ENDING_GRACE, and waits for it."""
    if process.poll() is None:
        process.terminate()
        process.send_signal(signal.SIGCONT)  # a stopped process takes no other signal
        try:
            process.wait(ENDING_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def read_stats() -> Dict[int, Tuple[str, ...]]:
    """Of each process state, parent, group and session, as in /proc/PID/stat."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open("/proc/{}/stat".format(name), encoding="ascii", errors="replace") as file:
                found[int(name)] = tuple(file.read().rpartition(")")[2].split()[:4])
    return found


def groups_here() -> Set[int]:
    """The process groups of our session that somebody is in."""
    session = str(os.getsid(0))
    return {int(words[2]) for words in read_stats().values() if words[3] == session and words[0] != "Z"}


def is_own_group(process: "subprocess.Popen") -> bool:
    """Whether there is anybody left in the group that a child of ours leads, or led.

    Its number is nobody else's while it was not waited for, and while somebody is in that group.
    """
    return process.poll() is None or process.pid in groups_here()


def end_group(process: "subprocess.Popen") -> None:
    """Ends a process and all that it has started, as far as these stayed in its group."""
    if is_own_group(process):
        for number in (signal.SIGTERM, signal.SIGCONT):
            signal_process(process.pid, number, with_group=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING_GRACE)
    if is_own_group(process):
        signal_process(process.pid, signal.SIGKILL, with_group=True)
    process.wait()


def find_children() -> List[int]:
    """The process ids of our children."""
    return [pid for pid, words in read_stats().items() if words[1] == str(os.getpid())]


def reap_children() -> bool:
    """Waits for the children that have ended; whether none is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return True
    return False


def end_children() -> None:
    """Ends, with their groups, the children that nobody has ended: an interruption may fall into the start of one."""
    groups = {pid for pid in find_children() if pid in groups_here()}
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in find_children():
            for each in (number, signal.SIGCONT):
                signal_process(pid, each)
        for group in groups & groups_here():
            for each in (number, signal.SIGCONT):
                signal_process(group, each, with_group=True)
        deadline = time.monotonic() + ENDING_GRACE
        while time.monotonic() < deadline and not (reap_children() and not groups & groups_here()):
            time.sleep(0.005)


class Conversation:
    """What a program is given on its stdin, if that is a pipe, and says on stdout and stderr until it has ended."""

    def __init__(self, process: "subprocess.Popen", data: bytes = b"", most: float = float("inf"),
                 patience: float = float("inf")) -> None:
        """most: bytes that it may say; patience: seconds for which it may say nothing."""
        self.process, self.data, self.most, self.patience = process, data, most, patience
        self.poll = select.poll()
        self.open: Dict[int, Any] = {}  # the pipes by descriptor
        self.said = {process.stdout: bytearray(), process.stderr: bytearray()}
        self.last_moved = time.monotonic()
        for file in (process.stdin, process.stdout, process.stderr):
            if file is not None:
                self.open[file.fileno()] = file
                os.set_blocking(file.fileno(), False)
                self.poll.register(file, select.POLLOUT if file is process.stdin else select.POLLIN)

    def run(self) -> Tuple[bytes, bytes]:
        """All that it says; Interrupted ends it first."""
        deadline = float("inf")
        try:
            while self.open and time.monotonic() < deadline:
                has_ended = self.process.poll() is not None
                ready = self.poll.poll(1000 * LOOK_INTERVAL)
                if has_ended:
                    deadline = min(deadline, time.monotonic() + PIPE_GRACE) if ready else 0.0
                for fd, _ in ready:
                    self.move(fd)
                self.check_bounds(bool(ready))
            self.process.wait()
        except BaseException:
            end_process(self.process)
            raise
        finally:
            for fd in list(self.open):
                self.close(fd)
        return bytes(self.said[self.process.stdout]), bytes(self.said[self.process.stderr])

    def check_bounds(self, moved: bool) -> None:
        self.last_moved = time.monotonic() if moved else self.last_moved
        if sum(map(len, self.said.values())) > self.most:
            raise BackupError("prints without end")
        if time.monotonic() - self.last_moved > self.patience:
            raise Stalled("stalled: nothing came for {}".format(format_duration(self.patience)))

    def move(self, fd: int) -> None:
        """Reads or writes what goes on one pipe; one that is at its end is closed."""
        file, got = self.open[fd], b""
        if file is self.process.stdin:
            with contextlib.suppress(BrokenPipeError):
                got = self.data = self.data[os.write(fd, self.data):] if self.data else b""
        else:
            got = os.read(fd, PIPE_SIZE)
            self.said[file] += got
        if not got:
            self.close(fd)

    def close(self, fd: int) -> None:
        self.poll.unregister(fd)
        self.open.pop(fd).close()


def run(argv: Sequence[str]) -> Outcome:
    """Runs a program to its end; Interrupted ends it first."""
    process = start_program(argv)
    out, error = Conversation(process).run()
    return Outcome(process.returncode, os.fsdecode(out), os.fsdecode(error).strip())


def check(argv: Sequence[str], doing: str) -> str:
    """What a program prints; BackupError 'DOING: its last words' where it fails."""
    outcome = run(argv)
    if outcome.status != 0:
        raise program_error(doing, outcome.error, outcome.status)
    return outcome.out


class HeldSignals:
    """Keeps signals that ask to stop until they do no harm: a stream is torn where one falls between two steps."""

    def __init__(self) -> None:
        self.handlers: Dict[int, Any] = {}
        self.caught: Optional[int] = None

    def __enter__(self) -> "HeldSignals":
        self.hold()
        return self

    def __exit__(self, *_: Any) -> None:
        handlers = dict(self.handlers)
        self.let_go()
        if self.caught is not None:
            handlers[self.caught](self.caught, None)

    def hold(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            handler = signal.getsignal(number)
            if callable(handler) and threading.current_thread() is threading.main_thread():
                self.handlers[number] = handler
                signal.signal(number, self.note)

    def let_go(self) -> None:
        for number, handler in self.handlers.items():
            if signal.getsignal(number) == self.note:  # else they are ignored by now
                signal.signal(number, handler)
        self.handlers.clear()

    def note(self, number: int, _frame: Any) -> None:
        self.caught = number

    def look(self) -> None:
        """Lets the signal in that has come."""
        if self.caught is not None:
            number, self.caught = self.caught, None
            self.handlers[number](number, None)

    @contextlib.contextmanager
    def let_in(self) -> Iterator[None]:
        """Where one waits, they come through."""
        self.look()
        self.let_go()
        try:
            yield
        finally:
            self.hold()


class Stage:
    """One process of a transfer, with its stderr drained and the tail of it kept; without `stdout` that as well."""

    def __init__(self, argv: Sequence[str], stdin: Any, stdout: Any,
                 environment: Optional[Dict[str, str]] = None, own_group: bool = True,
                 prepare: Optional[Callable[[], None]] = None) -> None:
        self.program = " ".join(argv[:2])
        if stdout is None:
            self.process = start_program(argv, stdin, subprocess.PIPE, subprocess.STDOUT, environment, own_group)
        else:
            self.process = start_program(argv, stdin, stdout, subprocess.PIPE, environment, own_group, prepare)
        self.stderr: Any = self.process.stderr or self.process.stdout
        self.tail: "collections.deque[bytes]" = collections.deque([b""], maxlen=20)  # lines, the last as far as it came
        self.is_over = False
        self.drain = threading.Thread(target=self.read_stderr, daemon=True)
        try:
            self.drain.start()
        except RuntimeError as error:
            end_process(self.process)
            (self.process.stderr or self.process.stdout).close()  # type: ignore[union-attr]
            raise explain(error, "cannot run {}".format(argv[0])) from None

    def read_stderr(self) -> None:
        """To its end, or until we are done with a program that has left somebody behind who holds it open."""
        poll = select.poll()
        poll.register(self.stderr, select.POLLIN)
        with self.stderr:
            while True:
                ready = poll.poll(1000 * LOOK_INTERVAL)
                got = os.read(self.stderr.fileno(), 4096) if ready else b""
                if not got and (ready or self.is_over):
                    break
                first, *lines = got.split(b"\n")
                self.tail[-1] = (self.tail[-1] + first)[-4096:]
                self.tail.extend(lines)

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self, timeout: float) -> None:
        """Waits for the end; BackupError unless the exit status is 0."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise Stalled("{} stalled: it did not end within {}".format(
                self.program, format_duration(timeout))) from None
        if status != 0:
            raise self.error()

    def error(self) -> BackupError:
        """Why this ended process failed."""
        self.drain.join(PIPE_GRACE)
        words = os.fsdecode(b"\n".join(self.tail))
        # "At subvol X" and the like are no complaint
        complaints = "\n".join(line for line in words.splitlines() if not re.match(r"At (sub|snap)", line))
        return program_error(self.program, complaints, self.process.returncode)

    def end(self) -> None:
        end_process(self.process)
        self.is_over = True
        self.drain.join(PIPE_GRACE)


def enlarge(fd: int) -> None:
    """Makes `fd`, if it is a pipe, as large as allowed."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, F_SETPIPE_SZ, PIPE_SIZE)


def make_pipe() -> Tuple[int, int]:
    """A large pipe: the two ends of a transfer then wait for each other less."""
    read_end, write_end = os.pipe()
    enlarge(write_end)
    return read_end, write_end


def capacity_of(fd: int) -> int:
    """Bytes that the pipe or socket `fd` holds, about."""
    try:
        return fcntl.fcntl(fd, F_GETPIPE_SZ)
    except OSError:
        return SOCKET_SIZE


# Writing to a pipe copies into pages made for it. vmsplice lends it the pages of the writer instead, which spares
# that, and the reader finds them in the processor's caches. What was lent must not change until it was read.

LEAST_LENT = 32 << 10  # bytes; less is copied as fast


def map_memory(size: int) -> Any:
    """Memory that can be lent: once it is freed nothing of it is used again, as that of a bytearray would be."""
    try:
        import mmap
        return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (ImportError, OSError):
        return bytearray(size)


@functools.lru_cache(maxsize=None)
def find_vmsplice() -> Optional[Tuple[Any, Any]]:
    """The ctypes module and its vmsplice(2); None where there is none."""
    try:
        import ctypes
        return ctypes, ctypes.CDLL(None, use_errno=True).vmsplice
    except (ImportError, OSError, AttributeError):
        return None


def write_or_lend(pipe: int, piece: memoryview) -> int:
    """Writes to a pipe of ours, as os.write does; pages from map_memory are lent.

    They must not change before PIPE_SIZE bytes more were written, for a pipe holds no more, or the reader is gone.
    Only for readers that copy: one that splices on might hold them for longer.
    """
    found = find_vmsplice() if len(piece) >= LEAST_LENT and type(piece.obj).__name__ == "mmap" else None
    if found is None:
        return os.write(pipe, piece)
    ctypes, vmsplice = found
    span = struct.pack("PN", ctypes.addressof(ctypes.c_char.from_buffer(piece)), len(piece))
    lent = vmsplice(pipe, span, ctypes.c_ulong(1), SPLICE_F_NONBLOCK)
    if lent < 0 and ctypes.get_errno() == errno.EAGAIN:
        raise BlockingIOError
    return int(lent) if lent >= 0 else os.write(pipe, piece)  # which may do where lending does not


class Background:
    """Something that is done in a thread.

    A thread whose join() a signal's exception leaves counts as ended in Python 3.9 to 3.12, though it is not:
    so the end is told by an event.
    """

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act, self.outcome, self.error = act, None, None  # type: Callable[[], Any], Any, Optional[BaseException]
        self.over = threading.Event()
        try:
            threading.Thread(target=self.run, daemon=True).start()
        except RuntimeError:  # no process or memory is left for one
            self.run()

    def run(self) -> None:
        try:
            self.outcome = self.act()
        except BaseException as error:
            self.error = error
        finally:
            self.over.set()

    @property
    def is_over(self) -> bool:
        return self.over.is_set()

    def result(self) -> Any:
        """Waits for what came out; raises what was raised."""
        self.over.wait()
        if self.error is not None:
            raise self.error
        return self.outcome

    def outlast(self, seconds: float) -> None:
        """Waits for the end even where a signal asks to stop meanwhile, which is raised afterwards."""
        deadline, interruption = time.monotonic() + seconds, None  # type: float, Optional[Interrupted]
        while not self.is_over and time.monotonic() < deadline:
            try:
                self.over.wait(max(0.0, deadline - time.monotonic()))
            except Interrupted as signalled:
                interruption = signalled
        if interruption is not None:
            raise interruption


def outlast_all(works: Sequence[Background], seconds: float) -> None:
    """Waits for all of them, even where a signal asks to stop meanwhile, which is raised afterwards."""
    deadline, interruption = time.monotonic() + seconds, None  # type: float, Optional[Interrupted]
    for work in works:
        try:
            work.outlast(max(0.0, deadline - time.monotonic()))
        except Interrupted as signalled:
            interruption = signalled
    if interruption is not None:
        raise interruption


########################################################################################################
# BTRFS: what the kernel and the btrfs program say and do
#
# Reading goes by ioctl (uapi/linux/btrfs.h), which any user may, in microseconds; where the kernel has
# no GET_SUBVOL_INFO (before Linux 4.18) by `btrfs subvolume show`. Changing goes by the btrfs program.
# Protocol 2 with compressed data is used where the sending kernel (6.0) and btrfs-progs of both ends are
# safe for it: 5.19 to send, 6.2 to receive, as 6.0.2 and 6.2 mended silent loss of data.
########################################################################################################

GET_SUBVOL_INFO = 0x81F8943C
FS_INFO = 0x8400941F
SET_RECEIVED_SUBVOL = 0xC0C89425
DESTROY_SUBVOLUME, BY_ID = 0x5000943F, 16  # BTRFS_IOC_SNAP_DESTROY_V2, since Linux 5.7
DESTROY_ARGUMENTS = struct.Struct("=q8xQ32xQ4032x")
TREE_SEARCH, TREE_SEARCH_SIZE, TREE_SEARCH_BUFFER = 0xD0009411, 4096, 104
TREE_SEARCH_KEY = struct.Struct("=QQQQQQQIII")
TREE_SEARCH_ITEM = struct.Struct("=QQQII")
UUID_TREE = 9
SUBVOL_INFO = struct.Struct("=Q256xQQQQ16s16s16sQQQQQI4xQI4xQI4xQI4x64x")
ROOT_FLAG_RDONLY = 1 << 0
SUBVOLUME_INODE = 256
STAND_IN_INODE = 2  # of the empty folder that a snapshot shows where a subvolume was nested


def open_folder(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)


def subvolume_of_fd(fd: int, name: str) -> Subvolume:
    """The subvolume that the open folder `fd` belongs to. OSError with ENOTTY where it is not on btrfs."""
    buffer = bytearray(SUBVOL_INFO.size)
    fcntl.ioctl(fd, GET_SUBVOL_INFO, buffer)
    (subvolid, _, _, generation, flags, uuid, parent, received, _, otransid, _, _, _, _, seconds, nanoseconds,
     _, _, _, _) = SUBVOL_INFO.unpack(buffer)
    return Subvolume(name, format_uuid(uuid), format_uuid(parent), format_uuid(received),
                     bool(flags & ROOT_FLAG_RDONLY), seconds * 10 ** 9 + nanoseconds, otransid, subvolid, generation)


def subvolume_changed(path: str) -> Optional[float]:
    """When anything in the subvolume at `path` was last changed, in seconds since the epoch; None where unknown."""
    try:
        fd = open_folder(path)
    except OSError:
        return None
    try:
        buffer = bytearray(SUBVOL_INFO.size)
        fcntl.ioctl(fd, GET_SUBVOL_INFO, buffer)
        seconds, nanoseconds = SUBVOL_INFO.unpack(buffer)[12:14]
        return float(seconds + nanoseconds / 1e9)
    except OSError:
        return None
    finally:
        os.close(fd)


def parse_subvolume_show(text: str, name: str) -> Subvolume:
    """A subvolume from the output of `btrfs subvolume show`, for kernels before 4.18.

    >>> parse_subvolume_show("home\\n\\tUUID: a\\n\\tSnapshot(s):\\n\\t\\ttheir name\\n\\tUUID: b\\n", "home").uuid
    'a'
    """
    own, _, _ = text.partition("\tSnapshot(s):")  # others choose what is below, line breaks in it, too
    fields = {key.strip().lower(): value.strip() for key, _, value in
              (line.partition(":") for line in own.splitlines())}

    def uuid(key: str) -> Optional[str]:
        return fields.get(key, "-") if fields.get(key, "-") != "-" else None

    created = fields.get("creation time", "")
    match = re.match(r"(\S+ \S+) ([+-])([0-9]{2})([0-9]{2})", created)
    otime = 0
    if match:
        import calendar
        shift = int(match.group(2) + "1") * (int(match.group(3)) * 3600 + int(match.group(4)) * 60)
        otime = (calendar.timegm(time.strptime(match.group(1), "%Y-%m-%d %H:%M:%S")) - shift) * 10 ** 9
    return Subvolume(name, uuid("uuid"), uuid("parent uuid"), uuid("received uuid"),
                     "readonly" in fields.get("flags", ""), otime, int(fields.get("gen at creation", "0")),
                     int(fields.get("subvolume id", "0")), int(fields.get("generation", "0")))


def read_subvolume(path: str, name: str) -> Optional[Subvolume]:
    """The subvolume whose top folder is at `path`, None where there is none; links are not followed."""
    try:
        fd = open_folder(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise
    try:
        if os.fstat(fd).st_ino != SUBVOLUME_INODE:
            return None
        return subvolume_of_fd(fd, name)
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
    finally:
        os.close(fd)
    outcome = run(["btrfs", "subvolume", "show", path])
    return parse_subvolume_show(outcome.out, name) if outcome.status == 0 else None


FS_INFO_METADATA_UUID = struct.pack("<Q", 1 << 2)  # asks for it, since Linux 5.9


def has_passing_id(filesystem: str) -> bool:
    """Whether a mounted btrfs was given an id for this mount alone.

    Linux does so since 6.7 where another device with its UUID is mounted still, as in some other namespace after a
    disk was pulled out and put in again.
    """
    try:
        with open("/sys/fs/btrfs/{}/temp_fsid".format(filesystem), encoding="ascii") as file:
            return file.read().strip() == "1"
    except OSError:
        return False


def read_filesystem_id(path: str) -> Optional[str]:
    """The UUID that the btrfs that holds `path` has on its disk, None where that is no btrfs.

    `st_dev` and `f_fsid` differ from subvolume to subvolume and tell nothing.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        buffer = bytearray(1024)
        buffer[48:56] = FS_INFO_METADATA_UUID
        fcntl.ioctl(fd, FS_INFO, buffer)
        mounted, on_disk = format_uuid(bytes(buffer[16:32])), format_uuid(bytes(buffer[64:80]))
        return on_disk if mounted and has_passing_id(mounted) else mounted
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise
    finally:
        os.close(fd)


def read_default_acl(path: str) -> Optional[str]:
    """The default ACL of a folder as hex, None where it has none."""
    try:
        return os.getxattr(path, "system.posix_acl_default", follow_symlinks=False).hex()
    except OSError:
        return None


def parse_version(text: str) -> Tuple[int, ...]:
    """`btrfs-progs v6.2.1-rc1` as (6, 2, 1)."""
    match = re.search(r"v([0-9]+(?:\.[0-9]+)*)", text)
    return tuple(int(part) for part in match.group(1).split(".")) if match else ()


def search_uuid_tree(folder: str, uuid: str, kind: int) -> List[int]:
    """The ids of the subvolumes of a filesystem that have `uuid` as UUID (kind 251) or received UUID (252).

    By BTRFS_IOC_TREE_SEARCH, for root. OSError where it is refused.
    """
    objectid, offset = struct.unpack("<QQ", parse_uuid(uuid))
    buffer = bytearray(TREE_SEARCH_SIZE)
    TREE_SEARCH_KEY.pack_into(buffer, 0, UUID_TREE, objectid, objectid, offset, offset, 0, 2 ** 64 - 1, kind, kind, 1)
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, TREE_SEARCH, buffer)
    finally:
        os.close(fd)
    if TREE_SEARCH_KEY.unpack_from(buffer)[-1] == 0:  # items found
        return []
    start = TREE_SEARCH_BUFFER + TREE_SEARCH_ITEM.size
    size = TREE_SEARCH_ITEM.unpack_from(buffer, TREE_SEARCH_BUFFER)[-1]
    return list(struct.unpack_from("<{}Q".format(size // 8), buffer, start))


def is_sole_received(folder: str, received: str, base: str) -> bool:
    """Whether the subvolume with UUID `base` is the only one on the filesystem with that received UUID."""
    try:
        return search_uuid_tree(folder, received, 252) == search_uuid_tree(folder, base, 251)
    except OSError:
        return False


class Capabilities(NamedTuple):
    """What a host can do in a transfer."""

    sends_compressed: bool
    receives_compressed: bool
    progs: Tuple[int, ...]


def read_capabilities(version: str) -> Capabilities:
    """version: what `btrfs --version` says."""
    progs = parse_version(version)
    try:
        with open("/sys/fs/btrfs/features/send_stream_version", encoding="ascii") as feature:
            protocol = int(feature.read())
    except (OSError, ValueError):
        protocol = 1
    return Capabilities(protocol >= 2 and progs >= (5, 19), progs >= (6, 2), progs)


class SendOptions(NamedTuple):
    compressed: bool = False
    no_data: bool = False
    debug: bool = False


def send_argv(path: str, parent: Optional[str], options: SendOptions) -> List[str]:
    argv = ["btrfs", "send"] + ["-vv"] * options.debug + ["--no-data"] * options.no_data
    if options.compressed and not options.no_data:
        argv += ["--proto", "2", "--compressed-data"]
    return argv + (["-p", parent] if parent else []) + [path]


def set_received_uuid(path: str, uuid: str) -> None:
    """Stamps a writable subvolume, as `btrfs receive` does at its end (BTRFS_IOC_SET_RECEIVED_SUBVOL)."""
    fd = open_folder(path)
    try:
        fcntl.ioctl(fd, SET_RECEIVED_SUBVOL, bytearray(parse_uuid(uuid).ljust(200, b"\0")))
    finally:
        os.close(fd)


def destroy_open_subvolume(path: str) -> None:
    """Deletes the subvolume whose open folder is at `path`, by its id. OSError with ENOTTY before Linux 5.7.

    `btrfs subvolume delete` looks up the name anew, and takes what bears it then.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        subvolid = subvolume_of_fd(fd, "").subvolid
        fcntl.ioctl(fd, DESTROY_SUBVOLUME, bytearray(DESTROY_ARGUMENTS.pack(0, BY_ID, subvolid)))
    finally:
        os.close(fd)


def make_readonly(path: str) -> None:
    check(["btrfs", "property", "set", "-ts", path, "ro", "true"], "cannot make {} read-only".format(path))


def receive_argv(folder: str, debug: bool, confined: bool) -> List[str]:
    """confined: by chroot to the folder, so that an absolute path leads nowhere else."""
    return ["btrfs", "receive"] + ["-vv"] * debug + ["--chroot"] * confined + [folder]


def check_written(fd: int) -> None:
    """OSError where contents of any file of a filesystem could not be written, since `fd` was opened there.

    The call for a sync of btrfs succeeds all the same where a disk takes its trees but not the contents of files, of
    which nothing is left then. syncfs(2) tells, since Linux 5.8: each open file once, a new one of what none was told.
    """
    try:
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.syncfs(fd)
    except (ImportError, OSError, AttributeError):
        return
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def sync_filesystem(folder: str, held: int = -1) -> None:
    """Makes all that was written to the filesystem of `folder` durable; a read-only flag alone does not.

    held: a file there, open since before anything was written whose loss would matter.
    """
    check(["btrfs", "filesystem", "sync", folder], "cannot sync {}".format(folder))
    try:
        fd = os.dup(held) if held >= 0 else os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            check_written(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise os_error("cannot sync {}".format(folder), error, "contents of files were lost; see dmesg") from None


class HostFacts(NamedTuple):
    """What a machine is, as far as backups need to know."""

    user: int
    kernel: str
    python: str
    progs: str  # what `btrfs --version` prints first, '' where it is not installed
    has_btrfs: bool  # the kernel knows it
    programs: Tuple[str, ...]  # of those that are useful beside
    clock: float  # seconds since the epoch


def read_facts() -> HostFacts:
    import shutil
    path = child_environment()["PATH"]
    progs = ""
    if shutil.which("btrfs", path=path):
        progs = (run(["btrfs", "--version"]).out.splitlines() or [""])[0]
    try:
        with open("/proc/filesystems", encoding="ascii") as filesystems:
            has_btrfs = "\tbtrfs\n" in filesystems.read()
    except OSError:
        has_btrfs = False
    programs = tuple(name for name in ("ssh", "zstd", "lz4", "gzip") if shutil.which(name, path=path))
    return HostFacts(os.geteuid(), os.uname().release, sys.version.split()[0], progs, has_btrfs, programs, time.time())


class Health(NamedTuple):
    """How a filesystem is. Sizes in bytes. None: it could not be asked."""

    size: int
    free: int
    quotas: Optional[bool]  # enabled
    limits: Tuple[Tuple[str, int, int], ...]  # of qgroups that have one: id, used, limit
    errors: Optional[Tuple[str, ...]]  # counters of its devices that are not 0, as text
    missing: Tuple[str, ...] = ()  # ids of devices that belong to it and are not there


def parse_limits(text: str) -> Tuple[Tuple[str, int, int], ...]:
    """(id, used, limit) for each limit in the output of `btrfs qgroup show --raw -re`."""
    rows = re.findall(r"^([0-9]+/[0-9]+)\s+([0-9]+)\s+([0-9]+)\s+([0-9]+|none)\s+([0-9]+|none)", text, re.MULTILINE)
    return tuple((qgroup, int(used), int(limit)) for qgroup, referenced, exclusive, most, most_exclusive in rows
                 for used, limit in ((referenced, most), (exclusive, most_exclusive)) if limit != "none")


def parse_device_stats(text: str) -> Tuple[str, ...]:
    """`/dev/sda1 corruption_errs 3` for each counter of `btrfs device stats` that is not 0."""
    rows = re.findall(r"^\[(.*)\]\.(\S+)\s+([1-9][0-9]*)$", text, re.MULTILINE)
    return tuple("{} {} {}".format(*row) for row in rows)


def read_health(folder: str) -> Health:
    space = os.statvfs(folder)
    groups, devices, used = (run(["btrfs"] + words + [folder]) for words in (
        ["qgroup", "show", "--raw", "-re"], ["device", "stats"], ["device", "usage"]))
    enabled = True if groups.status == 0 else False if re.search(r"not enabled|No such file", groups.error) else None
    return Health(space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize, enabled, parse_limits(groups.out),
                  parse_device_stats(devices.out) if devices.status == 0 and used.status == 0 else None,
                  tuple(re.findall(r"^missing, ID: ([0-9]+)$", used.out, re.MULTILINE)))


def parse_find_new(text: str) -> int:
    """Bytes of data in the extents that `btrfs subvolume find-new` lists."""
    return sum(int(size) for size in re.findall(r" file offset [0-9]+ len ([0-9]+) disk start ", text))


########################################################################################################
# SEND CALL: the kernel's own send call, with reading ahead
#
# `btrfs send` hands its stream on through a pipe and a thread of its own. A bare interpreter makes the call itself
# and reads from the disk what comes next. It serves the machines whose ioctl numbers are known here; others use the
# program.
########################################################################################################

# `btrfs send` hands its stream on through a pipe and a thread of its own, which takes a third of its time where files
# are small. What it asks of the kernel is one call (BTRFS_IOC_SEND), so a bare interpreter asks in its place.
#
# The call reads one extent after another and waits for each: half of its time where files are small and not in memory.
# So a thread of that interpreter goes through the same tree in the same order (BTRFS_IOC_TREE_SEARCH, which passes
# over what is older than the parent) and has the data read ahead, AHEAD bytes before the place of the sender. That
# place is what the kernel counts as written, less the heads of the commands. What lies well behind it is dropped from
# memory, as the call drops what it has read itself. All this is advice: where it errs, the sender reads for itself,
# and where that is the most of it, the thread leaves off.

SEND = 0x40489426  # as most machines have it, where pointers have 64 bits
SEND_MACHINES = frozenset(("x86_64", "aarch64", "riscv64", "s390x", "loongarch64"))
SEND_FLAG_VERSION, SEND_FLAG_COMPRESSED = 8, 16
INO_LOOKUP, INO_LOOKUP_SIZE = 0xD0009412, 4096
TREE_SEARCH_V2 = 0xC0709411
SEND_SCRIPT = """
import _thread, array, collections, fcntl, os, struct, sys, time

AHEAD, PIECE = 16 << 20, 1 << 20  # bytes
HEAD = 36  # bytes of a command beside its path and data, about
INODE_ITEM, EXTENT_DATA, INLINE, REGULAR = 1, 108, 0, 1
SEARCH, FOUND = struct.Struct("=QQQQQQQIII36xQ"), struct.Struct("=QQQII")
EXTENT, DISK, SIZE = struct.Struct("<QQBBHB"), struct.Struct("<QQQQ"), struct.Struct("<16xQ")
LAST = 2 ** 64 - 1

class Sender:
    # Where the main thread is in its stream, and what it read from disk for itself, both in bytes.
    # path: the bytes of the path in a command, on the average.
    def __init__(self):
        self.look(0)
    def look(self, path):
        with open("/proc/self/task/%d/io" % os.getpid(), "rb", 0) as counters:
            counts = dict(line.split(b": ") for line in counters.read().splitlines())
        self.place = int(counts[b"wchar"]) - int(counts[b"syscw"]) * (HEAD + path)
        self.own = int(counts[b"read_bytes"])

def extents(fd, since):
    # Inode, offset, bytes, place and bytes on disk, and is_compressed of each extent of data born since that
    # generation, in order. An extent within its item has neither place nor bytes on disk.
    buffer = bytearray(SEARCH.size + {search_buffer})
    inode, kind, offset, size = {first_inode}, 0, 0, 0
    while True:
        SEARCH.pack_into(buffer, 0, 0, inode, LAST - 255, offset, LAST, since, LAST, kind, 255, 4096, {search_buffer})
        fcntl.ioctl(fd, {search}, buffer)
        count, start = SEARCH.unpack_from(buffer)[9], SEARCH.size
        if not count:
            return
        for _ in range(count):
            _, inode, offset, kind, taken = FOUND.unpack_from(buffer, start)
            start += FOUND.size
            if kind == INODE_ITEM:
                size, = SIZE.unpack_from(buffer, start)
            elif kind == EXTENT_DATA:
                born, length, compression, _, _, form = EXTENT.unpack_from(buffer, start)
                if born >= since and form == INLINE:
                    yield inode, offset, length, 0, 0, False
                elif born >= since and form == REGULAR:
                    disk, whole, begin, length = DISK.unpack_from(buffer, start + EXTENT.size)
                    if disk and offset < size:
                        yield inode, offset, min(length, size - offset), disk + begin, whole, compression != 0
            start += taken
        kind, offset = (kind, offset + 1) if offset < LAST else (kind + 1, 0)

def path_of(fd, inode):
    buffer = bytearray(struct.pack("=QQ", 0, inode).ljust({lookup_size}, b"\\0"))
    fcntl.ioctl(fd, {lookup}, buffer)
    return bytes(buffer[16:buffer.index(0, 16)]).rstrip(b"/")

def advise(fd, path, offset, length, advice):
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=fd)
    os.posix_fadvise(file, offset, length, advice)
    os.close(file)

def read_ahead(fd, since, sends_compressed):
    sender, held, seen = Sender(), collections.deque(), set()
    current, path, files, path_bytes = None, b"", 1, 0
    place = looked = 0  # bytes of the stream's data before here, and before the place of the last look
    alone = 0  # of these, what the sender reads for itself in any case
    last = place, sender.own, alone
    for inode, offset, length, disk, whole, is_compressed in extents(fd, since):
        if not disk or is_compressed and sends_compressed:
            place, alone = place + (whole or length), alone + whole
            continue
        if disk in seen:
            continue  # the sender says: a clone
        seen.add(disk)
        if len(seen) > 1 << 14:
            seen.clear()
        if inode != current:
            current, path = inode, path_of(fd, inode)
            files, path_bytes = files + 1, path_bytes + len(path)
        for part in range(offset, offset + length, PIECE):
            rest, size = 0.002, min(PIECE, offset + length - part)
            while place >= looked + PIECE or place > sender.place + AHEAD:
                sender.look(path_bytes // files)
                looked = place
                if place <= sender.place + AHEAD:
                    break
                time.sleep(rest)
                rest = min(2 * rest, 0.02)
            while held and held[0][0] + AHEAD < sender.place:
                advise(fd, *held.popleft()[1:], os.POSIX_FADV_DONTNEED)
            if place < sender.place:  # it went on, after a pause, faster than this thread could see
                last = place, sender.own, alone
            else:
                if place > last[0] + AHEAD:
                    if 2 * (sender.own - last[1] - alone + last[2]) > place - last[0]:
                        return
                    last = place, sender.own, alone
                advise(fd, path, part, size, os.POSIX_FADV_WILLNEED)
                held.append((place + size, path, part, size))
            place += size

def try_read_ahead(*about):
    try:
        read_ahead(*about)
    except Exception:
        pass

def about(path):
    # The id of a subvolume, and the generation in which it became what it is.
    info = bytearray({info_size})
    fcntl.ioctl(os.open(path, os.O_RDONLY), {get_info}, info)
    subvolid, made, received = struct.unpack_from("=Q344xQ8xQ", info)
    return subvolid, max(made, received)

def send(path, parent, version, flags):
    parents, since = array.array("Q"), 0
    if parent:
        subvolid, generation = about(parent)
        parents.append(subvolid)
        since = generation + 1
    fd = os.open(path, os.O_RDONLY)
    try:
        _thread.start_new_thread(try_read_ahead, (fd, since, version > 1))
    except RuntimeError:
        pass  # no process is left for it, nor needed
    fcntl.ioctl(fd, {send}, struct.pack(
        "=qQQQQI28x", 1, len(parents), parents.buffer_info()[0], sum(parents), flags, version))
    os._exit(0)

try:
    send(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
except OSError as error:
    sys.exit("ERROR: cannot send %s: %s" % (sys.argv[2], error.strerror))
""".format(first_inode=SUBVOLUME_INODE, search=TREE_SEARCH_V2, search_buffer=1 << 14, lookup=INO_LOOKUP,
           lookup_size=INO_LOOKUP_SIZE, info_size=SUBVOL_INFO.size, get_info=GET_SUBVOL_INFO, send=SEND)


def can_call_send() -> bool:
    return bool(sys.executable) and struct.calcsize("P") == 8 and os.uname().machine in SEND_MACHINES


def call_send_argv(path: str, parent: Optional[str], options: SendOptions) -> List[str]:
    """A process that writes to its stdout what that of send_argv does."""
    flags, version = (SEND_FLAG_VERSION | SEND_FLAG_COMPRESSED, 2) if options.compressed else (0, 1)
    return [sys.executable, "-I", "-S", "-c", SEND_SCRIPT, "btrfs-send", path, parent or "", str(version), str(flags)]


########################################################################################################
# MOUNTS: which filesystem stands where
#
# From /proc/self/mountinfo and /etc/fstab. Never: a guess where nothing is mounted.
########################################################################################################


class Mount(NamedTuple):
    """A row of /proc/self/mountinfo: `root` is the path of `point` in its filesystem."""

    point: str
    root: str
    kind: str
    device: str


def parse_mountinfo(text: str) -> List[Mount]:
    """The mounts that /proc/self/mountinfo lists, the last mounted last."""
    def plain(field: str) -> str:
        return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m.group(1), 8)), field)

    mounts = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind_and_device = before.split(" "), after.split(" ")
        if len(fields) > 4 and len(kind_and_device) > 1:
            mounts.append(Mount(plain(fields[4]), plain(fields[3]), kind_and_device[0], plain(kind_and_device[1])))
    return mounts


def read_mounts() -> List[Mount]:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mountinfo:
        return parse_mountinfo(mountinfo.read())


def mount_around(path: str, mounts: Sequence[Mount]) -> Optional[Mount]:
    """The mount that a real path lies on; of several at one point the last covers the others."""
    around = [m for m in mounts if (path + "/").startswith(m.point.rstrip("/") + "/")]
    longest = max((len(m.point) for m in around), default=0)
    return next((m for m in reversed(around) if len(m.point) == longest), None)


def reachable_path(path: str, mount: Mount) -> Optional[str]:
    """Where a path relative to a filesystem's top is found below `mount`, None where it is not."""
    inner = "/" + path
    root = mount.root.rstrip("/")
    return mount.point.rstrip("/") + inner[len(root):] if (inner + "/").startswith(root + "/") else None


def nearest_existing(path: str) -> str:
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def parse_fstab(text: str) -> List[str]:
    """The mount points of a file in fstab's format."""
    rows = (line.split() for line in text.splitlines() if not line.lstrip().startswith("#"))
    return [re.sub(r"\\([0-7]{3})", lambda m: chr(int(m.group(1), 8)), row[1]) for row in rows if len(row) > 2]


def find_unmounted(path: str) -> str:
    """The mount point of /etc/fstab at or above `path` that has nothing mounted, or ''."""
    try:
        with open("/etc/fstab", encoding="utf-8", errors="surrogateescape") as fstab:
            points = [point.rstrip("/") for point in parse_fstab(fstab.read()) if point.startswith("/")]
    except OSError:
        return ""
    above = [point for point in points if point and (path + "/").startswith(point + "/")]
    return next((point for point in above if not os.path.ismount(point)), "")


def find_mount(folder: str) -> str:
    """Where the filesystem of an existing folder is mounted; the top of a subvolume is not for that a mount point."""
    mount = mount_around(folder, read_mounts())
    return mount.point if mount is not None else "/"


def is_in_memory(folder: str) -> bool:
    """Whether a folder's filesystem is gone at the next boot, for what its mount tells."""
    mount = mount_around(folder, read_mounts())
    return mount is not None and (mount.kind in ("tmpfs", "ramfs", "devtmpfs", "rootfs")
                                  or re.match(r"/dev/z?ram[0-9]", mount.device) is not None)


########################################################################################################
# TRUST: who could have made what is there
#
# A way is walked step by step from what root owns, no link followed that another could have made. What others may write
# to, by owner, mode or ACL, is exposed from there on.
########################################################################################################

OPEN_FOLDER = re.compile(r"/proc/[0-9]+/fd/[0-9]+")  # begins a path to what a process has open


def is_of_others(found: os.stat_result, user: Optional[int] = None) -> bool:
    """Whether somebody else than root and the user who runs owns a file. user: who runs, where that is elsewhere."""
    return found.st_uid not in (0, os.geteuid() if user is None else user)


def open_step(folder: int, name: str, readable: bool, mode: Optional[int]) -> int:
    """A folder in an open one, made with `mode` where it is missing and that is no None. Passing needs no reading."""
    flags = (os.O_RDONLY if readable else os.O_PATH) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, dir_fd=folder)
    except FileNotFoundError:
        if mode is None:
            raise
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, mode, dir_fd=folder)
    return os.open(name, flags, dir_fd=folder)


ACL_ENTRY = struct.Struct("<HHI")  # of a POSIX ACL: whom, what he may, id; behind a version of 4 bytes
ACL_USER, ACL_GROUP, ACL_WRITE = 0x02, 0x08, 2


def acl_admits_others(acl: bytes) -> bool:
    """Whether an ACL lets users and groups write beside those that the mode of a folder tells of."""
    entries = (ACL_ENTRY.unpack_from(acl, at) for at in range(4, len(acl) - ACL_ENTRY.size + 1, ACL_ENTRY.size))
    own = {ACL_USER: (0, os.geteuid()), ACL_GROUP: (0, os.getegid())}
    return any(may & ACL_WRITE and whom in own and number not in own[whom] for whom, may, number in entries)


def is_open_by_acl(fd: int, found: os.stat_result) -> bool:
    """Whether others may write to an open folder for its ACL, whose mask stands as the group's rights in its mode."""
    if not found.st_mode & 0o020:
        return False
    try:
        return acl_admits_others(os.getxattr("/proc/self/fd/{}".format(fd), "system.posix_acl_access"))
    except OSError:
        return False


def way_step(path: str, fd: int) -> Tuple[str, os.stat_result]:
    """What a step is; one that an ACL opens to others as if its mode did."""
    found = os.fstat(fd)
    if is_open_by_acl(fd, found):
        found = os.stat_result((found.st_mode | 0o002,) + tuple(found)[1:])
    return path, found


def open_way(path: str, make: bool = False) -> Tuple[int, List[Tuple[str, os.stat_result]]]:
    """A folder, opened step by step without following any link, and what each step on the way is.

    make: makes what is missing, the last for its user alone. A path that begins with a folder that this process has
    open begins there. OSError.
    """
    known = OPEN_FOLDER.match(path)
    at = known.group() if known else "/"
    parts = [part for part in path[len(at):].split("/") if part]
    fd = os.open(at, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    steps = [way_step(at, fd)]
    try:
        for number, part in enumerate(parts, 1):
            at = os.path.join(at, part)
            is_last = number == len(parts)
            inner = open_step(fd, part, is_last, (0o700 if is_last else 0o755) if make else None)
            os.close(fd)
            fd = inner
            steps.append(way_step(at, fd))
        return fd, steps
    except OSError as error:
        os.close(fd)
        raise OSError(error.errno, error.strerror, at) from None


def exposed_steps(steps: Sequence[Tuple[str, os.stat_result]], runs: Optional[Tuple[int, int]] = None,
                  ) -> List[Tuple[str, str]]:
    """The steps of a way at which others decide what stands there or below: each with why.

    In a folder with the sticky bit everybody may make something, but move only what is his own.
    runs: the ids of the user who runs and of his group, where that is on another machine.
    """
    user, group = runs or (os.geteuid(), os.getegid())
    trusted_groups, exposed = (0, group), []
    for (path, found), (_, inner) in zip(steps, list(steps[1:]) + [steps[-1]]):
        is_shared = found.st_mode & 0o002 or (found.st_mode & 0o020 and found.st_gid not in trusted_groups)
        is_kept = found.st_mode & stat.S_ISVTX and inner is not found and not is_of_others(inner, user)
        if is_of_others(found, user):
            exposed.append((path, "belongs to user {}".format(found.st_uid)))
        elif is_shared and not is_kept:
            exposed.append((path, "can be written by others"))
    return exposed


def is_exposed(folder: str) -> bool:
    """Whether others decide what bears the names in a folder. OSError."""
    fd, steps = open_way(folder)
    os.close(fd)
    return bool(exposed_steps(steps))


@contextlib.contextmanager
def firm_path(path: str, uuid: Optional[str]) -> Iterator[str]:
    """A path that leads to the subvolume with this UUID at `path` alone, whatever others make of the name meanwhile.

    Where nobody else has a say it is the path itself, but not in an open folder, whose own path may change. OSError;
    BackupError where it is another subvolume.
    """
    folder, name = os.path.split(path)
    fd, steps = open_way(folder)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, fd)
        if exposed_steps(steps) or OPEN_FOLDER.match(path):
            inner = open_step(fd, name, True, None)
            stack.callback(os.close, inner)
            path = "/proc/{}/fd/{}".format(os.getpid(), inner)
            if os.fstat(inner).st_ino != SUBVOLUME_INODE or subvolume_of_fd(inner, name).uuid != uuid:
                raise BackupError("{} has become another".format(os.path.join(folder, name)), "look there")
        yield path


def foreign_link(path: str) -> str:
    """The first link on the way to `path` that somebody else has made than root and the user who runs, or ''.

    Under sudo that is the one who typed the command as well.
    """
    users = {"0", str(os.geteuid()), os.environ.get("SUDO_UID", "0")}
    at, left, most = "/", path.split("/")[::-1], 1000
    while left and most:
        part, most = left.pop(), most - 1
        at = os.path.dirname(at) if part == ".." else os.path.join(at, part) if part not in ("", ".") else at
        try:
            found = os.lstat(at)
            if stat.S_ISLNK(found.st_mode):
                if str(found.st_uid) not in users:
                    return at
                target = os.readlink(at)
                at, left = "/" if target.startswith("/") else os.path.dirname(at), left + target.split("/")[::-1]
        except OSError:
            break
    return ""


########################################################################################################
# FILES: small files, read and written so that nobody else can have a hand in it
#
# All small files of this program, wherever they lie, go through here. What is read is opened without following links,
# must be a plain file with a single name, and is waited for never. What is written stands aside, is synced, gets its
# name, and the folder is synced.
########################################################################################################

LOCK_FILE = ".outstanding_transfers"
LARGEST_NOTE, LARGEST_STATE = 1 << 20, 64 << 20  # bytes of a file about one backup, about all
ENOUGH_FOR_STATE = 64 << 10  # bytes
ASIDE = ".new"  # ends the name of a file that shall replace another


def open_plain(name: str, flags: int, folder: int, single: bool = True) -> int:
    """Opens the plain file `name` in an open folder, for its user alone where it is made. single: of no other name.

    Whatever else bears the name: OSError at once, and nothing was followed, waited for or changed.
    """
    fd = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o600, dir_fd=folder)
    found = os.fstat(fd)
    if stat.S_ISREG(found.st_mode) and (found.st_nlink <= 1 or not single):  # 0: replaced meanwhile
        return fd
    os.close(fd)
    raise OSError(errno.EMLINK, "it is no plain file with a single name")


@contextlib.contextmanager
def opened_folder(path: str) -> Iterator[int]:
    """The folder at `path` as a file descriptor."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def plain_error(path: str, doing: str, error: OSError, hint: str = "") -> BackupError:
    """What is said of the plain file at `path` where `doing` it failed. hint: where nothing better is known."""
    if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.EMLINK):  # a link, a socket, a folder
        return BackupError("cannot {} {}: it is no plain file with a single name".format(doing, path),
                           "somebody may have put it there; look at it, and move it away")
    words = error.strerror or str(error)
    return os_error("cannot {} {}".format(doing, path), OSError(error.errno, words), hint_for(words) or hint)


def read_note(folder: str, name: str, most: int = LARGEST_NOTE, single: bool = True) -> Tuple[str, os.stat_result]:
    """The text of a small plain file, of at most so many bytes, and what is known of the file. OSError."""
    with opened_folder(folder) as top:
        fd = open_plain(name, os.O_RDONLY, top, single)
    with open(fd, encoding="utf-8", errors="surrogateescape") as file:
        found = os.fstat(fd)
        if found.st_size > most:
            raise OSError(errno.EFBIG, "it is larger than {}".format(format_size(most)))
        return file.read(most), found


def open_log(path: str) -> int:
    """Opens a log for appending. In a folder where others decide what bears its name it must be a plain file.

    A fifo would stop the run, a link would lead to a file of root's.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    place, name = os.path.split(os.path.abspath(path))
    folder, steps = open_way(os.path.realpath(place))
    try:
        if not exposed_steps(steps) and not foreign_link(os.path.join(place, name)):
            return os.open(path, flags, 0o666)
        return open_plain(name, flags, folder)
    except OSError as error:
        raise plain_error(path, "write", error, "the run goes on without this log") from None
    finally:
        os.close(folder)


def write_aside(folder: int, name: str, content: bytes, durably: bool) -> None:
    """A new file of that name, in place of what a crash or anybody left under it; none where that fails."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
    fd = open_plain(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, folder)
    try:
        with open(fd, "wb", 0) as file:
            left = memoryview(content)
            while left:
                left = left[file.write(left):]
            if durably:
                os.fsync(fd)
    except OSError:
        os.unlink(name, dir_fd=folder)
        raise


def sync_folder(folder: Union[int, str]) -> None:
    """Makes renames in a folder durable, at a path or open; some filesystems of networks know of no such thing."""
    fd = folder if isinstance(folder, int) else os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        if fd is not folder:
            os.close(fd)


def replace_file(folder: str, name: str, text: str, durably: bool = True, aside: str = "") -> None:
    """Replaces a small file; durably: after any crash it is the old or the new one, whole."""
    aside = aside or name + ASIDE
    try:
        with opened_folder(folder) as top:
            try:
                write_aside(top, aside, text.encode("utf-8", "surrogateescape"), durably)
                os.rename(aside, name, src_dir_fd=top, dst_dir_fd=top)
            except BaseException:  # a signal as well
                with contextlib.suppress(OSError):
                    os.unlink(aside, dir_fd=top)
                raise
            if durably:
                sync_folder(top)
    except OSError as error:
        raise plain_error(os.path.join(folder, name), "write", error) from None


def prove_writable(folder: str) -> None:
    """BackupError where the state files of a folder could not be replaced."""
    path = os.path.join(folder, LOCK_FILE)
    try:
        with opened_folder(folder) as top:
            write_aside(top, LOCK_FILE + ASIDE, bytes(ENOUGH_FOR_STATE), durably=False)
            os.unlink(LOCK_FILE + ASIDE, dir_fd=top)
    except OSError as error:
        raise plain_error(path, "write", error) from None


def boot_id() -> str:
    """What tells this boot of the machine from others."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def unlink_own(path: str, fd: int) -> None:
    """Removes the name of an open file where it still is that file's."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(fd), os.lstat(path)):
            os.unlink(path)


def remove_file(folder: str, name: str) -> None:
    """Removes a file; no error where it is gone already."""
    try:
        os.unlink(os.path.join(folder, name))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise os_error("cannot delete {}".format(os.path.join(folder, name)), error) from None


########################################################################################################
# STATE: locks and pins in the snapshot folder
#
# `.outstanding_transfers` holds locks and parent notes in the format of release 0.6.6, so that either
# program takes over from the other; `.destinations.json` the pins, `.own-destinations.json` the far destinations
# whose notes no puller may change; in a folder of backups `.PREFIX.source` says whose they are. Each change
# reads, changes its own entries, writes aside, syncs, renames and syncs the folder, under a flock on it. What
# cannot be read as that format is an error, for without it nothing may be deleted. A run holds a flock on a file
# of its prefix; the kernel drops it however the run ends. All small files of this program, wherever they lie,
# are read and written by the few functions here, for others may own the folder: no link is followed, nothing but
# a plain file with a single name is opened, and nothing is waited for without limit.
########################################################################################################

PIN_FILE = ".destinations.json"
SOURCE_NOTE = ".source"  # ends the name of the note that says whose backups of a prefix a folder holds
MOST_TEXT = 1 << 16  # characters of one text
OWN_FILE = ".own-destinations.json"
Pins = Dict[str, Dict[str, Tuple[Pin, ...]]]  # {destination: {prefix: pins}}
FORMAT_ERRORS = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # of what is read


@functools.lru_cache(maxsize=None)
def is_sequence_type(origin: Any) -> bool:
    import collections.abc as abc
    return origin in (list, List, Sequence, abc.Sequence, Iterable, abc.Iterable)


def is_of_type(value: Any, hint: Any) -> bool:
    """Whether a value that was read or arrived is what is declared. Typing's own names differ before Python 3.7."""
    origin = getattr(hint, "__origin__", None)
    arguments: Tuple[Any, ...] = getattr(hint, "__args__", None) or ()
    if hint is Any:
        return True
    if origin is Union:
        return any(is_of_type(value, one) for one in arguments)
    if is_sequence_type(origin):
        return isinstance(value, (list, tuple)) and all(is_of_type(item, arguments[0]) for item in value)
    if origin in (tuple, Tuple):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return isinstance(value, tuple) and all(is_of_type(item, arguments[0]) for item in value)
        return isinstance(value, tuple) and len(value) == len(arguments) and all(map(is_of_type, value, arguments))
    if origin in (frozenset, FrozenSet, set, Set):
        return isinstance(value, frozenset) and all(is_of_type(item, arguments[0]) for item in value)
    if origin in (dict, Dict):
        return isinstance(value, dict) and all(
            is_of_type(key, arguments[0]) and is_of_type(item, arguments[1]) for key, item in value.items())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
    if hint is str:
        return isinstance(value, str) and len(value) <= MOST_TEXT and "\0" not in value
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


@functools.lru_cache(maxsize=None)
def type_hints(declared: Any) -> Dict[str, Any]:
    return get_type_hints(declared)


def check_fields(value: Any) -> Any:
    """A NamedTuple as it is; TypeError, which names the field, where one is not of the type that it declares."""
    declared: Any = type(value)
    for field, hint in type_hints(declared).items():
        if not is_of_type(getattr(value, field), hint):
            raise TypeError(field)
    return value


class LockChange(NamedTuple):
    """One transfer's lock, to set or to clear."""

    snapshot: str
    destination: str
    parent: Optional[str] = None


def parse_locks(text: str) -> Locks:
    """The locks that `text` holds; ValueError for anything but the format."""
    import json
    locks = json.loads(text)
    if not isinstance(locks, dict):
        raise ValueError("not an object")
    for name, entry in locks.items():
        if not isinstance(entry, dict) or not set(entry) <= set(LOCK_KINDS):
            raise ValueError("not locks of {!r}".format(name))
        for destinations in entry.values():
            if not isinstance(destinations, list) or not all(isinstance(d, str) for d in destinations):
                raise ValueError("not a list of destinations for {!r}".format(name))
    return locks


def add_locks(locks: Locks, changes: Iterable[LockChange]) -> Locks:
    result = {name: {kind: list(entry.get(kind, ())) for kind in LOCK_KINDS} for name, entry in locks.items()}
    for change in changes:
        for name, kind in ((change.snapshot, "locks"), (change.parent, "parent_locks")):
            if name is not None:
                entry = result.setdefault(name, {"locks": [], "parent_locks": []})
                if change.destination not in entry[kind]:
                    entry[kind].append(change.destination)
    return result


def clear_locks(locks: Locks, changes: Iterable[LockChange]) -> Locks:
    gone = set()
    for change in changes:
        gone |= {(change.snapshot, "locks", change.destination), (change.parent, "parent_locks", change.destination)}
    result = {name: {kind: [d for d in entry.get(kind, ()) if (name, kind, normal_destination(d)) not in gone]
                     for kind in LOCK_KINDS} for name, entry in locks.items()}
    return {name: entry for name, entry in result.items() if entry["locks"] or entry["parent_locks"]}


def bound_changes(changes: Iterable[LockChange], filesystem: Optional[str]) -> List[LockChange]:
    """Changes of locks, and those of the entries that bind them to the filesystem that a destination is on.

    Without a UUID it is none that is known again, and a name may be too long: then nothing is bound.
    """
    result = []
    for change in changes:
        result.append(change)
        names = [name and "{} on {}".format(name, filesystem) for name in (change.snapshot, change.parent)]
        if is_uuid(filesystem) and all(len(os.fsencode(name or "")) <= LARGEST_NAME for name in names):
            result.append(LockChange(names[0] or "", change.destination, names[1]))
    return result


def locks_of(locks: Locks, destination: str, prefix: str, filesystem: Optional[str] = None) -> List[LockChange]:
    """The locks and notes that snapshots of `prefix` have for `destination`: on one filesystem, or (None) on all."""
    there, changes = locks_on(own_locks(locks, prefix), filesystem), []
    for name in own_locks(locks, prefix):
        snapshot, where = split_lock_name(name)
        if filesystem is None or where in (None, filesystem):
            noted = [snapshot in locked_names(there, destination, kind) for kind in LOCK_KINDS]
            changes += [LockChange(name, destination)] * noted[0] + [LockChange("", destination, name)] * noted[1]
    return changes


def format_locks(locks: Locks) -> str:
    import json
    return json.dumps(locks, indent=1, sort_keys=True) + "\n"


def changed_pins(pins: Pins, prefix: str, changes: Dict[str, Optional[Pin]]) -> Pins:
    """Pins with those of `prefix` set by destination and filesystem; None forgets all of a destination."""
    after = {destination: dict(entry) for destination, entry in pins.items()}
    for destination, pin in changes.items():
        before = after.setdefault(destination, {}).pop(prefix, ())
        if pin is not None:
            after[destination][prefix] = with_pin(before, pin)
    return {destination: entry for destination, entry in after.items() if entry}


def parse_pin(fields: Dict[str, Any]) -> Pin:
    sent = fields.get("sent", [])
    if not isinstance(sent, list):
        raise TypeError("sent")
    return check_fields(Pin(**dict(fields, sent=tuple(sent))))


def parse_pins(text: str) -> Pins:
    """The pins that `text` holds; an error of the kinds in FORMAT_ERRORS for anything but the format."""
    import json
    document = json.loads(text)
    return {destination: {prefix: tuple(map(parse_pin, entry if isinstance(entry, list) else [entry]))
                          for prefix, entry in entries.items()}
            for destination, entries in document["destinations"].items()}


def plain_pins(pins: Tuple[Pin, ...]) -> Any:
    """Pins as JSON holds them: a single one as release 0.7.0 wrote it, several as a list."""
    plain = [{key: value for key, value in pin._asdict().items() if key != "sent" or value} for pin in pins]
    return plain[0] if len(plain) == 1 else plain


def format_pins(pins: Pins) -> str:
    import json
    plain = {destination: {prefix: plain_pins(entry) for prefix, entry in entries.items()}
             for destination, entries in pins.items()}
    return json.dumps({"version": 1, "destinations": plain}, indent=1, sort_keys=True) + "\n"


def parse_sources(text: str) -> Tuple[str, ...]:
    import json
    sources = json.loads(text)["sources"]
    if not isinstance(sources, list) or not all(isinstance(key, str) and len(parse_uuid(key)) == 16 for key in sources):
        raise ValueError("not UUIDs")
    return tuple(sources)


def format_sources(sources: Sequence[str]) -> str:
    import json
    return json.dumps({"version": 1, "sources": list(sources)}, sort_keys=True) + "\n"


def source_note_name(prefix: str) -> str:
    return "." + prefix + SOURCE_NOTE if prefix else SOURCE_NOTE


class Claim(NamedTuple):
    """What a source wants the note about `prefix` in a folder to say, and what it has seen there."""

    prefix: str
    before: Tuple[str, ...]
    after: Tuple[str, ...]


def check_claim(folder: str, claim: Claim, found: Sequence[str], names: Iterable[str]) -> None:
    """BackupError unless a note is as it was seen, and those whose backups are among `names` stay in it."""
    gone = not set(claim.before) <= set(claim.after)
    if tuple(found) != claim.before or (
            gone and any(name_time(claim.prefix, partial_of(name) or name) for name in names)):
        raise BackupError("another source has begun to send backups of prefix {} to {}".format(
            printable(repr(claim.prefix)), folder), "give each a prefix of its own with -p, or a folder of its own")
    if len(claim.after) > MOST_SOURCE_IDS or not all(len(parse_uuid(key)) == 16 for key in claim.after):
        raise BackupError("that names no source")


def delete_firm(firm: str, path: str, command: Callable[[Sequence[str], str], Any] = check) -> None:
    """Deletes the subvolume at `path`, to which `firm` leads, see `firm_path`. command: runs a program. OSError."""
    if firm != path:
        try:
            destroy_open_subvolume(firm)
            return
        except OSError as error:
            if error.errno != errno.ENOTTY and os.geteuid() == 0:  # by ids only root may delete
                raise
    command(["btrfs", "subvolume", "delete", firm], "cannot delete {}".format(path))


def parse_own(text: str) -> Dict[str, List[str]]:
    import json
    destinations = json.loads(text)["destinations"]
    if not is_of_type(destinations, List[str]):
        raise ValueError("not a list of destinations")
    return {"destinations": destinations}


DAMAGE_HINTS = {
    LOCK_FILE: "mend it, or move it away if no transfer is unfinished",
    PIN_FILE: "mend it, or move it away: then snapshots that absent destinations need are no longer protected",
    OWN_FILE: "mend it, or move it away and run the backups of this machine, which note their destinations anew"}


def parse_state(path: str, text: str, parse: Callable[[str], Any]) -> Any:
    """What `parse` makes of the content of the state file at `path`."""
    try:
        return parse(text)
    except FORMAT_ERRORS:
        hint = DAMAGE_HINTS.get(os.path.basename(path),
                                "it says whose the backups are: mend it, or delete it where they are of one source")
        raise BackupError("{} is damaged or not ours, so nothing was changed".format(path), hint) from None


def read_state_file(folder: str, name: str, parse: Callable[[str], Any], own: bool = False) -> Any:
    """What `parse` makes of a state file, {} where there is none. own: BackupError for one of another user's."""
    path = os.path.join(folder, name)
    try:
        text, found = read_note(folder, name, LARGEST_STATE)
        if own and is_of_others(found):
            raise BackupError("{} belongs to user {}".format(path, found.st_uid))
        return parse_state(path, text, parse)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise plain_error(path, "read", error) from None


def read_own_destinations(folder: str) -> List[str]:
    """The destinations on other machines that this machine's own runs have noted in `folder`."""
    return list(read_state_file(folder, OWN_FILE, parse_own).get("destinations", ()))


def note_own_destinations(folder: str, destinations: Iterable[str]) -> None:
    """Keeps in mind which notes a key that others have must never touch."""
    import json
    far = {destination for destination in destinations if destination.startswith(("ssh://", "raw+ssh://"))}
    known = read_own_destinations(folder) if far else []
    if not far <= set(known):
        replace_file(folder, OWN_FILE, json.dumps(
            {"version": 1, "destinations": sorted(far | set(known))}, indent=1) + "\n")


def parse_record(text: str) -> Record:
    """The record that `text` holds; an error of the kinds in FORMAT_ERRORS for what is none."""
    import json
    fields = json.loads(text)
    point = fields.pop("point")
    marks = tuple(check_fields(Mark(offset, sha256)) for offset, sha256 in point["marks"])
    acl = point["acl"]  # a record of somebody who did not know of it cannot be gone on with
    if acl is not None:
        bytes.fromhex(acl)
    record = check_fields(Record(**fields)._replace(point=ResumePoint(marks, point["file_data"], acl=acl)))
    for uuid in (record.stream_id, record.private, record.parent_id, record.base):
        if uuid is not None and len(parse_uuid(uuid)) != 16:
            raise ValueError("not a UUID")
    if not record.point.is_sound or not is_of_type(record.point.file_data, int):
        raise ValueError("not marks")
    return record


def format_record(record: Record) -> str:
    import json
    point = {"marks": [list(mark) for mark in record.point.marks], "file_data": record.point.file_data,
             "acl": record.point.acl}
    return json.dumps(dict(record._asdict(), point=point), indent=1, sort_keys=True) + "\n"


def read_record(folder: str, name: str) -> Optional[Record]:
    """The record of snapshot `name`'s partial; None where there is none, or one that cannot be read as such.

    Nor is one believed that somebody else could have made: a transfer would go on from what he put there.
    """
    try:
        text, found = read_note(folder, record_name(name))
        record = parse_record(text)
    except (OSError,) + FORMAT_ERRORS:
        return None
    return record if record.name == name and not is_of_others(found) else None


def remove_record(folder: str, name: str) -> None:
    for path in (record_name(name), record_name(name) + ASIDE):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, path))


########################################################################################################
# LOCKS: who works on a folder now
#
# A run holds a flock on a file of its prefix; the kernel drops it however the run ends. Changes of notes take turns
# by a flock on the folder.
########################################################################################################

MUTEX_PATIENCE = 60.0  # seconds; a change takes milliseconds


def try_flock(fd: int) -> bool:
    """Takes the flock of an open file, unless another has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def folder_mutex(folder: str) -> Iterator[None]:
    """Keeps other runs, of other prefixes too, from changing the state files meanwhile.

    BackupError where that is not to be had: whoever may read the folder can hold its flock.
    """
    deadline = time.monotonic() + MUTEX_PATIENCE
    with opened_folder(folder) as fd:
        while not try_flock(fd):
            if time.monotonic() > deadline:
                raise BackupError("another program holds a lock on the folder {}".format(folder),
                                  "see which: {}; to keep others out: {}".format(
                                      typed(["fuser", "-v", folder]), typed(["chmod", "go=", folder])))
            time.sleep(0.01)
        yield


def run_lock_name(prefix: str) -> str:
    return "." + prefix + ".lock" if prefix else ".lock"


def has_open(pid: str, top: os.stat_result) -> bool:
    """Whether a process has the file `top` open; also True where it may not be asked.

    Compared is what is open, not by which path: that process may see it at another one.
    """
    try:
        for fd in os.listdir("/proc/{}/fd".format(pid)):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                opened = os.stat("/proc/{}/fd/{}".format(pid, fd))
                if (opened.st_dev, opened.st_ino) == (top.st_dev, top.st_ino):
                    return True
    except (FileNotFoundError, ProcessLookupError):
        pass  # it has ended
    except OSError:
        return True
    return False


def is_flocked(path: str) -> bool:
    """Whether some process holds a flock on the file at `path`; told without trying, which would be in its way."""
    try:
        top = os.stat(path)
        with open("/proc/locks", encoding="ascii") as locks:
            lines = [line.split() for line in locks]
    except OSError:
        return False
    held = [words[4] for words in lines if len(words) > 5 and words[1] == "FLOCK"
            and words[5].split(":")[-1] == str(top.st_ino)]
    return any(pid in ("0", "-1") or has_open(pid, top) for pid in held)  # 0: outside of this container


def lock_holder(fd: int) -> Optional[int]:
    """The id of the process that has a POSIX lock on a file; None where there is none that we can see."""
    asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, pid = struct.unpack("hhqqi", fcntl.fcntl(fd, fcntl.F_GETLK, asked)[:struct.calcsize("hhqqi")])
    return pid if kind != fcntl.F_UNLCK and pid > 1 else None


def ask_to_end(pid: int) -> None:
    """The same as the user's request; also for one that was stopped."""
    signal_process(pid, signal.SIGTERM)
    signal_process(pid, signal.SIGCONT)


@contextlib.contextmanager
def run_lock(folder: str, prefix: str, wait: float, on_wait: Callable[[], None], token: str = "") -> Iterator[None]:
    """Holds the one-run-at-a-time lock of `prefix` in `folder`; Busy when it is not free within `wait` seconds.

    token: tells the run, so that an agent of its own which waits at the end of a dead connection can be ended.
    """
    path = os.path.join(folder, run_lock_name(prefix))
    try:
        with opened_folder(folder) as top:
            fd = open_plain(run_lock_name(prefix), os.O_RDWR | os.O_CREAT, top)
    except OSError as error:
        raise plain_error(path, "write", error, "is the folder writable?") from None
    try:
        deadline, waited = time.monotonic() + wait, False
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells others our process id
                if os.pread(fd, 100, 0) != token.encode():
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, token.encode(), 0)
                break
            except BlockingIOError:
                pid = lock_holder(fd) if token and os.pread(fd, 100, 0) == token.encode() else None
                if pid is not None:
                    ask_to_end(pid)
                if time.monotonic() >= deadline:
                    raise Busy("another run is at work in {}".format(folder), "it has not ended within {}: wait longer"
                               .format(format_duration(wait)) if wait else "wait for it, or use --wait") from None
                if not waited:
                    on_wait()
                waited = True
                time.sleep(0.1)
        yield
    finally:
        os.close(fd)


########################################################################################################
# SWAP: a restored state put in a subvolume's place
#
# The new subvolume is made ready beside the place, under a name that says so, and made durable; then both
# change names in one step, so that at every moment the old or the new one stands there. Notes beside the
# place, written first and removed last, say what belongs to whom by UUID: the next call completes or undoes
# what was broken off, whenever that was. The old one is kept. Locks move on to the new snapshot folder, as
# they tell of partials at destinations; pins then name the restored state, which is all that is left in
# common. Never deleted: anything but what the notes name and that was made of the restored subvolume.
########################################################################################################

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2  # uapi/linux/fs.h
RENAMEAT2_NUMBERS = {"x86_64": 316, "aarch64": 276, "riscv64": 276, "armv7l": 382, "i686": 353, "ppc64le": 357,
                     "s390x": 347}  # for C libraries without the function, as glibc before 2.28
AT_FDCWD = -100


class SwapPlace(NamedTuple):
    """The place of a swap: what stands there, and where that is mounted as well."""

    path: str
    old: Optional[Subvolume]
    mounts: Tuple[str, ...]
    is_broken: bool


class SwapOrder(NamedTuple):
    """What shall be swapped in at `place`.

    snapshots: the snapshot folder, relative to the place or absolute. temporary: the folder of the restored
    subvolume was made for this swap. key, pin: the destination that the backup lies at.
    """

    place: str
    restored: str
    name: str
    snapshots: str
    temporary: bool
    old_name: str
    key: str
    pin: Pin


class SwapNotes(NamedTuple):
    """The notes of a swap. `kept` is the read-only snapshot's path in the new subvolume, '' where outside.

    new_uuid is known once the new subvolume is whole and durable.
    """

    name: str
    stream_id: str
    restored: str
    restored_uuid: str
    temporary: bool
    kept: str
    old_uuid: Optional[str]
    old_name: str
    new_uuid: Optional[str] = None


def rename_with(flag: int, source: str, target: str) -> bool:
    """Renames by renameat2; False where kernel, C library or Python cannot, OSError where it fails."""
    try:
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
    except (ImportError, OSError):
        return False
    paths = (AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flag)
    number = RENAMEAT2_NUMBERS.get(os.uname().machine)
    if hasattr(libc, "renameat2"):
        status = libc.renameat2(*paths)
    elif number is not None and sys.maxsize > 2 ** 32:
        status = libc.syscall(ctypes.c_long(number), *paths)
    else:
        return False
    code = ctypes.get_errno()
    if status != 0 and code not in (errno.ENOSYS, errno.EINVAL):
        raise OSError(code, os.strerror(code))
    return status == 0


def rename_to_free(source: str, target: str) -> None:
    """Renames where nothing bears the target's name."""
    if rename_with(RENAME_NOREPLACE, source, target):
        return
    if os.path.lexists(target):
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
    os.rename(source, target)


def put_in_place(aside: str, place: str, old_path: Optional[str]) -> None:
    """Puts `aside` at `place`: in exchange for what is there, whose later path is `old_path`, or None.

    Without RENAME_EXCHANGE (Linux before 3.15, a Python without ctypes) in two steps: nothing stands at the
    place between them, and the notes bring the next call through.
    """
    if old_path is None:
        rename_to_free(aside, place)
    elif not rename_with(RENAME_EXCHANGE, aside, place):
        rename_to_free(place, old_path)
        rename_to_free(aside, place)


def beside(place: str, ending: str) -> str:
    return os.path.join(os.path.dirname(place), ".{}.{}".format(os.path.basename(place), ending))


def subvolume_at(path: str) -> Optional[Subvolume]:
    return read_subvolume(path, os.path.basename(path))


def read_swap_notes(place: str) -> Optional[SwapNotes]:
    """The notes of a swap at `place`; BackupError for what is none of ours, as subvolumes are deleted by them."""
    import json
    folder, name = os.path.split(beside(place, "restoring.json"))
    try:
        text, found = read_note(folder, name)
        if is_of_others(found):
            raise ValueError("it belongs to user {}".format(found.st_uid))
        return check_fields(SwapNotes(**json.loads(text)))
    except FileNotFoundError:
        return None
    except (OSError,) + FORMAT_ERRORS as error:
        raise BackupError("cannot read {}: {}".format(os.path.join(folder, name), error), "what a broken restore left "
                          "of {} must be looked at by hand; then move that file away".format(place)) from None


def write_swap_notes(place: str, notes: SwapNotes) -> None:
    import json
    folder, name = os.path.split(beside(place, "restoring.json"))
    replace_file(folder, name, json.dumps(notes._asdict(), indent=1, sort_keys=True) + "\n")


def delete_subvolume(path: str, found: Subvolume) -> None:
    with firm_path(path, found.uuid) as firm:
        delete_firm(firm, path)


def delete_prepared(aside: str, notes: SwapNotes) -> None:
    """Deletes a new subvolume that never got to its place, and the snapshot kept in it."""
    for path in [os.path.join(aside, notes.kept)] * bool(notes.kept) + [aside]:
        with contextlib.suppress(OSError):  # no such folder, or a link of the backup's, that nothing was made behind
            os.close(open_way(os.path.dirname(path))[0])
            made = subvolume_at(path)
            if made is not None and made.parent_uuid != notes.restored_uuid:
                raise BackupError("{} is not what a broken restore left".format(path), "move it away and try again")
            if made is not None:
                delete_subvolume(path, made)


def remove_restore_folder(folder: str) -> None:
    """Removes a folder that holds nothing but what a restore notes for itself."""
    with contextlib.suppress(OSError):
        with contextlib.ExitStack() as stack:
            fd, _ = open_way(folder)
            stack.callback(os.close, fd)
            if all(name == LOCK_FILE or name.endswith(".lock") for name in os.listdir(fd)):
                for name in os.listdir(fd):
                    os.unlink(name, dir_fd=fd)
                os.rmdir(folder)


def remove_temporary(notes: SwapNotes) -> None:
    """Removes the restored subvolume and its folder where both were made for the swap alone."""
    found, folder = subvolume_at(notes.restored), os.path.dirname(notes.restored)
    if found is not None and found.uuid == notes.restored_uuid:
        delete_subvolume(notes.restored, found)
    remove_restore_folder(folder)


def finish_swap(place: str) -> Optional[SwapNotes]:
    """Completes or undoes the swap that the notes at `place` tell of.

    The notes, where the new subvolume now stands at its place; None where there are none or it does not.
    """
    notes, aside = read_swap_notes(place), beside(place, "restoring")
    if notes is None:
        return None
    standing, waiting = subvolume_at(place), subvolume_at(aside)
    try:
        if standing is None and waiting is not None and waiting.uuid == notes.new_uuid:
            rename_to_free(aside, place)
        elif waiting is not None and waiting.uuid == notes.old_uuid:
            rename_to_free(aside, os.path.join(os.path.dirname(place), notes.old_name))
        elif waiting is not None:
            delete_prepared(aside, notes)
        sync_filesystem(os.path.dirname(place))
        standing = subvolume_at(place)
        is_done = standing is not None and standing.uuid == notes.new_uuid
        if is_done and notes.temporary:
            remove_temporary(notes)
        os.unlink(beside(place, "restoring.json"))
        sync_folder(os.path.dirname(place))
    except OSError as error:
        raise os_error("cannot swap at {}".format(place), error) from None
    return notes if is_done else None


def is_mounted(point: str, subvolume: Subvolume) -> bool:
    try:
        found = subvolume_at(point)
    except OSError:
        return False
    return found is not None and found.uuid == subvolume.uuid


def look_at_swap_place(path: str) -> SwapPlace:
    """The place of a swap; BackupError where none can be done there."""
    place, mounts = os.path.realpath(path), read_mounts()
    if not os.path.isdir(os.path.dirname(place)) or place == "/":
        raise BackupError("no such folder: {}".format(os.path.dirname(place)), "is its filesystem mounted?")
    mounted = next((m for m in reversed(mounts) if m.point == place), None)
    if mounted is not None:
        raise BackupError("{} is a mount point, which cannot be swapped".format(path),
                          "it is the top level of {}: name a subvolume in it".format(mounted.device)
                          if mounted.root == "/" else
                          "mount the top level of {} (mount -o subvolid=5) and name the subvolume there: its path "
                          "in it is {}".format(mounted.device, mounted.root))
    old = subvolume_at(place)
    if old is None and os.path.lexists(place):
        raise BackupError("{} is no subvolume, so it cannot be swapped".format(path), "move it away")
    below = [m.point for m in mounts if m.point.startswith(place + "/")]
    if below:  # a rename would take them along
        raise BackupError("something is mounted below {}: {}".format(path, some_of(sorted(below))),
                          "unmount it first: {}".format(typed(["umount", "--"] + sorted(below, reverse=True))))
    points = [m.point for m in mounts if m.kind == "btrfs" and old is not None and is_mounted(m.point, old)]
    return SwapPlace(place, old, tuple(points), os.path.lexists(beside(place, "restoring.json")))


def free_name(folder: str, name: str) -> str:
    """`name`, or where something bears it, with the first free number added."""
    number, free = 1, name
    while os.path.lexists(os.path.join(folder, free)):
        number += 1
        free = "{}-{}".format(name, number)
    return free


@contextlib.contextmanager
def opened_snapshot_folder(folder: str) -> Iterator[str]:
    """A path that leads to the folder for the restored state, made where it is missing, through no link.

    A backup holds what another machine or a user has put into it: a link there may lead to another's snapshots.
    """
    try:
        fd, _ = open_way(folder, make=True)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        raise BackupError("{} is a link or no folder in the backup, so that nothing can be kept there".format(
            error.filename), "take -f with a folder outside of the subvolume, for it and its backups") from None
    try:
        yield "/proc/{}/fd/{}".format(os.getpid(), fd)
    finally:
        os.close(fd)


def remove_stand_ins(folder: str) -> None:
    """Removes the empty folders that a snapshot has in the place of snapshots that lay in the source."""
    with os.scandir(folder) as entries:
        stand_ins = [entry.path for entry in entries if os.lstat(entry.path).st_ino == STAND_IN_INODE]
    for path in stand_ins:
        os.rmdir(path)


def pins_after_restore(pins: Pins, order: SwapOrder, stream_id: str) -> Pins:
    """Pins that name the restored state: nothing newer is left in common with any destination.

    What was last sent into a command cannot be looked at, so there only a pin of this very state stays.
    """
    prefix = prefix_of(order.name)
    result = {destination: dict(entry) for destination, entry in pins.items()}
    if prefix is None:
        return result
    for destination, entry in result.items():
        if prefix in entry and not is_command(destination):
            entry[prefix] = tuple(order.pin._replace(filesystem=pin.filesystem) for pin in entry[prefix])
        elif prefix in entry and all(pin.uuid != stream_id for pin in entry[prefix]):
            del entry[prefix]
    return changed_pins(result, prefix, {order.key: order.pin})


def carry_state(old: str, new: str, order: SwapOrder, stream_id: str) -> List[str]:
    """Writes the state files of the new snapshot folder, from the old one where that is still there.

    Else the pins, which only protect, from what the restored state itself holds; no locks, for a backup says what
    whoever has it likes, and a lock may name a command. What cannot be read is named in a warning: what matters
    now is to get the data back.
    """
    is_there, warnings = os.path.isdir(old), []
    locks: Locks = {}
    pins: Pins = {}
    try:
        locks = read_state_file(old, LOCK_FILE, parse_locks, own=True) if is_there else {}
        pins = read_state_file(old if is_there else new, PIN_FILE, parse_pins, own=True)
    except BackupError as error:
        warnings.append("{}; the restored subvolume goes on without it".format(error.message))
    replace_file(new, LOCK_FILE, format_locks(locks))
    replace_file(new, PIN_FILE, format_pins(pins_after_restore(pins, order, stream_id)))
    return warnings


def prepare_swap(order: SwapOrder, notes: SwapNotes, snapshots: str) -> List[str]:
    """Makes the new subvolume beside the place, with a snapshot of the restored state and the state files."""
    aside = beside(order.place, "restoring")
    snapshot_argv = ["btrfs", "subvolume", "snapshot"]
    check(snapshot_argv + [order.restored, aside], "cannot take a snapshot of {}".format(order.restored))
    new = subvolume_at(aside)
    if new is None or new.received_uuid is not None:
        raise BackupError("the writable snapshot of {} kept its received UUID".format(order.restored))
    kept_in = os.path.dirname(os.path.join(aside, notes.kept)) if notes.kept else snapshots
    with opened_snapshot_folder(kept_in) as folder:
        path = os.path.join(folder, order.name)
        if notes.kept:
            remove_stand_ins(folder)
        there = subvolume_at(path)
        if there is None or not there.readonly or there.stream_id != notes.stream_id:
            if os.path.lexists(path):  # it would be made inside
                raise BackupError("{} is another one".format(os.path.join(kept_in, order.name)), "move it away")
            check(snapshot_argv + ["-r", order.restored, path], "cannot keep a snapshot of the restored state")
        return carry_state(snapshots, folder, order, notes.stream_id) if notes.kept else []


def swap_in(order: SwapOrder) -> Tuple[SwapNotes, List[str]]:
    """Swaps a writable snapshot of the restored subvolume in: the notes of it, and what there is to warn of."""
    place, restored, old = order.place, subvolume_at(order.restored), subvolume_at(order.place)
    if restored is None or not restored.is_received:
        raise BackupError("{} was not restored by receiving it, so nothing could be sent on top of it".format(
            order.restored), "restore it to another folder")
    folder = os.path.realpath(os.path.join(place, order.snapshots))
    inside = (folder + "/").startswith(place + "/")
    notes = SwapNotes(order.name, restored.received_uuid or "", order.restored, restored.uuid or "", order.temporary,
                      os.path.join(folder, order.name)[len(place) + 1:] if inside else "",
                      old.uuid if old else None, free_name(os.path.dirname(place), order.old_name))
    aside = beside(place, "restoring")
    if os.path.lexists(aside):
        raise BackupError("{} exists, and no notes of a restore name it".format(aside), "look at it, move it away")
    write_swap_notes(place, notes)
    try:
        warnings = prepare_swap(order, notes, folder)
        sync_filesystem(aside)
        new = subvolume_at(aside)
        write_swap_notes(place, notes._replace(new_uuid=new.uuid if new else None))
        put_in_place(aside, place, os.path.join(os.path.dirname(place), notes.old_name) if old else None)
        sync_filesystem(os.path.dirname(place))
    except OSError as error:
        finish_swap(place)
        raise os_error("cannot swap at {}".format(place), error) from None
    except BackupError:
        finish_swap(place)
        raise
    if finish_swap(place) is None:
        raise BackupError("the new subvolume does not stand at {}".format(place), "look there, and run again")
    return notes, warnings


########################################################################################################
# DIGEST: a tree of files as one digest, and what differs in two of them
#
# A folder's digest covers the name of each entry and all that send and receive are to bring over: type, mode,
# owner, time of change, extended attributes (ACLs and capabilities are such), target, device, content, and which
# names are one file. The tree's digest covers those of its folders. Left out: what a snapshot shows of nested
# subvolumes, the top folder's times, holes (a hole is the zeros it reads as). Contents go by blocks, so that
# threads share a large file, as hashing does not hold the interpreter, and holes are skipped unread.
########################################################################################################

DIGEST_BLOCK = 1 << 20
DIGEST_RUN = 32 * DIGEST_BLOCK  # of a large file, for one thread at a time
SMALL_FILE = 128 << 10  # bytes; below that another thread costs more than it gains
MOST_PENDING = 256  # runs handed to threads and not yet used
MOST_THREADS = 4
PAGE_OF_DIGESTS = 20000  # folders
MOST_DIGESTED = 4  # trees whose folders a host remembers
MOST_DIFFERENCES = 10  # that are named
TYPE_NAMES = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "symbolic link", stat.S_IFIFO: "fifo",
              stat.S_IFSOCK: "socket", stat.S_IFCHR: "character device", stat.S_IFBLK: "block device"}
Aspects = Dict[str, str]  # of one entry: what it is by what that is about


class TreeDigest(NamedTuple):
    """The digest of a tree, and how much it covers: entries, and bytes of file contents."""

    digest: str
    entries: int
    size: int


def open_quietly(path: bytes) -> int:
    """Opens a file for reading without a trace in its access time, where that is allowed."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, flags | os.O_NOATIME)
    except PermissionError:
        return os.open(path, flags)


@functools.lru_cache(maxsize=None)
def digest_of_zeros() -> bytes:
    import hashlib
    return hashlib.sha256(bytes(DIGEST_BLOCK)).digest()


def next_data(fd: int, at: int, end: int) -> int:
    """Where the first data at or after `at` begins, `end` where there is none."""
    try:
        return min(end, os.lseek(fd, at, os.SEEK_DATA))
    except OSError as error:
        return end if error.errno == errno.ENXIO else at


def digest_run(path: bytes, start: int, end: int, is_sparse: bool, buffer: bytearray) -> bytes:
    """The digests of the blocks of a file from `start`, a multiple of the block size, to `end`, put together."""
    import hashlib
    digests, at, view = [], start, memoryview(buffer)
    fd = open_quietly(path)
    try:
        while at < end:
            holes = (next_data(fd, at, end) - at) // DIGEST_BLOCK if is_sparse else 0
            digests.append(digest_of_zeros() * holes)
            at += holes * DIGEST_BLOCK
            os.lseek(fd, at, os.SEEK_SET)
            size = min(DIGEST_BLOCK, end - at)
            got = os.readv(fd, [view[:size]]) if size else 0
            while 0 < got < size:
                more = os.readv(fd, [view[got:size]])
                got = got + more if more else -1
            if got < size:
                raise OSError(errno.EIO, "it became shorter while it was read")
            if size:
                digests.append(hashlib.sha256(view[:size]).digest())
            at += size
    finally:
        os.close(fd)
    return b"".join(digests)


class Run:
    """A run of a file that a thread digests: its result or its error, once it is done."""

    def __init__(self, path: bytes, start: int, end: int, is_sparse: bool) -> None:
        self.path, self.start, self.end, self.is_sparse = path, start, end, is_sparse
        self.digests = b""
        self.error: Optional[BaseException] = None
        self.done = threading.Event()

    def do(self, buffer: bytearray) -> None:
        try:
            self.digests = digest_run(self.path, self.start, self.end, self.is_sparse, buffer)
        except BaseException as error:  # whatever it is, it is raised where the result is wanted
            self.error = error
        self.done.set()

    def result(self) -> bytes:
        self.done.wait()
        if self.error is not None:
            raise self.error
        return self.digests


class RunThreads:
    """Threads that digest runs of large files; they are made when the first one comes."""

    def __init__(self) -> None:
        import queue
        self.queue: Any = queue.Queue(MOST_PENDING)
        self.threads: List[threading.Thread] = []

    def put(self, run: Run) -> Run:
        if len(self.threads) < min(MOST_THREADS, os.cpu_count() or 1):
            self.threads.append(threading.Thread(target=self.work, daemon=True))
            self.threads[-1].start()
        self.queue.put(run)
        return run

    def work(self) -> None:
        buffer = bytearray(DIGEST_BLOCK)
        for run in iter(self.queue.get, None):
            run.do(buffer)

    def end(self) -> None:
        for _ in self.threads:
            self.queue.put(None)


class DigestedFolder(NamedTuple):
    """A folder whose entries are known but perhaps not yet all contents."""

    path: bytes
    names: List[bytes]
    aspects: List[Aspects]
    contents: Dict[int, List[Run]]  # by number of the entry


def aspects_of(path: bytes, status: os.stat_result, is_top: bool) -> Aspects:
    """All about an entry but links and content."""
    import hashlib
    kind = stat.S_IFMT(status.st_mode)
    aspects = {"type": TYPE_NAMES.get(kind, oct(kind)), "mode": "{:04o}".format(stat.S_IMODE(status.st_mode)),
               "owner": "{}:{}".format(status.st_uid, status.st_gid)}
    if not is_top:
        aspects["time"] = str(status.st_mtime_ns)
    if kind == stat.S_IFLNK:
        aspects["target"] = os.fsdecode(os.readlink(path))
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        aspects["device"] = "{}:{}".format(os.major(status.st_rdev), os.minor(status.st_rdev))
    for name in sorted(os.listxattr(path, follow_symlinks=False)):
        value = os.getxattr(path, name, follow_symlinks=False)
        aspects["attribute " + os.fsdecode(name)] = hashlib.sha256(value).hexdigest()
    return aspects


class TreeReader:
    """Reads a tree, folder by folder in the order of names, and remembers the digest of each folder."""

    def __init__(self, top: str, on_progress: Callable[[int], None] = lambda size: None) -> None:
        self.top, self.on_progress = os.fsencode(top), on_progress
        self.folders: Dict[bytes, str] = {}  # relative path to digest
        self.links: Dict[int, bytes] = {}  # inode of a file with several names to the first of them
        self.contents: Dict[int, str] = {}  # of the same
        self.entries = self.size = 0
        self.buffer = bytearray(DIGEST_BLOCK)
        self.threads = RunThreads()
        self.pending: "collections.deque[DigestedFolder]" = collections.deque()
        self.runs = 0
        self.last_told = time.monotonic()

    def run(self) -> TreeDigest:
        """The digest of the whole tree; BackupError where not all of it can be read."""
        import hashlib
        self.links.clear()
        left = [b""]
        try:
            while left:
                folder, inner = self.read_folder(left.pop())
                left += inner[::-1]
                self.pending.append(folder)
                self.settle(MOST_PENDING // 2)
            self.settle(0)
        finally:
            self.threads.end()
        whole = hashlib.sha256()
        for path in sorted(self.folders):
            whole.update(path + b"\0" + self.folders[path].encode("ascii") + b"\0")
        return TreeDigest(whole.hexdigest(), self.entries, self.size)

    def settle(self, most: int) -> None:
        """Brings folders to their digest until at most `most` runs are under way, and in any case those that can be."""
        while self.pending and (self.runs > most or not self.pending[0].contents or not most):
            folder = self.pending.popleft()
            self.folders[folder.path] = self.digest_folder(folder)
        self.tell()

    def tell(self) -> None:
        if time.monotonic() - self.last_told > 0.2:
            self.last_told = time.monotonic()
            self.on_progress(self.size)

    def digest_folder(self, folder: DigestedFolder) -> str:
        import hashlib
        whole = hashlib.sha256()
        self.add_contents(folder)
        for name, aspects in zip(folder.names, folder.aspects):
            whole.update(b"%s\0%s\0\0" % (name, os.fsencode("\0".join(map("\0".join, aspects.items())))))
        return whole.hexdigest()

    def add_contents(self, folder: DigestedFolder) -> None:
        """Adds the contents of large files, which threads have digested, to the folder's aspects."""
        import hashlib
        for number, runs in folder.contents.items():
            path = os.path.join(self.top, folder.path, folder.names[number])
            try:
                digests = b"".join(run.result() for run in runs)
            except OSError as error:
                raise self.unreadable(path, error) from None
            self.runs -= len(runs)
            folder.aspects[number]["content"] = hashlib.sha256(digests).hexdigest()

    @staticmethod
    def unreadable(path: bytes, error: OSError) -> BackupError:
        hint = "see dmesg: the disk or its data may be damaged" if error.errno == errno.EIO else ""
        return os_error("cannot read {}".format(os.fsdecode(path)), error, hint)

    def read_folder(self, folder: bytes) -> Tuple[DigestedFolder, List[bytes]]:
        """What is in a folder, and the paths of the folders in it."""
        path = os.path.join(self.top, folder) if folder else self.top
        found, inner = DigestedFolder(folder, [], [], {}), []
        at = path
        try:
            if not folder:
                self.add_entry(found, b".", path, os.lstat(path))
            for name in sorted(os.listdir(path)):
                at = os.path.join(path, name)
                status = os.lstat(at)
                if stat.S_ISDIR(status.st_mode):
                    if status.st_ino in (SUBVOLUME_INODE, STAND_IN_INODE):
                        continue
                    inner.append(os.path.join(folder, name))
                self.add_entry(found, name, at, status)
        except OSError as error:
            raise self.unreadable(at, error) from None
        return found, inner

    def add_entry(self, folder: DigestedFolder, name: bytes, path: bytes, status: os.stat_result) -> None:
        aspects = aspects_of(path, status, name == b"." and not folder.path)
        folder.names.append(name)
        folder.aspects.append(aspects)
        self.entries += 1
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            first = self.links.setdefault(status.st_ino, os.path.join(folder.path, name))
            aspects["links"] = os.fsdecode(first)
            if first != os.path.join(folder.path, name):
                return  # the same file again
        if stat.S_ISREG(status.st_mode):
            aspects["size"] = str(status.st_size)
            self.add_content(folder, path, status)

    def add_content(self, folder: DigestedFolder, path: bytes, status: os.stat_result) -> None:
        """Digests a small file at once, and hands a large one to the threads."""
        size, is_sparse = status.st_size, status.st_blocks * 512 < status.st_size
        if size <= SMALL_FILE:
            folder.aspects[-1]["content"] = self.digest_small(path, size)
            self.size += size
            return
        runs = folder.contents.setdefault(len(folder.names) - 1, [])
        for start in range(0, size, DIGEST_RUN):
            end = min(start + DIGEST_RUN, size)
            runs.append(self.threads.put(Run(path, start, end, is_sparse)))
            self.size += end - start
            self.runs += 1
            self.tell()

    def digest_small(self, path: bytes, size: int) -> str:
        import hashlib
        fd = open_quietly(path)
        try:
            got = os.readv(fd, [memoryview(self.buffer)[:size]]) if size else 0
        finally:
            os.close(fd)
        if got < size:  # where a read was interrupted, what follows reads on
            return hashlib.sha256(digest_run(path, 0, size, False, self.buffer)).hexdigest()
        block = hashlib.sha256(memoryview(self.buffer)[:size]).digest() if size else b""
        return hashlib.sha256(block).hexdigest()

    def page(self, after: str, most: int) -> List[Tuple[str, str]]:
        """At most `most` folders in the order of their paths, from the one after `after`, '' for all, with digests."""
        wanted = sorted(path for path in self.folders if not after or path > os.fsencode(after[1:]))[:most]
        return [("/" + os.fsdecode(path), self.folders[path]) for path in wanted]

    def describe(self, folder: str) -> Dict[str, Aspects]:
        """The aspects of each entry of a folder (its path begins with a slash)."""
        try:
            found, _ = self.read_folder(os.fsencode(folder[1:]))
            self.add_contents(found)
        finally:
            self.threads.end()
        return {os.fsdecode(name): aspects for name, aspects in zip(found.names, found.aspects)}


def differing_aspects(one: Optional[Aspects], other: Optional[Aspects]) -> str:
    """In words what differs in an entry: `content`, `owner 0:0 instead of 1000:1000`, `missing`."""
    if one is None or other is None:
        return "only in the backup" if one is None else "missing"
    if one["type"] != other["type"]:
        return "a {} instead of a {}".format(other["type"], one["type"])
    words: List[str] = []
    for key in list(one) + [key for key in other if key not in one]:
        ours, theirs = one.get(key), other.get(key)
        if ours == theirs or (key == "content" and "size" in words[-1:]):
            continue
        if key in ("mode", "owner", "target", "device"):
            words.append("{} {} instead of {}".format(key, theirs, ours))
        elif key == "links":
            words.append("hard links")
        elif key.startswith("attribute "):
            words.append(key + (" missing" if theirs is None else " added" if ours is None else ""))
        else:
            words.append("time of change" if key == "time" else key)
    return ", ".join(words)


########################################################################################################
# PART VI THE TRANSFER: one snapshot on its way
########################################################################################################


########################################################################################################
# CONFINEMENT: where a stream that others could have made is received
#
# A private folder, a mount namespace and a chroot, so that receive reaches nothing but the folder it works in, and
# follows no link, opens no device and runs nothing there, as far as the kernel can see to it.
########################################################################################################


class PrivateFolder:
    """A folder of this process alone, for sockets, whose paths may have 104 bytes, or to mount something at.

    It is held by a lock. What a killed run left empty, or with sockets that nobody listens on, the next one removes.
    """

    PREFIX = "bbng-"
    YOUNG = 60.0  # seconds in which it may not be held yet

    def __init__(self) -> None:
        import tempfile
        for parent in (tempfile.gettempdir(), "/tmp"):
            with contextlib.suppress(OSError):
                self.sweep(parent)
            self.path = tempfile.mkdtemp(prefix=self.PREFIX, dir=parent)
            if parent == "/tmp" or len(parent) < 60 and self.is_safe():
                break
            os.rmdir(self.path)
        try:
            self.fd = open_folder(self.path)
        except OSError:
            os.rmdir(self.path)
            raise
        fcntl.flock(self.fd, fcntl.LOCK_EX)

    def is_safe(self) -> bool:
        """Whether nobody else can put something in its place, as where TMPDIR is another user's folder."""
        try:
            return not is_exposed(self.path)
        except OSError:
            return False

    def sweep(self, parent: str) -> None:
        for entry in os.scandir(parent):
            if entry.name.startswith(self.PREFIX) and entry.is_dir(follow_symlinks=False):
                about = entry.stat(follow_symlinks=False)
                if about.st_uid == os.geteuid() and not 0 <= time.time() - about.st_mtime < self.YOUNG:
                    with contextlib.suppress(OSError):
                        self.remove_unless_held(entry.path)

    def remove_unless_held(self, path: str) -> None:
        fd = open_folder(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in os.listdir(fd):
                if stat.S_ISSOCK(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                    os.unlink(name, dir_fd=fd)
            os.rmdir(path)
        finally:
            os.close(fd)

    def end(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            with contextlib.suppress(OSError):
                self.remove_unless_held(self.path)


class Confinement:
    """A view of one folder's filesystem, for a `btrfs receive` whose stream is not trusted.

    In a mount namespace of its own, where no symbolic link is followed (MS_NOSYMFOLLOW, since Linux 5.10) and no
    device opened: so a stream cannot reach out of its own subvolume through what it has made there.
    """

    NEW_NAMESPACE, BIND, REMOUNT, PRIVATE, RECURSIVE, NO_LINKS = 0x20000, 4096, 32, 1 << 18, 16384, 256
    HAS_NO_LINKS = 0x2000  # in statvfs: a kernel that does not know MS_NOSYMFOLLOW takes it without a word
    HARMLESS = os.ST_NODEV | os.ST_NOSUID | os.ST_NOEXEC  # as in mount(2)

    def __init__(self, folder: str) -> None:
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        self.unshare, self.mount, self.errno = libc.unshare, libc.mount, ctypes.get_errno
        mount = mount_around(folder, read_mounts())
        self.mount_point = mount.point if mount is not None else "/"
        self.flags = (self.BIND | self.REMOUNT | self.NO_LINKS | self.HARMLESS
                      | (os.statvfs(folder).f_flag & os.ST_RDONLY))
        self.private = PrivateFolder()
        self.path = os.path.join(self.private.path, os.path.relpath(folder, self.mount_point))

    def enter(self) -> None:
        """Is called in the new process."""
        os.setpgrp()
        self.check(self.unshare(self.NEW_NAMESPACE))
        private = os.fsencode(self.private.path)
        self.check(self.mount(b"none", b"/", None, self.PRIVATE | self.RECURSIVE, None))
        self.check(self.mount(os.fsencode(self.mount_point), private, None, self.BIND, None))
        self.check(self.mount(None, private, None, self.flags, None))
        if not os.statvfs(private).f_flag & self.HAS_NO_LINKS:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def check(self, status: int) -> None:
        if status != 0:
            raise OSError(self.errno(), os.strerror(self.errno()))

    def end(self) -> None:
        self.private.end()


def confine(folder: str) -> Optional[Confinement]:
    """A confinement to `folder`, None where the kernel or what this process may do does not allow for one."""
    if parse_version("v" + os.uname().release) < (5, 10):
        return None
    try:
        confinement = Confinement(os.path.realpath(folder))
    except (ImportError, OSError, AttributeError):  # of a Python without ctypes, a C library without the calls
        return None
    try:
        start_program(["true"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, prepare=confinement.enter).wait()
        return confinement
    except BackupError:
        confinement.end()
        return None


def find_hazards(top: str) -> Iterator[Hazard]:
    """The links and special files of a subvolume that nobody changes, by their paths in it."""
    folders = [b""]
    while folders:
        folder = folders.pop()
        for entry in os.scandir(os.path.join(os.fsencode(top), folder)):
            path = os.path.join(folder, entry.name)
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif not entry.is_file(follow_symlinks=False):
                yield path, A_LINK if entry.is_symlink() else SPECIAL


########################################################################################################
# PARTIALS: backups that are not complete, in pieces
#
# A checkpoint ends receive between two commands, stamps what there is with a private received UUID, syncs, and writes
# a record; the next piece is a snapshot of it. Never: a piece to go on from that no record vouches for; two writers
# of one.
########################################################################################################

HOLDER_IDLE = 10.0  # seconds without a byte after which a writer of the same stream counts as abandoned
HOLDER_PATIENCE = 90.0  # seconds for it to end


class BeingWritten(ReceiverFailed):
    """Another process writes the partials of a snapshot."""


class PartialLock:
    """The kernel's word that one process alone writes the partials of a snapshot in a folder.

    The file holds the stream's id, and its mtime tells when something last came. A writer that is at work on
    the same stream, but gets nothing any more, waits at the end of a dead connection: it is asked to end.
    """

    def __init__(self, folder: str, name: str, stream_id: str) -> None:
        self.path, self.name, self.stream_id = os.path.join(folder, partial_lock_name(name)), name, stream_id
        self.touched = 0.0
        try:
            self.fd = self.acquire()
        except OSError as error:
            failed = plain_error(self.path, "write", error)
            raise ReceiverFailed(failed.message, failed.hint) from None

    def acquire(self) -> int:
        deadline, asked = time.monotonic() + HOLDER_PATIENCE, 0
        while True:
            with opened_folder(os.path.dirname(self.path)) as folder:
                fd = open_plain(os.path.basename(self.path), os.O_RDWR | os.O_CREAT, folder)
            try:
                if not try_flock(fd):
                    asked = self.ask_holder(fd, asked, deadline)
                    time.sleep(0.05)
                elif os.path.lexists(self.path) and os.path.samestat(os.fstat(fd), os.lstat(self.path)):
                    self.sign(fd)
                    taken, fd = fd, -1
                    return taken
            finally:
                if fd >= 0:
                    os.close(fd)

    def sign(self, fd: int) -> None:
        """Says in the file that was locked whose it is."""
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells others our process id
            os.ftruncate(fd, 0)
            os.pwrite(fd, self.stream_id.encode(), 0)
        except OSError:
            unlink_own(self.path, fd)
            raise

    def ask_holder(self, fd: int, asked: int, deadline: float) -> int:
        """Asks the process that holds the lock to end, where that is right; returns its id."""
        idle = time.time() - os.fstat(fd).st_mtime
        pid = lock_holder(fd)
        if os.pread(fd, 100, 0).decode("ascii", "replace") not in ("", self.stream_id) or time.monotonic() > deadline:
            raise BeingWritten("another run is writing {}".format(partial_name(self.name)), "wait for it")
        if idle < HOLDER_IDLE or pid is None or pid == asked:
            return asked
        ask_to_end(pid)
        return pid

    def touch(self) -> None:
        """Notes that something came."""
        now = time.monotonic()
        if now - self.touched > 2:
            self.touched = now
            os.utime(self.fd)

    def release(self) -> None:
        if self.fd >= 0:
            unlink_own(self.path, self.fd)
            os.close(self.fd)
            self.fd = -1


def remove_idle_lock(folder: str, name: str) -> None:
    """Removes the lock file of a snapshot's partials that a crash left behind."""
    with contextlib.suppress(FileNotFoundError), opened_folder(folder) as top:
        fd = open_plain(partial_lock_name(name), os.O_RDWR, top)
        try:
            if try_flock(fd):
                unlink_own(os.path.join(folder, partial_lock_name(name)), fd)
        finally:
            os.close(fd)


class Partial:
    """The partial backup of one snapshot: its pieces, the record that vouches for one, and the lock on both."""

    def __init__(self, folder: str, expected: ExpectedStream) -> None:
        self.folder, self.expected, self.name = folder, expected, expected.name
        self.lock: Optional[PartialLock] = None
        self.record = Record(self.name, expected.uuid, expected.parent_uuid, expected.base, expected.compressed)
        self.checkpoint: Optional[Subvolume] = None  # the piece that the record vouches for
        self.finished: Optional[Subvolume] = None  # one that lacks nothing but its name
        self.last_piece = 0

    @property
    def resume(self) -> Optional[ResumePoint]:
        """Where the stream goes on; None where it begins."""
        if self.finished is not None:
            return self.record.point._replace(complete=True)
        return self.record.point if self.checkpoint is not None else None

    def take_lock(self) -> None:
        if self.lock is None:
            self.lock = PartialLock(self.folder, self.name, self.expected.uuid)

    def release(self) -> None:
        if self.lock is not None:
            self.lock.release()

    def open(self, take_up: bool) -> None:
        """Finds what can be taken up, and deletes what cannot. Where there is nothing nothing is touched."""
        found = read_subvolume(os.path.join(self.folder, self.name), self.name)
        if found is not None and found.is_received and found.received_uuid == self.expected.uuid:
            self.finished = found
        elif os.path.lexists(os.path.join(self.folder, self.name)):
            raise ReceiverFailed("{} exists at {}".format(self.name, self.folder))
        traces = (record_name(self.name), partial_lock_name(self.name))
        if any(name in traces or partial_of(name) == self.name for name in os.listdir(self.folder)):
            self.take_lock()
        pieces = [read_subvolume(os.path.join(self.folder, name), name) for name in os.listdir(self.folder)
                  if partial_of(name) == self.name]
        record = read_record(self.folder, self.name) if take_up else None
        if record is not None and self.agrees(record):
            for piece in vouched_pieces(record, [piece for piece in pieces if piece is not None]):
                if piece.name == record.piece:
                    self.checkpoint, self.record = piece, record
                elif self.finished is None and record.boot == boot_id() and record.boot:
                    self.finished, self.record = piece, record
        for doomed in pieces:
            if doomed is not None and doomed not in (self.checkpoint, self.finished):
                self.delete(doomed)
        if self.checkpoint is None and self.finished is None:
            remove_record(self.folder, self.name)
        else:
            self.last_piece = max(piece_of(p.name) for p in (self.checkpoint, self.finished) if p is not None)

    def agrees(self, record: Record) -> bool:
        """Whether a record is of the stream that is expected."""
        mine = self.record
        return ((record.stream_id, record.parent_id, record.base, record.compressed)
                == (mine.stream_id, mine.parent_id, mine.base, mine.compressed))

    def delete(self, piece: Subvolume) -> None:
        path = os.path.join(self.folder, piece.name)
        with firm_path(path, piece.uuid) as firm:
            delete_firm(firm, path)

    def next_piece(self) -> str:
        self.take_lock()
        self.last_piece += 1
        return partial_name(self.name, self.last_piece)

    def look_at(self, piece: str) -> Subvolume:
        """A piece as `btrfs receive` left it, on the parent that it must have."""
        found = read_subvolume(os.path.join(self.folder, piece), piece)
        if found is None:
            raise ReceiverFailed("btrfs receive left no {}".format(piece))
        base = self.checkpoint.uuid if self.checkpoint is not None else self.expected.base
        if found.parent_uuid != base:
            raise ReceiverFailed("{} was received on another parent (UUID {}) than planned (UUID {})".format(
                piece, found.parent_uuid, base), "-I sends in full")
        return found

    def keep(self, piece: str, stream: IncomingStream, point: ResumePoint) -> None:
        """Makes a piece that was cut at `point` one to go on from, also after a power failure."""
        path, before, private = os.path.join(self.folder, piece), self.checkpoint, format_uuid(os.urandom(16))
        found = self.look_at(piece)
        if found.readonly or private is None:
            raise ReceiverFailed("{} is not as it was left".format(piece))
        try:
            with firm_path(path, found.uuid) as firm:
                set_received_uuid(os.path.join(firm, "."), private)
                make_readonly(firm)
        except OSError as error:
            raise os_error("cannot keep {}".format(path), error) from None
        self.sync()
        self.record = self.record._replace(piece=piece, private=private, point=point, version=stream.version,
                                           ctransid=stream.ctransid)
        replace_file(self.folder, record_name(self.name), format_record(self.record))
        self.checkpoint = read_subvolume(path, piece)
        if before is not None:
            self.delete(before)

    def note_finished(self, piece: str) -> Subvolume:
        """Notes that a piece has all but its name, which holds until the next boot; then makes it durable."""
        found = self.look_at(piece)
        if not found.readonly or found.received_uuid != self.expected.uuid:
            raise ReceiverFailed("btrfs receive left {} incomplete though it reported success".format(piece))
        record = self.record._replace(finished=piece, boot=boot_id())
        replace_file(self.folder, record_name(self.name), format_record(record), durably=False)
        self.make_durable()
        return found

    def sync(self) -> None:
        sync_filesystem(self.folder, self.lock.fd if self.lock is not None else -1)

    def make_durable(self) -> None:
        """Syncs a finished piece; where that fails nothing vouches for it any more."""
        try:
            self.sync()
        except BackupError:
            with contextlib.suppress(OSError, BackupError):
                if self.checkpoint is None:
                    remove_record(self.folder, self.name)
                else:
                    record = self.record._replace(finished="", boot="")
                    replace_file(self.folder, record_name(self.name), format_record(record))
            raise

    def give_name(self, backup: Subvolume) -> Subvolume:
        """The backup under its final name, and nothing beside it."""
        path = os.path.join(self.folder, self.name)
        try:
            if backup.name != self.name:
                if os.path.lexists(path):
                    raise ReceiverFailed("{} has appeared meanwhile".format(path))
                os.rename(os.path.join(self.folder, backup.name), path)
            sync_folder(self.folder)
            if self.checkpoint is not None:
                self.delete(self.checkpoint)
            remove_record(self.folder, self.name)
        except OSError as error:
            raise os_error("cannot rename {}".format(backup.name), error) from None
        return backup._replace(name=self.name)


########################################################################################################
# ENDS: the processes at the two ends of a stream
#
# A sender fills buffers, a receiver takes them, and neither ever blocks. The receiver alone makes a backup
# complete: `btrfs receive` exited 0, the result was seen read-only with the right identity, its filesystem is
# synced; only then it gets its name. Before that it is a partial: a checkpoint ends receive between two
# commands, stamps what there is with a private received UUID, syncs, and writes a record; the next piece is a
# snapshot of it. Never: a piece to go on from that no record vouches for; two writers of one partial.
########################################################################################################

CHECKPOINT_DISTANCE = 256 << 20  # bytes of stream between checkpoints, at least
CHECKPOINT_INTERVAL = 5.0  # seconds between them, at least: each waits for a sync
CUT_PATIENCE = 5.0  # seconds for a `btrfs receive` that is cut to take what it got
SUSPEND_TIMEOUT = 120.0  # seconds to make a last checkpoint durable
SKIP_PATIENCE = 900.0  # seconds without a byte


def socket_pair() -> Tuple[int, int]:
    """Two ends for the output of the program `btrfs send`, which makes a pipe as small as its own 64 or 256 KiB."""
    import socket
    ours, theirs = socket.socketpair()
    for option in (socket.SO_SNDBUF, 32):  # 32: SO_SNDBUFFORCE, beyond the limit for users
        with contextlib.suppress(OSError):
            theirs.setsockopt(socket.SOL_SOCKET, option, SENDER_BUFFER)
    return ours.detach(), theirs.detach()


def read_from(fd: int, stage: Stage, buffer: Union[bytearray, memoryview]) -> Optional[int]:
    """How many bytes of a program came into `buffer`: None while there are none, 0 at its end or the pipe's."""
    try:
        return os.readv(fd, [buffer])
    except BlockingIOError:
        if not stage.has_ended():
            return None
    try:
        return os.readv(fd, [buffer])  # what came right before
    except BlockingIOError:
        return 0


class Sender:
    """What a stream comes from. Nothing here waits but wait_readable, finish and end."""

    start = 0  # offset in the stream of the first byte that read() gives
    capacity = PIPE_SIZE  # bytes that can wait where it is read from, about

    def skip(self, resume: ResumePoint, on_progress: Callable[[int], None]) -> None:
        """Goes on at a place in the stream; StreamDiffers where what comes before it is not what went to it."""
        raise NotImplementedError

    def wait_readable(self, seconds: float) -> None:
        """Waits until there is something to read, but no longer than that."""
        raise NotImplementedError

    def read(self, buffer: Union[bytearray, memoryview]) -> Optional[int]:
        """How many bytes came into `buffer`: None while there are none, 0 at the end."""
        raise NotImplementedError

    def finish(self, timeout: float) -> None:
        """After the end: BackupError unless what was read is all that was to be sent."""
        raise NotImplementedError

    def end(self) -> None:
        """Ends what was started for it, wherever it stands; does nothing a second time."""
        raise NotImplementedError


class Receiver:
    """Where a stream goes to. Nothing here waits but finish and end."""

    program = "receiving"  # what messages call it
    resume: Optional[ResumePoint] = None  # where in the stream it goes on; None: from the start, in one piece

    @property
    def pending(self) -> int:
        """Chunks that were offered and are not wholly written."""
        raise NotImplementedError

    @property
    def file_data(self) -> int:
        """Bytes of file contents so far, before compression; 0 where nobody has asked for it."""
        return 0

    def count_file_data(self) -> None:
        """Asks for `file_data`, where that is not counted anyway."""

    @property
    def is_busy(self) -> bool:
        """Whether it works on what it has got, for as long as it likes."""
        return False

    def offer(self, chunk: memoryview) -> None:
        """Takes a chunk, whose memory must not change before `pending` has gone down."""
        raise NotImplementedError

    def pump(self) -> int:
        """Writes what goes without waiting; returns how many bytes that were."""
        raise NotImplementedError

    def check_alive(self) -> None:
        """BackupError where it can take no more."""
        raise NotImplementedError

    def close_pipe(self) -> None:
        """Says, as soon as all is written, that nothing more comes; called until it is."""
        raise NotImplementedError

    def finish(self, timeout: float) -> Any:
        """What has become of the stream: a Subvolume, a RawFile; BackupError where it is not complete."""
        raise NotImplementedError

    def end(self) -> None:
        """Ends what was started for it, with a last checkpoint where it has any; does nothing a second time."""
        raise NotImplementedError


class LocalSender(Sender):
    """A sending process and what it writes.

    ends: what it is read from and what it writes to.
    """

    def __init__(self, argv: Sequence[str], ends: Tuple[int, int]) -> None:
        self.read_end, write_end = ends
        try:
            self.stage = Stage(argv, subprocess.DEVNULL, write_end)
        except BackupError:
            os.close(self.read_end)
            raise
        finally:
            os.close(write_end)
        self.stage.program = "btrfs send"
        os.set_blocking(self.read_end, False)
        self.poll = select.poll()
        self.poll.register(self.read_end, select.POLLIN)
        self.start = 0  # offset in the stream of the first byte that read() gives

    def skip(self, resume: ResumePoint, on_progress: Callable[[int], None]) -> None:
        """Reads up to where a partial goes on; StreamDiffers where that is not what it was received from."""
        check, buffer = PrefixCheck(resume.marks), memoryview(bytearray(PIPE_SIZE))
        last_moved = time.monotonic()
        while check.left:
            got = self.read(buffer[:min(PIPE_SIZE, check.left)])
            if got:
                check.feed(buffer[:got])
                last_moved = time.monotonic()
                on_progress(check.at)
            elif got == 0:
                self.finish(ENDING_GRACE)
                raise StreamDiffers("the stream is shorter than what has arrived of it")
            elif time.monotonic() - last_moved > SKIP_PATIENCE:
                raise Stalled("btrfs send stalled: not a byte came for {}".format(format_duration(SKIP_PATIENCE)))
            else:
                self.wait_readable(0.1)
        self.start = check.at

    def wait_readable(self, seconds: float) -> None:
        self.poll.poll(1000 * seconds)

    def read(self, buffer: Union[bytearray, memoryview]) -> Optional[int]:
        """How many bytes came into `buffer`: None while there are none, 0 at the end."""
        return read_from(self.read_end, self.stage, buffer)

    def finish(self, timeout: float) -> None:
        self.stage.wait(timeout)

    def end(self) -> None:
        os.close(self.read_end)
        self.stage.end()


def start_sender(path: str, parent: Optional[str], options: SendOptions) -> LocalSender:
    if options.debug or not can_call_send():
        return LocalSender(send_argv(path, parent, options), socket_pair())
    return LocalSender(call_send_argv(path, parent, options), make_pipe())


def receiver_error(error: BackupError, expected: ExpectedStream) -> ReceiverFailed:
    """Why `btrfs receive` failed.

    A parent there that is the original snapshot, as in a restore, has an empty folder where a subvolume was nested
    in the source. Those are in no stream, and so in the way of what the stream does there.
    """
    in_the_way = re.search(r"failed: (Directory not empty|File exists)", error.message)
    if in_the_way and expected.base is not None and expected.base == expected.parent_uuid:
        return AmbiguousParent("the parent {} has empty folders where subvolumes were nested".format(expected.base),
                               "send in full with -I", error.detail)
    return ReceiverFailed(error.message, error.hint, error.detail, error.transient)


class LocalReceiver(Receiver):
    """`btrfs receive` and its pipe: takes a stream, leaves a complete backup or a partial to go on from."""

    program = "btrfs receive"

    def __init__(self, argv: Sequence[str], stream: IncomingStream, partial: Partial, in_pieces: bool,
                 confinement: Optional[Confinement] = None) -> None:
        self.argv, self.stream, self.partial, self.in_pieces = argv, stream, partial, in_pieces
        self.confinement = confinement
        self.resume = partial.resume
        # an empty piece ends a chunk, a place in the stream asks for a checkpoint there
        self.queue: "collections.deque[Union[memoryview, ResumePoint]]" = collections.deque()
        self.chunks = 0  # that are not wholly written
        self.stage: Optional[Stage] = None  # started with the first byte
        self.write_end = -1  # while there is a pipe
        self.piece = ""
        self.last_cut, self.last_cut_time = stream.offset, time.monotonic()
        self.work: Optional[Background] = None  # a checkpoint
        self.completing: Optional[Background] = None
        self.received = threading.Event()  # while completing: `btrfs receive` has ended
        self.failed = self.is_over = False

    @property
    def pending(self) -> int:
        return self.chunks

    @property
    def file_data(self) -> int:
        return self.stream.reader.file_data

    # -- the stream

    def offer(self, chunk: memoryview) -> None:
        try:
            self.queue.extend(memoryview(piece) for piece in self.stream.edit(chunk))
        except BackupError:
            self.failed = True
            raise
        stream = self.stream
        is_far = stream.offset - self.last_cut >= CHECKPOINT_DISTANCE
        if is_far and self.in_pieces and stream.held is None and not stream.ended and (
                time.monotonic() - self.last_cut_time >= CHECKPOINT_INTERVAL):
            self.queue.append(stream.point)
            self.last_cut, self.last_cut_time = stream.offset, time.monotonic()
        self.queue.append(memoryview(b""))
        self.chunks += 1

    def pump(self) -> int:
        """Writes what the pipe has room for; returns how many bytes that were."""
        if self.completing is not None or not self.end_work():
            return 0
        moved = 0
        try:
            while self.queue and self.work is None:
                moved += self.write_some(self.queue.popleft())
        except BlockingIOError:
            pass
        except BrokenPipeError:
            raise self.failure() from None
        if moved and self.partial.lock is not None:
            self.partial.lock.touch()
        return moved

    def write_some(self, piece: Union[memoryview, ResumePoint]) -> int:
        """Writes what goes of the piece that was taken from the queue; BlockingIOError where nothing does."""
        if isinstance(piece, ResumePoint):
            self.work = Background(functools.partial(self.cut, piece, float("inf")))
            return 0
        if not len(piece):
            self.chunks -= 1
            return 0
        if self.stage is None:
            self.queue.appendleft(piece)
            self.begin_piece()
            return 0
        written = 0
        try:
            written = write_or_lend(self.write_end, piece)
        finally:
            if written < len(piece):
                self.queue.appendleft(piece[written:])
        return written

    def begin_piece(self) -> None:
        self.piece, checkpoint = self.partial.next_piece(), self.partial.checkpoint
        if checkpoint is not None and checkpoint.received_uuid is not None:
            self.queue.appendleft(memoryview(self.stream.reopening(self.piece, checkpoint.received_uuid)))
        read_end, self.write_end = make_pipe()
        try:
            self.stage = Stage(self.argv, read_end, subprocess.DEVNULL,
                               prepare=self.confinement.enter if self.confinement else None)
        except BackupError:
            self.failed = True
            raise
        finally:
            os.close(read_end)
        os.set_blocking(self.write_end, False)

    def end_work(self) -> bool:
        """Whether what is done beside is over, and went well."""
        if self.work is None or not self.work.is_over:
            return self.work is None
        work, self.work = self.work, None
        try:
            work.result()
        except BaseException:
            self.failed = True
            raise
        return True

    def failure(self) -> BackupError:
        """Why `btrfs receive` ended early."""
        self.failed = True
        try:
            if self.stage is not None:
                self.stage.wait(ENDING_GRACE)
        except BackupError as error:
            return self.explained(error)
        return ReceiverFailed("btrfs receive ended before the stream did")

    def explained(self, error: BackupError) -> BackupError:
        """The same as the receiver's error: NoPieces where `btrfs receive` did not find the last piece."""
        is_lost = any(sign in error.message + error.detail
                      for sign in ("cannot find parent", "remount this btrfs", "reachable from inside"))
        if is_lost and self.partial.checkpoint is not None:
            return NoPieces(error.message, error.hint, error.detail)
        return receiver_error(error, self.partial.expected)

    def check_alive(self) -> None:
        if self.work is None and self.completing is None and self.stage is not None and self.stage.has_ended():
            raise self.failure()

    # -- checkpoints

    def cut(self, point: ResumePoint, patience: float) -> None:
        """Ends `btrfs receive` where it is, and keeps what it has made."""
        stage = self.stage
        if stage is None:
            return
        self.close_write_end()
        try:
            stage.wait(patience)
            raise ReceiverFailed("btrfs receive took a cut stream for a whole one")
        except BackupError as error:
            if "unexpected EOF in stream" not in error.message + error.detail:
                raise self.explained(error) from None
        stage.end()
        self.partial.keep(self.piece, self.stream, point)
        self.stage, self.piece = None, ""

    def suspend(self) -> None:
        """Keeps for later what has arrived, as far as that goes without much waiting."""
        if self.failed or not self.in_pieces:
            return
        if self.stage is not None:
            self.stage.process.send_signal(signal.SIGCONT)  # a stopped process takes nothing
        if self.completing is not None:
            self.wait_for(self.completing)
        elif self.work is not None:
            self.wait_for(self.work)
            if not self.work.is_over or self.work.error is not None:
                return
            self.work = None
        if self.completing is None and (self.stage is not None or self.queue):
            self.work = Background(self.flush_and_cut)
            self.wait_for(self.work)

    def wait_for(self, work: Background) -> None:
        """Waits long for a sync, but not for a `btrfs receive` that does not end."""
        work.outlast(CUT_PATIENCE)
        if self.stage is None or self.stage.has_ended():
            work.outlast(SUSPEND_TIMEOUT)

    def flush_and_cut(self) -> None:
        self.queue = collections.deque(piece for piece in self.queue if not isinstance(piece, ResumePoint))
        while self.queue:
            try:
                self.write_some(self.queue.popleft())
            except BlockingIOError:
                poll = select.poll()
                poll.register(self.write_end, select.POLLOUT)
                if not poll.poll(1000 * CUT_PATIENCE):
                    return
        self.cut(self.stream.point, CUT_PATIENCE)

    # -- the end

    def close_pipe(self) -> None:
        """Nothing more will come: what is left to do can be done while others are waited for."""
        if self.completing is None and (self.stream.ended or self.partial.finished is not None):
            if self.stage is None and self.partial.finished is None:
                self.begin_piece()
            self.completing = Background(self.complete)

    def complete(self) -> Subvolume:
        """The backup, durable, but for its name."""
        finished, stage = self.partial.finished, self.stage
        if finished is not None or stage is None:
            self.received.set()
            self.partial.make_durable()
            return finished  # type: ignore[return-value]
        try:
            os.set_blocking(self.write_end, True)
            for piece in list(self.queue) + [self.stream.closing]:
                while not isinstance(piece, ResumePoint) and len(piece):
                    piece = memoryview(piece)[os.write(self.write_end, piece):]
            self.close_write_end()
            stage.wait(float("inf"))
        except BrokenPipeError:
            raise self.failure() from None
        except BackupError as error:
            raise self.explained(error) from None
        finally:
            self.received.set()
        return self.partial.note_finished(self.piece)

    def finish(self, timeout: float) -> Subvolume:
        """The complete backup under its final name."""
        if not self.stream.ended and self.partial.finished is None:
            raise BackupError("the stream ended before its end command")
        self.close_pipe()
        if self.completing is None or not self.received.wait(None if timeout == float("inf") else timeout):
            self.failed = True
            raise Stalled("btrfs receive stalled: it did not end within {}".format(format_duration(timeout)))
        backup = self.partial.give_name(self.completing.result())
        self.is_over = True
        return backup

    def close_write_end(self) -> None:
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    def end(self) -> None:
        """Ends everything; what has arrived stays as a checkpoint where that is possible."""
        try:
            if not self.is_over:
                self.is_over = True
                self.suspend()
        finally:
            self.close_write_end()
            if self.stage is not None:
                self.stage.end()
            self.partial.release()
            if self.confinement is not None:
                self.confinement.end()




class SendSize(NamedTuple):
    """What a send will weigh, in bytes; `ended`: the figures are whole."""

    stream_size: int = 0
    file_data: int = 0
    ended: bool = False


class Measuring:
    """`btrfs send --no-data` beside a transfer, niced, to learn what the transfer will weigh."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.meter = SizeMeter()
        self.read_end, write_end = make_pipe()
        try:
            self.stage = Stage(argv, subprocess.DEVNULL, write_end)
        except BackupError:
            os.close(self.read_end)
            raise
        finally:
            os.close(write_end)
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self.stage.process.pid, 19)
        self.reading = Background(self.read)

    def read(self) -> None:
        """To the end of what is sent; what is no stream any more ends the send as well, for nobody reads it then."""
        try:
            for chunk in iter(lambda: os.read(self.read_end, PIPE_SIZE), b""):
                self.meter.feed(chunk)
        finally:
            os.close(self.read_end)

    def wait(self) -> SizeMeter:
        """The finished meter; BackupError where the send failed."""
        self.reading.result()
        self.stage.wait(ENDING_GRACE)
        return self.meter

    def end(self) -> None:
        self.stage.end()
        self.reading.outlast(PIPE_GRACE)


########################################################################################################
# FILTERS: programs that compress and encrypt a stream, and back
#
# They run on the machine that runs the command: what is encrypted has left it in no other form. Programs
# in a row are fed and read without blocking. Encryption that is asked for is proven with a few bytes before
# the first byte of a stream; never does a stream go on without it. A row has succeeded when every program in
# it exited 0.
########################################################################################################

RING = 4  # buffers of PIPE_SIZE between a row of programs and what takes its output
PROOF_TIMEOUT = 60.0  # seconds
PROOF = b"btrfs-backup-ng sees whether this comes out as it should\n" * 20
AGE_MAGIC = b"age-encryption.org/v1"


class Coder(NamedTuple):
    """A program that changes a stream: `forth` when it is stored, `back` when it is read; `suffix` of the file."""

    suffix: str
    forth: Tuple[str, ...]
    back: Tuple[str, ...]


COMPRESSORS = {
    "zstd": Coder(".zst", ("zstd", "-q", "-c", "-T0"), ("zstd", "-q", "-d", "-c")),
    "lz4": Coder(".lz4", ("lz4", "-q", "-c"), ("lz4", "-q", "-d", "-c")),
    "gzip": Coder(".gz", ("gzip", "-c"), ("gzip", "-d", "-c")),
    "xz": Coder(".xz", ("xz", "-q", "-c", "-T0"), ("xz", "-q", "-d", "-c")),
}


def encryptor(method: str, recipient: str, identity: str = "") -> Coder:
    """The filter for gpg or age. The recipient stands on the command line, for it is public.

    gpg does not ask whether it trusts the key, which the user has named, nor the network for it, and does not
    compress again. Its back
    way asks gpg's own agent; age's takes the file `identity`.
    """
    if method == "gpg":
        base = ("gpg", "--batch", "--quiet", "--output", "-")
        forth = ("--no-tty", "--trust-model", "always", "--no-auto-key-locate", "--compress-algo", "none",
                 "--recipient", recipient, "--encrypt")
        return Coder(".gpg", base + forth, base + ("--decrypt",))
    whom = ("--recipients-file", recipient) if recipient.startswith("/") else ("--recipient", recipient)
    return Coder(".age", ("age", "--encrypt") + whom, ("age", "--decrypt", "--identity", identity))


def filters_of(steps: Sequence[str], identity: str = "") -> List[Coder]:
    """The filters that a pipeline names, such as ["zstd", "gpg:KEY"]; BackupError for one not known here."""
    found = []
    for step in steps:
        method, colon, recipient = step.partition(":")
        if method in COMPRESSORS and not colon:
            found.append(COMPRESSORS[method])
        elif method in ("gpg", "age") and recipient:
            found.append(encryptor(method, recipient, identity))
        else:
            raise BackupError("{} is no filter that this version knows".format(printable(step)))
    return found


class Feed:
    """The writing end of a pipe: takes chunks, writes what fits."""

    def __init__(self, write_end: int) -> None:
        self.write_end = write_end  # -1 once closed
        self.queue: "collections.deque[memoryview]" = collections.deque()
        os.set_blocking(write_end, False)

    @property
    def pending(self) -> int:
        """Chunks not wholly written."""
        return len(self.queue)

    def offer(self, chunk: Chunk) -> None:
        if len(chunk):
            self.queue.append(memoryview(chunk))

    def pump(self) -> int:
        """How many bytes the pipe had room for. BrokenPipeError where nobody reads it any more."""
        moved = 0
        try:
            while self.queue:
                written = os.write(self.write_end, self.queue[0])
                moved += written
                if written < len(self.queue[0]):
                    self.queue[0] = self.queue[0][written:]
                else:
                    self.queue.popleft()
        except BlockingIOError:
            pass
        return moved

    def close(self) -> None:
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    def reading_end(self) -> Optional[int]:
        """The other end of the pipe once more, to see what nobody has read; None where there is no /proc."""
        try:
            return os.open("/proc/self/fd/{}".format(self.write_end), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None


def start_fed(argv: Sequence[str], stdout: Any, environment: Optional[Dict[str, str]] = None) -> Tuple[Stage, Feed]:
    """A program that takes a stream on its stdin, and what feeds it."""
    read_end, write_end = make_pipe()
    try:
        return Stage(argv, read_end, stdout, environment), Feed(write_end)
    except BackupError:
        os.close(write_end)
        raise
    finally:
        os.close(read_end)


class Pipeline:
    """Programs in a row: chunks go in through `feed`, bytes come out of `read`."""

    def __init__(self, argvs: Sequence[Sequence[str]]) -> None:
        self.stages: List[Stage] = []
        self.read_end, write_end = make_pipe()
        self.feed = Feed(write_end)
        self.closing = False  # nothing more will be fed: the first program may see its end
        try:
            for argv in argvs:
                self.add(argv)
        except BaseException:
            self.end()
            raise
        os.set_blocking(self.read_end, False)
        self.poll = select.poll()
        self.poll.register(self.read_end, select.POLLIN)

    def add(self, argv: Sequence[str]) -> None:
        following, out = make_pipe()
        try:
            stage = Stage(argv, self.read_end, out)
        except BaseException:
            os.close(following)
            raise
        finally:
            os.close(out)
        stage.program = argv[0]
        self.stages.append(stage)
        os.close(self.read_end)
        self.read_end = following

    def pump(self) -> int:
        """Writes what the first program takes; BackupError where a program has ended early."""
        try:
            moved = self.feed.pump()
        except BrokenPipeError:
            self.finish(ENDING_GRACE)
            raise BackupError("{} ended before its input did".format(self.stages[0].program)) from None
        if self.closing and not self.feed.pending:
            self.feed.close()
        return moved

    def read(self, buffer: Union[bytearray, memoryview]) -> Optional[int]:
        """How many bytes came into `buffer`: None while there are none, 0 at the end."""
        return read_from(self.read_end, self.stages[-1], buffer)

    def wait_readable(self, seconds: float) -> None:
        self.poll.poll(1000 * seconds)

    def check_alive(self) -> None:
        """BackupError where a program has failed; those that still work are not waited for."""
        failed = [stage for stage in self.stages if stage.has_ended() and stage.process.returncode != 0]
        for stage in failed:
            if stage.process.returncode != -signal.SIGPIPE:
                raise stage.error()
        if failed:  # the next one is about to end
            self.finish(ENDING_GRACE)

    def finish(self, timeout: float) -> None:
        """Waits for all; raises what the first that failed says, but for the SIGPIPE that another's failure brings."""
        errors: List[Tuple[bool, int, BackupError]] = []
        for stage in self.stages:
            try:
                stage.wait(timeout)
            except BackupError as error:
                errors.append((stage.process.returncode == -signal.SIGPIPE, len(errors), error))
        if errors:
            raise min(errors, key=lambda entry: entry[:2])[2]

    def end(self) -> None:
        for stage in self.stages:
            stage.end()
        self.feed.close()
        if self.read_end >= 0:
            os.close(self.read_end)
            self.read_end = -1


def run_through(argvs: Sequence[Sequence[str]], data: bytes) -> bytes:
    """What the programs make of a few bytes; BackupError where they fail."""
    pipeline, buffer, out = Pipeline(argvs), bytearray(PIPE_SIZE), b""
    try:
        pipeline.feed.offer(data)
        pipeline.pump()
        pipeline.feed.close()
        while True:
            pipeline.wait_readable(PROOF_TIMEOUT)
            got = pipeline.read(buffer)
            if not got:
                break
            out += buffer[:got]
        pipeline.finish(PROOF_TIMEOUT)
    finally:
        pipeline.end()
    return out


def is_encrypted(method: str, data: bytes) -> bool:
    """Whether `data` begins as what gpg or age makes for a recipient."""
    if method == "age":
        return data.startswith(AGE_MAGIC)
    return data[:1] in (b"\x84", b"\x85", b"\x86", b"\xc1")  # a session key for a public key (RFC 4880, 4.2 and 5.1)


def prove_filters(steps: Sequence[str]) -> None:
    """BackupError unless the programs of a pipeline do here and now what is expected of them."""
    for step, found in zip(steps, filters_of(steps)):
        method = step.partition(":")[0]
        made = run_through([found.forth], PROOF)
        if method in COMPRESSORS:
            if run_through([found.back], made) != PROOF:
                raise BackupError("{} does not bring back what it has compressed".format(method))
        elif PROOF[:20] in made or not is_encrypted(method, made):
            raise BackupError("{} does not encrypt".format(method), "look at what it does by itself")


########################################################################################################
# RELAY: one stream from a sender to its receivers
#
# The relay moves what can be moved, then naps. Waking for every few KiB costs more than moving them, and
# memory made anew for each read more than both, so a few buffers go round, and it naps for so
# long that the ends run neither full nor dry. One sender may feed several receivers (lanes), each from where it is to
# go on; what was last sent is kept in a window, from which a lane that broke is served again. One that fails for
# good, or that the others wait for too long, is dropped with a checkpoint. Signals wait until no step is half
# done, lest a stream is torn. Never: a lane finished before the sender exited 0.
########################################################################################################

READ_SIZE = PIPE_SIZE
LANE_CHUNKS = 4  # of READ_SIZE at most: what a lane holds that it has not written yet

# How far back from the position of a lane its pipe may still read: what it holds, what is lent to the pipe, and a
# command that a chunk has torn, which is written with the next one only.
LENT = LANE_CHUNKS * READ_SIZE + PIPE_SIZE + COMMAND_HEADER.size + LARGEST_COMMAND

# Bytes kept in memory: little, which stays in the processor's caches, and what a broken lane goes on from.
SMALL_WINDOW, WINDOW, HISTORY = 8 << 20, 24 << 20, 16 << 20
SHORTEST_NAP, LONGEST_NAP, IDLE_NAP = 0.0005, 0.008, 0.1  # seconds
PROGRESS_INTERVAL = 0.2  # seconds
SLOW_PATIENCE = 5.0  # seconds that others wait for a lane which has less than a quarter of their speed
FINISH_PATIENCE = 1.0  # seconds that a lane which has everything waits for others, as all can finish at once
LEAVING_TIMEOUT = 150.0  # seconds for the checkpoint of a lane that has left


class Figures(NamedTuple):
    """What went to one receiver: bytes, bytes of these that had been sent before, how often it was taken up."""

    sent: int = 0
    again: int = 0
    taken_up: int = 0

    def plus(self, other: "Figures") -> "Figures":
        return Figures(self.sent + other.sent, self.again + other.again, self.taken_up + other.taken_up)


class Relayed(NamedTuple):
    """How a relay ended: bytes and seconds, and per lane its backup or its error, and its figures.

    postponed: lanes that a stream of their own has to serve, and why. source_error: the sender's, if it failed.
    """

    size: int
    seconds: float
    backups: Dict[str, Subvolume]
    errors: Dict[str, BackupError]
    postponed: Dict[str, str]
    figures: Dict[str, Figures]
    source_error: Optional[BackupError] = None


class Manner(NamedTuple):
    """How a relay treats its lanes.

    limit: bytes a second for each. reopen: what opens a lane's receiver again, after how many seconds, when it
    broke with an error; None gives it up. on_lane: told offset in the stream and bytes of file contents of each.
    """

    limit: float = 0.0
    reopen: Optional[Callable[[str, BackupError, int], Optional[Tuple[float, Callable[[], Receiver]]]]] = None
    on_lane: Callable[[str, int, int], None] = lambda key, position, file_data: None


PLAIN = Manner()


class Window:
    """The last bytes of a stream, in memory that goes round."""

    def __init__(self, begun: int, size: int) -> None:
        self.begun = self.end = begun  # offsets in the stream
        self.memory = map_memory(size)

    @property
    def start(self) -> int:
        return max(self.begun, self.end - len(self.memory))

    def room(self, needed: int) -> Optional[memoryview]:
        """Where the next bytes can be read to; None where that would cost bytes from offset `needed` on."""
        at = (self.end - self.begun) % len(self.memory)
        size = min(READ_SIZE, len(self.memory) - at)
        return memoryview(self.memory)[at:at + size] if self.end + size - len(self.memory) <= needed else None

    def view(self, offset: int, most: int) -> memoryview:
        """Bytes from `offset` on, as they lie in one piece."""
        at = (offset - self.begun) % len(self.memory)
        return memoryview(self.memory)[at:at + min(most, self.end - offset, len(self.memory) - at)]

    def renew(self) -> None:
        """Leaves the memory to whom still reads from it, and goes on in a copy."""
        before, self.memory = self.memory, map_memory(len(self.memory))
        self.memory[:] = before


class Pace:
    """Lets at most `limit` bytes a second pass, of which those of a tenth of a second may come at once."""

    def __init__(self, limit: float) -> None:
        self.limit, self.left, self.last = limit, 0.0, time.monotonic()

    def allowed(self) -> int:
        """How many bytes may pass now."""
        if not self.limit:
            return READ_SIZE
        now = time.monotonic()
        self.left = min(self.left + (now - self.last) * self.limit, max(self.limit / 10, 4096.0))
        self.last = now
        return min(READ_SIZE, int(self.left))


class Lane:
    """One receiver's way through a relay. `position`: offset in the stream of what it gets next."""

    def __init__(self, receiver: Receiver, start: int, limit: float) -> None:
        self.receiver: Optional[Receiver] = receiver
        self.reopening: Optional[Background] = None  # while there is no receiver
        self.check: Optional[PrefixCheck] = None  # of what is skipped
        self.pace = Pace(limit)
        self.figures = Figures()
        self.waited = 0.0  # seconds that others waited for it, less what they did not
        self.position = self.begun = start
        resume = receiver.resume
        if resume is not None and resume.offset != start:
            self.check = PrefixCheck(resume.marks)
        if resume is not None and resume.offset:
            self.figures = Figures(taken_up=1)

    def give(self, chunk: memoryview) -> None:
        """Takes the next bytes of the stream."""
        if self.check is None:
            self.receiver.offer(chunk)  # type: ignore[union-attr]
            self.figures = self.figures._replace(sent=self.figures.sent + len(chunk))
            self.pace.left -= len(chunk)
        else:
            self.check.feed(chunk)
            self.check = self.check if self.check.left else None
        self.position += len(chunk)

    def share(self) -> int:
        """How many bytes it may be given now."""
        if self.check is not None:
            return min(READ_SIZE, self.check.left)
        return self.pace.allowed() if self.receiver.pending < LANE_CHUNKS else 0  # type: ignore[union-attr]

    @property
    def is_busy(self) -> bool:
        """Whether the receiver still works on what it has, for as long as it likes."""
        return self.receiver is not None and self.receiver.is_busy

    def is_drained(self, end: int) -> bool:
        return self.receiver is not None and self.position == end and not (self.check or self.receiver.pending)


class Relay:
    """Moves one stream from a sender to the receivers in `lanes` (destination id to receiver)."""

    def __init__(self, sender: Sender, lanes: Dict[str, Receiver], stall_timeout: float,
                 on_progress: Callable[[int, int], None], manner: Manner = PLAIN) -> None:
        self.sender, self.stall_timeout, self.on_progress, self.manner = sender, stall_timeout, on_progress, manner
        self.lanes = {key: Lane(receiver, sender.start, manner.limit) for key, receiver in lanes.items()}
        is_near = all(isinstance(receiver, LocalReceiver) for receiver in lanes.values())
        is_small = is_near or manner.reopen is None  # nothing goes on from this relay's memory
        self.history = LENT if is_small else HISTORY
        self.window = Window(sender.start, SMALL_WINDOW if is_small else WINDOW)
        self.result = Relayed(0, 0.0, {}, {}, {}, {})
        self.signals = HeldSignals()
        self.leaving: List[Background] = []
        self.stopped = threading.Event()
        self.ended = False  # the sender, and well
        self.much = sender.capacity // 2  # bytes at once
        self.rest = SHORTEST_NAP
        self.begun = self.last_moved = self.last_look = self.last_undrained = time.monotonic()

    def run(self) -> Relayed:
        """The relay from first byte to named backups. All lanes have ended then; an error of the sender is theirs."""
        with self.signals:
            try:
                self.move_all()
            except Exception as error:
                broken = explain(error, "btrfs send")
                self.result = self.result._replace(source_error=broken)
                for key in list(self.lanes):
                    self.leave(key, broken)
            finally:
                self.stopped.set()
                self.leaving += [Background(functools.partial(self.end_lane, lane)) for lane in self.lanes.values()]
                self.leaving.append(Background(self.sender.end))
                outlast_all(self.leaving, LEAVING_TIMEOUT)
        return self.result._replace(size=self.window.end - self.window.begun, seconds=time.monotonic() - self.begun)

    def move_all(self) -> None:
        while self.lanes:
            self.signals.look()
            got = self.read_more()
            moved = 0
            for key in list(self.lanes):
                moved += self.try_lane(key, self.serve)
            now = time.monotonic()
            if moved or got:
                self.last_moved = now
            if self.ended:
                self.finish_drained(now)
            self.look_around(now)
            if self.lanes:
                self.nap(got, moved)

    def read_more(self) -> Optional[int]:
        """Bytes read from the sender: None while there are none, 0 where there is no room or no more to come."""
        needed = min(lane.position for lane in self.lanes.values()) - self.history
        room = None if self.ended else self.window.room(needed)
        if room is None:
            return 0
        got = self.sender.read(room)
        if got == 0:
            with self.signals.let_in():
                self.sender.finish(self.stall_timeout)
            self.ended = True
        self.window.end += got or 0
        return got

    def nap(self, got: Optional[int], moved: int) -> None:
        """Lets something come together, or go: shorter where much had come meanwhile, longer where little had."""
        flow = max(got or 0, moved // len(self.lanes))
        if got is None and not any(lane.receiver and lane.receiver.pending for lane in self.lanes.values()):
            self.sender.wait_readable(IDLE_NAP)
        elif flow >= self.much:
            self.rest = max(SHORTEST_NAP, self.rest / 2)
        else:
            self.rest = min(LONGEST_NAP, self.rest * 1.2) if flow < self.much / 4 else self.rest
            time.sleep(self.rest)

    def serve(self, key: str) -> int:
        """Gives a lane what it may have; how many bytes moved."""
        lane = self.lanes[key]
        if lane.receiver is None:
            self.look_at_reopening(key)
            return 0
        checked = 0
        while lane.position < self.window.end:
            size = lane.share()
            if size <= 0:
                break
            view = self.window.view(lane.position, size)
            checked += len(view) if lane.check else 0
            lane.give(view)
        if self.ended and lane.check and lane.position == self.window.end:
            raise StreamDiffers("the stream is shorter than what has arrived of it")
        return checked + (lane.receiver.pump() or 0)

    def try_lane(self, key: str, act: Callable[[str], Optional[int]]) -> int:
        """Does something with a lane; one that fails is opened again, or dropped."""
        try:
            return act(key) or 0 if key in self.lanes else 0
        except StreamDamaged:  # for all lanes
            raise
        except Exception as error:
            if key not in self.lanes:
                raise
            receiver = self.lanes[key].receiver or Receiver()
            self.fail(key, explain(error, receiver.program))
            return 0

    # -- lanes that come and go

    def fail(self, key: str, error: BackupError) -> None:
        lane = self.lanes[key]
        self.window.renew()  # what the receiver holds of it may still be on its way
        again = None
        if self.manner.reopen is not None and error.transient:
            again = self.manner.reopen(key, error, lane.position)
        if again is None:
            self.leave(key, error)
            return
        pause, reopen = again
        receiver, lane.receiver = lane.receiver, None

        def open_again() -> Optional[Receiver]:
            if receiver is not None:
                receiver.end()
            return None if self.stopped.wait(pause) else reopen()

        lane.reopening = Background(open_again)

    def look_at_reopening(self, key: str) -> None:
        """Puts the receiver that was opened again to work, where the window still holds what it needs."""
        lane = self.lanes[key]
        if lane.reopening is None or not lane.reopening.is_over:
            return
        lane.receiver, lane.reopening = lane.reopening.result(), None
        resume = (lane.receiver.resume if lane.receiver else None) or BEGINNING
        if resume.complete:
            lane.position = self.window.end
            self.finish_lane(key)
        elif max(self.window.start, lane.begun) <= resume.offset <= lane.position:
            again = lane.figures.again + lane.position - resume.offset
            lane.figures = lane.figures._replace(again=again, taken_up=lane.figures.taken_up + (resume.offset > 0))
            lane.position, lane.check = resume.offset, None
        else:
            self.postpone(key, "it goes on further back than is in memory")

    def leave(self, key: str, error: Optional[BackupError]) -> None:
        """Lets a lane go, with its checkpoint; in the background, for the others go on."""
        lane = self.lanes.pop(key)
        self.result.figures[key] = lane.figures
        if error is not None:
            self.result.errors[key] = error
        self.leaving.append(Background(functools.partial(self.end_lane, lane)))

    def postpone(self, key: str, reason: str) -> None:
        self.window.renew()
        self.result.postponed[key] = reason
        self.leave(key, None)

    def end_lane(self, lane: Lane) -> None:
        if lane.reopening is not None:
            with contextlib.suppress(Exception):
                lane.receiver = lane.reopening.result()
        if lane.receiver is not None:
            lane.receiver.end()

    # -- looking after them

    def look_around(self, now: float) -> None:
        passed = now - self.last_look
        if passed < PROGRESS_INTERVAL:
            return
        self.last_look = now
        for key in list(self.lanes):
            self.try_lane(key, self.look_at)
        if self.lanes:
            self.drop_slow(passed)
        working = [lane for lane in self.lanes.values() if lane.receiver is not None]
        self.on_progress(max((lane.position for lane in working), default=0),
                         max((lane.receiver.file_data for lane in working if lane.receiver), default=0))
        if all(lane.is_busy for lane in working):
            self.last_moved = now
        if now - self.last_moved > self.stall_timeout and len(working) == len(self.lanes):
            self.give_up_stalled()

    def look_at(self, key: str) -> None:
        lane = self.lanes[key]
        if lane.receiver is not None:
            lane.receiver.check_alive()
            self.manner.on_lane(key, lane.position, lane.receiver.file_data)

    def drop_slow(self, passed: float) -> None:
        """Lets a lane go that the others have to wait for, most of the time and for long enough."""
        slowest = min(self.lanes, key=lambda key: self.lanes[key].position)
        lane = self.lanes[slowest]
        is_full = not self.ended and self.window.room(lane.position - self.history) is None
        others = [other for other in self.lanes.values() if other is not lane]
        if is_full and any(other.is_drained(self.window.end) for other in others):
            lane.waited += passed
        else:
            lane.waited = max(0.0, lane.waited - 3 * passed)
        if lane.waited > SLOW_PATIENCE:
            self.postpone(slowest, "the others had to wait for it")

    def give_up_stalled(self) -> None:
        stalled = "stalled: not a byte moved for {}".format(format_duration(self.stall_timeout))
        slow = [key for key, lane in self.lanes.items() if lane.receiver.pending]  # type: ignore[union-attr]
        if not slow:
            raise Stalled("btrfs send " + stalled)
        self.window.renew()
        for key in slow:
            program = self.lanes[key].receiver.program  # type: ignore[union-attr]
            self.leave(key, ReceiverFailed("{} {}".format(program, stalled)))

    def finish_drained(self, now: float) -> None:
        """Finishes the lanes that have everything: at best all at once, for each takes its time to be durable."""
        drained = [key for key, lane in self.lanes.items() if lane.is_drained(self.window.end)]
        if len(drained) < len(self.lanes) and now - self.last_undrained < FINISH_PATIENCE:
            return
        for key in drained:
            self.try_lane(key, self.close_lane)
        for key in drained:
            if key in self.lanes and not self.lanes[key].is_busy:
                self.try_lane(key, self.finish_lane)
        self.last_undrained = time.monotonic()

    def close_lane(self, key: str) -> None:
        self.lanes[key].receiver.close_pipe()  # type: ignore[union-attr]

    def finish_lane(self, key: str) -> None:
        lane = self.lanes[key]
        if lane.receiver is not None:
            with self.signals.let_in():
                self.result.backups[key] = lane.receiver.finish(self.stall_timeout)
            self.leave(key, None)


########################################################################################################
# PART VII PLACES: hosts, and what lies on them
########################################################################################################


########################################################################################################
# COMMANDS: shell://: a command of the user's takes the stream
#
# `sh -c COMMAND`, here, with the stream as `btrfs send` writes it on its stdin and what it is in its
# environment. It has succeeded when the stream came to its end and the command has read all of it and exited 0,
# which may take as long as it likes, for it may work on what it has read. Where the transfer fails the command is
# killed before its pipe is closed, lest it takes a cut stream for a whole one. Nobody can list what it made of
# the streams: what it took is remembered in the pins.
########################################################################################################


class ShellReceiver(Receiver):
    """A command that takes one stream."""

    program = "the command"  # nobody knows what it has kept, so that nothing goes on in it

    def __init__(self, command: str, expected: ExpectedStream, source: str) -> None:
        self.stream = WatchedStream(expected)
        self.failed = True  # until finish() says otherwise
        facts = {"SNAPSHOT": expected.name, "PARENT": expected.parent_name or "", "UUID": expected.uuid,
                 "SOURCE": source}
        environment = dict(os.environ, **{"BTRFS_BACKUP_" + key: value for key, value in facts.items()})
        self.stage, self.feed = start_fed(["sh", "-c", command], None, environment)
        self.stage.program = self.program
        self.rest: Optional[int] = None  # the end of the pipe that the command reads from, once it was closed

    @property
    def pending(self) -> int:
        return self.feed.pending

    @property
    def file_data(self) -> int:
        return self.stream.reader.file_data

    def offer(self, chunk: memoryview) -> None:
        self.feed.offer(self.stream.watch(chunk))

    def pump(self) -> int:
        try:
            return self.feed.pump()
        except BrokenPipeError:
            raise self.failure() from None

    def failure(self) -> BackupError:
        """Why the command ended early."""
        try:
            self.stage.wait(ENDING_GRACE)
        except BackupError as error:
            return ReceiverFailed(error.message, error.hint, error.detail)
        return self.unread()

    @staticmethod
    def unread() -> BackupError:
        return ReceiverFailed("the command did not read the stream to its end", "it must read all of its stdin")

    def check_alive(self) -> None:
        if self.stage.has_ended() and not self.stream.ended:
            raise self.failure()

    def close_pipe(self) -> None:
        if self.stream.ended and self.feed.write_end >= 0:
            self.rest = self.feed.reading_end()
            self.feed.close()

    @property
    def is_busy(self) -> bool:
        """Whether it works on what it has got, of which it has everything."""
        return self.feed.write_end < 0 and not self.stage.has_ended()

    def has_rest(self) -> bool:
        """Whether some of the stream is still in the pipe."""
        return self.rest is not None and bool(select.select([self.rest], [], [], 0)[0]) and bool(os.read(self.rest, 1))

    def finish(self, _: float) -> Subvolume:
        """What was taken, as a backup; BackupError unless the command says so and all of it was read."""
        expected = self.stream.expected
        if not self.stream.ended:
            raise BackupError("the stream ended before its end command")
        self.close_pipe()
        try:
            self.stage.wait(float("inf"))
        except BackupError as error:
            raise ReceiverFailed(error.message, error.hint, error.detail) from None
        if self.has_rest():
            raise self.unread()
        self.failed = False
        return Subvolume(expected.name, expected.uuid, expected.parent_uuid, expected.uuid, True, expected.otime)

    def end(self) -> None:
        if self.failed:
            end_group(self.stage.process)
        self.feed.close()
        if self.rest is not None:
            os.close(self.rest)
            self.rest = None
        self.stage.end()


class ShellPlace:
    """What a transfer asks of a host, as far as a command has it."""

    def __init__(self, source: str, sent: Sequence[Subvolume]) -> None:
        self.source, self.sent = source, tuple(sent)

    def list(self, _: str) -> Listing:
        """What is remembered as sent."""
        return Listing(self.sent)

    def capabilities(self) -> Capabilities:
        """Protocol 1: whoever restores may have an older btrfs."""
        return Capabilities(False, False, ())

    def delete(self, _: str, doomed: Sequence[Subvolume], __: bool) -> List[BackupError]:
        return [BackupError("{} cannot be deleted at a command".format(s.name)) for s in doomed]

    def open_receive(self, command: str, expected: ExpectedStream, _: bool, __: str = "") -> ShellReceiver:
        return ShellReceiver(command, expected, self.source)


########################################################################################################
# STREAM FILES: raw folders: files with streams, and what is known of each
#
# NAME.btrfs, with a suffix for each filter, holds a stream; beside it FILE.json, the sidecar, says whose
# stream it is, what it builds on, sizes and digests. A file is written as .NAME.partial and synced; then the
# sidecar gets its final name, then the file, so that a file with a final name is whole and has its sidecar at
# any moment. A file goes before its sidecar. Only what a sidecar of ours vouches for is ever deleted, and
# partials that a lock names.
########################################################################################################

STREAM_SUFFIX = ".btrfs"
SIDECAR_SUFFIX = ".json"


class Damaged(BackupError):
    """A stream file is not what its sidecar says."""


class RawBackup(NamedTuple):
    """A sidecar: what a stream file holds. Sizes in bytes, digests SHA-256 as hex, otime in ns.

    `pipeline` are the filters in the order they were applied. uid, gid and mode are those of the top folder.
    """

    name: str
    file: str
    uuid: str
    parent_uuid: Optional[str]
    parent: Optional[str]
    otime: int
    stream_size: int
    stream_sha256: str
    file_size: int
    file_sha256: str
    pipeline: Tuple[str, ...]
    uid: int
    gid: int
    mode: int
    source: str = ""


class RawFile(NamedTuple):
    """A file as it was written: bytes, SHA-256 as hex."""

    size: int
    sha256: str


class RawFolder(NamedTuple):
    """What a folder of stream files holds.

    `sizes` of the files that sidecars name, where they exist; `partials` the names of snapshots; `broken` pairs of
    a file's name and what is wrong with it.
    """

    backups: Tuple[RawBackup, ...] = ()
    sizes: Dict[str, int] = {}
    partials: Tuple[str, ...] = ()
    broken: Tuple[Tuple[str, str], ...] = ()


def iso_time(otime: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(otime // 10 ** 9))


def sidecar_digest(document: Dict[str, Any]) -> str:
    import hashlib
    import json
    rest = {key: value for key, value in document.items() if key != "sidecar_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode("ascii")).hexdigest()


def format_sidecar(backup: RawBackup) -> str:
    import json
    document = dict(backup._asdict(), version=1, program="btrfs-backup-ng " + __version__, protocol=1,
                    time=iso_time(backup.otime), mode=oct(backup.mode))
    document["sidecar_sha256"] = sidecar_digest(dict(document, pipeline=list(backup.pipeline)))
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def parse_sidecar(text: str) -> RawBackup:
    """What a sidecar says; ValueError for anything but one of ours, unchanged."""
    import json
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("it was changed or damaged") from None
    if not isinstance(document, dict) or "sidecar_sha256" not in document:
        raise ValueError("it is no sidecar of this program's")
    if document["sidecar_sha256"] != sidecar_digest(document):
        raise ValueError("it was changed or damaged")
    if document.get("version") != 1:
        raise ValueError("it is of a newer version")
    fields = {key: document[key] for key in RawBackup._fields}
    if not isinstance(fields["pipeline"], list):
        raise TypeError("pipeline")
    fields.update(pipeline=tuple(fields["pipeline"]), mode=int(fields["mode"], 8))
    return check_fields(RawBackup(**fields))


def read_sidecar(folder: str, name: str) -> RawBackup:
    """The sidecar in file `name`; ValueError says what is wrong with it."""
    text = read_note(folder, name, single=False)[0]  # it vouches for itself, and copies of a folder may share files
    try:
        backup = parse_sidecar(text)
    except (KeyError, TypeError, AttributeError):
        raise ValueError("it is no sidecar of this program's") from None
    if backup.file + SIDECAR_SUFFIX != name or not backup.file.startswith(backup.name + STREAM_SUFFIX):
        raise ValueError("it belongs to {}".format(printable(backup.file)))
    return backup


def without_replaced(backups: Sequence[RawBackup], sizes: Dict[str, int]) -> Tuple[RawBackup, ...]:
    """Without the sidecars of lost files that were sent again since, compressed or encrypted in another way."""
    there = {backup.name for backup in backups if backup.file in sizes}
    return tuple(backup for backup in backups if backup.file in sizes or backup.name not in there)


def read_raw_folder(folder: str) -> RawFolder:
    """What a folder of stream files holds. OSError where it cannot be listed."""
    names = set(os.listdir(folder))
    backups, sizes, broken = [], {}, []
    for name in sorted(n for n in names if n.endswith(SIDECAR_SUFFIX) and STREAM_SUFFIX in n and n[:1] != "."):
        try:
            backup = read_sidecar(folder, name)
        except (ValueError, OSError) as error:
            broken.append((name, "its sidecar cannot be used: {}".format(
                error.strerror if isinstance(error, OSError) else error)))
            continue
        backups.append(backup)
        with contextlib.suppress(OSError):
            found = os.lstat(os.path.join(folder, backup.file))
            if stat.S_ISREG(found.st_mode):
                sizes[backup.file] = found.st_size
    known = {backup.file for backup in backups} | {name[:-len(SIDECAR_SUFFIX)] for name, _ in broken}
    for name in sorted(names):
        if re.search(r"[0-9]\.btrfs(\.[a-z0-9]+)*$", name) and not name.endswith(SIDECAR_SUFFIX) and name not in known:
            broken.append((name, "it has no sidecar"))
    partials = {partial_of(name) or "" for name in names} - {""}
    partials = {name[:-len(SIDECAR_SUFFIX)] if name.endswith(SIDECAR_SUFFIX) else name for name in partials}
    return RawFolder(without_replaced(backups, sizes), sizes, tuple(sorted(partials)), tuple(broken))


def stream_file_stem(path: str) -> str:
    """The path without what a stream file has after the name of its snapshot."""
    folder, name = os.path.split(path)
    return os.path.join(folder, name.partition(STREAM_SUFFIX)[0])


def without_full_stream(backups: Sequence[RawBackup]) -> List[RawBackup]:
    """Those of `backups` whose parents do not lead to a full stream among them, but nowhere, or in a circle."""
    children: Dict[Optional[str], List[RawBackup]] = {}
    for backup in backups:
        children.setdefault(backup.parent_uuid, []).append(backup)
    sound, reached = list(children.get(None, ())), {None}  # type: List[RawBackup], Set[Optional[str]]
    for backup in sound:
        if backup.uuid not in reached:
            reached.add(backup.uuid)
            sound += children.get(backup.uuid, ())
    return [backup for backup in backups if backup.parent_uuid not in reached]


def broken_backups(folder: RawFolder) -> Dict[str, str]:
    """What is wrong, by name of the backup, with those that cannot be restored for what can be seen from outside."""
    wrong, missing = {}, set()
    for file, what in folder.broken:
        wrong[file.partition(STREAM_SUFFIX)[0]] = "{}: {}".format(file, what)
    for backup in folder.backups:
        size = folder.sizes.get(backup.file)
        if size is None:
            wrong[backup.name] = "{} is missing".format(backup.file)
            missing.add(backup.name)
        elif size != backup.file_size:
            wrong[backup.name] = "{} has {} bytes instead of {}".format(backup.file, size, backup.file_size)
    cut = without_full_stream([backup for backup in folder.backups if backup.name not in wrong])
    broken = (set(wrong) | {backup.name for backup in cut}) - missing
    wrong.update({backup.name: "its parent {} is {}".format(
        backup.parent, "broken" if backup.parent in broken else "missing") for backup in cut})
    return wrong


def raw_subvolume(backup: RawBackup) -> Subvolume:
    """A backup as if it had been received, with a number made of its id."""
    return Subvolume(backup.name, backup.uuid, backup.parent_uuid, backup.uuid, True, backup.otime,
                     subvolid=crc32c(os.fsencode(backup.uuid)))


def listing_of(folder: RawFolder) -> Listing:
    """A raw folder as planning sees it: each backup that can be restored as a received subvolume."""
    wrong = broken_backups(folder)
    lost = {b.name for b in folder.backups if b.file not in folder.sizes}
    whole = [raw_subvolume(b) for b in folder.backups if b.name not in wrong]
    partial = [Subvolume(partial_name(name), None, readonly=False) for name in folder.partials]
    return Listing(tuple(whole + partial), frozenset(), True,
                   tuple(Broken(name, why, name in lost) for name, why in sorted(wrong.items())))


def is_encryption(step: str) -> bool:
    return step.partition(":")[0] in ("gpg", "age")


def encryption_of(folder: RawFolder, prefix: str) -> str:
    """How the newest encrypted stream of `prefix` is encrypted, as --raw-encrypt takes it; "" where none is.

    Of a stream file whose sidecar cannot be used only its name tells, so that KEY stands for the key.
    """
    ours = sorted((b for b in folder.backups if name_time(prefix, b.name)), key=lambda b: b.otime, reverse=True)
    known = [step for backup in ours for step in backup.pipeline if is_encryption(step)]
    files = [file for file, _ in folder.broken if name_time(prefix, file.partition(STREAM_SUFFIX)[0])]
    guessed = [method + ":KEY" for file in files for method in re.findall(r"\.(gpg|age)(?:\.json)?$", file)]
    return (known + guessed + [""])[0]


def publish_stream_file(folder: str, backup: RawBackup) -> None:
    """Gives a synced partial its final name, after its sidecar. OSError where that fails."""
    replace_file(folder, backup.file + SIDECAR_SUFFIX, format_sidecar(backup),
                 aside=partial_name(backup.name + SIDECAR_SUFFIX))
    os.rename(os.path.join(folder, partial_name(backup.name)), os.path.join(folder, backup.file))
    sync_folder(folder)


def chain_length(name: str, backups: Dict[str, RawBackup]) -> int:
    """How many streams restoring the backup `name` takes, as far as they are there."""
    seen = []  # type: List[str]
    at: Optional[str] = name
    while at in backups and at not in seen:
        seen.append(at)
        at = backups[at].parent
    return len(seen)


def clear_sidecars(folder: str) -> None:
    held = read_raw_folder(folder)
    needed = {b.parent_uuid for b in held.backups}
    for backup in held.backups:
        if backup.file not in held.sizes and backup.uuid not in needed and backup.name not in held.partials:
            remove_file(folder, backup.file + SIDECAR_SUFFIX)


def checked_name(name: str, part: str = "") -> str:
    """A name in a folder as it is; BackupError for what leads elsewhere, or does not have `part` in it."""
    if "/" in name or "\0" in name or name in ("", ".", "..") or part not in name:
        raise BackupError("{} is no name of a stream file".format(printable(repr(name))))
    return name


def delete_stream_files(folder: str, doomed: Sequence[Subvolume]) -> List[BackupError]:
    """Deletes backups that still are what they were planned as, children before their parents, and partials.

    With backups, sidecars go as well that a crash has left without their file, where no other backup needs that.
    """
    errors: List[BackupError] = []
    held = read_raw_folder(folder)
    by_name = {b.name: b for b in held.backups}
    for subvolume in sorted(doomed, key=lambda s: -chain_length(s.name, by_name)):
        try:
            name, backup = partial_of(subvolume.name), by_name.get(subvolume.name)
            if name is not None:
                checked_name(name)
                for left in (partial_name(name), partial_name(name + SIDECAR_SUFFIX)):
                    remove_file(folder, left)
            elif backup is None or backup.uuid != subvolume.received_uuid:
                raise BackupError("not deleted: {} is no longer what it was".format(
                    os.path.join(folder, subvolume.name)), "run again")
            else:
                remove_file(folder, backup.file)
                remove_file(folder, backup.file + SIDECAR_SUFFIX)
        except BackupError as error:
            errors.append(error)
    if any(partial_of(subvolume.name) is None for subvolume in doomed):
        clear_sidecars(folder)
    sync_folder(folder)
    return errors


class FileSink(Receiver):
    """Writes `.NAME.partial` in a thread of its own, for a disk may make it wait; digests what it writes."""

    program, file_data = "the stream file", 0

    def __init__(self, folder: str, name: str) -> None:
        import hashlib
        import queue
        self.folder, self.path = folder, os.path.join(folder, checked_name(partial_name(name)))
        try:
            self.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self.failure(error) from None
        with contextlib.suppress(OSError):  # some filesystems of networks know no locks
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # says that it is in use
        self.digest, self.queue = hashlib.sha256(), queue.Queue()  # type: Any, Any
        self.offered = self.done = self.size = self.told = 0
        self.error: Optional[OSError] = None
        self.finished = False
        self.thread = threading.Thread(target=self.write_all, daemon=True)
        self.thread.start()

    def failure(self, error: OSError) -> BackupError:
        failed = os_error("cannot write {}".format(self.path), error, hint_for(error.strerror or ""))
        return ReceiverFailed(failed.message, failed.hint)

    @property
    def pending(self) -> int:
        """Chunks not wholly written."""
        return self.offered - self.done

    def offer(self, chunk: Chunk) -> None:
        if len(chunk):
            self.offered += 1
            self.queue.put(memoryview(chunk))

    def write_all(self) -> None:
        for chunk in iter(self.queue.get, None):
            try:
                if self.error is None:
                    self.write(chunk)
            except OSError as error:
                self.error = error
            self.done += 1

    def write(self, chunk: memoryview) -> None:
        self.digest.update(chunk)
        while chunk:
            written = os.write(self.fd, chunk)
            self.size += written
            chunk = chunk[written:]

    def pump(self) -> int:
        """How many bytes were written since it was last asked."""
        self.check_alive()
        size, told = self.size, self.told
        self.told = size
        return size - told

    def check_alive(self) -> None:
        if self.error is not None:
            raise self.failure(self.error)

    def close_pipe(self) -> None:
        """Nothing more will be offered."""
        self.queue.put(None)

    def finish(self, timeout: float) -> RawFile:
        """The file as it is on the disk by now, still under its partial name."""
        self.close_pipe()
        self.thread.join(None if timeout == float("inf") else timeout)
        if self.thread.is_alive():
            raise Stalled("writing {} stalled".format(self.path))
        self.check_alive()
        try:
            os.fsync(self.fd)
            sync_folder(self.folder)
        except OSError as error:
            raise self.failure(error) from None
        self.finished = True
        return RawFile(self.size, self.digest.hexdigest())

    def end(self) -> None:
        """Lets go of the file; one that is not finished is deleted."""
        if self.fd < 0:
            return
        self.error = self.error or OSError(errno.ECANCELED, "given up")
        self.queue.put(None)
        self.thread.join(ENDING_GRACE)
        if not self.finished:
            unlink_own(self.path, self.fd)
        os.close(self.fd)
        self.fd = -1


class FileSource(Sender):
    """A stream file as it lies there, as a sender gives it."""

    def __init__(self, folder: str, file: str) -> None:
        path = os.path.join(folder, checked_name(file, STREAM_SUFFIX))
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise os_error("cannot read {}".format(path), error) from None
        self.path = path

    def wait_readable(self, seconds: float) -> None:
        """A file can always be read."""

    def read(self, buffer: Union[bytearray, memoryview]) -> Optional[int]:
        try:
            return os.readv(self.fd, [buffer])
        except OSError as error:
            raise os_error("cannot read {}".format(self.path), error) from None

    def finish(self, timeout: float) -> None:
        """Nothing is left to wait for."""

    def end(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def idle_raw_partials(folder: str) -> Dict[str, float]:
    """The names of partials that nobody writes, each with the seconds since it was last written."""
    idle = {}
    for name in os.listdir(folder):
        if partial_of(name) is not None and not name.endswith(SIDECAR_SUFFIX + ".partial"):
            with contextlib.suppress(OSError):
                with opened_folder(folder) as top:
                    fd = open_plain(name, os.O_RDONLY, top)
                with open(fd, "rb") as source:
                    fcntl.flock(source, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    idle[name] = time.time() - os.fstat(fd).st_mtime
    return idle


def digest_file(folder: str, file: str) -> RawFile:
    """Size and SHA-256 of a file; BackupError where it cannot be read."""
    import hashlib
    source, digest, size, buffer = FileSource(folder, file), hashlib.sha256(), 0, bytearray(PIPE_SIZE)
    try:
        for got in iter(lambda: source.read(buffer) or 0, 0):
            digest.update(memoryview(buffer)[:got])
            size += got
    finally:
        source.end()
    return RawFile(size, digest.hexdigest())


########################################################################################################
# HOST: the semantic calls that everything above planning goes through
#
# A host is a machine that things are done on. Its calls take and return plain values, so that they can
# travel: look at a place, list a folder, snapshot, delete, rename, state, send, receive. LocalHost does
# them here. Never: deleting by name alone; what is deleted must still have the UUID that was planned.
########################################################################################################


class Place(NamedTuple):
    """What is at a path. `inside` is the subvolume that holds it, or its nearest existing parent."""

    path: str  # real path
    kind: str  # "folder", "missing" or "other"
    filesystem: Optional[str] = None  # UUID of the btrfs, of the nearest existing parent where missing
    inside: Optional[Subvolume] = None
    is_top: bool = False
    readonly: bool = False
    unmounted: str = ""  # a mount point of /etc/fstab on the way to it where nothing is mounted
    mount: str = ""  # where the filesystem that it is on is mounted
    in_memory: bool = False  # whether that is gone at the next boot
    exposed: Tuple[Tuple[str, str], ...] = ()  # folders on the way to it that others may write to, each with why


def is_received_into(folder: str) -> bool:
    """Whether a `btrfs` process has `folder` open, as `btrfs receive` has while it works."""
    top = os.stat(folder)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            with open("/proc/{}/comm".format(pid), "rb") as comm:
                is_btrfs = comm.read() == b"btrfs\n"
            if is_btrfs and has_open(pid, top):
                return True
    return False


class SkipReport:
    """Tells every few seconds how far the skipping of a stream's beginning has come."""

    def __init__(self, events: Events, name: str, offset: int) -> None:
        self.events, self.name, self.offset, self.told = events, name, offset, time.monotonic()

    def __call__(self, done: int) -> None:
        if time.monotonic() - self.told > 5:
            self.told = time.monotonic()
            self.events.debug("skipping", "reading {} again: {} of {} that have arrived".format(
                self.name, format_size(done), format_size(self.offset)), snapshot=self.name)


@contextlib.contextmanager
def receiving_in(folder: str) -> Iterator[contextlib.ExitStack]:
    """What is to be undone where a receiver cannot be opened."""
    with contextlib.ExitStack() as undo:
        try:
            yield undo
        except OSError as error:
            raise os_error("cannot receive in {}".format(folder), error) from None
        undo.pop_all()


class LocalHost:
    """This machine. Paths are real paths; names are names in a folder."""

    machine = ""
    skips = True  # open_send can begin in the middle
    serves = False  # others, as an agent: what is noted are destinations of theirs

    def __init__(self, events: Events, must_confine: bool = False) -> None:
        """must_confine: nothing is received where the kernel cannot keep it to its folder."""
        self.events, self.must_confine = events, must_confine
        self.known_capabilities: Optional[Capabilities] = None
        self.digested: Dict[Tuple[str, int], TreeReader] = {}
        self.digests_mutex = threading.Lock()
        self.held: Dict[str, int] = {}  # folders that a run holds, open

    @contextlib.contextmanager
    def firm(self, folder: str) -> Iterator[str]:
        """A path to the folder that is held under the name `folder`, whatever bears that name by now.

        It is the name itself where none is held. What is said of it says the name.
        """
        path = "/proc/{}/fd/{}".format(os.getpid(), self.held[folder]) if folder in self.held else folder
        try:
            yield path
        except BackupError as error:
            error.message, error.hint, error.detail = (
                text.replace(path, folder) for text in (error.message, error.hint, error.detail))
            raise

    def name(self) -> str:
        return os.uname().nodename

    def command(self, argv: Sequence[str], doing: str) -> str:
        begun = time.monotonic()
        try:
            return check(argv, doing)
        finally:
            self.events.debug("command", "ran {} ({:.3f} s)".format(" ".join(argv), time.monotonic() - begun))

    def capabilities(self) -> Capabilities:
        if self.known_capabilities is None:
            self.known_capabilities = read_capabilities(self.command(["btrfs", "--version"], "btrfs --version"))
        return self.known_capabilities

    def look(self, path: str) -> Place:
        """What is at `path`; links are followed, as a user means them, but for those that another user has made."""
        link = foreign_link(os.path.abspath(path))
        if link:
            raise BackupError("{} is a link of another user's".format(link), "name the folder that is meant")
        real = os.path.realpath(path)
        try:
            os.stat(real)
        except PermissionError as error:  # what may not be seen is not missing
            raise os_error("cannot look at {}".format(path), error) from None
        except OSError:
            pass
        kind = "folder" if os.path.isdir(real) else "other" if os.path.lexists(real) else "missing"
        if kind == "other":
            return Place(real, kind)
        ground = nearest_existing(real)
        try:
            filesystem = read_filesystem_id(ground)
            inside, is_top = self.subvolume_around(ground) if filesystem else (None, False)
            flags = os.statvfs(ground).f_flag
            exposed = self.exposed(ground, kind == "missing")
        except OSError as error:
            raise os_error("cannot look at {}".format(path), error) from None
        return Place(real, kind, filesystem, inside, is_top and kind == "folder", bool(flags & os.ST_RDONLY),
                     find_unmounted(real), find_mount(ground), is_in_memory(ground), exposed)

    def exposed(self, folder: str, is_ground: bool) -> Tuple[Tuple[str, str], ...]:
        """The folders on the way to `folder` where others decide what stands there. is_ground: to one to be made in it.

        BackupError where it is no longer the folder that this host holds.
        """
        fd, steps = open_way(folder)
        held = self.held.get(folder)
        try:
            if held is not None and not os.path.samestat(os.fstat(fd), os.fstat(held)):
                raise BackupError("{} has become another folder meanwhile".format(folder), "look there, and run again")
        finally:
            os.close(fd)
        return tuple(exposed_steps(steps + steps[:1] if is_ground else steps))  # what is made there will be ours

    def subvolume_around(self, folder: str) -> Tuple[Optional[Subvolume], bool]:
        """The subvolume that holds `folder`, and whether `folder` is its top."""
        top = folder
        while os.stat(top).st_ino != SUBVOLUME_INODE and top != "/":
            top = os.path.dirname(top)
        return read_subvolume(top, os.path.basename(top)), top == folder

    def list(self, folder: str) -> Listing:
        """What `folder` holds; BackupError where it cannot be read, for that is not an empty folder."""
        with self.firm(folder) as firm:
            return self.list_firm(firm)

    @staticmethod
    def list_firm(folder: str) -> Listing:
        subvolumes, others = [], set()
        try:
            for name in os.listdir(folder):
                subvolume = read_subvolume(os.path.join(folder, name), name)
                if subvolume is None:
                    others.add(name)
                else:
                    subvolumes.append(subvolume)
        except OSError as error:
            raise os_error("cannot list {}".format(folder), error) from None
        ours = sorted(name for name in map(snapshot_of_record, others) if name)
        found = (read_record(folder, name) for name in ours)
        return Listing(tuple(subvolumes), frozenset(others), records=tuple(r for r in found if r is not None))

    def facts(self) -> HostFacts:
        return read_facts()

    def health(self, folder: str) -> Health:
        try:
            return read_health(folder)
        except OSError as error:
            raise os_error("cannot look at {}".format(folder), error) from None

    def is_held(self, folder: str, prefix: str) -> bool:
        """Whether a run is at work on `prefix` in `folder`."""
        return is_flocked(os.path.join(folder, run_lock_name(prefix)))

    def own_sizes(self, folder: str) -> Dict[int, int]:
        """Bytes that each subvolume of a filesystem shares with no other, by id; {} where quotas are not enabled."""
        outcome = run(["btrfs", "qgroup", "show", "--raw", folder])
        rows = re.findall(r"^0/([0-9]+)\s+[0-9]+\s+([0-9]+)", outcome.out, re.MULTILINE)
        return {int(subvolid): int(exclusive) for subvolid, exclusive in rows} if outcome.status == 0 else {}

    def nested_subvolumes(self, path: str, beside: str) -> List[str]:
        """Subvolumes directly nested in the one at `path`, relative to it, without those in folder `beside`."""
        around, _ = self.subvolume_around(path)
        listed = self.command(["btrfs", "subvolume", "list", "-o", path], "cannot list subvolumes of {}".format(path))
        paths = re.findall(r"^ID [0-9]+ .*? path (.*)$", listed, re.MULTILINE)
        if not paths or around is None:
            return []
        own = "" if around.subvolid == 5 else self.command(
            ["btrfs", "inspect-internal", "subvolid-resolve", str(around.subvolid), path],
            "cannot resolve {}".format(path)).strip()
        inner = [nested[len(own) + 1:] if own and nested.startswith(own + "/") else nested for nested in paths]
        return [nested for nested in inner if os.path.dirname(os.path.join(path, nested)) != beside
                and not nested.startswith(STATE_FOLDER + "/")]

    def make_folder(self, path: str) -> None:
        """Makes a folder, for its user alone, and its parents; no error where it is there."""
        try:
            os.close(open_way(path, make=True)[0])
        except OSError as error:
            raise os_error("cannot make the folder {}".format(path), error) from None

    def snapshot(self, source: str, folder: str, name: str) -> Subvolume:
        with self.firm(folder) as firm:
            path = os.path.join(firm, name)
            self.command(["btrfs", "subvolume", "snapshot", "-r", source, path],
                         "cannot take a snapshot of {}".format(source))
            taken = read_subvolume(path, name)
            if taken is None or not taken.readonly:
                raise BackupError("the snapshot {} was not made as asked".format(path),
                                  "look at it with btrfs subvolume show")
            return taken

    def delete(self, folder: str, doomed: Sequence[Subvolume], convert_rw: bool) -> List[BackupError]:
        """Deletes subvolumes of `folder` that still are what they were planned as; an error for each not gone."""
        errors: List[BackupError] = []
        for subvolume in doomed:
            try:
                with self.firm(folder) as firm:
                    self.delete_one(os.path.join(firm, subvolume.name), subvolume, convert_rw)
            except Exception as error:
                errors.append(explain(error, "cannot delete {}".format(os.path.join(folder, subvolume.name))))
        errors += self.forget_partials(folder, [partial_of(s.name) or "" for s in doomed if partial_of(s.name)])
        if doomed:
            self.command(["btrfs", "filesystem", "sync", folder], "cannot sync {}".format(folder))
        return errors

    def delete_one(self, path: str, subvolume: Subvolume, convert_rw: bool) -> None:
        found = read_subvolume(path, subvolume.name)
        if found is None or found.uuid != subvolume.uuid:
            raise BackupError("not deleted: {} is no longer what it was".format(path), "run again")
        try:
            with firm_path(path, found.uuid) as firm:
                if convert_rw and found.readonly:
                    self.make_writable(firm)
                delete_firm(firm, path, self.command)
        except OSError as error:
            raise os_error("cannot delete {}".format(path), error) from None

    def idle_partials(self, folder: str) -> Dict[str, float]:
        """Partial backups in `folder` by name, each with the seconds since it was last changed.

        Without those that may be in use: whose lock is held, or all where a `btrfs receive` has the folder open.
        """
        if is_received_into(folder):
            return {}
        names = [name for name in os.listdir(folder) if partial_of(name) is not None
                 and not is_flocked(os.path.join(folder, partial_lock_name(partial_of(name) or "")))]
        changed = {name: subvolume_changed(os.path.join(folder, name)) for name in names}
        return {name: time.time() - moment for name, moment in changed.items() if moment is not None}

    def forget_partials(self, folder: str, names: Sequence[str]) -> List[BackupError]:
        """Removes the records of those snapshots that have no partial left."""
        try:
            for name in set(names) - {partial_of(left) for left in os.listdir(folder)} if names else ():
                remove_record(folder, name)
                remove_idle_lock(folder, name)
        except OSError as error:
            return [os_error("cannot delete records in {}".format(folder), error)]
        return []

    def make_writable(self, path: str) -> None:
        argv = ["btrfs", "property", "set", "-ts", path, "ro", "false"]
        if self.capabilities().progs >= (5, 14, 2):  # from there on a received subvolume needs force
            argv.insert(3, "-f")
        self.command(argv, "cannot make {} writable".format(path))

    def wait_for_cleaning(self, folder: str) -> None:
        self.command(["btrfs", "subvolume", "sync", folder], "cannot wait for deleted subvolumes of {}".format(folder))

    def read_locks(self, folder: str) -> Locks:
        with self.firm(folder) as firm:
            return read_state_file(firm, LOCK_FILE, parse_locks)

    def change_locks(self, folder: str, add: Sequence[LockChange], clear: Sequence[LockChange]) -> Locks:
        """Sets and clears locks in the file as it stands now; what comes out is durable."""
        with self.firm(folder) as firm, folder_mutex(firm):
            before = self.read_locks(folder)
            after = clear_locks(add_locks(before, add), clear) if add or clear else before
            if after != before:
                self.note_own(firm, [change.destination for change in add])
                replace_file(firm, LOCK_FILE, format_locks(after))
        return after

    def prove_writable(self, folder: str) -> None:
        """BackupError where locks and pins could not be written, or snapshots not be taken."""
        find_program("btrfs")
        with self.firm(folder) as firm, folder_mutex(firm):
            prove_writable(firm)

    def note_own(self, folder: str, destinations: Iterable[str]) -> None:
        if not self.serves:
            note_own_destinations(folder, destinations)

    def read_pins(self, folder: str) -> Pins:
        with self.firm(folder) as firm:
            return read_state_file(firm, PIN_FILE, parse_pins)

    def change_pins(self, folder: str, prefix: str, pins: Dict[str, Optional[Pin]]) -> None:
        """Sets the pins of `prefix` by destination; None forgets."""
        with self.firm(folder) as firm, folder_mutex(firm):
            before = self.read_pins(folder)
            after = changed_pins(before, prefix, pins)
            if after != before:
                self.note_own(firm, [destination for destination, pin in pins.items() if pin is not None])
                replace_file(firm, PIN_FILE, format_pins(after))

    def read_notes(self, folder: str, prefix: str) -> FolderNotes:
        """What a folder tells of the snapshots of `prefix` in it; BackupError where it is damaged."""
        pins = self.read_pins(folder)
        return FolderNotes(read_state_file(folder, source_note_name(prefix), parse_sources) or (),
                           own_locks(self.read_locks(folder), prefix),
                           {key: entry[prefix] for key, entry in pins.items() if prefix in entry})

    def claim(self, folder: str, claim: Claim) -> None:
        """Notes whose the backups of a prefix in a folder are; BackupError where they are another's by now."""
        name = source_note_name(claim.prefix)
        with folder_mutex(folder):
            check_claim(folder, claim, read_state_file(folder, name, parse_sources) or (), os.listdir(folder))
            replace_file(folder, name, format_sources(claim.after))

    @contextlib.contextmanager
    def hold(self, folder: str, prefix: str, wait: float, token: str = "") -> Iterator[None]:
        """A context in which no other run works on `prefix` in `folder`, and in which that means the folder it is now.

        Whoever owns a folder above it could put another one in its place.
        """
        with contextlib.ExitStack() as stack:
            if folder not in self.held and not OPEN_FOLDER.match(folder):
                try:
                    self.held[folder] = open_way(folder)[0]
                except OSError as error:
                    raise os_error("cannot open {}".format(folder), error) from None
                stack.callback(os.close, self.held[folder])
                stack.callback(self.held.pop, folder)
            firm = stack.enter_context(self.firm(folder))
            stack.enter_context(run_lock(firm, prefix, wait, lambda: self.events.info(
                "waiting", "waiting for another run in {}".format(folder)), token))
            yield

    def expected_stream(self, folder: str, snapshot: Subvolume, parent: Optional[Subvolume]) -> ExpectedStream:
        """What the stream of a snapshot must say; read right before it is sent."""
        path = os.path.join(folder, snapshot.name)
        try:
            top = os.lstat(path)
        except OSError as error:
            raise os_error("cannot look at {}".format(path), error, "was it deleted meanwhile?") from None
        return ExpectedStream(snapshot.name, snapshot.stream_id or "", parent.stream_id if parent else None,
                              top.st_uid, top.st_gid, stat.S_IMODE(top.st_mode), None,
                              parent.name if parent else None, snapshot.otime)

    def open_send(self, folder: str, name: str, parent: Optional[str], options: SendOptions,
                  resume: Optional[ResumePoint] = None) -> LocalSender:
        """A sender, whose stream begins where a partial goes on; StreamDiffers where that does not fit."""
        path, parent = os.path.join(folder, name), os.path.join(folder, parent) if parent else None
        self.events.debug("command", "starting {}".format(" ".join(send_argv(path, parent, options))))
        sender = start_sender(path, parent, options)
        if resume is not None:
            try:
                sender.skip(resume, SkipReport(self.events, name, resume.offset))
            except BaseException:
                sender.end()
                raise
        return sender

    def measure_send(self, folder: str, name: str, parent: Optional[str]) -> Measuring:
        return Measuring(send_argv(os.path.join(folder, name), os.path.join(folder, parent) if parent else None,
                                   SendOptions(no_data=True)))

    def measured(self, folder: str, name: str, parent: Optional[str]) -> SendSize:
        """What a send will weigh, once it was measured to its end."""
        measuring = self.measure_send(folder, name, parent)
        try:
            meter = measuring.wait()
            return SendSize(meter.stream_size, meter.file_data, meter.ended)
        finally:
            measuring.end()

    def data_since(self, path: str, generation: int) -> int:
        """Bytes of data in extents of the subvolume at `path` written after `generation`; an estimate of a send."""
        return parse_find_new(self.command(["btrfs", "subvolume", "find-new", path, str(generation)],
                                           "cannot look for changes in {}".format(path)))

    def open_receive(self, folder: str, expected: ExpectedStream, debug: bool, begin: str = "anew") -> LocalReceiver:
        """A receiver of a stream that may hold anything; begin: see `receiver`."""
        check_expected(expected)
        with receiving_in(folder) as undo:
            confinement = confine(folder)
            if confinement is not None:
                undo.callback(confinement.end)
            elif self.must_confine:
                raise BackupError("this system cannot keep a stream from following links",
                                  "a key that may receive needs root and Linux 5.10 or later")
            partial = self.open_partial(folder, expected, begin, undo)
            gate = StreamGate(expected, None if confinement else self.hazards(partial))
            return self.receiver(partial, gate, confinement, debug, begin)

    def open_own_receive(self, folder: str, expected: ExpectedStream, debug: bool, begin: str) -> LocalReceiver:
        """The same for a stream that this machine's kernel writes and this process passes on: it is trusted.

        Not so a folder in which others may put a link in the place of what is received.
        """
        with receiving_in(folder) as undo:
            confinement = confine(folder) if is_exposed(folder) else None
            if confinement is not None:
                undo.callback(confinement.end)
            elif is_exposed(folder):
                raise BackupError("others may write to {}, and this system cannot keep them from leading a transfer "
                                  "elsewhere".format(folder), "let root alone write there; or it needs Linux 5.10 and, "
                                  "in a service, the units that 'print systemd' writes now")
            return self.receiver(self.open_partial(folder, expected, begin, undo), None, confinement, debug, begin)

    @staticmethod
    def open_partial(folder: str, expected: ExpectedStream, begin: str, undo: contextlib.ExitStack) -> Partial:
        partial = Partial(folder, expected)
        undo.callback(partial.release)
        partial.open(take_up=begin == "take up")
        return partial

    def receiver(self, partial: Partial, gate: Optional[StreamGate], confinement: Optional[Confinement], debug: bool,
                 begin: str) -> LocalReceiver:
        """begin: "take up" what there is; "anew"; "in one piece", without checkpoints."""
        folder, expected = partial.folder, partial.expected
        sole = expected.base is None or is_sole_received(folder, expected.parent_uuid or "", expected.base)
        ground = Ground(sole, read_default_acl(self.base_path(folder, expected)) if expected.base else None,
                        keeps_capabilities(self.capabilities().progs))
        stream = IncomingStream(expected, ground, gate, partial.resume or BEGINNING)
        if partial.record.piece:
            stream.go_on_with(partial.record.version, partial.record.ctransid)
        argv = receive_argv(confinement.path if confinement else folder, debug, confinement is not None)
        self.events.debug("command", "starting {}".format(" ".join(argv)))
        return LocalReceiver(argv, stream, partial, begin != "in one piece", confinement)

    def base_path(self, folder: str, expected: ExpectedStream) -> str:
        """Where the parent's backup is: as a rule in `folder`, by its own name; ReceiverFailed where it is not seen."""
        near = os.path.join(folder, os.path.basename(expected.parent_name or ""))
        found = read_subvolume(near, near) if expected.parent_name else None
        if found is None or found.uuid != expected.base:
            mount = mount_around(os.path.realpath(folder), read_mounts())
            ids = search_uuid_tree(folder, expected.base or "", 251) if mount is not None else []
            found = self.subvolume_of_id(folder, ids[0], mount) if ids and mount is not None else None
        if found is None:
            raise ReceiverFailed("the parent's backup (UUID {}) is not to be seen from {}".format(
                expected.base, folder), "-I sends in full")
        return found.name

    def hazards(self, partial: Partial) -> Hazards:
        """What a stream must not go through, as far as it is there before the stream begins."""
        folder, expected, piece = partial.folder, partial.expected, partial.checkpoint
        parent = list(find_hazards(self.base_path(folder, expected))) if expected.base is not None else []
        return Hazards(find_hazards(os.path.join(folder, piece.name)) if piece is not None else parent, parent)

    def settle_partials(self, folder: str, names: Dict[str, str]) -> List[str]:
        """Has writers of partials that wait at the end of a dead connection end; the names that are being written.

        names: the stream id of each snapshot.
        """
        busy = []
        for name, stream_id in names.items():
            if os.path.lexists(os.path.join(folder, partial_lock_name(name))):
                try:
                    PartialLock(folder, name, stream_id).release()
                except BeingWritten:
                    busy.append(name)
        return busy

    def find_base(self, folder: str, ids: Sequence[str]) -> Optional[Tuple[str, Subvolume]]:
        """The first of `ids` that a read-only subvolume on the filesystem of `folder` has, and that subvolume.

        By UUID or received UUID, wherever `btrfs receive` can reach it from `folder`. Receive
        looks for a received UUID first, so one that was itself sent to the same filesystem would be mistaken.
        A partial is none, for it may be deleted: one that lacks nothing but its name has the received UUID already.
        """
        mount = mount_around(os.path.realpath(folder), read_mounts())
        if mount is None:
            return None
        for key in ids:
            try:
                found = search_uuid_tree(folder, key, 251) + search_uuid_tree(folder, key, 252)
                bases = [self.subvolume_of_id(folder, subvolid, mount) for subvolid in found]
                for base in bases:
                    if (base is not None and base.readonly and partial_of(os.path.basename(base.name)) is None
                            and not search_uuid_tree(folder, base.uuid or key, 252)):
                        return key, base._replace(name=os.path.basename(base.name))
            except OSError as error:
                self.events.debug("search", "cannot look for subvolumes on the filesystem of {}: {}".format(
                    folder, error.strerror))
                return None
        return None

    def subvolume_of_id(self, folder: str, subvolid: int, mount: Mount) -> Optional[Subvolume]:
        """A subvolume of the filesystem of `folder`, its path as its name; None where it is not to be reached."""
        outcome = run(["btrfs", "inspect-internal", "subvolid-resolve", str(subvolid), folder])
        path = reachable_path(outcome.out.rstrip("\n"), mount) if outcome.status == 0 else None
        found = read_subvolume(path, path) if path else None
        return found if found is not None and found.subvolid == subvolid else None

    def digest_tree(self, folder: str, name: str, label: str) -> TreeDigest:
        """The digest of the read-only subvolume `name` in `folder`. label: the location in progress events."""
        begun = time.monotonic()

        def tell(size: int) -> None:
            self.events.emit("progress", "progress", "{} at {}".format(name, label), snapshot=name, destination=label,
                             done=size, expected=None, rate=size / max(0.001, time.monotonic() - begun))

        key, reader = self.digest_key(folder, name), TreeReader(os.path.join(folder, name), tell)
        try:
            digest = reader.run()
        finally:
            self.events.emit("progress", "progress", destination=label)
        with self.digests_mutex:
            self.digested[key] = reader
            while len(self.digested) > MOST_DIGESTED:
                del self.digested[next(iter(self.digested))]
        return digest

    @staticmethod
    def digest_key(folder: str, name: str) -> Tuple[str, int]:
        """What a digested tree is remembered by: it cannot change as long as it is the same and read-only."""
        path = os.path.join(folder, name)
        found = read_subvolume(path, name)
        if found is None or not found.readonly:
            raise BackupError("{} is no read-only subvolume".format(path), "is it still there?")
        return found.uuid or path, found.generation

    def digested_tree(self, folder: str, name: str) -> TreeReader:
        """The reader of a tree that was digested, once more where another process of this host did that."""
        key = self.digest_key(folder, name)
        if key not in self.digested:
            self.digest_tree(folder, name, "")
        return self.digested[key]

    def folder_digests(self, folder: str, name: str, after: str) -> List[Tuple[str, str]]:
        """A page of the digests of a tree's folders by path, which begins with a slash; `after` is the last one's."""
        return self.digested_tree(folder, name).page(after, PAGE_OF_DIGESTS)

    def describe_folder(self, folder: str, name: str, inner: str) -> Dict[str, Aspects]:
        """What each entry of one folder in a tree is."""
        reader = self.digested_tree(folder, name)
        if os.fsencode(inner[1:]) not in reader.folders:
            raise BackupError("{} has no folder {}".format(name, inner))
        again = TreeReader(os.path.join(folder, name))
        again.links = dict(reader.links)
        return again.describe(inner)

    def look_at_swap_place(self, path: str) -> SwapPlace:
        try:
            return look_at_swap_place(path)
        except OSError as error:
            raise os_error("cannot look at {}".format(path), error) from None

    def swap_in(self, order: SwapOrder) -> SwapNotes:
        """Puts a writable snapshot of a restored subvolume in the place of another."""
        notes, warnings = swap_in(order)
        for text in warnings:
            self.events.warning("state", text)
        return notes

    def finish_swap(self, place: str) -> Optional[SwapNotes]:
        """Completes or undoes a swap that was broken off; its notes where it is completed."""
        return finish_swap(place)


    def list_raw(self, folder: str) -> RawFolder:
        """The stream files of `folder`; BackupError where it cannot be read."""
        try:
            return read_raw_folder(folder)
        except OSError as error:
            raise os_error("cannot list {}".format(folder), error) from None

    def delete_raw(self, folder: str, doomed: Sequence[Subvolume]) -> List[BackupError]:
        """Deletes stream files by name and id; an error for each not gone."""
        try:
            return delete_stream_files(folder, doomed)
        except OSError as error:
            return [os_error("cannot delete in {}".format(folder), error)]

    def open_raw_receive(self, folder: str, name: str, packed: bool) -> FileSink:
        """Begins the stream file of a backup as a partial; packed: it comes compressed or encrypted."""
        try:
            taken = [n for n in os.listdir(folder) if n.startswith(name + STREAM_SUFFIX)
                     and not n.endswith(SIDECAR_SUFFIX)]
        except OSError as error:
            raise os_error("cannot list {}".format(folder), error) from None
        if taken:
            raise ReceiverFailed("{} exists at {}".format(taken[0], folder))
        return FileSink(folder, name)

    def publish_raw(self, folder: str, backup: RawBackup) -> None:
        """Gives a finished stream file its sidecar and its name."""
        stem = checked_name(backup.name) + STREAM_SUFFIX
        path = os.path.join(folder, checked_name(backup.file, stem))
        try:
            # a sidecar that speaks of another's file, or of none, would make a good backup look broken
            if not backup.file.startswith(stem):
                raise BackupError("{} is no stream file of {}".format(backup.file, backup.name))
            if any(name.startswith(stem) and not name.endswith(SIDECAR_SUFFIX) for name in os.listdir(folder)):
                raise ReceiverFailed("{} has appeared meanwhile".format(path))
            os.lstat(os.path.join(folder, partial_name(backup.name)))
            if backup.parent_uuid is not None and backup.parent_uuid not in {
                    s.uuid for s in listing_of(read_raw_folder(folder)).subvolumes}:
                raise ReceiverFailed("{}, which {} builds on, is gone".format(backup.parent, backup.name), "run again")
            publish_stream_file(folder, backup)
        except OSError as error:
            raise os_error("cannot write {}".format(path), error, hint_for(error.strerror or "")) from None

    def open_raw_send(self, folder: str, file: str) -> FileSource:
        return FileSource(folder, file)

    def digest_raw(self, folder: str, file: str) -> RawFile:
        return digest_file(folder, file)

    def idle_raw_partials(self, folder: str) -> Dict[str, float]:
        """Partials of stream files by name that nobody writes, each with the seconds since it was changed."""
        try:
            return idle_raw_partials(folder)
        except OSError as error:
            raise os_error("cannot list {}".format(folder), error) from None


########################################################################################################
# RAW FOLDERS: raw:// and raw+ssh://: streams through filters into files, and back
#
# The filters run here, the file is written where the folder is. A backup needs its whole chain, from the full
# stream to its own: what a kept one needs is kept, and a chain is as long as --raw-full-every allows. Streams
# are of protocol 1, which every btrfs receive reads. Never: a name for a file before its size and both its
# digests are known and it is on the disk.
########################################################################################################


class RawReceiver(Receiver):
    """Takes a stream into a stream file."""

    program = "the stream file"

    def __init__(self, host: LocalHost, folder: str, expected: ExpectedStream, steps: Sequence[str],
                 source: str) -> None:
        import hashlib
        self.host, self.folder, self.steps, self.source = host, folder, tuple(steps), source
        self.stream = WatchedStream(expected)
        self.digest, self.size = hashlib.sha256(), 0  # of the plain stream
        filters = filters_of(steps)
        self.file = expected.name + STREAM_SUFFIX + "".join(f.suffix for f in filters)
        self.buffers = [bytearray(PIPE_SIZE) for _ in range(RING if filters else 0)]
        self.filtered, self.at_end = 0, not filters  # bytes that came out of the filters; whether all have
        self.sink = host.open_raw_receive(folder, expected.name, bool(filters))
        self.pipeline: Optional[Pipeline] = None
        if filters:
            try:
                self.pipeline = Pipeline([f.forth for f in filters])
            except BaseException:
                self.sink.end()
                raise

    @property
    def file_data(self) -> int:
        return self.stream.reader.file_data

    @property
    def pending(self) -> int:
        return self.pipeline.feed.pending if self.pipeline else self.sink.pending

    def offer(self, chunk: memoryview) -> None:
        passed = self.stream.watch(chunk)
        self.digest.update(passed)
        self.size += len(passed)
        if self.pipeline:
            self.pipeline.feed.offer(passed)
        else:
            self.filtered += len(passed)
            self.sink.offer(passed)

    def pump(self) -> int:
        moved = self.pump_filters(self.pipeline) if self.pipeline else 0
        return moved + self.sink.pump()

    def pump_filters(self, pipeline: Pipeline) -> int:
        moved = pipeline.pump()
        while not self.at_end and self.sink.pending < RING:
            got = pipeline.read(self.buffers[0])
            if not got:
                self.at_end = got == 0
                break
            self.sink.offer(memoryview(self.buffers[0])[:got])
            self.buffers.append(self.buffers.pop(0))
            self.filtered += got
            moved += got
        return moved

    def check_alive(self) -> None:
        self.sink.check_alive()
        if self.pipeline:
            self.pipeline.check_alive()

    def close_pipe(self) -> None:
        if self.stream.ended and self.pipeline:
            self.pipeline.feed.close()

    def drain(self, timeout: float) -> None:
        """Until everything has gone through the filters and into the file."""
        last = time.monotonic()
        while not (self.at_end and self.sink.pending == 0):
            if self.pump():
                last = time.monotonic()
            elif time.monotonic() - last > timeout:
                raise Stalled("{} stalled: not a byte moved for {}".format(self.program, format_duration(timeout)))
            else:
                time.sleep(0.002)

    def finish(self, timeout: float) -> Subvolume:
        """The backup under its final name, with its sidecar, both durable."""
        expected = self.stream.expected
        if not self.stream.ended:
            raise BackupError("the stream ended before its end command")
        self.close_pipe()
        self.drain(timeout)
        if self.pipeline:
            self.pipeline.finish(timeout)
        written = self.sink.finish(timeout)
        if written.size != self.filtered:
            raise ReceiverFailed("{} bytes of {} arrived in {}".format(written.size, self.filtered, self.file))
        self.host.publish_raw(self.folder, RawBackup(
            expected.name, self.file, expected.uuid, expected.parent_uuid, expected.parent_name, expected.otime,
            self.size, self.digest.hexdigest(), written.size, written.sha256, self.steps,
            expected.uid, expected.gid, expected.mode, self.source))
        return Subvolume(expected.name, expected.uuid, expected.parent_uuid, expected.uuid, True, expected.otime)

    def end(self) -> None:
        if self.pipeline:
            self.pipeline.end()
        self.sink.end()


class KnownSize:
    """What a stream weighs, where that is known beforehand; as a measuring gives it."""

    def __init__(self, size: int) -> None:
        self.meter = SendSize(size, size, True)

    def wait(self) -> SendSize:
        return self.meter

    def end(self) -> None:
        """Nothing was begun."""


def check_digest(backup: RawBackup, sha256: str) -> None:
    """Damaged unless that is the digest of the backup's file."""
    if sha256 != backup.file_sha256:
        raise Damaged("{} is damaged: its SHA-256 is not the one in its sidecar".format(backup.file),
                      "get it from a copy, or choose another backup")


LACKING_KEYS = ("No secret key", "Bad passphrase", "no identity matched")  # in the words of gpg and age


class RawSender(Sender):
    """The stream inside of a stream file, as `btrfs send` would give it; its end is good if both digests are."""

    def __init__(self, host: LocalHost, folder: str, backup: RawBackup, identity: str) -> None:
        import hashlib
        self.backup, self.identity = backup, identity
        self.file_digest, self.digest = hashlib.sha256(), hashlib.sha256()  # of the file, of the plain stream
        if any(step.startswith("age:") for step in backup.pipeline) and not identity:
            raise BackupError("{} is encrypted with age".format(backup.file),
                              "give the file that holds the key with --raw-identity")
        argvs = [coder.back for coder in reversed(filters_of(backup.pipeline, identity))]
        self.source = host.open_raw_send(folder, backup.file)
        self.buffers = [bytearray(PIPE_SIZE) for _ in range(RING if argvs else 0)]
        self.all_read = False  # whether the file was read to its end
        self.lacks_key = False  # for which the filters have failed
        self.pipeline: Optional[Pipeline] = None
        if argvs:
            try:
                self.pipeline = Pipeline(argvs)
            except BaseException:
                self.source.end()
                raise

    def wait_readable(self, seconds: float) -> None:
        if self.pipeline:
            self.pipeline.wait_readable(seconds if self.all_read else min(seconds, 0.002))
        else:
            self.source.wait_readable(seconds)

    def read(self, buffer: Union[bytearray, memoryview]) -> Optional[int]:
        """How many bytes came into `buffer`: None while there are none, 0 at the end."""
        if self.pipeline:
            self.fill(self.pipeline)
            got = self.pipeline.read(buffer)
        else:
            got = self.read_file(buffer)
        if got:
            self.digest.update(memoryview(buffer)[:got])
        return got

    def read_file(self, buffer: Union[bytearray, memoryview]) -> Optional[int]:
        got = self.source.read(buffer)
        self.all_read = self.all_read or got == 0
        if got:
            self.file_digest.update(memoryview(buffer)[:got])
        return got

    def fill(self, pipeline: Pipeline) -> None:
        """Feeds the filters with what they take now."""
        got: Optional[int] = 1
        while got and not self.all_read and pipeline.feed.pending < RING - 1:
            got = self.read_file(self.buffers[0])
            if got:
                pipeline.feed.offer(memoryview(self.buffers[0])[:got])
                self.buffers.append(self.buffers.pop(0))
        try:
            pipeline.pump()
        except BackupError as error:
            raise self.explained(error) from None
        if self.all_read and not pipeline.feed.pending:
            pipeline.feed.close()

    def finish(self, timeout: float) -> None:
        """BackupError unless file and stream are what the sidecar says."""
        if self.pipeline:
            try:
                self.pipeline.finish(timeout)
            except BackupError as error:
                raise self.explained(error) from None
        self.read_rest()
        self.source.finish(timeout)
        self.check_file()
        if self.digest.hexdigest() != self.backup.stream_sha256:
            raise Damaged("{} is whole, but the stream inside is not the one that was sent".format(
                self.backup.file), "another backup may be good: see verify")

    def read_rest(self) -> None:
        """Reads what the filters did not take."""
        buffer = bytearray(PIPE_SIZE)
        while not self.all_read:
            if self.read_file(buffer) is None:
                self.source.wait_readable(0.1)

    def check_file(self) -> None:
        check_digest(self.backup, self.file_digest.hexdigest())

    def explained(self, error: BackupError) -> BackupError:
        """Why the filters failed, in their words: whether the file is damaged only reading all of it can tell."""
        words = error.message + error.detail
        method = next((step.partition(":")[0] for step in self.backup.pipeline if is_encryption(step)), "")
        self.lacks_key = bool(method) and any(sign in words for sign in LACKING_KEYS)
        hints = {"gpg": "was the passphrase right?" if "Bad passphrase" in words else
                 "is the secret key in gpg's key ring of this user?",
                 "age": "does {} hold the right key?".format(self.identity)}
        return BackupError("{} cannot be read: {}".format(self.backup.file, error.message),
                           hints[method] if self.lacks_key else error.hint, error.detail)

    def end(self) -> None:
        if self.pipeline:
            self.pipeline.end()
        self.source.end()


@functools.lru_cache(maxsize=None)
def can_dump() -> bool:
    """Whether there is a `btrfs receive --dump` here, as since btrfs-progs 4.9."""
    try:
        outcome = run(["btrfs", "receive", "--help"])
    except BackupError:
        return False
    return "--dump" in outcome.out + outcome.error


class StreamProof:
    """Follows a stream as `btrfs receive` would, and makes nothing of it; BackupError where it cannot be received.

    Its beginning must be the expected one, of protocol 1, its end the end of what comes, and what is between must pass
    the gate. Checksums are looked at by `btrfs receive --dump`, which needs no btrfs, where there is one. Whether that
    is there which a command changes only a btrfs can tell.
    """

    def __init__(self, expected: ExpectedStream, with_dump: bool) -> None:
        self.stream = WatchedStream(expected, StreamGate(expected))
        self.dump: Optional[Tuple[Stage, Feed]] = None
        if with_dump:
            self.dump = start_fed(["btrfs", "receive", "--dump"], subprocess.DEVNULL)
            os.set_blocking(self.dump[1].write_end, True)

    def take(self, chunk: Chunk) -> None:
        passed = self.stream.watch(chunk)
        if self.stream.version > 1:
            raise BackupError("the stream is of protocol {}, which not every btrfs receive reads".format(
                self.stream.version))
        try:
            if self.dump is not None:
                self.dump[1].offer(passed)
                self.dump[1].pump()
        except BrokenPipeError:
            self.finish_dump(ENDING_GRACE)
            raise BackupError("btrfs receive --dump ended before the stream did") from None

    def finish_dump(self, timeout: float) -> None:
        if self.dump is None:
            return
        stage, feed = self.dump
        feed.close()
        try:
            stage.wait(timeout)
        except BackupError as error:  # what was wrong stands first
            raise BackupError(re.sub(r"^ERROR:\s*", "", (error.detail or error.message).split("\n")[0])) from None

    def finish(self, timeout: float) -> None:
        """BackupError unless all that was taken is one whole stream."""
        if not self.stream.ended:
            raise BackupError("the stream ended before its end command")
        self.finish_dump(timeout)

    def end(self) -> None:
        if self.dump is not None:
            self.dump[1].close()
            self.dump[0].end()


def stream_of(backup: RawBackup) -> ExpectedStream:
    """What the stream inside of a file must be, by its sidecar."""
    return ExpectedStream(backup.name, backup.uuid, backup.parent_uuid, backup.uid, backup.gid, backup.mode, None,
                          backup.parent, backup.otime)


class RawPlace:
    """A raw folder's host: of the calls of LocalHost those that have a meaning there, by the same names."""

    def __init__(self, host: LocalHost, steps: Sequence[str], identity: str) -> None:
        self.host, self.steps, self.identity = host, tuple(steps), identity
        self.source = ""  # what sidecars call the source
        self.told: Set[Broken] = set()
        self.sender: Optional[RawSender] = None  # the last one

    def look(self, path: str) -> Place:
        """What is at `path`. Its filesystem need not be btrfs: then it is known by where it is mounted."""
        place = self.host.look(path)
        return place._replace(filesystem=place.filesystem or "mounted at {}".format(place.mount), is_top=False)

    def list(self, folder: str) -> Listing:
        """The backups that can be restored, and partials; says once what is wrong with others."""
        listing = listing_of(self.host.list_raw(folder))
        for broken in listing.broken:
            if broken not in self.told:
                self.told.add(broken)
                self.host.events.warning("broken", "{} in {} cannot be restored: {}".format(
                    broken.name, folder, broken.why), name=broken.name, folder=folder)
        return listing

    def sidecar(self, folder: str, name: str) -> RawBackup:
        found = [b for b in self.host.list_raw(folder).backups if b.name == name]
        if not found:
            raise BackupError("{} has no sidecar in {}".format(name, folder))
        return found[0]

    def delete(self, folder: str, doomed: Sequence[Subvolume], _: bool) -> List[BackupError]:
        return self.host.delete_raw(folder, doomed)

    def wait_for_cleaning(self, folder: str) -> None:
        """Files are gone when they are deleted."""

    def idle_partials(self, folder: str) -> Dict[str, float]:
        return self.host.idle_raw_partials(folder)

    def own_sizes(self, folder: str) -> Dict[int, int]:
        """Bytes of each stream file."""
        return {raw_subvolume(b).subvolid: b.file_size for b in self.host.list_raw(folder).backups}

    def capabilities(self) -> Capabilities:
        """Protocol 1: whoever restores may have an older btrfs."""
        return Capabilities(False, False, ())

    def open_receive(self, folder: str, expected: ExpectedStream, _: bool, __: str = "") -> RawReceiver:
        return RawReceiver(self.host, folder, expected, self.steps, self.source)

    def expected_stream(self, folder: str, snapshot: Subvolume, parent: Optional[Subvolume]) -> ExpectedStream:
        backup = self.sidecar(folder, snapshot.name)
        if backup.parent_uuid != (parent.stream_id if parent else None):
            raise BackupError("{} builds on {}".format(backup.file, backup.parent))
        return stream_of(backup)

    def open_send(self, folder: str, name: str, _: Optional[str], __: SendOptions) -> RawSender:
        self.sender = RawSender(self.host, folder, self.sidecar(folder, name), self.identity)
        return self.sender

    def measure_send(self, folder: str, name: str, _: Optional[str]) -> KnownSize:
        return KnownSize(self.sidecar(folder, name).stream_size)

    def __getattr__(self, name: str) -> Any:
        """What a folder is a folder for: locks, pins, making it."""
        if name not in ("make_folder", "hold", "read_locks", "change_locks", "read_pins", "change_pins",
                        "read_notes", "claim", "events",
                        "list_raw", "digest_raw", "health"):
            raise AttributeError(name)
        return getattr(self.host, name)


########################################################################################################
# WIRE: calls, results and streams as frames on a channel
#
# A frame is `kind (1 byte) | be32 length | payload`. Calls and results are JSON in which each value says
# what it is, from a table: nothing is pickled or evaluated. A channel carries one call or one stream at a
# time; a stream is Data frames, then Finish or Abort. Whatever comes before the marker line is noise of a
# login shell. Both ends use the same classes: a StreamSource is read like `btrfs send`, a StreamSink is
# fed like `btrfs receive`. No side believes the other: each value, wherever it stands, has the type that is
# declared for it and the bounds that its field has, or it is nonsense, and that was the last word that is heard
# of that side. Never: a frame above LARGEST_FRAME or, but for listings, LARGEST_CALL; a wait for a side of which
# nothing comes, however long.
########################################################################################################

MARKER = b"\nbtrfs-backup-ng wire 1\n"
MOST_NOISE = 256 << 10
FRAME = struct.Struct(">cI")
CALL, RESULT, FAILED, EVENT, DATA, FINISH, ABORT = b"C", b"R", b"X", b"L", b"D", b"F", b"A"
LARGEST_FRAME = 64 << 20  # a listing of some 100,000 subvolumes
LARGEST_CALL = 1 << 20  # also of what is answered, but for listings
MOST_ITEMS = 4 << 20  # in one frame: each takes far more memory than bytes there
MOST_EVENTS = 1000  # a second
LEAST_FRAME = 4096  # bytes
MOST_TOLD = 4096  # characters of an error
DEEPEST_VALUE = 20
CHANNEL_NAP = 0.2  # seconds
GREETING_TIMEOUT = 120.0  # seconds; a password may have to be typed
POLLRDHUP = 0x2000  # in select since Python 3.7
WIRE_CLASSES: Dict[str, Any] = {c.__name__: c for c in (
    Subvolume, Listing, Place, Pin, FolderNotes, Claim, LockChange, Capabilities, SendOptions, SendSize, ExpectedStream,
    RawBackup, RawFile, RawFolder, SwapPlace, SwapOrder, SwapNotes, HostFacts, Health, TreeDigest, Mark,
    ResumePoint, Record)}


class ConnectionLost(ReceiverFailed):
    """The connection to a host broke; another one may work."""

    transient = True


class Nonsense(ConnectionLost):
    """What another host says is nothing that it may say: nothing further of it is heard, nor asked again."""

    transient = False

    def __init__(self, message: str, hint: str = "is the program there of another version, or not ours?",
                 detail: str = "", transient: bool = False) -> None:
        super().__init__(message, hint, detail, transient)


def error_classes() -> Dict[str, Any]:
    """BackupError and what derives from it, by name."""
    found, left = {}, [BackupError]  # type: Dict[str, Any], List[Any]
    while left:
        error = left.pop()
        found[error.__name__] = error
        left += error.__subclasses__()
    return found


def pack_value(value: Any) -> Any:
    """`value` in the terms of JSON: plain ones and lists as they are, all else as {"is": CLASS, "of": [...]}."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [pack_value(item) for item in value]
    if isinstance(value, dict):
        return {"is": "dict", "of": [[pack_value(key), pack_value(item)] for key, item in value.items()]}
    if isinstance(value, BackupError):
        return {"is": "error", "of": [type(value).__name__, value.message, value.hint, value.detail, value.transient]}
    if isinstance(value, (set, frozenset)):
        return {"is": "set", "of": [pack_value(item) for item in sorted(value)]}
    name = type(value).__name__
    if name != "tuple" and name not in WIRE_CLASSES:
        raise TypeError("{} does not travel".format(name))
    return {"is": name, "of": [pack_value(item) for item in value]}


def is_file_name(text: str) -> bool:
    return len(os.fsencode(text)) <= 255 and "/" not in text and text not in (".", "..")


UUID_TEXT, SHA256_TEXT, HEX_TEXT = (re.compile(pattern) for pattern in (
    "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "[0-9a-f]{64}", "([0-9a-f]{2})*"))


def text_rules() -> Dict[str, Callable[[str], Any]]:
    """What a text must be by the name of the field that it stands in, in whatever class; '' may stand anywhere."""
    rules: Dict[str, Callable[[str], Any]] = {
        "filesystem": lambda text: UUID_TEXT.fullmatch(text) or text.startswith("/dev/"),  # where it is not known
        "path": lambda text: text.startswith("/"), "kind": lambda text: text in ("folder", "missing", "other")}
    for fields, rule in (
            ("name names snapshot parent parent_name file sizes partials others piece finished old_name nodename",
             is_file_name),
            ("uuid parent_uuid received_uuid stream_id base parent_id private sent restored_uuid old_uuid "
             "new_uuid sources before after", UUID_TEXT.fullmatch),
            ("sha256 stream_sha256 file_sha256", SHA256_TEXT.fullmatch),
            ("default_acl parent_acl", HEX_TEXT.fullmatch)):
        rules.update(dict.fromkeys(fields.split(), rule))
    return rules


TEXT_RULES = text_rules()
BOUNDS = {"mode": 0o10000, "uid": 1 << 32, "gid": 1 << 32, "version": 1 << 32, "otime": 1 << 63, "clock": 1 << 40}


def check_bounds(value: Any) -> Any:
    """A NamedTuple as it is; ValueError, which names the field, where one is out of its bounds."""
    for field in value._fields:
        found = getattr(value, field)
        for item in found if isinstance(found, (tuple, frozenset, dict)) else (found,):
            if isinstance(item, str) and item and not TEXT_RULES.get(field, bool)(item) or (
                    isinstance(item, (int, float)) and not 0 <= item < BOUNDS.get(field, 1 << 64)):
                raise ValueError("{}.{} is out of bounds".format(type(value).__name__, field))
    return value


def unpack_class(name: str, items: List[Any]) -> Any:
    if name == "dict":
        return dict(items)
    if name == "error":
        kind, message, hint, detail = (str(item)[:MOST_TOLD] for item in items[:4])
        return error_classes().get(kind, BackupError)(message, hint, detail, items[4:] == [True])
    if name in ("tuple", "set"):
        return tuple(items) if name == "tuple" else frozenset(items)
    return check_bounds(check_fields(WIRE_CLASSES[name](*items)))


def unpack_value(packed: Any, depth: int = 0) -> Any:
    """The value that pack_value made `packed` of; ValueError for anything else."""
    if depth > DEEPEST_VALUE:
        raise ValueError("a value is too deep")
    if isinstance(packed, list):
        return [unpack_value(item, depth + 1) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if set(packed) != {"is", "of"} or not isinstance(packed["of"], list) or not isinstance(packed["is"], str):
        raise ValueError("a value without its class")
    items = [unpack_value(item, depth + 1) for item in packed["of"]]
    try:
        return unpack_class(packed["is"], items)
    except (TypeError, KeyError) as error:
        raise ValueError("no value of class {}: {}".format(packed["is"], error)) from None


def check_values(value: Any) -> Any:
    """The same value, each class in it checked."""
    if isinstance(value, (tuple, list, frozenset)):
        for item in value:
            check_values(item)
    return check_bounds(check_fields(value)) if hasattr(value, "_fields") else value


def parse_whole(digits: str) -> int:
    """An integer of JSON, which may be as long as a frame there."""
    if len(digits) > 20:
        raise ValueError("a number is too large")
    return int(digits)


def poll_fds(interests: Iterable[Tuple[int, int]], seconds: float) -> List[Tuple[int, int]]:
    poll = select.poll()
    for fd, mask in interests:
        poll.register(fd, mask)
    return poll.poll(None if seconds == float("inf") else 1000 * seconds)


class Channel:
    """Frames over two file descriptors, neither of which ever blocks.

    lends: `write_end` is a pipe of ours, to a reader that copies.
    """

    def __init__(self, read_end: int, write_end: int, peer: str, lends: bool = False) -> None:
        self.read_end, self.write_end, self.peer, self.lends = read_end, write_end, peer, lends
        self.inbox = b""  # bytes read beyond the marker
        self.outbox: "collections.deque[memoryview]" = collections.deque()
        self.queued = self.written = 0  # bytes that were ever put into and taken from the outbox
        self.received = self.events = 0  # bytes, and events, that were ever read
        self.begun = time.monotonic()
        self.largest = LARGEST_CALL  # bytes of a frame that may come
        self.data_left = 0  # bytes of a Data frame that are still to be read
        self.head = bytearray()
        self.on_event: Callable[[Any], None] = lambda event: None
        self.on_error: Callable[[BackupError], None] = lambda error: None
        for fd in (read_end, write_end):
            os.set_blocking(fd, False)

    # -- out

    def send(self, kind: bytes, payload: Chunk = b"") -> None:
        """Queues a frame; its memory must not change until it is flushed."""
        self.send_raw(FRAME.pack(kind, len(payload)))
        if len(payload):
            self.send_raw(payload)

    def send_raw(self, data: Chunk) -> None:
        """Queues bytes outside of frames: the marker, and what leads to it."""
        self.outbox.append(memoryview(data))
        self.queued += len(data)

    def send_value(self, kind: bytes, value: Any) -> None:
        import json
        payload = json.dumps(pack_value(value)).encode("ascii")
        if len(payload) > (LARGEST_CALL if kind == CALL else LARGEST_FRAME):
            raise BackupError("{} cannot be told as much at once: {}".format(self.peer, format_size(len(payload))))
        self.send(kind, payload)

    def flush_some(self) -> int:
        """Writes what goes without waiting; how many bytes that were."""
        moved = 0
        try:
            while self.outbox:
                written = self.write_some()
                moved += written
                self.written += written
                while self.outbox and written >= len(self.outbox[0]):
                    written -= len(self.outbox.popleft())
                if written:
                    self.outbox[0] = self.outbox[0][written:]
        except BlockingIOError:
            pass
        except OSError:
            raise self.lost() from None
        return moved

    def write_some(self) -> int:
        """Writes what goes of the first pieces; BlockingIOError where nothing does."""
        pieces = list(itertools.islice(self.outbox, 16))
        if self.lends and len(pieces[0]) >= LEAST_LENT:
            return write_or_lend(self.write_end, pieces[0])
        if self.lends:
            pieces = list(itertools.takewhile(lambda piece: len(piece) < LEAST_LENT, pieces))
        return os.writev(self.write_end, pieces)

    def flush(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        self.flush_some()
        while self.outbox:
            if time.monotonic() > deadline:
                raise Stalled("{} stalled: it took nothing for {}".format(self.peer, format_duration(timeout)))
            poll_fds([(self.write_end, select.POLLOUT)], CHANNEL_NAP)
            if self.flush_some():
                deadline = time.monotonic() + timeout

    # -- in

    def lost(self) -> BackupError:
        return ConnectionLost("the connection to {} was lost".format(self.peer))

    def nonsense(self, what: str) -> BackupError:
        return Nonsense("{} makes no sense: {}".format(self.peer, what))

    def read_some(self, size: int) -> Optional[bytes]:
        """Up to `size` bytes, None while there are none; ConnectionLost at the end."""
        if self.inbox:
            found, self.inbox = self.inbox[:size], self.inbox[size:]
            return found
        try:
            found = os.read(self.read_end, size)
        except BlockingIOError:
            return None
        except OSError:
            found = b""
        if not found:
            raise self.lost()
        self.received += len(found)
        return found

    def skip_noise(self, deadline: float) -> bytes:
        """Reads up to the marker; what came before it."""
        noise = b"\n"
        while MARKER not in noise:
            if len(noise) > MOST_NOISE or time.monotonic() > deadline:
                raise BackupError("{} answers something else than this program".format(self.peer),
                                  "does its login shell print without end?", os.fsdecode(noise[:200]))
            try:
                more = self.read_some(65536)
            except ConnectionLost:
                self.inbox = noise
                raise
            if more is None:
                if time.monotonic() > deadline:
                    raise Stalled("{} does not answer".format(self.peer))
                self.wait(CHANNEL_NAP)
            noise += more or b""
        noise, _, self.inbox = noise.partition(MARKER)
        return noise

    def wait(self, seconds: float) -> None:
        if self.read_end < 0:
            raise self.lost()
        if not self.inbox:
            poll_fds([(self.read_end, select.POLLIN)], seconds)

    def next_frame(self) -> Optional[Tuple[bytes, bytes]]:
        """The next frame's kind and payload, None while it is not whole and after an event, which goes its own way.

        Of a Data frame the payload stays, to be read by read_data. What may come without end and brings nothing
        keeps nobody here: whoever reads has signals to look at, and a time after which a stream has stalled.
        """
        while True:
            if len(self.head) < FRAME.size:
                got = self.read_some(FRAME.size - len(self.head))
            else:
                kind, length = FRAME.unpack_from(self.head)
                if length > (LARGEST_FRAME if kind == DATA else self.largest):
                    raise self.nonsense("a frame of {}".format(format_size(length)))
                if kind == DATA and not length:
                    raise self.nonsense("a frame of nothing")
                if kind == DATA:
                    self.head, self.data_left = bytearray(), length
                    return kind, b""
                if len(self.head) == FRAME.size + length:
                    payload, self.head = bytes(self.head[FRAME.size:]), bytearray()
                    if kind != EVENT:
                        return kind, payload
                    self.take_event(payload)
                    return None
                got = self.read_some(FRAME.size + length - len(self.head))
            if got is None:
                return None
            self.head += got

    def value(self, payload: bytes) -> Any:
        import json
        if sum(map(payload.count, (b"[", b"{", b","))) > MOST_ITEMS:
            raise self.nonsense("a value without end")
        try:
            found = unpack_value(json.loads(payload.decode("ascii"), parse_int=parse_whole))
        except (ValueError, OverflowError, RecursionError) as error:
            raise self.nonsense("{:.200}".format(str(error))) from None
        for item in found if isinstance(found, list) else [found]:
            if isinstance(item, BackupError):
                self.on_error(item)
        return found

    def await_frame(self, timeout: float, most: float = 0) -> Tuple[bytes, bytes]:
        """The next frame but Data, which is thrown away. Stalled after `timeout` seconds without a byte.

        most: bytes of Data that may come before it; each frame counts as LEAST_FRAME at least.
        """
        seen, deadline = self.received, time.monotonic() + timeout
        while True:
            self.flush_some()
            if self.data_left:
                self.read_data(bytearray(min(self.data_left, PIPE_SIZE)))
            frame = self.next_frame() if not self.data_left else None
            if frame is not None and frame[0] != DATA:
                return frame
            if frame is not None:
                most -= max(self.data_left, LEAST_FRAME)
                if most < 0:
                    raise self.nonsense("a stream that nobody has asked for")
            if self.received != seen:
                seen, deadline = self.received, time.monotonic() + timeout
            elif frame is None:
                if time.monotonic() > deadline:
                    raise Stalled("{} stalled: nothing came for {}".format(self.peer, format_duration(timeout)))
                self.wait(CHANNEL_NAP)

    def take_event(self, payload: bytes) -> None:
        self.events += 1
        if self.events > MOST_EVENTS * (10 + time.monotonic() - self.begun):
            raise self.nonsense("it talks without end")
        self.on_event(self.value(payload))

    def read_data(self, buffer: Union[bytearray, memoryview]) -> Optional[int]:
        """Bytes of a Data frame into `buffer`; how many, None while there are none."""
        size = min(len(buffer), self.data_left)
        if self.inbox:
            found = self.read_some(size) or b""
            buffer[:len(found)] = found
            self.data_left -= len(found)
            return len(found)
        try:
            got = os.readv(self.read_end, [memoryview(buffer)[:size]])
        except BlockingIOError:
            return None
        except OSError:
            got = 0
        if not got:
            raise self.lost()
        self.data_left -= got
        self.received += got
        return got

    def result(self, timeout: float) -> Any:
        """What a call gave, or its error raised."""
        kind, payload = self.await_frame(timeout)
        value = self.value(payload)
        if kind == FAILED and isinstance(value, BackupError):
            raise value
        if kind != RESULT:
            raise self.nonsense("an answer out of turn")
        return value

    def close(self) -> None:
        """Closes both ends, once: their numbers may be another file's afterwards."""
        ends, self.read_end, self.write_end = {self.read_end, self.write_end}, -1, -1
        for fd in ends - {-1}:
            with contextlib.suppress(OSError):
                os.close(fd)


# those of COMPRESSORS that are used on the way, the better first, and what they are told besides
COMPRESSIONS: Dict[str, Tuple[str, ...]] = {"zstd": (), "lz4": (), "gzip": ("-1",)}
MOST_DRAINED = 64 << 20  # bytes that may be under way when a stream is given up


class StreamSource(Sender):
    """A stream that comes over a channel; read like `btrfs send`."""

    def __init__(self, channel: Channel, compression: str) -> None:
        self.channel, self.capacity = channel, capacity_of(channel.read_end)
        self.unpacked = Pipeline([COMPRESSORS[compression].back]) if compression else None
        self.raw = bytearray(PIPE_SIZE) if compression else bytearray()
        self.start = 0  # offset in the stream of the first byte that comes
        self.is_over = False  # the last frame of the stream was seen
        self.lost: Optional[ConnectionLost] = None  # once all is out of the filter, that is raised
        self.kept: Optional[BackupError] = None  # what is wrong, once the bytes before it are handed over

    def wait_readable(self, seconds: float) -> None:
        if self.unpacked:
            poll_fds([(self.unpacked.read_end, select.POLLIN), (self.channel.read_end, select.POLLIN)], seconds)
        else:
            self.channel.wait(seconds)

    def read(self, buffer: Union[bytearray, memoryview]) -> Optional[int]:
        """How many bytes came into `buffer`: None while there are none, 0 at the end."""
        if self.unpacked is None:
            return self.read_channel(buffer)
        if not self.unpacked.feed.pending and not self.unpacked.closing:
            try:
                got = self.read_channel(self.raw)
                self.unpacked.feed.offer(memoryview(self.raw)[:got or 0])
                self.unpacked.closing = got == 0
            except ConnectionLost as error:
                self.lost, self.unpacked.closing = error, True
        self.unpacked.pump()
        try:
            got = self.unpacked.read(buffer)
            if got == 0:
                self.unpacked.finish(ENDING_GRACE)
        except BackupError:
            if self.lost is not None:
                raise self.lost from None
            raise
        if got == 0 and self.lost is not None:
            raise self.lost
        return got

    def read_channel(self, buffer: Union[bytearray, memoryview]) -> Optional[int]:
        """As read(), of any number of frames: a limited rate makes small ones."""
        self.channel.flush_some()
        filled = 0
        while filled < len(buffer) and not (self.is_over and self.kept is None):
            if self.kept is not None:
                if filled:
                    break
                raise self.kept
            try:
                got = self.read_frame(memoryview(buffer)[filled:])
            except BackupError as error:
                self.kept = error
                continue
            if got is None:
                break
            filled += got
        return filled or (0 if self.is_over else None)

    def read_frame(self, buffer: memoryview) -> Optional[int]:
        """Bytes of one frame, None while there are none."""
        if not self.channel.data_left:
            frame = self.channel.next_frame()
            if frame is None:
                return None
            self.take_frame(*frame)
        return self.channel.read_data(buffer) if self.channel.data_left else 0

    def take_frame(self, kind: bytes, payload: bytes) -> None:
        if kind == DATA:
            return
        self.is_over = True
        if kind == FINISH:
            return
        error = self.channel.value(payload) if kind == FAILED else None
        if isinstance(error, BackupError):
            raise error
        if kind != ABORT:
            raise self.channel.nonsense("a frame out of turn")
        raise BackupError("{} gave the transfer up".format(self.channel.peer))

    def finish(self, timeout: float) -> None:
        """Nothing: the end of the stream was sent after its sender had exited 0."""

    def drain(self, timeout: float) -> None:
        """Throws away what is still under way, up to the last frame of the stream."""
        while not self.is_over:
            self.is_over = self.channel.await_frame(timeout, MOST_DRAINED)[0] in (FINISH, FAILED, ABORT)

    def end(self) -> None:
        if self.unpacked is not None:
            self.unpacked.end()
            self.unpacked = None


class StreamSink(Receiver):
    """A stream that leaves over a channel; fed like `btrfs receive`."""

    def __init__(self, channel: Channel, compression: str) -> None:
        self.channel, self.program = channel, channel.peer
        self.packed = (Pipeline([COMPRESSORS[compression].forth + COMPRESSIONS[compression]])
                       if compression else None)
        self.marks: "collections.deque[int]" = collections.deque()  # where each offered chunk ends in what was queued
        self.finished = False  # the last frame was queued
        self.reader: Optional[CommandReader] = None  # set to learn how much file contents has passed

    @property
    def file_data(self) -> int:
        """Bytes of file contents so far, before compression; 0 where nobody wanted to know."""
        return self.reader.file_data if self.reader else 0

    def count_file_data(self) -> None:
        """Asks for `file_data`, which costs a little."""
        self.reader = CommandReader((), 0 if self.resume else STREAM_HEADER.size)
        self.reader.file_data = self.resume.file_data if self.resume else 0

    def follow(self, chunk: memoryview) -> None:
        if self.reader:
            for _ in self.reader.feed(chunk):
                pass

    def offer(self, chunk: memoryview) -> None:
        self.follow(chunk)
        if self.packed:
            self.packed.feed.offer(chunk)
        elif len(chunk):  # an empty frame would be nonsense
            self.channel.send(DATA, chunk)
            self.marks.append(self.channel.queued)

    @property
    def pending(self) -> int:
        """Chunks not wholly written."""
        if self.packed:
            return self.packed.feed.pending
        while self.marks and self.marks[0] <= self.channel.written:
            self.marks.popleft()
        return len(self.marks)

    def pump(self) -> int:
        """Writes what goes without waiting; returns how many bytes that were. Raises what check_alive does."""
        if not self.finished:
            self.check_alive()  # what is sent after the other side has given up is sent in vain
        if self.packed and not self.finished:
            self.packed.pump()
            while len(self.channel.outbox) < 8:
                buffer = bytearray(PIPE_SIZE // 4)
                got = self.packed.read(buffer)
                if got is None:
                    break
                if got == 0:
                    self.packed.finish(ENDING_GRACE)
                    self.send_end()
                    break
                self.channel.send(DATA, memoryview(buffer)[:got])
        return self.channel.flush_some()

    def send_end(self) -> None:
        self.channel.send(FINISH)
        self.finished = True

    def check_alive(self) -> None:
        """Raises what the other side has to say: before the end of a stream that is always a failure."""
        frame = self.channel.next_frame()
        if frame is None:
            return
        error = self.channel.value(frame[1]) if frame[0] == FAILED else None
        raise error if isinstance(error, BackupError) else BackupError(
            "{} gave the transfer up".format(self.channel.peer))

    def close_pipe(self) -> None:
        """Says that the stream is complete."""
        if self.packed:
            self.packed.closing = True
            self.pump()
        elif not self.finished:
            self.send_end()
            self.channel.flush_some()

    def flush(self, timeout: float) -> None:
        self.close_pipe()
        deadline = time.monotonic() + timeout
        while not self.finished:
            if self.pump():
                deadline = time.monotonic() + timeout
            if time.monotonic() > deadline:
                raise Stalled("{} stalled".format(self.channel.peer))
            time.sleep(0.002)
        self.channel.flush(timeout)

    def finish(self, timeout: float) -> Any:
        self.flush(timeout)

    def end(self) -> None:
        if self.packed is not None:
            self.packed.end()
            self.packed = None


########################################################################################################
# GUARD: what a restricted key may ask for
#
# Every path is opened step by step below one folder, no link is followed, no mount and no received subvolume entered.
# Never: SSH_ORIGINAL_COMMAND looked at.
########################################################################################################

CALLS = {  # each call of LocalHost, and the groups that it belongs to
    "capabilities": tuple(AGENT_GROUPS), "look": tuple(AGENT_GROUPS), "list": ("list",),
    "nested_subvolumes": ("snapshot",), "make_folder": ("receive",), "snapshot": ("snapshot",),
    "delete": ("delete", "receive"), "wait_for_cleaning": ("delete",), "read_locks": ("list", "send"),
    "change_locks": ("send",), "prove_writable": ("send",), "read_pins": ("list", "send"), "change_pins": ("send",),
    "hold": ("send",), "read_notes": ("list", "send"), "claim": ("receive",),
    "release": ("send",), "expected_stream": ("send",), "measured": ("send",), "data_since": ("send",),
    "open_send": ("send",), "open_receive": ("receive",), "own_sizes": ("list",),
    "idle_partials": ("list",), "list_raw": ("list",), "delete_raw": ("delete", "receive"),
    "publish_raw": ("receive",), "digest_raw": ("verify",), "idle_raw_partials": ("list",),
    "open_raw_send": ("send",), "open_raw_receive": ("receive",),
    "facts": ("list",), "health": ("list",), "is_held": ("list",),
    "digest_tree": ("verify",), "folder_digests": ("verify",), "describe_folder": ("verify",),
    "settle_partials": ("receive",), "forget_partials": ("receive", "delete"),
    "find_base": (), "look_at_swap_place": (), "swap_in": (), "finish_swap": ()}  # for no key that is restricted
SENDERS = frozenset(("open_send", "open_raw_send"))
RECEIVERS = frozenset(("open_receive", "open_raw_receive"))
LISTINGS = frozenset((  # what is answered may be large
    "list", "list_raw", "own_sizes", "nested_subvolumes", "idle_partials", "idle_raw_partials", "read_locks",
    "change_locks", "read_pins", "read_notes", "folder_digests", "describe_folder", "delete", "delete_raw"))
NAMED = frozenset(("idle_partials", "idle_raw_partials", "settle_partials"))  # what they give are names


class Refused(BackupError):
    """What was asked for may not be asked of this agent, or cannot be done by this host: nothing is known then."""


class Restriction(NamedTuple):
    """What a key may do: the calls of some groups, below one folder, with so many partials at once.

    known_as: the name of the machine whose destinations alone it may note; '' is any but this machine's own.
    """

    under: str
    allow: Tuple[str, ...]
    most_partials: int = 16
    known_as: str = ""


PATH_ARGUMENTS = frozenset(("path", "folder", "source", "beside"))
NAME_ARGUMENTS = frozenset(("name", "names", "parent", "file"))


def names_in(key: str, value: Any) -> Iterator[str]:
    """All that is a name of a file or subvolume in an argument called `key`."""
    if isinstance(value, str) and key in NAME_ARGUMENTS:
        yield value
    elif hasattr(value, "_fields"):
        for field, inner in zip(value._fields, value):
            yield from names_in(field, inner)
    elif isinstance(value, (list, tuple, dict)):
        for inner in value:
            yield from names_in(key, inner)


def check_name(name: str) -> None:
    """Refused unless `name` can only be that of a snapshot, or of a partial, in a folder."""
    if not name or len(os.fsencode(name)) > 255 or "/" in name or not name.isprintable() or (
            name.startswith(".") and partial_of(name) is None):
        raise Refused("{} is no name of a snapshot".format(printable(repr(name))))


def check_prefix(prefix: str) -> None:
    """Refused unless `prefix` can be a part of a file's name, as it is in that of a run's lock."""
    if "/" in prefix or not prefix.isprintable():
        raise Refused("{} is no prefix".format(printable(repr(prefix))))


class MissingFolder(BackupError):
    """A folder below a restricted one is not there; `above` leads to what there is of the way to it."""

    path = above = ""


class Guard:
    """Lets only what a restriction allows reach the host."""

    def __init__(self, restriction: Restriction) -> None:
        self.restriction = restriction
        self.under = os.path.realpath(restriction.under)
        self.opened = contextlib.ExitStack()  # the folders of the call at work
        self.shown: Dict[str, str] = {}  # what they are called in messages
        self.missing = ""  # what is looked at and is not there: the answer is about the folder above it

    def check_call(self, name: str) -> None:
        if not set(CALLS.get(name, ())) & set(self.restriction.allow):
            what = [AGENT_GROUPS[group] for group in CALLS.get(name, ())] or ["do that"]
            raise Refused("this key may not {}: it allows {}".format(what[0], ", ".join(self.restriction.allow)),
                          "see --allow in its authorized_keys")

    def open_path(self, path: str, make: bool) -> str:
        """A path of this process that leads to `path`, whatever happens to its names meanwhile.

        Refused unless it is below the folder, as far as it exists, by plain folders alone. What is missing is
        made, or MissingFolder: a name alone might lead elsewhere a moment later.
        """
        parts = self.parts_below(path)
        try:
            fd, at = open_folder(self.under), self.under
        except OSError as error:
            raise os_error("cannot look at {}".format(self.under), error, "is its filesystem mounted?") from None
        mounts = frozenset(mount.point for mount in read_mounts())
        try:
            for part in parts:
                at = os.path.join(at, part)
                if make:
                    self.make_step(fd, part)
                try:
                    inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=fd)
                except FileNotFoundError:
                    missing = MissingFolder("no such folder: {}".format(path))
                    missing.path, missing.above = os.path.join(self.under, *parts), self.keep(fd, os.path.dirname(at))
                    raise missing from None
                except OSError:
                    raise Refused("{} is no plain folder".format(at)) from None
                os.close(fd)
                fd = inner
                self.check_step(fd, at, part, mounts)
            return self.keep(fd, at)
        finally:
            os.close(fd)

    @staticmethod
    def make_step(above: int, name: str) -> None:
        """Makes a missing folder, but none in the place of notes, whose names are hidden."""
        if name.startswith(".") and name != STATE_FOLDER:
            return
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=above)

    def keep(self, fd: int, shown: str) -> str:
        """A path that leads to the open folder `fd` until the call is over."""
        kept = os.dup(fd)
        self.opened.callback(os.close, kept)
        path = "/proc/{}/fd/{}".format(os.getpid(), kept)
        self.shown[path] = shown
        return path

    def parts_below(self, path: str) -> List[str]:
        for top in (self.restriction.under.rstrip("/"), self.under.rstrip("/")):
            if (path.rstrip("/") + "/").startswith(top + "/"):
                parts = [part for part in path[len(top):].split("/") if part]
                if ".." in parts or "." in parts or "\n" in path:
                    break
                return parts
        raise Refused("{} is not below {}".format(printable(path), self.restriction.under))

    @staticmethod
    def check_step(fd: int, at: str, part: str, mounts: FrozenSet[str]) -> None:
        if at in mounts:
            raise Refused("{} is a mount point".format(at))
        if os.fstat(fd).st_ino == SUBVOLUME_INODE:
            try:
                subvolume = subvolume_of_fd(fd, part)
            except OSError:
                raise Refused("{} is on another filesystem".format(at)) from None
            if subvolume.readonly or subvolume.received_uuid is not None or partial_of(part) is not None:
                raise Refused("{} is a backup".format(at))

    def checked(self, name: str, arguments: Dict[str, Any]) -> List[Any]:
        """The arguments, with folders opened; Refused where one leads out, or asks for more than is allowed."""
        self.check_call(name)
        for key, value in arguments.items():
            if key in PATH_ARGUMENTS:
                try:
                    arguments[key] = self.open_path(value, make=name == "make_folder")
                except MissingFolder as missing:
                    if name != "look":
                        raise
                    arguments[key], self.missing = missing.above, missing.path
            elif key == "prefix":
                check_prefix(value)
        folders = [arguments[key] for key in arguments if key in PATH_ARGUMENTS]
        for found in (found for key, value in arguments.items() for found in names_in(key, value)):
            check_name(found)
            if any(os.path.islink(os.path.join(folder, found)) for folder in folders):
                raise Refused("{} is a link".format(printable(found)))
        if name in ("delete", "delete_raw"):
            self.check_deletion(arguments["doomed"])
        elif name == "open_raw_receive":
            self.check_raw_receive(arguments["folder"], arguments["name"])
        elif name == "open_receive":
            self.check_receive(arguments["folder"], arguments["expected"])
        elif name in ("change_locks", "change_pins"):
            self.check_notes(arguments)
        elif name == "claim":
            check_prefix(arguments["claim"].prefix)
        return list(arguments.values())

    def allowed_part(self, name: str, arguments: Sequence[Any], found: Any) -> Any:
        """What of an answer the other side may see: of notes its own, unless it may delete, when all protect."""
        if self.missing:
            return found._replace(path=self.missing, kind="missing", is_top=False)
        if name == "own_sizes":
            own_ids = {subvolume.subvolid for subvolume in LocalHost(Events()).list(arguments[0]).subvolumes}
            return {subvolid: size for subvolid, size in found.items() if subvolid in own_ids}
        if name not in ("read_locks", "change_locks", "read_pins", "read_notes") or "delete" in self.restriction.allow:
            return found
        own = read_own_destinations(arguments[0])
        if name == "read_pins":
            return self.own_pins(found, own)
        if name == "read_notes":
            return found._replace(locks=self.own_locks(found.locks, own), pins=self.own_pins(found.pins, own))
        return self.own_locks(found, own)

    def own_pins(self, pins: Dict[str, Any], own: Sequence[str]) -> Dict[str, Any]:
        return {destination: entry for destination, entry in pins.items() if self.may_note(destination, own)}

    def own_locks(self, locks: Locks, own: Sequence[str]) -> Locks:
        seen = {snapshot: {kind: [destination for destination in noted if self.may_note(destination, own)]
                           for kind, noted in entry.items()} for snapshot, entry in locks.items()}
        return {snapshot: entry for snapshot, entry in seen.items() if any(entry.values())}

    def forget(self) -> None:
        """Closes what a call needed."""
        self.opened.close()
        self.shown.clear()
        self.missing = ""

    def in_words(self, text: str) -> str:
        """`text` with folders as their owner calls them."""
        for path, shown in self.shown.items():
            text = text.replace(path, shown)
        return text

    def check_deletion(self, doomed: Sequence[Subvolume]) -> None:
        for subvolume in doomed:
            if "delete" not in self.restriction.allow and partial_of(subvolume.name) is None:
                raise Refused("this key may not delete {}".format(subvolume.name), "see --allow in its authorized_keys")

    def check_receive(self, folder: str, expected: ExpectedStream) -> None:
        if partial_of(expected.name) is not None:
            raise Refused("{} is no name of a snapshot".format(expected.name))
        listing = LocalHost(Events()).list(folder)
        if expected.base is not None and not any(s.uuid == expected.base and s.readonly for s in listing.subvolumes):
            raise Refused("the parent is not in {}".format(folder))
        others = sum(partial_of(s.name) not in (None, expected.name) for s in listing.subvolumes)
        if others >= self.restriction.most_partials:
            raise Refused("{} holds too many broken transfers".format(folder), "run prune there")

    def check_raw_receive(self, folder: str, name: str) -> None:
        if partial_of(name) is not None:
            raise Refused("{} is no name of a snapshot".format(name))
        if len(read_raw_folder(folder).partials) >= self.restriction.most_partials:
            raise Refused("{} holds too many broken transfers".format(folder), "delete its .*.partial")

    def check_notes(self, arguments: Dict[str, Any]) -> None:
        """The machine's own destinations, and other machines', are not a puller's to note or to forget."""
        destinations = list(arguments.get("pins", ())) + [
            change.destination for kind in ("add", "clear") for change in arguments.get(kind, ())]
        own = read_own_destinations(arguments["folder"])
        others = [destination for destination in destinations if not self.may_note(destination, own)]
        if others:
            raise Refused("this key may not change notes of {}".format(others[0]),
                          "see --as in its authorized_keys" if self.restriction.known_as else "")

    def may_note(self, destination: str, own: Sequence[str]) -> bool:
        """Whether notes of a destination belong to whoever has this key. own: the destinations of this machine."""
        name = self.restriction.known_as + "/" if self.restriction.known_as else ""
        return destination.startswith(("ssh://" + name, "raw+ssh://" + name)) and destination not in own


########################################################################################################
# AGENT: the program on another host, serving calls over a channel
#
# What it may do is what CALLS names: calls of LocalHost, with arguments of the types that these declare.
# Each channel has an agent of its own, which ends, and with it all that it has started, when its channel
# does: a thread waits for that and interrupts whatever is being done. A key that is restricted has a
# Guard: every path is opened step by step below one folder, no link is followed, no mount and no received
# subvolume entered, and receive is confined by chroot. Never: SSH_ORIGINAL_COMMAND looked at.
########################################################################################################

CALL_FAILURES = (BackupError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
                 RecursionError, MemoryError, struct.error)


def checked_result(call: str, result: Any) -> Any:
    """What a call gave, if it is what LocalHost's gives; ValueError else. Its classes were checked on arrival."""
    hint = type_hints(getattr(LocalHost, {"release": "hold"}.get(call, call)))["return"]
    if call in SENDERS or call in ("hold", "release"):
        hint = type(None)
    if not is_of_type(result, hint):
        raise ValueError("an answer to {} that is none".format(call.replace("_", " ")))
    if call in NAMED and not all(map(is_file_name, result)):
        raise ValueError("an answer to {} with names that are none".format(call.replace("_", " ")))
    return result


class Greeting(NamedTuple):
    """What an agent says first."""

    version: str
    sha256: str
    python: str
    nodename: str
    user: int
    programs: Tuple[str, ...]  # of those that compress


WIRE_CLASSES["Greeting"] = Greeting


def check_arguments(method: Any, arguments: Sequence[Any]) -> None:
    """TypeError unless `arguments` fit what `method` declares."""
    hints = [hint for name, hint in type_hints(method).items() if name != "return"]
    needed = len(hints) - len(getattr(method, "__wrapped__", method).__defaults__ or ())
    if not needed <= len(arguments) <= len(hints) or not all(map(is_of_type, arguments, hints)):
        raise TypeError("{} takes other arguments".format(method.__name__))


def find_compressions() -> Tuple[str, ...]:
    found = []
    for name in COMPRESSIONS:
        with contextlib.suppress(BackupError):
            find_program(name)
            found.append(name)
    return tuple(found)


def own_source() -> bytes:
    """The source of this file, also from inside a zip."""
    loader = globals().get("__loader__")
    return loader.get_data(__file__) if loader is not None else b""


@functools.lru_cache(maxsize=None)
def source_digest() -> str:
    """SHA-256 of this file's source."""
    import hashlib
    return hashlib.sha256(own_source()).hexdigest()


def log_refusal(refusal: Refused) -> None:
    """Notes on this machine what a key was refused; a system without syslog does without."""
    try:
        import syslog
    except ImportError:
        return
    whose = os.environ.get("SSH_CONNECTION", "").split(" ")[0] or "somebody"
    syslog.openlog("btrfs-backup-ng", syslog.LOG_PID, syslog.LOG_AUTH)
    syslog.syslog(syslog.LOG_WARNING, printable("refused {}: {}".format(whose, refusal.message)))


PULSE = 10.0  # seconds


def work_of(pid: int) -> List[bytes]:
    """What changes as long as a process does something; of one that waits for its programs, that these do something.

    Of each it is the first thread that counts; and a program that has ended is none.
    """
    found = []
    try:
        with open("/proc/{0}/task/{0}/stat".format(pid), "rb") as about:
            found.append(about.read().rpartition(b")")[2])
        with open("/proc/{0}/task/{0}/status".format(pid), "rb") as about:
            found += [line for line in about if b"ctxt_switches" in line]
        with open("/proc/{0}/task/{0}/children".format(pid), "rb") as children:
            inner = [work for child in children.read().split() for work in work_of(int(child))]
    except OSError:  # it has ended, or the kernel does not tell of children (CONFIG_PROC_CHILDREN)
        return found + [str(time.monotonic()).encode("ascii")]
    return [] if found[0].startswith(b" Z") else inner or found


class Agent:
    """Serves one channel until it ends."""

    def __init__(self, channel: Channel, restriction: Optional[Restriction] = None) -> None:
        self.channel = channel
        self.guard = Guard(restriction) if restriction else None
        self.events = Events(self.tell)
        self.host = LocalHost(self.events, must_confine=restriction is not None)
        self.host.serves = True
        self.held: Dict[Tuple[int, int, str], contextlib.ExitStack] = {}
        self.telling, self.is_at_work = threading.RLock(), False

    def tell(self, event: Event) -> None:
        if self.guard is not None:
            event = event._replace(text=self.guard.in_words(event.text))
        with self.telling:
            self.channel.send_value(EVENT, tuple(event))
            self.channel.flush_some()

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """While something is done that may take long without a word of it."""
        self.is_at_work = True
        try:
            yield
        finally:
            with self.telling:  # what follows is written without it
                self.is_at_work = False

    def beat(self) -> None:
        """Tells the other side that a call is at work, as long as it moves: a disk that hangs must show."""
        work: List[bytes] = []
        with contextlib.suppress(ConnectionLost):
            while True:
                time.sleep(PULSE)
                before, work = work, work_of(os.getpid())
                with self.telling:
                    if self.is_at_work and work != before:
                        self.channel.send_value(EVENT, tuple(Event("alive", "debug", "", {})))
                        self.channel.flush_some()

    def greet(self) -> None:
        self.channel.send_raw(MARKER)
        self.channel.send_value(RESULT, Greeting(
            __version__, source_digest(), sys.version.split()[0], os.uname().nodename, os.geteuid(),
            find_compressions()))
        self.channel.flush(GREETING_TIMEOUT)

    def serve(self) -> None:
        """Answers calls until the channel ends."""
        self.greet()
        self.channel.skip_noise(float("inf"))
        threading.Thread(target=self.beat, daemon=True).start()
        try:
            while True:
                kind, payload = self.channel.await_frame(float("inf"), float("inf"))
                if kind == CALL:
                    self.answer(payload)
                elif kind != ABORT:  # one that came too late
                    raise ConnectionLost("a frame out of turn")
        finally:
            for held in self.held.values():
                held.close()

    def answer(self, payload: bytes) -> None:
        """Does one call; whatever goes wrong with it is an answer as well."""
        try:
            name, arguments, compression = self.parse_call(payload)
            if name in RECEIVERS:
                self.receive(name, arguments, compression)
            elif name in SENDERS:
                self.send(name, arguments, compression)
            else:
                with self.at_work():
                    result = self.method(name, arguments)()
                self.channel.send_value(RESULT, result)
        except (ConnectionLost, Interrupted):
            raise
        except CALL_FAILURES as error:
            self.refuse(error)
        finally:
            if self.guard is not None:
                self.guard.forget()
        self.channel.flush(float("inf"))

    def refuse(self, error: BaseException) -> None:
        if isinstance(error, OSError):
            error = os_error("cannot do that" if error.filename is None else "{}".format(error.filename), error)
        elif not isinstance(error, BackupError):
            error = BackupError("this agent cannot do such a call: {}".format(error), "is it of another version?")
        if self.guard is not None:
            in_words, transient = self.guard.in_words, error.transient
            error = type(error)(in_words(error.message), in_words(error.hint), in_words(error.detail), transient)
        self.channel.send_value(FAILED, error)

    def parse_call(self, payload: bytes) -> Tuple[str, Tuple[Any, ...], str]:
        try:
            name, arguments, compression = self.channel.value(payload)
        except Nonsense as error:
            raise Refused(error.message, "is it of another version?") from None
        if not isinstance(arguments, tuple) or not isinstance(name, str) or compression not in ("", *COMPRESSIONS):
            raise TypeError("no call")
        return name, arguments, compression

    def method(self, name: str, arguments: Sequence[Any]) -> Any:
        """What does a call, once it was checked that it may be done with these arguments."""
        if name not in CALLS:
            raise BackupError("this agent knows no call {}".format(printable(name)), "is it of another version?")
        declared = getattr(LocalHost, {"release": "hold"}.get(name, name))
        check_arguments(declared, arguments)
        done_by = getattr(self if name in ("hold", "release") else self.host, name)
        if self.guard is None:
            return functools.partial(done_by, *arguments)
        try:
            checked = self.guard.checked(name, dict(zip(type_hints(declared), arguments)))
            guard = self.guard
            return lambda: guard.allowed_part(name, checked, done_by(*checked))
        except Refused as refusal:
            log_refusal(refusal)
            raise

    def hold(self, folder: str, prefix: str, wait: float, token: str = "") -> None:
        """Holds a run lock until it is released or the channel ends."""
        key = self.key_of(folder, prefix)
        if key not in self.held:
            stack = contextlib.ExitStack()
            stack.enter_context(self.host.hold(folder, prefix, wait, token))
            self.held[key] = stack

    def release(self, folder: str, prefix: str, _: float) -> None:
        self.held.pop(self.key_of(folder, prefix), contextlib.ExitStack()).close()

    @staticmethod
    def key_of(folder: str, prefix: str) -> Tuple[int, int, str]:
        """What a run lock is known by; a path may be another one in each call."""
        found = os.stat(folder)
        return found.st_dev, found.st_ino, prefix

    def receive(self, name: str, arguments: Sequence[Any], compression: str) -> None:
        """A stream from the channel into a receiver of this host; then what became of it.

        The sender does not wait for the receiver to be opened, so that its stream is drained in any case.
        """
        source = StreamSource(self.channel, compression)
        try:
            with self.at_work():
                receiver: Receiver = self.method(name, arguments)()
            self.channel.send_value(RESULT, receiver.resume)
            source.start = receiver.resume.offset if receiver.resume else 0
            relayed = Relay(source, {"": receiver}, float("inf"), lambda size, data: None).run()
            if relayed.errors:
                raise relayed.errors[""]
            self.channel.send_value(RESULT, relayed.backups[""])
        except ConnectionLost:
            raise
        except CALL_FAILURES as error:
            self.refuse(error)
            source.drain(float("inf"))
        finally:
            source.end()

    def send(self, name: str, arguments: Sequence[Any], compression: str) -> None:
        """A stream from a sender of this host into the channel."""
        with self.at_work():
            sender = self.method(name, arguments)()
        self.channel.send_value(RESULT, None)
        relayed = Relay(sender, {"": StreamSink(self.channel, compression)}, float("inf"),
                        lambda size, data: None).run()
        if relayed.errors:
            raise relayed.errors[""]


HANGUP_GRACE = 2.0  # seconds


def interrupt_on_hangup(fd: int) -> None:
    """Ends this process the gentle way when the other end of `fd` is gone, whatever it is doing then."""

    def watch() -> None:
        poll_fds([(fd, POLLRDHUP)], float("inf"))
        time.sleep(HANGUP_GRACE)  # in which what has arrived can be taken
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def serve_agent(restriction: Optional[Restriction] = None) -> None:
    """Serves calls on stdin and stdout, which nothing else may use from here on."""
    read_end, write_end = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    for fd in (read_end, write_end):
        enlarge(fd)
    interrupt_on_hangup(read_end)
    with contextlib.suppress(ConnectionLost):
        Agent(Channel(read_end, write_end, "the other side"), restriction).serve()


########################################################################################################
# SSH: connections to other machines
#
# The user's ssh configuration wins: only what it leaves open is set. All channels to a machine share one connection
# (ControlMaster), so there is one authentication. Never: a weaker check of host keys, a password asked for without a
# terminal.
########################################################################################################

STAGE_1 = 'exec(open(0,"rb",0,closefd=False).readline())'
STAGE_2 = r'''
import sys
marker = b"\nbtrfs-backup-ng wire 1\n"
if sys.version_info < (3, 6):
    open(1, "wb", 0, closefd=False).write(marker + b"old %d.%d\n" % sys.version_info[:2])
    raise SystemExit(1)
import os
if sys.getfilesystemencoding() != "utf-8" and os.environ.get("LC_ALL") != "C.UTF-8":  # see use_utf8
    try:
        os.execve(sys.executable or "", [sys.executable, "-I", "-c", "LINE = %r; exec(LINE)" % LINE],
                  dict(os.environ, LC_ALL="C.UTF-8", PYTHONUTF8="1"))
    except OSError:
        pass
import hashlib, stat, zlib
sys.dont_write_bytecode = False

def is_private(path, kind):
    found = os.lstat(path)
    return kind(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022

def read_cached(path):
    folder = os.path.dirname(path)
    try:  # whoever may rename one of the folders could change what is imported once it was looked at
        for _ in range(3):
            if not is_private(folder, stat.S_ISDIR):
                return
            folder = os.path.dirname(folder)
        if is_private(path, stat.S_ISREG):
            with open(path, "rb") as source:
                return source.read()
    except OSError:
        pass

def keep(path, source):
    try:
        folders = [os.path.dirname(path)]
        while not os.path.isdir(folders[-1]):
            folders.append(os.path.dirname(folders[-1]))
        for folder in reversed(folders):
            if not os.path.isdir(folder):
                os.mkdir(folder, 0o700)
            if not is_private(folder, stat.S_ISDIR):
                return
        aside = "%s.%d" % (path, os.getpid())
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as copy:
            copy.write(source)
            copy.flush()
            os.fsync(copy.fileno())
        os.rename(aside, path)
        return read_cached(path) == source
    except OSError:
        pass

def fetch():
    os.write(1, marker + b"need\n")
    unpacker, source = zlib.decompressobj(), b""
    while not unpacker.eof:
        more = os.read(0, 65536)
        if not more:
            raise SystemExit(1)
        source += unpacker.decompress(more)
    return source

def home():
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):
        import pwd
        try:
            cache = os.path.join(pwd.getpwuid(os.geteuid()).pw_dir, ".cache")
        except KeyError:
            cache = "/nonexistent"
    return cache

def is_right(source):
    return source is not None and hashlib.sha256(source).hexdigest() == DIGEST

class InMemory:
    def __init__(self, source):
        self.source = source
    def get_data(self, path):
        return self.source

path = os.path.join(home(), "btrfs-backup-ng", DIGEST, "btrfs_backup_ng.py")
source = read_cached(path)
kept = is_right(source)
if not kept:
    source = fetch()
    if not is_right(source):
        raise SystemExit("the program arrived damaged")
    kept = keep(path, source)
program = None
if kept:
    sys.path.insert(0, os.path.dirname(path))
    try:
        import btrfs_backup_ng as program
    except Exception:  # torn bytecode
        sys.modules.pop("btrfs_backup_ng", None)
    del sys.path[0]
if program is None:
    program = type(sys)("btrfs_backup_ng")
    program.__file__ = path
    program.__loader__ = InMemory(source)
    sys.modules["btrfs_backup_ng"] = program
    exec(compile(source, path, "exec"), program.__dict__)
sys.argv = ["btrfs-backup-ng", "agent"]
raise SystemExit(program.main(["agent"]))
'''
CONNECT_TIMEOUT = 20  # seconds
ENDING_TIMEOUT = 10.0  # seconds for the far side to say that it has ended a transfer


class NoPython(BackupError):
    """The host has no Python that can run the agent."""


def stage_2() -> bytes:
    """The line that STAGE_1 executes."""
    return "LINE = {!r}; exec(LINE)\n".format("DIGEST = {!r}\n".format(source_digest()) + STAGE_2).encode("ascii")


def has_terminal() -> bool:
    """Whether ssh could ask a person."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


class SshOptions(NamedTuple):
    """How ssh is called. `given` are the user's own `-o` values."""

    given: Tuple[str, ...] = ()
    sudo: bool = False


def parse_ssh_settings(text: str) -> Dict[str, str]:
    """`ssh -G`: the settings that hold for a host, names in lower case."""
    return dict((line.split(" ", 1) + [""])[:2] for line in text.splitlines())


def ssh_argv(endpoint: Endpoint, options: SshOptions, more: Sequence[str]) -> List[str]:
    argv = ["ssh"]
    for option in list(options.given) + list(more):
        argv += ["-o", option]
    if endpoint.port:
        argv += ["-p", endpoint.port]
    return argv + ["-T", "-x", "--", endpoint.login]


def open_settings(settings: Dict[str, str], control_path: str, is_first: bool) -> List[str]:
    """What we set where the user's configuration leaves it open."""
    more = ["ClearAllForwardings=yes"]
    if not has_terminal():
        more.append("BatchMode=yes")
    if settings.get("serveraliveinterval", "0") == "0":
        more += ["ServerAliveInterval=15", "ServerAliveCountMax=3"]
    if settings.get("connecttimeout", "none") in ("none", "0"):
        more.append("ConnectTimeout={}".format(CONNECT_TIMEOUT))
    if settings.get("remotecommand", "none") != "none":
        more.append("RemoteCommand=none")
    if control_path and settings.get("controlpath", "none") == "none":
        more += ["ControlMaster=" + ("yes" if is_first else "no"), "ControlPath=" + control_path, "ControlPersist=no"]
    return more


def ssh_words(machine: str) -> Tuple[str, str]:
    """How `ssh` and `ssh-keygen -R` are told of a machine."""
    match = re.fullmatch(r"((?:.*@)?)(\[[^\]]*\]|[^:]*)(?::([0-9]+))?", machine)
    user, host, port = match.groups() if match else ("", machine, None)
    host = host.strip("[]")
    return ("-p {} {}{}".format(port, user, host), "[{}]:{}".format(host, port)) if port else (user + host, host)


SSH_FAILED = 255  # of ssh itself, else it ends as the command does
CUT_OFF = (  # ssh_dispatch_run_fatal stands before what stays as it is as well, such as a host's key that is too short
    r"Connection to [^\n]* closed by|client_loop: send disconnect|packet_write_wait"
    r"|ssh_dispatch_run_fatal: [^\n]*: (Broken pipe|message authentication code incorrect|Connection corrupted)"
    r"|Timeout, server |(read from|write to) master failed|mux_client_[a-z_]+: [^\n]*Broken pipe")


def ssh_hints(machine: str) -> Tuple[Tuple[str, str, str], ...]:
    """(a pattern of what ssh or the shell there says, what is wrong, what to do)."""
    login, known = ssh_words(machine)
    sudoers = "allow python3 without one in its sudoers, see README"
    no_sudo = ("there is no sudo", "log in as root, without --ssh-sudo")
    return (
        ("Could not resolve hostname", "no such host", "is the name right, and the network up?"),
        ("REMOTE HOST IDENTIFICATION HAS CHANGED", "its host key has changed",
         "if that is meant to be: ssh-keygen -R {}".format(quoted(known))),
        ("Host key verification failed", "its host key is not known",
         "log in once by hand, as the same user: ssh {}".format(login)),
        (r"Permission denied \([a-z,-]+\)", "it lets us not in",
         "set up a key for this user (under sudo that is root): ssh-copy-id {}".format(login)),
        ("Too many authentication failures", "it lets us not in", "name the key: --ssh-opt IdentityFile=..."),
        ("Connection refused", "connection refused", "is sshd running there, and the port right?"),
        ("timed out", "it does not answer", "is it switched on and reachable?"),
        ("No route to host", "it cannot be reached", "is it switched on and reachable?"),
        ("Network is unreachable", "it cannot be reached", "is the network up?"),
        ("Bad configuration option", "ssh does not know an option", "see --ssh-opt"),
        ("sudo: a password is required", "sudo wants a password there", sudoers),
        ("sudo: a terminal is required", "sudo wants a password there", sudoers),
        ("is not in the sudoers", "this user may not use sudo there", "see README about --ssh-sudo"),
        ("not allowed to execute", "this user may not use sudo for python3 there", "see README about --ssh-sudo"),
        # sh, bash, tcsh, zsh, fish
        ("sudo: not found", *no_sudo), ("sudo: command not found", *no_sudo), ("sudo: Command not found", *no_sudo),
        ("command not found: sudo", *no_sudo), ("Unknown command: sudo", *no_sudo),
        ("Connection reset by", "the connection was lost", "try again"),
        ("Connection closed by", "the connection was closed", "see the log of sshd there"),
        (CUT_OFF, "the connection was lost", "try again"),
    )


# What may be over soon: a machine that starts, a network that is away, a connection that was cut.
PASSING_SIGNS = frozenset((
    "Could not resolve hostname", "Connection refused", "timed out", "No route to host", "Network is unreachable",
    "Connection reset by", "Connection closed by", CUT_OFF))


def no_agent_error(machine: str, status: Optional[int], words: str, noise: str) -> BackupError:
    """Why no agent answered, from how ssh ended, what it said, and what the host printed."""
    for sign, cause, hint in ssh_hints(machine):
        if re.search(sign, words):
            kind = ConnectionLost if sign in PASSING_SIGNS else BackupError
            return kind("{}: {}".format(machine, cause), hint, words)
    if re.search(r"[Uu]nknown option:? -I|invalid syntax|Missing parentheses", words):  # Python before 3.4 has no -I
        return NoPython("{} has only an old Python".format(machine), "install Python 3.6 or later there")
    if "SyntaxError" in words:
        return BackupError("{}: a part of what was sent to it is missing".format(machine),
                           "does a start file of its login shell read its input, as in .bashrc?")
    if status == 127 or re.search(r"python3[^\n]*(not found|No such file)|[Uu]nknown command[^\n]*python3", words):
        return NoPython("{} has no python3".format(machine), "install Python 3.6 or later there")
    said = (words or noise).strip()
    if not words.strip() and (status is None or status == SSH_FAILED or status < 0):
        return ConnectionLost("{}: the connection was lost during the login".format(machine), "try again", said)
    last = said.splitlines()[-1][:MOST_TOLD] if said else "nothing"
    return BackupError("{}: its login gave no agent but said: {}".format(machine, last),
                       "is its login shell restricted?", said if "\n" in said else "")


class Connection:
    """One agent at work: the process that leads to it, and the channel."""

    def __init__(self, machine: str, argv: Sequence[str], interactive: bool = False) -> None:
        self.machine, self.is_broken = machine, False
        their_in, our_out = make_pipe()
        our_in, their_out = make_pipe()
        try:
            self.stage = Stage(argv, their_in, their_out, own_group=not interactive)
        except BackupError:
            os.close(our_out)
            os.close(our_in)
            raise
        finally:
            os.close(their_in)
            os.close(their_out)
        self.channel = Channel(our_in, our_out, machine, lends=True)
        try:
            self.greeting: Greeting = self.begin()
        except BaseException:
            self.end()
            raise

    def begin(self) -> Greeting:
        """Sends what is needed to get an agent's greeting."""
        import zlib
        noise, deadline = b"", time.monotonic() + GREETING_TIMEOUT
        try:
            self.channel.send_raw(stage_2())
            self.channel.flush(GREETING_TIMEOUT)
            noise = self.channel.skip_noise(deadline)
            if self.wants_source(deadline):
                self.channel.send_raw(zlib.compress(own_source(), 6))
                self.channel.flush(GREETING_TIMEOUT)
                noise += self.channel.skip_noise(deadline)
            greeting = self.channel.result(GREETING_TIMEOUT)
        except Nonsense:
            raise
        except ConnectionLost:
            raise self.explain(noise) from None
        if not isinstance(greeting, Greeting):
            raise BackupError("{} greets in a strange way".format(self.machine))
        self.channel.send_raw(MARKER)
        return greeting

    def is_alive(self) -> bool:
        """Whether nothing shows that it has ended."""
        return not self.stage.has_ended() and not poll_fds([(self.channel.read_end, 0)], 0)

    def wants_source(self, deadline: float) -> bool:
        """Whether what follows the marker is no greeting but a line of STAGE_2."""
        line = b""
        while not line.endswith(b"\n") and len(line) < 20:
            more = self.channel.read_some(1)
            if more is None:
                if time.monotonic() > deadline:
                    raise Stalled("{} does not answer".format(self.machine))
                self.channel.wait(CHANNEL_NAP)
            line += more or b""
            if line == RESULT:
                self.channel.inbox = line + self.channel.inbox
                return False
        if line.startswith(b"old "):
            raise NoPython("{} has only Python {}".format(self.machine, os.fsdecode(line[4:-1])),
                           "install Python 3.6 or later there")
        return line == b"need\n"

    def explain(self, noise: bytes) -> BackupError:
        """Why the connection ended."""
        noise += self.channel.inbox
        with contextlib.suppress(BackupError):
            self.stage.wait(ENDING_GRACE)
        self.stage.drain.join(1)
        return no_agent_error(self.machine, self.stage.process.poll(), os.fsdecode(b"\n".join(self.stage.tail)),
                              os.fsdecode(noise))

    def end(self) -> None:
        self.channel.close()
        with contextlib.suppress(BackupError):
            self.stage.wait(ENDING_GRACE)
        self.stage.end()


Share = Callable[[Endpoint, Dict[str, str]], str]


class SshConnector:
    """Makes connections to one machine; they share one authentication.

    share: gives the control path of a connection to the endpoint that others keep, by ssh's settings for it; '' where
    there is none.
    """

    def __init__(self, endpoint: Endpoint, options: SshOptions, events: Events, share: Optional[Share] = None) -> None:
        self.endpoint, self.options, self.events, self.share = endpoint, options, events, share
        self.folder: Optional[PrivateFolder] = None  # of the control socket
        self.settings: Optional[Dict[str, str]] = None

    def __call__(self, is_first: bool) -> Connection:
        argv = self.argv(is_first)
        self.events.debug("command", "starting {} ...".format(" ".join(argv)))
        words = ["sudo", "-n"] * self.options.sudo + ["python3", "-I", "-c", "'" + STAGE_1 + "'"]
        return Connection(self.endpoint.machine, argv + [" ".join(words)], interactive=has_terminal())

    def argv(self, is_first: bool) -> List[str]:
        """The command up to what runs there."""
        if self.settings is None:
            outcome = run(ssh_argv(self.endpoint, self.options, ())[:-2] + ["-G", "--", self.endpoint.login])
            if outcome.status != 0:
                raise no_agent_error(self.endpoint.machine, outcome.status, outcome.error, "")
            self.settings = parse_ssh_settings(outcome.out)
        if self.share is not None and self.settings.get("controlpath", "none") == "none":
            shared = self.share(self.endpoint, self.settings)
            if shared:
                return ssh_argv(self.endpoint, self.options, open_settings(self.settings, shared, False))
        return ssh_argv(self.endpoint, self.options, open_settings(self.settings, self.control_path(), is_first))

    def await_master(self, master: Stage) -> None:
        """Waits until others can share the connection of `master`, or it has ended."""
        deadline = time.monotonic() + GREETING_TIMEOUT
        is_ours = (self.settings or {}).get("controlpath", "none") == "none"
        while is_ours and self.folder and not os.path.exists(self.control_path()):
            if master.has_ended() or time.monotonic() > deadline:
                break
            time.sleep(0.02)

    def control_path(self) -> str:
        """A socket in a private folder; '' where there can be none."""
        if self.folder is None:
            with contextlib.suppress(OSError):
                self.folder = PrivateFolder()
        return os.path.join(self.folder.path, "ssh") if self.folder else ""

    def end(self) -> None:
        if self.folder is not None:
            self.folder.end()


########################################################################################################
# REMOTE: hosts over ssh
#
# `ssh HOST python3 -I -c STAGE_1` reads one line, STAGE_2, which looks for this very source in the cache
# folder of the user there, by SHA-256, or asks for it; then the agent serves. Isolated (-I), that Python imports
# nothing from the folder it starts in, the login's home, nor from what the user has installed. The user's ssh
# configuration wins: only what it leaves open is set. All channels to a machine share one connection
# (ControlMaster), so there is one authentication. A channel that breaks is replaced by the next call.
# Never: anything installed there, a weaker check of host keys, a password asked for without a terminal.
########################################################################################################

MOST_DOOMED = 400  # in one call, whatever their names
LONGEST_WAIT = 1e9  # seconds for another run; infinity does not travel


class RemoteReceiver(StreamSink):
    """A receiver of another host. Its opening is not waited for, unless there may be something to take up."""

    def __init__(self, host: "AgentHost", connection: Connection, compression: str, gives: Any = Subvolume) -> None:
        """gives: the class of what it makes of the stream."""
        super().__init__(connection.channel, compression)
        self.host, self.gives = host, gives
        self.program = connection.channel.peer
        self.connection: Optional[Connection] = connection
        self.is_open = self.is_over = False

    def check_alive(self) -> None:
        frame = self.channel.next_frame()
        if frame is not None:
            self.take_answer(*frame)

    def take_answer(self, kind: bytes, payload: bytes) -> Any:
        value = self.channel.value(payload)
        if kind == RESULT and not self.is_open:
            self.is_open = True
            self.resume = value if isinstance(value, ResumePoint) else None
            if self.resume and not self.resume.is_sound:
                raise self.channel.nonsense("a place in the stream that is none")
            return None
        self.is_over = True
        if kind == FAILED and isinstance(value, (ReceiverFailed, StreamDamaged)):
            raise value
        if kind == FAILED and isinstance(value, BackupError):
            raise ReceiverFailed(value.message, value.hint, value.detail, value.transient)
        if kind != RESULT or not isinstance(value, self.gives):
            raise self.channel.nonsense("an answer out of turn")
        return value

    def await_opening(self) -> None:
        """Waits until `resume` is known."""
        while not self.is_open:
            self.take_answer(*self.channel.await_frame(self.host.patience))

    def finish(self, timeout: float) -> Any:
        self.flush(timeout)
        made = None
        while not self.is_over:
            made = self.take_answer(*self.channel.await_frame(timeout))
        return made

    def end(self) -> None:
        super().end()
        if self.connection is None:
            return
        connection, self.connection = self.connection, None
        try:
            if not self.finished:
                self.channel.send(ABORT)
            while not self.is_over:
                frame = self.channel.await_frame(ENDING_TIMEOUT)
                with contextlib.suppress(ReceiverFailed):
                    self.take_answer(*frame)
        except BackupError:
            connection.is_broken = True
        self.host.give_back(connection)


class RemoteSender(StreamSource):
    """A sender of another host."""

    def __init__(self, host: "AgentHost", connection: Connection, compression: str) -> None:
        super().__init__(connection.channel, compression)
        self.host = host
        self.connection: Optional[Connection] = connection

    def end(self) -> None:
        super().end()
        if self.connection is None:
            return
        connection, self.connection = self.connection, None
        try:
            if not self.is_over:
                self.channel.send(ABORT)
                self.drain(ENDING_TIMEOUT)
        except BackupError:
            connection.is_broken = True
        self.host.give_back(connection)


class RemoteMeasuring:
    """A measuring of a send on another host; its result comes at once, at its end."""

    def __init__(self, host: "AgentHost", arguments: Tuple[Any, ...]) -> None:
        self.meter = SendSize()
        self.error: Optional[BackupError] = None
        self.host, self.arguments = host, arguments
        self.thread = threading.Thread(target=self.measure, daemon=True)
        self.thread.start()

    def measure(self) -> None:
        try:
            self.meter = self.host.call("measured", *self.arguments)
        except Exception as error:
            self.error = explain(error, "cannot measure")

    def wait(self) -> SendSize:
        self.thread.join()
        if self.error is not None:
            raise self.error
        return self.meter

    def end(self) -> None:
        """Nothing: it ends with the connection at the latest."""


# What another host may tell: for each kind of event its level, and its facts with their types. All LocalHost tells.
TELLABLE: Dict[str, Tuple[str, Dict[str, Any]]] = {
    "command": ("debug", {}), "search": ("debug", {}), "skipping": ("debug", {"snapshot": str}),
    "waiting": ("info", {}), "state": ("warning", {}),
    "progress": ("progress", {"snapshot": str, "destination": str, "done": int, "expected": Optional[int],
                              "rate": float})}


def told_event(told: Any) -> Optional[Event]:
    """The event that another host tells; None for whatever it may not tell."""
    if not is_of_type(told, Tuple[str, str, str, Dict[str, Any]]):
        return None
    kind, level, text, facts = told
    known_level, types = TELLABLE.get(kind, ("", {}))
    if level != known_level or not all(key in types and is_of_type(facts[key], types[key]) for key in facts):
        return None
    if not all(len(fact) <= MOST_TOLD if isinstance(fact, str) else 0 <= (fact or 0) < 1 << 64
               for fact in facts.values()):
        return None
    return Event(kind, level, text, facts)


def breaks(error: BaseException) -> bool:
    """Whether a call that ended so leaves its channel in an unknown state; an error that the host answers does not."""
    return not isinstance(error, BackupError) or isinstance(error, (ConnectionLost, Stalled))


def batches(doomed: Sequence[Subvolume]) -> List[List[Subvolume]]:
    """The same subvolumes, no more at once than a call holds."""
    return [list(doomed[start:start + MOST_DOOMED]) for start in range(0, len(doomed), MOST_DOOMED)]


class AgentHost:
    """A host that an agent does the calls of: the same calls as LocalHost's, by the same names."""

    skips = True

    def __init__(self, machine: str, connect: Callable[[bool], Connection], events: Events,
                 compress: str = "no", patience: float = float("inf")) -> None:
        """connect: makes a connection; its argument says whether it is the first.

        patience: seconds for which nothing may come while a call is at work.
        """
        self.machine, self.connect, self.events, self.compress = machine, connect, events, compress
        self.patience = patience
        self.token = os.urandom(16).hex()
        self.mutex, self.holding = threading.Lock(), threading.Lock()
        self.idle: List[Connection] = []
        self.all: List[Connection] = []
        self.holds: List[Tuple[str, str]] = []
        self.holder: Optional[Connection] = None
        self.known_capabilities: Optional[Capabilities] = None
        self.labels: Set[str] = set()  # what it may tell the progress of
        self.give_back(self.borrow())

    # -- connections

    def borrow(self) -> Connection:
        """A connection; where that which held the run locks is gone, they are held again first."""
        connection = self.find_connection()
        with self.holding:
            if self.holder is None and self.holds:
                self.hold_again(connection)
        return connection

    def hold_again(self, connection: Connection) -> None:
        """Takes the run locks by another connection; raises where another run has one: nothing is done without."""
        try:
            for folder, prefix in self.holds:
                self.ask(connection, "hold", (folder, prefix, 3 * ENDING_TIMEOUT, self.token), "")
            self.holder = connection
        except BaseException as error:
            connection.is_broken = breaks(error)
            self.give_back(connection)
            raise

    def find_connection(self) -> Connection:
        """An idle connection, or a new one."""
        with self.mutex:
            while self.idle:
                connection = self.idle.pop()
                if connection.is_alive():
                    return connection
                self.remove(connection)
            connection = self.connect(not self.all)
            self.greeting: Greeting = connection.greeting
            connection.channel.on_event, connection.channel.on_error = self.pass_on, self.locate
            self.all.append(connection)
        return connection

    def give_back(self, connection: Connection) -> None:
        with self.mutex:
            if not connection.is_broken:
                self.idle.append(connection)
                return
            self.remove(connection)

    def remove(self, connection: Connection) -> None:
        self.all.remove(connection)
        if self.holder is connection:
            self.holder = None
        connection.end()

    def pass_on(self, told: Any) -> None:
        """An event of the other host becomes one of ours, if it is one that a host may tell."""
        event = told_event(told)
        if event is not None and (event.level != "progress" or event.facts.get("destination") in self.labels):
            text = "{}: {}".format(self.machine, printable(event.text[:MOST_TOLD])) if event.text else ""
            self.events.emit(event.kind, event.level, text, **event.facts)

    def locate(self, error: BackupError) -> None:
        """An error of the other host says so, and what an ordinary user can do about it."""
        error.message = "{}: {}".format(self.machine, error.message)
        error.args = (error.message,)
        if self.greeting.user and re.search("not permitted|permission denied", error.message.lower()):
            error.hint = "log in as root, or use --ssh-sudo"

    def end(self) -> None:
        for connection in reversed(self.all):
            connection.end()

    # -- calls

    def ask(self, connection: Connection, name: str, arguments: Tuple[Any, ...], compression: str,
            timeout: Optional[float] = None) -> Any:
        """What a call gives; Nonsense where that cannot be."""
        channel = connection.channel
        channel.send_value(CALL, (name, arguments, compression))
        channel.largest = LARGEST_FRAME if name in LISTINGS else LARGEST_CALL
        found = channel.result(self.patience if timeout is None else timeout)
        try:
            return checked_result(name, found)
        except ValueError as error:
            raise channel.nonsense(str(error)) from None

    def call(self, name: str, *arguments: Any) -> Any:
        """What a call gives on the other host; its errors are raised here."""
        connection = self.borrow()
        try:
            return self.ask(connection, name, arguments, "")
        except BaseException as error:
            connection.is_broken = breaks(error)
            raise
        finally:
            self.give_back(connection)

    def __getattr__(self, name: str) -> Any:
        if name not in CALLS:
            raise AttributeError(name)
        return functools.partial(self.call, name)

    def name(self) -> str:
        return self.greeting.nodename

    def capabilities(self) -> Capabilities:
        if self.known_capabilities is None:
            self.known_capabilities = self.call("capabilities")
        return self.known_capabilities

    @contextlib.contextmanager
    def hold(self, folder: str, prefix: str, wait: float) -> Iterator[None]:
        """Holds the run lock there, by the agent at the other end of one connection, as long as that stands."""
        connection = self.borrow()
        try:
            self.ask(connection, "hold", (folder, prefix, min(wait, LONGEST_WAIT), self.token), "")
            self.holder = connection
            self.holds.append((folder, prefix))
        except BaseException as error:
            connection.is_broken = breaks(error)
            raise
        finally:
            self.give_back(connection)
        try:
            yield
        finally:
            self.holds.remove((folder, prefix))
            with contextlib.suppress(BackupError):
                self.release(folder, prefix)

    def delete(self, folder: str, doomed: Sequence[Subvolume], convert_rw: bool) -> List[BackupError]:
        return [error for some in batches(doomed) for error in self.call("delete", folder, some, convert_rw)]

    def delete_raw(self, folder: str, doomed: Sequence[Subvolume]) -> List[BackupError]:
        return [error for some in batches(doomed) for error in self.call("delete_raw", folder, some)]

    def digest_tree(self, folder: str, name: str, label: str) -> TreeDigest:
        self.labels.add(label)
        return self.call("digest_tree", folder, name, label)

    def release(self, folder: str, prefix: str) -> None:
        """Lets go of a run lock, at the agent that holds it, which may be busy only with what was given up."""
        with self.mutex:
            connection = self.holder if self.holder in self.idle else None
            if connection is not None:
                self.idle.remove(connection)
        if connection is not None:
            try:
                self.ask(connection, "release", (folder, prefix, 0.0), "", ENDING_TIMEOUT)
            except BackupError:
                connection.is_broken = True
            self.give_back(connection)

    def compression(self) -> str:
        """The program that streams are compressed with on the way, '' for none."""
        ours, theirs = find_compressions(), self.greeting.programs
        if self.compress == "no":
            return ""
        if self.compress == "auto":
            return next((name for name in COMPRESSIONS if name in ours and name in theirs), "")
        for programs, where in ((ours, "here"), (theirs, "on " + self.machine)):
            if self.compress not in programs:
                raise BackupError("{} is not installed {}".format(self.compress, where),
                                  "install the package {0}, or use --compress auto".format(self.compress))
        return self.compress

    # -- streams

    def open_receive(self, folder: str, expected: ExpectedStream, debug: bool, begin: str = "anew") -> RemoteReceiver:
        compression = self.compression()
        connection = self.borrow()
        connection.channel.send_value(CALL, ("open_receive", (folder, expected, debug, begin), compression))
        receiver = RemoteReceiver(self, connection, compression)
        if begin == "take up":
            try:
                receiver.await_opening()
            except BaseException:
                receiver.end()
                raise
        return receiver

    def open_send(self, folder: str, name: str, parent: Optional[str], options: SendOptions,
                  resume: Optional[ResumePoint] = None) -> RemoteSender:
        sender = self.open_sender("open_send", (folder, name, parent, options, resume), self.compression())
        sender.start = resume.offset if resume else 0
        return sender

    def open_sender(self, call: str, arguments: Tuple[Any, ...], compression: str) -> RemoteSender:
        connection = self.borrow()
        try:
            self.ask(connection, call, arguments, compression)
        except BaseException as error:
            connection.is_broken = breaks(error)
            self.give_back(connection)
            raise
        return RemoteSender(self, connection, compression)

    def open_raw_receive(self, folder: str, name: str, packed: bool) -> RemoteReceiver:
        compression = "" if packed else self.compression()
        connection = self.borrow()
        connection.channel.send_value(CALL, ("open_raw_receive", (folder, name, packed), compression))
        return RemoteReceiver(self, connection, compression, RawFile)

    def open_raw_send(self, folder: str, file: str) -> RemoteSender:
        """Not compressed on the way: it is already, if anybody wanted that."""
        return self.open_sender("open_raw_send", (folder, file), "")

    def measure_send(self, folder: str, name: str, parent: Optional[str]) -> RemoteMeasuring:
        return RemoteMeasuring(self, (folder, name, parent))


########################################################################################################
# PLAIN COMMANDS: hosts without Python
#
# Where the agent cannot run, plain commands over ssh do the main job, with what busybox has: listing,
# snapshots, transfers, deletion, locks and pins. Each is `sh -c` with a script that comes through any login
# shell. The stream is checked and edited here, and the backup gets its name only when it was seen complete
# and durable there. Nothing is resumed or verified, and no lock keeps other machines' runs away.
########################################################################################################


class PlainSender(LocalSender):
    """`btrfs send` by a plain command over ssh, whose output begins after the marker."""

    def __init__(self, argv: Sequence[str], explained: Callable[[BackupError, int], BackupError]) -> None:
        super().__init__(argv, socket_pair())
        self.explained = explained
        self.head: Optional[bytes] = b"\n"  # while the marker is sought

    def finish(self, timeout: float) -> None:
        try:
            super().finish(timeout)
        except BackupError as error:
            raise self.explained(error, self.stage.process.returncode) from None

    def read(self, buffer: Union[bytearray, memoryview]) -> Optional[int]:
        while self.head is not None:
            got = super().read(buffer)
            if not got:
                return got
            self.head += bytes(buffer[:got])
            if len(self.head) > MOST_NOISE + len(buffer):
                raise BackupError("the login shell there prints without end")
            noise, found, rest = self.head.partition(MARKER)
            if found:
                self.head = None
                if rest:
                    buffer[:len(rest)] = rest
                    return len(rest)
        return super().read(buffer)


class PlainReceiver(Receiver):
    """`btrfs receive` by a plain command over ssh. The stream is checked and edited here; it cannot be taken up."""

    program = "btrfs receive"

    def __init__(self, host: "ShellHost", folder: str, stream: IncomingStream, argv: Sequence[str]) -> None:
        self.host, self.folder, self.stream = host, folder, stream
        self.stage, self.feed = start_fed(argv, subprocess.DEVNULL)
        self.stage.program = self.program
        self.is_closed = False  # the end of the stream was queued

    @property
    def pending(self) -> int:
        return self.feed.pending

    @property
    def file_data(self) -> int:
        return self.stream.reader.file_data

    def offer(self, chunk: memoryview) -> None:
        for piece in self.stream.edit(chunk):
            self.feed.offer(piece)

    def pump(self) -> int:
        try:
            return self.feed.pump()
        except BrokenPipeError:
            raise self.failure() from None

    def failure(self) -> BackupError:
        """Why `btrfs receive`, or the way to it, ended early."""
        try:
            self.stage.wait(ENDING_GRACE)
        except BackupError as error:
            return receiver_error(self.host.explained(error, self.stage.process.returncode), self.stream.expected)
        return ReceiverFailed("btrfs receive ended before the stream did")

    def check_alive(self) -> None:
        if self.stage.has_ended():
            raise self.failure()

    def close_pipe(self) -> None:
        if self.stream.ended and not self.is_closed:
            self.is_closed = True
            self.feed.offer(self.stream.closing)
            self.pump()

    def finish(self, timeout: float) -> Subvolume:
        """The complete backup under its final name."""
        if not self.stream.ended:
            raise BackupError("the stream ended before its end command")
        self.close_pipe()
        deadline = time.monotonic() + timeout
        while self.feed.pending:
            poll_fds([(self.feed.write_end, select.POLLOUT)], CHANNEL_NAP)
            if self.pump():
                deadline = time.monotonic() + timeout
            elif time.monotonic() > deadline:
                raise Stalled("btrfs receive stalled: it took nothing for {}".format(format_duration(timeout)))
        self.feed.close()
        try:
            self.stage.wait(timeout)
        except BackupError as error:
            raise receiver_error(self.host.explained(error, self.stage.process.returncode),
                                 self.stream.expected) from None
        return self.host.complete(self.folder, self.stream.expected)

    def end(self) -> None:
        self.feed.close()
        self.stage.end()


def shell_command(script: str, arguments: Sequence[str]) -> str:
    """The one word for ssh that runs `script` in sh there, with `arguments` as $a0, $a1 and so on.

    It must come through any login shell: so the script has no single quote, no `!` and no newline, and the
    arguments are spelled in octal, but for plain letters.
    """
    spelled = []
    for number, argument in enumerate(arguments):
        octal = "".join(chr(byte) if re.match(rb"[A-Za-z0-9/._-]", bytes([byte])) else "\\0{:03o}".format(byte)
                        for byte in os.fsencode(argument))
        spelled.append('a{0}=$(printf %b "{1}x"); a{0}="${{a{0}%x}}"; '.format(number, octal))
    return "sh -c '" + "".join(spelled) + script + "'"


PLAIN_READ = (
    'if [ -L "$a0" ]; then echo "it is a link" >&2; exit 1; fi; '
    'if [ -e "$a0" ]; then [ -f "$a0" ] || { echo "it is no plain file" >&2; exit 1; }; echo found; cat "$a0"; fi')

# `cat` ends as well where the connection does: then less has come than was sent. No link is followed (-C: O_EXCL).
PLAIN_REPLACE = (
    'umask 077; rm -f "$a0.new"; (set -C; cat > "$a0.new") || exit 1; '
    '[ "$(wc -c < "$a0.new")" -eq "$a1" ] || { echo "it did not arrive whole" >&2; exit 1; }; '
    'if [ -d "$a0" ]; then echo "it is a folder" >&2; exit 1; fi; sync && mv "$a0.new" "$a0" && sync')

# `btrfs subvolume sync` says nothing for as long as a large subvolume takes.
PLAIN_SYNC = ('while l=$(btrfs subvolume list -d "$a0") || exit 1; [ -n "$l" ]; do echo "$l"; sleep 2; done')
PLAIN_WRITTEN = (  # see check_written; a sync that knows no -f says how it is used
    'said=$(sync -f "$a0" 2>&1) || case $said in *option*|*sage*) ;; '
    '*) printf "%s: contents of files were lost\\n" "$said" >&2; exit 1;; esac; ')

# By its id, from within it, for others may change what bears its name meanwhile; before Linux 5.7 or btrfs-progs 5.7 by
# its name. Nothing that is opened as "." is looked for by a path. A path may hold line breaks and seeming rows.
PLAIN_DELETE = (
    'cd "$a0" || exit 1; { [ "$(btrfs inspect-internal rootid .)" = "$a1" ] && '
    '[ "$(btrfs subvolume list -u . | sed -n '
    '"s/^ID $a1 gen [0-9]* top level [0-9]* uuid \\([^ ]*\\) path .*/\\1/p")" = "$a2" ]; } || '
    '{ echo "it is no longer what it was" >&2; exit 1; }; '
    'if [ "$a3" = writable ]; then btrfs property set -f -ts . ro false || exit 1; fi; '
    'said="Inappropriate ioctl for device"; if btrfs subvolume delete --help 2>&1 | grep -q -e --subvolid; then '
    'said=$(btrfs subvolume delete -i "$a1" . 2>&1 >/dev/null) && exit; fi; '
    'case $said in *"Inappropriate ioctl for device") cd /; btrfs subvolume delete "$a0";; '
    '*) printf "%s\\n" "$said" >&2; exit 1;; esac')
PLAIN_MARK = 'printf "\\nbtrfs-backup-ng wire 1\\n"; '
# Others choose names, line breaks in them, too; so what holds any is kept apart by NUL, which no name can hold.
PLAIN_LINKS = (  # each link on a way and on those that links lead to; the kernel follows 40 as well
    'links() ( d="$1"; while [ "$d" != / ] && [ "$d" != . ]; do if [ -L "$d" ]; then '
    '[ "$2" -lt 41 ] || { echo "too many links" >&2; exit 1; }; '
    'stat -c "%u %n" "$d" && printf "\\0" && t=$(readlink "$d") || exit 1; '
    'case $t in /*) ;; *) t="$(dirname "$d")/$t";; esac; links "$t" $(($2 + 1)) || exit 1; fi; '
    'd=$(dirname "$d"); done ); ')
PLAIN_LOOK = (
    PLAIN_LINKS +
    'k=missing; if [ -e "$a0" ] || [ -L "$a0" ]; then k=other; fi; if [ -d "$a0" ]; then k=folder; fi; '
    'g="$a0"; until [ -d "$g" ]; do g=$(dirname "$g"); done; r="${a0#"$g"}"; g=$(cd -P "$g" && pwd -P) || exit 1; '
    't="$g"; until [ "$(stat -c %i "$t")" = 256 ] || [ "$t" = / ]; do t=$(dirname "$t"); done; '
    'w=no; if [ -w "$g" ]; then w=yes; fi; '
    'printf "kind: %s\\nground: %s\\nrest: %s\\ntop: %s\\nwritable: %s\\n\\0" "$k" "$g" "$r" "$t" "$w"; '
    'echo "user: $(id -u) $(id -g) ${SUDO_UID:-0}"; d="$g"; while stat -c "way: %u %g %f %n" "$d" || exit 1; do '
    'if [ "$d" = / ]; then break; fi; d=$(dirname "$d"); done; '
    'printf "\\0"; links "$a0" 0 || exit 1; printf "\\0"; '
    'if [ "$(stat -f -c %t "$g")" = 9123683e ]; then btrfs subvolume show "$t"; printf "\\0"; '
    'for f in /sys/fs/btrfs/*/devices/*; do echo "$f $(cat "$f/dm/name" 2>&1)"; done; '
    'printf "\\0"; cat /proc/self/mountinfo; fi')
PLAIN_LIST = (
    'cd "$a0" || exit 1; g=$(pwd -P); t="$g"; '
    'until [ "$(stat -c %i "$t")" = 256 ] || [ "$t" = / ]; do t=$(dirname "$t"); done; '
    'i=$(btrfs inspect-internal rootid "$t") || exit 1; p=; '
    'if [ "$i" -gt 5 ]; then p=$(btrfs inspect-internal subvolid-resolve "$i" "$t") || exit 1; fi; '
    'printf "own: %s\\nrest: %s\\n\\0" "$p" "${g#"$t"}"; '
    'btrfs subvolume list -o -c -u -q -R "$g" || exit 1; printf "\\0"; '
    'btrfs subvolume list -o -c -u -q -R -r "$g" || exit 1; printf "\\0"; '
    'find . ! -name . -prune -inum 256 -print0 || exit 1; printf "\\0"; find . ! -name . -prune -print0')
PLAIN_ROW = re.compile(r"^ID ([0-9]+) gen ([0-9]+) cgen ([0-9]+) top level [0-9]+ parent_uuid (\S+) +"
                       r"received_uuid (\S+) +uuid (\S+) path (.*)$", re.MULTILINE)


def parse_plain_way(text: str, links: Sequence[str], is_ground: bool) -> Tuple[Tuple[str, str], ...]:
    """What others may change on the way that PLAIN_LOOK has gone up, as `LocalHost.exposed`, but for ACLs.

    BackupError where one of `links` is another's.

    >>> way = ("user: 0 0 0\\nway: 0 0 41c0 /home/a/b\\nway: 7 7 41ed /home/a\\n"
    ...        "way: 0 0 43ff /home\\nway: 0 0 41ed /\\n")
    >>> parse_plain_way(way, (), False)
    (('/home', 'can be written by others'), ('/home/a', 'belongs to user 7'))
    """
    runs = re.match(r"user: ([0-9]+) ([0-9]+) ([0-9]+)$", text, re.MULTILINE)
    found = re.findall(r"^way: ([0-9]+) ([0-9]+) ([0-9a-f]+) (/.*)$", text, re.MULTILINE)
    steps = [(path, os.stat_result((int(mode, 16), 0, 0, 0, int(uid), int(gid), 0, 0, 0, 0)))
             for uid, gid, mode, path in reversed(found)]
    if runs is None or not steps:
        raise ValueError("it does not say whose the folders are")
    user, group, behind_sudo = map(int, runs.groups())
    for owner, path in (link.split(" ", 1) for link in links):
        if int(owner) not in (0, user, behind_sudo):
            raise BackupError("{} is a link of another user's".format(path.rstrip("\n")),
                              "name the folder that is meant")
    return tuple(exposed_steps(steps + steps[:1] if is_ground else steps, (user, group)))


def parse_plain_look(text: str) -> Place:
    """A place from the output of PLAIN_LOOK."""
    here, way, *more = text.split("\0")
    links, below = more[:more.index("")], more[more.index("") + 1:]
    facts = dict(re.findall(r"^(kind|ground|rest|top|writable): (.*)$", here, re.MULTILINE))
    path = os.path.join(facts["ground"], facts["rest"].strip("/")).rstrip("/") or "/"
    exposed = parse_plain_way(way, links, facts["kind"] == "missing")
    if facts["kind"] == "other" or len(below) < 3:
        return Place(path, facts["kind"])
    show, devices, mounts = below
    mount = mount_around(facts["ground"], parse_mountinfo(mounts))
    names = {os.path.basename(mount.device)} if mount else set()
    found = re.findall(r"^/sys/fs/btrfs/([^/]+)/devices/(\S+) ?(.*)$", devices, re.MULTILINE)
    filesystem = next((uuid for uuid, name, mapped in found if names & {name, mapped}), mount.device if mount else None)
    return Place(path, facts["kind"], filesystem, parse_subvolume_show(show, os.path.basename(facts["top"])),
                 facts["kind"] == "folder" and facts["top"] == facts["ground"], facts["writable"] == "no",
                 exposed=exposed)


def parse_plain_list(text: str) -> Listing:
    """A listing from the output of PLAIN_LIST: of what is in the folder, each with the one row that there is of it.

    A path of another's elsewhere in the subvolume can end in what looks like a row; BackupError where it takes the
    place of something that is here.
    """
    head, rows, sealed, *more = text.split("\0")
    facts = dict(re.findall(r"^(own|rest): (.*)$", head, re.MULTILINE))
    prefix = "/".join(part for part in (facts["own"], facts["rest"].strip("/")) if part)
    prefix = prefix + "/" if prefix else ""
    tops = {name[len("./"):] for name in more[:more.index("")]}
    readonly = {row.group() for row in PLAIN_ROW.finditer(sealed)}
    subvolumes: Dict[str, Subvolume] = {}
    for row in PLAIN_ROW.finditer(rows):
        name = row.group(7)[len(prefix):]
        if not row.group(7).startswith(prefix) or name not in tops:
            continue
        if name in subvolumes:
            raise BackupError("cannot tell which of two subvolumes is {}{}".format(prefix, name),
                              "look for one with a line break in its path: btrfs subvolume list -o")
        parent, received, uuid = (None if found == "-" else found for found in row.group(4, 5, 6))
        subvolumes[name] = Subvolume(name, uuid, parent, received, row.group() in readonly, 0, int(row.group(3)),
                                     int(row.group(1)), int(row.group(2)))
    names = (name[len("./"):] for name in more[more.index("") + 1:] if name)
    return Listing(tuple(subvolumes.values()), frozenset(name for name in names if name not in subvolumes))


class NotMeasured:
    """Stands where a size cannot be known."""

    meter = SendSize()

    def end(self) -> None:
        """Nothing is under way."""


class ShellHost:
    """A host without Python: what plain commands can do of a host's calls."""

    def __init__(self, connector: SshConnector, events: Events, patience: float = float("inf")) -> None:
        """patience: seconds for which nothing may come while a command is at work."""
        self.connector, self.events, self.machine = connector, events, connector.endpoint.machine
        self.patience = patience
        self.master = Stage(self.argv("exec cat > /dev/null", (), is_first=True), subprocess.PIPE, subprocess.DEVNULL)
        try:
            connector.await_master(self.master)
            facts = self.run("uname -n; btrfs --version || exit 1; "
                             "cat /sys/fs/btrfs/features/send_stream_version 2>&1; exit 0", (), "cannot begin")
        except BaseException:
            self.end()
            raise
        self.nodename, version, *protocol = facts.splitlines() + [""] * (2 - len(facts.splitlines()))
        if not self.nodename or not is_file_name(self.nodename):
            raise Nonsense("{} has no name".format(self.machine))
        self.progs = parse_version(version)
        self.protocol = int(protocol[0]) if protocol and re.fullmatch("[0-9]{1,9}", protocol[0]) else 1

    # -- commands

    def argv(self, script: str, arguments: Sequence[str], is_first: bool = False) -> List[str]:
        sudo = "sudo -n " if self.connector.options.sudo else ""
        return self.connector.argv(is_first) + [sudo + shell_command(script, arguments)]

    def run(self, script: str, arguments: Sequence[str], doing: str, data: bytes = b"") -> str:
        """What a script prints there; BackupError 'DOING: its last words' where it fails."""
        begun = time.monotonic()
        process = start_program(self.argv(PLAIN_MARK + script, arguments), subprocess.PIPE, subprocess.PIPE)
        try:
            out, words = Conversation(process, data, LARGEST_FRAME, self.patience).run()
        except BackupError as error:
            raise type(error)("{}: {} {}".format(doing, self.machine, error.message)) from None
        self.events.debug("command", "{}: ran a script ({:.3f} s): {}".format(
            self.machine, time.monotonic() - begun, script))
        if process.returncode != 0:
            raise self.explained(program_error(doing, os.fsdecode(words).strip(), process.returncode),
                                 process.returncode)
        _, mark, said = (b"\n" + out).partition(MARKER)
        if not mark:
            raise BackupError("{}: {} does not answer as sh does".format(doing, self.machine),
                              "is its login shell restricted?")
        return os.fsdecode(said)

    def explained(self, error: BackupError, status: int) -> BackupError:
        """The same error, with what an exit status of ssh's own and its words mean, which are few by a shared way."""
        words = error.message + "\n" + error.detail
        if status == SSH_FAILED and any(re.search(sign, words) for sign, _, _ in ssh_hints(self.machine)):
            return no_agent_error(self.machine, status, words, "")
        if status == SSH_FAILED:
            return ConnectionLost("the connection to {} was lost".format(self.machine), "", error.detail)
        if re.search(r"btrfs: *(command )?not found", words):
            return BackupError("{}: the program btrfs is not installed there".format(self.machine),
                               "install the package {}".format(PACKAGES["btrfs"]))
        return error

    def end(self) -> None:
        self.master.process.stdin.close()  # type: ignore[union-attr]
        self.master.end()

    def __getattr__(self, name: str) -> Any:
        if name not in CALLS:
            raise AttributeError(name)
        raise Refused("{} has no Python that could do that: {}".format(self.machine, name.replace("_", " ")),
                      "install Python 3.6 or later there")

    # -- the calls of a host, as far as they go

    def name(self) -> str:
        return self.nodename

    def capabilities(self) -> Capabilities:
        return Capabilities(self.protocol >= 2 and self.progs >= (5, 19), self.progs >= (6, 2), self.progs)

    def understood(self, parse: Callable[[str], Any], text: str) -> Any:
        """What `parse` makes of the words of this host; Nonsense where that cannot be."""
        try:
            return check_values(parse(text))
        except FORMAT_ERRORS as error:
            raise Nonsense("{} makes no sense: {:.200}".format(self.machine, str(error))) from None

    def look(self, path: str) -> Place:
        return self.understood(parse_plain_look, self.run(PLAIN_LOOK, (path,), "cannot look at {}".format(path)))

    def list(self, folder: str) -> Listing:
        return self.understood(parse_plain_list, self.run(PLAIN_LIST, (folder,), "cannot list {}".format(folder)))

    def make_folder(self, path: str) -> None:
        self.run('mkdir -p -m 700 "$a0"', (path,), "cannot make the folder {}".format(path))

    def snapshot(self, source: str, folder: str, name: str) -> Subvolume:
        path = os.path.join(folder, name)
        text = self.run('btrfs subvolume snapshot -r "$a0" "$a1" >&2 && btrfs subvolume show "$a1"', (source, path),
                        "cannot take a snapshot of {}".format(source))
        return self.understood(lambda text: parse_subvolume_show(text, name), text)

    def delete(self, folder: str, doomed: Sequence[Subvolume], convert_rw: bool) -> List[BackupError]:
        """Deletes subvolumes of `folder` that still are what they were planned as; an error for each not gone."""
        errors = []
        writable = "writable" if convert_rw else ""
        for subvolume in doomed:
            path = os.path.join(folder, subvolume.name)
            try:
                self.run(PLAIN_DELETE, (path, str(subvolume.subvolid), subvolume.uuid or "-", writable),
                         "cannot delete {}".format(path))
            except BackupError as error:
                errors.append(error)
        if doomed:
            self.run('btrfs filesystem sync "$a0"', (folder,), "cannot sync {}".format(folder))
        return errors

    def subvolume(self, path: str, name: str) -> Subvolume:
        text = self.run('btrfs subvolume show "$a0"', (path,), "cannot look at {}".format(path))
        return self.understood(lambda text: parse_subvolume_show(text, name), text)

    def wait_for_cleaning(self, folder: str) -> None:
        self.run(PLAIN_SYNC, (folder,), "cannot wait for deleted subvolumes of {}".format(folder))

    @contextlib.contextmanager
    def hold(self, folder: str, prefix: str, wait: float) -> Iterator[None]:
        """Nothing is held: a lock of the kernel's would end with the command that takes it."""
        yield

    def read_state(self, folder: str, name: str, parse: Callable[[str], Any]) -> Any:
        path = os.path.join(folder, name)
        found, _, text = self.run(PLAIN_READ, (path,), "cannot read {}".format(path)).partition("\n")
        return parse_state(path, text, parse) if found else {}

    def replace_state(self, folder: str, name: str, text: str) -> None:
        path = os.path.join(folder, name)
        data = text.encode("utf-8", "surrogateescape")
        self.run(PLAIN_REPLACE, (path, str(len(data))), "cannot write {}".format(path), data)

    def read_locks(self, folder: str) -> Locks:
        return self.read_state(folder, LOCK_FILE, parse_locks)

    def change_locks(self, folder: str, add: Sequence[LockChange], clear: Sequence[LockChange]) -> Locks:
        before = self.read_locks(folder)
        after = clear_locks(add_locks(before, add), clear)
        if after != before:
            self.replace_state(folder, LOCK_FILE, format_locks(after))
        return after

    def read_pins(self, folder: str) -> Pins:
        return self.read_state(folder, PIN_FILE, parse_pins)

    def prove_writable(self, folder: str) -> None:
        """What cannot be written is seen only when it is."""

    def change_pins(self, folder: str, prefix: str, pins: Dict[str, Optional[Pin]]) -> None:
        before = self.read_pins(folder)
        after = changed_pins(before, prefix, pins)
        if after != before:
            self.replace_state(folder, PIN_FILE, format_pins(after))

    def read_notes(self, folder: str, prefix: str) -> FolderNotes:
        pins = self.read_pins(folder)
        return FolderNotes(self.read_state(folder, source_note_name(prefix), parse_sources) or (),
                           own_locks(self.read_locks(folder), prefix),
                           {key: entry[prefix] for key, entry in pins.items() if prefix in entry})

    def claim(self, folder: str, claim: Claim) -> None:
        name, listing = source_note_name(claim.prefix), self.list(folder)
        check_claim(folder, claim, self.read_state(folder, name, parse_sources) or (),
                    [s.name for s in listing.subvolumes])
        self.replace_state(folder, name, format_sources(claim.after))

    # -- streams

    def expected_stream(self, folder: str, snapshot: Subvolume, parent: Optional[Subvolume]) -> ExpectedStream:
        path = os.path.join(folder, snapshot.name)
        text = self.run('stat -c "%u %g %a" "$a0"', (path,), "cannot look at {}".format(path))

        def parse(text: str) -> ExpectedStream:
            uid, gid, mode = text.split()
            return ExpectedStream(snapshot.name, snapshot.stream_id or "", parent.stream_id if parent else None,
                                  int(uid), int(gid), int(mode, 8))

        return self.understood(parse, text)

    def open_send(self, folder: str, name: str, parent: Optional[str], options: SendOptions,
                  resume: Optional[ResumePoint] = None) -> PlainSender:
        """`btrfs send` there, its stream here, from where a partial goes on."""
        flags = ("-vv " if options.debug else "") + ("--no-data " if options.no_data else "")
        flags += "--proto 2 --compressed-data " if options.compressed and not options.no_data else ""
        onto, arguments = "", [os.path.join(folder, name)]
        if parent is not None:
            onto = '-p "$a1" '
            arguments.append(os.path.join(folder, parent))
        sender = PlainSender(self.argv(PLAIN_MARK + "exec btrfs send " + flags + onto + '"$a0"', arguments),
                             self.explained)
        if resume is not None:
            try:
                sender.skip(resume, SkipReport(self.events, name, resume.offset))
            except BaseException:
                sender.end()
                raise
        return sender

    def open_receive(self, folder: str, expected: ExpectedStream, debug: bool, begin: str) -> PlainReceiver:
        """`btrfs receive` there, fed from here with a stream that may hold anything; it always begins anew."""
        base = self.base_name(folder, expected)
        return self.receiver(folder, expected, debug, StreamGate(expected, self.hazards(folder, base)))

    def open_own_receive(self, folder: str, expected: ExpectedStream, debug: bool, _: str) -> PlainReceiver:
        """The same for a stream that this machine's kernel writes."""
        return self.receiver(folder, expected, debug, None)

    def receiver(self, folder: str, expected: ExpectedStream, debug: bool, gate: Optional[StreamGate]) -> PlainReceiver:
        listing = self.list(folder)
        if listing.named(expected.name) is not None or expected.name in listing.others:
            raise ReceiverFailed("{} exists at {}".format(expected.name, folder))
        left = [s for s in listing.subvolumes if partial_of(s.name) == expected.name]
        for error in self.delete(folder, left, False) if left else ():
            raise error
        base = self.base_name(folder, expected)
        ground = Ground(expected.base is None or self.is_sole(folder, expected),
                        self.read_default_acl(folder, base) if base else None, keeps_capabilities(self.progs))
        flags = "-vv " if debug else ""
        return PlainReceiver(self, folder, IncomingStream(expected, ground, gate),
                             self.argv('exec btrfs receive ' + flags + '"$a0"', (folder,)))

    def base_name(self, folder: str, expected: ExpectedStream) -> Optional[str]:
        """What the parent's backup is called in `folder`; None where there is no parent, or it is elsewhere."""
        found = [s.name for s in self.list(folder).subvolumes if s.uuid == expected.base] if expected.base else []
        return found[0] if found else None

    def read_default_acl(self, folder: str, name: str) -> Optional[str]:
        """As hex; None where there is none, or no getfattr to tell."""
        said = self.run('command -v getfattr > /dev/null || exit 0; '
                        'getfattr -h -n system.posix_acl_default -e hex "$a0" 2> /dev/null || true',
                        (os.path.join(folder, name),), "cannot look at {}".format(name))
        found = re.search("^system.posix_acl_default=0x((?:[0-9a-f]{2})+)$", said, re.MULTILINE)
        return found.group(1) if found else None

    def hazards(self, folder: str, base: Optional[str]) -> Hazards:
        """What a stream must not go through; nothing there keeps `btrfs receive` from that."""
        found: List[Hazard] = []
        for kind, types in ((A_LINK, "l"), (SPECIAL, "b c p s")) if base is not None else ():
            said = self.run('cd "$a0" && for t in ' + types + '; do find . -type $t -print0 || exit 1; done',
                            (os.path.join(folder, base or ""),), "cannot look at {}".format(base))
            found += [(os.fsencode(path)[2:], kind) for path in said.split("\0") if path]
        return Hazards(found, found)

    def is_sole(self, folder: str, expected: ExpectedStream) -> bool:
        """Whether the base is the only subvolume on the filesystem with its received UUID."""
        rows = self.run('btrfs subvolume list -u -R "$a0"', (folder,), "cannot list {}".format(folder))
        return re.findall(r" received_uuid {} +uuid (\S+) ".format(expected.parent_uuid), rows) == [expected.base]

    def complete(self, folder: str, expected: ExpectedStream) -> Subvolume:
        """The backup of a receive that has ended well, seen complete, durable and named."""
        partial = partial_name(expected.name)
        found = self.subvolume(os.path.join(folder, partial), partial)
        if not found.readonly or found.received_uuid != expected.uuid:
            raise ReceiverFailed("btrfs receive left {} incomplete though it reported success".format(partial))
        if found.parent_uuid != expected.base:
            raise ReceiverFailed("{} was received on another parent (UUID {}) than planned (UUID {})".format(
                partial, found.parent_uuid, expected.base), "-I sends in full")
        self.run('btrfs filesystem sync "$a0" || exit 1; ' + PLAIN_WRITTEN +
                 'if [ -e "$a2" ]; then echo "it has appeared meanwhile" >&2; exit 1; fi; '
                 'mv "$a1" "$a2" && btrfs filesystem sync "$a0"',
                 (folder, os.path.join(folder, partial), os.path.join(folder, expected.name)),
                 "cannot rename {}".format(partial))
        return found._replace(name=expected.name)

    def measured(self, folder: str, name: str, parent: Optional[str]) -> SendSize:
        """What a send will weigh, once it was measured to its end."""
        sender = self.open_send(folder, name, parent, SendOptions(no_data=True))
        meter, buffer = SizeMeter(), memoryview(bytearray(PIPE_SIZE))
        try:
            for got in iter(lambda: sender.read(buffer), 0):
                if got is None:
                    sender.wait_readable(CHANNEL_NAP)
                else:
                    meter.feed(bytes(buffer[:got]))
            sender.finish(ENDING_GRACE)
        finally:
            sender.end()
        return SendSize(meter.stream_size, meter.file_data, meter.ended)

    def measure_send(self, folder: str, name: str, parent: Optional[str]) -> Any:
        """A measuring that never ends: what is to come stays unknown."""
        return NotMeasured()

    def data_since(self, path: str, generation: int) -> int:
        """Bytes of data in extents of the subvolume at `path` written after `generation`; an estimate of a send."""
        return parse_find_new(self.run('btrfs subvolume find-new "$a0" {}'.format(generation), (path,),
                                       "cannot look for changes in {}".format(path)))

    def settle_partials(self, folder: str, names: Dict[str, str]) -> List[str]:
        """None: what a former run has lost cannot be seen here, and ends by itself once its partial is deleted."""
        return []

    def forget_partials(self, folder: str, names: Sequence[str]) -> List[BackupError]:
        """Nothing: there are no records."""
        return []


########################################################################################################
# HOSTS: the hosts of a run
#
# Each machine is reached once; one that cannot be is not tried again.
########################################################################################################


class Hosts:
    """The hosts of a run by machine: each is reached once."""

    def __init__(self, task: Task, events: Events, share: Optional[Share] = None) -> None:
        self.task, self.events, self.share = task, events, share
        self.known: Dict[str, Any] = {}
        self.errors: Dict[str, BackupError] = {}
        self.stack = contextlib.ExitStack()

    def of(self, endpoint: Endpoint) -> Any:
        """The host of an endpoint; BackupError where it cannot be reached, which is tried once."""
        machine = endpoint.machine
        if machine in self.errors:
            raise self.errors[machine]
        if machine not in self.known:
            try:
                self.known[machine] = self.reach(endpoint) if machine else LocalHost(self.events)
            except Exception as error:
                self.errors[machine] = explain(error, "cannot reach {}".format(machine))
                raise self.errors[machine] from None
        host = self.known[machine]
        return self.raw_place(host) if endpoint.kind.has_streams else host

    def raw_place(self, host: Any) -> RawPlace:
        steps = [step for step in (self.task.raw_compress, self.task.raw_encrypt) if step]
        identity = self.task.raw_identity or ""
        if identity and not os.path.exists(identity):
            raise BackupError("no such file: {}".format(identity), "--raw-identity takes the file that holds age's key")
        return RawPlace(host, steps, identity)

    def reach(self, endpoint: Endpoint) -> Any:
        connector = SshConnector(endpoint, SshOptions(self.task.ssh_options, self.task.ssh_sudo), self.events,
                                 self.share)
        self.stack.callback(connector.end)
        try:
            host: Any = AgentHost(endpoint.machine, connector, self.events, self.task.compress, self.task.stall_timeout)
        except NoPython as error:
            host = ShellHost(connector, self.events, self.task.stall_timeout)
            self.events.warning("plain", "{}: plain commands do the main job there; nothing is resumed or verified, "
                                "and another machine's run is not kept away".format(error.message))
        self.stack.callback(host.end)
        return host

    def end(self) -> None:
        """Ends all connections."""
        self.stack.close()


########################################################################################################
# PART VIII THE VERBS: what the program is asked to do
########################################################################################################


########################################################################################################
# DELIVERY: one snapshot to its destinations, through as many relays as it takes
#
# Receivers say how far their partials have come; those that go on at the same place, or from the start,
# share one send. What breaks for a reason that does not last is taken up after a pause, from the window of a
# relay that still runs or by a further send, which skips what has arrived after it was proven to be the same.
# A lane that was too slow for the others, or goes on elsewhere, gets a send of its own. Never: a stream that
# goes on from a partial which it does not fit; then the transfer starts over, and says so.
########################################################################################################

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds between a break and the next try; twice as long each time
TAKE_UP, ANEW, IN_ONE_PIECE = "take up", "anew", "in one piece"


class Target(NamedTuple):
    """Where a snapshot goes: a folder of a host. base: UUID of its parent's backup there; begin: see open_receive."""

    key: str
    text: str
    host: Any
    folder: str
    base: Optional[str]
    begin: str


class Shipment(NamedTuple):
    """What is sent, and from where."""

    host: Any
    folder: str
    snapshot: Subvolume
    parent: Optional[Subvolume]
    options: SendOptions

    @property
    def parent_name(self) -> Optional[str]:
        return self.parent.name if self.parent else None


def planned_stream(shipment: Shipment, told: ExpectedStream) -> ExpectedStream:
    """What the stream of a shipment must say: names and ids as planned here, only the rest as the source tells it."""
    snapshot, parent = shipment.snapshot, shipment.parent
    expected = told._replace(name=snapshot.name, uuid=snapshot.stream_id or "", base=None, otime=snapshot.otime,
                             parent_uuid=parent.stream_id if parent else None,
                             parent_name=parent.name if parent else None, compressed=shipment.options.compressed)
    check_expected(expected)
    return expected


class Terms(NamedTuple):
    """How hard it is tried. limit: bytes a second for each destination, 0 for none."""

    stall_timeout: float
    retries: int
    resume: bool
    limit: float


class Delivered(NamedTuple):
    """What became of one destination's part; the error is the source's own where `at_source`."""

    backup: Optional[Subvolume]
    error: Optional[BackupError]
    figures: Figures
    seconds: float
    at_source: bool = False


class Tries:
    """How often one destination may still be tried again, and how soon."""

    def __init__(self, retries: int) -> None:
        self.retries = self.left = retries
        self.pause, self.furthest = FIRST_PAUSE, 0

    def next_pause(self, position: int) -> Optional[float]:
        """Seconds to wait after a break at an offset of the stream; None where it is given up."""
        if self.left <= 0:
            return None
        self.left -= 1
        self.pause = FIRST_PAUSE if position > self.furthest else min(2 * self.pause, LONGEST_PAUSE)
        self.furthest = max(self.furthest, position)
        return self.pause


class ProgressOf:
    """Tells the progress of one delivery as events; measures beside it what is to come."""

    def __init__(self, shipment: Shipment, targets: Dict[str, Target], events: Events) -> None:
        self.shipment, self.events = shipment, events
        self.texts = {key: target.text for key, target in targets.items()}
        self.is_wanted = events.want_progress
        self.measuring: Any = None
        self.recent: Dict[str, "collections.deque[Tuple[float, int]]"] = {
            key: collections.deque(maxlen=25) for key in targets}

    def __enter__(self) -> "ProgressOf":
        shipment = self.shipment
        if self.is_wanted:
            with apart(self.events, lambda error: self.events.debug("measuring", format_error(error)), "measuring"):
                self.measuring = shipment.host.measure_send(
                    shipment.folder, shipment.snapshot.name, shipment.parent_name)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.measuring is not None:
            self.measuring.end()
            self.events.emit("progress", "progress")

    def tell(self, key: str, position: int, file_data: int) -> None:
        """position: bytes of stream so far; file_data: bytes of file contents so far."""
        if self.measuring is None:
            return
        meter = self.measuring.meter
        done, expected = ((file_data, meter.file_data) if self.shipment.options.compressed
                          else (position, meter.stream_size))
        now, recent = time.monotonic(), self.recent[key]
        recent.append((now, done))
        elapsed = now - recent[0][0]
        self.events.emit("progress", "progress", snapshot=self.shipment.snapshot.name, destination=self.texts[key],
                         done=done, expected=expected if meter.ended else None,
                         rate=max(0.0, (done - recent[0][1]) / elapsed) if elapsed > 0 else 0.0)


class Delivery:
    """One snapshot on its way to some destinations."""

    def __init__(self, shipment: Shipment, targets: Sequence[Target], terms: Terms, events: Events) -> None:
        self.shipment, self.terms, self.events = shipment, terms, events
        self.targets = {target.key: target for target in targets}
        self.tries = {target.key: Tries(terms.retries) for target in targets}
        self.figures = {target.key: Figures() for target in targets}
        self.done: Dict[str, Delivered] = {}
        self.pause = 0.0  # before the next round
        self.begun = time.monotonic()

    def run(self) -> Dict[str, Delivered]:
        with ProgressOf(self.shipment, self.targets, self.events) as self.progress:
            while len(self.done) < len(self.targets):
                time.sleep(self.pause)
                self.pause = 0.0
                self.go_round([key for key in self.targets if key not in self.done])
        return self.done

    def go_round(self, keys: Sequence[str]) -> None:
        """One send to as many of the destinations as can share it."""
        shipment = self.shipment
        try:
            self.expected = planned_stream(
                shipment, shipment.host.expected_stream(shipment.folder, shipment.snapshot, shipment.parent))
        except Exception as error:
            self.fail_at_source(keys, error, 0)
            return
        with contextlib.ExitStack() as stack:
            opened: Dict[str, Receiver] = {}
            for key in keys:
                with apart(self.events, functools.partial(self.fail, key, position=0), "cannot receive"):
                    receiver = self.open(self.targets[key])
                    stack.callback(self.close, key, receiver)
                    if receiver.resume is not None and receiver.resume.complete:
                        self.book(key, receiver.finish(self.terms.stall_timeout))
                    else:
                        opened[key] = receiver
            if opened:
                self.send(*self.sharing(opened))

    def close(self, key: str, receiver: Receiver) -> None:
        """What goes wrong when all is over changes nothing of what came out."""
        with apart(self.events, lambda error: self.events.debug("end", format_error(error), destination=key), "ending"):
            receiver.end()

    def open(self, target: Target) -> Receiver:
        open_receive = target.host.open_receive
        if isinstance(self.shipment.host, LocalHost):  # this machine's kernel writes it
            open_receive = getattr(target.host, "open_own_receive", open_receive)
        expected = self.expected._replace(base=target.base)
        receiver: Receiver = open_receive(target.folder, expected, self.shipment.options.debug, target.begin)
        resume = receiver.resume
        if resume is not None:
            self.events.info("taking-up", "taking up {} to {} at {}".format(
                self.expected.name, target.text, format_size(resume.offset)),
                snapshot=self.expected.name, destination=target.key, offset=resume.offset)
        if self.progress.is_wanted and self.shipment.options.compressed:
            receiver.count_file_data()
        return receiver

    def sharing(self, opened: Dict[str, Receiver]) -> Tuple[Dict[str, Receiver], Optional[ResumePoint]]:
        """Receivers that one send can serve, and where that begins; None is its start."""
        points = {key: receiver.resume or BEGINNING for key, receiver in opened.items()}
        distinct = {point.marks for point in points.values()}
        host = self.shipment.host
        if () in distinct or not getattr(host, "skips", False) or (len(distinct) > 1 and not host.machine):
            return opened, None
        marks = next(iter(distinct))
        return ({key: receiver for key, receiver in opened.items() if points[key].marks == marks},
                next(point for point in points.values() if point.marks == marks))

    def send(self, lanes: Dict[str, Receiver], resume: Optional[ResumePoint]) -> None:
        shipment = self.shipment
        try:
            sender = shipment.host.open_send(shipment.folder, shipment.snapshot.name, shipment.parent_name,
                                             shipment.options, *([resume] if resume else []))
        except Exception as error:
            self.fail_at_source(list(lanes), error, resume.offset if resume else 0)
            return
        relayed = Relay(sender, lanes, self.terms.stall_timeout, lambda size, file_data: None,
                        Manner(self.terms.limit, self.reopen, self.progress.tell)).run()
        for key in lanes:
            self.figures[key] = self.figures[key].plus(relayed.figures[key])
        for key, backup in relayed.backups.items():
            self.book(key, backup)
        for key, reason in relayed.postponed.items():
            self.targets[key] = self.later(self.targets[key])
            self.events.info("by-itself", "sending {} to {} by itself: {}".format(
                self.expected.name, self.targets[key].text, reason), destination=key)
        for key, broken in relayed.errors.items():
            self.fail(key, broken, relayed.figures[key].sent, at_source=broken is relayed.source_error)

    def book(self, key: str, backup: Optional[Subvolume], error: Optional[BackupError] = None,
             at_source: bool = False) -> None:
        self.done[key] = Delivered(backup, error, self.figures[key], time.monotonic() - self.begun, at_source)

    # -- what breaks

    def later(self, target: Target) -> Target:
        """The target for a further try."""
        return target if target.begin == IN_ONE_PIECE else target._replace(begin=TAKE_UP if self.terms.resume else ANEW)

    def fail_at_source(self, keys: Sequence[str], error: Exception, position: int) -> None:
        for key in keys:
            self.fail(key, explain(error, "cannot send"), position, at_source=True)

    def fail(self, key: str, error: BackupError, position: int, at_source: bool = False) -> None:
        """Plans another try, or gives up."""
        if isinstance(error, (StreamDiffers, NoPieces)) and self.targets[key].begin != IN_ONE_PIECE:
            begin = ANEW if isinstance(error, StreamDiffers) else IN_ONE_PIECE
            self.targets[key] = self.targets[key]._replace(begin=begin)
            self.events.warning("starting-over", "sending {} to {} starts over: {}".format(
                self.shipment.snapshot.name, self.targets[key].text, error.message), destination=key)
            return
        pause = self.pause_after(key, error, position)
        if pause is None:
            self.book(key, None, error, at_source)
        else:
            self.pause = max(self.pause, pause)
            self.targets[key] = self.later(self.targets[key])

    def pause_after(self, key: str, error: BackupError, position: int) -> Optional[float]:
        """Seconds to wait before the next try, which is announced; None where there will be none."""
        tries = self.tries[key]
        pause = tries.next_pause(position) if error.transient else None
        if pause is not None:
            self.events.warning("broken", "sending {} to {} broke off: {}; trying again in {} ({} of {})".format(
                self.shipment.snapshot.name, self.targets[key].text, error.message, format_duration(pause),
                tries.retries - tries.left, tries.retries), snapshot=self.shipment.snapshot.name, destination=key)
        return pause

    def reopen(self, key: str, error: BackupError, position: int) -> Optional[Tuple[float, Callable[[], Receiver]]]:
        """What a relay that still runs does about a lane that broke."""
        pause = self.pause_after(key, error, position)
        if pause is None:
            return None
        self.targets[key] = self.later(self.targets[key])
        return pause, functools.partial(self.open, self.targets[key])


########################################################################################################
# DESTINATIONS: where backups go in this run, and whether they may
#
# A destination is known by an id in notes, which says its machine and folder. What speaks against writing there is
# found before anything is written, first what explains the rest.
########################################################################################################


def folder_key(kind: Kind, machine: str, path: str) -> str:
    """What locks and pins call the folder `path` on a machine; '' is this one."""
    scheme = kind.on_host if machine else kind.here
    return scheme + "://" * bool(scheme) + machine + path


def destination_key(text: str, pulled: bool = False) -> str:
    """The normalised id of a destination, which locks and pins name it by; what is none stays as it is.

    pulled: the notes are kept on another machine, where a path alone would name a place of that one.
    """
    try:
        endpoint = parse_endpoint(text)
    except UsageError:
        return normal_destination(text)
    if not endpoint.kind.has_folder:
        return endpoint.text
    path = normal_destination(endpoint.path) if endpoint.login else os.path.realpath(endpoint.path)
    machine = endpoint.machine or (os.uname().nodename if pulled else "")
    return folder_key(endpoint.kind, machine, path)


def prefix_key(task: Task) -> str:
    """What stands for the prefix of a task before its source was reached."""
    machine = parse_endpoint(task.source).machine
    if task.prefix is not None:
        return task.prefix
    return "/ of " + machine if machine else os.uname().nodename + "-"  # no prefix holds a slash


def claims_of(task: Task) -> Tuple[str, Dict[str, str]]:
    """The id of a task's snapshots before anything is looked at, and the folders that they fill, with their names."""
    source = parse_endpoint(task.source)
    snapshots = os.path.join(source.path, task.snapshot_folder)
    snapshots = source.machine + (os.path.normpath(snapshots) if source.login else os.path.realpath(snapshots))
    folders = {destination_key(text): "destination {}".format(text) for text in task.destinations
               if parse_endpoint(text).kind.has_folder}  # a command gets names, and decides itself
    folders["snapshots " + snapshots] = "snapshot folder {}".format(task.snapshot_folder)
    return destination_key(task.source) + " " + snapshots, folders


def check_together(tasks: Sequence[Task]) -> None:
    """UsageError where tasks of one command would put snapshots of two sources under one prefix into one folder."""
    claimed: Dict[Tuple[str, str], Tuple[str, int, str]] = {}
    for number, task in enumerate(tasks, 1):
        source, folders = claims_of(task)
        for key, name in folders.items():
            whose, first, text = claimed.setdefault((key, prefix_key(task)), (source, number, task.source))
            if whose != source:
                raise UsageError(
                    "tasks {} and {}: {} and {} cannot share {} and a prefix: each would take the other's for its "
                    "own, and delete them".format(first, number, printable(text), printable(task.source),
                                                  printable(name)),
                    "give each a prefix of its own with -p, or a folder of its own")


class Grounds(NamedTuple):
    """What a destination is judged by: its folder, the source's, and whether it lay elsewhere before."""

    place: Place
    source: Place
    snapshots: Place  # the snapshot folder
    any_filesystem: bool  # --skip-fs-checks
    moved: str  # where it was seen on other filesystems than this, and never on this, what to type if that is right

    @property
    def is_sources(self) -> bool:
        """Whether both are on one filesystem."""
        return self.place.filesystem == self.source.filesystem

    @property
    def is_in_source(self) -> bool:
        inside, source = self.place.inside, self.source.inside
        return bool(self.is_sources and inside and source and inside.subvolid == source.subvolid)

    def was_elsewhere(self, text: str) -> BackupError:
        return BackupError("destination {} was on another filesystem before".format(text),
                           "is it mounted? If it moved for good: " + self.moved)


class Destination:
    """One destination during a run: reachable until `error` says otherwise."""

    def __init__(self, text: str, key: str) -> None:
        self.text, self.key, self.endpoint = text, key, parse_endpoint(text)
        self.path, self.filesystem = self.endpoint.path, None  # type: str, Optional[str]
        self.host: Any = None  # once it was reached
        self.listing: Optional[Listing] = None
        self.notes = NO_NOTES
        self.whose = FREE  # as far as is known
        self.busy: FrozenSet[str] = frozenset()  # snapshots whose partials another run is writing
        self.plan = DestinationPlan()
        self.is_new = False
        self.failed = False  # something was not done as asked: nothing is deleted here
        self.closed = False  # no transfer is tried any more
        self.was_reached = False  # it was tried to

    @property
    def is_open(self) -> bool:
        return self.listing is not None and not self.closed

    def record_of(self, snapshot: str) -> Optional[Record]:
        """What the transfer of a snapshot goes on from."""
        return next((r.take_up for r in self.plan.recoveries if r.snapshot == snapshot), None)

    def look(self, hosts: Hosts) -> Place:
        """Reaches the host, and notes where the folder is."""
        self.host = hosts.of(self.endpoint)
        place: Place = self.host.look(self.endpoint.path)
        self.path, self.filesystem, self.is_new = place.path, place.filesystem, place.kind == "missing"
        return place

    def check(self, grounds: Grounds) -> None:
        """BackupError where nothing may be written there."""
        for doubt in self.doubts(grounds):
            raise doubt

    def doubts(self, grounds: Grounds) -> Iterator[BackupError]:
        """What speaks against it, first what explains the rest."""
        place = grounds.place
        if place.kind == "other":
            yield BackupError("destination {} is not a folder".format(self.text), "name a folder")
        if place.unmounted:
            yield BackupError("destination {}: nothing is mounted at {}".format(self.text, place.unmounted),
                              "mount it and run again")
        if (place.path, place.filesystem) == (grounds.snapshots.path, grounds.snapshots.filesystem):
            yield BackupError("destination {} is the snapshot folder itself".format(self.text),
                              "name a folder elsewhere")
        if grounds.is_in_source:
            yield BackupError("destination {} is inside the source".format(self.text),
                              "name a folder on another filesystem; is it mounted?")
        yield from self.doubts_of_filesystem(grounds)
        if place.readonly:
            yield BackupError("destination {} is mounted read-only".format(self.text), "mount it writable")

    def doubts_of_filesystem(self, grounds: Grounds) -> Iterator[BackupError]:
        place, no_such = grounds.place, "no such destination: " + self.text
        if place.filesystem is None and not grounds.any_filesystem:
            yield BackupError("destination {} is not on btrfs".format(self.text), "is its filesystem mounted?")
        if grounds.is_sources and place.kind == "missing":
            yield BackupError(no_such, "is its filesystem mounted? On the source's own the folder must exist")
        if grounds.is_sources and grounds.moved:
            yield grounds.was_elsewhere(self.text)
        if place.kind == "missing" and grounds.moved:
            yield BackupError(no_such + ", and its filesystem is none that it was on",
                              "is it mounted? On a new disk make the folder first")


class StreamsDestination(Destination):
    """A raw folder. Any filesystem will do, but not one that is there only because the right one is not mounted."""

    def doubts_of_filesystem(self, grounds: Grounds) -> Iterator[BackupError]:
        place, around, no_such = grounds.place, os.path.dirname(grounds.place.path), "no such destination: " + self.text
        doubtful = grounds.is_sources or place.mount == "/" or place.in_memory
        if grounds.moved and (doubtful or place.kind == "missing"):
            yield grounds.was_elsewhere(self.text)
        if place.kind == "missing" and doubtful:
            yield BackupError(no_such + ", and {} is in memory".format(place.mount) * place.in_memory,
                              "is its filesystem mounted? On the source's own and on the root filesystem and in memory "
                              "it must exist")
        if place.kind == "missing" and self.host.look(around).kind != "folder":
            yield BackupError("{}, nor is there {}".format(no_such, around),
                              "is its filesystem mounted? The folder alone is made, not those around it")


def destination_at(text: str, key: str) -> Destination:
    return (StreamsDestination if parse_endpoint(text).kind.has_streams else Destination)(text, key)


########################################################################################################
# BACKUP: observe, plan, show or execute
#
# The order: locks and pins are read, and where they cannot be the task stops; the snapshot is taken;
# each destination is reached, listed and rid of what a failed transfer left; what is missing is sent,
# oldest first, to all destinations that lack it on the same parent at once; retention comes last. A
# destination that fails is reported and left alone from there on: nothing is deleted at it, and the
# others go on. A dry run observes and plans with the same functions and prints instead of doing.
########################################################################################################

LOCKED_HINT = "look at it, move it away or delete it, then run again"  # a lock names what may not be deleted


class Gate:
    """Where a task waits for the others of its command. Alone it never does."""

    def take_turn(self, key: str) -> None:
        """Waits until no other task works on what `key` names."""

    def snapshot_taken(self) -> None:
        """Waits until transfers may begin."""

    share: Optional[Share] = None  # as SshConnector takes it


def describe_transfer(transfer: Transfer) -> str:
    if transfer.parent is None:
        return "send {} in full".format(transfer.snapshot.name)
    return "send {}, incrementally from {}".format(transfer.snapshot.name, transfer.parent.name)


class TaskRun:
    """One task from its first look to its last deletion."""

    def __init__(self, task: Task, events: Events, gate: Optional[Gate] = None,
                 clock: Callable[[], float] = time.time) -> None:
        self.task, self.events, self.gate, self.clock = task, events, gate or Gate(), clock
        self.hosts = Hosts(task, events, self.gate.share)
        self.host: Any = None  # once the source was reached
        self.prefix = task.prefix or ""  # known once the source is
        self.failed = False
        self.counts: "collections.Counter[Tuple[str, str]]" = collections.Counter()
        self.snapshots: List[Subvolume] = []
        self.locks: Locks = {}
        self.pins: PinsOfPrefix = {}
        self.ids: Tuple[str, ...] = ()  # what folders of backups call this source
        self.destinations: List[Destination] = []
        self.notes: List[str] = []
        self.lock_place: Optional[Tuple[LocalHost, str]] = None  # where locks are kept; None: the snapshot folder

    # -- saying what happens

    def at(self, destination: Optional[Destination], doing: str = "") -> ContextManager[None]:
        """Around all that is done at one destination, or (None) at the source, while others may go on."""

        def tell(error: BackupError) -> None:
            if destination is not None:
                destination.closed = True
            self.report(error, destination, doing + ": " if doing and doing not in error.message else "")

        return apart(self.events, tell, doing or (destination.text if destination else self.task.source))

    def report(self, error: BackupError, destination: Optional[Destination] = None, prefix: str = "") -> None:
        """An error of one destination or deletion; the run goes on and ends non-zero."""
        self.failed = True
        if destination is not None:
            destination.failed = True
            if destination.text not in error.message and destination.path not in error.message:
                prefix = prefix or "{}: ".format(destination.text)
            machine = destination.endpoint.machine + ": "
            if prefix and machine != ": " and error.message.startswith(machine):
                error.message = error.message[len(machine):]  # which the prefix names
        told = BackupError(prefix + error.message, error.hint, error.detail)
        self.events.error(told, destination=destination.key if destination else None)

    # -- source

    def open_source(self) -> None:
        """Finds the source subvolume and its snapshot folder, or says why not."""
        text, taking = self.task.source, not self.task.no_snapshot
        endpoint = parse_endpoint(text)
        self.host = self.hosts.of(endpoint)
        if self.task.prefix is None:
            self.prefix = self.host.name() + "-"
        place = self.host.look(endpoint.path)
        if place.kind == "missing":
            raise BackupError("no such source: {}".format(text), "is its filesystem mounted?" if "/" in text else
                              "nor is there a verb of that name; see --help")
        if place.kind == "other":
            raise BackupError("{} is not a subvolume but a file".format(text), "name the subvolume that holds it")
        if not self.task.skip_fs_checks and place.filesystem is None:
            raise BackupError("{} is not on btrfs".format(text), "only subvolumes of btrfs can be backed up")
        if not self.task.skip_fs_checks and not place.is_top:
            raise BackupError("{} is an ordinary folder, not a subvolume".format(text),
                              "name the subvolume that holds it, or make it one with btrfs subvolume create")
        if taking and place.inside is not None and place.inside.received_uuid is not None:
            raise BackupError(
                "{} has a received UUID, so that all its snapshots would look alike".format(text),
                "take a writable snapshot of it with 'btrfs subvolume snapshot' and use that in its place")
        self.source, self.filesystem, self.source_place = place.path, place.filesystem, place
        self.open_snapshot_folder()

    def open_snapshot_folder(self) -> None:
        path = os.path.join(self.source, self.task.snapshot_folder)
        folder = self.host.look(path)
        if folder.kind == "other":
            raise BackupError("the snapshot folder {} is a file".format(folder.path), "choose another with -f")
        if not self.task.skip_fs_checks and folder.filesystem != self.filesystem:
            raise BackupError("the snapshot folder {} is not on the source's filesystem".format(folder.path),
                              "choose another with -f")
        self.folder, self.folder_exists, self.folder_place = folder.path, folder.kind == "folder", folder
        if self.task.verb == "" and self.task.no_snapshot and not self.folder_exists and (
                self.task.snapshot_folder != Task().snapshot_folder):
            raise BackupError("no such snapshot folder: {}".format(folder.path), "see -f; without -S it is made")

    def check_writable(self) -> None:
        """BackupError where no snapshot or note can be written, for without notes nothing is sent or deleted."""
        place, inside = self.folder_place, self.folder_place.inside
        if place.readonly:
            raise BackupError("{} is mounted read-only".format(self.task.source), "mount it writable; see dmesg")
        if inside is not None and inside.readonly:
            raise BackupError("{} is a read-only snapshot, in which nothing can be noted".format(
                self.task.source if (self.folder + "/").startswith(self.source + "/") else self.folder),
                "name the subvolume that it is of, or with -f a snapshot folder outside of it")

    def check_snapshot_folder(self) -> None:
        """BackupError where somebody else could have put there what it holds, or the folder itself.

        A source may well be another's. What leads from there to its snapshots may not.
        """
        folder, path = self.folder_place, os.path.normpath(os.path.join(self.source, self.task.snapshot_folder))
        inside = path.startswith(self.source.rstrip("/") + "/")
        exposed = [(step, why) for step, why in folder.exposed
                   if not inside or step.startswith(self.source.rstrip("/") + "/")]
        if inside and folder.path != path:
            exposed.insert(0, (path, "is reached over a link"))
        if exposed:
            raise BackupError("{} {}, so its snapshots could be somebody else's".format(*exposed[0]), self.way_out())

    def way_out(self) -> str:
        """What to type where the snapshot folder cannot be trusted."""
        top, words = self.source_place.mount.rstrip("/"), "take -f with a folder outside of the source"
        if (top + "/").startswith(self.source.rstrip("/") + "/"):
            return words + " that only root may write to"
        import shlex
        example = os.path.join(top or "/", ".snapshots", os.path.basename(self.source))
        return "{}, e.g. -f {}".format(words, shlex.quote(example))

    def read_state(self) -> None:
        """Locks and pins as they shall be; changes them where options ask for it."""
        notes = self.host.read_notes(self.folder, self.prefix) if self.folder_exists else NO_NOTES
        self.locks, self.pins = notes.locks, dict(notes.pins)
        self.ids = self.source_ids(notes)
        forget = {self.key_of(text) for text in self.task.forget}
        locked = {normal_destination(d) for entry in self.locks.values() for d in entry.get("locks", ())}
        locked.discard(self.folder)  # by a restore into the snapshot folder
        unlock = set(forget)
        if self.task.remove_locks:
            unlock |= {self.key_of(text) for text in self.task.destinations}
            unlock |= locked if self.task.locked_destinations else set()
        retry = self.task.locked_destinations and not self.task.no_transfer
        self.find_destinations(sorted(locked - unlock) if retry else [])
        for text in self.task.forget if not self.task.dry_run else ():
            self.clear_forgotten(text)
        for key in sorted(unlock):
            changes = locks_of(self.locks, key, self.prefix)
            if changes:
                self.change_locks(clear=changes)
                self.note("unlocked", "removed", "remove", "the locks of {}".format(key), destination=key)
            elif key in forget and key not in self.pins:
                self.events.warning("unknown", "nothing is remembered of {}".format(key), destination=key)
        for key in sorted(forget & set(self.pins)):
            del self.pins[key]
            self.note("forgotten", "forgot", "forget", key, destination=key)
        if forget and not self.task.dry_run:
            self.host.change_pins(self.folder, self.prefix, dict.fromkeys(forget))

    def source_ids(self, notes: FolderNotes) -> Tuple[str, ...]:
        """What folders of backups call the source; backups that are sent on are of that which they came from."""
        inside = self.source_place.inside
        return notes.sources or ((inside.uuid,) if inside is not None and inside.uuid else ())

    def clear_forgotten(self, text: str) -> None:
        """Deletes what broken transfers left at a destination that is given up, if it can be reached."""
        names = locked_names(self.locks, self.key_of(text))
        try:
            destination = destination_at(text, self.key_of(text))
            if not names or not destination.endpoint.kind.has_subvolumes:
                return
            place = destination.look(self.hosts)
            names = self.locked_at(destination)
            if not names or place.kind != "folder":
                return
            busy = destination.host.settle_partials(place.path, dict.fromkeys(names, ""))
            left = [s for s in destination.host.list(place.path).subvolumes
                    if partial_of(s.name) in set(names) - set(busy)]
            for error in destination.host.delete(place.path, left, False):
                self.report(error, destination)
            if left:
                self.events.info("recovered", "deleted {} at {}: it is given up".format(
                    ", ".join(s.name for s in left), text), destination=destination.key)
        except BackupError as error:
            self.events.debug("forgotten", "nothing was deleted at {}: {}".format(text, error.message))

    def note(self, kind: str, done: str, planned: str, what: str, **facts: Any) -> None:
        """Tells a change of state; a dry run makes a line of its plan of it."""
        if self.task.dry_run:
            self.notes.append("  {} {}".format(planned, what))
        else:
            self.events.info(kind, "{} {}".format(done, what), **facts)

    def change_locks(self, add: Sequence[LockChange] = (), clear: Sequence[LockChange] = ()) -> None:
        """Changes our view of the locks, and in a real run first the file."""
        if not self.task.dry_run:
            host, folder = self.lock_place or (self.host, self.folder)
            host.change_locks(folder, add, clear)
        self.locks = clear_locks(add_locks(self.locks, add), clear)

    def filesystem_of(self, destination: Destination) -> Optional[str]:
        """What binds a destination's locks to its disk; nothing where these are kept on that itself."""
        return destination.filesystem if self.lock_place is None else None

    def locked_at(self, destination: Destination) -> List[str]:
        """The snapshots that are locked for a destination on the filesystem that is there now."""
        return locked_names(locks_on(self.locks, self.filesystem_of(destination)), destination.key)

    def clear_locks(self, destination: Destination, changes: Sequence[LockChange]) -> None:
        """Clears locks of a destination, and what binds them to the filesystem that is there now."""
        self.change_locks(clear=bound_changes(changes, self.filesystem_of(destination)))

    def clear_lone_notes(self, destination: Destination) -> None:
        """Clears the parent notes of a destination that no transfer there needs any more."""
        if destination.listing is not None and not self.locked_at(destination):
            self.change_locks(clear=locks_of(self.locks, destination.key, self.prefix,
                                             self.filesystem_of(destination)))

    def key_of(self, text: str) -> str:
        """The id of a destination in the notes, by the machine that these are kept on."""
        host = self.lock_place[0] if self.lock_place else getattr(self, "host", None)  # none without a source
        return destination_key(text, pulled=host is not None and not isinstance(host, LocalHost))

    def find_destinations(self, locked: Sequence[str]) -> None:
        """The destinations given and those that locks name, each once."""
        for text in list(self.task.destinations) + self.believed(locked):
            try:
                parse_endpoint(text)
            except UsageError as error:
                self.report(BackupError("locked destination {}: {}".format(text, error.message), error.hint))
                continue
            if self.key_of(text) not in [d.key for d in self.destinations]:
                self.destinations.append(destination_at(text, self.key_of(text)))

    def believed(self, locked: Sequence[str]) -> List[str]:
        """Of the destinations that locks name those that need no other word for it.

        Locks that lie on another machine say what that one likes: a command to run here, a folder here to write to.
        """
        if isinstance(self.host, LocalHost):
            return list(locked)
        given = {self.key_of(text) for text in self.task.destinations}
        for text in locked:
            if text not in given:
                self.report(BackupError("a lock at {} names {}".format(self.task.source, text), "name it as a "
                                        "destination if that is right: another machine's word for it is not taken"))
        return []

    # -- destinations

    def reach(self, destination: Destination) -> None:
        """Checks and lists a destination, making its folder where that is allowed.

        It needs no lock of its own: `btrfs receive` makes a partial only where none of its name exists, so
        that of two writers of one name the later fails at its first command.
        """
        destination.was_reached = True
        with self.at(destination):
            if not destination.endpoint.kind.has_folder:
                destination.host = self.shell_place(destination)
                destination.listing = destination.host.list(destination.path)
                return
            place = destination.look(self.hosts)
            if destination.endpoint.kind.has_streams:
                self.prepare_raw(destination.host)
            self.check_destination(destination, place)
            if destination.is_new and self.task.dry_run:
                destination.listing = Listing()
                return
            if destination.is_new:
                destination.host.make_folder(place.path)
            if destination.endpoint.kind.has_streams and not self.task.no_transfer:
                self.check_encryption(destination, destination.host.list_raw(place.path))
            self.settle(destination)
            listing = destination.host.list(place.path)
            destination.notes = destination.host.read_notes(place.path, self.prefix)
            self.check_owner(destination, listing)
            destination.listing = listing

    def check_destination(self, destination: Destination, place: Place) -> None:
        """BackupError where nothing may be written there; says where all lies on one filesystem."""
        text = destination.text
        moved = self.pins_elsewhere(destination, place.filesystem)
        grounds = Grounds(place, self.source_place, self.folder_place, self.task.skip_fs_checks,
                          forget_command(self.task, self.prefix, text) if moved else "")
        destination.check(grounds)
        if grounds.is_sources and destination.endpoint.kind.has_subvolumes:
            self.events.warning("same-filesystem", "{} is on the source's own filesystem: what breaks that takes both"
                                .format(text), destination=destination.key)

    def owner(self, destination: Destination) -> Owner:
        return Owner(self.snapshots, self.ids, self.pins.get(destination.key, ()))

    def check_owner(self, destination: Destination, listing: Listing) -> None:
        """BackupError where the backups of this prefix at a destination are another source's."""
        self.check_owned(destination, listing, self.prefix, self.owner(destination))

    def check_owned(self, destination: Destination, listing: Listing, prefix: str, owner: Owner) -> None:
        destination.whose = whose(owner, listing, prefix, destination.notes.sources, destination.filesystem)
        if destination.whose == OF_OTHERS and not self.task.same_source:
            raise BackupError(
                "destination {}: its backups of prefix {} are of another source".format(
                    destination.text, printable(repr(prefix))),
                "give this source another prefix with -p, or another folder; if it is the same source, on a machine "
                "that was rebuilt: --same-source")

    def look_for_others(self) -> None:
        """BackupError, before anything is done, where a destination that is new to this source holds another's backups.

        One that cannot be looked at now has its error when it is needed.
        """
        for destination in self.destinations:
            if not destination.endpoint.kind.has_folder or destination.key in self.pins:
                continue
            look = destination_at(destination.text, destination.key)
            try:
                place = look.look(self.hosts)
                listing = look.host.list(place.path) if place.kind == "folder" else Listing()
                if listing.subvolumes:
                    look.notes = look.host.read_notes(place.path, self.prefix)
            except Exception:
                continue
            self.check_owner(look, listing)

    def claim(self, destination: Destination) -> None:
        """Notes at a destination, before the first byte, that its backups of this prefix are of this source."""
        if not destination.endpoint.kind.has_folder:
            return
        noted = destination.notes.sources
        after = claimed(self.owner(destination), noted, destination.whose)
        if after in ((), noted):
            return
        with self.at(destination):
            destination.host.claim(destination.path, Claim(self.prefix, noted, after))
            destination.notes = destination.notes._replace(sources=after)
            destination.whose = OURS

    @property
    def source_text(self) -> str:
        return self.task.source if parse_endpoint(self.task.source).login else self.source

    def pins_elsewhere(self, destination: Destination, filesystem: Optional[str]) -> bool:
        """Whether a destination was seen on other filesystems than this, and never on this."""
        known = {pin.filesystem for pin in self.pins.get(destination.key, ())}
        return bool(known) and not known & {None, filesystem}

    def shell_place(self, destination: Destination) -> ShellPlace:
        sent = {uuid for pin in self.pins.get(destination.key, ()) for uuid in pin.sent}
        names = {s.stream_id: s for s in self.snapshots if s.stream_id in sent}
        return ShellPlace(self.source_text, [s._replace(received_uuid=s.stream_id) for s in names.values()])

    def prepare_raw(self, place: RawPlace) -> None:
        """BackupError unless the filters of a raw folder show that they work."""
        place.source = self.source_text
        if not self.task.no_transfer:
            prove_filters(place.steps)

    def check_encryption(self, destination: Destination, folder: RawFolder) -> None:
        """BackupError where streams would be written that are less protected than those before them."""
        import shlex
        if any(map(is_encryption, destination.host.steps)):
            return
        encryption, text = encryption_of(folder, self.prefix), destination.text
        if encryption:
            raise BackupError(
                "destination {} holds encrypted streams, and this run would add some that are not".format(text),
                "give --raw-encrypt {}, or name another folder".format(shlex.quote(encryption)))
        if text not in self.task.destinations and not any(name_time(self.prefix, b.name) for b in folder.backups):
            raise BackupError("a lock names {}, but not how its streams are to be encrypted".format(text),
                              "run the backup to it again as usual, and it goes on")

    def settle(self, destination: Destination) -> None:
        """Ends what still waits for the rest of a transfer that a former run has lost, so that it can be taken up."""
        known = {s.name: s.stream_id or "" for s in self.snapshots}
        names = {name: known.get(name, "") for name in self.locked_at(destination)}
        if names and not self.task.dry_run and destination.endpoint.kind.has_subvolumes:
            destination.busy = frozenset(destination.host.settle_partials(destination.path, names))

    def needed_destinations(self) -> List[Destination]:
        """The destinations that something may be done at: without transfer and retention none."""
        return [] if self.task.no_transfer and self.task.backup_policy.keeps_all else self.destinations

    def look_at_idle(self) -> None:
        """Lists destinations that nothing is done at, where that is possible: what they have in common stays here."""
        if self.needed_destinations() or self.task.snapshot_policy.keeps_all:
            return
        for destination in self.destinations:
            if not destination.endpoint.kind.has_folder:
                continue
            try:
                place = destination.look(self.hosts)
                if place.kind == "folder":
                    destination.listing = destination.host.list(place.path)
            except BackupError as error:
                self.events.debug("idle", "{} was not looked at: {}".format(destination.text, error.message))

    def plan_destination(self, destination: Destination) -> None:
        if self.task.no_transfer or destination.listing is None:
            return
        recoveries = [Recovery(r.snapshot, (), "another run is writing {}".format(partial_name(r.snapshot)))
                      if r.snapshot in destination.busy else r
                      for r in plan_recoveries(locks_on(self.locks, self.filesystem_of(destination)), destination.key,
                                               self.snapshots, destination.listing, self.usable_records(destination))]
        destination.plan = plan_transfers(
            self.snapshots, destination.listing, self.prefix, self.task.backup_policy, self.clock(), recoveries,
            not self.task.no_incremental, self.longest_chain(destination))

    def longest_chain(self, destination: Destination) -> int:
        """How many streams may build on each other there; 0: any number."""
        return self.task.raw_full_every if destination.endpoint.kind.has_streams else 0

    def usable_records(self, destination: Destination) -> List[Record]:
        """The records at a destination that transfers can go on from."""
        if self.task.no_resume or destination.listing is None or not destination.listing.records:
            return []
        records = usable_records(self.snapshots, destination.listing, not self.task.no_incremental)
        return [r for r in records if not r.compressed or self.can_be_compressed(destination)]

    def can_be_compressed(self, destination: Destination) -> bool:
        return (self.host.capabilities().sends_compressed and destination.host.capabilities().receives_compressed)

    # -- snapshot

    def new_name(self, listing: Listing) -> str:
        """A name that nothing bears yet; the later of two within one second waits."""
        taken = {s.name for s in listing.subvolumes} | listing.others
        name = snapshot_name(self.prefix, self.clock())
        while name in taken:
            time.sleep(0.05)
            name = snapshot_name(self.prefix, self.clock())
        return name

    def check_found(self) -> None:
        """Reports where no snapshot is taken and there is none: a mistyped prefix must not be done with for ever."""
        task = self.task
        if self.snapshots or not task.no_snapshot or task.forget or task.remove_locks or task.locked_destinations:
            return
        found = snapshot_prefixes(self.host.list(self.folder) if self.folder_exists else Listing())
        there = ", ".join("{} of {}".format(count, printable(repr(prefix))) for prefix, count in sorted(found.items()))
        self.report(BackupError(
            "no snapshot of prefix {} in {}{}".format(printable(repr(self.prefix)), self.folder,
                                                      "; there are {}".format(there) if there else ""),
            "give the prefix with -p" if there else "without -S one is taken"))

    def take_snapshot(self) -> None:
        name = self.new_name(self.host.list(self.folder))
        snapshot = self.host.snapshot(self.source, self.folder, name)
        self.counts["snapshot", "taken"] += 1
        self.events.info("snapshot", "took snapshot {} of {}".format(name, self.task.source),
                         snapshot=name, source=self.source)
        self.snapshots.append(snapshot)

    def nested_text(self) -> Tuple[str, List[str]]:
        """What is not in the snapshots, as text, and the paths of it; '' where all is."""
        try:
            nested = sorted(self.host.nested_subvolumes(self.source, self.folder))
        except Exception as error:  # an ordinary user may take snapshots but not list subvolumes
            return "nested subvolumes were not looked for: {}".format(explain(error, "cannot list").message), []
        return "subvolumes nested in {} are not in its snapshots: {}".format(
            self.task.source, some_of(nested)) if nested else "", nested

    def warn_of_nested(self) -> None:
        text, paths = self.nested_text()
        if text:
            self.events.warning("nested", text, paths=paths)

    def warn_of_future(self) -> None:
        for snapshot in self.snapshots:
            moment = snapshot_time(self.prefix, snapshot.name)
            if moment is not None and is_future(moment, self.clock()):
                self.events.warning("future", "snapshot {} has a name from the future: kept and not counted".format(
                    snapshot.name), snapshot=snapshot.name)

    # -- execution

    def execute(self) -> None:
        if not self.folder_exists:
            self.host.make_folder(self.folder)
        self.folder_exists = True
        self.gate.take_turn(" ".join((parse_endpoint(self.task.source).machine, self.folder, self.prefix)))
        with self.host.hold(self.folder, self.prefix, self.task.wait):
            self.open_snapshot_folder()  # once more, now that it cannot become another
            self.check_snapshot_folder()
            self.read_state()
            self.snapshots = snapshots_of(self.host.list(self.folder), self.prefix)
            self.look_for_others()
            self.check_found()
            self.with_room(lambda: self.host.prove_writable(self.folder))
            if not self.task.no_snapshot:
                self.with_room(self.take_snapshot)
                self.warn_of_nested()
            self.warn_of_future()
            self.gate.snapshot_taken()
            for destination in self.needed_destinations():
                with self.at(destination):
                    if not destination.was_reached:
                        self.reach(destination)
                    self.plan_destination(destination)
                    self.recover(destination)
            self.look_at_idle()
            self.transfer_all()
            with self.at(None):
                self.remember(self.destinations)
                self.retain()
        done = ", ".join("{} {}".format(plural(count, noun), verb)
                         for (noun, verb), count in sorted(self.counts.items()))
        nothing = "nothing was done" if self.failed else "nothing to do"
        self.events.info("done", "{}: {}".format("finished with errors" if self.failed else "done", done or nothing))

    def with_room(self, act: Callable[[], None]) -> None:
        """Does something at the source; where that is full, once more after what the policy deletes there is gone.

        What failed on a full source must not fail for ever, nor take one more snapshot each time.
        """
        try:
            act()
        except BackupError as error:
            if not is_full(error) or not self.free_source():
                raise
            act()

    def free_source(self) -> bool:
        """Deletes at the source what its policy allows by now; whether anything. It needs no file to be written."""
        for destination in self.destinations:  # what each has in common is protected, noted or not
            if not destination.was_reached:
                self.reach(destination)
        self.try_to_remember()
        seen = {d.key: self.pin_of(d, d.listing) for d in self.destinations if d.listing is not None}
        noted, pins = dict(self.pins), dict(self.pins)
        for key, pin in seen.items():
            if pin is not None:
                noted[key], pins[key] = noted.get(key, ()) + (pin,), with_pin(pins.get(key, ()), pin)
        verdicts = self.source_verdicts(noted)
        if not deletions(verdicts):  # nor can be noted what has taken the place of what is
            verdicts = self.source_verdicts(pins)
        doomed = deletions(verdicts)
        if doomed:
            self.events.warning("full", "the filesystem of {} is full: making room first".format(self.task.source))
            self.delete(self.host, self.folder, self.task.source, self.snapshots, verdicts)
            self.host.wait_for_cleaning(self.folder)
            self.snapshots = snapshots_of(self.host.list(self.folder), self.prefix)
            self.try_to_remember()
        return bool(doomed)

    def try_to_remember(self) -> None:
        """Notes what was seen in common, which must stay also where this run fails and a destination is away then."""
        try:
            self.remember(self.destinations)
        except BackupError as error:
            self.events.debug("unnoted", format_error(error))

    def recover(self, destination: Destination) -> None:
        """Clears what failed transfers left at a destination, under their locks."""
        is_listed = destination.endpoint.kind.has_subvolumes and destination.listing is not None
        traces = left_traces(self.snapshots, destination.listing or Listing()) if is_listed else []
        for error in destination.host.forget_partials(destination.path, traces) if traces else ():
            self.report(error, destination)
        for recovery in destination.plan.recoveries:
            errors = destination.host.delete(destination.path, recovery.delete, False)
            for subvolume in recovery.delete if not errors else ():
                self.events.info("recovered", "deleted {} at {}: its transfer was broken off".format(
                    subvolume.name, destination.text), destination=destination.key, name=subvolume.name)
            if recovery.take_up is None and destination.listing and destination.listing.record_of(recovery.snapshot):
                errors += destination.host.forget_partials(destination.path, [recovery.snapshot])
            for error in errors:
                self.report(error, destination)
            if recovery.problem:
                self.report(BackupError("{}: {}".format(destination.text, recovery.problem),
                                        LOCKED_HINT), destination)
            elif not errors and recovery.take_up is None:
                self.clear_locks(destination, [LockChange(recovery.snapshot, destination.key)])
        for problem in destination.plan.problems:
            self.report(BackupError("{}: {}".format(destination.text, problem.text), problem.remedy(
                destination.path, destination.endpoint.machine)), destination)
        for verdict in destination.plan.skipped:
            self.events.debug("skipped", "not sent to {}: {}, {}".format(
                destination.text, verdict.name, verdict.reason))
        self.clear_lone_notes(destination)
        if destination.listing is not None and destination.plan.recoveries:
            gone = {s.name for r in destination.plan.recoveries for s in r.delete}
            destination.listing = destination.listing._replace(
                subvolumes=tuple(s for s in destination.listing.subvolumes if s.name not in gone))

    def transfer_all(self) -> None:
        """Sends snapshot by snapshot; destinations that lack one on the same parent share its stream."""
        for snapshot in list(self.snapshots):
            groups: Dict[Tuple[Optional[str], bool], List[Destination]] = {}
            parents: Dict[Optional[str], Optional[Subvolume]] = {}
            able = self.able_to_compress([
                d for d in self.destinations if d.is_open and snapshot in self.snapshots
                and any(t.snapshot.name == snapshot.name for t in d.plan.transfers)])
            lacking = [d for d in self.destinations if d.key in able]
            compressed = all(able[d.key] for d in lacking if d.record_of(snapshot.name) is None)
            for destination in lacking:
                record = destination.record_of(snapshot.name)
                parent = parent_of_record(record, self.snapshots) if record else self.parent_now(snapshot, destination)
                parents[parent.name if parent else None] = parent
                key = parent.name if parent else None, record.compressed if record else compressed
                groups.setdefault(key, []).append(destination)
            for (parent_name, is_compressed), destinations in groups.items():
                for destination in destinations:
                    self.claim(destination)
                destinations = [d for d in destinations if d.is_open]
                if destinations:
                    self.transfer(Transfer(snapshot, parents[parent_name]), destinations, is_compressed)

    def able_to_compress(self, destinations: Sequence[Destination]) -> Dict[str, bool]:
        """Whether each destination may get compressed data; one that cannot tell is not in it."""
        able = {}
        for destination in destinations:
            with self.at(destination):
                able[destination.key] = self.task.compress == "no" and self.can_be_compressed(destination)
        return able

    def parent_now(self, snapshot: Subvolume, destination: Destination) -> Optional[Subvolume]:
        """The parent by what the destination really holds by now: a failed transfer brought none."""
        if self.task.no_incremental or destination.listing is None:
            return None
        parent = choose_parent(snapshot, self.snapshots, parent_ids(self.snapshots, destination.listing))
        return within_chain(parent, chain_lengths(destination.listing), self.longest_chain(destination))

    def transfer(self, transfer: Transfer, destinations: List[Destination], compressed: Optional[bool] = None) -> None:
        """Sends one snapshot to some destinations, compressed data where all can do that, unless told."""
        records = [record for record in (d.record_of(transfer.snapshot.name) for d in destinations) if record]
        if compressed is None:
            compressed = records[0].compressed if records else (
                self.task.compress == "no" and all(map(self.can_be_compressed, destinations)))
        name = transfer.snapshot.name
        try:
            delivered = self.deliver(transfer, destinations, compressed)
        except Exception as error:
            for destination in destinations:
                with self.at(destination, "sending {} to {}".format(name, destination.text)):
                    raise error
            return
        for destination in destinations:
            with self.at(destination, "sending {} to {}".format(name, destination.text)):
                self.conclude(transfer, destination, delivered[destination.key])
        if any(one.at_source for one in delivered.values()):
            with self.at(None):
                self.look_again(transfer, destinations)

    def look_again(self, transfer: Transfer, destinations: Sequence[Destination]) -> None:
        """Where a send failed: what was deleted meanwhile is neither sent any more nor built on."""
        there = {s.uuid for s in self.host.list(self.folder).subvolumes}
        gone = {s.uuid for s in self.snapshots if s.uuid not in there}
        self.snapshots[:] = [s for s in self.snapshots if s.uuid in there]
        if transfer.parent is not None and transfer.parent.uuid in gone and transfer.snapshot.uuid in there:
            for destination in [d for d in destinations if d.is_open]:
                self.transfer(Transfer(transfer.snapshot, self.parent_now(transfer.snapshot, destination)),
                              [destination])

    def deliver(self, transfer: Transfer, destinations: List[Destination], compressed: bool) -> Dict[str, Delivered]:
        """What became of one snapshot on its way to some destinations, under locks."""
        name, parent = transfer.snapshot.name, transfer.parent.name if transfer.parent else None
        self.change_locks(add=[change for d in destinations for change in bound_changes(
            [LockChange(name, d.key, parent)], self.filesystem_of(d))])
        for destination in destinations:
            self.events.info("sending", "sending {} to {}{}".format(
                name, destination.text, ", incrementally from {}".format(parent) if parent else " in full"),
                snapshot=name, destination=destination.key, parent=parent)
        shipment = Shipment(self.host, self.folder, transfer.snapshot, transfer.parent,
                            SendOptions(compressed, False, self.task.btrfs_debug))
        terms = Terms(self.task.stall_timeout, self.task.retries, not self.task.no_resume, self.task.limit)
        targets = [Target(d.key, d.text, d.host, d.path, self.base_of(transfer.parent, d),
                          TAKE_UP if d.record_of(name) else ANEW) for d in destinations]
        return Delivery(shipment, targets, terms, self.events).run()

    def delete_partial(self, transfer: Transfer, destination: Destination) -> None:
        """Deletes what a given up transfer left, under its lock."""
        listing = destination.host.list(destination.path)
        left = [s for s in listing.subvolumes if partial_of(s.name) == transfer.snapshot.name]
        for error in destination.host.delete(destination.path, left, False):
            self.report(error, destination)
        parent = transfer.parent.name if transfer.parent else None
        self.clear_locks(destination, [LockChange(transfer.snapshot.name, destination.key, parent)])

    @staticmethod
    def base_of(parent: Optional[Subvolume], destination: Destination) -> Optional[str]:
        """The UUID of the backup that `parent` is at a destination."""
        if parent is None or destination.listing is None:
            return None
        copies = copies_by_id(destination.listing)[parent.stream_id or ""]
        return (base_among(parent, copies) or copies[0]).uuid

    def conclude(self, transfer: Transfer, destination: Destination, delivered: Delivered) -> None:
        """Books the end of a transfer at one destination: a backup, or an error."""
        name, parent = transfer.snapshot.name, transfer.parent.name if transfer.parent else None
        backup, error = delivered.backup, delivered.error
        if isinstance(error, AmbiguousParent) and transfer.parent is not None:
            self.events.warning("ambiguous", "sending {} to {} in full: {}".format(
                name, destination.text, error.message))
            self.delete_partial(transfer, destination)
            self.transfer(Transfer(transfer.snapshot, None), [destination])
            return
        if error is not None or backup is None or destination.listing is None:
            destination.closed = not delivered.at_source
            self.report(error or BackupError("not completed"), destination,
                        "sending {} to {}: ".format(name, destination.text))
            return
        listing = destination.listing  # where nothing is left of what this went on from
        destination.listing = listing._replace(
            subvolumes=tuple(s for s in listing.subvolumes if partial_of(s.name) != name) + (backup,),
            records=tuple(record for record in listing.records if record.name != name))
        if not destination.endpoint.kind.has_folder:  # nobody else remembers it
            self.remember([destination])
        self.clear_locks(destination, [LockChange(name, destination.key, parent)])
        self.counts["backup", "sent"] += 1
        self.tell_sent(name, destination, delivered)

    def tell_sent(self, name: str, destination: Destination, delivered: Delivered) -> None:
        sent, again, taken_up = delivered.figures
        text = "sent {} to {}: {} in {}, {}/s".format(
            name, destination.text, format_size(sent), format_duration(delivered.seconds),
            format_size(sent / max(delivered.seconds, 0.001)))
        if taken_up or again:
            text += "; taken up {}, {} sent again".format(plural(taken_up, "time"), format_size(again))
        self.events.info("sent", text, snapshot=name, destination=destination.key, bytes=sent,
                         seconds=round(delivered.seconds, 3), taken_up=taken_up, again=again)

    # -- what stays

    def remember(self, destinations: Sequence[Destination]) -> None:
        """Pins, for each destination that was seen, the newest snapshot in common.

        A pin holds as long as nothing newer was seen in common on its filesystem, as with a folder that was emptied.
        """
        pins = {d.key: self.pin_of(d, d.listing) for d in destinations if d.listing is not None}
        new = {key: pin for key, pin in pins.items() if pin is not None and pin not in self.pins.get(key, ())}
        if new and not self.task.dry_run:
            self.host.change_pins(self.folder, self.prefix, dict(new))
        self.pins.update({key: with_pin(self.pins.get(key, ()), pin) for key, pin in new.items()})

    def pin_of(self, destination: Destination, listing: Listing) -> Optional[Pin]:
        newest = newest_common(self.snapshots, listing)
        if newest is None:
            return None
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(newest.otime / 1e9)) + "Z"
        sent = () if destination.endpoint.kind.has_folder else tuple(s.received_uuid or "" for s in listing.subvolumes)
        return Pin(newest.name, newest.stream_id or "", moment, destination.filesystem, sent)

    def source_verdicts(self, pins: PinsOfPrefix) -> List[Verdict]:
        return plan_source_retention(self.snapshots, self.prefix, self.task.snapshot_policy, self.locks, pins,
                                     self.clock())

    def destination_verdicts(self, destination: Destination, listing: Listing) -> List[Verdict]:
        if not destination.endpoint.kind.has_folder:
            return []
        notes = destination.notes
        if not self.task.dry_run and not self.task.backup_policy.keeps_all:  # backups are sent on meanwhile
            notes = destination.host.read_notes(destination.path, self.prefix)
        return plan_destination_retention(self.snapshots, listing, self.prefix, self.task.backup_policy, self.clock(),
                                          notes)

    def describe_needed(self, destination: Destination, verdicts: Sequence[Verdict]) -> str:
        """What stays beyond the policy, where nothing is done yet that will let it go."""
        if self.longest_chain(destination):
            return ""
        return describe_needed(verdicts, destination.text, self.task.backup_policy)

    def retain(self) -> None:
        for destination in self.destinations:
            if destination.listing is not None and not destination.failed:
                with self.at(destination):
                    self.retain_at(destination, destination.listing)
        self.delete(self.host, self.folder, self.task.source, self.snapshots, self.source_verdicts(self.pins))

    def retain_at(self, destination: Destination, listing: Listing) -> None:
        verdicts = self.destination_verdicts(destination, listing)
        needed = self.describe_needed(destination, verdicts)
        if needed:
            self.events.info("needed", needed, destination=destination.key)
        self.delete(destination.host, destination.path, destination.text, listing.subvolumes, verdicts)

    def delete(self, host: Any, folder: str, text: str, subvolumes: Sequence[Subvolume],
               verdicts: Sequence[Verdict]) -> None:
        for verdict in verdicts:
            if verdict.keep:
                self.events.debug("kept", "kept {} at {}: {}".format(verdict.name, text, verdict.reason))
        named = {s.name: s for s in subvolumes}
        doomed = deletions(verdicts)
        for verdict in doomed:
            self.events.info("deleting", "deleting {} at {}: {}".format(verdict.name, text, verdict.reason),
                             name=verdict.name, folder=folder, reason=verdict.reason)
        if not doomed:
            return
        try:
            errors = host.delete(folder, [named[v.name] for v in doomed], self.task.convert_rw)
        except Refused as refusal:
            self.report(refusal, prefix="{}: ".format(text))
            return
        for error in errors:
            self.report(error)
        self.counts["subvolume", "deleted"] += len(doomed) - len(errors)
        if self.task.sync:
            host.wait_for_cleaning(folder)

    # -- dry run

    def show(self) -> List[str]:
        """The plan of this task, in lines; nothing is changed."""
        self.read_state()
        listing = self.host.list(self.folder) if self.folder_exists else Listing()
        self.snapshots = snapshots_of(listing, self.prefix)
        self.look_for_others()
        self.check_found()
        if not self.task.no_snapshot:
            name = self.new_name(listing)
            self.snapshots.append(Subvolume(name, "not taken yet", otime=int(self.clock() * 10 ** 9)))
        self.warn_of_future()
        for destination in self.needed_destinations():
            self.reach(destination)
            with self.at(destination):
                self.plan_destination(destination)
            self.expect_clear(destination)
        self.look_at_idle()
        lines = ["source {}, snapshots in {}".format(self.task.source, self.folder)]
        lines += self.notes
        if not self.task.no_snapshot:
            lines.append("  take snapshot {}".format(self.snapshots[-1].name))
            lines += ["  note: {}".format(text) for text in self.nested_text()[:1] if text]
        for destination in self.destinations:
            if destination.listing is not None:
                destination.listing = after_transfers(destination.listing, destination.plan)
        self.remember(self.destinations)
        for verdict in self.source_verdicts(self.pins):
            lines += self.describe_verdict(verdict)
        for destination in self.needed_destinations():
            lines += self.describe_destination(destination)
        return lines

    def expect_clear(self, destination: Destination) -> None:
        """Clears our view of the locks of what will be done at a destination, as `recover` and `conclude` do."""
        plan, key = destination.plan, destination.key
        self.clear_locks(destination, [LockChange(r.snapshot, key) for r in plan.recoveries if not r.problem] + [
            LockChange(t.snapshot.name, key, t.parent.name if t.parent else None) for t in plan.transfers])
        self.clear_lone_notes(destination)

    def describe_verdict(self, verdict: Verdict) -> List[str]:
        if verdict.keep:
            return ["  keep {}: {}".format(verdict.name, verdict.reason)] if self.task.verbosity == "debug" else []
        return ["  delete {}: {}".format(verdict.name, verdict.reason)]

    def describe_destination(self, destination: Destination) -> List[str]:
        lines = ["destination {}".format(destination.text)]
        if destination.listing is None:
            return lines + ["  nothing: it cannot be used now"]
        if destination.is_new:
            lines.append("  make the folder")
        for recovery in destination.plan.recoveries:
            lines += ["  delete {}: its transfer was broken off".format(s.name) for s in recovery.delete]
            if recovery.problem:
                self.report(BackupError("{}: {}".format(destination.text, recovery.problem)), destination)
        for problem in destination.plan.problems:
            self.report(BackupError("{}: {}".format(destination.text, problem.text), problem.remedy(
                destination.path, destination.endpoint.machine)), destination)
        lines += ["  do not send {}: {}".format(v.name, v.reason) for v in destination.plan.skipped]
        for transfer in destination.plan.transfers:
            record = destination.record_of(transfer.snapshot.name)
            line = "  {}, {}".format(describe_transfer(transfer), self.describe_size(transfer))
            lines.append(line + ", taken up at {}".format(format_size(record.point.offset)) if record else line)
        if not destination.failed:
            verdicts = self.destination_verdicts(destination, destination.listing)
            needed = self.describe_needed(destination, verdicts)
            lines += [line for verdict in verdicts for line in self.describe_verdict(verdict)]
            lines += ["  " + needed] if needed else []
        return lines if len(lines) > 1 else lines + ["  nothing to do"]

    def describe_size(self, transfer: Transfer) -> str:
        """How much a transfer will send: from the kernel where the snapshot exists, else from new extents."""
        parent = transfer.parent
        if transfer.snapshot not in self.snapshots[-1:] or self.task.no_snapshot:
            taken = parent is None or parent.uuid != "not taken yet"
            return "about {}".format(format_size(self.host.measured(
                self.folder, transfer.snapshot.name, parent.name if parent and taken else None).stream_size))
        return "about {}".format(format_size(self.host.data_since(self.source, parent.generation + 1 if parent else 0)))


def print_result(text: str) -> None:
    """Writes text to stdout in whatever encoding that has; BackupError where it cannot be written."""
    data = text.encode(sys.stdout.encoding or "ascii", "backslashreplace") + b"\n"
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads it has seen enough
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer must not fail again at exit
        raise os_error("cannot write the result", error) from None


def run_task(task: Task, events: Events, gate: Optional[Gate] = None) -> int:
    """Does one task; the exit status. Errors that stop it are raised."""
    run = TaskRun(task, events, gate)
    try:
        run.open_source()
        run.check_writable()
        run.check_snapshot_folder()
        if task.dry_run:
            run.gate.snapshot_taken()
            print_result("\n".join(run.show()))
        else:
            run.execute()
    finally:
        run.hosts.end()
    return 1 if run.failed else 0


########################################################################################################
# LIST: which snapshots are where
#
# A location is the snapshot folder of a source, or a folder of backups; an entry one subvolume in it. What
# belongs to what goes by identity, as in a transfer; a name alone only says where a stranger stands in the
# way. A location that cannot be listed is an error and never an empty one. Nothing is changed.
########################################################################################################


class Entry(NamedTuple):
    """One subvolume at a location. `moment` is its time in seconds since the epoch, as far as its name tells one."""

    subvolume: Subvolume
    path: str
    state: str  # "complete", "partial" or "foreign"
    moment: Optional[float]
    locks: Tuple[str, ...] = ()
    parent_locks: Tuple[str, ...] = ()
    size: Optional[int] = None  # bytes that it shares with no other

    @property
    def snapshot_name(self) -> str:
        return partial_of(self.subvolume.name) or self.subvolume.name


class Location(NamedTuple):
    """What there is at an endpoint; where `error` is set, not all of it is known."""

    endpoint: str
    is_source: bool
    entries: Tuple[Entry, ...] = ()
    error: Optional[BackupError] = None
    listing: Listing = Listing()

    def complete(self) -> List[Entry]:
        return [entry for entry in self.entries if entry.state == "complete"]


def name_moment(name: str) -> Optional[float]:
    """When the snapshot of that name, or the partial backup of it, says that it was taken."""
    name = partial_of(name) or name
    prefix = prefix_of(name)
    return None if prefix is None else snapshot_time(prefix, name)


def snapshot_state(subvolume: Subvolume) -> str:
    """The state of a subvolume in a snapshot folder."""
    if partial_of(subvolume.name) is not None:
        return "partial"
    return "complete" if subvolume.readonly and prefix_of(subvolume.name) is not None else "foreign"


def backup_state(subvolume: Subvolume, snapshots: Dict[str, Subvolume], ids: Set[str]) -> str:
    """The state of a subvolume in a folder of backups. snapshots, ids: the source's, by name and stream id."""
    is_copy = bool({subvolume.uuid, subvolume.received_uuid} & ids)
    named = prefix_of(subvolume.name) is not None
    if partial_of(subvolume.name) is not None:
        return "partial"
    if not subvolume.readonly:
        return "partial" if named and (is_copy or subvolume.received_uuid is None) else "foreign"
    if is_copy:
        return "complete"
    return "complete" if named and subvolume.received_uuid and subvolume.name not in snapshots else "foreign"


def is_asked_for(subvolume: Subvolume, prefix: Optional[str], ids: Set[str]) -> bool:
    """Whether a subvolume is shown when snapshots of `prefix` are asked for; None asks for all."""
    name = partial_of(subvolume.name) or subvolume.name
    is_copy = bool({subvolume.uuid, subvolume.received_uuid} & ids)
    return prefix is None or is_copy or name_time(prefix, name) is not None


def source_entries(listing: Listing, folder: str, prefix: Optional[str], locks: Locks) -> Tuple[Entry, ...]:
    entries, locks = [], locks_on(locks)
    for subvolume in sorted(listing.subvolumes, key=by_creation):
        if is_asked_for(subvolume, prefix, set()):
            own, named = locks.get(subvolume.name, {}), prefix_of(subvolume.name)
            moment = None if named is None else snapshot_moment(named, subvolume)
            entries.append(Entry(subvolume, os.path.join(folder, subvolume.name), snapshot_state(subvolume), moment,
                                 tuple(own.get("locks", ())), tuple(own.get("parent_locks", ()))))
    return tuple(entries)


def backup_entries(listing: Listing, folder: str, prefix: Optional[str], source: Optional[Location],
                   locks: Locks, key: str) -> Tuple[Entry, ...]:
    """The entries of a folder of backups. locks: those on its filesystem; key: what they call it."""
    snapshots = [entry.subvolume for entry in source.complete()] if source else []
    known, by_name = {s.stream_id: s for s in snapshots if s.stream_id}, {s.name: s for s in snapshots}
    locked, parents = set(locked_names(locks, key)), set(locked_names(locks, key, "parent_locks"))
    entries = []
    for backup in listing.subvolumes:
        if is_asked_for(backup, prefix, set(known)):
            snapshot = known.get(backup.received_uuid or "") or known.get(backup.uuid or "")
            named = prefix_of(snapshot.name) if snapshot else None
            moment = snapshot_moment(named, snapshot) if snapshot and named is not None else name_moment(backup.name)
            entry = Entry(backup, os.path.join(folder, backup.name), backup_state(backup, by_name, set(known)), moment)
            entries.append(entry._replace(locks=(key,) * (entry.snapshot_name in locked),
                                          parent_locks=(key,) * (entry.snapshot_name in parents)))
    return tuple(sorted(entries, key=lambda e: (e.moment is None, e.moment or 0, e.subvolume.name)))


def list_endpoint(host: LocalHost, endpoint: Endpoint) -> Tuple[str, Listing]:
    """The folder that an endpoint names, and what it holds."""
    if not endpoint.kind.has_folder:
        raise BackupError("{} cannot be listed".format(endpoint.text))
    place = host.look(endpoint.path)
    if place.kind != "folder":
        raise BackupError("no such folder: {}".format(endpoint.text) if place.kind == "missing" else
                          "{} is not a folder".format(endpoint.text),
                          "nothing is mounted at {}".format(place.unmounted) if place.unmounted else
                          "is its filesystem mounted?")
    listing = host.list(place.path)
    broken = tuple(Subvolume(b.name, None, readonly=False) for b in listing.broken if not b.is_lost)
    return place.path, listing._replace(subvolumes=listing.subvolumes + broken)


def folder_prefixes(listing: Listing, only: Optional[str]) -> List[str]:
    """The prefixes of the backups and partials in a folder; `only` where that is not None."""
    if only is not None:
        return [only]
    names = [s.name if s.is_received else partial_of(s.name) for s in listing.subvolumes]
    return sorted({prefix for prefix in (prefix_of(name) for name in names if name) if prefix is not None})


def found_instead(endpoint: Endpoint, listing: Listing, prefix: Optional[str]) -> str:
    """What a folder holds in the place of backups of `prefix` (None: of any), and how to name it; '' for nothing."""
    prefixes = [] if prefix is None else folder_prefixes(listing, None)
    if prefixes:
        return "there are some of {}".format(", ".join("'{}'".format(printable(found)) for found in prefixes))
    if not endpoint.kind.has_streams and any(STREAM_SUFFIX in name for name in listing.others):
        return "its stream files are named as {}".format(folder_key(STREAM_FILES, endpoint.machine, endpoint.path))
    return ""


def is_backup_folder(host: Any, place: Place, snapshot_folder: str) -> bool:
    """Whether a place is a folder of backups and no source: it holds some, and no snapshot folder."""
    return (place.kind == "folder" and host.look(os.path.join(place.path, snapshot_folder)).kind != "folder"
            and bool(folder_prefixes(host.list(place.path), None)))


class Survey:
    """Lists the locations that a task names, the source first."""

    def __init__(self, task: Task, events: Events) -> None:
        self.task = task
        self.run = TaskRun(task._replace(no_snapshot=True), events)
        self.source: Optional[Location] = None
        self.locks: Locks = {}

    def locations(self) -> List[Location]:
        texts = [self.task.source] + list(self.task.destinations)
        found = []
        if self.has_source():
            self.source = self.survey_source()
            found, texts = [self.source], texts[1:]
        return found + [self.survey_folder(text) for text in texts]

    def has_source(self) -> bool:
        """Whether the first path is a source, not a folder of backups, which may be the top of a disk as well."""
        endpoint = parse_endpoint(self.task.source)
        if not endpoint.kind.has_subvolumes:
            return False
        try:
            host = self.run.hosts.of(endpoint)
            place = host.look(endpoint.path)
            if place.kind == "folder" and not place.is_top:
                return False
            if self.task.destinations:
                return not is_backup_folder(host, place, self.task.snapshot_folder)
            return place.is_top and host.look(os.path.join(place.path, self.task.snapshot_folder)).kind == "folder"
        except Exception:  # which it meets again, and tells
            return True

    def survey_source(self) -> Location:
        """The snapshots; what is known of them also where the locks cannot be read."""
        location, errors = Location(self.task.source, True), []  # type: Location, List[BackupError]
        with apart(self.run.events, errors.append, self.task.source):
            self.run.open_source()
            if not self.run.folder_exists:
                return location
            listing = self.run.host.list(self.run.folder)
            location = location._replace(listing=listing, entries=source_entries(
                listing, self.run.folder, self.task.prefix, {}))
            self.locks = self.run.host.read_locks(self.run.folder)
            return location._replace(entries=source_entries(listing, self.run.folder, self.task.prefix, self.locks))
        return location._replace(error=errors[0])

    def survey_folder(self, text: str) -> Location:
        errors: List[BackupError] = []
        with apart(self.run.events, errors.append, text):
            endpoint = parse_endpoint(text)
            host = self.run.hosts.of(endpoint)
            folder, listing = list_endpoint(host, endpoint)
            if self.source is None and {LOCK_FILE, PIN_FILE} & listing.others:  # a snapshot folder by itself
                entries = source_entries(listing, folder, self.task.prefix, host.read_locks(folder))
            else:
                locks = locks_on(self.locks, host.look(folder).filesystem) if self.locks else {}
                entries = backup_entries(listing, folder, self.task.prefix, self.source, locks,
                                         self.run.key_of(text) if locks else "")
            instead = "" if entries else found_instead(endpoint, listing, self.task.prefix)
            if instead:
                self.run.events.warning("empty", "no backups {}in {}; {}".format(
                    "" if self.task.prefix is None else "of prefix '{}' ".format(printable(self.task.prefix)),
                    text, instead), folder=folder)
            return Location(text, False, entries, None, listing)
        return Location(text, False, (), errors[0])

    def with_sizes(self, location: Location) -> Location:
        """The location with what is known about sizes; where that is nothing it is no error."""
        if location.error is not None or not location.entries:
            return location
        try:
            host = self.run.hosts.of(parse_endpoint(location.endpoint))
            sizes = host.own_sizes(os.path.dirname(location.entries[0].path))
        except Exception:
            return location
        return location._replace(entries=tuple(
            entry._replace(size=sizes.get(entry.subvolume.subvolid)) for entry in location.entries))

    def end(self) -> None:
        self.run.hosts.end()


def format_time(moment: float) -> str:
    """Seconds since the epoch as ISO 8601 in local time: `2026-01-31T09:30:00+01:00`."""
    text = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(moment))
    return text[:-2] + ":" + text[-2:]


def format_json(value: Any) -> str:
    import json
    return json.dumps(value, indent=1)


def describe_entry(entry: Entry) -> Dict[str, Any]:
    """An entry as `--json` shows it."""
    subvolume = entry.subvolume
    return {"name": subvolume.name, "path": entry.path,
            "time": None if entry.moment is None else format_time(entry.moment),
            "uuid": subvolume.uuid, "parent_uuid": subvolume.parent_uuid, "received_uuid": subvolume.received_uuid,
            "state": entry.state, "size": entry.size, "locks": list(entry.locks),
            "parent_locks": list(entry.parent_locks)}


def describe_locations(locations: Iterable[Location]) -> Dict[str, Any]:
    return {"locations": [{"endpoint": location.endpoint,
                           "error": format_error(location.error) if location.error else None,
                           "snapshots": [describe_entry(entry) for entry in location.entries]}
                          for location in locations]}


class Row(NamedTuple):
    """A line of the table: a snapshot, and its entry at each location (by number) that has one."""

    name: str
    moment: float
    cells: Dict[int, Entry]


def table_rows(locations: Sequence[Location]) -> List[Row]:
    """The lines of the table, oldest first; strangers stand where their name stands in the way, or not at all."""
    rows: List[Row] = []
    by_id: Dict[str, Row] = {}
    by_name: Dict[str, Row] = {}
    for number, location in enumerate(locations):
        for entry in location.entries:
            keys = [key for key in (entry.subvolume.received_uuid, entry.subvolume.uuid) if key]
            name, is_whole = entry.snapshot_name, entry.state == "complete"
            row = next((by_id[key] for key in keys if key in by_id), None) if is_whole else by_name.get(name)
            if row is None or number in row.cells:
                if prefix_of(name) is None:
                    continue
                row = Row(name, entry.moment or 0.0, {})
                rows.append(row)
                by_name.setdefault(name, row)
            row.cells[number] = entry
            if is_whole:
                by_id.setdefault(entry.subvolume.stream_id or "", row)
    return sorted(rows, key=lambda row: (row.moment, row.name))


def cell_text(row: Row, number: int, location: Location, has_source: bool, parents: Set[Optional[str]]) -> str:
    """What stands in the table for a snapshot at a location. parents: stream ids that the next transfers build on."""
    entry = row.cells.get(number)
    if entry is None:
        unknown = "?" if location.error else "-"
        return "missing" if has_source and 0 in row.cells and not location.error else unknown
    words = ["present" if entry.state == "complete" else entry.state]
    if entry.locks and entry.state == "complete":
        words.append("locked")
    if entry.parent_locks or (entry.state == "complete" and entry.subvolume.stream_id in parents):
        words.append("parent")
    return ", ".join(words) + ("  " + format_size(entry.size) if entry.size is not None else "")


def summary_text(location: Location, texts: Sequence[str]) -> str:
    """`12 present, 1 partial, 3 missing`."""
    if location.error:
        return "not listed" if not location.entries else "not all known"
    counts = collections.Counter(text.split(",")[0].split(" ")[0] for text in texts)
    words = [word for word in ("present", "partial", "missing", "foreign") if counts[word]]
    parts = ["{} {}".format(counts[word], word) for word in words]
    shown = counts["present"] + counts["partial"] + counts["foreign"]
    others = len(location.entries) - shown
    parts += [plural(others, "other subvolume")] * (others > 0)
    return ", ".join(parts) or "nothing"


def newest_text(location: Location, now: float) -> str:
    moments = [entry.moment for entry in location.complete() if entry.moment is not None]
    past = [moment for moment in moments if not is_future(moment, now)]
    return "{} ago".format(format_age(now - max(past))) if past else "-"


def format_table(rows: Sequence[Sequence[str]]) -> List[str]:
    """Columns as wide as what they hold; no blanks at the end of a line."""
    rows = [[printable(text) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]


def next_parents(snapshots: Sequence[Subvolume], listing: Listing) -> Set[Optional[str]]:
    """The stream ids of what the next transfer of each prefix builds on."""
    prefixes = {prefix_of(s.name) for s in snapshots}
    found = [newest_common([s for s in snapshots if prefix_of(s.name) == prefix], listing) for prefix in prefixes]
    return {s.stream_id for s in found if s is not None}


def format_locations(locations: Sequence[Location], now: float) -> str:
    """The table, its totals below it."""
    has_source = locations[0].is_source
    snapshots = [entry.subvolume for entry in locations[0].complete()] if has_source else []
    rows = table_rows(locations)
    columns = []
    for number, location in enumerate(locations):
        parents = next_parents(snapshots, location.listing) if has_source and number else set()
        texts = [cell_text(row, number, location, has_source, parents) for row in rows]
        columns.append([location.endpoint] + texts + ["", summary_text(location, texts), newest_text(location, now)])
    names = ["snapshot"] + [row.name for row in rows] + ["", "total", "newest"]
    return "\n".join(format_table(list(zip(names, *columns))))


def check_list(task: Task) -> None:
    """UsageError for what no listing can mean."""
    if not task.source:
        raise UsageError("nothing to list", "btrfs-backup-ng list SOURCE [DESTINATION ...]; see list --help")
    check_folders(task, "listed", "name a folder")


def run_list(task: Task, events: Events) -> int:
    """Prints what is where; 1 where a location could not be listed."""
    survey = Survey(task, events)
    try:
        locations = [survey.with_sizes(location) for location in survey.locations()]
        print_result(format_json(describe_locations(locations)) if task.json else
                     format_locations(locations, time.time()))
    finally:
        survey.end()
    for location in locations:
        if location.error is not None:
            events.error(location.error)
    return 1 if any(location.error for location in locations) else 0


########################################################################################################
# RESTORE: one backup back, beside a subvolume or in its place
#
# choose the backup -> look at the target -> choose the parent -> show, or transfer and swap. The transfer is
# a task's own, from the folder of backups to the target, and its lock stands in the target's folder: of a
# restore that was broken off the next one clears what the lock names. What is there already with the right
# identity is not sent again. Never: anything written where the backup lies; anything overwritten.
########################################################################################################

STREAM_FILES_ARE = "stream files are restored from raw://PATH"
STEP = "restore: a step on the way"  # locks what a chain brings only to build on; no destination's name


def restorable(listing: Listing) -> List[Subvolume]:
    """The subvolumes of a folder that can be restored: complete, and so read-only."""
    return [s for s in listing.subvolumes if s.readonly and s.stream_id and partial_of(s.name) is None]


def choose_named(listing: Listing, name: str, folder: str) -> Subvolume:
    found, broken = listing.named(name), next((b for b in listing.broken if b.name == name), None)
    if broken is not None:
        raise BackupError("{} in {} cannot be restored: {}".format(name, folder, broken.why),
                          "choose another; verify tells which are good")
    if found is None:
        newest = sorted((s.name for s in restorable(listing) if prefix_of(s.name) is not None), reverse=True)[:3]
        raise BackupError("no backup {} in {}".format(name, folder),
                          "there are, among others, {}".format(", ".join(newest)) if newest else "")
    if found not in restorable(listing):
        raise BackupError("{} in {} is writable, so it is no complete backup".format(name, folder),
                          "choose another, or copy from it")
    return found


def only_prefix(backups: Sequence[Subvolume], folder: str) -> str:
    """The prefix that all backups in a folder share."""
    prefixes = sorted({prefix for prefix in (prefix_of(b.name) for b in backups) if prefix is not None})
    if len(prefixes) > 1:
        raise BackupError("{} holds backups of several prefixes: {}".format(folder, ", ".join(
            "'{}'".format(prefix) for prefix in prefixes)), "choose one with -p")
    return prefixes[0] if prefixes else ""


def no_backups(listing: Listing, prefix: str, folder: str) -> BackupError:
    of_prefix = "of prefix '{}' ".format(prefix) if prefix else ""
    if listing.broken:
        return BackupError("no backup {}in {} can be restored".format(of_prefix, folder), "verify says what is wrong")
    return BackupError("no backups {}in {}".format(of_prefix, folder),
                       "look there with ls" + ("" if listing.chained else "; " + STREAM_FILES_ARE))


def choose_newest(listing: Listing, prefix: Optional[str], before: float, folder: str) -> Subvolume:
    """The newest backup by its name's time, and that from before `before` (seconds since the epoch)."""
    backups = restorable(listing)
    chosen = only_prefix(backups, folder) if prefix is None else prefix
    times = {b: snapshot_time(chosen, b.name) for b in backups}
    fitting = [(moment, by_creation(b), b) for b, moment in times.items() if moment is not None and moment < before]
    if not fitting:
        known = sorted(b.name for b, moment in times.items() if moment is not None)
        if known:
            raise BackupError("no backup in {} is from before that time".format(folder),
                              "the oldest is {}".format(known[0]))
        raise no_backups(listing, chosen, folder)
    return max(fitting)[2]


def parents_in_order(backup: Subvolume, listing: Listing) -> List[Subvolume]:
    """The other backups that a restore could build on, the best first: nearest older ones, then newer ones."""
    prefix = prefix_of(backup.name)
    others = [b for b in restorable(listing) if b.stream_id != backup.stream_id and prefix_of(b.name) == prefix]
    ambiguous = ambiguous_ids(others)

    def moment(one: Subvolume) -> Tuple[float, Tuple[int, int, str]]:
        return snapshot_time(prefix or "", one.name) or 0.0, by_creation(one)

    ordered = sorted((b for b in others if b.stream_id not in ambiguous), key=moment)
    older = [b for b in ordered if moment(b) < moment(backup)]
    return older[::-1] + [b for b in ordered if moment(b) > moment(backup)]


def in_other_folder(base: Subvolume) -> Subvolume:
    """A subvolume of another folder of the same filesystem, under a name that none in a folder has."""
    return base._replace(name="/" + base.name)


class RestoreRun:
    """One restore, from the choice of the backup to the last rename."""

    def __init__(self, task: Task, events: Events, clock: Callable[[], float] = time.time) -> None:
        self.task, self.events, self.clock = task, events, clock
        self.sending = TaskRun(task, events, clock=clock)  # does the transfer, from the folder of backups
        self.parent: Optional[Subvolume] = None
        self.swap_place: Optional[SwapPlace] = None
        self.steps: Set[str] = set()  # what a chain has brought or will bring only to build on

    # -- what is restored

    def find_backup(self) -> None:
        """Finds the backup that is meant, and the folder it lies in."""
        text, endpoint, name = self.task.source, parse_endpoint(self.task.source), self.task.backup_name
        is_folder = self.task.latest or self.task.before is not None or name is not None
        path = endpoint.path
        stem = stream_file_stem(path.rstrip("/")) if endpoint.kind.has_streams else path.rstrip("/")
        if not is_folder and prefix_of(os.path.basename(stem)) is not None:
            path, name = os.path.split(stem)  # a restricted key may look at the folder alone
        host = self.sending.hosts.of(endpoint)
        place = host.look(path or ".")
        if place.kind != "folder":
            away = "nothing is mounted at " + place.unmounted if place.unmounted else "is its filesystem mounted?"
            raise BackupError("no such backup: {}".format(text),
                              STREAM_FILES_ARE if STREAM_SUFFIX in os.path.basename(stem) else away)
        folder = place.path
        if not is_folder and name is None:
            if not place.is_top or place.inside is None or folder == "/":
                raise BackupError("{} is a folder, not a backup".format(text),
                                  "choose one in it with --latest, --before TIME or --name NAME")
            folder, name = os.path.split(folder)
        listing = host.list(folder)
        if name is not None:
            self.backup = choose_named(listing, name, folder)
        else:
            limit = min(self.clock() + 1, float("inf") if self.task.before is None else self.task.before)
            self.backup = choose_newest(listing, self.task.prefix, limit, text)
        self.listing, self.filesystem = listing, place.filesystem
        self.sending.host, self.sending.folder = host, folder
        self.sending.snapshots = [self.backup]

    # -- where to

    def find_target(self) -> None:
        """The folder to restore to, as it is now; in place without a folder one of its own beside the place."""
        text = (self.task.destinations + (self.task.in_place or "",))[0]
        target = destination_at(text, destination_key(text))
        host = target.host = self.sending.hosts.of(target.endpoint)
        if self.task.in_place is not None:
            self.swap_place = host.look_at_swap_place(parse_endpoint(self.task.in_place).path)
            if not self.task.destinations:
                target.path = beside(self.swap_place.path, "restored")
        place = host.look(target.path)
        self.check_target(target, place)
        target.path, target.key = place.path, place.path  # the key names it in locks in its own folder
        target.is_new, target.filesystem = place.kind == "missing", place.filesystem
        self.target, self.sending.lock_place = target, (host, target.path)
        self.sending.destinations = [target]

    def check_target(self, target: Destination, place: Place) -> None:
        text = target.text
        if place.kind == "other":
            raise BackupError("{} is not a folder".format(text), "name a folder on btrfs")
        if place.unmounted:
            raise BackupError("nothing is mounted at {}".format(place.unmounted), "mount it and run again")
        if place.kind == "missing" and target.host.look(os.path.dirname(place.path)).kind != "folder":
            raise BackupError("no such folder: {}".format(os.path.dirname(place.path)), "is its filesystem mounted?")
        if place.filesystem is None:
            raise BackupError("{} is not on btrfs".format(text), "a backup can only be restored to btrfs")
        if place.readonly or (place.inside is not None and place.inside.readonly):
            raise BackupError("{} is read-only".format(text), "name a folder that can be written")
        if self.swap_place is not None:
            around = target.host.look(os.path.dirname(self.swap_place.path))
            if around.filesystem != place.filesystem:
                raise BackupError("{} is not on the filesystem of {}".format(text, self.task.in_place),
                                  "leave FOLDER out")

    def check_kept(self) -> None:
        """BackupError where something else bears the name of the restored state in a snapshot folder outside."""
        place, host, name = self.swap_place, self.target.host, self.backup.name
        if place is None:
            return
        folder = host.look(os.path.join(place.path, self.task.snapshot_folder))
        if folder.kind != "folder" or (folder.path + "/").startswith(place.path + "/"):
            return
        listing = host.list(folder.path)
        there = listing.named(name)
        if name in listing.others or there is not None and not (there.readonly and corresponds(self.backup, there)):
            raise BackupError("{} is another one than the snapshot that would be kept there".format(
                os.path.join(folder.path, name)), "move it away")

    def observe_target(self) -> None:
        """Reads what the target holds and what its locks tell, and plans what is left to do."""
        target, sending = self.target, self.sending
        target.listing = Listing() if target.is_new else target.host.list(target.path)
        locks = {} if target.is_new else target.host.read_locks(target.path)
        self.steps = set(locked_names(locks, STEP))
        sending.prefix = prefix_of(self.backup.name) or ""
        sending.locks = {name: entry for name, entry in locks.items()
                         if any(name in locked_names(locks, target.key, kind) for kind in ("locks", "parent_locks"))}
        transfers: Tuple[Transfer, ...] = ()
        if not self.is_there():
            self.check_name(self.backup, "")
            self.choose_parent()
            transfers = self.links() + (Transfer(self.backup, self.parent),)
        target.plan = DestinationPlan(tuple(self.recoveries(transfers)), transfers)

    def recoveries(self, transfers: Sequence[Transfer] = ()) -> List[Recovery]:
        """What is done about partials that locks name: they go, but for those that `transfers` can go on from."""
        usable = [record for record in map(self.usable_record, transfers) if record is not None]
        concerned = [transfer.snapshot for transfer in transfers] or [self.backup]
        return plan_recoveries(self.sending.locks, self.target.key, concerned, self.target.listing or Listing(), usable)

    def check_name(self, backup: Subvolume, why: str) -> None:
        """BackupError unless the target can get a backup under its name; `why` it shall, where it was not asked for."""
        cleared = {s.name for recovery in self.recoveries() for s in recovery.delete}
        problem = name_problem(backup, self.target.listing or Listing(), cleared)
        if problem is not None:
            raise BackupError("{}: {}".format(why or self.target.text, problem.text), problem.remedy(
                self.target.path, self.target.endpoint.machine))

    def usable_record(self, transfer: Transfer) -> Optional[Record]:
        """What a transfer can go on from: it was on the same parent."""
        record = self.target.listing.record_of(transfer.snapshot.name) if self.target.listing else None
        parent = transfer.parent
        is_known = parent is None or parent.stream_id in copies_by_id(self.target.listing or Listing())
        if record is None or self.task.no_resume or not is_known:
            return None
        wanted = (transfer.snapshot.stream_id, parent.stream_id if parent else None,
                  self.sending.base_of(parent, self.target))
        return record if (record.stream_id, record.parent_id, record.base) == wanted else None

    def is_there(self) -> bool:
        """Whether the target holds the backup already, under its name."""
        there = self.target.listing.named(self.backup.name) if self.target.listing is not None else None
        return there is not None and corresponds(self.backup, there)

    def choose_parent(self) -> None:
        if self.listing.chained:
            self.parent = next((b for b in self.listing.subvolumes if b.stream_id == self.backup.parent_uuid), None)
            return
        candidates = parents_in_order(self.backup, self.listing)
        if self.task.no_incremental or not candidates:
            return
        around = os.path.dirname(self.target.path) if self.target.is_new else self.target.path
        found = self.target.host.find_base(around, [b.stream_id or "" for b in candidates])
        if found is not None and self.target.listing is not None:
            self.parent = next(b for b in candidates if b.stream_id == found[0])
            # the transfer takes its base from there, and of several with this id the last
            self.target.listing = self.target.listing._replace(
                subvolumes=self.target.listing.subvolumes + (in_other_folder(found[1]),))

    def links(self) -> Tuple[Transfer, ...]:
        """The streams that come before the backup's own, oldest first, as far as the target lacks what they make."""
        around = os.path.dirname(self.target.path) if self.target.is_new else self.target.path
        by_id = {b.stream_id: b for b in self.listing.subvolumes if b.stream_id}
        links: List[Transfer] = []
        link = self.parent if self.listing.chained else None
        while link is not None and not self.has_base(link, around):
            parent = by_id.get(link.parent_uuid or "")
            if len(links) > len(by_id):  # a host may say anything
                raise BackupError("what {} builds on leads in a circle".format(self.backup.name), "choose another")
            links.insert(0, Transfer(link, parent))
            self.check_name(link, "{}, which {} builds on".format(link.name, self.backup.name))
            link = parent
        return tuple(links)

    def has_base(self, link: Subvolume, around: str) -> bool:
        """Whether the target's filesystem has what a link of the chain makes; then the listing has it from here on."""
        there = self.target.listing.named(link.name) if self.target.listing is not None else None
        if there is not None and corresponds(link, there):
            return True
        found = None if self.task.no_incremental else self.target.host.find_base(around, [link.stream_id or ""])
        if found is None or found[1].received_uuid != link.stream_id or self.target.listing is None:
            return False
        self.target.listing = self.target.listing._replace(
            subvolumes=self.target.listing.subvolumes + (in_other_folder(found[1]),))
        return True

    # -- doing it

    def execute(self) -> None:
        self.find_backup()
        self.find_target()
        if self.finish_broken_swap():
            return
        target, prefix = self.target, prefix_of(self.backup.name)
        self.observe_target()  # what is refused is refused before anything is written
        self.check_kept()
        if target.is_new:
            target.host.make_folder(target.path)
            target.is_new = False
        with contextlib.ExitStack() as stack:
            lock_name = self.backup.name if prefix is None else prefix
            stack.enter_context(target.host.hold(target.path, lock_name, self.task.wait))
            self.observe_target()
            self.transfer()
            if self.swap_place is not None:
                self.hold_replaced(stack, lock_name)
                self.swap(self.swap_place)

    def transfer(self) -> None:
        target = self.target
        self.sending.recover(target)
        if self.is_there():
            self.events.info("present", "{} is already in {}".format(self.backup.name, self.target_name))
            self.clear_steps()
            return
        self.steps |= {t.snapshot.name for t in target.plan.transfers[:-1]}
        self.sending.change_locks(add=[LockChange(name, STEP) for name in sorted(self.steps)])
        for transfer in target.plan.transfers:
            if not target.failed:
                self.sending.transfer(transfer, [target])
        self.clear_steps()  # where a signal interrupts, the locks tell the next run of them
        if target.failed:
            raise BackupError("{} was not restored".format(self.backup.name), self.blame()
                              or "run again when that is mended")
        self.events.emit("restored", "info" if self.task.destinations else "debug", "restored {} to {}".format(
            self.backup.name, self.target_name), snapshot=self.backup.name, folder=target.path)

    def key_of_folder(self, here: str) -> str:
        """What locks and pins call the folder that the backup lies in; here: the name of this machine there."""
        endpoint = parse_endpoint(self.task.source)
        return folder_key(endpoint.kind, endpoint.machine or here, normal_destination(self.sending.folder))

    @property
    def target_name(self) -> str:
        """The folder with the host that it is on."""
        return folder_key(self.target.endpoint.kind, self.target.endpoint.machine, self.target.path)

    def clear_steps(self) -> None:
        """Deletes what a chain has brought only to build on; what is restored is, also where that fails."""
        try:
            self.delete_steps()
        except BackupError as error:
            self.sending.report(error)

    def delete_steps(self) -> None:
        """Deletes them, and where the restore failed what is half there."""
        target = self.target
        if not self.listing.chained:
            return
        for transfer in target.plan.transfers if target.failed else ():
            self.sending.delete_partial(transfer, target)
        named = {b.name: b for b in self.listing.subvolumes if b.name in self.steps - {self.backup.name}}
        left = [s for s in target.host.list(target.path).subvolumes
                if s.name in named and corresponds(named[s.name], s)]
        errors = target.host.delete(target.path, sorted(left, key=by_creation, reverse=True), False)
        for error in errors:
            self.sending.report(error)
        if not errors:
            self.sending.change_locks(clear=[LockChange(name, STEP) for name in self.steps])

    def blame(self) -> str:
        """Which stream file of a chain is damaged, if the one is that failed."""
        place, folder = self.sending.host, self.sending.folder
        sender = place.sender if self.listing.chained else None
        if sender is None or sender.lacks_key:
            return ""
        backup, sha256 = sender.backup, sender.file_digest.hexdigest()
        if not sender.all_read:
            self.events.info("reading", "looking whether {} is damaged".format(backup.file))
            sha256 = place.digest_raw(folder, backup.file).sha256
        if sha256 == backup.file_sha256:
            return ""
        return "{} is damaged: choose another backup, or get it from a copy".format(backup.file)

    def hold_replaced(self, stack: contextlib.ExitStack, lock_name: str) -> None:
        """Keeps backups of the subvolume that is replaced from running meanwhile."""
        if self.swap_place is None or self.swap_place.old is None:
            return
        folder = self.target.host.look(os.path.join(self.swap_place.path, self.task.snapshot_folder))
        if folder.kind == "folder" and folder.path != self.target.path:
            stack.enter_context(self.target.host.hold(folder.path, lock_name, self.task.wait))

    def finish_broken_swap(self) -> bool:
        """Brings a swap that was broken off to its end; whether it was the one that is asked for now."""
        if self.swap_place is None or not self.swap_place.is_broken:
            return False
        path = self.swap_place.path
        notes = self.target.host.finish_swap(path)
        if notes is None:
            self.events.info("undone", "cleared what a broken restore left beside {}".format(path))
        else:
            self.say_swapped(path, notes)
        self.find_target()
        return notes is not None and notes.stream_id == self.backup.stream_id

    def swap(self, place: SwapPlace) -> None:
        host, created = self.target.host, time.gmtime(self.backup.otime / 1e9)
        self.warn_of_swap(place)
        pin = Pin(self.backup.name, self.backup.stream_id or "", time.strftime("%Y-%m-%dT%H:%M:%S", created) + "Z",
                  self.filesystem)
        stamp = time.strftime(TIME_FORMATS[0], time.localtime(self.clock()))
        key = self.key_of_folder("" if isinstance(host, LocalHost) else os.uname().nodename)
        notes = host.swap_in(SwapOrder(
            place.path, os.path.join(self.target.path, self.backup.name), self.backup.name, self.task.snapshot_folder,
            not self.task.destinations, "{}.old-{}".format(os.path.basename(place.path), stamp),
            key, pin))
        self.say_swapped(place.path, notes)
        for point in place.mounts:
            self.events.warning("mounted", "the old subvolume is still mounted at {}: unmount it there and mount it "
                                "again".format(printable(point)), point=point)

    def warn_of_swap(self, place: SwapPlace) -> None:
        if prefix_of(self.backup.name) is None:
            self.events.warning("name", "{} ends in no time, so backups will not go on from it".format(
                self.backup.name))
        if place.old is None:
            return
        snapshots = os.path.join(place.path, self.task.snapshot_folder)
        try:
            nested = self.target.host.nested_subvolumes(place.path, snapshots)
        except Exception as error:
            self.events.warning("nested", "nested subvolumes were not looked for: {}".format(
                explain(error, "cannot list").message))
            return
        if nested:
            self.events.warning("nested", "subvolumes nested in {} stay in the old one: {}".format(
                place.path, some_of(sorted(nested))), paths=nested)

    def say_swapped(self, path: str, notes: SwapNotes) -> None:
        kept = "; the old one is {}".format(os.path.join(os.path.dirname(path), notes.old_name))
        self.events.info("swapped", "{} is now as in {}{}".format(path, notes.name, kept if notes.old_uuid else ""),
                         path=path, snapshot=notes.name, old=notes.old_name if notes.old_uuid else None)

    # -- dry run

    def show(self) -> List[str]:
        """What would be done, in lines."""
        self.find_backup()
        self.find_target()
        self.observe_target()
        self.check_kept()
        target, name = self.target, self.backup.name
        lines = ["restore {} from {}".format(name, self.sending.folder)]
        if self.swap_place is not None and self.swap_place.is_broken:
            lines.append("  complete or undo the restore that was broken off at {}".format(self.swap_place.path))
        lines += ["  make the folder {}".format(target.path)] if target.is_new else []
        lines += ["  delete {}: its transfer was broken off".format(s.name)
                  for recovery in target.plan.recoveries for s in recovery.delete]
        for transfer in target.plan.transfers:
            lines.append("  {} to {}, {}".format(describe_transfer(transfer), target.path, self.size_of(transfer)))
        if not target.plan.transfers:
            lines.append("  nothing to send: {} is already in {}".format(name, target.path))
        return lines + self.describe_swap()

    def size_of(self, transfer: Transfer) -> str:
        measuring = self.sending.host.measure_send(self.sending.folder, transfer.snapshot.name,
                                                   transfer.parent.name if transfer.parent else None)
        try:
            return "about {}".format(format_size(measuring.wait().stream_size))
        finally:
            measuring.end()

    def describe_swap(self) -> List[str]:
        if self.swap_place is None:
            return []
        path, old = self.swap_place.path, self.swap_place.old
        kept = ", keep the old one as {}.old-DATE".format(path) if old is not None else ""
        lines = ["  put a writable snapshot of it at {}{}".format(path, kept)]
        return lines + ["  delete {} again".format(self.target.path)] * (not self.task.destinations)


def run_restore(task: Task, events: Events) -> int:
    """Does one restore; the exit status."""
    run = RestoreRun(task, events)
    try:
        if task.dry_run:
            print_result("\n".join(run.show()))
        else:
            run.execute()
    finally:
        run.sending.hosts.end()
    return 1 if run.sending.failed else 0


########################################################################################################
# PRUNE: retention of a folder of backups by itself
#
# No source is looked at: what is kept is decided by names, and by what the folder itself tells of transfers
# that are not complete. Each prefix is counted by itself. A folder is worked on under the same lock as a
# run that has it as its snapshot folder, so that two do not collide. Never deleted: what is no complete
# backup, but for partials that are provably ours, unused and old, and only where that is asked for.
########################################################################################################


def plan_prune(listing: Listing, prefix: str, policy: Policy, protected: Dict[str, str], now: float) -> List[Verdict]:
    """Verdicts on the backups of `prefix` in a folder."""
    moments = backup_moments(prefix, backups_of(listing, prefix), [])
    return keep_chains(plan_retention(moments, policy, protected, now), listing)


def abandoned_partials(listing: Listing, prefix: str, idle: Dict[str, float], limit: float) -> List[Subvolume]:
    """Partial backups of `prefix` that nothing uses and nothing has changed for `limit` seconds, oldest first."""
    found = [s for s in listing.subvolumes if idle.get(s.name, -1.0) >= limit
             and name_time(prefix, partial_of(s.name) or "") is not None]
    return sorted(found, key=by_creation)


def lone_lock_names(listing: Listing, prefix: str) -> List[str]:
    """Snapshots of `prefix` of whose transfers to a folder nothing is left but a lock file."""
    names = {partial_of(name[:-len(".lock")]) for name in listing.others if name.endswith(".partial.lock")}
    busy = {partial_of(s.name) for s in listing.subvolumes} | {record.name for record in listing.records}
    return sorted(name for name in names - busy if name and name_time(prefix, name) is not None)


class Pruning:
    """The pruning of one folder."""

    def __init__(self, task: Task, hosts: Hosts, text: str, events: Events) -> None:
        self.task, self.hosts, self.text, self.events = task, hosts, text, events
        self.deleted = self.kept = 0
        self.statuses: Set[int] = set()  # of what was not done
        self.told: Set[str] = set()

    def run(self) -> None:
        """Does each prefix by itself: one that another run is at work on, or that fails, does not stop the others."""
        with apart(self.events, self.report, self.text):
            endpoint = parse_endpoint(self.text)
            self.host = self.hosts.of(endpoint)
            self.folder, listing = list_endpoint(self.host, endpoint)
            for prefix in folder_prefixes(listing, self.task.prefix):
                self.try_to_prune(prefix)
            if self.deleted and self.task.sync and not self.task.dry_run:
                self.host.wait_for_cleaning(self.folder)
            if not self.deleted and not self.kept and not self.statuses:
                self.tell_empty(listing)

    def try_to_prune(self, prefix: str) -> None:
        with apart(self.events, self.report, self.text):
            if self.task.dry_run:
                self.prune(prefix)
            else:
                with self.host.hold(self.folder, prefix, self.task.wait):
                    self.prune(prefix)

    def tell_empty(self, listing: Listing) -> None:
        """An error where something else was meant: a prefix, stream files. Else nothing would ever be deleted."""
        prefix, instead = self.task.prefix, found_instead(parse_endpoint(self.text), listing, self.task.prefix)
        if prefix is None and not instead:
            self.events.warning("empty", "no backups in {}".format(self.text), folder=self.folder)
            return
        what = "no backups" if prefix is None else "no backups of prefix '{}'".format(prefix)
        self.report(BackupError("{} in {}".format(what, self.text), instead or "look there with list"))

    def report(self, error: BackupError) -> None:
        """Tells an error, once where it is the same for each prefix."""
        self.statuses.add(error.status)
        text = error.message if self.text in error.message else "{}: {}".format(self.text, error.message)
        if text not in self.told:
            self.told.add(text)
            self.events.error(BackupError(text, error.hint, error.detail))

    def prune(self, prefix: str) -> None:
        """Looks at what there is now, and deletes what goes of one prefix."""
        listing = self.host.list(self.folder)
        protected = known_protections(listing, prefix, self.host.read_notes(self.folder, prefix))
        verdicts = plan_prune(listing, prefix, self.task.backup_policy, protected, time.time())
        self.tell_kept(verdicts)
        named = {s.name: s for s in listing.subvolumes}
        self.delete([(named[v.name], v.reason) for v in deletions(verdicts)], self.task.convert_rw)
        self.tell_needed(verdicts)
        if self.task.partials_older_than is not None:
            idle = self.host.idle_partials(self.folder)
            self.delete([(s, "of a transfer that was broken off, unchanged for {}".format(format_age(idle[s.name])))
                         for s in abandoned_partials(listing, prefix, idle, self.task.partials_older_than)], False)
            self.delete_lone_locks(listing, prefix)

    def delete_lone_locks(self, listing: Listing, prefix: str) -> None:
        """Deletes what is left of a broken transfer whose partial is gone: a lock file, unless it is held."""
        lone = lone_lock_names(listing, prefix)
        if self.task.dry_run:
            for name in lone:
                print_result("  delete {}: of a transfer that was broken off".format(partial_lock_name(name)))
        elif lone:
            for error in self.host.forget_partials(self.folder, lone):
                self.report(error)
            gone = set(lone) - set(lone_lock_names(self.host.list(self.folder), prefix))
            self.events.info("deleting", "deleted {} at {}: of transfers that were broken off".format(
                some_of([partial_lock_name(name) for name in sorted(gone)]), self.text), folder=self.folder)

    def tell_kept(self, verdicts: Sequence[Verdict]) -> None:
        for verdict in verdicts:
            self.kept += verdict.keep
            if verdict.keep and self.task.dry_run and self.task.verbosity == "debug":
                print_result("  keep {}: {}".format(verdict.name, verdict.reason))
            elif verdict.keep:
                self.events.debug("kept", "kept {} at {}: {}".format(verdict.name, self.text, verdict.reason))

    def tell_needed(self, verdicts: Sequence[Verdict]) -> None:
        needed = describe_needed(verdicts, self.text, self.task.backup_policy)
        if needed and self.task.dry_run:
            print_result("  " + needed)
        elif needed:
            self.events.info("needed", needed, folder=self.folder)

    def delete(self, doomed: Sequence[Tuple[Subvolume, str]], convert_rw: bool) -> None:
        """Deletes subvolumes, each with its reason; a dry run only says so."""
        if self.task.dry_run:
            for subvolume, reason in doomed:
                print_result("  delete {}: {}".format(subvolume.name, reason))
            self.deleted += len(doomed)
            return
        for subvolume, reason in doomed:
            self.events.info("deleting", "deleting {} at {}: {}".format(subvolume.name, self.text, reason),
                             name=subvolume.name, folder=self.folder, reason=reason)
        errors = self.host.delete(self.folder, [subvolume for subvolume, _ in doomed], convert_rw)
        for error in errors:
            self.report(error)
        self.deleted += len(doomed) - len(errors)


def check_prune(task: Task) -> None:
    """UsageError where nothing says what to keep, or where there is nothing to prune."""
    if not task.source:
        raise UsageError("no folder given", "btrfs-backup-ng prune [options] FOLDER ...; see prune --help")
    policy = task.backup_policy
    if policy.keeps_all and not policy.everything and task.partials_older_than is None:
        raise UsageError("nothing says what to keep",
                         "give --keep-backups '14d 8w 12m' or -n NUMBER, or --partials-older-than alone")
    check_folders(task, "pruned", "name a folder")


def run_prune(task: Task, events: Events) -> int:
    """Prunes each folder; one that fails does not stop the others. The status of what failed, 1 where that differs."""
    hosts = Hosts(task, events)
    failures, deleted, kept = set(), 0, 0  # type: Set[int], int, int
    try:
        for text in (task.source,) + task.destinations:
            if task.dry_run:
                print_result("folder {}".format(text))
            pruning = Pruning(task, hosts, text, events)
            pruning.run()
            failures |= pruning.statuses
            deleted, kept = deleted + pruning.deleted, kept + pruning.kept
    finally:
        hosts.end()
    if not task.dry_run:
        events.info("done", "{}: {} deleted, {} kept".format(
            "finished with errors" if failures else "done", plural(deleted, "subvolume"),
            plural(kept, "backup")))
    return failures.pop() if len(failures) == 1 else int(bool(failures))


########################################################################################################
# DOCTOR: what is wrong, and what to do about it
#
# A check is a generator of findings about one place: ok, a problem with its remedy, or not checked. An
# error in a check is a problem; what a key may not ask, or what could not be looked at because an earlier
# check failed, is "not checked". For a monitor (--max-age) that is a problem as well. Which checks a place
# has says one table, so that none is left out without a word. A remedy is words, or a command with every
# option that matters. The rules are those of a run, asked of the same functions. Never: anything changed,
# anybody kept waiting, a remedy that sends or deletes what the ordinary run would not.
########################################################################################################

OK, PROBLEM, NOT_CHECKED = "ok", "problem", "not checked"
OLDEST_PROGS = (3, 12)
OLDEST_CLOCK = 1704067200.0  # seconds since the epoch: 2024, when none of this was written yet
MOST_CLOCK_SHIFT = 600.0  # seconds between two hosts
LITTLE_SPACE = 10 << 30  # bytes; less than this and less than a twentieth is a problem
LONG_AWAY = 30 * 86400.0  # seconds; a destination that nobody has backed up to for so long keeps a snapshot in vain
SEE_ABOVE = "see above"  # why something was not checked that needs what is said there
GROUND = ("space", "quotas", "devices")
CHECKS = {  # that belong to each kind of place
    "this machine": ("programs", "kernel", "privileges", "clock"),
    "host": ("connection", "programs", "kernel", "privileges", "clock"),
    "source": ("source", "identity", "snapshots", "locks", "notes") + GROUND,
    "destination folder": ("folder", "backups", "parent", "partials") + GROUND + ("age",),
    "destination raw folder": ("folder", "backups", "parent", "partials", "space", "age"),
    "destination command": ("folder", "age"),
    "folder": ("backups", "partials") + GROUND + ("age",),
    "raw folder": ("backups", "partials", "space", "age"),
}


class Finding(NamedTuple):
    """What a check found: a state, what is so, and what to do about it, a line for each thing that may help."""

    state: str
    text: str
    remedy: str = ""


class Checked(NamedTuple):
    """A finding, of which check, about which place ('' is this machine)."""

    name: str
    where: str
    finding: Finding


Findings = Iterator[Finding]


def check_programs(facts: HostFacts) -> Findings:
    version = parse_version(facts.progs)
    if not facts.progs:
        yield Finding(PROBLEM, "the program btrfs is not installed", "install the package " + PACKAGES["btrfs"])
    elif version < OLDEST_PROGS:
        yield Finding(PROBLEM, "{} is too old".format(facts.progs), "install btrfs-progs 3.12 or later, best 6.2")
    else:
        yield Finding(OK, ", ".join((facts.progs,) + facts.programs))


def check_kernel(facts: HostFacts) -> Findings:
    text = "Linux {}, Python {}".format(facts.kernel, facts.python)
    if facts.has_btrfs:
        yield Finding(OK, text)
    else:
        yield Finding(PROBLEM, "this kernel has not loaded btrfs ({})".format(text), "modprobe btrfs")


def check_privileges(facts: HostFacts, is_remote: bool) -> Findings:
    if facts.user == 0:
        yield Finding(OK, "root")
    else:
        yield Finding(PROBLEM, "user {} is not root, as btrfs send and receive need".format(facts.user),
                      "log in as root there, or use --ssh-sudo" if is_remote else "run as root")


def check_clock(facts: HostFacts, is_remote: bool, now: float) -> Findings:
    shown = format_time(facts.clock)
    if facts.clock < OLDEST_CLOCK:
        yield Finding(PROBLEM, "the clock says {}".format(shown), "set the clock: names of snapshots come from it")
    elif is_remote and abs(facts.clock - now) > MOST_CLOCK_SHIFT:
        yield Finding(PROBLEM, "its clock says {}, this machine's {}".format(shown, format_time(now)),
                      "set the clock that is wrong")
    else:
        yield Finding(OK, shown)


def check_space(health: Health) -> Findings:
    text = "{} of {} free".format(format_size(health.free), format_size(health.size))
    if health.free < min(health.size / 20, LITTLE_SPACE):
        yield Finding(PROBLEM, "only " + text,
                      "free some space, or keep less: -N, -n, --keep-snapshots, --keep-backups")
    else:
        yield Finding(OK, text)


def check_quotas(health: Health, folder: str) -> Findings:
    if health.quotas is None:
        yield Finding(NOT_CHECKED, "quotas could not be asked", "run as root")
        return
    full = [(qgroup, used, limit) for qgroup, used, limit in health.limits if used > 0.95 * limit]
    for qgroup, used, limit in full:
        yield Finding(PROBLEM, "qgroup {} has used {} of its limit of {}".format(
            qgroup, format_size(used), format_size(limit)), typed(["btrfs", "qgroup", "limit", "none", qgroup, folder]))
    if not full:
        yield Finding(OK, "enabled; they make deleting slow" if health.quotas else "not enabled")


def check_devices(health: Health, folder: str) -> Findings:
    if health.errors is None:
        yield Finding(NOT_CHECKED, "the devices could not be asked", "run as root")
        return
    for device in health.missing:
        yield Finding(PROBLEM, "device {} is missing: what has a copy on it has no other, or none".format(device),
                      "connect it, or replace it by another: btrfs replace start {} /dev/... {}".format(
                          device, quoted(folder)))
    if health.errors:
        yield Finding(PROBLEM, "errors were counted: {}".format(", ".join(health.errors)),
                      "see dmesg; then, which also sets the counters back: {} && {}".format(
                          typed(["btrfs", "scrub", "start", "-B", folder]),
                          typed(["btrfs", "device", "stats", "-z", folder])))
    elif not health.missing:
        yield Finding(OK, "no errors were counted")


def check_identity(place: Place, snapshots: Sequence[Subvolume]) -> Findings:
    """Whether snapshots can be told from each other."""
    if place.inside is not None and place.inside.received_uuid is not None:
        yield Finding(PROBLEM, "the source has a received UUID, so that all its snapshots would look alike",
                      "take a writable snapshot of it with 'btrfs subvolume snapshot' and use that in its place")
        return
    shared = ambiguous_ids(snapshots)
    alike = [s.name for s in snapshots if s.stream_id in shared]
    if alike:
        yield Finding(PROBLEM, "snapshots with the same identity: {}".format(some_of(alike)), "delete all but one")
    else:
        yield Finding(OK, "each snapshot has its own")


def check_snapshots(snapshots: Sequence[Subvolume], folder: str, now: float) -> Findings:
    future = [s.name for s in snapshots if is_future(name_moment(s.name) or 0.0, now)]
    if future:
        yield Finding(PROBLEM, "names from the future: {}".format(some_of(future)),
                      "set the clock if it is wrong, else delete them: they are kept and not counted")
    else:
        yield Finding(OK, "{} in {}".format(plural(len(snapshots), "snapshot"), folder))


def check_age(entries: Sequence[Entry], limit: Optional[float], now: float) -> Findings:
    """Whether the newest complete backup of all these is young enough."""
    past = [(e.moment, e.subvolume.name) for e in entries if e.moment is not None and not is_future(e.moment, now)]
    if not past:
        yield Finding(NOT_CHECKED if limit is None else PROBLEM, "no complete backup yet", "make one")
        return
    moment, name = max(past)
    text = "the newest backup {} is {} old".format(name, format_age(now - moment))
    if limit is not None and now - moment > limit:
        yield Finding(PROBLEM, "{}, more than {}".format(text, format_age(limit)),
                      "see why the last run failed, or run one now")
    else:
        yield Finding(OK, text)


def check_partials(listing: Listing, prefix: Optional[str], locked: Set[str], idle: Dict[str, float],
                   place: Tuple[str, str]) -> Findings:
    """What was broken off and no lock names. idle: the partials that nothing uses; place: folder and machine."""
    names = [s.name for s in listing.subvolumes if is_unfinished(s) and is_asked_for(s, prefix, set())]
    orphans = [name for name in names if (partial_of(name) or name) not in locked
               and (name in idle or partial_of(name) is None)]
    for name in orphans:
        yield Finding(PROBLEM, "{} is of a broken transfer, and no lock of the source names it".format(name),
                      left_remedy("if nothing is writing it", os.path.join(place[0], name), listing.chained, place[1]))
    if not orphans:
        yield Finding(OK, "{} under way or to be taken up".format(plural(len(names), "transfer")) if names else "none")


def check_parent(snapshots: Sequence[Subvolume], listing: Listing, prefix: str) -> Findings:
    """What the next transfer builds on."""
    newest, backups = newest_common(snapshots, listing), backups_of(listing, prefix)
    if newest is not None:
        yield Finding(OK, "the next backup builds on {}".format(newest.name))
    elif backups:
        yield Finding(PROBLEM, "none of the {} has its snapshot at the source: the next one is sent in full".format(
            plural(len(backups), "backup")), "are -p and -f those of the backups? Else let it be sent in full once")
    else:
        yield Finding(OK, "no backups {}yet: the first one is sent in full".format(
            "of prefix '{}' ".format(prefix) if prefix else ""))


def check_lock(task: Task, key: Tuple[str, str], names: Sequence[str], folder: str) -> Finding:
    """A lock that nobody works on. key: prefix and destination; folder: where the snapshots are."""
    prefix, destination = key
    if destination in (folder, STEP):
        return Finding(PROBLEM, "a restore of {} into {} was broken off".format(some_of(names), folder),
                       "restore it again, which goes on where it stopped")
    return Finding(PROBLEM, "a transfer to {} was broken off: {}".format(printable(destination), some_of(names)),
                   "back up to it again as usual, which completes it\nif it will not come back: {}".format(
                       forget_command(task, prefix, destination)))


def check_pins(task: Task, key: Tuple[str, str], pins: Sequence[Pin], now: float) -> Findings:
    """What is kept at the source for a destination, one for each disk that takes a turn there. key: prefix and it."""
    prefix, destination = key
    for pin in pins:
        moment = name_moment(pin.name)
        age = 0.0 if moment is None else now - moment
        text = "{} is kept for {}{}, and {} old".format(
            pin.name, printable(destination), " on filesystem {}".format(pin.filesystem) * (len(pins) > 1),
            format_age(age))
        yield Finding(OK, text) if age <= LONG_AWAY else Finding(
            PROBLEM, text, "back up to it again\nif it will not come back{}: {}".format(
                ", forget all disks of that place, then back up to the others" * (len(pins) > 1),
                forget_command(task, prefix, destination)))


def for_monitors(checked: Checked) -> Checked:
    """A finding as a monitor must see it: what was not checked is not ok."""
    finding = checked.finding
    if finding.state == NOT_CHECKED and finding.text != SEE_ABOVE:
        finding = Finding(PROBLEM, "not checked: {}".format(finding.text), finding.remedy)
    return checked._replace(finding=finding)


def place_words(task: Task) -> List[str]:
    """The one place that a task names, for a command that needs no source."""
    words = ["-p", task.prefix] if task.prefix is not None else []
    words += ["--ssh-opt=" + option for option in task.ssh_options] + ["--ssh-sudo"] * task.ssh_sudo
    return words + ["--", task.source]


def nearest_place(host: Any, path: str) -> Place:
    """What is at `path`, or where it is missing at the nearest folder above it that is there."""
    place: Place = host.look(path)
    while place.kind == "missing" and place.path != "/":
        place = host.look(os.path.dirname(place.path))
    return place


def check_unused(listing: Listing, idle: Dict[str, float], task: Task) -> Findings:
    """Partials in a folder of backups by itself: only their sources know whether they are still wanted."""
    names = [s.name for s in listing.subvolumes
             if partial_of(s.name) is not None and is_asked_for(s, task.prefix, set())]
    old = [name for name in names if idle.get(name, 0.0) > 7 * 86400]
    if old:
        yield Finding(PROBLEM, "unchanged for more than a week: {}".format(some_of(old)),
                      typed(["btrfs-backup-ng", "prune", "--partials-older-than", "7d"] + place_words(task)))
    else:
        yield Finding(OK, "{} under way or to be taken up".format(plural(len(names), "transfer")) if names else "none")


class Doctor:
    """Examines this machine and what a task names."""

    def __init__(self, task: Task, events: Events) -> None:
        self.task, self.now = task, time.time()
        self.run = TaskRun(task._replace(no_snapshot=True), events)
        self.checked: List[Checked] = []
        self.machines: Set[str] = set()
        self.locks: Locks = {}
        self.all_pins: Pins = {}
        self.snapshots: List[Subvolume] = []

    def record(self, name: str, where: str, finding: Finding) -> None:
        self.checked.append(Checked(name, where, finding))

    def ask(self, name: str, where: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """What a call gives; None where it fails, which is the finding of check `name` then."""
        try:
            return call(*arguments)
        except Refused as refusal:
            self.record(name, where, Finding(NOT_CHECKED, refusal.message, refusal.hint))
        except Exception as error:
            told = explain(error, "cannot look")
            text = "; ".join([told.message] + told.detail.splitlines()[-2:])
            self.record(name, where, Finding(PROBLEM, text, told.hint))
        return None

    def examine(self, name: str, where: str, check: Callable[..., Findings], *arguments: Any) -> bool:
        """Does a check; whether all was ok."""
        findings = self.ask(name, where, lambda: list(check(*arguments)))
        for finding in findings or ():
            self.record(name, where, finding)
        return findings is not None and all(finding.state == OK for finding in findings)

    @contextlib.contextmanager
    def place(self, kind: str, where: str) -> Iterator[None]:
        """What is examined at one place; those of its checks that were not made show as that."""
        yield
        made = {checked.name for checked in self.checked if checked.where == where}
        for name in CHECKS[kind]:
            if name not in made:
                self.record(name, where, Finding(NOT_CHECKED, SEE_ABOVE))

    # -- machines

    def examine_machine(self, endpoint: Optional[Endpoint]) -> bool:
        """The machine of an endpoint, None for this one; each once. Whether it can be reached."""
        endpoint = (endpoint or Endpoint("", SUBVOLUMES, "/"))._replace(kind=SUBVOLUMES)
        where = endpoint.machine
        if where not in self.machines:
            self.machines.add(where)
            with self.place("host" if where else "this machine", where):
                if not where or self.examine("connection", where, self.check_connection, endpoint):
                    self.examine_facts(endpoint, where)
        return where not in self.run.hosts.errors

    def examine_facts(self, endpoint: Endpoint, where: str) -> None:
        facts = self.ask("programs", where, lambda: self.run.hosts.of(endpoint).facts())
        if facts is not None:
            self.examine("programs", where, check_programs, facts)
            self.examine("kernel", where, check_kernel, facts)
            self.examine("privileges", where, check_privileges, facts, bool(where))
            self.examine("clock", where, check_clock, facts, bool(where), time.time())

    def check_connection(self, endpoint: Endpoint) -> Findings:
        begun = time.monotonic()
        host = self.run.hosts.of(endpoint)
        yield Finding(OK, "reached in {}".format(format_duration(time.monotonic() - begun)))
        if isinstance(host, ShellHost):
            yield Finding(PROBLEM, "there is no python3 that could be used: plain commands do only the main job",
                          "install Python 3.6 or later there")

    def examine_ground(self, endpoint: Endpoint, folder: str, where: str) -> None:
        """The filesystem that holds a folder, or will hold it."""
        host = self.run.hosts.of(endpoint._replace(kind=SUBVOLUMES))
        place = self.ask("space", where, nearest_place, host, folder)
        health = self.ask("space", where, lambda: host.health(place.path)) if place else None
        if health is not None:
            self.examine("space", where, check_space, health)
            if place.filesystem is not None:
                self.examine("quotas", where, check_quotas, health, place.path)
                self.examine("devices", where, check_devices, health, place.path)

    # -- the source

    def examine_source(self) -> bool:
        where, endpoint = self.task.source, parse_endpoint(self.task.source)
        is_reached = self.examine_machine(endpoint)
        with self.place("source", where):
            if not is_reached or not self.examine("source", where, self.check_source):
                return False
            self.examine("identity", where, check_identity, self.run.source_place, self.snapshots)
            self.examine("snapshots", where, check_snapshots, self.snapshots, self.run.folder, self.now)
            self.examine("locks", where, self.check_locks)
            self.examine("notes", where, self.check_notes)
            self.examine_ground(endpoint, self.run.source, where)
            return True

    def check_source(self) -> Findings:
        run = self.run
        run.open_source()
        listing = run.host.list(run.folder) if run.folder_exists else Listing()
        self.snapshots = sorted((s for s in listing.subvolumes if snapshot_state(s) == "complete"
                                 and is_asked_for(s, self.task.prefix, set())), key=by_creation)
        run.check_writable()
        run.check_snapshot_folder()
        yield Finding(OK, "a subvolume on btrfs")

    def check_locks(self) -> Findings:
        """Locks of transfers that nobody works on."""
        self.locks = self.run.host.read_locks(self.run.folder) if self.run.folder_exists else {}
        broken: Dict[Tuple[str, str], List[str]] = {}
        for name, entry in locks_on(self.locks).items():
            prefix = prefix_of(name)
            if prefix is not None and self.task.prefix in (None, prefix):
                for destination in entry.get("locks", ()):
                    broken.setdefault((prefix, destination), []).append(name)
        held = {prefix for prefix, _ in broken if self.run.host.is_held(self.run.folder, prefix)}
        stale = {key: names for key, names in sorted(broken.items()) if key[0] not in held}
        for key, names in stale.items():
            yield check_lock(self.task, key, names, self.run.folder)
        if not stale:
            yield Finding(OK, "a run is at work" if held else "no transfer is unfinished")

    def check_notes(self) -> Findings:
        """What the source remembers of its destinations; with a source alone, how old that is."""
        self.all_pins = self.run.host.read_pins(self.run.folder) if self.run.folder_exists else {}
        own = self.run.prefix
        self.run.pins = {key: entry[own] for key, entry in self.all_pins.items() if own in entry}
        named = {self.run.key_of(text) for text in self.task.destinations}
        kept = {(prefix, key): pins for key, entry in self.all_pins.items() for prefix, pins in entry.items()
                if self.task.prefix in (None, prefix)}
        for key, pins in sorted(kept.items()):
            # of those named, and for a monitor of all, the age is a check of its own
            is_judged = key[1] in named or self.task.max_age is not None
            for finding in check_pins(self.task, key, pins, self.now):
                yield Finding(OK, finding.text) if is_judged else finding
        if not kept:
            yield Finding(OK, "no destination is remembered")

    def examine_remembered(self, only: Optional[str] = None) -> None:
        """The ages of the backups at destinations (or `only` one) that the source remembers, without looking there."""
        newest: Dict[str, List[Entry]] = {key: [] for key in self.all_pins if only in (None, key)}
        if only is not None:
            newest.setdefault(only, [])
        for key, entries in sorted(newest.items()):
            for prefix, pins in self.all_pins.get(key, {}).items():
                if self.task.prefix in (None, prefix):
                    entries += [Entry(Subvolume(pin.name, pin.uuid), "", "complete", name_moment(pin.name))
                                for pin in pins]
            self.examine("age", key, check_age, entries, self.task.max_age, self.now)
        if not newest:
            self.record("age", self.task.source, Finding(
                PROBLEM, "no destination has ever got a backup", "make one, or name the destination"))

    # -- destinations

    def examine_destination(self, text: str, source_known: bool) -> None:
        endpoint = parse_endpoint(text)
        if not endpoint.kind.has_folder:
            with self.place("destination " + endpoint.kind.name, text):
                self.record("folder", text, Finding(OK, "a command, which cannot be asked what it has got"))
                if source_known:
                    self.examine_remembered(self.run.key_of(text))
            return
        is_reached = self.examine_machine(endpoint)
        with self.place("destination " + endpoint.kind.name, text):
            if is_reached and source_known:
                self.examine_known(destination_at(text, self.run.key_of(text)))
            elif is_reached:
                self.examine_folder(endpoint)

    def examine_known(self, destination: Destination) -> None:
        """A destination of a source that is known."""
        is_fine = self.examine("folder", destination.text, self.check_folder, destination)
        if is_fine and destination.listing is not None:
            self.examine_backups(destination, destination.listing)

    def check_folder(self, destination: Destination) -> Findings:
        place = destination.look(self.run.hosts)
        self.run.check_destination(destination, place)
        listing = Listing() if destination.is_new else destination.host.list(place.path)
        for prefix in sorted(self.prefixes()) if not destination.is_new else ():
            self.check_owner(destination, listing, prefix)
        destination.listing = listing
        yield Finding(OK, "the first run makes it" if destination.is_new else
                      "on btrfs, writable" if destination.endpoint.kind.has_subvolumes else "writable")

    def prefixes(self) -> Set[str]:
        """The prefixes that runs of the source may have."""
        return {prefix_of(s.name) or "" for s in self.snapshots} | {self.run.prefix}

    def check_owner(self, destination: Destination, listing: Listing, prefix: str) -> None:
        """BackupError where a run with that prefix would be refused: its notes there are damaged, or of another."""
        run = self.run
        destination.notes = destination.host.read_notes(destination.path, prefix)
        try:
            notes = run.host.read_notes(run.folder, prefix) if run.folder_exists else NO_NOTES
        except BackupError:  # which the checks of the source tell
            return
        snapshots = [s for s in self.snapshots if name_time(prefix, s.name)]
        run.check_owned(destination, listing, prefix,
                        Owner(snapshots, run.source_ids(notes), notes.pins.get(destination.key, ())))

    def examine_backups(self, destination: Destination, listing: Listing) -> None:
        where, host = destination.text, destination.host
        source = Location(self.task.source, True, source_entries(
            Listing(tuple(self.snapshots)), self.run.folder, self.task.prefix, self.locks))
        locks = locks_on(self.locks, destination.filesystem)
        entries = backup_entries(listing, destination.path, self.task.prefix, source, locks, destination.key)
        prefixes = self.prefixes()
        own = [e for e in entries if e.state == "complete" and prefix_of(e.snapshot_name) in prefixes]
        self.examine("backups", where, self.check_backups, destination, listing, own)
        for prefix in sorted(prefixes):
            snapshots = [s for s in self.snapshots if name_time(prefix, s.name)]
            if snapshots or backups_of(listing, prefix) or len(prefixes) == 1:
                self.examine("parent", where, check_parent, snapshots, listing, prefix)
        locked = set(locked_names(locks, destination.key))
        idle = {} if destination.is_new else self.ask(
            "partials", where, lambda: host.idle_partials(destination.path))
        if idle is not None:
            self.examine("partials", where, check_partials, listing, self.task.prefix, locked, idle,
                         (destination.path, destination.endpoint.machine))
        self.examine_ground(destination.endpoint, destination.path, where)
        self.examine("age", where, check_age, own, self.task.max_age, self.now)

    def check_backups(self, destination: Destination, listing: Listing, own: Sequence[Entry]) -> Findings:
        """What the next run could not send, and why: the same rules, with everything to be kept."""
        problems: List[Problem] = []
        # which the check of partials tells of
        unfinished = {partial_of(s.name) or s.name for s in listing.subvolumes if is_unfinished(s)}
        for prefix in sorted({prefix_of(s.name) or "" for s in self.snapshots}):
            snapshots = [s for s in self.snapshots if name_time(prefix, s.name)]
            locks = locks_on(own_locks(self.locks, prefix), destination.filesystem)
            recoveries = plan_recoveries(locks, destination.key, snapshots, listing)
            plan = plan_transfers(snapshots, listing, prefix, Policy(), self.now, recoveries)
            problems += [Problem(r.snapshot, r.problem, LOCKED_HINT) for r in plan.recoveries if r.problem]
            problems += [problem for problem in plan.problems if problem.snapshot not in unfinished]
        named = {problem.snapshot for problem in problems}
        problems += [Problem(b.name, "its {} cannot be restored: {}".format(b.name, b.why), "see verify")
                     for b in listing.broken if b.name not in named]
        for problem in problems:
            yield Finding(PROBLEM, problem.text, problem.remedy(destination.path, destination.endpoint.machine))
        if not problems:
            yield Finding(OK, plural(len(own), "complete backup"))

    # -- a folder of backups alone

    def examine_folder(self, endpoint: Endpoint) -> None:
        found = self.ask("backups", endpoint.text, lambda: list_endpoint(self.run.hosts.of(endpoint), endpoint))
        if found is not None:
            self.examine_listed(endpoint, *found)

    def examine_listed(self, endpoint: Endpoint, folder: str, listing: Listing) -> None:
        """A folder of backups that could be listed."""
        host, text = self.run.hosts.of(endpoint), endpoint.text
        prefixes = folder_prefixes(listing, self.task.prefix) or [""]
        groups = [[e for e in backup_entries(listing, folder, prefix, None, {}, "") if e.state == "complete"]
                  for prefix in prefixes]
        for broken in listing.broken:
            self.record("backups", text, Finding(PROBLEM, "{} cannot be restored: {}".format(broken.name, broken.why),
                                                 "see verify"))
        self.record("backups", text, Finding(OK, plural(sum(map(len, groups)), "complete backup")))
        idle = self.ask("partials", text, lambda: host.idle_partials(folder))
        if idle is not None:
            self.examine("partials", text, check_unused, listing, idle, self.task)
        self.examine_ground(endpoint, folder, text)
        for entries in groups:
            self.examine("age", text, check_age, entries, self.task.max_age, self.now)

    def is_folder_alone(self) -> bool:
        """Whether the one path given is a folder of backups."""
        endpoint = parse_endpoint(self.task.source)
        if self.task.destinations:
            return False
        if endpoint.kind.has_streams:
            return True
        try:
            host = self.run.hosts.of(endpoint)
            place = host.look(endpoint.path)
            return is_backup_folder(host, place, self.task.snapshot_folder)
        except Refused:
            return not place.is_top
        except Exception:  # which is met again, and told
            return False

    def examine_all(self) -> List[Checked]:
        self.examine_machine(None)
        if self.task.source and self.is_folder_alone():
            endpoint = parse_endpoint(self.task.source)
            is_reached = self.examine_machine(endpoint)
            with self.place(endpoint.kind.name, endpoint.text):
                if is_reached:
                    self.examine_folder(endpoint)
        elif self.task.source:
            known = self.examine_source()
            for text in self.task.destinations:
                self.examine_destination(text, known)
            if known and self.task.max_age is not None and not self.task.destinations:
                self.examine_remembered()
        return self.checked if self.task.max_age is None else list(map(for_monitors, self.checked))


def describe_checks(checks: Sequence[Checked]) -> Dict[str, Any]:
    return {"problems": sum(checked.finding.state == PROBLEM for checked in checks),
            "checks": [dict(checked.finding._asdict(), name=checked.name, where=checked.where) for checked in checks]}


def format_checks(checks: Sequence[Checked]) -> str:
    """The findings, by place; a remedy stands under its problem."""
    lines: List[str] = []
    for number, (name, where, finding) in enumerate(checks):
        if number == 0 or where != checks[number - 1].where:
            lines += [""] * bool(lines) + [printable(where) or "this machine"]
        lines.append("  {:<11}  {:<10}  {}".format(finding.state, name, printable(finding.text)))
        if finding.state != OK and finding.remedy:
            lines += [" " * 27 + "-> " + printable(remedy) for remedy in finding.remedy.split("\n")]
    counts = collections.Counter(checked.finding.state for checked in checks)
    totals = ["{} {}".format(counts[OK], OK), plural(counts[PROBLEM], PROBLEM)]
    return "\n".join(lines + ["", ", ".join(totals + ["{} {}".format(counts[NOT_CHECKED], NOT_CHECKED)])])


def format_status(checks: Sequence[Checked]) -> str:
    """All in one line, for monitors, and a line for each problem below it."""
    problems = [checked for checked in checks if checked.finding.state == PROBLEM]
    ages = [checked for checked in checks if checked.name == "age" and checked.finding.state == OK]
    if not problems:
        parts = [checked.finding.text if len(ages) == 1 else "{}: {}".format(checked.where, checked.finding.text)
                 for checked in ages] or [plural(len(checks), "check")]
        return printable("BTRFS-BACKUP OK - {}".format("; ".join(parts)).replace("|", "/"))
    first = "BTRFS-BACKUP PROBLEM - {}: {}".format(
        plural(len(problems), "problem"), "; ".join(checked.finding.text for checked in problems))
    lines = [first.replace("|", "/")]  # what follows a | is taken for figures
    lines += ["{}: {}: {}".format(c.where or "this machine", c.name, "; ".join(
        part for part in [c.finding.text] + c.finding.remedy.split("\n") if part)) for c in problems]
    return "\n".join(printable(line) for line in lines)


def check_doctor(task: Task) -> None:
    """UsageError for what cannot be examined."""
    if task.max_age is not None and not task.source:
        raise UsageError("--max-age needs a source or a folder of backups", "see doctor --help")
    if task.source and (task.destinations or not parse_endpoint(task.source).kind.has_streams):
        check_source(task.source)


def run_doctor(task: Task, events: Events) -> int:
    """Prints what was found; 1 where there is a problem."""
    doctor = Doctor(task, events)
    try:
        checks = doctor.examine_all()
    finally:
        doctor.run.hosts.end()
    if task.json:
        print_result(format_json(describe_checks(checks)))
    else:
        print_result(format_checks(checks) if task.max_age is None else format_status(checks))
    problems = sum(checked.finding.state == PROBLEM for checked in checks)
    if problems:
        events.error(BackupError("{} found".format(plural(problems, "problem"))))
    return 1 if problems else 0


########################################################################################################
# VERIFY: whether backups are what their snapshots are
#
# survey -> the backups to check -> for each snapshot its digest and those of its backups, at the same time, each
# computed where the data lies -> where they differ, the folders' digests, and of differing folders the entries. A
# result is equal, different or not checked, and a check that could not be done is never the first. Never:
# anything written; success where nothing was compared.
########################################################################################################

EQUAL, DIFFERENT, SAME_IDENTITY = "equal", "different", "same identity"  # or NOT_CHECKED


class Compared(NamedTuple):
    """What came out for one backup. `differences` are lines; `is_fault`: it was to be checked, and failed."""

    name: str
    endpoint: str
    result: str
    text: str = ""
    differences: Tuple[str, ...] = ()
    is_fault: bool = False


def on_bad_parent(compared: Compared, parent: Compared) -> Compared:
    """What a sound stream file is where the one that it builds on is not, or is not known to be."""
    said = "could not be checked" if parent.result == NOT_CHECKED else "is not"
    return compared._replace(result=parent.result, is_fault=True,
                             text="it is whole, but {} that it builds on {}".format(parent.name, said))


class Check(NamedTuple):
    """A backup that is to be compared with its snapshot."""

    snapshot: Entry
    backup: Entry
    endpoint: str


def plan_checks(source: Location, location: Location, task: Task) -> Tuple[List[Check], List[Compared]]:
    """The backups of a location to compare, oldest first, and what is known about the others."""
    snapshots = [entry for entry in source.complete() if task.backup_name in (None, entry.subvolume.name)]
    checks, others, names = [], [], {entry.subvolume.name for entry in snapshots}
    for snapshot in snapshots:
        checks += [Check(snapshot, backup, location.endpoint) for backup in location.entries
                   if backup.state != "partial" and corresponds(snapshot.subvolume, backup.subvolume)]
    checks = checks[-1:] if task.latest else checks
    taken = {check.backup.path for check in checks}
    for entry in location.entries:
        name, is_asked = entry.snapshot_name, task.backup_name is not None
        if entry.path in taken or task.latest or (is_asked and name != task.backup_name):
            continue
        if entry.state == "partial":
            is_under_way = partial_of(entry.subvolume.name) is not None
            text = "it is partial" if is_under_way else "it is writable, so it is no complete backup"
            others.append(Compared(entry.subvolume.name, location.endpoint, NOT_CHECKED, text, (),
                                   is_asked or not is_under_way))
        elif name in names and entry.state == "foreign":
            text = "it is another subvolume (received UUID {})".format(entry.subvolume.received_uuid or "none")
            others.append(Compared(name, location.endpoint, DIFFERENT, text, (), True))
        elif entry.state == "complete":
            others.append(Compared(name, location.endpoint, NOT_CHECKED, "its snapshot is no longer there",
                                   (), is_asked))
    return checks, others


class TreeAt(NamedTuple):
    """A read-only subvolume on a host. `endpoint` is what the user calls the location."""

    host: Any
    folder: str
    name: str
    endpoint: str

    def digest(self) -> TreeDigest:
        return self.host.digest_tree(self.folder, self.name, self.endpoint)

    def folders(self) -> Iterator[Tuple[str, str]]:
        """(path, digest) of all its folders in the order of their paths."""
        page: List[Tuple[str, str]] = self.host.folder_digests(self.folder, self.name, "")
        while page:
            yield from page
            page = self.host.folder_digests(self.folder, self.name, page[-1][0]) if len(page) >= PAGE_OF_DIGESTS else []

    def describe(self, inner: str) -> Dict[str, Aspects]:
        return self.host.describe_folder(self.folder, self.name, inner)


def differing_folders(one: Iterator[Tuple[str, str]], other: Iterator[Tuple[str, str]]) -> Iterator[str]:
    """The folders that both trees have, with other digests; the trees as (path, digest) in the order of paths.

    What only one has is missing in its own folder, which differs.

    >>> list(differing_folders(iter([("/", "1"), ("/a", "2"), ("/b", "3")]), iter([("/", "4"), ("/b", "5")])))
    ['/', '/b']
    """
    left, right = next(one, None), next(other, None)
    while left is not None and right is not None:
        ours, theirs = os.fsencode(left[0]), os.fsencode(right[0])
        if left[0] == right[0] and left[1] != right[1]:
            yield left[0]
        left, right = (next(one, None) if ours <= theirs else left), (next(other, None) if theirs <= ours else right)


def describe_differences(folder: str, one: Dict[str, Aspects], other: Dict[str, Aspects]) -> List[str]:
    """Lines `PATH: what differs` for the entries of one folder; '.' is the tree's top."""
    lines = []
    for name in sorted(set(one) | set(other), key=os.fsencode):
        words = differing_aspects(one.get(name), other.get(name))
        if words:
            lines.append("{}: {}".format(os.path.join(folder, name)[1:] or ".", words))
    return lines


class VerifyRun:
    """One verification, from the listings to the last result."""

    def __init__(self, task: Task, events: Events) -> None:
        self.task, self.events = task, events
        self.survey = Survey(task, events)
        self.results: List[Compared] = []

    def execute(self) -> int:
        if parse_endpoint(self.task.source).kind.has_streams:
            for location in self.survey.locations():
                self.verify_stream_files(location)
            return self.conclude()
        source, *locations = self.survey.locations()
        if source.error is not None and not source.entries:
            raise source.error
        checks: Dict[str, List[Check]] = {}
        for location in locations:
            if parse_endpoint(location.endpoint).kind.has_streams:
                self.verify_stream_files(location)
                continue
            planned, others = plan_checks(source, location, self.task)
            if location.error is not None:
                others = [Compared("", location.endpoint, NOT_CHECKED, format_error(location.error), (), True)]
            elif not planned and not any(other.is_fault for other in others):
                others.append(Compared("", location.endpoint, NOT_CHECKED, "there is nothing to compare", (), True))
            for other in others:
                self.report(other)
            for check in planned:
                checks.setdefault(check.snapshot.path, []).append(check)
        for same in checks.values():
            self.verify(source.endpoint, same)
        return self.conclude()

    def tree_at(self, endpoint: str, entry: Entry) -> TreeAt:
        return TreeAt(self.survey.run.hosts.of(parse_endpoint(endpoint)), *os.path.split(entry.path), endpoint=endpoint)

    def verify(self, source: str, checks: Sequence[Check]) -> None:
        """Compares the backups of one snapshot with it, all sides at once."""
        if self.task.quick:
            for check in checks:
                self.report(Compared(check.backup.subvolume.name, check.endpoint, SAME_IDENTITY))
            return
        original = self.tree_at(source, checks[0].snapshot)
        copies = [self.tree_at(check.endpoint, check.backup) for check in checks]
        self.events.debug("verifying", "verifying {}".format(original.name))
        sides = [Background(tree.digest) for tree in [original] + copies]
        for copy, side in zip(copies, sides[1:]):
            self.report(self.compare(original, copy, sides[0], side))

    def compare(self, original: TreeAt, copy: TreeAt, one: Background, other: Background) -> Compared:
        try:
            ours, theirs = one.result(), other.result()
            if ours == theirs:
                return Compared(copy.name, copy.endpoint, EQUAL, "{} files and folders, {}".format(
                    ours.entries, format_size(ours.size)))
            return self.name_differences(original, copy)
        except Exception as error:
            return Compared(copy.name, copy.endpoint, NOT_CHECKED, format_error(explain(error, "cannot compare")), (),
                            True)

    @staticmethod
    def name_differences(original: TreeAt, copy: TreeAt) -> Compared:
        """The first paths that differ, from the digests of folders, then from what is in those."""
        folders, lines = list(differing_folders(original.folders(), copy.folders())), []  # type: List[str], List[str]
        left = collections.deque(folders)
        while left and len(lines) <= MOST_DIFFERENCES:
            folder = left.popleft()
            lines += describe_differences(folder, original.describe(folder), copy.describe(folder))
        shown = lines[:MOST_DIFFERENCES]
        if left or len(lines) > len(shown):
            shown.append("and more, in {}".format(plural(len(folders), "folder")))
        return Compared(copy.name, copy.endpoint, DIFFERENT, lines[0] if lines else "", tuple(shown), True)

    # -- stream files

    def verify_stream_files(self, location: Location) -> None:
        """Checks the backups of a raw folder by their sidecars, parents before their children."""
        if location.error is not None:
            self.report(Compared("", location.endpoint, NOT_CHECKED, format_error(location.error), (), True))
            return
        before = len(self.results)
        bad: Dict[Optional[str], Compared] = {}  # by stream id
        wrong = {broken.name: broken.why for broken in location.listing.broken}
        for name in sorted(set(wrong) - {entry.subvolume.name for entry in location.entries}):
            if self.task.backup_name in (None, name) and not self.task.latest:
                self.report(Compared(name, location.endpoint, DIFFERENT, wrong[name], (), True))
        lengths, asked = chain_lengths(location.listing), self.asked_entries(location)
        for entry in sorted(self.with_chains(location, asked), key=lambda e: lengths.get(e.subvolume.stream_id, 0)):
            compared = self.verify_stream_file(location.endpoint, entry, wrong)
            parent = bad.get(entry.subvolume.parent_uuid)
            if compared.result == EQUAL and parent:
                compared = on_bad_parent(compared, parent)
            if compared.is_fault:
                bad[entry.subvolume.stream_id] = compared
            if entry in asked:
                self.report(compared)
        if len(self.results) == before:
            self.report(Compared("", location.endpoint, NOT_CHECKED, "there is nothing to compare", (), True))

    def asked_entries(self, location: Location) -> List[Entry]:
        entries = [entry for entry in location.entries if self.task.backup_name in (None, entry.snapshot_name)]
        whole = [entry for entry in entries if entry.state == "complete"]
        return whole[-1:] if self.task.latest else entries

    def with_chains(self, location: Location, asked: Sequence[Entry]) -> List[Entry]:
        """The same with what they build on, without which none can be restored; but where nothing is read."""
        by_id = {entry.subvolume.stream_id: entry for entry in location.entries if entry.state == "complete"}
        found = list(asked)
        for entry in found if not self.task.quick else ():
            parent = by_id.get(entry.subvolume.parent_uuid)
            if parent is not None and parent not in found:
                found.append(parent)
        return found

    def verify_stream_file(self, endpoint: str, entry: Entry, wrong: Dict[str, str]) -> Compared:
        name = entry.subvolume.name
        if name in wrong:
            return Compared(name, endpoint, DIFFERENT, wrong[name], (), True)
        if entry.state == "partial":
            return Compared(name, endpoint, NOT_CHECKED, "it is partial", (), self.task.backup_name is not None)
        if entry.state == "foreign":
            return Compared(name, endpoint, DIFFERENT, "it is another subvolume (stream id {})".format(
                entry.subvolume.stream_id), (), True)
        if self.task.quick:
            return Compared(name, endpoint, SAME_IDENTITY)
        try:
            return Compared(name, endpoint, EQUAL, self.check_stream_file(endpoint, entry))
        except Damaged as damage:
            return Compared(name, endpoint, DIFFERENT, format_error(damage), (), True)
        except Exception as error:
            return Compared(name, endpoint, NOT_CHECKED, format_error(explain(error, "cannot read it")), (), True)

    def check_stream_file(self, endpoint: str, entry: Entry) -> str:
        """What was compared; Damaged where it differs."""
        place, folder = self.survey.run.hosts.of(parse_endpoint(endpoint)), os.path.dirname(entry.path)
        backup = place.sidecar(folder, entry.subvolume.name)
        if not self.task.raw_files:
            try:
                return self.check_stream(place, folder, backup)
            except Stalled:
                raise
            except BackupError:  # which the file may be the cause of
                check_digest(backup, place.digest_raw(folder, backup.file).sha256)
                raise
        check_digest(backup, place.digest_raw(folder, backup.file).sha256)
        return "the file, {}".format(format_size(backup.file_size))

    def check_stream(self, place: RawPlace, folder: str, backup: RawBackup) -> str:
        """What was seen of a stream in a file; Damaged where it cannot be restored."""
        sender, buffer = place.open_send(folder, backup.name, None, SendOptions()), bytearray(PIPE_SIZE)
        with contextlib.ExitStack() as stack:
            stack.callback(sender.end)
            proof = StreamProof(stream_of(backup), can_dump())
            stack.callback(proof.end)
            for got in self.read_all(sender, buffer, backup.file):
                self.prove(backup, proof.take, memoryview(buffer)[:got])
            sender.finish(self.task.stall_timeout)
            self.prove(backup, proof.finish, self.task.stall_timeout)
        lacks = "" if can_dump() else ", but not its checksums, which takes btrfs-progs 4.9"
        return "the file and the stream inside, {}{}".format(format_size(backup.stream_size), lacks)

    @staticmethod
    def prove(backup: RawBackup, act: Callable[[Any], None], what: Any) -> None:
        try:
            act(what)
        except BackupError as error:
            raise Damaged("{} cannot be restored: {}".format(backup.file, error.message), error.hint) from None

    def read_all(self, sender: RawSender, buffer: bytearray, file: str) -> Iterator[int]:
        """How many bytes of a stream came into the buffer, until its end."""
        last = time.monotonic()
        while True:
            got = sender.read(buffer)
            now = time.monotonic()
            if got == 0:
                return
            if got is not None:
                last = now
                yield got
            elif now - last > self.task.stall_timeout:
                raise Stalled("reading {} stalled".format(file))
            else:
                sender.wait_readable(IDLE_NAP)

    def report(self, compared: Compared) -> None:
        """Prints a result; what is wrong is an error as well, with the paths that differ."""
        self.results.append(compared)
        words = [compared.result] + ([compared.text.split("\n")[0]] if compared.text else [])
        print_result("{}  {}  {}".format(compared.name or "-", compared.endpoint, ": ".join(map(printable, words))))
        if compared.is_fault:
            what = "{} at {}".format(compared.name, compared.endpoint) if compared.name else compared.endpoint
            self.events.error(BackupError("{}: {}".format(what, ": ".join(words)), "", "\n".join(compared.differences)),
                              snapshot=compared.name, destination=compared.endpoint, result=compared.result)

    def conclude(self) -> int:
        counts = collections.Counter(compared.result for compared in self.results)
        is_good = not any(compared.is_fault for compared in self.results)
        done = ", ".join("{} {}".format(count, result) for result, count in sorted(counts.items()))
        self.events.info("done", "{}: {}".format("done" if is_good else "not all backups are proven", done),
                         counts=dict(counts))
        return 0 if is_good and counts[EQUAL] + counts[SAME_IDENTITY] else 1


def run_verify(task: Task, events: Events) -> int:
    """Compares backups with their snapshots; 0 where all are equal and there was one at least."""
    run = VerifyRun(task, events)
    try:
        return run.execute()
    finally:
        run.survey.end()


########################################################################################################
# HELP: help and man page, from the tables
#
# What there is to say about options stands in the tables of OPTIONS, once; here it is only laid out, so
# that help, manual and completions cannot drift from what is parsed. Texts are paragraphs apart by empty
# lines; a paragraph that is indented is laid out already and stays as it is.
########################################################################################################

PROGRAM = "btrfs-backup-ng"
HELP_WIDTH = 80
FLAGS_WIDTH = 28
STATUS_TEXT = """\
  0         all done
  1         something was not done as asked; the errors say what
  2         the command line is wrong, nothing was started
  75        another run is at work on the same snapshots
  130, 143  interrupted (Ctrl-C, SIGTERM); locks stay, and the next run goes on"""
FILES_TEXT = """\
In the snapshot folder, by default .btrfs-backup-ng/snapshots in the source:

  .outstanding_transfers  locks: transfers that have begun and are not complete
  .destinations.json      of each destination the newest snapshot seen there
  .PREFIX.lock            held by the kernel's flock while a run is at work

At a destination, .NAME.partial is what has arrived of the backup NAME so far, and .NAME.partial.json says how much
that is."""
PLACES_TEXT = """\
  /PATH, ./PATH                   on this machine
  ssh://[USER@]HOST[:PORT]/PATH   on another, by ssh; also [USER@]HOST:/PATH
  shell://COMMAND                 a destination: gets each stream on its stdin
  raw:///PATH                     a destination: stream files on any filesystem
  raw+ssh://[USER@]HOST[:PORT]/PATH

A source is a subvolume. A destination is a folder on btrfs, but for shell:// and raw://."""
TOPICS = (("places", PLACES_TEXT), ("exit status", STATUS_TEXT), ("files", FILES_TEXT))  # said of all verbs


def usage_of(name: str) -> str:
    """What to type for a verb: `btrfs-backup-ng list [options] ...`."""
    usage = VERBS[name].usage
    return " ".join([PROGRAM] + ([name] if name and usage.split(" ")[0] != name else []) + [usage])


def flags_text(option: Option) -> str:
    return ", ".join(option.flags) + (" " + option.metavar if option.metavar else "")


def format_columns(rows: Iterable[Tuple[str, str]], indent: str = "  ") -> List[str]:
    """Lines with two columns; a long entry of the first gets a line of its own."""
    import textwrap
    lines = []
    for left, right in rows:
        texts = textwrap.wrap(right, HELP_WIDTH - FLAGS_WIDTH - 2 - len(indent), break_on_hyphens=False)
        if len(left) > FLAGS_WIDTH:
            lines.append(indent + left)
            left = ""
        lines.append("{}{:<{}}  {}".format(indent, left, FLAGS_WIDTH, texts[0]))
        lines += [" " * (FLAGS_WIDTH + 2 + len(indent)) + more for more in texts[1:]]
    return lines


def format_paragraphs(text: str) -> List[str]:
    import textwrap
    lines: List[str] = []
    for paragraph in text.split("\n\n"):
        laid_out = paragraph.startswith(" ")
        lines += [""] + (paragraph.split("\n") if laid_out else
                         textwrap.wrap(paragraph, HELP_WIDTH, break_on_hyphens=False))
    return lines


def format_usage(name: str) -> List[str]:
    lines = ["usage: " + usage_of(name)]
    return lines if name else lines + ["       {} VERB ...".format(PROGRAM)]


def format_verbs() -> List[str]:
    rows = [(name, verb.summary) for name, verb in VERBS.items() if name and verb.summary]
    return ["", "verbs, each with a --help of its own:"] + format_columns(rows)


def format_examples(verb: Verb) -> List[str]:
    lines = ["", "examples:"] if verb.examples else []
    for arguments, effect in verb.examples:
        lines += ["  {} {}".format(PROGRAM, arguments), "      " + effect]
    return lines


def format_help(name: str = "") -> str:
    """The help of a verb; that of the classic command also tells of the verbs."""
    verb = VERBS[name]
    lines = format_usage(name)
    lines += format_paragraphs(verb.about or verb.summary)
    for group in verb.groups:
        lines += ["", group.title.lower() + ":"]
        lines += format_columns((flags_text(option), option.help) for option in group.options)
    if not name:
        lines += format_verbs()
    lines += format_examples(verb)
    for title, text in () if name else TOPICS:
        lines += ["", title + ":"] + format_paragraphs(text)[1:]
    return "\n".join(lines)


def roff(text: str) -> str:
    """`text` as one line of a man page's source."""
    text = text.replace("\\", "\\(rs").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    text = "".join(c if ord(c) < 128 else "\\[u{:04X}]".format(ord(c)) for c in text)
    return "\\&" + text if text[:1] in (".", "\\") else text


def roff_paragraphs(text: str) -> List[str]:
    lines = []
    for paragraph in text.split("\n\n"):
        words = [roff(line) for line in paragraph.split("\n")]
        laid_out = paragraph.startswith(" ")
        lines += [".PP"] + ([".nf"] + words + [".fi"] if laid_out else words)
    return lines


def roff_options(groups: Iterable[Group], heading: str) -> List[str]:
    lines = []
    for group in groups:
        lines.append("{} {}".format(heading, roff(group.title)))
        for option in group.options:
            flags = ", ".join("\\fB{}\\fR".format(roff(flag)) for flag in option.flags)
            metavar = " \\fI{}\\fR".format(roff(option.metavar)) if option.metavar else ""
            lines += [".TP", flags + metavar, roff(option.help)]
    return lines


def roff_examples(verb: Verb) -> List[str]:
    lines = []
    for arguments, effect in verb.examples:
        lines += [".TP", "\\fB{}\\fR".format(roff(PROGRAM + " " + arguments)), roff(effect)]
    return lines


def roff_verb(name: str, verb: Verb) -> List[str]:
    """A section of the manual for one verb, its options under each other."""
    options = tuple(option for group in verb.groups for option in group.options)
    lines = [".SH {}".format(roff(name.upper())), ".B {}".format(roff(usage_of(name)))]
    lines += roff_paragraphs(verb.about or verb.summary) + [".PP"]
    return lines + roff_options([Group("Options", options)], ".SS") + [".PP"] + roff_examples(verb)


def format_man() -> str:
    """The manual in man's own language."""
    classic = VERBS[""]
    lines = ['.TH BTRFS\\-BACKUP\\-NG 8 "" "{} {}" "System Administration"'.format(roff(PROGRAM), __version__),
             ".nh", ".ad l",  # what is copied from it must be what is typed, with no hyphens and blanks of its own
             ".SH NAME", roff(PROGRAM) + " \\- incremental btrfs backups", ".SH SYNOPSIS"]
    for name in VERBS:
        lines += [".B {}".format(roff(usage_of(name))), ".br"]
    lines += [".SH DESCRIPTION"] + roff_paragraphs(classic.about)
    lines += [".SH OPTIONS"] + roff_options(classic.groups, ".SS")
    for name, verb in VERBS.items():
        lines += roff_verb(name, verb) if name else []
    for title, text in TOPICS:
        lines += [".SH {}".format(roff(title.upper()))] + roff_paragraphs(text)
    lines += [".SH EXAMPLES"] + roff_examples(classic)
    return "\n".join(lines + [".SH SEE ALSO", "btrfs(8), btrfs\\-send(8), btrfs\\-receive(8), ssh(1)"])


########################################################################################################
# COMPLETION: what the Tab key offers in bash, zsh and fish
#
# Scripts for the shells, from the tables of options. They know the verbs, each verb's options, the words
# that an option takes, and where a file or a folder is wanted; they never run the program. A value that
# cannot be known, such as a number, is not guessed.
########################################################################################################

FOLDER_VALUES = ("DIR", "DEST", "FOLDER", "SUBVOLUME", "PATH")


def value_words(option: Option) -> Tuple[str, ...]:
    return option.parse.words if isinstance(option.parse, OneOf) else ()


def value_kind(option: Option) -> str:
    """What completes an option's value: "words", "file", "folder", or "" for nothing."""
    metavar = option.metavar.strip("[]")
    return "words" if value_words(option) else "file" if metavar == "FILE" else (
        "folder" if metavar in FOLDER_VALUES else "")


def options_of(verb: Verb) -> List[Option]:
    return [option for group in verb.groups for option in group.options]


def needs_value(option: Option) -> bool:
    return option.parse is not None and not option.metavar.startswith("[")


def single_quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


BASH_COMPLETION = """\
# bash completion for {program} {version}
_btrfs_backup_ng() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} verb= IFS=$' \\t\\n'
    if [[ $cur == = ]]; then cur=; elif [[ $prev == = ]]; then prev=${{COMP_WORDS[COMP_CWORD-2]}}; fi
    if ((COMP_CWORD > 1)); then
        case ${{COMP_WORDS[1]}} in {verbs}) verb=${{COMP_WORDS[1]}} ;; esac
    fi
    case $verb:$prev in
{values}
    esac
    case $verb:$cur in
{flags}
    esac
    case $verb:$prev in
{operands}
    esac
    ((COMP_CWORD == 1)) && COMPREPLY=($(compgen -W '{verb_words}' -- "$cur"))
    IFS=$'\\n'
    compopt -o filenames 2>/dev/null
    COMPREPLY+=($(compgen -d -- "$cur"))
}}
complete -F _btrfs_backup_ng {program}"""
BASH_VALUES = {"file": "COMPREPLY=($(compgen -f -- \"$cur\"))", "folder": "COMPREPLY=($(compgen -d -- \"$cur\"))",
               "": "COMPREPLY=()"}


def bash_words(words: Iterable[str]) -> str:
    return "COMPREPLY=($(compgen -W {} -- \"$cur\"))".format(single_quoted(" ".join(words)))


def bash_values(name: str, verb: Verb) -> List[str]:
    """The branches for the values of a verb's options."""
    lines = []
    for option in filter(needs_value, options_of(verb)):
        kind = value_kind(option)
        reply = bash_words(value_words(option)) if kind == "words" else BASH_VALUES[kind]
        names = "IFS=$'\\n'; compopt -o filenames 2>/dev/null; " if kind in ("file", "folder") else ""
        patterns = "|".join("{}:{}".format(name, flag) for flag in option.flags)
        lines.append("        {}) {}{}; return ;;".format(patterns, names, reply))
    return lines


def bash_completion() -> str:
    flags = ["        {}:-*) {}; return ;;".format(name, bash_words(flags_of(verb.groups)))
             for name, verb in VERBS.items()]
    verbs = [name for name in VERBS if name]
    return BASH_COMPLETION.format(
        program=PROGRAM, version=__version__, verbs="|".join(verbs), verb_words=" ".join(verbs),
        values="\n".join(line for name, verb in VERBS.items() for line in bash_values(name, verb)),
        flags="\n".join(flags),
        operands="\n".join("        {}:{}) {}; return ;;".format(name, word, bash_words(words))
                           for name, verb in VERBS.items() for word, words in verb.operands))


def zsh_text(text: str) -> str:
    """`text` inside a specification of _arguments."""
    return re.sub(r"([\[\]:\\])", r"\\\1", text)


def zsh_option(option: Option) -> str:
    """One option as _arguments wants it: '(-N --num-snapshots)'{-N+,--num-snapshots=}'[help]:N: '."""
    takes = needs_value(option)
    flags = [flag + (("=" if flag.startswith("--") else "+") if takes else "") for flag in option.flags]
    actions = {"file": "_files", "folder": "_files -/", "": " ", "words": "({})".format(" ".join(value_words(option)))}
    value = ":{}:{}".format(zsh_text(option.metavar), actions[value_kind(option)]) if takes else ""
    once = "*" if option.many else "({})".format(" ".join(option.flags))
    flags_part = "{" + ",".join(flags) + "}" if len(flags) > 1 else flags[0]
    return "{}{}{}".format(single_quoted(once), flags_part,
                           single_quoted("[{}]{}".format(zsh_text(option.help), value)))


def zsh_branch(name: str, verb: Verb) -> List[str]:
    branches = " ".join("{}) compadd {} ;;".format(word, " ".join(words)) for word, words in verb.operands)
    operands = "{{case $words[CURRENT-1] in {} *) _files -/ ;; esac}}".format(branches) if branches else "_files -/"
    specifications = [zsh_option(option) for option in options_of(verb)] + [single_quoted("*: :" + operands)]
    return ["    {})".format(name or "*"), "      _arguments -s -S \\"] + [
        "        {} \\".format(text) for text in specifications[:-1]] + [
        "        {} ;;".format(specifications[-1])]


ZSH_COMPLETION = """\
#compdef {program}
# zsh completion for {program} {version}
_btrfs_backup_ng() {{
  local verb= verbs
  verbs=(
{verbs}
  )
  if (( CURRENT > 2 )) && (( ${{+verbs[(r)${{words[2]}}:*]}} )); then
    verb=$words[2]
    shift words
    (( CURRENT-- ))
  elif (( CURRENT == 2 )); then
    _describe -t verbs verb verbs
  fi
  case $verb in
{branches}
  esac
}}
if [ "$funcstack[1]" = _{program} ]; then _btrfs_backup_ng "$@"; else compdef _btrfs_backup_ng {program}; fi"""


def zsh_completion() -> str:
    named = [(name, verb) for name, verb in VERBS.items() if name]
    return ZSH_COMPLETION.format(
        program=PROGRAM, version=__version__,
        verbs="\n".join("    " + single_quoted("{}:{}".format(name, verb.summary)) for name, verb in named),
        branches="\n".join(line for name, verb in named + [("", VERBS[""])] for line in zsh_branch(name, verb)))


FISH_COMPLETION = """\
# fish completion for {program} {version}
function __btrfs_backup_ng_verb
    set -l words (commandline -opc)
    if set -q words[2]; and contains -- $words[2] {verbs}
        echo $words[2]
    end
end
function __btrfs_backup_ng_is
    test "$argv[1]" = "$(__btrfs_backup_ng_verb)"
end
function __btrfs_backup_ng_after
    contains -- (commandline -opc)[-1] $argv
end
complete -c {program} -f"""


def fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def fish_option(name: str, option: Option) -> str:
    words = ["complete -c", PROGRAM, "-n", fish_quoted("__btrfs_backup_ng_is {}".format(name or '""'))]
    words += ["-l " + flag[2:] if flag.startswith("--") else "-s " + flag[1:] for flag in option.flags]
    if needs_value(option):
        kind = value_kind(option)
        words.append({"file": "-r -F", "folder": "-x -a '(__fish_complete_directories)'", "": "-x"}.get(
            kind) or "-x -a " + fish_quoted(" ".join(value_words(option))))
    return " ".join(words + ["-d", fish_quoted(option.help)])


def fish_completion() -> str:
    named = [(name, verb) for name, verb in VERBS.items() if name]
    lines = [FISH_COMPLETION.format(program=PROGRAM, version=__version__,
                                    verbs=" ".join(name for name, _ in named))]
    for name, verb in named:
        lines.append("complete -c {} -n 'test (count (commandline -opc)) = 1' -a {} -d {}".format(
            PROGRAM, name, fish_quoted(verb.summary)))
    for name, verb in VERBS.items():
        is_verb = "__btrfs_backup_ng_is {}".format(name or '""')
        for word, words in verb.operands:
            lines.append("complete -c {} -n '{}; and __btrfs_backup_ng_after {}' -a {}".format(
                PROGRAM, is_verb, word, fish_quoted(" ".join(words))))
        others = "; and not __btrfs_backup_ng_after " + " ".join(word for word, _ in verb.operands)
        lines.append("complete -c {} -n '{}{}' -a '(__fish_complete_directories)'".format(
            PROGRAM, is_verb, others if verb.operands else ""))
    lines += [fish_option(name, option) for name, verb in VERBS.items() for option in options_of(verb)]
    return "\n".join(lines)


########################################################################################################
# UNITS: a systemd service and its timer
#
# The service may do what a backup needs and little else: see HARDENING for what is asked and what must
# not be. It is written as a shell script, to be read before it is given to sh. The arguments are parsed
# and checked first, so that a mistake shows now and not at night.
########################################################################################################

# Nothing that mounts a folder over itself (ReadWritePaths=, and with it ProtectSystem=strict, or BindPaths=):
# `btrfs receive` then takes that folder for the mount point of its filesystem, and refuses to receive an
# increment ("remount this btrfs filesystem with fs tree", btrfs-progs 6.2). No PrivateDevices=, device policy
# or RestrictSUIDSGID=: receive makes device nodes and setuid files. Where others may write, or a stream is not
# this machine's own, receive runs in a mount namespace and a chroot (Confinement).
HARDENING = """\
NoNewPrivileges=yes
CapabilityBoundingSet=CAP_SYS_ADMIN CAP_CHOWN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER CAP_FSETID \
CAP_KILL CAP_MKNOD CAP_SETFCAP CAP_SYS_CHROOT
LockPersonality=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=mnt
RestrictRealtime=yes
SystemCallArchitectures=native
SystemCallErrorNumber=EPERM
SystemCallFilter=~@clock @cpu-emulation @debug @module @obsolete @raw-io @reboot @swap
"""
SERVICE = """\
[Unit]
Description={description}
{after}
[Service]
Type=oneshot
ExecStart={command}
KillMode=mixed
Nice=10
IOSchedulingClass=idle
{hardening}"""
TIMER = """\
[Unit]
Description={description}

[Timer]
OnCalendar={calendar}
Persistent=true

[Install]
WantedBy=timers.target
"""
UNITS_SCRIPT = """\
#!/bin/sh
# Writes a systemd service and its timer into {folder}, or into the folder given.
# Afterwards, to try it, to see what it said, and to have it run by itself:
#     {systemctl} daemon-reload
#     {systemctl} start {name}.service
#     {journalctl} -u {name}.service
#     {systemctl} enable --now {name}.timer
set -eu
folder=${{1:-{folder}}}
mkdir -p "$folder"
{guard}cat >"$folder/{name}.service" <<'END OF UNIT'
{service}END OF UNIT
cat >"$folder/{name}.timer" <<'END OF UNIT'
{timer}END OF UNIT
echo "written: $folder/{name}.service, $folder/{name}.timer"
echo "next: {systemctl} daemon-reload; {systemctl} enable --now {name}.timer"
"""


OTHERS_UNIT_GUARD = """\
if [ -e "$folder/{name}.service" ] && ! grep -qxF {description} "$folder/{name}.service"; then
    echo "error: $folder/{name}.service backs up something else; print these units with --unit NAME" >&2
    exit 1
fi
"""


def unit_text(text: str) -> str:
    """`text` in a unit's setting, where % begins a specifier."""
    return printable(text).replace("%", "%%")


def unit_word(word: str) -> str:
    """One word of a command in a unit: quoted where it must be, bytes that are no text as \\xNN."""
    if re.fullmatch(r"[A-Za-z0-9/_.,:=@+-]+", word):
        return word
    escapes = {"\\": "\\\\", '"': '\\"', "%": "%%", "$": "$$"}
    return '"' + "".join(escapes.get(c) or (c if c.isprintable() else "".join(
        "\\x{:02x}".format(byte) for byte in os.fsencode(c))) for c in word) + '"'


def program_argv() -> List[str]:
    """What runs this very program again, from any folder."""
    path = os.path.abspath(sys.argv[0])
    return [path] if os.access(path, os.X_OK) else [sys.executable, path]


def check_absolute(request: Request) -> None:
    """UsageError for paths that mean another place when systemd starts the program."""
    logs = (request.task.log_json,) if request.task.log_json else ()
    for text in request.paths + request.task.forget + request.files + logs:
        endpoint = parse_endpoint(text)
        if endpoint.kind.has_folder and not endpoint.path.startswith("/"):
            raise UsageError("{} is a relative path, and systemd starts in another folder".format(printable(text)),
                             "give the whole path")


def default_unit_name(source: str) -> str:
    return "btrfs-backup-" + (re.sub(r"[^A-Za-z0-9_.]+", "-", parse_endpoint(source).path).strip("-.") or "root")


def format_units(task: Task, requests: Sequence[Request], arguments: Sequence[str]) -> str:
    """The script that writes the units of a backup of one or more tasks, which `arguments` ask for.

    Two sources may come to the same default name: then the script writes nothing.
    """
    import shlex
    endpoints = [parse_endpoint(text) for request in requests for text in request.paths]
    sources = [request.task.source for request in requests]
    name = task.unit or default_unit_name(sources[0])
    description = "Back up {} with {}".format(unit_text(", ".join(sources)), PROGRAM)
    after = "Wants=network-online.target\nAfter=network-online.target\n" if any(e.login for e in endpoints) else ""
    # a command of the user's own may do anything; sudo does not work where no new privileges are allowed
    is_hardened = not task.user and all(e.kind.has_folder for e in endpoints)
    command = " ".join(map(unit_word, program_argv() + list(arguments)))
    user = " --user" if task.user else ""
    return UNITS_SCRIPT.format(
        folder="$HOME/.config/systemd/user" if task.user else "/etc/systemd/system",
        systemctl="systemctl" + user, journalctl="journalctl" + user, name=name,
        guard="" if task.unit else OTHERS_UNIT_GUARD.format(
            name=name, description=shlex.quote("Description=" + description)),
        service=SERVICE.format(description=description, after=after, command=command,
                               hardening=HARDENING if is_hardened else ""),
        timer=TIMER.format(description=description, calendar=unit_text(task.on_calendar))).rstrip("\n")


########################################################################################################
# PART IX THE SURFACE: what a person and a shell see
########################################################################################################


########################################################################################################
# DISPLAY: what a person sees while it works
#
# A board gathers from the events what is at work: tasks, and in each the transfers by destination. Log
# lines scroll; on a terminal the running transfers stand below them, a line each, or the live view takes
# the whole screen. What is drawn is laid out by pure functions and never wider than the terminal, whose
# size is asked each time. A terminal that goes away stops nothing. Never: a word here that no event said.
########################################################################################################

DRAW_INTERVAL = 0.1  # seconds
OPEN_SCREEN = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"  # the other screen, no cursor, no wrapping
CLOSE_SCREEN = "\x1b[?7h\x1b[?25h\x1b[?1049l"
STATES = {"waiting": "waiting", "snapshot": "snapshot taken", "sending": "sending", "sent": "sent",
          "deleting": "deleting", "recovered": "clearing up"}
PLAIN_GLYPHS = {ord("…"): "~", ord("█"): "#", ord("░"): "-", ord("─"): "-"}
BAR_WIDTH = 16
SMALLEST_VIEW = (40, 8)  # columns, lines


def shown_width(text: str) -> int:
    """The columns that `text` takes on a terminal."""
    try:
        return len(text.encode("ascii"))
    except UnicodeEncodeError:
        import unicodedata
        return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
                   for c in text)


def clip(text: str, width: int, from_left: bool = False) -> str:
    """`text` in at most `width` columns, with a mark where something is left out.

    >>> clip("/mnt/backup", 7), clip("/mnt/backup", 7, from_left=True)
    ('/mnt/b…', '…backup')
    """
    if shown_width(text) <= width:
        return text
    left, room = 0, width - 1
    for c in reversed(text) if from_left else text:
        room -= shown_width(c)
        if room < 0:
            break
        left += 1
    return ("…" + text[len(text) - left:] if from_left else text[:left] + "…") if width > 0 else ""


def clip_pair(one: str, between: str, other: str, width: int) -> str:
    """Both texts in `width` columns, each without its beginning where it is too long; paths tell most at their end."""
    room = max(0, width - shown_width(between))
    size, other_size = shown_width(one), shown_width(other)
    if size + other_size > room:
        size = min(size, max(room // 2, room - other_size))
        other_size = room - size
    return clip(clip(one, size, True) + between + clip(other, other_size, True), width)


def pad(text: str, width: int) -> str:
    return text + " " * max(0, width - shown_width(text))


def fold(line: str, width: int) -> List[str]:
    """A line as lines of at most `width` columns, parted at blanks, the later ones indented; words stay whole.

    A line that is indented by 8 is one to be copied and typed: it is left to the terminal.
    """
    if line.startswith(" " * 8):
        return [line]
    lines, indent = [""], " " * (len(line) - len(line.lstrip(" ")))
    for word in re.findall(r" *[^ ]+| +$", line):
        if shown_width(lines[-1] + word) > width and lines[-1].strip():
            lines.append(indent + "    " + word.lstrip(" "))
        else:
            lines[-1] += word
    return lines


class Work:
    """One task as the board knows it. Times as the board's clock tells them."""

    def __init__(self, title: str, begun: float) -> None:
        self.title, self.begun = title, begun
        self.ended: Optional[float] = None
        self.state, self.snapshot, self.message, self.cause = "starting", "", "", ""
        self.bars: Dict[str, Dict[str, Any]] = {}  # destination to the facts of its last progress

    @property
    def is_at_work(self) -> bool:
        return self.ended is None and bool(self.bars or self.state in ("sending", "deleting", "clearing up"))


class Board:
    """What is at work, by task, gathered from events. `encoding` is that of the terminal."""

    def __init__(self, titles: Dict[str, str], encoding: str = "utf-8",
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.encoding, self.clock = encoding, clock
        self.begun = clock()
        self.works = {task: Work(self.shown(title), self.begun) for task, title in titles.items()}

    def shown(self, text: str) -> str:
        """`text` in characters that the terminal can show, on one line."""
        return printable(text.encode(self.encoding, "backslashreplace").decode(self.encoding))

    def take(self, event: Event) -> None:
        task = event.facts.get("task", "")
        if task not in self.works:
            self.works[task] = Work(self.shown(task), self.clock())
        work = self.works[task]
        if event.level == "progress":
            self.take_progress(work, event)
        elif event.kind == "task":
            work.state = event.facts["state"]
            if event.facts.get("ended"):
                work.ended, work.bars = self.clock(), {}
        elif event.level in LEVELS and event.level != "debug":
            work.state = STATES.get(event.kind, work.state)
            work.snapshot = self.shown(event.facts.get("snapshot") or work.snapshot)
            work.message = self.shown(event.text.split("\n")[0])
            work.cause = work.message if event.level == "error" else work.cause

    def take_progress(self, work: Work, event: Event) -> None:
        destination = event.facts.get("destination", "")
        if "done" in event.facts:
            label = event.text or "{} to {}".format(event.facts.get("snapshot", ""), destination)
            to = self.shown(destination)
            is_to = label.endswith(" to " + destination)
            work.bars[destination] = dict(event.facts, label=self.shown(label), to=to if is_to else "")
        elif "destination" in event.facts:
            work.bars.pop(destination, None)
        else:
            work.bars.clear()

    def bars(self) -> List[Tuple[Work, Dict[str, Any]]]:
        return [(work, facts) for work in self.works.values() for facts in work.bars.values()]


def progress_parts(facts: Dict[str, Any]) -> List[str]:
    """`45%`, `1.2 GiB`, `of 2.7 GiB`, `85.2 MiB/s`, `0:18 left`; what is unknown is ''."""
    done, expected, rate = facts["done"], facts.get("expected") or 0, facts.get("rate") or 0.0
    seconds = round(max(0, expected - done) / rate) if expected and rate >= 1 else 0
    left = format_duration(seconds).replace(".0 s", " s") if expected and rate >= 1 else ""
    return ["{:.0f}%".format(min(100.0, 100.0 * done / expected)) if expected else "",
            format_size(min(done, expected) if expected else done), "of " + format_size(expected) if expected else "",
            format_size(rate) + "/s" if rate else "", left + " left" if left else ""]


def progress_label(facts: Dict[str, Any], title: str) -> str:
    """What is sent where; of a task where several are at work, for these may bear the same prefix."""
    return "{} to {}".format(title, facts["to"]) if title and facts["to"] else facts["label"]


def format_progress(facts: Dict[str, Any], width: int, title: str = "", column: int = 0) -> str:
    """One transfer on one line: what, how far, how fast. Where room is short, less, and the end of the destination.

    column: where the numbers begin if that is beyond the label.
    """
    percent, done, total, rate, left = progress_parts(facts)
    label, percent = progress_label(facts, title), percent.rjust(4) if column else percent
    for parts in ((percent, (done + " " + total).strip(), rate, left), (percent, done, rate, left)):
        numbers = "  ".join(part for part in parts if part)
        room = width - 2 - shown_width(numbers)
        if shown_width(label) <= room:
            return pad(label, min(column, room)) + "  " + numbers
    if facts["to"]:
        label = clip_pair(label[:-len(facts["to"]) - 4], " to ", facts["to"], max(8, room))
    return clip(clip(label, max(8, room)) + "  " + numbers, width)


def progress_lines(board: Board, width: int, most: int) -> List[str]:
    """The running transfers, a line each, at most `most` lines."""
    several = len(board.works) > 1
    bars = [(facts, work.title if several else "") for work, facts in board.bars()]
    column = min(max([shown_width(progress_label(*bar)) for bar in bars] or [0]), width // 2)
    lines = [format_progress(facts, width, title, column) for facts, title in bars]
    if len(lines) > most:
        lines[max(0, most - 1):] = [clip("… and {}".format(plural(len(lines) - most + 1, "more transfer")), width)]
    return lines[:most]


def format_bar(facts: Dict[str, Any]) -> str:
    done, expected = facts["done"], facts.get("expected")
    full = int(BAR_WIDTH * min(1.0, done / expected)) if expected else 0
    return "█" * full + "░" * (BAR_WIDTH - full)


def format_clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return "{}:{:02}:{:02}".format(minutes // 60, minutes % 60, rest) if minutes >= 60 else "{}:{:02}".format(
        minutes, rest)


def left_and_right(left: str, right: str, width: int) -> str:
    """Two texts at both ends of a line; the left one gives way."""
    room = max(0, width - shown_width(right) - 1)
    return clip(pad(clip(left, room), room) + " " + right, width)


def work_lines(work: Work, titles: int, width: int, now: float) -> List[str]:
    """One task in the live view: what it does, then a line for each running transfer."""
    said = work.cause or work.message if work.ended is not None or not work.snapshot else work.snapshot
    head = " {}  {}  {}".format(pad(clip(work.title, titles, from_left=True), titles), pad(work.state, 14), said)
    lines = [left_and_right(head, format_clock((work.ended or now) - work.begun), width)]
    for facts in work.bars.values():
        percent, done, total, rate, left = progress_parts(facts)
        full = "{}  {:>4}  {:>10} {:>13}  {:>12}  {:>12}".format(format_bar(facts), percent, done, total, rate, left)
        short = "{}  {:>4}  {:>10}  {:>12}".format(format_bar(facts), percent, done, rate)
        numbers = full if shown_width(full) + 30 <= width else short
        room = max(0, width - shown_width(numbers) - 9)
        name = clip(facts["to"] or facts["label"], room, from_left=True)
        lines.append(clip("    to {}  {}".format(pad(name, room), numbers), width))
    return lines


def choose_works(works: Sequence[Work], heights: Dict[int, int], room: int) -> Tuple[List[Work], List[Work]]:
    """The tasks that fit into `room` lines, those at work first, in their own order; and the rest."""
    ranked = sorted(works, key=lambda w: (w.ended is not None, not w.is_at_work, w.state == "done"))
    if sum(heights.values()) <= room:
        return list(works), []
    chosen, left = set(), room - 1  # a line for those left out
    for work in ranked:
        if heights[id(work)] <= left:
            chosen.add(id(work))
            left -= heights[id(work)]
    return [w for w in works if id(w) in chosen], [w for w in works if id(w) not in chosen]


def count_states(works: Iterable[Work]) -> str:
    """`3 sending, 1 done, 1 failed`."""
    counts = collections.Counter("at work" if work.is_at_work else work.state for work in works)
    return ", ".join("{} {}".format(count, state) for state, count in sorted(counts.items()))


def live_lines(board: Board, messages: Sequence[str], width: int, height: int) -> List[str]:
    """The live view: a head, the tasks, the last messages; exactly `height` lines of at most `width` columns."""
    now, works = board.clock(), list(board.works.values())
    head = left_and_right(" btrfs-backup-ng  {}: {}".format(plural(len(works), "task"), count_states(works)),
                 format_clock(now - board.begun) + " ", width)
    titles = min(max([shown_width(w.title) for w in works] or [0]), max(8, width // 3))
    blocks = {id(w): work_lines(w, titles, width, now) for w in works}
    room = max(1, height - 3 - min(5, max(2, height // 5)))
    chosen, rest = choose_works(works, {key: len(lines) for key, lines in blocks.items()}, room)
    lines = [head, "─" * width] + [line for w in chosen for line in blocks[id(w)]]
    if rest:
        lines.append(clip(" … and {}: {}".format(plural(len(rest), "more task"), count_states(rest)), width))
    lines.append("─" * width)
    folded = [part for message in messages[-height:] for part in fold(message, width - 2)]
    space = max(0, height - len(lines))
    lines += [clip(" " + line, width) for line in folded[-space:]] if space else []
    return (lines + [""] * height)[:height]


class Terminal:
    """stderr. What cannot be written any more, as the terminal is closed, is dropped."""

    def __init__(self) -> None:
        self.encoding = sys.stderr.encoding or "ascii"
        self.glyphs = {} if self.encoding.lower().replace("-", "") == "utf8" else PLAIN_GLYPHS
        self.can_draw = os.isatty(2) and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")

    def size(self) -> Tuple[int, int]:
        """Columns and lines."""
        try:
            size = os.get_terminal_size(2)
        except OSError:
            return 80, 24
        return size.columns or 80, size.lines or 24

    def write(self, text: str) -> None:
        try:
            sys.stderr.write(text.translate(self.glyphs))
            sys.stderr.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nor may flushing at the end of the process fail


def format_event(event: Event) -> List[str]:
    """An event as lines of a log, with its task in front where several run."""
    mark = event.level + ": " if event.level in ("warning", "error") else ""
    task = "{}: ".format(event.facts["task"]) if "task" in event.facts else ""
    return [printable(line) for line in (mark + task + event.text).split("\n")]


class LogLines(Reader):
    """Writes events of `level` and above to stderr; on a terminal the running transfers below them."""

    token = -1

    def __init__(self, level: str, progress: bool, terminal: Terminal, board: Board) -> None:
        self.levels = LEVELS[LEVELS.index(level):]
        self.progress, self.terminal, self.board = progress and terminal.can_draw, terminal, board
        self.block: List[str] = []  # as it stands on the terminal
        self.drawn = 0.0

    def __call__(self, event: Event) -> None:
        if self.progress:
            self.board.take(event)
        if event.level in self.levels:
            lines = format_event(event)
            if self.terminal.can_draw:
                width = self.terminal.size()[0] - 1
                lines = [part for line in lines for part in fold(line, width)]
            self.draw(lines)
        elif self.progress and event.level == "progress":
            self.tick("done" not in event.facts)

    def __enter__(self) -> "LogLines":
        return self

    def __exit__(self, *_: Any) -> None:
        """Leaves nothing but what was said."""
        self.board.works.clear()
        self.draw([])

    def tick(self, now: bool = False) -> None:
        """Draws the transfers again where that is due."""
        if self.progress and (now or time.monotonic() - self.drawn >= DRAW_INTERVAL):
            self.draw([])

    def draw(self, lines: Sequence[str]) -> None:
        """Writes `lines` above the transfers."""
        columns, height = self.terminal.size()
        # with room for the ^C that a terminal writes behind it
        block = progress_lines(self.board, columns - 4, max(1, height - 2)) if self.progress else []
        if lines or block != self.block:
            self.terminal.write(self.erase(columns) + "".join(line + "\n" for line in lines) + "\n".join(block))
        self.block, self.drawn = block, time.monotonic()

    def erase(self, columns: int) -> str:
        """What removes the block, also where the terminal has become narrower and has wrapped it."""
        if not self.block:
            return ""
        rows = sum(max(1, -(-shown_width(line) // columns)) for line in self.block)
        return "\r" + ("\x1b[{}A".format(rows - 1) if rows > 1 else "") + "\x1b[J"


class LiveView(Reader):
    """Draws the whole screen anew a few times a second; a context, in which the terminal shows it.

    Where this process is killed so that it cannot give the terminal back, a child may do it that reads a byte
    from `token`, a pipe.
    """

    progress = True

    def __init__(self, level: str, terminal: Terminal, board: Board) -> None:
        self.levels = LEVELS[LEVELS.index(level):]
        self.terminal, self.board = terminal, board
        self.messages: List[str] = []
        self.last: List[Event] = []  # what still matters when the screen is gone
        self.frame: List[str] = []
        self.size, self.drawn = (0, 0), 0.0
        self.pausing = False

    def __call__(self, event: Event) -> None:
        self.board.take(event)
        if event.level in self.levels:
            self.messages = self.messages[-200:] + [self.board.shown(line) for line in format_event(event)]
            if event.level in ("warning", "error") or event.kind in ("done", "summary"):
                self.last.append(event)
        self.tick()

    def tick(self, now: bool = False) -> None:
        if self.pausing:
            self.pause()
        size = self.terminal.size()
        if not now and size == self.size and time.monotonic() - self.drawn < DRAW_INTERVAL:
            return
        frame = live_lines(self.board, self.messages, *size)
        if frame != self.frame or size != self.size:
            clear = "\x1b[2J" if size != self.size else ""
            lines = [pad(line, size[0]) for line in frame]  # erasing after a full line would take its last column
            self.terminal.write(clear + "\x1b[H\x1b[7m" + "\r\n".join([lines[0] + "\x1b[0m"] + lines[1:]) + "\x1b[H")
        self.frame, self.size, self.drawn = frame, size, time.monotonic()

    def __enter__(self) -> "LiveView":
        self.token, write_end = os.pipe()
        os.write(write_end, b"x")
        os.close(write_end)
        self.before = signal.signal(signal.SIGTSTP, self.note_pause)
        self.open()
        return self

    def __exit__(self, *_: Any) -> None:
        """Gives the terminal back as it was, and says there what still matters."""
        signal.signal(signal.SIGTSTP, self.before)
        os.close(self.token)
        self.terminal.write(CLOSE_SCREEN)
        for event in self.last:
            width = self.terminal.size()[0] - 1
            self.terminal.write("".join(part + "\n" for line in format_event(event) for part in fold(line, width)))

    def note_pause(self, _number: int, _frame: Any) -> None:
        self.pausing = True

    def open(self) -> None:
        self.terminal.write(OPEN_SCREEN)
        self.size = (0, 0)
        self.tick(True)

    def pause(self) -> None:
        """Stops as Ctrl-Z asks, with the terminal given back meanwhile."""
        self.pausing = False
        self.terminal.write(CLOSE_SCREEN)
        os.kill(os.getpid(), signal.SIGSTOP)
        self.open()


########################################################################################################
# CREW: the tasks of one command, each in a process of its own
#
# Each task runs in a child of ours: down a pipe comes the leave to go on, up another come its events, each a list
# in a line of JSON, and what it asks of us, each an object, which nothing that an event holds can become. All take
# their snapshots first; then they go on, no more at once than allowed. Tasks on one snapshot folder and prefix take
# turns. A child whose pipe from us ends has lost us, and stops as if it were interrupted. Never: a child left
# running when we are done with it; a display that a child writes to; a command line that a child has sent.
########################################################################################################

TICK = 0.1  # seconds between looks at everything
SNAPSHOT_PATIENCE = 60.0  # seconds for which a task that is not ready keeps the others from going on
STOP_GRACE = 60.0  # seconds a task gets to end its transfers
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CREW_SIGNALS = STOP_SIGNALS + (signal.SIGQUIT,)  # a crew does not leave its children and terminal behind
LEAVE_SIZE = 5  # bytes
TURN, GO, UNSHARED = b"turn\n", b"go  \n", b"s-  \n"  # and s012, the number of a shared connection
MASTER_TASKS = 3  # on one connection: sshd's MaxSessions is 10 by default, and a task may have three at once
SUMMARY_ERRORS = 5  # of one task
SWALLOWED_NAP = 0.01  # seconds


def pass_over(_number: int, _frame: Any) -> None:
    """Does nothing. SIG_IGN would be inherited by programs that are started, and not bear a signal under way."""


def catch_signals() -> None:
    """Makes INT, TERM and HUP raise Interrupted, once: cleaning up is not interrupted again.

    Where a finalizer happens to run, Python swallows what is raised: there it is raised again a moment later.
    """

    def interrupt(number: int, _frame: Any) -> None:
        for other in STOP_SIGNALS:
            signal.signal(other, pass_over)
        raise Interrupted(number)

    def raise_again(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, Interrupted):
            tell_unraisable(unraisable)
            return
        number = unraisable.exc_value.status - 128
        signal.signal(number, interrupt)
        later = threading.Timer(SWALLOWED_NAP, lambda: os.kill(os.getpid(), number))
        later.daemon = True
        later.start()

    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, interrupt)
    if sys.version_info >= (3, 8):
        tell_unraisable = sys.__unraisablehook__  # novermin
        sys.unraisablehook = raise_again  # novermin


def format_interruption(name: str, tasks: Sequence[Task]) -> str:
    """What a signal did to tasks: whether locks stay is not known here, and a dry run leaves nothing to go on with."""
    goes_on = any(task.verb in ("", "restore") and not task.dry_run for task in tasks)
    return "interrupted by {}{}".format(name, "; the next run goes on" if goes_on else "")


def run_and_report(run: Callable[[Task, Events], int], task: Task, events: Events) -> int:
    """Does a task and says what stopped it; the exit status."""
    try:
        return run(task, events)
    except BrokenPipeError:  # nobody reads the results any more
        raise
    except Exception as error:
        if task.verbosity == "debug":
            import traceback
            traceback.print_exc()
        told = explain(error, "stopped")
        events.error(told)
        return told.status
    except Interrupted as interruption:
        end_children()
        events.warning("interrupted", format_interruption(str(interruption), [task]))
        return interruption.status


def overall_status(statuses: Sequence[int]) -> int:
    """The exit status of a command from those of its tasks: busy only where nothing else went wrong."""
    bad = {status for status in statuses if status}
    return 0 if not bad else Busy.status if bad == {Busy.status} else 1


def format_request(request: Request, *more: str) -> str:
    """The command line of one task, for a shell; without the options that hold for the whole command."""
    plain = all(split_word(path) == (path, None) and path[:1] not in ("-", "@") for path in request.paths)
    return typed(["btrfs-backup-ng"] + list(more) + list(request.words) + ([] if plain else ["--"])
                 + list(request.paths))


def task_names(requests: Sequence[Request]) -> List[str]:
    """What to call each task: its source, with a number where several have the same."""
    sources = [printable(request.task.source) for request in requests]
    return [source if sources.count(source) == 1 else "{} ({})".format(source, sources[:number].count(source))
            for number, source in enumerate(sources, 1)]


# In the child.


class ChildEvents(Reader):
    """A reader of events that passes them on to the parent; and the way to ask something of it."""

    def __init__(self, fd: int, progress: bool) -> None:
        self.fd, self.progress, self.mutex = fd, progress, threading.Lock()
        self.is_torn = False  # a signal has left the last line in its midst

    def __call__(self, event: Event) -> None:
        self.write(event)

    def ask(self, word: str, what: Any = None) -> None:
        self.write({"ask": word, "of": what})

    def write(self, said: Any) -> None:
        import json
        data = b"\n" + json.dumps(said, default=str).encode("ascii") + b"\n"
        with self.mutex, contextlib.suppress(BrokenPipeError):  # that the parent has gone is seen elsewhere
            data, self.is_torn = data[not self.is_torn:], True
            while data:
                data = data[os.write(self.fd, data):]
            self.is_torn = False


def master_path(folder: str, number: int) -> str:
    return os.path.join(folder, str(number))


class ChildGate(Gate):
    """Asks the parent, and hears from it on stdin."""

    def __init__(self, parent: ChildEvents, folder: str, on_loss: Callable[[], None]) -> None:
        """folder: of the sockets of shared connections; '' where there are none."""
        import queue
        self.parent, self.folder, self.on_loss = parent, folder, on_loss
        self.leaves = {TURN: threading.Event(), GO: threading.Event()}
        self.answers: "queue.Queue[bytes]" = queue.Queue()
        self.asking = threading.Lock()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        for leave in iter(lambda: os.read(0, LEAVE_SIZE), b""):
            if leave in self.leaves:
                self.leaves[leave].set()
            else:
                self.answers.put(leave)
        self.on_loss()
        os.kill(os.getpid(), signal.SIGTERM)

    def take_turn(self, key: str) -> None:
        self.parent.ask("turn", key)
        self.leaves[TURN].wait()

    def snapshot_taken(self) -> None:
        self.parent.ask("ready")
        self.leaves[GO].wait()

    def share(self, endpoint: Endpoint, settings: Dict[str, str]) -> str:
        if not self.folder:
            return ""
        with self.asking:
            self.parent.ask("share", [endpoint.machine, settings])
            answer = self.answers.get()
        return master_path(self.folder, int(answer[1:4])) if answer != UNSHARED else ""


def close_lost_screen(terminal: int, token: int) -> None:
    """Gives a terminal back whose owner was killed; of several tasks the one does it that gets the token."""
    with contextlib.suppress(OSError):
        if os.read(token, 1):
            os.write(terminal, CLOSE_SCREEN.encode("ascii"))


def until_interrupted(act: Callable[[], int]) -> int:
    """What `act` returns, or the status of the signal that asked it to stop; one that comes later changes nothing."""
    status = None
    try:
        catch_signals()
        status = act()
        for number in STOP_SIGNALS:
            signal.signal(number, pass_over)
    except Interrupted as interruption:  # is raised once
        status = interruption.status if status is None else status
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # a handler would be taken back as the interpreter ends
    return status


def act_and_flush(act: Callable[[], int]) -> int:
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return act()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()


def live_as_child(act: Callable[[], int]) -> None:
    """The rest of a forked process's life. The signals, held back by the parent, are free again."""
    status = 1
    try:
        signal.signal(signal.SIGQUIT, signal.SIG_IGN)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        status = until_interrupted(functools.partial(act_and_flush, act))
    except Exception as error:  # before there was anything to report it with
        with contextlib.suppress(OSError):
            print(format_error(explain(error, "stopped")), file=sys.stderr, flush=True)
    finally:
        os._exit(status)


# In the parent.


class TaskProcess:
    """One task's process, as its parent sees it."""

    def __init__(self, name: str, request: Request) -> None:
        self.name, self.request = name, request
        self.pid: Optional[int] = None  # while there is a process
        self.leave_fd = -1  # while it can be told something
        self.status: Optional[int] = None
        self.streams: Dict[int, str] = {}  # what comes on each open pipe
        self.rest = {"events": b"", "stdout": b"", "stderr": b""}
        self.turn: Optional[str] = None  # what it wants to be alone with
        self.is_told = False  # that it waits for its turn
        self.has_turn = self.is_ready = self.waits = self.goes = self.took_snapshot = False
        self.errors: List[Dict[str, Any]] = []

    @property
    def runs(self) -> bool:
        return self.status is None

    @property
    def delays(self) -> bool:
        """Whether the others should wait for its snapshot."""
        return self.runs and not (self.is_ready or self.waits or (self.turn is not None and not self.has_turn))

    def start(self, siblings: Sequence["TaskProcess"], act: Callable[[int, int], int]) -> None:
        """Forks a child that does `act`, given where to write its events and our stderr; OSError where it cannot be.

        Forked, not started anew, for compiling this file takes longer than taking a snapshot.
        """
        with contextlib.ExitStack() as stack:
            theirs, ours = [], []  # type: List[int], List[int]
            for number in range(4):
                ends = os.pipe()
                for fd, kept in zip(ends if number == 0 else ends[::-1], (theirs, ours)):
                    kept.append(fd)
                    stack.callback(os.close, fd)
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                for sibling in siblings:
                    sibling.close()
                live_as_child(functools.partial(self.begin, theirs, ours, act))
            stack.pop_all()
        self.pid = pid
        for fd in theirs:
            os.close(fd)
        self.leave_fd, self.streams = ours[0], dict(zip(ours[1:], ("stdout", "stderr", "events")))
        for fd in self.streams:
            os.set_blocking(fd, False)

    @staticmethod
    def begin(theirs: Sequence[int], ours: Sequence[int], act: Callable[[int, int], int]) -> int:
        """What the child does: with the pipes in place of its standard streams."""
        terminal = os.dup(2)
        for fd in ours:
            os.close(fd)
        for number in range(3):
            os.dup2(theirs[number], number)
            os.close(theirs[number])
        return act(theirs[3], terminal)

    def tell(self, leave: bytes) -> None:
        """Tells it something, if it is still there to hear it."""
        if self.leave_fd >= 0:
            with contextlib.suppress(BrokenPipeError):
                os.write(self.leave_fd, leave)

    def signal(self, number: int) -> None:
        signal_process(self.pid, number)

    def look(self) -> Optional[int]:
        """The status of a process that has ended by now, negative where a signal ended it; None otherwise."""
        pid, code = os.waitpid(self.pid, os.WNOHANG) if self.pid is not None else (0, 0)
        if not pid:
            return None
        self.pid = None
        return -os.WTERMSIG(code) if os.WIFSIGNALED(code) else os.WEXITSTATUS(code)

    def read(self, fd: int) -> bytes:
        """What has come on a pipe; a pipe at its end is closed."""
        try:
            data = os.read(fd, PIPE_SIZE)
        except BlockingIOError:
            return b""
        if not data:
            os.close(fd)
            del self.streams[fd]
        return data

    def take_lines(self, kind: str, data: bytes) -> List[bytes]:
        """The lines that are whole now."""
        *lines, self.rest[kind] = (self.rest[kind] + data).split(b"\n")
        return lines

    def close(self) -> None:
        for fd in list(self.streams) + ([self.leave_fd] if self.leave_fd >= 0 else []):
            os.close(fd)
        self.streams, self.leave_fd = {}, -1


def ignore_interrupts() -> None:
    """For what may ask at our terminal: Ctrl-C there is for us, as the tasks end first, and need it for that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Master:
    """A connection over ssh that tasks share, so that a person is asked once.

    It lives as long as its `cat` there, whose stdin is ours: killed we leave none behind.
    """

    def __init__(self, folder: str, number: int, argv: Sequence[str]) -> None:
        self.number, self.argv, self.path = number, argv, master_path(folder, number)
        self.users: List[TaskProcess] = []
        self.waiting: List[TaskProcess] = []
        self.deadline = time.monotonic() + GREETING_TIMEOUT
        more = ["-o", "ControlMaster=yes", "-o", "ControlPersist=no", "-o", "ControlPath=" + self.path]
        read_end, self.write_end = os.pipe()
        try:
            self.stage = Stage(list(argv[:1]) + more + list(argv[1:]) + ["cat"], read_end, subprocess.DEVNULL,
                               prepare=ignore_interrupts if has_terminal() else None)
        except BaseException:
            os.close(self.write_end)
            raise
        finally:
            os.close(read_end)

    def answer(self) -> bool:
        """Tells those that wait, once it is known whether it works; whether it may still be used."""
        is_there = os.path.exists(self.path)
        ended = self.stage.has_ended() or (not is_there and time.monotonic() > self.deadline)
        if ended or is_there:
            for process in self.waiting:  # those that have ended meanwhile do not hear it
                process.tell(UNSHARED if ended else "s{:03}\n".format(self.number).encode("ascii"))
            self.waiting = []
        return not ended

    def end(self) -> None:
        os.close(self.write_end)
        self.stage.end()


class Masters:
    """The shared connections of a crew; a context, at whose end they end."""

    def __init__(self, requests: Sequence[Request]) -> None:
        paths = [path for request in requests for path in request.paths]
        is_remote = len(requests) > 1 and any(parse_endpoint(path).login for path in paths)
        self.private: Optional[PrivateFolder] = None  # none where there is no place for it: then nothing is shared
        with contextlib.suppress(OSError):
            self.private = PrivateFolder() if is_remote else None
        self.folder = self.private.path if self.private else ""
        self.all: List[Master] = []
        self.numbers = itertools.count()

    @staticmethod
    def argv(request: Request, machine: str, settings: Dict[str, str]) -> List[str]:
        """The ssh command to a machine that the user has named, by ssh's settings for it; [] for any other machine."""
        options = SshOptions(request.task.ssh_options, request.task.ssh_sudo)
        return next((ssh_argv(endpoint, options, open_settings(settings, "", True))
                     for endpoint in map(parse_endpoint, request.paths) if endpoint.machine == machine != ""), [])

    def ask(self, process: TaskProcess, machine: str, settings: Dict[str, str]) -> None:
        """Finds a connection to a machine that the task may share, or makes it; `look` answers."""
        argv = self.argv(process.request, machine, settings)
        if not argv:
            process.tell(UNSHARED)
            return
        for master in self.all:
            running = [user for user in master.users if user.runs]
            if master.argv == argv and (process in running or len(running) < MASTER_TASKS):
                break
        else:
            try:
                master = Master(self.folder, next(self.numbers), argv)
            except Exception:  # nor is it shared where there is no descriptor or process for it
                process.tell(UNSHARED)
                return
            self.all.append(master)
        master.users.append(process)
        master.waiting.append(process)

    def look(self) -> None:
        for master in list(self.all):
            if not master.answer():
                self.all.remove(master)
                master.end()

    def __enter__(self) -> "Masters":
        return self

    def __exit__(self, *_: Any) -> None:
        for master in self.all:
            master.end()
        if self.private is not None:
            self.private.end()


class Crew:
    """The tasks of one command at work. `tick` draws what a display shows; `token` is for the children's gates."""

    def __init__(self, requests: Sequence[Request], events: Events, tick: Callable[[], None], token: int = -1) -> None:
        self.events, self.tick, self.token = events, tick, token
        self.jobs = requests[0].task.jobs or len(requests)
        self.progress = events.want_progress
        self.processes = [TaskProcess(name, request) for name, request in zip(task_names(requests), requests)]
        self.owners: Dict[int, TaskProcess] = {}
        self.masters = Masters(requests)
        self.poll = select.poll()
        self.begun = time.monotonic()
        self.is_open = False  # all that can have taken their snapshots
        self.stopped_by: Optional[int] = None
        self.deadline: Optional[float] = None  # for those that were asked to stop

    def run(self) -> List[int]:
        """The exit status of each task, when all have ended."""
        with self.noted_signals(), self.masters:
            try:
                for process in self.processes:
                    self.start(process)
                while any(process.runs for process in self.processes):
                    self.step()
            finally:
                self.end()
        return [process.status or 0 for process in self.processes]

    @contextlib.contextmanager
    def noted_signals(self) -> Iterator[None]:
        """Signals that ask to stop are noted here, so that none comes between two steps."""

        def note(number: int, _frame: Any) -> None:
            self.stopped_by = self.stopped_by or number

        before = {number: signal.getsignal(number) for number in CREW_SIGNALS}
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def end(self) -> None:
        """Where we fail ourselves: lets those that run end as if they were interrupted, and waits for them."""
        for process in self.processes:
            process.close()
            process.signal(signal.SIGTERM)
            process.signal(signal.SIGCONT)
        left, deadline = self.processes, time.monotonic() + STOP_GRACE
        while left:
            if time.monotonic() > deadline:
                for process in left:
                    process.signal(signal.SIGKILL)
            left = [process for process in left if process.pid is not None and process.look() is None]
            time.sleep(TICK if left else 0)

    def start(self, process: TaskProcess) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until the child has handlers of its own
        try:
            process.start(self.processes, functools.partial(self.act, process.request.task))
        except Exception as error:  # no descriptors, processes or memory are left
            process.status = 1
            self.fail(process, explain(error, "cannot start the task"))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        for fd in process.streams:
            self.owners[fd] = process
            self.poll.register(fd, select.POLLIN)

    def act(self, task: Task, fd: int, terminal: int) -> int:
        """What the child does."""
        parent = ChildEvents(fd, self.progress)
        on_loss = functools.partial(close_lost_screen, terminal, self.token)
        return run_and_report(lambda task, events: run_task(task, events, ChildGate(
            parent, self.masters.folder, on_loss)), task, Events(parent))

    def step(self) -> None:
        for fd, _ in self.poll.poll(1000 * TICK):
            self.read(self.owners[fd], fd)
        for process in self.processes:
            status = process.look()
            if status is not None:
                self.conclude(process, status)
        self.masters.look()
        if self.stopped_by:
            self.stop()
        else:
            self.give_leave()
        self.tick()

    def stop(self) -> None:
        """Asks all to end, and kills in the end what does not."""
        now = time.monotonic()
        if self.deadline is None:
            for process in self.processes:
                process.signal(signal.SIGTERM)
                process.signal(signal.SIGCONT)  # a stopped process takes no other signal
                self.show(process, "stopping")
        elif now > self.deadline:
            for process in [process for process in self.processes if process.runs]:
                self.emit(process, "killed", "warning", "it did not end within {}, and was killed".format(
                    format_duration(STOP_GRACE)))
                process.signal(signal.SIGKILL)
            self.deadline += STOP_GRACE
        self.deadline = self.deadline or now + STOP_GRACE

    def give_leave(self) -> None:
        """Turns to those whose folder nobody else has, and leave to go on once all have their snapshots."""
        running = [process for process in self.processes if process.runs]
        for process in running:
            others = {other.turn for other in running if other.has_turn}
            if process.turn is None or process.has_turn:
                continue
            if process.turn not in others:
                process.has_turn = True
                process.tell(TURN)
            elif not process.is_told:
                process.is_told = True
                self.emit(process, "waiting", "info", "waiting for another task on the same snapshots")
        late = time.monotonic() - self.begun > SNAPSHOT_PATIENCE
        self.is_open = self.is_open or late or not any(process.delays for process in running)
        free = self.jobs - sum(process.goes for process in running)
        for process in [process for process in running if process.is_ready and not process.goes and self.is_open]:
            if free > 0:
                process.goes, free = True, free - 1
                process.tell(GO)
                self.show(process, "at work")

    def conclude(self, process: TaskProcess, status: int) -> None:
        """Books the end of a task's process."""
        process.status = 1 if status < 0 or status == UsageError.status else status
        for fd in list(process.streams):
            while fd in process.streams and self.read(process, fd):
                pass
        for fd in process.streams:  # something that it has started holds the other end
            self.poll.unregister(fd)
        process.close()
        if status < 0 and not self.stopped_by:
            self.fail(process, BackupError("its process was killed by {}".format(signal_name(-status)), "run it again"))
        self.show(process, "done" if status == 0 else "busy" if status == Busy.status else
                  "stopped" if self.stopped_by else "failed", ended=True)

    # -- what the children say

    def read(self, process: TaskProcess, fd: int) -> bool:
        """Takes what has come on a pipe; whether that was anything."""
        kind = process.streams[fd]
        data = process.read(fd)
        if fd not in process.streams:
            self.poll.unregister(fd)
        if kind == "stdout":
            process.rest[kind] += data
            return bool(data)
        for line in process.take_lines(kind, data):
            if kind == "events":
                self.take(process, line)
            elif line:
                self.emit(process, "stderr", "warning", os.fsdecode(line))
        return bool(data)

    def take(self, process: TaskProcess, line: bytes) -> None:
        """Takes one line of what a child says; one that a signal has torn is the beginning of an event."""
        import json
        try:
            said = json.loads(line.decode("ascii"))
        except ValueError:
            return
        if isinstance(said, dict):
            self.answer(process, said["ask"], said["of"])
        else:
            self.take_event(process, Event(*said))

    def answer(self, process: TaskProcess, word: str, what: Any) -> None:
        """Notes what a child asks for; `give_leave` and the masters answer."""
        if word == "turn":
            process.turn = what
        elif word == "share":
            self.masters.ask(process, *what)
        elif word == "ready":
            process.is_ready = True
            self.show(process, "waiting")

    def take_event(self, process: TaskProcess, event: Event) -> None:
        if event.kind != "interrupted" or not self.stopped_by:
            process.waits = event.kind == "waiting"
            process.took_snapshot = process.took_snapshot or event.kind == "snapshot"
            self.emit(process, *event[:3], **event.facts)

    def fail(self, process: TaskProcess, error: BackupError) -> None:
        self.emit(process, "error", "error", format_error(error), message=error.message, hint=error.hint)

    def emit(self, process: TaskProcess, kind: str, level: str, text: str = "", **facts: Any) -> None:
        if level == "error":
            process.errors.append(dict(facts, text=text))
        if len(self.processes) > 1:
            facts["task"] = process.name
        self.events.emit(kind, level, text, **facts)

    def show(self, process: TaskProcess, state: str, ended: bool = False) -> None:
        self.emit(process, "task", "state", state=state, ended=ended)

    # -- what is said at the end

    def summary(self) -> List[str]:
        """For each failed task what failed, where, why, and what to type."""
        lines = []
        for process in self.processes:
            if process.status:
                said = [error.get("message") and "{}{}".format(
                    error["message"], "; " + error["hint"] if error.get("hint") else "") or error["text"]
                    for error in process.errors] or ["ended with status {}".format(process.status)]
                lines += ["    {}: {}".format(process.name, line) for line in said[:SUMMARY_ERRORS]]
                lines += ["    {}: … and {}".format(process.name, plural(len(said) - SUMMARY_ERRORS, "more error"))
                          ] * (len(said) > SUMMARY_ERRORS)
                kept = process.took_snapshot and not process.request.task.no_snapshot
                lines.append("        again: " + format_request(process.request, *["-S"] * kept))
        return lines

    def results(self) -> List[Tuple[Request, str]]:
        """What each task has written to its stdout."""
        return [(process.request, os.fsdecode(process.rest["stdout"]).rstrip("\n")) for process in self.processes]


def run_crew(requests: Sequence[Request], events: Events, view: Union[LogLines, LiveView]) -> int:
    """Does several tasks at once, shown by `view`; the exit status of the command."""
    with view:
        crew = Crew(requests, events, view.tick, view.token)
        statuses = crew.run()
        failed = sum(status != 0 for status in statuses)
        if crew.stopped_by:
            events.warning("interrupted", format_interruption(
                signal.Signals(crew.stopped_by).name, [request.task for request in requests]))
        elif failed and len(statuses) > 1:
            head = "{} of {} was not done as asked" if failed == 1 else "{} of {} were not done as asked"
            events.emit("summary", "error", "\n".join(
                [head.format(failed, plural(len(statuses), "task"))] + crew.summary()))
    for number, (request, text) in enumerate(crew.results(), 1):
        if request.task.dry_run and len(requests) > 1:
            print_result("task {} of {}: {}".format(number, len(requests), format_request(request)))
        if text:
            print_result(text)
    return 128 + crew.stopped_by if crew.stopped_by else overall_status(statuses)


########################################################################################################
# COPIES: the program's own copies in the user's cache folder
#
# A zipapp, and an agent on a remote host, run from a copy of the source in CACHE/btrfs-backup-ng/SHA-256/,
# where Python keeps its bytecode. The folder's time says when the copy was last used, by the day. A run
# from such a copy removes those of other versions that nobody has used for long, and of these only what is
# provably ours: nobody else can write there, the source is the one that the folder is named after, and
# nothing else is in it.
########################################################################################################

COPY_NAME = re.compile(r"[0-9a-f]{64}")
COPY_UNUSED = 90 * 86400.0  # seconds
COPY_PARTS = re.compile(r"btrfs_backup_ng\.py(\.[0-9]+)?|__pycache__/btrfs_backup_ng\.[^/]*\.pyc(\.[0-9]+)?")


def copy_files(folder: str) -> Optional[List[str]]:
    """The files of an old copy, relative to its folder, or None where not all in it is ours."""
    import hashlib
    names = [name for name in os.listdir(folder) if name != "__pycache__"]
    bytecode = os.path.join(folder, "__pycache__")
    if os.path.isdir(bytecode) and not os.path.islink(bytecode):
        names += ["__pycache__/" + name for name in os.listdir(bytecode)]
    status = os.lstat(folder)
    is_private = status.st_uid == os.geteuid() and stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o022
    if not is_private or not all(COPY_PARTS.fullmatch(name) for name in names):
        return None
    with open(os.path.join(folder, "btrfs_backup_ng.py"), "rb") as source:
        is_ours = hashlib.sha256(source.read()).hexdigest() == os.path.basename(folder)
    return names if is_ours else None


def remove_copy(folder: str) -> None:
    """Removes an old copy if it is provably ours, the source last: until then it is known as ours."""
    names = copy_files(folder)
    for name in sorted(names or (), reverse=True, key=lambda name: (name != "btrfs_backup_ng.py", name)):
        os.unlink(os.path.join(folder, name))
        if name.startswith("__pycache__/"):
            with contextlib.suppress(OSError):
                os.rmdir(os.path.join(folder, "__pycache__"))
    if names is not None:
        os.rmdir(folder)


def tend_copies(now: float) -> None:
    """Once a day, where this is a kept copy: marks it as used and removes old ones. Never fails."""
    own = os.path.dirname(os.path.abspath(__file__))
    copies = os.path.dirname(own)
    if not COPY_NAME.fullmatch(os.path.basename(own)) or os.path.basename(copies) != "btrfs-backup-ng":
        return
    with contextlib.suppress(OSError):
        if os.lstat(own).st_mtime > now - 86400:
            return
        os.utime(own)
        for name in sorted(os.listdir(copies)):
            folder = os.path.join(copies, name)
            with contextlib.suppress(OSError):
                if COPY_NAME.fullmatch(name) and folder != own and os.lstat(folder).st_mtime < now - COPY_UNUSED:
                    remove_copy(folder)


########################################################################################################
# COMMAND LINE: help, version, sudo, signals, main
#
# The thin shell around a task: everything that touches the process as a whole (its arguments, user,
# signals, exit status) is here and nowhere else.
########################################################################################################


def format_version() -> str:
    try:
        progs = check(["btrfs", "--version"], "btrfs --version").splitlines()[0]
    except BackupError as error:
        progs = error.message
    return "btrfs-backup-ng {}\nsha256 {}\nPython {}\n{}".format(
        __version__, source_digest(), sys.version.split()[0], progs)


def elevate(arguments: Sequence[str]) -> None:
    """Runs again through sudo with the same interpreter, file and arguments; does not come back."""
    try:
        sudo = find_program("sudo")
    except BackupError:
        raise BackupError("this needs root, and sudo is not installed", "run as root, or with --no-elevate") from None
    # isolated: sudo may leave HOME as it was, and with it what the user has installed there
    argv = [sudo, "--", sys.executable, "-I", os.path.abspath(sys.argv[0])] + list(arguments)
    sys.stderr.flush()
    try:
        os.execv(sudo, argv)
    except OSError as error:
        raise os_error("cannot run sudo", error, "run as root") from None


def make_view(requests: Sequence[Request], terminal: Terminal) -> Union[LogLines, LiveView]:
    """What shows a person the events."""
    task, several = requests[0].task, len(requests) > 1
    titles = dict(zip(task_names(requests) if several else [""], task_names(requests)))
    board = Board(titles, terminal.encoding)
    has_room = all(real >= least for real, least in zip(terminal.size(), SMALLEST_VIEW))
    if task.live_layout and not task.dry_run and terminal.can_draw and has_room:
        return LiveView(task.verbosity, terminal, board)
    return LogLines(task.verbosity, not task.no_progress and task.verbosity in ("info", "debug"), terminal, board)


def no_operands(operands: Sequence[str]) -> None:
    if operands:
        raise UsageError("print: {} is too much".format(printable(operands[0])), "see print --help")


def print_man(task: Task) -> str:
    no_operands(task.destinations)
    return format_man()


def print_completion(task: Task) -> str:
    writers = {"bash": bash_completion, "zsh": zsh_completion, "fish": fish_completion}
    shell = "".join(task.destinations[:1])
    if shell not in writers:
        raise UsageError("print completion: which shell?" if not shell else
                         "no completion for {}".format(printable(shell)), "one of " + ", ".join(writers))
    no_operands(task.destinations[1:])
    return writers[shell]()


def print_systemd(task: Task) -> str:
    requests = parse_command(task.destinations)
    for request in requests:
        if request.task.verb:
            raise UsageError("print systemd is for backups, not for the verb {}".format(request.task.verb),
                             "{} print systemd -- SOURCE DESTINATION ...".format(PROGRAM))
        check_task(request.task)
        check_absolute(request)
    check_together([request.task for request in requests])
    return format_units(task, requests, task.destinations)


PUBLIC_KEY = re.compile(r"((?:sk-)?(?:ssh|ecdsa)-[a-z0-9@.-]+) ([A-Za-z0-9+/=]+)(?: (.*))?")


def program_path() -> str:
    """Where this program is, as another shell finds it."""
    import shutil
    installed = shutil.which("btrfs-backup-ng")
    called = os.path.abspath(sys.argv[0])
    return installed if installed and os.path.realpath(installed) == os.path.realpath(called) else called


def print_authorized_keys(task: Task) -> str:
    """The line of authorized_keys that restricts a key."""
    import shlex
    if not task.under or not task.allow or len(task.destinations) != 1:
        raise UsageError("print authorized-keys needs --under, --allow and a KEYFILE",
                         "print authorized-keys --under /mnt/backups/laptop --allow receive,list laptop.pub")
    if not task.under.isprintable():
        raise UsageError("{} cannot be printed as it is".format(printable(task.under)), "print the line for another "
                         "folder, and write this one into it")
    path = task.destinations[0]
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as key_file:
            lines = [line.strip() for line in key_file if line.strip() and not line.startswith("#")]
    except OSError as error:
        raise os_error("cannot read {}".format(path), error) from None
    keys = [line for line in lines if PUBLIC_KEY.fullmatch(line)]
    if not keys or len(keys) != len(lines):
        raise UsageError("{} holds no public key".format(path), "name the file that ends in .pub")
    words = ["sudo", "-n"] * task.ssh_sudo + [program_path(), "agent", "--under", task.under, "--allow",
                                             ",".join(task.allow)]
    if task.most_partials != Task().most_partials:
        words += ["--most-partials", str(task.most_partials)]
    if task.known_as:
        words += ["--as", task.known_as]
    command = " ".join(map(shlex.quote, words)).replace('"', '\\"')
    return "\n".join('restrict,command="{}" {}'.format(command, key) for key in keys)


# what can be printed
PRINTS: Dict[str, Callable[[Task], str]] = {
    "man": print_man,
    "completion": print_completion,
    "systemd": print_systemd,
    "authorized-keys": print_authorized_keys,
}


def check_print(task: Task) -> None:
    if task.source not in PRINTS:
        raise UsageError("print: {} is nothing to print".format(printable(task.source)) if task.source else
                         "print takes what to print", "one of " + ", ".join(PRINTS))


def run_print(task: Task, events: Events) -> int:
    print_result(PRINTS[task.source](task))
    return 0


def check_agent(task: Task) -> None:
    if bool(task.under) != bool(task.allow):
        raise UsageError("--under and --allow go together", "see agent --help")


def run_agent(task: Task, _events: Events) -> int:
    serve_agent(Restriction(task.under, task.allow, task.most_partials, task.known_as) if task.under else None)
    return 0


# how each verb is checked and run
RUNS: Dict[str, Tuple[Callable[[Task], None], Callable[[Task, Events], int]]] = {
    "": (check_task, run_task),
    "doctor": (check_doctor, run_doctor),
    "agent": (check_agent, run_agent),
    "list": (check_list, run_list),
    "prune": (check_prune, run_prune),
    "restore": (check_restore, run_restore),
    "verify": (check_verify, run_verify),
    "print": (check_print, run_print),
}


def run_arguments(arguments: Sequence[str]) -> int:
    """The exit status of a command line; BackupError where it ends early."""
    try:
        requests = parse_command(arguments)
    except Forbidden:
        if os.geteuid() != 0 and "--no-elevate" not in arguments:
            elevate(arguments)
        raise
    task = requests[0].task
    if task.help:
        print_result(format_help(task.verb))
        return 0
    if task.version:
        print_result(format_version())
        return 0
    check, run = RUNS[task.verb]
    for number, request in enumerate(requests, 1):
        try:
            check(request.task)
        except UsageError as error:
            raise UsageError("task {}: {}".format(number, error.message) if len(requests) > 1 else error.message,
                             error.hint) from None
    if not task.verb:
        check_together([request.task for request in requests])
    if os.geteuid() != 0 and not task.no_elevate and VERBS[task.verb].needs_root:
        elevate(arguments)
    view = make_view(requests, Terminal())
    events = Events(view, *[JsonLog(task.log_json, open_log)] if task.log_json else [])
    if task.live_layout and not isinstance(view, LiveView) and not task.dry_run:
        events.info("no-view", "no live view: it needs a terminal of at least {} columns and {} lines on stderr".format(
            *SMALLEST_VIEW))
    if len(requests) > 1 or isinstance(view, LiveView):
        status = run_crew(requests, events, view)
    else:
        if task.dry_run and requests[0].files:
            print_result("task: " + format_request(requests[0]))
        status = run_and_report(run, task, events)
    return status or int(not events.is_whole)


def open_standard_streams() -> None:
    """Opens what is closed of 0, 1 and 2 on nothing, so that no file of ours gets one of these numbers."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w"))


def use_utf8() -> None:
    """Starts again with names of files as UTF-8 where they are not: in the C locale before Python 3.7, in old locales.

    Else the same name would be another text in a lock, in another process, or on another host. What is printed
    stays in the encoding of the locale.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("LC_ALL") != "C.UTF-8":
        shown = getattr(sys.stdout, "encoding", None) or "ascii"
        with contextlib.suppress(OSError):
            with open("/proc/self/cmdline", "rb") as file:
                words = file.read().split(b"\0")[:-1]
            os.execve(sys.executable or "", words, dict(os.environ, LC_ALL="C.UTF-8", PYTHONUTF8="1",
                                                  PYTHONIOENCODING=shown + ":backslashreplace"))


def wants_debug(arguments: Sequence[str]) -> bool:
    with contextlib.suppress(BackupError):
        return parse_command(arguments)[0].task.verbosity == "debug"
    return False


def run_and_explain(arguments: Sequence[str]) -> int:
    """Does what the arguments ask, says what goes wrong; returns the exit status."""
    try:
        return run_arguments(arguments)
    except BackupError as error:
        print("error: " + format_error(error), file=sys.stderr)
        return error.status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        if wants_debug(arguments):
            raise
        print("error: " + format_error(explain(error, "stopped")), file=sys.stderr)
        return 1


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Does what the arguments ask; returns the exit status."""
    if argv is None:
        use_utf8()
    arguments = list(sys.argv[1:] if argv is None else argv)
    open_standard_streams()
    tend_copies(time.time())
    return until_interrupted(lambda: run_and_explain(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
