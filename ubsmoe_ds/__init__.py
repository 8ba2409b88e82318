"""UB-SMoE (arXiv 2605.16690) as a DeepSpeed-MoE training backend: federated clients of unequal compute."""

__version__ = "0.1.0"
