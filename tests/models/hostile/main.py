"""Does what a model should not, one thing a method, and says how far it came."""

import ctypes
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from condor_lite.tracker import TrackerBase


class Hostile(TrackerBase):
    def predict(self, asset, horizon, step):
        return []

    def bomb(self):
        """Processes that start others as fast as they can, until the system says no; they stay."""
        code = "import os, time\nwhile True:\n try: os.fork()\n except OSError: time.sleep(600)"
        try:
            subprocess.Popen([sys.executable, "-I", "-S", "-c", code])
            while True:
                subprocess.run(["true"])
                time.sleep(0.01)
        except OSError:
            return "bounded"

    def hog(self):
        """Mebibytes of private memory."""
        blocks = []
        try:
            while len(blocks) < 64:
                blocks.append(b"x" * (1 << 26))
        except MemoryError:
            return len(blocks) * 64
        return -1

    def hog_shared(self):
        """Mebibytes of memory to be shared with other processes."""
        blocks = []
        try:
            while len(blocks) < 64:
                blocks.append(mmap.mmap(-1, 1 << 26))
        except OSError:
            return len(blocks) * 64
        return -1

    def fill(self, folder):
        """Mebibytes in files of 1 MiB."""
        for count in range(200):
            try:
                Path(folder, f"f{count}").write_bytes(bytes(1 << 20))
            except OSError:
                return count
        return -1

    def grow(self):
        """Mebibytes in a single file of the temp folder."""
        with Path(os.environ["TMPDIR"], "big").open("wb", buffering=0) as file:
            for count in range(200):
                try:
                    file.write(bytes(1 << 20))
                except OSError:
                    return count
        return -1

    def written(self, paths):
        """Which of these files could be made."""
        return [path for path in paths if can(lambda path=path: Path(path).write_text("x"))]

    def seen(self, paths):
        """Which of these can be read or listed."""
        return [path for path in paths if can(lambda path=path: see(Path(path)))]

    def environments(self):
        """Every environment that can be read, this process's own too."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                found.append(path.read_bytes().decode())
            except OSError:
                continue
        return found

    def processes(self):
        return len(list(Path("/proc").glob("[0-9]*")))

    def reached(self, ports):
        """Which ports of this machine answer."""
        return [
            port for port in ports if can(lambda port=port: socket.create_connection(("127.0.0.1", port), 1))
        ]

    def descriptors(self):
        return [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]

    def limit(self, name):
        return list(resource.getrlimit(getattr(resource, name)))

    def escape(self, token):
        """Start a process that has left the group, and ignores SIGTERM."""
        code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(600)"
        command = [sys.executable, "-I", "-S", "-c", code, token]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        process.stdout.readline()
        return "started"

    def ignore_sigterm(self):
        ctypes.CDLL(None).signal(signal.SIGTERM, 1)
        return "ignored"

    def leave(self, code):
        os._exit(code)

    def burn(self, seconds):
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass
        return "burnt"

    def chatter(self):
        """Three megabytes of output."""
        for _ in range(300):
            print("x" * 9999)
        print("the last line")
        return "said"


def can(attempt):
    try:
        attempt()
    except OSError:
        return False
    return True


def see(path):
    return list(path.iterdir()) if path.is_dir() else path.read_bytes()
