"""Command-line tools around the Triton kernels: builds ahead of time, checks on a GPU, timings and cost estimates.

    python -m hybridmem_kernels.tools.aot          # build every kernel and compare its resources with resources.json
    python -m hybridmem_kernels.tools.gpu_check    # check and time the operators on a GPU
    python -m hybridmem_kernels.tools.roofline     # estimate their cost on GPUs

No operator imports from here.
"""
