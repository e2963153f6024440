"""From a data set's name to batches of preference pairs."""
