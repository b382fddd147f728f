"""The in-context network; nothing here knows about files."""

from scripts.networks.neuroverse3d import Neuroverse3D

__all__ = ["Neuroverse3D"]
