"""Raw files of any layout -> an nnU-Net dataset.

In: folders of NIfTI, DICOM, BIDS or the Decathlon. Out: a checked dataset folder.
"""
