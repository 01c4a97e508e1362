"""An agent that is killed in calls: before one is done, or when it is done and not yet answered.

Usage: dying_agent.py FILE, whose lines say which calls are still to come, in this order: `before CALL` or `after CALL`;
or `lost CALL`, where the connection alone is gone, and for some seconds more it has the locks that it had.
"""

import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import btrfs_backup_ng as program


def is_due(line):
    """Whether this is the next line of FILE, which it leaves then."""
    with open(sys.argv[1], encoding="ascii") as file:
        left = file.read().splitlines()
    if left[:1] != [line]:
        return False
    with open(sys.argv[1], "w", encoding="ascii") as file:
        file.write("".join(one + "\n" for one in left[1:]))
    return True


class DyingAgent(program.Agent):

    def method(self, name, arguments):
        done = super().method(name, arguments)

        def last():
            if is_due("before " + name):
                os._exit(9)
            found = done()
            if is_due("after " + name):
                os._exit(9)
            if is_due("lost " + name):
                if not os.fork():
                    for fd in (0, 1, 2, self.channel.read_end, self.channel.write_end):
                        os.close(fd)
                    time.sleep(3)
                os._exit(9)
            return found

        return last


if __name__ == "__main__":
    program.Agent = DyingAgent  # type: ignore[misc]
    raise SystemExit(program.main(["agent"]))
