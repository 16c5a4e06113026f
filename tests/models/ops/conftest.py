"""What the tests of deformable attention share."""

import pytest

from tests.models.ops.cuda_cases import emulated_kernels
from tests.models.ops.emulated import Emulated, build


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    """The CUDA side of the operator on a device that is not one; needs g++."""
    return build(tmp_path_factory.mktemp("emulated"), emulated_kernels())
