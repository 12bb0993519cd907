"""`hybridmem convert`: conversion of a pretrained model to a HybridMem folder with the same logits."""

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
    """Convert a pretrained Llama, SmolLM2, Mistral, Qwen2 or Qwen3 model to a HybridMem folder.

    Args:
        model: Hugging Face folder or name; an already converted model is accepted with an allocation.
        output: folder to write, which must be empty or absent.
        attention_window: window in tokens of heads without full attention. None: the allocation's, or 256.
        num_sink_tokens: number of sink tokens at the start of a document that these heads also see. None: the
            allocation's, or 4.
        head_source: full, memory or none for all heads, or a list of these for each layer and KV head. None: full.
        memory_depth: number of layers of each memory. None: 1, a linear memory.
        allocation: file of head sources, in place of head_source.
    """
    convert_folder(
        model,
        output,
        attention_window,
        num_sink_tokens,
        head_source,
        memory_depth,
        allocation,
        track=lambda shards: track(shards, "writing weights"),
    )
    print(f"wrote {output}")
