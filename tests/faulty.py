"""A host that fails at its Nth call: this machine, as the program's own code sees it, in the same process."""

import os
import sys
from typing import Any, List

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import btrfs_backup_ng as program


class Faults:
    """Counts the calls of what it wraps, and raises `error` at the one with number `at`."""

    def __init__(self, at: int = -1, error: Any = None) -> None:
        self.at, self.error = at, error
        self.calls: List[str] = []

    def call(self, name: str, method: Any, *arguments: Any, **more: Any) -> Any:
        self.calls.append(name)
        if len(self.calls) - 1 == self.at:
            raise self.error
        made = method(*arguments, **more)
        return Wrapped(made, self) if name in ("open_receive", "open_own_receive", "open_send") else made


class Wrapped:
    """A receiver or sender whose calls are counted: each method once, for it may be asked thousands of times."""

    def __init__(self, wrapped: Any, faults: Faults) -> None:
        self.wrapped, self.faults, self.called = wrapped, faults, {"pending", "resume", "file_data", "start"}

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.wrapped, name)
        if name in self.called or not callable(value):
            return value
        self.called.add(name)
        return lambda *arguments, **more: self.faults.call(name, value, *arguments, **more)


class FaultyHost(program.LocalHost):
    """This machine, as far as one folder goes; its inner calls are not counted."""

    faults: Any = None
    inside = False

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name.startswith("_") or not callable(value) or object.__getattribute__(self, "inside"):
            return value

        def call(*arguments: Any, **more: Any) -> Any:
            def method(*arguments: Any, **more: Any) -> Any:
                self.inside = True
                try:
                    return value(*arguments, **more)
                finally:
                    self.inside = False

            return self.faults.call(name, method, *arguments, **more)

        return call


def faulty_at(test: Any, aim: Any) -> None:
    """Until the end of the test, places in the folder of aim() = (folder, Faults) are on a host with these faults."""
    before = program.Hosts.of
    test.addCleanup(setattr, program.Hosts, "of", before)

    def of(hosts: Any, endpoint: Any) -> Any:
        host, (folder, faults) = before(hosts, endpoint), aim()
        if not folder or not endpoint.path.startswith(folder):
            return host
        faulty = FaultyHost(hosts.events)
        faulty.faults = faults
        return hosts.known.setdefault("faulty", faulty)

    setattr(program.Hosts, "of", of)  # noqa: B010
