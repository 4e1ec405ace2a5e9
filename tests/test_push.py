"""`sdjax push` and `push_to_hub`: a local server takes what the hub would get."""

import hashlib
import shutil
from pathlib import Path

import hub_server
import pytest
import yaml
from safetensors import safe_open

from sdjax import push
from sdjax.errors import ConfigError
from sdjax.formats import hub
from sdjax.train import file_metadata
from sdjax.train.loop import train

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    # The newest HTTP library of huggingface_hub warns of how that uploads a file.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]


@pytest.fixture
def server(monkeypatch):
    """See `hub_server.serve`."""
    yield from hub_server.serve(monkeypatch)


@pytest.fixture
def run(finished, tmp_path):
    """The folder of a copy of a finished run, with a file of a single step."""
    shutil.copytree(finished[0], tmp_path / "run")
    steps = tmp_path / "run" / "export" / "style" / "steps"
    steps.mkdir()
    (steps / "lora-000002.safetensors").write_bytes(b"not this")
    return tmp_path / "run"


def head(card: bytes) -> dict:
    return yaml.safe_load(card.decode().split("---\n")[1])


def test_push_uploads_the_export_with_its_licence(server, run, capsys):
    assert push.main([str(run), "me/style", "--license", "openrail++", "--private"]) == 0
    assert capsys.readouterr().out.strip().endswith("/me/style")
    uploaded, folder = server.repositories["me/style"], run / "export" / "style"
    assert uploaded == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert set(uploaded) == {"lora.safetensors", "pytorch_lora_weights.safetensors", "README.md", "samples.png"}
    assert server.private == {"me/style": True}
    card = head(uploaded["README.md"])
    assert card["license"] == "openrail++" and "These weights: `openrail++`." in uploaded["README.md"].decode()
    assert card["widget"] == [{"text": "red circle", "output": {"url": "samples.png"}}]
    assert {"lora", "template:sd-lora", "diffusers", "text-to-image"} <= set(card["tags"])
    assert push.main([str(run), "me/style", "--license", "apache-2.0"]) == 0
    again = server.repositories["me/style"]["README.md"]
    assert head(again)["license"] == "apache-2.0" and b"openrail" not in again


def test_what_keeps_a_push_from_the_hub_is_one_error(server, run, finished, monkeypatch, tmp_path, capsys):
    licensed = ["--license", "openrail++"]
    (tmp_path / "half" / "export").mkdir(parents=True)
    shutil.copy(run / "config.toml", tmp_path / "half" / "config.toml")
    cases = [
        ([run, "me/style"], 2, "say under which licence the files may be used"),
        ([run, "style", *licensed], 2, "'style' is no name of a repository: give OWNER/NAME"),
        ([run, "me/st yle", *licensed], 2, "'me/st yle' is no name of a repository"),
        ([run, "me/style", *licensed, "--stage", "words"], 2, "--stage words: the stages of"),
        ([tmp_path / "none", "me/style", *licensed], 3, "not the folder of a run"),
        ([tmp_path / "half", "me/style", *licensed], 3, "holds no export; the stage is not done"),
        ([run, "no/entry", *licensed], 3, "no/entry: the token may not write there"),
    ]
    for arguments, code, message in cases:
        assert push.main(list(map(str, arguments))) == code, arguments
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1, error
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert push.main([str(run), "me/style", *licensed]) == 3
    assert "me/style: the token is not valid: log in with `hf auth login`" in capsys.readouterr().err
    assert not any(server.repositories.values())


def test_a_run_pushes_its_export_when_it_is_done(server, settings):
    config = settings(
        stages=[{"steps": 1}],
        validation={},
        license="openrail++",
        push_to_hub="me/copies",
        copies=[{"name": "a"}, {"name": "b", "seed": 1}],
    )
    assert train(config) == 0
    assert set(server.repositories) == {"me/copies-a", "me/copies-b"}
    for copy in ("a", "b"):
        file = Path(config.output) / copy / "export" / "style" / "lora.safetensors"
        assert server.repositories[f"me/copies-{copy}"]["lora.safetensors"] == file.read_bytes()
        with safe_open(file, "np") as opened:
            assert opened.metadata()["modelspec.license"] == "openrail++"
    assert head(server.repositories["me/copies-a"]["README.md"])["license"] == "openrail++"


def test_a_run_that_cannot_push_is_refused_before_weights_are_read(server, settings, monkeypatch, no_weights):
    with pytest.raises(ConfigError, match="push_to_hub needs license"):
        settings(push_to_hub="me/style")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(hub.DataError, match="the token is not valid"):
        train(settings(push_to_hub="me/style", license="openrail++"))


def test_metadata_follows_modelspec_and_kohyas_hashes(finished):
    """https://github.com/Stability-AI/ModelSpec 1.0.1, and sd-scripts' hashes, computed from the bytes of the file."""
    file = finished[0] / "export" / "style" / "lora.safetensors"
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    spec = {key.removeprefix("modelspec."): value for key, value in metadata.items() if key.startswith("modelspec.")}
    content = file.read_bytes()
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert spec == {
        "sai_model_spec": "1.0.1",
        "implementation": "diffusers",
        "title": "style",
        "date": file_metadata.today(),
        "resolution": "16x16",
        "prediction_type": "v",
        "encoder_layer": "1",
        "hash_sha256": f"0x{digest}",
    }
    assert metadata["sshs_model_hash"] == digest and len(metadata["sshs_legacy_hash"]) == 8


def test_the_day_is_that_of_source_date_epoch(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert file_metadata.today() == "2023-11-14"
