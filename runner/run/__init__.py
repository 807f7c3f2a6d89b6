"""One run: built, trained, evaluated and exported."""
