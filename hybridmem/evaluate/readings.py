"""Reading of a text by a model: strongest reads, gates and surprise, by layer and head."""

from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor


@dataclass
class Reads:
    """Strongest reads of every head and token; the first head is the mean of the others."""

    heads: list[str]
    places: Int[Tensor, "heads tokens top"]  # of the tokens that are read
    weights: Float[Tensor, "heads tokens top"]
    total: Float[Tensor, "heads tokens"]  # on all tokens, 0 where a head reads none


@dataclass
class Series:
    """Values of every head at consecutive tokens; the first head is the mean of the others."""

    name: str
    heads: list[str]
    values: Float[Tensor, "heads some_tokens"]
    start: int = 0  # the token of the first number


@dataclass
class LayerReading:
    """Reads and gates of one layer."""

    number: int
    variant: str
    sources: list[str] = field(default_factory=list)  # of each query head in `mah`
    reads: dict[str, Reads] = field(default_factory=dict)  # attention, memory
    series: list[Series] = field(default_factory=list)


@dataclass
class Reading:
    """A model's reading of a prompt and of its own continuation."""

    ids: Int[Tensor, " tokens"]
    prompt_length: int
    nats: Float[Tensor, " predicted"]  # of every token except the first
    layers: list[LayerReading]
