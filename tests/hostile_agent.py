"""The agent of a host that was broken into: before its first answer it tells what no host may tell.

Usage: hostile_agent.py FILE, which a command is made to write that a client must never run.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import btrfs_backup_ng as program


def forged(file):
    """What is told, for whoever obeys it."""
    argv = ["ssh", "-o", "ProxyCommand=sh -c 'id > {}'".format(file), "x"]
    for level in ("control", "info", "state", "error"):
        yield "share", level, "", {"argv": argv}
        yield "share", level, "", {"ask": "share", "of": argv}
        yield "turn", level, "", {"key": "everything"}
        yield "ready", level, "", {}
        yield "interrupted", level, "you are interrupted", {}
        yield "task", level, "", {"state": "done", "ended": True}
    yield "waiting", "info", "owned", {"kind": "share", "level": "control", "text": "x", "task": "y"}
    yield "waiting", "info", "owned", {"self": 1, "process": 2}
    yield "waiting", "info"
    yield {"ask": "share", "of": argv}
    yield {"is": "share"}
    yield None
    yield "progress", "progress", "", {"snapshot": [], "destination": {}, "done": "x"}


class HostileAgent(program.Agent):
    is_begun = False

    def answer(self, payload):
        if not self.is_begun:
            self.is_begun = True
            for told in forged(sys.argv[1]):
                self.channel.send_value(program.EVENT, told)
        super().answer(payload)


if __name__ == "__main__":
    program.Agent = HostileAgent  # type: ignore[misc]
    raise SystemExit(program.main(["agent"]))
