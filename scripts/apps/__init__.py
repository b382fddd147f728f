"""Applications around the bundle: each has its own requirements, and brings no mechanism of its own.

In: a server's or a packaged application's requests. Out: its answers, from ``inference.json``.
May use: checkpoint, data, inference, runtime.
"""
