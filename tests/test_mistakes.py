"""What is typed by mistake, and what is said of it: a row is the words, the exit status and what tells what to do."""

import fcntl
import os
import re
import shlex
import tempfile
import unittest

import support
import terminal

# Capitals stand for places of the test; see `Mistakes.places`.
OPTIONS = (
    # an option that there is not
    ("--dryrun HOME BACKUPS", 2, "did you mean --dry-run?"),
    ("--dry-rum HOME BACKUPS", 2, "did you mean --dry-run?"),
    ("--verson", 2, "did you mean --version?"),
    ("--prefix=x HOME BACKUPS", 2, "did you mean --snapshot-prefix?"),
    ("-version", 2, "did you mean --version?"),
    ("-dry-run HOME BACKUPS", 2, "did you mean --dry-run?"),
    ("--keep 14d HOME BACKUPS", 2, "could be --keep-backups or --keep-snapshots"),
    ("--latest HOME BACKUPS", 2, "--latest is an option of restore and verify"),
    ("--remove HOME BACKUPS", 2, "option --remove must be written in full: --remove-locks"),
    ("prune --num-snapshots 3 BACKUPS", 2, "--num-snapshots is an option of a backup"),
    ("list --jsom BACKUPS", 2, "did you mean --json?"),
    # a value that it does not take
    ("-n HOME BACKUPS", 2, "is not a number of 0 or more"),
    ("-n 3d HOME BACKUPS", 2, "'3d' is not a number of 0 or more; to keep by time: --keep-backups 3d"),
    ("-N 1w HOME BACKUPS", 2, "to keep by time: --keep-snapshots 1w"),
    ("-N -1 HOME BACKUPS", 2, "'-1' is not a number"),
    ("--jobs 0 HOME BACKUPS", 2, "'0' is not a number above 0"),
    ("list --last 0 HOME", 2, "--last: '0' is not a number above 0"),
    ("list --last -1 HOME", 2, "--last: '-1' is not a number above 0"),
    ("--retries many HOME BACKUPS", 2, "'many' is not a number"),
    ("--num-backups= HOME BACKUPS", 2, "'' is not a number"),
    ("--keep-backups 14 HOME BACKUPS", 2, "'14' is not like '24h 14d 8w 12m 5y'"),
    ("--keep-backups '14 days' HOME BACKUPS", 2, "is not like '24h 14d 8w 12m 5y'"),
    ("--keep-backups '14d, 8w' HOME BACKUPS", 2, "is not like '24h 14d 8w 12m 5y'"),
    ("--keep-backups 12M HOME BACKUPS", 2, "is not like '24h 14d 8w 12m 5y'"),
    ("--keep-backups 14d 8w 12m HOME BACKUPS", 2, "write it in quotes: --keep-backups '14d 8w 12m'"),
    ("--keep-snapshots=24h 14d HOME BACKUPS", 2, "write it in quotes: --keep-snapshots '24h 14d'"),
    ("-n 7 d HOME BACKUPS", 2, "to keep by time: --keep-backups 7d"),
    ("--limit 20Mbit HOME BACKUPS", 2, "such as 500K, 20M or 1G"),
    ("--limit 20MB HOME BACKUPS", 2, "such as 500K, 20M or 1G"),
    ("--limit 20 HOME BACKUPS", 2, "with its unit, such as 500K, 20M or 1G"),
    ("--limit 20 M HOME BACKUPS", 2, "with its unit, such as 500K, 20M or 1G"),
    ("--compress bzip2 HOME BACKUPS", 2, "is not one of no, auto, zstd, lz4, gzip"),
    ("--raw-compress zst HOME raw://BACKUPS", 2, "did you mean zstd?"),
    ("--raw-compress zstd HOME BACKUPS", 2, "no such destination is given; name one, as raw:///PATH"),
    ("--raw-encrypt mykey HOME raw://BACKUPS", 2, "is neither gpg:KEY nor age:RECIPIENT"),
    ("--raw-encrypt age:key.txt HOME raw://BACKUPS", 2, "nor the whole path of a file of them"),
    ("doctor --max-age 26 HOME", 2, "is not an age such as 30min, 26h, 3d, 2w"),
    ("doctor --max-age '1 day' HOME", 2, "is not an age such as 30min, 26h, 3d, 2w"),
    ("--ssh-opt Foo=bar --dry-run -p home HOME ssh://127.0.0.1:1/x", 1, "ssh does not know one of the options"),
    ("HOME BACKUPS -v", 2, "-v needs a value"),
    ("-v verbose HOME BACKUPS", 2, "is not one of debug, info, warning, error"),
    ("-v eror HOME BACKUPS", 2, "did you mean error?"),
    ("-vv --dry-run -p home HOME BACKUPS", 0, "source HOME"),
    ("--wait 1h HOME BACKUPS", 2, "--wait takes seconds: --wait 3600"),
    ("-p home- HOME BACKUPS -N", 2, "-N needs a value"),
    ("-n=7 HOME BACKUPS", 2, "write --num-backups=7"),
    ("--log-json /nodir/x --dry-run -p home HOME BACKUPS", 1, "cannot write /nodir/x: no such file or directory"),
    ("-n 3 HOME 'shell://cat >/dev/null'", 2, "where nothing can be deleted"),
)

