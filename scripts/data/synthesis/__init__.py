"""Seeds and label maps -> cohorts of made-up subjects.

In: a seed, perhaps a folder of label maps. Out: images and labels of a cohort's subjects, in memory or as a dataset.
"""
