"""Fixtures of the remote tests: a real sshd, accounts, a proxy for bad networks.

Nothing of ssh is mocked: an Sshd is /usr/sbin/sshd on a free port of the loopback with keys of its
own. It sees the world as another machine would: in a mount namespace of its own, where disks show
up at paths that hold nothing here, and where programs can be hidden. So a program that looks at an
endpoint's path on the wrong machine finds an empty folder.

What a test starts there ends with it: all of it bears a mark in its environment.
"""

import collections
import contextlib
import fnmatch
import functools
import itertools
import os
import pwd
import queue
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from typing import Any, Dict, List, NamedTuple, Tuple

import support
from disks import SYSTEM_FOLDERS, find_program
from support import require, wait_until

MARK = "BTRFS_BACKUP_NG_TEST_SSHD"

def why_not():
    """The reason why tests with a real sshd cannot run here, or None."""
    for program in ("sshd", "ssh", "ssh-keygen", "unshare"):
        if not find_program(program):
            return "needs the program " + program
    return support.why_not() or support.why_no_mounts()


def write_file(path, text, mode=0o644):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(path, mode)
    return path


# Keys. One for the client and one for all servers of this process.


def folder_for_keys():
    """This process's folder for ssh: others may look into it, as an sshd reads keys as its user."""
    scratch = support.scratch_folder()
    os.chmod(scratch, 0o755)
    folder = os.path.join(scratch, "ssh")
    os.makedirs(folder, exist_ok=True)
    return folder


@functools.lru_cache(maxsize=None)
def key(name):
    """The path of a private key, made at its first use; its public part is beside it."""
    path = os.path.join(folder_for_keys(), name)
    support.command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", path)
    return path


def public(name):
    with open(key(name) + ".pub", encoding="ascii") as file:
        return " ".join(file.read().split()[:2])


def known_hosts():
    return os.path.join(folder_for_keys(), "known_hosts")


def make_known(port, host_key="host"):
    """Let the client know who answers at this port of the loopback."""
    with open(known_hosts(), "a", encoding="ascii") as file:
        for host in ("127.0.0.1", "::1", "localhost"):
            file.write("[{}]:{} {}\n".format(host, port, public(host_key)))


def ssh_options(identity="client", hosts=None):
    """The values of `ssh -o` that reach any Sshd of this process, and nothing else of this account's."""
    return ["IdentityFile=" + key(identity), "IdentitiesOnly=yes", "IdentityAgent=none",
            "UserKnownHostsFile=" + (hosts or known_hosts()), "GlobalKnownHostsFile=/dev/null",
            "SendEnv=BTRFS_BACKUP_NG_TEST_RUN"]


def as_program_options(options):
    return [word for option in options for word in ("--ssh-opt", option)]


# Accounts.

ACCOUNT = "bbngtest"


def why_no_accounts():
    for program in ("useradd", "userdel", "sudo"):
        if not find_program(program):
            return "needs the program " + program
    if not os.access("/etc", os.W_OK) or not os.path.isdir("/etc/sudoers.d"):
        return "no accounts can be made here"
    return None


