"""Errors of commands in one line, whatever they hold, and Ctrl-C that is never lost."""

import logging
import subprocess
import sys
import textwrap

import pytest
from PIL import Image

from sdjax.errors import ConfigError, DataError
from sdjax.runtime import command


def raising(error):
    def run(argv):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (DataError("bad \x1b[31mtensor\x07\u202e"), 3, r"error: bad \x1b[31mtensor\x07\u202e"),
        (OSError(28, "No space left on device", "out.png"), 3, "error: out.png: No space left on device"),
        (MemoryError(), 4, "error: out of memory"),
        (KeyError("x"), 1, "error: sdjax did not expect this, given `a.png --width 8`: KeyError: 'x'"),
    ],
)
def test_an_error_is_told_without_a_traceback(capsys, error, code, expected):
    assert command.run(raising(error), ["a.png", "--width", "8"]) == code
    assert capsys.readouterr().err.splitlines()[0] == expected
    with pytest.raises(type(error)):
        command.run(raising(error), ["--debug"])


def test_a_parser_has_debug_and_takes_whole_flags_only():
    parser = command.parser("sdjax x", "first\nsecond")
    parser.add_argument("--steps")
    assert parser.parse_args([]).debug is False and parser.parse_args(["--debug"]).debug
    assert "first\nsecond" in parser.format_help()
    with pytest.raises(ConfigError, match=r"unrecognized arguments: --step 3; `sdjax x --help` lists the flags"):
        parser.parse_args(["--step", "3"])


def test_log_messages_do_not_control_the_terminal():
    record = logging.LogRecord("sdjax", logging.INFO, "", 0, "name \x1b[2J", (), None)
    assert command.Formatter("%(message)s").format(record) == r"name \x1b[2J"


@pytest.mark.parametrize(("place", "number"), [("callback", 2), ("swallowed", 2), ("callback", 15)])
def test_a_signal_is_not_lost(place, number):
    """An exception in a callback of the garbage collector, of which JAX has one, is dropped by Python."""
    code = f"""
        import gc, os, signal, sys, time
        from sdjax.runtime import command

        signal.signal({number}, signal.SIG_DFL)  # a shell may have started the tests with the signal ignored

        def callback(phase, info):
            gc.callbacks.remove(callback)
            os.kill(os.getpid(), {number})
            time.sleep(0.1)

        def work(argv):
            if {place!r} == "callback":
                gc.callbacks.append(callback)
                gc.collect()
            else:
                try:
                    os.kill(os.getpid(), {number})
                    time.sleep(0.1)
                except BaseException:
                    pass
            print("goes on", flush=True)
            time.sleep(20)

        command._AGAIN = 0.1
        sys.exit(command.run(work, [], (2, 15)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=15)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "goes on\n", "stopped\n")


def test_a_signal_that_becomes_another_error_is_told():
    """As in the import of an extension module, which makes it an ImportError."""
    code = """
        import os, sys, time
        from sdjax.runtime import command

        def work(argv):
            try:
                os.kill(os.getpid(), 15)
                time.sleep(20)
            except BaseException as e:
                raise ImportError("Encountered an error while initializing the extension.") from e

        sys.exit(command.run(work, [], (15,)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=15)
    assert (done.returncode, done.stderr) == (143, "stopped\n")


def test_a_signal_in_the_import_of_an_extension_waits_for_its_end():
    """NumPy's `import_array`, which extensions call, printed a traceback of the KeyboardInterrupt."""
    code = """
        import builtins, os, sys
        from sdjax.runtime import command

        def interrupted(name, *arguments, real=builtins.__import__):
            module = real(name, *arguments)
            if name == "numpy._core._multiarray_umath":
                builtins.__import__ = real
                print("interrupted", flush=True)
                os.kill(os.getpid(), 15)
            return module

        def work(argv):
            import numpy
            builtins.__import__ = interrupted
            import ml_dtypes  # calls import_array

        sys.exit(command.run(work, [], (15,)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=15)
    assert (done.returncode, done.stdout, done.stderr) == (143, "interrupted\n", "stopped\n")


def test_a_signal_within_exec_gives_its_exit_code(tmp_path):
    """Python used to end a module by SIGINT instead."""
    work = "import os, time; os.kill(os.getpid(), 15); time.sleep(20)"
    code = f"import sys; from sdjax.runtime import command; sys.exit(command.run(lambda _: exec({work!r}), [], (15,)))"
    (tmp_path / "work.py").write_text(code)
    run = [sys.executable, "-m", "work"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=15, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (143, "stopped\n")


def test_a_signal_at_the_end_of_a_command_is_told_once():
    """It used to raise KeyboardInterrupt a second later, whatever Python was doing by then."""
    code = """
        import os, signal, sys, time
        from sdjax.runtime import command

        def setitimer(which, seconds, real=signal.setitimer):
            if not seconds:
                signal.setitimer = real
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
            real(which, seconds)

        signal.setitimer, command._AGAIN = setitimer, 0.1
        code = command.run(lambda argv: None, [], (signal.SIGTERM,))
        time.sleep(0.5)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        sys.exit(code)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=15)
    assert (done.returncode, done.stderr) == (143, "stopped\n")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_really_runs_out_of_memory_says_so(tmp_path):
    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")
    code = """
        import resource, sys
        import numpy, PIL.PngImagePlugin
        from sdjax import generate
        import sdjax.draw.jobs
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + (40 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        sys.exit(generate.main(["--model", "tiny", "--prompt", "x", "--image", "large.png"]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (4, "error: out of memory\n")
