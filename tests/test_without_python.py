"""Remote hosts without a Python that can run the program: plain commands over ssh do the main job."""

import os
import unittest

import pythons
import remote
import support
from support import subvolume


class WithoutPython(remote.RemoteTestCase):
    """Plain commands do the main job, and the run says what is lost."""

    sshd_options = {"hide": ("python*",)}

    def check(self):
        self.take(1)
        first = self.push("-S")
        self.assertIn("python", first.stderr.lower())
        self.assertRegex(first.stderr, "(?m)^warning: ")
        self.take(2, 3)
        self.push("-S", "-n", "2")
        self.assertBackedUp([self.name(2), self.name(3)])
        self.assertIsNotNone(subvolume(self.backup_path(self.name(3))).parent_uuid)
        self.assertNothingLeft(self.server)

    def test_push(self):
        self.check()

    def test_old_python(self):
        """python3 is in truth a Python 2."""
        folder = os.path.join(remote.folder_for_keys(), "python2")
        os.makedirs(folder, exist_ok=True)
        found = dict(pythons.all_pythons()).get((2, 7))
        if found:
            with open(os.path.join(folder, "python3"), "w") as script:
                script.write('#!/bin/sh\nexec %s "$@"\n' % found)
        else:
            with open(os.path.join(folder, "python3"), "w") as script:
                script.write('#!/bin/sh\necho "SyntaxError: invalid syntax" >&2\nexit 1\n')
        os.chmod(os.path.join(folder, "python3"), 0o755)
        self.server.stop()
        self.server.environment["PATH"] = folder + ":/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        self.server.start()
        self.check()

    def test_busybox(self):
        """All tools but btrfs are busybox's."""
        busybox = remote.login_shell("busybox")
        folder = os.path.join(remote.folder_for_keys(), "busybox tools")
        os.makedirs(folder, exist_ok=True)
        support.command(os.path.realpath(busybox), "--install", "-s", folder)
        os.symlink(remote.find_program("btrfs"), os.path.join(folder, "btrfs"))
        account = self.user(shell=busybox)
        self.server.stop()
        self.server.environment["PATH"] = folder
        self.server.start()
        self.assertIn("BusyBox", self.server.ssh("ls --help 2>&1"))
        self.assertTrue(account.name)
        self.check()

    def test_pull(self):
        self.take(1)
        self.pull("-S")
        self.take(2)
        self.pull("-S")
        self.assertBackedUp([self.name(1), self.name(2)])
        self.assertNothingLeft(self.server)


if __name__ == "__main__":
    unittest.main()
