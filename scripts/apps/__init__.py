"""Applications around the bundle: each has its own requirements, and brings no mechanism of its own.

In: a server's or a packaged application's requests. Out: predictions, from ``inference.json``.
May use: checkpoint, data, inference, reporting, runtime.
"""
