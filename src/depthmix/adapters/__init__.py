"""How a mixture comes onto a model: as a PEFT method or without, from disk.

PEFT knows the method as soon as anything of this room is imported.
"""

from depthmix.adapters.model import register

register()
