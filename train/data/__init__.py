"""The data sets to train on; a module is imported when it is used, and only its own packages must be installed."""
