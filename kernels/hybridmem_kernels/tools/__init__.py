"""Command-line tools for the Triton kernels: ahead-of-time builds, GPU checks, timings and cost estimates.

    python -m hybridmem_kernels.tools.aot          # build every kernel and compare its resources with resources.json
    python -m hybridmem_kernels.tools.gpu_check    # check and time the operators on a GPU
    python -m hybridmem_kernels.tools.roofline     # estimate the operators' cost on GPUs

No operator imports from this package.
"""
