import os
import subprocess
import sys
import textwrap

import jax
import pytest

from sdjax.runtime import compilation_cache


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """Records the settings that `enable` gives to JAX, instead of setting them."""
    told = {}
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    return told


def test_the_default_is_the_users_own_and_closed_to_others(tmp_path, monkeypatch, settings):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compilation_cache.enable()
    folder = tmp_path / "sdjax" / "xla"
    assert settings["jax_compilation_cache_dir"] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_without_xdg_it_lies_under_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compilation_cache.default_folder() == tmp_path / ".cache" / "sdjax" / "xla"


def test_the_environment_wins(tmp_path, monkeypatch, settings):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "theirs"))
    compilation_cache.enable(tmp_path / "ours")
    assert not settings and not (tmp_path / "ours").exists()


def test_an_empty_environment_variable_turns_it_off(tmp_path, monkeypatch, settings):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    compilation_cache.enable(tmp_path / "ours")
    assert settings == {"jax_compilation_cache_dir": None}


def test_a_folder_that_cannot_be_made_gives_a_warning(tmp_path, settings):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="no compilation cache in .*: .*every start compiles again"):
        compilation_cache.enable(tmp_path / "file" / "below")
    assert not settings


def test_a_folder_that_others_can_write_is_not_used(tmp_path, settings):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    with pytest.warns(UserWarning, match="other users can write there"):
        compilation_cache.enable(tmp_path / "shared")
    assert not settings


def test_damaged_entries_give_a_warning_and_are_compiled_again(tmp_path):
    code = """
import sys
from sdjax.runtime import compilation_cache
compilation_cache.enable(sys.argv[1])
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
print(jax.jit(lambda x: jnp.sin(x) + 1)(0.0))
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_COMPILATION_CACHE")}

    def run():
        command = [sys.executable, "-c", code, str(tmp_path / "cache")]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120)

    assert run().stdout == "1.0\n"
    entries = [path for path in (tmp_path / "cache").iterdir() if path.name.endswith("-cache")]
    assert entries
    for path in entries:
        path.write_bytes(b"damaged")
    again = run()
    assert again.stdout == "1.0\n"
    assert "Error reading persistent compilation cache entry" in again.stderr


def test_an_entry_that_was_cut_off_is_written_anew(tmp_path):
    code = f"""
        import jax, os, pathlib
        from sdjax.runtime import compilation_cache
        folder = pathlib.Path({str(tmp_path)!r}) / "xla"
        compilation_cache.enable(folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        def program(x):
            return x * 2 + 1
        jax.jit(program)(1.0)
        (entry,) = folder.glob("jit_program-*-cache")
        whole = entry.stat().st_size
        os.truncate(entry, whole // 2)
        jax.clear_caches()
        assert jax.jit(program)(1.0) == 3
        assert entry.stat().st_size > 0.9 * whole  # it also holds how long the compilation took
    """
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Error reading persistent compilation cache entry" in done.stderr
