"""Programs that mean harm, each contained, none passing, the machine as before. Numbers are limits of this file."""

import ctypes
import dataclasses
import glob
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from kwaicoder_jax import errors
from kwaicoder_jax.evaluation import isolation, outcomes, pipes, sandbox

# CPU time is for programs that go on for ever; what ends for another reason gets there on a busy machine too.
LIMITS = outcomes.Limits(cpu_seconds=8.0, wall_seconds=60.0, memory_bytes=256 << 20, output_bytes=100_000, processes=24)
BRIEF = dataclasses.replace(LIMITS, cpu_seconds=0.6)
MARK = (*sandbox.PYTHON_FLAGS, "-X", f"sandbox_tests_{os.getpid()}")  # to find what is left of them
SYSTEM_PYTHON = "/usr/bin/python3"
WEAKEST = isolation.Isolation(namespaces=False, user=None)


@pytest.fixture(scope="module")
def box():
    return sandbox.Sandbox(LIMITS, python_flags=MARK)


@pytest.fixture(scope="module")
def plain():
    """What remains where the kernel allows no namespaces; only programs that do no lasting harm run here."""
    return sandbox.Sandbox(LIMITS, python_flags=MARK, isolation=WEAKEST)


@pytest.fixture(scope="module")
def plain_user():
    """The same for root, with the program under another user, for which the interpreter must be readable."""
    if os.geteuid() != 0 or not os.path.exists(SYSTEM_PYTHON):
        pytest.skip("needs root and a system Python")
    other = isolation.Isolation(namespaces=False, user=isolation.NOBODY)
    flags = ("-s", "-S", "-B", *MARK[-2:])
    return sandbox.Sandbox(LIMITS, python=SYSTEM_PYTHON, python_flags=flags, isolation=other)


@pytest.fixture(autouse=True)
def machine_as_before():
    """Every test leaves no process, no open file and no temporary folder behind."""
    before = _state()
    yield
    end = time.monotonic() + 5
    while (after := _state()) != before and time.monotonic() < end:
        time.sleep(0.05)
    assert after == before


def _state():
    marked = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{name}/cmdline").read_bytes()
            parent = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if MARK[-1].encode() in words or (b"launcher.py" in words and parent == os.getpid()):
            marked.append(name)
    folders = glob.glob(os.path.join(tempfile.gettempdir(), f"sandbox-{os.getpid()}-*"))
    return marked, len(os.listdir("/proc/self/fd")), folders


def run(box, program, **kwargs):
    return box.run(textwrap.dedent(program), **kwargs)


def in_namespaces(box):
    if not box.isolation.namespaces:
        pytest.skip("this kernel allows no namespaces: " + "; ".join(box.isolation.missing))


def test_a_right_program_passes(box, plain):
    for one in (box, plain):
        outcome = run(
            one, "import json, sys\nprint('hello')\nprint('there', file=sys.stderr)\nassert __name__ == '__main__'"
        )
        assert (outcome.status, outcome.output, outcome.errors, outcome.exit_code) == (
            "passed",
            "hello\n",
            "there\n",
            0,
        )
        assert 0 < outcome.cpu_seconds < 1
        assert 0 < outcome.seconds < 60


