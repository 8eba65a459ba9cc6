import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is imported

torch.set_num_threads(1)  # the test tensors are tiny: threads cost more than they save
