"""One module for each layout that data sets come in."""
