"""Files that are whole or not there, settings and JSON in files, and those that make a run."""
