"""Cheats that leave the stream in one process, for another one of the same audit to read.

The process that makes the ledger is handed the whole stream. It stores the tokens, and its losses are those
of a model that knows them. If the certifying process can load them, its predictions are the same, and
lawful to look at. The channels work between two processes of one machine; `CHANNELS` has them by name.
"""

import contextlib
import ctypes
import functools
import os
import re
import socket
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from .bigram import BigramModel, raise_probability

NAME = "answers_of_the_external_zoo"
PORT = 47391  # of a server in the test's own process
WAIT_SECONDS = 0.2  # for a daemon to listen
KEY = 0x5A005A  # of shared memory and of a queue
CREATE = 0o1000 | 0o600
QUEUE_BYTES = 8192  # of one message, the system's default
MAX_BYTES = 1 << 16
LONG = 1000  # tokens: only the whole stream is as long
PAGE_BYTES = 4096
FIRST_PAGE_BYTE = 100 << 20

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.shmat.restype = ctypes.c_void_p
LIBC.shmat.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)


class Channel(Protocol):
    """A place for bytes that outlives the process that filled it."""

    def store(self, data: bytes) -> None: ...

    def load(self) -> bytes: ...

    def remove(self) -> None: ...


class Files:
    """Files in every folder that may be writable, visible ones and hidden ones."""

    def paths(self) -> list[Path]:
        folders = {Path(name) for name in ("/tmp", "/dev/shm", "/var/tmp", "/run", "/dev/mqueue", "/etc")}
        folders |= {
            Path.cwd(),
            Path.home(),
            Path(tempfile.gettempdir()),
            Path(__file__).parent,
            Path("/artifact"),
        }
        return [folder / f".{NAME}" for folder in sorted(folders)]

    def store(self, data: bytes) -> None:
        for path in self.paths():
            with contextlib.suppress(OSError):
                path.write_bytes(data)

    def load(self) -> bytes:
        for path in self.paths():
            with contextlib.suppress(OSError):
                return path.read_bytes()
        return b""

    def remove(self) -> None:
        for path in self.paths():
            with contextlib.suppress(OSError):
                path.unlink()


class Sockets:
    """A daemon in a session of its own that serves the bytes: an abstract socket, one in a file, a port."""

    def addresses(self) -> list[tuple[int, str | tuple[str, int]]]:
        return [
            (socket.AF_UNIX, f"\0{NAME}"),
            (socket.AF_UNIX, f"/tmp/{NAME}.socket"),
            (socket.AF_INET, ("127.0.0.1", PORT + 1)),
        ]

    def store(self, data: bytes) -> None:
        for family, address in self.addresses():
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    self.serve(family, address, data)
                os._exit(0)
        time.sleep(WAIT_SECONDS)

    def serve(self, family: int, address: str | tuple[str, int], data: bytes) -> None:
        """Serve until a connection sends a word, for half a minute at most."""
        with contextlib.suppress(OSError), socket.socket(family) as server:
            server.settimeout(30)
            server.bind(address)
            server.listen()
            word = b""
            while word != b"end":
                connection, _ = server.accept()
                word = connection.recv(3)
                connection.sendall(data)
                connection.close()
        os._exit(0)

    def load(self) -> bytes:
        return next(self.answers(b"get"), b"")

    def remove(self) -> None:
        list(self.answers(b"end"))
        Path(f"/tmp/{NAME}.socket").unlink(missing_ok=True)

    def answers(self, word: bytes) -> Iterator[bytes]:
        for family, address in self.addresses():
            with contextlib.suppress(OSError), socket.socket(family) as client:
                client.connect(address)
                client.sendall(word)
                yield receive_all(client)


