"""`azu bench`: how fast azu is on this machine, beside others in the same run."""
