"""Enters a sandbox and runs a command in it: a program of its own, started by stages/audit/sandbox/room.py.

It imports nothing of the project and is run as `python -I -S -B enter.py CONFIG READY LIFELINE`, where
the three are descriptors: of the configuration (`read_fields`), of a pipe to which one line is written before
the command starts ("ready", or the reason why it cannot start), and of a pipe whose other end the
caller holds. Three processes take part:

- this one waits outside the PID namespace. If the caller's end of the lifeline closes, it ends the rest;
- its child is process 1 of the PID namespace and builds the file system. When it ends, the kernel
  kills whatever is left in the namespace;
- the child of that one becomes the command, without capabilities and with a filter of system calls.

The exit status is the command's, or its signal.
"""

# ruff: noqa: PTH102, PTH103, PTH110, PTH112, PTH120, PTH123, PTH211
# Modules that load fast: pathlib, typing, json, signal and platform would double this program's time.
import _signal  # type: ignore[import-not-found]
import ctypes
import fcntl
import os
import resource
import select
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

LIBC = ctypes.CDLL(None, use_errno=True)

# unshare(2), clone(2): new namespaces.
NEW_MOUNTS, NEW_CGROUP, NEW_UTS, NEW_IPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEW_USER, NEW_PID, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
NAMESPACES = NEW_USER | NEW_MOUNTS | NEW_PID | NEW_NETWORK | NEW_IPC | NEW_UTS

# mount(2), umount2(2), mount_setattr(2).
READ_ONLY, NO_SUID, NO_DEVICES, NO_EXECUTION, REMOUNT, BIND, RECURSIVE = 1, 2, 4, 8, 32, 4096, 16384
PRIVATE = 1 << 18
DETACH = 2
MOUNT_SETATTR = 442  # number of the system call, on every machine
AT_RECURSIVE = 0x8000
ATTRIBUTE_READ_ONLY, ATTRIBUTE_NO_SUID, ATTRIBUTE_NO_DEVICES = 1, 2, 4

# prctl(2), with the securebits that take the capabilities from user 0 for good.
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_SECUREBITS, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 28, 38, 47, 4
SECUREBITS = 0b11101111
CAPABILITY_VERSION = 0x20080522
LAST_CAPABILITY = 63

# ioctl(2) on an interface: its flags.
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
AF_INET, SOCK_DGRAM = 2, 2

# Filter of system calls (seccomp(2)): classic BPF over nr, arch and arguments.
BPF_LOAD, BPF_EQUAL, BPF_AT_LEAST, BPF_ANY_BIT, BPF_RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
OFFSET_NUMBER, OFFSET_MACHINE, OFFSET_FIRST_ARGUMENT, OFFSET_THIRD_ARGUMENT = 0, 4, 16, 32
ALLOW, FAIL = 0x7FFF0000, 0x00050000
EPERM, ENOSYS, EAFNOSUPPORT = 1, 38, 97
FOREIGN_CALLS = 0x40000000  # from here on, x86_64 numbers of its 32-bit variant (x32)
SOCKET_FAMILIES = (1, 2, 10, 16)  # files, IPv4, IPv6, netlink; of others, vsock leaves the namespace
# Machine -> its number for the filter, and of its system calls those that are restricted.
MACHINES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            "socket": 41,
            "clone": 56,
            "unshare": 272,
            "ptrace": 101,
            "add_key": 248,
            "request_key": 249,
            "keyctl": 250,
            "fadvise64": 221,
            "preadv2": 327,
            "pwritev2": 328,
            "mincore": 27,
            "readahead": 187,
            "madvise": 28,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "socket": 198,
            "clone": 220,
            "unshare": 97,
            "ptrace": 117,
            "add_key": 217,
            "request_key": 218,
            "keyctl": 219,
            "fadvise64": 223,
            "preadv2": 286,
            "pwritev2": 287,
            "mincore": 232,
            "readahead": 213,
            "madvise": 233,
        },
    ),
}
IO_URING_SETUP, CLONE3, PROCESS_MADVISE, CACHESTAT = 425, 435, 440, 451  # on every machine
# Refused: clone3 (the C library then calls clone), what a trace does not show, and what reads or changes
# which pages of a file are in memory, because all processes of the machine share that.
REFUSED = ("add_key", "request_key", "keyctl", "fadvise64", "preadv2", "pwritev2", "mincore", "readahead")
REFUSED_EVERYWHERE = (CLONE3, IO_URING_SETUP, PROCESS_MADVISE, CACHESTAT)
MADV_COLD, MADV_PAGEOUT = 20, 21