@pytest.mark.parametrize(
    ("program", "status", "detail"),
    [
        ("assert 1 == 2, 'no'", "failed", "AssertionError: no"),
        ("def f(:", "failed", "SyntaxError"),
        ("import sys; sys.exit(0)", "failed", "SystemExit: 0"),
        ("raise SystemExit", "failed", "SystemExit"),
        ("exit()", "failed", "NameError"),  # added by site, which is not loaded
        ("import os; os._exit(0)", "failed", "did not run to its end"),
        ("import os; os._exit(3)", "failed", "exit status 3"),
        ("import atexit, os; atexit.register(os._exit, 5)", "failed", "exit status 5"),
        ("raise KeyboardInterrupt", "failed", "KeyboardInterrupt"),
        ("class E(BaseException):\n  def __str__(self): raise self\nraise E", "failed", "E"),
        ("def f(): return f()\nf()", "failed", "RecursionError"),
        ("while True: pass", "timeout", "CPU time"),
        (
            "import signal, time\nfor s in (15, 2, 1, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
            "timeout",
            "CPU",
        ),
        ("import ctypes; ctypes.string_at(0)", "crashed", "Segmentation"),
        ("import os; os.abort()", "crashed", "Abort"),
        ("import os; os.kill(os.getpid(), 9)", "crashed", "Killed"),
        ("x = bytearray(10**10)", "memory", "MemoryError"),
        ("x = []\nwhile True: x.append(bytearray(10**6))", "memory", "MemoryError"),
        ("while True: print('x' * 1000)", "output", "100000"),
        ("import os\nwhile True: os.write(2, b'x' * 65536)", "output", "100000"),
        ("print('x' * 50_000_000, end='')", "output", "100000"),
        ("import os; os.closerange(0, 256)", "failed", ""),
        (
            "import os\nfor i in range(3, 256):\n  try: os.write(i, b'0' * 32)\n  except OSError: pass",
            "failed",
            "its end",
        ),
        ("import os, re\nprint('0' * 32)\nos._exit(0)", "failed", "did not run to its end"),
        ("f = open('big', 'wb')\nwhile True: f.write(b'x' * 10**6)", "failed", "OSError"),
        ("x = [open('main.py') for i in range(1000)]", "failed", "Too many open files"),
        ("import os; assert os.readlink('/proc/self/fd/0') == '/dev/null'; input()", "failed", "EOFError"),
    ],
)
def test_wrong_programs(box, plain, program, status, detail):
    for one in (box, plain):
        outcome = run(one, program, limits=BRIEF if status == "timeout" else LIMITS)
        assert outcome.status == status, outcome
        assert detail in outcome.detail
        assert len(outcome.output) <= 100_000 >= len(outcome.errors)


def test_deep_recursion_in_c_is_contained(box):
    outcome = run(
        box, "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n  def __repr__(s): return repr(s)\nrepr(A())"
    )
    assert outcome.status in ("crashed", "memory", "failed")


def test_sleeping_ends_by_the_clock(box, plain):
    for one in (box, plain):
        limits = outcomes.Limits(wall_seconds=0.7)
        outcome = run(one, "import time\ntime.sleep(1000)", limits=limits)
        assert outcome.status == "timeout"
        assert "clock" in outcome.detail
        assert 0.5 < outcome.seconds < 10


def test_too_much_output_ends_the_program_at_once(box):
    outcome = run(box, "import time\nprint('x' * 200_000, flush=True)\ntime.sleep(50)")
    assert (outcome.status, outcome.seconds < 30) == ("output", True)


def test_fork_bomb(box):
    in_namespaces(box)
    started = run(
        box,
        "import os, time\nn = 0\ntry:\n  while os.fork(): n += 1\n  time.sleep(9)\nexcept OSError: print(n)",
    )
    assert int(started.output.split()[0]) in range(15, LIMITS.processes + 1)  # the limit binds, in a bounded case first
    outcome = run(box, "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", limits=BRIEF)
    assert outcome.status == "timeout"
    assert outcome.seconds < 30


def test_work_in_children_counts(box, plain):
    """Processes of 0.3 seconds, one after the other without end: together past the limit, none alone."""
    program = """
        import os, time
        while True:
            if os.fork() == 0:
                while time.process_time() < 0.3: pass
                os._exit(0)
            os.wait()
    """
    for one in (box, plain):
        outcome = run(one, program, limits=BRIEF)
        assert (outcome.status, "CPU" in outcome.detail) == ("timeout", True)
        assert 0.6 < outcome.cpu_seconds < 3


def test_the_cpu_limit_does_not_wait_for_a_look(box):
    limits = outcomes.Limits(cpu_seconds=0.02)  # below the supervisor's interval
    program = "import time\nwhile time.process_time() < 0.04: pass"
    assert {run(box, program, limits=limits).status for _ in range(5)} == {"timeout"}


