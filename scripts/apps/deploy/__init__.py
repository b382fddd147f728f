"""MONAI Deploy application: a DICOM series in, a DICOM segmentation out, by the contexts packaged with the weights.

For research use only. Not a medical device.
"""
