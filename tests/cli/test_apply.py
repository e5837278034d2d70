"""`kvpolicy apply`: text, account, exit codes; on the model that ships, and on SmolLM2."""

import json

import pytest

from kvpolicy.cli.main import main

KEYS = {
    "schema_version", "policy", "model", "prompt_tokens", "new_tokens", "text", "token_ids", "evicted", "resident_peak",
    "resident_bound", "cache_bytes", "planned_cache_bytes", "dense_cache_bytes", "tokens_per_second", "graphs",
    "graph_breaks", "recompiles",
}  # fmt: skip


def apply(capsys, *arguments):
    code = main(["apply", *arguments])
    return code, *capsys.readouterr()


TINY = ["builtin:tiny", "-n", "40", "--device", "cpu"]


@pytest.mark.parametrize(
    "policy",
    [
        ["raas", "--set", "budget=48", "--set", "page_size=4", "-p", "owl red tin sky fog hum hum hum hum owl"],
        ["scope-discontinuous", "--set", "alpha=16", "--set", "beta1=8", "--set", "beta2=8"],
        ["h2o"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_json_accounts_for_everything(policy, capsys):
    code, out, err = apply(capsys, *policy, *TINY, "--json", "--compare-dense")
    assert code == 0, err
    account = json.loads(out)
    assert account.keys() >= KEYS
    assert account["new_tokens"] == len(account["token_ids"]) <= 40
    assert account["cache_bytes"] == account["planned_cache_bytes"]
    assert account["resident_peak"] >= 1 and account["evicted"] > 0
    assert 0 <= account["agreement"]["top1"] <= 1
    assert (account["graphs"], account["graph_breaks"], account["recompiles"]) == (0, 0, 0)


def test_the_full_cache_agrees_with_itself(capsys):
    _, out, _ = apply(capsys, "dense", *TINY, "--json", "--compare-dense")
    account = json.loads(out)
    assert account["agreement"]["top1"] == 1.0 and account["evicted"] == 0


def test_a_reader_sees_text_then_table(capsys):
    code, out, err = apply(capsys, "tova", "--set", "budget=24", *TINY)
    assert code == 0
    for word in ("pool", "kept", "evicted", "peak", "bound", "as planned", "tokens/s", "compiled     no"):
        assert word in out
    assert "not compiled: on a CPU" in err


def test_a_policy_that_never_fires_says_so(capsys):
    _, _, err = apply(capsys, "window", *TINY)
    assert "nothing was evicted" in err


def test_one_seed_one_text(capsys):
    arguments = ["window", *TINY, "--temperature", "1.5", "--json"]
    texts = [json.loads(apply(capsys, *arguments, "--seed", seed)[1])["token_ids"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_compiled_steps_are_counted(capsys):
    _, out, err = apply(capsys, "window", "--set", "window=16", *TINY, "--compile", "--json")
    account = json.loads(out)
    assert (account["graphs"], account["graph_breaks"], account["recompiles"]) == (1, 0, 0)
    assert "compiled, as asked" in err


def test_a_saved_model_brings_its_policy_back(tmp_path, capsys):
    import kvpolicy

    code, _, _ = apply(capsys, "window", "--set", "window=16", *TINY, "--save", str(tmp_path / "kept"))
    assert code == 0
    model = kvpolicy.from_pretrained(tmp_path / "kept")
    assert model.config.kv_policy["name"] == "window"
    code, out, _ = apply(capsys, "dense", str(tmp_path / "kept"), "-p", "owl red", "-n", "4", "--json")
    assert code == 0 and json.loads(out)["new_tokens"] == 4


def test_prompts_come_from_files_and_stdin(tmp_path, capsys, monkeypatch):
    import io

    file = tmp_path / "prompt.txt"
    file.write_text("owl red tin hum owl")
    counts = []
    for source in (["-p", "owl red tin hum owl"], ["-f", str(file)]):
        counts.append(json.loads(apply(capsys, "dense", *TINY, *source, "--json")[1])["prompt_tokens"])
    monkeypatch.setattr("sys.stdin", io.StringIO("owl red tin hum owl"))
    counts.append(json.loads(apply(capsys, "dense", *TINY, "-f", "-", "--json")[1])["prompt_tokens"])
    assert len(set(counts)) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["raas", "-p", "x", "-f", "y"], 2, "-p and -f both give a prompt"),
        (["raas", "-f", "/no/such/file"], 2, "cannot read the prompt from /no/such/file"),
        (["raas", "-p", "  "], 2, "the prompt is empty"),
        (["raas", "-n", "0"], 2, "max-new-tokens"),
        (["rass"], 3, "raas"),
        (["raas", "--set", "bugdet=3"], 3, "budget"),
        (["raas", "--set", "budget=40"], 2, "raas keeps at most 40 tokens in all"),
        (["raas", "builtin:huge", "-p", "x"], 4, "builtin:tiny"),
        (["raas", "--device", "cuda:7"], 2, "cuda:7"),
        (["raas", "--dtype", "int7"], 2, "int7"),
        (["raas", "--chat"], 2, "no chat template"),
        (["window", "-n", "100000"], 4, "positions"),
        (["window", "--save", "/proc/nowhere"], 2, "cannot save to /proc/nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_get_a_sentence_and_their_exit_code(arguments, code, words, capsys):
    got, _, err = apply(capsys, *arguments)
    assert got == code, err
    assert words in err and "Traceback" not in err


def test_an_unsupported_architecture_is_refused_by_name(tmp_path, capsys):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from kvpolicy.models import load_model

    GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    ).save_pretrained(tmp_path)
    tokenizer: AutoTokenizer = load_model("builtin:tiny", device="cpu")[1]
    tokenizer.save_pretrained(tmp_path)
    code, _, err = apply(capsys, "raas", str(tmp_path), "-p", "owl red")
    assert code == 4 and "gpt2" in err and "llama" in err and "Traceback" not in err


@pytest.mark.smollm2
@pytest.mark.parametrize(
    "policy",
    [
        ["raas", "--set", "budget=96"],
        ["scope-discontinuous", "--set", "alpha=24", "--set", "beta1=8", "--set", "beta2=8"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_real_model_writes_under_both_papers_policies(policy, capsys):
    prompt = "Write one sentence about the sea, and then one about the mountains."
    code, out, err = apply(capsys, *policy, "builtin:smollm2", "-p", prompt, "-n", "64", "--json", "--device", "cpu")
    assert code == 0, err
    account = json.loads(out)
    assert account["evicted"] > 0 and account["cache_bytes"] == account["planned_cache_bytes"]
    assert len(set(account["token_ids"])) > 15  # text, not one word over and over
