"""The inside of `auditing.box`: makes the walls, starts the program, answers for it when it opens a file.

    python -I -S jail.py FD     # FD: a socket on which the plan comes as a line of JSON; the report goes back

Three processes: one that waits, the supervisor, and the program with all that it starts. The supervisor
lives behind the same walls as the program, so what it opens in its place is no more than the program may see.
It holds nothing that is worth having: the plan, and the names that it noted.

Only the standard library is imported, and nothing of the repository: starting takes 20 ms.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import resource
import select
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
MOST_NAMES = 20_000

# Numbers of Linux on x86-64 (asm/unistd_64.h; seccomp.h, landlock.h, mount.h and sched.h in linux/).
X86_64 = 0xC000003E
NEWEST = 462  # what came after this system call, and x32's calls, are unknown to the filter
ALLOW, ASK, ERRNO, KILL = 0x7FFF0000, 0x7FC00000, 0x00050000, 0x80000000
RECEIVE, SEND, ADD_FD = 0xC0502100, 0xC0182101, 0x40182103
MOVE = 1 << 13  # LANDLOCK_ACCESS_FS_REFER
NAMESPACES = 0x7E020080  # CLONE_NEW*: time, mounts, cgroup, UTS, IPC, user, PID, network
OPEN, OPENAT, EXECVE, EXECVEAT, SOCKET, CLONE, FORK, VFORK = 2, 257, 59, 322, 41, 56, 57, 58
READS_AND_STARTS = (OPEN, OPENAT, EXECVE, EXECVEAT, SOCKET, CLONE, FORK, VFORK)
AT_PIDS = {62: "kill", 200: "tkill", 234: "tgkill", 129: "rt_sigqueueinfo", 297: "rt_tgsigqueueinfo"}
AT_PIDS |= {434: "pidfd_open", 302: "prlimit64", 203: "sched_setaffinity", 144: "sched_setscheduler"}
AT_PIDS |= {142: "sched_setparam", 314: "sched_setattr"}
# Other ways to another's memory, to files unseen, to other walls, to the machine: refused.
REFUSED = {101: "ptrace", 310: "process_vm_readv", 311: "process_vm_writev", 438: "pidfd_getfd", 312: "kcmp"}
REFUSED |= {304: "open_by_handle_at", 303: "name_to_handle_at", 323: "userfaultfd", 440: "process_madvise"}
REFUSED |= {165: "mount", 166: "umount2", 155: "pivot_root", 161: "chroot", 272: "unshare", 308: "setns"}
REFUSED |= {
    428: "open_tree",
    429: "move_mount",
    430: "fsopen",
    431: "fsconfig",
    432: "fsmount",
    433: "fspick",
}
REFUSED |= {442: "mount_setattr", 321: "bpf", 298: "perf_event_open", 317: "seccomp", 246: "kexec_load"}
REFUSED |= {320: "kexec_file_load", 248: "add_key", 249: "request_key", 250: "keyctl", 169: "reboot"}
REFUSED |= {175: "init_module", 313: "finit_module", 176: "delete_module", 167: "swapon", 168: "swapoff"}
REFUSED |= {163: "acct", 179: "quotactl", 443: "quotactl_fd", 300: "fanotify_init", 141: "setpriority"}
REFUSED |= {251: "ioprio_set", 133: "mknod", 259: "mknodat", 256: "migrate_pages", 279: "move_pages"}
# Their arguments lie in memory where they could change after we looked; libraries then use an older call.
UNKNOWN = {
    435: "clone3",
    437: "openat2",
    425: "io_uring_setup",
    426: "io_uring_enter",
    427: "io_uring_register",
}
# Without namespaces System V memory and queues are everyone's, and a folder of /proc stands for its process.
SHARED = {
    29: "shmget",
    64: "semget",
    68: "msgget",
    240: "mq_open",
    241: "mq_unlink",
    424: "pidfd_send_signal",
}
SHARED |= {76: "truncate", 92: "chown", 93: "fchown", 94: "lchown", 260: "fchownat", 188: "setxattr"}
SHARED |= {189: "lsetxattr", 190: "fsetxattr", 197: "removexattr", 198: "lremovexattr", 199: "fremovexattr"}
# Landlock is not asked about modes and times: nothing is done, and success said, as copying a file needs it.
PRETENDED = {90: "chmod", 91: "fchmod", 268: "fchmodat", 452: "fchmodat2", 132: "utime", 235: "utimes"}
PRETENDED |= {261: "futimesat", 280: "utimensat"}
# (call, argument, value): signals to the owner of a file, who may be anybody.
OWNERS = [(72, 1, 8), (72, 1, 15), (16, 1, 0x8901), (16, 1, 0x8902)]  # fcntl F_SETOWN(_EX), ioctl FIOSETOWN


def call(number: int, *arguments: object) -> int:
    """A system call. Raises OSError."""
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    found = LIBC.syscall(ctypes.c_long(number), *wide)
    if found < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return found


def prctl(*arguments: int) -> None:
    """Set something of this process. Raises OSError."""
    call(157, *arguments, *[0] * (5 - len(arguments)))


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Errors of a step say which it was."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{name}: {error.strerror or error}") from None


# -- the walls


def enter_namespaces() -> None:
    """Own users, mounts, processes, network, System V memory and host name, as the user that we are."""
    user, group = os.getuid(), os.getgid()
    call(272, NAMESPACES & ~0x02000080)
    for file, text in {
        "setgroups": "deny",
        "uid_map": f"{user} {user} 1",
        "gid_map": f"{group} {group} 1",
    }.items():
        Path("/proc/self", file).write_text(text)


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2)."""
    call(165, source.encode(), target.encode(), kind.encode(), flags, options.encode())


