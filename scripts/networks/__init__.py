"""The in-context network: a target and (image, label) pairs in, the target's prediction out.

``kernels`` -> ``blocks`` -> ``parts`` -> ``neuroverse3d`` is the method; ``execution`` decides whether the parts run as
they are or as in ``slabwise`` and ``winograd``, which only make predictions on a CPU cheaper. Uses no other room.
"""

from scripts.networks.neuroverse3d import Neuroverse3D

__all__ = ["Neuroverse3D"]
