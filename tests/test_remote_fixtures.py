"""The fixtures of the remote tests by themselves: plain ssh through them, without the program."""

import os
import pwd
import socket
import subprocess
import time
import unittest

import remote
import support
from support import wait_until


class TheServer(remote.SshdTestCase):

    def test_a_command_runs_there_and_is_counted(self):
        sshd = self.sshd()
        self.assertEqual(0, sshd.accepted())
        self.assertEqual("hello\n", sshd.ssh("echo hello"))
        self.assertEqual(1, sshd.accepted())
        self.assertEqual(sshd.home + "\n", sshd.ssh("echo $HOME"))
        self.assertNothingLeft(sshd)

    @unittest.skipUnless(remote.has_ipv6(), "no IPv6 here")
    def test_ipv6(self):
        self.assertEqual("hello\n", self.sshd().ssh("echo hello", host="::1"))

    def test_a_changed_host_key_is_refused(self):
        sshd = self.sshd()
        sshd.stop()
        sshd.host_key = "other_host"
        sshd.start()
        with self.assertRaisesRegex(RuntimeError, "IDENTIFICATION HAS CHANGED"):
            sshd.ssh("true")

    def test_two_servers(self):
        one, other = self.sshd(), self.sshd(environment={"WHO": "the other"})
        self.assertEqual("the other\n", other.ssh("echo $WHO"))
        self.assertEqual("\n", one.ssh("echo $WHO"))
        self.assertEqual((1, 1), (one.accepted(), other.accepted()))

    def test_a_key_limited_to_a_command(self):
        sshd = self.sshd()
        sshd.authorize("root", 'command="echo forced"')
        self.assertEqual("forced\n", sshd.ssh("echo free"))

    def test_what_runs_there_is_seen_and_ended(self):
        sshd = self.sshd()
        argv = sshd.argv("setsid sleep 1234 & sleep 2345")
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as client:
            self.assertTrue(wait_until(lambda: sshd.find("sleep", "2345")))
            self.assertTrue(wait_until(lambda: sshd.find("sleep", "1234")))
            client.kill()
        self.assertTrue(sshd.left_over(timeout=0.5), "the daemon outlives its session")
        sshd.stop()
        self.assertEqual({}, sshd.processes())

    def test_the_runs_mark_gets_there(self):
        sshd = self.sshd()
        argv = sshd.argv("echo $BTRFS_BACKUP_NG_TEST_RUN")
        env = dict(os.environ, BTRFS_BACKUP_NG_TEST_RUN="7-7")
        self.assertEqual(b"7-7\n", subprocess.check_output(argv, env=env))


class AnotherMachine(remote.SshdTestCase):

    def test_hidden_programs(self):
        sshd = self.sshd(hide=("btrfs", "python*"))
        self.assertEqual("none\n", sshd.ssh("command -v btrfs || command -v python3 || echo none"))
        self.assertTrue(sshd.ssh("command -v ls"))
        self.assertTrue(remote.find_program("btrfs"))

    def test_send_and_receive_over_ssh(self):
        source, target = self.disk("128M"), self.disk("128M")
        there = os.path.join(support.scratch_folder(), "target disk there")
        sshd = self.sshd({target.path: there})
        top = support.create(os.path.join(source.path, "home"))
        support.Churn(top).fill()
        taken = support.snapshot(top, os.path.join(source.path, "taken"))
        with subprocess.Popen(["btrfs", "send", "-q", taken], stdout=subprocess.PIPE) as sender:
            subprocess.check_call(sshd.argv("btrfs receive -q '%s'" % there), stdin=sender.stdout)
        self.assertEqual([], os.listdir(there))
        self.assertComplete(os.path.join(target.path, "taken"), taken)
        self.assertEqual("taken\n", sshd.inside("ls", there))


