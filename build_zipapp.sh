#!/bin/sh
# Packs btrfs_backup_ng.py into one executable file, btrfs_backup_ng.pyz:
#
#     ./build_zipapp.sh [OUTPUT]
#
# The same source gives the same bytes, whatever the time zone, umask, locale or Python
# (one built with zlib-ng instead of zlib compresses differently). PYTHON names the
# interpreter that packs, SOURCE_DATE_EPOCH the date that the entries carry.
#
# Python's own zipapp module is not used, because the __main__.py that it writes drops what
# main() returns, and because it neither sorts nor dates its entries the same way each time.
set -eu

fail() {
    printf 'build_zipapp.sh: %s\n' "$1" >&2
    exit 1
}

[ $# -le 1 ] || fail "too many arguments; usage: build_zipapp.sh [OUTPUT]"
folder=$(cd "$(dirname -- "$0")" && pwd)
source=$folder/btrfs_backup_ng.py
output=${1:-$folder/btrfs_backup_ng.pyz}
python=${PYTHON:-python3}

[ -f "$source" ] || fail "no $source to pack"
[ ! -d "$output" ] || fail "$output is a folder; name a file"
command -v "$python" >/dev/null || fail "no $python; install Python 3.6 or later, or set PYTHON"

"$python" -E -s - "$source" "$output" <<'PYTHON'
import sys

if sys.version_info < (3, 6):
    sys.exit("build_zipapp.sh: needs Python 3.6 or later, this is %d.%d" % sys.version_info[:2])

sys.path[:] = [folder for folder in sys.path if folder]  # not from the current folder

import hashlib
import os
import stat
import tempfile
import time
import zipfile

SHEBANG = b"#!/usr/bin/env python3\n"

# The earliest date that a zip file can hold, and the first one it no longer can.
EARLIEST, TOO_LATE = 315532800, 4354819200

# Kept in syntax that every Python parses, so that an old one says what is wrong.
MAIN = b'''\
import sys

if sys.version_info < (3, 6):
    sys.stderr.write(
        "btrfs-backup-ng: needs Python 3.6 or later, this is %d.%d (%s)\\n"
        % (sys.version_info[0], sys.version_info[1], sys.executable)
    )
    sys.exit(1)

import gc
import os
import signal

# Ctrl-C ends it without a word, not in a traceback, until the program tends to that itself.
if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# What importing makes is kept to the end. Looking there for garbage, meanwhile and at exit, took a
# fifth of the time that the shortest run takes.
gc.disable()

DIGEST, SIZE = "@DIGEST@", @SIZE@
NAME = "btrfs_backup_ng"


def is_private(path, kind):
    # only what nobody else can have written: sudo may leave another user's settings in place
    status = os.lstat(path)
    if status.st_uid != os.geteuid() or status.st_mode & 0o170022 != kind:
        raise OSError(path + " is not private")
    return status.st_size


def cache_folder():
    # Python keeps bytecode of files, not of what is in a zip, and compiling takes longer than
    # most runs have to do: so the module is imported from a copy in the user's cache folder.
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):
        import pwd

        cache = os.path.join(pwd.getpwuid(os.geteuid()).pw_dir, ".cache")
    for folder in (cache, os.path.join(cache, "btrfs-backup-ng"), os.path.join(cache, "btrfs-backup-ng", DIGEST)):
        is_private(os.path.dirname(folder), 0o040000)
        if not os.path.isdir(folder):
            os.mkdir(folder, 0o700)
    is_private(folder, 0o040000)
    source = os.path.join(folder, NAME + ".py")
    if not os.path.lexists(source) or is_private(source, 0o100000) != SIZE:
        aside = "%s.%d" % (source, os.getpid())
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as copy:
            copy.write(__loader__.get_data(os.path.join(os.path.dirname(__file__), NAME + ".py")))
            copy.flush()
            os.fsync(copy.fileno())
        os.rename(aside, source)
    return folder


def forget_bytecode(folder):
    # a crash of the system can leave it torn
    kept = os.path.join(folder, "__pycache__")
    for name in os.listdir(kept):
        if name.startswith(NAME + "."):
            os.unlink(os.path.join(kept, name))


def load():
    try:
        folder = cache_folder()
    except (OSError, KeyError, ImportError):
        return
    sys.path.insert(0, folder)
    settings = sys.dont_write_bytecode, getattr(sys, "pycache_prefix", None)
    sys.dont_write_bytecode = False
    sys.pycache_prefix = None
    try:
        __import__(NAME)
    except Exception:
        sys.path.remove(folder)
        sys.modules.pop(NAME, None)
        try:
            forget_bytecode(folder)
        except OSError:
            pass
    sys.dont_write_bytecode, sys.pycache_prefix = settings


load()
from btrfs_backup_ng import main

if hasattr(gc, "freeze"):  # since 3.7
    gc.freeze()
gc.enable()
raise SystemExit(main())
'''


def entry_date():
    text = os.environ.get("SOURCE_DATE_EPOCH") or str(EARLIEST)
    try:
        seconds = int(text)
    except ValueError:
        sys.exit("build_zipapp.sh: SOURCE_DATE_EPOCH is no number of seconds: " + ascii(text))
    return time.gmtime(min(max(seconds, EARLIEST), TOO_LATE - 1))[:6]


def entry(name, date):
    info = zipfile.ZipInfo(name, date)
    # what every run reads is stored as it is, so that most runs need no zlib
    info.compress_type = zipfile.ZIP_STORED if name == "__main__.py" else zipfile.ZIP_DEFLATED
    info.create_system = 3  # Unix; else the system that packs shows
    info.external_attr = (stat.S_IFREG | 0o644) << 16
    return info


def write_archive(stream, contents):
    date = entry_date()
    stream.write(SHEBANG)
    with zipfile.ZipFile(stream, "w") as archive:
        for name in sorted(contents):
            archive.writestr(entry(name, date), contents[name])


def replace(path, contents):
    """Write aside and rename: whoever runs the old file meanwhile goes on undisturbed."""
    folder, name = os.path.split(os.path.abspath(path))
    handle, aside = tempfile.mkstemp(prefix="." + name + ".", dir=folder)
    try:
        with os.fdopen(handle, "wb") as stream:
            write_archive(stream, contents)
            os.fchmod(stream.fileno(), 0o755)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise


source, output = sys.argv[1:]
try:
    with open(source, "rb") as stream:
        program = stream.read()
    digest = hashlib.sha256(program).hexdigest().encode()
    main = MAIN.replace(b"@DIGEST@", digest).replace(b"@SIZE@", b"%d" % len(program))
    replace(output, {"__main__.py": main, "btrfs_backup_ng.py": program})
except OSError as error:
    sys.exit("build_zipapp.sh: cannot write %s: %s" % (ascii(output), error.strerror))
PYTHON