def fix(target: str, below: bool = True) -> None:
    """Make mounts read-only, without set-user-ID programs."""
    attributes = struct.pack("<4Q", 1 | 2, 0, 0, 0)
    call(442, -100, target.encode(), 0x8000 if below else 0, attributes, len(attributes))


def build_root(plan: Mapping) -> None:
    """A new root that holds the plan's paths only, under their own names; the old one is gone afterwards."""
    bind, private = 0x5000, 0x44000  # MS_BIND | MS_REC, MS_REC | MS_PRIVATE
    detach, nowhere = 2, 0x6  # MNT_DETACH, MS_NOSUID | MS_NODEV
    mount("none", "/", flags=private)
    mount("tmpfs", "/tmp", "tmpfs", nowhere)
    os.mkdir("/tmp/old")
    call(155, b"/tmp", b"/tmp/old")
    os.chdir("/")
    for place, target in plan["links"].items():
        os.symlink(target, place)
    for path, source, writable in sorted(plan["paths"]):
        if path != source and os.path.lexists(path):  # a link in a folder that is here already
            continue
        make_place(path, os.path.isdir(f"/old{source}"))
        if path == "/proc":
            mount("proc", "/proc", "proc", nowhere)
        elif path == "/dev/shm":
            mount("tmpfs", path, "tmpfs", nowhere)
        else:
            mount(f"/old{source}", path, flags=bind)
        if not writable:
            fix(path)
    call(166, b"/old", detach)
    os.rmdir("/old")
    fix("/", below=False)


def make_place(path: str, folder: bool) -> None:
    """Something to mount on."""
    os.makedirs(path if folder else os.path.dirname(path), exist_ok=True)
    if not folder and not os.path.exists(path):
        os.close(os.open(path, os.O_CREAT, 0o600))


def landlock() -> int:
    """The version of the kernel's Landlock, 0 where it has none."""
    try:
        return call(444, None, 0, 1)
    except OSError:
        return 0


def restrict_files(paths: Sequence[tuple[str, str, bool]]) -> None:
    """Landlock: these paths alone can be read and run, those that are writable changed too."""
    every = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(landlock(), 16)) - 1
    read, of_files = 0b1101, 0b1100_0000_0000_0111  # run, read, list; run, write, read, truncate, ioctl
    rules = call(444, struct.pack("<Q", every), 8, 0)
    for path, _, writable in paths:
        place = os.open(path, os.O_PATH)
        folder = stat.S_ISDIR(os.fstat(place).st_mode)
        rights = (every if writable else read) & (every if folder else of_files)
        call(445, rules, 1, struct.pack("<Qi", rights, place), 0)
        os.close(place)
    call(446, rules, 0)
    os.close(rules)


def restrict_reach() -> None:
    """Landlock again, for the program alone: no TCP; no abstract socket, signal or ptrace to the outside."""
    version = landlock()
    if version >= 4:
        rights = struct.pack("<3Q", MOVE, 3, 3)[: 24 if version >= 6 else 16]
        rules = call(444, rights, len(rights), 0)
        root = os.open("/", os.O_PATH)  # moving files between folders must be allowed by every set of rules
        call(445, rules, 1, struct.pack("<Qi", MOVE, root), 0)
        os.close(root)
        call(446, rules, 0)
        os.close(rules)


def drop_capabilities() -> None:
    """Root in here has no power over what it does not own; without new privileges it gets none back."""
    call(126, struct.pack("<Ii", 0x20080522, 0), bytes(24))


