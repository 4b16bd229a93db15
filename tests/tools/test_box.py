"""The box: what a program in it can't do, whichever means build it, and what is noted of what it opens."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from patience import PATIENCE

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from auditing import box  # noqa: E402
from auditing.run import NotChecked  # noqa: E402

SECRET = "not for your eyes"

# What the program in the box tries, each in a function of its own: what that returns, or the error's name.
ATTEMPTS = """
import contextlib, ctypes, fcntl, json, mmap, os, resource, shutil, signal, socket, subprocess, sys, threading
from pathlib import Path
outside, audit = Path(sys.argv[1]), int(sys.argv[2])
secret = outside / "secret"
libc = ctypes.CDLL(None, use_errno=True)
done = {}

def attempt(function):
    try:
        done[function.__name__] = function()
    except BaseException as error:
        done[function.__name__] = f"no: {type(error).__name__}"

def call(number, *arguments):
    found = libc.syscall(ctypes.c_long(number), *arguments)
    if found < 0:
        raise OSError(ctypes.get_errno(), "")
    return found

def through_libc(path):
    found = libc.open(os.fsencode(path), os.O_RDONLY)
    return os.read(found, 100).decode() if found >= 0 else "no: libc"

def by_child(path):
    return subprocess.run(["cat", path], capture_output=True, text=True).stdout or "no: cat"

def text(name, content="x"):
    Path(name).write_text(content)
    return name

@attempt
def write_beside(): return text("../new")
@attempt
def write_outside(): return text(outside / "new")
@attempt
def append_outside(): return open(secret, "a").write("x")
@attempt
def write_tmp(): return text(f"/tmp/{outside.name}-new")
@attempt
def write_home(): return text(os.path.expanduser("~root") + "/new")
@attempt
def write_kernel(): return text("/proc/sys/kernel/core_pattern", "core")
@attempt
def write_given(): return open(sys.argv[0], "a").write("x")
@attempt
def write_python(): return text(os.path.join(sys.base_prefix, "new"))
@attempt
def write_by_link():
    os.symlink(outside, "link")
    return text("link/new")
@attempt
def write_by_cwd_of_audit(): return text(f"/proc/{audit}/cwd/new")
@attempt
def write_by_root_link(): return text(f"/proc/self/root{outside}/new")
@attempt
def write_from_folder_descriptor():
    return os.open("../new", os.O_CREAT | os.O_WRONLY, dir_fd=os.open(".", os.O_RDONLY))
@attempt
def hard_link(): os.link(secret, "hard")
@attempt
def rename_in(): os.rename(secret, "stolen")
@attempt
def rename_out(): os.rename(text("mine"), outside / "mine")
@attempt
def delete(): os.unlink(secret)
@attempt
def may_pretend_to_change():
    for change in (lambda: os.chmod(secret, 0o777), lambda: os.utime(secret, (1, 1))):
        with contextlib.suppress(OSError):
            change()
@attempt
def change_owner(): os.chown(secret, os.getuid(), os.getgid())
@attempt
def cut(): os.truncate(secret, 0)
@attempt
def make_folder(): os.mkdir(outside / "folder")

@attempt
def read(): return secret.read_text()
@attempt
def read_libc(): return through_libc(secret)
@attempt
def read_child(): return by_child(secret)
@attempt
def read_link():
    os.symlink(secret, "secret link")
    return Path("secret link").read_text()
@attempt
def read_root_link(): return Path(f"/proc/self/root{secret}").read_text()
@attempt
def read_path_descriptor():
    return Path(f"/proc/self/fd/{os.open(secret, os.O_PATH)}").read_text()
@attempt
def read_audits_memory(): return len(open(f"/proc/{audit}/mem", "rb").read(0)) + 1
@attempt
def read_audits_environment(): return open(f"/proc/{audit}/environ").read()
@attempt
def read_supervisors_memory(): return len(open(f"/proc/{os.getppid()}/mem", "rb").read(0)) + 1
@attempt
def write_supervisors_memory(): return len(open(f"/proc/{os.getppid()}/mem", "r+b").read(0)) + 1
@attempt
def vm_read():
    here = ctypes.create_string_buffer(8)
    vector = (ctypes.c_size_t * 2)(ctypes.addressof(here), 8)
    return call(310, audit, vector, 1, vector, 1, 0)
