"""Product search with graded judgements, such as ESCI: the policy rewrites a shopper's query.

examples   {"query": "usb c hub", "product_id": "B01", "esci_label": "E", "split": "train"}   one judgement per line
products   {"product_id": "B01", "product_title": "7-in-1 USB-C hub", …}                      one product per line
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridmem.checks import at_least, between_0_and_1
from hybridmem.rl.rewards.ranking import RankingReward, write_answer
from hybridmem.rl.rewards.retrievers import BM25, read_jsonl

from .query import split_texts
from .task import Split, example_generator

GAINS = {"E": 1.0, "S": 0.1, "C": 0.01, "I": 0.0}  # exact, substitute, complement, irrelevant, as in ESCI's own NDCG
SPLIT_OF = {"train": "train", "test": "val", "val": "val"}
PROMPT = """Rewrite a shopper's query so that a keyword search finds the products that match it.
Think first, then give the new query: <think>…</think><answer>{{"query": "…"}}</answer>

Query: {query}
"""


class ProductSearch:
    """Queries with graded products; the response is a better query, rewarded by the NDCG@k of BM25's results.

    The judgements' column `split` divides the queries; without it, a fraction is held out. The answer is the original
    query, from which a model can learn the format.

    Needs bm25s (`pip install hybridmem[rank]`).

    Args:
        examples: a JSONL file of judgements, with the columns query, product_id, esci_label and optionally split.
        products: a JSONL file of all searchable products, with the column product_id.
        text_columns: the products' columns with searchable text.
        k: the cutoff of NDCG, in products.
        gains: the relevance of each label; {E: 1, S: 0, C: 0, I: 0} is the binary gain of Rec-R1.
        think: True if a response must contain <think>…</think> before its answer.
        prompt: a format string with {query}; double other braces.
        max_completion_length: the maximum number of tokens in a response.
        val_fraction: the fraction of queries to hold out if the judgements have no split.
        seed: seeds the split and all examples.

    Raises:
        ImportError: bm25s is not installed.
        FileNotFoundError, ValueError: A file or a setting is invalid; the message contains the line or the setting.
    """

    def __init__(
        self,
        examples: str,
        products: str,
        text_columns: Sequence[str] = ("product_title", "product_description", "product_bullet_point"),
        k: int = 100,
        gains: Mapping[str, float] = GAINS,
        think: bool = True,
        prompt: str = PROMPT,
        max_completion_length: int = 512,
        val_fraction: float = 0.1,
        seed: int = 0,
    ):
        at_least(1, k=k, max_completion_length=max_completion_length)
        at_least(0, seed=seed)
        if "{query}" not in prompt:
            raise ValueError(f"prompt={prompt!r} must contain {{query}}, the place of the query")
        between_0_and_1(val_fraction=val_fraction)
        for name, file in (("examples", examples), ("products", products)):
            if not Path(file).is_file():
                raise FileNotFoundError(f"{name}={file!r} does not exist or is not a file; set it to a JSONL file")
        self.prompt, self.think, self.seed = prompt, think, seed
        self._max_completion_length = max_completion_length
        self.judged, splits = read_judgements(examples, gains)
        self.queries = splits or split_texts(sorted(self.judged), val_fraction, seed)
        retriever = BM25(products, id_column="product_id", text_columns=text_columns)
        found = {product for judged in self.judged.values() for product in judged} & set(retriever.ids)
        if not found:
            raise ValueError(
                f"products={products!r} contains none of the products judged in examples={examples!r}; check that the "
                "files belong together"
            )
        self.ranking = RankingReward("ndcg", k, retriever, think)

    def example(self, split: Split, index: int) -> dict[str, Any]:
        """Return {"prompt", "answer", "relevance" by product}."""
        rng = example_generator(self.seed, split, index)
        query = self.queries[split][rng.integers(len(self.queries[split]))]
        return {
            "prompt": self.prompt.format(query=query),
            "answer": write_answer(query, "" if self.think else None),
            "relevance": self.judged[query],
        }

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """Return Rec-R1's reward: 0.1 + NDCG@k, 0 for queries that find nothing relevant, −2 if malformed."""
        rewards: Any = self.ranking(completions, **columns)
        return rewards

    @property
    def max_completion_length(self) -> int:
        """Return the maximum number of tokens in a response."""
        return self._max_completion_length


def read_judgements(
    path: str, gains: Mapping[str, float]
) -> tuple[dict[str, dict[str, float]], dict[Split, list[str]] | None]:
    """Read the gain of each judged product by query, and the queries of each split (None if no line has a split).

    Queries whose products all have gain 0 are dropped, because every ranking would score the same.

    Raises:
        FileNotFoundError, ValueError: The file has no usable query, or a line lacks a column or has an unknown label.
    """
    judged: dict[str, dict[str, float]] = {}
    split_of: dict[str, Split] = {}
    for name, record in read_jsonl(path):
        missing = {"query", "product_id", "esci_label"} - set(record)
        if missing:
            raise ValueError(f"{name} lacks {', '.join(sorted(missing))}; it has {', '.join(sorted(record))}")
        if record["esci_label"] not in gains:
            raise ValueError(f"{name} has esci_label={record['esci_label']!r}, but gains has {', '.join(gains)}")
        query = record["query"]
        judged.setdefault(query, {})[str(record["product_id"])] = gains[record["esci_label"]]
        if "split" in record:
            if record["split"] not in SPLIT_OF:
                raise ValueError(f"{name} has split={record['split']!r}; it must be one of {', '.join(SPLIT_OF)}")
            split_of[query] = SPLIT_OF[record["split"]]  # type: ignore[assignment]
    judged = {query: products for query, products in judged.items() if any(gain > 0 for gain in products.values())}
    if not judged:
        raise ValueError(f"examples={path!r} has no query with a product of gain above 0; check its labels and gains")
    if not split_of:
        return judged, None
    splits: dict[Split, list[str]] = {
        split: sorted(query for query in judged if split_of.get(query) == split) for split in ("train", "val")
    }
    empty = [split for split, queries in splits.items() if not queries]
    if empty:
        raise ValueError(
            f"examples={path!r} has no usable query in split {empty[0]}; add some, or remove the column split"
        )
    return judged, splits
