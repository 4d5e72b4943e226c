"""The operator library `torch.ops.rmtkernels`.

Schemas and fake kernels are declared in Python, so that every operator exists and traces where no binary was built;
the compiled libraries register implementations only.
"""

import torch

LIBRARY = torch.library.Library("rmtkernels", "DEF")


def define(schema: str) -> None:
    """Declares one operator, `name(arguments) -> results`."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