@attempt
def ptrace(): return call(101, 16, audit, 0, 0)
@attempt
def take_descriptor(): return call(438, call(434, audit, 0), 0, 0)

@attempt
def tcp(): return str(socket.create_connection(("127.0.0.1", 9), 1))
@attempt
def udp(): return str(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
@attempt
def tcp6(): return str(socket.socket(socket.AF_INET6))
@attempt
def raw(): return str(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
@attempt
def abstract():
    socket.socket(socket.AF_UNIX).connect("\\0" + outside.name)
@attempt
def name_service(): return socket.getaddrinfo("localhost.invalid", 80)

@attempt
def signal_audit(): os.kill(audit, 0)
@attempt
def signal_supervisor(): os.kill(os.getppid(), signal.SIGTERM)
@attempt
def signal_all(): os.kill(-1, 0)
@attempt
def signal_group_of_audit(): os.kill(-os.getpgid(audit), 0)
@attempt
def limits_of_audit(): return resource.prlimit(audit, resource.RLIMIT_NOFILE)
@attempt
def signal_by_owner(): return fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, audit)
@attempt
def namespace(): return call(272, 0x10000000)
@attempt
def namespace_by_clone(): return call(56, 0x10000000 | 17, 0, 0, 0, 0)
@attempt
def io_uring(): return call(425, 1, 0)
@attempt
def mount(): return call(165, b"none", b"/proc", b"tmpfs", 0, 0)
@attempt
def by_handle(): return call(304, 0, 0, 0)
@attempt
def new_filter(): return call(317, 1, 8, 0)
@attempt
def call_of_x32(): return call(0x40000000 + 39)

# What it may do.
@attempt
def may_write():
    os.mkdir("sub")
    os.rename(text("own"), "sub/own")
    with open("sub/own", "r+b") as file:
        file.truncate(0)
        mmap.mmap(-1, 100).close()
    shutil.rmtree("sub")
    return os.path.exists("sub")
@attempt
def may_read_given(): return len(Path(sys.argv[0]).read_text()) > 100
@attempt
def may_read_libc(): return through_libc("/dev/zero").strip("\\0") + through_libc(text("c file", "by C"))
@attempt
def may_copy_with_mode_and_times(): return Path(shutil.copy2("c file", "copy")).read_text()
@attempt
def may_start_child(): return by_child(text("child file", "by cat"))
@attempt
def may_use_threads():
    found = []
    thread = threading.Thread(target=found.append, args=[1])
    thread.start(), thread.join()
    return found
@attempt
def may_pair(): return len(socket.socketpair())
@attempt
def may_signal_itself(): return os.kill(os.getpid(), 0)
@attempt
def may_read_own_memory_map(): return "python" in Path("/proc/self/maps").read_text()
@attempt
def environment(): return dict(os.environ)
@attempt
def standard_input(): return sys.stdin.read()
@attempt
def capabilities():
    return [line.split()[1] for line in open("/proc/self/status") if line.startswith("CapEff")]
print(json.dumps(done))
"""

MEANS = {"namespaces": True, "Landlock": False}
PERMITTED = {"environment", "standard_input", "capabilities"}


class Box(NamedTuple):
    """A way to build the box, and a folder for it."""

    namespaces: bool
    folder: Path

    def run(self, code: str, *arguments: object, timeout: float = PATIENCE, **options) -> box.Ran:
        """A Python program in it."""
        command = [sys.executable, "-I", "-S", "-c", textwrap.dedent(code), *map(str, arguments)]
        return self.command(command, timeout=timeout, **options)

    def command(
        self, command: list[str], timeout: float = PATIENCE, memory: int | None = None, **options
    ) -> box.Ran:
        readable, environment = options.get("readable", ()), options.get("environment", {})
        enough = {"enough": options["enough"]} if "enough" in options else {}
        return box._run(
            command, self.folder, readable, environment, timeout, memory, self.namespaces, **enough
        )


@pytest.fixture(scope="module", params=MEANS)
def means(request) -> bool:
    """Both ways to build it, where this machine has them."""
    namespaces = MEANS[request.param]
    if reason := box._lacks(namespaces):
        pytest.skip(reason)
    return namespaces


@pytest.fixture
def boxed(means, tmp_path) -> Box:
    (tmp_path / "box").mkdir()
    return Box(means, tmp_path / "box")


class Attempts(NamedTuple):
    """What a program tried, what came of it, and how things were around it before and after."""

    done: dict
    ran: box.Ran
    folder: Path
    before: dict
    after: dict


def state(folder: Path) -> dict:
    """All that could be changed in a folder."""
    files = {path: path.lstat() for path in folder.rglob("*") if "box" not in path.parts}
    return {str(path): (s.st_size, s.st_mode, s.st_mtime_ns, s.st_nlink) for path, s in files.items()}


@pytest.fixture(scope="module")
def attempts(means, tmp_path_factory) -> Attempts:
    """One program that tries all."""
    work = tmp_path_factory.mktemp("attempts")
    outside, folder, program = work / "outside", work / "around" / "box", work / "program.py"
    outside.mkdir(), folder.mkdir(parents=True)
    (outside / "secret").write_text(SECRET)
    program.write_text(ATTEMPTS)
    before = state(work)
    command = [sys.executable, "-I", "-S", str(program), str(outside), str(os.getpid())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAK", SECRET)
        patch.chdir(outside)
        ran = Box(means, folder).command(command, readable=[program], environment={"GIVEN": "1"})
    assert ran.code == 0, ran.errors
    return Attempts(json.loads(ran.output), ran, folder, before, state(work))


def test_nothing_outside_is_changed_or_seen(attempts):
    forbidden = [name for name in attempts.done if not name.startswith("may") and name not in PERMITTED]
    succeeded = {name: attempts.done[name] for name in forbidden if "no: " not in str(attempts.done[name])}
    assert not succeeded and len(forbidden) > 40
    assert attempts.before == attempts.after
    assert not Path(f"/tmp/{attempts.folder.parents[1].name}-new").exists()
    assert SECRET not in attempts.ran.output + attempts.ran.errors


def test_what_a_program_needs_it_has(attempts):
    done = {name: value for name, value in attempts.done.items() if name.startswith("may")}
    assert done == {
        "may_write": False,
        "may_read_given": True,
        "may_read_libc": "by C",
        "may_start_child": "by cat",
        "may_use_threads": [1],
        "may_pair": 2,
        "may_pretend_to_change": None,  # whether it had an effect is seen outside
        "may_copy_with_mode_and_times": "by C",
        "may_signal_itself": None,
        "may_read_own_memory_map": True,
    }


def test_environment_and_input_are_those_given(attempts):
    found = attempts.done["environment"]
    assert found["GIVEN"] == "1" and "LEAK" not in found
    assert found["HOME"] == found["TMPDIR"] == str(attempts.folder.resolve())
    assert attempts.done["standard_input"] == "" and int(attempts.done["capabilities"][0], 16) == 0


def test_files_are_noted_whoever_opens_them(attempts):
    """By Python, by the C library, by a child; not the libraries, and not what was only written."""
    own = attempts.folder.resolve()
    expected = [own / "c file", own / "copy", own / "child file", own.parents[1] / "program.py"]
    assert set(attempts.ran.opened) == {str(path) for path in expected} | {str(own / "sub" / "own")}


def test_what_was_refused_is_noted(attempts):
    outside = (attempts.folder.parents[1] / "outside").resolve()
    found = set(attempts.ran.refused)
    assert {str(outside / "secret"), str(outside / "new")} <= found
    sockets = {name for name in found if name.startswith("network")}
    assert sockets == {"network AF_INET", "network AF_INET6", "network AF_PACKET"}


def test_a_name_that_changes_while_it_is_opened_is_not_believed(boxed):
    """What counts is the file that came out, not the string that was looked at."""
    ran = boxed.run(
        """
        import ctypes, os, threading
        for name in ("one", "two"):
            open(name, "w").write(name)
        libc, name, over = ctypes.CDLL(None), ctypes.create_string_buffer(b"one"), []
        def swap():
            while not over:
                name.value = b"two"
                name.value = b"one"
        threading.Thread(target=swap).start()
        read = set()
        for _ in range(300):
            file = libc.open(name, 0)
            if file >= 0:
                read.add(os.read(file, 3).decode())
                os.close(file)
        over.append(1)
        print(*sorted(read))
        """
    )
    assert ran.code == 0 and ran.output.split(), ran.errors
    assert [Path(name).name for name in ran.opened] == ran.output.split()


def test_names_that_are_not_for_a_terminal(boxed):
    """No line of the audit's table is forged by a file's name."""
    ran = boxed.run("for name in ('a\\nS4  VERIFIED', b'\\xff\\x1b[2J'): open(name, 'w').close(); open(name)")
    assert [Path(name).name for name in ran.opened] == ["a S4 VERIFIED", r"\udcff\x1b[2J"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", -9), ("1 / 0", 1)],
)
def test_exit_codes(boxed, code, expected):
    ran = boxed.run(code)
    assert (ran.code, ran.timed_out) == (expected, False)


def test_a_command_that_is_not_there(boxed):
    ran = boxed.command(["nothing-like-this"])
    assert ran.code == 127 and ran.errors == "nothing-like-this: No such file or directory\n"


def test_output_without_end_is_cut_to_its_last_bytes(boxed, monkeypatch):
    monkeypatch.setattr(box, "KEPT", 100_000)
    ran = boxed.run("print('x' * 3_000_000); print('the end')")
    assert len(ran.output) == 100_000 and ran.output.endswith("x\nthe end\n")


def test_a_program_that_does_not_end_is_ended(boxed):
    code = "import time; print('begun', flush=True); time.sleep(3600)"
    tries = (boxed.run(code, timeout=seconds) for seconds in (1, 30, PATIENCE))  # where it begins slowly
    ran = next(ran for ran in tries if ran.output or ran.code != -signal.SIGKILL)
    assert ran.timed_out and ran.code == -signal.SIGKILL and ran.output == "begun\n"


def test_a_program_whose_output_is_enough_is_ended(boxed):
    code = "import time; print('one', flush=True); print('two', flush=True); time.sleep(3600)"
    ran = boxed.run(code, timeout=PATIENCE, enough=lambda output: b"two" in output)
    assert not ran.timed_out and ran.code == -signal.SIGKILL and ran.output == "one\ntwo\n"


DAEMON = """
import os, time
def live(name):
    with open(name, "wb", buffering=0) as file:  # opened once: who watches it may be gone
        while True:
            file.seek(0), file.write(str(time.monotonic_ns()).encode())
if not os.fork():
    os.setsid()
    if not os.fork():
        live("alive")
    os._exit(0)
while not os.path.exists("alive"):
    time.sleep(0.01)
"""


def test_nobody_outlives_the_program(boxed):
    """A process in a session of its own, orphaned, that holds the output open."""
    ran = boxed.run(DAEMON)
    assert ran.code == 0 and not ran.timed_out
    written = (boxed.folder / "alive").read_text()
    time.sleep(0.2)
    assert (boxed.folder / "alive").read_text() == written


def test_nobody_outlives_an_audit_that_is_killed(boxed):
    code = f"""
        import sys, types; sys.path.insert(0, {str(Path(box.__file__).parents[1])!r})
        from pathlib import Path
        sys.modules["auditing.run"] = types.SimpleNamespace(NotChecked=Exception, printable=str)  # no torch
        from auditing import box
        box._run([sys.executable, "-c", {DAEMON + "live('program')"!r}], Path({str(boxed.folder)!r}),
                 (), {{}}, 600, None, {boxed.namespaces})
        """
    audit = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    while not (boxed.folder / "program").exists():
        assert audit.poll() is None
        time.sleep(0.01)
    audit.kill()
    audit.wait()
    quiet(boxed.folder / "alive")
    quiet(boxed.folder / "program")


def quiet(path: Path) -> None:
    """Wait until nobody writes a file any more."""
    before = None
    for _ in range(int(PATIENCE / 0.3)):
        if (now := path.read_text()) == before:
            return
        before = now
        time.sleep(0.3)
    pytest.fail(f"{path.name} is still written to")


def test_processes_without_end_meet_a_limit(boxed, monkeypatch):
    monkeypatch.setattr(box, "MOST_TASKS", 40)
    ran = boxed.run(
        """
        import os, time
        count = 0
        try:
            while count < 200:
                if not os.fork():
                    time.sleep(3600)
                count += 1
        except BlockingIOError:
            print(count)
        """
    )
    assert ran.code == 0 and 0 < int(ran.output) < 100, ran


def test_memory_has_a_limit(boxed):
    ran = boxed.run("bytearray(1 << 30)", memory=1 << 28)
    assert ran.code == 1 and ran.errors.endswith("MemoryError\n")


def test_no_file_descriptor_is_inherited(boxed, tmp_path):
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        ran = boxed.run("import os; print(*os.listdir('/proc/self/fd'))")
    assert ran.output.split() == ["0", "1", "2", "3"], "3 is the listing's own"


def test_a_folder_inside_what_is_readable_and_links_in_it(boxed, tmp_path):
    """The folder stays writable, what is around it not; a link leads to what is readable too."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("found")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    code = "print(open('../link/file').read(), open('new', 'w').write('x')); open('../x', 'w')"
    ran = boxed.run(code, readable=[tmp_path, tmp_path / "link"])
    assert ran.output == "found 1\n" and ran.errors.splitlines()[-1].startswith(
        ("OSError", "PermissionError")
    )
    assert [Path(name).name for name in ran.opened] == ["file"]


# -- what is a library


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder of installed distributions with one in it."""
    folder = tmp_path / "site-packages"
    (folder / "known" / "__pycache__").mkdir(parents=True)
    (folder / "known" / "__init__.py").write_text("x = 1\n")
    (folder / "known" / "__pycache__" / "__init__.cpython-311.pyc").write_text("compiled")
    (folder / "known-1.dist-info").mkdir()
    told = box._hash(str(folder / "known" / "__init__.py"), 0)
    record = folder / "known-1.dist-info" / "RECORD"
    record.write_text(f"known/__init__.py,sha256={told},6\nknown-1.dist-info/RECORD,,\n")
    monkeypatch.setattr(box, "_sites", lambda: [str(folder.resolve())])
    return folder.resolve()


def test_a_library_is_what_a_distribution_installed(site):
    compiled = site / "known" / "__pycache__" / "__init__.cpython-311.pyc"
    assert box.is_library(str(site / "known" / "__init__.py")) and box.is_library(str(compiled))
    (site / "known" / "weights.bin").write_text("hidden")
    (site / "sitecustomize.py").write_text("")
    (site / "start.pth").write_text("")
    assert not box.is_library(str(site / "known" / "weights.bin"))
    assert box.strange_libraries() == [str(site / "sitecustomize.py"), str(site / "start.pth")]
    assert str(site / "known" / "weights.bin") in box.strange_libraries([str(site / "known" / "weights.bin")])


def test_a_library_that_was_changed_is_none(site):
    path = site / "known" / "__init__.py"
    assert box.is_library(str(path))
    path.write_text("x = 2\n")
    os.utime(path, (1, 1))
    assert not box.is_library(str(path))


def test_python_itself_is_a_library_and_what_is_put_beside_it_is_not():
    assert box.is_library(json.__file__) and box.is_library(os.path.realpath(sys.executable))
    assert box.is_library(pytest.__file__), "as installed here"
    assert not box.is_library(os.path.join(os.path.dirname(os.__file__), "weights.bin"))
    assert not box.is_library(os.path.join(os.path.dirname(os.__file__), "sitecustomize.py"))
    assert not box.is_library("/home/someone/weights.bin")


# -- machines on which it cannot be made


def test_without_a_box_nothing_is_run(monkeypatch, tmp_path):
    monkeypatch.setattr(box, "_lacks", lambda namespaces: "no box: the reason")
    assert box.available() == "no box: the reason"
    with pytest.raises(NotChecked, match="^no box: the reason$"):
        box.run([sys.executable, "-c", "open('made', 'w')"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_reason_is_one_line(monkeypatch, tmp_path):
    """From a step that fails: here the plan names a folder that cannot be entered."""
    if box.available():
        pytest.skip(box.available())
    with pytest.raises(NotChecked, match="^no box: .*No such file or directory"):
        box._run(["true"], tmp_path / "nowhere", (), {}, 10, None, False)
