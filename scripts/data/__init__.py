"""Files -> cases -> groups; nothing here knows about the network."""

from scripts.data.augmentation import GroupAugmentation
from scripts.data.collection import Collection
from scripts.data.episodes import EpisodeDataset, GroupSampler, collate_groups
from scripts.data.nnunet import DatasetError, find_datasets, find_targets
from scripts.data.prepared import PreparedCases
from scripts.data.preprocessing import Preprocessing
from scripts.data.synthesis.cohort_source import SyntheticCohorts

__all__ = [
    "Collection",
    "DatasetError",
    "EpisodeDataset",
    "GroupAugmentation",
    "GroupSampler",
    "PreparedCases",
    "Preprocessing",
    "SyntheticCohorts",
    "collate_groups",
    "find_datasets",
    "find_targets",
]
