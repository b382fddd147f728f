"""Neuroverse3D as a MONAI Bundle."""