def test_memory_of_children_counts(box):
    in_namespaces(box)
    program = """
        import os, time
        for _ in range(8):
            if os.fork() == 0:
                x = bytearray(b'1') * (60 << 20)
                time.sleep(60)
        time.sleep(60)
    """
    assert run(box, program).status == "memory"


def test_many_threads(box):
    in_namespaces(box)
    program = """
        import threading, time
        for _ in range(1000): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    """
    outcome = run(box, program, limits=outcomes.Limits(cpu_seconds=2, processes=24))
    assert outcome.status == "failed"
    assert "can't start new thread" in outcome.detail


def test_daemons_die(box, plain):
    program = """
        import os, time
        read, write = os.pipe()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.setsid()
                os.write(write, b'x')
                time.sleep(300)
                os._exit(0)
            os._exit(0)
        os.read(read, 1)
    """
    for one in (box, plain):
        assert run(one, program).status == "passed"  # and the fixture finds nothing left


def test_daemons_that_ignore_and_spam(box):
    program = """
        import os, signal
        for number in set(signal.valid_signals()) - {9, 19}:
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        for _ in range(5):
            if os.fork() == 0:
                os.setsid()
                while True: os.write(1, b'spam' * 1000)
        os._exit(0)
    """
    assert run(box, program).status in ("failed", "output")


def test_the_parent_cannot_be_killed(box):
    in_namespaces(box)
    program = """
        import os
        for target in (os.getppid(), 1, -1):
            try: os.kill(target, 9)
            except OSError: pass
    """
    outcome = run(box, program)
    assert outcome.status == "passed", outcome  # it was not harmed, nor was anything else


def test_nothing_outside_can_be_signalled(box):
    in_namespaces(box)
    program = f"""
        import os
        assert not [n for n in os.listdir('/proc') if n.isdigit() and int(n) > 40]
        os.kill({os.getpid()}, 0)
    """
    assert "ProcessLookupError" in run(box, program).detail


def test_files_outside_are_out_of_reach(box, tmp_path):
    in_namespaces(box)
    home = Path.home()
    canary = tmp_path / "canary"
    canary.write_text("alive")
    with tempfile.NamedTemporaryFile(dir=home) as at_home:
        program = f"""
            import os, shutil
            for place in ({str(tmp_path)!r}, {str(home)!r}, os.environ['HOME'], '/etc', '/opt', '/dev', '/proc'):
                shutil.rmtree(place, ignore_errors=True)
            for place in ({str(canary)!r}, {at_home.name!r}, {__file__!r}):
                try: open(place).read()
                except OSError: pass
                else: raise AssertionError('read ' + place)
            for place in ('/usr/x', '/etc/x', '/bin/x', '/proc/sys/kernel/core_pattern', {sys.base_prefix + "/x"!r}):
                try: open(place, 'w').write('x')
                except OSError: pass
                else: raise AssertionError('wrote ' + place)
        """
        outcome = run(box, program, limits=LIMITS)
        assert os.path.exists(at_home.name)
    assert canary.read_text() == "alive"
    assert outcome.status == "passed", outcome
    assert os.path.exists("/etc/passwd")


def test_readable_folders_are_read_only(tmp_path):
    """Even one that everybody may write to."""
    (tmp_path / "data").write_text("known")
    tmp_path.chmod(0o777)
    (tmp_path / "data").chmod(0o666)
    one = sandbox.Sandbox(LIMITS, readable=(str(tmp_path),))
    in_namespaces(one)
    outcome = run(
        one, f"import os; os.chdir({str(tmp_path)!r})\nassert open('data').read() == 'known'\nopen('data', 'w')"
    )
    assert "Read-only file system" in outcome.detail


def test_a_private_folder_that_goes_away(box, plain):
    for one in (box, plain):
        program = """
            import os, tempfile
            assert os.listdir('.') == ['main.py'], os.listdir('.')
            assert os.path.realpath(os.environ['HOME']) == os.path.realpath(tempfile.gettempdir()) == os.getcwd()
            os.makedirs('a/b'); open('a/b/c', 'w').write('x')
            os.symlink('/', 'root'); os.symlink('/etc/passwd', 'passwd'); os.symlink('loop', 'loop')
            os.chmod('a/b', 0); os.chmod('a', 0)
        """
        assert run(one, program).status == "passed"
        assert run(one, program).status == "passed"
    assert os.path.exists("/etc/passwd")


