"""The hosts: the only modules that import them."""
