"""Untrusted configs: the allow-list, the import path, and the signatures of a user's own runs."""
