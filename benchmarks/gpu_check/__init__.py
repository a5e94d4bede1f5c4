"""`make gpu-check`: what only a GPU can tell, in one command for the day when one is at hand; smaller on a processor.

__main__    asks for one part after the other, each within its time, and writes what was found; needs Python alone
wheels      packages that such a machine may lack, fetched beforehand by `make gpu-wheels`
worker      the process that does the parts; one that hangs or dies is replaced, and the next part begins
place       where it is measured, and the models: random weights of real shapes, nothing is downloaded
parts       what is measured inside the process: probes, kernels, waits, vectors beside the processor's
speed       tokens per second with capture and without, a long document
commands    what is done by the command line: runs and their digests, memory that runs out, writing, tests
"""
