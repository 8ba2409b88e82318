"""What happens between clients: exchange of deltas, merge rules, DMR's server step, the rounds."""
