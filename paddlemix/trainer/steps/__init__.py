"""What happens to a step after its losses: they are told to all processes, checked, its gradients clipped and used."""
