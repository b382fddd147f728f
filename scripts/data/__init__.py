"""Files -> cases -> groups; nothing here knows about the network.

In: dataset folders, raw files (``conversion``), or seeds (``synthesis``). Out: preprocessed cases, groups of them for
training, and predictions brought back to a scan's own voxels.
May use: registration, runtime.
"""

from scripts.data.aligned_members import AlignedMembers
from scripts.data.augmentation import GroupAugmentation
from scripts.data.collection import Collection
from scripts.data.episodes import EpisodeDataset, GroupSampler, collate_groups
from scripts.data.nnunet import DatasetError, find_datasets, find_targets
from scripts.data.prepared import PreparedCases
from scripts.data.preprocessing import Preprocessing
from scripts.data.synthesis.cohort_source import SyntheticCohorts

__all__ = [
    "AlignedMembers",
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
