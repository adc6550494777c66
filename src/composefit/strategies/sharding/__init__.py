"""The parts of `FullySharded`: what is sharded, and what becomes of its gradients and state."""