VERBS = (
    ("help", 0, "usage: btrfs-backup-ng"),
    ("help list", 0, "usage: btrfs-backup-ng list"),
    ("--help list", 0, "usage: btrfs-backup-ng list"),
    ("list --help", 0, "usage: btrfs-backup-ng list"),
    ("list -h HOME", 0, "usage: btrfs-backup-ng list"),
    ("help lst", 2, "did you mean list?"),
    ("help retension", 2, "did you mean retention?"),
    ("help resuming", 0, ".NAME.partial"),
    ("help --dry-run", 0, "usage: btrfs-backup-ng"),
    ("version", 0, "btrfs-backup-ng"),
    ("-n 3 version BACKUPS", 2, "no such source: version, nor is there a verb of that name; did you mean verify?"),
    ("-q version -h", 0, "btrfs-backup-ng"),
    ("-n 3 version BACKUPS", 2, "no such source: version"),
    ("-q list BACKUPS", 0, "home20240101-000000"),
    ("--dry-run prune -n 1 BACKUPS", 0, "home20240101-000000"),
    ("--dry-run list BACKUPS", 2, "--dry-run is an option of a backup, restore and prune"),
    ("--wait 5 -q prune --dry-run -n 5 BACKUPS", 0, ""),
    ("HOME list BACKUPS", 2, "btrfs-backup-ng list HOME BACKUPS"),
    ("restor BACKUPS HOME", 2, "did you mean restore?"),
    ("restor --latest BACKUPS HOME", 2, "no such source: restor, nor is there a verb of that name; did you mean "
                                        "restore?"),
    ("lst --json HOME", 2, "did you mean list?"),
    ("anna --before 2024-01-01 BACKUPS", 2, "nor is there a verb of that name; the verbs are"),
    ("/none --before 2024-01-01 BACKUPS", 2, "unknown option --before; --before is an option of restore"),
    ("List HOME", 2, "did you mean list?"),
    ("ls HOME", 2, "did you mean list?"),
    ("snapshots HOME", 2, "did you mean list?"),
    ("status HOME", 2, "did you mean list?"),
    ("check HOME BACKUPS", 2, "did you mean verify?"),
    ("mount BACKUPS HOME", 2, "did you mean restore?"),
    ("copy BACKUPS HOME", 2, "did you mean restore?"),
    ("forget BACKUPS", 2, "did you mean prune?"),
    ("backup HOME BACKUPS", 2, "a backup needs no verb: btrfs-backup-ng [options] SOURCE [DESTINATION ...]"),
    ("run HOME BACKUPS", 2, "a backup needs no verb: btrfs-backup-ng [options] SOURCE [DESTINATION ...]"),
    ("list HOME : BACKUPS", 2, "list is done for one task at a time; give each a command of its own"),
    ("list HOME:BACKUPS", 2, "list is done for one task at a time; write \\: for a colon in a path"),
    ("prune -n 1 BACKUPS : DISK", 2, "give each a command of its own, or name all folders without the colon"),
    ("frobnicate HOME", 2, "nor is there a verb of that name; the verbs are agent, browse, diff, doctor, help"),
    ("backup -n 3 HOME", 2, "a backup needs no verb"),
    ("", 2, "btrfs-backup-ng SOURCE [DESTINATION ...]"),
    ("print systemd -N 3 HOME BACKUPS", 2, "print systemd -- [options] SOURCE"),
    ("print completion zhs", 2, "did you mean zsh?"),
    ("print mann", 2, "did you mean man?"),
    ("print systemd --on-calendar 'at night' -- HOME", 2, "systemd knows no time such as 'at night'; for example "
                                                          "--on-calendar 'Mon..Fri 18:30'"),
)

