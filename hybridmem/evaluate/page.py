"""Self-contained HTML page of readings: text, reads, gates and surprise."""

import base64
import html
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hybridmem.data.tokenizer import token_bytes

from .readings import LayerReading, Reading, Reads, Series

TEMPLATE = Path(__file__).with_name("page.html")
PLACE = re.compile("@(title|data)@")
STEPS = 255  # of a quantised number
MOST_TOKENS = 1 << 16  # places are written as 16 bits


class Numbers:
    """Byte arrays that a page stores compressed, each as an offset and a length."""

    def __init__(self) -> None:
        self.content = bytearray()

    def add(self, values: np.ndarray) -> list[int]:
        """Append an array; return its offset and length in bytes."""
        written = values.tobytes()
        self.content += written
        return [len(self.content) - len(written), len(written)]

    def packed(self) -> str:
        """Return all arrays, compressed and in base64."""
        return base64.b64encode(zlib.compress(bytes(self.content), 9)).decode()


def write_page(readings: list[tuple[str, Reading, PreTrainedTokenizerBase]], title: str, path: Path) -> None:
    """Write the page of one or two named readings."""
    models = [_model(*each) for each in readings]
    data = json.dumps(models, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"title": html.escape(title), "data": data}
    page = PLACE.sub(lambda found: parts[found[1]], TEMPLATE.read_text(encoding="utf-8"))
    path.write_text(page, encoding="utf-8")


def _model(name: str, reading: Reading, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    numbers = Numbers()
    layers = [_layer(layer, numbers) for layer in reading.layers]
    return {
        "name": name,
        "tokens": token_texts(tokenizer, reading.ids.tolist()),
        "prompt": reading.prompt_length,
        "nats": [round(nats, 2) for nats in reading.nats.tolist()],
        "layers": layers,
        "numbers": numbers.packed(),
    }


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Return the text of each token; incomplete characters are written as escaped bytes, special tokens by name."""
    pieces = token_bytes(tokenizer)
    texts = []
    for token in ids:
        piece = pieces[token] if token < len(pieces) else b""
        name = tokenizer.convert_ids_to_tokens(token) or f"<{token}>"
        texts.append(piece.decode(errors="backslashreplace") if piece else name)
    return texts


def _layer(layer: LayerReading, numbers: Numbers) -> dict[str, Any]:
    return {
        "number": layer.number,
        "variant": layer.variant,
        "sources": layer.sources,
        "reads": {kind: _reads(reads, numbers) for kind, reads in layer.reads.items()},
        "series": [_series(series, numbers) for series in layer.series],
    }


def _reads(reads: Reads, numbers: Numbers) -> dict[str, Any]:
    """Write square roots of weights as bytes, so that small weights keep their precision."""
    places = reads.places.numpy().astype("<u2")
    low, high = places & 255, places >> 8  # bytes of one kind compress better
    return {
        "heads": reads.heads,
        "top": reads.places.shape[2],
        "low": numbers.add(low.astype("u1")),
        "high": numbers.add(high.astype("u1")),
        "weights": numbers.add(_steps(reads.weights.clamp(0, 1).sqrt())),
        "total": numbers.add(_steps(reads.total.clamp(0, 1).sqrt())),
    }


def _series(series: Series, numbers: Numbers) -> dict[str, Any]:
    low, high = series.values.min().item(), series.values.max().item()
    values = (series.values - low) / max(high - low, 1e-12)
    return {
        "name": series.name,
        "heads": series.heads,
        "start": series.start,
        "low": float(f"{low:.4g}"),
        "high": float(f"{high:.4g}"),
        "values": numbers.add(_steps(values)),
    }


def _steps(shares: Tensor) -> np.ndarray:
    return (shares * STEPS).round().numpy().astype("u1")