def test_the_disk_is_bounded(box):
    in_namespaces(box)
    program = "for i in range(100):\n  open(f'f{i}', 'wb').write(b'x' * (8 << 20))"
    assert "No space left" in run(box, program).detail


def test_no_network(box):
    in_namespaces(box)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        server.settimeout(0.2)
        outcome = run(box, f"import socket\nsocket.create_connection({address!r}, timeout=1)")
        assert outcome.status == "failed"
        assert "OSError" in outcome.detail or "Refused" in outcome.detail
        with pytest.raises(TimeoutError):
            server.accept()
    abstract = "\0kwaicoder-test"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(abstract)
        server.listen()
        outcome = run(box, f"import socket\nsocket.socket(socket.AF_UNIX).connect({abstract!r})")
        assert "ConnectionRefused" in outcome.detail


def test_no_shared_memory(box):
    in_namespaces(box)
    libc = ctypes.CDLL(None)
    segment = libc.shmget(0, 4096, 0o1666)  # IPC_PRIVATE, IPC_CREAT, for all
    assert segment >= 0
    try:
        program = "import os\nassert len(open('/proc/sysvipc/shm').read().splitlines()) == 1\nos.listdir('/dev/shm')[0]"
        assert "IndexError" in run(box, program).detail  # the heading alone, and an empty folder
    finally:
        libc.shmctl(segment, 0, None)


def test_a_listening_socket_reaches_nobody(box):
    in_namespaces(box)
    program = """
        import socket
        s = socket.socket(); s.bind(('0.0.0.0', 45671)); s.listen()
        try: s.settimeout(0.5); s.accept()
        except TimeoutError: raise
    """
    assert "TimeoutError" in run(box, program).detail


def test_rights_cannot_be_had_again(box):
    in_namespaces(box)
    program = """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(0x10000000) != 0, 'a new user namespace'
        assert libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) != 0
        assert libc.sethostname(b'x', 1) != 0
        assert libc.ptrace(16, 1, 0, 0) != 0
        for change in (os.setuid, os.setgid):
            try: change(0)
            except PermissionError: pass
            else: raise AssertionError(change)
        import resource
        try: resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        except (ValueError, PermissionError): pass
        else: raise AssertionError('limit raised')
        try: open('/proc/1/environ').read()
        except PermissionError: pass
        else: raise AssertionError('supervisor readable')
        status = open('/proc/self/status').read()
        assert 'CapEff:\\t0000000000000000' in status and 'NoNewPrivs:\\t1' in status
    """
    outcome = run(box, program)
    assert outcome.status == "passed", outcome


def test_the_environment_is_scrubbed(box, monkeypatch):
    monkeypatch.setenv("KWAICODER_SECRET", "1")
    names = run(box, "import os\nprint(*sorted(os.environ))").output.split()
    assert names == ["HOME", "LANG", "PATH", "PWD", "PYTHONHASHSEED", "TMPDIR"]


def test_only_its_own_descriptors(box, plain):
    """Standard streams, the runner's two pipes, and the directory listing itself; not the leash or the report."""
    for one in (box, plain):
        assert run(one, "import os\nassert len(os.listdir('/proc/self/fd')) == 6").status == "passed"


