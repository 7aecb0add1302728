"""Ground floor: one file per operation, each with its reference, its CPU path and its public op.

Nothing is imported here, so that `import kernels` costs nothing; this package never imports ftcore.
"""
