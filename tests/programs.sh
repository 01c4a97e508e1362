#!/bin/sh
# Sees to what the tests and the demo need before they start:
#
#     tests/programs.sh {demo|bench|test}
#
# checks Python and the kernel, and installs the programs that are missing with the system's
# package manager. Says nothing when all is there.
set -eu

# One line per program: who needs it, its name, and its package for apt-get, dnf, zypper.
# "test" needs what "demo" needs as well, and so does "bench".
needed_programs() {
    cat <<'LIST'
demo  mkfs.btrfs  btrfs-progs  btrfs-progs  btrfsprogs
demo  btrfs       btrfs-progs  btrfs-progs  btrfsprogs
demo  mount       mount        util-linux   util-linux
demo  diff        diffutils    diffutils    diffutils
test  losetup     mount        util-linux   util-linux
test  fallocate   util-linux   util-linux   util-linux
test  unshare     util-linux   util-linux   util-linux
test  setfattr    attr         attr         attr
test  setfacl     acl          acl          acl
test  setcap      libcap2-bin  libcap       libcap-progs
test  mkfs.ext4   e2fsprogs    e2fsprogs    e2fsprogs
test  chattr      e2fsprogs    e2fsprogs    e2fsprogs
test  man         man-db       man-db       man
test  groff       groff-base   groff-base   groff
test  zsh         zsh          zsh          zsh
test  fish        fish         fish         fish
test  strace      strace       strace       strace
test  systemd-analyze systemd  systemd      systemd
test  ssh         openssh-client  openssh-clients  openssh-clients
test  ssh-keygen  openssh-client  openssh          openssh-common
test  sshd        openssh-server  openssh-server   openssh-server
test  sudo        sudo         sudo         sudo
test  useradd     passwd       shadow-utils shadow
test  zsh         zsh          zsh          zsh
test  fish        fish         fish         fish
test  tcsh        tcsh         tcsh         tcsh
test  dash        dash         dash         dash
test  busybox     busybox      busybox      busybox
bench ssh         openssh-client  openssh-clients  openssh-clients
bench ssh-keygen  openssh-client  openssh          openssh-common
bench sshd        openssh-server  openssh-server   openssh-server
bench unshare     util-linux   util-linux   util-linux
test  rclone      rclone       rclone       rclone
test  zstd        zstd         zstd         zstd
test  lz4         lz4          lz4          lz4
test  gzip        gzip         gzip         gzip
test  xz          xz-utils     xz           xz
test  gpg         gnupg        gnupg2       gpg2
test  age         age          age          age
LIST
}

fail() {
    printf '%s: %s\n' "$purpose" "$1" >&2
    exit 1
}

is_known_purpose() {
    case $purpose in demo | bench | test) ;; *) return 1 ;; esac
}

check_python() {
    python=${PYTHON:-python3}
    command -v "$python" >/dev/null ||
        fail "no $python; install Python 3.6 or later, or set PYTHON"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 6))' ||
        fail "needs Python 3.6 or later, $python is older; set PYTHON"
}

is_root() { [ "$(id -u)" -eq 0 ]; }

# Without root the suite still runs what needs no file system of its own, and says what it skips.
check_root() {
    is_root && return
    [ "$purpose" = test ] || fail "needs root for its loop devices and mounts; try: sudo make $purpose"
    echo "test: not root, so tests on real btrfs are skipped; for all of them: sudo make test"
}

check_kernel() {
    grep -qw btrfs /proc/filesystems || modprobe -q btrfs 2>/dev/null ||
        fail "this kernel has no btrfs, and 'modprobe btrfs' did not load it"
    [ -e /dev/loop-control ] || modprobe -q loop 2>/dev/null ||
        fail "no loop devices here; try: modprobe loop"
}

# Prints the names of the missing programs, or their packages for the manager in column $1.
missing() {
    needed_programs | while read -r needed_by program apt_get dnf zypper; do
        [ "$needed_by" = demo ] || [ "$needed_by" = "$purpose" ] || continue
        if ! command -v "$program" >/dev/null; then
            case $1 in
            program) echo "$program" ;;
            apt-get) echo "$apt_get" ;;
            dnf) echo "$dnf" ;;
            zypper) echo "$zypper" ;;
            esac
        fi
    done | sort -u | tr '\n' ' ' | sed 's/ $//'
}

package_manager() {
    for manager in apt-get dnf zypper; do
        if command -v "$manager" >/dev/null; then
            echo "$manager"
            return
        fi
    done
}

# A fresh system has no package lists yet, an old one has stale ones: then update and try again.
apt_get_install() {
    DEBIAN_FRONTEND=noninteractive
    export DEBIAN_FRONTEND
    apt-get -q -y --no-install-recommends install "$@" ||
        { apt-get -q update && apt-get -q -y --no-install-recommends install "$@"; }
}

install_packages() {
    manager=$1
    shift
    case $manager in
    apt-get) apt_get_install "$@" ;;
    dnf) dnf -q -y install "$@" ;;
    zypper) zypper --quiet --non-interactive install "$@" ;;
    esac
}

install_missing() {
    programs=$(missing program)
    [ -n "$programs" ] || return 0
    is_root || fail "missing: $programs; as root, 'make $purpose' installs them"
    manager=$(package_manager)
    [ -n "$manager" ] || fail "missing: $programs; install them (no apt-get, dnf or zypper here to do it)"
    packages=$(missing "$manager")
    echo "installing $packages with $manager"
    # shellcheck disable=SC2086 # one word is one package
    log=$(install_packages "$manager" $packages 2>&1) || {
        printf '%s\n' "$log" | tail -n 20 >&2
        fail "$manager could not install $packages"
    }
    programs=$(missing program)
    [ -z "$programs" ] || fail "still missing after installing $packages: $programs"
}

purpose=${1:-}
is_known_purpose || {
    echo "usage: tests/programs.sh {demo|bench|test}" >&2
    exit 2
}
# An ordinary user's PATH often lacks the folders that mkfs and losetup are in.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
check_python
check_root
install_missing
is_root && check_kernel
exit 0
