"""Seeds and label maps -> cohorts of made-up subjects.

Comes in: a seed, perhaps a folder of label maps. Goes out: images and labels of a cohort's subjects, in memory or as a
dataset. May use: the rest of data, runtime.
"""
