"""`kvpolicy apply`: text, account, exit codes; on the model that ships, and on SmolLM2."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kvpolicy
from kvpolicy.cli.apply import read_prompt
from kvpolicy.cli.main import main
from kvpolicy.cli.picture import strip
from kvpolicy.lab.fidelity.referee import TOGETHER
from kvpolicy.lab.running import Request, run_policy
from kvpolicy.lab.watching import Watch
from kvpolicy.models import load_model

ROOT = Path(__file__).parents[2]

KEYS = {
    "schema_version", "policy", "model", "prompt_tokens", "new_tokens", "text", "token_ids", "evicted", "resident_peak",
    "resident_bound", "cache_bytes", "planned_cache_bytes", "dense_cache_bytes", "tokens_per_second", "graphs",
    "graph_breaks", "recompiles", "compile", "compile_reason", "seed", "dtype", "device", "versions", "pools",
    "agreement",
}  # fmt: skip

POLICIES = {
    "raas": ["--set", "budget=48", "--set", "page_size=4", "-p", "hum owl red tin sky fog hum hum owl"],
    "scope-slide": ["--set", "alpha=16", "--set", "beta1=8", "--set", "beta2=8"],
    "scope-adaptive": ["--set", "alpha=16", "--set", "beta1=8", "--set", "beta2=8"],
    "scope-discontinuous": ["--set", "alpha=16", "--set", "beta1=4", "--set", "beta2=8"],
    "h2o": [],
    "tova": ["--set", "budget=24"],
}


def apply(capsys, *arguments):
    code = main(["apply", *arguments])
    return code, *capsys.readouterr()


TINY = ["builtin:tiny", "-n", "60", "--device", "cpu"]


# The account -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_the_json_accounts_for_everything(policy, capsys):
    code, out, err = apply(capsys, policy, *POLICIES[policy], *TINY, "--json", "--compare-dense", "--must-evict")
    assert code == 0, err
    account = json.loads(out)
    assert account.keys() >= KEYS and account["schema_version"] == 1
    assert account["new_tokens"] == len(account["token_ids"]) == 60
    assert account["cache_bytes"] == account["planned_cache_bytes"] > 0
    assert 0 < account["resident_peak"] <= account["resident_bound"]
    assert 0 < account["held_peak"] <= account["slots"]
    assert max(tokens for _, tokens in account["residents"]) == account["resident_peak"]
    assert account["evicted"] == sum(pool["evicted"] for pool in account["pools"].values()) > 0
    assert all(pool["kept"] <= pool["bound"] and pool["peak"] <= pool["slots"] for pool in account["pools"].values())
    assert 0 <= account["agreement"]["top1"] <= 1 and account["agreement"]["tokens"] == 60
    assert (account["graphs"], account["graph_breaks"], account["recompiles"]) == (0, 0, 0)
    assert account["tokens_per_second"] > 0 and account["compile_seconds"] == 0
    assert account["text"] in err  # it streams, beside the object


def test_what_explain_announced_is_what_apply_allocates(capsys):
    sizes = ["--set", "alpha=16", "--set", "beta1=4", "--set", "beta2=8"]
    account = json.loads(apply(capsys, "scope-discontinuous", *sizes, *TINY, "--json")[1])
    lengths = ["-c", str(account["prompt_tokens"]), "-n", "60", "--model", "builtin:tiny"]
    assert main(["explain", "scope-discontinuous", *sizes, *lengths, "--dtype", account["dtype"], "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    for key in ("cache_bytes", "planned_cache_bytes", "dense_cache_bytes", "resident_bound"):
        assert account[key] == plan[key]
    (layer,) = plan["layers"]
    evicted = sum(pool["evicted"] for pool in layer["pools"])
    assert account["evicted"] == evicted * plan["geometry"]["layers"] * plan["geometry"]["kv_heads"]


def test_a_reader_sees_text_then_table(capsys):
    code, out, err = apply(capsys, "tova", "--set", "budget=24", *TINY)
    assert code == 0
    text, _, account = out.partition("pool ")
    assert len(text.split()) >= 50
    for word in ("kept", "evicted", "peak", "bound", "as planned", "less", "tokens/s", "compiled     no: on a CPU"):
        assert word in account
    assert "tova under builtin:tiny on cpu, not compiled" in err


def test_a_policy_that_never_fires_says_so_however_quiet(capsys):
    for more in ([], ["-q"], ["--json"]):
        code, _, err = apply(capsys, "window", *TINY, *more)
        assert code == 0 and "NOTHING WAS EVICTED: " in err and "window=1024" in err
    assert apply(capsys, "window", *TINY, "--must-evict")[0] == 1
    assert "NOTHING" not in apply(capsys, "dense", *TINY)[2]


def test_compiled_steps_are_counted_and_timed_apart(capsys):
    _, out, err = apply(capsys, "window", "--set", "window=16", *TINY, "--compile", "--json")
    account = json.loads(out)
    assert (account["graphs"], account["graph_breaks"], account["recompiles"]) == (1, 0, 0)
    assert account["compile_seconds"] > 0 and account["compile"] and account["compile_reason"] == "as asked"
    assert "compiled (as asked)" in err


@pytest.mark.parametrize(
    ("values", "picture"), [([0, 7], "▁█"), ([], ""), ([0], "▁"), ([5] * 3, "███"), (list(range(80)), None)]
)
def test_a_strip(values, picture):
    assert len(strip(values)) <= 40
    assert picture is None or strip(values) == picture


# The full cache --------------------------------------------------------------------------------------------------


def test_the_full_cache_agrees_with_itself(capsys):
    assert TOGETHER < 100
    _, out, _ = apply(capsys, "dense", *TINY, "-n", "100", "--json", "--compare-dense")
    account = json.loads(out)
    verdict = account["agreement"]
    assert verdict["top1"] == verdict["equal_tokens"] == 1.0 and verdict["first_divergence"] is None
    assert verdict["max_kl"] < 1e-4 and verdict["tokens"] == 100
    assert account["evicted"] == 0


def test_a_divergence_is_found_where_it_is(capsys):
    """A window that forgets the phrase: the verdict is that of two full passes over the same text."""
    _, out, _ = apply(capsys, "window", "--set", "window=6", *TINY, "-n", "100", "--json", "--compare-dense")
    account = json.loads(out)
    model, tokenizer = load_model("builtin:tiny", device="cpu")
    prompt = tokenizer(read_prompt(None, None, "builtin:tiny", "window"), return_tensors="pt").input_ids
    chosen = torch.tensor([account["token_ids"]])
    with torch.no_grad():
        full = model(torch.cat([prompt, chosen], 1)).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
    wrong = (full.argmax(-1) != chosen[0]).nonzero()
    verdict = account["agreement"]
    assert verdict["first_divergence"] == int(wrong[0])
    assert verdict["top1"] == pytest.approx(1 - len(wrong) / 100) and verdict["mean_kl"] > 0.1
    assert verdict["mean_log_probability"] == pytest.approx(float(full.gather(-1, chosen[0][:, None]).mean()), abs=1e-3)


def test_reading_along_changes_no_token(capsys):
    arguments = ["h2o", *TINY, "--json"]
    alone, watched = (json.loads(apply(capsys, *arguments, *more)[1]) for more in ([], ["--compare-dense"]))
    assert alone["token_ids"] == watched["token_ids"] and alone["agreement"] is None


# Running ---------------------------------------------------------------------------------------------------------


def test_one_seed_one_text(capsys):
    arguments = ["window", *TINY, "--temperature", "4", "--top-p", "0.95", "--json"]
    texts = [json.loads(apply(capsys, *arguments, "--seed", seed)[1])["token_ids"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_an_interrupt_ends_the_text_and_still_accounts(capsys, monkeypatch):
    put = Watch.put

    def interrupted(self, value):
        put(self, value)
        if len(self.tokens) == 30:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Watch, "put", interrupted)
    before = signal.getsignal(signal.SIGINT)  # ignored where a shell runs the tests in the background
    code, out, err = apply(capsys, "window", "--set", "window=16", *TINY, "--json")
    account = json.loads(out)
    assert code == 130 and account["ended"] == "interrupted" and account["new_tokens"] in (30, 31)
    assert account["resident_peak"] == 16 and account["evicted"] > 0
    assert "stopping after this token" in err and "Traceback" not in err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_text_may_end_by_itself():
    model, tokenizer = load_model("builtin:tiny", device="cpu")
    request = Request("hum owl red tin hum owl", max_new_tokens=50, seed=3)
    first = run_policy(model, tokenizer, "tiny", kvpolicy.load_policy("dense"), request)
    model.generation_config.eos_token_id = first.token_ids[4]
    outcome = run_policy(model, tokenizer, "tiny", kvpolicy.load_policy("dense"), request)
    stop = first.token_ids.index(first.token_ids[4])
    assert outcome.ended == "text" and outcome.token_ids == first.token_ids[: stop + 1]
    assert first.ended == "length" and not hasattr(model, "_kvpolicy")


def test_a_saved_model_brings_its_policy_back(tmp_path, capsys):
    code, _, err = apply(capsys, "window", "--set", "window=16", *TINY, "--save", str(tmp_path / "kept"))
    assert code == 0 and "saved to" in err
    model = kvpolicy.from_pretrained(tmp_path / "kept")
    assert model.config.kv_policy["name"] == "window"
    code, out, _ = apply(capsys, "dense", str(tmp_path / "kept"), "-p", "hum owl", "-n", "4", "--json")
    assert code == 0 and json.loads(out)["new_tokens"] == 4


def test_prompts_come_from_files_and_stdin(tmp_path, capsys, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text("hum owl red tin sky")
    sources = [["-p", "hum owl red tin sky"], ["-f", str(file)], ["-f", "-"]]
    monkeypatch.setattr("sys.stdin", io.StringIO("hum owl red tin sky"))
    accounts = [json.loads(apply(capsys, "dense", *TINY, *source, "--json")[1]) for source in sources]
    assert len({account["prompt_tokens"] for account in accounts}) == 1
    assert accounts[0]["token_ids"] == accounts[1]["token_ids"] == accounts[2]["token_ids"]


def test_the_streams_are_kept_apart(tmp_path):
    """With a policy from stdin, the object alone on stdout, and no colour, bar or advice of a library anywhere."""
    policy = "kvpolicy: 1\nname: piped\npools: {all: {admit: all, budget: 20}}\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "kvpolicy", "apply", "-", *TINY, "--json", "--must-evict"]
    done = subprocess.run(words, input=policy, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    account = json.loads(done.stdout)
    assert account["policy"] == "piped"
    said = done.stderr.replace(account["text"], "").split("\n")
    assert [line for line in said if line.strip()] == [said[0]] and said[0].startswith(
        "piped under builtin:tiny on cpu"
    )


# Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["raas", "-p", "x", "-f", "y"], 2, "-p and -f both give a prompt"),
        (["raas", "-f", "/no/such/file"], 2, "cannot read the prompt from /no/such/file"),
        (["raas", "-f", sys.executable], 2, "it is not UTF-8 text"),
        (["raas", "-p", "  "], 2, "the prompt is empty"),
        (["-", "-f", "-"], 3, "<stdin>"),
        (["raas", "-n", "0"], 2, "max-new-tokens"),
        (["raas", "--assistant-model", "x"], 2, "assistant"),
        (["rass"], 3, "did you mean `raas`?"),
        (["raas", "--set", "bugdet=3"], 3, "budget"),
        (["raas", "--set", "budget=40"], 2, "raas keeps at most 40 tokens in all"),
        (["raas", "builtin:huge", "-p", "x"], 4, "builtin:tiny"),
        (["raas", "./nowhere", "-p", "x"], 4, "./nowhere"),
        (["raas", "./nowhere"], 2, "give a prompt with -p TEXT or -f FILE"),
        (["raas", "--device", "cuda:7"], 2, "cuda:7"),
        (["raas", "--dtype", "int7"], 2, "int7"),
        (["raas", "--chat"], 2, "no chat template"),
        (["raas", "--top-p", "0.5"], 2, "--temperature"),
        (["window", "-n", "100000"], 4, "positions"),
        (["window", "--save", "/proc/nowhere"], 2, "cannot save to /proc/nowhere"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_mistakes_get_a_sentence_and_their_exit_code(arguments, code, words, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    got, out, err = apply(capsys, *arguments)
    assert got == code, err
    assert words in err and "Traceback" not in err and not out


def test_the_policy_and_the_prompt_cannot_share_stdin():
    with pytest.raises(kvpolicy.UsageError, match="both come from stdin"):
        read_prompt(None, Path("-"), "builtin:tiny", "-")


def test_what_the_runtime_cannot_do_is_refused_before_anything_runs(tmp_path, capsys):
    file = tmp_path / "shared.yaml"
    file.write_text("kvpolicy: 1\nname: x\npools: {all: {admit: all, budget: 64, evict: {scope: across-heads}}}\n")
    code, out, err = apply(capsys, str(file), *TINY)
    assert (code, out) == (2, "") and "cannot do yet: pool all: evict scope across-heads while generating" in err


def test_a_missing_extra_is_5(monkeypatch, capsys, tmp_path):
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr("kvpolicy.models.gguf.find_spec", lambda name: None)
    code, _, err = apply(capsys, "raas", str(tmp_path / "model.gguf"), "-p", "x")
    assert code == 5 and "kvpolicy[gguf]" in err


def test_an_unsupported_architecture_is_refused_by_name(tmp_path, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    ).save_pretrained(tmp_path)
    load_model("builtin:tiny", device="cpu")[1].save_pretrained(tmp_path)
    code, _, err = apply(capsys, "raas", str(tmp_path), "-p", "hum owl")
    assert code == 4 and "gpt2" in err and "llama" in err and "Traceback" not in err


def test_a_family_that_nobody_knows_runs_with_generic_and_says_so(tmp_path, capsys):
    from kvpolicy.testing.models import random_model

    random_model("bitnet", vocab_size=256).save_pretrained(tmp_path)
    load_model("builtin:tiny", device="cpu")[1].save_pretrained(tmp_path)
    given = ("h2o", str(tmp_path), "-p", "hum owl", "-n", "12", "--set", "heavy=4", "--set", "recent=4")
    code, _, err = apply(capsys, *given)
    assert code == 4 and "'bitnet'" in err and "--generic" in err
    code, out, err = apply(capsys, *given, "--generic")
    assert code == 0 and "UNTESTED: kvpolicy does not know models of type bitnet" in err and "Warning" not in err
    assert "does not know models of type bitnet" in out
    code, out, _ = apply(capsys, *given, "--generic", "--json")
    assert json.loads(out)["untested_type"] == "bitnet"


# SmolLM2 ---------------------------------------------------------------------------------------------------------


@pytest.mark.smollm2
@pytest.mark.parametrize(
    "policy",
    [
        ["raas", "--set", "budget=64", "--set", "page_size=4"],
        ["scope-discontinuous", "--set", "alpha=24", "--set", "beta1=8", "--set", "beta2=8"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_real_model_writes_under_both_papers_policies(policy, capsys):
    prompt = "Tell me a long story about a lighthouse keeper and the sea."
    words = [*policy, "builtin:smollm2", "-p", prompt, "-n", "64", "--json", "--device", "cpu", "--must-evict"]
    code, out, err = apply(capsys, *words)
    assert code == 0, err
    account = json.loads(out)
    assert account["evicted"] > 0 and account["cache_bytes"] == account["planned_cache_bytes"]
    assert len(set(account["token_ids"])) > 15  # text, not one word over and over
