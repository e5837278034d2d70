"""The other side of ``kvpolicy.lab.peers.kvpress_sets``: runs in kvpress's own environment and imports nothing of ours.

``worker FOLDER``: reads a model, and in order.json a prompt and presses; writes the prompt's queries, keys and values
as every press saw them (seen.safetensors), and the positions that each press keeps, by layer and KV head (kept.json).
"""

import json
import sys
from pathlib import Path
from typing import Any

import kvpress
import torch
from kvpress.utils import get_prerope_query_states
from safetensors.torch import load_model, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.models.llama.modeling_llama import rotate_half

NEEDS_MAPS = ("ObservedAttentionPress",)


def main() -> None:
    folder = Path(sys.argv[1])
    order = json.loads((folder / "order.json").read_text())
    prompt = torch.tensor([order["prompt"]])
    models = {kind: loaded(folder, kind) for kind in ("sdpa", "eager")}
    full = DynamicCache(config=models["sdpa"].config)
    queries = watched(models["sdpa"], prompt, full)
    keys, values = ([getattr(layer, what)[0] for layer in full.layers] for what in ("keys", "values"))
    seen = {"queries": torch.stack(queries), "keys": torch.stack(keys), "values": torch.stack(values)}
    save_file({name: tensor.contiguous() for name, tensor in seen.items()}, folder / "seen.safetensors")
    kept = [kept_by(models, case, prompt, keys) for case in order["cases"]]
    (folder / "kept.json").write_text(json.dumps(kept))


def loaded(folder: Path, attention: str) -> torch.nn.Module:
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    load_model(model, folder / "model.safetensors", strict=False)
    return model


@torch.no_grad()
def watched(model: Any, prompt: torch.Tensor, cache: DynamicCache) -> list[torch.Tensor]:
    """Reads the prompt without a press and gives every layer's rotated queries [Q, N, D]."""
    queries = []

    def look(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        states = get_prerope_query_states(module, kwargs["hidden_states"])
        cos, sin = (part.unsqueeze(1) for part in kwargs["position_embeddings"])
        queries.append((states * cos + rotate_half(states) * sin)[0])

    hooks = [layer.self_attn.register_forward_pre_hook(look, with_kwargs=True) for layer in model.model.layers]
    model(prompt, past_key_values=cache)
    for hook in hooks:
        hook.remove()
    return queries


@torch.no_grad()
def kept_by(models: dict, case: dict, prompt: torch.Tensor, keys: list[torch.Tensor]) -> list[list[list[int]]]:
    """Positions that a press keeps, by layer and KV head: those whose keys it leaves, and does not mask."""
    press = built(case)
    model = models["eager" if case["press"] in NEEDS_MAPS else "sdpa"]
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    cache = DynamicCache(config=model.config)
    with press(model):
        model(prompt, past_key_values=cache)
    kept = []
    for layer, cached, full in zip(model.model.layers, cache.layers, keys, strict=True):
        heads = [
            {int(place) for place in torch.cdist(left, all_).argmin(-1)}
            for left, all_ in zip(cached.keys[0], full, strict=True)
        ]
        masked = layer.self_attn.masked_key_indices
        if masked is not None:
            for head, place in zip(masked[1].tolist(), masked[2].tolist(), strict=True):
                heads[head].discard(place)
        kept.append([sorted(head) for head in heads])
    return kept


def built(case: dict) -> Any:
    """The press of a case; one that wraps another gives it the ratio."""
    press = getattr(kvpress, case["press"])
    if case["of"] is None:
        return press(compression_ratio=case["ratio"], **case["arguments"])
    inner = getattr(kvpress, case["of"]["press"])(compression_ratio=case["ratio"], **case["of"]["arguments"])
    return press(press=inner, **case["arguments"])


if __name__ == "__main__":
    main()
