"""A pretrained model as a HybridMem folder with the same logits."""

from pathlib import Path

from rich.progress import track

from hybridmem.convert import convert_folder


def convert(
    model: str,
    output: Path,
    attention_window: int | None = None,
    num_sink_tokens: int | None = None,
    head_source: list[list[str]] | str | None = None,
    memory_depth: int | None = None,
    allocation: Path | None = None,
) -> None:
    """Convert a pretrained model of the families Llama, Mistral, Qwen2 or Qwen3.

    Args:
        model: a Hugging Face folder or name; with an allocation it may be converted already.
        output: the folder to write; it must be empty or absent.
        attention_window: tokens that heads see which do not read everything; by default the allocation's, or 256.
        num_sink_tokens: first tokens of a document that these heads see too; by default the allocation's, or 4.
        head_source: full, memory or none for all heads, or a list of these for each layer and KV head; by default full.
        memory_depth: layers of each memory; 1, the default, is linear.
        allocation: a file of head sources, in place of head_source.
    """
    convert_folder(
        model, output, attention_window, num_sink_tokens, head_source, memory_depth, allocation,
        track=lambda shards: track(shards, "writing weights"),
    )  # fmt: skip
    print(f"wrote {output}")
