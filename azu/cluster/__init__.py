"""The life of a job, from its reservation to its receipt, over ports."""
