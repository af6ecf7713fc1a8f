"""Files that are whole or not there, JSON in files, and the files by which a run is known."""