SOURCES = (
    # none
    ("-p home TOP/hom BACKUPS", 1, "no such source: TOP/hom; is its filesystem mounted?"),
    ("-p home HOME/anna BACKUPS", 1, "is an ordinary folder, not a subvolume; name the subvolume that holds it: HOME,"),
    ("-p home --dry-run HOME/anna/letters BACKUPS", 1, "name the subvolume that holds it: HOME,"),
    ("-p home HOME/day1 BACKUPS", 1, "is not a subvolume but a file; name the subvolume that holds it: HOME"),
    ("-p home HOME/day1", 1, "a file of arguments is written @HOME/day1"),
    ("-p home PLAIN BACKUPS", 1, "PLAIN is not on btrfs; only subvolumes of btrfs can be backed up"),
    ("raw://BACKUPS TOP/new", 2, "cannot be a source"),
    ("shell://cat BACKUPS", 2, "cannot be a source"),
    # a snapshot, a backup
    ("-p home SNAPSHOT BACKUPS", 1, "is a read-only snapshot, in which nothing can be noted; name the subvolume that "
                                    "it was taken from: HOME,"),
    ("-p home --dry-run SNAPSHOT BACKUPS", 1, "is a read-only snapshot"),
    ("-p home BACKUP TOP/new", 1, "is a backup, which does not change; to bring it back: btrfs-backup-ng restore "
                                  "BACKUP"),
    ("-p home --dry-run BACKUP TOP/new", 1, "is a backup, which does not change"),
    # swapped with the destination
    ("-p home BACKUPS HOME", 1, "BACKUPS is a folder of backups, not a source; to back up to it: btrfs-backup-ng -p "
                                "home HOME BACKUPS"),
    ("-p home BACKUPS TOP/new", 1, "to copy its backups: btrfs-backup-ng -S -p home -f BACKUPS DISK TOP/new"),
    ("-p home --dry-run DISK HOME/x", 0, "is itself backed up to the filesystem of DISK: are source and destination "
                                         "swapped?"),
    # a colon for a blank
    ("-p home --dry-run HOME:BACKUPS", 1, "to back up to it: btrfs-backup-ng SOURCE BACKUPS"),
    ("-p home --dry-run HOME:BACKUPS", 1, "put a blank, not a colon, before a destination"),
    ("-p home --dry-run HOME:TOP/none", 1, "put a blank, not a colon, before a destination"),
)

DESTINATIONS = (
    # that can never be one: no snapshot is taken
    ("-p home HOME HOME/inside", 1, "is inside the source; name a folder on another filesystem"),
    ("-p home HOME HOME", 1, "is inside the source"),
    ("-p home HOME SNAPSHOTS", 1, "is the snapshot folder itself"),
    ("-p home HOME DISK/file", 1, "DISK/file is not a folder"),
    ("-p home HOME BACKUP", 1, "BACKUP is a backup; name the folder that holds it: BACKUPS"),
    ("-p home --dry-run HOME BACKUP", 1, "BACKUP is a backup; name the folder that holds it: BACKUPS"),
    ("-p home HOME raw://BACKUP", 1, "is in a read-only subvolume; name a folder that can be written"),
    ("-p home HOME SNAPSHOT", 1, "SNAPSHOT is in a read-only subvolume"),
    # that is away or none yet
    ("-p home --dry-run HOME PLAIN", 1, "PLAIN is not on btrfs; is its filesystem mounted?"),
    ("-p home --dry-run HOME nas", 1, "nas is not on btrfs; is its filesystem mounted? A host is written nas:/PATH"),
    ("-p home --dry-run HOME TOP/missing", 1, "no such destination: TOP/missing; is its filesystem mounted?"),
    # that is perhaps another than was meant
    ("-p home --dry-run HOME DISK", 0, "DISK is new, but backups of HOME are on that filesystem already: was BACKUPS "
                                       "meant?"),
    ("-p home --dry-run HOME DISK/backup", 0, "was BACKUPS meant?"),
    # that cannot be shared
    ("-p home HOME BACKUPS : -p home TOP/other BACKUPS", 2, "cannot share destination BACKUPS and a prefix"),
    ("-p home --dry-run -S HOME raw:///dev/shm/none/usb/home", 1, "is its filesystem mounted? On the source's own and "
                                                                  "on the root filesystem and in memory it must exist"),
    ("-p home --dry-run HOME ssh://127.0.0.1:1/x", 1, "connection refused; is sshd running there, and the port right?"),
    ("-p home --dry-run HOME ssh://no.such.host.invalid/x", 1, "no such host; is the name right, and the network up?"),
)

