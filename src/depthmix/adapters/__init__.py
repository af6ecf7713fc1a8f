"""How a mixture comes onto a model: as a PEFT method or without, from disk, in trainers."""
