"""What a policy keeps, step by step: the same code in one process and on each of several ranks. Also what a rank runs:

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.ranks.following FOLDER
"""

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import kvpolicy
from kvpolicy.attention import Formula, Rotation
from kvpolicy.cli.main import main
from kvpolicy.errors import KvpolicyError, ModelError
from kvpolicy.language import Policy, loads_policy
from kvpolicy.models.load import sharding
from kvpolicy.patching import cache_for, compile_report, patch_of
from kvpolicy.plan import ModelGeometry, make_plan
from kvpolicy.runtime import PolicyCache, decode_loop
from kvpolicy.runtime.ranks import ALONE, Ranks

GEOMETRY = ModelGeometry("random", layers=2, query_heads=8, kv_heads=4, head_dim=8)
PROMPT, STEPS, ROWS = 19, 30, 2


def model(kv_heads=4, heads=8):
    """A random model whose attention is far from uniform, so that what is evicted shows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=8, max_position_embeddings=512, initializer_range=0.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompts():
    """Ids [ROWS, PROMPT], the second row padded on the left, and their mask."""
    ids = torch.randint(2, 97, (ROWS, PROMPT), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return ids * mask, mask


def kept(cache):
    """Positions held, by layer, row and head: those that lie here."""
    return [
        [[sorted(p for p in head if p >= 0) for head in row] for row in cache.positions(layer).tolist()]
        for layer in range(len(cache.governed))
    ]


@torch.no_grad()
def follow(model, policy, compile=None, second=0):
    """Tokens that a model chooses under a policy, and what it keeps after every pass; then a second turn of so many
    prompt tokens."""
    ids, mask = prompts()
    extra = torch.randint(2, 97, (ROWS, second), generator=torch.Generator().manual_seed(4))
    with kvpolicy.applied(model, policy, compile=compile):
        lengths = (PROMPT - 5, PROMPT + second)
        turns = 1 + (second > 0)
        cache = cache_for(model, prompt=lengths, max_new_tokens=2 * STEPS, batch=ROWS, turns=turns)
        tokens, held, logits = [], [], []
        for new, steps in ((ids, STEPS), (extra, STEPS // 2 if second else 0)):
            for _ in range(steps):
                if new is not ids:
                    mask = torch.cat([mask, mask.new_ones(ROWS, new.shape[1])], dim=1)
                places = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
                out = model(new, attention_mask=mask, position_ids=places, past_key_values=cache, logits_to_keep=1)
                new = out.logits[:, -1:].argmax(-1)
                tokens.append(new[:, 0].tolist())
                logits.append(out.logits[:, -1].tolist())
                held.append(kept(cache))
        report = compile_report(model)
        return {
            "heads": list(cache.ranks.heads(cache.plan.geometry.kv_heads)),
            "tokens": tokens,
            "kept": held,
            "logits": logits,
            "stats": cache.stats(everywhere=True),
            "bytes": [cache.bytes, cache.own.bytes],
            "graphs": [report.graphs, report.graph_breaks, report.recompiles],
        }


def follow_numbers(policy, ranks=ALONE):
    """What a cache keeps of queries, keys and values that are the same to the last bit however many ranks there are."""
    shape = GEOMETRY
    plan = make_plan(policy, shape, batch=ROWS, prompt=PROMPT, max_new_tokens=STEPS)
    cache = PolicyCache(plan, rotation=Rotation.none(), ranks=ranks)
    numbers = torch.Generator().manual_seed(5)
    heads = ranks.heads(shape.kv_heads)
    some = {shape.kv_heads: slice(heads.start, heads.stop)}
    some[shape.query_heads] = slice(heads.start * shape.group, heads.stop * shape.group)
    held = []
    for columns in (PROMPT, *[1] * STEPS):
        cache.begin(columns)
        for layer in cache.layers:
            given = [
                torch.randn(ROWS, count, columns, shape.head_dim, generator=numbers)[:, some[count]]
                for count in (shape.query_heads, shape.kv_heads, shape.kv_heads)
            ]
            layer.forward(*given, Formula(1.0))
        cache.finish()
        held.append(kept(cache))
    return held


def generate(model, policy):
    """Texts by way of ``generate``: greedy, sampled, and by the lean loop."""
    ids, mask = prompts()
    texts = []
    with kvpolicy.applied(model, policy):
        for options in ({"do_sample": False}, {"do_sample": True}, {"do_sample": True, "custom_generate": decode_loop}):
            torch.manual_seed(7)
            given = {"attention_mask": mask, "max_new_tokens": STEPS, **options}
            texts.append(model.generate(ids, **given).tolist())
    return texts


def refusal(path, policy):
    """The sentence with which a sharded model is refused; the class of the error before it."""
    try:
        kvpolicy.apply(sharded(path), policy)
    except KvpolicyError as fault:
        return f"{type(fault).__name__}: {fault}"
    return "taken"


def command(arguments):
    """What a command of the command line prints here, and its exit code."""
    said = io.StringIO()
    with redirect_stdout(said):
        code = main(["--quiet", *arguments])
    return [code, said.getvalue()]


def follow_family(path, policy):
    """``follow``, of a sharded model of another family; None where transformers itself cannot run it sharded, and where
    kvpolicy refuses it, why."""
    ready = sharded(path)
    try:
        plain = unpatched(ready)
    except RuntimeError:
        return None
    try:
        return {**follow(ready, policy), "plain": plain}
    except ModelError as fault:
        return {"refused": str(fault)}


def unpatched(model):
    """The likeliest token after each of the prompt's, without a policy."""
    ids, mask = prompts()
    with torch.no_grad():
        return model(ids[mask.all(1)]).logits.argmax(-1).tolist()


def sharded(path):
    """The model in a folder, as transformers shards it over all ranks."""
    return AutoModelForCausalLM.from_pretrained(path, **sharding()).eval()


def run(folder):
    """All that a rank is asked to do in the folder's ``job.json``; the answers go into ``rank<n>.json``."""
    job = json.loads((folder / "job.json").read_text())
    policies: dict[str, Policy] = {name: loads_policy(text, filename=name) for name, text in job["policies"].items()}
    dist.init_process_group("gloo")
    logging.disable_progress_bar()
    shared = sharded(folder / "model")
    ranks = Ranks.of(dist.group.WORLD)
    done = {
        "heads": list(ranks.heads(GEOMETRY.kv_heads)),
        "families": {
            family: follow_family(folder / family, policies[name]) for family, name in job.get("families", {}).items()
        },
        "follow": {name: follow(shared, policies[name], **how) for name, how in job.get("follow", {}).items()},
        "numbers": {name: follow_numbers(policies[name], ranks) for name in job.get("numbers", ())},
        "generate": {name: generate(shared, policies[name]) for name in job.get("generate", ())},
        "refused": [refusal(folder / name, policies[policy]) for name, policy in job.get("refused", ())],
        "commands": [command(arguments) for arguments in job.get("commands", ())],
        "left": [*sorted(name for name in vars(shared) if "kvp" in name), shared.config._attn_implementation],
    }
    with kvpolicy.applied(shared, next(iter(policies.values()))):
        assert patch_of(shared).ranks == ranks
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(done))
    dist.destroy_process_group()


if __name__ == "__main__":
    run(Path(sys.argv[1]))
