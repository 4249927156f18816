"""Standing in front of an attention kernel, for single modules and for a while.

Transformers looks the kernel up by name in a public registry, through ``module.config``. A module gets its own shallow
copy of the config with the name of a function of ours, which does its work and runs the kernel that was there;
putting the original config back undoes it. No function is patched and nothing stays on the module.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def put_in_front(module: nn.Module, prefix: str, forward: Callable[..., Any]) -> Any:
    """Let the attention calls of ``module`` go to ``forward``.

    Args:
        module: looks its kernel up in transformers' registry.
        prefix: of the names under which ``forward`` is registered, one for each kernel that it stands in front of.
        forward: called as the kernel is, ``(module, query, key, value, attention_mask, **options)``, with the
            kernel's name as a first argument; ``run_kernel`` takes the same.

    Returns:
        The config that the module had; giving it back undoes this.
    """
    config: Any = module.config
    base = config._attn_implementation
    if prefix + base not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(prefix + base, partial(forward, base))
    own = copy.copy(config)
    own._attn_implementation_internal = prefix + base
    module.config = own
    return config


def run_kernel(name: str, module: nn.Module, *inputs: Any, **options: Any) -> Any:
    """Run the kernel of that name, as ``module`` would."""
    if name == "eager":  # every modelling file has its own
        return sys.modules[type(module).__module__].eager_attention_forward(module, *inputs, **options)
    return ALL_ATTENTION_FUNCTIONS[name](module, *inputs, **options)
