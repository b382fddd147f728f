"""Context set and scan -> prediction on the scan's own voxels.

In: a network, context pairs, a scan. Out: a :class:`~scripts.inference.target.Target` with all that was found, and the
run's files. :mod:`scripts.inferer` is this room's door.
May use: checkpoint, data, networks, registration, reporting, runtime.
"""
