"""Context set and scan -> prediction on the scan's own voxels.

Comes in: a network, context pairs, a scan. Goes out: a :class:`~scripts.inference.target.Target` with all that was
found, and the run's files. May use: networks, data, registration, reporting, runtime.
"""
