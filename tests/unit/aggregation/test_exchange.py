"""Merge rules, DMR's server step and who owns what: by hand."""
