"""Options from files, command lines and Python: read, checked, and without their secrets."""
