import os

import pytest
import torch
import transformers


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The tests run in several processes, and their models are too small for threads.
torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random state, whatever ran before it in its process."""
    torch.manual_seed(0)
