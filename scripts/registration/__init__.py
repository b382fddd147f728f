"""Bringing contexts to a target.

In: a target and K context images, each a ``MetaTensor`` (1, H, W, D) with its affine (RAS, mm); images of any scale.
Out: an :class:`Alignment`, which warps images and soft masks of a context onto any grid, and weights for votes.
Knows no files and no network. May use: no other room.
"""

from scripts.registration.alignment import MODES, Alignment, align
from scripts.registration.votes import vote, vote_weights

__all__ = ["MODES", "Alignment", "align", "vote", "vote_weights"]