def change_accounts(*argv):
    """useradd and its kin give up at once while another one is at work."""
    for _ in range(100):
        done = subprocess.run([find_program(argv[0])] + list(argv[1:]), stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode == 0 or b"lock" not in done.stdout:
            break
        time.sleep(0.1)
    if done.returncode:
        raise RuntimeError("%r exited %d: %s" % (argv, done.returncode, os.fsdecode(done.stdout)))


def sweep_accounts():
    """Remove the accounts of test processes that are dead."""
    for account in pwd.getpwall():
        match = re.fullmatch(ACCOUNT + r"([0-9]+)x[0-9]+s?", account.pw_name)
        if match and not support.is_in_use(int(match.group(1))):
            remove_account(account.pw_name)


def remove_account(name):
    with contextlib.suppress(FileNotFoundError):
        os.unlink("/etc/sudoers.d/" + name)
    uid = pwd.getpwnam(name).pw_uid
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat("/proc/" + pid).st_uid == uid:
                os.kill(int(pid), signal.SIGKILL)
    with contextlib.suppress(RuntimeError):
        change_accounts("userdel", "-f", name)


class User:
    """An account without a password, its home in the scratch folder; with sudo or without."""

    numbers = itertools.count(1)

    def __init__(self, shell="/bin/sh", sudo=False):
        sweep_accounts()
        number = next(self.numbers)
        self.name = "%s%dx%d%s" % (ACCOUNT, support.scratch_number(), number, "s" if sudo else "")
        self.home = os.path.join(folder_for_keys(), self.name)
        os.mkdir(self.home, 0o755)
        change_accounts("useradd", "-M", "-N", "-d", self.home, "-s", shell, "-p", "*", self.name)
        account = pwd.getpwnam(self.name)
        self.uid, self.gid = account.pw_uid, account.pw_gid
        os.chown(self.home, self.uid, self.gid)
        if sudo:
            kept = "BTRFS_BACKUP_NG_TEST_RUN XDG_CACHE_HOME " + MARK
            self.sudoers('Defaults:{0} env_keep += "{1}"\n{0} ALL=(root) NOPASSWD: ALL\n'.format(self.name, kept))

    def sudoers(self, text):
        write_file("/etc/sudoers.d/" + self.name, text, 0o440)

    def write(self, name, text, mode=0o644):
        """A file in the home, which is the user's own."""
        path = os.path.join(self.home, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_file(path, text, mode)
        folder = path
        while folder != self.home:
            os.chown(folder, self.uid, self.gid)
            folder = os.path.dirname(folder)
        return path

    def set_shell(self, shell):
        change_accounts("usermod", "-s", shell, self.name)

    def close(self):
        remove_account(self.name)
        shutil.rmtree(self.home, ignore_errors=True)


def login_shell(name):
    """The path of a shell that an account can have; busybox's is its ash. Skips where it is not installed."""
    found = find_program(name)
    if found is None:
        require("needs the program " + name)
    if name != "busybox":
        return found
    ash = os.path.join(folder_for_keys(), "ash")
    if not os.path.islink(ash):
        os.symlink(found, ash)
    return ash


# The server.


class Process(NamedTuple):
    parent: int
    marked: bool
    argv: List[bytes]


def processes_with(mark):
    """{pid: Process} of all that run here; those that have ended but were not waited for left out."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open("/proc/%s/stat" % pid, "rb") as stat:
                state, parent = stat.read().rpartition(b")")[2].split()[:2]
            with open("/proc/%s/environ" % pid, "rb") as environ:
                marked = mark in environ.read().split(b"\0")
            with open("/proc/%s/cmdline" % pid, "rb") as cmdline:
                argv = cmdline.read().split(b"\0")[:-1]
            if state != b"Z":
                found[int(pid)] = Process(int(parent), marked, argv)
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Sshd:
    """An sshd at `port` of 127.0.0.1 and ::1.

    mounts: {folder here: where it is seen there, a folder that is made and stays empty here}
    hide: the programs, as patterns of the shell's, that are not installed there
    environment: more variables of all its sessions
    lines: more of its configuration
    host_key: which key it proves itself with; root: the key that root logs in with
    own_cache: whether root has a cache folder of its own there, where nobody has left the program before
    """

    numbers = itertools.count(1)

    def __init__(self, mounts=None, hide=(), environment=None, lines=(), host_key="host",
                 own_cache=False):
        self.folder = os.path.join(folder_for_keys(), "sshd%d" % next(self.numbers))
        self.keys = os.path.join(self.folder, "keys")
        self.home = os.path.join(self.folder, "home")  # root's
        self.cache = os.path.join(self.home if own_cache else folder_for_keys(), "cache")  # made by whoever needs it
        for folder in (self.folder, self.keys, self.home):
            os.mkdir(folder)
        self.log = os.path.join(self.folder, "log")
        self.mark = "%s=%d-%s" % (MARK, os.getpid(), os.path.basename(self.folder))
        self.mounts, self.hide, self.host_key = dict(mounts or {}), hide, host_key
        self.environment, self.lines = dict(environment or {}), list(lines)
        self.process: Any = None
        self.authorize("root")
        self.port = 0
        self.start()

    def start(self):
        """Start it, at the same port as before if there was one."""
        for _ in range(1 if self.port else 10):
            port = self.port or free_port()
            self.configure(port)
            script = self.preparation() + 'exec "$@"'
            argv = ["unshare", "--mount", "--propagation", "slave", "sh", "-euc", script, "sh",
                    find_program("sshd"), "-D", "-E", self.log, "-f", os.path.join(self.folder, "sshd_config")]
            with open(os.path.join(self.folder, "stderr"), "ab") as stderr:
                self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr,
                                                start_new_session=True)
            if self.has_started(port):
                if not self.port:
                    make_known(port, self.host_key)
                self.port = port
                return
            self.stop()
        raise AssertionError("sshd did not start: " + self.read("log") + self.read("stderr"))

    def has_started(self, port):
        """Wait until it listens, or has given up, as where another program was quicker to take the port."""
        wait_until(lambda: self.process.poll() is not None or is_listening(port))
        return self.process.poll() is None

    def configure(self, port):
        os.makedirs("/run/sshd", exist_ok=True)
        # Root's own home is no place for tests to write to; under sudo it would be that one as well.
        own = dict({"HOME": self.home, "XDG_CACHE_HOME": self.cache}, **self.environment)
        marked = [self.mark.partition("=")[::2]]
        lines = ["Port %d" % port, "ListenAddress 127.0.0.1"] + ["ListenAddress ::1"] * has_ipv6()
        lines += ["HostKey " + key(self.host_key), "PidFile none", "LogLevel VERBOSE", "StrictModes no",
                  "UsePAM no", "PasswordAuthentication no", "KbdInteractiveAuthentication no",
                  "PermitRootLogin yes", "PermitUserEnvironment yes", "MaxStartups 100", "UseDNS no",
                  "KexAlgorithms curve25519-sha256",  # the default takes three times the processor's time
                  "Ciphers aes128-gcm@openssh.com",  # the default takes twice as much of it
                  "AuthorizedKeysFile %s/%%u" % self.keys, "AcceptEnv BTRFS_BACKUP_NG_TEST_RUN"]
        lines += penalties() + self.lines
        sudoers = dict({"XDG_CACHE_HOME": self.cache}, **self.environment)
        lines += ["SetEnv " + format_environment(marked + list(self.environment.items()))]
        lines += ["Match User %s*s" % ACCOUNT, "SetEnv " + format_environment(marked + list(sudoers.items()))]
        # What a Match block sets takes the place of what stands above it.
        lines += ["Match User root", "SetEnv " + format_environment(marked + list(own.items()))]
        write_file(os.path.join(self.folder, "sshd_config"), "\n".join(lines) + "\n")

    def preparation(self):
        """What to do first in the new mount namespace, as a script."""
        lines = []
        for here, there in self.mounts.items():
            os.makedirs(there, exist_ok=True)
            lines.append("mount --bind %s %s" % (shlex.quote(here), shlex.quote(there)))
        for folder, real, shown in folders_without(tuple(self.hide)) if self.hide else ():
            lines += ["mount --bind %s %s" % (folder, real), "mount --bind %s %s" % (shown, folder)]
        return "\n".join(lines + [""])

    def authorize(self, user, options="", identity="client"):
        """Let the key in as this user, with options as in authorized_keys, in place of what was there."""
        write_file(os.path.join(self.keys, user), (options + " " + public(identity)).strip() + "\n")

    def read(self, name):
        path = os.path.join(self.folder, name)
        if not os.path.exists(path):
            return ""
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()

    def accepted(self):
        """How many authentications it has accepted so far."""
        return len(re.findall(r"^Accepted publickey for ", self.read("log"), re.MULTILINE))

    def endpoint(self, path, user="root", host="127.0.0.1", port=None):
        return "ssh://%s@%s:%d%s" % (user, host, port or self.port, path)

    def argv(self, command, user="root", host="127.0.0.1", port=None, options=()):
        """Plain ssh that runs a command there."""
        argv = ["ssh", "-F", "none", "-o", "BatchMode=yes", "-p", str(port or self.port)]
        for option in ssh_options() + list(options):
            argv += ["-o", option]
        return argv + ["-T", "%s@%s" % (user, host), command]

    def ssh(self, command, **where):
        """What a command prints there; raises when it fails."""
        return support.command(*self.argv(command, **where))

    def processes(self):
        """{pid: argv} of all that its sessions have started and that still runs, those of sshd included."""
        everything = processes_with(self.mark.encode())
        children = collections.defaultdict(list)
        for pid, process in everything.items():
            children[process.parent].append(pid)
        left = [self.process.pid] + [pid for pid, process in everything.items() if process.marked]
        found = set()
        while left:
            pid = left.pop()
            if pid not in found:
                found.add(pid)
                left += children[pid]
        return {pid: everything[pid].argv for pid in found - {self.process.pid} if pid in everything}

    def left_over(self, timeout=support.HANGS):
        """processes() once there are none, or those that have not ended after so many seconds."""
        deadline = time.monotonic() + timeout
        while True:
            left = self.processes()
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.02)

    def find(self, *words):
        """The pids of processes there whose arguments hold all these words, each in some argument."""
        return [pid for pid, argv in self.processes().items()
                if all(any(word.encode() in argument for argument in argv) for word in words)]

    def inside(self, *argv):
        """What a command prints that is run in its mount namespace, without ssh."""
        return support.command("nsenter", "--mount", "--target", str(self.process.pid), *argv)

    def stop(self):
        """The machine is away: connections are refused, and what its sessions had started is gone."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        while True:
            left = self.processes()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not left:
                break
            time.sleep(0.005)

    def close(self):
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


@functools.lru_cache(maxsize=None)
def folders_without(hidden):
    """(path, where it is put aside, links to all but the hidden, which stand for it) of each folder of programs.

    Made once: that takes longer than most tests.
    """
    top, found = tempfile.mkdtemp(prefix="hidden", dir=folder_for_keys()), []
    os.chmod(top, 0o755)
    for folder in sorted({os.path.realpath(folder) for folder in SYSTEM_FOLDERS}):
        real, shown = top + "/real" + folder, top + "/shown" + folder
        os.makedirs(real)
        os.makedirs(shown)
        for name in os.listdir(folder):
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in hidden):
                os.symlink(os.path.join(real, name), os.path.join(shown, name))
        found.append((folder, real, shown))
    return found


def format_environment(variables):
    return " ".join('"%s=%s"' % variable for variable in variables)


def is_listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@functools.lru_cache(maxsize=None)
def has_ipv6():
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


@functools.lru_cache(maxsize=None)
def penalties():
    """Since OpenSSH 9.8 an address that fails often is locked out for a while."""
    argv = [find_program("sshd"), "-t", "-f", "/dev/null", "-h", key("host"), "-o", "PerSourcePenalties=no"]
    os.makedirs("/run/sshd", exist_ok=True)
    knows = not subprocess.call(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return ["PerSourcePenalties no"] if knows else []


# The network between.


class Flow:
    """One direction of a connection through the proxy: reads here, writes there after the delay."""

    def __init__(self, proxy, source, sink, count):
        self.proxy, self.source, self.sink, self.count = proxy, source, sink, count
        self.moving = proxy.moving
        self.queue: Any = queue.Queue(maxsize=4096)
        for work in (self.read, self.write):
            threading.Thread(target=work, daemon=True).start()

    def read(self):
        data = b"x"
        while data:
            try:
                data = self.source.recv(1 << 20)
            except OSError:
                data = b""
            self.queue.put((time.monotonic() + self.proxy.delay, data))

    def write(self):
        data = b"x"
        while data:
            due, data = self.queue.get()
            time.sleep(max(0.0, due - time.monotonic()))
            self.moving.wait()
            try:
                if data:
                    self.proxy.pace(len(data))
                    # Counted first: who has got them finds them counted.
                    self.count(len(data))
                    self.sink.sendall(data)
                    self.proxy.look_for_cut()
                else:
                    self.sink.shutdown(socket.SHUT_WR)
            except OSError:
                break


class Proxy:
    """A port of the loopback that leads to another one, over as bad a network as wanted.

    delay: seconds that everything takes on its way, each way
    rate: bytes a second at most, both ways together; 0 is unlimited
    up, down: bytes that have passed from the client and to it
    turns: how often something passed the other way than what passed before
    """

    def __init__(self, port, delay=0.0, rate=0, host_key="host"):
        self.target, self.delay, self.rate = port, delay, rate
        self.up = self.down = self.connections = self.turns = 0
        self.is_upward = False  # what passed last
        self.cuts: Any = collections.deque()  # after how many bytes in all to cut
        self.moving = threading.Event()
        self.moving.set()
        self.lost = []
        self.lock = threading.Lock()
        self.free_at = 0.0
        self.open = []
        self.listener: Any = None
        self.port = 0
        self.listen()
        make_known(self.port, host_key)

    def listen(self):
        """Take connections, at the same port as before if there was one."""
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("127.0.0.1", self.port))
        self.listener.listen(50)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, args=(self.listener,), daemon=True).start()

    def refuse(self):
        """Take no more connections; those that are open stay."""
        if self.listener:
            # close() alone would leave the thread that accepts holding on to it.
            self.listener.shutdown(socket.SHUT_RDWR)
            self.listener.close()
            self.listener = None

    def accept(self, listener):
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self.connect, args=(client,), daemon=True).start()

    def connect(self, client):
        # The round trip of the handshake, which the kernel has done without us.
        time.sleep(2 * self.delay)
        self.moving.wait()
        try:
            server = socket.create_connection(("127.0.0.1", self.target))
        except OSError:
            client.close()
            return
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self.lock:
            self.connections += 1
            self.open += [client, server]
        Flow(self, client, server, self.count_up)
        Flow(self, server, client, self.count_down)

    def pace(self, size):
        """Wait for the turn of so many bytes."""
        if self.rate:
            with self.lock:
                now = time.monotonic()
                self.free_at = max(self.free_at, now) + size / self.rate
                pause = self.free_at - now
            time.sleep(pause)

    def count_up(self, size):
        with self.lock:
            self.up += size
            self.turns += not self.is_upward
            self.is_upward = True

    def count_down(self, size):
        with self.lock:
            self.down += size
            self.turns += self.is_upward
            self.is_upward = False

    def look_for_cut(self):
        with self.lock:
            is_due = bool(self.cuts) and self.up + self.down >= self.cuts[0]
            if is_due:
                self.cuts.popleft()
        if is_due:
            self.cut()

    def cut_after(self, *sizes):
        """Cut all connections each time so many bytes more have passed, both ways together."""
        with self.lock:
            self.cuts.extend(itertools.accumulate((self.up + self.down,) + sizes))
            self.cuts.popleft()

    def cut(self):
        """Break all connections that are open."""
        with self.lock:
            ends, self.open = self.open, []
        for end in ends:
            with contextlib.suppress(OSError):
                # Lingering for no time sends a reset in place of a farewell.
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def hang(self):
        """Forward nothing more, in silence; connections stay open."""
        self.moving.clear()

    def go_on(self):
        self.moving.set()

    def forget(self):
        """The same for those that are open now; later ones work."""
        self.lost.append(self.moving)
        self.moving.clear()
        self.moving = threading.Event()
        self.moving.set()

    def close(self):
        self.refuse()
        self.cut()
        self.delay = 0.0
        for moving in self.lost + [self.moving]:
            moving.set()


