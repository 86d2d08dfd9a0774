"""What a person looks at after a run: tables by class, plots, a page."""