def load_filter(namespaces: bool) -> int:
    """seccomp: the descriptor on which the kernel asks the supervisor about some calls; others it refuses."""
    asked = {**dict.fromkeys(READS_AND_STARTS, ASK), **dict.fromkeys(AT_PIDS, ASK)}
    refused = dict.fromkeys(REFUSED if namespaces else REFUSED | SHARED, ERRNO | errno.EPERM)
    refused |= {} if namespaces else dict.fromkeys(PRETENDED, ERRNO)
    unknown = dict.fromkeys(UNKNOWN, ERRNO | errno.ENOSYS)
    load, equal, greater, answer = 0x20, 0x15, 0x25, 0x06
    code = [(load, 0, 0, 4), (equal, 1, 0, X86_64), (answer, 0, 0, KILL), (load, 0, 0, 0)]
    code += [(greater, 0, 1, NEWEST), (answer, 0, 0, ERRNO | errno.ENOSYS)]
    for number, action in (asked | refused | unknown).items():
        code += [(equal, 0, 1, number), (answer, 0, 0, action)]
    for number, index, value in OWNERS:
        code += [(equal, 0, 4, number), (load, 0, 0, 16 + 8 * index), (equal, 0, 1, value)]
        code += [(answer, 0, 0, ERRNO | errno.EPERM), (load, 0, 0, 0)]
    code += [(answer, 0, 0, ALLOW)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in code))
    header = struct.pack("<H6xQ", len(code), ctypes.addressof(program))
    return call(317, 1, 8, header)  # SECCOMP_SET_MODE_FILTER, NEW_LISTENER


# -- the supervisor


def families() -> dict[int, str]:
    """Names of the kinds of sockets."""
    return {int(value): name for name, value in vars(socket).items() if name.startswith("AF_")}


