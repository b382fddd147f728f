"""What any program needs: options and command lines, files that are whole, locks, processes, memory, manifests.

In: paths, values, signals. Out: the same, checked, recorded and put in place.
May use: no other room.
"""
