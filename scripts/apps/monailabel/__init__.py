"""The MONAI Label application: the contexts are the annotations finished so far (docs/monailabel.md)."""
