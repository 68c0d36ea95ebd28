"""How much memory a transformation takes, exactly and before anything is allocated."""

from optax_structured.memory.formulas import METHODS, Widths, published_bytes, published_numbers
from optax_structured.memory.llama import LLAMA_MODELS, PLAIN_LEAVES, llama
from optax_structured.memory.report import (
    LeafMemory,
    MemoryReport,
    abstract_state,
    memory_report,
    state_bytes,
)

__all__ = [
    "LLAMA_MODELS",
    "METHODS",
    "PLAIN_LEAVES",
    "LeafMemory",
    "MemoryReport",
    "Widths",
    "abstract_state",
    "llama",
    "memory_report",
    "published_bytes",
    "published_numbers",
    "state_bytes",
]
