"""What a network counts and measures of itself: names, meters, and how it is told to Prometheus."""
