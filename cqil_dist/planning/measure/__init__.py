"""What every kind of planning stands on: the model in groups, its text, and how far plans are."""