PLACES = (
    # names of hosts and schemes
    ("HOME nas:mnt/second", 2, "names a host but no absolute path on it; write nas:/PATH"),
    ("HOME nas:~/x", 2, "names a host but no absolute path on it"),
    ("HOME localhost:2222:/mnt/x", 2, "write ssh://localhost:2222/mnt/x"),
    ("HOME ssh://nas", 2, "names no path on the host"),
    ("HOME ssh:/nas/mnt", 2, "did you mean ssh://nas/mnt?"),
    ("HOME raw:/mnt/nas/home", 2, "did you mean raw:///mnt/nas/home?"),
    ("HOME raw:mnt/nas", 2, "did you mean raw:///mnt/nas?"),
    ("HOME ssh:nas:/mnt", 2, "did you mean ssh://nas/mnt?"),
    ("HOME ssh//nas/mnt", 2, "did you mean ssh://nas/mnt?"),
    ("HOME ssh:///nas/mnt", 2, "names no host; did you mean ssh://nas/mnt?"),
    ("HOME sftp://nas/x", 2, "did you mean ssh://nas/x?"),
    ("HOME shh://nas/x", 2, "did you mean ssh://nas/x?"),
    ("HOME rsync://nas/x", 2, "did you mean ssh://nas/x?"),
    ("HOME s3://nas/x", 2, "give a path, ssh://, raw:// or shell://"),
    ("HOME file:///mnt/x", 2, "did you mean /mnt/x?"),
    ("HOME ssh://nas:/x", 2, "has no valid port after its colon"),
    ("HOME ssh://nas:abc/x", 2, "has no valid port"),
    ("HOME raw://mnt/nas", 2, "raw:///PATH, with three slashes"),
    ("HOME shell://", 2, "names no command"),
)

LINES = (
    ("-N three", "-N/--num-snapshots: 'three' is not a number of 0 or more"),
    ("num-snapshots = 3", "is not a path, nor an option, which begins with --; write --num-snapshots=3"),
    ("num-snapshots 3", "write --num-snapshots=3"),
    ("no-snapshot: yes", "write --no-snapshot"),
    ("[home]", "there are no sections here: [home]; each line is an option or a path; a line : begins another task, "
               "and a path of that name is written ./[home]"),
    ("sync folder", "write --sync; a path of that name is written ./sync folder"),
    ("HOME BACKUPS", "more than one thing on a line: HOME BACKUPS; give BACKUPS a line of its own"),
    ("-p home- # mine", "more than one thing on a line: home- # mine; give # mine a line of its own"),
    ("-p 'home-'", "nothing is quoted or escaped here: 'home-'"),
    ("HOME ssh:/nas/x", "more than one thing on a line"),
    ("@job.conf", "is already being read: it includes itself"),
    ("@none.conf", "none.conf: no such file or directory"),
)

# an option where a value should be: it would go unheard, and here it is one that keeps all from being changed
UNHEARD = tuple(("{} --dry-run HOME BACKUPS".format(flag), 2, "{} needs a value ({}), and --dry-run is an option; if "
                 "it is meant as the value: {}=--dry-run".format(flag, metavar, long)) for flag, metavar, long in (
    ("--skip", "PATTERN", "--skip"), ("-p", "P", "--snapshot-prefix"), ("-f", "DIR", "--snapshot-folder"),
    ("-n", "N", "--num-backups"), ("--log-json", "FILE", "--log-json"), ("--ssh-opt", "OPT", "--ssh-opt"),
    ("--free-backups", "SIZE", "--free-backups"), ("--forget-destination", "DEST", "--forget-destination"))) + (
    ("-p -S HOME BACKUPS", 2, "-S is an option; if it is meant as the value: --snapshot-prefix=-S"),
    ("restore BACKUPS --name --latest TOP/new", 2, "--latest is an option"),
)

