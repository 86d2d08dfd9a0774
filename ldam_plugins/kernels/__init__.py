"""Fast forms of an operation, with the same values; one function of each picks the form."""
