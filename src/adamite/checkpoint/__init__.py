"""Checkpoints that are whole, and whose they say they are: written with Orbax, checked on the way back.

Needs the extra ``checkpoint``, which is orbax-checkpoint: `import adamite` alone does not.
"""

from adamite.checks import RefusedError, needed

with needed("adamite.checkpoint", "orbax-checkpoint"):
    from adamite.checkpoint.manifest import Manifest
    from adamite.checkpoint.saving import Checkpoint, manager, read_manifest, restore, save

__all__ = ["Checkpoint", "Manifest", "RefusedError", "manager", "read_manifest", "restore", "save"]
