"""What each release left on disk, which later ones read."""