def test_a_killed_parent_takes_all_along(box, tmp_path):
    script = f"""
import sys; sys.path.insert(0, {str(Path.cwd())!r})
from kwaicoder_jax.evaluation import isolation, sandbox
weak = isolation.Isolation(False, None)
box = sandbox.Sandbox(isolation=weak if sys.argv[1] == 'plain' else None)
box.run("import os, time\\nif os.fork() == 0: os.setsid()\\ntime.sleep(77)")
"""
    for kind in ("best", "plain"):
        parent = subprocess.Popen([sys.executable, "-c", script, kind], env={"TMPDIR": str(tmp_path)})
        end = time.monotonic() + 20
        wanted = 4 if kind == "best" and box.isolation.namespaces else 3  # launcher, supervisor, program, daemon
        while len(family := _children_of_all(parent.pid)) < wanted and time.monotonic() < end:
            time.sleep(0.05)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        end = time.monotonic() + 5
        while any(os.path.exists(f"/proc/{one}") for one in family) and time.monotonic() < end:
            time.sleep(0.05)
        assert len(family) >= wanted
        assert not [one for one in family if os.path.exists(f"/proc/{one}")]


def _children_of_all(process):
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents[int(name)] = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    family = {process}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return family - {process}


def test_results_do_not_depend_on_the_number_of_workers(box):
    programs = [
        *("assert True", "assert False", "while True: pass", "import os; os._exit(0)", "print('x' * 10**6)") * 2,
        "print(hash('a'), list({'b', 'c', 'd'}))",
    ]
    brief = sandbox.Sandbox(BRIEF, python_flags=MARK, isolation=box.isolation)
    one, many = brief.run_many(programs, workers=1), brief.run_many(programs, workers=8)
    assert [(o.status, o.detail, o.exit_code) for o in one] == [(o.status, o.detail, o.exit_code) for o in many]
    assert one[-1].output == many[-1].output
    assert [o.status for o in one[:5]] == ["passed", "failed", "timeout", "failed", "output"]


def test_other_commands(box):
    script = "cat data/in.txt; echo oops >&2; exit 3"
    outcome = box.run_command(["/bin/sh", "-c", script], files={"data/in.txt": "text\n"})
    assert (outcome.status, outcome.exit_code, outcome.output, outcome.errors) == ("failed", 3, "text\n", "oops\n")
    assert box.run_command(["/bin/true"]).status == "passed"
    with pytest.raises(isolation.SandboxError, match="No such file"):
        box.run_command(["/no/such/compiler"])
    with pytest.raises(errors.UserError, match="relative"):
        box.run_command(["/bin/true"], files={"../escape": ""})


def test_any_text_is_a_program(box):
    assert run(box, "x = 'é漢'\nassert len(x) == 2").status == "passed"
    assert box.run("\0").status == "failed"
    assert box.run("x = '\ud800'").status == "failed"
    assert box.run("x = 'a\r\nb'").status == "failed"
    assert box.run("# " + "x" * 3_000_000).status == "passed"


def test_isolation_says_what_is_missing():
    outcome = outcomes.Outcome("passed", "", 0, 0, "", "", 0)

    def attempt(candidate):
        if candidate.namespaces:
            raise isolation.SandboxError("unshare: not permitted")
        return outcome

    found = isolation.detect(attempt)
    assert not found.namespaces
    assert "unshare: not permitted" in found.missing[0]
    assert any("network can be reached" in line for line in found.report)
    with pytest.raises(isolation.SandboxError, match="no program can be run safely"):
        isolation.detect(lambda _: outcomes.Outcome("failed", "broken", 0, 0, "", "", 1))


def test_no_jax_is_needed():
    code = "import sys\nfrom kwaicoder_jax.evaluation import sandbox\nassert not {'jax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_namespaces_another_user_is_a_wall(plain_user, tmp_path):
    canary = tmp_path / "canary"
    canary.write_text("alive")
    program = f"""
        import os, tempfile
        assert os.getuid() == os.geteuid() > 1000 and not os.getgroups()
        for action in (
            lambda: os.kill(os.getppid(), 9), lambda: os.kill({os.getpid()}, 9), lambda: open({str(canary)!r}, 'w'),
            lambda: open('/etc/x', 'w'), lambda: os.setuid(0),
        ):
            try: action()
            except PermissionError: pass
            else: raise AssertionError
        open('mine', 'w').write('x')
        n = 0
        try:
            while os.fork(): n += 1
            os._exit(0)
        except OSError: pass
        assert 15 < n <= 24, n
    """
    for outcome in plain_user.run_many([textwrap.dedent(program)] * 3, workers=3):
        assert outcome.status == "passed", outcome
    assert canary.read_text() == "alive"


