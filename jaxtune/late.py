"""jax and NumPy, imported when something of them is first used.

A file that holds a section of the configuration and the code that it configures takes them from here, so that reading a
configuration imports neither: ``from jaxtune.late import jax, jnp``. Its annotations need ``Array`` and the like for
those who check types alone::

    if TYPE_CHECKING or TYPES:
        from jaxtyping import Array, Float
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

TYPES = "jax" in sys.modules
"""Whether annotations may name arrays at no cost: what checks types at run time has imported jax before."""

if TYPE_CHECKING:
    import jax as jax
    import jax.numpy as jnp
    import numpy as np
else:

    class Late:
        """Stands for a module that is not imported yet."""

        def __init__(self, name: str):
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self._name), attribute)

    jax, jnp, np = Late("jax"), Late("jax.numpy"), Late("numpy")

__all__ = ["TYPES", "jax", "jnp", "np"]
