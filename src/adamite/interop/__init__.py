"""To and from other programs: the optimizers of torch, and weights as safetensors files.

    names            what an array is called there, and how its axes lie
    settings         what torch steps a group of parameters with
    state_dicts      what a state dict of torch's looks like
    arguments        what a transformation says of each parameter that torch says, too
    comparison       where the two differ
    torch_recipes    what a torch optimizer does, as a transformation
    rule_states      the states of Adam in the state of an optimizer
    torch_in, _out   state dicts to states, and back
    files            safetensors files: looked at before they are read, replaced in one piece
    torch_files      state dicts as such files
    safetensors      weights as such files

Torch is never imported and nothing is ever unpickled. Files need the package safetensors, all else only JAX.
"""

from adamite.interop.names import flax_names
from adamite.interop.safetensors import load_weights, save_weights
from adamite.interop.torch_files import read_torch, write_torch
from adamite.interop.torch_in import from_torch
from adamite.interop.torch_out import to_torch
from adamite.interop.torch_recipes import torch_optimizer

__all__ = [
    "flax_names",
    "from_torch",
    "load_weights",
    "read_torch",
    "save_weights",
    "to_torch",
    "torch_optimizer",
    "write_torch",
]
