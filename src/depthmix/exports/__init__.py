"""A finished run as other engines load it: one folder, without depthmix."""
