"""Raw files of any layout -> an nnU-Net dataset.

Comes in: folders of NIfTI, DICOM, BIDS or the Decathlon. Goes out: a checked dataset folder. May use: the rest of
data, runtime.
"""
