"""Files -> cases -> groups; nothing here knows about the network."""

from scripts.data.collection import Collection, PreparedCases
from scripts.data.episodes import EpisodeDataset, GroupSampler
from scripts.data.nnunet import DatasetError, find_datasets, find_targets
from scripts.data.preprocessing import Preprocessing

__all__ = [
    "Collection",
    "DatasetError",
    "EpisodeDataset",
    "GroupSampler",
    "Preprocessing",
    "PreparedCases",
    "find_datasets",
    "find_targets",
]