# Test cases.


class SshdTestCase(support.TestCase):

    usual_seconds = 3.0

    @classmethod
    def setUpClass(cls):
        require(why_not())
        super().setUpClass()

    def sshd(self, *args, **options):
        sshd = Sshd(*args, **options)
        self.addCleanup(sshd.close)
        return sshd

    def proxy(self, *args, **options):
        proxy = Proxy(*args, **options)
        self.addCleanup(proxy.close)
        return proxy

    def user(self, *args, **options):
        require(why_no_accounts())
        user = User(*args, **options)
        self.addCleanup(user.close)
        return user

    def assertNothingLeft(self, *sshds):
        for sshd in sshds:
            self.assertEqual({}, sshd.left_over())


class RemoteTestCase(SshdTestCase, support.BackupTestCase):
    """The source on one disk, its backups on another; both are also seen on a machine reached by ssh.

    There they are at other paths, which are empty folders here. `remote_source` and `remote_target` are the
    endpoints; `source`, `snapshots`, `target` the same folders as they are seen here, to look at.
    """

    sshd_options: Dict[str, Any] = {}

    def setUp(self):
        super().setUp()
        there = os.path.join(support.scratch_folder(), "there")
        self.source_there, self.target_there = there + "/source disk", there + "/target disk"
        self.server = self.sshd({self.source_disk.path: self.source_there, self.target_disk.path: self.target_there},
                                **self.sshd_options)
        self.set_endpoints()
        self.addCleanup(self.assertNothingHere, there)

    def set_endpoints(self, **where):
        """Where the remote endpoints lead to: user, host, port."""
        self.remote_source = self.server.endpoint(self.source_there + "/home", **where)
        self.remote_target = self.server.endpoint(self.target_there + "/backups", **where)

    def assertNothingHere(self, top):
        """The paths that exist there only have stayed empty here."""
        self.assertEqual([], [os.path.join(folder, name) for folder, folders, files in os.walk(top) for name in files])
        self.assertEqual([], [name for path in (self.source_there, self.target_there) for name in os.listdir(path)])

    def program_options(self, options=None):
        return as_program_options(options or ssh_options())

    def run_remote(self, *arguments, options=None, **more):
        """The program, with the options that let ssh in."""
        return self.run_program(*self.program_options(options) + list(arguments), **more)

    def push(self, *options, to=None, **more):
        """From the source here to the target there."""
        targets = [self.remote_target] if to is None else to
        return self.run_remote("-p", "home", *list(options) + [self.source] + list(targets), **more)

    def pull(self, *options, to=None, **more):
        """From the source there to the target here."""
        targets = [self.target] if to is None else to
        return self.run_remote("-p", "home", *list(options) + [self.remote_source] + list(targets), **more)


class RestrictedTestCase(RemoteTestCase):
    """Where the key of root is restricted to an agent below the target."""

    allow = "receive,list"
    more: Tuple[str, ...] = ()

    def setUp(self):
        super().setUp()
        self.under = self.target_there + "/backups"
        self.restrict(self.allow)

    def restrict(self, allow):
        """What the key may do from now on."""
        words = support.PROGRAM_ARGV + ["agent", "--under", self.under, "--allow", allow]
        words += self.more
        command = " ".join(map(shlex.quote, words))
        self.server.authorize("root", 'restrict,command="{}"'.format(command))

    def connect(self):
        """A client of its own, which says what it likes."""
        from btrfs_backup_ng import AgentHost, Connection, Events
        host = AgentHost("server", lambda first: Connection("server", self.server.argv("true")), Events())
        self.addCleanup(host.end)
        return host