def test_an_unprivileged_caller_has_namespaces_too(box):
    in_namespaces(box)
    if os.geteuid() != 0 or not os.path.exists(SYSTEM_PYTHON):
        pytest.skip("needs root, to become someone else, and a system Python")
    hostile = "import os, signal\nfor s in (2, 15, 19, 9): os.kill(1, s)\nassert os.getuid() == 1000"
    reading = "open('/proc/1/environ').read()"
    reading_parent = "import os\nopen(f'/proc/{os.getppid()}/environ').read()"
    script = f"""
import signal, sys; sys.path.insert(0, {str(Path.cwd())!r})
from kwaicoder_jax.evaluation import isolation, sandbox
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell in the background ignores it, and so would the launcher
box = sandbox.Sandbox(python_flags=('-s', '-S', '-B'), isolation=isolation.Isolation(True, None))
for text in ({hostile!r}, {reading!r}, 'import os; os._exit(0)'):
    print(box.run(text))
box = sandbox.Sandbox(python_flags=('-s', '-S', '-B'), isolation=isolation.Isolation(False, None))
print(box.run({reading_parent!r}))
"""
    command = [SYSTEM_PYTHON, "-c", script]
    done = subprocess.run(
        command, user=isolation.NOBODY, group=isolation.NOBODY, extra_groups=[], env={}, capture_output=True, text=True
    )
    if "No module named" in done.stderr:
        pytest.skip("the repository is not readable for others")
    lines = done.stdout.splitlines()
    assert [line.split("'")[1] for line in lines] == ["passed", "failed", "failed", "failed"], done
    assert "PermissionError" in lines[1]
    assert "PermissionError" in lines[3]


def test_an_interpreter_with_packages():
    """A virtual environment's packages, on demand."""
    limits = outcomes.Limits(memory_bytes=4 << 30)
    rich = sandbox.Sandbox(limits, python=sys.executable, python_flags=("-P", "-s", "-B"), readable=(sys.prefix,))
    outcome = rich.run("import numpy\nassert numpy.arange(4).sum() == 6")
    assert outcome.status == "passed", outcome


def test_a_supervisor_that_does_not_answer_is_killed(monkeypatch):
    """A launcher that says it started, ignores the leash, and has a child in its group that holds the pipes."""
    monkeypatch.setattr(pipes, "GRACE", 0.3)
    streams = {name: pipes.Pipe() for name in ("report", "out", "err")}
    with pipes.Pipe() as leash, streams["report"] as report, streams["out"], streams["err"]:
        script = f"import os, time\nos.write({report.write}, b'{{\"started\": true}}\\n')\nos.fork()\ntime.sleep(99)"
        command = [sys.executable, "-S", *MARK[-2:], "-c", script]
        process = subprocess.Popen(command, start_new_session=True, pass_fds=[report.write])
        seen = pipes.follow(process, leash, streams, 0.3, 1000)
    assert seen.ended_for == "wall"
    assert seen.reports == [{"started": True}]
    assert 0.6 <= seen.seconds < 10
    assert process.returncode == -signal.SIGKILL


def test_a_launcher_that_does_not_start_is_no_verdict(monkeypatch):
    monkeypatch.setattr(pipes, "START_SECONDS", 0.0)
    with pytest.raises(isolation.SandboxError, match="did not start"):
        sandbox.Sandbox(LIMITS, isolation=WEAKEST).run("pass")


def test_known_escape_the_nonce_can_be_found(box):
    """Stated, not wanted: a program that knows this runner, and searches its descriptors, passes."""
    program = """
        import os
        for i in range(3, 256):
            os.set_blocking(i, False) if os.path.exists(f'/proc/self/fd/{i}') else None
        nonce = b''
        for i in range(3, 256):
            try: nonce = os.read(i, 64) or nonce
            except OSError: pass
        for i in range(3, 256):
            try: os.write(i, nonce)
            except OSError: pass
        os._exit(0)
    """
    assert run(box, program).status == "passed"