NEWER = (
    # options
    ("--exclude anna HOME BACKUPS", 2, "make what is to stay out a subvolume of its own"),
    ("--skip HOME/anna HOME BACKUPS", 2, "is not relative to the source, as in docker/*"),
    ("--skip '' HOME BACKUPS", 2, "--skip: '' is not a path"),
    ("list --skip anna HOME", 2, "--skip is an option of a backup; see --help"),
    ("--channels 0 HOME BACKUPS", 2, "--channels: '0' is not above 0"),
    ("--channels many HOME BACKUPS", 2, "'many' is not a number"),
    ("--free 10% HOME BACKUPS", 2, "could be --free-backups or --free-snapshots"),
    ("--free-backups 10 HOME BACKUPS", 2, "with its unit, such as 500M, 50G or 2T, nor a share such as 10%"),
    ("--free-backups 10GB HOME BACKUPS", 2, "with its unit, such as 500M, 50G or 2T"),
    ("--free-backups 110% HOME BACKUPS", 2, "'110%' is not a size above 0"),
    ("--free-snapshots 0% HOME BACKUPS", 2, "'0%' is not a size above 0"),
    ("--free-backups -5G HOME BACKUPS", 2, "'-5G' is not a size above 0"),
    ("--free-backups 10% HOME raw://BACKUPS", 2, "is for destinations on btrfs, not for raw:// and shell://"),
    ("--at-least 5 HOME BACKUPS", 2, "nothing makes room; add --free-backups or --free-snapshots"),
    ("--free-backups 10% --at-least 0 HOME BACKUPS", 2, "--at-least: '0' is not a number above 0"),
    ("prune --free-snapshots 10% BACKUPS", 2, "--free-snapshots is an option of a backup"),
    ("prune --at-least 2 BACKUPS", 2, "nothing says what to keep"),
    ("--budget 5 HOME BACKUPS", 2, "unknown option --budget; see --help"),
    # words for verbs
    ("find thanks.txt", 2, "did you mean browse?"),
    ("versions HOME/day1", 2, "did you mean history?"),
    ("usage BACKUPS", 2, "did you mean space?"),
    ("compare BACKUP BACKUP", 2, "did you mean diff?"),
    # history
    ("history", 2, "history takes a file or folder; btrfs-backup-ng history PATH"),
    ("history HOME/none", 1, "error: no version of HOME/none in 2 snapshots at 2 places; is the path right?"),
    ("history BACKUP/none", 1, "error: no version of none in 2 snapshots at 1 place; is the path right?"),
    ("history --deleted HOME/day1", 1, "error: no folder HOME/day1 in 2 snapshots at 2 places"),
    ("history --latest HOME/day1", 2, "--latest is an option of restore and verify; see --help"),
    ("history raw://BACKUPS/day1", 2, "raw://BACKUPS/day1 holds streams, which only a restore reads; name the path in "
                                      "its source, and then the folder: btrfs-backup-ng history PATH raw://FOLDER"),
    ("history shell://cat", 2, "cannot be looked into; name a file or folder"),
    # diff
    ("diff BACKUP", 2, "diff takes two snapshots or backups, the older one first"),
    ("diff --top 0 BACKUP BACKUP", 2, "--top: '0' is not above 0"),
    ("diff BACKUPS SNAPSHOT", 1, "BACKUPS is a folder of snapshots or backups; name one; the newest is "
                                 "BACKUPS/home20240102-000000"),
    ("diff SNAPSHOT SNAPSHOTS", 1, "SNAPSHOTS is a folder of snapshots or backups; name one; the newest is"),
    ("diff BACKUP/anna BACKUP", 1, "BACKUP/anna is in a snapshot or backup, and only whole ones are compared; name "
                                   "BACKUP"),
    ("diff BACKUP BACKUPS/home20240103-000000", 1, "no backup home20240103-000000 in BACKUPS; there are, among others"),
    ("diff raw://BACKUP BACKUP", 1, "holds streams, which are not compared; name snapshots or backups in folders"),
    # space, browse
    ("space PLAIN", 1, "PLAIN is not on btrfs"),
    ("space BACKUP", 0, "no snapshots or backups; name a source, or a folder of backups"),
    ("space -n 5 BACKUPS", 2, "-n is an option of a backup, list, prune and doctor"),
    ("space shell://cat", 2, "cannot be measured; name a source, or a folder of backups"),
    ("browse PLAIN", 1, "PLAIN is in no subvolume of btrfs; name a file or folder in a subvolume"),
    ("browse HOME/day1", 0, "1 any time"),
    ("list HOME BACKUPS BACKUPS/", 0, "sent source 1 home20240101-000000"),
    ("browse shell://cat", 2, "cannot be looked into; name a source, or a folder of backups"),
    # files back
    ("restore BACKUP/day1", 2, "restore takes the folder to restore files to"),
    ("restore --latest --path ../day1 BACKUPS PLAIN", 2, "'../day1' is not a path in a backup"),
    ("restore --path day1 BACKUPS PLAIN", 1, "choose one in it with --latest, --before TIME or --name NAME"),
    ("restore --latest --path none BACKUPS PLAIN", 1, "there is no none in home20240102-000000"),
    ("restore --replace --latest BACKUPS TOP/new", 2, "--replace goes with files and folders of a backup"),
    ("restore BACKUP/anna HOME/day1", 1, "HOME/day1 is not a folder; name the folder to restore to"),
    ("restore BACKUP/day1 HOME", 1, "day1 exists in HOME, and nothing is overwritten; --replace keeps what is there"),
    ("restore --name home20240101-000000 --latest BACKUPS TOP/new", 2, "exclude each other; give one of them"),
    ("verify --latest --name home20240101-000000 HOME BACKUPS", 2, "exclude each other; give one of them"),
)