def parents() -> dict[int, int]:
    """The parent of each process that is there."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
            found[int(name)] = int(file.read().rpartition(")")[2].split()[1])
    return found


def group_of(task: int) -> int:
    """The process of a thread; 0 where there is none."""
    with contextlib.suppress(OSError), open(f"/proc/{task}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Tgid:"))
    return 0


class Question:
    """A system call that waits for an answer: id, thread, number, arguments."""

    def __init__(self, listener: int):
        data = bytearray(80)
        fcntl.ioctl(listener, RECEIVE, data)
        self.listener = listener
        self.id, self.task, _, self.number, _, _, *self.arguments = struct.unpack("<QIIiIQ6Q", data)

    def argument(self, index: int) -> int:
        """An argument that is a C int."""
        return ctypes.c_int(self.arguments[index]).value

    def text(self, index: int) -> str:
        """The string that an argument points to. Raises OSError."""
        address = self.arguments[index]
        first = 4096 - address % 4096  # what follows the end of a page may not be there
        buffer = ctypes.create_string_buffer(first + 4096)
        here = struct.pack("<2Q", ctypes.addressof(buffer), len(buffer))
        there = struct.pack("<4Q", address, first, address + first, 4096)
        count = call(310, self.task, here, 1, there, 2, 0)
        return os.fsdecode(buffer.raw[:count].split(b"\0")[0])

    def answer(self, code: int = 0) -> None:
        """Go on (0), or fail with this error."""
        reply = struct.pack("<QqiI", self.id, 0, -code, 0 if code else 1)
        with contextlib.suppress(OSError):  # it may be gone
            fcntl.ioctl(self.listener, SEND, bytearray(reply))

    def give(self, descriptor: int, flags: int) -> None:
        """Go on with a file that we opened."""
        reply = struct.pack("<QIIII", self.id, 2, descriptor, 0, flags & os.O_CLOEXEC)
        try:
            fcntl.ioctl(self.listener, ADD_FD, reply)
        except OSError as error:
            self.answer(error.errno)


class Supervisor:
    """Answers the kernel's questions, and notes them."""

    def __init__(self, plan: Mapping, program: int, listener: int):
        self.plan, self.program, self.listener = plan, program, listener
        self.opened: set[str] = set()
        self.failed: dict[str, int] = {}
        self.network: set[str] = set()
        self.status: int | None = None
        self.families, self.before = families(), len(os.listdir("/proc"))
        self.writable = [path for path, _, writable in plan["paths"] if writable]
        self.answers = dict.fromkeys(AT_PIDS, self.reach) | {OPEN: self.open, OPENAT: self.open}
        self.answers |= {EXECVE: self.execute, EXECVEAT: self.execute, SOCKET: self.connect}
        self.answers |= dict.fromkeys((CLONE, FORK, VFORK), self.fork)

    def note(self, names: set[str] | dict[str, int], name: str, code: int = 0) -> None:
        """Keep a name; where there are too many, that there are."""
        name = name if len(names) < MOST_NAMES else f"more than {MOST_NAMES:,} files"
        names.update({name: code} if isinstance(names, dict) else {name})

    def next(self) -> None:
        """Answer one question."""
        try:
            question = Question(self.listener)
        except OSError:  # who asked is gone
            return
        try:
            self.answers[question.number](question)
        except OSError as error:
            question.answer(error.errno or errno.EPERM)

    def open(self, question: Question) -> None:
        """Open a file that is only read, in the program's place: its name cannot change after it was noted.

        What is written to lies in writable places, where nothing is that the caller did not put there.
        """
        first = question.number == OPENAT
        path, flags = question.text(int(first)), question.argument(first + 1)
        base = question.argument(0) if first else -100
        if flags & os.O_PATH:  # cannot be read from; opening it again is another question
            return question.answer()
        if flags & os.O_ACCMODE != os.O_RDONLY:
            name = os.path.realpath(self.name(question.task, base, path))
            if not any(f"{name}/".startswith(f"{place}/") for place in self.writable):
                self.note(self.failed, name, errno.EROFS)
            elif flags & os.O_ACCMODE == os.O_RDWR and not flags & os.O_TRUNC and os.path.isfile(name):
                self.note(self.opened, name)
            return question.answer()
        mode = question.argument(first + 2) & 0o755 if flags & os.O_CREAT else 0
        try:
            found = self.open_as(question.task, base, path, flags, mode)
        except OSError as error:
            self.note(self.failed, self.name(question.task, base, path), error.errno)
            raise
        try:
            kind, name = os.fstat(found).st_mode, os.readlink(f"/proc/self/fd/{found}")
            ours = name.startswith(f"/proc/{os.getpid()}/")  # our memory
            if stat.S_ISFIFO(kind) or ours:  # a pipe would wait
                raise OSError(errno.EACCES, "refused")
            if not stat.S_ISDIR(kind):
                self.note(self.opened, name)
            os.set_blocking(found, not flags & os.O_NONBLOCK)
            question.give(found, flags)
        finally:
            os.close(found)

    @staticmethod
    def base(task: int, base: int) -> str:
        """Where a relative path of a thread begins."""
        return f"/proc/{task}/cwd" if base == -100 else f"/proc/{task}/fd/{base}"

    def name(self, task: int, base: int, path: str) -> str:
        """The absolute name of a path, as far as can be said."""
        if not path.startswith("/"):
            with contextlib.suppress(OSError):
                path = os.path.join(os.readlink(self.base(task, base)), path)
        return os.path.normpath(path)

    def open_as(self, task: int, base: int, path: str, flags: int, mode: int) -> int:
        """openat2(2), from where the thread is; not through links of /proc, which would be ours."""
        for own in ("/proc/self", "/proc/thread-self"):
            if f"{path}/".startswith(f"{own}/"):
                path = f"/proc/{task}{path[len(own) :]}"
        if not path:
            raise FileNotFoundError(errno.ENOENT, "")
        known = 0o17777703 & ~os.O_NONBLOCK | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CREAT | os.O_EXCL
        how = struct.pack("<3Q", flags & known | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, mode, 2)
        if path.startswith("/"):
            return call(437, -100, os.fsencode(path), how, len(how))
        start = os.open(self.base(task, base), os.O_PATH)
        try:
            return call(437, start, os.fsencode(path), how, len(how))
        finally:
            os.close(start)

    def execute(self, question: Question) -> None:
        """Programs may be started; they are behind the same walls."""
        at = question.number == EXECVEAT
        path = question.text(int(at))
        name = self.name(question.task, question.argument(0) if at else -100, path)
        self.note(self.opened, name) if os.path.exists(name) else self.note(self.failed, name, errno.ENOENT)
        question.answer()

    def connect(self, question: Question) -> None:
        """No socket is made but pairs of them. Libraries look for name services of the machine: not noted."""
        family = question.argument(0)
        if family != socket.AF_UNIX:
            self.note(self.network, f"network {self.families.get(family, family)}")
        question.answer(errno.EACCES)

    def fork(self, question: Question) -> None:
        """New processes and threads, up to a limit, in no namespaces of their own."""
        if question.number == CLONE and question.arguments[0] & NAMESPACES & ~0xFF:
            return question.answer(errno.EPERM)
        self.bury()
        threads = len(os.listdir(f"/proc/{question.task}/task"))
        full = len(os.listdir("/proc")) - self.before + threads > self.plan["tasks"]
        question.answer(errno.EAGAIN if full else 0)

    def reach(self, question: Question) -> None:
        """Signals and limits for those in here alone. 0 is who asks, or its group."""
        target = abs(question.argument(0))
        allowed = not target or (question.argument(0) != -1 and group_of(target) in self.family())
        question.answer(0 if allowed else errno.EPERM)

    def family(self) -> set[int]:
        """Processes that descend from us."""
        children: dict[int, list[int]] = {}
        for child, parent in parents().items():
            children.setdefault(parent, []).append(child)
        found, left = set(), [os.getpid()]
        while left:
            new = children.get(left.pop(), [])
            found.update(new)
            left += new
        return found

    def bury(self) -> None:
        """Forget processes that have ended, but for the program's status."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self.program:
                    self.status = ended[1]

    def watch(self, control: socket.socket) -> tuple[int, bool]:
        """Answer until the program ends, its time is over, or nobody wants it any more: (code, timed out)."""
        end, poll = time.monotonic() + self.plan["timeout"], select.poll()
        process = os.pidfd_open(self.program)
        for place in (self.listener, process, control):
            poll.register(place, select.POLLIN)
        while self.status is None and (left := end - time.monotonic()) > 0:
            ready = dict(poll.poll(1000 * left + 1))
            if ready.get(self.listener, 0) & select.POLLIN:
                self.next()
            elif self.listener in ready:  # all who could ask are gone
                poll.unregister(self.listener)
            elif control.fileno() in ready:
                break
            if process in ready:
                self.bury()
        late = self.status is None
        return (-signal.SIGKILL if late else os.waitstatus_to_exitcode(self.status)), late

    def end(self) -> None:
        """Kill whoever is left. Nobody can start another: without a listener the kernel refuses it."""
        os.close(self.listener)
        while left := self.family():
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, 0)
            self.bury()


def limit(plan: Mapping) -> None:
    """What a process may use."""
    seconds = int(plan["timeout"] + 60) * (os.cpu_count() or 1)
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: seconds}
    if plan["memory"]:
        limits[resource.RLIMIT_DATA] = plan["memory"]
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def start(plan: Mapping, to_supervisor: socket.socket) -> None:
    """Become the program. What goes wrong is the supervisor's to tell."""
    try:
        prctl(1, signal.SIGKILL)
        os.setsid()
        os.chdir(plan["folder"])
        with step("Landlock"):
            restrict_reach()
        limit(plan)
        with step("seccomp"):
            listener = load_filter(plan["namespaces"])
        socket.send_fds(to_supervisor, [b"x"], [listener])
        os.closerange(3, 1 << 30)  # the report's socket above all
    except OSError as error:
        to_supervisor.sendall(str(error).encode())
        os._exit(1)
    try:
        os.execvpe(plan["command"][0], plan["command"], plan["environment"])
    except OSError as error:
        os.write(2, f"{plan['command'][0]}: {error.strerror}\n".encode())
        os._exit(127)


