"""Memory of the GPU as torch's allocator takes it."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROGRAM = """
import torch
from lit_qlora.device import let_segments_grow
let_segments_grow()
torch.cuda.is_available()
kept = torch.empty(2**26, device="cuda")
print([segment["is_expandable"] for segment in torch.cuda.memory_snapshot()])
"""


@pytest.mark.parametrize(("users", "grow"), [({}, True), ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, False)])
def test_segments_grow_unless_the_user_has_settings_of_the_allocator(users: dict[str, str], grow: bool) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environment: dict[str, Any] = {name: value for name, value in os.environ.items() if name not in names} | users
    command = [sys.executable, "-c", PROGRAM]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.strip() == f"[{grow}]"
