"""What any program needs: options and command lines, files that are whole, locks, processes, memory, manifests.

Comes in: paths, values, signals. Goes out: the same, checked, recorded and put in place. May use: no other room but
the network's channel counts, by which memory is planned.
"""
