"""The other side of ``kvpolicy.lab.peers.kvpress``: runs in kvpress's own environment and imports nothing of ours.

Reads one JSON object a line and answers each with one: {"do": "prompt"} reads the prompt, {"do": "steps", "count": n}
decodes n tokens and gives the seconds that they took together, {"do": "stats"} says how many tokens the cache holds.
"""

import json
import sys
import time
from contextlib import nullcontext

import torch
from kvpress import DecodingPress, KnormPress
from safetensors.torch import load_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache


def main() -> None:
    """One arm: ``worker FOLDER THREADS INTERVAL TARGET PROMPT``; an interval of 0 is the full cache without a press."""
    folder, threads, interval, target, prompt = sys.argv[1], *(int(text) for text in sys.argv[2:])
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="sdpa").eval()
    load_model(model, f"{folder}/model.safetensors", strict=False)
    press = DecodingPress(KnormPress(), compression_interval=interval, target_size=target) if interval else None
    cache = DynamicCache(config=model.config)
    token = torch.full((1, 1), 7)
    answer({"ready": True})
    with torch.no_grad(), press(model) if press else nullcontext():
        for line in sys.stdin:
            order = json.loads(line)
            if order["do"] == "prompt":
                model(torch.load(f"{folder}/prompt.pt")[:, :prompt], past_key_values=cache, logits_to_keep=1)
                answer({})
            elif order["do"] == "steps":
                start = time.perf_counter()
                for _ in range(order["count"]):
                    token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
                answer({"seconds": time.perf_counter() - start})
                if press is None:
                    cache.crop(prompt)
            else:
                answer({"tokens": cache.layers[0].keys.shape[2]})


def answer(said: dict) -> None:
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
