"""Hugging Face checkpoints turned into models with UB-SMoE layers."""
