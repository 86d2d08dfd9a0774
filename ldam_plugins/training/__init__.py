"""What a training loop of the hosts lacks."""
