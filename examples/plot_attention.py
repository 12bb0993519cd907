"""Record and plot attention, and the attention that a memory implies.

    python examples/plot_attention.py --model runs/examples/text --layer 1 --output attention.png

Any causal language model of transformers has the first panel; a layer with a memory has all three.
"""

import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hybridmem  # noqa: F401  registers its models with transformers
from hybridmem.cli.console import run_script
from hybridmem.rl import AttentionRecorder
from hybridmem.rl.attention.distributions import allocation, attention, memory

TEXT = "def area(width, height):\n    return width * height\n\nprint(area(3, 4))\n"


def main(model: str, layer: int = -1, text: str = TEXT, output: str = "attention.png"):
    """Record one layer and draw it.

    Args:
        model: folder or name of a causal language model.
        layer: index of the layer; negative ones count from the end.
        text: text to read.
        output: image file to write.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    lm = AutoModelForCausalLM.from_pretrained(model).eval()
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad(), AttentionRecorder(lm, layers=[layer]) as recorder:
        lm(ids)
    (record,) = recorder.records.values()
    queries = ids.shape[1]

    maps = {"attention": attention(record, queries)}
    if record.memory is not None and record.memory_depth == 1:
        maps["implied by the memory"] = memory(record, queries)
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    for panel, (title, weights) in zip(panels, maps.items(), strict=False):
        panel.imshow(weights[0], vmax=0.3, cmap="Blues")
        panel.set(title=title, xlabel="token read before", ylabel="token")
    if record.gate is not None:
        shares = allocation(record, queries)[0]
        panels[2].plot(shares[:, 1], label="memory")
        panels[2].plot(shares[:, 2], label="window")
        panels[2].set(title="the gate's shares", xlabel="token", ylim=(0, 1))
        panels[2].legend()
    for panel in panels:
        panel.set_visible(panel.has_data())
    figure.savefig(output, dpi=150)
    print(f"wrote {output}")


if __name__ == "__main__":
    run_script(main)
