"""Tools that know no config, no engine and no model; any other program may import them: see README.md beside."""
