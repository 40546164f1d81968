"""What a run writes down about itself: callbacks that listen and decide nothing."""
