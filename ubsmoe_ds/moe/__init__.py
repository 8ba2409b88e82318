"""The UB-SMoE layer: gate, experts, and the pseudo-gradient of experts that were not activated."""
