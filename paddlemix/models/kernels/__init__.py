"""How a formula is computed on a device: functions with hand-written gradients, C for CPU, fused operators."""
