"""Data modules for text from files, text streamed from the Hugging Face hub, and tasks with verifiable answers."""

from hybridmem.rl.rollouts.prompts import Prompt

from .corpora import Document, list_documents, standard_library_files
from .hub import HubDataModule
from .mixed_module import MixedDataModule
from .order import EndlessSampler
from .packing import ContinuousRows, PackedRows
from .task_module import TaskDataModule
from .text_module import TextDataModule
from .tokenizer import byte_tokenizer, load_tokenizer, token_byte_lengths
from .tokens import Corpus, tokenize
from .vision import load_processor

__all__ = [
    "ContinuousRows",
    "Corpus",
    "Document",
    "EndlessSampler",
    "HubDataModule",
    "MixedDataModule",
    "PackedRows",
    "Prompt",
    "TaskDataModule",
    "TextDataModule",
    "byte_tokenizer",
    "list_documents",
    "load_processor",
    "load_tokenizer",
    "standard_library_files",
    "token_byte_lengths",
    "tokenize",
]
