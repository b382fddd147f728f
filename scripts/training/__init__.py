"""Episodes -> weights: the run's folder, engines, handlers.

In: a dataset of groups, a network, an optimiser. Out: a run folder with weights, metrics and pictures.
:mod:`scripts.losses` is this room's door.
May use: checkpoint, data, networks, reporting, runtime.
"""
