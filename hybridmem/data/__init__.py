"""Text as rows of tokens: from files, or streamed from the Hugging Face hub."""

from .corpora import Document, list_documents, standard_library_files
from .hub import HubDataModule
from .module import TextDataModule
from .order import EndlessSampler
from .packing import ContinuousRows, PackedRows
from .tokenizer import byte_tokenizer, load_tokenizer, token_byte_lengths
from .tokens import Corpus, tokenize

__all__ = [
    "ContinuousRows",
    "Corpus",
    "Document",
    "EndlessSampler",
    "HubDataModule",
    "PackedRows",
    "TextDataModule",
    "byte_tokenizer",
    "list_documents",
    "load_tokenizer",
    "standard_library_files",
    "token_byte_lengths",
    "tokenize",
]
