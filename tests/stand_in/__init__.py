"""A GPU for machines without one: torch's CUDA device in host memory, and NCCL over gloo, for that device alone.

`python -m tests.stand_in MODULE WORDS` runs a module as `python -m MODULE WORDS` would on a host of eight GPUs. What it
shows is where tensors are: one on the wrong device, or a collective of host tensors, fails as on a GPU. It shows
nothing of CUDA's own kernels, streams, speed or memory.
"""
