"""A host that was broken into: it can make its own backups wrong, and nothing else here."""

import os
import shlex
import sys

import remote
import support

AGENT = os.path.join(support.HERE, "hostile_agent.py")


class Forged(remote.RemoteTestCase):
    """Over a real sshd, whose key leads to a hostile agent."""

    def setUp(self):
        super().setUp()
        self.owned = os.path.join(support.scratch_folder(), "owned")
        words = map(shlex.quote, [sys.executable, AGENT, self.owned])
        self.server.authorize("root", 'restrict,command="{}"'.format(" ".join(words)))
        self.other = support.create(os.path.join(self.source_disk.path, "other"))
        self.write("file", "content")

    def test_what_it_tells_is_not_obeyed(self):
        """With two tasks, whose processes ask their parent for connections: a host's word is not theirs."""
        result = self.run_remote("-p", "home", self.source, self.remote_target, ":", "-p", "other",
                                 *self.program_options() + [self.other, self.remote_target])
        self.assertFalse(os.path.exists(self.owned), "the host has run a command here")
        self.assertEqual(0, result.status, result.stderr)
        self.assertEqual(2, len(support.names(self.target)))
        for word in ("internal error", "Traceback", "owned", "interrupted"):
            self.assertNotIn(word, result.stderr)