def supervise(plan: Mapping, control: socket.socket) -> dict:
    """Build the walls around this process, start the program, answer for it; returns the report."""
    if plan["namespaces"]:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; all in here die with us. Else `watch` sees who is gone
    prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans become ours
    if plan["namespaces"]:
        with step("mounts"):
            build_root(plan)
    if landlock():
        with step("Landlock"):
            restrict_files(plan["paths"])
    elif not plan["namespaces"]:
        raise OSError("Landlock: the kernel has none")
    drop_capabilities()
    ours, theirs = socket.socketpair()
    program = os.fork()
    if not program:
        start(plan, theirs)
    prctl(4, 0)  # PR_SET_DUMPABLE: our memory is not to be seen in /proc
    theirs.close()
    message, listeners, _, _ = socket.recv_fds(ours, 1000, 1)
    if not listeners:
        raise OSError(message.decode() or "the program could not be started")
    supervisor = Supervisor(plan, program, listeners[0])
    code, late = supervisor.watch(control)
    supervisor.end()
    report = {"code": code, "timed_out": late, "opened": sorted(supervisor.opened)}
    return report | {"failed": supervisor.failed, "network": sorted(supervisor.network)}


def main() -> None:
    """Read the plan, carry it out, tell."""
    control = socket.socket(fileno=int(sys.argv[1]))
    plan = json.loads(control.makefile().readline())
    prctl(1, signal.SIGKILL)
    try:
        if plan["namespaces"]:
            with step("namespaces"):
                enter_namespaces()
        if supervisor := os.fork():
            os.waitpid(supervisor, 0)
            return
        report = supervise(plan, control)
    except OSError as error:
        report = {"error": str(error)}
    control.sendall(json.dumps(report).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
