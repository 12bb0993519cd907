"""A pretrained model as a HybridMem folder with the same logits."""

from pathlib import Path

from rich.progress import track

from hybridmem.convert import convert_folder


def convert(
    model: str,
    output: Path,
    attention_window: int = 256,
    num_sink_tokens: int = 4,
    head_source: list[list[str]] | str = "full",
    memory_depth: int = 1,
) -> None:
    """Convert a pretrained model of the families Llama, Mistral, Qwen2 or Qwen3.

    Args:
        model: a Hugging Face folder or name.
        output: the folder to write; it must be empty or absent.
        attention_window: tokens that heads see which do not read everything.
        num_sink_tokens: first tokens of a document that these heads see too.
        head_source: full, memory or none for all heads, or a list of these for each layer and KV head.
        memory_depth: layers of each memory; 1 is linear.
    """
    convert_folder(
        model, output, attention_window, num_sink_tokens, head_source, memory_depth,
        track=lambda shards: track(shards, "writing weights"),
    )  # fmt: skip
    print(f"wrote {output}")