OTHERS = (
    ("restore BACKUPS TOP/new", 1, "BACKUPS is a folder, not a backup; choose one in it with --latest"),
    ("restore BACKUPS", 2, "restore takes a backup and a folder to restore it to"),
    ("restore BACKUPS --name nosuch TOP/new", 1, "no backup nosuch in BACKUPS; there are, among others, home20240102"),
    ("restore BACKUPS --before yesterday TOP/new", 2, "is not a time such as 2026-01-31"),
    ("restore BACKUPS --before 2023-01-01 TOP/new", 1, "the oldest is home20240101-000000"),
    ("restore BACKUPS --latest PLAIN", 1, "PLAIN is not on btrfs; a backup can only be restored to btrfs"),
    ("restore BACKUPS --latest --in-place HOME/anna", 1, "HOME/anna is not a subvolume"),
    ("restore BACKUPS --latest --in-place TOP", 1, "TOP is a mount point, which cannot be swapped"),
    ("restore DISK/none/home20240101-000000 TOP/new", 1, "no such backup: DISK/none/home20240101-000000"),
    ("restore BACKUP/none TOP/new", 1, "there is no none in home2024"),
    ("restore DISK TOP/new", 1, "DISK is a folder, not a backup; choose one in it with --latest"),
    ("restore --latest HOME TOP/new", 1, "no backups in HOME; look there with ls"),
    ("restore BACKUPS --latest --in-place TOP/hom --dry-run", 0, "there is nothing at TOP/hom, so it is made anew; did "
                                                                 "you mean home?"),
    ("restore BACKUPS --latest TOP/new --dry-run", 0, "in all: 1 to restore"),
    ("verify -p home BACKUPS HOME", 1, "the source comes first: btrfs-backup-ng verify HOME BACKUPS"),
    ("verify -p home --name home20240103-000000 HOME BACKUPS", 1, "no snapshot home20240103-000000 in HOME; did you "
                                                                  "mean home20240102-000000?"),
    ("verify -p home HOME DISK", 1, "nothing to compare: DISK holds no backup of what is in HOME"),
    ("list HOME BACKUPS/none", 1, "error: no such folder: BACKUPS/none; is its filesystem mounted?"),
    ("verify BACKUPS", 2, "btrfs-backup-ng verify SOURCE DESTINATION"),
    ("list BACKUPS/none", 1, "no such folder: BACKUPS/none; is its filesystem mounted?"),
    ("list DISK", 0, "no backups in DISK; there are backups below it: btrfs-backup-ng list BACKUPS"),
    ("list -p other DISK", 0, "DISK nothing"),
    ("diff BACKUP HOME", 1, "HOME is not a snapshot, and may change while it is compared; name one of its snapshots; "
                            "the newest is SNAPSHOTS/home20240102-000000"),
    ("diff BACKUP TOP/plain", 1, "take a snapshot of it, and name that: btrfs-backup-ng TOP/plain"),
    ("diff BACKUP /", 1, "no such snapshot or backup: /"),
    ("list shell://cat", 2, "shell://cat cannot be listed; name a folder"),
    ("prune BACKUPS", 2, "nothing says what to keep; give --keep-backups"),
    ("-S --dry-run -p hme HOME BACKUPS", 1, "there are 2 of 'home'; give the prefix with -p"),
    ("-S -f .snapshot -p home HOME BACKUPS", 1, "no such snapshot folder: HOME/.snapshot"),
    ("-S -T -p home --dry-run --forget-destination DISK/backup HOME", 1,
     "nothing is remembered of DISK/backup; did you mean BACKUPS?"),
    ("-S -T -p home --dry-run --forget-destination /nowhere HOME", 1, "remembered are BACKUPS"),
    ("doctor -p home HOME", None, "if it will not come back: btrfs-backup-ng -S -T --forget-destination BACKUPS"),
)


