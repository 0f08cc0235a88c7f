"""Make batches of token ids from files of examples.

sources (locations) -> formats, examples (conversations) -> encode (ids, masks, cuts) -> cache.
Then cache -> audit, load (the data of a run) -> packing, batches (the data of a step).
"""

from lit_qlora.data.audit import Audit, boundary, show
from lit_qlora.data.batches import Batch, Batching, Step, collate, count_steps, longest_step, steps, validation_batches
from lit_qlora.data.encode import Encoder, Encoding
from lit_qlora.data.examples import Example, read_examples
from lit_qlora.data.load import RunData, read_data
from lit_qlora.data.samples import Sample, Samples

__all__ = [
    "Audit",
    "Batch",
    "Batching",
    "Encoder",
    "Encoding",
    "Example",
    "RunData",
    "Sample",
    "Samples",
    "Step",
    "boundary",
    "collate",
    "count_steps",
    "longest_step",
    "read_data",
    "read_examples",
    "show",
    "steps",
    "validation_batches",
]
