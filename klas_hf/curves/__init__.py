"""Quality over cost: the trade-off curve, and two-model cascades beside it."""
