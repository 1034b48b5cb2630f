"""Models by id: where they come from, what they cost to hold, whether they are cut."""