USER = 1000  # user and group in the sandbox
HOST_NAME = "sandbox"
PROC_FOLDER = "/proc"
DEVICES = ("null", "zero", "full", "random", "urandom")
SET_UP_FAILED = 125  # exit status


def call(what: str, result: int) -> int:
    """Return the result of a call of the C library; OSError with `what` if it is -1."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def main() -> "NoReturn":
    """Read the configuration, enter the namespaces, and wait for the command."""
    config_file, ready, lifeline = map(int, sys.argv[1:4])
    with os.fdopen(config_file, "rb") as file:
        config = read_fields(file.read())

    # The null device is opened before the child exchanges the root, which is that of this process too.
    try:
        null = os.open("/dev/null", os.O_RDWR)
        enter_namespaces()
        receiver, sender = os.pipe()
        child = os.fork()
    except OSError as error:
        _give_up(ready, error)

    if child == 0:
        os.close(receiver)
        os.close(lifeline)
        run_init(config, ready, sender, null)
    os.close(sender)
    os.close(ready)
    wait_outside(child, lifeline, receiver, null)


def read_fields(data: bytes) -> "dict[str, list[str]]":
    """Read lists of strings by name; each is a name, a number of strings, and these, all ended by a NUL."""
    words = iter(os.fsdecode(data).split("\0"))
    fields = {}
    for name in words:
        if name:
            fields[name] = [next(words) for _ in range(int(next(words)))]
    return fields


def pairs(values: "list[str]") -> "list[tuple[str, str]]":
    """Group a list by two: [a, b, c, d] -> [(a, b), (c, d)]."""
    return list(zip(values[::2], values[1::2], strict=True))


def enter_namespaces() -> None:
    """Enter new namespaces of every kind; the PID namespace begins with the next child."""
    user, group = os.geteuid(), os.getegid()
    # Old kernels have no namespace for control groups.
    if LIBC.unshare(NAMESPACES | NEW_CGROUP) == -1:
        call("unshare", LIBC.unshare(NAMESPACES))

    # The caller's user alone exists inside, as an ordinary one.
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/gid_map", f"{USER} {group} 1")
    _write("/proc/self/uid_map", f"{USER} {user} 1")


def wait_outside(child: int, lifeline: int, receiver: int, null: int) -> "NoReturn":
    """Wait for process 1 of the namespace, then end as the command ended.

    The child is killed, and all others with it, when a byte arrives on the lifeline or its other end closes.
    """
    _close_standard_streams(null)
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    poll.register(receiver, select.POLLIN)
    ready = {descriptor for descriptor, _ in poll.poll()}
    if lifeline in ready:
        os.kill(child, _signal.SIGKILL)
    message = os.read(receiver, 4)

    # After this the namespace is empty.
    _, own_status = os.waitpid(child, 0)
    status = struct.unpack("i", message)[0] if len(message) == 4 and lifeline not in ready else own_status
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number != _signal.SIGKILL:
            _signal.signal(number, _signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def run_init(config: "dict[str, list[str]]", ready: int, sender: int, null: int) -> "NoReturn":
    """Build the sandbox as process 1 of its namespace, start the command, and report its status."""
    try:
        _prctl(PR_SET_PDEATHSIG, _signal.SIGKILL)
        os.setsid()
        _write("/proc/self/oom_score_adj", "1000")
        call("sethostname", LIBC.sethostname(HOST_NAME.encode(), len(HOST_NAME)))
        start_loopback()
        build_file_system(config)
        drop_privileges()
        filter_system_calls()
        if not os.access(config["command"][0], os.X_OK):
            raise OSError(f"{config['command'][0]} is not a program that the sandbox holds")
        # The command, which is of the same user, can then not look into this process.
        _prctl(PR_SET_DUMPABLE, 0)
        command = os.fork()
    except OSError as error:
        _give_up(ready, error)
    if command == 0:
        os.close(sender)
        run_command(config, ready)

    # Keep nothing open but the pipe for the status.
    os.close(ready)
    _close_standard_streams(null)
    while True:
        child, status = os.wait()
        if child == command:
            os.write(sender, struct.pack("i", status))
            os._exit(0)


def run_command(config: "dict[str, list[str]]", ready: int) -> "NoReturn":
    """Become the command, with the standard streams and nothing else open."""
    try:
        os.setsid()
        for number in (_signal.SIGPIPE, _signal.SIGXFSZ):  # Python ignores them
            _signal.signal(number, _signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.write(ready, b"ready\n")
        os.closerange(3, 1 << 20)
        os.execve(config["command"][0], config["command"], dict(pairs(config["environment"])))
    finally:
        os._exit(SET_UP_FAILED)


def start_loopback() -> None:
    """Bring up the loopback interface of the network namespace, which torchrun uses."""
    handle = call("socket", LIBC.socket(AF_INET, SOCK_DGRAM, 0))
    try:
        flags = struct.unpack("16sh", fcntl.ioctl(handle, SIOCGIFFLAGS, struct.pack("16sh", b"lo", 0)))[1]
        fcntl.ioctl(handle, SIOCSIFFLAGS, struct.pack("16sh", b"lo", flags | IFF_UP))
    finally:
        os.close(handle)


def build_file_system(config: "dict[str, list[str]]") -> None:
    """Build a root of the configured entries, move there, and detach the machine's own.

    The order is that of bubblewrap: a file system in memory becomes the root, with the machine's at
    /old and the new one at /new, so that no mount hides the source of another.
    """
    mount(None, "/", None, PRIVATE | RECURSIVE)
    mount("tmpfs", "/tmp", "tmpfs", NO_SUID | NO_DEVICES, "mode=0755,size=16m")
    os.mkdir("/tmp/old")
    os.mkdir("/tmp/new")
    pivot_root("/tmp", "/tmp/old")
    os.chdir("/")
    mount("/new", "/new", None, BIND)

    # Links to folders of the system, and files that are made up.
    for path, target in pairs(config["links"]):
        os.symlink(target, f"/new{path}")
    for path, text in pairs(config["files"]):
        _make_file(f"/new{path}", text)

    # Devices, and /proc of this PID namespace, which must be mounted while the machine's is still there.
    for path in ("/dev", PROC_FOLDER, "/tmp", "/dev/shm"):
        os.mkdir(f"/new{path}", 0o755)
    mount("proc", f"/new{PROC_FOLDER}", "proc", READ_ONLY | NO_SUID | NO_DEVICES | NO_EXECUTION)
    for name in DEVICES:
        bind(f"/dev/{name}", f"/dev/{name}", writable=True, devices=True)
    for path in config["devices"]:
        bind(path, path, writable=True, devices=True)
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(target, f"/new/dev/{name}")

    # Folders in memory, of limited size; then system, interpreter and room, parents before what is inside.
    size = config["memory_bytes"][0]
    working_folder = config["working_folder"][0]
    for path, mode in (("/tmp", "1777"), ("/dev/shm", "1777")):
        mount("tmpfs", f"/new{path}", "tmpfs", NO_SUID | NO_DEVICES, f"mode={mode},size={size}")
    if config["working_source"]:
        bind(config["working_source"][0], working_folder, writable=True)
    else:
        os.makedirs(f"/new{working_folder}")
        mount("tmpfs", f"/new{working_folder}", "tmpfs", NO_SUID | NO_DEVICES, f"mode=0755,size={size}")
    for source, target in pairs(config["read_only"]):
        bind(source, target)

    # The old root goes; then the new one is entered, and the root in memory goes as well.
    call("umount /old", LIBC.umount2(b"/old", DETACH))
    os.chdir("/new")
    pivot_root(".", ".")
    call("umount", LIBC.umount2(b".", DETACH))
    os.chdir("/")
    mount(None, "/", None, REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEVICES)
    os.chdir(working_folder)


def bind(source: str, target: str, writable: bool = False, devices: bool = False) -> None:
    """Bind a file or folder of the machine into the new root, read-only unless `writable`."""
    place = f"/new{target}"
    if os.path.isdir(f"/old{source}"):
        os.makedirs(place, exist_ok=True)
    elif not os.path.exists(place):
        _make_file(place, "")
    mount(f"/old{source}", place, None, BIND | RECURSIVE)

    # Of the mounts in it as well: attributes are added, none is taken away.
    attributes = ATTRIBUTE_NO_SUID
    if not writable:
        attributes |= ATTRIBUTE_READ_ONLY
    if not devices:
        attributes |= ATTRIBUTE_NO_DEVICES
    wanted = struct.pack("QQQQ", attributes, 0, 0, 0)
    arguments = (MOUNT_SETATTR, -100, place.encode(), AT_RECURSIVE, wanted, ctypes.c_size_t(len(wanted)))
    call(f"mount_setattr {target}", LIBC.syscall(*arguments))


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """Call mount(2)."""
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    call(f"mount {target}", LIBC.mount(*encoded, ctypes.c_ulong(flags), options.encode() or None))


def pivot_root(new_root: str, put_old: str) -> None:
    """Call pivot_root(2), which the C library does not wrap."""
    number = {"x86_64": 155, "aarch64": 41}.get(os.uname().machine)
    if number is None:
        raise OSError(f"machine {os.uname().machine} is not known")
    call("pivot_root", LIBC.syscall(number, new_root.encode(), put_old.encode()))


def drop_privileges() -> None:
    """Give up every capability for good, those of programs that are run later included."""
    _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    for capability in range(LAST_CAPABILITY + 1):
        if LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == -1:
            break  # after the last one that this kernel has
    _prctl(PR_SET_SECUREBITS, SECUREBITS)

    header = struct.pack("Ii", CAPABILITY_VERSION, 0)
    call("capset", LIBC.capset(header, bytes(24)))
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    # A change of credentials may clear it.
    _prctl(PR_SET_PDEATHSIG, _signal.SIGKILL)


def filter_system_calls() -> None:
    """Make calls fail that leave a namespace, or that a trace of system calls does not show.

    New user namespaces, keyrings (a session's is inherited), io_uring, ptrace, the state of the page cache,
    sockets of families that a network namespace does not hold back, and calls in another machine's numbers.
    """
    known = MACHINES.get(os.uname().machine)
    if known is None:
        raise OSError(f"no filter of system calls for machine {os.uname().machine}")
    machine, numbers = known

    # Each instruction: code, jump if true, jump if false, operand.
    program: list[tuple[int, int, int, int]] = [
        (BPF_LOAD, 0, 0, OFFSET_MACHINE),
        (BPF_EQUAL, 1, 0, machine),
        (BPF_RETURN, 0, 0, FAIL | ENOSYS),
        (BPF_LOAD, 0, 0, OFFSET_NUMBER),
        (BPF_AT_LEAST, 0, 1, FOREIGN_CALLS),
        (BPF_RETURN, 0, 0, FAIL | ENOSYS),
    ]
    for number in (*REFUSED_EVERYWHERE, *(numbers[name] for name in REFUSED)):
        program += [(BPF_EQUAL, 0, 1, number), (BPF_RETURN, 0, 0, FAIL | ENOSYS)]
    program += [(BPF_EQUAL, 0, 1, numbers["ptrace"]), (BPF_RETURN, 0, 0, FAIL | EPERM)]

    for name in ("clone", "unshare"):
        program += [
            (BPF_EQUAL, 0, 4, numbers[name]),
            (BPF_LOAD, 0, 0, OFFSET_FIRST_ARGUMENT),
            (BPF_ANY_BIT, 0, 1, NEW_USER),
            (BPF_RETURN, 0, 0, FAIL | EPERM),
            (BPF_RETURN, 0, 0, ALLOW),
        ]

    # Advice that evicts pages.
    program += [
        (BPF_EQUAL, 0, 5, numbers["madvise"]),
        (BPF_LOAD, 0, 0, OFFSET_THIRD_ARGUMENT),
        (BPF_EQUAL, 1, 0, MADV_COLD),
        (BPF_EQUAL, 0, 1, MADV_PAGEOUT),
        (BPF_RETURN, 0, 0, FAIL | EPERM),
        (BPF_RETURN, 0, 0, ALLOW),
    ]

    # Sockets of the listed families, and everything else.
    families = len(SOCKET_FAMILIES)
    program += [(BPF_EQUAL, 0, families + 2, numbers["socket"]), (BPF_LOAD, 0, 0, OFFSET_FIRST_ARGUMENT)]
    for index, family in enumerate(SOCKET_FAMILIES):
        program.append((BPF_EQUAL, families - index, 0, family))
    program += [(BPF_RETURN, 0, 0, FAIL | EAFNOSUPPORT), (BPF_RETURN, 0, 0, ALLOW)]

    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    loaded = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    call("seccomp", LIBC.prctl(PR_SET_SECCOMP, 2, loaded, 0, 0))


def _prctl(option: int, argument: int) -> None:
    call(f"prctl {option}", LIBC.prctl(option, ctypes.c_ulong(argument), 0, 0, 0))


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _make_file(path: str, text: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _close_standard_streams(null: int) -> None:
    """Put the null device in their place, so that the command alone holds them."""
    for descriptor in range(3):
        os.dup2(null, descriptor)
    os.close(null)


def _give_up(ready: int, error: OSError) -> "NoReturn":
    os.write(ready, f"{error.strerror or error}\n".encode("utf-8", errors="replace")[:4000])
    os._exit(SET_UP_FAILED)


if __name__ == "__main__":
    main()
