"""torchvision, to compare with where it is installed."""

import warnings

import pytest


@pytest.fixture(scope="session")
def torchvision():
    """torchvision.transforms; skips the test where it cannot be imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from torchvision import transforms
        except (ImportError, RuntimeError) as error:  # RuntimeError: made for another build of torch.
            pytest.skip(f"torchvision cannot be imported: {error}")
    return transforms
