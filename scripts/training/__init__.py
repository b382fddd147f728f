"""Episodes -> weights: the run's folder, engines, handlers.

Comes in: a dataset of groups, a network, an optimiser. Goes out: a run folder with weights, metrics and pictures.
May use: networks, data, reporting (pictures), runtime.
"""