class Mistakes(support.BackupTestCase):

    usual_seconds = 4

    def setUp(self):
        super().setUp()
        os.makedirs(os.path.join(self.source, "anna", "letters"))
        self.take(1, 2)
        self.transfer("-q")
        open(os.path.join(self.target_disk.path, "file"), "w").close()
        plain = tempfile.mkdtemp(dir=support.scratch_folder())
        self.addCleanup(os.rmdir, plain)
        self.places = {
            "HOME": self.source, "SNAPSHOTS": self.snapshots, "SNAPSHOT": self.snapshot_path(self.name(1)),
            "BACKUPS": self.target, "BACKUP": self.backup_path(self.name(1)),
            "PLAIN": plain, "TOP": self.source_disk.path, "DISK": self.target_disk.path,
        }

    def place(self, text):
        pattern = r"(?<![\w-])(?:{})\b".format("|".join(self.places))
        return re.sub(pattern, lambda found: self.places[found.group()], text)

    def check(self, rows, **options):
        disks = self.source_disk.path, self.target_disk.path
        for typed, status, words in rows:
            before = support.listing(*disks)
            with self.subTest(typed=typed):
                result = self.run_program(*shlex.split(self.place(typed)), status=None, **options)
                if status is not None:
                    self.assertEqual(status, result.status, result.stderr)
                self.assertIn(self.place(words), " ".join((result.stderr + result.stdout).split()))
                self.assertLessEqual(len(result.errors), 1)
                self.assertUnchanged(before, *disks)

    def test_options(self):
        self.check(OPTIONS)

    def test_verbs(self):
        self.check(VERBS)

    def test_sources(self):
        self.check(SOURCES)

    def test_destinations(self):
        self.check(DESTINATIONS)

    def test_places(self):
        self.check(PLACES)

    def test_an_option_is_no_value(self):
        self.check(UNHEARD)

    def test_newer_verbs_and_options(self):
        self.check(NEWER)

    def test_other_verbs(self):
        support.create(self.place("TOP/plain"))
        self.check(OTHERS)

    def test_lines_of_a_file(self):
        job = os.path.join(support.scratch_folder(), "job.conf")
        for line, words in LINES:
            with open(job, "w") as file:
                file.write("# the job\n" + self.place(line) + "\n")
            for said in words, "error: {}:2: ".format(job):
                self.check([("--dry-run @" + job, 2, said)])
        for line in "./[home]", "./sync folder":
            with open(job, "w") as file:
                file.write(line)
            self.check([("--dry-run @" + job, 1, "no such source: " + line)])

    def test_on_a_terminal_they_are_folded_between_words(self):
        for typed in "--frobnicate " + self.source, "restor --latest " + self.source, "--dry-run ssh:/nas/mnt":
            for columns in 60, 80:
                running = terminal.OnTerminal(*typed.split(), columns=columns)
                self.addCleanup(running.close)
                said = running.finish().stderr
                self.assertEqual(0, running.screen.wrapped, said)
                whole = self.run_program(*typed.split(), status=2).stderr
                self.assertEqual(1, whole.count("\n"), whole)
                self.assertEqual(whole.split(), said.split())
        running = terminal.OnTerminal("verify", self.source, self.target, columns=66, results=True)
        self.addCleanup(running.close)
        said = running.finish().stderr
        self.assertEqual(0, running.screen.wrapped, said)
        self.assertEqual(2, said.count("files and folders"), said)

    def test_a_command_to_copy_is_on_a_line_of_its_own(self):
        for typed, words in (
                ("-p home BACKUPS HOME", "btrfs-backup-ng -p home HOME BACKUPS"),
                ("list DISK", "btrfs-backup-ng list BACKUPS"),
                ("verify BACKUPS HOME", "btrfs-backup-ng verify HOME BACKUPS")):
            running = terminal.OnTerminal(*shlex.split(self.place(typed)), columns=60)
            self.addCleanup(running.close)
            said = running.finish().stderr
            command = " " * 8 + self.place(words)
            self.assertEqual(0, sum(line.endswith(": ") for line in said.split("\n")))
            self.assertIn("\n" + "\n".join(re.findall(".{1,60}", command)), said)

    def test_one_that_can_never_be_a_destination_keeps_no_other_from_its_backup(self):
        result = self.backup(to=[self.source, self.target], status=1)
        self.assertErrorSays(result, "destination {} is inside the source".format(self.source))
        self.assertEqual(3, len(support.names(self.target)))
        self.assertIn("1 backup sent", result.stderr)

    def test_none_left_of_several(self):
        before = support.listing(self.source_disk.path, self.target_disk.path)
        result = self.backup(to=[self.source, self.place("BACKUP")], status=1)
        self.assertEqual(2, len(result.errors), result.stderr)
        self.assertUnchanged(before, self.source_disk.path, self.target_disk.path)

    def test_a_second_folder_on_a_disk_is_not_taken_for_the_first_that_is_named_as_well(self):
        second = os.path.join(self.target_disk.path, "second")
        self.assertNotIn("warning", self.transfer("--dry-run", to=[self.target, second]).stderr)

    def test_where_a_known_disk_was_unmounted_the_source_is_a_snapshot_taken(self):
        place = os.path.join(self.source, "disk")
        away = self.disk("128M", at=place)
        self.transfer("-q", to=[place])
        away.unmount()
        self.assertErrorSays(self.backup(to=[place], status=1), place, "is it mounted?")
        self.assertEqual(3, len(support.names(self.snapshots)))

    def test_what_is_there_is_not_as_it_should_be(self):
        notes = os.path.join(self.snapshots, ".outstanding_transfers")
        with open(notes, "w") as file:
            file.write("garbage")
        self.check([("-p home HOME BACKUPS", 1, "is damaged or was not written by this program, so nothing was changed"
                     )])
        os.unlink(notes)
        with open(os.path.join(self.snapshots, ".home.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.check([("-p home HOME BACKUPS", 75, "another run is at work in SNAPSHOTS; wait for it, or use --wait"
                         )])
        support.snapshot(self.source, self.snapshot_path("many20240101-000000"))
        support.send_receive(self.snapshot_path("many20240101-000000"), self.target)
        self.check([
            ("restore --latest BACKUPS TOP/new", 1, "backups of several prefixes: 'home', 'many'; choose one with -p"),
            ("-p home BACKUPS TOP/new", 1, "to copy its backups: btrfs-backup-ng -S -p home -f BACKUPS DISK TOP/new"),
            ("-p none --dry-run -S HOME BACKUPS", 1, "no snapshot of prefix 'none' in SNAPSHOTS; there are 2 of "
                                                     "'home', 1 of 'many'; give the prefix with -p")])
        support.make_writable(self.backup_path(self.name(2)))
        self.check([("-p home -S --dry-run HOME BACKUPS", 1, "is a writable subvolume that no lock names; if it is "
                     "what a broken transfer left, delete it: btrfs subvolume delete BACKUPS/home20240102-000000")])
        support.command("btrfs", "property", "set", self.backup_path(self.name(2)), "ro", "true")
        self.check([("-p home -S --dry-run HOME BACKUPS", 1, "its home20240102-000000 is another subvolume")])
        support.snapshot(self.source, self.snapshot_path("home20991231-000000"))
        self.check([("-p home -S --dry-run HOME DISK/new", 0, "names are from the future are kept and not counted")])

    def test_the_disk_cannot_be_written(self):
        self.target_disk.remount("ro")
        self.check([("-p home --dry-run HOME BACKUPS", 1, "is mounted read-only; mount it writable")])
        self.source_disk.remount("ro")
        self.check([("-p home HOME BACKUPS", 1, "HOME is mounted read-only; mount it writable")])

    def test_programs_and_rights(self):
        self.check([("-p home HOME BACKUPS", 1, "install the package btrfs-progs")],
                   wrapper=support.without_programs("btrfs"))
        os.chmod(self.snapshots, 0o700)
        self.check([("--no-elevate -p home HOME BACKUPS", 1, "permission denied; run as root")],
                   wrapper=support.as_nobody())

    def test_through_sudo(self):
        sudo = support.fake("sudo", 'echo "error: sudo $*" >&2; exit 1\n')
        for more, words in (({}, " -I /"), ({"NO_COLOR": "1"}, " -I -X no_color /")):
            env = dict(sudo, **more)
            result = self.run_program("list", self.source, status=1, wrapper=support.as_nobody(), env=env)
            self.assertIn("this needs root: running it again through sudo (--no-elevate: without)\n", result.stderr)
            self.assertRegex(result.stderr, "error: sudo -- {}{}.* list {}".format(
                re.escape(support.PYTHON), words, re.escape(self.source)))

    def test_what_is_printed_helps(self):
        """Remedies with all their words, typed."""
        for typed, mark in (("-p home BACKUPS HOME", "to back up to it: "), ("-p home BACKUPS TOP/new", "to copy its "
                            "backups: "), ("verify BACKUPS HOME", "the source comes first: ")):
            with self.subTest(typed=typed):
                said, = self.run_program(*shlex.split(self.place(typed)), status=1).errors
                self.run_program(*shlex.split(said.partition(mark)[2])[1:], status=0)
        self.assertEqual(3, len(support.names(self.target)))
        self.assertEqual(3, len(support.names(self.place("TOP/new"))))

    def test_the_file_of_a_job_serves_every_verb(self):
        job = os.path.join(support.scratch_folder(), "job.conf")
        with open(job, "w") as file:
            file.write("-p home\n-N 3\n-n 2\n--retries 1\n{}\n{}\n".format(self.source, self.target))
        into = os.path.join(self.source_disk.path, "restored")
        for words, said in (("list", self.name(1)), ("verify", "2 equal"), ("doctor", "2 complete backups"),
                            ("prune -n 1", "1 backup kept"), ("restore --latest " + into, "restored " + self.name(2))):
            with self.subTest(words=words):
                verb, _, rest = words.partition(" ")
                result = self.run_program(verb, "@" + job, *rest.split(), status=0)
                self.assertIn(said, result.stdout + result.stderr)
        self.assertEqual([self.name(2)], support.names(self.target))
        self.assertEqual([self.name(2)], support.names(into))

    def test_what_is_said_to_type_can_be_typed(self):
        said = self.run_program("doctor", "-p", "home", self.source, status=None).stdout
        command, = re.findall("if it will not come back: btrfs-backup-ng (.*)", said)
        self.assertIn("forgot " + self.target, self.run_program(*shlex.split(command)).stderr)
        said = self.run_program("doctor", "-p", "home", self.source, status=None).stdout
        self.assertIn("no destination is remembered", said)


if __name__ == "__main__":
    unittest.main()
