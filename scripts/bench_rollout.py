"""Seconds of a rollout of configs/rl/recall.yaml: 128 prompts, 8 responses to each, from an untrained model.

    python scripts/bench_rollout.py [--rounds 5] [--precision bfloat16]

To compare two versions of the package, run the script in turn with PYTHONPATH set to each.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import yaml

from hybridmem import HybridMemConfig, HybridMemForCausalLM
from hybridmem.rl.rollouts.prompts import pad_prompts
from hybridmem.rl.rollouts.sampling import Sampling, prefill, sample
from hybridmem.tasks import Recall
from hybridmem.training.allocator import keep_freed_memory

CONFIGS = Path(__file__).parents[1] / "configs" / "rl"
PAD, END = 256, 258


def main() -> None:
    """Time prefill and whole rollouts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="bfloat16: by autocast")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    warmup, settings = (yaml.safe_load((CONFIGS / name).read_text()) for name in ("recall_warmup.yaml", "recall.yaml"))
    model = HybridMemForCausalLM(HybridMemConfig(**warmup["model"]["init_args"]["config"])).eval()
    data, responses = settings["data"]["init_args"], settings["model"]["init_args"]["num_generations"]
    task = Recall(**data["task"]["init_args"])
    texts = [task.example("train", n)["prompt"] for n in range(data["batch_size"])]
    prompts = pad_prompts([list(text.encode()) for text in texts], PAD, torch.device("cpu"))
    sampling = Sampling(max_completion_length=task.max_completion_length)
    parts: dict[str, list[float]] = {"prefill": [], "rollout": []}
    for _ in range(arguments.rounds + 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bfloat16"):
            began = clock()
            with torch.no_grad():
                prefill(model, prompts, responses)
            between = clock()
            sample(model, prompts, responses, sampling, [END], PAD)
        parts["prefill"].append(between - began)
        parts["rollout"].append(clock() - between)
    medians = {name: statistics.median(values[1:]) for name, values in parts.items()}
    decoding = medians["rollout"] - medians["prefill"]
    print(
        f"prompts {tuple(prompts.input_ids.shape)} tokens {sampling.max_completion_length}: "
        f"rollout {medians['rollout'] * 1e3:.1f} ms, prefill {medians['prefill'] * 1e3:.1f} ms, "
        f"decoding {decoding * 1e3:.1f} ms"
    )


if __name__ == "__main__":
    main()
