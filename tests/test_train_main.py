"""The training command: its exit codes, and its errors in one line. `test_train_killed` runs it as a process."""

import signal

import pytest

from sdjax.train import config_file
from sdjax.train.__main__ import main


@pytest.fixture
def file(settings, tmp_path):
    """The TOML file of a run. The handler of SIGTERM, which the command sets, is restored afterwards."""
    path = tmp_path / "run.toml"
    path.write_text(config_file.to_toml(settings()))
    former = signal.getsignal(signal.SIGTERM)
    yield path
    signal.signal(signal.SIGTERM, former)


def test_the_command_returns_exit_codes_and_one_line(file, tmp_path, capsys, no_weights):
    for arguments, code, message in (
        ([str(tmp_path / "none.toml")], 2, "none.toml"),
        ([str(file), "--sead", "1"], 2, "unknown flag --sead"),
        ([str(file), "--data.path", "/nowhere"], 3, "/nowhere"),
        ([str(file), "--resume-step", "7"], 3, "no checkpoint of step 7"),
    ):
        assert main(arguments) == code
        complaint = capsys.readouterr().err
        assert message in complaint.splitlines()[-1] and complaint.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in complaint


def test_a_full_disk_is_one_line(file, monkeypatch, capsys):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdjax.train.loop.plan_runs", full)
    assert main([str(file)]) == 3
    assert capsys.readouterr().err.splitlines()[-1] == "error: [Errno 28] No space left on device"
