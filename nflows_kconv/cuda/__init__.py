"""The CUDA implementation of the primitive: kernels compiled when they are first needed, for the problem at hand.

plan                  what a problem, a kernel, a launch and a plan are
planning              from a problem to its plan: which kernels run it; the other planning modules are its parts
compiler, cache       from a kernel to code for a GPU, once for all processes
driver, runtime       from a plan to functions loaded on a device, once in a process
native_launcher, python_launcher   from a call of an operator to launches
operators             registers all this with torch
"""
