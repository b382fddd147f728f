"""A BIDS App: a BIDS dataset in, a BIDS derivative with segmentations out.

BIDS Apps: Gorgolewski et al. 2017, PLOS Computational Biology 13(3):e1005209.
"""
