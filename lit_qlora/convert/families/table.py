"""The families: a row for each Hugging Face `model_type`."""

from lit_qlora.convert.families import (
    conv_rows,
    delta_rows,
    expert_rows,
    gemma4_rows,
    layer_norm_rows,
    llama4_rows,
    rms_rows,
    routed_rows,
    space_rows,
)
from lit_qlora.convert.families.read import Family

VERIFIED_WITH = ("5.23", "5.24")
"""The versions of transformers that tests/convert/test_families.py held every row against."""

FAMILIES: dict[str, Family] = {
    **rms_rows.ROWS,
    **layer_norm_rows.ROWS,
    **routed_rows.ROWS,
    **expert_rows.ROWS,
    **delta_rows.ROWS,
    **gemma4_rows.ROWS,
    **conv_rows.ROWS,
    **llama4_rows.ROWS,
    **space_rows.ROWS,
}
"""model_type -> its row."""