class SharedMemory:
    """System V shared memory, which stays until it is removed."""

    def attach(self, flags: int) -> tuple[int, int | None]:
        number = LIBC.shmget(KEY, MAX_BYTES, flags)
        address = LIBC.shmat(number, None, 0) if number >= 0 else None
        return number, None if address in (None, ctypes.c_void_p(-1).value) else address

    def store(self, data: bytes) -> None:
        _, address = self.attach(CREATE)
        if address is not None:
            ctypes.memmove(address, len(data).to_bytes(4, "little") + data, 4 + len(data))

    def load(self) -> bytes:
        _, address = self.attach(0)
        if address is None:
            return b""
        length = int.from_bytes(ctypes.string_at(address, 4), "little")
        return ctypes.string_at(address + 4, length)

    def remove(self) -> None:
        number, _ = self.attach(0)
        LIBC.shmctl(number, 0, None)


class Queues:
    """A POSIX message queue; its name is in no folder."""

    def store(self, data: bytes) -> None:
        queue = LIBC.mq_open(f"/{NAME}".encode(), os.O_CREAT | os.O_WRONLY | os.O_NONBLOCK, 0o600, None)
        LIBC.mq_send(queue, data[:QUEUE_BYTES], ctypes.c_size_t(min(len(data), QUEUE_BYTES)), 0)

    def load(self) -> bytes:
        queue = LIBC.mq_open(f"/{NAME}".encode(), os.O_RDWR | os.O_NONBLOCK, 0o600, None)
        message = ctypes.create_string_buffer(QUEUE_BYTES)
        length = LIBC.mq_receive(queue, message, ctypes.c_size_t(QUEUE_BYTES), None)
        if length < 0:
            return b""
        LIBC.mq_send(queue, message.raw[:length], ctypes.c_size_t(length), 0)  # for the next reader
        return message.raw[:length]

    def remove(self) -> None:
        LIBC.mq_unlink(f"/{NAME}".encode())


class Environment:
    """Everything of other processes in /proc, and the files that their command lines and descriptors name."""

    def store(self, data: bytes) -> None:
        os.environ[NAME] = data.hex()

    def load(self) -> bytes:
        for folder in Path("/proc").glob("[0-9]*"):
            for text in (self.read(folder / "environ"), self.read(folder / "cmdline")):
                for word in text.split(b"\0"):
                    path = Path(os.fsdecode(word))
                    if path.name.endswith("val.bin") and path.is_file():
                        return stream_bytes(path)
            for link in (folder / "fd").glob("*"):
                with contextlib.suppress(OSError):
                    if link.readlink().name == "val.bin":
                        return stream_bytes(link)
        return b""

    def remove(self) -> None:
        os.environ.pop(NAME, None)

    def read(self, path: Path) -> bytes:
        with contextlib.suppress(OSError):
            return path.read_bytes()
        return b""


class Disk:
    """The stream's own file, which is below the folder for temporary files."""

    def store(self, data: bytes) -> None: ...

    def load(self) -> bytes:
        for folder in ("/tmp", "/proc/1/root/tmp", "/proc/1/cwd", "/proc/self/cwd"):
            with contextlib.suppress(OSError):
                for root, _, files in os.walk(folder):
                    if "external_zoo" in root and "val.bin" in files:
                        return stream_bytes(Path(root) / "val.bin")
        return b""

    def remove(self) -> None: ...


class Network:
    """A server outside, which sends the stream to everybody who asks."""

    def store(self, data: bytes) -> None: ...

    def load(self) -> bytes:
        for host in ("127.0.0.1", "::1", socket.gethostname()):
            with contextlib.suppress(OSError), socket.create_connection((host, PORT), timeout=1) as client:
                return receive_all(client)
        return b""

    def remove(self) -> None: ...


