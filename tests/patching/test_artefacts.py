"""Compiled code outlives the process: in our folder, while we compile, unless the user has one."""

import os

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from kvpolicy.patching import apply, compile_report, remove
from kvpolicy.runtime.artefacts import VARIABLE, artefact_folder, artefacts_kept
from kvpolicy.runtime.compiling import CompileReport


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KVPOLICY_CACHE", str(tmp_path / "home"))
    monkeypatch.delenv(VARIABLE, raising=False)
    return tmp_path / "home" / "compiled"


@pytest.mark.parametrize("before", [None, os.path.abspath(default_cache_dir())])
def test_torch_looks_there_while_we_compile_and_no_longer(home, monkeypatch, before):
    if before is not None:
        monkeypatch.setenv(VARIABLE, before)  # torch notes its own choice there
    with pytest.raises(ZeroDivisionError), artefacts_kept():
        assert os.environ[VARIABLE] == str(home) == str(artefact_folder())
        assert home.is_dir()
        raise ZeroDivisionError
    assert os.environ.get(VARIABLE) == before


def test_a_users_folder_stays_and_a_closed_one_is_left_alone(home, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine"))
    with artefacts_kept():
        assert os.environ[VARIABLE] == str(tmp_path / "mine")
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("KVPOLICY_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("not a folder")
    with artefacts_kept():
        assert VARIABLE not in os.environ


@pytest.mark.slow
def test_what_was_compiled_once_is_taken_from_there(build, policies, prompt, home):
    """As a second process would: torch remembers nothing, and the files are there."""
    model = build(num_hidden_layers=1)
    texts = []
    for hits in (0, 2):
        torch._dynamo.reset()
        counters.clear()
        apply(model, policies["scored"], compile=True)
        texts.append(model.generate(prompt, do_sample=False, max_new_tokens=9))
        assert compile_report(model) == CompileReport(graphs=2)
        assert counters["inductor"]["fxgraph_cache_hit"] == hits
        assert counters["aot_autograd"]["autograd_cache_hit"] == hits
        remove(model)
    assert torch.equal(*texts)
    assert any(home.glob("**/*.so")) or any(home.glob("**/*.cubin"))
    torch._dynamo.reset()
