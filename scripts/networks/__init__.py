"""The in-context network.

In: a target and (image, label) pairs on one grid, as tensors. Out: the target's prediction.
May use: no other room.

``kernels`` -> ``blocks`` -> ``parts`` -> ``neuroverse3d`` is the method; ``execution`` decides whether the parts run as
they are or as in ``slabwise`` and ``winograd``, which only make predictions on a CPU cheaper.
"""

from scripts.networks.neuroverse3d import Neuroverse3D

__all__ = ["Neuroverse3D"]
