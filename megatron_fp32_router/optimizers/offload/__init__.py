"""CPU offload: HybridDeviceOptimizer."""
