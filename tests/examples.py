"""What README's examples need to be run, by section and first line; README itself is for its readers alone."""

from typing import Dict, NamedTuple, Sequence


class Needs(NamedTuple):
    run: bool = False  # although it begins with something else than the program
    not_run: str = ""  # why it is left out
    first: Sequence[str] = ()  # commands that are run before, in the same place
    status: int = 0  # what its last command exits with
    file: str = ""  # it is no command but this file, which the section has from the start


SNAPSHOTS = "/home/.btrfs-backup-ng/snapshots"
ON_THE_NAS = ("mkdir -p /backups && mount --bind /mnt/backups /backups", "btrfs-backup-ng -q -S /home /backups/home")
TOP = "mkdir -p /mnt/top && mount -o subvolid=5 /dev/sda2 /mnt/top"

EXAMPLES: Dict[str, Dict[str, Needs]] = {
    "btrfs-backup-ng": {
        "make demo    # 10 seconds: backs up, loses and restores on two small filesystems in files, and leaves nothing "
        "behind": Needs(not_run="this is in it"),
    },
    "Get it": {
        "make install": Needs(not_run="test_zipapp does it"),
        "install -m 755 btrfs_backup_ng.py /usr/local/bin/btrfs-backup-ng": Needs(run=True),
    },
    "Quick start": {
        "mkfs.btrfs -L backup /dev/sdb1": Needs(run=True, first=[
            "umount /mnt/backup", "sed -i '/mnt.backup/d' /etc/fstab"]),
        "# ls /mnt/backup/home": Needs(run=True),
        "# cp -a /mnt/backup/home/laptop-20260131-093000/anna/letters/thanks.txt /home/anna/letters/": Needs(run=True),
    },
    "How it works": {
        "your disk                                        backup disks and machines": Needs(not_run="a picture"),
    },
    "A file or a folder": {
        "btrfs-backup-ng history ssh://nas/backups/home/anna/letters/thanks.txt": Needs(
            first=[*ON_THE_NAS, "btrfs-backup-ng -q -S /home raw:///mnt/nas/home"]),
    },
    "A whole subvolume, beside the old one": {
        "mkdir -p /mnt/top": Needs(run=True),
    },
    "In the place of the old one": {
        "mkdir -p /mnt/top": Needs(run=True),
    },
    "From a server, and from stream files": {
        "btrfs-backup-ng restore ssh://nas/backups/home --latest /mnt/restore": Needs(first=ON_THE_NAS),
        "btrfs-backup-ng restore raw:///mnt/nas/home --latest /mnt/restore": Needs(first=[
            "mkdir -p /mnt/safe/home && age-keygen -o age.key && age-keygen -y age.key >age.pub",
            "btrfs-backup-ng -q -S /home raw:///mnt/nas/home",
            "btrfs-backup-ng -q -S --raw-encrypt age:/root/age.pub /home raw:///mnt/safe/home"]),
    },
    "By hand": {
        "mkdir /mnt/top/restored": Needs(run=True, first=[TOP]),
    },
    "Several destinations, several sources": {
        "# Blank lines, comments and indentation have no effect; nothing is quoted.":
            Needs(file="/etc/btrfs-backup/home.conf"),
    },
    "Another machine": {
        "ssh-keygen -t ed25519 -N '' -f /root/.ssh/id_ed25519": Needs(not_run="it asks for the password there"),
        "btrfs-backup-ng --ssh-opt IdentityFile=/root/.ssh/backup --ssh-opt Port=2222 /home ssh://nas/mnt/backups/home":
            Needs(first=["mv .ssh/id_ed25519 .ssh/backup"]),
        "btrfs-backup-ng --ssh-sudo /home ssh://backup@nas/mnt/backups/home":
            Needs(not_run="it takes an account with sudo, as test_remote has"),
        "backup ALL=(root) NOPASSWD: /usr/bin/python3": Needs(not_run="test_remote tries it"),
    },
    "Every night": {
        "systemctl daemon-reload": Needs(not_run="no systemd is at work there"),
        "#!/bin/sh": Needs(run=True),
        "[Service]": Needs(file="/etc/systemd/system/failed@.service"),
        "[Unit]": Needs(file="/etc/systemd/system/btrfs-backup-home.service.d/mail.conf"),
    },
    "Checking": {
        "# btrfs-backup-ng list /home /mnt/backup/home": Needs(first=[
            "btrfs subvolume snapshot -r /home {}/laptop-20260202-093000".format(SNAPSHOTS),
            "btrfs subvolume delete /mnt/backup/home/laptop-20260131-093000"]),
        "cd /home/.btrfs-backup-ng/snapshots": Needs(run=True),
        "btrfs-backup-ng doctor --max-age 26h /home /mnt/backup/home && curl -fsS https://hc-ping.com/YOUR-ID":
            Needs(not_run="there is no such service"),
    },
    "A bigger disk, with all history": {
        "mkfs.btrfs -L bigger /dev/sdb1": Needs(run=True),
    },
    "Taking over btrbk's backups": {
        "for at in /mnt/top/btrbk_snapshots/home.* /mnt/backup/btrbk/home.*; do": Needs(run=True, first=[
            TOP, "mkdir /mnt/top/btrbk_snapshots /mnt/backup/btrbk",
            "btrfs subvolume snapshot -r /home /mnt/top/btrbk_snapshots/home.20260130T0930",
            "btrfs subvolume snapshot -r /home /mnt/top/btrbk_snapshots/home.20260131T093000+0100",
            "btrfs send /mnt/top/btrbk_snapshots/home.20260130T0930 | btrfs receive /mnt/backup/btrbk",
            "btrfs send -p /mnt/top/btrbk_snapshots/home.20260130T0930 "
            "/mnt/top/btrbk_snapshots/home.20260131T093000+0100 | btrfs receive /mnt/backup/btrbk"]),
    },
    "Encrypted, to storage that others run": {
        "btrfs-backup-ng --raw-compress zstd --raw-encrypt age:/root/age.pub -n 60 --raw-full-every 30 /home "
        "raw:///mnt/safe/home": Needs(first=[
            "mkdir -p /mnt/safe/home && age-keygen -o age.key && age-keygen -y age.key >age.pub"]),
        "age -d -i /root/age.key /mnt/safe/home/laptop-20260131-093000.btrfs.zst.age | zstd -dc | "
        "btrfs receive /mnt/restore": Needs(run=True),
    },
    "The cloud": {
        "mkdir -p /mnt/cloud": Needs(run=True, first=[
            "printf '#!/bin/sh\nmount --bind /mnt/restore /mnt/cloud\n' >/usr/local/bin/rclone"]),
    },
    "Any command": {
        "btrfs-backup-ng /home 'shell://cat > /mnt/nas/\"$BTRFS_BACKUP_SNAPSHOT\".btrfs'":
            Needs(first=["mkdir streams"]),
        "btrfs receive /mnt/restore < /mnt/nas/laptop-20260131-093000.btrfs": Needs(run=True),
    },
    "A database": {
        "systemctl stop mariadb": Needs(run=True, first=[
            TOP, "btrfs subvolume create /mnt/top/mysql",
            "mkdir -p /var/lib/mysql && mount -o subvol=mysql /dev/sda2 /var/lib/mysql",
            "printf '#!/bin/sh\n' >/usr/local/bin/systemctl && chmod 755 /usr/local/bin/systemctl"]),
    },
    "A proof every month": {
        "#!/bin/sh": Needs(run=True),
    },
    "A USB disk, when it is plugged in": {
        "[Unit]": Needs(file="/etc/systemd/system/btrfs-backup-home.service.d/plugged.conf"),
        "systemctl daemon-reload": Needs(run=True, first=[
            "btrfs-backup-ng print systemd -- /home /mnt/backup/home | sh"]),
    },
    "Five laptops": {
        "-n 30": Needs(file="/etc/btrfs-backup/laptops.conf"),
    },
    "Leaving something out": {
        "cd /home/anna": Needs(run=True, first=["mkdir /home/anna/.cache && echo page >/home/anna/.cache/page"]),
    },
    "Previous Versions of Windows, by Samba": {
        "vfs objects = shadow_copy2": Needs(not_run="a part of a file of Samba's"),
        "chmod 755 /home/.btrfs-backup-ng/snapshots": Needs(run=True),
    },
    "What to keep": {
        "btrfs-backup-ng -S --forget-destination /mnt/second/home /home": Needs(first=[
            "btrfs-backup-ng -S /home /mnt/second/home"]),
    },
    "The first backup by disk": {
        "btrfs-backup-ng /home /mnt/usb/home": Needs(first=["mkdir /mnt/usb && mount --bind /mnt/second /mnt/usb"]),
    },
    "A dead machine": {
        "cp /usr/local/bin/btrfs-backup-ng /mnt/backup/": Needs(run=True),
        "mkdir -p /mnt/backup /mnt/new": Needs(run=True, first=[
            "btrfs-backup-ng -q / /mnt/backup/root", "umount /mnt/backup"]),
        "mkfs.btrfs -U OLD-UUID /dev/nvme0n1p2": Needs(run=True),
        "/mnt/backup/btrfs-backup-ng restore /mnt/backup/root --latest --in-place /mnt/new/@": Needs(run=True),
        "umount /mnt/new": Needs(not_run="there is nothing to boot"),
    },
    "Restricted servers": {
        "mkdir -p /mnt/backups/laptop": Needs(run=True, first=[
            "mv .ssh/id_ed25519.pub laptop.pub && rm .ssh/authorized_keys"]),
        "#!/bin/sh": Needs(run=True),
    },
    "Restoring from it": {
        "btrfs-backup-ng print authorized-keys --under /mnt/backups/laptop --allow send,list,verify restore.pub "
        ">> /root/.ssh/authorized_keys": Needs(first=[
            "btrfs-backup-ng -q -S /home /mnt/backups/laptop",
            "ssh-keygen -q -t ed25519 -N '' -f restore && rm .ssh/id_ed25519 .ssh/authorized_keys"]),
    },
    "A server that pulls": {
        "btrfs-backup-ng print authorized-keys --under /home --allow send,list server.pub "
        ">> /root/.ssh/authorized_keys": Needs(first=["mv .ssh/id_ed25519.pub server.pub && rm .ssh/authorized_keys"]),
    },
}
