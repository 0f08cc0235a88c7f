"""From a file of examples to batches of token ids: sources, then samples, then batches."""

from lit_qlora.data.batches import Batch, Step, collate, count_steps, steps, validation_batches
from lit_qlora.data.samples import DataReport, Sample, encode_examples
from lit_qlora.data.sources import Example, find_files, read_examples

__all__ = [
    "Batch",
    "DataReport",
    "Example",
    "Sample",
    "Step",
    "collate",
    "count_steps",
    "encode_examples",
    "find_files",
    "read_examples",
    "steps",
    "validation_batches",
]
