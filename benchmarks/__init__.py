"""What the project's claims about speed and memory rest on: `make bench`, or `python -m benchmarks`.

Machines differ and are noisy, so every figure is a ratio within one process, or between runs that
alternate, and the median of several repeats. Small overheads are measured as time inside the capture
code over the forward pass of the same run, since two loops timed apart differ by more than that.
"""