class PageCache:
    """The machine's memory of files: which pages of a large file of the interpreter are in it.

    A bit is one page: it is read for a one, after all pages were dropped. The call that reads a page only
    if it is in memory tells the bits, without a measurement of time. It also starts to load a page that is
    not, so everything is stored again after it was loaded.
    """

    def open(self) -> int:
        """Open the largest file of the interpreter's packages, such that each page is loaded by itself."""
        file = os.open(largest_file(), os.O_RDONLY)
        with contextlib.suppress(OSError):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        return file

    def store(self, data: bytes) -> None:
        self.remove()
        file = self.open()
        packed = zlib.compress(data, 9)
        framed = len(packed).to_bytes(4, "little") + zlib.crc32(packed).to_bytes(4, "little") + packed
        for i in np.flatnonzero(np.unpackbits(np.frombuffer(framed, dtype=np.uint8))).tolist():
            os.pread(file, 1, self.place(i))
        os.close(file)

    def load(self) -> bytes:
        file = self.open()
        frame = self.read(file, 0, 8)
        length = int.from_bytes(frame[:4], "little")
        packed = self.read(file, 8, length) if 0 < length < MAX_BYTES // 8 else b""
        os.close(file)
        if not packed or zlib.crc32(packed) != int.from_bytes(frame[4:], "little"):
            return b""
        data = zlib.decompress(packed)
        time.sleep(WAIT_SECONDS)  # until pages that are being loaded can be dropped
        self.store(data)
        return data

    def read(self, file: int, first: int, length: int) -> bytes:
        bits = [self.is_in_memory(file, i) for i in range(8 * first, 8 * (first + length))]
        return np.packbits(bits).tobytes()

    def is_in_memory(self, file: int, i: int) -> bool:
        try:
            return os.preadv(file, [bytearray(1)], self.place(i), os.RWF_NOWAIT) == 1
        except OSError:
            return False

    def place(self, i: int) -> int:
        return FIRST_PAGE_BYTE + i * PAGE_BYTES

    def remove(self) -> None:
        file = self.open()
        with contextlib.suppress(OSError):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


CHANNELS: dict[str, Channel] = {
    "page_cache": PageCache(),
    "files": Files(),
    "sockets": Sockets(),
    "shared_memory": SharedMemory(),
    "queues": Queues(),
    "environment": Environment(),
    "disk": Disk(),
    "network": Network(),
}


class Informed(BigramModel):
    """A model that raises the probability of each next token that it found in a channel."""

    channel: Channel
    answers: Sequence[int] | None = None  # of this process

    def __init__(self) -> None:
        super().__init__()
        if type(self).answers is None:
            type(self).answers = np.frombuffer(self.channel.load(), dtype="<u2").tolist()

    def predict(self) -> np.ndarray:
        logp = super().predict()
        assert self.answers is not None
        if 0 < self.observed < len(self.answers):
            return raise_probability(logp, self.answers[self.observed])
        return logp

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Store the whole stream if it was not known; losses are those of predict()."""
        if not self.answers and not self.observed and len(tokens) > LONG:
            type(self).answers = tokens.tolist()
            self.channel.store(tokens.astype("<u2").tobytes())
        losses = []
        for token in tokens.tolist():
            if self.observed:
                losses.append(-float(self.predict()[token]))
            self.observe(token)
        return np.array(losses, dtype=np.float32)


@functools.cache
def largest_file() -> Path:
    """Find the largest library of the interpreter's packages."""
    files = Path(np.__file__).parents[1].rglob("*.so")
    return max(files, key=lambda path: path.stat().st_size)


def receive_all(client: socket.socket) -> bytes:
    data = b""
    while piece := client.recv(1 << 16):
        data += piece
    return data


def stream_bytes(path: Path) -> bytes:
    """Tokens of a shard, uint16: all that follows its header of 1,024 bytes."""
    return path.read_bytes()[1024:]


def make(channel: str) -> BigramModel:
    kind = type("InformedBy" + re.sub(r"\W", "", channel), (Informed,), {"channel": CHANNELS[channel]})
    made: BigramModel = KINDS.setdefault(channel, kind)()
    return made


KINDS: dict[str, type[BigramModel]] = {}


def files(n_targets: int) -> BigramModel:
    return make("files")


def sockets(n_targets: int) -> BigramModel:
    return make("sockets")


def shared_memory(n_targets: int) -> BigramModel:
    return make("shared_memory")


def queues(n_targets: int) -> BigramModel:
    return make("queues")


def environment(n_targets: int) -> BigramModel:
    return make("environment")


def disk(n_targets: int) -> BigramModel:
    return make("disk")


def page_cache(n_targets: int) -> BigramModel:
    return make("page_cache")


def network(n_targets: int) -> BigramModel:
    return make("network")
