"""Training: networks, data sets, losses and the trainer behind `flashcocos train`. Needs torch."""
