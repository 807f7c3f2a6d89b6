"""Untrusted configs: what they may name, where modules are imported from, and signatures of the user's own runs."""