class Accounts(remote.SshdTestCase):

    SHELLS = [("sh", ""), ("dash", ""), ("bash", ".bashrc"), ("zsh", ".zshenv"),
              ("fish", ".config/fish/config.fish"), ("tcsh", ".cshrc"), ("busybox", "")]

    def test_each_login_shell_with_the_noise_of_its_rc(self):
        sshd, user = self.sshd(), self.user()
        sshd.authorize(user.name)
        for name, rc in self.SHELLS:
            with self.subTest(shell=name):
                user.set_shell(remote.login_shell(name))
                if rc:
                    user.write(rc, "echo noise\n")
                self.assertEqual(("noise\n" if rc else "") + "hello\n", sshd.ssh("echo hello", user=user.name))

    def test_sudo(self):
        sshd, able, unable = self.sshd(), self.user(sudo=True), self.user()
        for user in (able, unable):
            sshd.authorize(user.name)
            self.assertEqual("%d\n" % user.uid, sshd.ssh("id -u", user=user.name))
        self.assertEqual("0\n", sshd.ssh("sudo -n id -u", user=able.name))
        with self.assertRaisesRegex(RuntimeError, "password"):
            sshd.ssh("sudo -n id -u", user=unable.name)

    def test_what_sudo_starts_is_seen(self):
        sshd, user = self.sshd(), self.user(sudo=True)
        sshd.authorize(user.name)
        sshd.ssh("sudo -n setsid sleep 1234 >/dev/null 2>&1 </dev/null &", user=user.name)
        self.assertTrue(wait_until(lambda: sshd.find("sleep", "1234")))
        sshd.stop()
        self.assertEqual({}, sshd.processes())

    def test_accounts_of_dead_processes_go(self):
        remote.require(remote.why_no_accounts())
        with subprocess.Popen(["true"]) as dead:
            pass
        name = "%s%dx1" % (remote.ACCOUNT, dead.pid)
        remote.change_accounts("useradd", "-M", "-N", name)
        remote.sweep_accounts()
        with self.assertRaises(KeyError):
            pwd.getpwnam(name)


class TheNetworkBetween(remote.SshdTestCase):

    def setUp(self):
        self.server = self.sshd()
        self.between = self.proxy(self.server.port)

    def ssh(self, command):
        return self.server.ssh(command, port=self.between.port)

    def start(self, command):
        process = subprocess.Popen(self.server.argv(command, port=self.between.port), stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.addCleanup(self.end, process)
        return process

    @staticmethod
    def end(process):
        process.kill()
        process.communicate()

    def test_bytes_are_counted_each_way(self):
        self.assertEqual(100000, len(self.ssh("head -c 100000 /dev/zero").encode()))
        self.assertGreater(self.between.down, 100000)
        self.assertLess(self.between.up, 50000)
        self.assertEqual(1, self.between.connections)

    def test_what_was_got_is_counted(self):
        with socket.create_connection(("127.0.0.1", self.between.port), timeout=30) as client:
            got = len(client.recv(4))
            with self.between.lock:
                client.sendall(b"SSH-2.0-nobody\r\n")
                client.settimeout(0.5)
                with self.assertRaises(socket.timeout):
                    while True:
                        got += len(client.recv(65536))
                self.assertLessEqual(got, self.between.down)

    def test_delay(self):
        self.between.delay = 0.05
        started = time.monotonic()
        self.ssh("true")
        # Handshake, banner, key exchange, authentication and command take more than five round trips.
        self.assertGreater(time.monotonic() - started, 0.5)

    def test_rate(self):
        self.between.rate = 1000000
        started = time.monotonic()
        self.ssh("head -c 1000000 /dev/urandom | base64")
        self.assertGreater(time.monotonic() - started, 1.2)

    def test_cut_after_so_many_bytes(self):
        self.between.cut_after(500000, 1000000)
        for size in (500000, 1500000):
            before = self.between.down + self.between.up
            process = self.start("cat /dev/zero")
            got = len(process.stdout.read())
            self.assertEqual(255, process.wait())
            passed = self.between.down + self.between.up
            self.assertGreaterEqual(passed, size)
            self.assertLess(passed, size + (4 << 20))  # some pieces of what is read at once
            self.assertLess(got, passed - before)
        self.assertEqual("through\n", self.ssh("echo through"))

    def test_cut_all(self):
        process = self.start("while echo beat; do sleep 0.01; done")
        self.assertEqual(b"beat\n", process.stdout.readline())
        self.between.cut()
        self.assertEqual(255, process.wait(support.HANGS))
        self.assertNothingLeft(self.server)

    def stands_still(self):
        before = self.between.down
        time.sleep(0.3)
        return self.between.down == before

    def test_silence(self):
        process = self.start("while echo beat; do sleep 0.01; done")
        self.assertEqual(b"beat\n", process.stdout.readline())
        self.between.hang()
        self.assertTrue(wait_until(self.stands_still))  # what was on its way still passes
        seen = self.between.down
        self.assertIsNone(process.poll())
        self.between.go_on()
        self.assertTrue(wait_until(lambda: self.between.down > seen))

    def test_refusing_and_listening_again(self):
        self.between.refuse()
        with self.assertRaisesRegex(RuntimeError, "refused"):
            self.ssh("true")
        self.between.listen()
        self.assertEqual("back\n", self.ssh("echo back"))


if __name__ == "__main__":
    unittest.main()
