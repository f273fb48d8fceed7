"""How a configuration declares hyper-parameters: default, meaning, range, and whether a sweep may trace them.

`hyper(default, help, least=..., traced=...)` is a field of a `ModelConfig`, under the name of the hyper-parameter in
the reference code, see `mgrad_jax.declaration.setting`. One declared `traced` the model holds as a
`TracedHyperParameter` of the same name, so that one compiled program serves a whole sweep of its values; what decides
shapes or the structure of the program cannot be.
"""

from mgrad_jax.declaration import Range, check
from mgrad_jax.declaration import setting as hyper

__all__ = ["MOST_LAYERS", "Range", "check", "hyper"]
MOST_LAYERS = 100  # a limit: each is written out in the program
