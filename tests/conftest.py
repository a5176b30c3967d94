"""What all tests share."""

import numpy as np
import pytest
import torch
from hypothesis import settings

# Machines differ in speed, and no test may fail by the clock.
settings.register_profile("polyseg", deadline=None, max_examples=50)
settings.load_profile("polyseg")


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - for libraries that still read it
