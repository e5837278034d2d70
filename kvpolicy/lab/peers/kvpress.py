"""Tokens per second beside kvpress's DecodingPress: the same weights, the same budget, the same rule, taking turns.

    python -m kvpolicy.lab.peers.kvpress --budget 1024 --rounds 12

kvpress needs an older transformers, so it gets an environment of its own, which this script makes once (it fetches
kvpress and torch by name), and a process per arm that answers over a pipe. The rule is Knorm (arXiv:2406.11430), which
both sides can say: drop the keys of the largest norm down to the budget, at every step or at every sixteenth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs
import torch
from safetensors.torch import save_model

from kvpolicy.lab.bench.environment import environment
from kvpolicy.lab.bench.models import random_model, random_tokens, twin
from kvpolicy.language import loads_policy
from kvpolicy.patching import apply, cache_for
from kvpolicy.runtime.stepping import Stepper

KVPRESS = "0.5.5"
BLOCK = 16  # steps: one whole round of the slower cadence
KNORM = """
kvpolicy: 1
name: knorm
params: {{budget: {{default: {budget}, help: tokens kept}}}}
pools:
  all: {{admit: all, budget: budget, scorer: {{signal: key-norm, weight: -1}}, update: {{every: {every}}}}}
"""


@dataclass
class Arm:
    """One way to decode; ``seconds`` of blocks of BLOCK steps."""

    name: str
    seconds: list[float] = field(default_factory=list)

    def block(self) -> float:
        raise NotImplementedError

    @property
    def ms(self) -> float:
        """Median milliseconds per step, updates included as often as they come."""
        return 1e3 * statistics.median(self.seconds) / BLOCK


class Theirs(Arm):
    """A process in kvpress's environment."""

    def __init__(self, name: str, python: Path, *arguments: object) -> None:
        super().__init__(name)
        worker = Path(__file__).with_name("kvpress_worker.py")
        command = [str(python), "-P", str(worker), *(str(argument) for argument in arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()
        self.ask(do="prompt")

    def ask(self, **order: object) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}; its error is above")
        said: dict[str, Any] = json.loads(line)
        return said

    def block(self) -> float:
        return float(self.ask(do="steps", count=BLOCK)["seconds"])

    def close(self) -> None:
        self.process.kill()


class Ours(Arm):
    """A policy on the same weights, compiled, in the project's own loop."""

    def __init__(self, name: str, model: Any, every: int, budget: int, prompt: torch.Tensor, steps: int) -> None:
        super().__init__(name)
        patched = apply(twin(model), loads_policy(KNORM.format(budget=budget, every=every)), compile=True)
        self.cache = cache_for(patched, prompt=prompt.shape[1], max_new_tokens=steps)
        patched(prompt, past_key_values=self.cache, logits_to_keep=1)
        self.stepper = Stepper(patched, self.cache)
        self.token = torch.full((1, 1), 7)

    def block(self) -> float:
        start = time.perf_counter()
        for _ in range(BLOCK):
            self.token = self.stepper.step(self.token).argmax(-1, keepdim=True)
        return time.perf_counter() - start


def default_environment() -> Path:
    """Where kvpress's environment is made unless another folder is given."""
    return Path(platformdirs.user_cache_dir("kvpolicy")) / "peers" / f"kvpress-{KVPRESS}"


def environment_of_kvpress(folder: Path) -> Path:
    """The python of kvpress's environment, made if it is not there.

    Raises:
        SystemExit: it could not be made, with pip's own reason above.
    """
    python = folder / "bin" / "python"
    if python.exists() and not subprocess.run([python, "-c", "import kvpress"], capture_output=True).returncode:
        return python
    print(f"making an environment for kvpress {KVPRESS} in {folder}", file=sys.stderr)
    version = torch.__version__.partition("+")[0]
    try:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for package in (f"torch=={version}", f"kvpress=={KVPRESS}"):
            subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"no environment for kvpress could be made ({error}); give one that has it with --env"
        ) from None
    return python


@torch.no_grad()
def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Every arm in turn, ``options.rounds`` blocks each."""
    python = environment_of_kvpress(options.env)
    torch.set_num_threads(options.threads)
    model = random_model("smollm2-135m", layers=options.layers, dtype="float32", device=torch.device("cpu"))
    prompt = random_tokens(model, 1, options.budget)
    steps = (options.rounds + 3) * BLOCK
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        save_model(model, f"{folder}/model.safetensors")
        torch.save(prompt, f"{folder}/prompt.pt")
        arms: list[Arm] = [Theirs("full cache, theirs", python, folder, options.threads, 0, 0, options.budget)]
        for every in (16, 1):
            given = (folder, options.threads, every, options.budget, options.budget)
            arms.append(Theirs(f"kvpress, every {every}", python, *given))
            arms.append(Ours(f"kvpolicy, every {every}", model, every, options.budget, prompt, steps))
        for _ in range(2):  # compilation, and the first updates
            for arm in arms:
                arm.block()
        for done in range(options.rounds):
            print(f"\rround {done + 1} of {options.rounds}", end="", file=sys.stderr)
            for arm in arms:
                arm.seconds.append(arm.block())
        print(file=sys.stderr)
        return {"rows": [_row(arm, arms) for arm in arms], "environment": environment(torch.device("cpu"))}


def _row(arm: Arm, arms: list[Arm]) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": arm.name, "ms": arm.ms, "tokens_per_second": 1e3 / arm.ms}
    if isinstance(arm, Theirs):
        row["tokens"] = arm.ask(do="stats")["tokens"]
        arm.close()
        return row
    assert isinstance(arm, Ours)
    stats = arm.cache.stats()
    if not stats["evicted"]:
        raise SystemExit(f"{arm.name} evicted nothing, so it says nothing; give more --rounds")
    theirs = next(other for other in arms if other.name == arm.name.replace("kvpolicy", "kvpress"))
    return row | {"tokens": stats["resident"], "evicted": stats["evicted"], "times_kvpress": theirs.ms / arm.ms}


def main() -> None:
    """Measure, print, and keep the numbers with ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--env", type=Path, default=default_environment(), help="a virtual environment with kvpress, made if missing"
    )
    parser.add_argument("--budget", type=int, default=1024, help="tokens kept, and tokens of the prompt")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=12, help="blocks of 16 steps of each arm")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    result = compare(options)
    for row in result["rows"]:
        times = f"  {row['times_kvpress']:.2f} x kvpress" if "times_kvpress" in row else ""
        print(f"{row['arm']:20} {row['ms']:8.2f} ms/step {row['tokens_per_second']:7.1f} tokens/s"
              f"  {row['tokens']} tokens resident{times}")  # fmt: skip
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
