"""The compile report: what the compiler makes of every kernel we ship, for GPUs that this machine need not have.

    targets.py      the GPUs: their limits and rates
    launches.py     the public calls whose kernels are compiled
    compiling.py    runs those calls on meta tensors and catches what they would have launched
    disassembly.py  machine code -> instructions, loops, tensor-core work
    rows.py         one row a kernel: resources, and a first-order model of each main loop
    baseline.py     what fails a build
    sweep.py        other tile sizes for one kernel
    __main__.py     the command

The README one folder up says how to read it.
"""
