"""Speed of models, kernels and memory: python -m runtime.bench --help"""
