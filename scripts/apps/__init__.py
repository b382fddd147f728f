"""Applications around the bundle: each has its own requirements, and brings no mechanism of its own."""
