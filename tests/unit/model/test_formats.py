"""Weight formats: what a matrix written in blocks stands for, its bytes, and who refuses it."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import CPU, TinyModelFactory

from cqil_dist.errors import CheckpointError
from cqil_dist.model.formats import weight_format
from cqil_dist.model.precision import Precision
from cqil_dist.model.torch_backend import TorchBackend


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("outputs", "inputs"), [(7, 5), (5, 7)])
def test_a_matrix_written_in_blocks_is_the_matrix_in_its_format(
    outputs: int, inputs: int, name: str
) -> None:
    """Wide matrices and tall ones lie in memory in different orders."""
    chosen = weight_format(name)
    weight_OI = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    matrix = chosen.empty(outputs, inputs, CPU)
    matrix.write(weight_OI[:3, :2])
    matrix.write(weight_OI[3:, :2], first_output=3)
    matrix.write(weight_OI[:, 2:], first_input=2)
    assert torch.equal(matrix.dequantised(), weight_OI.to(getattr(torch, name)).float())
    assert matrix.nbytes == chosen.nbytes(outputs, inputs)


def test_numbers_that_torch_would_have_to_convert_are_refused(
    tiny_model: TinyModelFactory,
) -> None:
    model = tiny_model()
    mixed = Precision(compute="float32", weights="bfloat16", kv="float32", wire="float32")
    with pytest.raises(CheckpointError, match="convert nothing between bfloat16, float32"):
        TorchBackend(model.config, model.checkpoint, mixed, CPU)
    with pytest.raises(CheckpointError, match="weight format 'int3' is not one of float32"):
        weight_format("int3")
